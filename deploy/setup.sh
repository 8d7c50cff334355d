#!/bin/sh
# Installs what building, testing and showing xman needs on Debian 12, Debian 13 and Ubuntu 24.04.
#
#   deploy/setup.sh        installs what is missing; says and does nothing when nothing is
#   deploy/setup.sh -n     only says what it would do
#
# It asks no question and starts no service. Without root it uses sudo.
set -eu

build="build-essential pkg-config clang libclang-dev libkrb5-dev libvirt-dev"
kerberos="krb5-kdc krb5-admin-server krb5-user"
tools="bash busybox-static cpio fish iproute2 man-db procps python3 python3-gssapi rsyslog systemd tmux util-linux xz-utils zsh zstd"
hypervisor="libvirt-daemon libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu
    libvirt-daemon-driver-lxc qemu-system-x86 qemu-utils"

# Not every release has all of these; what is missing, the tests of it say.
batch="slurmctld slurm-client munge gridengine-master gridengine-client"

# Newer releases split these off libvirt-daemon; older ones know no such packages.
split_off="libvirt-daemon-lock libvirt-daemon-log"

dry_run=false
policy=/usr/sbin/policy-rc.d
policy_is_ours=false

say() {
    echo "setup: $*" >&2
}

die() {
    say "$*"
    exit 1
}

as_root() {
    if "$dry_run"; then
        say "would run: $*"
    elif [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# Prints those of its arguments that are not installed.
missing() {
    # shellcheck disable=SC2016  # dpkg-query's own variables
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2> /dev/null |
        sed -n 's/^installed //p')
    for package in "$@"; do
        case "
$installed
" in
        *"
$package
"*) ;;
        *) echo "$package" ;;
        esac
    done
}

# Prints those of its arguments that the package lists know.
known() {
    for package in "$@"; do
        if apt-cache show --no-all-versions "$package" > /dev/null 2>&1; then
            echo "$package"
        fi
    done
}

# Grid Engine wants a program that sends mail. Where there is none, this one is not a daemon.
mailer() {
    [ -e /usr/sbin/sendmail ] || echo msmtp-mta
}

simulate() {
    apt-get -s -q install --no-install-recommends "$@" > /dev/null 2>&1
}

install() {
    as_root env DEBIAN_FRONTEND=noninteractive DEBIAN_PRIORITY=critical NEEDRESTART_SUSPEND=1 \
        apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confdef \
        -o Dpkg::Options::=--force-confold install --no-install-recommends "$@"
}

update() {
    # One broken source of many is no reason to stop; if it was needed, the installation says so.
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update || say "apt-get update failed in part; going on"
}

# Daemons of the packages must not start: tests run their own.
forbid_services() {
    if [ ! -e "$policy" ]; then
        policy_is_ours=true
        trap allow_services EXIT
        trap 'exit 1' HUP INT TERM
        as_root sh -c "printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy"
    fi
}

allow_services() {
    if "$policy_is_ours"; then
        policy_is_ours=false
        as_root rm -f "$policy"
    fi
}

# Adds the backports of this Debian, as a copy of the entry it has for the release itself.
add_backports() {
    if apt-cache policy | grep -q "n=$1,"; then
        return
    fi
    release=${1%-backports}
    for list in /etc/apt/sources.list.d/*.sources; do
        [ -e "$list" ] || continue
        entry=$(awk -v release="$release" -v suite="$1" 'BEGIN { RS = ""; FS = "\n" }
            {
                fits = 0; off = 0; text = ""
                for (i = 1; i <= NF; i++) {
                    line = $i
                    if (line ~ /^#/) continue
                    if (line ~ /^Suites:/) {
                        count = split(line, words, /[ \t]+/)
                        for (word = 2; word <= count; word++) if (words[word] == release) fits = 1
                        line = "Suites: " suite
                    }
                    if (tolower(line) ~ /^enabled:[ \t]*(no|false)/) off = 1
                    text = text line "\n"
                }
                if (fits && !off) { printf "%s", text; exit }
            }' "$list")
        if [ -n "$entry" ]; then
            write_source xman-backports.sources "$entry"
            return
        fi
    done
    for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$list" ] || continue
        entry=$(sed -n -E "s/^(deb[ \t]+(\[[^]]*\][ \t]+)?[^ \t]+[ \t]+)$release([ \t].*)$/\1$1\3/p" "$list" | head -n 1)
        if [ -n "$entry" ]; then
            write_source xman-backports.list "$entry"
            return
        fi
    done
    die "no entry for $release in apt's sources to derive $1 from; add $1 by hand"
}

write_source() {
    say "adding /etc/apt/sources.list.d/$1"
    # shellcheck disable=SC2016  # the inner shell's own variables
    as_root sh -c 'printf "%s\n" "$2" > "/etc/apt/sources.list.d/$1"' sh "$1" "$2"
}

install_packages() {
    # shellcheck disable=SC2046,SC2086  # words are meant to be split
    set -- $(missing $build $kerberos $tools $hypervisor $batch)
    [ -e /usr/sbin/virtlogd ] || set -- "$@" libvirt-daemon-log
    if [ $# -eq 0 ]; then
        return
    fi
    command -v apt-get > /dev/null || die "apt-get is missing; install by hand: $*"
    if ! "$dry_run" && [ "$(id -u)" -ne 0 ] && ! command -v sudo > /dev/null; then
        die "need root or sudo to install: $*"
    fi
    say "installing $*"
    update
    forbid_services
    # shellcheck disable=SC2046,SC2086
    set -- $(known $split_off $(missing $batch)) $(missing $build $kerberos $tools $hypervisor) $(mailer)
    if simulate "$@"; then
        install "$@"
    else
        install_with_backports
    fi
    allow_services
}

# Where a part of QEMU or libvirt came from backports already, the rest has to come from there too.
install_with_backports() {
    # shellcheck disable=SC1091  # every system has it
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME-}")-backports
    say "apt cannot install all from the release itself; taking QEMU and libvirt from $suite"
    add_backports "$suite"
    update
    # libvirt-dev needs the very libvirt that will be installed. All in one go, so that nothing is fetched twice.
    # shellcheck disable=SC2046,SC2086
    set -- $(missing $build $kerberos $tools | grep -v '^libvirt-dev$') $(known $(missing $batch)) $(mailer)
    [ $# -eq 0 ] || install "$@"
    # shellcheck disable=SC2046,SC2086
    set -- $(known $split_off) libvirt-dev $hypervisor
    install -t "$suite" "$@"
}

# `make check` wants it. There is no Debian package; a debug build takes half the time and checks as well.
install_cargo_deny() {
    if [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo-deny" ] || command -v cargo-deny > /dev/null; then
        return
    fi
    command -v cargo > /dev/null || die "cargo is missing: install Rust 1.89 or newer with rustup"
    say "installing cargo-deny"
    if "$dry_run"; then
        say "would run: cargo install --locked --debug cargo-deny"
    else
        env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug cargo-deny
    fi
}

case ${1-} in
-n) dry_run=true ;;
'') ;;
*) die "usage: deploy/setup.sh [-n]" ;;
esac
install_packages
install_cargo_deny
