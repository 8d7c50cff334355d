"""Values to bytes and back, as the section "Encoding" of docs/PROTOCOL.md has it.

A `Kind` is how values of one type look as bytes. Kinds are put together as the tables of the page are:

    @dataclass(frozen=True)
    class Gone:
        name: str = of(DOMAIN_NAME)
        uuid: UUID = of(ID)

    GONE = Struct(Gone)
    GONE.decode(GONE.encode(Gone("web1", uuid4())))

Decoding is strict: a message fills its bytes exactly, a bool is 0 or 1, a length is never more than what is there.
Whatever the bytes are, `decode` returns a value or raises `CodecError`.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import Any, Callable, Dict, Generic, List, Optional, Sequence, Tuple, Type, TypeVar
from uuid import UUID

from .errors import CodecError

T = TypeVar("T")
E = TypeVar("E", bound=enum.IntEnum)


class Reader:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise CodecError(f"cut short: {count} bytes announced, {self.left} there")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")


class Kind(Generic[T]):
    """How values of one type look as bytes."""

    # What values are in Python, so that an enumeration finds the variant of a value.
    types: Tuple[type, ...] = ()

    def write(self, out: bytearray, value: T) -> None:
        raise NotImplementedError

    def read(self, reader: Reader) -> T:
        raise NotImplementedError

    def encode(self, value: T) -> bytes:
        """Returns the value's bytes; raises CodecError where it has none."""
        out = bytearray()
        self.write(out, value)
        return bytes(out)

    def decode(self, data: bytes) -> T:
        """Returns the value that fills the bytes exactly; raises CodecError where there is none."""
        reader = Reader(data)
        value = self.read(reader)
        if reader.left:
            raise CodecError(f"{reader.left} bytes too many")
        return value


