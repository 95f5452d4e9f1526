"""A wrapping key in a hardware module behind PKCS#11; the PIN comes from `PKCS11_PIN`."""

from __future__ import annotations

import os
from typing import Any

import pkcs11
from pkcs11.exceptions import EncryptedDataInvalid, EncryptedDataLenRange, PKCS11Error
from pkcs11.mechanisms import GCMParams

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.envelope import KEY_BYTES, NONCE_BYTES, TAG_BYTES

PIN_VARIABLE = "PKCS11_PIN"
_NOT_OURS = (EncryptedDataInvalid, EncryptedDataLenRange)


class HsmProvider:
    """Wraps by the module's AES-GCM under a key that it does not hand out."""

    def __init__(self, module: str, token: str, label: str, pin: str) -> None:
        self._place = (module, token, label)
        self._pin = pin
        self._key: Any = None

    @classmethod
    def connect(cls, module: str, token: str, label: str) -> HsmProvider:
        """Return the provider of a module's key; raises `ConfigError` where it isn't there."""
        pin = os.environ.get(PIN_VARIABLE)
        if pin is None:
            raise ConfigError(f"shield_keys: the module's PIN is missing; set {PIN_VARIABLE}")
        provider = cls(module, token, label, pin)
        try:
            provider._opened()
        except (PKCS11Error, OSError, RuntimeError) as error:
            raise ConfigError(
                f"shield_keys: {module} has no key {label} in a token {token}, or refuses the"
                f" PIN: {type(error).__name__}"
            ) from None
        return provider

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._run("encrypt", bytes(key), nonce, label)

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""
        if len(wrapped) != NONCE_BYTES + KEY_BYTES + TAG_BYTES:
            raise SealError("a wrapped key is of another form or version")
        into[:] = self._run("decrypt", wrapped[NONCE_BYTES:], wrapped[:NONCE_BYTES], label)

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return what was given: the module's key has one version."""
        return wrapped

    def destroy(self, label: bytes) -> bool:
        """Destroy nothing: one key wraps all."""
        return False

    def _opened(self) -> Any:
        """Return the key in an open session."""
        if self._key is None:
            module, token, label = self._place
            session = pkcs11.lib(module).get_token(token_label=token).open(user_pin=self._pin)
            self._key = session.get_key(
                object_class=pkcs11.ObjectClass.SECRET_KEY,
                key_type=pkcs11.KeyType.AES,
                label=label,
            )
        return self._key

    def _run(self, what: str, data: bytes, nonce: bytes, label: bytes) -> bytes:
        try:
            call = getattr(self._opened(), what)
            return bytes(
                call(
                    data,
                    mechanism=pkcs11.Mechanism.AES_GCM,
                    mechanism_param=GCMParams(nonce, label, TAG_BYTES * 8),
                )
            )
        except _NOT_OURS as error:
            raise SealError("the module does not open this wrapped key") from error
        except PKCS11Error as error:
            self._key = None
            raise KeysUnavailable(f"the module failed: {type(error).__name__}") from error
