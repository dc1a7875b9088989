"""A warm copy of every company's sessions that never mirrors the disaster, and how old it is.

Most runs find that nothing has changed, by one query and a small file per company. Of a company that did change, only
the rows written since are read; the next generation is built beside the current one, shares the files that have not
changed with it, and is held against it before it takes its place. What looks like the disaster itself is *held*: the
copy stays as it is until `--accept`, or until the source has again what the copy has.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

import opsctl
from opsctl.baileys import credentials
from opsctl.baileys.filenames import CREDS_FILE, UnwritableName, folder_name, key_file_name
from opsctl.baileys.key_types import KNOWN, ExpiryPolicy
from opsctl.errors import AlreadyRunning, DatabaseUnavailable, HalfDone, OpsctlError, Refused
from opsctl.operations.sources import CLOCKS_DIFFER_S, moment
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores.folder import entries_of, opened, read_file
from opsctl.stores.live import Base, LiveDatabase, LiveFolders
from opsctl.stores.records import FileEntry, ManifestDamaged, Origin, Record
from opsctl.stores.staging import CompanyWriter, Order
from opsctl.stores.standby import Building, Built, Checked, Facts, Marks, State
from opsctl.stores.switch_record import read_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.stores.live import Found, Live
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.staging import Staged
    from opsctl.stores.standby import Copy, Standby

EVERYBODY = "@all"
"""In place of a company's id, which it cannot be: every company that is held."""
LARGEST_LOSS = 5
"""A company that loses more than one in so many of its keys is held."""
LIVE_LOSS = 100
"""But not where all but one in so many of them were past their retention: that was a cleanup."""
_EVERY_ONE = 5
"""So many keys of one type, and no other left: that is no ordinary day either."""
_SWITCHING = timedelta(minutes=15)
"""A switch that takes longer was left in the middle."""
_CLOCK_TOLERANCE = timedelta(seconds=1)
_BATCH_COMPANIES, _BATCH_FILES = 100, 50_000
_VERIFY_RUNS = 1440
"""In how many runs every copy is read back once: a day's, at a run a minute."""


@dataclass(frozen=True, slots=True)
class SyncWish:
    """What the operator, or cron, asked for."""

    run_id: str
    keep: timedelta
    retention: timedelta
    """What a cleanup may have deleted, by age."""
    companies: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    full: bool = False

    def accepts(self, company_id: str) -> bool:
        """Whether whatever happened to this company is to be copied."""
        return company_id in self.accept or EVERYBODY in self.accept

    def wants(self, company_id: str) -> bool:
        """Whether this run is about the company."""
        return not self.companies or company_id in self.companies


class Result(StrEnum):
    """What became of one company's copy."""

    NEW = "new"
    UPDATED = "updated"
    WOULD_COPY = "would copy"
    HELD = "held"
    """What the source has now was not applied."""
    RELEASED = "released"
    """It is not held any more: the source is again what the copy is."""
    LET_GO = "let go"
    """Its end was accepted."""
    DAMAGED = "damaged"
    """The copy was not as its manifest says; the next run makes it anew."""
    FAILED = "failed"
    """It could not be copied."""


_COPIED = frozenset({Result.NEW, Result.UPDATED, Result.WOULD_COPY})
_NOT_WELL = frozenset({Result.HELD, Result.DAMAGED, Result.FAILED})


@dataclass(frozen=True, slots=True)
class SyncRow:
    """One company of which there is something to say. Files are counted with creds.json."""

    company: str
    result: Result
    keys: int = 0
    written: int = 0
    removed: int = 0
    generation: str | None = None
    seconds: float | None = None
    reason: str | None = None
    held_since: str | None = None
    warnings: tuple[str, ...] = ()


_SYNC_COLUMNS = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("Keys", "keys", numeric=True),
    Column("Written", "written", numeric=True),
    Column("Removed", "removed", numeric=True),
    Column("s", "seconds", numeric=True),
    Column("Why", "reason"),
)


# A sync.


