//! `describe` and `dmesg`: text of hosts.

use std::{
    cell::{Cell, RefCell},
    ops::ControlFlow,
};

use clap::Args;
use serde_json::json;
use uuid::Uuid;
use xman_client::{Address, Caller, Event, Explanation, Wait, fleet};
use xman_common::{
    name::DomainRef,
    protocol::{Describe, Dmesg, Item, Request},
};

use crate::{
    exit::Tally,
    heard::conclude,
    options::Format,
    output::{Unprinted, error_value},
    setting::{MAX_ANSWER, Setting, Stop, misfit, too_much},
    target::{self, Purpose, Target},
};

/// What `rxm help dmesg` says after the options.
pub(crate) const DMESG_HELP: &str = "\
Examples:
  rxm -H skirit80 dmesg
  rxm dmesg skirit80/web
  rxm -H skirit80 dmesg -f";

/// What `rxm help describe` says after the options.
pub(crate) const DESCRIBE_HELP: &str = "\
Examples:
  rxm describe skirit80/web
  rxm describe --inactive skirit80/web > web.xml
  rxm describe --secrets skirit80/web        with passwords, for whom may see them";

/// Arguments of `dmesg`.
#[derive(Debug, Args)]
pub(crate) struct DmesgArgs {
    /// NAME, UUID or HOST/NAME: its hypervisor log instead of the hypervisor's messages
    pub(crate) domain: Option<String>,
    /// Go on with what comes
    #[arg(short, long)]
    pub(crate) follow: bool,
}

/// Arguments of `describe`.
#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The definition rather than what runs
    #[arg(long)]
    pub(crate) inactive: bool,
    /// With passwords and other secrets
    #[arg(long)]
    pub(crate) secrets: bool,
}

/// A line that has no end is printed in pieces of this length, in bytes.
const LONGEST_LINE: usize = 64 * 1024;

/// `rxm describe`
pub(crate) async fn describe(setting: &Setting, args: DescribeArgs) -> Result<Tally, Stop> {
    let (target, mut caller, found) =
        target::find_one(setting, &args.domain, Purpose::Read).await?;
    let about = Describe {
        domain: target.domain.clone(),
        inactive: args.inactive,
    };
    let request = if args.secrets {
        Request::DescribeSecrets(about)
    } else {
        Request::Describe(about)
    };
    let answer = text(setting, &mut caller, &request).await;
    match (&answer, setting.output.format) {
        (Ok(xml), Format::Json | Format::Yaml) => setting.output.values(vec![json!({
            "host": target.address,
            "name": name(&target),
            "uuid": target.row.as_ref().map(|row| row.uuid),
            "xml": xml,
        })])?,
        (Err(error), Format::Json | Format::Yaml) => setting
            .output
            .values(vec![error_value(&target.address, error)])?,
        (Ok(_), Format::Name) => setting.output.line(&name(&target))?,
        (Ok(xml), Format::Table | Format::Wide) => {
            setting.output.text(xml)?;
            if !xml.ends_with('\n') {
                setting.output.raw("\n")?;
            }
        }
        (Err(_), _) => {}
    }
    let mut heard = vec![(target.address, answer)];
    heard.extend(
        found
            .silent
            .into_iter()
            .map(|(host, error)| (host, Err(error))),
    );
    Ok(conclude(setting, &heard))
}

fn name(target: &Target) -> String {
    target
        .row
        .as_ref()
        .map_or_else(|| target.domain.to_string(), |row| row.name.to_string())
}

/// Makes a call whose answer is text.
pub(crate) async fn text(
    setting: &Setting,
    caller: &mut Caller,
    request: &Request,
) -> Result<String, Explanation> {
    let (_, items) = setting.ask(caller, request).await?;
    let mut text = String::new();
    for item in items {
        let Item::Text(piece) = item else {
            return Err(misfit());
        };
        text.push_str(&piece);
    }
    Ok(text)
}

