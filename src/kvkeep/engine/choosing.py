"""What chooses the form of a request's pages, as the options ask for it; loads no torch."""

from __future__ import annotations

import logging
from typing import Final

from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.quant.controller import ByLength, ByLink, Controller, Fixed

KEPT: Final = "kept"
"""Codec in the tag of pages in the model's dtype beside coded ones; keys are turned as theirs."""

log = logging.getLogger(__name__)


def controller_of(
    options: EngineOptions, names: tuple[str, ...], bytes_per_token: float
) -> Controller:
    """Return what chooses among forms; `bytes_per_token`: of those that are not coded."""
    link = options.kv_auto_link_bytes_per_s
    if options.kv != "auto":
        if link is not None:
            raise ConfigError("kv_auto_link_bytes_per_s: only kv = auto chooses by it; set that")
        return Fixed(names)
    by_length = ByLength(names, options.kv_auto_tokens)
    if link is None:
        return by_length
    if link <= 0 or options.kv_auto_link_wait_s < 0:
        raise ConfigError(
            f"kv_auto_link_bytes_per_s: {link:g} with kv_auto_link_wait_s ="
            f" {options.kv_auto_link_wait_s:g}; the first must be above 0, the other not below"
        )
    by_link = ByLink(by_length, bytes_per_token, link, options.kv_auto_link_wait_s)
    log.info(
        "kv auto: prompts of more than %d tokens are coded: in 16 bits they would take longer than"
        " %g s on the link",
        by_link.bound_tokens,
        by_link.wait_s,
    )
    return by_link
