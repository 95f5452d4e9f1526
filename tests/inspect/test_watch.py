from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError, EngineError, NonFiniteKV
from kvkeep.inspect.watch import watch
from kvkeep.quant.codec import Float, KVShape, Place, Tiles
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout

IDS = [int(t) for t in np.random.default_rng(3).integers(1, 200, 300)]


def options(model: Path, **changes: object) -> EngineOptions:
    settings = {"threads": 1, "kv_cache_bytes": 32 << 20, "chunk_tokens": 64, **changes}
    return EngineOptions(model=str(model), **settings)  # type: ignore[arg-type]


def test_pages_in_the_models_dtype_are_stored_as_computed(tiny: dict[str, Path]) -> None:
    seen = watch(options(tiny["qwen2"]), Float(), IDS, 2)
    info = seen.info
    assert seen.k.shape == (info.num_layers, info.num_kv_heads, 64, info.head_dim)
    assert torch.equal(seen.stored_k, seen.k)
    assert torch.equal(seen.stored_v, seen.v)
    whole = watch(options(tiny["qwen2"], chunk_tokens=512), Float(), IDS, 2)
    assert torch.equal(whole.k, seen.k), "however the prompt is cut"
    assert torch.equal(whole.out, seen.out)


def test_a_servers_guard_does_not_look_on(tiny: dict[str, Path]) -> None:
    plain, guarded = (
        watch(options(tiny["qwen2"], kv="k2v2", guard_share=share), Hack(Layout.K2V2), IDS, 1)
        for share in (0.0, 1.0)
    )
    watch(options(tiny["qwen2"], guard_share=1.0), Float(), IDS, 1)
    assert torch.equal(plain.stored_k, guarded.stored_k)


@pytest.mark.parametrize("page", [0, 3])
def test_what_is_stored_is_what_the_codec_makes_of_the_page(
    tiny: dict[str, Path], page: int
) -> None:
    """Of keys that were turned back, as the model has them."""
    codec = Hack(Layout.K4V2)
    plain = watch(options(tiny["qwen2"], dtype="float32"), Float(), IDS, page)
    coded = watch(options(tiny["qwen2"], dtype="float32"), codec, IDS, page)
    torch.testing.assert_close(coded.k[0], plain.k[0], atol=1e-5, rtol=1e-5)
    info = plain.info
    shape = KVShape(info.num_layers, info.num_kv_heads, info.head_dim, Layout.F32)
    turn = codec.rotation(shape)
    assert turn is not None
    place = Place(1, page == 0)
    tiles = codec.encode(coded.k[1] @ turn.k, coded.v[1], place)
    k, v = codec.decode(tiles, shape, place)
    torch.testing.assert_close(coded.stored_k[1], k @ turn.q.T, atol=0.02, rtol=0.02)
    torch.testing.assert_close(coded.stored_v[1], v)
    assert not torch.equal(coded.stored_k, coded.k)


@pytest.mark.parametrize(
    ("tokens", "page", "said"),
    [(300, 4, "page: the text has no page 4; choose one of 0 to 3"), (63, 0, "text: 63 tokens")],
)
def test_a_page_that_is_not_there_is_refused_before_a_model_is_loaded(
    tmp_path: Path, tokens: int, page: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        watch(options(tmp_path), Float(), IDS[:tokens], page)


class Refusing(Hack):
    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        raise NonFiniteKV("K", 1)


def test_what_cannot_be_stored_names_layer_and_head(tiny: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match="K of layer 0, KV head 1, isn't finite"):
        watch(options(tiny["qwen2"]), Refusing(Layout.K2V2), IDS, 1)
