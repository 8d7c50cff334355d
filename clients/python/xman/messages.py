"""Every message of the protocol: the tables of docs/PROTOCOL.md, in its order and with its names.

Structures are frozen dataclasses. The variants of an enumeration are told apart by their Python type: an item is a
`DomainRow`, a `str` (a piece of text), an `EventRow` and so on; a domain is a `UUID` or a `str` (its name).
"""

from __future__ import annotations

import enum
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union
from uuid import UUID

from .codec import (
    BOOL,
    BYTES,
    F64,
    ID,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Bytes,
    Choice,
    Fixed,
    Kind,
    ListOf,
    Maybe,
    Row,
    Struct,
    Text,
    Variants,
    of,
)
from .errors import CodecError, FaultCode

# ---------------------------------------------------------------------------------------------------------------------
# Strings with a meaning of their own.
# ---------------------------------------------------------------------------------------------------------------------

# They turn the direction of text or separate lines: a name with them is not what it looks like.
_MARKS = frozenset("\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PRINCIPAL = re.compile(r"(?:[^@\\]|\\[/@\\tnb0])+@(?:[^@\\]|\\[/@\\tnb0])+")
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_JOB_ID = re.compile(r"[!-.0-~]{1,128}")
_MAC = re.compile(r"[0-9a-f][02468ace](?::[0-9a-f]{2}){5}")
_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:-]{0,252}")
_HYPHENATED = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_UUID = re.compile(rf"[0-9a-fA-F]{{32}}|(?:urn:uuid:)?{_HYPHENATED}|\{{{_HYPHENATED}\}}")
# No characters, though XML and files would take them for some.
_NONCHARACTERS = frozenset("\ufffe\uffff")


def _control(value: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in value)


def _marked(value: str) -> bool:
    return not _MARKS.isdisjoint(value)


def _length(value: str) -> int:
    return len(value.encode("utf-8", "surrogatepass"))


def _principal(value: str) -> Optional[str]:
    if _control(value) or _length(value) > 1024 or not _PRINCIPAL.fullmatch(value):
        return "that is no principal"
    return None


def _domain_name(value: str) -> Optional[str]:
    if not 1 <= _length(value) <= 240 or _control(value) or _marked(value) or "/" in value:
        return "that is no domain name"
    if value in (".", "..") or _UUID.fullmatch(value):
        return "that is no domain name"
    return None


def _tag(value: str) -> Optional[str]:
    return None if _TAG.fullmatch(value) else "that is no tag"


def _label_value(value: str) -> Optional[str]:
    wrong = _control(value) or _marked(value) or not _NONCHARACTERS.isdisjoint(value)
    return "that is no label value" if wrong or not 1 <= _length(value) <= 255 else None


def _job_id(value: str) -> Optional[str]:
    return None if _JOB_ID.fullmatch(value) else "that is no job's id"


def _link_name(value: str) -> Optional[str]:
    wrong = _control(value) or _marked(value) or "/" in value or not _NONCHARACTERS.isdisjoint(value)
    return "that is no link name" if wrong or not 1 <= _length(value) <= 63 else None


def _mac(value: str) -> Optional[str]:
    return None if _MAC.fullmatch(value) else "that is no MAC address of one interface"


def _host_name(value: str) -> Optional[str]:
    return None if _HOST.fullmatch(value) else "that is no host name"


PRINCIPAL = Text(_principal)
DOMAIN_NAME = Text(_domain_name)
TAG = Text(_tag)
LABEL_VALUE = Text(_label_value)
JOB_ID = Text(_job_id)
LINK_NAME = Text(_link_name)
MAC = Text(_mac)
HOST_NAME = Text(_host_name)

# A domain is named by its UUID or by its name.
Domain = Union[UUID, str]
DOMAIN: Kind[Domain] = Variants("domain", ID, DOMAIN_NAME)


def domain(text: str) -> Domain:
    """Returns what a person means by a domain: no name looks like a UUID."""
    return UUID(text) if _UUID.fullmatch(text) else text


