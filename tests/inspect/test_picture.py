from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvkeep.errors import ConfigError
from kvkeep.inspect.page import PageErrors
from kvkeep.inspect.picture import check_format, draw, save


def made(layers: int = 3, heads: int = 2) -> PageErrors:
    drawn = np.random.default_rng(0).uniform(0, 1, (layers, heads, 16))
    per_head = drawn.mean(2).tolist()
    return PageErrors(
        model="toy",
        digest="0123456789abcdef" * 4,
        dtype="bfloat16",
        codec="k2v2",
        page=3,
        first_position=192,
        tokens=300,
        k_channels=drawn.tolist(),
        v_channels=drawn.tolist(),
        k_heads=per_head,
        v_heads=per_head,
        k_heads_before=per_head,
        v_heads_before=per_head,
        attention_heads=per_head,
    )


def words(svg: str) -> set[str]:
    return {text.strip() for text in re.findall(r">([^<>]+)</text>", svg)}


def test_a_picture_names_codec_model_axes_and_units(tmp_path: Path) -> None:
    save(made(), tmp_path / "page.svg")
    said = words((tmp_path / "page.svg").read_text())
    title = {
        "k2v2 against bfloat16: page 3, tokens 192 to 255 of 300",
        "toy, digest 0123456789abcdef",
    }
    assert title <= said
    assert {"layer / KV head", "channel of the head", "RMS error / RMS", "query head"} <= said
    assert {"as stored", "2 / 1", "layer"} <= said


def test_a_picture_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        save(made(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_maps_hold_the_figures() -> None:
    errors = made()
    keys = draw(errors).axes[0].images[0].get_array()
    assert keys is not None
    assert np.array_equal(keys, np.array(errors.k_channels).reshape(6, 16))


def test_of_many_rows_layers_alone_are_named() -> None:
    labels = draw(made(layers=60)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [str(i) for i in range(0, 60, 2)]


def test_errors_of_nothing_are_drawn(tmp_path: Path) -> None:
    none = np.zeros((3, 2, 16)).tolist()
    flat = np.zeros((3, 2)).tolist()
    changed = msgspec.structs.replace(
        made(), k_channels=none, k_heads=flat, k_heads_before=flat, attention_heads=flat
    )
    save(changed, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: page\.gif names no format"):
        check_format(tmp_path / "page.gif")
    with pytest.raises(ConfigError, match="out: can't write"):
        save(made(), tmp_path / "nowhere" / "page.svg")
