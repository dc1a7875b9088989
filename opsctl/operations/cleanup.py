"""Delete keys that are past their retention, by type, archived first, in transactions too short to be noticed."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import orjson

from opsctl.baileys import credentials
from opsctl.baileys.key_types import KNOWN, PRE_KEYS_KEPT, ExpiryPolicy, own_addresses
from opsctl.errors import HalfDone, Interrupted, OpsctlError, Refused, UsageError
from opsctl.operations.cleanup_pass import Limits, Pass, Progress
from opsctl.report import Column, Failure, Report
from opsctl.retry import repeatable
from opsctl.stores import keys
from opsctl.stores.archive import Head, archived_lines, new_archive, unwritable
from opsctl.stores.postgres import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.archive import Archive
    from opsctl.stores.keys import CensusRow, Expiry, TableSizes
    from opsctl.stores.postgres import Snapshot

    OpenConnection = Callable[[], AbstractContextManager[Connection]]

NOTEWORTHY = 1_000
"""So many deletions in one run are told to Sentry."""
_SAMPLE, _MOST_NAMED = 3, 1_000_000

AGES = ("under 1 d", "1-7 d", "7-14 d", "14-30 d", "over 30 d")


class Rule(StrEnum):
    """What makes a key of an allowed type expired."""

    SAFE = "safe"
    """Past the retention and past its own expiry; the types that cost little."""
    ALL = "all"
    """Past the retention; every type that is not protected."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for."""

    run_id: str
    environment: str
    retention: timedelta
    rule: Rule = Rule.SAFE
    types: tuple[str, ...] = ()
    prune_pre_keys: bool = False
    companies: tuple[str, ...] = ()
    most_rows: int | None = None
    longest: timedelta | None = None
    pause_ratio: float = 1.0
    name_keys: bool = False
    """List each key in the details."""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The types that may go by age."""
        if self.types:
            return self.types
        wanted = {ExpiryPolicy.PAST_RETENTION}
        if self.rule is Rule.ALL:
            wanted.add(ExpiryPolicy.ON_REQUEST)
        return tuple(name for name, known in KNOWN.items() if known.expiry in wanted)


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One type in `--explain`."""

    key_type: str
    deleted: str
    losing_it: str


@dataclass(frozen=True, slots=True)
class CleanupRow:
    """One company's keys of one type."""

    company: str
    key_type: str
    keys: int
    expired: int
    expired_bytes: int
    deleted: int = 0
    oldest: str | None = None
    newest: str | None = None

    @property
    def oldest_day(self) -> str:
        """For the table."""
        return (self.oldest or "")[:10]


@dataclass(frozen=True, slots=True)
class Found:
    """What a cleanup would delete, at one moment."""

    expiry: Expiry
    census: tuple[CensusRow, ...]
    sizes: TableSizes
    system_identifier: str | None
    cautions: tuple[str, ...]
    """What the chosen policy can break, and what none touches."""
    warnings: tuple[str, ...]
    sample: tuple[str, ...]

    @property
    def expired(self) -> int:
        """Keys."""
        return sum(row.expired_count for row in self.census)

    @property
    def expired_bytes(self) -> int:
        """Of their values."""
        return sum(row.expired_bytes for row in self.census)


def require_allowed(types: Sequence[str]) -> None:
    """Raises `UsageError` for a type that nobody knows, and `Refused` for one that no age makes superfluous."""
    for name in types:
        if name not in KNOWN:
            raise UsageError(f"{name!r} is no type of key; known are {', '.join(KNOWN)}", hint="opsctl keys stats")
        known = KNOWN[name]
        if known.expiry is ExpiryPolicy.EXPERT_PRUNE:
            raise Refused(
                f"{name} is never deleted by age: losing one costs {known.losing_it}", hint="--prune-pre-keys"
            )
        if known.protected:
            raise Refused(
                f"{name} is never deleted by age: losing one costs {known.losing_it}",
                kind="protected-type",
                hint="opsctl keys cleanup --explain",
            )


def explain(wish: Wish) -> Report:
    """The policy as it stands, type by type."""
    days = wish.retention.days
    both = "" if wish.rule is Rule.ALL else " and past expires_at"
    rows = []
    for name, known in KNOWN.items():
        if name in wish.allowed:
            deleted = f"after {days} days{both}"
            if name == "sender-key":
                deleted += ", other members' only"
        elif known.expiry is ExpiryPolicy.EXPERT_PRUNE:
            deleted = f"all but the newest {PRE_KEYS_KEPT:,}" if wish.prune_pre_keys else "only by --prune-pre-keys"
        elif known.expiry is ExpiryPolicy.NEVER:
            deleted = "never"
        else:
            deleted = f"only by --type {name}"
        rows.append(PolicyRow(name, deleted, known.losing_it))
    rows.append(PolicyRow("any other", "never", "nobody knows"))
    return Report(
        summary=f"a key is expired when its last write is more than {days} days ago{both}; credentials never are",
        rows=rows,
        columns=(Column("Type", "key_type"), Column("Deleted", "deleted"), Column("Losing one costs", "losing_it")),
        facts={"retention_days": days, "policy": wish.rule},
    )


