"""The client against hosts that lie.

The host here is a real one as far as Kerberos goes: it has a key for `xman/localhost` (KRB5_KTNAME), and we have a
ticket. What it says then is what a test wants it to. It is run by `cargo test -p xman-tests --test it python`.
"""

import os
import socket
import struct
import threading
import time
import unittest
import warnings
from typing import Callable, List, Optional
from unittest.mock import patch
from uuid import UUID, uuid4

import gssapi

from xman import (
    Client,
    Closed,
    CodecError,
    Error,
    ExpiringWarning,
    Fault,
    FaultCode,
    Lost,
    ProtocolError,
    Reason,
    Refused,
    Tampered,
    TimedOut,
    Unauthenticated,
    client,
    gss,
    wire,
)
from xman import messages as m

from . import samples

WHOAMI = samples.REPLIES[1]
FLAGS = int(gss._FLAGS)


def setUpModule() -> None:
    for name in ("KRB5_KTNAME", "KRB5CCNAME", "KRB5_CONFIG"):
        if name not in os.environ:
            raise RuntimeError(f"{name} is not set: these tests are run by the Rust tests of the project")


class Liar:
    """The host's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(120)
        self.preface = b""
        self.answer = b""
        self.context: Optional[gssapi.SecurityContext] = None

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.connection.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def frame(self) -> bytes:
        return self.exactly(int.from_bytes(self.exactly(4), "big"))

    def send(self, data: bytes) -> None:
        self.connection.sendall(struct.pack(">I", len(data)) + data)

    def greet(self, version: int = 1, ahead: float = 0) -> None:
        self.preface = self.exactly(8)
        self.answer = b"XMAN" + struct.pack(">Hq", version, int((time.time() + ahead) * 1000))
        self.connection.sendall(self.answer)

    def accept(self) -> m.Hello:
        self.greet()
        token = self.frame()
        assert token[:1] == b"\0"
        self.context = gssapi.SecurityContext(usage="accept")
        answer = self.context.step(token[1:])
        assert answer and self.context.complete
        self.send(b"\0" + answer)
        hello = self.hear()
        assert isinstance(hello, m.Hello)
        return hello

    def welcome(self) -> None:
        hello = self.accept()
        assert (hello.preface, hello.answer) == (self.preface, self.answer)
        self.say(m.Welcome(self.preface, self.answer, "liar", samples.ALICE, hello.until, "1"))

    def hear(self) -> m.Outgoing:
        assert self.context is not None
        return m.OUTGOING.decode(self.context.unwrap(self.frame()).message)

    def call(self) -> m.Call:
        message = self.hear()
        assert isinstance(message, m.Call), message
        return message

    def seal(self, data: bytes, hidden: bool = True) -> bytes:
        assert self.context is not None
        return self.context.wrap(data, hidden).message

    def say(self, message: m.Incoming) -> None:
        self.send(self.seal(m.INCOMING.encode(message)))


class Hostile(unittest.TestCase):
    def setUp(self) -> None:
        self.trouble: List[BaseException] = []

    def host(self, script: Callable[[Liar], None]) -> int:
        """Starts a host that does as the script says with one caller, and returns its port."""
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            try:
                with listener:
                    connection, _ = listener.accept()
                with connection:
                    script(Liar(connection))
            except BaseException as e:
                self.trouble.append(e)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()

        def finish() -> None:
            thread.join(30)
            self.assertFalse(thread.is_alive(), "the host's script did not end")
            self.assertEqual(self.trouble, [])

        self.addCleanup(finish)
        return int(listener.getsockname()[1])

    def connect(self, script: Callable[[Liar], None]) -> Client:
        session = Client("localhost", self.host(script))
        self.addCleanup(session.close)
        return session

    def after_call(self, then: Callable[[Liar, m.Call], None]) -> Client:
        def script(liar: Liar) -> None:
            liar.welcome()
            then(liar, liar.call())

        return self.connect(script)

    # What is said in clear.

    def test_a_refusal_is_told_with_its_reason_and_the_clocks(self) -> None:
        table = {1: Reason.CLOCK, 2: Reason.NO_KEY, 3: Reason.EXPIRED, 4: Reason.REPLAY, 255: Reason.OTHER, 77: Reason.OTHER}
        for code, reason in table.items():

            def script(liar: Liar, code: int = code) -> None:
                liar.greet(ahead=420)
                liar.frame()
                liar.send(bytes((1, code)))

            with self.subTest(code), self.assertRaises(Refused) as caught:
                self.connect(script)
            self.assertIs(caught.exception.reason, reason)
            assert caught.exception.host_ahead is not None
            self.assertAlmostEqual(caught.exception.host_ahead, 420, delta=5)

    def test_a_host_without_room_or_version_is_told_apart(self) -> None:
        for version, reason in ((0, Reason.NO_VERSION), (65_535, Reason.NO_ROOM)):
            with self.assertRaises(Refused) as caught:
                self.connect(lambda liar: liar.greet(version))
            self.assertIs(caught.exception.reason, reason)

    def test_a_host_that_says_so_before_it_has_heard_anything_is_understood(self) -> None:
        def script(liar: Liar) -> None:
            liar.connection.sendall(b"XMAN" + struct.pack(">Hq", 65_535, 0))
            liar.connection.shutdown(socket.SHUT_WR)
            liar.exactly(8)

        with self.assertRaises(Refused) as caught:
            self.connect(script)
        self.assertIs(caught.exception.reason, Reason.NO_ROOM)

    def test_prefaces_that_arrived_otherwise_are_noticed(self) -> None:
        def changed(which: str) -> Callable[[Liar], None]:
            def script(liar: Liar) -> None:
                hello = liar.accept()
                preface = liar.preface[:-1] + b"\2" if which == "caller" else liar.preface
                answer = liar.answer[:-1] + bytes((liar.answer[-1] ^ 1,)) if which == "host" else liar.answer
                liar.say(m.Welcome(preface, answer, "liar", samples.ALICE, hello.until, "1"))

            return script

        for which in ("caller", "host"):
            with self.subTest(which), self.assertRaises(Tampered):
                self.connect(changed(which))

    def test_a_connection_that_ends_where_prefaces_are_compared_is_said_to_be_suspicious(self) -> None:
        with self.assertRaises(Tampered):
            self.connect(lambda liar: liar.accept() and None)

    def test_a_handshake_that_does_not_end_is_given_up(self) -> None:
        def script(liar: Liar) -> None:
            liar.greet()
            liar.frame()
            self.assertEqual(liar.connection.recv(1), b"")

        with patch.object(client, "HANDSHAKE", 0.5), self.assertRaises(TimedOut):
            self.connect(script)

    def test_a_host_that_never_answers_is_given_up(self) -> None:
        def script(liar: Liar) -> None:
            liar.exactly(8)
            self.assertEqual(liar.connection.recv(1), b"")

        with patch.object(client, "HANDSHAKE", 0.5), self.assertRaisesRegex(TimedOut, "nothing answers"):
            self.connect(script)

    def test_frames_that_are_no_handshake_are_refused(self) -> None:
        for frame in (b"", b"\1", b"\1\2\3", b"\2token"):

            def script(liar: Liar, frame: bytes = frame) -> None:
                liar.greet()
                liar.frame()
                liar.send(frame)

            with self.subTest(frame), self.assertRaises(ProtocolError):
                self.connect(script)

    def test_a_frame_over_the_limit_ends_a_handshake(self) -> None:
        def script(liar: Liar) -> None:
            liar.greet()
            liar.frame()
            liar.connection.sendall(struct.pack(">I", wire.HANDSHAKE_FRAME + 1))

        with self.assertRaises(ProtocolError):
            self.connect(script)

    def test_tokens_that_prove_nothing_are_refused_and_stay_out_of_the_error(self) -> None:
        def script(liar: Liar) -> None:
            liar.greet()
            liar.frame()
            liar.send(b"\0" + b"do not show me")

        with self.assertRaises(Unauthenticated) as caught:
            self.connect(script)
        self.assertNotIn("show me", repr(caught.exception))
        self.assertIsNone(caught.exception.__context__, "the library's error holds a token")

    # What is wrapped.

    def test_a_session_that_the_host_does_not_want_is_told_why(self) -> None:
        def script(liar: Liar) -> None:
            liar.accept()
            liar.say(m.Closing(m.FaultRow(FaultCode.BUSY, "too many sessions of yours", True)))

        with self.assertRaises(Closed) as caught:
            self.connect(script)
        self.assertIs(caught.exception.fault.code, FaultCode.BUSY)
        self.assertIn("too many", str(caught.exception))

    def test_something_else_than_a_welcome_is_refused(self) -> None:
        def script(liar: Liar) -> None:
            liar.accept()
            liar.say(m.Alive())

        with self.assertRaises(ProtocolError):
            self.connect(script)

    def test_a_message_in_clear_is_refused(self) -> None:
        session = self.after_call(
            lambda liar, call: liar.send(liar.seal(m.INCOMING.encode(m.DoneWith(call.id, WHOAMI)), hidden=False))
        )
        with self.assertRaisesRegex(ProtocolError, "not a sealed token"):
            session.whoami()

    def test_frames_that_are_no_tokens_are_refused(self) -> None:
        for frame in (b"", b"\5", b"\5\4", b"\5\4\2", b"\5\4\2" + bytes(60), b"\x60\x10" + bytes(60)):
            session = self.after_call(lambda liar, call, frame=frame: liar.send(frame))  # type: ignore[misc]
            with self.subTest(frame), self.assertRaises(ProtocolError):
                session.whoami()

    def test_repeated_missing_reordered_and_changed_tokens_end_the_session(self) -> None:
        def repeated(one: bytes, two: bytes) -> List[bytes]:
            return [one, one, two]

        def missing(one: bytes, two: bytes) -> List[bytes]:
            return [two]

        def reordered(one: bytes, two: bytes) -> List[bytes]:
            return [two, one]

        def changed(one: bytes, two: bytes) -> List[bytes]:
            return [one[:-1] + bytes((one[-1] ^ 1,)), two]

        for order in (repeated, missing, reordered, changed):

            def then(liar: Liar, call: m.Call, order: Callable[[bytes, bytes], List[bytes]] = order) -> None:
                one = liar.seal(m.INCOMING.encode(m.Alive()))
                two = liar.seal(m.INCOMING.encode(m.DoneWith(call.id, WHOAMI)))
                for token in order(one, two):
                    liar.send(token)

            session = self.after_call(then)
            with self.subTest(order.__name__), self.assertRaisesRegex(ProtocolError, "does not open"):
                session.whoami()
            with self.assertRaises(Lost):
                session.whoami()

    def test_a_message_that_is_none_ends_the_session(self) -> None:
        good = m.INCOMING.encode(m.Alive())
        for data in (good + b"\0", b"", b"\0\0\0\x63", b"\0\0\0\3" + bytes(3)):
            session = self.after_call(lambda liar, call, data=data: liar.send(liar.seal(data)))  # type: ignore[misc]
            with self.subTest(data), self.assertRaises(CodecError):
                session.whoami()
            with self.assertRaises(Lost):
                session.whoami()

    def test_a_variant_from_the_future_is_named(self) -> None:
        data = b"\0\0\0\3" + m.ID.encode(samples.ID) + b"\0\0\0\0" + b"\0\0\x27\x0f"
        session = self.after_call(lambda liar, call: liar.send(liar.seal(data)))
        with self.assertRaisesRegex(CodecError, "no variant 9999 of Reply.*newer"):
            session.whoami()

    def test_answers_to_calls_that_nobody_made_end_the_session(self) -> None:
        for message in (
            m.DoneWith(uuid4(), WHOAMI),
            m.Items(uuid4(), ()),
            m.ProgressOf(uuid4(), samples.PROGRESS),
            m.Room(uuid4(), 1),
            m.Renewed(b"", 1),
            m.Welcome(b"", b"", "", samples.ALICE, 1, ""),
        ):
            session = self.after_call(lambda liar, call, message=message: liar.say(message))  # type: ignore[misc]
            with self.subTest(type(message).__name__), self.assertRaises(ProtocolError):
                session.whoami()

    def test_an_answer_of_another_kind_is_refused(self) -> None:
        session = self.after_call(lambda liar, call: liar.say(m.DoneWith(call.id, m.Done())))
        with self.assertRaisesRegex(ProtocolError, "Done instead of Whoami"):
            session.whoami()

    def test_a_frame_over_the_limit_ends_a_session(self) -> None:
        session = self.after_call(
            lambda liar, call: liar.connection.sendall(struct.pack(">I", wire.SEALED_FRAME + 1))
        )
        with self.assertRaises(ProtocolError):
            session.whoami()

    # Calls.

    def test_a_change_that_is_torn_off_is_told_with_its_id(self) -> None:
        id = uuid4()
        ends: List[Callable[[Liar, m.Call], None]] = [
            lambda liar, call: None,
            lambda liar, call: liar.connection.sendall(b"\0\0\0\x50torn"),
            lambda liar, call: liar.say(m.Closing(m.FaultRow(FaultCode.EXPIRED, "your ticket has ended", False))),
            lambda liar, call: liar.send(liar.seal(b"\0\0\0\x63")),
        ]
        for end in ends:
            session = self.after_call(end)
            with self.assertRaises(Error) as caught:
                session.pause(samples.DOMAIN, id=id)
            self.assertEqual(caught.exception.call, id)

    def test_a_read_that_is_torn_off_has_no_id_to_repeat(self) -> None:
        session = self.after_call(lambda liar, call: None)
        with self.assertRaises(Lost) as caught:
            session.whoami()
        self.assertIsNone(caught.exception.call)

    def test_a_fault_is_an_exception_and_the_session_goes_on(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.DoneWith(call.id, m.FaultRow(FaultCode.UNKNOWN, "it did not come back in time", True)))
            liar.say(m.DoneWith(liar.call().id, WHOAMI))

        session = self.after_call(then)
        with self.assertRaises(Fault) as caught:
            session.pause(samples.DOMAIN)
        fault = caught.exception
        self.assertEqual((fault.code, fault.retry), (FaultCode.UNKNOWN, True))
        self.assertEqual(str(fault), "it did not come back in time")
        self.assertIsInstance(fault.call, UUID)
        self.assertEqual(session.whoami(), WHOAMI)

    def test_a_change_says_its_id_its_deadline_and_the_domain_by_uuid(self) -> None:
        heard: List[m.Call] = []

        def then(liar: Liar, call: m.Call) -> None:
            heard.append(call)
            liar.say(m.DoneWith(call.id, samples.ROW))

        session = self.after_call(then)
        id = uuid4()
        self.assertEqual(session.pause(str(samples.DOMAIN), id=id, timeout=2.5), samples.ROW)
        self.assertEqual((heard[0].id, heard[0].deadline_ms, heard[0].verb), (id, 2500, 14))
        self.assertEqual(m.VERBS["pause"].arguments.decode(heard[0].body), m.OneDomain(samples.DOMAIN))

    def test_a_host_that_lives_is_waited_for_and_one_that_is_silent_is_not(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            for _ in range(50):
                liar.say(m.Alive())
                time.sleep(0.25)  # the host takes its time, longer than one that is silent is waited for
            liar.say(m.DoneWith(call.id, WHOAMI))
            liar.call()
            self.assertEqual(liar.connection.recv(1), b"")

        with patch.object(client, "SILENCE", 10.0):
            session = self.after_call(then)
            self.assertEqual(session.whoami(), WHOAMI)
            with self.assertRaisesRegex(TimedOut, "silent"):
                session.whoami()

    def test_a_host_that_lives_but_lets_the_deadline_pass_is_given_up(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            try:
                while True:
                    liar.say(m.Alive())
                    time.sleep(0.1)  # the host takes its time
            except OSError:
                pass

        with patch.object(client, "GRACE", 0.3):
            session = self.after_call(then)
            with self.assertRaisesRegex(TimedOut, "no answer in time") as caught:
                session.pause(samples.DOMAIN, timeout=0.2)
            self.assertIsNotNone(caught.exception.call)

    def test_what_cannot_be_said_is_refused_before_anything_is_sent(self) -> None:
        session = self.after_call(lambda liar, call: liar.say(m.DoneWith(call.id, WHOAMI)))
        for verb, arguments in (
            ("pause", m.OneDomain("a/b")),
            ("pause", m.Nothing()),
            ("create", m.Create("x" * wire.MESSAGE)),
            ("console", m.OpenConsole("web1")),
            ("dance", m.Nothing()),
        ):
            with self.subTest(verb), self.assertRaises(CodecError):
                session.call(verb, arguments)
        self.assertEqual(session.whoami(), WHOAMI)

    # Events.

    def test_events_are_followed_and_ended_by_cancel(self) -> None:
        heard: List[m.Outgoing] = []
        event, gap = samples.ITEMS[11], samples.ITEMS[13]

        def then(liar: Liar, call: m.Call) -> None:
            heard.append(call)
            liar.say(m.Items(call.id, (m.Cursor(samples.ID, 1), event)))
            liar.say(m.Alive())
            liar.say(m.Items(call.id, (gap,)))
            heard.append(liar.hear())
            liar.say(m.Items(call.id, (event,)))
            liar.say(m.DoneWith(call.id, m.FaultRow(FaultCode.BUSY, "cancelled", True)))
            liar.say(m.DoneWith(liar.call().id, WHOAMI))

        session = self.after_call(then)
        with session.events(["web*"], since=samples.CURSOR, follow=True) as events:
            self.assertEqual(events.cursor, samples.CURSOR)
            self.assertEqual(next(events), m.Cursor(samples.ID, 1))
            self.assertEqual(events.cursor, m.Cursor(samples.ID, 1))
            self.assertEqual((next(events), next(events)), (event, gap))
            self.assertIsNone(events.wait(0.1))
            self.assertFalse(events.over)
            with self.assertRaisesRegex(Error, "another call runs"):
                session.whoami()
        self.assertEqual(events.cursor, samples.ITEMS[13].cursor)
        self.assertTrue(events.over)
        self.assertEqual(session.whoami(), WHOAMI)
        call = heard[0]
        assert isinstance(call, m.Call)
        asked = m.Events(("web*",), samples.CURSOR, True)
        self.assertEqual((call.verb, m.VERBS["events"].arguments.decode(call.body)), (41, asked))
        self.assertEqual(heard[1], m.Cancel(call.id))

    def test_who_reads_too_slowly_is_told_so_and_keeps_the_cursor(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.Items(call.id, (samples.CURSOR,)))
            liar.say(m.DoneWith(call.id, m.FaultRow(FaultCode.BUSY, "you read too slowly", True)))

        events = self.after_call(then).events(follow=True)
        with self.assertRaises(Fault) as caught:
            list(events)
        self.assertIs(caught.exception.code, FaultCode.BUSY)
        self.assertEqual(events.cursor, samples.CURSOR)

    def test_events_that_end_by_themselves_are_over(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.Items(call.id, (samples.CURSOR,)))
            liar.say(m.DoneWith(call.id, m.Done()))

        events = self.after_call(then).events()
        self.assertEqual(list(events), [samples.CURSOR])
        self.assertTrue(events.over)

    def test_an_interrupted_wait_for_events_loses_none(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            sealed = liar.seal(m.INCOMING.encode(m.Items(call.id, (samples.CURSOR,))))
            whole = struct.pack(">I", len(sealed)) + sealed
            liar.connection.sendall(whole[:9])
            self.assertIsInstance(liar.hear(), m.Cancel)
            liar.connection.sendall(whole[9:])
            liar.say(m.DoneWith(call.id, m.FaultRow(FaultCode.BUSY, "cancelled", True)))
            liar.say(m.DoneWith(liar.call().id, WHOAMI))

        session = self.after_call(then)
        with session.events(follow=True) as events:
            self.assertIsNone(events.wait(0.3))
        self.assertEqual(session.whoami(), WHOAMI)

    def test_what_is_no_event_ends_the_session(self) -> None:
        for message in (lambda id: m.Items(id, ("text",)), lambda id: m.ProgressOf(id, samples.PROGRESS)):
            session = self.after_call(lambda liar, call, message=message: liar.say(message(call.id)))  # type: ignore[misc]
            with self.assertRaises(ProtocolError):
                list(session.events())

    # Tickets.

    def renewing(self, answer: Callable[[Liar, m.Renew], m.Incoming]) -> Client:
        """A host that says that the ticket ends, and answers the renewal that comes of it so."""

        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.Expiring(100))
            renew = liar.hear()
            assert isinstance(renew, m.Renew), renew
            liar.say(answer(liar, renew))
            liar.say(m.DoneWith(call.id, WHOAMI))

        session = self.after_call(then)
        # As if the first ticket had been a shorter one than that in the cache.
        session._ticket -= 1000
        return session

    def test_a_fresh_ticket_renews_the_session_in_the_middle_of_a_call(self) -> None:
        def answer(liar: Liar, renew: m.Renew) -> m.Incoming:
            fresh = gssapi.SecurityContext(usage="accept")
            token = fresh.step(renew.token)
            assert token and fresh.complete
            self.assertEqual(int(fresh.actual_flags) & FLAGS, FLAGS)
            return m.Renewed(token, renew.until + 7)

        session = self.renewing(answer)
        before = session.until
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertEqual(session.whoami(), WHOAMI)
        self.assertAlmostEqual(session.until, before + 7, delta=2)

    def test_a_renewal_that_does_not_prove_the_host_ends_the_session(self) -> None:
        for token in (b"", b"nonsense"):
            session = self.renewing(lambda liar, renew, token=token: m.Renewed(token, renew.until))  # type: ignore[misc]
            with self.subTest(token), self.assertRaises((ProtocolError, Unauthenticated)):
                session.whoami()
            with self.assertRaises(Lost):
                session.whoami()

    def test_a_ticket_that_comes_late_is_found_while_a_call_goes_on(self) -> None:
        heard: List[m.Outgoing] = []

        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.Expiring(100))
            liar.say(m.Items(call.id, (samples.CURSOR,)))
            liar.say(m.Items(call.id, (samples.CURSOR,)))
            liar.say(m.Alive())
            heard.append(liar.hear())
            liar.say(m.Closing(samples.FAULT))

        session = self.after_call(then)
        with patch.object(client, "LOOK", 0.0):
            events = session.events(follow=True)
            with self.assertWarns(ExpiringWarning):
                next(events)
            next(events)
            session._ticket -= 1000  # as if there had been a kinit just now
            with self.assertRaises(Closed):
                next(events)
        self.assertIsInstance(heard[0], m.Renew)

    def test_without_a_fresh_ticket_there_is_a_warning(self) -> None:
        def then(liar: Liar, call: m.Call) -> None:
            liar.say(m.Expiring(100))
            liar.say(m.DoneWith(call.id, WHOAMI))

        session = self.after_call(then)
        with self.assertWarnsRegex(ExpiringWarning, "100 s.*kinit"):
            self.assertEqual(session.whoami(), WHOAMI)

    # The context.

    def test_a_context_that_lacks_a_flag_is_not_used(self) -> None:
        F = gssapi.RequirementFlag
        five = (
            F.mutual_authentication,
            F.confidentiality,
            F.integrity,
            F.replay_detection,
            F.out_of_sequence_detection,
        )
        self.assertTrue(gss._is_strong(sum(int(flag) for flag in five)))
        for flag in five:
            with self.subTest(flag):
                self.assertFalse(gss._is_strong(sum(int(other) for other in five if other is not flag)))

    def test_a_real_context_that_lacks_a_flag_is_not_used(self) -> None:
        # Kerberos gives confidentiality and integrity to all.
        F = gssapi.RequirementFlag
        for flag in (F.mutual_authentication, F.replay_detection, F.out_of_sequence_detection):
            context = gss.Context("localhost")
            with self.subTest(flag), patch.object(gss, "_FLAGS", FLAGS & ~int(flag)):
                token = context.step()
                if not context.complete:
                    context.step(gssapi.SecurityContext(usage="accept").step(token))
                self.assertTrue(context.complete)
            with self.subTest(flag), self.assertRaisesRegex(ProtocolError, "does not prove"):
                context._verify()

    def test_a_name_that_the_library_changed_is_another_host(self) -> None:
        for principal, host, meant in (
            ("xman/alpha@R", "alpha", True),
            ("xman/alpha@R", "ALPHA", True),
            ("xman/alpha.ex.org@R", "alpha.ex.org.", True),
            ("xman/alpha.ex.org@R", "alpha", True),
            ("xman/beta.ex.org@R", "alpha", False),
            ("xman/alphabet@R", "alpha", False),
            ("xman/beta.ex.org@R", "alpha.ex.org", False),
            ("xman/alpha.ex.org.evil@R", "alpha.ex.org", False),
            ("xman/localhost@R", "127.0.0.1", False),
            ("xman/localhost@R", "::1", False),
            ("host/alpha@R", "alpha", False),
        ):
            with self.subTest(principal=principal, host=host):
                self.assertIs(gss._is_meant(principal, host), meant)


if __name__ == "__main__":
    unittest.main()
