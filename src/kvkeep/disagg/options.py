"""How workers are linked; light to import, crosses process boundaries."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvkeep.engine.options import EngineOptions
from kvkeep.engine.speeds import Speeds
from kvkeep.errors import ConfigError

Role = Literal["prefill", "decode"]
"""Of a worker."""


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of one worker: its own certificate and key, and who signs the cluster's."""

    certificate: str
    key: str
    authority: str


class PaceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A slower link than there is, emulated where it is sent from."""

    bytes_per_s: float
    latency_s: float = 0.0


def check_engine(engine: EngineOptions) -> None:
    """Refuse what can't be handed over; raises `ConfigError`."""
    if not engine.prefix_caching:
        raise ConfigError("link: pages are handed over from cache to cache; keep prefix_caching")
    if engine.guard_share and not engine.guard_led:
        raise ConfigError(
            "guard_share: two engines of a request have no guard of their own; leave it at 0"
        )


class LinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about links of one worker."""

    listen: str = "tcp://127.0.0.1:0"
    """`tcp://HOST:PORT`, port 0: any free one; or on this host `shm://PATH` of a socket, or of a
    folder for one: `shm://PATH/`."""
    advertise: str | None = None
    """What others dial, where that is not what is listened at."""
    tls: TlsFiles | None = None
    """Needed wherever another host could connect."""
    pace: PaceOptions | None = None
    speeds: Speeds | None = None
    """What rows behind a prompt's last whole pages are sent or computed by; None: they are sent."""
    attend_apart: int | None = None
    """Of prompts of so many tokens or more, a prefill worker holds the pages while they are
    answered, and a decode worker attends to them there; None: of none.
    """
    answer_s: float = 5.0
    """A worker that attends for another and takes longer over a layer is given up."""
    queue_bytes: int = 64 << 20
    """Copied by a prefill worker and not yet sent, per link; what exceeds it is sent later."""
    window_bytes: int = 64 << 20
    """Sent to a decode worker and not yet installed, per link."""
    beat_s: float = 0.25
    silence_s: float = 3.0
    """A link over which nothing came for so long is given up."""
    dial_s: float = 5.0
    unasked_s: float = 120.0
    """A prompt that nobody has asked for since it was computed is forgotten: over a slow link those
    before it may take long.
    """
    expires_s: float = 600.0
    """A transfer that lasts longer is given up."""


def check_apart(engine: EngineOptions, link: LinkOptions) -> None:
    """Refuse pages attended to where another worker holds them, where that can't be done.

    Raises `ConfigError`.
    """
    if link.attend_apart is None:
        return
    if link.attend_apart < 1:
        raise ConfigError("cluster_attend_apart: must be a number of prompt tokens of at least 1")
    if engine.device != "cpu" or engine.kernel == "triton":
        raise ConfigError(
            "cluster_attend_apart: parts of a prompt are attended on a CPU only; leave it out"
        )
    if engine.kv == "auto" or engine.guard_share:
        raise ConfigError(
            "cluster_attend_apart: pages of one form only; choose another kv than auto, and no"
            " guard_share"
        )
    if engine.shield == "tile":
        raise ConfigError(
            "cluster_attend_apart: pages held for others lie open in memory; choose another shield"
            " than tile"
        )
