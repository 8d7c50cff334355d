"""A session with one host.

    with Client("skirit1.example.org") as host:
        for domain in host.list().domains:
            print(domain.name, domain.state.name)

One thread, one call at a time. A read that fails can simply be made again. A change has an id; whoever repeats it
(after `Lost`, or a `Fault` with `retry`) repeats the id as well, and the host carries it out once: `insist` does that.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Callable, Deque, Iterator, List, Optional, Sequence, Tuple, Type, TypeVar, Union
from uuid import UUID, uuid4

from . import messages as m
from . import wire
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
    Unreachable,
)

SOFTWARE = "python-xman 0.1.0"

CONNECT = 20.0  # seconds for a connection; the host gives 10 for the handshake
HANDSHAKE = 10.0
SILENCE = 20.0  # a host that works on a call says so every 5 s
GRACE = 10.0  # for an answer to arrive that was given at the deadline
DEADLINE = 60.0  # of a call that names none
LONGEST = 24 * 3600.0  # the longest deadline that a host grants
LATER = 5  # seconds that a fresh ticket must last longer; less is rounding
RENEWAL = 120.0  # before the end of the ticket: when the host begins to warn, and we to look for a fresh one
LOOK = 10.0  # between two looks for a fresh ticket

T = TypeVar("T")
Happening = Union[m.Cursor, m.EventRow, m.Gap]


@dataclass(frozen=True)
class Listing:
    """Domains, and the hypervisors whose domains are missing from them."""

    domains: Tuple[m.DomainRow, ...]
    troubles: Tuple[m.Trouble, ...]


@dataclass(frozen=True)
class Standings:
    """How a host's domains stand towards jobs, and what room it has."""

    domains: Tuple[m.StatusRow, ...]
    room: m.HostRoom


@dataclass(frozen=True)
class Answer:
    """All that came of a call."""

    reply: m.Reply
    items: Tuple[m.Item, ...]


