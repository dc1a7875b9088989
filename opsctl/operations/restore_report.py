"""How a restore is told: its rows, what it warns of, its exit code, and what to type next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from opsctl.errors import Refused, SourceUnavailable
from opsctl.operations.sources import Kind
from opsctl.report import Column, Failure, Report, duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opsctl.operations.restore import Wish
    from opsctl.operations.sources import Offer
    from opsctl.stores.staging import LeftOut, Staged


class Result(StrEnum):
    """What became of one company."""

    RESTORED = "restored"
    UNCHANGED = "unchanged"
    WOULD_RESTORE = "would restore"
    REFUSED = "refused"
    """The folder in place, or the id, forbids it."""
    WITHHELD = "withheld"
    """The database can be read and does not have it: it may have been deleted on purpose."""
    DAMAGED = "damaged"
    """The source's credentials or rows cannot be used."""
    LATE = "too late"
    """The deadline, or a disk that gave up, came first."""


class OfASource:
    """What a table shows of where a company's sessions came from."""

    __slots__ = ()
    source: str
    rpo_s: float | None

    @property
    def source_in_a_word(self) -> str:
        """`source` for a table of 80 columns."""
        return self.source.partition(" ")[0]

    @property
    def age(self) -> str | None:
        """`rpo_s` for people: `37 s`, `12 min`, `3 h`, `40 d`."""
        return None if self.rpo_s is None else duration(self.rpo_s)


@dataclass(frozen=True, slots=True)
class CompanyRow(OfASource):
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
    source: str = ""
    """`database`, `replica`, `standby` or `cache`, and which of several."""
    rpo_s: float | None = None
    """How long before this run the moment was that the copy shows; None where its time is still to come."""
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
_COLUMNS_OF_MANY_SOURCES = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("From", "source_in_a_word"),
    Column("RPO paid", "age", numeric=True),
    *_COLUMNS[2:5],
    *_COLUMNS[6:],
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
_PREVIEW_COLUMNS_OF_MANY_SOURCES = (
    Column("Company", "company"),
    Column("Result", "result"),
    Column("From", "source_in_a_word"),
    Column("RPO paid", "age", numeric=True),
    Column("Keys", "keys", numeric=True),
    Column("Set aside", "files_set_aside", numeric=True),
    Column("Warn", "warning_count", numeric=True),
)
_DONE = frozenset({Result.RESTORED, Result.UNCHANGED})
_SHOWN_COMPANIES = 10


@dataclass(slots=True)
class Telling:
    """What is gathered while a restore runs."""

    wish: Wish
    rows: dict[str, CompanyRow] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def settle(self, row: CompanyRow) -> None:
        """What became of a company, in place of what was thought before."""
        self.rows[row.company] = row

    @property
    def _rows(self) -> list[CompanyRow]:
        return [self.rows[company] for company in sorted(self.rows)]

    @property
    def _only_the_database(self) -> bool:
        return not self.notes and {row.source_in_a_word for row in self.rows.values()} <= {"", Kind.DATABASE}

    def report(self) -> Report:
        """Of a restore that was done."""
        rows = self._rows
        done = [row for row in rows if row.result in _DONE]
        missing = [row for row in rows if row.result not in _DONE | {Result.WITHHELD}]
        keys = sum(row.keys for row in done)
        wanted = [row for row in rows if row.result is not Result.WITHHELD]
        exit_code, failure = _failure(done, missing)
        return Report(
            summary=f"{len(done)} of {len(wanted)} companies restored, {keys:,} keys, in {self.wish.target}",
            rows=rows,
            columns=_COLUMNS if self._only_the_database else _COLUMNS_OF_MANY_SOURCES,
            facts=self.facts,
            notes=self.notes,
            warnings=self._all_warnings(rows),
            details=self._all_details(rows),
            next_lines=_next_lines(self.wish, done),
            exit_code=exit_code,
            failure=failure,
            rto_scope="files",
            rto_met=False if missing else None,
            companies=[row.company for row in missing],
        )

    def preview(self) -> Report:
        """Of a dry run."""
        rows = self._rows
        missing = [row for row in rows if row.result in {Result.REFUSED, Result.DAMAGED}]
        possible = [row for row in rows if row not in missing and row.result is not Result.WITHHELD]
        needed, free = self.facts["space_needed_bytes"], self.facts["space_free_bytes"]
        exit_code, failure = _failure(possible, missing)
        return Report(
            summary=f"{len(possible)} of {len(possible) + len(missing)} companies would be restored to "
            f"{self.wish.target}; {needed:,} bytes needed, {free:,} free; nothing was changed",
            rows=rows,
            columns=_PREVIEW_COLUMNS if self._only_the_database else _PREVIEW_COLUMNS_OF_MANY_SOURCES,
            facts=self.facts,
            notes=self.notes,
            warnings=self._all_warnings(rows),
            details=self._all_details(rows),
            exit_code=exit_code,
            failure=failure,
            companies=[row.company for row in missing],
        )

    def _all_warnings(self, rows: Sequence[CompanyRow]) -> list[str]:
        restored = [row for row in rows if row.keys_by_type is not None]
        out = list(self.warnings)
        out += [f"{row.company}: {warning}" for row in restored for warning in row.warnings]
        out += [f"{row.company} is not restored: {row.reason}" for row in rows if row.result is Result.WITHHELD]
        stale = [row for row in restored if row.copy == "possibly stale"]
        bare = [row for row in stale if row.source_in_a_word == Kind.CACHE and not row.keys]
        if bare:
            out.append(
                f"credentials alone were restored from the cache, without keys ({_named(bare)}): each chat's first "
                'incoming message is late, a contact that uses an old pre-key fails with "Invalid PreKey ID", and '
                "group messages wait for a retry"
            )
        keyed = [row for row in stale if row not in bare]
        for source in sorted({row.source_in_a_word for row in keyed}):
            out.append(_stale_warning([row for row in keyed if row.source_in_a_word == source], source, self.wish))
        return out

    def _all_details(self, rows: Sequence[CompanyRow]) -> list[str]:
        out = list(self.details)
        for row in rows:
            if row.keys_by_type:
                kinds = ", ".join(f"{count} {kind}" for kind, count in row.keys_by_type.items())
                out.append(f"{row.company}: {kinds}")
            out += [f"{row.company}: left out: {key.reason}" for key in row.left_out]
        return out


