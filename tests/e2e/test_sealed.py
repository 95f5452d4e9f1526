"""An engine whose tier holds sealed pages alone: restarts, lost keys, a key process that dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.engine.sealers import key_client, mode_of, provider_of, shred_in
from kvkeep.errors import ConfigError
from kvkeep.shield.receipt import read_receipt
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens
from tests.shield.providers.machines import machine, verifier

SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = {"a": prompt_of(300, 1), "b": prompt_of(300, 2)}


def sealed(
    model: Path, folder: Path, shield: str | None = None, provider: str | None = None
) -> EngineCore:
    """Return an engine with a disk below it, by default sealed since it has one."""
    return core_for(
        model,
        tenants={"a": 0.4, "b": 0.4},
        tiers=(f"disk:{folder / 'tier'},64MiB",),
        shield=shield,
        keys=keys_in(folder, provider),
    )


def keys_in(folder: Path, provider: str | None = None) -> KeyOptions:
    return KeyOptions(store=str(folder / "keys" / "sealing.json"), provider=provider)


def ask(core: EngineCore, tenant: str) -> list[Chunk]:
    """Return an answer; steps leave time to the threads that seal and open."""
    asked = [request(PROMPTS[tenant], SHORT, id="r", tenant=tenant)]
    return drive(core, asked, lambda _: time.sleep(0.001))["r"]


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (folder / "tier").glob("*.segment"))


@pytest.fixture
def folder(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with pages of two tenants, sealed by an engine that has ended."""
    (tmp_path / "tier").mkdir()
    core = sealed(tiny["qwen2"], tmp_path)
    for tenant in PROMPTS:
        assert ask(core, tenant)[0].cached_tokens == 0
    rested(core, 4 * len(PROMPTS))
    core.close()
    return tmp_path


def rested(core: EngineCore, pages: int) -> None:
    """Ask until so many pages are below memory: none is while a new tenant's keys are made."""
    end = time.monotonic() + 30
    while core.stats().tiers[0].pages < pages:
        assert time.monotonic() < end
        for tenant in PROMPTS:
            ask(core, tenant)


