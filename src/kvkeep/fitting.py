"""Which settings go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvkeep.addresses import is_loopback
from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from kvkeep.config import Settings

UNSAFE_POLICIES: Final = ("safekv", "share_all")
"""Policies that need a word of confirmation."""


def check_together(settings: Settings) -> None:
    """Refuse settings that do not go together; raises `ConfigError`."""
    if settings.share in UNSAFE_POLICIES and not settings.unsafe_share_all:
        raise ConfigError(
            f"share: {settings.share!r} lets tenants time each other's prompts; "
            "add --unsafe-share-all, or leave it at 'selective'"
        )
    if settings.share_gate and settings.share not in {"selective", "dp"}:
        raise ConfigError(
            f"share_gate: {settings.share!r} has no young shared pages to hide; "
            "leave it out, or share 'selective' or 'dp'"
        )
    _check_cluster(settings)
    if settings.share == "pinned" and settings.share_pinned is None:
        raise ConfigError("share: 'pinned' shares what --share-pinned FILE declares; add it")
    if settings.share_webhook is not None and not settings.share_webhook.startswith(
        ("http://", "https://")
    ):
        raise ConfigError("share_webhook: must be an http or https URL")
    if settings.no_auth and not is_loopback(settings.host):
        raise ConfigError(
            "no_auth: serves without keys, so host must be a loopback address; "
            "use --keys FILE to serve others"
        )
    if not is_loopback(settings.admin_host):
        raise ConfigError("admin_host: must be a loopback address; use --admin-socket or a tunnel")
    if settings.max_model_len is not None and settings.max_model_len < 2:
        raise ConfigError("max_model_len: needs room for a prompt and an answer, at least 2")


def _check_cluster(settings: Settings) -> None:
    """Refuse what a cluster's workers can't do, and half of their links."""
    files = (settings.cluster_certificate, settings.cluster_key, settings.cluster_authority)
    if any(files) and not all(files):
        raise ConfigError(
            "cluster_certificate: goes with cluster_key and cluster_authority; give all three"
        )
    if settings.cluster_shared_memory and (settings.cluster is None or any(files)):
        raise ConfigError(
            "cluster_shared_memory: is for a cluster on one machine, whose workers need no"
            " certificates; leave it out, or cluster_certificate"
        )
    link, token_ms = settings.cluster_link_gbit, settings.cluster_token_ms
    if (link or token_ms) and not (
        settings.cluster and link and (token_ms or settings.kv == "auto")
    ):
        raise ConfigError(
            "cluster_link_gbit: in a cluster, kv = auto or cluster_token_ms goes with it; set"
            " both, or neither"
        )
    if settings.cluster_attend_apart and (settings.cluster is None or settings.kv == "auto"):
        raise ConfigError("cluster_attend_apart: is for a cluster, and another kv than auto")
    _check_scaling(settings)
    if settings.cluster is None:
        return
    if any(one.startswith("redis") for one in settings.tier):
        raise ConfigError("tier: a cluster's workers share no server; give memory: and disk:")
    if settings.guard_share and settings.kv == "bf16" and settings.evict == "off":
        raise ConfigError(
            "guard_share: pages of kv = bf16 are stored as they were computed, and nothing can"
            " drift; choose another kv, let tokens be evicted, or leave it at 0"
        )
    if not settings.prefix_caching:
        raise ConfigError("prefix_caching: a cluster hands cached pages over; leave it on")


def _check_scaling(settings: Settings) -> None:
    """Refuse bounds that nothing can lie between."""
    bounds = {
        "prefill": (settings.cluster_prefill, settings.cluster_prefill_most),
        "decode": (settings.cluster_decode, settings.cluster_decode_most),
    }
    for role, (least, most) in bounds.items():
        if most is not None and (settings.cluster is None or not 0 < least < most):
            raise ConfigError(
                f"cluster_{role}_most: {most} with cluster_{role} = {least}; in a cluster, the"
                " second must be 1 or more and the first above it, or leave the first out to have a"
                " fixed number"
            )