@contextmanager
def live_sessions(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]], sessions_dir: Path | None, *, now: datetime
) -> Iterator[Live]:
    """The folders while a switch is on record beside them, else the database.

    Raises `AlreadyRunning` while a switch is under way: neither is the truth that a copy should show. One that was left
    in the middle is `Refused`.
    """
    record = read_switch(sessions_dir) if sessions_dir is not None else None
    if record is not None and record.is_switching:
        words = f"a switch is under way since {record.since} ({record.phase}), so the copies stay as they are"
        if now - moment(record.since) < _SWITCHING:
            raise AlreadyRunning(words, hint="opsctl switch status")
        raise Refused(words, kind="half-switched", hint="opsctl switch status")
    if sessions_dir is not None and record is not None and record.folders_are_the_truth:
        yield LiveFolders(sessions_dir, now=now)
    else:
        with open_snapshot() as snapshot:
            yield LiveDatabase(snapshot)


@repeatable  # of the database; what it changes are copies, and one that was made is made again or stands
def sync_standby(
    open_live: Callable[[], AbstractContextManager[Live]],
    standby: Standby,
    wish: SyncWish,
    *,
    journal: Journal,
    now: datetime,
) -> Report:
    """Bring the wished companies' copies up to date.

    Raises `AlreadyRunning`, `DatabaseUnavailable`, `Refused`, or `HalfDone` where the disk gave up in the middle.
    """
    run = None
    try:
        with standby.syncing(), ExitStack() as opened_live:
            with journal.step("look for changes"):
                run = _Sync(opened_live.enter_context(open_live()), standby, wish, now)
                todo = run.look()
            with standby.locked(wish.run_id):
                standby.tidy(keep=wish.keep, now=now)
            if todo:
                with journal.step("copy what changed", total=len(todo)) as advance:
                    for done, (found, copy) in enumerate(todo, 1):
                        run.build(found, copy)
                        if run.batch_is_full:
                            run.publish()
                        advance(done)
            opened_live.close()
            with journal.step("publish and read back"):
                run.publish()
                run.read_back()
                run.remember()
    except OSError as error:
        raise _disk_failure(error, standby, half_done=run is not None and run.copied > 0) from None
    return _sync_report(run)


def _disk_failure(error: OSError, standby: Standby, *, half_done: bool) -> OpsctlError:
    kind = "disk-full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else None
    hint = f"df -h {standby.path}; df -i {standby.path}"
    message = f"the standby folder {standby.path} cannot be written: {error.strerror}"
    return (HalfDone if half_done else Refused)(message, kind=kind, hint=hint)


@repeatable
def preview_sync(
    open_live: Callable[[], AbstractContextManager[Live]],
    standby: Standby,
    wish: SyncWish,
    *,
    journal: Journal,
    now: datetime,
) -> Report:
    """What a sync would do: what changed is read and compared, nothing is written."""
    with open_live() as live:
        run = _Sync(live, standby, wish, now)
        with journal.step("look for changes"):
            todo = run.look()
        with journal.step("read and compare what changed", total=len(todo)) as advance:
            for done, (found, copy) in enumerate(todo, 1):
                run.preview(found, copy)
                advance(done)
    return _sync_report(run)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A company as it was read, and what the copy has besides or otherwise."""

    staged: Staged
    written: frozenset[str]
    removed: frozenset[str]
    lost: tuple[FileEntry, ...]
    """The copy's keys that are gone."""
    newest_at: str | None
    newest_kept: str | None
    """The newest change that the copy knows of what is still there."""
    went_back: bool
    """Whether anything is older than in the copy."""
    shares: bool
    """Whether it has files of the copy, which were not read back."""


class _Unlike(Exception):
    """What is said not to have changed is not what the copy has."""


