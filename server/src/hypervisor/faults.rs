//! One table from libvirt's errors to faults: one cause, one message with the next step.

use virt::{connect::Connect, error::Error};
use virt_sys as sys;
use xman_common::protocol::{Code, Fault};

/// The most of libvirt's own words that a message repeats, in bytes: QEMU's output can be long.
const MAX_TEXT: usize = 800;

/// What went wrong, and where in a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cause<'a> {
    /// libvirt's error number.
    pub(super) code: sys::virErrorNumber,
    /// libvirt's words.
    pub(super) text: &'a str,
    /// Whether a change had begun.
    pub(super) begun: bool,
    /// Whether the connection is still there.
    pub(super) alive: bool,
}

/// Makes a fault of an error on a connection.
pub(super) fn fault(error: &Error, connection: &Connect, begun: bool) -> Fault {
    let alive = connection.is_alive().unwrap_or(false);
    judge(Cause {
        code: error.code().to_raw(),
        text: error.message(),
        begun,
        alive,
    })
}

/// The table.
pub(super) fn judge(cause: Cause<'_>) -> Fault {
    let text = tidy(cause.text);
    if !cause.alive {
        return lost(cause.begun, &text);
    }
    let has = |piece: &str| text.contains(piece);
    let (code, message) = match cause.code {
        sys::VIR_ERR_NO_DOMAIN => return vanished(),
        sys::VIR_ERR_OPERATION_TIMEOUT if has("state change lock") => {
            return Fault::new(
                Code::Busy,
                format!(
                    "another job holds the domain; nothing has begun, ask again later ({text})"
                ),
            );
        }
        _ if has("assigned non-USB host devices")
            || has("non-migratable")
            || has("cannot migrate domain")
            || (has("migration with") && has("not supported")) =>
        {
            (
                Code::Refused,
                format!(
                    "the domain has a device that cannot be saved or moved with its memory; take that away, or shut the guest down instead ({text})"
                ),
            )
        }
        _ if has("cannot rename domain with") => (
            Code::Conflict,
            format!(
                "it has snapshots or checkpoints, which go by its name; remove them first ({text})"
            ),
        ),
        _ if has("virtlogd") => (
            Code::Refused,
            format!("libvirt needs virtlogd, which does not run; start it ({text})"),
        ),
        // Our own connection lives, so it is one that libvirt has to another host or a service.
        _ if has("socket is closed") || has("End of file while reading") => (
            Code::Refused,
            format!("libvirt's connection to the other side broke ({text})"),
        ),
        _ if has("Failed to connect socket")
            || has("unable to connect to server")
            || has("unable to resolve address") =>
        {
            (
                Code::Refused,
                format!("libvirt cannot reach the other side ({text})"),
            )
        }
        _ if has("unplug") && has("timed out") => (
            Code::Refused,
            format!("the guest has not given it back; look again in a while ({text})"),
        ),
        sys::VIR_ERR_OPERATION_TIMEOUT if cause.begun => {
            return unknown(&format!("libvirt gave up waiting: {text}"));
        }
        sys::VIR_ERR_OPERATION_TIMEOUT => (
            Code::Busy,
            format!("libvirt gave up waiting; ask again later ({text})"),
        ),
        // libvirt 9.0 misses now and then what a container says at its start, and never asks again.
        sys::VIR_ERR_OPERATION_INVALID if has("Init process ID is not yet known") => (
            Code::Refused,
            format!(
                "libvirt has not heard which is the container's first process, and so cannot ask it; ask again in a moment, and if that \
                 stays so `rxm destroy` ends it ({text})"
            ),
        ),
        sys::VIR_ERR_INVALID_ARG if has("higher than max memory") => (
            Code::Conflict,
            format!(
                "that is more than the definition's maximum; `mem-set --maximum` raises it first ({text})"
            ),
        ),
        _ if has("greater than max allowable vcpus") => (
            Code::Conflict,
            format!(
                "that is more than the maximum; `vcpu-set --maximum` raises it for the next start ({text})"
            ),
        ),
        sys::VIR_ERR_OPERATION_FAILED
            if has("already exists") || has("already active") || has("already defined") =>
        {
            (Code::Conflict, format!("there is one already ({text})"))
        }
        sys::VIR_ERR_DOM_EXIST => (Code::Conflict, format!("there is one already ({text})")),
        sys::VIR_ERR_OPERATION_INVALID
        | sys::VIR_ERR_RESOURCE_BUSY
        | sys::VIR_ERR_BLOCK_COPY_ACTIVE => (
            Code::Conflict,
            format!("the domain is not in a state that allows it ({text})"),
        ),
        sys::VIR_ERR_CONFIG_UNSUPPORTED | sys::VIR_ERR_XML_ERROR
            if has("unexpected domain type")
                || has("does not support os type")
                || has("does not support virt type") =>
        {
            (
                Code::BadRequest,
                format!(
                    "the XML is for another hypervisor than this; `--hypervisor` chooses one of the host's ({text})"
                ),
            )
        }
        sys::VIR_ERR_XML_ERROR
        | sys::VIR_ERR_XML_DETAIL
        | sys::VIR_ERR_XML_INVALID_SCHEMA
        | sys::VIR_ERR_OS_TYPE
        | sys::VIR_ERR_NO_NAME
        | sys::VIR_ERR_NO_OS
        | sys::VIR_ERR_NO_ROOT
        | sys::VIR_ERR_NO_SOURCE
        | sys::VIR_ERR_NO_TARGET
        | sys::VIR_ERR_NO_DEVICE
        | sys::VIR_ERR_INVALID_MAC => (
            Code::BadRequest,
            format!("libvirt cannot use the XML ({text})"),
        ),
        sys::VIR_ERR_INVALID_ARG if has("unsupported flags") => (
            Code::Unsupported,
            format!("this hypervisor {} ({text})", lacks(&text)),
        ),
        sys::VIR_ERR_INVALID_ARG | sys::VIR_ERR_OVERFLOW => (
            Code::BadRequest,
            format!("libvirt does not take that ({text})"),
        ),
        sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_ARGUMENT_UNSUPPORTED => (
            Code::Unsupported,
            format!("this hypervisor {} ({text})", lacks(&text)),
        ),
        sys::VIR_ERR_CONFIG_UNSUPPORTED => (
            Code::Refused,
            format!("this host cannot run a domain like that; change its definition ({text})"),
        ),
        sys::VIR_ERR_OPERATION_UNSUPPORTED => (
            Code::Refused,
            format!("this domain or its guest cannot do that ({text})"),
        ),
        sys::VIR_ERR_MIGRATE_UNSAFE => (
            Code::Refused,
            format!(
                "the move could damage disks: put them on storage that both hosts share, with cache='none' ({text})"
            ),
        ),
        sys::VIR_ERR_CPU_INCOMPATIBLE => (
            Code::Refused,
            format!("the processors do not have what the domain's <cpu> asks for ({text})"),
        ),
        sys::VIR_ERR_OPERATION_ABORTED => (
            Code::Refused,
            format!("it was given up on request ({text})"),
        ),
        sys::VIR_ERR_OPERATION_DENIED
        | sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE => (
            Code::Refused,
            format!(
                "libvirt does not let xmand do that; look at libvirt's own configuration ({text})"
            ),
        ),
        sys::VIR_ERR_AGENT_UNRESPONSIVE | sys::VIR_ERR_AGENT_COMMAND_TIMEOUT => (
            Code::Refused,
            format!("the guest's agent does not answer ({text})"),
        ),
        sys::VIR_ERR_RPC | sys::VIR_ERR_NO_CONNECT | sys::VIR_ERR_INVALID_CONN => {
            return lost(cause.begun, &text);
        }
        _ => (Code::Refused, format!("libvirt refused ({text})")),
    };
    Fault::new(code, message)
}

