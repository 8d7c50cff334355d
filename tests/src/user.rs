//! Somebody with a principal, a home and a credential cache, who calls `rxm`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::child::{Outcome, PATIENCE, Process, bare_command, built, eventually, program, run};
use crate::host::Host;
use crate::realm::client_command;
use crate::scratch::Scratch;
use crate::terminal::Terminal;

/// Where an `rxm` is pointed at: a host of the lab, several, or a node set as one would type it.
pub trait Reach {
    /// Returns the value for `-H`.
    fn nodes(&self) -> String;

    /// Returns the words before `rxm` that put it where the hosts can be reached.
    fn entrance(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Reach for Host {
    fn nodes(&self) -> String {
        self.target()
    }

    fn entrance(&self) -> Vec<String> {
        self.callers_entrance().to_vec()
    }
}

impl Reach for [&Host] {
    fn nodes(&self) -> String {
        self.iter()
            .map(|host| host.target())
            .collect::<Vec<_>>()
            .join(",")
    }

    fn entrance(&self) -> Vec<String> {
        self.first()
            .map(|host| host.callers_entrance().to_vec())
            .unwrap_or_default()
    }
}

impl<const N: usize> Reach for [&Host; N] {
    fn nodes(&self) -> String {
        self.as_slice().nodes()
    }

    fn entrance(&self) -> Vec<String> {
        self.as_slice().entrance()
    }
}

impl Reach for str {
    fn nodes(&self) -> String {
        self.to_owned()
    }
}

/// Somebody with a principal, a home and a credential cache.
#[derive(Debug)]
pub struct User {
    principal: String,
    password: String,
    krb5_conf: PathBuf,
    scratch: Scratch,
}

impl User {
    pub(crate) fn new(principal: &str, password: &str, krb5_conf: &Path) -> Self {
        Self {
            principal: principal.to_owned(),
            password: password.to_owned(),
            krb5_conf: krb5_conf.to_owned(),
            scratch: Scratch::new("home"),
        }
    }

    /// Returns the full principal, as `.k5login` wants it.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.principal
    }

    /// Returns the person's home.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.scratch.path()
    }

    /// Returns the name of the credential cache, for `KRB5CCNAME`.
    #[must_use]
    pub fn ccache(&self) -> String {
        format!("FILE:{}", self.scratch.path().join("ccache").display())
    }

    /// Returns the environment that makes a program act for this person.
    #[must_use]
    pub fn env(&self) -> [(OsString, OsString); 3] {
        [
            ("KRB5_CONFIG".into(), self.krb5_conf.clone().into()),
            ("KRB5CCNAME".into(), self.ccache().into()),
            ("HOME".into(), self.home().into()),
        ]
    }

    /// Asks the KDC for a ticket for a day.
    #[track_caller]
    pub fn kinit(&self) {
        self.kinit_for(Duration::from_secs(24 * 60 * 60));
    }

    /// Asks the KDC for a ticket for so many whole seconds.
    #[track_caller]
    pub fn kinit_for(&self, lifetime: Duration) {
        let mut kinit = self.kerberos("kinit");
        kinit
            .arg("-l")
            .arg(format!("{}s", lifetime.as_secs()))
            .arg(&self.principal);
        run(kinit, format!("{}\n", self.password).as_bytes(), PATIENCE).success();
    }

    /// Asks for the ticket of a service now, e.g. `xman@localhost`, so that it is in the cache later.
    #[track_caller]
    pub fn fetch_ticket(&self, service: &str) {
        let mut kvno = self.kerberos("kvno");
        match service.split_once('@') {
            Some((service, host)) => kvno.args(["-S", service, host]),
            None => kvno.arg(service),
        };
        run(kvno, b"", PATIENCE).success();
    }

    /// Throws all tickets away.
    #[track_caller]
    pub fn kdestroy(&self) {
        run(self.kerberos("kdestroy"), b"", PATIENCE).success();
    }