def test_sealed_pages_outlive_a_restart_and_say_nothing(
    tiny: dict[str, Path], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = tmp_path_factory.mktemp("plain")
    (plain / "tier").mkdir()
    core = sealed(tiny["qwen2"], plain, "off")
    cold = {tenant: tokens(ask(core, tenant)) for tenant in PROMPTS}
    core.close()
    core = sealed(tiny["qwen2"], folder)
    for tenant in PROMPTS:
        warm = ask(core, tenant)
        assert tokens(warm) == cold[tenant]
        assert warm[0].cached_tokens == 256
    core.close()
    open_bytes, sealed_bytes = on_disk(plain), on_disk(folder)
    assert len(sealed_bytes) >= len(open_bytes) * 0.99
    blocks = [open_bytes[at : at + 16] for at in range(4096, len(open_bytes) - 16, 4096)]
    assert not any(block in sealed_bytes for block in blocks if len(set(block)) > 4)
    both = [sealed_bytes[at : at + 16] for at in range(0, len(sealed_bytes) - 16, 16)]
    assert len({block for block in both if any(block)}) >= len([b for b in both if any(b)]) * 0.999


def test_shredding_one_tenant_leaves_the_other_its_pages(
    tiny: dict[str, Path], folder: Path
) -> None:
    (folder / "receipt").write_bytes(shred_in(keys_in(folder), "a"))
    assert read_receipt(folder / "receipt").check().tenant == "a"
    core = sealed(tiny["qwen2"], folder)
    assert ask(core, "a")[0].cached_tokens == 0
    assert ask(core, "b")[0].cached_tokens == 256
    rested(core, 12)  # four of them by keys that are gone
    core.close()
    core = sealed(tiny["qwen2"], folder)
    assert ask(core, "a")[0].cached_tokens == 256, "by new keys"
    core.close()
    with pytest.raises(ConfigError, match="no keys of a tenant nobody"):
        shred_in(keys_in(folder), "nobody")
    with pytest.raises(ConfigError, match="no page was ever sealed"):
        shred_in(KeyOptions(store=str(folder / "none")), "a")


def test_a_key_process_that_is_killed_costs_hits_and_nothing_else(
    tiny: dict[str, Path], folder: Path
) -> None:
    before = keepers()
    core = sealed(tiny["qwen2"], folder)
    (keeper,) = keepers() - before
    assert state(core) == ("file", True, True)
    os.kill(keeper, signal.SIGKILL)
    first = ask(core, "a")
    assert first[0].cached_tokens == 0
    assert state(core) == ("file", False, False)
    assert dict(core.stats().tiers[0].errors)["read:keys"] >= 1
    core.purge("a")
    core.close()
    core = sealed(tiny["qwen2"], folder)
    assert ask(core, "b")[0].cached_tokens == 256
    core.close()


def state(core: EngineCore) -> tuple[str, bool, bool]:
    """Return the provider of keys, whether their process runs, and whether it gave any lately."""
    (use,) = core.stats().tiers
    assert use.room is not None
    assert use.keys is not None
    assert not use.room.read_only
    return use.keys.provider, use.keys.running, use.keys.answering


def keepers() -> set[int]:
    """Return the key processes that this one started and did not end."""
    numbers = (path for path in Path("/proc").iterdir() if path.name.isdigit())
    return {int(path.name) for path in numbers if _is_keeper_of(path)}


def _is_keeper_of(process: Path) -> bool:
    """Tell whether this process is a key process that this one started."""
    try:
        command = (process / "cmdline").read_bytes()
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return False
    return b"kvkeep.shield.keeper" in command and int(parent) == os.getpid()


def test_keys_that_cannot_be_had_are_refused_at_start(tiny: dict[str, Path], folder: Path) -> None:
    (folder / "keys" / "sealing.json.kek").rename(folder / "kek")
    with pytest.raises(ConfigError, match=r"shield_keys: can't read .*sealing.json.kek"):
        key_client(keys_in(folder)).start()
    moved = KeyOptions(store=keys_in(folder).store, provider=f"file:{folder / 'kek'}")
    assert str(provider_of(moved)) == moved.provider
    beside = KeyOptions(store=str(folder / "tier" / "sealing.json"))
    with pytest.raises(ConfigError, match="lies in the tier's directory"):
        key_client(beside, [folder / "tier"])


def test_a_tier_is_sealed_unless_told_otherwise() -> None:
    tiers = ("memory:1GiB",)
    assert mode_of(EngineOptions(model="m")) == "off"
    assert mode_of(EngineOptions(model="m", tiers=tiers)) == "seal"
    assert mode_of(EngineOptions(model="m", tiers=tiers, shield="off")) == "off"
    assert mode_of(EngineOptions(model="m", tiers=tiers, shield="orth")) == "orth"


def test_pages_outlive_a_restart_on_an_attested_machine_alone(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tier").mkdir()
    with verifier() as service, machine(tmp_path / "entry") as guest:
        provider = f"attested:{service.url},kek,{guest.path}"
        core = sealed(tiny["qwen2"], tmp_path, "tee", provider)
        assert core.info.shield.startswith("tee: as seal, with keys released to an attested")
        cold = tokens(ask(core, "a"))
        rested(core, 4 * len(PROMPTS))
        core.close()
        core = sealed(tiny["qwen2"], tmp_path, "tee", provider)
        warm = ask(core, "a")
        assert (tokens(warm), warm[0].cached_tokens) == (cold, 256)
        core.close()
        guest.measurement = b"changed"
        with pytest.raises(ConfigError, match="the verifier refuses this machine's report"):
            sealed(tiny["qwen2"], tmp_path, "tee", provider)
