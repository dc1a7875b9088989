"""Baileys session folders -> PostgreSQL: planned for every company before any row is written, then one by one.

Each company is one transaction: archived before it commits, and read back inside of it, so that what does not read
back as the folder has it is never committed.
"""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from opsctl.baileys import buffers
from opsctl.baileys.filenames import UnwritableName, folder_name, is_company_id
from opsctl.baileys.key_types import shown_key_id
from opsctl.errors import Locked, OpsctlError, Refused, SourceUnavailable, unreadable
from opsctl.operations.comparison import Terms, compared
from opsctl.operations.sides import CompanyPlan, as_text, identity
from opsctl.operations.three_way import WRITTEN, Action, Prefer
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores import keys
from opsctl.stores.folder import OPSCTL_FOLDER, opened, origin_of, read_file
from opsctl.stores.postgres import parse_rows
from opsctl.stores.publishing import Owner, locked_root, readable_root, sync_filesystem
from opsctl.stores.records import ManifestDamaged, Returned
from opsctl.stores.returned import put_mark_in_place, write_mark
from opsctl.stores.rewriting import Archiving, NewRow, rewriting
from opsctl.stores.staging import Warnings
from opsctl.stores.switch_record import clear_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.baileys.buffers import StoredForm
    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.archive import Archive
    from opsctl.stores.postgres import Fingerprint, Server, Snapshot
    from opsctl.stores.publishing import SessionsRoot
    from opsctl.stores.records import Origin
    from opsctl.stores.rewriting import Rewriting

    Remaining = Callable[[], float | None]
    OpenSnapshot = Callable[[], AbstractContextManager[Snapshot]]
    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_LISTED = 1_000


@dataclass(frozen=True, slots=True)
class FailbackWish:
    """What the operator asked for, and where rows are archived."""

    source: Path
    environment: str
    archiving: Archiving
    companies: tuple[str, ...] = ()
    prefer: Prefer | None = None
    new_identities: frozenset[str] = frozenset()
    adopt: bool = False
    form: StoredForm | None = None

    @property
    def run_id(self) -> str:
        return self.archiving.run_id

    @property
    def database(self) -> str:
        """Where the rows go, for people."""
        return self.archiving.database


class Result(StrEnum):
    """What became of one company."""

    BROUGHT_BACK = "brought back"
    UNCHANGED = "unchanged"
    """The database has what the folder has."""
    ALREADY_BACK = "already back"
    """An earlier run brought it back, and nothing was written on the folder since."""
    WOULD_CHANGE = "would change"
    REFUSED = "refused"
    CONFLICTING = "conflicting"
    """Somebody has to decide first."""
    NOT_VERIFIED = "not verified"
    """It did not read back as it was written, so its transaction was rolled back."""
    LATE = "too late"
    """The deadline, or a database that gave up, came first."""


