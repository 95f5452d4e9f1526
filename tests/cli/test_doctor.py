from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvkeep.cli import run
from kvkeep.cli.doctor import cpu_flags
from kvkeep.models.make import tiny
from kvkeep.shield.opened import opened
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import parse_spec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny("qwen2", tmp_path / "tiny")


def test_flags_of_the_first_processor() -> None:
    text = "processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags : fpu\n"
    assert cpu_flags(text) == {"fpu", "avx2", "fma"}
    assert cpu_flags("nothing") == frozenset()


def test_doctor_names_the_kernel_and_accepts_a_good_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--model", str(model), "--kernel", "reference"]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown
    assert "can be served (qwen2)" in shown
    for what in ("key memory", "open tiles", "core dumps", "swap", "attestation"):
        assert what in shown


def test_doctor_says_why_a_model_cannot_be_served(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert run(["doctor", "--model", str(model)]) == 1
    assert "can't be served" in capsys.readouterr().out


def test_model_info_counts_what_a_token_costs(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    heads, dim = config["num_key_value_heads"], config["hidden_size"]
    dim //= config["num_attention_heads"]
    per_token = config["num_hidden_layers"] * heads * dim * 2 * 2
    assert run(["model", "info", str(model)]) == 0
    assert f"{per_token} in bfloat16" in capsys.readouterr().out


def test_model_make_needs_to_be_told_that_weights_are_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "make", str(tmp_path / "m"), "--like", "qwen2.5-0.5b"]) == 1
    assert "--random" in capsys.readouterr().err


def test_template_keeps_and_breaks(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "template", str(model)]) == 0
    (model / "chat_template.jinja").write_text(
        "{{ messages | length }} messages:"
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    capsys.readouterr()
    assert run(["doctor", "template", str(model)]) == 1
    assert "breaks reuse" in capsys.readouterr().out


def test_doctor_says_where_pages_would_go_and_whose_keys_seal_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, kek = tmp_path / "store.json", tmp_path / "kek"
    told = ["doctor", "--model", str(model), "--kernel", "reference"]
    told += ["--tier", f"disk:{tmp_path / 'new'},64MiB", "--shield-store", str(store)]
    told += ["--shield-keys", f"file:{kek}"]

    def shown() -> str:
        run(told)
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert "free" in shown()
    assert "the first start with a tier makes it" in shown()
    make_key_file(kek)
    with opened(store, parse_spec(f"file:{kek}")):
        pass
    assert "of 0 owners, wrapped by file, in" in shown()
    kek.unlink()
    assert "NONE: shield_keys: can't read" in shown()
