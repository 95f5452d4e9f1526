"""Scanning in a thread: what its slowness and its death may cost."""

from __future__ import annotations

import pytest

from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion
from kvkeep.sharing.worker import read_one
from tests.sharing.nodes import SIX, Blocks, end_epochs, sharing
from tests.sharing.worlds import TAINT, Finds, Setting


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_scans_and_its_death_costs_no_more_than_the_prompt() -> None:
    setting = Setting()
    setting.directory.set({name: Member(name, "all") for name in SIX})
    deadly = Deadly()
    setting.inspector = deadly
    policy = setting.promotion(AtLeast(4, life_epochs=10))
    threaded = Promotion(policy._parts, policy._limits, threaded=True, clock=lambda: 0.0)
    threaded.offer(Blocks(TAINT), "a")
    wait_until_scanned(threaded)
    for name in SIX:
        threaded.offer(Blocks(1), name)
        wait_until_scanned(threaded)
    end_epochs(threaded, 2)
    assert threaded.public_len(Blocks(1), "a") == 1
    assert threaded.scans.counts.restarts == 1
    threaded.close()
    threaded.close()
    policy.close()


class Deadly(Finds):
    """Takes its thread with it where it finds something."""

    def first_doubt(self, text: str) -> int | None:
        if chr(0x4E00 + TAINT) in text:
            raise SystemExit
        return None


def wait_until_scanned(policy: Promotion) -> None:
    worker = policy._worker
    assert worker is not None
    for _ in range(2000):
        if not any(n > 0 for n in policy.scans._open.values()):
            break
        if worker._thread is not None:
            worker._thread.join(0.005)
    assert not any(n > 0 for n in policy.scans._open.values())
    if worker._thread is not None and policy.scans.counts.dropped:
        worker._thread.join(0.05)


def test_one_tenants_unread_prompts_delay_nobody_elses_promotion() -> None:
    setting, policy = sharing()
    setting.directory.set({name: Member(name, "all") for name in (*SIX, "loud")})
    threaded = Promotion(policy._parts, policy._limits, threaded=True, clock=lambda: 0.0)
    assert threaded._worker is not None
    threaded._worker.close()
    for i in range(20):
        threaded.offer(Blocks(100 + i), "loud")
    for name in SIX:
        threaded.offer(Blocks(1), name)
    for _ in range(1 + len(SIX)):
        assert read_one(threaded.scans, threaded._read)
    end_epochs(threaded, 2)
    assert threaded.public_units == 1


def test_an_epoch_waits_for_its_scans_but_not_for_ever() -> None:
    _setting, policy = sharing()
    threaded = Promotion(policy._parts, policy._limits, threaded=True, clock=lambda: 0.0)
    assert threaded._worker is not None
    threaded._worker.close()
    for name in SIX:
        threaded.offer(Blocks(1), name)
    end_epochs(threaded, 3)
    assert threaded.public_units == 0
    while read_one(threaded.scans, threaded._read):
        pass
    end_epochs(threaded)
    assert threaded.public_units == 1
    threaded.offer(Blocks(2), "a")
    end_epochs(threaded, 6)
    for name in SIX:
        threaded.offer(Blocks(1), name)
    end_epochs(threaded, 2)
    assert threaded.public_units == 1
