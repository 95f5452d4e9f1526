"""Votes of all workers are counted as one, and the same is public on each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvkeep.disagg.agreed import Agreement
from kvkeep.disagg.totals import NOTHING, total
from kvkeep.engine import messages as m
from kvkeep.engine.api import Chunk, SamplingParams, SharingStats, TenantTerms
from kvkeep.engine.options import SharingOptions
from kvkeep.engine.terms import limits_of
from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Ballot, UnitRef
from kvkeep.sharing.promotion import Promotion
from kvkeep.sharing.state import State, decode_state
from tests.disagg.crews import QUICK_CREW, Cluster, cluster_of
from tests.disagg.pairs import Worker, answers, until
from tests.engines import request, tokens
from tests.sharing.worlds import Finds

K = 4
SHARED = SharingOptions(policy="selective", k=K, epoch_s=3600.0, led=True)
SOME = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7, 8] * 70
"""One unit of four pages, and a few more tokens."""
NAMES = tuple(f"t{number}" for number in range(16))
EPOCHS = 3
"""One in which prompts are sent, one at whose end they are counted, and one more."""


def policy_of(worker: Worker) -> Promotion:
    found = worker.core.sharing.policy
    assert isinstance(found, Promotion)
    return found


@pytest.fixture(autouse=True)
def _clears_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every worker read prompts by rules that find nothing: what they find is not at stake."""
    monkeypatch.setattr("kvkeep.engine.build.inspector_of", lambda *_: Finds())


@asynccontextmanager
async def shared(
    model: Path, share: SharingOptions = SHARED, prefill: int = 0
) -> AsyncIterator[Cluster]:
    """Yield two workers that answer, and perhaps some that prefill; all tenants are of a group."""
    async with cluster_of(model, crew={"prefill": prefill}, share=share) as cluster:
        await settle(cluster, NAMES)
        yield cluster


async def settle(cluster: Cluster, names: Sequence[str], silent: Sequence[str] = ()) -> None:
    """Have tenants share with each other; what silent ones send does not count."""
    terms = {
        name: TenantTerms(voter=name, group="g", contribute=name not in silent) for name in names
    }
    await cluster.fleet.set_tenants(dict.fromkeys(names, 0.05), terms)


def placed(cluster: Cluster) -> tuple[list[str], list[str]]:
    """Return the tenants whose prompt lies on one worker, and on the other."""
    by_worker = [
        [name for name in NAMES if cluster.place("decode", PROMPT, name) == worker]
        for worker in ("decode-0", "decode-1")
    ]
    assert min(map(len, by_worker)) >= 4
    return by_worker[0], by_worker[1]


async def ask(cluster: Cluster, name: str, suffix: str = "") -> list[Chunk]:
    (told,) = await answers(cluster.fleet, request(PROMPT, SOME, id=name + suffix, tenant=name))
    return told


async def end_epochs(cluster: Cluster, count: int = EPOCHS) -> None:
    """End epochs once all that was sent has been read."""
    agreement = agreement_of(cluster)
    for _ in range(count):
        for worker in cluster.hands.alive():
            scans = policy_of(worker).scans
            await until(lambda scans=scans: not any(scans._open.values()), 60)  # type: ignore[misc]
        await agreement.end_epoch(0.0)


def agreement_of(cluster: Cluster) -> Agreement:
    assert cluster.fleet.agreement is not None
    return cluster.fleet.agreement


def public(cluster: Cluster) -> list[int]:
    return [policy_of(worker).public_units for worker in cluster.hands.alive()]


def forget(cluster: Cluster, names: Sequence[str]) -> None:
    """Evict what tenants have sent from all workers."""
    for worker in cluster.hands.alive():
        for manager in worker.core.caches.managers.values():
            for name in names:
                manager.evict_pages(name, 999)