class Client:
    """A session with the xmand of one host, as whoever has the ticket in the credential cache.

    The host must have a key for `xman/HOST`, HOST exactly as given here. Leave by `with` or `close`.
    """

    #: Whom the host takes us for.
    principal: str
    #: The session's name in the host's audit.
    session: str
    #: The host's program and version.
    software: str
    #: Who the host has proved to be.
    target: str
    #: By how many seconds the host's clock is ahead of ours, as it says itself.
    host_ahead: float
    #: When the session ends unless it is renewed, in seconds since 1970.
    until: int

    def __init__(self, host: str, port: int = wire.PORT, *, timeout: float = CONNECT, software: str = SOFTWARE) -> None:
        from . import gss  # here, so that messages can be used without the package gssapi

        try:
            m.HOST_NAME.encode(host)
        except CodecError:
            raise Unreachable(f"{host!r} is no name of a host") from None
        self.host = host
        self.port = port
        self._gss = gss
        self._running: Optional[UUID] = None
        self._fresh: Optional[gss.Context] = None
        self._expiring = False
        self._looked = 0.0
        self._heard = 0.0
        self._stream = wire.Stream.connect(host, port, time.monotonic() + timeout)
        try:
            self._introduce(software)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session. Changes that have begun go on."""
        self._stream.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Verbs.
    # -----------------------------------------------------------------------------------------------------------------

    def whoami(self) -> m.Whoami:
        """Returns whom the host takes the caller for, and what it may do."""
        return _only(m.Whoami, self.call("whoami").reply)

    def info(self) -> m.Info:
        """Returns what the host is."""
        return _only(m.Info, self.call("info").reply)

    def list(self, patterns: Sequence[str] = (), states: Sequence[m.DomainState] = ()) -> Listing:
        """Returns the domains whose name fits any pattern (or whose UUID it is) and that are in any of the states."""
        items = self.call("list", m.List(tuple(patterns), tuple(states))).items
        domains = tuple(item for item in items if isinstance(item, m.DomainRow))
        troubles = tuple(item for item in items if isinstance(item, m.Trouble))
        return Listing(domains, troubles)

    def pause(self, domain: m.Domain, *, id: Optional[UUID] = None, timeout: Optional[float] = None) -> m.DomainRow:
        """Stops a domain's virtual CPUs. The id makes it one change, however often it is sent."""
        answer = self.call("pause", m.OneDomain(_named(domain)), id=id, timeout=timeout)
        return _only(m.DomainRow, answer.reply)

    def unpause(self, domain: m.Domain, *, id: Optional[UUID] = None, timeout: Optional[float] = None) -> m.DomainRow:
        """Lets a domain's virtual CPUs run again. The id makes it one change, however often it is sent."""
        answer = self.call("unpause", m.Unpause(_named(domain)), id=id, timeout=timeout)
        return _only(m.DomainRow, answer.reply)

    def events(
        self, patterns: Sequence[str] = (), since: Optional[m.Cursor] = None, follow: bool = False
    ) -> Events:
        """Returns what has happened to domains since a cursor, and with `follow` what happens from now on."""
        return Events(self, m.Events(tuple(patterns), since, follow))

    def lease_begin(
        self,
        key: m.LeaseKey,
        domain: m.Domain,
        *,
        user: Optional[str] = None,
        preemptible: Optional[bool] = None,
        ends_in: Optional[float] = None,
        reserve: bool = False,
        wait: bool = True,
        id: Optional[UUID] = None,
        timeout: Optional[float] = None,
    ) -> m.Lease:
        """Says that a job begins in a domain, and returns what came of it: `Granted`, `Pending` or `NotGranted`.

        The key stands for the lease: the same again is the same lease, also with another id, and tells how it stands.
        `ends_in` is in seconds. With `reserve` the room is only kept, for that long. Without `wait` the answer is
        `Pending` where others have to give way; with it, only where the time is over first.
        """
        ends_in_ms = None if ends_in is None else max(int(ends_in * 1000), 1)
        begin = m.LeaseBegin(key, _named(domain), user, preemptible, ends_in_ms, reserve, wait)
        reply = self.call("lease-begin", begin, id=id, timeout=timeout).reply
        if not isinstance(reply, (m.Granted, m.Pending, m.NotGranted)):
            raise ProtocolError(f"the host answered {type(reply).__name__} instead of a lease")
        return reply

    def lease_end(
        self,
        key: m.LeaseKey,
        domain: Optional[m.Domain] = None,
        *,
        id: Optional[UUID] = None,
        timeout: Optional[float] = None,
    ) -> Tuple[m.LeaseKey, ...]:
        """Says that a job has ended, in all its domains or in one, and returns the leases that it had; none is no failure."""
        end = m.LeaseEnd(key, None if domain is None else _named(domain))
        return _only(m.Ended, self.call("lease-end", end, id=id, timeout=timeout).reply).keys

    def leases(self, system: Optional[str] = None) -> Tuple[m.LeaseRow, ...]:
        """Returns the leases, of all batch systems or of one."""
        items = self.call("lease-list", m.LeaseList(system)).items
        return tuple(item for item in items if isinstance(item, m.LeaseRow))

    def status(self, patterns: Sequence[str] = ()) -> Standings:
        """Returns how domains stand towards jobs; all that have a class, where there are no patterns."""
        answer = self.call("status", m.Status(tuple(patterns)))
        domains = tuple(item for item in answer.items if isinstance(item, m.StatusRow))
        return Standings(domains, _only(m.HostRoom, answer.reply))

    def call(
        self,
        verb: str,
        arguments: Any = m.Nothing(),
        *,
        id: Optional[UUID] = None,
        timeout: Optional[float] = None,
        hypervisor: Optional[str] = None,
        on_behalf_of: Optional[str] = None,
        progress: Optional[Callable[[m.Progress], None]] = None,
    ) -> Answer:
        """Makes a call of any verb that is no stream, and returns all that came of it.

        `arguments` is the verb's structure from `xman.messages`. Raises Fault where the host says no, Lost where the
        connection ended first. `timeout` is in seconds; the host's own limit where it is absent.
        """
        known = m.VERBS.get(verb)
        if known is None:
            raise CodecError(f"there is no verb {verb}")
        if known.effect is m.Effect.STREAM:
            raise CodecError(f"{verb} is a stream, which this package does not speak")
        items: List[m.Item] = []
        begun = self._begin(known, arguments, id, timeout, hypervisor, on_behalf_of)
        try:
            while True:
                message = self._next(begun)
                if isinstance(message, m.Items):
                    items.extend(message.items)
                elif isinstance(message, m.ProgressOf):
                    if progress is not None:
                        progress(message.progress)
                elif message is not None:
                    return Answer(self._end(begun, message), tuple(items))
        except Fault:
            raise
        except BaseException:
            # Whatever else of the answer may come, nobody will wait for it.
            self.close()
            raise

    def renew(self) -> None:
        """Gives the session a new end from a fresh ticket, which must be in the credential cache.

        The client does so by itself when the host says that the ticket ends soon.
        """
        self._idle()
        fresh = self._gss.Context(self.host)
        self._offer(fresh, fresh.step())
        end = time.monotonic() + SILENCE
        try:
            while self._fresh is not None:
                message = self._hear(end)
                if not self._take(message):
                    raise ProtocolError(f"{type(message).__name__} where no call runs")
        except BaseException:
            self.close()
            raise

    # -----------------------------------------------------------------------------------------------------------------
    # How a session begins and goes on.
    # -----------------------------------------------------------------------------------------------------------------

    def _introduce(self, software: str) -> None:
        end = time.monotonic() + HANDSHAKE
        preface = wire.preface()
        try:
            self._stream.send(preface, end)
        except Lost:
            pass  # a host without room answers and closes before it has heard anything
        try:
            answer = wire.Answer.read(self._stream.exactly(wire.ANSWER, end))
        except TimedOut:
            raise TimedOut(f"{self.host}, port {self.port}: nothing answers in time") from None
        self._context = self._prove(answer, end)
        self._ticket = self._context.until
        hello = m.Hello(preface, answer.raw, software, self._ticket)
        self._say(hello, end)
        welcome = self._welcome(end)
        if (welcome.preface, welcome.answer) != (preface, answer.raw):
            raise Tampered("what was sent in clear is not what arrived: somebody stands between us and the host")
        self.principal = welcome.principal
        self.session = welcome.session
        self.software = welcome.software
        self.until = welcome.until
        self.target = self._context.target
        self.host_ahead = answer.host_ahead

    def _prove(self, answer: wire.Answer, end: float) -> Any:
        context = self._gss.Context(self.host)
        token = context.step()
        while token or not context.complete:
            if token:
                self._stream.send_frame(b"\0" + token, end)
            if context.complete:
                break
            frame = self._stream.frame(wire.HANDSHAKE_FRAME, end)
            if frame is None:
                raise Lost("the host closed the connection during the handshake")
            if len(frame) == 2 and frame[0] == 1:
                raise wire.refusal(frame[1], answer.host_ahead)
            if frame[:1] != b"\0":
                raise ProtocolError("a frame that belongs to no handshake")
            token = context.step(frame[1:])
        return context

    def _welcome(self, end: float) -> m.Welcome:
        frame = self._stream.frame(wire.SEALED_FRAME, end)
        if frame is None:
            raise Tampered(
                "the host closed the connection without a word after we repeated under encryption what was sent in "
                "clear: somebody may have changed it on its way; the host's audit says more"
            )
        message = self._open(frame)
        if isinstance(message, m.Closing):
            raise Closed(_fault(message.fault))
        if not isinstance(message, m.Welcome):
            raise ProtocolError(f"{type(message).__name__} instead of a welcome")
        return message

    def _say(self, message: m.Outgoing, end: float) -> None:
        self._send(_message(message), end)

    def _send(self, data: bytes, end: float) -> None:
        self._stream.send_frame(self._context.seal(data), end)

    def _hear(self, end: float) -> m.Incoming:
        frame = self._stream.frame(wire.SEALED_FRAME, end)
        if frame is None:
            self.close()
            raise Lost("the host closed the connection; its audit says why")
        self._heard = time.monotonic()
        return self._open(frame)

    def _open(self, frame: bytes) -> m.Incoming:
        try:
            return m.INCOMING.decode(self._context.open(frame))
        except Error:
            self.close()
            raise

    def _take(self, message: m.Incoming) -> bool:
        """Takes what belongs to the session and to no call; returns whether it was such a message."""
        if isinstance(message, m.Alive):
            return True
        if isinstance(message, m.Expiring):
            self._expiring = True
            if not self._look():
                text = f"the ticket ends in {message.seconds} s and there is no fresh one: run kinit"
                warnings.warn(text, ExpiringWarning, stacklevel=2)
            return True
        if isinstance(message, m.Renewed) and self._fresh is not None:
            fresh, self._fresh = self._fresh, None
            try:
                if not fresh.complete:
                    fresh.step(message.token)
                elif message.token:
                    raise ProtocolError("a token for a context that needs none")
                if not fresh.complete:
                    raise ProtocolError("the host did not prove itself anew")
            except Error:
                self.close()
                raise
            self.until = message.until
            self._ticket = fresh.until
            self._expiring = False
            return True
        if isinstance(message, m.Closing):
            self.close()
            raise Closed(_fault(message.fault))
        return False

    def _look(self) -> bool:
        """Offers a fresh ticket, if there is one that lasts longer; returns whether one is offered."""
        if self._fresh is not None:
            return True
        self._looked = time.monotonic()
        try:
            fresh = self._gss.Context(self.host)
            token = fresh.step()
        except Error:
            return False
        if fresh.until < self._ticket + LATER:
            return False
        self._offer(fresh, token)
        return True

    def _offer(self, fresh: Any, token: bytes) -> None:
        self._fresh = fresh
        self._say(m.Renew(token, fresh.until), time.monotonic() + SILENCE)

    def _look_again(self) -> None:
        if not self._expiring and time.time() > self.until - RENEWAL:
            self._expiring = True
        if self._expiring and time.monotonic() > self._looked + LOOK:
            self._look()

    # -----------------------------------------------------------------------------------------------------------------
    # How a call begins, goes on and ends.
    # -----------------------------------------------------------------------------------------------------------------

    def _idle(self) -> None:
        if not self._stream.is_open:
            raise Lost("the session has ended")
        if self._running is not None:
            raise Error("another call runs on this session: finish it, or close its events, first")

    def _begin(
        self,
        verb: m.Verb,
        arguments: Any,
        id: Optional[UUID] = None,
        timeout: Optional[float] = None,
        hypervisor: Optional[str] = None,
        on_behalf_of: Optional[str] = None,
    ) -> Begun:
        self._idle()
        body = verb.arguments.encode(arguments)
        deadline_ms = None if timeout is None else int(min(max(timeout, 0.001), LONGEST) * 1000)
        call = m.Call(id or uuid4(), deadline_ms, verb.number, hypervisor, on_behalf_of, body)
        message = _message(call)
        begun = Begun(call.id, verb, time.monotonic() + _patience(verb, arguments, timeout) + GRACE)
        self._look_again()
        self._running = call.id
        self._heard = time.monotonic()
        try:
            self._send(message, self._heard + SILENCE)
        except BaseException as e:
            self.close()
            if isinstance(e, Error):
                e.call = begun.repeat
            raise
        return begun

    def _next(self, begun: Begun, until: float = float("inf")) -> Union[m.Items, m.ProgressOf, m.DoneWith, None]:
        """Returns the next message of a call that runs, or nothing when none has come by `until`."""
        try:
            while True:
                end = min(self._heard + SILENCE, begun.end)
                try:
                    message = self._hear(min(end, until))
                except TimedOut:
                    if until < end:
                        return None
                    raise TimedOut("the host has fallen silent" if end < begun.end else "no answer in time") from None
                if self._take(message):
                    self._look_again()
                elif isinstance(message, (m.Items, m.ProgressOf, m.DoneWith)) and message.call == begun.id:
                    return message
                else:
                    self.close()
                    raise ProtocolError(f"{type(message).__name__} that belongs to no call of ours")
        except Error as e:
            e.call = begun.repeat
            raise

    def _end(self, begun: Begun, message: m.DoneWith) -> m.Reply:
        self._running = None
        outcome = message.outcome
        if isinstance(outcome, m.FaultRow):
            fault = _fault(outcome)
            if fault.retry or fault.code is FaultCode.UNKNOWN:
                fault.call = begun.repeat
            raise fault
        return outcome

    def _cancel(self, begun: Begun) -> None:
        """Ends a read that runs, and forgets what else comes of it."""
        begun = Begun(begun.id, begun.verb, time.monotonic() + SILENCE)
        self._say(m.Cancel(begun.id), begun.end)
        while not isinstance(self._next(begun), m.DoneWith):
            pass
        self._running = None


