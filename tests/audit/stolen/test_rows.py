from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.audit.stolen import PublicModel, open_public, read_stolen
from kvkeep.audit.stolen.rows import Form, rows_of_bytes
from kvkeep.errors import AuditError
from kvkeep.quant.codec import pack_float_tiles
from kvkeep.types import Layout

LAYERS, HEADS, DIM = 3, 2, 16


@pytest.fixture(scope="module")
def public(tiny: dict[str, Path]) -> PublicModel:
    return open_public(tiny["qwen2"])


@pytest.mark.parametrize(
    ("layout", "dtype", "form"),
    [
        (Layout.F32, torch.float32, "lanes"),
        (Layout.BF16, torch.bfloat16, "lanes"),
        (Layout.ROWS_F32, torch.float32, "rows"),
        (Layout.ROWS_BF16, torch.bfloat16, "rows"),
    ],
)
def test_layer_0_is_found_in_the_bytes_of_pages(
    public: PublicModel, layout: Layout, dtype: torch.dtype, form: Form
) -> None:
    shape = (2, LAYERS, HEADS, 64, DIM)
    k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    k, v = k.to(dtype), v.to(dtype)
    data = b"".join(
        pack_float_tiles(k[page, layer], v[page, layer], layout).tobytes()
        for page in range(2)
        for layer in range(LAYERS)
    )
    named = replace(public, dtype=str(dtype).removeprefix("torch."))
    stolen = rows_of_bytes(data + b"tail", named, form)
    for got, want in ((stolen.keys, k), (stolen.values, v)):
        assert got.shape == (128, HEADS, DIM)
        rows = want[:, 0].transpose(1, 2).reshape(128, HEADS, DIM).float().numpy()
        np.testing.assert_array_equal(got, rows)


def test_what_is_no_number_counts_as_nothing(public: PublicModel) -> None:
    stolen = rows_of_bytes(b"\xff" * (1 << 16), public)
    assert not stolen.keys.any()
    with pytest.raises(AuditError, match="hold no page"):
        rows_of_bytes(b"\xff" * 100, public)


def test_a_folder_is_read_in_order(public: PublicModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("b.npz", "a.npz"):
        k, v = rng.standard_normal((2, 4, HEADS, DIM))
        np.savez(tmp_path / name, k=k, v=v, tokens=np.arange(4) + ord(name[0]))
    stolen = read_stolen(tmp_path, public)
    assert stolen.tokens is not None
    assert stolen.tokens.tolist() == [97, 98, 99, 100, 98, 99, 100, 101]
    rows = np.zeros((4, HEADS, DIM))
    np.savez(tmp_path / "c.npz", k=rows, v=rows)
    assert read_stolen(tmp_path, public).tokens is None


def test_what_is_no_dump_is_refused(public: PublicModel, tmp_path: Path) -> None:
    rows = np.zeros((4, HEADS, DIM))
    cases = {
        "lacks": ({"k": rows}, "no dump with arrays"),
        "other": ({"k": rows, "v": rows[:, :1]}, "the model's are"),
        "short": ({"k": rows, "v": rows, "tokens": np.zeros(3)}, "tokens for 4 rows"),
        "large": ({"k": rows, "v": rows, "tokens": np.full(4, 512)}, "outside the model's vocab"),
    }
    for name, (arrays, sentence) in cases.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(AuditError, match=sentence):
            read_stolen(path, public)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(AuditError, match="no dump"):
        read_stolen(tmp_path / "text.npz", public)
    with pytest.raises(AuditError, match="can't read"):
        read_stolen(tmp_path / "nowhere.bin", public)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AuditError, match="holds no files"):
        read_stolen(tmp_path / "empty", public)
