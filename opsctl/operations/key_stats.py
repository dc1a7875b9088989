"""How many keys there are, of which types, how large, how old, and how fast they grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsctl.baileys.key_types import KNOWN
from opsctl.operations import cleanup
from opsctl.operations.cleanup import AGES, megabytes
from opsctl.report import Column, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from opsctl.db import Connection
    from opsctl.journal import Journal
    from opsctl.stores.keys import CensusRow

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 30
_GROWTH_DAYS = 7


@dataclass(frozen=True, slots=True)
class StatsRow:
    """One company's keys of one type. `ages` are keys under 1, 7, 14 and 30 days, and older."""

    company: str
    key_type: str
    keys: int
    size_bytes: int
    ages: tuple[int, ...]
    per_day: float
    """Keys a day, over the last 7 days."""
    expired: int
    oldest: str | None
    newest: str | None

    @property
    def size(self) -> str:
        """For the table."""
        return megabytes(self.size_bytes)

    @property
    def bars(self) -> str:
        """The ages as five bars, the fullest one full.

        >>> StatsRow("1", "session", 12, 0, (0, 1, 8, 3, 0), 0.0, 0, None, None).bars
        ' ▁█▃ '
        """
        most = max(self.ages) or 1
        return "".join(_BARS[-(-age * (len(_BARS) - 1) // most)] for age in self.ages)


_COLUMNS = (
    Column("Company", "company"),
    Column("Type", "key_type"),
    Column("Keys", "keys", numeric=True),
    Column("Size", "size", numeric=True),
    Column("A day", "per_day", numeric=True),
    Column("Expired", "expired", numeric=True),
    Column("Ages", "bars"),
)


def count_keys(
    open_connection: Callable[[], AbstractContextManager[Connection]],
    *,
    retention: timedelta,
    companies: tuple[str, ...],
    journal: Journal,
) -> Report:
    """One pass over the table. Raises `Refused` for a company that the database does not have."""
    wish = cleanup.Wish(run_id="", environment="", retention=retention, companies=companies)
    found = cleanup.find(open_connection, wish, journal=journal)
    rows = [_row(row) for row in found.census]
    totals = [sum(row.ages[index] for row in rows) for index in range(len(AGES))]
    unknown = sorted({row.key_type for row in rows} - KNOWN.keys())
    sizes = found.sizes
    return Report(
        summary=f"{sum(totals):,} keys of {len({row.company for row in rows})} companies, {found.expired:,} expired",
        rows=rows,
        columns=_COLUMNS,
        notes=[*_age_bars(totals), _sizes(sizes.table_bytes, sizes.index_bytes), *found.cautions],
        facts={
            "keys": sum(totals),
            "expired": found.expired,
            "expired_bytes": found.expired_bytes,
            "per_day": round(sum(row.per_day for row in rows), 1),
            "ages": dict(zip(AGES, totals, strict=True)),
            "table_bytes": sizes.table_bytes,
            "index_bytes": sizes.index_bytes,
            "total_bytes": sizes.table_bytes + sizes.index_bytes,
            "unknown_types": unknown,
            "retention_days": retention.days,
        },
        warnings=found.warnings,
        next_lines=["opsctl keys cleanup --dry-run"] if found.expired else [],
    )


def _row(row: CensusRow) -> StatsRow:
    return StatsRow(
        company=row.company_id,
        key_type=row.key_type,
        keys=row.key_count,
        size_bytes=row.size_bytes,
        ages=row.ages,
        per_day=round(row.created_in_7_days / _GROWTH_DAYS, 1),
        expired=row.expired_count,
        oldest=row.oldest_at,
        newest=row.newest_at,
    )


def _age_bars(totals: Sequence[int]) -> list[str]:
    """A line per age.

    >>> _age_bars([0, 2, 4, 0, 1])[2]
    '7-14 d     ############################## 4'
    """
    most = max(totals) or 1
    return [
        f"{name:<10} {'#' * -(-total * _WIDTH // most)} {total:,}" for name, total in zip(AGES, totals, strict=True)
    ]


def _sizes(table_bytes: int, index_bytes: int) -> str:
    return f"table {megabytes(table_bytes)}, indexes {megabytes(index_bytes)}, values alone are in the column Size"