/// `rxm dmesg`
pub(crate) async fn dmesg(setting: &Setting, args: DmesgArgs) -> Result<Tally, Stop> {
    if args.follow && setting.output.is_structured() {
        return Err(Stop::Usage(
            "what is followed has no end and so is no JSON or YAML; leave -f or -o away".to_owned(),
        ));
    }
    let (sources, silent) = match &args.domain {
        Some(domain) => {
            let (target, caller, found) = target::find_one(setting, domain, Purpose::Read).await?;
            (vec![(caller, Some(target.domain))], found.silent)
        }
        None => {
            let hosts = setting.hosts()?;
            setting.check_ticket().await?;
            (
                hosts
                    .iter()
                    .map(|host| (setting.caller(host), None))
                    .collect(),
                Vec::new(),
            )
        }
    };
    let mut heard = if setting.output.is_structured() {
        gather(setting, sources).await?
    } else {
        stream(setting, sources, args.follow).await?
    };
    heard.extend(silent.into_iter().map(|(host, error)| (host, Err(error))));
    Ok(conclude(setting, &heard))
}

type Source = (Caller, Option<DomainRef>);
type Heard = (Address, Result<(), Explanation>);

async fn gather(setting: &Setting, sources: Vec<Source>) -> Result<Vec<Heard>, Stop> {
    let texts = fleet::all(sources, fleet::WIDTH, |(mut caller, domain)| async move {
        let request = Request::Dmesg(Dmesg {
            domain,
            follow: false,
        });
        let text = text(setting, &mut caller, &request).await;
        (caller.address().clone(), text)
    })
    .await;
    let value = |(address, text): &(Address, Result<String, Explanation>)| match text {
        Ok(text) => json!({ "host": address, "text": text }),
        Err(error) => error_value(address, error),
    };
    setting.output.values(texts.iter().map(value).collect())?;
    Ok(texts
        .into_iter()
        .map(|(address, text)| (address, text.map(drop)))
        .collect())
}

/// Prints what comes: of one host at once, of several host after host, and what is followed line by line with its host before it.
async fn stream(setting: &Setting, sources: Vec<Source>, follow: bool) -> Result<Vec<Heard>, Stop> {
    let is_alone = sources.len() == 1;
    let at_once = is_alone || follow;
    let unprinted: RefCell<Option<Unprinted>> = RefCell::new(None);
    let unprinted = &unprinted;
    let mut heard = Vec::new();
    // Whoever follows many hosts follows them all at the same time.
    let width = if follow { sources.len() } else { fleet::WIDTH };
    fleet::each(
        sources,
        width,
        |(mut caller, domain)| async move {
            let prefix = if is_alone {
                String::new()
            } else {
                format!("{}: ", caller.address())
            };
            let lines = Lines::new(prefix);
            let request = Request::Dmesg(Dmesg { domain, follow });
            let outcome = read(setting, &mut caller, &request, follow, |text| {
                lines.take(text);
                if !at_once {
                    return if lines.waiting() > MAX_ANSWER {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    };
                }
                match setting.output.text(&lines.complete()) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        unprinted.borrow_mut().get_or_insert(error);
                        ControlFlow::Break(())
                    }
                }
            })
            .await;
            let outcome = if lines.waiting() > MAX_ANSWER {
                Err(too_much())
            } else {
                outcome
            };
            (caller.address().clone(), outcome, lines.rest())
        },
        |(address, outcome, rest)| {
            if unprinted.borrow().is_none()
                && let Err(error) = setting.output.text(&rest)
            {
                *unprinted.borrow_mut() = Some(error);
            }
            heard.push((address, outcome));
            if unprinted.borrow().is_some() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )
    .await;
    match unprinted.borrow_mut().take() {
        Some(error) => Err(error.into()),
        None => Ok(heard),
    }
}

