"""Values to bytes and back, and what is no message."""

import enum
import random
import unittest
from dataclasses import dataclass
from uuid import UUID

from xman import codec, messages
from xman.codec import BOOL, BYTES, F64, I64, ID, STRING, U8, U16, U32, U64, ListOf, Maybe, Row, Struct, Variants, of
from xman.errors import CodecError

from . import samples


class Colour(enum.IntEnum):
    RED = 0
    BLUE = 1


@dataclass(frozen=True)
class Pair:
    left: int = of(U8)
    right: bool = of(BOOL)


TABLE = (
    (U8, 255, "ff"),
    (U16, 9626, "259a"),
    (U32, 1, "00000001"),
    (U64, 2**64 - 1, "ffffffffffffffff"),
    (I64, -2, "fffffffffffffffe"),
    (F64, 1.5, "3ff8000000000000"),
    (F64, float("inf"), "7ff0000000000000"),
    (BOOL, True, "01"),
    (BOOL, False, "00"),
    (STRING, "", "0000000000000000"),
    (STRING, "ž", "0000000000000002c5be"),
    (BYTES, b"\x00\xff", "000000000000000200ff"),
    (ID, UUID(int=1), "0000000000000010" + "00" * 15 + "01"),
    (ListOf(U8), (1, 2), "00000000000000020102"),
    (Row(U8, U16), (1, 2), "010002"),
    (Maybe(U8), None, "00"),
    (Maybe(U8), 7, "0107"),
    (Maybe(Maybe(U8)), None, "00"),
    (codec.Choice(Colour), Colour.BLUE, "00000001"),
    (Struct(Pair), Pair(3, True), "0301"),
    (Variants("thing", STRING, Struct(Pair)), Pair(3, True), "000000010301"),
    (codec.Fixed(2), b"ab", "6162"),
)

WRONG_BYTES = (
    ("a number that is cut", U32, "000000"),
    ("a byte too many", U8, "0000"),
    ("a bool of two", BOOL, "02"),
    ("an option of two", Maybe(U8), "0207"),
    ("an option without its value", Maybe(U8), "01"),
    ("a string longer than the message", STRING, "0000000000000003" + "6162"),
    ("a string longer than memory", STRING, "ffffffffffffffff"),
    ("a string that is not UTF-8", STRING, "0000000000000001" + "ff"),
    ("an overlong form of UTF-8", STRING, "0000000000000002" + "c080"),
    ("half a surrogate pair", STRING, "0000000000000003" + "eda080"),
    ("a list longer than the message", ListOf(U8), "0000000000000003" + "0102"),
    ("a list longer than memory", ListOf(U64), "ffffffffffffffff" + "0102"),
    ("a UUID of 15 bytes", ID, "000000000000000f" + "00" * 15),
    ("a UUID of 17 bytes", ID, "0000000000000011" + "00" * 17),
    ("a variant that nobody knows", codec.Choice(Colour), "00000002"),
    ("a variant with fields that nobody knows", Variants("thing", STRING), "00000001"),
    ("bytes over their limit", codec.Bytes(most=1), "0000000000000002" + "0000"),
    ("nothing at all", U8, ""),
)

WRONG_VALUES = (
    (U8, 256),
    (U8, -1),
    (U8, True),
    (U8, "1"),
    (U64, 2**64),
    (I64, 2**63),
    (F64, "1"),
    (F64, 10**400),
    (BOOL, 1),
    (STRING, b"bytes"),
    (STRING, "\ud800"),
    (BYTES, "text"),
    (codec.Bytes(most=1), b"ab"),
    (codec.Fixed(2), b"a"),
    (ID, "00010203-0405-0607-0809-0a0b0c0d0e0f"),
    (ListOf(U8), "text"),
    (ListOf(U8), (256,)),
    (Row(U8, U8), (1,)),
    (codec.Choice(Colour), 1),
    (Struct(Pair), (3, True)),
    (Variants("thing", STRING), 5),
)


class Codec(unittest.TestCase):
    def test_values_look_as_the_page_says(self) -> None:
        for kind, value, text in TABLE:
            with self.subTest(value=value):
                self.assertEqual(kind.encode(value).hex(), text)
                self.assertEqual(kind.decode(bytes.fromhex(text)), value)

    def test_what_is_no_message_is_refused(self) -> None:
        for what, kind, text in WRONG_BYTES:
            with self.subTest(what), self.assertRaises(CodecError):
                kind.decode(bytes.fromhex(text))

    def test_a_value_that_cannot_be_said_is_refused(self) -> None:
        for kind, value in WRONG_VALUES:
            with self.subTest(kind=type(kind).__name__, value=value), self.assertRaises(CodecError):
                kind.encode(value)

    def test_two_variants_of_one_type_are_a_mistake(self) -> None:
        with self.assertRaises(TypeError):
            Variants("thing", STRING, STRING)

    def test_an_unknown_variant_is_named_with_what_it_may_mean(self) -> None:
        with self.assertRaisesRegex(CodecError, "no variant 4294967295 of Reply.*newer"):
            messages.REPLY.decode(bytes.fromhex("ffffffff"))


class Anything(unittest.TestCase):
    """Whatever arrives is a message, and then the only one with these bytes, or a CodecError."""

    kinds = (
        (messages.INCOMING, samples.INCOMING),
        (messages.OUTGOING, samples.OUTGOING),
        (messages.ITEM, samples.ITEMS),
        (messages.REPLY, samples.REPLIES),
        *((verb.arguments, (samples.ARGUMENTS[name],)) for name, verb in messages.VERBS.items()),
    )

    def check(self, kind: codec.Kind, data: bytes) -> bool:
        try:
            value = kind.decode(data)
        except CodecError:
            return False
        self.assertEqual(kind.encode(value), data)
        return True

    def test_random_bytes_raise_nothing_but_a_codec_error(self) -> None:
        chance = random.Random(9626)
        for _ in range(3000):
            kind, _ = chance.choice(self.kinds)
            number = chance.randrange(12).to_bytes(4, "big")
            self.check(kind, number + chance.randbytes(chance.randrange(200)))
            self.check(kind, chance.randbytes(chance.randrange(64)))

    def test_messages_with_a_few_wrong_bytes_raise_nothing_but_a_codec_error(self) -> None:
        chance = random.Random(1700036000)
        outcomes = [self.spoil(chance) for _ in range(20_000)]
        self.assertIn(True, outcomes, "no change was harmless: these were no messages to begin with")
        self.assertIn(False, outcomes)

    def spoil(self, chance: random.Random) -> bool:
        kind, values = chance.choice(self.kinds)
        data = bytearray(kind.encode(chance.choice(values)))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data) + 1)
            what = chance.randrange(4)
            if what == 0:
                del data[at:]
            elif what == 1:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif what == 2:
                del data[at : at + chance.randrange(1, 9)]
            elif at < len(data):
                data[at] = chance.choice((0, 1, 2, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        return self.check(kind, bytes(data))

    def test_every_beginning_of_a_message_is_refused(self) -> None:
        for kind, values in self.kinds:
            for value in values:
                data = kind.encode(value)
                for end in range(len(data)):
                    with self.assertRaises(CodecError):
                        kind.decode(data[:end])


if __name__ == "__main__":
    unittest.main()
