//! What a word on a command line could become: domains, hosts, hypervisors and leases, for the functions that `rxm completion` writes for shells.
//!
//! ```text
//! the words typed --> which value is it? --> the configuration, or the hosts --> one candidate a line
//! ```
//! Whoever presses the tab key has asked nothing: whatever is wrong (no ticket, no host, no time), nothing is said and nothing is waited for.

use std::{
    ffi::OsString,
    io::{self, Write},
    time::Duration,
};

use clap::{Arg, Command, CommandFactory, Parser};
use glob::Pattern;
use tokio::time::{Instant, timeout_at};
use xman_client::{Address, Interrupt, fleet};
use xman_common::protocol::{DomainState, Info, LeaseList, LeaseRow, Reply, Request};

use crate::{
    args::Cli,
    config::Config,
    lease,
    rights::actions,
    setting::Setting,
    target::{self, split},
};

/// How long all hosts may take together: longer feels like a shell that hangs.
const LIMIT: Duration = Duration::from_secs(1);
/// The most candidates: more are no help, and a host gone mad must not fill the terminal.
const MAX_CANDIDATES: usize = 2_000;
/// What the first argument of `rxm` is that asks for candidates. No command of the help: it is for scripts of our own.
pub(crate) const COMPLETE: &str = "complete";

/// `rxm complete SHELL ...`: prints what the last word could become, or nothing.
pub(crate) async fn complete(words: Vec<OsString>) {
    let words: Option<Vec<String>> = words
        .into_iter()
        .map(|word| word.into_string().ok())
        .collect();
    let Some(words) = words else { return };
    let lines = match words.as_slice() {
        [shell, breaks, line] if shell == "bash" => in_bash(breaks, line).await,
        [shell, words @ ..] if shell == "zsh" || shell == "fish" => {
            let mut words = words.to_vec();
            if let Some(last) = words.last_mut() {
                *last = Word::read(last).value;
            }
            Typed::read(&words).candidates().await
        }
        _ => return,
    };
    let mut text = lines.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    let _ = io::stdout().write_all(text.as_bytes());
}

/// bash gives its line, and takes what stands in the place of the piece behind the last of its word breaks.
async fn in_bash(breaks: &str, line: &str) -> Vec<String> {
    let words = Word::split(line);
    let values: Vec<_> = words.iter().map(|word| word.value.clone()).collect();
    let typed = Typed::read(&values);
    let Some(last) = words.last() else {
        return Vec::new();
    };
    let kept = last.kept(breaks);
    let whole = typed.candidates().await;
    whole
        .iter()
        .filter_map(|candidate| {
            format!("{}{candidate}", typed.before)
                .strip_prefix(&kept)
                .map(|rest| last.quoted(rest))
        })
        .collect()
}

/// A word of a shell's line: what it means, and how far it is quoted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Word {
    value: String,
    /// Each character of the value, and whether it was typed bare.
    bare: Vec<bool>,
    /// A quote that is still open, and how much of the value stood before it.
    open: Option<(char, usize)>,
}

