//! `edit`: a domain's definition in an editor. The edited text is stored or kept in a file, never lost.

use std::{
    env, fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::atomic::Ordering,
};

use clap::Args;
use roxmltree::{Document, ParsingOptions};
use tempfile::NamedTempFile;
use tokio::task;
use xman_client::{Caller, Kind};
use xman_common::protocol::{Define, Describe, MAX_XML, Request, Verb};

use crate::{
    ask,
    change::{change, rehearse},
    exit::{FAILED, Tally},
    heard::conclude,
    messages::text,
    setting::{Setting, Stop},
    target::{self, Purpose, Target},
    terminal::EDITOR_RUNS,
    told::Told,
};

/// What `rxm help edit` says after the options.
pub(crate) const HELP: &str = "\
VISUAL, EDITOR or vi opens the definition. What cannot be stored is offered again, and never lost. \
    A running domain takes the change over when it is started next.

Examples:
  rxm edit skirit80/web
  EDITOR=nano rxm edit skirit80/web";

/// Arguments of `edit`.
#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
}

/// More than any editor adds to what can be sent, in bytes.
const MAX_EDITED: u64 = 16 * MAX_XML as u64;

/// `rxm edit`
pub(crate) async fn edit(setting: &Setting, args: EditArgs) -> Result<Tally, Stop> {
    let (target, mut caller, found) =
        target::find_one(setting, &args.domain, Purpose::Change).await?;
    if setting.dry_run {
        return rehearse(setting, (Verb::Define, None), vec![target], &found.silent).await;
    }
    let about = Describe {
        domain: target.domain.clone(),
        inactive: true,
    };
    let original = match text(setting, &mut caller, &Request::DescribeSecrets(about)).await {
        Ok(xml) => xml,
        Err(error) => return Ok(conclude(setting, &[(target.address, Err::<(), _>(error))])),
    };
    let identity = match Identity::read(&original) {
        Ok(identity) => identity,
        Err(reason) => {
            return Err(Stop::Failed(
                Kind::Refused,
                format!(
                    "{}: what the host sent is no definition: {reason}",
                    target.label()
                ),
            ));
        }
    };
    let draft = Draft::new(&original)?;
    revise(setting, &mut caller, &target, &identity, draft).await
}

/// Edits until it is stored, discarded or kept.
async fn revise(
    setting: &Setting,
    caller: &mut Caller,
    target: &Target,
    identity: &Identity,
    mut draft: Draft,
) -> Result<Tally, Stop> {
    loop {
        let edited = match draft.edit().await {
            Ok(edited) => edited,
            Err(reason) => {
                settle(
                    setting,
                    draft.take_choice(setting, &reason).await?,
                    &mut draft,
                )?;
                continue;
            }
        };
        if edited == draft.original {
            setting
                .output
                .note(&format!("{}: nothing was changed", target.label()));
            return Ok(done());
        }
        let reason = match identity.check(&edited) {
            Err(reason) => reason,
            Ok(()) => {
                caller.rest();
                let request = Request::Define(Define {
                    xml: edited,
                    replaces: Some(draft.original.clone()),
                });
                match change(setting, caller, &request).await {
                    Ok(reply) => {
                        let mut told = Told::new(setting, Verb::Define, true);
                        told.success(
                            target,
                            "stored; a running domain takes it over when it is started next",
                            reply,
                        );
                        return told.finish();
                    }
                    Err(error) if error.kind == Kind::Interrupted => {
                        let kept = draft.keep()?;
                        setting
                            .output
                            .say(&format!("{}: {error}; {kept}", target.label()));
                        return Err(Stop::Code(crate::exit::INTERRUPTED));
                    }
                    Err(error) => error.to_string(),
                }
            }
        };
        settle(
            setting,
            draft
                .take_choice(setting, &format!("{}: {reason}", target.label()))
                .await?,
            &mut draft,
        )?;
    }
}

fn done() -> Tally {
    let mut tally = Tally::default();
    tally.done();
    tally
}

/// What to do with a text that cannot be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Again,
    Discard,
    Keep,
}

