"""The client against a real xmand, as somebody with a ticket.

    XMAN_TEST_HOST, XMAN_TEST_PORT   the host, with a key for xman/HOST
    XMAN_TEST_DOMAIN                 the one domain there that runs, which we may pause
    KRB5_CONFIG, KRB5CCNAME          whose ticket it is
    XMAN_TEST_STRANGER               class Calls: the credential cache of somebody who may do nothing
    XMAN_TEST_FRESH                  class Tickets: the credential cache with a ticket that lasts longer than ours

It is run by `cargo test -p xman-tests --test it python`, one class at a time.
"""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from typing import Callable, Iterator, List, Optional
from unittest.mock import patch
from uuid import uuid4

from xman import (
    Client,
    Closed,
    Cursor,
    DomainState,
    EventRow,
    ExpiringWarning,
    Fault,
    FaultCode,
    Gap,
    Lost,
    Tampered,
    TimedOut,
    Unauthenticated,
    Unreachable,
    client,
    follow,
    insist,
    wire,
)
from xman import messages as m

FOLDER = pathlib.Path(__file__).resolve().parents[1]
PAGE = FOLDER.parents[1] / "docs" / "PROTOCOL.md"


def wanted(name: str) -> str:
    if name not in os.environ:
        raise RuntimeError(f"{name} is not set: these tests are run by the Rust tests of the project")
    return os.environ[name]


def setUpModule() -> None:
    for name in ("XMAN_TEST_HOST", "XMAN_TEST_PORT", "XMAN_TEST_DOMAIN", "KRB5_CONFIG", "KRB5CCNAME"):
        wanted(name)


def connect(port: Optional[int] = None) -> Client:
    return Client(wanted("XMAN_TEST_HOST"), port or int(wanted("XMAN_TEST_PORT")))


