#!/usr/bin/env python3
"""A small authority for xmand: answers its questions by the rules in a file.

Made to be read, and changed into your own: `judge` is where a site's knowledge
goes. docs/AUTHORITY.md is the protocol. Python 3.11, its own library only.

    xman-authority.py --rules /etc/xman/authority.toml --socket /run/xman/authz.sock
    xman-authority.py --check /etc/xman/authority.toml

The rules are TOML. The first rule that fits decides; without one there is no
opinion, and xmand asks its next backend:

    [[rule]]
    name = "owners-use"                     # stands in the audit of xmand
    opinion = "allow"                       # or "deny", "none"
    actions = ["start", "pause", "unpause"] # all of these must fit, where given:
    principals = ["*@EXAMPLE.ORG"]          #   patterns as shells have them
    unix-groups = ["operators"]             #   one of the person's groups
    hosts = ["skirit*"]
    domains = ["web-*"]                     #   names of domains, also of new ones
    classes = ["grid"]
    owner = true                            #   the person owns the domain
    lease = true                            #   a job of the person holds it
    reason = "ask operators@example.org"    # for the log, and for `rxm explain`
    ttl-ms = 5000                           # how long xmand may remember it

Changed rules count from the next question on. Rules that cannot be read, or that
others than root and this account may write, deny everything.

What rests on rules that change with time or with facts that the question does not
hold should have no ttl-ms.
"""

import argparse
import fnmatch
import json
import os
import signal
import socket
import socketserver
import stat
import sys
import threading
import tomllib

MAX_LINE = 64 * 1024  # of a question, as xmand keeps it
MAX_RULES = 1024 * 1024  # bytes of the rules' file
LISTS = {"actions", "principals", "unix-groups", "hosts", "domains", "classes"}
FLAGS = {"owner", "lease"}
OPINIONS = {"allow", "deny", "none"}


def judge(question, rules):
    """Returns opinion, rule, reason and ttl_ms for a question."""
    rule = next((rule for rule in rules if fits(rule, question)), None)
    if rule is None:
        return {"opinion": "none"}
    answer = {"opinion": rule["opinion"], "rule": rule["name"]}
    if "reason" in rule:
        answer["reason"] = rule["reason"]
    if "ttl-ms" in rule:
        answer["ttl_ms"] = rule["ttl-ms"]
    return answer


def fits(rule, question):
    """Returns whether all conditions of the rule hold; what the question does not say does not hold."""
    subject = question["subject"]
    principal = question["principal"]
    lease = subject.get("lease") or {}
    found = {
        "actions": [question["action"]],
        "principals": [principal],
        "unix-groups": question["unix_groups"] or [],
        "hosts": [question["host"]],
        "domains": [subject["name"]] if "name" in subject else [],
        "classes": [subject["class"]] if subject.get("class") else [],
        "owner": principal in subject.get("owners", []),
        "lease": lease.get("user") == principal,
    }
    return all(
        found[key] == wanted
        if key in FLAGS
        else any(fnmatch.fnmatchcase(text, pattern) for text in found[key] for pattern in wanted)
        for key, wanted in rule.items()
        if key in LISTS | FLAGS
    )


def parse(text):
    """Returns the rules in a TOML text; ValueError where anything in it means nothing."""
    document = tomllib.loads(text)
    if set(document) - {"rule"} or not isinstance(document.get("rule", []), list):
        raise ValueError("the file holds [[rule]] and nothing else")
    rules = document.get("rule", [])
    for number, rule in enumerate(rules, 1):
        where = f"rule {number}"
        if not isinstance(rule, dict):
            raise ValueError(f"{where}: write [[rule]]")
        unknown = set(rule) - LISTS - FLAGS - {"name", "opinion", "reason", "ttl-ms"}
        if unknown:
            raise ValueError(f"{where}: unknown key '{min(unknown)}'")
        name = rule.get("name")
        if not (isinstance(name, str) and 0 < len(name) <= 128 and name.isascii() and name.isprintable()):
            raise ValueError(f"{where}: name: 1 to 128 printable ASCII characters")
        if rule.get("opinion") not in OPINIONS:
            raise ValueError(f"{where}: opinion: allow, deny or none")
        for key in LISTS & set(rule):
            if not (isinstance(rule[key], list) and all(isinstance(one, str) for one in rule[key])):
                raise ValueError(f"{where}: {key}: a list of strings")
        for key in FLAGS & set(rule):
            if not isinstance(rule[key], bool):
                raise ValueError(f"{where}: {key}: true or false")
        reason = rule.get("reason", "")
        if not (isinstance(reason, str) and len(reason.encode()) <= 1024 and reason.isprintable()):
            raise ValueError(f"{where}: reason: one line of at most 1024 bytes")
        ttl = rule.get("ttl-ms", 0)
        if not (type(ttl) is int and 0 <= ttl < 2**63):
            raise ValueError(f"{where}: ttl-ms: milliseconds, not negative")
    return rules


