"""The servers of `kvkeep bench sharing`: a policy each, with a pool of a given size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.sharing_trace import PAGE
from kvkeep.config import DEMO_MODEL
from tests.servers import Server, serving


@dataclass(frozen=True, slots=True)
class Policy:
    """A value of `--share` and what it takes to measure it."""

    name: str
    flags: tuple[str, ...] = ()
    public: bool = True
    """Whether the pool beyond what every tenant needs for one request is left to public pages."""
    settles: bool = False
    """Whether what is sent becomes public at a later epoch's end."""

    pins: bool = False
    """Whether the operator declares the trace's templates public."""

    def settle_s(self, epoch_s: float) -> float:
        """Return how long after it was sent something is public, if it ever is."""
        return 2 * epoch_s if self.settles else 0.0  # offers of e decide at the end of e + 1

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the server's command line."""
        return ("--share", self.name, *self.flags)


UNSAFE: Final = ("--unsafe-share-all",)
POLICIES: Final = (
    Policy("isolate", public=False),
    Policy("selective", settles=True),
    Policy("dp", settles=True),
    Policy("pinned", pins=True),
    Policy("salt"),
    Policy("safekv", UNSAFE, settles=True),
    Policy("share_all", UNSAFE),
)
QUICK_POLICIES: Final = ("isolate", "selective", "share_all")
GROUP: Final = "bench"
"""All tenants are of it: a tenant without a group shares with nobody, whatever the policy."""


def page_bytes(model: Path) -> int:
    """Return the bytes of a page of a model in 16 bits."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(PAGE * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4)


@contextmanager
def served(
    policy: Policy,
    shares: Mapping[str, float],
    pages: int,
    *arguments: str,
    model: Path = DEMO_MODEL,
    pins: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve a model to these tenants with a pool of so many pages and these prompts pinned."""
    size = ("--kv-cache-memory-bytes", str(pages * page_bytes(model)))
    told = ["--model", str(model), *policy.arguments, *size, *arguments]
    group = GROUP if policy.public else None
    with TemporaryDirectory() as name:
        folder = Path(name)
        if policy.pins:
            told += ["--share-pinned", str(pinned_file(folder / "pins.toml", pins))]
        with serving(folder, shares, *told, group=group) as one:
            yield one


def pinned_file(path: Path, texts: Sequence[str]) -> Path:
    """Write the file in which an operator declares texts public."""
    prefixes = (f"[[prefix]]\ntext = {json.dumps(text)}\n" for text in texts)
    path.write_text("\n".join(prefixes), encoding="utf-8")
    return path


def epochs_of(epoch_s: float) -> tuple[str, str]:
    """Return the arguments for epochs of so many seconds."""
    return ("--share-epoch-s", str(epoch_s))
