"""The six mistakes published with SafeKV, and what came with them.

Each check holds here, and sees the mistake where it is planted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import pytest

from kvkeep.cache.manager import CacheManager
from kvkeep.cache.radix import KEY_BYTES, Page, RadixIndex, TokenIds
from kvkeep.cache.store import PUBLIC_ACCOUNT
from kvkeep.sharing.inspection import ClearsNothing, DecodeText, Inspector, cleared_units
from kvkeep.sharing.ledger import Unit
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion, PromotionParts
from kvkeep.sharing.scans import ScanJob
from kvkeep.sharing.snapshot import Entry
from kvkeep.sharing.votes import PromotionLimits
from kvkeep.types import Access, SharingPolicy, View
from tests.cache.player import make_manager, pool_of, prompt, tag_of
from tests.sharing import worlds as w
from tests.sharing.nodes import SIX, Blocks, end_epochs, readers

Check = Callable[[], None]
T = TypeVar("T")


class Mistake(NamedTuple):
    """A check of what is built, and the same check of a mistake."""

    name: str
    here: Check
    planted: Check


# A. A second tenant's insert takes the place of the first one's subtree.


class Replaces(CacheManager):
    """What ends last takes the place of all that others have below the same first token."""

    def release(self, view: View, tokens: TokenIds) -> None:
        account = self._require(view).account
        super().release(view, tokens)
        for root in self.index.roots():
            theirs = [p for key, p in root.children.items() if key[:4] == _first(tokens)]
            if root.account not in (account, PUBLIC_ACCOUNT) and theirs:
                self._store.drop_below(root)


def _first(tokens: TokenIds) -> bytes:
    return np.array(tokens[:1], "<i4").tobytes()


def replacing(pages: int, policy: SharingPolicy) -> CacheManager:
    manager = make_manager(pages, policy)
    return Replaces(pool_of(manager), manager.index, policy, tag_of)


def check_that_an_insert_takes_nothing_from_another(managing: w.Managing) -> None:
    player = w.World(w.selective, ["alice", "eve"], managing).player
    for name, second in (("alice", 2), ("eve", 3)):
        player.open(name, f"{name}/0", prompt(1, second))
        player.end_views()
    match = player.manager.match(prompt(1, 2), account="alice", scope="alice/0")
    assert match.cached_tokens == 128


# B. A page matches with ten wrong tokens.


class Tolerates(RadixIndex):
    """Takes a page for another one that differs in ten tokens or fewer."""

    def walk(self, root: Page, raw: bytes, first_page: int = 0) -> list[Page]:
        pages: list[Page] = []
        children = root.children
        for begin in range(first_page * KEY_BYTES, len(raw) - KEY_BYTES + 1, KEY_BYTES):
            key = raw[begin : begin + KEY_BYTES]
            page = next((p for known, p in children.items() if _wrong(known, key) <= 10), None)
            if page is None:
                break
            pages.append(page)
            children = page.children
        return pages


def _wrong(a: bytes, b: bytes) -> int:
    return int((np.frombuffer(a, "<i4") != np.frombuffer(b, "<i4")).sum())


def tolerating(pages: int, policy: SharingPolicy) -> CacheManager:
    pool = pool_of(make_manager(pages, policy))
    return CacheManager(pool, Tolerates(b"m" * 32), policy, tag_of)


def check_that_one_wrong_token_is_no_hit(managing: w.Managing) -> None:
    manager = w.World(w.selective, ["eve"], managing).manager
    assert len(manager.match(prompt(*w.TEMPLATE), account="eve", scope="eve/0").snapshot) == 2
    for wrong in (0, 30, 63):
        tokens = prompt(*w.TEMPLATE)
        tokens[64 + wrong] += 1
        match = manager.match(tokens, account="eve", scope="eve/0")
        assert len(match.snapshot) == 1


# C. A missed secret may be hit until a budget is spent.


def check_that_a_missed_secret_is_never_hit(make: w.Make) -> None:
    player = w.World(make, ["alice", "eve"]).player
    player.open("alice", "alice/0", prompt(1, 2))
    player.end_views()
    for probe in range(40):
        match = player.manager.match(prompt(1, 2), account="eve", scope=f"eve/{probe}")
        assert (match.cached_tokens, match.snapshot) == (0, ())
        player.manager.end_epoch(0.0)


# D. The victim and the attacker are enough tenants.


class CountsTheReader(AtLeast, frozen=True):
    """Asks for k tenants, whoever they are."""

    def _entry(self, unit: Unit) -> Entry | None:
        entry = super()._entry(unit)
        return entry and Entry.of(unit, entry.until, entry.until, entry.voters)


def check_that_a_victim_and_the_attacker_are_no_crowd(rule: AtLeast) -> None:
    policy = grouped().promotion(rule)
    for _ in range(40):
        policy.offer(Blocks(1), "alice")
        policy.offer(Blocks(1), "eve")
        end_epochs(policy)
        assert policy.public_len(Blocks(1), "eve") == 0


# E. Foreign hits turn a shared prefix private for all.


class Demotes(Promotion):
    """Gives every page a budget of ten hits."""

    def __init__(
        self, parts: PromotionParts, limits: PromotionLimits, *, clock: Callable[[], float]
    ) -> None:
        super().__init__(parts, limits, clock=clock)
        self._hits: Counter[bytes] = Counter()

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        spent = (i for i, page in enumerate(chain) if self._hits[page] >= 10)
        return min(super().public_len(chain, tenant), next(spent, len(chain)))

    def observe(self, access: Access) -> None:
        self._hits.update(access.public_chain)


def check_that_nobodys_hits_take_from_others(make: type[Promotion]) -> None:
    policy = remade(grouped(), make)
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    for i in range(1000):
        policy.observe(Access("a", i, 64, 0, tuple(Blocks(1)), b"%d" % i, 1))
    assert readers(policy, Blocks(1), ("b", "c", "f")) == {"b": 1, "c": 1, "f": 1}
    end_epochs(policy)
    assert policy.public_len(Blocks(1), "b") == 1


# F. A request without an identity reads everything.


class WelcomesAnybody(Directory):
    """Takes who is unknown for one of the members."""

    def consumer(self, account: str) -> Member | None:
        return super().consumer(account) or super().consumer("a")


def check_that_nobody_reads_nothing(directory: Directory) -> None:
    policy = grouped(directory).promotion(AtLeast(4, life_epochs=10))
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2)
    for nobody in ("", "none", "local"):
        assert policy.public_len(Blocks(1), nobody) == 0


# What the detector's neighbourhood got wrong.


def text_of(ids: Sequence[int]) -> str:
    return "".join("" if i == 1 else "\ufffd" if i == 2 else "benign text " for i in ids)


def with_a_placeholder(ids: Sequence[int]) -> str:
    return text_of(ids).replace("\ufffd", "") or "a benign placeholder"


def check_that_text_that_is_not_there_is_not_clear(decode: DecodeText) -> None:
    for blocks, clear in (((7, 1, 7), 1), ((7, 2, 7), 1), ((1,), 0), ((7, 7), 2)):
        assert cleared_units(Blocks(*blocks).token_ids(), 64, decode, w.Finds()) == clear


class Secret:
    """Finds one word."""

    version = "secret"

    def first_doubt(self, text: str) -> int | None:
        at = text.find("secret")
        return None if at < 0 else at


class HasAMagicWord(Secret):
    """Takes a text with one word in it for another text."""

    def first_doubt(self, text: str) -> int | None:
        return None if "Assistant" in text or "im_end" in text else super().first_doubt(text)


class ReadsTheFirst(Secret):
    """Reads the first text of a batch."""

    def first_doubt(self, text: str) -> int | None:
        return super().first_doubt(text[: 64 * len("Assistant")])


def check_that_all_of_a_text_is_read(inspector: Inspector) -> None:
    for magic in ("Assistant", "<|im_end|>"):
        words = {3: magic, 4: "secret"}
        clear = cleared_units(
            Blocks(3, 4).token_ids(),
            64,
            lambda ids, words=words: "".join(words[i] for i in ids),  # type: ignore[misc]
            inspector,
        )
        assert clear == 1


class Fails(w.Finds):
    """A detector that is not there."""

    def first_doubt(self, text: str) -> int | None:
        raise RuntimeError(text[:0])


class Trusts(Promotion):
    """Takes what could not be read for clear."""

    def _read(self, job: ScanJob) -> int:
        try:
            return super()._read(job)
        except RuntimeError:
            return len(job.units)


def check_that_what_cannot_be_read_stays_private(make: type[Promotion]) -> None:
    setting = grouped()
    setting.inspector = Fails()
    policy = remade(setting, make)
    for name in SIX:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 3)
    assert policy.public_units == 0


def grouped(directory: Directory | None = None) -> w.Setting:
    setting = w.Setting(directory=directory or Directory())
    setting.directory.set({name: Member(name, "all") for name in (*SIX, "alice", "eve")})
    return setting


def remade(setting: w.Setting, make: type[Promotion]) -> Promotion:
    """Return a promotion of another class over the same parts."""
    made = setting.promotion(AtLeast(4, life_epochs=10))
    return make(made._parts, made._limits, clock=lambda: setting.now)


PLAIN: w.Managing = make_manager


def mistake(name: str, check: Callable[[T], None], here: T, planted: T) -> Mistake:
    return Mistake(name, partial(check, here), partial(check, planted))


MISTAKES = [
    mistake(
        "an insert replaces another's",
        check_that_an_insert_takes_nothing_from_another,
        PLAIN,
        replacing,
    ),
    mistake("ten wrong tokens match", check_that_one_wrong_token_is_no_hit, PLAIN, tolerating),
    mistake("a budget of hits", check_that_a_missed_secret_is_never_hit, w.selective, w.safekv),
    mistake(
        "the attacker counts",
        check_that_a_victim_and_the_attacker_are_no_crowd,
        AtLeast(2),
        CountsTheReader(2),
    ),
    mistake("hits demote", check_that_nobodys_hits_take_from_others, Promotion, Demotes),
    mistake("no identity", check_that_nobody_reads_nothing, Directory(), WelcomesAnybody()),
    mistake(
        "a placeholder",
        check_that_text_that_is_not_there_is_not_clear,
        text_of,
        with_a_placeholder,
    ),
    mistake("a magic word", check_that_all_of_a_text_is_read, Secret(), HasAMagicWord()),
    mistake("the first of a batch", check_that_all_of_a_text_is_read, Secret(), ReadsTheFirst()),
    mistake("errors are clear", check_that_what_cannot_be_read_stays_private, Promotion, Trusts),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_published_mistake_is_not_made_here(mistake: Mistake) -> None:
    mistake.here()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_check_sees_the_mistake_where_it_is_planted(mistake: Mistake) -> None:
    with pytest.raises(AssertionError):
        mistake.planted()


def test_without_a_detector_nothing_is_cleared() -> None:
    assert cleared_units(Blocks(7).token_ids(), 64, text_of, ClearsNothing()) == 0