def saved(cluster: Cluster) -> list[int]:
    """Return the tokens that each worker need not have computed."""
    return [worker.core.stats().sharing.saved_tokens for worker in cluster.hands.alive()]


@pytest.mark.parametrize("voters", [K - 1, K])
async def test_tenants_of_two_workers_promote_together_on_both(
    tiny: dict[str, Path], voters: int
) -> None:
    async with shared(tiny["qwen2"], prefill=1) as cluster:
        here, there = placed(cluster)
        both = [*here[: voters - 2], *there[:2]]
        for name in both:
            assert (await ask(cluster, name))[0].cached_tokens == 0
            await ask(cluster, name, "again")  # as often as it likes, on two workers: one voter
        await end_epochs(cluster)
        enough = voters >= K
        assert public(cluster) == [enough] * 3
        before = saved(cluster)
        for name in (here[-1], there[-1]):
            told = await ask(cluster, name)
            assert (told[0].cached_tokens, len(tokens(told))) == (0, SOME.max_tokens)
        assert (sum(saved(cluster)) > sum(before)) == enough
        stats = (await cluster.fleet.stats()).sharing
        assert (stats.public_units, stats.public_pages) == (enough, 8 * enough)  # pages of two


@pytest.mark.parametrize("victims", [K - 1, K])
async def test_two_worlds_across_two_workers(tiny: dict[str, Path], victims: int) -> None:
    """What observers on either worker are told is the same with and without fewer than k others."""
    async with shared(tiny["qwen2"]) as cluster:
        here, there = placed(cluster)
        observers = (here[-1], there[-1])
        await settle(cluster, NAMES, silent=observers)
        for name in [*here[:2], *there[:2]][:victims]:
            await ask(cluster, name)
        seen, saw = [], []
        for turn in range(EPOCHS + 1):
            for name in observers:
                told = await ask(cluster, name, f"-{turn}")
                seen.append((told[0].cached_tokens, tokens(told)))
            saw.append(saved(cluster))
            await end_epochs(cluster, 1)
            forget(cluster, observers)  # what they sent themselves is found in any world
        assert all(told == seen[0] for told in seen)
        assert saw[0] == [0, 0]
        assert (saw[-1] == [0, 0]) == (victims < K), "of K, time tells; of fewer, nothing does"
        assert min(saw[-1]) > 0 or victims < K, "on both workers"


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"kv": "k2v2", "evict": "corm", "shield": "seal"},
}
DRAWN = SamplingParams(max_tokens=8, temperature=1.0, seed=3, logprobs=1, ignore_eos=True)


async def observed(model: Path, victims: int, form: dict[str, Any]) -> tuple[list[Any], int]:
    """Return what an observer is told beside so many victims, and what is public in the end.

    Victims ask at the same time, on the same prefill and decode workers, of prompts that begin as
    the observer's do and of their own. The observer asks one by one, and of its own pages nothing
    is left after each epoch.
    """
    async with cluster_of(model, crew={"prefill": 1}, share=SHARED, **form) as cluster:
        await settle(cluster, NAMES)
        here, _ = placed(cluster)
        observer, others = here[-1], here[:victims]
        await settle(cluster, NAMES, silent=[observer])
        told: list[Any] = []

        async def look(turn: int) -> None:
            for number, prompt in enumerate((PROMPT, PROMPT * 3, PROMPT[:100], [turn + 1] * 300)):
                asked = request(prompt, DRAWN, id=f"{turn}-{number}", tenant=observer)
                (chunks,) = await answers(cluster.fleet, asked)
                scores = [entry for chunk in chunks for entry in chunk.logprobs]
                told.append((chunks[-1].cached_tokens, tokens(chunks), scores, chunks[-1].finish))

        async def disturb(name: str, turn: int) -> None:
            own = [ord(letter) for letter in name] * 200
            for number, prompt in enumerate((PROMPT, own[:500], PROMPT * 2)):
                asked = request(prompt, SOME, id=f"{name}-{turn}-{number}", tenant=name)
                await answers(cluster.fleet, asked)

        for turn in range(EPOCHS + 1):
            await asyncio.gather(look(turn), *(disturb(name, turn) for name in others))
            await end_epochs(cluster, 1)
            forget(cluster, [observer])
        return told, max(public(cluster))


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "all"])
@pytest.mark.timeout(240)
async def test_two_worlds_where_prompts_are_split(tiny: dict[str, Path], form: str) -> None:
    alone, nothing = await observed(tiny["qwen2"], 0, FORMS[form])
    beside, less = await observed(tiny["qwen2"], K - 1, FORMS[form])
    assert nothing == less == 0
    assert beside == alone
    _, shared_by_k = await observed(tiny["qwen2"], K, FORMS[form])
    assert shared_by_k > 0, "the same prompts of one more are shared"