_DONE = frozenset({Result.BROUGHT_BACK, Result.UNCHANGED, Result.ALREADY_BACK, Result.WOULD_CHANGE})


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key that is not the same on both sides."""

    key_type: str
    key_id: str
    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class CompanyRow:
    """One company in the answer; the counts are of rows, the credentials among them."""

    company: str
    folder: str
    result: Result
    unchanged: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    lost: int = 0
    """Rows that the database had lost, inserted again."""
    kept: int = 0
    damaged: int = 0
    conflicting: int = 0
    keys: tuple[KeyRow, ...] = ()
    """The first thousand of those that differ."""
    warnings: tuple[str, ...] = ()
    reason: str | None = None


_COLUMNS = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("Same", "unchanged", numeric=True),
    Column("Ins.", "inserted", numeric=True),
    Column("Upd.", "updated", numeric=True),
    Column("Del.", "deleted", numeric=True),
    Column("Lost", "lost", numeric=True),
    Column("Kept", "kept", numeric=True),
    Column("Torn", "damaged", numeric=True),
    Column("Confl.", "conflicting", numeric=True),
)


@dataclass(slots=True)
class _FleetPlan:
    """The plans of all companies, and what is true of all."""

    wish: FailbackWish
    server: Server
    companies: list[CompanyPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def preview_failback(open_snapshot: OpenSnapshot, wish: FailbackWish, *, journal: Journal) -> Report:
    """What a failback would do: everything is read and compared, nothing is written."""
    with _looked_at(wish) as root_fd:
        plan = _plan(open_snapshot, root_fd, wish, journal)
    with readable_root(wish.source, Owner.of(wish.source)) as root:
        if root is not None and (killed := root.unfinished_runs()):
            plan.warnings.append(f"run {killed[0]} was killed, or still works; failback settles first what it left")
    rows = [_row(company, Result.WOULD_CHANGE if company.writes else Result.UNCHANGED) for company in plan.companies]
    return _report(plan, rows, "would be brought back; nothing was changed")


class Failback:
    """A failback that was planned and holds the lock of its folders. Made by `planned_failback`."""

    def __init__(self, root: SessionsRoot, plan: _FleetPlan) -> None:
        self._root = root
        self._plan = plan
        self.all_back = False
        """Whether every company of the folders is in the database; after `write`."""

    @property
    def question(self) -> str:
        """What an operator has to agree to."""
        counts = {action: sum(company.counts[action] for company in self._writing) for action in Action}
        written = sum(counts[action] for action in WRITTEN)
        return (
            f"Write {written:,} rows and delete {counts[Action.DELETED]:,}, of {len(self._writing)} companies, "
            f"in {self._plan.wish.database}?"
        )

    @property
    def writes(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._writing)

    @property
    def _writing(self) -> list[CompanyPlan]:
        return [company for company in self._plan.companies if company.writes]

    def write(self, open_connection: OpenConnection, *, journal: Journal, remaining: Remaining) -> Report:
        """Write what was planned, company by company, and say how it went."""
        plan, rows = self._plan, [_row(c, Result.UNCHANGED) for c in self._plan.companies if not c.writes]
        if self.writes:
            with (
                journal.step("write and verify", total=len(self._writing)) as advance,
                plan.wish.archiving.archive(plan.server.system_identifier) as archive,
                open_connection() as connection,
            ):
                keys.require_writable(connection, inserting=True)
                keys.lock_keys(connection)
                for done, company in enumerate(self._writing, 1):
                    rows.append(self._written(connection, archive, company, remaining))
                    advance(done)
            if archive.rows_in_doubt:
                plan.warnings.append(
                    "the database did not answer a COMMIT, so nobody knows whether it was done: "
                    "type it again, or look with --dry-run"
                )
        self._mark(rows)
        self.all_back = not plan.wish.companies and all(row.result in _DONE for row in rows)
        return _report(plan, rows, f"brought back from {plan.wish.source} into {plan.wish.database}")

    def _written(
        self, connection: Connection, archive: Archive, company: CompanyPlan, remaining: Remaining
    ) -> CompanyRow:
        if remaining() == 0 or connection.closed:
            why = "the database stopped answering before it" if connection.closed else "the deadline came before it"
            return _row(company, Result.LATE, why)
        try:
            with (
                opened(company.folder, dir_fd=self._root.fd) as folder_fd,
                rewriting(connection, archive, company.company) as rows,
            ):
                require_unwritten(rows, company.fingerprint)
                _write(rows, company, folder_fd)
        except NotVerified as error:
            return _row(company, Result.NOT_VERIFIED, error.message)
        except (Refused, Locked) as error:
            return _row(company, Result.REFUSED, error.message)
        except SourceUnavailable as error:  # the backstop of the deadline is one too
            result = Result.LATE if error.kind in {"deadline", "frozen", "reset"} else Result.REFUSED
            return _row(company, result, error.message)
        except OSError as error:
            return _row(company, Result.REFUSED, f"{error.filename or self._root.path}: {error.strerror}")
        return _row(company, Result.BROUGHT_BACK)

    def _mark(self, rows: Sequence[CompanyRow]) -> None:
        """Remember in each folder that it was brought back: from now on it is not the live one any more."""
        done = {row.company for row in rows if row.result in _DONE}
        marked = [c for c in self._plan.companies if c.company in done and c.returned_by is None and c.folder_digest]
        at = as_text(datetime.now(UTC))
        written = []
        for company in marked:
            returned = Returned(self._plan.wish.run_id, at, company.folder_digest)
            if self._marked(company, partial(write_mark, returned=returned)):
                written.append(company)
        if written and self._marked(written[0], sync_filesystem):  # for all of them: they lie on one
            for company in written:
                self._marked(company, put_mark_in_place)

    def _marked(self, company: CompanyPlan, step: Callable[[int], None]) -> bool:
        """One step of marking; without the mark the rows are back all the same."""
        try:
            with opened(company.folder, dir_fd=self._root.fd) as folder_fd:
                step(folder_fd)
        except (OSError, ManifestDamaged) as error:
            self._plan.warnings.append(
                f"{company.company}: its folder cannot be marked as brought back ({error}); "
                "the next restore will ask for --discard-changes"
            )
            return False
        return True

    def settle_switch(self) -> None:
        """Where nobody moves the services back from here: the folders own the sessions until every company is back."""
        if self.all_back:
            clear_switch(self._root.own_fd)


@contextmanager
def planned_failback(
    open_snapshot: OpenSnapshot, wish: FailbackWish, *, journal: Journal, locked: SessionsRoot | None = None
) -> Iterator[Failback]:
    """A failback of all wished companies, planned, under the lock of their folders.

    `locked`: the folders, where somebody holds their lock. Raises `DatabaseUnavailable`, `Refused`, `Locked`, all with
    nothing changed.
    """
    with _looked_at(wish):
        pass
    taken = nullcontext(locked) if locked else locked_root(wish.source, Owner.of(wish.source), run_id=wish.run_id)
    with taken as root:
        root.recover()
        yield Failback(root, _plan(open_snapshot, root.fd, wish, journal))


class NotVerified(OpsctlError):
    """What was written does not read back as the folder has it."""

    exit_code = 1
    kind = "verification-failed"


@contextmanager
def _looked_at(wish: FailbackWish) -> Iterator[int]:
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(opened(wish.source))
        except (FileNotFoundError, NotADirectoryError):
            raise _no_folders(wish) from None
        except OSError as error:
            raise unreadable(wish.source, error) from None
        yield fd


def _no_folders(wish: FailbackWish) -> Refused:
    return Refused(
        f"{wish.source} holds no company folders", kind="no-folders", hint="pass the sessions folder as --from DIR"
    )


@repeatable
def _plan(open_snapshot: OpenSnapshot, root_fd: int, wish: FailbackWish, journal: Journal) -> _FleetPlan:
    folders = _chosen(_company_folders(root_fd), wish)
    with ExitStack() as database:
        with journal.step("connect to PostgreSQL"):
            snapshot = database.enter_context(open_snapshot())
        server = snapshot.server
        if server.in_recovery:
            raise Refused("this server is a standby and takes no rows", hint="point DATABASE_URL at the primary")
        tenants = {tenant.company_id: tenant for tenant in snapshot.tenants()}
        plan = _FleetPlan(wish, server)
        plan.facts |= {
            "source": str(wish.source),
            "database": wish.database,
            "system_identifier": server.system_identifier,
            "timeline": server.timeline,
        }
        with journal.step("compare files and rows", total=len(folders)) as advance:
            asked = [(_asked_for(name, origin, wish, tenants), origin) for name, origin in folders]
            terms = Terms(server, wish.prefer, wish.form, wish.new_identities)
            plan.companies = compared(snapshot, root_fd, asked, terms, advance)
    planned = {company.company for company in plan.companies}
    missing = sorted(c for c, t in tenants.items() if t.has_creds and c not in planned)
    if missing and not wish.companies:
        plan.warnings.append(
            f"{len(missing)} companies of the database have no folder in {wish.source} and stay as they are: "
            + ", ".join(map(ascii, missing[:5]))
        )
    return plan


def _company_folders(root_fd: int) -> list[tuple[str, Origin | None]]:
    """Every folder of a company, by name, with what its manifest says; files and links are none."""
    found: list[tuple[str, Origin | None]] = []
    for name in sorted(os.listdir(root_fd)):
        if name == OPSCTL_FOLDER or name.startswith("."):
            continue
        try:
            with opened(name, dir_fd=root_fd) as fd:
                found.append((name, origin_of(fd)))
        except (NotADirectoryError, FileNotFoundError):
            continue
        except OSError:
            found.append((name, None))
    return found


def _chosen(found: list[tuple[str, Origin | None]], wish: FailbackWish) -> list[tuple[str, Origin | None]]:
    """The folders of the wished companies. Raises `Refused` where one has none."""
    if not found:
        raise _no_folders(wish)
    names = {_folder_of(company): company for company in (*wish.companies, *wish.new_identities)}
    unknown = [company for name, company in names.items() if name not in dict(found)]
    if unknown:
        raise Refused(
            f"{wish.source} has no folder of company {', '.join(map(ascii, sorted(unknown)))}",
            kind="unknown-company",
            hint="opsctl sessions list",
        )
    wanted = {_folder_of(company) for company in wish.companies}
    return [(name, origin) for name, origin in found if not wanted or name in wanted]


def _folder_of(company: str) -> str:
    try:
        return folder_name(company)
    except UnwritableName as error:
        raise Refused(str(error), hint="opsctl sessions list") from None


def _asked_for(name: str, origin: Origin | None, wish: FailbackWish, known: Collection[str]) -> CompanyPlan:
    """Which company's folder this is, and whether it may be looked at at all."""
    plan = CompanyPlan(company=origin.company_id if origin else name, folder=name)
    plan.refused = _why_not_ours(name, origin, wish)
    if plan.refused is None and origin is None:
        ids = [company for company in _ids_of(name) if company in known] or _ids_of(name)[:1]
        if len(ids) == 1:
            plan.company = ids[0]
        else:
            plan.refused = f"the companies {' and '.join(ids)} of the database would both have this folder"
    return plan