/// Says what a driver does not have, and what does instead, by the call that libvirt names: drivers lack much that QEMU's has, that of
/// containers most.
fn lacks(text: &str) -> &'static str {
    let has = |pieces: &[&str]| pieces.iter().any(|piece| text.contains(piece));
    if has(&["SetVcpus"]) {
        "does not change the number of virtual CPUs; set it in the definition with `rxm edit`, for the next start"
    } else if has(&["ManagedSave", "virDomainSave", "virDomainRestore"]) {
        "keeps no image of a domain's memory; `rxm pause` halts it for a while"
    } else if has(&["Migrate"]) {
        "does not move a running domain; shut it down, and define it on the other host"
    } else if has(&["virDomainReset"]) {
        "has no reset; `rxm destroy` and `rxm start` do the same"
    } else if has(&[
        "CreateWithF",
        "CreateXMLWithF",
        "CreateXML",
        "CreateWithFlags",
    ]) {
        "does not start a domain like that; leave out `--paused`, and pause it then"
    } else if has(&["virDomainRename"]) {
        "does not rename; undefine the domain, and define it with its new name"
    } else if has(&["AttachDevice", "DetachDevice", "UpdateDevice"]) {
        "does not change devices while a domain runs; `rxm edit` changes its definition"
    } else if has(&["GetJob", "AbortJob"]) {
        "has no long work on domains that could be looked at or given up"
    } else if has(&["SetMetadata"]) {
        "keeps no owners, class or labels with its domains"
    } else {
        "cannot do that"
    }
}

