"""The bytes of every message as the project's own program writes them: common/tests/golden.txt.

This package was written without looking at them.
"""

import dataclasses
import enum
import pathlib
import re
import unittest
from typing import Any, Iterator, List, Tuple

from xman import messages as m
from xman.codec import Choice, Kind
from xman.errors import FaultCode

GOLDEN = pathlib.Path(__file__).resolve().parents[3] / "common" / "tests" / "golden.txt"

KINDS = {
    "from the caller": m.OUTGOING,
    "from the host": m.INCOMING,
    "reply": m.REPLY,
    "item": m.ITEM,
    "fault": m.FAULT_ROW,
    "domain by uuid": m.DOMAIN,
    "domain by name": m.DOMAIN,
}
ENUMERATIONS = {
    "fault code": FaultCode,
    "domain state": m.DomainState,
    "job state": m.JobState,
    "standing": m.Standing,
    "lease state": m.LeaseState,
    "depth": m.Depth,
    "then": m.Then,
}


def blocks() -> Iterator[Tuple[str, str, bytes]]:
    """Yields what each message is, its value in the words of Rust, and its bytes."""
    lines: List[str] = []
    for line in [*GOLDEN.read_text(encoding="utf-8").splitlines(), ""]:
        if line and not line.startswith("#"):
            lines.append(line.strip())
        elif lines:
            what, value, *digits = lines
            yield what, value, bytes.fromhex("".join(digits))
            lines = []


def kind_of(what: str) -> Kind[Any]:
    if what in KINDS:
        return KINDS[what]
    number, name = re.fullmatch(r"verb (\d+) ([a-z-]+)", what).groups()  # type: ignore[union-attr]
    verb = m.VERBS[name]
    assert verb.number == int(number), what
    return verb.arguments


def named_in_rust(text: str) -> List[Tuple[str, str]]:
    """Returns the numbers, truths and strings that stand behind a name."""
    return re.findall(r'(\w+): (?:\w+\()*("(?:[^"\\]|\\.)*"|\d+|true|false)(?![\w.-])', text)


def named_in_python(value: Any) -> Iterator[Tuple[str, str]]:
    if isinstance(value, tuple):
        for one in value:
            yield from named_in_python(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            name, inner = field.name.rstrip("_"), getattr(value, field.name)
            if isinstance(inner, bool):
                yield name, str(inner).lower()
            elif isinstance(inner, int) and not isinstance(inner, enum.IntEnum):
                yield name, str(inner)
            elif isinstance(inner, str):
                yield name, f'"{inner}"'
            else:
                yield from named_in_python(inner)


class Golden(unittest.TestCase):
    def test_every_message_is_read_as_what_it_is_and_written_as_it_was(self) -> None:
        count = 0
        for what, text, data in blocks():
            enumeration, _, word = what.rpartition(" ")
            with self.subTest(what, value=text):
                if enumeration in ENUMERATIONS:
                    kind: Kind[Any] = Choice(ENUMERATIONS[enumeration])
                    self.assertEqual(kind.decode(data).name.lower().replace("_", "-"), word)
                else:
                    kind = kind_of(what)
                value = kind.decode(data)
                self.assertEqual(kind.encode(value).hex(), data.hex())
                theirs, ours = named_in_rust(text), list(named_in_python(value))
                both = {name for name, _ in theirs} & {name for name, _ in ours}
                self.assertEqual([pair for pair in ours if pair[0] in both], [pair for pair in theirs if pair[0] in both])
                count += 1
        self.assertGreater(count, 100)

    def test_every_verb_is_there(self) -> None:
        there = {what.split()[2] for what, _, _ in blocks() if what.startswith("verb ")}
        self.assertEqual(there, set(m.VERBS))


if __name__ == "__main__":
    unittest.main()