def _why_not_ours(name: str, origin: Origin | None, wish: FailbackWish) -> str | None:
    if origin is None:
        if not wish.adopt:
            return "it has no manifest of ours; --adopt brings it back all the same, and deletes nothing"
        return None if _ids_of(name) else "its name is not a company's"
    if origin.environment != wish.environment:
        return f"it belongs to the environment {origin.environment!a}, and this is {wish.environment!a}"
    try:
        fits = folder_name(origin.company_id) == name
    except UnwritableName:
        fits = False
    return None if fits else f"its manifest is of company {origin.company_id!a}"


def _ids_of(name: str) -> list[str]:
    """The company ids that have this folder."""
    if not is_company_id(name) or not name.startswith("company_"):
        return []
    return [company for company in (name.removeprefix("company_"), name) if company]


def require_unwritten(rows: Rewriting, fingerprint: Fingerprint | None) -> None:
    """Raises `Refused` where a row of the company was written since its change was planned."""
    if rows.fingerprint != fingerprint:
        raise Refused("its rows were written while it was planned; is the service stopped?")


def _write(rows: Rewriting, plan: CompanyPlan, folder_fd: int) -> None:
    expected: dict[tuple[str, str], bytes] = {}
    rows.delete((c.key_type, c.key_id) for c in plan.changes if c.action is Action.DELETED)
    rows.put(_new_rows(plan, folder_fd, expected))
    if plan.creds is not None:
        rows.put_creds(buffers.in_form(plan.creds, plan.form), plan.creds_updated_at)
    check_rows(rows, expected, plan.creds)