@dataclass(frozen=True)
class Begun:
    """A call that runs, and until when its answer is waited for."""

    id: UUID
    verb: m.Verb
    end: float

    @property
    def repeat(self) -> Optional[UUID]:
        """The id that must be repeated with the call."""
        return self.id if self.verb.changes else None


class Events:
    """What happens to a host's domains, one item after another: `EventRow`, `Gap` and `Cursor`.

        with host.events(follow=True) as events:
            for item in events:
                ...

    `cursor` is always the place after the last item: give it to `Client.events` as `since` to go on there, also on
    another session. The host says Fault with the code BUSY to who reads too slowly.
    """

    def __init__(self, client: Client, arguments: m.Events) -> None:
        self.cursor = arguments.since
        self._client = client
        self._items: Deque[m.Item] = deque()
        self._begun: Optional[Begun] = client._begin(m.VERBS["events"], arguments)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Happening]:
        return self

    def __next__(self) -> Happening:
        item = self._get(float("inf"))
        if item is None:
            raise StopIteration
        return item

    @property
    def over(self) -> bool:
        """Whether no item will come any more."""
        return self._begun is None and not self._items

    def wait(self, timeout: float) -> Optional[Happening]:
        """Returns the next item, or nothing when none came within so many seconds, or none will (see `over`)."""
        return self._get(time.monotonic() + timeout)

    def close(self) -> None:
        """Tells the host that no more is wanted; the session can be used again."""
        begun, self._begun = self._begun, None
        self._items.clear()
        if begun is None or not self._client._stream.is_open:
            return
        try:
            self._client._cancel(begun)
        except Lost:
            self._client.close()
        except BaseException:
            self._client.close()
            raise

    def _get(self, until: float) -> Optional[Happening]:
        while not self._items:
            if self._begun is None:
                return None
            message = self._client._next(self._begun, until)
            if message is None:
                return None
            if isinstance(message, m.Items):
                self._items.extend(message.items)
            elif isinstance(message, m.DoneWith):
                begun, self._begun = self._begun, None
                self._client._end(begun, message)
            else:
                self._client.close()
                raise ProtocolError("progress of events")
        item = self._items.popleft()
        if isinstance(item, m.Cursor):
            self.cursor = item
        elif isinstance(item, (m.EventRow, m.Gap)):
            self.cursor = item.cursor
        else:
            self._client.close()
            raise ProtocolError(f"{type(item).__name__} among events")
        return item