@repeatable
def find(open_connection: OpenConnection, wish: Wish, *, journal: Journal, naming: bool = False) -> Found:
    """Count what is expired, naming some keys or all; changes nothing.

    Raises `Refused` for a company that the database does not have.
    """
    with journal.step("find expired keys"), open_connection() as connection, snapshot(connection) as opened:
        now = datetime.fromisoformat(opened.server.snapshot_at)
        expiry = keys.Expiry(
            now=now,
            cutoff=now - wish.retention,
            types=wish.allowed,
            by_age_alone=wish.rule is Rule.ALL,
            companies=wish.companies or None,
            **_exceptions(opened, connection, wish),
        )
        if not wish.pause_ratio:  # nobody is to be spared
            connection.execute("SET LOCAL max_parallel_workers_per_gather TO DEFAULT")
        census = tuple(keys.take_census(connection, expiry))
        unknown = sorted(set(wish.companies) - {row.company_id for row in census})
        if unknown:
            named = ", ".join(map(ascii, unknown))
            raise Refused(
                f"the database has no keys of company {named}", kind="unknown-company", hint="opsctl keys stats"
            )
        shown = (wish.most_rows or _MOST_NAMED) if wish.name_keys else _SAMPLE
        sample = keys.list_expired(connection, expiry, most=shown) if naming else []
        return Found(
            expiry=expiry,
            census=tuple(row for row in census if not wish.companies or row.company_id in wish.companies),
            sizes=keys.measure_tables(connection),
            system_identifier=opened.server.system_identifier,
            cautions=tuple(_cautions(wish, census)),
            warnings=tuple(_pooled(opened.pooled)),
            sample=tuple(f"{key.company_id} {key.key_type} {key.key_id} ({key.updated_at})" for key in sample),
        )


def _exceptions(opened: Snapshot, connection: Connection, wish: Wish) -> dict[str, Any]:
    """What has to be known of each company before its sender-keys or pre-keys are touched."""
    if "sender-key" not in wish.allowed and not wish.prune_pre_keys:
        return {}
    own_senders: dict[str, list[str]] = {}
    prune_below: dict[str, int] = {}
    floors = keys.pre_key_floors(connection, kept=PRE_KEYS_KEPT) if wish.prune_pre_keys else {}
    for company, creds in opened.all_creds().items():
        found = credentials.examine(creds)
        if addresses := own_addresses(found.me_id, found.me_lid):
            own_senders[company] = sorted(addresses)
        following, unuploaded = found.next_pre_key_id, found.first_unuploaded_pre_key_id
        if company in floors and following is not None and unuploaded is not None:
            prune_below[company] = min(floors[company], unuploaded, following - 1)
    return {"own_senders": own_senders, "prune_below": prune_below}


def _cautions(wish: Wish, census: Sequence[CensusRow]) -> Iterator[str]:
    """What a wider policy can break, and what no policy touches."""
    expired = Counter[str]()
    for row in census:
        expired[row.key_type] += row.expired_count
    if wish.rule is Rule.ALL:
        yield "--policy all looks at the last write alone: live keys of quiet customers are among what it deletes"
    for name in wish.allowed:
        if KNOWN[name].expiry is ExpiryPolicy.ON_REQUEST:
            yield f"{expired[name]:,} {name}: losing one costs: {KNOWN[name].losing_it}"
    if wish.prune_pre_keys:
        cost = KNOWN["pre-key"].losing_it
        yield f"{expired['pre-key']:,} pre-keys are pruned: one that is still handed out costs {cost}"
    unknown = Counter[str]()
    for row in census:
        if row.key_type not in KNOWN:
            unknown[row.key_type] += row.key_count
    if unknown:
        listed = ", ".join(f"{count:,} {name}" for name, count in unknown.most_common(5))
        yield f"keys of unknown types are never deleted: {listed}; opsctl keys doctor says what they are"


def _pooled(pooled: bool) -> Iterator[str]:
    if pooled:
        yield (
            "PostgreSQL is reached through a pooler: in its transaction mode, the lock against a second run may stay "
            "behind; point DATABASE_URL at PostgreSQL itself"
        )


