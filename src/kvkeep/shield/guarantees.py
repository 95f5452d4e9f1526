"""What each mode of `--shield` guarantees and what it does not, as an operator reads it."""

from __future__ import annotations

from typing import Final, NamedTuple


class Guarantee(NamedTuple):
    """One mode's promise."""

    sentence: str
    not_covered: str
    safe: bool
    """Whether it stands against somebody who has the model's weights."""


GUARANTEES: Final = {
    "off": Guarantee("pages lie as they are computed", "whoever reads one reads its tokens", False),
    "seal": Guarantee(
        "pages below memory open under their tenant's keys alone",
        "the server's own memory, its administrator, when and how much is read",
        True,
    ),
    "tile": Guarantee(
        "as seal, and cached pages are sealed in memory, open a layer at a time while it is"
        " attended; the index holds no tokens",
        "open pages, what requests hold and the front end for a while after them, text that waits"
        " to be read, the server's administrator, when and how much is read",
        True,
    ),
    "perm": Guarantee(
        "keys and values lie shuffled by channel, a key for each layer and KV head",
        "no protection against someone who has the public weights: sorted values name each token",
        False,
    ),
    "orth": Guarantee(
        "keys and values lie turned by secret rotations, a key for each layer and KV head",
        "no protection against someone who has the public weights: lengths name each token",
        False,
    ),
    "mask": Guarantee(
        "as orth, and shifted by secret vectors, a pair for each layer and KV head",
        "no protection against someone who has the public weights and a few pages or known text",
        False,
    ),
    "tee": Guarantee(
        "as seal, with keys released to an attested machine alone",
        "physical interposers, who is inside that machine, when and how much is read",
        True,
    ),
}


def describe(mode: str) -> str:
    """Return a line: the mode, what it guarantees and what it does not cover."""
    guarantee = GUARANTEES[mode]
    label = mode if guarantee.safe or mode == "off" else f"{mode} (obfuscation)"
    return f"{label}: {guarantee.sentence}; not covered: {guarantee.not_covered}"
