from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvkeep.audit.stolen import open_public
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import CheckpointError, ModelNotFound
from kvkeep.inspect.dump import dump_rows
from kvkeep.models.make import tiny


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_tables_are_what_an_engine_computes(family: str, tiny: dict[str, Path]) -> None:
    public = open_public(tiny[family])
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 512, 128)]
    rows = dump_rows(EngineOptions(model=str(tiny[family]), threads=1, kv_cache_bytes=8 << 20), ids)
    np.testing.assert_allclose(rows.v, public.values[ids], atol=1e-5)
    lengths, expected = (np.linalg.norm(x, axis=-1) for x in (rows.k, public.keys[ids]))
    np.testing.assert_allclose(lengths, expected, rtol=1e-4)
    np.testing.assert_allclose(rows.k[0], public.keys[ids[0]], atol=1e-4)  # at position 0


def test_shards_and_bfloat16_are_read(tmp_path: Path) -> None:
    whole = open_public(tiny("qwen2", tmp_path / "a", dtype="bfloat16"))
    shards = open_public(tiny("qwen2", tmp_path / "b", dtype="bfloat16", shard_bytes=64 << 10))
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    np.testing.assert_array_equal(whole.values, shards.values)
    assert (whole.num_layers, whole.dtype, whole.heads, whole.head_dim) == (3, "bfloat16", 2, 16)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_public(tmp_path)
    path = tiny("qwen2", tmp_path / "m")
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    for broken, sentence in ((content[:4], "no safetensors"), (content[:900], "no safetensors")):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match=sentence):
            open_public(path)
    weights.write_bytes(
        content.replace(b"layers.0.self_attn.v_proj.w", b"layers.0.self_attn.v_pr0j.w")
    )
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.0\.self_attn\.v_proj"):
        open_public(path)
    weights.write_bytes(content[: len(content) // 4])
    with pytest.raises(CheckpointError, match="can't be read at tensor"):
        open_public(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "many"}))
    with pytest.raises(CheckpointError, match="lacks or garbles"):
        open_public(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        open_public(path)
