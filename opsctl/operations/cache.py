"""The service's credentials cache: what is in it and whether it would help, filling it, emptying it.

No more than its shape, ages and fingerprints ever leave it.
"""

from __future__ import annotations

import pwd
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from opsctl.baileys import credentials
from opsctl.baileys.buffers import normalise, revive
from opsctl.baileys.filenames import is_company_id
from opsctl.errors import Refused, SourceUnavailable
from opsctl.report import Column, Failure, Report, duration
from opsctl.retry import repeatable
from opsctl.stores import cache_file
from opsctl.stores.cache_file import CredentialsCache, Validity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.stores.cache_file import CachedCreds, CacheFile
    from opsctl.stores.postgres import Snapshot

OVERWRITTEN = "a service that runs overwrites this at its next save, and reads the file only when it starts"
NOT_CHECKED = "no file tells whether WhatsApp still knows it, or another process uses it"
_FINGERPRINT = 12  # hexadecimal digits: enough to tell a thousand accounts apart
_FIELDS_NAMED = 4


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One company. `state` is valid, expired, future, damaged or missing; `account` a fingerprint of me.id."""

    company: str
    state: str
    age_s: float | None = None
    age: str | None = None
    of_ttl: str | None = None
    credentials: str | None = None
    account: str | None = None
    keys: bool | None = None
    database: str | None = None
    """How the database has the same creds, if it was asked."""
    findings: tuple[str, ...] = ()

    @property
    def unwell(self) -> bool:
        """Whether this entry would not help in an outage, whatever its age."""
        return self.state == "damaged" or self.credentials == "cannot log in"


@dataclass(frozen=True, slots=True)
class ChangedRow:
    """What became of one company's entry."""

    company: str
    result: str
    why: str | None = None


_COLUMNS = (
    Column("Company", "company"),
    Column("Entry", "state"),
    Column("Age", "age", numeric=True),
    Column("Of TTL", "of_ttl", numeric=True),
    Column("Creds", "credentials"),
    Column("Account", "account"),
    Column("Keys", "keys"),
)
_CHANGED = (Column("Company", "company"), Column("Result", "result"), Column("Why", "why"))


def inspect_cache(
    path: Path,
    *,
    ttl: timedelta,
    companies: tuple[str, ...],
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]] | None,
    journal: Journal,
) -> Report:
    """Every entry, and the file itself; 1 where not all of it can be used, or it differs from the database's.

    Raises `SourceUnavailable` where there is no cache, and `Refused` for a company that it does not know.
    """
    with journal.step("read the cache"):
        found = cache_file.read_cache(path)
        now = datetime.now(UTC)
        rows = {entry.company_id: _row(entry, now, ttl) for entry in found.entries.values()}
        rows |= {d.company_id: CacheRow(d.company_id, "damaged", findings=(d.problem,)) for d in found.damaged}
    if open_snapshot is not None:
        with journal.step("ask the database"):
            theirs = _all_creds(open_snapshot)
        rows = _against(rows, found, theirs)
    rows = _asked_for(rows, companies, path)
    failure = _failure(path, found, list(rows.values()))
    counts = ", ".join(f"{n} {s}" for s in _STATES if (n := sum(row.state == s for row in rows.values())))
    return Report(
        summary=f"{path}: {counts or 'no entries'}; {found.size_bytes:,} bytes, mode {found.mode:04o}, "
        f"owner {_user(found.uid)}",
        rows=[rows[company] for company in sorted(rows)],
        columns=(*_COLUMNS, *([Column("Database", "database")] if open_snapshot else [])),
        facts={
            "path": str(path),
            "size_bytes": found.size_bytes,
            "mode": f"{found.mode:04o}",
            "owner": _user(found.uid),
            "ttl_ms": round(ttl.total_seconds() * 1000),
            "torn": found.torn,
            "leftovers": [left.name for left in cache_file.leftovers(path)],
        },
        warnings=_warnings(path, found, list(rows.values())),
        notes=[NOT_CHECKED],
        details=[f"{row.company}: {finding}" for row in rows.values() for finding in row.findings],
        exit_code=1 if failure else 0,
        failure=failure,
    )


_STATES = (*(validity.value for validity in Validity), "damaged", "missing")


def _row(entry: CachedCreds, now: datetime, ttl: timedelta) -> CacheRow:
    age = now - entry.cached_at
    examined = credentials.examine(entry.creds)
    me_id = examined.me_id
    if examined.unusable or not examined.registered:
        verdict = "cannot log in"
    else:
        verdict = f"{len(examined.findings)} warnings" if examined.findings else "ok"
    return CacheRow(
        company=entry.company_id,
        state=entry.validity(now, ttl).value,
        age_s=round(age.total_seconds(), 3),
        age=duration(age.total_seconds()),
        of_ttl=f"{min(age / ttl, 99.99):.0%}" if age >= type(age)() else None,
        credentials=verdict,
        account=credentials.me_fingerprint(me_id)[:_FINGERPRINT] if me_id else None,
        keys=entry.holds_keys,
        findings=tuple(finding.message for finding in examined.findings),
    )