/// The domain was there when it was looked up, and is not any more.
pub(super) fn vanished() -> Fault {
    Fault::new(
        Code::NotFound,
        "the domain is gone: it vanished between look-up and action; `rxm list` shows what is there",
    )
}

const BEGAN: &str = "it began, and its outcome is not known: ";
const ASK: &str = "; ask again with the same id, or look at the domain";

/// It began and nobody can say what came of it.
pub(super) fn unknown(why: &str) -> Fault {
    Fault::new(Code::Unknown, format!("{BEGAN}{why}{ASK}"))
}

/// Returns why the outcome was not known, once it is.
pub(crate) fn cause(unknown: &Fault) -> &str {
    let message = unknown.message.as_str();
    let why = message.strip_prefix(BEGAN).unwrap_or(message);
    why.strip_suffix(ASK).unwrap_or(why)
}

fn lost(begun: bool, text: &str) -> Fault {
    if begun {
        return unknown(&format!(
            "the connection to libvirt broke in the middle ({text})"
        ));
    }
    Fault::new(
        Code::Unavailable,
        format!("libvirt cannot be reached; nothing has begun, ask again later ({text})"),
    )
}

/// Says why libvirt cannot be reached at a URI, and what to do.
pub(super) fn unreachable(error: &Error) -> String {
    let text = tidy(error.message());
    let has = |piece: &str| text.contains(piece);
    let advice = if has("No such file or directory") || has("Connection refused") {
        "is libvirtd (or virtqemud, virtlxcd, virtxend) running? start it, or correct the URI"
    } else if has("Permission denied") {
        "xmand must run as root, or as an account that libvirt lets in"
    } else if has("no connection driver") || has("driver is not") || has("could not load") {
        "install libvirt's driver for it (libvirt-daemon-driver-...), or correct the URI"
    } else if has("lock") || has("already") {
        "another process has opened the same directory; end it, or choose another root"
    } else {
        "try `virsh -c` with the same URI"
    };
    format!("{text}; {advice}")
}