impl Word {
    /// Cuts a line into words; the last one is what is being typed, and may be empty.
    fn split(line: &str) -> Vec<Self> {
        let mut words = Vec::new();
        let mut word = Self::default();
        let mut begun = false;
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            match (c, word.open) {
                (quote, Some((open, _))) if quote == open => word.open = None,
                ('\\', Some(('"', _))) => match chars.next() {
                    Some(next @ ('"' | '\\' | '$' | '`')) => word.push(next, false),
                    Some(next) => {
                        word.push('\\', false);
                        word.push(next, false);
                    }
                    None => {}
                },
                (c, Some(_)) => word.push(c, false),
                ('\'' | '"', None) => {
                    word.open = Some((c, word.value.len()));
                    begun = true;
                }
                ('\\', None) => {
                    begun = true;
                    if let Some(next) = chars.next() {
                        word.push(next, false);
                    }
                }
                (c, None) if c.is_whitespace() => {
                    if begun {
                        words.push(std::mem::take(&mut word));
                    }
                    begun = false;
                }
                (c, None) => {
                    word.push(c, true);
                    begun = true;
                }
            }
        }
        words.push(word);
        words
    }

    /// Reads one word, blanks and all.
    fn read(text: &str) -> Self {
        let mut words = Self::split(text).into_iter();
        match (words.next(), words.next()) {
            (Some(word), None) => word,
            _ => Self {
                value: text.to_owned(),
                ..Self::default()
            },
        }
    }

    fn push(&mut self, c: char, bare: bool) {
        self.value.push(c);
        self.bare.extend(std::iter::repeat_n(bare, c.len_utf8()));
    }

    /// What of the word stays as it is on the line.
    fn kept(&self, breaks: &str) -> String {
        let at = match self.open {
            Some((_, before)) => before,
            None => self
                .value
                .char_indices()
                .rev()
                .find(|(at, c)| breaks.contains(*c) && self.bare.get(*at) == Some(&true))
                .map_or(0, |(at, c)| at + c.len_utf8()),
        };
        self.value.get(..at).unwrap_or_default().to_owned()
    }

    /// Writes a text so that the shell reads it as one piece of this word.
    fn quoted(&self, text: &str) -> String {
        match self.open {
            Some(('\'', _)) => text.replace('\'', r"'\''"),
            Some(_) => escaped(text, |c| matches!(c, '"' | '\\' | '$' | '`')),
            None => escaped(text, |c| {
                !(c.is_alphanumeric()
                    || matches!(c, '_' | '-' | '.' | '/' | ':' | '@' | '%' | '+' | ',' | '='))
            }),
        }
    }
}