def preview(found: Found, wish: Wish) -> Report:
    """What `delete` would do."""
    sample = [f"for example {name}" for name in found.sample if not wish.name_keys]
    limit = f", at most {wish.most_rows:,} of them in one run" if _limited(found, wish) else ""
    return Report(
        summary=f"{found.expired:,} of {_total(found):,} keys are expired ({megabytes(found.expired_bytes)} of values)"
        f"{limit}; nothing was changed",
        notes=(*_notes(found), _size_note(found.sizes), *sample),
        rows=_rows(found, Counter()),
        columns=_PREVIEW_COLUMNS,
        facts=_facts(found, wish) | {"deleted": 0, "sample": list(found.sample)},
        warnings=(*found.cautions, *found.warnings),
        details=found.sample if wish.name_keys else (),
        next_lines=["opsctl keys cleanup"] if found.expired else [],
    )


def delete(
    open_connection: OpenConnection,
    found: Found,
    wish: Wish,
    *,
    state_dir: Path,
    keep_archives: timedelta,
    place: str,
    remaining: Callable[[], float | None],
    journal: Journal,
) -> Report:
    """Delete what `find` found, as far as it still holds, and say why it stopped.

    Raises `Locked` (another run), `Refused` (no archive) and `DatabaseUnavailable` with nothing deleted; what comes
    after the first deletion is told in the report: 6 for an error, 128 and the number for a signal.
    """
    head = Head(
        wish.run_id,
        "keys cleanup",
        datetime.now(UTC).isoformat(timespec="seconds"),
        wish.environment,
        place,
        found.system_identifier,
    )
    limits = Limits(wish.most_rows, wish.longest.total_seconds() if wish.longest else None, wish.pause_ratio, remaining)
    progress, archive, after = Progress(), None, None
    ended: BaseException | None = None
    with journal.step("delete expired keys", total=found.expired or None) as advance:
        try:
            with ExitStack() as opened:
                connection = opened.enter_context(open_connection())
                keys.require_writable(connection)
                keys.lock_keys(connection)
                archive = opened.enter_context(new_archive(state_dir, head, keep=keep_archives))
                archive.concerns(*(row.company_id for row in found.census if row.expired_count))
                Pass(connection, found.expiry, found.sizes, archive, limits, progress, advance).run()
                after = keys.measure_tables(connection)
        except (KeyboardInterrupt, OpsctlError, OSError) as error:
            ended = unwritable(state_dir, error) if isinstance(error, OSError) else error
            if archive is None or (isinstance(ended, OpsctlError) and not archive.rows):
                raise ended from None
    return _report(found, wish, progress, archive, after=after, ended=ended)


def _report(
    found: Found,
    wish: Wish,
    progress: Progress,
    archive: Archive,
    *,
    after: TableSizes | None,
    ended: BaseException | None,
) -> Report:
    exit_code, failure = _failure(progress, ended)
    warnings = list(found.warnings)
    if archive.rows_in_doubt:
        warnings.append(
            f"nobody answered the last commit: {archive.rows_in_doubt:,} keys are in the archive and may still be there"
        )
    stopped = {"done": "all of them", "max-rows": "stopped at --max-rows", "max-runtime": "stopped at --max-runtime"}
    facts = _facts(found, wish) | {
        "deleted": progress.rows,
        "skipped_locked": progress.locked,
        "changed_meanwhile": progress.changed,
        "in_doubt": archive.rows_in_doubt,
        "stopped": progress.stopped,
        "transactions": progress.transactions,
        "longest_transaction_ms": round(progress.longest_s * 1000, 1),
        "archive": str(archive.path) if archive.rows else None,
        "after": after and asdict(after),
    }
    why = stopped.get(progress.stopped, progress.stopped)
    return Report(
        summary=f"{progress.rows:,} of {found.expired:,} expired keys deleted ({why}), "
        f"{_total(found) - progress.rows:,} keys left",
        notes=(*_notes(found), *_size_notes(found, progress, after), *_left(progress), *found.cautions),
        rows=_rows(found, progress.deleted),
        columns=_COLUMNS,
        facts=facts,
        warnings=warnings,
        details=list(_named(archive)) if wish.name_keys and archive.rows else (),
        next_lines=[f"opsctl keys undo {wish.run_id} --dry-run    # puts them back", _VACUUM] if archive.rows else [],
        exit_code=exit_code,
        failure=failure,
        companies=sorted({company for company, _ in progress.deleted}),
        noteworthy=progress.rows > NOTEWORTHY,
    )


def _notes(found: Found) -> Iterator[str]:
    facts = _ages(found)
    yield "last written: " + ", ".join(f"{count:,} {name}" for name, count in facts["ages"].items())
    if facts["oldest"]:
        yield f"the oldest {facts['oldest']}, the newest {facts['newest']}"


