"""Assemble an engine core from options: the one place where parts meet."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec
import torch

from kvkeep.attention import cost
from kvkeep.attention.planner import CACHED_BYTES, AttentionPlanner, FlatPlanner, TreePlanner
from kvkeep.attention.profile import Bench, profile_all
from kvkeep.cache.caches import Caches
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.parts import PoolPart
from kvkeep.cache.pool import TilePool
from kvkeep.cache.radix import RadixIndex
from kvkeep.cache.tier.files import Directory, Files
from kvkeep.cache.tiers import FirstOf, PageListener, Tier
from kvkeep.engine import messages as m
from kvkeep.engine.apart import Elsewhere
from kvkeep.engine.api import GenerateRequest, ModelInfo, SamplingParams
from kvkeep.engine.backend import Backend, choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.evictors import evictor_of, measured_heads
from kvkeep.engine.forms import forms_of
from kvkeep.engine.gate import PrefillCost
from kvkeep.engine.limits import SchedulerLimits
from kvkeep.engine.lower import order_of, sizes_of, tier_of
from kvkeep.engine.options import CodedName, EngineOptions
from kvkeep.engine.output import OutputFactory
from kvkeep.engine.pinning import pin, pinned_prompts
from kvkeep.engine.pools import Secrecy, pool_of
from kvkeep.engine.runner import ModelRunner, RunnerParts
from kvkeep.engine.sealers import mode_of, unwrap_of
from kvkeep.engine.sharing import Sharing, inspector_of, rules_of
from kvkeep.engine.shields import shield_of
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import Corm
from kvkeep.eviction.policy import Evictor
from kvkeep.models import hub, loader
from kvkeep.models.host import HostedModel
from kvkeep.models.spec import ModelSpec
from kvkeep.models.text import TextModel
from kvkeep.ops.layout import Ops
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.calibration import Calibration
from kvkeep.quant.codec import Codec, Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.sharing.detector.organisation import OrganisationFile
from kvkeep.sharing.inspection import DecodeText, Inspector
from kvkeep.sharing.policy import SharingPolicy
from kvkeep.shield.guarantees import describe
from kvkeep.types import PAGE_TOKENS, Layout, PageKind, PageTag

_KEPT_VIEWS = 1 << 48
"""Numbers of views over kept pages begin here."""

WARM_UP = "warm-up"
"""Tenant of the request that runs before the engine reports ready."""
FIT_TOKENS = 513
"""Of the prompt that prefill's cost is fitted to."""
FIT_TURNS = 3


class Parts(msgspec.Struct, kw_only=True):
    """The techniques an engine runs with; the defaults are the null objects."""

    techniques: Techniques
    planner: AttentionPlanner | None = None
    """None: the one the options ask for, fitted to this machine."""
    policy: SharingPolicy | None = None
    """None: the one the options ask for."""
    inspector: Inspector | None = None
    """What reads prompts before they are shared; None clears nothing."""
    rules: OrganisationFile | None = None
    """The inspector's rules that may change while the engine runs."""
    listeners: tuple[PageListener, ...] = ()
    tier: Tier | None = None
    """Asked for pages that the tiers of the options lack, if there are any."""
    elsewhere: Elsewhere | None = None
    """Where prompts' first pages may be held; None: nowhere but here."""
    files: Callable[[Path], Files] = Directory
    """How the directory of a disk tier is opened."""
    backend: Backend | None = None
    model: HostedModel | None = None
    """None, of both: as the options ask; another engine's, where two run on one backend."""


def default_parts(options: EngineOptions) -> Parts:
    """Return the techniques `options` ask for."""
    rules = rules_of(options.share)
    return Parts(
        techniques=Techniques(codec_of(options), shield_of(options), evictor_of(options)),
        inspector=inspector_of(options.share, rules),
        rules=rules,
    )


def codec_of(options: EngineOptions) -> Codec:
    """Return the codec the options ask for; where requests differ, that of the long ones."""
    name = _coded_name(options)
    if name == "bf16":
        return Float()
    if name not in get_args(CodedName):
        raise ConfigError(f"kv: {name!r} is no form of pages; use bf16, auto or a codec's name")
    if name == "calibrated":
        path = hub.resolve(options.model, allow_download=options.allow_download)
        return ByHead(Calibration.read(path).layouts(), options.kv_window_tokens)
    return Hack(Layout[name.upper()], options.kv_window_tokens)


def _coded_name(options: EngineOptions) -> str:
    return options.kv_auto_codec if options.kv == "auto" else options.kv


