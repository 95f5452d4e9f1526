"""What a front end says to an engine and hears back: frozen records that cross as bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Literal, Protocol

import msgspec

from kvkeep.cache.tiers import TierUse
from kvkeep.engine.guarded import Guarded, GuardUse
from kvkeep.engine.moments import Moments


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when a sequence ends; the front end checks the ranges."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    seed: int | None = None
    """None draws a random one; the generator is counter-based per (seed, sample index, position).
    """
    n: int = 1
    best_of: int | None = None
    """Sequences generated, of which the `n` best are told; None: `n`."""
    use_beam_search: bool = False
    """Search with `width` beams instead of sampling."""
    length_penalty: float = 1.0
    """A text's log-probability is divided by its length to this power."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """Top log-probabilities per generated token (0: only the chosen one); None for none."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens (`echo` with logprobs)."""
    skip_special_tokens: bool = True

    @property
    def width(self) -> int:
        """Return the number of sequences generated at a time."""
        return self.best_of or self.n

    @property
    def ranks(self) -> bool:
        """Tell whether sequences are told only at the end, the best first."""
        return self.use_beam_search or self.width > self.n


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's part in a request whose prompt another computes than its answer."""

    role: Literal["prefill", "decode"]
    """`prefill`: it ends with its first token, and its pages go to whoever asks for them.
    `decode`: its pages come from `link`, and its first token by `Begin`.
    """
    link: str = ""
    """Where the prompt's pages are handed over; none: it stands by until `Begin`."""
    key: bytes = b""
    """What its pages are sealed under on their way, where pages are sealed: random, the same for
    both engines and of no other request.
    """
    whole: bool = False
    """Hand nothing over before the whole prompt is computed: a baseline to measure against."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, tokenised, with the identity its cache use is bound to."""

    id: str
    tenant: str
    """Account: whose quota pays and whose queue it waits in."""
    scope: str
    """Namespace of cached pages: tenant, subject and salt, already derived; never 'public'."""
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    deadline_s: float | None = None
    """Seconds from submission after which it ends with `deadline`."""
    store: bool = True
    """Whether anything of it may stay cached once it has ended."""
    evict: bool = True
    """Whether tokens of it may be evicted, where an engine does so."""
    protected: tuple[tuple[int, int], ...] = ()
    """Ranges of its prompt that are never evicted."""
    handover: Handover | None = None
    guarded: Guarded | None = None
    """Of its tenant's guard, where that is kept by whoever leads a cluster's workers."""
    timed: bool = False
    """Whether its last chunk says when what happened."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token's log-probability (natural log) and the best alternatives, best first."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Something new of one sequence of a request; the last chunk of a sequence has `finish`."""

    index: int = 0
    """Which of the `n` sequences."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    stop_match: str | int | None = None
    cached_tokens: int = 0
    """Prompt tokens taken from the cache; the same in every chunk of a request."""
    score: float | None = None
    """What ranked it: a beam's score, or the mean log-probability of one of `best_of`."""
    unsent_tokens: int = 0
    """Tokens generated for sequences that are not told; in one chunk of a request."""
    error: str | None = None
    """A clear sentence without content, where `finish` is `error`."""
    again: bool = False
    """Whether it could go on if other workers took it up."""
    kv: str | None = None
    """How its request's pages are stored, where `finish` is told; for the server's log."""
    moments: tuple[Moments, ...] = ()
    """Of each engine that worked on the request, in the last chunk of one that is timed."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a front end may tell about the model being served."""

    name: str
    path: str
    digest: str
    """Of the model's weights, config and dtype, in hexadecimal."""
    max_model_len: int
    vocab_size: int
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    bytes_per_token: int
    """Of a stored page."""
    uncoded_bytes_per_token: float = 0.0
    """Of a page in the model's dtype."""
    kernel: str
    kv: str = "bf16"
    """How pages are stored; `bf16` stands for the model's dtype."""
    evict: str = "off"
    """Which tokens are forgotten: the preset's name."""
    evict_rule: str = ""
    """And its values, as settings and what was measured have changed them."""
    shield: str = "off"
    """The mode, what it guarantees and what it does not cover, in a line."""
    window_tokens: int | None = None
    """Up to so many recent tokens are seen as they were computed; None: all."""
    kv_bytes: int = 0
    """Memory of all pages, staged ones among them."""
    kept_bytes: int = 0
    """Memory of the pages of requests that are not coded, where only some are."""
    staged_bytes: int = 0
    """Memory of pages in the model's dtype beside the coded ones."""
    eos_token_ids: tuple[int, ...]
    link: str = ""
    """Where it hands pages over to other engines; '': nowhere."""
    hands_rows: bool = False
    """Whether what lies behind a prompt's last whole pages can be handed over too."""
    version: str = ""
    """Of the program and of what it says to other engines; '': it speaks with none."""
    pid: int = 0
    """Of a cluster's worker, on its own machine."""
    sealer: str = ""
    """What seals the pages that it hands over, and by which store's keys; '': it hands none over.
    """


