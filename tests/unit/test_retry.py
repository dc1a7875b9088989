"""What of PostgreSQL's failures is tried again, and when."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import psycopg
import pytest

from opsctl import db
from opsctl.errors import DatabaseUnavailable, Refused
from opsctl.retry import ATTEMPTS, repeatable, retrying

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSIENT_STATES = ("08006", "08003", "57P03")
TRANSIENT_WORDS = {
    'could not translate host name "db" to address: Name or service not known': "name-not-found",
    'could not translate host name "db" to address: Temporary failure in name resolution': "name-not-found",
    "connection to server at 127.0.0.1, port 5 failed: Connection refused": "refused",
    "connection to server at 10.0.0.1, port 5 failed: Connection timed out": "timeout",
    "connection timeout expired": "timeout",
    "could not receive data from server: Connection reset by peer": "reset",
    "server closed the connection unexpectedly": "reset",
    "FATAL:  the database system is starting up": "starting",
}
FINAL_WORDS = {
    'FATAL:  password authentication failed for user "u"': "authentication",
    'FATAL:  no pg_hba.conf entry for host "10.0.0.1"': "authentication",
    'FATAL:  database "d" does not exist': "missing-database",
    "FATAL:  sorry, too many clients already": "too-many-clients",
    "server does not support SSL, but SSL was required": "tls",
}


def failing(kind: str, *, transient: bool, times: int) -> tuple[list[float], Callable[[], str]]:
    """A step that fails so many times, and when it was tried."""
    tried: list[float] = []

    def step() -> str:
        tried.append(time.monotonic())
        if len(tried) <= times:
            raise DatabaseUnavailable("no", kind=kind, transient=transient)
        return "done"

    return tried, step


@pytest.mark.parametrize("state", TRANSIENT_STATES)
def test_a_state_that_passes_is_transient(state: str) -> None:
    assert db.translated(psycopg.errors.lookup(state)("secret")).transient


@pytest.mark.parametrize("state", ["42601", "42501", "42P01", "28P01", "3D000", "53300", "22P02", "55P03", "XX001"])
def test_a_state_that_waiting_does_not_mend_is_not(state: str) -> None:
    error = db.translated(psycopg.errors.lookup(state)("secret"))
    assert not error.transient
    assert "secret" not in error.message


def test_a_connection_that_breaks_in_the_middle_is_transient() -> None:
    assert db.translated(psycopg.OperationalError("server closed the connection unexpectedly")).transient


@pytest.mark.parametrize("said", TRANSIENT_WORDS)
def test_a_failure_to_connect_that_passes_is_transient(said: str) -> None:
    error = db._connection_failure(psycopg.OperationalError(said), {"host": "db"}, 0)
    assert (error.kind, error.transient) == (TRANSIENT_WORDS[said], True)


@pytest.mark.parametrize("said", FINAL_WORDS)
def test_a_failure_to_connect_that_stays_is_not(said: str) -> None:
    error = db._connection_failure(psycopg.OperationalError(said), {"host": "db"}, 0)
    assert (error.kind, error.transient) == (FINAL_WORDS[said], False)


def test_three_attempts_are_made_100_and_200_ms_apart() -> None:
    tried, step = failing("refused", transient=True, times=2)
    assert retrying()(step) == "done"
    waits = [later - earlier for earlier, later in pairwise(tried)]
    assert 0.1 <= waits[0] < 0.19
    assert 0.2 <= waits[1] < 0.39


def test_after_three_attempts_the_failure_is_the_answer() -> None:
    tried, step = failing("refused", transient=True, times=9)
    with pytest.raises(DatabaseUnavailable):
        repeatable(step)()
    assert len(tried) == ATTEMPTS == 3


def test_what_does_not_pass_is_tried_once() -> None:
    tried, step = failing("authentication", transient=False, times=9)
    with pytest.raises(DatabaseUnavailable):
        repeatable(step)()
    assert len(tried) == 1

    def refuse() -> None:
        tried.append(0)
        raise Refused("no")

    with pytest.raises(Refused):
        repeatable(refuse)()
    assert len(tried) == 2


def test_past_its_clock_nothing_is_tried_again() -> None:
    tried, step = failing("refused", transient=True, times=9)
    with pytest.raises(DatabaseUnavailable):
        retrying(time.monotonic() + 0.05)(step)
    assert len(tried) == 2
