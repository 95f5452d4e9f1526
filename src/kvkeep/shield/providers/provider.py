"""What a provider of wrapping keys does, and how one is named on a command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal, Protocol, cast, get_args
from urllib.parse import urlsplit

from kvkeep.addresses import is_loopback
from kvkeep.errors import ConfigError

Kind = Literal["file", "env", "fd", "vault", "kms", "pkcs11", "attested"]

FORMS: Final = {
    "file": "file:PATH",
    "env": "env:NAME",
    "fd": "fd:NUMBER",
    "vault": "vault:URL,KEY",
    "kms": "kms:KEY-ARN",
    "pkcs11": "pkcs11:MODULE,TOKEN,LABEL",
    "attested": "attested:URL,KEY[,ENTRY]",
}
CAVEATS: Final = {
    "file": "whoever reads the key file and the key store opens every page; keep them apart",
    "env": "the server's own memory holds the key as part of its environment; prefer fd:",
}
"""What an operator is told at start."""


class KeyProvider(Protocol):
    """Wraps 32-byte keys under one that never leaves it; `label` is bound to what is wrapped.

    Each raises `KeysUnavailable` where it doesn't answer now, `SealError` where it refuses.
    """

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped."""

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return the same key wrapped by the newest version of the provider's own."""

    def destroy(self, label: bytes) -> bool:
        """Destroy what the provider keeps for this label alone; False where it keeps nothing."""


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """A provider as named: its kind, and the parts behind the colon."""

    kind: Kind
    parts: tuple[str, ...]

    def __str__(self) -> str:
        """Return the name again."""
        return f"{self.kind}:{','.join(self.parts)}"


def parse_spec(text: str) -> ProviderSpec:
    """Return what a name such as `file:PATH` says; raises `ConfigError` where it says nothing."""
    kind, colon, rest = text.partition(":")
    if kind not in get_args(Kind) or not colon:
        raise ConfigError(
            f"shield_keys: {kind!r} is no provider; use one of {', '.join(FORMS.values())}"
        )
    parts = tuple(rest.split(",")) if "," in FORMS[kind] else (rest,)
    least, most = (form.count(",") + 1 for form in (FORMS[kind].split("[")[0], FORMS[kind]))
    if not least <= len(parts) <= most or not all(parts):
        raise ConfigError(f"shield_keys: {kind} is written {FORMS[kind]}")
    if kind == "fd" and re.fullmatch(r"\d+(@\d+)?", rest) is None:
        raise ConfigError(f"shield_keys: fd is written {FORMS[kind]}, an open file's number")
    return ProviderSpec(cast("Kind", kind), parts)


def check_url(url: str, form: str) -> None:
    """Raise `ConfigError` for what is no URL of a service, or has keys cross a network."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        kind = form.partition(":")[0]
        raise ConfigError(f"shield_keys: {kind} is written {form} with an https URL")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigError("shield_keys: keys would cross a network in the clear; use https")


def located(spec: ProviderSpec) -> ProviderSpec:
    """Return a spec that another process of this user understands: whose descriptor is meant."""
    if spec.kind != "fd" or "@" in spec.parts[0]:
        return spec
    return ProviderSpec("fd", (f"{spec.parts[0]}@{os.getpid()}",))
