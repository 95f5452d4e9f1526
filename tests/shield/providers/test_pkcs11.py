"""The PKCS#11 provider against SoftHSM; `SOFTHSM2_MODULE` names its library where it is unusual."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pkcs11
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11.exceptions import DeviceError, EncryptedDataInvalid, NoSuchToken
from pkcs11.mechanisms import GCMParams

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.providers.pkcs11 import HsmProvider

MODULES = (
    os.environ.get("SOFTHSM2_MODULE", ""),
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
)

PLAY = """
import sys
import pkcs11
from kvkeep.errors import ConfigError, SealError
from kvkeep.shield.providers.pkcs11 import HsmProvider

module = sys.argv[1]
token = pkcs11.lib(module).get_token(token_label="kvkeep")
with token.open(user_pin="4321", rw=True) as session:
    session.generate_key(pkcs11.KeyType.AES, 256, label="kek", store=True)
provider = HsmProvider.connect(module, "kvkeep", "kek")
wrapped = provider.wrap(memoryview(b"k" * 32), b"acme")
into = bytearray(32)
provider.unwrap(wrapped, b"acme", memoryview(into))
assert bytes(into) == b"k" * 32
assert provider.rewrap(wrapped, b"acme") == wrapped
assert provider.destroy(b"acme") is False
changed = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
for raw, label in ((wrapped, b"rival"), (changed, b"acme"), (wrapped[:-1], b"acme")):
    try:
        provider.unwrap(raw, label, memoryview(into))
    except SealError:
        continue
    raise AssertionError("opened what is not its own")
for place in ((module, "none", "kek"), (module, "kvkeep", "none"), ("/none.so", "kvkeep", "kek")):
    try:
        HsmProvider.connect(*place)
    except ConfigError as error:
        assert "has no key" in str(error), error
    else:
        raise AssertionError(place)
print("played")
"""


def test_a_module_wraps_and_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    module = next((path for path in MODULES if path and Path(path).exists()), None)
    tool = shutil.which("softhsm2-util")
    if module is None or tool is None:
        pytest.skip("SoftHSM is not installed (softhsm2)")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    config = tmp_path / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {tokens}\n")
    environment = os.environ | {"SOFTHSM2_CONF": str(config), "PKCS11_PIN": "4321"}
    token = ["--init-token", "--free", "--label", "kvkeep", "--so-pin", "1234", "--pin", "4321"]
    subprocess.run([tool, "--module", module, *token], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-c", PLAY, module],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "played\n", done.stderr


class Module:
    """A module of one token and key, as the library shows it; it can be pulled out."""

    def __init__(self) -> None:
        self._cipher = AESGCM(bytes(32))
        self.out = False
        self.opened = 0

    def lib(self, path: str) -> Module:
        return self

    def get_token(self, token_label: str) -> Module:
        if token_label != "kvkeep":
            raise NoSuchToken
        return self

    def open(self, user_pin: str) -> Module:
        assert user_pin == "4321"
        self.opened += 1
        return self

    def get_key(self, **wanted: object) -> Module:
        return self

    def encrypt(self, data: bytes, mechanism: object, mechanism_param: GCMParams) -> bytes:
        if self.out:
            raise DeviceError
        return self._cipher.encrypt(mechanism_param.nonce, data, mechanism_param.aad)

    def decrypt(self, data: bytes, mechanism: object, mechanism_param: GCMParams) -> bytes:
        try:
            return self._cipher.decrypt(mechanism_param.nonce, data, mechanism_param.aad)
        except InvalidTag:
            raise EncryptedDataInvalid from None


def test_a_module_that_was_pulled_out_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    monkeypatch.setattr(pkcs11, "lib", module.lib)
    monkeypatch.setenv("PKCS11_PIN", "4321")
    provider = HsmProvider.connect("/module.so", "kvkeep", "kek")
    wrapped, into = provider.wrap(memoryview(b"k" * 32), b"acme"), bytearray(32)
    module.out = True
    with pytest.raises(KeysUnavailable, match="the module failed: DeviceError"):
        provider.wrap(memoryview(b"k" * 32), b"acme")
    module.out = False
    provider.unwrap(wrapped, b"acme", memoryview(into))
    assert (bytes(into), module.opened) == (b"k" * 32, 2)
    assert provider.rewrap(wrapped, b"acme") == wrapped
    assert provider.destroy(b"acme") is False
    for raw, label in ((wrapped, b"rival"), (wrapped[:-1], b"acme")):
        with pytest.raises(SealError):
            provider.unwrap(raw, label, memoryview(into))
    with pytest.raises(ConfigError, match=r"has no key kek in a token none.*NoSuchToken"):
        HsmProvider.connect("/module.so", "none", "kek")


def test_a_missing_pin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PKCS11_PIN", raising=False)
    with pytest.raises(ConfigError, match="set PKCS11_PIN"):
        HsmProvider.connect("/none.so", "token", "label")