@dataclass(frozen=True)
class Permit:
    """What lets one migration in. Who has it may use it, so it is never shown."""

    secret: bytes = of(Fixed(32), secret=True)


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in a host's events, shown as BOOK.NUMBER. A host begins a new book each time xmand starts."""

    book: UUID = of(ID)
    number: int = of(U64)

    def __str__(self) -> str:
        return f"{self.book.hex}.{self.number}"

    @classmethod
    def oldest(cls) -> Cursor:
        """Returns the place before all that a host still knows."""
        return cls(UUID(int=0), 0)

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Returns the cursor that `str` of it gave; raises CodecError where there is none."""
        book, dot, number = text.partition(".")
        if not re.fullmatch(r"[0-9a-f]{32}", book) or not re.fullmatch(r"[0-9]{1,20}", number):
            raise CodecError("a cursor looks like BOOK.NUMBER, the book as 32 hexadecimal digits")
        return cls(UUID(hex=book), int(number))


@dataclass(frozen=True, order=True)
class LeaseKey:
    """One run of one job of a batch system, shown as SYSTEM/CLUSTER/JOB/RUN."""

    system: str = of(TAG)
    cluster: str = of(TAG)
    id: str = of(JOB_ID)
    run: int = of(U32, 0)

    def __str__(self) -> str:
        return f"{self.system}/{self.cluster}/{self.id}/{self.run}"

    @classmethod
    def parse(cls, text: str) -> LeaseKey:
        """Returns the key that `str` of it gave; raises CodecError where there is none."""
        parts = text.split("/")
        if len(parts) != 4 or not re.fullmatch(r"[0-9]{1,10}", parts[3]):
            raise CodecError("a lease is written SYSTEM/CLUSTER/JOB/RUN, as slurm/grid/4711/0")
        key = cls(parts[0], parts[1], parts[2], int(parts[3]))
        LEASE_KEY.encode(key)
        return key


PERMIT = Struct(Permit)
CURSOR = Struct(Cursor)
LEASE_KEY = Struct(LeaseKey)

# ---------------------------------------------------------------------------------------------------------------------
# Answers.
# ---------------------------------------------------------------------------------------------------------------------


class DomainState(enum.IntEnum):
    UNKNOWN = 0
    RUNNING = 1
    BLOCKED = 2
    PAUSED = 3
    SHUTTING_DOWN = 4
    OFF = 5
    CRASHED = 6
    SLEEPING = 7


class What(enum.IntEnum):
    """What happened to a domain."""

    DEFINED = 0
    UNDEFINED = 1
    RENAMED = 2
    STARTED = 3
    PAUSED = 4
    RESUMED = 5
    SHUTTING_DOWN = 6
    STOPPED = 7
    SLEEPING = 8
    CRASHED = 9
    REBOOTED = 10
    LABELLED = 11
    FOUND = 12
    STANDING = 13


class JobState(enum.IntEnum):
    RUNNING = 0
    DONE = 1
    FAILED = 2
    UNKNOWN = 3


class Standing(enum.IntEnum):
    """How a domain stands towards jobs."""

    DOWN = 0
    BOOTING = 1
    FREE = 2
    OCCUPIED_WOULD_PREEMPT = 3
    OCCUPIED = 4
    RUNNING_PREEMPTIBLE = 5
    RUNNING = 6
    PREEMPTED = 7
    FROZEN = 8


class Depth(enum.IntEnum):
    """How deep a domain goes to make room."""

    STARVE = 0
    SHRINK = 1
    PAUSE = 2
    FREEZE = 3


class LeaseState(enum.IntEnum):
    RESERVED = 0
    PREPARING = 1
    ACTIVE = 2
    PREEMPTED = 3


class Then(enum.IntEnum):
    """What to do about a refusal."""

    LATER = 0
    ELSEWHERE = 1
    NEVER = 2


DOMAIN_STATE = Choice(DomainState)
STANDING = Choice(Standing)
DEPTH = Choice(Depth)


@dataclass(frozen=True)
class DomainRow:
    """A domain, as the host knew it `age_ms` ago."""

    name: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    hypervisor: str = of(STRING)
    id: Optional[int] = of(Maybe(U32))
    state: DomainState = of(DOMAIN_STATE)
    reason: str = of(STRING)
    memory_kib: int = of(U64)
    max_memory_kib: int = of(U64)
    vcpus: int = of(U32)
    max_vcpus: int = of(U32)
    cpu_time_ns: int = of(U64)
    autostart: bool = of(BOOL)
    persistent: bool = of(BOOL)
    saved: bool = of(BOOL)
    since_ms: Optional[int] = of(Maybe(U64))
    standing: Optional[Standing] = of(Maybe(STANDING))
    preempted_ms: int = of(U64)
    owners: Tuple[str, ...] = of(ListOf(PRINCIPAL))
    class_: Optional[str] = of(Maybe(TAG))
    labels: Tuple[Tuple[str, str], ...] = of(ListOf(Row(TAG, LABEL_VALUE)))
    metadata_trouble: str = of(STRING)
    age_ms: int = of(U64)
    stale: bool = of(BOOL)


@dataclass(frozen=True)
class Progress:
    """How far a job is. The rate is in bytes a second, 0 where unknown."""

    phase: str = of(STRING)
    percent: int = of(U8)
    done_bytes: int = of(U64)
    remaining_bytes: int = of(U64)
    total_bytes: int = of(U64)
    rate: int = of(U64)
    elapsed_ms: int = of(U64)
    eta_ms: Optional[int] = of(Maybe(U64))


@dataclass(frozen=True)
class JobRow:
    """Long work, by the id of the call that began it."""

    id: UUID = of(ID)
    principal: str = of(PRINCIPAL)
    verb: str = of(STRING)
    domain: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    detail: str = of(STRING)
    state: JobState = of(Choice(JobState))
    result: str = of(STRING)
    began_ms: int = of(U64)
    ended_ms: Optional[int] = of(Maybe(U64))
    progress: Optional[Progress] = of(Maybe(Struct(Progress)))


@dataclass(frozen=True)
class Done:
    """It is done, and there is nothing more to say."""


@dataclass(frozen=True)
class Whoami:
    """Whom the host takes the caller for, and what lets it in."""

    principal: str = of(PRINCIPAL)
    until: int = of(U64)
    verbs: Tuple[str, ...] = of(ListOf(STRING))
    rule: str = of(STRING)
    groups: Tuple[str, ...] = of(ListOf(STRING))
    acting: Optional[str] = of(Maybe(PRINCIPAL))
    session: str = of(STRING)


@dataclass(frozen=True)
class Hypervisor:
    """One of the host's connections to libvirt."""

    uri: str = of(STRING)
    driver: str = of(STRING)
    version: str = of(STRING)
    libvirt: str = of(STRING)
    trouble: str = of(STRING)
    age_ms: int = of(U64)


