"""A wrapping key in the transit engine of Vault or OpenBao: it never leaves the service.

The token is the client's own business: `VAULT_TOKEN`, or the file that `vault login` writes. Keys
must be derived ones, so that each wrapped key is bound to its label.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import hvac
import requests
from hvac import exceptions

from kvkeep.errors import ConfigError, KeysGone, KeysUnavailable, SealError
from kvkeep.shield.envelope import KEY_BYTES
from kvkeep.shield.providers.provider import check_url

ANSWER_S = 2.0
_EACH = "*"


class VaultProvider:
    """Wraps by `transit/encrypt`; a key's name that ends in `*` stands for one key per label."""

    def __init__(self, client: hvac.Client, key: str) -> None:
        self._transit: Any = client.secrets.transit
        self._key = key
        self._made: set[str] = set()

    @classmethod
    def connect(cls, url: str, key: str) -> VaultProvider:
        """Return the provider of a service; raises `ConfigError` where it can't be talked to."""
        check_url(url, "vault:URL,KEY")
        client = hvac.Client(url=url, timeout=ANSWER_S)
        if not client.token:
            raise ConfigError("shield_keys: vault needs a token; set VAULT_TOKEN")
        return cls(client, key)

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped; makes the service's key where there is none."""
        name = self._name(label)
        self._ensure(name)
        answer = _asked(
            lambda: self._transit.encrypt_data(
                name=name, plaintext=_text(key), context=_text(label)
            )
        )
        return str(answer["data"]["ciphertext"]).encode()

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""
        answer = _asked(
            lambda: self._transit.decrypt_data(
                name=self._name(label), ciphertext=wrapped.decode(), context=_text(label)
            )
        )
        plain = base64.b64decode(answer["data"]["plaintext"])
        if len(plain) != KEY_BYTES:
            raise SealError("the service answered with a key of another length")
        into[:] = plain

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return the same key wrapped by the newest version of the service's."""
        answer = _asked(
            lambda: self._transit.rewrap_data(
                name=self._name(label), ciphertext=wrapped.decode(), context=_text(label)
            )
        )
        return str(answer["data"]["ciphertext"]).encode()

    def destroy(self, label: bytes) -> bool:
        """Delete the service's key of this label; False where one key wraps all."""
        if not self._key.endswith(_EACH):
            return False
        name = self._name(label)
        _asked(lambda: self._transit.update_key_configuration(name=name, deletion_allowed=True))
        _asked(lambda: self._transit.delete_key(name=name))
        self._made.discard(name)
        return True

    def _name(self, label: bytes) -> str:
        if not self._key.endswith(_EACH):
            return self._key
        return self._key[:-1] + hashlib.blake2b(label, digest_size=16).hexdigest()

    def _ensure(self, name: str) -> None:
        """Make a key where there is none; raises `ConfigError` where it isn't a derived one."""
        if name in self._made:
            return
        try:
            found = _asked(lambda: self._transit.read_key(name=name))
        except KeysGone:
            _asked(lambda: self._transit.create_key(name=name, derived=True))
        else:
            if not found["data"].get("derived"):
                raise ConfigError(
                    f"shield_keys: the transit key {name} must be made with derived=true"
                )
        self._made.add(name)


def _asked(call: Callable[[], Any]) -> Any:
    """Return the service's answer; its refusals become errors of ours."""
    try:
        return call()
    except exceptions.InvalidPath as error:
        raise KeysGone("vault has no such key") from error
    except exceptions.InvalidRequest as error:
        raise SealError("vault does not open this wrapped key") from error
    except (exceptions.VaultError, requests.RequestException) as error:
        raise KeysUnavailable(f"vault does not answer: {type(error).__name__}") from error


def _text(raw: bytes | memoryview) -> str:
    return base64.b64encode(raw).decode()
