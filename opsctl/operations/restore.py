"""PostgreSQL -> Baileys session folders: read one snapshot, stage and read back, sync, exchange.

Companies are independent: one that cannot be restored does not delay the others, and is named.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import opsctl
from opsctl.baileys.filenames import UnwritableName, folder_name
from opsctl.errors import DatabaseUnavailable, OpsctlError, Refused, SourceUnavailable
from opsctl.report import Column, Failure, Report
from opsctl.stores.folder import Holding, opened
from opsctl.stores.publishing import SessionsRoot, Staging, check_root, locked_root, readable_root
from opsctl.stores.records import Origin
from opsctl.stores.staging import Order, Staged
from opsctl.stores.writers import ABORT, END, Advanced, Compared, Workplace, Writers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.stores.postgres import Snapshot, Tenant
    from opsctl.stores.publishing import Owner
    from opsctl.stores.staging import LeftOut

    Remaining = Callable[[], float | None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for."""

    target: Path
    owner: Owner
    environment: str
    run_id: str
    companies: tuple[str, ...] = ()
    service_stopped: bool = False
    drop_stale: bool = False
    replace_foreign: bool = False
    discard_changes: bool = False
    accept_damaged: bool = False


class Result(StrEnum):
    """What became of one company."""

    RESTORED = "restored"
    UNCHANGED = "unchanged"
    WOULD_RESTORE = "would restore"
    REFUSED = "refused"
    """The folder in place, or the id, forbids it."""
    DAMAGED = "damaged"
    """The source's credentials or rows cannot be used."""
    LATE = "too late"
    """The deadline, or a disk that gave up, came first."""


@dataclass(frozen=True, slots=True)
class CompanyRow:
    """One company in the answer. Files are counted with creds.json, keys without."""

    company: str
    folder: str
    result: Result
    keys: int = 0
    keys_by_type: Mapping[str, int] | None = None
    pre_keys: int = 0
    sessions: int = 0
    sender_keys: int = 0
    other_keys: int = 0
    files_restored: int = 0
    files_updated: int = 0
    files_unchanged: int = 0
    files_set_aside: int = 0
    busy_chats: int = 0
    dropped_keys: int = 0
    left_out: tuple[LeftOut, ...] = ()
    warning_count: int = 0
    warnings: tuple[str, ...] = ()
    copy: str = ""
    seconds: float | None = None
    reason: str | None = None

    @property
    def copy_in_a_word(self) -> str:
        """`copy` for a table of 80 columns; the warning below it has the whole sentence."""
        return "stale?" if self.copy == "possibly stale" else self.copy


_COLUMNS = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("Keys", "keys", numeric=True),
    Column("Pre-key", "pre_keys", numeric=True),
    Column("Session", "sessions", numeric=True),
    Column("Sender", "sender_keys", numeric=True),
    Column("Warn", "warning_count", numeric=True),
    Column("Copy", "copy_in_a_word"),
    Column("s", "seconds", numeric=True),
)
_PREVIEW_COLUMNS = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("Restored", "files_restored", numeric=True),
    Column("Updated", "files_updated", numeric=True),
    Column("Unchanged", "files_unchanged", numeric=True),
    Column("Set aside", "files_set_aside", numeric=True),
    Column("Warn", "warning_count", numeric=True),
)


@dataclass(slots=True)
class _Work:
    """What is known while a restore runs."""

    wish: Wish
    rows: dict[str, CompanyRow]
    staged: dict[str, Staged]
    warnings: list[str]
    details: list[str]
    facts: dict[str, Any]

    def settle(self, row: CompanyRow) -> None:
        self.rows[row.company] = row


def restore(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]], wish: Wish, *, journal: Journal, remaining: Remaining
) -> Report:
    """Restore the wished companies into `wish.target` and say how it went.

    Raises `DatabaseUnavailable`, `Refused`, `Locked`, all with nothing changed.
    """
    check_root(wish.target, wish.owner)
    staging = None
    with ExitStack() as database:
        snapshot, work, tenants = _begin(database, open_snapshot, wish, journal)
        try:
            with locked_root(wish.target, wish.owner, run_id=wish.run_id) as root:
                for run_id in root.recover():
                    work.details.append(f"run {run_id} was killed; what it left was tidied up")
                with root.staging(wish.run_id) as staging:
                    place = Workplace(wish.target, root.fd, staging.building_fd, wish.owner, wish.environment)
                    with Writers(place) as writers:
                        with staging.flushing():
                            _copy(snapshot, tenants, writers, work, journal=journal, remaining=remaining)
                        database.close()
                        compared = _verify(staging, writers, work, journal=journal, remaining=remaining)
                    _publish(root, staging, compared, work, journal=journal, remaining=remaining)
        except (OpsctlError, OSError) as error:
            if staging is None or not staging.published:
                raise
            _settle_the_rest(work, error)
    return _report(work)


