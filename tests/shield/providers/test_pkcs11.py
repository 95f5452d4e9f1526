"""The PKCS#11 provider against SoftHSM; `SOFTHSM2_MODULE` names its library where it is unusual."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_missing_pin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkeep.errors import ConfigError
    from kvkeep.shield.providers.pkcs11 import HsmProvider

    monkeypatch.delenv("PKCS11_PIN", raising=False)
    with pytest.raises(ConfigError, match="set PKCS11_PIN"):
        HsmProvider.connect("/none.so", "token", "label")