@dataclass(frozen=True)
class Info:
    """A host."""

    hostname: str = of(STRING)
    xmand: str = of(STRING)
    hypervisors: Tuple[Hypervisor, ...] = of(ListOf(Struct(Hypervisor)))
    cpu_model: str = of(STRING)
    cpus: int = of(U32)
    mhz: int = of(U32)
    memory_kib: int = of(U64)
    free_memory_kib: int = of(U64)
    load: Tuple[float, float, float] = of(Row(F64, F64, F64))
    active: int = of(U32)
    domains: int = of(U32)
    used_vcpus: int = of(U32)
    used_memory_kib: int = of(U64)
    stuck_lanes: int = of(U32)


@dataclass(frozen=True)
class Gone:
    """A domain that is no more."""

    name: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)


@dataclass(frozen=True)
class Memory:
    """A domain, and what was asked of its guest, which gives memory back by and by."""

    domain: DomainRow = of(Struct(DomainRow))
    asked_kib: int = of(U64)


@dataclass(frozen=True)
class Step:
    """What one backend of the policy says."""

    backend: str = of(STRING)
    opinion: str = of(STRING)
    because: str = of(STRING)
    wants: Tuple[str, ...] = of(ListOf(STRING))


@dataclass(frozen=True)
class Explained:
    """Why somebody may do something, or not."""

    principal: str = of(PRINCIPAL)
    action: str = of(STRING)
    domain: str = of(STRING)
    allowed: bool = of(BOOL)
    rule: str = of(STRING)
    steps: Tuple[Step, ...] = of(ListOf(Struct(Step)))


@dataclass(frozen=True)
class DiskAt:
    """A disk by its tag in the guest, e.g. `vdb`."""

    target: str = of(TAG)


@dataclass(frozen=True)
class InterfaceWith:
    """An interface by its address."""

    mac: str = of(MAC)


NamedDevice = Union[DiskAt, InterfaceWith]
NAMED_DEVICE: Kind[NamedDevice] = Variants("device", Struct(DiskAt), Struct(InterfaceWith))


@dataclass(frozen=True)
class Attached:
    """A domain, and what its new device is called."""

    domain: DomainRow = of(Struct(DomainRow))
    device: NamedDevice = of(NAMED_DEVICE)


@dataclass(frozen=True)
class LeaseRow:
    """A job's lease of a domain."""

    key: LeaseKey = of(LEASE_KEY)
    domain: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    user: Optional[str] = of(Maybe(PRINCIPAL))
    principal: str = of(PRINCIPAL)
    state: LeaseState = of(Choice(LeaseState))
    preemptible: bool = of(BOOL)
    victims: Tuple[str, ...] = of(ListOf(DOMAIN_NAME))
    began_ms: int = of(U64)
    ends_in_ms: Optional[int] = of(Maybe(U64))


