"""What is deleted is in the archive first, and an archive can be read whatever became of its run."""

from __future__ import annotations

import os
import resource
import subprocess
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import orjson
import psycopg
import pytest

from opsctl import db
from opsctl.errors import DatabaseUnavailable, Refused
from opsctl.stores.archive import ARCHIVE_FOLDER, Archive, Head, archived_lines, archived_runs, find_run, new_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Database

HEAD = Head("20260131T030405Z-00000a", "keys cleanup", "2026-01-31T03:04:05+00:00", "production", "db:5432/wa", "7")
KEEP = timedelta(days=90)


@contextmanager
def connected(database: Database) -> Iterator[db.Connection]:
    with db.connect(psycopg.conninfo.conninfo_to_dict(database.conninfo), 30) as connection:
        yield connection


def lines(*numbers: int) -> bytes:
    return b"".join(
        orjson.dumps({"table": "whatsapp_keys", "old": {"key_id": str(n), "value": "x" * 40}}) + b"\n" for n in numbers
    )


def read(path: Path) -> list[int]:
    return [int(orjson.loads(line)["old"]["key_id"]) for line in archived_lines(path)]


def one_transaction(archive: Archive, connection: db.Connection, rows: bytes, then: Callable[[], object]) -> None:
    with archive.transaction(connection) as keep:
        keep(rows)
        then()


def written(connection: db.Connection, state: Path, *transactions: tuple[int, ...], head: Head = HEAD) -> Path:
    with new_archive(state, head, keep=KEEP) as archive:
        for numbers in transactions:
            with archive.transaction(connection) as keep:
                keep(lines(*numbers))
        archive.concerns("962303", "962302")
    return archive.path


def test_what_was_kept_reads_back_for_the_owner_only_and_with_zcat(database: Database, tmp_path: Path) -> None:
    with connected(database) as connection:
        path = written(connection, tmp_path, (1, 2), (), (3,))
    assert read(path) == [1, 2, 3]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    (run,) = archived_runs(tmp_path)
    assert run == find_run(tmp_path, HEAD.run_id)
    assert (run.head, run.rows, run.companies, run.ended) == (HEAD, 3, ("962302", "962303"), "done")
    unpacked = subprocess.run(["zcat", path], capture_output=True, check=True).stdout
    assert unpacked.startswith(b'{"schema":"opsctl-archive/1"')
    assert lines(1, 2) + lines(3) in unpacked


def test_a_file_cut_at_any_byte_gives_the_transactions_that_are_whole(database: Database, tmp_path: Path) -> None:
    with connected(database) as connection:
        path = written(connection, tmp_path, (1, 2), (3,), (4, 5))
    whole = path.read_bytes()
    seen = set()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = read(path)
        assert found == list(range(1, len(found) + 1))
        seen.add(len(found))
        assert [run.ended for run in archived_runs(tmp_path)] in ([], ["killed"])
    assert seen == {0, 2, 3, 5}


def test_the_rows_are_in_the_file_before_the_commit(database: Database, tmp_path: Path) -> None:
    """The server dies at the commit: nobody knows whether it happened, so the rows must be there."""
    with suppress(DatabaseUnavailable), connected(database) as connection:
        pid = connection.info.backend_pid
        with new_archive(tmp_path, HEAD, keep=KEEP) as archive:
            kept = archive.transaction(connection)
            kept.__enter__()(lines(1))
            database.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            kept.__exit__(None, None, None)
        pytest.fail("the commit cannot have been answered")
    assert archive.rows_in_doubt == 1
    assert read(archive.path) == [1]
    assert [(run.rows, run.ended) for run in archived_runs(tmp_path)] == [(1, "stopped")]


def test_what_was_rolled_back_is_taken_back(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE late (n int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    with connected(database) as connection, new_archive(tmp_path, HEAD, keep=KEEP) as archive:
        with archive.transaction(connection) as keep:
            keep(lines(1))
        with pytest.raises(ZeroDivisionError):
            one_transaction(archive, connection, lines(2), lambda: 1 / 0)
        with pytest.raises(psycopg.errors.UniqueViolation):  # at the commit
            one_transaction(
                archive, connection, lines(3), lambda: connection.execute("INSERT INTO late VALUES (1), (1)")
            )
        with archive.transaction(connection) as keep:
            keep(lines(4))
    assert read(archive.path) == [1, 4]
    assert [run.rows for run in archived_runs(tmp_path)] == [2]


def test_a_disk_that_takes_no_more_rolls_back_and_keeps_what_there_was(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE gone AS SELECT 1 AS n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with connected(database) as connection, new_archive(tmp_path, HEAD, keep=KEEP) as archive:
        with archive.transaction(connection) as keep:
            keep(lines(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (archive.path.stat().st_size + 100, before[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                one_transaction(
                    archive, connection, os.urandom(5_000) + b"\n", lambda: connection.execute("DELETE FROM gone")
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert database.execute("SELECT n FROM gone") == [(1,)]
    assert read(archive.path) == [1]


def test_without_an_archive_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE_FOLDER).write_text("in the way")
    with pytest.raises(Refused, match="cannot be written"), new_archive(tmp_path, HEAD, keep=KEEP):
        pytest.fail("it began")


def test_a_run_that_deleted_nothing_leaves_no_archive(tmp_path: Path) -> None:
    with new_archive(tmp_path, HEAD, keep=KEEP) as archive:
        assert isinstance(archive, Archive)
    assert archived_runs(tmp_path) == []
    assert list((tmp_path / ARCHIVE_FOLDER).iterdir()) == []


def test_old_archives_go_when_a_new_one_is_made_and_other_files_stay(database: Database, tmp_path: Path) -> None:
    with connected(database) as connection:
        old = written(connection, tmp_path, (1,), head=Head("20250101T000000Z-00000b", "x", "", "", "", None))
        foreign = old.parent / "notes.txt"
        foreign.write_text("mine")
        for path in (old, foreign):
            os.utime(path, (0, 0))
        written(connection, tmp_path, (1,))
    assert [run.head.run_id for run in archived_runs(tmp_path)] == [HEAD.run_id]
    assert foreign.exists()


def test_a_damaged_archive_is_named_and_the_others_are_listed(database: Database, tmp_path: Path) -> None:
    with connected(database) as connection:
        path = written(connection, tmp_path, tuple(range(200)), (500,))
    whole = bytearray(path.read_bytes())
    whole[400] ^= 0xFF
    path.write_bytes(whole[:-20])  # without its foot, so that it is counted
    (path.parent / "20260101T000000Z-00000c.jsonl.gz").write_bytes(b"no archive")
    assert [run.ended for run in archived_runs(tmp_path)] == ["damaged"]
    with pytest.raises(Refused, match="damaged after 1"):
        read(path)


def test_a_run_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no archive of a run"):
        find_run(tmp_path, "../../etc/passwd")
