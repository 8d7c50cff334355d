//! `make install`: everything lies where packages and people look for it.

use std::{fs, path::Path, time::Duration};

use xman_tests::{Outcome, Scratch, bare_command, built, command, run};

use crate::rxm::man_reads;

const LIMIT: Duration = Duration::from_secs(300);

/// Runs `make install` with what the running test was built with.
#[track_caller]
fn install(destination: &Path, prefix: &str) {
    let folder = built("rxm").parent().unwrap().to_owned();
    let (target, profile) = (folder.parent().unwrap(), folder.file_name().unwrap());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut make = command("make");
    make.current_dir(source)
        .args(["-s", "install", &format!("PREFIX={prefix}")])
        .arg(format!("DESTDIR={}", destination.display()))
        .arg(format!("TARGET={}", target.display()))
        .arg(format!("PROFILE={}", profile.to_str().unwrap()));
    let made = run(make, b"", LIMIT).success();
    assert_eq!(made.stderr(), "");
}

#[track_caller]
fn call(executable: &Path, words: &[&str]) -> Outcome {
    let mut call = bare_command(executable);
    call.args(words);
    run(call, b"", LIMIT)
}

#[test]
fn everything_is_installed_where_it_is_looked_for() {
    let scratch = Scratch::new("install");
    let root = scratch.path();
    install(root, "/usr");
    for file in [
        "usr/bin/rxm",
        "usr/sbin/xmand",
        "usr/lib/systemd/system/xmand.service",
        "usr/share/man/man1/rxm.1",
        "usr/share/man/man1/rxm-list.1",
        "usr/share/man/man1/rxm-migrate.1",
        "usr/share/man/man5/xmand.toml.5",
        "usr/share/man/man8/xmand.8",
        "usr/share/bash-completion/completions/rxm",
        "usr/share/zsh/site-functions/_rxm",
        "usr/share/fish/vendor_completions.d/rxm.fish",
        "usr/share/doc/xman/rsyslog-xman.conf",
        "usr/share/doc/xman/xman-authority.py",
        "usr/share/doc/xman/policy/owners.cedar",
        "usr/share/xman/schema.cedarschema",
        "etc/xman/xmand.toml.example",
        "etc/xman/rxm.toml.example",
    ] {
        let size = fs::metadata(root.join(file)).map(|metadata| metadata.len());
        assert!(size.is_ok_and(|size| size > 0), "{file} is missing");
    }
    call(&root.join("usr/bin/rxm"), &["--version"])
        .success()
        .says("rxm ");
    call(&root.join("usr/sbin/xmand"), &["--version"])
        .success()
        .says("xmand ");
    for section in ["man1", "man5", "man8"] {
        assert!(man_reads(&root.join("usr/share/man").join(section)) > 0);
    }
    starts_what_is_installed(root, "/usr");
    systemd_accepts_the_unit(root);
}

#[test]
fn another_prefix_reaches_the_unit() {
    let scratch = Scratch::new("prefix");
    install(scratch.path(), "/opt/xman");
    call(&scratch.path().join("opt/xman/bin/rxm"), &["--version"]).success();
    starts_what_is_installed(scratch.path(), "/opt/xman");
}

/// The unit starts the installed program.
#[track_caller]
fn starts_what_is_installed(root: &Path, prefix: &str) {
    let path = format!("{prefix}/lib/systemd/system/xmand.service");
    let unit = fs::read_to_string(root.join(&path[1..])).unwrap();
    assert!(!unit.contains("@SBINDIR@"), "{unit}");
    let started = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="));
    let started = started.and_then(|line| line.split(' ').next()).unwrap();
    assert_eq!(started, format!("{prefix}/sbin/xmand"));
    assert!(
        root.join(&started[1..]).is_file(),
        "{started} is not installed"
    );
}

/// systemd finds no fault with the unit, where it finds the unit by itself.
#[track_caller]
fn systemd_accepts_the_unit(root: &Path) {
    // What the unit calls besides is the system's.
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/kill", root.join("bin/kill")).unwrap();
    let mut verify = command("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    verify
        .arg(format!("--root={}", root.display()))
        .arg("/usr/lib/systemd/system/xmand.service");
    let verified = run(verify, b"", LIMIT).success();
    assert_eq!(verified.stderr(), "");
}
