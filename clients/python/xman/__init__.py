"""Calls xmand: Kerberos-authenticated control of virtual machines.

    from xman import Client

    with Client("skirit1.example.org") as host:
        for domain in host.list(["web*"]).domains:
            print(domain.name, domain.state.name)

`client` holds the session with a host, `messages` everything that is said, `errors` what can go wrong, `codec` how
it looks as bytes, `wire` frames, `gss` Kerberos.
"""

from .client import Client, Events, Listing, Standings, follow, insist
from .errors import (
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
    Unreachable,
)
from .messages import (
    Cursor,
    DomainRow,
    DomainState,
    EventRow,
    Gap,
    Granted,
    LeaseKey,
    LeaseRow,
    NotGranted,
    Pending,
    Standing,
    StatusRow,
    Then,
)

__all__ = [
    "Client",
    "Closed",
    "CodecError",
    "Cursor",
    "DomainRow",
    "DomainState",
    "Error",
    "EventRow",
    "Events",
    "ExpiringWarning",
    "Fault",
    "FaultCode",
    "Gap",
    "Granted",
    "LeaseKey",
    "LeaseRow",
    "Listing",
    "Lost",
    "NotGranted",
    "Pending",
    "ProtocolError",
    "Reason",
    "Refused",
    "Standing",
    "Standings",
    "StatusRow",
    "Tampered",
    "Then",
    "TimedOut",
    "Unauthenticated",
    "Unreachable",
    "follow",
    "insist",
]