def _settle_the_rest(work: _Work, error: OpsctlError | OSError) -> None:
    """After something was published an error is no answer any more: what stands in place is, and what is missing."""
    wish = work.wish
    reason = error.message if isinstance(error, OpsctlError) else f"{wish.target}: {error.strerror}"
    with readable_root(wish.target, wish.owner) as root:
        standing = root.published_by(wish.run_id) if root else []
    late = [row for row in work.rows.values() if row.result is Result.RESTORED and row.folder not in standing]
    for row in late:
        work.settle(replace(row, result=Result.LATE, reason=reason))
    if not late:
        work.warnings.append(f"everything is in place, but what came after did not end well: {reason}")


def preview_restore(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]], wish: Wish, *, journal: Journal, remaining: Remaining
) -> Report:
    """What `restore` would do: everything is read, normalised and compared, nothing is written."""
    check_root(wish.target, wish.owner)
    with ExitStack() as database:
        snapshot, work, tenants = _begin(database, open_snapshot, wish, journal)
        with _readable(wish.target) as root_fd:
            place = Workplace(wish.target, root_fd, None, wish.owner, wish.environment)
            with Writers(place) as writers:
                compared = _copy(snapshot, tenants, writers, work, journal=journal, remaining=remaining)
    for found in compared.values():
        if (row := _row_unless_refused(found, work)) is not None:
            result = Result.UNCHANGED if found.identical else Result.WOULD_RESTORE
            work.settle(replace(row, result=result))
    needed = sum(staged.allocated_bytes for staged in work.staged.values())
    free = _free_bytes(wish.target)
    work.facts |= {"space_needed_bytes": needed, "space_free_bytes": free}
    if free < needed:
        work.warnings.append(f"{needed:,} bytes are needed at {wish.target} and {free:,} are free")
    return _preview_report(work)


@contextmanager
def _readable(target: Path) -> Iterator[int | None]:
    if not target.exists():
        yield None
        return
    with opened(target) as fd:
        yield fd


def _free_bytes(target: Path) -> int:
    status = os.statvfs(target if target.exists() else target.parent)
    return status.f_bavail * status.f_frsize


def _begin(
    database: ExitStack,
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]],
    wish: Wish,
    journal: Journal,
) -> tuple[Snapshot, _Work, list[Tenant]]:
    with journal.step("connect to PostgreSQL"):
        snapshot = database.enter_context(open_snapshot())
        everybody = snapshot.tenants()
    server = snapshot.server
    work = _Work(wish, {}, {}, [], [], {})
    work.facts |= {
        "target": str(wish.target),
        "owner": wish.owner.name,
        "source": "database",
        "snapshot_at": server.snapshot_at,
        "system_identifier": server.system_identifier,
        "timeline": server.timeline,
        "in_recovery": server.in_recovery,
        "service_stopped": "operator" if wish.service_stopped else "unknown",
    }
    if snapshot.damage:
        work.warnings.append(f"the table of keys is damaged, so each company is tried by itself: {snapshot.damage}")
    if snapshot.pooled:
        work.warnings.append(
            "PostgreSQL is reached through a transaction pooler: its own timeouts apply, and a step that is given up "
            "here may go on there"
        )
    if server.system_identifier is None:
        work.details.append(
            "the role may not read the server's identity; the way back will not recognise the server by it"
        )
    return snapshot, work, _select(everybody, work)


