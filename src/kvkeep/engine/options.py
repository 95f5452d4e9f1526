"""What an engine is started with; light to import, so that a server need not load torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvkeep.types import Kernel

CodedName = Literal["k8v8", "k4v4", "k4v2", "k2v2", "calibrated"]
KvName = CodedName | Literal["bf16", "auto"]
"""How pages are stored; `bf16` stands for the model's dtype, `auto` for a choice by request,
`calibrated` for bits per layer and KV head from a file beside the checkpoint.
"""

EvictName = Literal["off", "corm", "corm-paper"]
"""Which tokens are forgotten: none, by the preset tuned here, or as published."""

ShieldName = Literal["off", "seal", "tile", "perm", "orth", "mask", "tee"]
"""How pages are kept from who reads them where they lie."""

PolicyName = Literal["isolate", "selective", "dp", "pinned", "salt", "safekv", "share_all"]


class SharingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which pages tenants share, and how; lengths of time in epochs of `epoch_s` seconds."""

    policy: PolicyName = "isolate"
    k: int = 4
    eps: float = 1.0
    delta: float = 1e-6
    epoch_s: float = 60.0
    life_epochs: int = 60
    units_per_day: int = 1024
    state: str | None = None
    """File that carries votes over restarts."""
    led: bool = False
    """Whether epochs end, and votes are counted, where a cluster's workers are led."""
    pinned: str | None = None
    """TOML file of prefixes that are public from the start."""
    rules: str | None = None
    """TOML file of the organisation's own rules, looked at again at every epoch's end."""
    classifier: str | None = None
    """Folder of a token classifier or a GLiNER model that reads prompts beside the detector."""
    gate: bool = False
    """Hold first tokens back until computing what young shared pages saved would be over."""
    audit_log: str | None = None
    webhook: str | None = None


class GivenKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster's worker is told in place of a provider."""

    pages: bytes = b""
    """What wraps the roots in its own key store; empty: it seals nothing below memory."""
    model: bytes = b""
    """The key of a sealed checkpoint."""

    def __repr__(self) -> str:
        """Return which there are, and none of them."""
        return f"GivenKeys(pages={bool(self.pages)}, model={bool(self.model)})"


class KeyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Whose keys seal pages below memory."""

    provider: str | None = None
    """Such as `file:PATH`; None: a key file beside the store, made where there is none."""
    store: str | None = None
    """File of wrapped keys; None: `kvkeep-sealing.json`."""
    epoch_s: float = 86_400.0
    """Seconds after which a tenant's pages are sealed under a new key."""
    dumps: bool = False
    """Whether an engine process that seals may write cores and be attached to by its user."""
    model_provider: str | None = None
    """Whose key a sealed checkpoint's is wrapped by; None: `provider`'s."""
    given: GivenKeys | None = None
    """Of a cluster's worker: no provider is asked."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is started with; crosses the process boundary."""

    model: str
    served_name: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["float", "int8"] = "float"
    kernel: Kernel = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    chunk_tokens: int = 256
    kv: KvName = "bf16"
    kv_auto_tokens: int = 2048
    """The longest request, prompt and answer, that `auto` does not code."""
    kv_auto_codec: CodedName = "k4v2"
    """The form of longer ones."""
    kv_auto_memory: float = 0.5
    """Part of the memory for pages that `auto` does not code."""
    kv_auto_link_bytes_per_s: float | None = None
    """Of the link that prompts' pages are handed over by; None: it does not enter the choice."""
    kv_auto_link_wait_s: float = 0.1
    """Prompts whose pages would take longer on it, if nothing else did, are coded by `auto`."""
    kv_window_tokens: int = 128
    """Of a sequence, up to so many recent tokens stay as computed where pages are coded."""
    guard_share: float = 0.0
    """Part of the coded or evicting requests that carry a whole shadow in the model's dtype."""
    guard_samples: int = 8
    """Of a tenant, that end its epoch."""
    guard_kl: float = 0.05
    """Nats per token, as the mean of an epoch, above which its tenant steps back."""
    guard_memory: float = 0.25
    """Part of the memory for shadows and tenants that stepped back; `auto` has its own."""
    guard_state: str | None = None
    """File that carries steps back over restarts."""
    guard_led: bool = False
    """Whether requests are sampled, and steps back decided, where a cluster's workers are led."""
    kv_cache_bytes: int | None = None
    evict: EvictName = "off"
    evict_window: int | None = None
    """Of these, None keeps the preset's."""
    evict_prompt_rows: int | None = None
    evict_recent: int | None = None
    evict_weight: float | None = None
    evict_most: float | None = None
    evict_spread: int | None = None
    evict_cap: int | None = None
    evict_observe_every: int | None = None
    shield: ShieldName | None = None
    """None: `seal` where there is a tier below memory, else `off`."""
    keys: KeyOptions = KeyOptions()
    transform_key: str | None = None
    """File of 32 bytes from which perm, orth and mask derive theirs; None: random at each start."""
    transform_epoch: int = 0
    """A new one is a new key: pages of another are not found."""
    prefix_caching: bool = True
    attention_planner: Literal["tree", "flat"] = "tree"
    attention_share_across_tenants: Literal["public", "never"] = "public"
    attention_cost_model: str | None = None
    share: SharingOptions = SharingOptions()
    tiers: tuple[str, ...] = ()
    """Places below memory, such as `memory:4GiB` or `disk:DIR,64GiB`."""
    allow_download: bool = False
