"""docs/PROTOCOL.md against this package, which was written from it: tables, enumerations, examples, limits."""

import ast
import dataclasses
import enum
import pathlib
import re
import unittest
from typing import Dict, List, Tuple
from uuid import UUID

from xman import errors, wire
from xman import messages as m

from . import samples

PAGE = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Returns what stands below a heading, down to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |^#{{1,2}} |\Z)", PAGE, re.M | re.S)
    assert found, f"the page has no section {title}"
    return found.group(2)


def rows(text: str, head: str) -> List[List[str]]:
    """Returns the rows of the table whose head begins so."""
    lines = text[text.index(f"| {head}") :].splitlines()
    table = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def ticked(text: str) -> str:
    return text.replace("`", "").strip()


def fields(cls: type) -> List[str]:
    return [field.name.rstrip("_") for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


def enumeration(values: type) -> List[Tuple[int, str]]:
    return [(int(value), value.name.lower().replace("_", "-")) for value in values]  # type: ignore[attr-defined]


def counted(text: str) -> List[Tuple[int, str]]:
    """Reads `0 unknown, 1 running, ...`; what stands in parentheses says more and is left out."""
    found = re.findall(r"(?:^|, )(\d+) ([a-z0-9-]+)", re.sub(r"\([^)]*\)", "", text).replace(" ,", ","))
    return [(int(number), name) for number, name in found]


class Page(unittest.TestCase):
    def test_verbs(self) -> None:
        table = {
            ticked(name): (int(number), effect) for number, name, effect, *_ in rows(section("Verbs"), "number | verb")
        }
        ours = {verb.name: (verb.number, verb.effect.value) for verb in m.VERBS.values()}
        self.assertEqual(ours, table)

    def test_arguments(self) -> None:
        table = {ticked(name): text for _, name, _, text, _ in rows(section("Verbs"), "number | verb")}
        for name, text in table.items():
            ours = fields(type(samples.ARGUMENTS[name]))
            like = re.match(r"as `([a-z-]+)`", text)
            with self.subTest(name):
                if like:
                    self.assertEqual(ours, fields(type(samples.ARGUMENTS[like.group(1)])))
                else:
                    named = re.findall(r"(?:^|; )`([a-z_]+)` ", re.sub(r"\([^)]*\)", "", text))
                    self.assertEqual(ours, [] if text == "none" else named)

    def test_messages_of_both_sides(self) -> None:
        names = {m.ProgressOf: "Progress", m.DoneWith: "Done"}
        tables = PAGE.split("From the host:\n")
        for text, kind in ((tables[0], m.OUTGOING), (tables[1], m.INCOMING)):
            table = rows(text[text.index("| number | message |") :], "number | message")
            self.assertEqual([int(row[0]) for row in table], list(range(len(table))))
            self.assertEqual([ticked(row[1]) for row in table], [names.get(cls, cls.__name__) for cls in kind.types])
            for row, cls in zip(table, kind.types):
                named = re.findall(r"(?:^|; )`([a-z_]+)`", row[2])
                with self.subTest(cls.__name__):
                    if cls is m.Closing:
                        self.assertEqual(row[2].split(":")[0], "`Fault`")
                    elif cls is not m.Call:
                        self.assertEqual(len(named), len(fields(cls)))

    def test_structures(self) -> None:
        calls, answers = section("Calls"), section("Answers")
        for text, head, cls in (
            (calls, "field | type", m.Call),
            (answers.split("\n`EventRow`:")[1], "field | type", m.EventRow),
            (answers.split("\n`DomainRow`:")[1], "field | type", m.DomainRow),
            (answers.split("\n`Info`:")[1], "field | type", m.Info),
            (answers.split("\n`JobRow`:")[1], "field | type", m.JobRow),
            (answers.split("\n`LeaseRow`:")[1], "field | type", m.LeaseRow),
            (answers.split("\n`StatusRow`:")[1], "field | type", m.StatusRow),
            (answers.split("\n`Room`:")[1], "field | type", m.HostRoom),
        ):
            with self.subTest(cls.__name__):
                self.assertEqual(fields(cls), [ticked(row[0]) for row in rows(text, head)])
        progress = answers.split("\n`Progress`:")[1].split("\n\n")[0]
        self.assertEqual(fields(m.Progress), re.findall(r"`([a-z_]+)`", progress))

    def test_replies_and_items(self) -> None:
        answers = section("Answers")
        named = {
            "Done": (m.Done,),
            "Domain": (m.DomainRow,),
            "Job": (m.JobRow,),
            "Text": (str,),
            "Bytes": (bytes,),
            "Event": (m.EventRow,),
            "Console": m.CONSOLE.types,
            "Permitted": (m.Permit,),
            "Standing": (m.StatusRow,),
            "Status": (m.StatusRow,),
            "Room": (m.HostRoom,),
        }
        leases = {"number | reply": m.LEASE.types, "number | item": (m.LeaseRow,)}
        for head, kind in (("number | reply", m.REPLY), ("number | item", m.ITEM)):
            types: List[type] = []
            for at, row in enumerate(rows(answers, head)):
                self.assertEqual(int(row[0]), at)
                name = ticked(row[1])
                types.extend(leases[head] if name == "Lease" else named.get(name) or (getattr(m, name),))
            self.assertEqual(tuple(types), kind.types)

    def test_enumerations(self) -> None:
        answers = section("Answers")
        what = next(row[1] for row in rows(answers.split("\n`EventRow`:")[1], "field") if row[0] == "`what`")
        self.assertEqual(enumeration(m.What), counted(what.split("enumeration: ")[1]))
        for values in (m.DomainState, m.Standing, m.Depth, m.LeaseState, m.Then):
            line = re.search(rf"`{values.__name__}`, an enumeration: (.*)\.", answers)
            assert line
            self.assertEqual(enumeration(values), counted(line.group(1)))
        job = next(row[1] for row in rows(answers.split("\n`JobRow`:")[1], "field") if row[0] == "`state`")
        self.assertEqual(enumeration(m.JobState), counted(job.split("enumeration: ")[1]))
        settle = next(row[3] for row in rows(section("Verbs"), "number | verb") if row[1] == "`settle`")
        self.assertEqual(
            [(number, name.split("-")[0]) for number, name in enumeration(m.Settlement)],
            counted(settle.split("enumeration: ")[1]),
        )

    def test_faults(self) -> None:
        table = [(int(row[0]), ticked(row[1])) for row in rows(section("Faults"), "number | code")]
        self.assertEqual([(int(code), code.word) for code in errors.FaultCode], table)

    def test_refusals(self) -> None:
        table = [int(row[0]) for row in rows(section("Handshake"), "refusal | why")]
        known = [code for code in range(255) if wire.refusal(code, 0).reason is not errors.Reason.OTHER]
        self.assertEqual(known + [255], table)

    def test_limits(self) -> None:
        frames = {row[0]: int(row[1].replace(",", "")) for row in rows(section("Frames"), "when")}
        self.assertEqual(frames, {"handshake": wire.HANDSHAKE_FRAME, "sealed": wire.SEALED_FRAME})
        self.assertIn(f"at most {wire.SEALED_FRAME:,} - {wire.SEALED_FRAME - wire.MESSAGE} bytes", section("Handshake"))
        self.assertIn(f"port {wire.PORT}", section("Connection"))

    def test_names_that_are_shown_as_examples_are_good_ones(self) -> None:
        m.MAC.encode(re.search(r"`mac` \| six bytes as `([^`]+)`", PAGE).group(1))  # type: ignore[union-attr]


class Examples(unittest.TestCase):
    """The worked example, from its bytes to values and back."""

    def setUp(self) -> None:
        self.examples = [bytes.fromhex(text) for text in re.findall(r"^```hex\n(.*?)^```", PAGE, re.M | re.S)]
        clear = re.findall(r"^    (caller|host)  +((?:[0-9a-f]{2} +)+[0-9a-f]{2})", PAGE, re.M)
        self.prefaces: Dict[str, bytes] = {side: bytes.fromhex(text) for side, text in clear}
        self.call = UUID("00010203-0405-0607-0809-0a0b0c0d0e0f")

    def test_there_are_four_and_the_prefaces(self) -> None:
        self.assertEqual(len(self.examples), 4)
        self.assertEqual(self.prefaces["caller"], wire.preface())
        self.assertEqual(wire.Answer.read(self.prefaces["host"]).raw, self.prefaces["host"])

    def test_hello(self) -> None:
        said = m.Hello(self.prefaces["caller"], self.prefaces["host"], "rxm 0.1.0", 1_700_036_000)
        self.assertEqual(m.OUTGOING.encode(said), self.examples[0])
        self.assertEqual(m.OUTGOING.decode(self.examples[0]), said)

    def test_welcome(self) -> None:
        heard = m.Welcome(
            self.prefaces["caller"], self.prefaces["host"], "xmand 0.1.0", "alice@EX.ORG", 1_700_036_000, "5f3a"
        )
        self.assertEqual(m.INCOMING.decode(self.examples[1]), heard)
        self.assertEqual(m.INCOMING.encode(heard), self.examples[1])

    def test_call(self) -> None:
        domain = UUID("a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf")
        pause = m.VERBS["pause"]
        said = m.Call(self.call, None, pause.number, None, None, pause.arguments.encode(m.OneDomain(domain)))
        self.assertEqual(m.OUTGOING.encode(said), self.examples[2])
        self.assertEqual(m.OUTGOING.decode(self.examples[2]), said)

    def test_done(self) -> None:
        fault = m.FaultRow(errors.FaultCode.DENIED, "you may not do that here", False)
        self.assertEqual(m.INCOMING.decode(self.examples[3]), m.DoneWith(self.call, fault))
        self.assertEqual(m.INCOMING.encode(m.DoneWith(self.call, fault)), self.examples[3])

    def test_the_program_on_the_page_is_python(self) -> None:
        program = re.search(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
        assert program
        ast.parse(program.group(1))


if __name__ == "__main__":
    unittest.main()