async def test_a_worker_that_is_lost_does_not_contribute_and_learns_what_is_public(
    tiny: dict[str, Path],
) -> None:
    async with shared(tiny["qwen2"]) as cluster:
        here, there = placed(cluster)
        for name in [*here[:3], there[0]]:
            await ask(cluster, name)
        cluster.hands.kill("decode-1")
        await until(lambda: cluster.fleet.crew.members["decode-1"].starts == 2, 60)
        await until(lambda: cluster.serves("decode-1"), 60)
        await end_epochs(cluster)
        assert public(cluster) == [0, 0]
        await ask(cluster, there[1])
        await end_epochs(cluster)
        assert public(cluster) == [1, 1]


async def test_purged_and_leaving_tenants_do_not_count(tiny: dict[str, Path]) -> None:
    async with shared(tiny["qwen2"]) as cluster:
        here, there = placed(cluster)
        for name in [*here[:2], *there[: K - 3]]:
            await ask(cluster, name)
        await end_epochs(cluster)
        assert (await cluster.fleet.purge(here[0])).votes == 1
        await ask(cluster, there[K - 3])
        await end_epochs(cluster)
        assert public(cluster) == [0, 0]
        await settle(cluster, [name for name in NAMES if name != here[1]])
        for name in here[2:4]:
            await ask(cluster, name)
        await end_epochs(cluster)
        assert public(cluster) == [1, 1], "K of those that are left"


async def test_votes_outlive_the_cluster(tiny: dict[str, Path], tmp_path: Path) -> None:
    share = msgspec.structs.replace(SHARED, state=str(tmp_path / "votes"))
    async with shared(tiny["qwen2"], share) as cluster:
        here, there = placed(cluster)
        for name in [*here[:2], *there[:1]]:
            await ask(cluster, name)
        await end_epochs(cluster)
    async with shared(tiny["qwen2"], share) as cluster:
        await ask(cluster, there[1])
        await end_epochs(cluster)
        assert public(cluster) == [1, 1]


@pytest.mark.parametrize("differs", ["decode-0", "decode-1"])
async def test_nothing_is_public_while_workers_rules_differ(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, differs: str
) -> None:
    async with shared(tiny["qwen2"]) as cluster:
        here, there = placed(cluster)
        for name in [*here[:2], *there[:2]]:
            await ask(cluster, name)
        await end_epochs(cluster)
        assert public(cluster) == [1, 1]
        sharing = cluster.hands.workers[differs].core.sharing
        close = sharing.close_epoch
        monkeypatch.setattr(sharing, "close_epoch", lambda epoch: (close(epoch)[0], "other rules"))
        for name in (here[2], there[2]):
            await ask(cluster, name)
        await end_epochs(cluster)
        assert public(cluster) == [0, 0]
        assert not agreement_of(cluster)._votes.ledger.units


