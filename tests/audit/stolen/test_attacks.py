"""The attacks succeed on what they break, through real engines, and stay at chance elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.shield_seal import OwnKeys, context
from kvkeep.audit.stolen import ATTACKS, PublicModel, Report, Stolen, attack_rows, open_public
from kvkeep.audit.stolen.rows import rows_of_bytes
from kvkeep.engine.options import EngineOptions
from kvkeep.inspect.dump import dump_rows
from kvkeep.models.make import tiny
from kvkeep.ops.layout import Heads
from kvkeep.quant.codec import pack_float_tiles
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.frame import HEADER_BYTES
from kvkeep.shield.transform import LinearShield
from kvkeep.types import Layout

ROWS = 320
slow = pytest.mark.slow
Rows = NDArray[np.float32]
Dump = Callable[..., Stolen]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads as wide as real ones, one layer: attacks look at no other."""
    shape = {"head_dim": 64, "num_hidden_layers": 1}
    return tiny("qwen3", tmp_path_factory.mktemp("public") / "m", overrides=shape)


@pytest.fixture(scope="module")
def public(model: Path) -> PublicModel:
    return open_public(model)


@pytest.fixture(scope="module")
def dump(model: Path) -> Dump:
    @cache
    def dumped(**options: object) -> Stolen:
        ids = np.random.default_rng(0).integers(0, 512, ROWS)
        settings = {"threads": 2, "kv_cache_bytes": 16 << 20, **options}
        found = dump_rows(
            EngineOptions(model=str(model), **settings),  # type: ignore[arg-type]
            [int(i) for i in ids],
        )
        return Stolen(found.k, found.v, found.tokens)

    return dumped


def top1(report: Report, name: str) -> float:
    (found,) = [finding.top1 for finding in report.findings if finding.name == name]
    assert found is not None
    return found


def test_a_plain_page_gives_its_tokens_away(dump: Dump, public: PublicModel) -> None:
    stolen = dump()
    assert stolen.tokens is not None
    np.testing.assert_allclose(stolen.values, public.values[stolen.tokens], atol=1e-4)
    report = attack_rows(stolen, public)
    assert top1(report, "collision") >= 0.95
    assert report.guesses == tuple(stolen.tokens.tolist())
    assert report.leaks


def test_permuted_pages_fall_to_sorted_values(dump: Dump, public: PublicModel) -> None:
    report = attack_rows(dump(shield="perm"), public)
    assert top1(report, "sorted values") >= 0.95
    assert top1(report, "collision") <= 0.1
    assert report.best.top1 is not None
    assert report.best.top1 >= 0.95


def test_turned_pages_fall_to_norms(dump: Dump, public: PublicModel) -> None:
    report = attack_rows(dump(shield="orth"), public)
    assert top1(report, "norms") >= 0.95
    assert top1(report, "sorted values") <= 0.1


def test_masked_pages_fall_to_what_all_rows_share(dump: Dump, public: PublicModel) -> None:
    report = attack_rows(dump(shield="mask"), public)
    assert top1(report, "centred norms") >= 0.95
    assert top1(report, "norms") <= 0.5
    assert report.leaks


@pytest.mark.parametrize(
    "shield", [pytest.param("perm", marks=slow), pytest.param("orth", marks=slow), "mask"]
)
def test_any_of_them_falls_to_known_text(dump: Dump, public: PublicModel, shield: str) -> None:
    stolen = replace(dump(shield=shield), known=public.head_dim + 2)
    report = attack_rows(stolen, public)
    assert top1(report, "least squares on known text") >= 0.95
    few = attack_rows(replace(stolen, known=16), public)
    assert top1(few, "distances to known text") >= 0.95


@pytest.mark.parametrize(
    "shield", [pytest.param("off", marks=slow), pytest.param("perm", marks=slow), "orth"]
)
def test_codes_of_four_bits_do_not_hide_it(dump: Dump, public: PublicModel, shield: str) -> None:
    report = attack_rows(dump(shield=shield, kv="k4v4"), public)
    assert report.best.top1 is not None
    assert report.best.top1 >= 0.95


