"""The requests under way: keeps each account's cap, finds a revoked key's work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvkeep.errors import TooManyRequests
from kvkeep.server.identity import Identity


class Job:
    """One HTTP request under way; `cancel` ends it with the error its client shall see."""

    def __init__(self, request_id: str, identity: Identity) -> None:
        self.id = request_id
        self.identity = identity
        self.error: Exception | None = None
        self._on_cancel: list[Callable[[Exception], None]] = []

    def cancel(self, error: Exception) -> None:
        """End it; only the first error counts."""
        if self.error is None:
            self.error = error
            for callback in self._on_cancel:
                callback(error)

    def on_cancel(self, callback: Callable[[Exception], None]) -> None:
        """Have `callback` called on cancellation, at once where that has happened."""
        self._on_cancel.append(callback)
        if self.error is not None:
            callback(self.error)

    def check(self) -> None:
        """Raise the error it was cancelled with."""
        if self.error is not None:
            raise self.error


class Running:
    """All jobs under way."""

    def __init__(self) -> None:
        self._jobs: set[Job] = set()
        self._places: dict[str, set[Job]] = {}
        """The jobs that count against each account's cap."""

    def __len__(self) -> int:
        return len(self._jobs)

    @contextmanager
    def admit(self, request_id: str, identity: Identity) -> Iterator[Job]:
        """Hold one of the account's places; raises 429 where all are taken."""
        if len(self._places.get(identity.account, ())) >= identity.concurrency:
            raise TooManyRequests(
                f"this tenant may run {identity.concurrency} requests at a time; let one end"
            )
        job = Job(request_id, identity)
        self._jobs.add(job)
        self._places.setdefault(identity.account, set()).add(job)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            self.release(job)

    def release(self, job: Job) -> None:
        """Free the job's place once the engine has ended its work; again does nothing.

        Called before an answer's last bytes: whoever has read those may send the next request.
        """
        places = self._places.get(job.identity.account, set())
        places.discard(job)
        if not places:
            self._places.pop(job.identity.account, None)

    def cancel_where(
        self, matches: Callable[[Identity], bool], make_error: Callable[[], Exception]
    ) -> int:
        """Cancel the jobs of matching identities and return how many they were."""
        chosen = [job for job in self._jobs if matches(job.identity)]
        for job in chosen:
            job.cancel(make_error())
        return len(chosen)