@dataclass(frozen=True)
class Granted:
    """The lease is active or reserved, and libvirt was seen to agree."""

    lease: LeaseRow = of(Struct(LeaseRow))


@dataclass(frozen=True)
class Pending:
    """The lease is there and its job must not begin yet: the same call again tells more."""

    lease: LeaseRow = of(Struct(LeaseRow))


@dataclass(frozen=True)
class NotGranted:
    """There is no lease, and nobody gave way."""

    why: str = of(STRING)
    then: Then = of(Choice(Then))


Lease = Union[Granted, Pending, NotGranted]
LEASE: Kind[Lease] = Variants("Lease", Struct(Granted), Struct(Pending), Struct(NotGranted))


@dataclass(frozen=True)
class Ended:
    """The leases that there were and are no more."""

    keys: Tuple[LeaseKey, ...] = of(ListOf(LEASE_KEY))


@dataclass(frozen=True)
class NeedsRoom:
    """There is no room for it; the job that has it, where it is one."""

    lease: Optional[LeaseKey] = of(Maybe(LEASE_KEY))


@dataclass(frozen=True)
class Suspended:
    """The batch system, which has suspended this job of the domain's own."""

    lease: LeaseKey = of(LEASE_KEY)


@dataclass(frozen=True)
class Person:
    """Somebody who asked for it."""

    principal: str = of(PRINCIPAL)


Holder = Union[NeedsRoom, Suspended, Person]


@dataclass(frozen=True)
class Hold:
    """What keeps a domain from running."""

    holder: Holder = of(Variants("holder", Struct(NeedsRoom), Struct(Suspended), Struct(Person)))
    depth: Depth = of(DEPTH)
    reason: str = of(STRING)
    since_ms: int = of(U64)


@dataclass(frozen=True)
class StatusRow:
    """How a domain stands towards jobs."""

    name: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    hypervisor: str = of(STRING)
    standing: Standing = of(STANDING)
    since_ms: Optional[int] = of(Maybe(U64))
    class_: Optional[str] = of(Maybe(TAG))
    used_cpus: int = of(U32)
    available_cpus: int = of(U32)
    preempted_ms: int = of(U64)
    depth: Optional[Depth] = of(Maybe(DEPTH))
    doing: str = of(STRING)
    holds: Tuple[Hold, ...] = of(ListOf(Struct(Hold)))
    leases: Tuple[LeaseKey, ...] = of(ListOf(LEASE_KEY))


@dataclass(frozen=True)
class MaintenanceRow:
    """Why nothing new begins on a host."""

    reason: str = of(LABEL_VALUE)
    principal: str = of(PRINCIPAL)
    since_ms: int = of(U64)


@dataclass(frozen=True)
class HostRoom:
    """What a host has for jobs and domains."""

    cpus: int = of(U32)
    used_cpus: int = of(U32)
    memory_kib: int = of(U64)
    used_memory_kib: int = of(U64)
    maintenance: Optional[MaintenanceRow] = of(Maybe(Struct(MaintenanceRow)))


Reply = Union[
    Done,
    Whoami,
    Info,
    DomainRow,
    Gone,
    Memory,
    JobRow,
    Explained,
    Permit,
    Attached,
    Lease,
    Ended,
    StatusRow,
    HostRoom,
]
REPLY: Kind[Reply] = Variants(
    "Reply",
    Struct(Done),
    Struct(Whoami),
    Struct(Info),
    Struct(DomainRow),
    Struct(Gone),
    Struct(Memory),
    Struct(JobRow),
    Struct(Explained),
    PERMIT,
    Struct(Attached),
    LEASE,
    Struct(Ended),
    Struct(StatusRow),
    Struct(HostRoom),
)


@dataclass(frozen=True)
class Trouble:
    """A hypervisor whose domains are not known, or not known any more."""

    hypervisor: str = of(STRING)
    why: str = of(STRING)


@dataclass(frozen=True)
class Image:
    """The memory of a domain, saved under a name."""

    image: str = of(TAG)
    domain: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    hypervisor: str = of(STRING)
    size: int = of(U64)
    saved_ms: int = of(U64)


@dataclass(frozen=True)
class ConsoleAttached:
    """The first word of a console: who types, and who else reads."""

    keyboard: str = of(PRINCIPAL)
    is_mine: bool = of(BOOL)
    others: Tuple[str, ...] = of(ListOf(PRINCIPAL))


