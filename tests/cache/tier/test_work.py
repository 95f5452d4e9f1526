from __future__ import annotations

import threading

from kvkeep.cache.tier.work import (
    NOWHERE,
    PIECE_BYTES,
    READERS,
    Job,
    ReadQueue,
    Workers,
    WriteQueue,
)

A, B = b"a" * 16, b"b" * 16


def nothing() -> None:
    """Do nothing."""


def run_all(jobs: list[Job]) -> None:
    for job in jobs:
        job()


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
    workers = Workers(work, lambda: None, run_all)
    work.put(A, 1, wrote.set)
    workers.read(read.set, NOWHERE, 1)
    assert wrote.wait(5)
    assert read.wait(5)
    assert workers.stop()


def test_files_are_read_forwards_and_what_comes_later_waits_for_the_next_round() -> None:
    reads: ReadQueue[int] = ReadQueue()
    for offset in (40, 30, 20, 10):
        reads.put(offset, (1, offset), 1)
    reads.put(0, (0, 50), 1)
    first = reads.get()
    assert first == [0, 10, 20], "one reader's part of the round, an earlier segment first"
    reads.put(5, (1, 5), 1)
    assert reads.get() == [30]
    assert reads.get() == [40], "the round ends before what came later"
    assert reads.get() == [5]


def test_a_reader_takes_few_bytes_at_a_time_and_at_least_one_page() -> None:
    reads: ReadQueue[int] = ReadQueue()
    sizes = (PIECE_BYTES + 1, PIECE_BYTES // 2, PIECE_BYTES // 2, 1, *[1] * READERS)
    for number, size in enumerate(sizes):
        reads.put(number, (0, number), size)
    assert reads.get() == [0]
    assert reads.get() == [1, 2]


def test_readers_end_once_what_waits_is_read() -> None:
    reads: ReadQueue[int] = ReadQueue()
    reads.put(1, NOWHERE, 1)
    reads.close()
    assert reads.get() == [1]
    assert reads.get() == []
