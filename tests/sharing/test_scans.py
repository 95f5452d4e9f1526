from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kvkeep.sharing.inspection import Detects, cleared_units
from kvkeep.sharing.ledger import Ballot, Ledger, UnitRef
from kvkeep.sharing.scans import ScanJob, ScanLimits, ScanQueue
from kvkeep.sharing.worker import read_one
from tests.sharing.nodes import Blocks


def job(voter: str, name: bytes = b"u", epoch: int = 0, known: int = 0, units: int = 1) -> ScanJob:
    refs = tuple(UnitRef((name + bytes([i]),), None, i) for i in range(units))
    return ScanJob(voter, "g", epoch, refs, np.zeros(64 * units, np.int32), known)


def test_tenants_take_turns_whatever_the_length_of_their_queues() -> None:
    queue = ScanQueue(ScanLimits())
    for i in range(5):
        queue.put(job("loud", bytes([i])))
    queue.put(job("quiet"))
    order = [taken.voter for _ in range(6) if (taken := queue.take()) is not None]
    assert order == ["loud", "quiet", "loud", "loud", "loud", "loud"]
    assert queue.take() is None


def test_a_queue_and_a_budget_are_a_tenants_own_and_start_anew_each_epoch() -> None:
    queue = ScanQueue(ScanLimits(queued_bytes=512, epoch_bytes=700))
    assert [queue.put(job("a")) for _ in range(3)] == [True, True, False]
    assert queue.put(job("b"))
    while (taken := queue.take()) is not None:
        queue.finish(taken, 1)
    assert not queue.put(job("a")), "its budget for the epoch is spent"
    assert queue.put(job("a", epoch=1))
    queue.collect(5)
    assert queue.counts.dropped == {"a": 2}


def test_a_late_scan_holds_back_its_own_tenants_ballots_alone() -> None:
    queue = ScanQueue(ScanLimits())
    for voter in ("slow", "quick"):
        queue.put(job(voter))
    slow, quick = queue.take(), queue.take()
    assert slow is not None
    assert quick is not None
    queue.finish(quick, 1)
    queue.settle(Ballot("slow", "g", ()), 1)
    assert [ballot.voter for ballot in queue.collect(1)] == ["quick"]
    assert [len(ballot.units) for ballot in queue.collect(3)] == [0], "not waited for any longer"
    queue.finish(slow, 1)
    assert [len(ballot.units) for ballot in queue.collect(4)] == [1], "it counts when it ends"


def test_a_reading_does_not_clear_what_is_known_to_be_tainted() -> None:
    queue = ScanQueue(ScanLimits())
    queue.put(replace(job("a", units=3), tainted=1))
    taken = queue.take()
    assert taken is not None
    queue.finish(taken, 3)
    (ballot,) = queue.collect(1)
    assert ballot.units == taken.units[:1]
    assert ballot.tainted == taken.units[1]


def test_nothing_that_was_dropped_comes_back() -> None:
    queue = ScanQueue(ScanLimits())
    for voter in ("a", "b"):
        queue.put(job(voter))
        queue.put(job(voter, b"v"))
        queue.settle(Ballot(voter, "g", ()), 0)
    reading, given_up = queue.take(), queue.take()
    assert reading is not None
    assert given_up is not None
    queue.clear()
    queue.finish(reading, 1)
    queue.give_up(given_up)
    assert queue.take() is None
    assert queue.collect(0) == []
    queue.put(job("a"))
    assert read_one(queue, lambda _: 1)
    assert len(queue.collect(0)) == 1


def test_what_earlier_votes_cleared_costs_nothing() -> None:
    assert job("a", units=4).cost_bytes == 1024
    assert job("a", units=4, known=3).cost_bytes == 512, "the last of them is read again"


def test_an_error_is_a_doubt_and_is_not_told_in_words(caplog: pytest.LogCaptureFixture) -> None:
    queue = ScanQueue(ScanLimits())
    queue.put(job("a"))

    def fails(_: ScanJob) -> int:
        raise ValueError("the secret")

    with caplog.at_level(logging.WARNING):
        assert read_one(queue, fails)
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert queue.collect(0) == []
    assert not read_one(queue, fails)


def test_purging_while_a_job_is_read_drops_its_ballot() -> None:
    queue = ScanQueue(ScanLimits())
    for voter in ("a", "a", "b"):
        queue.put(job(voter))
    queue.settle(Ballot("a", "g", ()), 0)
    taken = queue.take()
    assert taken is not None
    queue.forget("a")
    queue.finish(taken, 1)
    rest = queue.take()
    assert rest is not None
    queue.finish(rest, 1)
    assert [ballot.voter for ballot in queue.collect(0)] == ["b"]