@dataclass(frozen=True)
class ConsoleJoined:
    principal: str = of(PRINCIPAL)


@dataclass(frozen=True)
class ConsoleLeft:
    principal: str = of(PRINCIPAL)


@dataclass(frozen=True)
class ConsoleKeyboard:
    """The keyboard changed hands."""

    principal: str = of(PRINCIPAL)
    is_mine: bool = of(BOOL)


@dataclass(frozen=True)
class ConsoleDropped:
    """So many bytes of the console were dropped, since the reader was too slow."""

    count: int = of(U64)


Console = Union[ConsoleAttached, ConsoleJoined, ConsoleLeft, ConsoleKeyboard, ConsoleDropped]
CONSOLE: Kind[Console] = Variants(
    "Console",
    Struct(ConsoleAttached),
    Struct(ConsoleJoined),
    Struct(ConsoleLeft),
    Struct(ConsoleKeyboard),
    Struct(ConsoleDropped),
)


@dataclass(frozen=True)
class EventRow:
    """Something that happened to a domain."""

    cursor: Cursor = of(CURSOR)
    at_ms: int = of(U64)
    hypervisor: str = of(STRING)
    name: str = of(DOMAIN_NAME)
    uuid: UUID = of(ID)
    what: What = of(Choice(What))
    detail: str = of(STRING)
    state: DomainState = of(DOMAIN_STATE)


@dataclass(frozen=True)
class Gap:
    """Something may have happened here that the host does not know, or knows no more."""

    cursor: Cursor = of(CURSOR)
    at_ms: int = of(U64)
    hypervisor: str = of(STRING)
    why: str = of(STRING)


Item = Union[
    DomainRow, str, JobRow, Trouble, Image, bytes, Console, EventRow, Cursor, Gap, LeaseRow, StatusRow
]
ITEM: Kind[Item] = Variants(
    "Item",
    Struct(DomainRow),
    STRING,
    Struct(JobRow),
    Struct(Trouble),
    Struct(Image),
    Bytes(most=65_536),
    CONSOLE,
    Struct(EventRow),
    CURSOR,
    Struct(Gap),
    Struct(LeaseRow),
    Struct(StatusRow),
)

# ---------------------------------------------------------------------------------------------------------------------
# Verbs and their arguments.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """No arguments."""


@dataclass(frozen=True)
class OneDomain:
    domain: Domain = of(DOMAIN)


@dataclass(frozen=True)
class List:
    patterns: Tuple[str, ...] = of(ListOf(STRING), ())
    states: Tuple[DomainState, ...] = of(ListOf(DOMAIN_STATE), ())


@dataclass(frozen=True)
class Dmesg:
    domain: Optional[Domain] = of(Maybe(DOMAIN), None)
    follow: bool = of(BOOL, False)


@dataclass(frozen=True)
class Describe:
    domain: Domain = of(DOMAIN)
    inactive: bool = of(BOOL, False)


@dataclass(frozen=True)
class Create:
    xml: str = of(STRING, secret=True)
    define: bool = of(BOOL, False)
    paused: bool = of(BOOL, False)


@dataclass(frozen=True)
class Define:
    xml: str = of(STRING, secret=True)
    replaces: Optional[str] = of(Maybe(STRING), None, secret=True)


@dataclass(frozen=True)
class Undefine:
    domain: Domain = of(DOMAIN)
    discard_saved: bool = of(BOOL, False)
    discard_nvram: bool = of(BOOL, False)


@dataclass(frozen=True)
class Start:
    domain: Domain = of(DOMAIN)
    paused: bool = of(BOOL, False)


@dataclass(frozen=True)
class Reboot:
    domain: Domain = of(DOMAIN)
    wait: bool = of(BOOL, False)
    force: bool = of(BOOL, False)


@dataclass(frozen=True)
class MemSet:
    domain: Domain = of(DOMAIN)
    kib: int = of(U64)
    config: bool = of(BOOL, False)
    maximum: bool = of(BOOL, False)


@dataclass(frozen=True)
class VcpuSet:
    domain: Domain = of(DOMAIN)
    count: int = of(U32)
    config: bool = of(BOOL, False)
    maximum: bool = of(BOOL, False)


@dataclass(frozen=True)
class Channel:
    """Migrate through xman's own channel."""

    port: int = of(U16)
    permit: Permit = of(PERMIT)


@dataclass(frozen=True)
class Direct:
    """Migrate from libvirt to libvirt."""


Way = Union[Channel, Direct]