fn escaped(text: &str, special: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if special(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// A command line so far.
#[derive(Debug, Default, PartialEq)]
struct Typed {
    /// The command and its subcommand.
    path: Vec<String>,
    /// Options with their values, by clap's names for them.
    options: Vec<(String, String)>,
    positionals: Vec<String>,
    /// Whose value is being typed, by clap's name for it.
    slot: Option<String>,
    /// What stands before the value in the same word, as `--hosts=`.
    before: String,
    /// The value so far.
    value: String,
}

impl Typed {
    /// Reads words as clap would; the last one is being typed.
    fn read(words: &[String]) -> Self {
        let mut typed = Self::default();
        let mut command = Cli::command();
        command.build();
        let Some((last, earlier)) = words
            .split_last()
            .filter(|(_, earlier)| !earlier.is_empty())
        else {
            return typed;
        };
        let mut command = &command;
        let mut waits: Option<&Arg> = None;
        let mut dashes = false;
        for word in earlier.iter().skip(1) {
            if let Some(arg) = waits.take() {
                typed.options.push((id(arg), word.clone()));
            } else if word == "--" && !dashes {
                dashes = true;
            } else if let Some(option) = option(command, word).filter(|_| !dashes) {
                match option {
                    Opt::Value(arg, value) => typed.options.push((id(arg), value)),
                    Opt::Waits(arg) => waits = Some(arg),
                    Opt::Other => {}
                }
            } else if let Some(sub) = command
                .find_subcommand(word)
                .filter(|_| typed.positionals.is_empty())
            {
                typed.path.push(sub.get_name().to_owned());
                command = sub;
            } else {
                typed.positionals.push(word.clone());
            }
        }
        last.clone_into(&mut typed.value);
        match (waits, option(command, last).filter(|_| !dashes)) {
            (Some(arg), _) => typed.slot = Some(id(arg)),
            (None, Some(Opt::Value(arg, value))) => {
                typed.slot = Some(id(arg));
                typed.before = last.strip_suffix(&value).unwrap_or_default().to_owned();
                typed.value = value;
            }
            (None, Some(Opt::Waits(_) | Opt::Other)) => {}
            // An option begins.
            (None, None) if last == "-" && !dashes => {}
            (None, None) => {
                let mut positionals = command.get_positionals();
                let arg = positionals.nth(typed.positionals.len());
                let arg =
                    arg.or_else(|| command.get_positionals().last().filter(|arg| is_list(arg)));
                typed.slot = arg.map(id);
            }
        }
        typed
    }

    fn meaning(&self) -> Option<Meaning> {
        let command = self.path.first().map_or("", String::as_str);
        match self.slot.as_deref()? {
            "hosts" => Some(Meaning::Hosts),
            "destination" | "to" if command != "save" => Some(Meaning::Hosts),
            "lease" => Some(Meaning::Leases(Part::Key)),
            "cluster" => Some(Meaning::Leases(Part::Cluster)),
            "system" => Some(Meaning::Leases(Part::System)),
            "hypervisor" => Some(Meaning::Hypervisors),
            "domain" | "domains" | "patterns" => Some(Meaning::Domains(states(command))),
            "words" => {
                let acted = self
                    .positionals
                    .iter()
                    .any(|word| actions().any(|action| action == word));
                Some(if acted {
                    Meaning::Domains(&[])
                } else {
                    Meaning::Actions
                })
            }
            _ => None,
        }
    }

    /// Returns what the value could become.
    async fn candidates(&self) -> Vec<String> {
        let mut found = match self.meaning() {
            None => return Vec::new(),
            Some(Meaning::Actions) => actions().map(ToOwned::to_owned).collect(),
            Some(Meaning::Hosts) => self.hosts().unwrap_or_default(),
            Some(Meaning::Domains(states)) => self.domains(states).await.unwrap_or_default(),
            Some(Meaning::Hypervisors) => self.hypervisors().await.unwrap_or_default(),
            Some(Meaning::Leases(part)) => self.leases(part).await.unwrap_or_default(),
        };
        found.retain(|candidate| candidate.starts_with(&self.value) && !candidate.starts_with('-'));
        found.sort();
        found.dedup();
        found.truncate(MAX_CANDIDATES);
        found
    }

    fn option(&self, name: &str) -> Option<&str> {
        let mut given = self.options.iter().rev();
        given
            .find(|(id, _)| id == name)
            .map(|(_, value)| value.as_str())
    }

    /// The options of a call that is made for the person who types.
    fn setting(&self) -> Option<Setting> {
        let mut line = vec!["rxm", "list", "--quiet", "--retries=1", "--timeout=1s"];
        for (name, flag) in [
            ("hosts", "--hosts"),
            ("hypervisor", "--hypervisor"),
            ("on_behalf_of", "--on-behalf-of"),
        ] {
            if let Some(value) = self
                .option(name)
                .filter(|_| self.slot.as_deref() != Some(name))
            {
                line.extend([flag, value]);
            }
        }
        let Cli { options, .. } = Cli::try_parse_from(line).ok()?;
        Setting::new(options, Interrupt::never()).ok()
    }

    /// Groups, and hosts that the configuration or the environment name; of a set its last element is being typed.
    fn hosts(&self) -> Option<Vec<String>> {
        let config = Config::read().ok()?;
        let setting = self.setting()?;
        let mut names: Vec<_> = config
            .group_names()
            .map(|name| format!("@{name}"))
            .collect();
        let named = names
            .iter()
            .filter_map(|group| setting.host_set(group).ok())
            .flatten();
        let known: Vec<_> = named.chain(setting.hosts().unwrap_or_default()).collect();
        names.extend(known.iter().map(ToString::to_string));
        let cut = self.value.rfind([',', '!']).map_or(0, |at| at + 1);
        let (set, _) = self.value.split_at_checked(cut)?;
        // A comma between brackets separates numbers.
        if set.matches('[').count() != set.matches(']').count() {
            return None;
        }
        Some(names.iter().map(|name| format!("{set}{name}")).collect())
    }

    async fn domains(&self, states: &[DomainState]) -> Option<Vec<String>> {
        let deadline = Instant::now() + LIMIT;
        let setting = &self.setting()?;
        let (place, name) = split(&self.value);
        let hosts = match place {
            Some(place) => setting.hosts_before_slash(place).ok()?,
            None => setting.hosts().ok()?,
        };
        timeout_at(deadline, setting.check_ticket())
            .await
            .ok()?
            .ok()?;
        let pattern = &[format!("{}*", Pattern::escape(name))];
        let ask = |host: Address| async move {
            let mut caller = setting.caller(&host);
            let rows = target::rows(setting, &mut caller, pattern, states);
            let rows = timeout_at(deadline, rows).await.ok()?.ok()?.rows;
            Some((host, rows))
        };
        let answers = fleet::all(hosts, fleet::WIDTH, ask).await;
        let rows = answers.into_iter().flatten();
        let named: Vec<(Address, String)> = rows
            .flat_map(|(host, rows)| {
                rows.into_iter()
                    .map(move |row| (host.clone(), row.name.to_string()))
            })
            .collect();
        let is_alone = |name: &String| named.iter().filter(|(_, other)| other == name).count() == 1;
        let called = |(host, name): &(Address, String)| match place {
            Some(place) => format!("{place}/{name}"),
            // Where nothing else can be typed on, rxm itself asks which host is meant.
            None if is_alone(name) || !format!("{host}/").starts_with(&self.value) => name.clone(),
            None => format!("{host}/{name}"),
        };
        Some(named.iter().take(MAX_CANDIDATES).map(called).collect())
    }

    /// Leases of the hosts, with their host where it is being typed, or a part of each.
    async fn leases(&self, part: Part) -> Option<Vec<String>> {
        let deadline = Instant::now() + LIMIT;
        let setting = &self.setting()?;
        let hosts = setting.hosts().ok()?;
        timeout_at(deadline, setting.check_ticket())
            .await
            .ok()?
            .ok()?;
        let ask = |host: Address| async move {
            let mut caller = setting.caller(&host);
            let leases = lease::leases(setting, &mut caller, LeaseList::default());
            let leases = timeout_at(deadline, leases).await.ok()?.ok()?;
            Some((host, leases))
        };
        let answers = fleet::all(hosts, fleet::WIDTH, ask).await;
        let rows = answers.into_iter().flatten();
        Some(
            rows.flat_map(|(host, rows)| {
                let name = |row: &LeaseRow| part.of(row, &host, &self.value);
                rows.iter().map(name).collect::<Vec<_>>()
            })
            .collect(),
        )
    }

    /// URIs and drivers of the hosts.
    async fn hypervisors(&self) -> Option<Vec<String>> {
        let deadline = Instant::now() + LIMIT;
        let setting = &self.setting()?;
        let hosts = setting.hosts().ok()?;
        timeout_at(deadline, setting.check_ticket())
            .await
            .ok()?
            .ok()?;
        let ask = |host: Address| async move {
            let mut caller = setting.caller(&host);
            let info = Request::Info(Info::default());
            match timeout_at(deadline, setting.ask(&mut caller, &info))
                .await
                .ok()?
                .ok()?
            {
                (Reply::Info(info), _) => Some(info.hypervisors),
                _ => None,
            }
        };
        let answers = fleet::all(hosts, fleet::WIDTH, ask).await;
        let found = answers.into_iter().flatten().flatten();
        Some(
            found
                .flat_map(|one| [one.uri, one.driver.to_lowercase()])
                .collect(),
        )
    }
}

/// What a word could become.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Meaning {
    /// What policies decide about.
    Actions,
    Hosts,
    Hypervisors,
    /// In one of these states, or in any.
    Domains(&'static [DomainState]),
    Leases(Part),
}

/// What of a lease is being typed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Key,
    /// `SYSTEM/CLUSTER`
    Cluster,
    System,
}

impl Part {
    fn of(self, row: &LeaseRow, host: &Address, typed: &str) -> String {
        let job = &row.key.job;
        match self {
            Self::Key if typed.starts_with(&format!("{host}/")) => format!("{host}/{}", row.key),
            Self::Key => row.key.to_string(),
            Self::Cluster => format!("{}/{}", job.system, job.cluster),
            Self::System => job.system.to_string(),
        }
    }
}

/// In which states a command makes sense; in any where none is named.
fn states(command: &str) -> &'static [DomainState] {
    use DomainState::{Blocked, Crashed, Off, Paused, Running, ShuttingDown, Sleeping};
    match command {
        "start" | "undefine" | "restore" | "rename" => &[Off, Crashed],
        "unpause" => &[Paused],
        "pause" => &[Running, Blocked, ShuttingDown],
        "shutdown" | "reboot" => &[Running, Blocked, ShuttingDown, Paused, Sleeping],
        "destroy" | "reset" | "console" | "save" | "save-to" => {
            &[Running, Blocked, ShuttingDown, Paused, Sleeping, Crashed]
        }
        "migrate" | "preempt" | "freeze" => &[Running, Blocked, Paused],
        _ => &[],
    }
}