def _left(progress: Progress) -> Iterator[str]:
    if progress.locked:
        yield f"{progress.locked:,} expired keys were locked by another session and left; the next run takes them"
    if progress.changed:
        yield f"{progress.changed:,} keys were written after they were found, and stay"


def _size_notes(found: Found, progress: Progress, after: TableSizes | None) -> Iterator[str]:
    yield _size_note(found.sizes) + (f"; afterwards {_size_note(after)}" if after else "")
    if progress.rows:
        yield "a VACUUM makes the space free for new rows; only VACUUM FULL would make the files smaller"


def _size_note(sizes: TableSizes) -> str:
    total = megabytes(sizes.table_bytes + sizes.index_bytes)
    return f"table {megabytes(sizes.table_bytes)}, indexes {megabytes(sizes.index_bytes)}, together {total}"


def _failure(progress: Progress, ended: BaseException | None) -> tuple[int, Failure | None]:
    """The exit code, and in `progress` why it ended."""
    so_far = f"after {progress.rows:,} deletions, each of them in the archive"
    again = "opsctl keys cleanup --yes    # goes on"
    if isinstance(ended, KeyboardInterrupt):
        number = signal.Signals(ended.exit_code - 128) if isinstance(ended, Interrupted) else signal.SIGINT
        progress.stopped = number.name
        return 128 + number, Failure("interrupted", f"stopped by {number.name} {so_far}", again)
    if isinstance(ended, OpsctlError):
        progress.stopped = ended.kind
        return HalfDone.exit_code, Failure(ended.kind, f"{ended.message}; stopped {so_far}", again)
    if progress.stopped == "deadline":
        return HalfDone.exit_code, Failure("deadline", f"the deadline came {so_far}", again)
    return 0, None


def _named(archive: Archive) -> Iterator[str]:
    """Every deleted key by name, for --verbose."""
    for line in archived_lines(archive.path):
        row = orjson.loads(line)["old"]
        yield f"{row['company_id']} {row['key_type']} {row['key_id']} ({row['updated_at']})"


def _rows(found: Found, deleted: Counter[tuple[str, str]]) -> list[CleanupRow]:
    return [
        CleanupRow(
            company=row.company_id,
            key_type=row.key_type,
            keys=row.key_count,
            expired=row.expired_count,
            expired_bytes=row.expired_bytes,
            deleted=deleted[row.company_id, row.key_type],
            oldest=row.oldest_at,
            newest=row.newest_at,
        )
        for row in found.census
        if row.expired_count or deleted[row.company_id, row.key_type]
    ]


def _facts(found: Found, wish: Wish) -> dict[str, Any]:
    return {
        "keys": _total(found),
        "expired": found.expired,
        "expired_bytes": found.expired_bytes,
        "policy": wish.rule,
        "types": list(wish.allowed),
        "retention_days": wish.retention.days,
        "cutoff": found.expiry.cutoff.isoformat(),
        "before": asdict(found.sizes),
        **_ages(found),
    }


def _ages(found: Found) -> dict[str, Any]:
    ages = Counter[str]()
    for row in found.census:
        for name, count in zip(AGES, row.ages, strict=True):
            ages[name] += count
    return {
        "ages": dict(ages),
        "oldest": min((row.oldest_at for row in found.census if row.oldest_at), default=None),
        "newest": max((row.newest_at for row in found.census if row.newest_at), default=None),
    }


def _total(found: Found) -> int:
    return sum(row.key_count for row in found.census)


def _limited(found: Found, wish: Wish) -> bool:
    return wish.most_rows is not None and found.expired > wish.most_rows


def megabytes(size_bytes: int) -> str:
    """A size for people.

    >>> megabytes(2_400_000)
    '2.4 MB'
    """
    return f"{size_bytes / 1_000_000:,.1f} MB"


_VACUUM = 'psql "$DATABASE_URL" -c "VACUUM (ANALYZE) whatsapp_keys"'
_COLUMNS = (
    Column("Company", "company"),
    Column("Type", "key_type"),
    Column("Keys", "keys", numeric=True),
    Column("Expired", "expired", numeric=True),
    Column("Deleted", "deleted", numeric=True),
    Column("Oldest", "oldest_day"),
)
_PREVIEW_COLUMNS = (
    Column("Company", "company"),
    Column("Type", "key_type"),
    Column("Keys", "keys", numeric=True),
    Column("Expired", "expired", numeric=True),
    Column("Bytes", "expired_bytes", numeric=True),
    Column("Oldest", "oldest_day"),
)