def _new_rows(plan: CompanyPlan, folder_fd: int, expected: dict[tuple[str, str], bytes]) -> Iterator[NewRow]:
    """The rows of the changed files, in the company's form; `expected` learns what each has to read back as."""
    for change in plan.changes:
        if change.action not in WRITTEN or change.file is None:
            continue
        data = read_file(folder_fd, change.file)
        if sha256(data).digest() != change.sha256:
            raise Refused(f"its file {change.file!a} was written while it was planned; is the service stopped?")
        value = buffers.normalise(data).data
        expected[change.key_type, change.key_id] = identity(value)
        text = buffers.in_form(value, plan.form)
        yield NewRow(change.key_type, change.key_id, text, change.updated_at, change.expires_at)


def check_rows(rows: Rewriting, expected: dict[tuple[str, str], bytes], creds: bytes | None) -> None:
    """Read the written rows back, and make sure that every other one is the row that it was.

    `expected` are the identities of the written ones; `creds` the credentials, if they were. Raises `NotVerified`.
    """
    found, wrong = 0, ""
    for lines in rows.written_key_rows():  # to the end: a COPY that is left in the middle leaves no connection behind
        for record in parse_rows(lines):
            if identity(buffers.normalise(record.value).data) == expected.get((record.key_type, record.key_id)):
                found += 1
            else:
                wrong = f"{record.key_type} {record.key_id[:60]!a} does not read back as it was written"
    if wrong:
        raise NotVerified(wrong)
    if found != len(expected) or not rows.others_stay():
        raise NotVerified("its rows do not read back as they were written")
    if creds is None:
        return
    there = rows.creds()
    if there is None or identity(buffers.normalise(there.creds.encode()).data) != identity(creds):
        raise NotVerified("its credentials do not read back as they were written")


