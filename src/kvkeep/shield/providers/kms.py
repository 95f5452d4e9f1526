"""A wrapping key in AWS KMS: it never leaves the service; credentials are found as boto3 does."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.envelope import KEY_BYTES

ANSWER_S = 2.0
_NOT_OURS = ("InvalidCiphertextException", "IncorrectKeyException")


class KmsProvider:
    """Wraps by `Encrypt`, the label as encryption context."""

    def __init__(self, client: Any, key_id: str) -> None:
        self._client = client
        self._key_id = key_id

    @classmethod
    def connect(cls, key_id: str) -> KmsProvider:
        """Return the provider of a key's ARN; raises `ConfigError` where it is none."""
        parts = key_id.split(":")
        if len(parts) != 6 or parts[2] != "kms" or not parts[3]:
            raise ConfigError("shield_keys: kms is written kms:arn:aws:kms:REGION:ACCOUNT:key/ID")
        settings = Config(
            connect_timeout=ANSWER_S, read_timeout=ANSWER_S, retries={"total_max_attempts": 1}
        )
        return cls(boto3.client("kms", region_name=parts[3], config=settings), key_id)

    def wrap(self, key: memoryview, label: bytes) -> bytes:
        """Return the key wrapped."""
        answer = _asked(
            lambda: self._client.encrypt(
                KeyId=self._key_id, Plaintext=bytes(key), EncryptionContext=_context(label)
            )
        )
        return bytes(answer["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, label: bytes, into: memoryview) -> None:
        """Write the key that was wrapped into 32 bytes."""
        answer = _asked(
            lambda: self._client.decrypt(
                KeyId=self._key_id, CiphertextBlob=wrapped, EncryptionContext=_context(label)
            )
        )
        plain = answer["Plaintext"]
        if len(plain) != KEY_BYTES:
            raise SealError("the service answered with a key of another length")
        into[:] = plain

    def rewrap(self, wrapped: bytes, label: bytes) -> bytes:
        """Return the same key wrapped by the newest version of the service's."""
        answer = _asked(
            lambda: self._client.re_encrypt(
                CiphertextBlob=wrapped,
                SourceKeyId=self._key_id,
                SourceEncryptionContext=_context(label),
                DestinationKeyId=self._key_id,
                DestinationEncryptionContext=_context(label),
            )
        )
        return bytes(answer["CiphertextBlob"])

    def destroy(self, label: bytes) -> bool:
        """Destroy nothing: one key wraps all, and the service deletes it after a week at best."""
        return False


def _context(label: bytes) -> dict[str, str]:
    return {"kvkeep": base64.b64encode(label).decode()}


def _asked(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _NOT_OURS:
            raise SealError("KMS does not open this wrapped key") from error
        raise KeysUnavailable(f"KMS refuses: {code}") from error
    except BotoCoreError as error:
        raise KeysUnavailable(f"KMS does not answer: {type(error).__name__}") from error
