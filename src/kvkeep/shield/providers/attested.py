"""A wrapping key that a verifier releases to an attested machine alone, for a minute at most.

    POST URL/v1/challenge  {"key"}  ->  {"nonce"}
    POST URL/v1/release    {"key", "nonce", "public", "provider", "report", "auxiliary"}
                           ->  {"public", "wrapped"}

JSON, bytes in base64. The report holds SHA-512(nonce | SHA-256(public) | "kvs1"), `public` being
an X25519 key that this process made for this release. The verifier judges the report and answers
with the wrapping key, 32 bytes by AES-256-GCM with a nonce of zeros under HKDF-SHA256(shared
secret, salt = nonce, info = "kvs1|release|" | public | its own public), bound to the key's label.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import httpx
import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvkeep.errors import KeysUnavailable
from kvkeep.shield.attestation import ReportEntry, bound_data, entry_of
from kvkeep.shield.envelope import KEY_BYTES, NONCE_BYTES, label_of
from kvkeep.shield.providers.local import LocalProvider
from kvkeep.shield.providers.provider import check_url
from kvkeep.shield.secret import SecretRegion

ANSWER_S: Final = 5.0
RELEASED_S: Final = 45.0
"""How long a released key is used before the machine attests anew."""
LEAST_NONCE_BYTES: Final = 16

_T = TypeVar("_T")


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """What a report must hold."""

    nonce: bytes


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """A wrapping key, for the one whose public key the report held."""

    public: bytes
    wrapped: bytes


class AttestedProvider:
    """Wraps with AES-256-GCM under a released key in secret memory."""

    def __init__(
        self,
        url: str,
        key: str,
        entry: ReportEntry,
        region: SecretRegion,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._entry = entry
        self._clock = clock
        slot = region.take()
        self._view = region.view(slot)
        self._local = LocalProvider(region, slot)
        self._until = float("-inf")
        self._client = httpx.Client(timeout=ANSWER_S, trust_env=False)

    @classmethod
    def connect(
        cls, url: str, key: str, entry: str | None, region: SecretRegion
    ) -> AttestedProvider:
        """Return the provider of a verifier; raises `ConfigError` where it can't be talked to."""
        check_url(url, "attested:URL,KEY")
        return cls(url, key, entry_of(entry), region)

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped."""
        return self._released().wrap(key, label)

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""
        self._released().unwrap(wrapped, label, into)

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return what was given: a released key has one version."""
        return wrapped

    def destroy(self, label: bytes) -> bool:
        """Destroy nothing: one key wraps all."""
        return False

    def _released(self) -> LocalProvider:
        """Return what wraps by the released key; raises `KeysUnavailable` where none is."""
        if self._clock() >= self._until:
            self._view[:] = bytes(KEY_BYTES)
            self._release()
            self._until = self._clock() + RELEASED_S
        return self._local

    def _release(self) -> None:
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        nonce = self._post("challenge", Challenge, {"key": self._key}).nonce
        if len(nonce) < LEAST_NONCE_BYTES:
            raise KeysUnavailable("the verifier's challenge is too short")
        report = self._entry.quote(bound_data(nonce, public))
        told = {
            "key": self._key,
            "nonce": _text(nonce),
            "public": _text(public),
            "provider": report.provider,
            "report": _text(report.report),
            "auxiliary": _text(report.auxiliary),
        }
        answer = self._post("release", Released, told)
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(answer.public))
            cipher = AESGCM(release_key(shared, nonce, public, answer.public))
            label = release_label(self._key)
            cipher.decrypt_into(bytes(NONCE_BYTES), answer.wrapped, label, self._view)
        except (ValueError, InvalidTag):
            self._view[:] = bytes(KEY_BYTES)
            raise KeysUnavailable("what the verifier released does not open") from None

    def _post(self, what: str, kind: type[_T], fields: Mapping[str, str]) -> _T:
        try:
            answer = self._client.post(f"{self._url}/v1/{what}", json=fields)
        except httpx.HTTPError as error:
            raise KeysUnavailable(f"the verifier does not answer: {type(error).__name__}") from None
        if answer.status_code == httpx.codes.FORBIDDEN:
            raise KeysUnavailable("the verifier refuses this machine's report")
        if answer.status_code != httpx.codes.OK:
            raise KeysUnavailable(f"the verifier answers {answer.status_code} to a {what}")
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError:
            raise KeysUnavailable(f"the verifier's answer to a {what} can't be read") from None


def release_key(shared: bytes, nonce: bytes, public: bytes, verifiers: bytes) -> bytes:
    """Return the key that a wrapping key is released under, from an X25519 secret."""
    info = b"kvs1|release|" + public + verifiers
    return HKDF(hashes.SHA256(), KEY_BYTES, nonce, info).derive(shared)


def release_label(key: str) -> bytes:
    """Return what a released key is bound to."""
    return label_of("release", key)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
