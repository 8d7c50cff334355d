"""Prefaces and frames, over a real pair of sockets."""

import socket
import struct
import time
import unittest

from xman import wire
from xman.errors import Lost, ProtocolError, Reason, Refused, TimedOut, Unreachable


def soon() -> float:
    return time.monotonic() + 60


def answer(version: int, clock_ms: int) -> bytes:
    return b"XMAN" + struct.pack(">Hq", version, clock_ms)


class Prefaces(unittest.TestCase):
    def test_the_callers_preface_is_that_of_the_page(self) -> None:
        self.assertEqual(wire.preface().hex(), "584d414e00010001")

    def test_an_answer_says_how_far_the_clocks_differ(self) -> None:
        now = int(time.time() * 1000)
        for ahead in (0, 420, -420):
            heard = wire.Answer.read(answer(1, now + ahead * 1000))
            self.assertAlmostEqual(heard.host_ahead, ahead, delta=2)

    def test_a_host_that_does_not_want_to_is_a_refusal(self) -> None:
        for version, reason in ((0, Reason.NO_VERSION), (65_535, Reason.NO_ROOM)):
            with self.assertRaises(Refused) as caught:
                wire.Answer.read(answer(version, 0))
            self.assertIs(caught.exception.reason, reason)

    def test_what_is_no_xmand_is_not_spoken_to(self) -> None:
        for raw in (b"SSH-2.0-OpenSS", b"XMAN\0\1", b"", answer(2, 0), answer(1, 0) + b"\0"):
            with self.subTest(raw), self.assertRaises(ProtocolError):
                wire.Answer.read(raw)

    def test_refusals_have_the_reasons_of_the_page(self) -> None:
        table = {1: Reason.CLOCK, 2: Reason.NO_KEY, 3: Reason.EXPIRED, 4: Reason.REPLAY, 255: Reason.OTHER, 9: Reason.OTHER}
        for code, reason in table.items():
            self.assertIs(wire.refusal(code, 0).reason, reason)
        self.assertIn("420 s ahead", str(wire.refusal(1, 420.3)))
        self.assertIn("420 s behind", str(wire.refusal(1, -420.3)))


class Frames(unittest.TestCase):
    def setUp(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.stream = wire.Stream(ours)
        self.addCleanup(self.stream.close)
        self.addCleanup(self.theirs.close)

    def test_frames_come_one_after_another_however_they_are_cut(self) -> None:
        for byte in b"\0\0\0\2ab\0\0\0\0\0\0\0\1":
            self.theirs.send(bytes((byte,)))
        self.assertEqual(self.stream.frame(10, soon()), b"ab")
        self.assertEqual(self.stream.frame(10, soon()), b"")
        self.theirs.send(b"c")
        self.assertEqual(self.stream.frame(10, soon()), b"c")

    def test_a_wait_that_ends_in_the_middle_of_a_frame_loses_nothing(self) -> None:
        for piece in (b"\0\0", b"\0\3a", b"b"):
            self.theirs.send(piece)
            with self.assertRaises(TimedOut):
                self.stream.frame(10, time.monotonic() + 0.05)
        self.theirs.send(b"c")
        self.assertEqual(self.stream.frame(10, soon()), b"abc")

    def test_an_end_between_frames_is_an_end_and_inside_of_one_a_loss(self) -> None:
        self.theirs.close()
        self.assertIsNone(self.stream.frame(10, soon()))
        for torn in (b"\0", b"\0\0\0", b"\0\0\0\2", b"\0\0\0\2a"):
            ours, theirs = socket.socketpair()
            stream = wire.Stream(ours)
            theirs.send(torn)
            theirs.close()
            with self.subTest(torn), self.assertRaises(Lost):
                stream.frame(10, soon())
            self.assertFalse(stream.is_open)

    def test_a_frame_over_the_limit_is_refused_by_its_length_alone(self) -> None:
        self.theirs.send(b"\0\0\0\x0b")
        with self.assertRaises(ProtocolError):
            self.stream.frame(10, soon())
        self.assertFalse(self.stream.is_open)

    def test_a_peer_that_does_not_read_is_given_up(self) -> None:
        with self.assertRaises(TimedOut):
            self.stream.send(bytes(50_000_000), time.monotonic() + 0.2)
        with self.assertRaisesRegex(Lost, "while something was sent"):
            self.stream.send(b"", soon())

    def test_last_words_are_heard_although_nothing_can_be_said_any_more(self) -> None:
        self.theirs.send(b"\0\0\0\2no")
        self.theirs.close()
        with self.assertRaisesRegex(Lost, "broke"):
            self.stream.send(b"x", soon())
        self.assertEqual(self.stream.frame(10, soon()), b"no")
        self.assertIsNone(self.stream.frame(10, soon()))

    def test_what_is_sent_has_its_length_in_front(self) -> None:
        self.stream.send_frame(b"ab", soon())
        self.assertEqual(self.theirs.recv(100), b"\0\0\0\2ab")

    def test_a_closed_stream_says_so(self) -> None:
        self.stream.close()
        with self.assertRaises(Lost):
            self.stream.send(b"x", soon())
        with self.assertRaises(Lost):
            self.stream.frame(10, soon())

    def test_a_host_that_is_not_there_is_unreachable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for host in ("127.0.0.1", "no-such-host.invalid", "bad\0name", "a" * 300):
            with self.subTest(host), self.assertRaises(Unreachable):
                wire.Stream.connect(host, port, soon())


if __name__ == "__main__":
    unittest.main()