class Number(Kind[int]):
    types = (int,)

    def __init__(self, width: int, signed: bool = False) -> None:
        self._width = width
        self._signed = signed

    def write(self, out: bytearray, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise CodecError(f"a whole number is wanted, not {_named(value)}")
        try:
            out += value.to_bytes(self._width, "big", signed=self._signed)
        except OverflowError:
            raise CodecError(f"{value} does not fit into {self._width} bytes") from None

    def read(self, reader: Reader) -> int:
        return int.from_bytes(reader.take(self._width), "big", signed=self._signed)


class Float(Kind[float]):
    types = (float,)

    def write(self, out: bytearray, value: float) -> None:
        if not isinstance(value, (float, int)):
            raise CodecError(f"a number is wanted, not {_named(value)}")
        try:
            out += struct.pack(">d", value)
        except (OverflowError, struct.error):
            raise CodecError("the number is too large") from None

    def read(self, reader: Reader) -> float:
        value: float = struct.unpack(">d", reader.take(8))[0]
        return value


class Bool(Kind[bool]):
    types = (bool,)

    def write(self, out: bytearray, value: bool) -> None:
        if not isinstance(value, bool):
            raise CodecError(f"True or False is wanted, not {_named(value)}")
        out.append(value)

    def read(self, reader: Reader) -> bool:
        value = reader.number(1)
        if value > 1:
            raise CodecError(f"a bool of {value}")
        return value == 1


class Bytes(Kind[bytes]):
    types = (bytes,)

    def __init__(self, most: Optional[int] = None) -> None:
        self._most = most

    def write(self, out: bytearray, value: bytes) -> None:
        if not isinstance(value, (bytes, bytearray)):
            raise CodecError(f"bytes are wanted, not {_named(value)}")
        self._check(len(value))
        U64.write(out, len(value))
        out += value

    def read(self, reader: Reader) -> bytes:
        length = reader.number(8)
        self._check(length)
        return reader.take(length)

    def _check(self, length: int) -> None:
        if self._most is not None and length > self._most:
            raise CodecError(f"{length} bytes, where {self._most} are the most")


class Fixed(Kind[bytes]):
    """So many bytes, without a length."""

    types = (bytes,)

    def __init__(self, length: int) -> None:
        self._length = length

    def write(self, out: bytearray, value: bytes) -> None:
        if not isinstance(value, (bytes, bytearray)) or len(value) != self._length:
            raise CodecError(f"{self._length} bytes are wanted")
        out += value

    def read(self, reader: Reader) -> bytes:
        return reader.take(self._length)


class Text(Kind[str]):
    """A string; with `check`, one that has a meaning of its own: `check` returns what is wrong with it, if anything."""

    types = (str,)

    def __init__(self, check: Optional[Callable[[str], Optional[str]]] = None) -> None:
        self._check = check

    def write(self, out: bytearray, value: str) -> None:
        if not isinstance(value, str):
            raise CodecError(f"a string is wanted, not {_named(value)}")
        self._require(value)
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError:
            raise CodecError("a string with half a character") from None
        U64.write(out, len(data))
        out += data

    def read(self, reader: Reader) -> str:
        data = reader.take(reader.number(8))
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError:
            raise CodecError("a string that is not UTF-8") from None
        self._require(value)
        return value

    def _require(self, value: str) -> None:
        wrong = self._check(value) if self._check else None
        if wrong is not None:
            raise CodecError(wrong)


class Id(Kind[UUID]):
    types = (UUID,)

    def write(self, out: bytearray, value: UUID) -> None:
        if not isinstance(value, UUID):
            raise CodecError(f"a UUID is wanted, not {_named(value)}")
        BYTES.write(out, value.bytes)

    def read(self, reader: Reader) -> UUID:
        data = BYTES.read(reader)
        if len(data) != 16:
            raise CodecError(f"a UUID of {len(data)} bytes")
        return UUID(bytes=data)


class ListOf(Kind[Tuple[T, ...]]):
    """A list; in Python a tuple, as all that is read here cannot be changed by accident."""

    types = (tuple, list)

    def __init__(self, element: Kind[T]) -> None:
        self._element = element

    def write(self, out: bytearray, value: Sequence[T]) -> None:
        if not isinstance(value, (tuple, list)):
            raise CodecError(f"a list is wanted, not {_named(value)}")
        U64.write(out, len(value))
        for element in value:
            self._element.write(out, element)

    def read(self, reader: Reader) -> Tuple[T, ...]:
        count = reader.number(8)
        # No element is shorter than a byte, so a count that lies costs nothing.
        if count > reader.left:
            raise CodecError(f"cut short: {count} elements announced, {reader.left} bytes there")
        return tuple(self._element.read(reader) for _ in range(count))


class Row(Kind[Tuple[Any, ...]]):
    """Values of several kinds one after another, in Python a tuple: pairs, and arrays without a count."""

    types = (tuple, list)

    def __init__(self, *elements: Kind[Any]) -> None:
        self._elements = elements

    def write(self, out: bytearray, value: Sequence[Any]) -> None:
        if not isinstance(value, (tuple, list)) or len(value) != len(self._elements):
            raise CodecError(f"{len(self._elements)} values are wanted")
        for element, one in zip(self._elements, value):
            element.write(out, one)

    def read(self, reader: Reader) -> Tuple[Any, ...]:
        return tuple(element.read(reader) for element in self._elements)


class Maybe(Kind[Optional[T]]):
    """An option: a value or None."""

    def __init__(self, value: Kind[T]) -> None:
        self._value = value
        self.types = (*value.types, type(None))

    def write(self, out: bytearray, value: Optional[T]) -> None:
        out.append(value is not None)
        if value is not None:
            self._value.write(out, value)

    def read(self, reader: Reader) -> Optional[T]:
        there = reader.number(1)
        if there > 1:
            raise CodecError(f"an option of {there}")
        return self._value.read(reader) if there else None


class Choice(Kind[E]):
    """An enumeration whose variants have no fields: in Python an IntEnum with the page's numbers."""

    def __init__(self, values: Type[E]) -> None:
        self._values = values
        self.types = (values,)

    def write(self, out: bytearray, value: E) -> None:
        if not isinstance(value, self._values):
            raise CodecError(f"a {self._values.__name__} is wanted, not {_named(value)}")
        U32.write(out, int(value))

    def read(self, reader: Reader) -> E:
        number = reader.number(4)
        try:
            return self._values(number)
        except ValueError:
            raise _unknown(number, self._values.__name__) from None


class Variants(Kind[T]):
    """An enumeration whose variants have fields. The Python types of the variants tell them apart."""

    def __init__(self, name: str, *variants: Kind[Any]) -> None:
        self._name = name
        self._variants = variants
        self._numbers: Dict[type, int] = {}
        for number, variant in enumerate(variants):
            for kind in variant.types:
                if kind in self._numbers:
                    raise TypeError(f"{name}: two variants are {kind.__name__}")
                self._numbers[kind] = number
        self.types = tuple(self._numbers)

    def write(self, out: bytearray, value: T) -> None:
        number = self._numbers.get(type(value))
        if number is None:
            raise CodecError(f"{_named(value)} is no {self._name}")
        U32.write(out, number)
        self._variants[number].write(out, value)

    def read(self, reader: Reader) -> T:
        number = reader.number(4)
        if number >= len(self._variants):
            raise _unknown(number, self._name)
        value: T = self._variants[number].read(reader)
        return value


class Struct(Kind[T]):
    """A structure: a dataclass whose fields were made by `of`, in the page's order."""

    def __init__(self, cls: Type[T]) -> None:
        self._cls = cls
        self._fields: List[Tuple[str, Kind[Any]]] = [
            (field.name, field.metadata["kind"]) for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        self.types = (cls,)

    def write(self, out: bytearray, value: T) -> None:
        if not isinstance(value, self._cls):
            raise CodecError(f"a {self._cls.__name__} is wanted, not {_named(value)}")
        for name, kind in self._fields:
            kind.write(out, getattr(value, name))

    def read(self, reader: Reader) -> T:
        return self._cls(**{name: kind.read(reader) for name, kind in self._fields})


def of(kind: Kind[T], default: Any = dataclasses.MISSING, secret: bool = False) -> Any:
    """Returns a field of a dataclass that is written as `kind` says; a secret one is not shown by repr."""
    metadata = {"kind": kind}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def _unknown(number: int, name: str) -> CodecError:
    return CodecError(f"there is no variant {number} of {name}: the host may be newer than this package")


def _named(value: object) -> str:
    """Returns the value's type: the value itself may be a secret, or long."""
    return type(value).__name__


U8 = Number(1)
U16 = Number(2)
U32 = Number(4)
U64 = Number(8)
I64 = Number(8, signed=True)
F64 = Float()
BOOL = Bool()
BYTES = Bytes()
STRING = Text()
ID = Id()