def insist(connect: Callable[[], Client], change: Callable[[Client, UUID], T], patience: float = 60.0) -> T:
    """Makes a change once, however often the connection breaks: connects again and sends the same id.

        insist(lambda: Client("skirit1"), lambda host, id: host.pause(domain, id=id))

    What cannot be helped by trying again, or not within so many seconds, is raised; `call` then holds the id if the
    change may have begun.
    """
    id = uuid4()
    sent: Optional[UUID] = None
    for last in _attempts(patience):
        try:
            with connect() as client:
                return change(client, id)
        except Error as e:
            sent = e.call = e.call or sent
            if last or not _passes(e):
                raise
    raise AssertionError("the last attempt returns or raises")


def follow(
    connect: Callable[[], Client],
    patterns: Sequence[str] = (),
    since: Optional[m.Cursor] = None,
    patience: float = 60.0,
) -> Iterator[Happening]:
    """Yields what happens to a host's domains, across lost connections: each new one goes on where the last one ended.

    What cannot be helped by trying again, or not within so many seconds, is raised.
    """
    attempts = _attempts(patience)
    while True:
        last = next(attempts)
        try:
            with connect() as client, client.events(patterns, since, follow=True) as events:
                for item in events:
                    attempts = _attempts(patience)
                    since = events.cursor
                    yield item
        except Error as e:
            if last or not _passes(e):
                raise


