"""A little command that shows the package at work: python3 -m xman HOST list."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import List, Optional, Sequence, Tuple

from . import wire
from .client import Client, follow, insist
from .errors import CodecError, Error, Refused, Unauthenticated, Unreachable
from .messages import Cursor, DomainRow, EventRow, Gap

OK, FAILED, UNREACHABLE, UNAUTHENTICATED = 0, 1, 3, 4


def main(words: Optional[Sequence[str]] = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = _arguments(words)
    warnings.showwarning = lambda text, *_: print(f"xman: {text}", file=sys.stderr)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has gone; nothing more can be told, also not at exit.
        sys.stdout = None
        return OK
    except Error as e:
        print(f"xman: {arguments.host[0]}: {e}", file=sys.stderr)
        if e.call is not None:
            print(f"xman: whether it was done is not known; the call was {e.call}", file=sys.stderr)
        if isinstance(e, (Unauthenticated, Refused)):
            return UNAUTHENTICATED
        return UNREACHABLE if isinstance(e, Unreachable) else FAILED
    return OK


def _arguments(words: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m xman",
        description="Asks an xmand. Needs a Kerberos ticket (kinit); the host's name is taken as you type it.",
        epilog="Exit codes: 0 done, 1 failed or denied, 2 wrong usage, 3 the host cannot be reached, 4 no proof of "
        "identity.",
    )
    parser.add_argument("host", metavar="HOST[:PORT]", type=_host)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    whoami = verbs.add_parser("whoami", help="whom the host takes you for, and what you may do")
    whoami.set_defaults(run=_whoami)
    show = verbs.add_parser("list", help="domains and their states")
    show.add_argument("pattern", nargs="*", help="names as the shell matches them, or UUIDs; all where none is given")
    show.set_defaults(run=_list)
    pause = verbs.add_parser("pause", help="stop a domain's virtual CPUs")
    pause.add_argument("domain", help="name or UUID")
    pause.set_defaults(run=_change, change=Client.pause)
    unpause = verbs.add_parser("unpause", help="let them run again")
    unpause.add_argument("domain", help="name or UUID")
    unpause.set_defaults(run=_change, change=Client.unpause)
    events = verbs.add_parser("events", help="what happens to domains, as it happens")
    events.add_argument("pattern", nargs="*", help="as for list")
    begin = events.add_mutually_exclusive_group()
    begin.add_argument("--since", metavar="CURSOR", type=_cursor, help="begin after this; each line ends with one")
    begin.add_argument(
        "--all", dest="since", action="store_const", const=Cursor.oldest(), help="begin with all that the host still knows"
    )
    events.add_argument("--no-follow", action="store_true", help="end with what has happened up to now")
    events.set_defaults(run=_events)
    return parser.parse_args(words)


def _host(text: str) -> Tuple[str, int]:
    """Reads HOST, HOST:PORT, [ADDRESS]:PORT or a bare IPv6 address."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, port = text, str(wire.PORT)
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST[:PORT]")
    return host, int(port)


def _cursor(text: str) -> Cursor:
    try:
        return Cursor.parse(text)
    except CodecError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _whoami(arguments: argparse.Namespace) -> None:
    with Client(*arguments.host) as host:
        me = host.whoami()
    print(f"{me.principal}, until {_when(me.until * 1000)}")
    print(f"may: {' '.join(me.verbs) or 'nothing'}")
    print(f"by:  {me.rule or 'nothing'}")


def _list(arguments: argparse.Namespace) -> None:
    with Client(*arguments.host) as host:
        listing = host.list(arguments.pattern)
    _table(listing.domains)
    for trouble in listing.troubles:
        print(f"xman: {trouble.hypervisor}: {trouble.why}", file=sys.stderr)


def _change(arguments: argparse.Namespace) -> None:
    with Client(*arguments.host) as host:
        rows = host.list([arguments.domain]).domains
    # By its UUID: a name may be another domain's by the time that it is acted upon. What is not listed may still be
    # there, hidden; the host says the right thing about it.
    uuids = [row.uuid for row in rows if arguments.domain in (row.name, str(row.uuid))]
    domain = uuids[0] if len(uuids) == 1 else arguments.domain
    _table([insist(lambda: Client(*arguments.host), lambda host, id: arguments.change(host, domain, id=id))])


def _events(arguments: argparse.Namespace) -> None:
    if arguments.no_follow:
        with Client(*arguments.host) as host, host.events(arguments.pattern, arguments.since) as events:
            for item in events:
                _show(item)
        return
    for item in follow(lambda: Client(*arguments.host), arguments.pattern, arguments.since):
        _show(item)


def _show(item: object) -> None:
    if isinstance(item, EventRow):
        detail = f" ({item.detail})" if item.detail else ""
        state = item.state.name.lower()
        print(f"{_when(item.at_ms)} {item.name} {item.what.name.lower()}{detail}, {state} {item.cursor}", flush=True)
    elif isinstance(item, Gap):
        where = item.hypervisor or "all"
        print(f"{_when(item.at_ms)} -- gap: {where}: {item.why} {item.cursor}", flush=True)
    else:
        print(f"-- from {item}", flush=True)


def _table(rows: Sequence[DomainRow]) -> None:
    lines: List[Tuple[str, str, str]] = [("NAME", "STATE", "UUID")]
    lines += [(row.name, row.state.name.lower().replace("_", "-"), str(row.uuid)) for row in rows]
    name, state = (max(len(line[column]) for line in lines) for column in (0, 1))
    for line in lines:
        print(f"{line[0]:{name}}  {line[1]:{state}}  {line[2]}")


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))


if __name__ == "__main__":
    sys.exit(main())