def _row(plan: CompanyPlan, result: Result, reason: str | None = None) -> CompanyRow:
    if plan.refused is not None:
        result = Result.CONFLICTING if plan.counts[Action.CONFLICT] else Result.REFUSED
        reason = plan.refused
    elif plan.returned_by is not None:
        result = Result.ALREADY_BACK
        reason = f"nothing was written on its folder since run {plan.returned_by} brought it back"
    counts = plan.counts
    differing = [c for c in (*plan.told, *plan.changes) if c.action is not Action.UNCHANGED]
    return CompanyRow(
        company=plan.company,
        folder=plan.folder,
        result=result,
        unchanged=counts[Action.UNCHANGED],
        inserted=counts[Action.INSERTED],
        updated=counts[Action.UPDATED],
        deleted=counts[Action.DELETED],
        lost=counts[Action.LOST],
        kept=counts[Action.KEPT],
        damaged=counts[Action.DAMAGED],
        conflicting=plan.conflicts,
        keys=tuple(
            KeyRow(c.key_type, shown_key_id(c.key_id, plan.me_ids), c.action, c.reason) for c in differing[:_LISTED]
        ),
        warnings=tuple(plan.warnings),
        reason=reason,
    )


def _report(plan: _FleetPlan, rows: list[CompanyRow], what: str) -> Report:
    rows = sorted(rows, key=lambda row: row.company)
    done = [row for row in rows if row.result in _DONE]
    exit_code, failure = _failure(rows, done)
    changed = sum(row.inserted + row.updated + row.lost for row in done)
    deleted = sum(row.deleted for row in done)
    archived = any(row.result is Result.BROUGHT_BACK for row in rows)
    return Report(
        summary=f"{len(done)} of {len(rows)} companies {what}; {changed:,} rows written, {deleted:,} deleted",
        rows=rows,
        columns=_COLUMNS,
        facts=plan.facts | ({"archived_run": plan.wish.run_id} if archived else {}),
        warnings=plan.warnings + [f"{row.company}: {warning}" for row in rows for warning in _told(row)],
        details=[f"{row.company}: {line}" for row in rows for line in _details(row)],
        next_lines=_next_lines(plan.wish, archived=archived, all_done=len(done) == len(rows)),
        exit_code=exit_code,
        failure=failure,
        companies=[row.company for row in rows if row not in done or row.damaged],
    )


_SILENT = frozenset({Action.INSERTED, Action.UPDATED, Action.LOST, Action.KEPT, Action.DELETED})


def _details(row: CompanyRow) -> tuple[str, ...]:
    return (*((row.reason,) if row.result is Result.ALREADY_BACK else ()), *_sentences(row, _SILENT))


def _told(row: CompanyRow) -> tuple[str, ...]:
    """What an operator has to know of a company without asking."""
    return (*row.warnings, *_sentences(row, frozenset(Action) - _SILENT))


def _sentences(row: CompanyRow, actions: frozenset[Action]) -> tuple[str, ...]:
    said = Warnings()
    for key in row.keys:
        if key.action in actions:
            said.add(f"{key.action} {key.key_type}: {key.reason}", key.key_id)
    return said.sentences()


def _failure(rows: list[CompanyRow], done: list[CompanyRow]) -> tuple[int, Failure | None]:
    """0; 6 where some companies are missing; 5 where all are; 1 where they read back differently, or files are torn."""
    missing = [row for row in rows if row not in done]
    results = {row.result for row in missing}
    if not missing:
        torn = [row for row in rows if row.damaged]
        if not torn:
            return 0, None
        named = "; ".join(f"{row.company}: {row.damaged}" for row in torn[:5])
        hint = "opsctl sessions verify"
        return 1, Failure("torn-files", f"files are torn, and their rows stay as they were: {named}", hint)
    named = "; ".join(f"{row.company}: {row.reason}" for row in missing[:5])
    more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
    message = f"{len(missing)} companies are missing: {named}{more}"
    hint = "opsctl sessions failback --dry-run --verbose"
    if results == {Result.NOT_VERIFIED}:
        return NotVerified.exit_code, Failure(NotVerified.kind, message, hint)
    if done:
        return 6, Failure("half-done", message, hint)
    if results == {Result.LATE}:
        return SourceUnavailable.exit_code, Failure("deadline", message, "type it again with a longer --deadline")
    kind = "conflict" if Result.CONFLICTING in results else "refused"
    return Refused.exit_code, Failure(kind, message, hint)


def _next_lines(wish: FailbackWish, *, archived: bool, all_done: bool) -> list[str]:
    lines = []
    if all_done and archived:
        lines += [
            "# the service's flags as they were, in its .env and at its start, for instance:",
            "USE_REPOSITORY_PATTERN=true USE_DATABASE_AUTH_STATE=true \\",
            "pm2 restart baileys-whatsapp-service --update-env",
        ]
    if archived:
        lines += [
            "# until the service writes again:",
            f"opsctl sessions failback --undo {shlex.quote(wish.run_id)} --service-stopped",
        ]
    return lines
