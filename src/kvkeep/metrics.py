"""The names of all metrics, modelled on vLLM's: one place, so that dashboards and code agree."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "kvkeep:"


class Kind(StrEnum):
    """How a metric behaves over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name (a counter's without `_total`), its meaning and its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """Return the name with the prefix."""
        return PREFIX + self.name


REQUESTS_RUNNING = Metric("num_requests_running", Kind.GAUGE, "Requests in the current batch.")
REQUESTS_WAITING = Metric(
    "num_requests_waiting", Kind.GAUGE, "Requests waiting for a place in the batch."
)
CACHE_USAGE = Metric("kv_cache_usage_perc", Kind.GAUGE, "Share of the page pool in use, 0 to 1.")
PAGES_TOTAL = Metric("kv_cache_pages", Kind.GAUGE, "Pages of the pool.")
PAGES_USED = Metric("kv_cache_pages_used", Kind.GAUGE, "Pages in use.")
PAGES_FREE = Metric("kv_cache_pages_free", Kind.GAUGE, "Pages free.")
PROMPT_TOKENS = Metric("prompt_tokens", Kind.COUNTER, "Prompt tokens of all requests.")
GENERATION_TOKENS = Metric("generation_tokens", Kind.COUNTER, "Tokens generated.")
PREFIX_QUERIES = Metric(
    "prefix_cache_queries", Kind.COUNTER, "Prompt tokens looked up in the cache."
)
PREFIX_HITS = Metric("prefix_cache_hits", Kind.COUNTER, "Prompt tokens found in the cache.")
PREEMPTIONS = Metric("num_preemptions", Kind.COUNTER, "Requests preempted and computed again.")
STEPS = Metric("engine_steps", Kind.COUNTER, "Steps of the engine.")
TREE_STEPS = Metric(
    "attention_tree_steps", Kind.COUNTER, "Steps in which requests read pages together."
)
PLANNED_BYTES = Metric(
    "attention_planned_bytes", Kind.COUNTER, "Bytes of K and V that the steps' plans read."
)
FLAT_BYTES = Metric(
    "attention_flat_bytes", Kind.COUNTER, "Bytes if every request had read its own pages."
)
READ_BYTES = Metric("attention_read_bytes", Kind.COUNTER, "Bytes of K and V the kernels read.")
CACHE_INFO = Metric(
    "kv_cache_info", Kind.GAUGE, "How pages are stored; always 1.", ("kv", "window_tokens")
)
KV_CHOSEN = Metric("kv_requests", Kind.COUNTER, "Requests by the form of their pages.", ("kv",))
ENCODED_PAGES = Metric("kv_encoded_pages", Kind.COUNTER, "Pages that the codec has stored.")
EVICT_SEEN = Metric(
    "evict_seen_tokens", Kind.COUNTER, "Tokens up to each row of requests that may lose some."
)
EVICT_LIVE = Metric("evict_live_tokens", Kind.COUNTER, "Of these, those that rows attended to.")
EVICT_PROMPT = Metric("evict_prompt_tokens", Kind.COUNTER, "Tokens of these requests' prompts.")
EVICT_KEPT = Metric("evict_prompt_kept_tokens", Kind.COUNTER, "Kept of them at prompts' ends.")
EVICT_PACKED = Metric("evict_packed_views", Kind.COUNTER, "Times live tokens were moved together.")
EVICT_FREED = Metric("evict_freed_bytes", Kind.COUNTER, "Bytes that requests gave back thereby.")
EVICT_MASKED = Metric("evict_masked_only", Kind.COUNTER, "Times evicted tokens stayed in place.")
FINISHED = Metric(
    "request_success", Kind.COUNTER, "Sequences ended, by reason.", ("finished_reason",)
)
TTFT = Metric("time_to_first_token_seconds", Kind.HISTOGRAM, "Time to first token.")
TPOT = Metric(
    "time_per_output_token_seconds", Kind.HISTOGRAM, "Time per output token after the first."
)
E2E = Metric(
    "e2e_request_latency_seconds", Kind.HISTOGRAM, "Time from submission to the last token."
)
STEP_TIME = Metric("engine_step_seconds", Kind.HISTOGRAM, "Time of a step.")
TENANT_QUOTA = Metric("tenant_pages_quota", Kind.GAUGE, "Pages reserved for a tenant.", ("tenant",))
TENANT_USED = Metric("tenant_pages_used", Kind.GAUGE, "Pages in use by a tenant.", ("tenant",))
TENANT_RUNNING = Metric(
    "tenant_requests_running", Kind.GAUGE, "Requests of a tenant in the batch.", ("tenant",)
)
TENANT_WAITING = Metric(
    "tenant_requests_waiting", Kind.GAUGE, "Requests of a tenant waiting.", ("tenant",)
)
GUARD_SHADOWED = Metric(
    "guard_shadowed_requests", Kind.COUNTER, "Requests compared with their shadow.", ("tenant",)
)
GUARD_UNSHADOWED = Metric(
    "guard_unshadowed_requests",
    Kind.COUNTER,
    "Requests drawn for a shadow that was not compared.",
    ("tenant",),
)
GUARD_COMPARED = Metric(
    "guard_compared_tokens", Kind.COUNTER, "Next tokens compared with a shadow's.", ("tenant",)
)
GUARD_AGREED = Metric(
    "guard_agreed_tokens", Kind.COUNTER, "Of these, those with the same most likely.", ("tenant",)
)
GUARD_KL = Metric(
    "guard_kl_nats", Kind.COUNTER, "Their KL divergence from the shadow's, summed.", ("tenant",)
)
GUARD_RECALLED = Metric(
    "guard_recalled_tokens", Kind.COUNTER, "Planted tokens that shadows told.", ("tenant",)
)
GUARD_FORGOTTEN = Metric(
    "guard_forgotten_tokens", Kind.COUNTER, "Of these, those not told without.", ("tenant",)
)
GUARD_BACK = Metric(
    "guard_steps_back", Kind.GAUGE, "Steps to no eviction and more bits taken.", ("tenant",)
)
SHARING_EPOCH = Metric("sharing_epoch", Kind.GAUGE, "Number of the epoch that runs.", ("policy",))
PUBLIC_UNITS = Metric("sharing_public_units", Kind.GAUGE, "Units of 256 tokens shared now.")
PUBLIC_PAGES = Metric("sharing_public_pages", Kind.GAUGE, "Pages shared now.")
EPS_PER_DAY = Metric(
    "sharing_eps_per_day", Kind.GAUGE, "What the noise may cost one tenant in a day."
)
SAVED_TOKENS = Metric(
    "sharing_saved_tokens", Kind.COUNTER, "Prompt tokens not computed thanks to other tenants."
)
SCANNED_BYTES = Metric(
    "sharing_scanned_bytes", Kind.COUNTER, "Token ids read by the detector.", ("tenant",)
)
SCANS_DROPPED = Metric(
    "sharing_scans_dropped", Kind.COUNTER, "Prompts that were not read in time.", ("tenant",)
)
SCANS_DOUBTFUL = Metric(
    "sharing_scans_doubtful", Kind.COUNTER, "Prompts with something doubtful.", ("tenant",)
)
SCAN_RESTARTS = Metric("sharing_scan_restarts", Kind.COUNTER, "Times the detector was restarted.")
SCAN_SECONDS = Metric("sharing_scan_seconds", Kind.COUNTER, "Processor time of the detector.")
GATE_BITS = Metric(
    "sharing_gate_bits", Kind.GAUGE, "Bits a held first token's time can tell; 0: none is held."
)
ALERTS = Metric("sharing_alerts", Kind.COUNTER, "Alerts of the monitor.", ("rule", "action"))
ALERTS_FAILED = Metric("sharing_alerts_failed", Kind.COUNTER, "Alerts that could not be handed on.")
TIER_LIMIT = Metric("tier_limit_bytes", Kind.GAUGE, "Size of a tier below memory.", ("tier",))
TIER_BYTES = Metric("tier_bytes", Kind.GAUGE, "Bytes of the pages in a tier.", ("tier",))
TIER_PAGES = Metric("tier_pages", Kind.GAUGE, "Pages in a tier.", ("tier",))
TIER_KEYS = Metric(
    "tier_keys_answering",
    Kind.GAUGE,
    "1 while the key process runs and gave keys when it was last asked.",
    ("tier",),
)
TIER_FREE = Metric(
    "tier_disk_free_bytes", Kind.GAUGE, "What the disk of a tier has left.", ("tier",)
)
TIER_RENEWED = Metric(
    "tier_renewed",
    Kind.COUNTER,
    "Pages of former key epochs that were sealed anew when they were read.",
    ("tier",),
)
TIER_HITS = Metric("tier_hits", Kind.COUNTER, "Pages that a tier brought back.", ("tier",))
TIER_MISSES = Metric(
    "tier_misses", Kind.COUNTER, "Pages of a tier that could not be read or opened.", ("tier",)
)
TIER_DROPS = Metric("tier_drops", Kind.COUNTER, "Pages that no tier took, by reason.", ("reason",))
TIER_ERRORS = Metric("tier_errors", Kind.COUNTER, "Errors of the tiers by kind.", ("kind",))
ENGINE_UP = Metric("engine_up", Kind.GAUGE, "1 while the engine is ready.")
HTTP_REQUESTS = Metric(
    "http_requests", Kind.COUNTER, "HTTP requests by route and status.", ("route", "status")
)
HTTP_IN_FLIGHT = Metric("http_requests_in_flight", Kind.GAUGE, "Generation requests under way.")
IGNORED_FIELDS = Metric(
    "ignored_fields", Kind.COUNTER, "Fields without effect that were sent.", ("field",)
)
AUTH_FAILURES = Metric("auth_failures", Kind.COUNTER, "Requests without a valid key or right.")
DISCONNECTS = Metric("client_disconnects", Kind.COUNTER, "Requests whose client went away.")
REVOKED = Metric("requests_revoked", Kind.COUNTER, "Requests cancelled because their key ended.")
RELOADS = Metric("tenant_reloads", Kind.COUNTER, "Times the tenant file was taken.")
RELOAD_FAILURES = Metric(
    "tenant_reload_failures", Kind.COUNTER, "Times the tenant file was not valid."
)
