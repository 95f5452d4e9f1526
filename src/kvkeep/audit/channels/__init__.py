"""The channels by name, and the control of each thing that they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from kvkeep.audit.channel import Channel, Observable
from kvkeep.audit.channels.cached_tokens import cached_tokens, own_cached_tokens
from kvkeep.audit.channels.crafted import boundary, collision, empty, sentinel
from kvkeep.audit.channels.early_bird import EarlyBird
from kvkeep.audit.channels.eviction import Eviction
from kvkeep.audit.channels.reply_order import ReplyOrder
from kvkeep.audit.channels.spoofed import no_key, spoofed_fields, spoofed_headers, spoofed_salt
from kvkeep.audit.channels.sybils import sybils
from kvkeep.audit.channels.ttft import own_ttft, ttft

CHANNELS: Final[Mapping[str, Callable[[], Channel]]] = {
    "ttft": ttft,
    "early_bird": EarlyBird,
    "cached_tokens": cached_tokens,
    "reply_order": ReplyOrder,
    "eviction": Eviction,
    "sybils": sybils,
    "spoofed_headers": spoofed_headers,
    "spoofed_fields": spoofed_fields,
    "spoofed_salt": spoofed_salt,
    "no_key": no_key,
    "boundary": boundary,
    "empty": empty,
    "sentinel": sentinel,
    "collision": collision,
}

CONTROLS: Final[Mapping[Observable, Callable[[], Channel]]] = {
    Observable.TTFT: own_ttft,
    Observable.CACHED_TOKENS: own_cached_tokens,
    Observable.ORDER: lambda: ReplyOrder(own=True),
}
"""`Eviction` has its control in `prepare`."""