def _named(rows: Sequence[CompanyRow]) -> str:
    shown = ", ".join(row.company for row in rows[:_SHOWN_COMPANIES])
    more = len(rows) - _SHOWN_COMPANIES
    return shown + (f" and {more} more" if more > 0 else "")


def _stale_warning(rows: Sequence[CompanyRow], source: str, wish: Wish) -> str:
    busy = sorted((row for row in rows if row.busy_chats), key=lambda row: -row.busy_chats)
    count = sum(row.busy_chats for row in busy)
    cost = (
        "their first incoming message will be late"
        if wish.drop_stale
        else "outgoing messages there may vanish silently; with --stale each chat's next incoming one is late"
    )
    whose = f" of {_named(busy)}" if busy else ""
    chats = f"{count} chats{whose} changed in the 15 minutes before it; {cost}"
    if source == Kind.DATABASE:
        return (
            "this copy is possibly stale, because the service was not proven stopped before it: "
            f"{chats}. Stop the service and restore with --service-stopped to be sure"
        )
    if source == Kind.CACHE:
        return f"the credentials of {_named(rows)} are the cache's and the keys beside them the standby's: {chats}"
    ages = [row.rpo_s for row in rows if row.rpo_s is not None]
    since = (
        f"{duration(max(ages))} ago or less" if len(ages) == len(rows) else "nobody knows when: a clock was set back"
    )
    return (
        f"the copies from the {source} are possibly stale, because what was written after them ({since}) "
        f"is missing: {chats}"
    )


def staged_row(
    staged: Staged, wish: Wish, offer: Offer, seconds: float, *, rpo_s: float | None, fresh: bool
) -> CompanyRow:
    """What is known of a company when its folder is written."""
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
        source=offer.label,
        rpo_s=None if rpo_s is None else round(rpo_s, 1),
        copy="fresh" if fresh else "possibly stale",
        seconds=round(seconds, 2),
        reason=reason,
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


def _next_lines(wish: Wish, done: Sequence[CompanyRow]) -> list[str]:
    if not done:
        return []
    target = shlex.quote(str(wish.target))
    first = [] if wish.service_stopped else ["pm2 stop baileys-whatsapp-service    # if it still runs"]
    return [
        f"opsctl sessions verify {target}",
        *first,
        "# by hand from here on; where `opsctl switch prepare` was done, in one line:",
        "opsctl sessions restore --switch",
        "# in the service's .env: USE_REPOSITORY_PATTERN=false,",
        "#   USE_DATABASE_AUTH_STATE=false, USE_LEGACY_SUPABASE=false; and the same at its",
        "#   start, because PM2 keeps the environment of the first one:",
        "USE_REPOSITORY_PATTERN=false USE_DATABASE_AUTH_STATE=false \\",
        "USE_LEGACY_SUPABASE=false pm2 restart baileys-whatsapp-service --update-env",
        "# from here on these folders are the truth: the service must not start on",
        "# PostgreSQL again before its rows are brought up to date from them, with",
        f"opsctl sessions failback --from {target} --dry-run",
        "# and if the service was not started on them:",
        f"opsctl sessions undo --to {target}",
    ]
