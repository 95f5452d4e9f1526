from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.cli import run
from kvkeep.cli.cluster import counted, crew_options, link_options, linked, worker_options
from kvkeep.cli.engine import engine_options
from kvkeep.config import DEMO_MODEL, load
from kvkeep.disagg.members import Scaling
from kvkeep.engine.options import GivenKeys, KeyOptions
from kvkeep.engine.speeds import Speeds
from kvkeep.errors import ConfigError

KEYS = KeyOptions(store="own.json", given=GivenKeys(pages=bytes(32)))


def test_settings_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    flags: dict[str, Any] = {
        "cluster": "auto",
        "cluster_prefill": 2,
        "cluster_decode": 3,
        "cluster_least_tokens": 700,
        "cluster_epoch_s": 2.5,
        "cluster_silence_s": 9.0,
        "drain_s": 7.0,
        "keys": "k.json",
        "share_audit_log": "alerts",
        "kv_cache_memory_bytes": "1GiB",
        "tier": ("memory:1GiB", "disk:pages,8GiB"),
    }
    settings = load(flags)
    crew = crew_options(settings)
    assert (crew.prefill, crew.decode, crew.least_tokens) == (2, 3, 700)
    assert (crew.epoch_s, crew.drain_s, crew.silence_s) == (2.5, 7.0, 9.0)
    assert crew_options(load({"cluster": "auto"})).silence_s == 60.0
    assert link_options(settings).tls is None
    one, other = (worker_options(settings, name, KEYS) for name in ("decode-0", "decode-1"))
    assert (one.share.policy, one.share.state, one.share.led) == ("selective", None, True)
    apart = worker_options(load({**flags, "share": "isolate"}), "decode-0", KEYS).share
    assert (apart.led, apart.state) == (False, str(Path("k.json.votes.decode-0").resolve()))
    assert counted(engine_options(settings).share).state == "k.json.votes"
    assert (other.share.audit_log or "").endswith("alerts.decode-1")
    assert one.tiers == ("memory:1GiB", f"disk:{Path('pages').resolve() / 'decode-0'},8GiB")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=type(one)) == one
    assert one.keys == KEYS
    guarded = worker_options(load({**flags, "kv": "k4v4", "guard_share": 0.1}), "w", KEYS)
    assert (guarded.guard_share, guarded.guard_led, guarded.guard_state) == (0.1, True, None)
    assert not one.guard_led
    assert bytes(32).hex() not in repr(one)
    assert repr(bytes(32)) not in repr(one)
    assert (one.threads, one.model) == (1, str(DEMO_MODEL.resolve()))
    assert worker_options(load({**flags, "threads": 3}), "w", KEYS).threads == 3
    assert worker_options(load({**flags, "cluster": "127.0.0.1:1"}), "w", KEYS).threads is None
    assert worker_options(load({**flags, "no_auth": True}), "w", KEYS).share.state is None


def test_what_a_link_is_slow_for_is_coded() -> None:
    flags: dict[str, Any] = {"cluster": "auto", "kv": "auto", "cluster_link_gbit": 8.0}
    found = worker_options(load({**flags, "cluster_link_wait_s": 0.25}), "w", KEYS)
    assert (found.kv_auto_link_bytes_per_s, found.kv_auto_link_wait_s) == (1e9, 0.25)
    assert worker_options(load({"cluster": "auto"}), "w", KEYS).kv_auto_link_bytes_per_s is None
    for without in ("cluster", "kv"):
        with pytest.raises(ConfigError, match="cluster_link_gbit: in a cluster, kv = auto or"):
            load({key: value for key, value in flags.items() if key != without})


