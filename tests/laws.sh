#!/bin/sh
# The laws of ARCHITECTURE.md that a grep can hold. Each line names the law it holds.
set -eu
cd "$(dirname "$0")/.."
broken=0

# only PATTERN MESSAGE ALLOWED...: PATTERN may stand in the product's sources in the ALLOWED paths alone.
only() {
    pattern=$1 message=$2
    shift 2
    found=$(grep -rnE --include='*.rs' "$pattern" common/src policy/src server/src client/src || true)
    for allowed in "$@"; do
        found=$(printf '%s\n' "$found" | grep -v "^$allowed" || true)
    done
    if [ -n "$found" ]; then
        printf 'law broken: %s\n%s\n' "$message" "$found" >&2
        broken=1
    fi
}

only '\blibgssapi::' 'only gss.rs names libgssapi' common/src/gss.rs
only '\b(virt|virt_sys)::' 'only hypervisor/ names virt' server/src/hypervisor/
only '\bsyslog::' 'only audit.rs writes to syslog' server/src/audit.rs
only '\bbincode::' 'only codec.rs names bincode' common/src/codec.rs
only '\brusqlite::' 'only store.rs names SQLite' server/src/store
only '\bunsafe\b' 'unsafe code stands in files of its own' server/src/hypervisor/ffi.rs
only '\broxmltree::' 'XML is read in hypervisor/ alone, and by rxm edit what an editor left' server/src/hypervisor/ client/src/bin/rxm/edit.rs
only 'Grant \{' 'only policy makes a Grant' policy/src/
only 'perform::perform\(' 'perform is reached through a verdict alone' server/src/call.rs
only 'policy\.(decide|decide_all|explain)\(' 'the policy is asked in rights.rs alone' server/src/rights.rs
only '\bcedar_policy::' 'only cedar names Cedar' policy/src/cedar
only 'std::env::(var|var_os|set_var)' 'no request path reads the environment' server/src/main.rs client/src/ common/src/gss.rs
only '#\[ignore' 'no test is skipped'

if grep -nE 'xman-(server|client|policy)' common/Cargo.toml policy/Cargo.toml client/Cargo.toml | grep -vE '^[a-z]+/Cargo.toml:[0-9]+:(name|description) ' | grep -vE 'client/Cargo.toml:.*xman-client'; then
    echo 'law broken: common <- policy <- server, common <- client' >&2
    broken=1
fi
if grep -n 'xman-client' server/Cargo.toml; then
    echo 'law broken: server and client never depend on each other' >&2
    broken=1
fi
exit $broken
