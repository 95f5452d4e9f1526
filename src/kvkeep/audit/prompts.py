"""Prompts of equal length in tokens that share no page, each to be used once.

The two of a pair are permutations of the same words, so any tokenizer that works word by word
counts them alike. The first word, which many tokenizers treat apart, is common; the second differs,
so that no page is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

_LEXICON: Final = """
able aged also area away baby back band bank base bath bear beat been belt best blow blue boat
body book both burn bush busy cake call calm came camp card care case cash cast chat chip city
coat code cold come cook cool cope copy core crew crop dark data date dawn days dead deal dear
deep desk diet disc disk does done door down draw drop dual duke duty each earn ease easy edge
else even ever evil exit face fact fail fair fall farm fast fate fear feed feel feet fell felt
file fill film find fine fire firm fish five flat flow food ford form fort four free from fuel
full fund gain game gate gave gear gift give glad goal goes gold gone good great grew grow gulf
half hard into item join just keep kept kind knew know lane last late left less like line list
long look made main make many mean meet mode more most move much near need next nice note open
over pace page pair part past plan plus post read real rest
"""
WORDS: Final = tuple(_LEXICON.split())
"""Plain words, no names and nothing of health: what a detector keeps private hides a leak."""
BLANKS: Final = ("\u200b", "\u200c", "\u200d", "\u2060")
"""Characters without a width: a text of these looks empty."""
PAGE_TOKENS: Final = 64
"""A multiple of the page sizes in use."""


class Twins(NamedTuple):
    """Two prompts alike but for the order of their words."""

    first: str
    second: str


class PromptMaker:
    """Makes prompts of about `tokens` tokens from a seed, after a text that all begin with."""

    def __init__(self, seed: int, behind: str = "") -> None:
        self._seed = seed
        self._behind = f"{behind} " if behind else ""
        self.chance = random.Random(seed)  # noqa: S311 - coins that a report can repeat
        self.tokens = 256
        self.tokens_per_word = 1.3
        """Measured on the target by `Prober.calibrate`."""

    @property
    def words(self) -> int:
        """Return the words of one prompt."""
        return max(16, round(self.tokens / self.tokens_per_word))

    def text(self) -> str:
        """Return one prompt."""
        return self._behind + " ".join(self.chance.choices(WORDS, k=self.words))

    def template(self, words: int) -> str:
        """Return a text that is the same at every call, for what everybody knows."""
        chance = random.Random(f"{self._seed} template")  # noqa: S311 - no secret
        return " ".join(chance.choices(WORDS, k=words))

    def twins(self) -> Twins:
        """Return two permutations of the same random words, alike in the first alone."""
        return Twins(*(self._behind + text for text in self.bare_twins()))

    def bare_twins(self) -> Twins:
        """Return twins with nothing before them, for what happens in a prompt's first page."""
        return Twins(*map(" ".join, self._permuted(WORDS, self.words)))

    def blanks(self) -> Twins:
        """Return two texts that look empty; a character of theirs is one to three tokens."""
        return Twins(*map("".join, self._permuted(BLANKS, max(16, self.tokens // 2))))

    def guesses(self, words: int) -> Twins:
        """Return two texts, to follow another, that differ in their first two words alone."""
        one, other = self.chance.sample(WORDS, 2)
        rest = self.chance.choices(WORDS, k=words)
        return Twins(" ".join([one, other, *rest]), " ".join([other, one, *rest]))

    def near(self, text: str) -> str:
        """Return a text of the same words, the fourth exchanged with a later one."""
        words = text.split()
        other = next(i for i in range(4, len(words)) if words[i] != words[3])
        words[3], words[other] = words[other], words[3]
        return " ".join(words)

    def secret(self) -> str:
        """Return made-up personal data."""
        name = f"{self.chance.choice(WORDS)}.{self.chance.choice(WORDS)}"
        return f"{name}{self.chance.randint(1000, 9999)}@example.org phone 555 0142 card 4111 1111"

    def across_boundary(self, text: str, secret: str) -> str:
        """Return the text with the secret laid over the boundary at 64 tokens.

        The words before it end a few tokens before the boundary; the secret is longer than that.
        """
        words, before = text.split(), max(2, round(PAGE_TOKENS / self.tokens_per_word) - 4)
        return " ".join([*words[:before], secret, *words[before:]])

    def _permuted(self, units: Sequence[str], count: int) -> tuple[list[str], list[str]]:
        first = self.chance.choice(units)
        one, other = self.chance.sample(units, 2)
        drawn = self.chance.choices(units, k=count - 3)
        shuffled = self.chance.sample(drawn, len(drawn))
        return [first, one, other, *drawn], [first, other, one, *shuffled]