def _select(everybody: Sequence[Tenant], work: _Work) -> list[Tenant]:
    """The companies to restore. Those that cannot be are settled as refused; raises where nothing was asked rightly."""
    wish = work.wish
    if not any(tenant.has_creds for tenant in everybody):
        raise DatabaseUnavailable("the database holds no credentials: whatsapp_auth is empty", kind="no-rows")
    known = {tenant.company_id: tenant for tenant in everybody}
    unknown = sorted(set(wish.companies) - known.keys())
    if unknown:
        raise Refused(
            f"the database has no company {', '.join(map(ascii, unknown))}",
            kind="unknown-company",
            hint="opsctl sessions list",
        )
    wanted = [known[company] for company in sorted(set(wish.companies))] if wish.companies else list(everybody)
    folders = Counter(_folder_of(tenant.company_id) for tenant in everybody if tenant.has_creds)
    selected = []
    for tenant in wanted:
        company = tenant.company_id
        folder = _folder_of(company)
        if folder is None:
            reason = "its id is not a company id and could leave the folder"
            work.settle(CompanyRow(ascii(company)[:60], "", Result.REFUSED, reason=reason))
        elif folders[folder] > 1 and tenant.has_creds:
            twins = sorted(t.company_id for t in everybody if t.has_creds and _folder_of(t.company_id) == folder)
            reason = f"the companies {' and '.join(twins)} would share the folder {folder}"
            work.settle(CompanyRow(company, folder, Result.REFUSED, reason=reason))
        elif not tenant.has_creds:
            reason = f"it has {tenant.key_count} keys and no credentials"
            if wish.companies:
                work.settle(CompanyRow(company, folder, Result.DAMAGED, reason=reason))
            else:
                work.warnings.append(f"company {company} is left out: {reason}")
        else:
            selected.append(tenant)
    return selected


def _folder_of(company_id: str) -> str | None:
    try:
        return folder_name(company_id)
    except UnwritableName:
        return None


class _Listener:
    """Hears what writers reply while companies are copied."""

    def __init__(self, writers: Writers, work: _Work, advance: Callable[[int], None], remaining: Remaining) -> None:
        self._writers = writers
        self._work = work
        self._advance = advance
        self._remaining = remaining
        self._keys = 0
        self.began: dict[str, float] = {}
        self.compared: dict[str, Compared] = {}

    def hear_what_came(self) -> None:
        while not self._writers.replies.empty():
            self._hear()

    def hear_all(self) -> None:
        """Until every company that was begun is staged, and compared where writers compare at once."""
        work, expected = self._work, len(self.began)
        while len(work.staged) < expected or (self._writers.previewing and len(self.compared) < expected):
            self._hear()

    def _hear(self) -> None:
        reply = self._writers.wait(self._remaining)
        if isinstance(reply, Advanced):
            self._keys += reply.keys
            self._advance(self._keys)
        elif isinstance(reply, Staged):
            self._work.staged[reply.company_id] = reply
            seconds = time.monotonic() - self.began[reply.company_id]
            self._work.settle(_staged_row(reply, self._work.wish, seconds))
        elif isinstance(reply, Compared):
            self.compared[reply.company_id] = reply


def _copy(
    snapshot: Snapshot,
    tenants: Sequence[Tenant],
    writers: Writers,
    work: _Work,
    *,
    journal: Journal,
    remaining: Remaining,
) -> dict[str, Compared]:
    """Stream every company to the writers; `work.staged` has them all afterwards.

    Gives the comparisons, which writers that write nothing make at once.
    """
    verb = "read and compare" if writers.previewing else "read and write"
    with journal.step(f"{verb} session files", total=sum(t.key_count for t in tenants)) as advance:
        listener = _Listener(writers, work, advance, remaining)
        for tenant in tenants:
            company = tenant.company_id
            listener.began[company] = time.monotonic()
            try:
                reason = None if _stream(snapshot, company, writers, work.wish) else "it has no credentials"
            except DatabaseUnavailable as error:
                if error.kind != "corrupt":
                    raise
                reason = error.message
            if reason is not None:
                del listener.began[company]
                work.settle(CompanyRow(company, folder_name(company), Result.DAMAGED, reason=reason))
            listener.hear_what_came()
        listener.hear_all()
    return listener.compared


def _stream(snapshot: Snapshot, company: str, writers: Writers, wish: Wish) -> bool:
    """Send one company's rows to a writer. False where it has no credentials."""
    with snapshot.company():
        creds = snapshot.creds(company)
        if creds is None:
            return False
        lane = writers.begin(
            Order(
                folder=folder_name(company),
                creds=creds.creds.encode(),
                creds_updated_at=creds.updated_at,
                origin=_origin(snapshot, company, wish),
                busy_since=snapshot.server.busy_since,
                fresh=wish.service_stopped,
                drop_stale=wish.drop_stale,
            )
        )
        try:
            for rows in snapshot.key_rows(company):
                lane.put(rows)
        except DatabaseUnavailable:
            lane.put(ABORT)
            raise
        lane.put(END)
    return True