@dataclass(frozen=True)
class Migrate:
    domain: Domain = of(DOMAIN)
    destination: str = of(HOST_NAME)
    bandwidth: Optional[int] = of(Maybe(U64))
    downtime_ms: Optional[int] = of(Maybe(U64))
    way: Way = of(Variants("way", Struct(Channel), Struct(Direct)))


@dataclass(frozen=True)
class OneJob:
    job: UUID = of(ID)


@dataclass(frozen=True)
class Owner:
    domain: Domain = of(DOMAIN)
    add: Tuple[str, ...] = of(ListOf(PRINCIPAL), ())
    remove: Tuple[str, ...] = of(ListOf(PRINCIPAL), ())


@dataclass(frozen=True)
class Label:
    domain: Domain = of(DOMAIN)
    set: Tuple[Tuple[str, str], ...] = of(ListOf(Row(TAG, LABEL_VALUE)), ())
    remove: Tuple[str, ...] = of(ListOf(TAG), ())


@dataclass(frozen=True)
class Class:
    domain: Domain = of(DOMAIN)
    class_: Optional[str] = of(Maybe(TAG), None)


@dataclass(frozen=True)
class AboutHost:
    """The host itself."""


@dataclass(frozen=True)
class AboutDomain:
    domain: Domain = of(DOMAIN)


@dataclass(frozen=True)
class AboutPrincipal:
    """Somebody to act for."""

    principal: str = of(PRINCIPAL)


About = Union[AboutHost, AboutDomain, AboutPrincipal]
ABOUT: Kind[About] = Variants("about", Struct(AboutHost), Struct(AboutDomain), Struct(AboutPrincipal))


@dataclass(frozen=True)
class Explain:
    action: str = of(STRING)
    about: About = of(ABOUT)


@dataclass(frozen=True)
class ExplainOther:
    principal: str = of(PRINCIPAL)
    action: str = of(STRING)
    about: About = of(ABOUT)


@dataclass(frozen=True)
class SaveTo:
    domain: Domain = of(DOMAIN)
    image: str = of(TAG)


@dataclass(frozen=True)
class RestoreFrom:
    image: str = of(TAG)
    paused: bool = of(BOOL, False)


@dataclass(frozen=True)
class OneImage:
    image: str = of(TAG)


@dataclass(frozen=True)
class Autostart:
    domain: Domain = of(DOMAIN)
    on: bool = of(BOOL)


@dataclass(frozen=True)
class Rename:
    domain: Domain = of(DOMAIN)
    name: str = of(DOMAIN_NAME)


class Format(enum.IntEnum):
    RAW = 0
    QCOW2 = 1


@dataclass(frozen=True)
class Disk:
    """A disk from a file or block device of the host."""

    source: str = of(STRING)
    target: Optional[str] = of(Maybe(TAG), None)
    format: Format = of(Choice(Format), Format.RAW)
    read_only: bool = of(BOOL, False)
    shareable: bool = of(BOOL, False)
    cdrom: bool = of(BOOL, False)


@dataclass(frozen=True)
class Network:
    name: str = of(LINK_NAME)


@dataclass(frozen=True)
class Bridge:
    name: str = of(LINK_NAME)


@dataclass(frozen=True)
class Interface:
    """A network interface on one of libvirt's networks or on a bridge."""

    link: Union[Network, Bridge] = of(Variants("link", Struct(Network), Struct(Bridge)))
    mac: Optional[str] = of(Maybe(MAC), None)
    model: Optional[str] = of(Maybe(TAG), None)


Device = Union[Disk, Interface]


@dataclass(frozen=True)
class Attach:
    domain: Domain = of(DOMAIN)
    device: Device = of(Variants("Device", Struct(Disk), Struct(Interface)))
    config: bool = of(BOOL, False)


@dataclass(frozen=True)
class Detach:
    domain: Domain = of(DOMAIN)
    device: NamedDevice = of(NAMED_DEVICE)
    config: bool = of(BOOL, False)


@dataclass(frozen=True)
class Unpause:
    domain: Domain = of(DOMAIN)
    force: bool = of(BOOL, False)


@dataclass(frozen=True)
class OpenConsole:
    domain: Domain = of(DOMAIN)
    force: bool = of(BOOL, False)


@dataclass(frozen=True)
class Events:
    patterns: Tuple[str, ...] = of(ListOf(STRING), ())
    since: Optional[Cursor] = of(Maybe(CURSOR), None)
    follow: bool = of(BOOL, False)