class WorkerUse(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of a cluster, for the admin port only."""

    name: str
    role: Literal["prefill", "decode"]
    state: Literal["starting", "serving", "draining", "lost"]
    epoch: int
    """The configuration's, at whose ends workers join and leave."""
    streams: int
    """Requests under way on it."""
    starts: int = 1
    """Times it was started."""
    pid: int = 0
    """Of its process, on its own machine."""
    held_pages: int = 0
    """That requests and transfers held when it was last heard of; public ones are not counted."""


class TenantUse(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's share, for the admin port only."""

    tenant: str
    quota_pages: int
    used_pages: int
    unused_pages: int = 0
    """Of these, cached ones that no sequence holds: they make way at once."""
    running: int
    waiting: int


class TenantTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator has settled for one account, beside its share."""

    voter: str
    """The authenticated tenant that answers for the account."""
    group: str | None = None
    """Whom it shares with; None: nobody."""
    contribute: bool = True
    consume: bool = True
    coded: bool = True
    """Whether its long requests are coded, where an engine can choose."""
    evict: bool = True
    """Whether tokens of its requests may be evicted, where an engine does so."""
    store: Literal["never", "memory", "disk"] = "disk"
    """How far down its cached pages may go."""
    ttl_s: float | None = None
    """Seconds without use after which its pages go."""


class Purged(msgspec.Struct, frozen=True, kw_only=True):
    """What was dropped of an account."""

    pages: int
    votes: int


class SharingStats(msgspec.Struct, frozen=True, kw_only=True):
    """The sharing policy at one moment, for the admin port only."""

    policy: str
    epoch: int = 0
    public_units: int = 0
    public_pages: int = 0
    eps_per_day: float | None = None
    """What `dp` may cost one tenant in a day."""
    scanned_bytes: tuple[tuple[str, int], ...] = ()
    """(tenant, bytes of token ids), as are the next two in prompts."""
    scans_dropped: tuple[tuple[str, int], ...] = ()
    scans_doubtful: tuple[tuple[str, int], ...] = ()
    scan_restarts: int = 0
    scan_s: float = 0.0
    """Processor time of the detector."""
    saved_tokens: int = 0
    """Prompt tokens that a snapshot's pages have saved computing."""
    gate_bits: float = 0.0
    """What one first token's time can tell at most where first tokens are held back; else 0."""
    alerts: tuple[tuple[str, str, int], ...] = ()
    """(rule, action, count)."""
    alerts_failed: int = 0


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """A cumulative histogram: counts per upper bound, +inf last."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class EvictStats(msgspec.Struct, frozen=True, kw_only=True):
    """What eviction does; tokens are means over layers and KV heads."""

    seen_tokens_total: float = 0.0
    """Over all rows of requests that may lose tokens: tokens up to the row."""
    live_tokens_total: float = 0.0
    """Of these, those attended to."""
    prompt_tokens_total: int = 0
    prompt_kept_tokens_total: float = 0.0
    """Tokens of prompts that were kept at their ends."""
    packed_views_total: int = 0
    """Times a request's live tokens were moved together."""
    freed_bytes_total: int = 0
    """By how much requests became smaller thereby."""
    masked_only_total: int = 0
    """Times evicted tokens stayed where they were: no room to move the others."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for the admin port; names follow the metrics they feed."""

    requests_running: int
    requests_waiting: int
    pages_total: int
    pages_used: int
    pages_free: int
    prompt_tokens_total: int
    generation_tokens_total: int
    prefix_cache_queries_total: int
    prefix_cache_hits_total: int
    preemptions_total: int
    steps_total: int
    attention_tree_steps_total: int
    """Steps in which requests read pages together."""
    attention_planned_bytes_total: int
    """Bytes of K and V that the steps' plans read."""
    attention_flat_bytes_total: int
    """Bytes that would have been read if every request read its own."""
    attention_read_bytes_total: int
    """Bytes that the kernels read; 0 where the backend does not count."""
    kv_chosen: tuple[tuple[str, int], ...] = ()
    """(form of pages, requests)."""
    encoded_pages_total: int = 0
    """Pages that a codec has stored."""
    evict: EvictStats = EvictStats()
    finished: tuple[tuple[str, int], ...]
    """(finish reason, count)."""
    ttft_s: Histogram
    tpot_s: Histogram
    e2e_s: Histogram
    step_s: Histogram
    tenants: tuple[TenantUse, ...]
    sharing: SharingStats
    guard: tuple[GuardUse, ...] = ()
    tiers: tuple[TierUse, ...] = ()
    workers: tuple[WorkerUse, ...] = ()
    """Of a cluster."""


class ChunkStream(Protocol):
    """One request's chunks as they come."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Return the stream itself."""

    async def __anext__(self) -> Chunk:
        """Return the next chunk; raises `EngineError` where the engine has ended."""

    async def aclose(self) -> None:
        """Stop reading; a request that is not finished is cancelled within a step."""


class TenantControl(Protocol):
    """What an operator decides about tenants while the engine runs."""

    async def set_tenants(
        self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
    ) -> None:
        """Set each tenant's reserved share (sum <= 1) and what else is settled for it.

        Tenants left out lose their requests.
        """

    async def purge(self, tenant: str) -> Purged:
        """Drop a tenant's cached pages and votes; its requests go on and leave nothing behind."""


class EngineClient(TenantControl, Protocol):
    """The whole engine, as a front end sees it: in a thread, a process or a cluster."""

    def submit(self, request: GenerateRequest) -> ChunkStream:
        """Start a request; closing the stream early cancels it."""

    async def info(self) -> ModelInfo:
        """Return the model's description, once loaded and warm."""

    async def stats(self) -> EngineStats:
        """Return counters and gauges; raises `EngineStopped` where the engine has died."""

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop taking requests, wait up to `drain_s` for those running, and end."""
