//! `make demo`: a throwaway realm, xmand on embedded QEMU, a real guest, a refused stranger, and the audit they left.
//!
//! With a terminal it then leaves a shell with `rxm` ready to use; without one it ends by itself.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a demonstration that cannot go on says so and ends"
)]

use std::{
    env,
    io::{self, IsTerminal},
    process::Command,
};

use xman_tests::{Embed, Guest, Host, Realm, Records, User, built};

fn main() {
    let stage = Stage::set();
    stage.show();
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        stage.leave_to_the_audience();
    }
}

/// Whoever owns a domain may use it.
const OWNERS: &str = r#"@id("everybody-asks")
permit (principal, action in Action::"ask", resource is Host);
@id("owners-use")
permit (principal, action in [Action::"view", Action::"use"], resource is Domain)
when { resource.owners.contains(principal) };
"#;

struct Stage {
    alice: User,
    bob: User,
    mallory: User,
    guest: Guest,
    host: Host,
    // Guests end with it, so after the host.
    _embed: Embed,
}

impl Stage {
    fn set() -> Self {
        say(
            "A Kerberos realm of its own, with three principals who all have tickets: alice, bob and mallory.",
        );
        let realm = Realm::shared();
        let (alice, bob, mallory) = (
            realm.user("alice"),
            realm.user("bob"),
            realm.user("mallory"),
        );
        say(
            "xmand, on a QEMU inside itself (no libvirtd). Its .k5login names one administrator: alice. A policy says what owners may:",
        );
        for line in OWNERS.lines() {
            println!("    {line}");
        }
        let embed = Embed::new();
        let host = Host::builder()
            .k5login(["alice"])
            .policy("owners.cedar", OWNERS)
            .uri(&embed.uri())
            .start(realm);
        let guest = Guest::booted("demo").memory(128, 256);
        Self {
            alice,
            bob,
            mallory,
            guest,
            host,
            _embed: embed,
        }
    }

    fn show(&self) {
        let file = self.guest.file();
        say("Who does the host take alice for, and what may she do?");
        self.rxm(&self.alice, &["whoami"]);
        say("She makes a domain from libvirt's XML, keeps its definition, and a real guest boots.");
        self.rxm(&self.alice, &["create", "--define", &file]);
        self.guest.wait_until_up();
        say("What runs here? (Answered from memory: a hanging libvirt cannot delay it.)");
        self.rxm(&self.alice, &["list"]);
        say("Pause stops its virtual CPUs ...");
        self.rxm(&self.alice, &["pause", "demo"]);
        self.guest.stands_still();
        say("... and unpause lets it run on: its counter has lost no number.");
        self.rxm(&self.alice, &["unpause", "demo"]);
        self.guest.keeps_counting();
        say("More memory, while it runs, through its balloon.");
        self.rxm(&self.alice, &["mem-set", "demo", "192MiB"]);
        self.rxm(&self.alice, &["-o", "wide", "list", "demo"]);
        say("Its XML, as libvirt has it; secrets are left out.");
        self.rxm(&self.alice, &["describe", "demo"]);
        say("She gives it to bob: from now on he may use it, and no more than that.");
        self.rxm(&self.alice, &["owner", "demo", "+bob@XMAN.TEST"]);
        self.rxm(&self.bob, &["pause", "demo"]);
        self.rxm(&self.bob, &["unpause", "demo"]);
        self.rxm(&self.bob, &["mem-set", "demo", "256MiB"]);
        self.rxm(&self.bob, &["explain", "mem-set", "demo"]);
        say("mallory has a good ticket too, but owns nothing. To her there is no such domain.");
        self.rxm(&self.mallory, &["list"]);
        self.rxm(&self.mallory, &["destroy", &self.guest.uuid().to_string()]);
        say(
            "What the audit log holds of all this (RFC 5424, the sentence at the end of each record):",
        );
        for record in self.host.audit().records() {
            println!(
                "    {}",
                record
                    .split_once("] ")
                    .map_or(record.as_str(), |(_, sentence)| sentence)
            );
        }
        say("One of these records whole, as programs read it:");
        println!(
            "    {}",
            self.host.audit().contains(&["mallory", "verdict=\"deny\""])
        );
    }

    fn rxm(&self, user: &User, words: &[&str]) {
        let who = user.principal().split('@').next().unwrap_or_default();
        println!("{who}$ rxm {}", words.join(" "));
        let outcome = user.rxm(&self.host, words);
        for line in outcome.stdout().lines().chain(outcome.stderr().lines()) {
            println!("    {line}");
        }
        if outcome.exit_code() != 0 {
            println!("    (exit code {})", outcome.exit_code());
        }
    }

    fn leave_to_the_audience(&self) {
        let programs = built("rxm")
            .parent()
            .expect("a program lies in a folder")
            .to_owned();
        let path = env::join_paths(
            [programs]
                .into_iter()
                .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
        );
        say(
            "Now you are alice, and `rxm` knows the host. Try: rxm list, rxm edit demo, rxm destroy demo. `exit` ends it all.",
        );
        let status = Command::new("bash")
            .args(["--norc", "-i"])
            .env("PATH", path.expect("a path that can be extended"))
            .env("XMAN_HOSTS", self.host.target())
            .env("PS1", "alice$ ")
            .envs(self.alice.env())
            .status();
        if let Err(error) = status {
            say(&format!("no shell: {error}"));
        }
    }
}

fn say(what: &str) {
    println!("\n# {what}");
}