    /// Returns whether there is a ticket that has not ended.
    #[must_use]
    pub fn has_valid_ticket(&self) -> bool {
        let mut klist = self.kerberos("klist");
        klist.arg("-s");
        run(klist, b"", PATIENCE).is_success()
    }

    /// Waits until the ticket has ended.
    #[track_caller]
    pub fn wait_until_expired(&self) {
        eventually("the ticket ends", PATIENCE, || {
            (!self.has_valid_ticket()).then_some(())
        });
    }

    /// Runs `rxm -H HOST ARGS` and waits for its end.
    #[track_caller]
    pub fn rxm<A: AsRef<OsStr>>(
        &self,
        hosts: &(impl Reach + ?Sized),
        args: impl IntoIterator<Item = A>,
    ) -> Outcome {
        self.rxm_call(hosts, args).run()
    }

    /// Returns a call of `rxm -H HOST ARGS` that can still be given input, environment or a terminal.
    #[track_caller]
    pub fn rxm_call<A: AsRef<OsStr>>(
        &self,
        hosts: &(impl Reach + ?Sized),
        args: impl IntoIterator<Item = A>,
    ) -> Call {
        let mut words = vec![OsString::from("-H"), hosts.nodes().into()];
        words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self.program_call(&hosts.entrance(), &built("rxm"), words)
    }

    /// Returns a call of `rxm ARGS` that names no host; the configuration or the environment may.
    #[track_caller]
    pub fn rxm_alone<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Call {
        let words = args
            .into_iter()
            .map(|arg| arg.as_ref().to_owned())
            .collect();
        self.program_call(&[], &built("rxm"), words)
    }

    /// Returns a call of any program that acts for this person, e.g. `xman-hook` or `remctl`.
    pub fn program_call(&self, entrance: &[String], program: &Path, args: Vec<OsString>) -> Call {
        let mut words: Vec<OsString> = entrance.iter().map(OsString::from).collect();
        words.push(program.into());
        words.extend(args);
        Call {
            words,
            env: self.env().to_vec(),
            input: Vec::new(),
            limit: PATIENCE,
        }
    }

    fn kerberos(&self, tool: &str) -> Command {
        client_command(&program(tool), &self.krb5_conf, &self.ccache())
    }
}

/// A call that is being prepared.
#[derive(Debug)]
#[must_use]
pub struct Call {
    words: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    input: Vec<u8>,
    limit: Duration,
}

impl Call {
    /// Gives the program this standard input; without, it reads end of file at once.
    pub fn stdin(mut self, input: impl AsRef<[u8]>) -> Self {
        input.as_ref().clone_into(&mut self.input);
        self
    }

    /// Adds or replaces a variable of the environment.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.env.retain(|(known, _)| *known != name);
        self.env.push((name, value.into()));
        self
    }

    /// Removes a variable of the environment.
    pub fn without_env(mut self, name: &str) -> Self {
        self.env.retain(|(known, _)| known != name);
        self
    }

    /// Fails the test when the program has not ended after `limit`.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the program to its end.
    #[track_caller]
    pub fn run(self) -> Outcome {
        let command = self.command();
        run(command, &self.input, self.limit)
    }

    /// Starts the program in the background, with standard input open for [`Process::say`].
    #[track_caller]
    pub fn spawn(self) -> Process {
        let mut command = self.command();
        command.stdin(Stdio::piped());
        let mut process = Process::start(command);
        if !self.input.is_empty() {
            process.say(&self.input);
        }
        process
    }

    /// Starts the program on a terminal of its own, 120 columns wide.
    #[track_caller]
    pub fn in_terminal(mut self) -> Terminal {
        if !self.env.iter().any(|(name, _)| name == "TERM") {
            self = self.env("TERM", "xterm-256color");
        }
        Terminal::open(&self.words, &self.env)
    }

    /// Returns the plain command, for who wants to start it often and fast.
    #[must_use]
    pub fn command(&self) -> Command {
        let (first, rest) = self.words.split_first().expect("a call has a program");
        let mut command = bare_command(Path::new(first));
        command.args(rest).envs(self.env.iter().cloned());
        command
    }
}