def test_what_is_computed_sooner_than_a_link_brings_it_is_told_by_two_settings() -> None:
    flags: dict[str, Any] = {"cluster": "auto", "cluster_link_gbit": 8.0, "cluster_token_ms": 2.5}
    settings = load(flags)
    assert link_options(settings).speeds == Speeds(link_bytes_per_s=1e9, token_s=0.0025)
    assert worker_options(settings, "w", KEYS).kv_auto_link_bytes_per_s is None
    assert link_options(load({"cluster": "auto"})).speeds is None
    one = {"cluster": "auto", "kv": "auto", "cluster_link_gbit": 8.0}
    assert link_options(load(one)).speeds is None
    for without in ("cluster", "cluster_link_gbit"):
        with pytest.raises(ConfigError, match="cluster_link_gbit: in a cluster, kv = auto or"):
            load({key: value for key, value in flags.items() if key != without})


def test_prompts_may_stay_where_they_were_computed() -> None:
    flags: dict[str, Any] = {"cluster": "auto", "cluster_attend_apart": 8192}
    assert link_options(load(flags)).attend_apart == 8192
    assert link_options(load({"cluster": "auto"})).attend_apart is None
    for other in ({"cluster": None}, {"kv": "auto"}):
        with pytest.raises(ConfigError, match="cluster_attend_apart: is for a cluster"):
            load({**flags, **other})


def test_workers_of_one_machine_may_share_memory() -> None:
    flags: dict[str, Any] = {"cluster": "auto", "cluster_shared_memory": True}
    with linked(load(flags)) as link:
        folder = Path(link.listen.removeprefix("shm://"))
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with linked(load({"cluster": "auto"})) as link:
        assert link.listen.startswith("tcp://127.0.0.1")
    files = {f"cluster_{name}": f"{name}.pem" for name in ("certificate", "key", "authority")}
    for other in ({"cluster": None}, files):
        with pytest.raises(ConfigError, match="cluster_shared_memory: is for a cluster on one"):
            load({**flags, **other})


def test_certificates_are_given_together() -> None:
    files = {f"cluster_{name}": f"{name}.pem" for name in ("certificate", "key", "authority")}
    tls = link_options(load(files)).tls
    assert tls is not None
    assert (tls.certificate, tls.key, tls.authority) == tuple(files.values())
    for name in files:
        with pytest.raises(ConfigError, match="cluster_certificate: goes with"):
            load({key: file for key, file in files.items() if key != name})


def test_workers_come_and_go_by_load_where_a_most_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert crew_options(load({"cluster": "auto"})).scaling == {}
    flags: dict[str, Any] = {"cluster": "auto", "cluster_prefill_most": 3, "cluster_scale_s": 60.0}
    found = crew_options(load(flags))
    assert (found.scaling, found.scale_s) == ({"prefill": Scaling(most=3, load=2.0)}, 60.0)
    both = crew_options(load({**flags, "cluster_decode_most": 2, "cluster_decode_load": 16.0}))
    assert both.scaling["decode"] == Scaling(most=2, load=16.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert worker_options(load(flags), "w", KEYS).threads == 2, "cores for all that there may be"
    for other in ({"cluster": None}, {"cluster_prefill": 3}, {"cluster_prefill": 0}):
        with pytest.raises(ConfigError, match="cluster_prefill_most: 3 with cluster_prefill = "):
            load({**flags, **other})


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--tier", "redis://h:1/0,1GiB"], "tier: a cluster's workers share no server"),
        (["--guard-share", "0.1"], "guard_share: pages of kv = bf16 are stored as they were"),
        (["--no-prefix-caching"], "prefix_caching: a cluster hands cached pages over"),
        (["--cluster-decode", "0"], "cluster_decode"),
        (["--cluster-prefill", "-1"], "cluster_prefill"),
        (["--cluster", "here"], "cluster: 'here' is neither 'auto' nor HOST:PORT"),
        (["--cluster", "192.0.2.7:6379"], "cluster: Ray's token authentication is off"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(
    flags: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    arguments = ["serve", "--no-auth", "--port", "0", "--admin-port", "0", "--cluster", "auto"]
    assert run([*arguments, *flags]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert why in " ".join(told.strip().splitlines()[-1].split())