@dataclass(frozen=True)
class MigrateIn:
    uuid: UUID = of(ID)
    name: str = of(DOMAIN_NAME)
    source: str = of(HOST_NAME)
    memory_kib: int = of(U64)


@dataclass(frozen=True)
class Carry:
    permit: Permit = of(PERMIT)
    uuid: UUID = of(ID)
    name: str = of(DOMAIN_NAME)


class Settlement(enum.IntEnum):
    RUN = 0
    KEEP_PAUSED = 1
    DROP = 2


@dataclass(frozen=True)
class Settle:
    permit: Permit = of(PERMIT)
    settlement: Settlement = of(Choice(Settlement))


@dataclass(frozen=True)
class LeaseBegin:
    """A job begins in a domain, and others give way for it. The same key again is the same lease."""

    key: LeaseKey = of(LEASE_KEY)
    domain: Domain = of(DOMAIN)
    user: Optional[str] = of(Maybe(PRINCIPAL), None)
    preemptible: Optional[bool] = of(Maybe(BOOL), None)
    ends_in_ms: Optional[int] = of(Maybe(U64), None)
    reserve: bool = of(BOOL, False)
    wait: bool = of(BOOL, False)


@dataclass(frozen=True)
class LeaseEnd:
    key: LeaseKey = of(LEASE_KEY)
    domain: Optional[Domain] = of(Maybe(DOMAIN), None)


@dataclass(frozen=True)
class LeaseList:
    system: Optional[str] = of(Maybe(TAG), None)
    key: Optional[LeaseKey] = of(Maybe(LEASE_KEY), None)


@dataclass(frozen=True)
class Preempt:
    domain: Domain = of(DOMAIN)
    depth: Optional[Depth] = of(Maybe(DEPTH), None)
    lease: Optional[LeaseKey] = of(Maybe(LEASE_KEY), None)
    reason: Optional[str] = of(Maybe(LABEL_VALUE), None)
    wait: bool = of(BOOL, False)


@dataclass(frozen=True)
class Resume:
    domain: Domain = of(DOMAIN)
    lease: Optional[LeaseKey] = of(Maybe(LEASE_KEY), None)
    force: bool = of(BOOL, False)
    wait: bool = of(BOOL, False)


@dataclass(frozen=True)
class Status:
    patterns: Tuple[str, ...] = of(ListOf(STRING), ())


@dataclass(frozen=True)
class Reconcile:
    """The jobs that a batch system has, sorted, each with its run: the leases of all others end."""

    system: str = of(TAG)
    cluster: str = of(TAG)
    running: Tuple[Tuple[str, int], ...] = of(ListOf(Row(JOB_ID, U32)))
    age_ms: int = of(U64)


@dataclass(frozen=True)
class Maintenance:
    reason: Optional[str] = of(Maybe(LABEL_VALUE), None)


class Effect(enum.Enum):
    READ = "read"
    CHANGE = "change"
    JOB = "change, job"
    STREAM = "stream"


@dataclass(frozen=True)
class Verb:
    """One thing that a host can be asked to do."""

    number: int
    name: str
    effect: Effect
    arguments: Kind[Any]

    @property
    def changes(self) -> bool:
        """Whether it is carried out once for each id, and never again."""
        return self.effect in (Effect.CHANGE, Effect.JOB)


def _verbs() -> Dict[str, Verb]:
    read, change, job, stream = Effect.READ, Effect.CHANGE, Effect.JOB, Effect.STREAM
    table = (
        (1, "whoami", read, Nothing),
        (2, "list", read, List),
        (3, "info", read, Nothing),
        (4, "dmesg", read, Dmesg),
        (5, "describe", read, Describe),
        (6, "describe-secrets", read, Describe),
        (7, "create", change, Create),
        (8, "define", change, Define),
        (9, "undefine", change, Undefine),
        (10, "start", change, Start),
        (11, "destroy", change, OneDomain),
        (12, "reboot", change, Reboot),
        (13, "shutdown", change, Reboot),
        (14, "pause", change, OneDomain),
        (15, "unpause", change, Unpause),
        (16, "mem-set", change, MemSet),
        (17, "vcpu-set", change, VcpuSet),
        (18, "migrate", job, Migrate),
        (19, "migrate-abort", change, OneDomain),
        (20, "job-list", read, Nothing),
        (21, "job-wait", read, OneJob),
        (22, "job-cancel", change, OneJob),
        (23, "owner", change, Owner),
        (24, "label", change, Label),
        (25, "class", change, Class),
        (26, "explain", read, Explain),
        (27, "explain-other", read, ExplainOther),
        (28, "save", job, OneDomain),
        (29, "restore", change, Start),
        (30, "discard-saved", change, OneDomain),
        (31, "save-to", job, SaveTo),
        (32, "images", read, Nothing),
        (33, "restore-from", change, RestoreFrom),
        (34, "discard-image", change, OneImage),
        (35, "autostart", change, Autostart),
        (36, "reset", change, OneDomain),
        (37, "rename", change, Rename),
        (38, "attach", change, Attach),
        (39, "detach", change, Detach),
        (40, "console", stream, OpenConsole),
        (41, "events", read, Events),
        (42, "migrate-in", read, MigrateIn),
        (43, "carry", stream, Carry),
        (44, "settle", change, Settle),
        (45, "lease-begin", change, LeaseBegin),
        (46, "lease-end", change, LeaseEnd),
        (47, "lease-list", read, LeaseList),
        (48, "preempt", change, Preempt),
        (49, "resume", change, Resume),
        (50, "freeze", change, Preempt),
        (51, "thaw", change, Resume),
        (52, "status", read, Status),
        (53, "reconcile", change, Reconcile),
        (54, "maintenance", change, Maintenance),
    )
    return {name: Verb(number, name, effect, Struct(cls)) for number, name, effect, cls in table}