/// An option on the line.
enum Opt<'a> {
    /// With its value, as `--hosts=a` or `-Ha`.
    Value(&'a Arg, String),
    /// Its value is the next word.
    Waits(&'a Arg),
    /// A flag, or none that is known.
    Other,
}

fn option<'a>(command: &'a Command, word: &str) -> Option<Opt<'a>> {
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) = long
            .split_once('=')
            .map_or((long, None), |(name, value)| (name, Some(value)));
        let is_it = |arg: &&Arg| {
            arg.get_long() == Some(name)
                || arg.get_all_aliases().unwrap_or_default().contains(&name)
        };
        let arg = command
            .get_arguments()
            .find(is_it)
            .filter(|arg| takes_value(arg));
        return Some(match (arg, value) {
            (Some(arg), Some(value)) => Opt::Value(arg, value.to_owned()),
            (Some(arg), None) => Opt::Waits(arg),
            (None, _) => Opt::Other,
        });
    }
    let letters = word
        .strip_prefix('-')
        .filter(|letters| !letters.is_empty())?;
    for (at, letter) in letters.char_indices() {
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_short() == Some(letter));
        if let Some(arg) = arg.filter(|arg| takes_value(arg)) {
            let rest = letters.get(at + letter.len_utf8()..).unwrap_or_default();
            return Some(match rest {
                "" => Opt::Waits(arg),
                rest => Opt::Value(arg, rest.to_owned()),
            });
        }
    }
    Some(Opt::Other)
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

