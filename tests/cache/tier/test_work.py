from __future__ import annotations

import threading

from kvkeep.cache.tier.work import Job, Workers, WriteQueue

A, B = b"a" * 16, b"b" * 16


def nothing() -> None:
    """Do nothing."""


def test_shelves_take_turns_and_what_is_urgent_goes_first() -> None:
    jobs: list[Job] = [lambda: None for _ in range(5)]
    work = WriteQueue()
    for job in jobs[:3]:
        work.put(A, 10, job)
    work.put(B, 10, jobs[3])
    work.put_first(jobs[4])
    assert [work.get(0) for _ in range(6)] == [jobs[4], jobs[0], jobs[3], jobs[1], jobs[2], None]
    assert not work.busy


def test_a_shelf_has_room_for_its_own_bytes_alone() -> None:
    work = WriteQueue()
    assert work.has_room(A, 1000, 15), "one page may always be under way"
    work.put(A, 10, nothing)
    work.put(B, 100, nothing)
    assert work.has_room(A, 5, 15)
    assert not work.has_room(A, 6, 15)
    assert work.get(0) is not None
    assert not work.has_room(A, 6, 15), "a job that runs counts until the next is asked for"
    assert work.get(0) is not None
    assert work.has_room(A, 6, 15)


def test_forgotten_jobs_never_run() -> None:
    work = WriteQueue()
    work.put(A, 10, nothing)
    work.put(B, 10, nothing)
    work.forget(A)
    assert work.get(0) is not None
    assert work.get(0) is None
    assert not work.busy


def test_what_runs_is_busy_whatever_it_is() -> None:
    urgent, other = WriteQueue(), WriteQueue()
    urgent.put_first(nothing)
    other.put(A, 1, nothing)
    for work in (urgent, other):
        assert work.get(0) is not None
        assert work.busy, "the job that was given out runs"
        assert work.get(0) is None
        assert not work.busy


def test_threads_run_jobs_and_end() -> None:
    work = WriteQueue()
    wrote, read = threading.Event(), threading.Event()
    workers = Workers(work, lambda: None)
    work.put(A, 1, wrote.set)
    workers.read(read.set)
    assert wrote.wait(5)
    assert read.wait(5)
    assert workers.stop()
