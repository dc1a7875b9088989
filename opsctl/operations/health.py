"""Is the database well? Every check of `health_checks`, one after the other; none hides another.

All together end within `BUDGET_S` by our own clock, whatever the server does: what was not asked by then is unknown.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import psycopg

from opsctl import db
from opsctl.errors import HINTS, DatabaseUnavailable
from opsctl.operations.health_checks import (
    DATABASE_CHECKS,
    LOCAL_CHECKS,
    Check,
    Group,
    HealthRow,
    LocalCheck,
    Server,
    State,
)
from opsctl.report import Column, Failure, Report

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from opsctl.settings import Settings

BUDGET_S = 5.0
TREND_POINTS = 30
_BROKEN = frozenset({"missing-table", "missing-column", "corrupt"})
"""A check that fails like this has found something."""
_ORDER = (State.OK, State.HIDDEN, State.UNKNOWN, State.WARNING, State.CRITICAL)
_COLUMNS = (Column("Check", "check"), Column("State", "state"), Column("To critical", "bar"), Column("Seen", "seen"))


@dataclass(frozen=True, slots=True)
class Health:
    """What all checks saw. `failure` says why the database could not be asked; `asking_s` is without the probes."""

    rows: tuple[HealthRow, ...]
    asking_s: float
    elapsed_s: float
    at: str
    """When the checks ended, ISO 8601 in UTC."""
    failure: Failure | None = None
    answered: bool = True
    """Whether the database did, to the end."""

    @property
    def worst(self) -> State:
        """The worst state of any check."""
        return max((row.state for row in self.rows), key=_ORDER.index, default=State.OK)


def examine(settings: Settings, *, only: Collection[Group] = (), budget_s: float = BUDGET_S) -> Health:
    """Ask everything once. Raises `SettingsError` without an address where the database is to be asked."""
    started = time.monotonic()
    rows: list[HealthRow] = []
    failure = None
    answered = True
    asking_s = 0.0
    checks = [check for check in DATABASE_CHECKS if not only or check.group in only]
    if checks:
        parameters = db.address(settings)
        try:
            with db.connect(parameters, budget_s) as connection:
                server = Server(connection, settings, reply_s=time.monotonic() - started)
                for check in checks:
                    rows += _looked(check, server)
                asking_s = server.asking_s
                answered = not server.connection.closed
                if not answered:
                    rows = _stopped_answering(rows, in_time=time.monotonic() < connection.give_up_at)
        except DatabaseUnavailable as error:
            answered = False
            failure = Failure(error.kind, error.message, error.hint, error.runbook)
            rows.insert(0, HealthRow("reply", Group.REACH, State.CRITICAL, error.message, action=error.hint))
    for local in LOCAL_CHECKS:
        if not only or local.group in only:
            rows += _looked_here(local, settings)
    order = list(Group)
    rows.sort(key=lambda row: order.index(row.group))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Health(tuple(rows), asking_s, time.monotonic() - started, at, failure, answered)


def _stopped_answering(rows: Sequence[HealthRow], *, in_time: bool) -> list[HealthRow]:
    """The rows of a server that answered first and then no more: no single check's matter, and worse than unknown."""
    reply = next((row for row in rows if row.check == "reply"), HealthRow("reply", Group.REACH, State.OK, "connected"))
    why = "stopped answering in the middle" if in_time else "not all was answered in time"
    stopped = replace(reply, state=State.CRITICAL, seen=f"{reply.seen}, then {why}", action="opsctl triage")
    return [stopped, *(row for row in rows if row is not reply)]


def _looked(check: Check, server: Server) -> list[HealthRow]:
    """One check's rows, whatever becomes of it."""
    if server.connection.closed:
        return [HealthRow(check.name, check.group, State.UNKNOWN, "not asked: the connection is gone")]
    try:
        return list(check.look(server))
    except psycopg.Error as error:
        problem = db.translated(error)
    except DatabaseUnavailable as error:
        problem = error
    if problem.kind == "permission":
        return [HealthRow(check.name, check.group, State.HIDDEN, problem.message, action=problem.hint)]
    state = State.CRITICAL if problem.kind in _BROKEN else State.UNKNOWN
    action = HINTS.get(problem.kind)
    return [HealthRow(check.name, check.group, state, problem.message, action=action)]


def _looked_here(check: LocalCheck, settings: Settings) -> list[HealthRow]:
    try:
        return list(check.look(settings))
    except OSError as error:
        return [HealthRow(check.name, check.group, State.UNKNOWN, error.strerror or type(error).__name__)]
    except ValueError:  # a file of ours that somebody changed
        return [HealthRow(check.name, check.group, State.UNKNOWN, "what is remembered here cannot be read")]


def report(health: Health) -> Report:
    """0: well, or only warnings; 1: something is critical or could not be asked; 4: the database gave no answer."""
    counts = {state: sum(row.state is state for row in health.rows) for state in _ORDER}
    bad = [row for row in health.rows if row.state in {State.CRITICAL, State.UNKNOWN}]
    failure = health.failure
    if failure is None and bad:
        what = "; ".join(f"{row.check}: {row.seen}" for row in bad)
        failure = Failure("unhealthy", what, hint=bad[0].action or "opsctl triage")
    said = [f"{count} {state}" for state, count in counts.items() if count]
    return Report(
        summary=f"{', '.join(said)}; asked in {health.elapsed_s:.2f} s",
        rows=health.rows,
        columns=_COLUMNS,
        facts={
            "at": health.at,
            "worst": health.worst.value,
            "elapsed_ms": round(health.elapsed_s * 1000, 1),
            "queries_ms": round(health.asking_s * 1000, 1),
        },
        warnings=[
            f"{row.check} is {row.state}: {row.action}"
            for row in health.rows
            if row.action and row.state not in {State.OK, State.HIDDEN}
        ],
        details=[f"{row.check}: {row.action}" for row in health.rows if row.state is State.HIDDEN and row.action],
        exit_code=4 if health.failure else 1 if bad else 0,
        failure=failure,
    )


class Trends:
    """The last values of every check, as a line of blocks beside its row."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def added(self, health: Health) -> Health:
        """The same rows, each with its trend up to now."""
        return replace(health, rows=tuple(self._with_trend(row) for row in health.rows))

    def _with_trend(self, row: HealthRow) -> HealthRow:
        if row.value is None:
            return row
        values = self._values.setdefault(row.check, deque(maxlen=TREND_POINTS))
        values.append(row.value)
        return replace(row, trend=sparkline(values))


_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """Values as a line of blocks from their least to their largest.

    >>> sparkline([1, 2, 3, 8]), sparkline([5, 5])
    ('▁▂▃█', '▁▁')
    """
    low, span = min(values), max(values) - min(values)
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1)) if span else 0] for value in values)