@pytest.mark.parametrize("mode", ["perm", "orth"])
def test_folded_weights_give_the_key_away(public: PublicModel, dump: Dump, mode: str) -> None:
    shield = LinearShield(mode, bytes(32))  # type: ignore[arg-type]
    (fold,) = shield.folds(Heads(4, 2, 64))
    weights = fold.apply("model.layers.0.self_attn.v_proj.weight", torch.tensor(public.v_proj))
    turned = fold.apply(
        "model.layers.0.self_attn.v_proj.bias", torch.tensor(dump().values[0]).view(-1)
    )
    values = np.repeat(turned.view(1, 2, 64).numpy(), 3, 0)
    assert dump().tokens is not None
    tokens = np.repeat(dump().tokens[:1], 3)  # type: ignore[index]
    report = attack_rows(Stolen(dump().keys[:3], values, tokens, weights.numpy()), public)
    assert top1(report, "folded weights") == 1.0


def sums(dim: int) -> Rows:
    found = np.ones((1, 1), np.float32)
    while len(found) < dim:
        found = np.block([[found, found], [found, -found]])
    scaled: Rows = (found / dim**0.5).astype(np.float32)
    return scaled


def test_one_hadamard_sum_is_void(dump: Dump, public: PublicModel) -> None:
    plain, rng = dump(), np.random.default_rng(1)
    signs = rng.choice([-1.0, 1.0], (2, 64)).astype(np.float32)
    keys, values = (
        np.asarray(x * signs @ sums(64), np.float32) for x in (plain.keys, plain.values)
    )
    turned = Stolen(keys, values, plain.tokens)
    assert top1(attack_rows(turned, public), "Hadamard magnitudes") >= 0.95


def test_rotations_that_go_through_rope_leave_radii(dump: Dump, public: PublicModel) -> None:
    plain, rng = dump(), np.random.default_rng(1)
    angles = rng.uniform(0, 2 * np.pi, (2, 32)).astype(np.float32)

    def turned(x: Rows) -> Rows:
        low, high = np.split(x, 2, -1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    stolen = Stolen(turned(plain.keys), turned(plain.values), plain.tokens)
    assert top1(attack_rows(stolen, public), "pair radii") >= 0.95


VOCABULARIES = 20


def pages_of(public: PublicModel, tokens: NDArray[np.int64], layout: Layout) -> bytes:
    """Return the bytes of pages with these tokens' values, keys left unturned by position."""
    dtype = torch.float32 if layout is Layout.F32 else torch.bfloat16
    found = []
    for begin in range(0, len(tokens), 64):
        at = tokens[begin : begin + 64]
        k, v = (torch.tensor(x[at]).transpose(0, 1).to(dtype) for x in (public.keys, public.values))
        found.append(pack_float_tiles(k, v, layout).tobytes())
    return b"".join(found)


def test_sealed_pages_stay_at_chance_where_plain_bytes_fall(public: PublicModel) -> None:
    """Of 20 vocabularies of rows, about 20 are guessed right by accident."""
    size = 128
    public = replace(public, keys=public.keys[:size], values=public.values[:size])
    tokens = np.random.default_rng(2).integers(0, size, VOCABULARIES * size)
    plain = pages_of(public, tokens, Layout.F32)
    sealed = FrameSealer(OwnKeys()).seal(context("victim"), plain, [len(plain)])[HEADER_BYTES:]
    for data, most in ((plain[: 1 << 18], None), (sealed, 5.0)):
        stolen = rows_of_bytes(bytes(data), public)
        report = attack_rows(replace(stolen, tokens=tokens[: len(stolen)]), public)
        assert report.over_chance is not None
        if most is None:
            assert report.best.top1 == 1.0
            assert report.leaks
        else:
            assert report.rows == len(tokens)
            assert report.over_chance <= most, [(f.name, f.top1) for f in report.findings]
            assert not report.leaks


def test_sealed_pages_are_told_from_others_without_the_truth(
    dump: Dump, public: PublicModel
) -> None:
    stolen = dump(shield="perm")
    assert attack_rows(replace(stolen, tokens=None), public).leaks
    noise = np.random.default_rng(3).standard_normal((2, *stolen.keys.shape)).astype(np.float32)
    assert not attack_rows(Stolen(noise[0], noise[1]), public).leaks


def test_what_was_not_stolen_is_not_tried(dump: Dump, public: PublicModel) -> None:
    tried = {finding.name for finding in attack_rows(dump(), public).findings}
    assert {attack.name for attack in ATTACKS} - tried == {
        "distances to known text",
        "least squares on known text",
        "folded weights",
    }