def _require_measured(options: EngineOptions, path: Path, spec: ModelSpec) -> None:
    """Refuse what `calibrate` wrote of another model; raises `ConfigError`."""
    model = (spec.digest, spec.num_layers, spec.num_kv_heads)
    if _coded_name(options) == "calibrated":
        Calibration.read(path).require(*model)
    if measured := measured_heads(options):
        measured.require(*model)


def build_core(
    options: EngineOptions,
    reply: Callable[[m.Reply], None] = lambda _: None,
    parts: Parts | None = None,
) -> EngineCore:
    """Load the model, reserve the pool and warm up; raises `ModelError` or `ConfigError`."""
    sizes_of(options.tiers)  # refused before anything slow
    parts = parts or default_parts(options)
    backend = parts.backend or choose(options, options.threads or len(os.sched_getaffinity(0)))
    kernels = backend.ops
    torch.set_num_threads(backend.torch_threads)
    path = hub.resolve(options.model, allow_download=options.allow_download)
    text = TextModel.load(path)
    model = parts.model or loader.load(
        path,
        dtype=options.dtype,
        ops=kernels,
        weights=options.weights,
        folds=parts.techniques.shield.folds,
        progress=lambda done, total: reply(m.Loading(done, total)),
        unwrap=unwrap_of(options.keys),
    )
    _require_measured(options, path, model.spec)
    shape, techniques = _shape_of(model, kernels), parts.techniques
    max_model_len, spec = _max_model_len(options, model), techniques.codec.page_spec(shape)
    secrecy = Secrecy(options, backend, alone=parts.tier is None and not parts.listeners)
    pool = pool_of(options, backend, spec, shape, max_model_len, secrecy)
    sharing = Sharing(options.share, _decode(text), parts.policy, parts.inspector, parts.rules)
    order = order_of(options, kernels.name, str(model.spec.dtype), techniques.codec.name)
    indexes = partial(RadixIndex, model.spec.digest, secrecy.keys)
    caches = _caches(options, parts, pool, shape, indexes, sharing.policy, order)
    planner = parts.planner or _planner(options, backend, pool, model)
    runner = ModelRunner(
        RunnerParts(
            model, pool, kernels, backend.upload, planner, techniques, shape, parts.listeners
        )
    )
    info = _info(options, model, pool, kernels.name, max_model_len, shape, techniques.evictor)
    evicts = techniques.evictor.watch(max_model_len) is not None
    forms = forms_of(options, caches, sharing.may_code, evicts=evicts)
    outputs = OutputFactory(text, info.vocab_size, info.eos_token_ids)
    core = EngineCore(
        info,
        caches,
        runner,
        outputs,
        _limits(options, coded=spec.window_tokens is not None),
        sharing,
        forms,
        prefix_caching=options.prefix_caching,
        elsewhere=parts.elsewhere,
    )
    _begin(core, options, text, caches.of(techniques.codec.name))
    forms.wake()
    caches.tiers.asleep = False
    return core


def _begin(core: EngineCore, options: EngineOptions, text: TextModel, cache: CacheManager) -> None:
    """Run what comes before the first client's request."""
    _warm_up(core, tokens=8, answer=4)
    if core.sharing.gate is not None:
        core.sharing.gate.set_cost(_prefill_cost(core))
    if options.share.pinned is not None:
        pin(core, cache, pinned_prompts(Path(options.share.pinned), text))
        core.reset_counters()


def _caches(
    options: EngineOptions,
    parts: Parts,
    pool: TilePool,
    shape: KVShape,
    index: Callable[[], RadixIndex],
    policy: SharingPolicy,
    order: bytes,
) -> Caches:
    """Return the cache of the codec's pages and, where requests differ, that of kept ones."""
    techniques = parts.techniques
    lower = tier_of(options, pool.spec.first_page_bytes, parts.files)
    tier: Tier | None = parts.tier or lower
    if parts.tier is not None and lower is not None:
        tier = FirstOf(lower, parts.tier)

    def tag_of(codec: str) -> Callable[[str], PageTag]:
        return lambda scope: PageTag(scope, codec, techniques.shield.name)

    name = techniques.codec.name
    managers = {name: CacheManager(pool, index(), policy, tag_of(name), tier, order=order)}
    if pool.bytes_of(PageKind.KEPT):
        if options.share.pinned is not None:
            raise ConfigError(
                "share_pinned: pages of one form only; choose another kv than auto, and no guard"
            )
        kept = PoolPart(pool, Float().page_spec(shape))
        managers[KEPT] = CacheManager(
            kept,
            index(),
            policy,
            tag_of(KEPT),
            tier,
            order=order,
            first_view=_KEPT_VIEWS,
        )
    return Caches(managers, policy, lower)