def _origin(snapshot: Snapshot, company: str, wish: Wish) -> Origin:
    return Origin(
        company_id=company,
        run_id=wish.run_id,
        environment=wish.environment,
        source="database",
        snapshot_at=snapshot.server.snapshot_at,
        system_identifier=snapshot.server.system_identifier,
        timeline=snapshot.server.timeline,
        me_sha256=None,
        service_stopped="operator" if wish.service_stopped else "unknown",
        stale_keys_dropped=wish.drop_stale,
        opsctl=opsctl.__version__,
    )


def _staged_row(staged: Staged, wish: Wish, seconds: float) -> CompanyRow:
    counts = staged.keys_by_type
    sender = counts.get("sender-key", 0) + counts.get("sender-key-memory", 0)
    pre_keys, sessions = counts.get("pre-key", 0), counts.get("session", 0)
    if staged.damage is not None:
        result, reason = Result.DAMAGED, staged.damage
    elif staged.unusable and not wish.accept_damaged:
        result, reason = Result.DAMAGED, f"its credentials cannot log in: {'; '.join(staged.unusable)}"
    else:
        result, reason = Result.RESTORED, None
    warnings = staged.warnings + (tuple(staged.unusable) if reason is None else ())
    return CompanyRow(
        company=staged.company_id,
        folder=staged.folder,
        result=result,
        keys=staged.key_count,
        keys_by_type=counts,
        pre_keys=pre_keys,
        sessions=sessions,
        sender_keys=sender,
        other_keys=staged.key_count - pre_keys - sessions - sender,
        busy_chats=staged.busy_chats,
        dropped_keys=staged.dropped_keys,
        left_out=staged.left_out,
        warning_count=len(warnings),
        warnings=warnings,
        copy="fresh" if wish.service_stopped else "possibly stale",
        seconds=round(seconds, 2),
        reason=reason,
    )


def _verify(
    staging: Staging, writers: Writers, work: _Work, *, journal: Journal, remaining: Remaining
) -> dict[str, Compared]:
    """Sync the filesystem, and meanwhile look for every staged file under its name."""
    publishable = [s for c, s in work.staged.items() if work.rows[c].result is Result.RESTORED]
    compared: dict[str, Compared] = {}
    with journal.step("sync and check", total=len(publishable)) as advance:
        writers.verify(publishable)
        staging.sync()
        while len(compared) < len(publishable):
            reply = writers.wait(remaining)
            if isinstance(reply, Compared):
                compared[reply.company_id] = reply
                advance(len(compared))
    return compared


def _row_unless_refused(found: Compared, work: _Work) -> CompanyRow | None:
    """The company's row with the numbers of files; None where it was settled as refused or damaged."""
    wish = work.wish
    row = replace(
        work.rows[found.company_id],
        files_restored=found.restored,
        files_updated=found.updated,
        files_unchanged=found.unchanged,
        files_set_aside=found.set_aside,
    )
    if row.result is Result.DAMAGED:
        return None
    if found.damage is not None:
        work.settle(replace(row, result=Result.DAMAGED, reason=found.damage))
        return None
    if found.holding is Holding.LIVE and not wish.discard_changes:
        names = ", ".join(ascii(name)[1:-1] for name in found.written_since)
        reason = f"its folder was written since it was restored ({names}); --discard-changes would lose that"
    elif found.holding is Holding.FOREIGN and not wish.replace_foreign:
        reason = f"what stands in its place ({row.folder}) is no folder that was restored here; --replace sets it aside"
    else:
        return row
    work.settle(replace(row, result=Result.REFUSED, reason=reason))
    return None


def _publish(
    root: SessionsRoot,
    staging: Staging,
    compared: Mapping[str, Compared],
    work: _Work,
    *,
    journal: Journal,
    remaining: Remaining,
) -> None:
    """Exchange company by company. A deadline between two of them leaves the rest as they were."""
    published: set[str] = set()
    with journal.step("publish"):
        for company in sorted(compared):
            row = _row_unless_refused(compared[company], work)
            if row is None:
                continue
            if compared[company].identical:
                work.settle(replace(row, result=Result.UNCHANGED))
            elif remaining() == 0:
                work.settle(replace(row, result=Result.LATE, reason="the deadline came before it"))
            else:
                try:
                    staging.publish(row.folder)
                except OSError as error:
                    reason = f"{row.folder} cannot be exchanged: {error.strerror}"
                    work.settle(replace(row, result=Result.REFUSED, reason=reason))
                else:
                    published.add(row.folder)
                    work.settle(row)
        if published:
            staging.sync_names()
    if published:
        root.forget_aside(published, newest=staging.run_id)