def _attempts(patience: float) -> Iterator[bool]:
    """Yields once for each attempt, with pauses that grow; the last time True."""
    end = time.monotonic() + patience
    pause = 0.2
    while time.monotonic() + pause < end:
        yield False
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
    yield True


def _passes(error: Error) -> bool:
    """Returns whether an error may be gone when the same is tried again."""
    if isinstance(error, Closed):
        return error.fault.retry or error.fault.code in (FaultCode.EXPIRED, FaultCode.UNAVAILABLE)
    if isinstance(error, Fault):
        return error.retry
    if isinstance(error, Refused):
        return error.reason in (Reason.NO_ROOM, Reason.REPLAY)
    return isinstance(error, (Lost, Unreachable))


def _patience(verb: m.Verb, arguments: Any, timeout: Optional[float]) -> float:
    """Returns for how long the host works on a call at most; as long as it says that it lives where that is unbounded."""
    if timeout is not None:
        return min(timeout, LONGEST)
    unbounded = verb.effect is m.Effect.JOB or verb.name == "job-wait" or getattr(arguments, "follow", False)
    return float("inf") if unbounded else DEADLINE


def _message(message: m.Outgoing) -> bytes:
    """Returns the bytes of a message; raises CodecError where it has none, before anything is sent."""
    data = m.OUTGOING.encode(message)
    if len(data) > wire.MESSAGE:
        raise CodecError(f"a message of {len(data)} bytes, where {wire.MESSAGE} are the most")
    return data


def _fault(row: m.FaultRow) -> Fault:
    return Fault(row.code, row.message, row.retry)


def _only(wanted: Type[T], reply: Any) -> T:
    if not isinstance(reply, wanted):
        raise ProtocolError(f"the host answered {type(reply).__name__} instead of {wanted.__name__}")
    return reply


def _named(domain: m.Domain) -> m.Domain:
    return m.domain(domain) if isinstance(domain, str) else domain
