"""Who is being served: requests that have not ended, the sequence behind every entry, and what is still to
be closed. The event loop and the engine thread both come here, under the lock of ``changed``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items

from service.errors import ApiError
from service.jobs import Event, Job, groups_of
from service.pricing import Entries
from service.schedule import Entry, served_name
from service.scheduler import Scheduler
from service.sequences import Sequence


class Roster:
    """Every method wants ``changed`` held, except ``entries_of``."""

    def __init__(self, scheduler: Scheduler, entries: Entries, clock: Callable[[], float]) -> None:
        self.changed = threading.Condition()
        self.scheduler = scheduler
        self.jobs: dict[str, Job] = {}
        self._entries = entries
        self._clock = clock
        self._owners: dict[int, tuple[Job, Sequence]] = {}
        self._closing: list[tuple[str, Sequence]] = []

    def entries_of(self, job: Job, arrived: float) -> list[Entry]:
        """One entry for every input; without the lock, since the cache is asked about each prompt."""
        return [self._entries.group(job, members, arrived) for members in groups_of(job)]

    def admit(self, job: Job, entries: Items[Entry]) -> None:
        """Queue the request, or Rejected."""
        leaders = [members[0] for members in groups_of(job)]
        now = self._clock()
        self.scheduler.admit(entries)
        self.jobs[job.id] = job
        for entry, leader in zip(entries, leaders, strict=True):
            self._owners[entry.key] = (job, leader)
        job.times.submitted = now
        self.changed.notify_all()

    def owner(self, entry: Entry) -> tuple[Job, Sequence] | None:
        """None once the sequence is closed."""
        return self._owners.get(entry.key)

    def follow(self, job: Job, leader: Entry, followers: Items[Sequence]) -> None:
        """Choices that have forked from ``leader`` decode from now on."""
        now = self._clock()
        entries = [self._entries.follower(job, sequence, now) for sequence in followers]
        for entry, sequence in zip(entries, followers, strict=True):
            self._owners[entry.key] = (job, sequence)
        self.scheduler.fork(leader, entries)

    def finish(self, job: Job, sequence: Sequence) -> None:
        """A sequence is complete and closed."""
        if sequence.entry is not None:
            self.scheduler.release(sequence.entry, keeps_output=not job.complete)
            self._owners.pop(sequence.entry.key, None)
        if job.complete:
            self.end(job, None)

    def end(self, job: Job, error: ApiError | None) -> None:
        """The one way a request ends. Its caches are freed by the engine thread before the next step."""
        if job.ended:
            return
        job.ended, job.error, job.times.ended = True, error, self._clock()
        self.jobs.pop(job.id, None)
        self.scheduler.drop(job.id)
        name = job.model.info.name
        self._closing.extend((name, sequence) for sequence in job.sequences)
        self.changed.notify_all()
        event: Event = error
        job.channel.put([event])

    def end_all(self, error: ApiError) -> None:
        for job in list(self.jobs.values()):
            self.end(job, error)

    def close_ended(self, held: Collection[Sequence]) -> None:
        """Close what has ended, but for those ``held`` by a forward that is not over."""
        kept = []
        for model, sequence in self._closing:
            if sequence in held:
                kept.append((model, sequence))
                continue
            sequence.close()
            if sequence.entry is not None:
                self.scheduler.release(sequence.entry)
                self._owners.pop(sequence.entry.key, None)
        self._closing = kept

    def has_work(self, model: str) -> bool:
        """Whether a request of the served model has not ended, or one of its sequences is still open."""
        names = [job.model.info.name for job in self.jobs.values()] + [name for name, _ in self._closing]
        return any(served_name(name) == model for name in names)

    def names_of(self, model: str) -> set[str]:
        """The served model's own name, and those of what was made from it for single requests."""
        names = {job.model.info.name for job in self.jobs.values()}
        return {model, *(name for name in names if served_name(name) == model)}
