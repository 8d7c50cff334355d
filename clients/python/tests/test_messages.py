"""Names that are checked at the door, and that every message goes there and back."""

import unittest
from typing import Iterable, Set
from uuid import UUID

from xman import messages as m
from xman.codec import Kind, Struct, Variants
from xman.errors import CodecError, FaultCode

from . import samples

UUIDS = (
    str(samples.DOMAIN),
    str(samples.DOMAIN).upper(),
    samples.DOMAIN.hex,
    f"urn:uuid:{samples.DOMAIN}",
    f"{{{samples.DOMAIN}}}",
)
NAMES = (
    (
        m.PRINCIPAL,
        ("alice@EX.ORG", "bob/admin@EX.ORG", "a/b/c@R", r"we\/ird\@x@EX.ORG", r"tab\tnew\nback\bnul\0@R", "žofie@R", "/@R", "a@R/S"),
        ("", "alice", "@EX.ORG", "alice@", "a@b@c", "a\\x@R", "a\tb@R", "a\x00@R", "a\u0085@R", "alice\\", "x" * 1024 + "@R"),
    ),
    (
        m.DOMAIN_NAME,
        ("web1", "a b", "..x", "-", "ž" * 120, "a" * 31, f"{{{samples.ID.hex}}}", f"x{samples.ID}"),
        ("", ".", "..", "a/b", "a\nb", "a\u202eb", "a\u2028b", "a\u2069", "ž" * 121, *UUIDS),
    ),
    (m.TAG, ("a", "0", "grid.brno-1_x", "a" * 63), ("", "A", "-a", ".a", "_a", "a" * 64, "ž", "a b", "a\n")),
    (
        m.LABEL_VALUE,
        ("x", "/", "a b", "ž" * 127, "\U0001f600"),
        ("", "a\n", "\u200e", "\ufffe", "\uffff", "ž" * 128, "\x7f"),
    ),
    (m.JOB_ID, ("4711", "12[3].pbs01", "#!~", "1" * 128), ("", "47 11", "a/b", "a\n", "ž", "\x7f", "1" * 129)),
    (m.LINK_NAME, ("br0", "default", "a b"), ("", "a/b", "\u200f", "a" * 64, "a\x00", "\ufffe")),
    (
        m.MAC,
        ("52:54:00:12:34:56", "00:00:00:00:00:00", "fe:ff:ff:ff:ff:ff"),
        ("", "FE:FF:FF:FF:FF:FF", "53:54:00:12:34:56", "52-54-00-12-34-56", "52:54:00:12:34", "52:54:00:12:34:56:78", "5254.0012.3456"),
    ),
    (
        m.HOST_NAME,
        ("alpha", "a.b-c_d", "fe80::1", "::1", "127.0.0.1", "a" * 253),
        ("", "-a", ".a", "a b", "a/b", "ž", "a" * 254, "[::1]"),
    ),
)


class Names(unittest.TestCase):
    def test_good_names_are_taken_and_bad_ones_make_no_message(self) -> None:
        for number, (kind, good, bad) in enumerate(NAMES):
            for text in good:
                with self.subTest(number=number, good=text):
                    self.assertEqual(kind.decode(kind.encode(text)), text)
            for text in bad:
                data = text.encode()
                with self.subTest(number=number, bad=text):
                    with self.assertRaises(CodecError):
                        kind.encode(text)
                    with self.assertRaises(CodecError):
                        kind.decode(len(data).to_bytes(8, "big") + data)

    def test_a_domain_is_a_uuid_or_a_name(self) -> None:
        self.assertEqual(m.DOMAIN.encode(samples.DOMAIN)[:4], bytes(4))
        self.assertEqual(m.DOMAIN.encode("web1")[:4], bytes((0, 0, 0, 1)))
        self.assertEqual(m.domain("web1"), "web1")
        for text in UUIDS:
            self.assertEqual(m.domain(text), samples.DOMAIN)

    def test_a_cursor_is_shown_and_read_again(self) -> None:
        self.assertEqual(str(samples.CURSOR), "000102030405060708090a0b0c0d0e0f.7")
        self.assertEqual(m.Cursor.parse(str(samples.CURSOR)), samples.CURSOR)
        for text in ("", "7", ".7", "0.7", f"{samples.CURSOR}x", f"{samples.ID}.7", f"{samples.ID.hex}.", f"{samples.ID.hex}.²"):
            with self.subTest(text), self.assertRaises(CodecError):
                m.Cursor.parse(text)

    def test_a_lease_is_shown_and_read_again(self) -> None:
        self.assertEqual(str(samples.KEY), "slurm/grid/12[3].pbs01/2")
        self.assertEqual(m.LeaseKey.parse(str(samples.KEY)), samples.KEY)
        for text in ("", "slurm/grid/4711", "slurm/grid/4711/0/0", "slurm/grid/4711/x", "slurm/grid/4711/-1", "slurm//4711/0",
                     "Slurm/grid/4711/0", "slurm/grid/47 11/0", "slurm/grid/4711/4294967296", "slurm/grid/4711/²"):
            with self.subTest(text), self.assertRaises(CodecError):
                m.LeaseKey.parse(text)


class Messages(unittest.TestCase):
    def test_every_message_goes_there_and_back(self) -> None:
        for kind, values in ((m.INCOMING, samples.INCOMING), (m.OUTGOING, samples.OUTGOING)):
            for value in values:
                with self.subTest(type=type(value).__name__):
                    self.assertEqual(kind.decode(kind.encode(value)), value)

    def test_every_verb_has_its_arguments(self) -> None:
        self.assertEqual(list(m.VERBS), list(samples.ARGUMENTS))
        for name, value in samples.ARGUMENTS.items():
            with self.subTest(name):
                kind = m.VERBS[name].arguments
                self.assertEqual(kind.decode(kind.encode(value)), value)

    def test_the_samples_leave_no_variant_out(self) -> None:
        for kind, values in (
            (m.INCOMING, samples.INCOMING),
            (m.OUTGOING, samples.OUTGOING),
            (m.ITEM, samples.ITEMS),
            (m.REPLY, samples.REPLIES),
        ):
            self.assertEqual({type(value) for value in values}, set(kind.types))

    def test_arguments_of_none_are_no_bytes(self) -> None:
        self.assertEqual(m.VERBS["whoami"].arguments.encode(m.Nothing()), b"")

    def test_secrets_are_not_shown(self) -> None:
        secret = b"do not show me, do not show me!!"
        shown = (
            m.Permit(secret),
            m.Input(samples.ID, secret),
            m.Renew(secret, 1),
            m.Renewed(secret, 1),
            m.Call(samples.ID, None, 8, None, None, secret),
            m.Define(secret.decode(), secret.decode()),
            m.Create(secret.decode()),
        )
        for value in shown:
            with self.subTest(type=type(value).__name__):
                self.assertNotIn("show me", repr(value))

    def test_fault_codes_have_the_words_of_the_page(self) -> None:
        self.assertEqual(FaultCode.BAD_REQUEST.word, "bad-request")


if __name__ == "__main__":
    unittest.main()