VERBS: Dict[str, Verb] = _verbs()

# ---------------------------------------------------------------------------------------------------------------------
# Messages.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    preface: bytes = of(BYTES)
    answer: bytes = of(BYTES)
    software: str = of(STRING)
    until: int = of(U64)


@dataclass(frozen=True)
class Call:
    id: UUID = of(ID)
    deadline_ms: Optional[int] = of(Maybe(U32))
    verb: int = of(U16)
    hypervisor: Optional[str] = of(Maybe(STRING))
    on_behalf_of: Optional[str] = of(Maybe(PRINCIPAL))
    body: bytes = of(BYTES, secret=True)


@dataclass(frozen=True)
class Input:
    call: UUID = of(ID)
    data: bytes = of(Bytes(most=65_536), secret=True)


@dataclass(frozen=True)
class Cancel:
    call: UUID = of(ID)


@dataclass(frozen=True)
class Renew:
    token: bytes = of(BYTES, secret=True)
    until: int = of(U64)


Outgoing = Union[Hello, Call, Input, Cancel, Renew]
OUTGOING: Kind[Outgoing] = Variants(
    "message", Struct(Hello), Struct(Call), Struct(Input), Struct(Cancel), Struct(Renew)
)


@dataclass(frozen=True)
class Welcome:
    preface: bytes = of(BYTES)
    answer: bytes = of(BYTES)
    software: str = of(STRING)
    principal: str = of(PRINCIPAL)
    until: int = of(U64)
    session: str = of(STRING)


@dataclass(frozen=True)
class Items:
    call: UUID = of(ID)
    items: Tuple[Item, ...] = of(ListOf(ITEM))


@dataclass(frozen=True)
class ProgressOf:
    call: UUID = of(ID)
    progress: Progress = of(Struct(Progress))


@dataclass(frozen=True)
class FaultRow:
    """A fault as it is on the wire; callers meet it as the exception `Fault`."""

    code: FaultCode = of(Choice(FaultCode))
    message: str = of(STRING)
    retry: bool = of(BOOL)


FAULT_ROW = Struct(FaultRow)


@dataclass(frozen=True)
class DoneWith:
    """The outcome is the last word on a call."""

    call: UUID = of(ID)
    outcome: Union[Reply, FaultRow] = of(Variants("outcome", REPLY, FAULT_ROW))


@dataclass(frozen=True)
class Alive:
    """The call goes on."""


@dataclass(frozen=True)
class Expiring:
    seconds: int = of(U32)


@dataclass(frozen=True)
class Renewed:
    token: bytes = of(BYTES, secret=True)
    until: int = of(U64)


@dataclass(frozen=True)
class Closing:
    fault: FaultRow = of(FAULT_ROW)


@dataclass(frozen=True)
class Room:
    call: UUID = of(ID)
    count: int = of(U32)


Incoming = Union[Welcome, Items, ProgressOf, DoneWith, Alive, Expiring, Renewed, Closing, Room]
INCOMING: Kind[Incoming] = Variants(
    "message",
    Struct(Welcome),
    Struct(Items),
    Struct(ProgressOf),
    Struct(DoneWith),
    Struct(Alive),
    Struct(Expiring),
    Struct(Renewed),
    Struct(Closing),
    Struct(Room),
)
