"""Which companies there are, which sources hold them, and how old each is."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from opsctl.baileys.filenames import CREDS_FILE, UnwritableName, folder_name
from opsctl.errors import DatabaseUnavailable, Refused
from opsctl.report import Column, Failure, Report, duration
from opsctl.retry import repeatable
from opsctl.stores.folder import OPSCTL_FOLDER, opened, origin_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.records import Origin
    from opsctl.stores.standby import Standby


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One company. Ages are in seconds; `database` and `folder` say in a word how that source has it."""

    company: str
    keys: int = 0
    keys_by_type: dict[str, int] = field(default_factory=dict)
    pre_keys: int = 0
    sessions: int = 0
    newest_change: str | None = None
    newest_age: str | None = None
    database: str = "no"
    folder: str = "no"
    folder_age: str | None = None
    standby: str | None = None
    """How old its warm copy is, with `held` where that is; None where there is none."""


_COLUMNS = (
    Column("Company", "company"),
    Column("Keys", "keys", numeric=True),
    Column("Pre-key", "pre_keys", numeric=True),
    Column("Session", "sessions", numeric=True),
    Column("Changed", "newest_age", numeric=True),
    Column("Database", "database"),
    Column("Folder", "folder"),
    Column("Its age", "folder_age", numeric=True),
)
_COLUMNS_WITH_STANDBY = (*_COLUMNS[:2], *_COLUMNS[3:], Column("Standby", "standby", numeric=True))


def list_sessions(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]],
    target: Path,
    *,
    standby: Standby,
    companies: tuple[str, ...],
    journal: Journal,
    now: datetime | None = None,
) -> Report:
    """Every company that any source knows. A database that is gone is said, with exit 1."""
    moment = now or datetime.now(UTC)
    failure = None
    rows: dict[str, SessionRow] = {}
    try:
        with journal.step("ask the database"):
            rows = _from_database(open_snapshot, moment)
    except DatabaseUnavailable as error:
        failure = Failure(error.kind, f"the database cannot be read: {error.message}", error.hint)
    warnings = _add_folders(rows, target, moment) + _add_copies(rows, standby, moment)
    if companies:
        unknown = sorted(set(companies) - rows.keys())
        if unknown and failure is None:
            raise Refused(f"no source holds {', '.join(map(ascii, unknown))}", kind="unknown-company")
        rows = {company: row for company, row in rows.items() if company in companies}
    ordered = [rows[company] for company in sorted(rows)]
    return Report(
        summary=f"{len(ordered)} companies, {sum(row.keys for row in ordered):,} keys in the database; "
        f"folders in {target}",
        rows=ordered,
        columns=_COLUMNS_WITH_STANDBY if any(row.standby for row in ordered) else _COLUMNS,
        facts={"target": str(target)},
        warnings=warnings,
        details=[f"{r.company}: {', '.join(f'{n} {t}' for t, n in r.keys_by_type.items())}" for r in ordered],
        exit_code=1 if failure else 0,
        failure=failure,
    )


@repeatable
def _from_database(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]], now: datetime
) -> dict[str, SessionRow]:
    with open_snapshot() as snapshot:
        return _rows_of(snapshot, now)


def _rows_of(snapshot: Snapshot, now: datetime) -> dict[str, SessionRow]:
    rows = {}
    for tenant in snapshot.tenants():
        by_type = tenant.keys_by_type or {}
        rows[tenant.company_id] = SessionRow(
            company=tenant.company_id,
            keys=tenant.key_count,
            keys_by_type=by_type,
            pre_keys=by_type.get("pre-key", 0),
            sessions=by_type.get("session", 0),
            newest_change=tenant.newest_at,
            newest_age=_age(tenant.newest_at, now),
            database="yes" if tenant.has_creds else "no creds",
        )
    return rows


def _add_folders(rows: dict[str, SessionRow], target: Path, now: datetime) -> list[str]:
    """Adds what stands in the sessions folder; gives a sentence where that cannot be read."""
    try:
        with opened(target) as fd:
            found = {name: _found(name, fd) for name in sorted(os.listdir(fd)) if name != OPSCTL_FOLDER}
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"the folders in {target} cannot be read: {error.strerror}"]
    by_folder = {_folder(company): company for company in rows}
    for name, (kind, origin) in found.items():
        if kind is None:
            continue
        company = by_folder.get(name) or (origin.company_id if origin else name.removeprefix("company_"))
        row = rows.get(company, SessionRow(company))
        rows[company] = replace(row, folder=kind, folder_age=_age(origin.snapshot_at, now) if origin else None)
    return []


def _add_copies(rows: dict[str, SessionRow], standby: Standby, now: datetime) -> list[str]:
    """Adds what the standby keeps; gives a sentence where that cannot be read."""
    try:
        copies = standby.copies()
    except Refused as error:
        return [f"the warm copies cannot be read: {error.message}"]
    for copy in copies:
        age = "damaged" if copy.damage else _age(copy.synced_at, now) or "unknown"
        row = rows.get(copy.company_id, SessionRow(copy.company_id))
        rows[copy.company_id] = replace(row, standby=f"{age}, held" if copy.held else age)
    return []


def _found(name: str, dir_fd: int) -> tuple[str | None, Origin | None]:
    """How one entry holds a company, in a word (None: it is a file), and what its manifest says."""
    origin = None
    try:
        with opened(name, dir_fd=dir_fd) as folder:
            origin = origin_of(folder)
            os.stat(CREDS_FILE, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return "no creds", origin
    except NotADirectoryError:
        is_link = stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
        return "symlink" if is_link else None, None
    except OSError:
        return "unreadable", None
    return ("restored" if origin else "foreign"), origin


def _folder(company: str) -> str | None:
    try:
        return folder_name(company)
    except UnwritableName:
        return None


def _age(moment: str | None, now: datetime) -> str | None:
    """How long ago PostgreSQL's text of a time is."""
    if moment is None:
        return None
    try:
        seconds = (now - datetime.fromisoformat(moment)).total_seconds()
    except ValueError:  # `infinity`, or a year that Python has not
        return moment
    return duration(seconds)