/// Goes on for another edit, or ends.
fn settle(setting: &Setting, choice: Choice, draft: &mut Draft) -> Result<(), Stop> {
    match choice {
        Choice::Again => Ok(()),
        Choice::Discard => {
            setting.output.say("nothing was stored");
            Err(Stop::Code(FAILED))
        }
        Choice::Keep => {
            setting.output.say(&draft.keep()?);
            Err(Stop::Code(FAILED))
        }
    }
}

/// The text being edited, in a file that only its owner can read: it may hold passwords.
struct Draft {
    file: Option<NamedTempFile>,
    path: PathBuf,
    /// What it was at first: that much need not be kept.
    original: String,
}

impl Draft {
    fn new(text: &str) -> Result<Self, Stop> {
        let written = tempfile::Builder::new()
            .prefix("rxm-edit-")
            .suffix(".xml")
            .tempfile()
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.flush()?;
                Ok(file)
            });
        let file = written.map_err(|error| {
            Stop::Failed(
                Kind::Refused,
                format!("a file to edit cannot be made: {error}"),
            )
        })?;
        let path = file.path().to_owned();
        Ok(Self {
            file: Some(file),
            path,
            original: text.to_owned(),
        })
    }

    /// Runs the editor and reads what it left.
    async fn edit(&self) -> Result<String, String> {
        let path = self.path.clone();
        let status = task::spawn_blocking(move || run_editor(&path)).await;
        match status {
            Ok(Ok(status)) if status.success() => read(&self.path),
            Ok(Ok(status)) => Err(format!("the editor failed ({status})")),
            Ok(Err(error)) => Err(format!("the editor cannot be run: {error}; set EDITOR")),
            Err(_) => Err("the editor cannot be run".to_owned()),
        }
    }

    /// Asks what to do with a text that cannot be stored; with nobody to ask it is kept.
    async fn take_choice(&mut self, setting: &Setting, reason: &str) -> Result<Choice, Stop> {
        setting.output.say(reason);
        if !ask::is_possible() {
            return Ok(Choice::Keep);
        }
        loop {
            match ask::ask(
                setting,
                "(e)dit again, (d)iscard, or (k)eep the text in a file?",
            )
            .await
            {
                Ok(answer) => match answer.as_str() {
                    "e" | "edit" => return Ok(Choice::Again),
                    "d" | "discard" => return Ok(Choice::Discard),
                    "k" | "keep" | "" => return Ok(Choice::Keep),
                    _ => {}
                },
                Err(stop) => {
                    setting.output.say(&self.keep()?);
                    return Err(stop);
                }
            }
        }
    }

    /// Leaves the file where it is, and says where.
    fn keep(&mut self) -> Result<String, Stop> {
        let shown = self.path.display().to_string();
        if read(&self.path).is_ok_and(|text| text == self.original) {
            return Ok("nothing was changed".to_owned());
        }
        match self.file.take().map(NamedTempFile::keep) {
            Some(Err(error)) => Err(Stop::Failed(
                Kind::Refused,
                format!("{shown} cannot be kept: {}", error.error),
            )),
            Some(Ok(_)) | None => Ok(format!(
                "your text is kept in {shown} (it may hold secrets); `rxm define` stores it"
            )),
        }
    }
}

/// As git and crontab do it: VISUAL, EDITOR or vi, each a command of the shell.
fn run_editor(path: &Path) -> io::Result<ExitStatus> {
    let named = |name| {
        env::var(name)
            .ok()
            .filter(|editor| !editor.trim().is_empty())
    };
    let editor = named("VISUAL")
        .or_else(|| named("EDITOR"))
        .unwrap_or_else(|| "vi".to_owned());
    EDITOR_RUNS.store(true, Ordering::Relaxed);
    let status = Command::new("sh")
        .arg("-c")
        .arg(format!("{editor} \"$1\""))
        .arg("rxm-edit")
        .arg(path)
        .status();
    EDITOR_RUNS.store(false, Ordering::Relaxed);
    status
}

fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read =
        fs::File::open(path).and_then(|file| file.take(MAX_EDITED).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() > MAX_XML => Err(format!(
            "the XML has {} bytes; one call carries at most {MAX_XML}",
            text.len()
        )),
        Ok(_) => Ok(text),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// What must stay the same.
#[derive(Debug, PartialEq)]
struct Identity {
    name: String,
    uuid: Option<String>,
}

impl Identity {
    fn read(xml: &str) -> Result<Self, String> {
        let options = ParsingOptions {
            nodes_limit: 100_000,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(xml, options)
            .map_err(|error| format!("it is not well-formed XML: {error}"))?;
        let root = document.root_element();
        if root.tag_name().name() != "domain" {
            return Err(format!(
                "its root is <{}>, not <domain>",
                root.tag_name().name()
            ));
        }
        let child = |tag: &str| {
            let node = root.children().find(|node| node.tag_name().name() == tag);
            node.and_then(|node| node.text())
                .map(|text| text.trim().to_owned())
        };
        let name = child("name")
            .filter(|name| !name.is_empty())
            .ok_or("it has no <name>")?;
        Ok(Self {
            name,
            uuid: child("uuid").map(|uuid| uuid.to_ascii_lowercase()),
        })
    }

    /// Refuses a text that would not redefine this domain, and says what it would do.
    fn check(&self, edited: &str) -> Result<(), String> {
        let Self { name, uuid } = Self::read(edited)?;
        match (name == self.name, uuid == self.uuid) {
            (true, true) => Ok(()),
            (false, true) => Err(format!(
                "the name was changed from '{}' to '{name}': that would rename the domain, which edit does not do; put '{}' back",
                self.name, self.name
            )),
            (true, false) => Err(format!(
                "the UUID was changed: that would define a second domain under the name '{name}'; put {} back",
                self.uuid.as_deref().unwrap_or("none")
            )),
            (false, false) => Err(format!(
                "name and UUID were changed: that would define another domain '{name}' beside '{}'; `rxm define` does that",
                self.name
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const XML: &str = "<domain type='test'><name>web</name><uuid>6695EB01-f6a4-8304-79aa-97f2502e193f</uuid></domain>";

    #[test]
    fn name_and_uuid_must_stay() {
        let identity = Identity::read(XML).unwrap();
        let check = |from: &str, to: &str| identity.check(&XML.replace(from, to));
        assert_eq!(check("type='test'", "type='kvm'"), Ok(()));
        assert_eq!(check("EB01", "eb01"), Ok(()));
        assert!(
            check("<name>web", "<name>wob")
                .unwrap_err()
                .contains("rename")
        );
        assert!(check("193f", "1930").unwrap_err().contains("second domain"));
        assert!(
            check("<uuid>6695EB01-f6a4-8304-79aa-97f2502e193f</uuid>", "")
                .unwrap_err()
                .contains("second domain")
        );
        assert!(
            check("web</name><uuid>6", "wob</name><uuid>7")
                .unwrap_err()
                .contains("beside")
        );
    }

    #[test]
    fn what_is_no_definition_is_refused_without_harm() {
        for (xml, word) in [
            ("", "well-formed"),
            ("no xml", "well-formed"),
            ("<network/>", "<network>"),
            ("<domain/>", "<name>"),
            ("<domain><name/></domain>", "<name>"),
            (
                "<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>",
                "well-formed",
            ),
        ] {
            let error = Identity::read(xml).unwrap_err();
            assert!(error.contains(word), "{xml}: {error}");
        }
        assert!(Identity::read(&"<a>".repeat(200_000)).is_err());
    }

    #[test]
    fn the_draft_is_readable_by_its_owner_only_and_can_be_kept() {
        let mut draft = match Draft::new(XML) {
            Ok(draft) => draft,
            Err(_) => panic!("no draft"),
        };
        let mode = fs::metadata(&draft.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(draft.keep(), Ok(said) if said == "nothing was changed"));
        fs::write(&draft.path, "edited").unwrap();
        assert!(draft.keep().is_ok());
        let path = draft.path.clone();
        drop(draft);
        assert_eq!(fs::read_to_string(&path).unwrap(), "edited");
        fs::remove_file(path).unwrap();
    }
}