fn is_list(arg: &Arg) -> bool {
    arg.get_num_args()
        .is_some_and(|number| number.max_values() > 1)
        || matches!(arg.get_action(), clap::ArgAction::Append)
}

fn id(arg: &Arg) -> String {
    arg.get_id().as_str().to_owned()
}

/// The commands whose words are all domains, hosts or actions, and never files.
fn without_files() -> Vec<String> {
    let known = ["domain", "domains", "patterns", "destination", "words"];
    let mut command = Cli::command();
    command.build();
    command
        .get_subcommands()
        .filter(|sub| {
            let mut positionals = sub.get_positionals().peekable();
            positionals.peek().is_some()
                && positionals.all(|arg| known.contains(&arg.get_id().as_str()))
        })
        .map(|sub| sub.get_name().to_owned())
        .collect()
}

/// Teaches the script that clap has written for bash to ask for candidates.
pub(crate) fn for_bash(script: &str) -> String {
    let script = script.replacen("_rxm() {", "_rxm_words() {", 1);
    let known = r#"
# Domains, hosts and hypervisors, where one is being typed; else what stands above.
_rxm() {
    local known=()
    mapfile -t known < <(rxm complete bash "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" 2> /dev/null < /dev/null)
    if ((${#known[@]})); then
        COMPREPLY=("${known[@]}")
    else
        _rxm_words "$@"
    fi
}
"#;
    match script.rfind("\nif [[ ") {
        Some(at) => {
            let (functions, rest) = script.split_at(at);
            format!("{functions}{known}{rest}")
        }
        None => script,
    }
}

/// As [`for_bash`], for zsh.
pub(crate) fn for_zsh(script: &str) -> String {
    let known = r#"
# Domains, hosts and hypervisors, where one is being typed; else files.
_rxm_known() {
    local -a known
    known=("${(@f)$(rxm complete zsh "${(@Q)_rxm_line[1,_rxm_at-1]}" "${_rxm_line[_rxm_at]}" 2> /dev/null < /dev/null)}")
    known=("${(@)known:#}")
    if (( $#known )); then
        compadd -- "${known[@]}"
    else
        _default
    fi
}

_rxm() {
    # What is looked at further in begins at the subcommand.
    local -a _rxm_line=("${words[@]}")
    local -i _rxm_at=$CURRENT
    _rxm_words "$@"
}
"#;
    let script = script.replacen("\n_rxm() {", "\n_rxm_words() {", 1);
    let script: String = script
        .split_inclusive('\n')
        .map(|line| {
            match line
                .strip_prefix("'*::words ")
                .and_then(|_| line.rsplit_once(":("))
            {
                Some((question, _)) => format!("{question}:_rxm_known' \\\n"),
                None => line.replace(":_default'", ":_rxm_known'"),
            }
        })
        .collect();
    match script.rfind("\nif [ ") {
        Some(at) => {
            let (functions, rest) = script.split_at(at);
            format!("{functions}{known}{rest}")
        }
        None => script,
    }
}

/// As [`for_bash`], for fish.
pub(crate) fn for_fish(script: &str) -> String {
    format!(
        r#"{script}
# Domains, hosts and hypervisors, where one is being typed.
function __rxm_known
    set -l current (commandline -ct)
    rxm complete fish (commandline -opc) "$current" 2> /dev/null < /dev/null
end
complete -c rxm -s H -l hosts -x -a '(__rxm_known)'
complete -c rxm -l hypervisor -x -a '(__rxm_known)'
complete -c rxm -n "__fish_seen_subcommand_from {}" -f
complete -c rxm -a '(__rxm_known)'
"#,
        without_files().join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(line: &str) -> Typed {
        let values: Vec<_> = Word::split(line)
            .into_iter()
            .map(|word| word.value)
            .collect();
        Typed::read(&values)
    }

    #[track_caller]
    fn means(line: &str, expected: Option<Meaning>) -> Typed {
        let typed = typed(line);
        assert_eq!(typed.meaning(), expected, "{line}: {typed:?}");
        typed
    }

    #[test]
    fn what_is_being_typed_is_known_by_its_place() {
        let any = Some(Meaning::Domains(&[]));
        for line in [
            "rxm describe ",
            "rxm list we",
            "rxm ls a b ",
            "rxm -H a -o json describe we",
            "rxm mem-set we",
            "rxm attach disk we",
            "rxm detach interface we",
            "rxm explain pause we",
            "rxm can bob@R pause ",
            "rxm -yqH a describe -- we",
            "rxm lease begin slurm/grid/1/0 we",
            "rxm resume --force we",
            "rxm thaw a b ",
            "rxm status --line we",
        ] {
            means(line, any);
        }
        assert_eq!(
            typed("rxm unpause ").meaning(),
            Some(Meaning::Domains(states("unpause")))
        );
        for line in [
            "rxm -H ",
            "rxm --hosts=a,@g",
            "rxm list -Ha",
            "rxm migrate web al",
            "rxm -yH al",
        ] {
            means(line, Some(Meaning::Hosts));
        }
        means("rxm drain --to al", Some(Meaning::Hosts));
        means("rxm list --hypervisor ", Some(Meaning::Hypervisors));
        for line in [
            "rxm lease end ",
            "rxm lease show a/slurm/gr",
            "rxm lease begin sl",
            "rxm preempt web --lease sl",
            "rxm thaw --lease=sl",
        ] {
            means(line, Some(Meaning::Leases(Part::Key)));
        }
        means("rxm reconcile sl", Some(Meaning::Leases(Part::Cluster)));
        means(
            "rxm lease list --system ",
            Some(Meaning::Leases(Part::System)),
        );
        means("rxm explain ", Some(Meaning::Actions));
        for line in [
            "",
            "rxm",
            "rxm ",
            "rxm li",
            "rxm list -",
            "rxm create fi",
            "rxm list --timeout ",
            "rxm attach ",
            "rxm attach disk web /x",
            "rxm whoami ",
            "rxm mem-set web ",
            "rxm bogus we",
            "rxm job wait ",
            "rxm save web --to ",
            "rxm reconcile slurm/grid fi",
            "rxm lease ",
            "rxm preempt --reason ",
            "rxm maintenance on ",
        ] {
            means(line, None);
        }
    }

    #[test]
    fn what_was_typed_before_counts() {
        let line = typed("rxm -H a --as bob@R list --hosts=b --hypervisor lxc we");
        assert_eq!(
            (line.option("hosts"), line.option("on_behalf_of")),
            (Some("b"), Some("bob@R"))
        );
        let attached = typed("rxm list --hosts=a,@g");
        assert_eq!(
            (attached.before.as_str(), attached.value.as_str()),
            ("--hosts=", "a,@g")
        );
    }

    #[test]
    fn a_lease_has_its_host_where_that_is_typed() {
        let row = crate::lease::tests::lease_in("web", xman_common::protocol::LeaseState::Active);
        let host = "a:7".parse().unwrap();
        let of = |part: Part, typed| part.of(&row, &host, typed);
        assert_eq!(of(Part::Key, "sl"), "slurm/grid/4711/0");
        assert_eq!(of(Part::Key, "a:7/sl"), "a:7/slurm/grid/4711/0");
        assert_eq!(of(Part::Cluster, ""), "slurm/grid");
        assert_eq!(of(Part::System, ""), "slurm");
    }

    #[track_caller]
    fn becomes(line: &str, candidate: &str, expected: &str) {
        let words = Word::split(line);
        let last = words.last().unwrap();
        let kept = last.kept(" \t\n\"'@><=;|&(:");
        let rest = candidate.strip_prefix(&kept).unwrap();
        assert_eq!(last.quoted(rest), expected, "{line}");
    }

    #[test]
    fn a_name_is_quoted_as_the_word_has_begun() {
        let odd = r#"we b's "$x" ü"#;
        becomes("rxm pause we", odd, r#"we\ b\'s\ \"\$x\"\ ü"#);
        becomes(r"rxm pause we\ b", odd, r#"we\ b\'s\ \"\$x\"\ ü"#);
        becomes("rxm pause 'we b", odd, r#"we b'\''s "$x" ü"#);
        becomes("rxm pause \"we b", odd, r#"we b's \"\$x\" ü"#);
        becomes("rxm pause host:96", "host:9626/web", "9626/web");
        becomes("rxm -H @gr", "@grid", "grid");
        becomes(r"rxm pause a\:b", "a:bc", "a:bc");
    }

    #[test]
    fn the_scripts_ask_for_what_they_cannot_know() {
        let bash = for_bash("_rxm() {\n}\n\nif [[ 1 ]]; then\n    complete -F _rxm rxm\nfi\n");
        assert!(
            bash.starts_with("_rxm_words() {") && bash.contains("\n_rxm() {"),
            "{bash}"
        );
        let zsh = for_zsh(
            "#compdef rxm\n\n_rxm() {\n'--hosts=[x]:HOSTS:_default' \\\n'*::words -- x:(a b)' \\\n}\n\nif [ 1 ]; then\nfi\n",
        );
        assert!(
            zsh.contains("HOSTS:_rxm_known'") && zsh.contains("words -- x:_rxm_known' \\\n"),
            "{zsh}"
        );
        let fish = for_fish("");
        assert!(
            fish.contains(" pause ") && !fish.contains(" create "),
            "{fish}"
        );
    }
}