class Place:
    def __init__(self, start: int, verdict: int) -> None:
        self.start, self.verdict = start, verdict


class Scans:
    def __init__(self, *places: Place) -> None:
        self._places = places

    def feed(self, text: str) -> tuple[Place, ...]:
        return self._places


class Fake:
    version = "d1"

    def __init__(self, *places: Place) -> None:
        self._places = places

    def scanner(self) -> Scans:
        return Scans(*self._places)


def test_a_detectors_grey_ends_what_is_clear_and_its_clear_does_not() -> None:
    inspector = Detects(Fake(Place(90, 1), Place(10, 0), Place(130, 2)))
    assert inspector.version == "d1"
    text = "x" * 64
    assert (
        cleared_units(Blocks(1, 2, 3).token_ids(), 64, lambda ids: text[: len(ids)] * 3, inspector)
        == 0
    )
    assert (
        cleared_units(Blocks(1, 2, 3).token_ids(), 64, lambda ids: "x" * len(ids), inspector) == 1
    )
    assert Detects(Fake()).first_doubt("text") is None


def test_the_taints_kept_for_a_tenant_are_bounded() -> None:
    ledger = Ledger()
    for i in range(9):
        ref = UnitRef((bytes([i]),), None, 0)
        ledger.cast([Ballot("a", "g", (), ref)], 0, 0, 3)
    assert len(ledger.voters["a"].tainted) == 3


def test_an_only_vote_goes_with_its_taint() -> None:
    ledger = Ledger()
    ref = UnitRef((b"u",), None, 0)
    ledger.cast([Ballot("a", "g", (ref,))], 0, 0, 3)
    assert ledger.knows("a", "g", b"u")
    ledger.cast([Ballot("a", "g", (), ref)], 1, 0, 3)
    assert ledger.units == {}


def test_a_taint_takes_back_the_tenants_own_votes_below_it() -> None:
    ledger = Ledger()
    top, below = UnitRef((b"u",), None, 0), UnitRef((b"w",), b"u", 1)
    other = UnitRef((b"o",), None, 0)
    for voter in ("a", "b"):
        ledger.cast([Ballot(voter, "g", (top, below)), Ballot(voter, "g", (other,))], 0, 0, 99)
    ledger.cast([Ballot("a", "h", (top,))], 0, 0, 99)
    ledger.cast([Ballot("a", "g", (), top)], 1, 0, 99)
    left = {key: sorted(unit.votes) for key, unit in ledger.units.items()}
    assert left == {
        ("g", b"u"): ["b"],
        ("g", b"w"): ["b"],
        ("g", b"o"): ["a", "b"],
        ("h", b"u"): ["a"],
    }


def test_what_is_known_is_not_read_again_but_for_its_end() -> None:
    read: list[str] = []

    class Notes:
        version = "notes"

        def first_doubt(self, text: str) -> int | None:
            read.append(text)
            return None

    tokens = Blocks(1, 2, 3, 4, 5).token_ids()
    assert cleared_units(tokens, 64, lambda ids: "".join(map(str, ids)), Notes(), 3) == 5
    assert read == ["3" * 64 + "4" * 64 + "5" * 64]


def test_what_begins_in_known_text_taints_it() -> None:
    inspector = Detects(Fake(Place(60, 2)))
    tokens = Blocks(1, 2, 3, 4).token_ids()
    assert cleared_units(tokens, 64, lambda ids: "x" * len(ids), inspector, 2) == 1


def test_a_character_halved_by_the_cut_is_no_doubt() -> None:
    tokens = Blocks(1, 2, 3, 4).token_ids()

    def halves(ids: Sequence[int]) -> str:
        return ("" if ids[0] == 1 else "\ufffd") + "x" * (len(ids) - 1)

    assert cleared_units(tokens, 64, halves, Detects(Fake()), 3) == 4
    assert cleared_units(tokens[64:], 64, halves, Detects(Fake())) == 0


def test_what_one_reading_taints_no_other_of_the_same_epoch_votes_for() -> None:
    """Of a unit that two prompts go on from, a secret at its end shows in one of them alone."""
    top = UnitRef((b"t",), None, 0)
    below = UnitRef((b"b",), b"t", 1)
    ledger = Ledger()
    ledger.cast([Ballot("a", "g", (top, below)), Ballot("a", "g", (top,), below)], 0, 0, 99)
    assert [key[1] for key, unit in ledger.units.items() if unit.votes] == [top.name]