def _report(work: _Work) -> Report:
    rows = [work.rows[company] for company in sorted(work.rows)]
    done = [row for row in rows if row.result in {Result.RESTORED, Result.UNCHANGED}]
    missing = [row for row in rows if row not in done]
    keys = sum(row.keys for row in done)
    summary = f"{len(done)} of {len(rows)} companies restored, {keys:,} keys, in {work.wish.target}"
    exit_code, failure = _failure(done, missing)
    return Report(
        summary=summary,
        rows=rows,
        columns=_COLUMNS,
        facts=work.facts,
        warnings=_warnings(work, rows),
        details=_details(work, rows),
        next_lines=_next_lines(work.wish, done),
        exit_code=exit_code,
        failure=failure,
        rto_scope="files",
        rto_met=False if missing else None,
        companies=[row.company for row in missing],
    )


def _preview_report(work: _Work) -> Report:
    rows = [work.rows[company] for company in sorted(work.rows)]
    missing = [row for row in rows if row.result in {Result.REFUSED, Result.DAMAGED}]
    needed, free = work.facts["space_needed_bytes"], work.facts["space_free_bytes"]
    possible = [row for row in rows if row not in missing]
    exit_code, failure = _failure(possible, missing)
    return Report(
        summary=f"{len(possible)} of {len(rows)} companies would be restored to {work.wish.target}; "
        f"{needed:,} bytes needed, {free:,} free; nothing was changed",
        rows=rows,
        columns=_PREVIEW_COLUMNS,
        facts=work.facts,
        warnings=_warnings(work, rows),
        details=_details(work, rows),
        exit_code=exit_code,
        failure=failure,
        companies=[row.company for row in missing],
    )


def _failure(done: Sequence[CompanyRow], missing: Sequence[CompanyRow]) -> tuple[int, Failure | None]:
    """0; 6 where some are missing; where all are: 5 if we refused any, 4 if the source could not be used."""
    if not missing:
        return 0, None
    named = "; ".join(f"{row.company}: {row.reason}" for row in missing[:5])
    more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
    results = {row.result for row in missing}
    if done:
        kind, exit_code = "half-done", 6
    elif results == {Result.LATE}:
        kind, exit_code = "deadline", SourceUnavailable.exit_code
    elif Result.REFUSED in results:
        kind, exit_code = "refused", Refused.exit_code
    else:
        kind, exit_code = "damaged-source", SourceUnavailable.exit_code
    hint = "opsctl sessions restore --help" if Result.REFUSED in results else "opsctl sessions list"
    return exit_code, Failure(kind, f"{len(missing)} companies are missing: {named}{more}", hint)


def _warnings(work: _Work, rows: Sequence[CompanyRow]) -> list[str]:
    out = list(work.warnings)
    wish = work.wish
    restored = [row for row in rows if row.keys_by_type is not None]
    for row in restored:
        out += [f"{row.company}: {warning}" for warning in row.warnings]
    if restored and not wish.service_stopped:
        busy = sum(row.busy_chats for row in restored)
        cost = (
            "their first incoming message will be late"
            if wish.drop_stale
            else "outgoing messages there may vanish silently; with --stale each chat's next incoming one is late"
        )
        out.append(
            "this copy is possibly stale, because the service was not proven stopped before it: "
            f"{busy} chats changed in the 15 minutes before it; {cost}. "
            "Stop the service and restore with --service-stopped to be sure"
        )
    return out


def _details(work: _Work, rows: Sequence[CompanyRow]) -> list[str]:
    out = list(work.details)
    for row in rows:
        if row.keys_by_type:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.keys_by_type.items())
            out.append(f"{row.company}: {kinds}")
        out += [f"{row.company}: left out: {key.reason}" for key in row.left_out]
    return out


def _next_lines(wish: Wish, done: Sequence[CompanyRow]) -> list[str]:
    if not done:
        return []
    target = shlex.quote(str(wish.target))
    first = [] if wish.service_stopped else ["pm2 stop baileys-whatsapp-service    # if it still runs"]
    return [
        f"opsctl sessions verify {target}",
        *first,
        "# in the service's .env: USE_REPOSITORY_PATTERN=false,",
        "#   USE_DATABASE_AUTH_STATE=false, USE_LEGACY_SUPABASE=false",
        "pm2 restart baileys-whatsapp-service --update-env",
        "# from here on these folders are the truth: the service must not start",
        "# on PostgreSQL again before its rows are brought up to date; until then:",
        f"opsctl sessions undo --to {target}",
    ]
