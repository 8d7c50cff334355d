"""Kerberos 5 through GSSAPI. The one file that names the package `gssapi`.

A context is the caller's half of a handshake: it gives tokens, takes the host's, and when it is complete it has
proved both sides to each other. Then everything is verified that was asked for, and messages are sealed and opened.
"""

from __future__ import annotations

import time
from typing import Optional

try:
    import gssapi
    from gssapi.raw import init_sec_context, inquire_context
except ImportError as e:
    raise ImportError("xman needs the package gssapi: install python3-gssapi") from e

from .errors import ProtocolError, Unauthenticated

TOKENS = 6  # of one side; Kerberos needs one

_FLAGS = (
    gssapi.RequirementFlag.mutual_authentication
    | gssapi.RequirementFlag.confidentiality
    | gssapi.RequirementFlag.integrity
    | gssapi.RequirementFlag.replay_detection
    | gssapi.RequirementFlag.out_of_sequence_detection
)


class Context:
    """A security context with the service `xman` of one host, whose name is taken as it was typed.

    `until` is when the ticket ends, in seconds since 1970, known from the first token on. `target` is the principal
    that the host has proved to be, known at the end.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._wanted = f"xman/{host}"
        self._context: Optional[gssapi.SecurityContext] = None
        self._raw = None
        self._taken = 0
        self.complete = False
        self.until = 0
        self.target = ""
        try:
            self._name = gssapi.Name(f"xman@{host}", gssapi.NameType.hostbased_service)
        except gssapi.exceptions.GSSError as e:
            trouble = _text(e)
        else:
            return
        raise Unauthenticated(f"{self._wanted}: {trouble}")

    def step(self, token: Optional[bytes] = None) -> bytes:
        """Takes the host's token, if there is one yet, and returns the next one for it, or no bytes."""
        if token is not None:
            self._taken += 1
            if self._taken > TOKENS:
                raise ProtocolError(f"more than {TOKENS} tokens from the host")
        try:
            result = init_sec_context(
                self._name,
                context=self._raw,
                mech=gssapi.MechType.kerberos,
                flags=_FLAGS,
                input_token=token,
            )
        except gssapi.exceptions.GSSError as e:
            trouble = _text(e)
        else:
            self._raw = result.context
            self.until = int(time.time()) + (result.lifetime or 0)
            if not result.more_steps:
                self._verify()
            return result.token or b""
        # Out of the handler, so that the library's exception, which may hold a token, is not chained.
        raise Unauthenticated(f"{self._wanted}: {trouble}")

    def _verify(self) -> None:
        """Checks that the context is all that was asked for."""
        facts = inquire_context(self._raw)
        if not _is_strong(int(facts.flags)):
            raise ProtocolError("the context does not prove, seal and order everything")
        if facts.mech != gssapi.MechType.kerberos:
            raise ProtocolError("the context is not one of Kerberos")
        if not facts.complete:
            raise ProtocolError("the context is not complete")
        self.target = str(gssapi.Name(facts.target_name))
        if not _is_meant(self.target, self._host):
            raise Unauthenticated(
                f"{self._wanted} was asked for, but the Kerberos library made {self.target} of it: set "
                "dns_canonicalize_hostname = false and rdns = false in krb5.conf, or call the host by that name"
            )
        self.complete = True

    def seal(self, message: bytes) -> bytes:
        """Returns the message as a token that only the host can open."""
        try:
            sealed = gssapi.raw.wrap(self._raw, message, confidential=True)
        except gssapi.exceptions.GSSError as e:
            trouble = _text(e)
        else:
            if not sealed.encrypted:
                raise ProtocolError("GSSAPI did not encrypt")
            return bytes(sealed.message)
        raise ProtocolError(f"cannot seal: {trouble}")

    def open(self, token: bytes) -> bytes:
        """Returns the message in a token; what is repeated, missing, reordered or in clear is refused."""
        # RFC 4121: a wrap token, and its flag "Sealed".
        if len(token) < 3 or token[:2] != b"\x05\x04" or not token[2] & 0x02:
            raise ProtocolError("a frame that is not a sealed token of RFC 4121")
        try:
            opened = gssapi.raw.unwrap(self._raw, token)
        except gssapi.exceptions.GSSError as e:
            trouble = _text(e)
        else:
            if not opened.encrypted:
                raise ProtocolError("a message in clear")
            return bytes(opened.message)
        raise ProtocolError(f"a token that does not open: {trouble}")


def _is_strong(flags: int) -> bool:
    return flags & int(_FLAGS) == int(_FLAGS)


def _is_meant(principal: str, host: str) -> bool:
    """Returns whether a service is the one of the host that was typed.

    The library writes names small, without a dot at the end, and may add the machine's own search domain to a name
    without dots. What it asked the DNS for is another host.
    """
    service, _, _ = principal.rpartition("@")
    wanted = "xman/" + host.lower().rstrip(".")
    return service == wanted or ("." not in wanted and ":" not in wanted and service.startswith(wanted + "."))


def _text(error: gssapi.exceptions.GSSError) -> str:
    """Returns the library's own words: those of the mechanism where it has any, since GSSAPI's say less."""
    lines = error.get_all_statuses(error.min_code, False) if error.min_code else []
    text = " ".join(lines or error.get_all_statuses(error.maj_code, True)).strip().rstrip(".")
    no_ticket = isinstance(error, (gssapi.exceptions.MissingCredentialsError, gssapi.exceptions.ExpiredCredentialsError))
    return f"{text}: run kinit" if no_ticket else text
