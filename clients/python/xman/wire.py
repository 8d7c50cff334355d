"""Bytes on the wire: the prefaces in clear, and frames.

What has arrived is kept until it makes a frame, so a wait that ends in the middle (a timeout, Ctrl-C) loses nothing.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Optional

from .errors import Lost, ProtocolError, Reason, Refused, TimedOut, Unreachable

PORT = 9626
VERSION = 1
MAGIC = b"XMAN"
ANSWER = 14  # bytes of the host's preface
HANDSHAKE_FRAME = 65_536
SEALED_FRAME = 131_072
# The longest message before it is sealed; the rest is what gss_wrap may add.
MESSAGE = SEALED_FRAME - 128

_PIECE = 65_536


def preface() -> bytes:
    """Returns what the caller says first."""
    return MAGIC + struct.pack(">HH", VERSION, VERSION)


@dataclass(frozen=True)
class Answer:
    """The host's preface, as it came, and by how many seconds its clock is ahead of ours."""

    raw: bytes
    host_ahead: float

    @classmethod
    def read(cls, raw: bytes) -> Answer:
        """Raises Refused where the host does not want to, ProtocolError where it is no xmand."""
        if len(raw) != ANSWER or raw[:4] != MAGIC:
            raise ProtocolError("what answers there is no xmand")
        version, clock = struct.unpack(">Hq", raw[4:])
        host_ahead = clock / 1000 - time.time()
        if version == 0:
            raise Refused(Reason.NO_VERSION, host_ahead)
        if version == 65_535:
            raise Refused(Reason.NO_ROOM, host_ahead)
        if version != VERSION:
            raise ProtocolError(f"the host chose version {version}, which nobody offered")
        return cls(raw, host_ahead)


def refusal(code: int, host_ahead: float) -> Refused:
    """Returns what a refusal of this code means."""
    reasons = {1: Reason.CLOCK, 2: Reason.NO_KEY, 3: Reason.EXPIRED, 4: Reason.REPLAY}
    return Refused(reasons.get(code, Reason.OTHER), host_ahead)


class Stream:
    """A connection that takes and gives frames, each within a deadline of time.monotonic()."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._arrived = bytearray()
        self._open = True
        self._torn = False

    @classmethod
    def connect(cls, host: str, port: int, deadline: float) -> Stream:
        """Connects to the first address of the host that answers."""
        try:
            connection = socket.create_connection((host, port), timeout=_left(deadline))
        except (OSError, UnicodeError) as e:
            raise Unreachable(f"{host}, port {port}: {e}") from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection)

    @property
    def is_open(self) -> bool:
        return self._open

    def close(self) -> None:
        self._open = False
        self._socket.close()

    def send(self, data: bytes, deadline: float) -> None:
        """Sends bytes as they are. When that does not work to the end nothing else can be sent, but what the host has
        said before can still be read."""
        if self._torn:
            raise Lost("the connection broke while something was sent")
        self._torn = True
        rest = memoryview(data)
        while rest:
            self._wait(deadline, write=True)
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as e:
                raise Lost(f"the connection broke: {e}") from None
        self._torn = False

    def send_frame(self, data: bytes, deadline: float) -> None:
        self.send(struct.pack(">I", len(data)) + data, deadline)

    def exactly(self, count: int, deadline: float) -> bytes:
        """Returns so many bytes; raises Lost when the connection ends before, TimedOut at the deadline."""
        self._gather(count, deadline)
        return self._pop(count)

    def frame(self, most: int, deadline: float) -> Optional[bytes]:
        """Returns a frame, or nothing when the connection was closed between two of them.

        After TimedOut the stream is as it was, and can be asked again.
        """
        if not self._arrived and not self._more(deadline):
            return None
        self._gather(4, deadline)
        length = int.from_bytes(self._arrived[:4], "big")
        if length > most:
            self.close()
            raise ProtocolError(f"the host announced a frame of {length} bytes, where {most} are the most")
        self._gather(4 + length, deadline)
        return self._pop(4 + length)[4:]

    def _pop(self, count: int) -> bytes:
        data = bytes(self._arrived[:count])
        del self._arrived[:count]
        return data

    def _gather(self, count: int, deadline: float) -> None:
        while len(self._arrived) < count:
            if not self._more(deadline):
                self.close()
                raise Lost("the connection ended in the middle of a frame")

    def _more(self, deadline: float) -> bool:
        """Waits for bytes; returns whether there were any before the end of the connection."""
        while True:
            self._wait(deadline, write=False)
            try:
                piece = self._socket.recv(_PIECE)
            except BlockingIOError:
                continue
            except OSError as e:
                self.close()
                raise Lost(f"the connection broke: {e}") from None
            self._arrived += piece
            return bool(piece)

    def _wait(self, deadline: float, write: bool) -> None:
        if not self._open:
            raise Lost("the connection is closed")
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT if write else select.POLLIN)
        # A millisecond more, so that the deadline has passed when poll says so.
        if not poll.poll(_left(deadline) * 1000 + 1):
            raise TimedOut("nothing came in time" if not write else "the host did not read in time")


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
