"""A whole engine whose tiles, kernels and sampling are a device's: the tokens of a CPU's engine.

Without a CUDA device the kernels run through Triton's interpreter, on a tiny float32 checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvkeep.attention.planner import FlatPlanner
from kvkeep.cli.engine import engine_options
from kvkeep.config import Settings, load
from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from tests.calibrated import LAYOUTS
from tests.e2e.test_tree import GROUP, parts
from tests.engines import core_for, drive, request, tokens
from tests.forests import eager
from tests.ops.devices import DEVICE
from tests.toys import WindowEvictor

TENANTS = {"a": 1.0}
PAGE_BYTES = 64 * 3 * 2 * 32 * 2 * 4
PREFIX = np.random.default_rng(5).integers(1, 500, 258).tolist()
DEVICE_OPTIONS = {"kernel": "triton", "device": DEVICE}

Start = Callable[..., EngineCore]


@pytest.fixture(scope="module")
def start(tiny: dict[str, Path]) -> Start:
    """Return what starts an engine of so many pages."""

    def start(pages: int, chosen: Parts, **options: object) -> EngineCore:
        return core_for(
            tiny["qwen3"],
            tenants=TENANTS,
            parts=chosen,
            pages=pages,
            page_bytes=PAGE_BYTES,
            dtype="float32",
            **options,
        )

    return start


def ask(name: str, tail: list[int], **params: object) -> GenerateRequest:
    settings = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True, **params}
    sampling = SamplingParams(**settings)  # type: ignore[arg-type]
    return request([*PREFIX, *tail], sampling, id=name, scope="s")


def test_bits_that_differ_by_head_are_refused(start: Start) -> None:
    chosen = Parts(
        techniques=Techniques(ByHead(LAYOUTS), NoShield(), KeepAll()),
        planner=FlatPlanner(),
        policy=ShareNothing(),
    )
    with pytest.raises(ConfigError, match="kv: bits that differ by head"):
        start(64, chosen, **DEVICE_OPTIONS)


def said(chunks: dict[str, list[Chunk]]) -> dict[str, list[int]]:
    assert all(chunk.error is None for found in chunks.values() for chunk in found)
    return {name: tokens(found) for name, found in sorted(chunks.items())}


def conversation(core: EngineCore) -> dict[str, list[int]]:
    """Return what one request says, then what four that hit its prefix say together."""
    first = drive(core, [ask("first", [7])])
    several = [
        ask("greedy", [1, 2, 3]),
        ask("drawn", [4], temperature=0.8, seed=3),
        ask("narrow", [5, 6], temperature=1.2, seed=4, top_p=0.7, logprobs=2),
        ask("edited", [8], logit_bias=((11, 4.0),), repetition_penalty=1.3),
    ]
    return said({**first, **drive(core, several)})


@pytest.fixture(scope="module")
def on_a_cpu(start: Start) -> dict[str, list[int]]:
    return conversation(start(40, parts(FlatPlanner())))


@pytest.mark.parametrize("tree", [pytest.param(False, marks=pytest.mark.slow), True])
def test_greedy_and_drawn_tokens_are_a_cpus(
    start: Start, on_a_cpu: dict[str, list[int]], *, tree: bool
) -> None:
    core = start(40, parts(eager(GROUP) if tree else FlatPlanner()), **DEVICE_OPTIONS)
    assert core.info.kernel == "triton"
    assert conversation(core) == on_a_cpu
    stats = core.stats()
    assert stats.prefix_cache_hits_total >= 3 * 256
    assert (stats.attention_tree_steps_total > 0) == tree
    assert stats.attention_read_bytes_total > 0


def test_preempted_requests_say_the_same(start: Start) -> None:
    def crowd(core: EngineCore) -> dict[str, list[int]]:
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        asked = [request(PREFIX[i : i + 62], params, id=f"r{i}", scope="s") for i in range(3)]
        return said(drive(core, asked))

    want = crowd(start(40, parts(FlatPlanner())))
    core = start(4, parts(eager(GROUP)), **DEVICE_OPTIONS)
    assert crowd(core) == want
    assert core.stats().preemptions_total > 0


def test_evicted_tokens_are_masked_as_on_a_cpu(start: Start) -> None:
    def alone(**options: object) -> tuple[dict[str, list[int]], int]:
        evictor = WindowEvictor(50)
        techniques = Techniques(Float(), NoShield(), evictor)
        chosen = Parts(techniques=techniques, policy=ShareNothing(), planner=FlatPlanner())
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        core = start(8, chosen, **options)
        return said(drive(core, [request(PREFIX[:130], params, scope="s")])), evictor.observed

    found, observed = alone(**DEVICE_OPTIONS)
    assert (found, observed) == alone()
    assert observed > 0


@pytest.mark.parametrize(
    ("kv", "asked"),
    [
        ("k2v2", [(131, 2)]),
        *(
            pytest.param(kv, [(127, 3), (131, 1), (9, 2)], marks=pytest.mark.slow, id=kv)
            for kv in ("k2v2", "k8v8", "auto")
        ),
    ],
)
def test_coded_pages_on_a_device_say_what_a_cpus_say(
    tiny: dict[str, Path], kv: str, asked: list[tuple[int, int]]
) -> None:
    """A prompt's last rows read codes, and so does an answer that goes on beyond a block."""

    def talk(**options: object) -> tuple[dict[str, list[int]], int, int]:
        chosen = {"kv": kv, "kv_auto_tokens": 20, "dtype": "float32", "chunk_tokens": 160}
        settings = {"max_num_seqs": 2, **chosen, **options}
        core = core_for(tiny["qwen3"], tenants=TENANTS, **settings)  # type: ignore[arg-type]
        chunks: dict[str, list[Chunk]] = {}
        for length, answer in asked:
            params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
            chunks |= drive(core, [request(PREFIX[:length], params, id=f"{length}", scope="s")])
        stats = core.stats()
        return said(chunks), stats.encoded_pages_total, stats.prefix_cache_hits_total

    found = talk(**DEVICE_OPTIONS)
    assert found == talk()
    assert found[1] >= 2


def test_int8_weights_are_refused_on_a_device(tiny: dict[str, Path]) -> None:
    options = EngineOptions(
        model=str(tiny["qwen3"]), weights="int8", kernel="triton", device=DEVICE
    )
    with pytest.raises(ConfigError, match="weights: 'int8' runs on a CPU alone"):
        build_core(options)


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_an_engine_for_a_device_that_is_not_there_is_refused(tiny: dict[str, Path]) -> None:
    settings: Settings = load({"device": "cuda", "model": str(tiny["qwen3"])})
    with pytest.raises(ConfigError, match="device: 'cuda' needs a CUDA device"):
        build_core(engine_options(settings))