class Rules:
    """The rules in a file, as they are now."""

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.text = None
        self.rules = None
        self.news = None

    def current(self):
        """Returns the rules; None where there are none to go by. Reads the file each time: no time stamp tells every change."""
        with self.lock:
            try:
                text = read(self.path)
                if text != self.text:
                    self.rules, self.text = parse(text), text
                news = f"rules: {len(self.rules)}"
            except (OSError, ValueError) as error:
                self.rules, self.text = None, None
                news = f"{error}; everything is denied"
            if news != self.news:
                self.news = news
                log(f"{self.path}: {news}")
            return self.rules


def read(path):
    """Returns what is in a file that root or this account alone may write."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise ValueError("not a regular file that root or this account owns and nobody else may write")
        if found.st_size > MAX_RULES:
            raise ValueError(f"longer than {MAX_RULES} bytes")
        return file.read(MAX_RULES).decode()


class Conversation(socketserver.StreamRequestHandler):
    """One connection of xmand: a line in, a line out, until it closes."""

    def handle(self):
        try:
            while line := self.rfile.readline(MAX_LINE + 1):
                question = json.loads(line)
                if question["xman"] != 1 or not line.endswith(b"\n"):
                    raise ValueError("not a question of version 1")
                rules = self.server.rules.current()
                if rules is None:
                    answer = {"opinion": "deny", "reason": "the authority has no rules that it can read"}
                else:
                    answer = judge(question, rules)
                answer = {"xman": 1, "id": question["id"], **answer}
                self.wfile.write(json.dumps(answer).encode() + b"\n")
        except ConnectionError:
            pass  # xmand went away
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # The protocol has no word for "I do not understand": to close is to deny.
            log(f"not understood, connection closed: {error!r}")


class Server(socketserver.ThreadingUnixStreamServer):
    """Listens at a socket that this account alone can reach."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path, rules):
        self.rules = rules
        remove_stale(path)
        before = os.umask(0o177)  # made with mode 0600; a chmod afterwards would come too late
        try:
            super().__init__(path, Conversation)
        finally:
            os.umask(before)
        self.made = os.lstat(path)

    def server_close(self):
        super().server_close()
        try:
            now = os.lstat(self.server_address)
            if (now.st_dev, now.st_ino) == (self.made.st_dev, self.made.st_ino):
                os.unlink(self.server_address)
        except FileNotFoundError:
            pass


def remove_stale(path):
    """Removes what an authority that died left behind; a living one's socket, and anything else, stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            sys.exit(f"{path} is not a socket: remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(2)
        try:
            other.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            sys.exit(f"{path}: {error}")
        else:
            sys.exit(f"{path}: an authority listens there already")


def log(text):
    print(text, file=sys.stderr, flush=True)


def check(path):
    """Says what is wrong with the rules; returns the exit status."""
    try:
        rules = parse(read(path))
    except (OSError, ValueError) as error:
        log(f"{path}: {error}")
        return 1
    for rule in rules:
        print(f"{rule['opinion']:5} {rule['name']}")
    return 0


def stop(_signal, _frame):
    raise SystemExit(0)


def main():
    parser = argparse.ArgumentParser(description="Answers xmand's questions by the rules in a file.")
    parser.add_argument("--rules", default="/etc/xman/authority.toml", help="the rules (%(default)s)")
    parser.add_argument("--socket", default="/run/xman/authz.sock", help="where xmand asks (%(default)s)")
    parser.add_argument("--check", metavar="FILE", help="look at rules and leave")
    given = parser.parse_args()
    if given.check:
        return check(given.check)
    signal.signal(signal.SIGTERM, stop)
    rules = Rules(given.rules)
    rules.current()
    with Server(given.socket, rules) as server:
        log(f"listening at {given.socket}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