@pytest.mark.parametrize("purged", [False, True])
async def test_who_is_purged_while_ballots_are_on_their_way_does_not_count(purged: bool) -> None:
    unit = UnitRef((b"page",), None, 0)

    async def close_epoch(epoch: int, now: float) -> m.Votes:
        if purged:
            agreement.forget("b")
        return m.Votes((Ballot("a", "g", (unit,)), Ballot("b", "g", (unit,))), "rules")

    async def publish(state: bytes, now: float) -> None:
        """Take it."""

    client = SimpleNamespace(close_epoch=close_epoch, publish=publish)
    worker = SimpleNamespace(name="w", client=client)
    crew: Any = SimpleNamespace(serving=lambda: [worker], options=QUICK_CREW)
    agreement = Agreement(SHARED, crew)
    agreement.settle({name: TenantTerms(voter=name, group="g") for name in "ab"})
    await agreement.end_epoch(0.0)
    (votes,) = (unit.votes for unit in agreement._votes.ledger.units.values())
    assert set(votes) == ({"a"} if purged else {"a", "b"})


async def test_where_an_epoch_can_not_be_ended_nothing_is_public_until_one_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unit, asked, told = UnitRef((b"page",), None, 0), 0, list[State]()

    async def close_epoch(epoch: int, now: float) -> m.Votes:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise ValueError("secret words")
        return m.Votes(tuple(Ballot(f"t{n}", "g", (unit,)) for n in range(K + 1)), "rules")

    async def publish(state: bytes, now: float) -> None:
        told.append(decode_state(state, None, limits_of(SHARED).unit_pages))

    client = SimpleNamespace(close_epoch=close_epoch, publish=publish)
    worker = SimpleNamespace(name="w", client=client)
    crew: Any = SimpleNamespace(serving=lambda: [worker], options=QUICK_CREW)
    agreement = Agreement(msgspec.structs.replace(SHARED, epoch_s=0.01), crew)
    running = asyncio.create_task(agreement.run())
    await until(lambda: len(told) > 2, 30)
    running.cancel()
    assert [len(state.snapshot.entries) for state in told[:3]] == [1, 0, 1]
    assert "so nothing is public: ValueError at test_agreed.py:" in caplog.text
    assert "secret words" not in caplog.text


async def test_workers_that_can_not_be_told_that_nothing_is_public_are_lost() -> None:
    tried, lost = 0, list[str]()

    async def close_epoch(epoch: int, now: float) -> m.Votes:
        return m.Votes((), "rules")

    async def publish(state: bytes, now: float) -> None:
        nonlocal tried
        tried += 1
        raise ValueError("secret words")

    client = SimpleNamespace(close_epoch=close_epoch, publish=publish)
    worker = SimpleNamespace(name="w", client=client)
    crew: Any = SimpleNamespace(
        serving=lambda: [worker], options=QUICK_CREW, lost=lambda _, why: lost.append(why)
    )
    agreement = Agreement(msgspec.structs.replace(SHARED, epoch_s=0.01), crew)
    running = asyncio.create_task(agreement.run())
    await until(lambda: len(lost) > 1, 30)
    assert not running.done(), "epochs go on"
    running.cancel()
    assert tried >= 4, "the state, then that nothing is public, in each epoch"
    (why,) = set(lost)
    assert why.startswith("it publishes what is not agreed: ValueError at test_agreed.py:")


def test_a_policy_that_counts_nothing_is_not_led(tiny: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="share: 'isolate' counts no votes"):
        Agreement(SharingOptions(led=True), None)  # type: ignore[arg-type]


def test_what_is_agreed_is_not_added_up() -> None:
    one = SharingStats(policy="dp", public_units=3, public_pages=9, eps_per_day=2.0)
    of = [msgspec.structs.replace(NOTHING, sharing=one)] * 2
    agreed, apart = (total(of, (), agreed=agreed).sharing for agreed in (True, False))
    assert (agreed.public_units, agreed.public_pages, agreed.eps_per_day) == (3, 18, 2.0)
    assert (apart.public_units, apart.eps_per_day) == (6, 4.0)