/// Returns libvirt's words as one line without control characters, cut to a length fit for a message.
pub(super) fn tidy(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_TEXT));
    for piece in text
        .split(|c: char| c.is_control())
        .map(str::trim)
        .filter(|piece| !piece.is_empty())
    {
        if !line.is_empty() {
            line.push_str("; ");
        }
        line.push_str(piece);
    }
    if line.len() > MAX_TEXT {
        line.truncate(
            (0..=MAX_TEXT)
                .rev()
                .find(|at| line.is_char_boundary(*at))
                .unwrap_or_default(),
        );
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: sys::virErrorNumber, text: &str, begun: bool, alive: bool, expected: Code) {
        let fault = judge(Cause {
            code,
            text,
            begun,
            alive,
        });
        assert_eq!(fault.code, expected, "{code} {text:?}: {fault}");
        assert!(!fault.message.contains('\n'));
    }

    #[test]
    fn each_cause_has_its_code() {
        let lock = "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomainSuspend)";
        for (code, text, expected) in [
            (sys::VIR_ERR_NO_DOMAIN, "Domain not found", Code::NotFound),
            (
                sys::VIR_ERR_OPERATION_INVALID,
                "domain is not running",
                Code::Conflict,
            ),
            (sys::VIR_ERR_OPERATION_TIMEOUT, lock, Code::Busy),
            (
                sys::VIR_ERR_OPERATION_TIMEOUT,
                "vcpu unplug request timed out. Unplug result must be",
                Code::Refused,
            ),
            (
                sys::VIR_ERR_OPERATION_TIMEOUT,
                "Timed out during operation",
                Code::Unknown,
            ),
            (
                sys::VIR_ERR_INVALID_ARG,
                "cannot set memory higher than max memory",
                Code::Conflict,
            ),
            (
                sys::VIR_ERR_INVALID_ARG,
                "invalid argument: unsupported flags (0x1)",
                Code::Unsupported,
            ),
            (
                sys::VIR_ERR_INVALID_ARG,
                "invalid argument: vcpu",
                Code::BadRequest,
            ),
            (
                sys::VIR_ERR_XML_ERROR,
                "(domain_definition):1: x\n<y>\n--^",
                Code::BadRequest,
            ),
            (sys::VIR_ERR_NO_SUPPORT, "virDomainReset", Code::Unsupported),
            (
                sys::VIR_ERR_CONFIG_UNSUPPORTED,
                "unsupported configuration",
                Code::Refused,
            ),
            (
                sys::VIR_ERR_MIGRATE_UNSAFE,
                "Unsafe migration",
                Code::Refused,
            ),
            (
                sys::VIR_ERR_OPERATION_FAILED,
                "domain 'a' already exists with uuid",
                Code::Conflict,
            ),
            (
                sys::VIR_ERR_OPERATION_FAILED,
                "migration job failed",
                Code::Refused,
            ),
            (sys::VIR_ERR_INTERNAL_ERROR, "process exited", Code::Refused),
            (
                sys::VIR_ERR_INTERNAL_ERROR,
                "internal error: client socket is closed",
                Code::Refused,
            ),
            (sys::VIR_ERR_RPC, "gone", Code::Unknown),
        ] {
            check(code, text, true, true, expected);
        }
    }

    #[test]
    fn what_a_driver_lacks_is_said_with_what_does_instead() {
        for (call, advice) in [
            ("virDomainSetVcpusFlags", "rxm edit"),
            ("virDomainManagedSave", "rxm pause"),
            ("virDomainSaveParams", "rxm pause"),
            ("virDomainMigratePerform3", "shut it down"),
            ("virDomainReset", "rxm destroy"),
            ("virDomainRename", "undefine"),
            ("virDomainAttachDeviceFlags", "rxm edit"),
            ("virDomainAbortJob", "long work"),
            ("virDomainSetMetadata", "owners"),
            ("virDomainPinVcpu", "cannot do that"),
        ] {
            let text = format!("this function is not supported by the connection driver: {call}");
            let fault = judge(Cause {
                code: sys::VIR_ERR_NO_SUPPORT,
                text: &text,
                begun: true,
                alive: true,
            });
            assert_eq!(fault.code, Code::Unsupported);
            assert!(fault.message.contains(advice), "{fault}");
        }
        check(
            sys::VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: Init process ID is not yet known",
            true,
            true,
            Code::Refused,
        );
        for text in [
            "unexpected domain type lxc, expecting one of these: qemu, kvm",
            "unsupported configuration: Emulator '/usr/bin/x' does not support os type 'exe'",
        ] {
            let code = sys::VIR_ERR_CONFIG_UNSUPPORTED;
            check(code, text, false, true, Code::BadRequest);
        }
    }

    #[test]
    fn a_broken_connection_is_unknown_only_if_something_had_begun() {
        for code in [
            sys::VIR_ERR_SYSTEM_ERROR,
            sys::VIR_ERR_INTERNAL_ERROR,
            sys::VIR_ERR_RPC,
            sys::VIR_ERR_NO_DOMAIN,
        ] {
            check(
                code,
                "End of file while reading data",
                true,
                false,
                Code::Unknown,
            );
            check(
                code,
                "End of file while reading data",
                false,
                false,
                Code::Unavailable,
            );
        }
        check(
            sys::VIR_ERR_OPERATION_TIMEOUT,
            "Timed out",
            false,
            true,
            Code::Busy,
        );
    }

    #[test]
    fn libvirts_words_become_one_bounded_line() {
        assert_eq!(
            tidy("internal error: process exited:\n2024 qemu: \u{1b}[31mno\r\n\n"),
            "internal error: process exited:; 2024 qemu:; [31mno"
        );
        assert!(tidy(&"ü".repeat(5_000)).len() <= MAX_TEXT + 3);
    }
}