def _limits(options: EngineOptions, *, coded: bool) -> SchedulerLimits:
    rows, chunk = options.max_num_batched_tokens, options.chunk_tokens
    return SchedulerLimits(options.max_num_seqs, rows, chunk, coded=coded)


def _decode(text: TextModel) -> DecodeText:
    """Return the text of tokens with nothing left out: what is invisible is read too."""
    return lambda ids: text.decode(ids, skip_special_tokens=False)


def _planner(
    options: EngineOptions, backend: Backend, pool: TilePool, model: HostedModel
) -> AttentionPlanner:
    """Return the planner asked for; a tree's costs are read or measured on the unused pool."""
    if options.attention_planner == "flat":
        return FlatPlanner()
    spec, kernels = model.spec, backend.ops
    plain = kernels.layouts[spec.dtype]
    coded = pool.spec.usual_layout
    layouts = (plain,) if coded == plain else (plain, coded)
    if options.attention_cost_model is not None:
        costs = cost.load(Path(options.attention_cost_model), layouts)
    elif backend.costs is not None:
        costs = (backend.costs,)
    else:
        attention, kv, timing = kernels.attention, pool.layer_kv(0), backend.timing
        costs = profile_all(
            [
                Bench(attention, kv, plain, stored, spec.num_heads, backend.parallel, timing)
                for stored in layouts
            ]
        )
    across = options.attention_share_across_tenants == "public"
    cached = CACHED_BYTES * spec.num_layers // pool.spec.bytes_per_token
    return TreePlanner(
        costs[0],
        spec.num_heads // spec.num_kv_heads,
        coded=costs[-1],
        across_scopes=across,
        cached_tokens=cached,
    )


def _shape_of(model: HostedModel, kernels: Ops) -> KVShape:
    spec = model.spec
    layout = kernels.layouts[spec.dtype]
    return KVShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, layout)


def _max_model_len(options: EngineOptions, model: HostedModel) -> int:
    limit = model.spec.max_model_len
    if options.max_model_len is None:
        return limit
    if not 1 <= options.max_model_len <= limit:
        raise ConfigError(f"max_model_len: must lie between 1 and the model's {limit}")
    return options.max_model_len


def _info(
    options: EngineOptions,
    model: HostedModel,
    pool: TilePool,
    kernel: str,
    max_model_len: int,
    shape: KVShape,
    evictor: Evictor,
) -> ModelInfo:
    spec = model.spec
    return ModelInfo(
        name=options.served_name or Path(options.model).name,
        path=options.model,
        digest=spec.digest.hex(),
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        dtype=str(spec.dtype).removeprefix("torch."),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_pages=pool.num_pages,
        bytes_per_token=pool.spec.bytes_per_token,
        uncoded_bytes_per_token=Float().page_spec(shape).bytes_per_token,
        kernel=kernel,
        kv=options.kv,
        evict=options.evict,
        evict_rule=evictor.rule if isinstance(evictor, Corm) else "",
        shield=describe(mode_of(options)),
        window_tokens=pool.spec.window_tokens,
        kv_bytes=sum(pool.bytes_of(kind) for kind in PageKind),
        staged_bytes=pool.bytes_of(PageKind.STAGED),
        kept_bytes=pool.bytes_of(PageKind.KEPT),
        eos_token_ids=spec.eos_token_ids,
    )


def _prefill_cost(core: EngineCore) -> PrefillCost:
    """Measure what a prompt costs on the idle engine: the best of a few turns."""
    info = core.info
    tokens = max(2, min(FIT_TOKENS, info.max_model_len - 1, info.num_pages * PAGE_TOKENS - 1))
    one, many = (
        min(_warm_up(core, tokens=count, answer=1) for _ in range(FIT_TURNS))
        for count in (1, tokens)
    )
    if math.isnan(one + many):
        raise ConfigError(
            f"share_gate: no prompt of {tokens} tokens could be timed; give the cache more memory"
        )
    return PrefillCost.of(one, many, tokens)


def _warm_up(core: EngineCore, *, tokens: int, answer: int) -> float:
    """Run one request, as before the first client's; return its seconds, NaN if it failed."""
    core.set_tenants({WARM_UP: 1.0})
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    core.submit(
        GenerateRequest(
            id=WARM_UP,
            tenant=WARM_UP,
            scope=WARM_UP,
            prompt_ids=(0,) * tokens,
            params=params,
            evict=False,
        )
    )
    begun = time.perf_counter()
    failed = False
    while not core.idle():
        failed |= any(output.chunk.error for output in core.step())
    took = time.perf_counter() - begun
    core.set_tenants({})
    core.reset_counters()
    return math.nan if failed else took
