"""One pass over the table, range by range, in transactions that aim at 25 ms of work, archived before they commit.

What is expired in some blocks is found in one transaction and deleted in others, each of which checks again and passes
over what the service has locked.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg

from opsctl.signals import held_back
from opsctl.stores import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.db import Connection
    from opsctl.stores.archive import Archive
    from opsctl.stores.keys import Expiry, Places

_AIM_S = 0.025
"""What a transaction's work is cut for: with the wait for the disk it then still stays below 0.1 s."""
_ATTEMPTS = 3


@dataclass(slots=True)
class Batch:
    """A number of rows, or of blocks, that adapts to what it takes."""

    size: int
    fewest: int
    most: int

    def adapt(self, done: int, seconds: float) -> None:
        """Towards `_AIM_S`, at most twice as many the next time, or a quarter; a small rest says nothing."""
        if done >= self.size or seconds > _AIM_S:
            factor = max(0.25, min(2.0, _AIM_S / seconds))
            self.size = max(self.fewest, min(self.most, int(done * factor)))


@dataclass(frozen=True, slots=True)
class Limits:
    """When a pass stops before the table's end, and how much it rests."""

    most_rows: int | None
    longest_s: float | None
    pause_ratio: float
    """Seconds of rest for each second of work."""
    remaining: Callable[[], float | None]


@dataclass(slots=True)
class Progress:
    """How far a pass has come."""

    deleted: Counter[tuple[str, str]] = field(default_factory=Counter)
    rows: int = 0
    locked: int = 0
    """Rows that another session had locked."""
    changed: int = 0
    """Rows that were found and written since, so that they are not expired any more."""
    transactions: int = 0
    longest_s: float = 0.0
    """The longest of all transactions, from BEGIN to the answer to COMMIT."""
    stopped: str = "done"
    """Why it ended: `done`, `max-rows`, `max-runtime` or `deadline`; whoever catches an exception knows better."""


class _Stop(Exception):
    """A limit was reached: which."""


class Pass:
    """Deletes what is expired, and counts in `progress` while it does."""

    def __init__(
        self,
        connection: Connection,
        expiry: Expiry,
        archive: Archive,
        limits: Limits,
        progress: Progress,
        advance: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._expiry = expiry
        self._archive = archive
        self._limits = limits
        self._advance = advance
        self._started = time.monotonic()
        self._blocks = Batch(256, fewest=8, most=2_048)
        self._rows = Batch(500, fewest=100, most=20_000)
        self.progress = progress

    def run(self, blocks: int) -> None:
        """Go through `blocks` blocks of every partition. Signals are answered between two transactions."""
        first = 0
        try:
            while first < blocks:
                end = min(first + self._blocks.size, blocks)
                for places in self._found(first, end):
                    self._delete(places)
                first = end
        except _Stop as stop:
            self.progress.stopped = str(stop)

    def _found(self, first: int, end: int) -> list[Places]:
        self._check()
        began = time.monotonic()
        with held_back(), self._counted():
            found = keys.find_expired(self._connection, self._expiry, first_block=first, end_block=end)
        self._blocks.adapt(end - first, time.monotonic() - began)
        return found

    def _delete(self, places: Places) -> None:
        start = 0
        while start < len(places):
            self._check()
            batch = places.cut(start, self._allowed())
            self._delete_batch(batch)
            start += len(batch)
            self._advance(self.progress.rows)

    def _delete_batch(self, batch: Places) -> None:
        began = time.monotonic()
        with held_back():
            deleted = self._deleted(batch)
            count = sum(deleted.values())
            self.progress.deleted.update(deleted)
            self.progress.rows += count
            if count < len(batch):
                locked = keys.count_still_expired(self._connection, self._expiry, batch)
                self.progress.locked += locked
                self.progress.changed += len(batch) - count - locked
        self._rest((time.monotonic() - began) * self._limits.pause_ratio)

    def _rest(self, seconds: float) -> None:
        """Sleep, but not past the moment at which the pass would stop anyway."""
        limits = self._limits
        until_stop = float("inf") if limits.longest_s is None else limits.longest_s - (time.monotonic() - self._started)
        remaining = limits.remaining()
        time.sleep(max(0.0, min(seconds, until_stop, float("inf") if remaining is None else remaining)))

    def _deleted(self, batch: Places) -> Counter[tuple[str, str]]:
        """One transaction; tried again where it lost a deadlock or a table was locked for a moment."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._counted(), self._archive.transaction(self._connection) as keep, self._adapting(batch):
                    return keys.delete_expired(self._connection, self._expiry, batch, keep)
            except (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Around a transaction, its commit too."""
        began = time.monotonic()
        yield
        self.progress.transactions += 1
        self.progress.longest_s = max(self.progress.longest_s, time.monotonic() - began)

    @contextmanager
    def _adapting(self, batch: Places) -> Iterator[None]:
        """Around what grows with the batch; waiting for a disk does not, and fewer rows would wait as long."""
        began = time.monotonic()
        yield
        self._rows.adapt(len(batch), time.monotonic() - began)

    def _allowed(self) -> int:
        """Rows of the next transaction."""
        most = self._limits.most_rows
        return self._rows.size if most is None else min(self._rows.size, most - self.progress.rows)

    def _check(self) -> None:
        limits = self._limits
        if limits.most_rows is not None and self.progress.rows >= limits.most_rows:
            raise _Stop("max-rows")
        if limits.longest_s is not None and time.monotonic() - self._started >= limits.longest_s:
            raise _Stop("max-runtime")
        if limits.remaining() == 0:
            raise _Stop("deadline")
