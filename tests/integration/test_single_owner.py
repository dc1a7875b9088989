"""Nothing that moves sessions or mends their rows begins while somebody else writes them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.integration.fleet import FIRST, Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

STOPPED = {
    "SERVICE_MANAGER": "command",
    "SERVICE_NAMES": "wa",
    "SERVICE_STATUS_COMMAND": "sh -c 'exit 3'",
    "SERVICE_STOP_COMMAND": "true",
    "SERVICE_START_COMMAND": "true",
}


@contextmanager
def somebody_writing(fleet: Fleet) -> Iterator[None]:
    """A program that no service manager knows."""
    over = threading.Event()

    def write() -> None:
        with fleet.database.connect() as connection:
            while not over.wait(0.1):
                connection.execute("UPDATE whatsapp_keys SET updated_at = now() WHERE company_id = %s", [FIRST])
                # Without it PostgreSQL may keep a session's counters to itself for a minute.
                connection.execute("SELECT pg_stat_force_next_flush()")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_services_that_are_stopped_are_not_enough_while_somebody_changes_the_tables(fleet: Fleet) -> None:
    fleet.restored()
    fleet.key("lid", "mapping-77", '"88"')  # which doctor would mend
    folders = {"SESSIONS_DIR": str(fleet.target), **STOPPED}
    lines = [
        ("sessions", "failback", "--yes"),
        ("sessions", "repair", "--company", FIRST, "--from", "folder", "--yes"),
        ("keys", "doctor", "--fix", "--yes"),
        ("sessions", "restore", "--discard-changes", "--yes"),
    ]
    with somebody_writing(fleet), ThreadPoolExecutor(len(lines)) as at_once:
        endings = list(at_once.map(lambda words: fleet.run_opsctl(*words, env=fleet.env | folders), lines))
    for words, done in zip(lines, endings, strict=True):
        assert done.returncode == 5, (words, done)
        assert "somebody goes on changing the tables of sessions" in done.stderr, (words, done)