async fn read(
    setting: &Setting,
    caller: &mut Caller,
    request: &Request,
    follow: bool,
    mut take: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<(), Explanation> {
    let wait = if follow { Wait::Follow } else { Wait::Deadline };
    let address = caller.address().clone();
    let fits = Cell::new(true);
    let reply = caller
        .call(request, Uuid::new_v4(), wait, |event| match event {
            Event::Items(items) => {
                for item in items {
                    let Item::Text(text) = item else {
                        fits.set(false);
                        return ControlFlow::Break(());
                    };
                    if take(&text).is_break() {
                        return ControlFlow::Break(());
                    }
                }
                ControlFlow::Continue(())
            }
            Event::Again => {
                setting
                    .output
                    .note(&format!("{address}: asked again; messages may be repeated"));
                ControlFlow::Continue(())
            }
            Event::Expiring(seconds) => {
                setting.warn_of_expiry(seconds);
                ControlFlow::Continue(())
            }
            Event::Progress(_) | Event::Alive => ControlFlow::Continue(()),
        })
        .await;
    match reply {
        Ok(_) if fits.get() => Ok(()),
        Err(failure) if fits.get() => Err(setting.explain(&failure, &address)),
        Ok(_) | Err(_) => Err(misfit()),
    }
}

/// Text that comes in pieces, given out in lines with a prefix before each.
struct Lines {
    prefix: String,
    text: RefCell<String>,
    begins: Cell<bool>,
}

impl Lines {
    fn new(prefix: String) -> Self {
        Self {
            prefix,
            text: RefCell::new(String::new()),
            begins: Cell::new(true),
        }
    }

    fn take(&self, text: &str) {
        self.text.borrow_mut().push_str(text);
    }

    fn waiting(&self) -> usize {
        self.text.borrow().len()
    }

    /// Gives out the lines that are complete; without a prefix everything, since nothing can mix with it.
    fn complete(&self) -> String {
        let mut text = self.text.borrow_mut();
        let end = match text.rfind('\n') {
            _ if self.prefix.is_empty() || text.len() > LONGEST_LINE => text.len(),
            Some(newline) => newline + 1,
            None => 0,
        };
        let rest = text.split_off(end);
        let whole = std::mem::replace(&mut *text, rest);
        drop(text);
        self.prefixed(&whole)
    }

    /// Gives out what is left, and ends its last line.
    fn rest(&self) -> String {
        let text = self.text.take();
        let mut rest = self.prefixed(&text);
        if !self.begins.replace(true) {
            rest.push('\n');
        }
        rest
    }

    fn prefixed(&self, text: &str) -> String {
        let mut prefixed = String::with_capacity(text.len());
        for line in text.split_inclusive('\n') {
            if self.begins.get() {
                prefixed.push_str(&self.prefix);
            }
            prefixed.push_str(line);
            self.begins.set(line.ends_with('\n'));
        }
        prefixed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_become_lines_with_their_host_before_them() {
        let lines = Lines::new("a: ".to_owned());
        lines.take("one\ntw");
        assert_eq!(lines.complete(), "a: one\n");
        assert_eq!(lines.complete(), "");
        lines.take("o\nthree");
        assert_eq!(lines.complete(), "a: two\n");
        assert_eq!(lines.rest(), "a: three\n");
        assert_eq!(lines.rest(), "");
    }

    #[test]
    fn one_host_alone_is_printed_as_it_comes() {
        let lines = Lines::new(String::new());
        lines.take("one\ntw");
        assert_eq!(lines.complete(), "one\ntw");
        lines.take("o");
        assert_eq!(lines.rest(), "o\n");
    }

    #[test]
    fn a_line_without_end_is_given_out_in_pieces() {
        let lines = Lines::new("a: ".to_owned());
        lines.take(&"x".repeat(LONGEST_LINE + 1));
        assert_eq!(lines.complete().len(), LONGEST_LINE + 4);
        lines.take("y\n");
        assert_eq!(lines.complete(), "y\n");
    }
}
