"""What can go wrong, one class for each thing that a caller does about it.

    Error
      CodecError        bytes that are no message, or a value that cannot become one
      ProtocolError     the host broke a rule of the protocol; the connection is closed
        Tampered        somebody between us and the host changed what was sent in clear
      Unreachable       no connection to the host
      Unauthenticated   Kerberos does not let us prove who we are: no ticket, no KDC, no such service
      Refused           the host did not take the connection; `reason` says why
      Fault             the host's answer to a call: no
      Lost              the connection ended
        Closed          the host said why it ends the session; `fault` holds it
        TimedOut        nothing came in time

Their texts hold no tokens, no keys and no arguments of calls.
"""

import enum
from typing import Optional
from uuid import UUID


class Error(Exception):
    """Everything that this package raises on purpose.

    `call` is the id of a change that was under way and whose outcome is not known: whoever sends it again sends the
    same id, and it is carried out once.
    """

    call: Optional[UUID] = None


class CodecError(Error, ValueError):
    """Bytes that are no message, or a value that cannot become one."""


class ProtocolError(Error):
    """The host broke a rule of the protocol; the connection is closed."""


class Tampered(ProtocolError):
    """What was sent in clear is not what arrived: somebody stands in between."""


class Unreachable(Error):
    """The host cannot be connected to."""


class Unauthenticated(Error):
    """Kerberos does not let us prove who we are, or the host who it is."""


class Reason(enum.Enum):
    """Why a host does not take a connection. Whoever says so has proved nothing."""

    CLOCK = "the clocks differ too much"
    NO_KEY = "the host has no key for the ticket: its keytab is not what the KDC thinks"
    EXPIRED = "the ticket has expired: run kinit"
    REPLAY = "the same handshake was seen before: try again"
    OTHER = "the host's log says why"
    NO_VERSION = "host and caller have no version of the protocol in common"
    NO_ROOM = "the host has no room for one more connection: try again later"


class Refused(Error):
    """The host did not take the connection: a hint, since nobody has proved anything yet.

    `host_ahead` is by how many seconds the host's clock is ahead of ours, as it says itself.
    """

    def __init__(self, reason: Reason, host_ahead: Optional[float]) -> None:
        text = f"refused: {reason.value}"
        if reason is Reason.CLOCK and host_ahead is not None:
            way = "ahead of" if host_ahead > 0 else "behind"
            text += f"; the host's is {abs(host_ahead):.0f} s {way} ours"
        super().__init__(text)
        self.reason = reason
        self.host_ahead = host_ahead


class FaultCode(enum.IntEnum):
    """What programs branch on."""

    BAD_REQUEST = 0
    DENIED = 1
    NOT_FOUND = 2
    CONFLICT = 3
    BUSY = 4
    UNKNOWN = 5
    UNAVAILABLE = 6
    REFUSED = 7
    UNSUPPORTED = 8
    EXPIRED = 9
    TOO_LARGE = 10
    INTERNAL = 11

    @property
    def word(self) -> str:
        """The code as people and JSON have it, e.g. `bad-request`."""
        return self.name.lower().replace("_", "-")


class Fault(Error):
    """The host's answer to a call: no. `retry` says whether the same call may succeed later."""

    def __init__(self, code: FaultCode, message: str, retry: bool) -> None:
        super().__init__(message or code.word)
        self.code = code
        self.message = message
        self.retry = retry


class Lost(Error):
    """The connection ended."""


class Closed(Lost):
    """The host ended the session and said why: see `fault`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"the host ended the session: {fault}")
        self.fault = fault


class TimedOut(Lost):
    """Nothing came in time."""


class ExpiringWarning(UserWarning):
    """The ticket ends soon and there is no fresh one: run kinit, or the session ends with it."""