def eventually(what: str, look: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not look():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within 120 s: {what}")
        time.sleep(0.02)


class Live(unittest.TestCase):
    def setUp(self) -> None:
        self.domain = wanted("XMAN_TEST_DOMAIN")
        self.addCleanup(self.set_running)

    def set_running(self) -> None:
        with connect() as host:
            if host.list([self.domain]).domains[0].state is DomainState.PAUSED:
                host.unpause(self.domain)

    def state(self) -> DomainState:
        """Returns how the domain is, as somebody else sees it."""
        with connect() as host:
            return host.list([self.domain]).domains[0].state

    def session(self, port: Optional[int] = None) -> Client:
        host = connect(port)
        self.addCleanup(host.close)
        return host


class Calls(Live):
    def test_the_host_says_who_we_are_and_proves_who_it_is(self) -> None:
        host = self.session()
        me = host.whoami()
        self.assertEqual(me.principal, host.principal)
        self.assertEqual(me.session, host.session)
        self.assertEqual(me.until, host.until)
        self.assertIn("pause", me.verbs)
        self.assertTrue(host.target.startswith(f"xman/{wanted('XMAN_TEST_HOST')}@"), host.target)
        self.assertTrue(host.software.startswith("xmand "), host.software)
        self.assertAlmostEqual(host.host_ahead, 0, delta=5)

    def test_a_list_has_what_fits_and_nothing_else(self) -> None:
        host = self.session()
        row = host.list().domains[0]
        self.assertEqual((row.name, row.state), (self.domain, DomainState.RUNNING))
        self.assertEqual(host.list().troubles, ())
        for patterns, states, there in (
            ([self.domain], [], True),
            (["*"], [DomainState.RUNNING], True),
            ([str(row.uuid)], [], True),
            (["no-such-*"], [], False),
            (["*"], [DomainState.OFF], False),
        ):
            with self.subTest(patterns=patterns, states=states):
                self.assertEqual(bool(host.list(patterns, states).domains), there)

    def test_pause_and_unpause_do_what_they_say(self) -> None:
        host = self.session()
        uuid = host.list([self.domain]).domains[0].uuid
        self.assertIs(host.pause(uuid).state, DomainState.PAUSED)
        self.assertIs(self.state(), DomainState.PAUSED)
        self.assertIs(host.unpause(self.domain).state, DomainState.RUNNING)
        self.assertIs(self.state(), DomainState.RUNNING)

    def test_a_change_that_is_sent_again_with_its_id_is_not_made_again(self) -> None:
        id = uuid4()
        first = self.session().pause(self.domain, id=id)
        self.set_running()
        again = self.session().pause(self.domain, id=id)
        self.assertEqual((again.uuid, again.state), (first.uuid, DomainState.PAUSED))
        self.assertIs(self.state(), DomainState.RUNNING, "it was paused a second time")

    def test_an_id_that_was_another_change_is_a_conflict(self) -> None:
        host, id = self.session(), uuid4()
        host.pause(self.domain, id=id)
        with self.assertRaises(Fault) as caught:
            host.unpause(self.domain, id=id)
        self.assertIs(caught.exception.code, FaultCode.CONFLICT)

    def test_faults_have_their_codes_and_the_session_goes_on(self) -> None:
        host = self.session()
        with self.assertRaises(Fault) as caught:
            host.pause("no-such-domain")
        self.assertIs(caught.exception.code, FaultCode.NOT_FOUND)
        host.pause(self.domain)
        with self.assertRaises(Fault) as caught:
            host.pause(self.domain)
        self.assertEqual((caught.exception.code, caught.exception.retry), (FaultCode.CONFLICT, False))
        with self.assertRaises(Fault) as caught:
            host.list(["x" * 1000])
        self.assertIs(caught.exception.code, FaultCode.TOO_LARGE)
        with self.assertRaises(Fault) as caught:
            host.call("whoami", on_behalf_of="somebody@ELSE.WHERE")
        self.assertIs(caught.exception.code, FaultCode.DENIED)
        self.assertEqual(host.whoami().principal, host.principal)

    def test_other_verbs_can_be_called_by_their_name(self) -> None:
        host = self.session()
        self.assertGreater(host.info().cpus, 0)
        xml = "".join(str(item) for item in host.call("describe", m.Describe(self.domain)).items)
        self.assertIn(f"<name>{self.domain}</name>", xml)
        answer = host.call("label", m.Label(self.domain, set=(("site", "Brno"),))).reply
        assert isinstance(answer, m.DomainRow)
        self.assertEqual(answer.labels, (("site", "Brno"),))
        explained = host.call("explain", m.Explain("pause", m.AboutDomain(self.domain))).reply
        assert isinstance(explained, m.Explained)
        self.assertTrue(explained.allowed)
        host.call("label", m.Label(self.domain, remove=("site",)))

    def test_a_stranger_is_denied_and_the_session_goes_on(self) -> None:
        with patch.dict(os.environ, KRB5CCNAME=wanted("XMAN_TEST_STRANGER")):
            host = self.session()
        calls: List[Callable[[], object]] = [
            host.whoami,
            host.list,
            lambda: host.pause(self.domain),
            lambda: host.unpause(self.domain),
        ]
        for call in calls:
            with self.assertRaises(Fault) as caught:
                call()
            self.assertEqual((caught.exception.code, caught.exception.retry), (FaultCode.DENIED, False))
        self.assertIs(self.state(), DomainState.RUNNING)

    def test_without_a_ticket_nothing_is_proved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with patch.dict(os.environ, KRB5CCNAME=f"FILE:{folder}/none"):
                with self.assertRaisesRegex(Unauthenticated, "run kinit"):
                    connect()

    def test_a_host_is_taken_by_the_name_that_was_typed(self) -> None:
        port = int(wanted("XMAN_TEST_PORT"))
        with self.assertRaisesRegex(Unauthenticated, "xman/127.0.0.1"):
            Client("127.0.0.1", port)
        with tempfile.TemporaryDirectory() as folder:
            # A machine whose Kerberos asks the DNS what a host is called.
            text = pathlib.Path(wanted("KRB5_CONFIG")).read_text(encoding="utf-8")
            trusting = pathlib.Path(folder, "krb5.conf")
            trusting.write_text(
                text.replace("dns_canonicalize_hostname = false", "dns_canonicalize_hostname = true").replace(
                    "rdns = false", "rdns = true"
                ),
                encoding="utf-8",
            )
            with patch.dict(os.environ, KRB5_CONFIG=str(trusting)):
                with self.assertRaisesRegex(Unauthenticated, "made xman/localhost@.* of it"):
                    Client("127.0.0.1", port)
        for name in ("", "a/b", "-x", "a b"):
            with self.subTest(name), self.assertRaises(Unreachable):
                Client(name, port)


class Wire(Live):
    """Somebody stands between the caller and the host."""

    def relay(self, change: Callable[["Relay"], None]) -> int:
        relay = Relay(change)
        self.addCleanup(relay.finish, self)
        return relay.port

    def test_who_changes_a_preface_is_noticed(self) -> None:
        def caller(relay: "Relay") -> None:
            preface = relay.from_caller(8)
            relay.host.sendall(preface[:-1] + b"\2")
            relay.pass_on()

        def host(relay: "Relay") -> None:
            relay.host.sendall(relay.from_caller(8))
            answer = relay.from_host(wire.ANSWER)
            relay.caller.sendall(answer[:-1] + bytes((answer[-1] ^ 1,)))
            relay.pass_on()

        for change in (caller, host):
            with self.subTest(change.__name__), self.assertRaises(Tampered):
                connect(self.relay(change))

    def test_a_change_goes_through_once_when_the_answer_is_lost(self) -> None:
        relays: List[Callable[[Relay], None]] = [Relay.lose_an_answer, Relay.lose_an_answer, Relay.pass_on]
        ports: Iterator[int] = iter([self.relay(relay) for relay in relays])
        ids = []

        def pause(host: Client, id: client.UUID) -> m.DomainRow:
            ids.append(id)
            return host.pause(self.domain, id=id)

        row = insist(lambda: connect(next(ports)), pause)
        # Had the second one been another change, it would have been a conflict: paused already.
        self.assertIs(row.state, DomainState.PAUSED)
        self.assertEqual((len(ids), len(set(ids))), (3, 1))

    def test_who_gives_up_is_told_the_id(self) -> None:
        port = self.relay(Relay.lose_an_answer)
        with self.assertRaises(Unreachable) as caught:
            # The first attempt gets through, and nobody listens to the others.
            insist(lambda: connect(port), lambda host, id: host.pause(self.domain, id=id), patience=1)
        assert caught.exception.call is not None
        self.assertIs(self.state(), DomainState.PAUSED)
        row = self.session().pause(self.domain, id=caught.exception.call)
        self.assertIs(row.state, DomainState.PAUSED)

    def test_a_host_that_falls_silent_is_given_up(self) -> None:
        def silent(relay: "Relay") -> None:
            relay.pass_frames(2)
            relay.from_caller(1)
            relay.until_the_caller_leaves()

        host = self.session(self.relay(silent))
        with patch.object(client, "SILENCE", 0.5), self.assertRaises(TimedOut):
            host.whoami()
        with self.assertRaises(Lost):
            host.whoami()


class Relay:
    """Passes bytes between one caller and the host, as `change` does it."""

    def __init__(self, change: Callable[["Relay"], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._change = change
        self._trouble: Optional[BaseException] = None
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self, test: unittest.TestCase) -> None:
        self._thread.join(30)
        test.assertFalse(self._thread.is_alive(), "nobody used the relay")
        test.assertIsNone(self._trouble)

    def _run(self) -> None:
        try:
            with self._listener:
                self.caller, _ = self._listener.accept()
            self.host = socket.create_connection((wanted("XMAN_TEST_HOST"), int(wanted("XMAN_TEST_PORT"))))
            with self.caller, self.host:
                self._change(self)
        except OSError:
            pass  # one of the two has gone
        except BaseException as e:
            self._trouble = e

    def from_caller(self, count: int) -> bytes:
        return self._exactly(self.caller, count)

    def from_host(self, count: int) -> bytes:
        return self._exactly(self.host, count)

    def _exactly(self, side: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = side.recv(count - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data

    def _frame(self, side: socket.socket) -> bytes:
        length = self._exactly(side, 4)
        return length + self._exactly(side, int.from_bytes(length, "big"))

    def pass_frames(self, count: int) -> None:
        """Passes the prefaces on, and so many frames of each side, the caller's first."""
        self.host.sendall(self.from_caller(8))
        self.caller.sendall(self.from_host(wire.ANSWER))
        for _ in range(count):
            self.host.sendall(self._frame(self.caller))
            self.caller.sendall(self._frame(self.host))

    def lose_an_answer(self) -> None:
        """Passes on a handshake and a call, waits until the host has answered, and hangs up instead."""
        self.pass_frames(2)
        self.host.sendall(self._frame(self.caller))
        self._frame(self.host)

    def pass_on(self) -> None:
        """Passes everything on until one side ends."""
        back = threading.Thread(target=self._copy, args=(self.host, self.caller), daemon=True)
        back.start()
        self._copy(self.caller, self.host)
        back.join(30)

    def until_the_caller_leaves(self) -> None:
        while self.caller.recv(4096):
            pass

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                data = source.recv(65_536)
                if not data:
                    break
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class Tickets(Live):
    """Our ticket ends in a few seconds; XMAN_TEST_FRESH is one that does not."""

    def setUp(self) -> None:
        self.domain = wanted("XMAN_TEST_DOMAIN")

    def test_a_fresh_ticket_is_found_and_the_session_outlives_the_first(self) -> None:
        host = self.session()
        first = host.until
        self.assertLess(first, time.time() + 60, "a ticket that ends soon is wanted")
        # The host says at once that it ends, before or after its first answer; as long as there is no other, we are told.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")

            def is_told() -> bool:
                host.whoami()
                return any(isinstance(word.message, ExpiringWarning) for word in told)

            eventually("we are told that the ticket ends", is_told)
            self.assertRegex(str(told[0].message), "run kinit")
        with patch.dict(os.environ, KRB5CCNAME=wanted("XMAN_TEST_FRESH")), patch.object(client, "LOOK", 0.1):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                eventually("the session is renewed", lambda: host.whoami().until > first)
        self.assertGreater(host.until, first + 3600)
        eventually("the first ticket ends", lambda: time.time() > first + 1)
        self.assertEqual(host.whoami().until, host.until)

    def test_a_session_that_is_not_renewed_ends_with_its_ticket(self) -> None:
        host = self.session()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpiringWarning)
            with self.assertRaises(Closed) as caught:
                eventually("the ticket ends", lambda: not host.whoami())
        self.assertIs(caught.exception.fault.code, FaultCode.EXPIRED)

    def test_renewal_on_demand_takes_the_fresh_ticket(self) -> None:
        host = self.session()
        first = host.until
        with patch.dict(os.environ, KRB5CCNAME=wanted("XMAN_TEST_FRESH")):
            host.renew()
        self.assertGreater(host.until, first + 3600)
        self.assertEqual(host.whoami().until, host.until)

    def test_somebody_elses_ticket_does_not_renew_a_session(self) -> None:
        host = self.session()
        with patch.dict(os.environ, KRB5CCNAME=wanted("XMAN_TEST_STRANGER")), self.assertRaises(Lost):
            host.renew()


class Examples(Live):
    def run_python(self, *words: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)

    def program(self, page: pathlib.Path) -> str:
        """Writes the program on a page to a file and returns its path."""
        found = re.search(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        assert found, f"{page} holds no program"
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = pathlib.Path(folder.name, "example.py")
        path.write_text(found.group(1), encoding="utf-8")
        return str(path)

    def test_the_program_on_the_page_on_the_protocol_lists_the_domain(self) -> None:
        done = self.run_python(self.program(PAGE), wanted("XMAN_TEST_HOST"), wanted("XMAN_TEST_PORT"))
        self.assertEqual((done.stdout, done.stderr), (f"{self.domain}\n", ""))

    def test_the_program_of_the_readme_pauses_what_runs(self) -> None:
        done = self.run_python(self.program(FOLDER / "README.md"), wanted("XMAN_TEST_HOST"), wanted("XMAN_TEST_PORT"))
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout.splitlines()[1:], [f"{self.domain} PAUSED"])
        self.assertIs(self.state(), DomainState.PAUSED)

    def test_the_command_works_and_has_exit_codes(self) -> None:
        there = f"{wanted('XMAN_TEST_HOST')}:{wanted('XMAN_TEST_PORT')}"
        for words, code, said in (
            ((there, "whoami"), 0, "by:  k5login"),
            ((there, "list"), 0, f"{self.domain}  running"),
            ((there, "pause", self.domain), 0, f"{self.domain}  paused"),
            ((there, "pause", self.domain), 1, "is paused already"),
            ((there, "unpause", self.domain), 0, f"{self.domain}  running"),
            ((there, "pause", "no-such-domain"), 1, "no domain"),
            ((there, "events", "--no-follow", "--all"), 0, f" {self.domain} paused"),
            ((there, "events", "--since", "yesterday"), 2, "BOOK.NUMBER"),
            ((there, "dance"), 2, "invalid choice"),
            (("no-such-host.invalid", "list"), 3, "no-such-host.invalid"),
            (("127.0.0.1:" + wanted("XMAN_TEST_PORT"), "list"), 4, "xman/127.0.0.1"),
            ((there + "x", "list"), 2, "no HOST[:PORT]"),
        ):
            with self.subTest(words):
                done = self.run_python("-m", "xman", *words)
                self.assertEqual(done.returncode, code, done.stdout + done.stderr)
                self.assertIn(said, done.stdout if code == 0 else done.stderr)
                self.assertNotIn("Traceback", done.stderr)


class Happenings(Live):
    """Events."""

    def test_what_happens_is_followed_and_goes_on_after_a_cursor(self) -> None:
        host, other = self.session(), self.session()
        with host.events(follow=True) as events:
            begin = next(events)
            self.assertIsInstance(begin, Cursor)
            other.pause(self.domain)
            paused = self.until(events, m.What.PAUSED)
            other.unpause(self.domain)
            resumed = self.until(events, m.What.RESUMED)
        self.assertEqual((paused.name, paused.state), (self.domain, DomainState.PAUSED))
        self.assertEqual((resumed.name, resumed.state), (self.domain, DomainState.RUNNING))
        # The same session can be used again, and what was seen before can be read again from any place.
        again = list(host.events(since=begin))
        self.assertEqual(again[0], begin)
        self.assertEqual([row for row in again if isinstance(row, EventRow)][-2:], [paused, resumed])
        rest = [row for row in host.events(since=paused.cursor) if isinstance(row, EventRow)]
        self.assertEqual(rest, [resumed])
        self.assertEqual([row for row in host.events(since=resumed.cursor) if isinstance(row, EventRow)], [])

    def until(self, events: client.Events, what: m.What) -> EventRow:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            item = events.wait(end - time.monotonic())
            if isinstance(item, EventRow) and item.what is what:
                return item
        raise AssertionError(f"no event {what.name} within 120 s")

    def test_patterns_choose(self) -> None:
        host, other = self.session(), self.session()
        with host.events(["no-such-*"], follow=True) as events:
            begin = next(events)
            assert isinstance(begin, Cursor)
            other.pause(self.domain)
            # What is meant for others has come by the time that it is known to everybody.
            with connect() as third, third.events([self.domain], since=begin, follow=True) as all_of_it:
                self.until(all_of_it, m.What.PAUSED)
            self.assertFalse(isinstance(events.wait(0.5), EventRow))

    def test_the_oldest_cursor_is_before_all_that_the_host_knows(self) -> None:
        host = self.session()
        paused = host.pause(self.domain).uuid

        def is_there() -> bool:
            items = list(host.events(since=Cursor.oldest()))
            self.assertIsInstance(items[0], Cursor)
            return any(isinstance(item, EventRow) and (item.uuid, item.what) == (paused, m.What.PAUSED) for item in items)

        eventually("the event is on record", is_there)

    def test_a_cursor_of_a_book_that_is_gone_is_a_gap(self) -> None:
        host = self.session()
        items = list(host.events(since=Cursor(uuid4(), 7)))
        self.assertTrue(any(isinstance(item, Gap) for item in items), items)

    def test_a_follower_goes_on_across_lost_connections(self) -> None:
        with connect() as host:
            since = next(host.events())
        assert isinstance(since, Cursor)
        relays = [Relay(Relay.pass_on), Relay(Relay.pass_on)]
        ports = iter([relay.port for relay in relays])
        items = follow(lambda: connect(next(ports)), since=since)
        with connect() as other:
            other.pause(self.domain)
            first = self.next_of(items, m.What.PAUSED)
            relays[0].caller.shutdown(socket.SHUT_RDWR)
            other.unpause(self.domain)
            second = self.next_of(items, m.What.RESUMED)
        self.assertLess(first.cursor.number, second.cursor.number)
        items.close()  # type: ignore[attr-defined]
        for relay in relays:
            relay.finish(self)

    def next_of(self, items: Iterator[object], what: m.What) -> EventRow:
        for item in items:
            if isinstance(item, EventRow) and item.what is what:
                return item
        raise AssertionError("the follower ended")

    def test_a_stranger_hears_nothing_of_domains(self) -> None:
        with patch.dict(os.environ, KRB5CCNAME=wanted("XMAN_TEST_STRANGER")):
            stranger = self.session()
        other = self.session()
        try:
            events = stranger.events(follow=True)
            begin = next(events)
        except Fault as fault:
            self.assertIs(fault.code, FaultCode.DENIED)
            return
        self.assertIsInstance(begin, Cursor)
        with self.session().events(follow=True) as seen:
            other.pause(self.domain)
            self.until(seen, m.What.PAUSED)
        self.assertIsNone(events.wait(0.5))
        events.close()

    def test_the_command_shows_events_until_it_is_interrupted(self) -> None:
        there = f"{wanted('XMAN_TEST_HOST')}:{wanted('XMAN_TEST_PORT')}"
        environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
        command = [sys.executable, "-m", "xman", there, "events", self.domain]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
            assert shown.stdout and shown.stderr
            self.assertRegex(shown.stdout.readline(), r"^-- from [0-9a-f]{32}\.[0-9]+\n$")
            with connect() as other:
                other.pause(self.domain)
            self.assertRegex(shown.stdout.readline(), rf" {self.domain} paused.* [0-9a-f]{{32}}\.[0-9]+\n$")
            shown.send_signal(2)
            self.assertEqual((shown.wait(30), shown.stderr.read()), (130, ""))


if __name__ == "__main__":
    unittest.main()