class _Sync:
    """One run: looks, reads, publishes, and remembers, in this order; a preview only looks and reads."""

    def __init__(self, live: Live, standby: Standby, wish: SyncWish, now: datetime) -> None:
        self.live = live
        self.standby = standby
        self.wish = wish
        self.now = now
        self.at = now.isoformat(timespec="seconds")
        self.rows: dict[str, SyncRow] = {}
        self.warnings: list[str] = []
        self.unchanged: list[Copy] = []
        self.companies = 0
        self._held: list[Copy] = []
        self._published: dict[str, str] = {}
        self._states: dict[str, State] = {}
        self._leaving: list[Copy] = []
        self._built: list[tuple[Built, SyncRow]] = []

    @property
    def copied(self) -> int:
        """How many companies have a new copy, or would have one."""
        return sum(row.result in _COPIED for row in self.rows.values())

    def settle(self, row: SyncRow) -> None:
        self.rows[row.company] = row

    # Looking.

    def look(self) -> list[tuple[Found, Copy | None]]:
        """The companies that have to be read. The others are settled, or unchanged."""
        found = self.live.companies()
        copies = {copy.folder: copy for copy in self.standby.copies()}
        self._require_known({f.company_id for f in found} | {c.company_id for c in copies.values()})
        folders = Counter(_folder_of(f.company_id) for f in found if f.has_creds)
        todo = []
        for company in found:
            folder = _folder_of(company.company_id)
            copy = copies.pop(folder, None) if folder else None
            if not self.wish.wants(company.company_id):
                continue
            if folder is None:
                self._failed(ascii(company.company_id)[:60], None, "its id is not a company id")
            elif folders[folder] > 1 and company.has_creds:
                self._failed(company.company_id, copy, f"two companies would share the folder {folder}")
            elif not company.has_creds and copy is None:
                self.warnings.append(f"company {company.company_id} is not copied: it has keys and no credentials")
            elif not company.has_creds and copy is not None:
                self._missing(copy, "it has no credentials any more")
            elif self._has_to_be_read(company, copy):
                todo.append((company, copy))
        for copy in copies.values():
            if self.wish.wants(copy.company_id):
                self._missing(copy, self.live.gone)
        return todo

    def _require_known(self, known: set[str]) -> None:
        self.companies = len(known)
        unknown = sorted({*self.wish.companies, *self.wish.accept} - known - {EVERYBODY})
        if unknown:
            raise Refused(
                f"neither the {self.live.name} nor the standby has a company {', '.join(map(ascii, unknown))}",
                kind="unknown-company",
                hint="opsctl standby status",
            )

    def _has_to_be_read(self, found: Found, copy: Copy | None) -> bool:
        company = found.company_id
        if copy is None or self.wish.accepts(company):
            return True
        if copy.origin is not None and copy.damage is not None:
            self._failed(company, copy, f"{copy.path} is not ours to replace: {copy.damage}")
            return False
        state = copy.state
        marks = _marks(copy)
        if marks is None:
            return True
        reason = self.live.another_server(marks)
        if reason is not None:
            self._hold(company, copy, reason, digest=found.digest)
            return False
        if self.wish.full or not found.digest:
            return True
        if (marks.source, marks.digest) == (self.live.name, found.digest):
            if state.held:
                self._states[company] = replace(state, held=None, held_since=None, held_digest=None)
                row = SyncRow(company, Result.RELEASED, copy.key_count or 0, generation=copy.generation)
                self.settle(replace(row, reason="it is again what the copy is"))
            self.unchanged.append(copy)
            return False
        if state.held and state.held_digest == found.digest:
            self._hold(company, copy, state.held, digest=found.digest)
            return False
        return True

    def _missing(self, copy: Copy, reason: str) -> None:
        """The source does not have this company, or not its credentials."""
        if self.wish.accepts(copy.company_id):
            self._leaving.append(copy)
            row = SyncRow(copy.company_id, Result.LET_GO, copy.key_count or 0, generation=copy.generation)
            self.settle(replace(row, reason=reason))
        else:
            self._hold(copy.company_id, copy, reason, digest="")

    def _hold(self, company: str, copy: Copy, reason: str, *, digest: str) -> None:
        state = copy.state
        held = replace(state, held=reason, held_since=state.held_since or self.at, held_digest=digest or None)
        self._states[company] = held
        if copy.damage is None:
            self._held.append(copy)
        row = SyncRow(company, Result.HELD, copy.key_count or 0, generation=copy.generation)
        self.settle(replace(row, reason=reason, held_since=held.held_since))

    def _failed(self, company: str, copy: Copy | None, reason: str) -> None:
        generation = copy.generation if copy else None
        self.settle(SyncRow(company, Result.FAILED, generation=generation, reason=reason))

    # Reading.

    def build(self, found: Found, copy: Copy | None) -> None:
        """Read one company into its next generation."""
        company = found.company_id
        read = self._read(found, copy, write=True)
        if read is None:
            self.standby.abandon(company)
            return
        taken, row = read
        number = self.standby.next_generation(company)
        staged = taken.staged
        facts = Facts(number, self.at, staged.key_count, staged.keys_by_type, taken.newest_at, staged.me_sha256)
        verified_at = copy.state.verified_at if copy is not None and taken.shares else self.at
        state = State(number, synced_at=self.at, verified_at=verified_at, marks=self.live.marks(found.digest))
        base = copy.generation if copy is not None and copy.damage is None else None
        built = Built(company, facts, state, base, taken.written | taken.removed)
        self._built.append((built, replace(row, generation=number)))

    def preview(self, found: Found, copy: Copy | None) -> None:
        """Read one company, and settle what would become of it."""
        read = self._read(found, copy, write=False)
        if read is not None:
            self.settle(replace(read[1], result=Result.WOULD_COPY))

    def _read(self, found: Found, copy: Copy | None, *, write: bool) -> tuple[_Taken, SyncRow] | None:
        """What was read and what is to be said of it; None where it was settled: held, or failed."""
        company, started = found.company_id, time.monotonic()
        marks = None if self.wish.full or self.wish.accepts(company) else _marks(copy)
        if marks is not None and not self.live.can_tell_changes(marks):
            marks = None
        try:
            try:
                taken = self._take(company, copy, marks, write=write)
            except _Unlike:
                taken = self._take(company, copy, None, write=write)
        except DatabaseUnavailable as error:
            if error.kind != "corrupt":
                raise
            self._failed(company, copy, error.message)
            return None
        except OSError as error:
            self._failed(company, copy, f"it cannot be copied: {error.strerror}")
            return None
        if taken is None:
            self._failed(company, copy, "its credentials were gone when they were read")
            return None
        if taken.staged.damage is not None:
            self._failed(company, copy, taken.staged.damage)
            return None
        if copy is not None and not self.wish.accepts(company):
            reason = self._reason_to_hold(copy, taken)
            if reason is not None:
                self._hold(company, copy, reason, digest=found.digest)
                return None
        return taken, SyncRow(
            company,
            Result.NEW if copy is None else Result.UPDATED,
            keys=taken.staged.key_count,
            written=len(taken.written),
            removed=len(taken.removed),
            seconds=round(time.monotonic() - started, 2),
            warnings=(*self.live.left_as_it_was(), *taken.staged.unusable),
        )

    def _take(self, company: str, copy: Copy | None, marks: Marks | None, *, write: bool) -> _Taken | None:
        """Read a company: what `marks` say has not changed is shared with the copy. None: it has no credentials."""
        with ExitStack() as stack:
            base_fd = stack.enter_context(_base(copy))
            base = Base(base_fd, _entries(base_fd) if base_fd is not None else {}, marks)
            creds = self.live.creds(company, base)
            if creds is None:
                return None
            building = Building(None, {})
            if write:
                building = stack.enter_context(self.standby.building(company, reuse=marks is not None))
            order = Order(
                folder=folder_name(company),
                creds=creds[0],
                creds_updated_at=creds[1],
                origin=self._origin(company),
                busy_since=self.live.at,
                fresh=False,
                drop_stale=False,
                as_stored=True,
            )
            reader = _Reader(CompanyWriter(order, building.fd), base, building, self.live.at)
            reader.notice(CREDS_FILE, creds[1])
            records = self.live.records(company, base)
            try:
                for record in records:
                    reader.add(record)
            except (_Unlike, OSError):
                deque(records, maxlen=0)  # the connection is of use again only when the last row was taken
                raise
            return reader.finish()

    def _origin(self, company: str) -> Origin:
        return Origin(
            company_id=company,
            run_id=self.wish.run_id,
            environment=self.standby.environment,
            source="standby",
            snapshot_at=self.live.at,
            system_identifier=self.live.system_identifier,
            timeline=self.live.timeline,
            me_sha256=None,
            service_stopped="unknown",
            stale_keys_dropped=False,
            opsctl=opsctl.__version__,
        )

    def _reason_to_hold(self, copy: Copy, taken: _Taken) -> str | None:
        """Why what the source has now looks like the disaster, and is not to replace the copy."""
        staged = taken.staged
        if copy.me_sha256 is not None and staged.me_sha256 != copy.me_sha256:
            new = f"another one ({staged.me_sha256[:12]}, not {copy.me_sha256[:12]})" if staged.me_sha256 else "gone"
            return f"its me.id is {new}"
        if staged.unusable and (copy.damage is not None or not _unusable(copy)):
            return f"its credentials cannot log in any more: {'; '.join(staged.unusable)}"
        lost = Counter(entry.key_type for entry in taken.lost)
        if not lost and (copy.key_count or 0) > staged.key_count:  # its manifest is torn, but its keys were counted
            lost = Counter(copy.keys_by_type) - Counter(staged.keys_by_type)
        retained = self._retained(taken.lost) if taken.lost else lost
        for key_type, count in retained.items():
            never = key_type in KNOWN and KNOWN[key_type].expiry is ExpiryPolicy.NEVER
            if (never or count >= _EVERY_ONE) and not staged.keys_by_type.get(key_type):
                return f"it lost all of its {lost[key_type]:,} {key_type} keys"
        before = copy.key_count or 0
        if lost.total() * LARGEST_LOSS > before and retained.total() * LIVE_LOSS > before:
            kinds = ", ".join(f"{count} {key_type}" for key_type, count in lost.most_common(3))
            return f"it lost {lost.total():,} of its {before:,} keys ({kinds})"
        if _is_before(taken.newest_at, taken.newest_kept) and not _is_before(self.live.at, taken.newest_kept):
            return f"its newest change went back from {taken.newest_kept} to {taken.newest_at}"
        return copy.held if copy.held is not None and taken.went_back else None

    def _retained(self, lost: Iterable[FileEntry]) -> Counter[str]:
        """Of these, by type, those that no cleanup may delete: all but what is past its expiry and the retention."""
        at = self.live.at
        oldest = f"{datetime.fromisoformat(at).astimezone(UTC) - self.wish.retention:%Y-%m-%d %H:%M:%S.%f}+00"
        return Counter(
            entry.key_type
            for entry in lost
            if not (
                entry.key_type in KNOWN
                and KNOWN[entry.key_type].expiry is ExpiryPolicy.PAST_RETENTION
                and entry.expires_at is not None
                and entry.expires_at < at
                and entry.updated_at is not None
                and entry.updated_at < oldest
            )
        )

    # Publishing.

    @property
    def batch_is_full(self) -> bool:
        files = sum(row.keys for _, row in self._built)
        return len(self._built) >= _BATCH_COMPANIES or files >= _BATCH_FILES

    def publish(self) -> None:
        """Make what was built durable, then current, company by company."""
        batch, self._built = self._built, []
        leaving, self._leaving = self._leaving, []
        if not batch and not leaving:
            return
        self.standby.sync()
        with self.standby.locked(self.wish.run_id):
            for built, row in batch:
                try:
                    self.standby.publish(built)
                    self.standby.prune(built.company_id, keep=self.wish.keep, now=self.now)
                except OSError as error:
                    self.settle(replace(row, result=Result.FAILED, reason=f"it cannot be copied: {error.strerror}"))
                else:
                    self._published[built.company_id] = built.state.verified_at or ""
                    self.settle(row)
            for copy in leaving:
                gone = self.standby.let_go(copy, now=self.now)
                row = self.rows[copy.company_id]
                self.settle(replace(row, reason=f"{row.reason}; its last copies stay in {gone} for a while"))

    def read_back(self) -> None:
        """Hold some copies against their manifests, all of them in turn, and make the ready ones that are missing."""
        kept = {copy.company_id: copy for copy in (*self.unchanged, *self._held)}
        verified = {company: copy.verified_at or "" for company, copy in kept.items()} | self._published
        due = sorted(verified, key=lambda company: verified[company])[: -(-len(verified) // _VERIFY_RUNS)]
        for company in due:
            self._verify(company)
        for company, copy in kept.items():
            if copy.ready is None and company not in due:
                self._mend(copy)

    def _verify(self, company: str) -> None:
        copy = self.standby.copy(company)
        if copy is None or copy.damage is not None:
            return
        state = self._states.get(company, copy.state)
        damage = self.standby.damage(copy.path, company_id=company)
        if damage is not None:
            self._states[company] = replace(state, marks=None)
            row = SyncRow(company, Result.DAMAGED, copy.key_count or 0, generation=copy.generation)
            self.settle(replace(row, reason=f"{damage}; the next sync makes it anew"))
            return
        self._states[company] = replace(state, verified_at=self.at)
        with self.standby.locked(self.wish.run_id):
            self.standby.prune(company, keep=self.wish.keep, now=self.now)
        if copy.ready is None or self.standby.damage(copy.ready, company_id=company) is not None:
            self._mend(copy)

    def _mend(self, copy: Copy) -> None:
        try:
            with self.standby.locked(self.wish.run_id):
                self.standby.rebuild_ready(copy.company_id)
        except OSError as error:
            self._failed(copy.company_id, copy, f"its ready copy cannot be made: {error.strerror}")

    def remember(self) -> None:
        """Write down what was found, for the next run and for `standby status`."""
        missed = [company for company, row in self.rows.items() if row.result in _NOT_WELL]
        with self.standby.locked(self.wish.run_id):
            for copy in self.unchanged:
                state = self._states.get(copy.company_id, copy.state)
                # A time still to come was written before the clock was set back.
                if self.wish.companies or (state.synced_at or "") > self.at:
                    self._states[copy.company_id] = replace(state, synced_at=self.at)
            for company, state in self._states.items():
                self.standby.remember(company, state)
            if not self.wish.companies:
                self.standby.remember_check(Checked(self.at, tuple(sorted(missed)), self.live.name))


class _Reader:
    """Passes a company's records on to its writer, and takes note of what the copy has besides or otherwise."""

    def __init__(self, writer: CompanyWriter, base: Base, building: Building, server_at: str) -> None:
        self._writer = writer
        self._base = base.entries
        self._base_fd = base.fd
        self._fd = building.fd
        self._spare = dict(building.there)
        self._server_at = server_at
        self._there: set[str] = set()
        self._written: set[str] = {CREDS_FILE}
        self._newest = self._newest_kept = ""
        self._went_back = False

    def notice(self, name: str, updated_at: str | None) -> None:
        """A file is still there, with this time."""
        self._there.add(name)
        at, old = updated_at or "", self._base.get(name)
        self._newest = max(self._newest, at)
        if old is not None and old.updated_at:
            self._newest_kept = max(self._newest_kept, old.updated_at)
            self._went_back = self._went_back or at < old.updated_at <= self._server_at

    def add(self, record: Record) -> None:
        """Raises `_Unlike` where an unchanged record is not as the copy has it."""
        key_type, key_id, value, updated_at, expires_at, _ = record
        try:
            name = key_file_name(key_type, key_id)
        except UnwritableName:
            if not value:
                raise _Unlike from None
            self._writer.add(record)  # which lists it as left out
            return
        self.notice(name, updated_at)
        if value:
            self._written.add(name)
            self._take_out(name)
            self._writer.add(record)
            return
        old = self._base.get(name)
        if old is None or (old.key_type, old.key_id, old.updated_at, old.expires_at) != (
            key_type,
            key_id,
            updated_at,
            expires_at,
        ):
            raise _Unlike
        if name in self._written:  # two rows want one file: for a reading of both
            raise _Unlike
        if self._fd is not None and self._spare.get(name) != old.sha256:
            self._take_out(name)
            try:
                os.link(name, name, src_dir_fd=self._base_fd, dst_dir_fd=self._fd, follow_symlinks=False)
            except FileNotFoundError:
                raise _Unlike from None
        self._spare.pop(name, None)
        self._writer.keep(name, old)

    def _take_out(self, name: str) -> None:
        if self._spare.pop(name, None) is not None:
            os.unlink(name, dir_fd=self._fd)

    def finish(self) -> _Taken:
        for name in tuple(self._spare):
            self._take_out(name)
        gone = self._base.keys() - self._there
        return _Taken(
            staged=self._writer.finish(),
            written=frozenset(self._written),
            removed=frozenset(gone),
            lost=tuple(self._base[name] for name in gone),
            newest_at=self._newest or None,
            newest_kept=self._newest_kept or None,
            went_back=self._went_back,
            shares=bool(self._there - self._written),
        )


def _marks(copy: Copy | None) -> Marks | None:
    """By what to see whether a company has changed; None where nothing is remembered of this copy."""
    if copy is None or copy.damage is not None or copy.state.generation != copy.generation:
        return None
    return copy.state.marks


@contextmanager
def _base(copy: Copy | None) -> Iterator[int | None]:
    """The copy that the next generation is made from and held against; None where there is none to be used."""
    if copy is None or copy.damage is not None:
        yield None
        return
    with opened(copy.path) as fd:
        yield fd


def _entries(fd: int) -> dict[str, FileEntry]:
    """The files that a folder's manifest lists; none where it cannot be read."""
    try:
        return dict(entries_of(fd))
    except (ManifestDamaged, OSError):
        return {}


def _unusable(copy: Copy) -> bool:
    """Whether the copy's own credentials cannot log in."""
    with opened(copy.path) as fd:
        return credentials.examine(read_file(fd, CREDS_FILE)).unusable


def _is_before(one: str | None, other: str | None) -> bool:
    """Of two times in PostgreSQL's text, whether the first is earlier by more than files and clocks differ."""
    if not one or not other:
        return False
    try:
        return datetime.fromisoformat(one) + _CLOCK_TOLERANCE < datetime.fromisoformat(other)
    except (ValueError, OverflowError):  # `infinity`, or a year that Python has not
        return one < other


def _folder_of(company_id: str) -> str | None:
    try:
        return folder_name(company_id)
    except UnwritableName:
        return None


def _sync_report(run: _Sync) -> Report:
    rows = [run.rows[company] for company in sorted(run.rows)]
    counts = Counter(row.result for row in rows)
    bad = [row for row in rows if row.result in _NOT_WELL]
    verb = "would be copied, nothing was changed" if counts[Result.WOULD_COPY] else "copied"
    what = [f"{run.copied} of {run.companies} companies {verb}", f"{len(run.unchanged)} unchanged"]
    what += [f"{counts[result]} {result}" for result in (*sorted(_NOT_WELL), Result.LET_GO) if counts[result]]
    warnings = [*run.warnings, *(f"{row.company}: {warning}" for row in rows for warning in row.warnings)]
    return Report(
        summary=f"{', '.join(what)}; in {run.standby.path}",
        rows=rows,
        columns=_SYNC_COLUMNS,
        facts={
            "standby": str(run.standby.path),
            "source": run.live.name,
            "at": run.at,
            "companies": run.companies,
            "copied": run.copied,
            "unchanged": len(run.unchanged),
            "held": counts[Result.HELD],
        },
        warnings=warnings,
        exit_code=1 if bad else 0,
        failure=_sync_failure(bad),
        companies=[row.company for row in bad],
    )


def _sync_failure(bad: Sequence[SyncRow]) -> Failure | None:
    if not bad:
        return None
    named = "; ".join(f"{row.company}: {row.reason}" for row in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    held = [row.company for row in bad if row.result is Result.HELD]
    if not held:
        return Failure("not-copied", f"copies that are not well ({len(bad)}): {named}{more}", "opsctl standby status")
    which = held[0] if len(held) == 1 else EVERYBODY
    return Failure(
        "held",
        f"copies that stay as they were ({len(bad)}): {named}{more}",
        f"opsctl standby status; only where that was meant: opsctl standby sync --accept {which}",
    )


# Its age.


@dataclass(frozen=True, slots=True)
class StatusRow:
    """One company's copy. `age_s` is how long ago it was last known to be equal to the live sessions: the RPO."""

    company: str
    state: str
    age_s: float | None
    synced_at: str | None
    keys: int | None
    keys_by_type: dict[str, int]
    newest_at: str | None
    generation: str
    generations: int
    ready: bool
    verified_age_s: float | None
    held: str | None
    held_since: str | None
    damage: str | None

    @property
    def age(self) -> str:
        """For people."""
        return _age(self.age_s)

    @property
    def verified(self) -> str:
        """For people."""
        return _age(self.verified_age_s)

    @property
    def why(self) -> str | None:
        """What is wrong, for people."""
        return self.damage or self.held


_STATUS_COLUMNS = (
    Column("Company", "company"),
    Column("State", "state"),
    Column("Age", "age", numeric=True),
    Column("Keys", "keys", numeric=True),
    Column("Copies", "generations", numeric=True),
    Column("Ready", "ready"),
    Column("Verified", "verified", numeric=True),
    Column("Why", "why"),
)


def standby_status(standby: Standby, *, companies: tuple[str, ...], max_age: timedelta, now: datetime) -> Report:
    """How old each copy is, and what is wrong with it; 1 where one is too old, held or damaged, or there is none.

    Raises `Refused` for a company that has no copy.
    """
    copies = standby.copies()
    unknown = sorted(set(companies) - {copy.company_id for copy in copies})
    if unknown:
        raise Refused(
            f"the standby has no company {', '.join(map(ascii, unknown))}",
            kind="unknown-company",
            hint="opsctl standby status",
        )
    wanted = [copy for copy in copies if not companies or copy.company_id in companies]
    rows = [_status_row(standby, copy, max_age, now) for copy in wanted]
    known = [row.age_s for row in rows if row.age_s is not None and row.state not in {"damaged", _OF_UNKNOWN_AGE}]
    worst = max(known, default=None)
    checked = standby.checked()
    report = Report(
        summary=f"{len(rows)} warm copies in {standby.path}; "
        + ("none can be used" if worst is None else f"restoring from them now would lose at most {_age(worst)}"),
        rows=rows,
        columns=_STATUS_COLUMNS,
        notes=[_generations(standby, company, now) for company in companies],
        facts={
            "standby": str(standby.path),
            "rpo_s": worst,
            "max_age_s": max_age.total_seconds(),
            "checked_at": checked.at if checked else None,
            "source": checked.source if checked else None,
        },
    )
    if not rows:
        failure = Failure("no-standby", f"there are no warm copies in {standby.path}", "opsctl standby sync")
        return replace(report, summary=failure.message, exit_code=1, failure=failure)
    bad = [row for row in rows if row.state != _IN_ORDER]
    if not bad:
        return report
    return replace(report, exit_code=1, failure=_status_failure(bad), companies=[row.company for row in bad])


_IN_ORDER = "ok"
_OF_UNKNOWN_AGE = "of unknown age"
"""Its time is missing, or still to come: then a clock was set back."""


def _generations(standby: Standby, company: str, now: datetime) -> str:
    """What `sessions restore --generation` can take, newest first."""
    taken = (
        f"{copy.generation} ({_age(_seconds_since(copy.synced_at, now))} ago)" for copy in standby.generations(company)
    )
    return f"generations of {company}: {', '.join(taken)}"


def _status_row(standby: Standby, copy: Copy, max_age: timedelta, now: datetime) -> StatusRow:
    age_s = _seconds_since(copy.synced_at, now)
    if copy.damage is not None:
        state = "damaged"
    elif copy.held is not None:
        state = "held"
    elif age_s is None or age_s < -CLOCKS_DIFFER_S:
        state = _OF_UNKNOWN_AGE
    elif age_s > max_age.total_seconds():
        state = "too old"
    else:
        state = _IN_ORDER
    return StatusRow(
        company=copy.company_id,
        state=state,
        age_s=age_s,
        synced_at=copy.synced_at,
        keys=copy.key_count,
        keys_by_type=dict(copy.keys_by_type),
        newest_at=copy.newest_at,
        generation=copy.generation,
        generations=standby.generation_count(copy.folder),
        ready=copy.ready is not None,
        verified_age_s=_seconds_since(copy.verified_at, now),
        held=copy.held,
        held_since=copy.held_since,
        damage=copy.damage,
    )


def _status_failure(bad: Sequence[StatusRow]) -> Failure:
    named = "; ".join(
        f"{row.company} is {row.state}{f': {row.why}' if row.why else f' ({row.age})'}" for row in bad[:5]
    )
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    states = {row.state for row in bad}
    kind = "damaged" if "damaged" in states else "held" if "held" in states else "too-old"
    hint = "opsctl standby sync"
    if states == {"held"}:
        which = bad[0].company if len(bad) == 1 else EVERYBODY
        hint = f"look at the database; only where that was meant: opsctl standby sync --accept {which}"
    return Failure(kind, f"warm copies that are not in order ({len(bad)}): {named}{more}", hint)


def _seconds_since(moment: str | None, now: datetime) -> float | None:
    return None if moment is None else round((now - datetime.fromisoformat(moment)).total_seconds(), 1)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
