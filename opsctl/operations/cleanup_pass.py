"""One pass over the table, range by range, in short transactions, archived before they commit.

What is expired in some blocks is deleted at one stroke. Where the service has locked some of it, or a limit is near, it
is found in one transaction and deleted in others, each of which checks again and passes over what is locked.
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
    from opsctl.stores.keys import Expiry, Places, TableSizes

_AIM_S = 0.025
"""What a transaction's work is cut for: with the wait for the disk it then still stays below 0.1 s."""
_AIM_BESIDE_A_SERVICE_S = 0.008
_CHANGED_BESIDE_A_SERVICE = 4
"""Blocks, of all partitions together, that a transaction with a pause may change: whoever commits meanwhile waits
until its log is on the disk, and after a checkpoint that is 8 KiB a block. With 4, the p99 of upserts grew x 1.04 to
1.22, with 8 to 2.1, with 16 to 2.3, and with what 8 ms allow to 4.4 (benchmarks/cleanup.py)."""
_MOST_ROWS_IN_A_BLOCK = 291
"""MaxHeapTuplesPerPage of 8 KiB (PostgreSQL, src/include/access/htup_details.h)."""
_ATTEMPTS = 3


@dataclass(slots=True)
class Batch:
    """A number of rows, or of blocks, that adapts to what it takes."""

    size: int
    fewest: int
    most: int
    aim_s: float = _AIM_S
    most_changed: int | None = None

    def adapt(self, done: int, seconds: float, *, changed: int = 0) -> None:
        """Towards `aim_s`, at most twice as many the next time, or a quarter; a small rest says nothing.

        `changed` blocks were changed meanwhile; the next time no more than `most_changed` are, if they are as many of
        each.
        """
        if done >= self.size or seconds > self.aim_s:
            factor = max(0.25, min(2.0, self.aim_s / seconds))
            if self.most_changed is not None and changed:
                factor = min(factor, self.most_changed / changed)
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
        sizes: TableSizes,
        archive: Archive,
        limits: Limits,
        progress: Progress,
        advance: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._expiry = expiry
        self._sizes = sizes
        self._archive = archive
        self._limits = limits
        self._advance = advance
        self._started = time.monotonic()
        if limits.pause_ratio:
            most_changed = _CHANGED_BESIDE_A_SERVICE
            few = max(1, most_changed // sizes.parts)
            self._blocks = Batch(few, fewest=few, most=256, aim_s=_AIM_BESIDE_A_SERVICE_S, most_changed=most_changed)
            self._rows = Batch(100, fewest=100, most=20_000, aim_s=_AIM_BESIDE_A_SERVICE_S)
        else:
            self._blocks = Batch(16, fewest=4, most=256)
            self._rows = Batch(500, fewest=100, most=20_000)
        self.progress = progress

    def run(self) -> None:
        """Go through all blocks of every partition. Signals are answered between two transactions."""
        sizes, first = self._sizes, 0
        try:
            while first < sizes.blocks:
                blocks = range(first, min(first + self._blocks.size, sizes.blocks))
                most = len(blocks) * sizes.parts * _MOST_ROWS_IN_A_BLOCK
                if self._allowed(most) < most or not self._delete_range(blocks):
                    for places in self._found(blocks):
                        self._delete(places)
                first = blocks.stop
        except _Stop as stop:
            self.progress.stopped = str(stop)

    def _delete_range(self, blocks: range) -> bool:
        """Delete what is expired there at one stroke; False where some of it is locked, and nothing was deleted."""
        self._check()
        began = time.monotonic()
        with held_back():
            try:
                with self._counted(), self._archive.transaction(self._connection) as keep:
                    deleted = keys.delete_expired_range(self._connection, self._expiry, blocks, keep)
                    changed = min(len(blocks) * self._sizes.parts, deleted.total())
                    self._blocks.adapt(len(blocks), time.monotonic() - began, changed=changed)
            except (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
                return False
            count = self._count(deleted)
        if count:
            self._rest_after(began)
        return True

    def _found(self, blocks: range) -> list[Places]:
        self._check()
        with held_back(), self._counted():
            return keys.find_expired(self._connection, self._expiry, blocks)

    def _delete(self, places: Places) -> None:
        start = 0
        while start < len(places):
            self._check()
            batch = places.cut(start, self._allowed(self._rows.size))
            self._delete_batch(batch)
            start += len(batch)

    def _delete_batch(self, batch: Places) -> None:
        began = time.monotonic()
        with held_back():
            count = self._count(self._deleted(batch))
            if count < len(batch):
                locked = keys.count_still_expired(self._connection, self._expiry, batch)
                self.progress.locked += locked
                self.progress.changed += len(batch) - count - locked
        self._rest_after(began)

    def _count(self, deleted: Counter[tuple[str, str]]) -> int:
        count = deleted.total()
        self.progress.deleted.update(deleted)
        self.progress.rows += count
        self._advance(self.progress.rows)
        return count

    def _rest_after(self, began: float) -> None:
        """Sleep in proportion to the work since, but not past the moment at which the pass would stop anyway."""
        limits = self._limits
        seconds = (time.monotonic() - began) * limits.pause_ratio
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

    def _allowed(self, rows: int) -> int:
        """As many of these as `--max-rows` leaves."""
        most = self._limits.most_rows
        return rows if most is None else min(rows, most - self.progress.rows)

    def _check(self) -> None:
        limits = self._limits
        if limits.most_rows is not None and self.progress.rows >= limits.most_rows:
            raise _Stop("max-rows")
        if limits.longest_s is not None and time.monotonic() - self._started >= limits.longest_s:
            raise _Stop("max-runtime")
        if limits.remaining() == 0:
            raise _Stop("deadline")