def _against(rows: dict[str, CacheRow], found: CacheFile, theirs: dict[str, bytes]) -> dict[str, CacheRow]:
    compared = {
        company: replace(row, database=_drift(found.entries.get(company), theirs.get(company)))
        for company, row in rows.items()
    }
    missing = {company: CacheRow(company, "missing", database="has it") for company in theirs.keys() - rows.keys()}
    return compared | missing


def _drift(ours: CachedCreds | None, theirs: bytes | None) -> str:
    """How the database's creds differ, by the names of fields, which are no secret."""
    if theirs is None:
        return "has it not"
    if ours is None:
        return "has it"
    mine, others = revive(orjson.loads(ours.creds)), _revived(theirs)
    if not (isinstance(mine, dict) and isinstance(others, dict)):
        return "is damaged"
    if mine.get("me") and others.get("me") and _me(mine) != _me(others):
        return "another account"
    fields = [name for name in sorted(mine.keys() | others.keys()) if mine.get(name) != others.get(name)]
    if not fields:
        return "same"
    more = len(fields) - _FIELDS_NAMED
    return "differs: " + ", ".join(fields[:_FIELDS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _revived(creds: bytes) -> object:
    """What the database has, None for what nobody can walk through: JSONB may be nested without end."""
    try:
        value = orjson.loads(creds)
    except orjson.JSONDecodeError:
        return None
    return None if cache_file.nested_too_deeply(value) else revive(value)


def _me(creds: dict[str, object]) -> object:
    me = creds["me"]
    return me.get("id") if isinstance(me, dict) else me


def _asked_for(rows: dict[str, CacheRow], companies: tuple[str, ...], path: Path) -> dict[str, CacheRow]:
    unknown = sorted(set(companies) - rows.keys())
    if unknown:
        raise Refused(f"{path} holds nothing of {', '.join(map(ascii, unknown))}", kind="unknown-company")
    return {company: row for company, row in rows.items() if not companies or company in companies}


def _failure(path: Path, found: CacheFile, rows: Sequence[CacheRow]) -> Failure | None:
    if found.torn:
        return Failure("torn", f"{path} is no whole cache: {found.torn}", hint="opsctl cache warm")
    unwell = [row.company for row in rows if row.unwell]
    if unwell:
        return Failure("damaged", f"nobody could log in with {', '.join(map(ascii, unwell))}", "opsctl cache warm")
    drifted = [row.company for row in rows if row.database and row.database not in {"same", "has it"}]
    if drifted:
        what = f"the cache is not what the database has for {', '.join(map(ascii, drifted))}"
        return Failure("drift", what, hint="opsctl cache warm")
    return None


def _warnings(path: Path, found: CacheFile, rows: Sequence[CacheRow]) -> list[str]:
    warnings = []
    if found.mode & 0o077:
        warnings.append(f"others may look at {path} ({found.mode:04o}): chmod 600 {path}")
    folder = path.parent.stat()
    if found.uid != folder.st_uid:
        warnings.append(f"{path} belongs to {_user(found.uid)}, its folder to {_user(folder.st_uid)}")
    if left := cache_file.leftovers(path):
        warnings.append(f"left beside it: {', '.join(file.name for file in left)}")
    if future := [row.company for row in rows if row.state == Validity.FUTURE]:
        warnings.append(f"of the future, so never to be trusted: {', '.join(map(ascii, future))}")
    if missing := [row.company for row in rows if row.state == "missing"]:
        warnings.append(f"in the database and not in the cache: {', '.join(map(ascii, missing))}")
    return warnings


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@repeatable
def _all_creds(open_snapshot: Callable[[], AbstractContextManager[Snapshot]]) -> dict[str, bytes]:
    with open_snapshot() as snapshot:
        return snapshot.all_creds()


def find_creds(
    open_snapshot: Callable[[], AbstractContextManager[Snapshot]], *, companies: tuple[str, ...], journal: Journal
) -> tuple[dict[str, bytes], dict[str, str]]:
    """What of the database can be cached, by company, in Baileys' own bytes; and why the rest cannot.

    Raises `DatabaseUnavailable`, `SourceUnavailable` (no rows) and `Refused` (an unknown company).
    """
    with journal.step("read credentials"):
        rows = _all_creds(open_snapshot)
    if not rows:
        raise SourceUnavailable("whatsapp_auth holds no company", kind="no-rows", hint="opsctl config show")
    unknown = sorted(set(companies) - rows.keys())
    if unknown:
        raise Refused(f"the database holds no {', '.join(map(ascii, unknown))}", kind="unknown-company")
    usable, left_out = {}, {}
    for company, text in rows.items():
        if companies and company not in companies:
            continue
        normalised = normalise(text)
        problem = normalised.problem or _problem(company, normalised.data)
        if problem is None:
            usable[company] = normalised.data
        else:
            left_out[company] = problem
    return usable, left_out


def _problem(company: str, creds: bytes) -> str | None:
    """Why the service could not start with these creds."""
    if not is_company_id(company):
        return "not a company id"
    if cache_file.nested_too_deeply(orjson.loads(creds)):
        return "nested too deeply"
    examined = credentials.examine(creds)
    if examined.unusable:
        return next(f.message for f in examined.findings if f.severity is credentials.Severity.UNUSABLE)
    return None if examined.registered else "abandoned pairing: will ask for a QR code"


def preview_warm(usable: dict[str, bytes], left_out: dict[str, str], *, path: Path) -> Report:
    """What `warm_cache` would do."""
    rows = [
        *(ChangedRow(c, "would be cached") for c in usable),
        *(ChangedRow(c, "left out", w) for c, w in left_out.items()),
    ]
    return Report(
        f"{len(usable)} companies would be written to {path}", rows=rows, columns=_CHANGED, warnings=[OVERWRITTEN]
    )


def warm_cache(
    cache: CredentialsCache, usable: dict[str, bytes], left_out: dict[str, str], *, journal: Journal
) -> Report:
    """Put these companies into the cache as of now. Raises `Refused` where none can be."""
    if not usable:
        raise Refused(f"no company's credentials can be used: {'; '.join(left_out.values())}", kind="unusable")
    with journal.step("write the cache"), cache:
        for company, text in usable.items():
            creds = orjson.loads(text)
            cache.set(company, creds)
        kept = set(cache.known())
    dropped = dict.fromkeys(usable.keys() - kept, f"more than {cache.max_entries} companies") | left_out
    failure = None
    if dropped:
        what = f"{len(dropped)} companies are not in the cache: {', '.join(map(ascii, sorted(dropped)))}"
        failure = Failure("half-done", what, hint="opsctl cache inspect --against database")
    rows = [
        ChangedRow(c, "left out", dropped[c]) if c in dropped else ChangedRow(c, "cached") for c in usable | left_out
    ]
    return Report(
        f"{len(usable.keys() & kept)} companies cached in {cache.path} for {duration(cache.ttl.total_seconds())}",
        rows=rows,
        columns=_CHANGED,
        facts=_facts(cache),
        warnings=[OVERWRITTEN, *_set_aside(cache)],
        exit_code=6 if dropped else 0,
        failure=failure,
        companies=sorted(dropped),
    )


def preview_clear(path: Path, *, companies: tuple[str, ...]) -> Report:
    """What `clear_cache` would do. Raises `SourceUnavailable` for what is no cache."""
    found = cache_file.read_cache(path)
    known = [*found.entries, *(entry.company_id for entry in found.damaged)]
    _check_known(known, companies, path)
    gone = [company for company in known if not companies or company in companies]
    return Report(
        f"{len(gone)} of {len(known)} entries of {path} would be cleared",
        rows=[ChangedRow(company, "would be cleared") for company in gone],
        columns=_CHANGED,
        warnings=[OVERWRITTEN],
    )


def clear_cache(cache: CredentialsCache, *, companies: tuple[str, ...]) -> Report:
    """Forget these companies, or all. Raises `Refused` for a company that is not there."""
    with cache:
        known = cache.known()
        _check_known(known, companies, cache.path)
        if companies:
            for company in companies:
                cache.clear(company)
        else:
            cache.clear_all()
    gone = [company for company in known if not companies or company in companies]
    return Report(
        f"{len(gone)} of {len(known)} entries of {cache.path} cleared",
        rows=[ChangedRow(company, "cleared") for company in gone],
        columns=_CHANGED,
        facts=_facts(cache),
        warnings=[*([OVERWRITTEN] if gone else []), *_set_aside(cache)],
    )


def _check_known(known: Sequence[str], companies: tuple[str, ...], path: Path) -> None:
    unknown = sorted(set(companies) - set(known))
    if unknown:
        raise Refused(f"{path} holds nothing of {', '.join(map(ascii, unknown))}", kind="unknown-company")


def _facts(cache: CredentialsCache) -> dict[str, str | None]:
    return {"path": str(cache.path), "set_aside": str(cache.set_aside) if cache.set_aside else None}


def _set_aside(cache: CredentialsCache) -> list[str]:
    if cache.set_aside is None:
        return []
    return [f"not all of the cache could be read ({cache.torn or 'damaged entries'}); it is kept as {cache.set_aside}"]
