"""`standby sync`: the copy follows every change, and no disaster."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from opsctl import db
from opsctl.baileys.filenames import MANIFEST_FILE
from opsctl.embedded import embedded_server
from opsctl.journal import Journal
from opsctl.operations.fleet import create_schema
from opsctl.operations.standby import SyncWish, live_sessions, standby_status, sync_standby
from opsctl.stores import switch_record
from opsctl.stores.folder import entries_of, opened
from opsctl.stores.postgres import snapshot
from opsctl.stores.publishing import locked_root
from opsctl.stores.standby import Standby
from opsctl.stores.switch_record import SwitchRecord, clear_switch, write_switch
from tests import needs
from tests.conftest import Database, each_postgres
from tests.integration.fleet import FIRST, KEYS, PLANTED, SECOND, Fleet, results, rows_of, unchanged
from tests.integration.test_health import replica_of, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from opsctl.report import Report
    from opsctl.stores.live import Live
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.standby import Copy
    from tests.conftest import Finished, RunOpsctl
    from tests.forks import Forks

ENVIRONMENT = "production"
REPOSITORY = Path(__file__).parents[2]


class Warm:
    """A fleet with a standby folder beside it."""

    def __init__(self, fleet: Fleet, path: Path) -> None:
        self.fleet = fleet
        self.path = path
        self.store = Standby(self.path, ENVIRONMENT)
        fleet.env |= {"STANDBY_DIR": str(self.path), "SESSIONS_DIR": str(fleet.target)}
        self._runs = 0

    def execute(self, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
        return self.fleet.database.execute(sql, params)

    def sync(self, *words: str, env: dict[str, str] | None = None) -> Finished:
        return self.fleet.opsctl("standby", "sync", *words, env=env)

    def status(self, *words: str, env: dict[str, str] | None = None) -> Finished:
        return self.fleet.opsctl("standby", "status", *words, env=env)

    def synced(self, *, into: Path | None = None, now: datetime | None = None, **wish: Any) -> Report:
        """The same in this process, in a tenth of the time."""
        self._runs += 1
        moment = now or datetime.now(UTC)
        wished = SyncWish(f"run-{self._runs}", timedelta(hours=24), timedelta(days=30), **wish)

        def open_live() -> AbstractContextManager[Live]:
            return live_sessions(self._snapshot, self.fleet.target, now=moment)

        store = Standby(into, ENVIRONMENT) if into else self.store
        return sync_standby(open_live, store, wished, journal=Journal(), now=moment)

    @contextmanager
    def _snapshot(self) -> Iterator[Snapshot]:
        address = conninfo_to_dict(self.fleet.database.conninfo)
        with db.connect(address, 30) as connection, snapshot(connection) as now:
            yield now

    def copy(self, company: str = FIRST) -> Copy:
        found = self.store.copy(company)
        assert found is not None
        return found

    def whole(self, company: str = FIRST) -> dict[str, str]:
        """The digests of a copy that is as its manifest says, and so is the one that is ready."""
        copy = self.copy(company)
        assert copy.damage is None
        assert copy.ready is not None
        for folder in (copy.path, copy.ready):
            assert self.store.damage(folder, company_id=company) is None
        assert digests(copy.path) == digests(copy.ready)
        return digests(copy.path)

    def entries(self, company: str = FIRST) -> dict[str, Any]:
        return entries(self.copy(company).path)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def keys(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name != MANIFEST_FILE}


def entries(folder: Path) -> dict[str, Any]:
    with opened(folder) as fd:
        return dict(entries_of(fd))


@pytest.fixture
def warm(fleet: Fleet) -> Iterator[Warm]:
    """In memory where there is such a place: each sync ends with one of the filesystem, which others may keep busy."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Warm(fleet, Path(folder) / "standby")


@pytest.fixture
def synced(warm: Warm) -> Warm:
    warm.synced()
    return warm


# The form.


@each_postgres
def test_a_copy_is_what_a_restore_of_a_stopped_service_would_publish(warm: Warm) -> None:
    done = warm.sync("--json")
    assert done.returncode == 0, done
    assert {row["result"] for row in rows_of(done).values()} == {"new"}
    warm.fleet.restored()
    for company in (FIRST, SECOND):
        warm.whole(company)
        assert keys(warm.copy(company).path) == keys(warm.fleet.folder(company))
        assert warm.entries(company) == entries(warm.fleet.folder(company))
    origin = warm.copy().origin
    assert origin is not None
    assert (origin.source, origin.environment, origin.service_stopped) == ("standby", ENVIRONMENT, "unknown")
    assert origin.system_identifier is not None


def test_credentials_are_copied_as_they_are_with_no_number_raised(warm: Warm) -> None:
    warm.execute("UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{nextPreKeyId}', '3')")
    warm.synced()
    creds = json.loads((warm.copy().path / "creds.json").read_bytes())
    assert creds["nextPreKeyId"] == 3


def test_the_ready_copy_shares_no_inode_and_nobody_else_may_look(synced: Warm) -> None:
    synced.execute("UPDATE whatsapp_keys SET value = '{}' WHERE key_type = 'sender-key-memory'")
    synced.synced()
    inodes: dict[int, list[Path]] = {}
    for path in synced.path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), path
        inodes.setdefault(path.stat().st_ino, []).append(path)
    assert synced.path.stat().st_mode & 0o777 == 0o700
    shared = [paths for paths in inodes.values() if len(paths) > 1]
    assert shared, "generations share what has not changed"
    assert not [path for paths in shared for path in paths if "ready" in path.parts]


@needs.root()
def test_the_ready_copy_belongs_to_the_owner_of_the_service(warm: Warm) -> None:
    app = warm.fleet.place / "app"
    app.mkdir()
    os.chown(app, 65534, 65534)
    for change in ("whatsapp_keys", "whatsapp_auth"):  # made whole, then brought up to date
        warm.execute(f"UPDATE {change} SET updated_at = now()")
        assert warm.sync("--quiet", env={"APP_DIR": str(app)}).returncode == 0
        ready = warm.copy().ready
        assert ready is not None
        assert {path.stat().st_uid for path in (ready, *ready.iterdir())} == {65534}
        assert warm.copy().path.stat().st_uid == 0


def test_a_run_without_changes_says_nothing_and_writes_no_copy(synced: Warm) -> None:
    before = synced.whole()
    done = synced.sync("--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert synced.copy().generation == "00000001"
    assert synced.whole() == before


# What changes.


def test_only_rows_that_changed_are_read(synced: Warm) -> None:
    synced.execute(
        "UPDATE whatsapp_keys SET value = '{}' WHERE company_id = %s AND key_type = 'sender-key-memory'", [FIRST]
    )
    (count,) = synced.execute(
        "SELECT count(*) FROM whatsapp_keys WHERE company_id = %s AND key_type = 'sender-key-memory'", [FIRST]
    )[0]
    report = synced.synced()
    assert [(row.company, row.written) for row in report.rows] == [(FIRST, count + 1)]  # and creds.json
    before, after = (synced.store.generations(FIRST)[index].path for index in (1, 0))
    shared = [p for p in after.iterdir() if (before / p.name).exists() and p.samefile(before / p.name)]
    assert len(shared) == KEYS - count


def test_a_run_looks_through_each_table_once_to_find_what_changed(synced: Warm) -> None:
    looked = "SELECT relname, seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname LIKE 'whatsapp_%'"
    synced.synced()  # what was written before is counted, too, when the connection ends
    time.sleep(0.5)
    before = dict(synced.execute(looked))
    assert synced.synced().exit_code == 0
    until(lambda: dict(synced.execute(looked)) != before)
    time.sleep(0.5)
    after = dict(synced.execute(looked))
    assert {table: after[table] - before[table] for table in after} == {"whatsapp_auth": 1, "whatsapp_keys": 1}


@pytest.mark.parametrize("frozen", [False, True], ids=["as written", "after VACUUM FREEZE"])
@each_postgres
def test_a_write_that_was_under_way_during_the_last_sync_is_not_missed(warm: Warm, frozen: bool) -> None:
    """Its transaction has a lower number than some that the sync saw, and a savepoint's number that it did not list."""
    with warm.fleet.database.connect(autocommit=False) as writer:
        writer.execute("SELECT txid_current()")
        writer.execute("SAVEPOINT inner_one")
        writer.execute("UPDATE whatsapp_keys SET value = '{\"late\": 1}' WHERE key_type = 'sender-key-memory'")
        warm.execute("UPDATE whatsapp_keys SET updated_at = now() WHERE key_type = 'session'")
        warm.synced()
        writer.execute("RELEASE SAVEPOINT inner_one")
        writer.commit()
    if frozen:
        warm.execute("VACUUM (FREEZE) whatsapp_keys")
    warm.synced()
    late = [path for path in warm.copy().path.iterdir() if path.read_bytes() == b'{"late":1}']
    assert late
    assert warm.entries() == fresh(warm)


def fresh(warm: Warm, company: str = FIRST) -> dict[str, Any]:
    """The entries of a copy that was made from nothing."""
    scratch = warm.path.with_name("scratch")
    warm.synced(into=scratch)
    copy = Standby(scratch, ENVIRONMENT).copy(company)
    assert copy is not None
    found = entries(copy.path)
    shutil.rmtree(scratch)
    return found


ROW = "(SELECT ctid FROM whatsapp_keys WHERE company_id = '962302' AND key_type = %(type)s ORDER BY key_id LIMIT 1)"
CHANGES = {
    "write": "UPDATE whatsapp_keys SET value = %(value)s, updated_at = now() WHERE ctid = " + ROW,
    "write silently": "UPDATE whatsapp_keys SET value = %(value)s WHERE ctid = " + ROW,
    "write ahead of time": "UPDATE whatsapp_keys SET value = %(value)s, updated_at = now() + '1 hour' WHERE ctid = "
    + ROW,
    "write in the past": "UPDATE whatsapp_keys SET value = %(value)s, updated_at = updated_at - interval '1 day' "
    "WHERE ctid = " + ROW,
    "delete": "DELETE FROM whatsapp_keys WHERE ctid = " + ROW,
    "insert": "INSERT INTO whatsapp_keys VALUES ('962302', %(type)s, %(id)s, %(value)s) ON CONFLICT DO NOTHING",
    "insert again": "WITH gone AS (DELETE FROM whatsapp_keys WHERE ctid = " + ROW + " RETURNING *) "
    "INSERT INTO whatsapp_keys SELECT company_id, key_type, key_id || '.0', value, created_at, updated_at, expires_at "
    "FROM gone ON CONFLICT DO NOTHING",
    "take out": "DELETE FROM whatsapp_keys WHERE ctid = " + ROW + " RETURNING *",
    "rename": "UPDATE whatsapp_keys SET key_id = key_id || %(id)s WHERE ctid = " + ROW,
    "collide": "INSERT INTO whatsapp_keys VALUES ('962302', %(type)s, 'a:b', %(value)s), "
    "('962302', %(type)s, 'a-b', %(value)s) ON CONFLICT DO NOTHING",
    "uncollide": "DELETE FROM whatsapp_keys WHERE key_id = 'a-b'",
    "unwritable": "INSERT INTO whatsapp_keys VALUES ('962302', %(type)s, repeat('x', 300), %(value)s) "
    "ON CONFLICT DO NOTHING",
    "save creds": "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{note}', %(value)s), updated_at = now()",
    "save creds silently": "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{note}', %(value)s)",
    "freeze": "VACUUM (FREEZE) whatsapp_keys",
    "repack": "VACUUM (FULL) whatsapp_keys",
}
change = st.tuples(
    st.sampled_from(sorted(CHANGES)), st.sampled_from(["session", "sender-key", "pre-key"]), st.integers(0, 9)
)


def test_whatever_is_written_deleted_or_written_again_reaches_the_copy(synced: Warm) -> None:
    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.lists(change, min_size=1, max_size=4), min_size=1, max_size=3))
    @example([[("take out", "session", 7), ("delete", "pre-key", 0)], [("take out", "session", 8)]])
    def check(runs: list[list[tuple[str, str, int]]]) -> None:
        for changes in runs:
            for name, key_type, number in changes:
                values = {"type": key_type, "id": f"new-{number}", "value": json.dumps(number)}
                taken_out = synced.execute(CHANGES[name], values)
                for company, kind, key_id, *_, created_at, updated_at, expires_at in taken_out:  # and put in again
                    row = (company, kind, key_id, values["value"], created_at, updated_at, expires_at)
                    synced.execute("INSERT INTO whatsapp_keys VALUES (%s, %s, %s, %s, %s, %s, %s)", row)
            # The service saves its credentials all the time; and a company that is empty is another test's.
            synced.execute("UPDATE whatsapp_auth SET updated_at = now()")
            report = synced.synced()
            assert report.exit_code == 0, report
        synced.whole()
        assert synced.entries() == fresh(synced)

    check()


def test_replaced_copies_are_kept_for_a_day_thinned_out_with_age(synced: Warm) -> None:
    """Also each is whole: the next generation is made in a folder that is not kept any longer."""
    start = datetime.now(UTC)
    minutes = [*range(5, 125, 5), 60 * 23, 60 * 25, 60 * 26]
    spare = synced.path / f"company_{FIRST}" / "spare"
    spares = 0
    for minute in minutes:
        synced.execute(
            "UPDATE whatsapp_keys SET value = to_jsonb(%s::int), updated_at = now() WHERE key_type = 'session'",
            [minute],
        )
        assert synced.synced(now=start + timedelta(minutes=minute)).exit_code == 0
        spares += spare.is_dir()
        if minute == 120:
            kept = synced.store.generations(FIRST)
            # Three and the current one; of the hour before one each ten minutes, then one each hour.
            assert 9 <= len(kept) <= 12
            # A run takes the spare; whether it leaves one depends on where in their ten minutes the runs fall.
            assert spares >= 6
    kept = synced.store.generations(FIRST)
    assert 4 <= len(kept) <= 5  # those that were replaced more than 24 hours ago are gone
    for copy in kept:
        assert copy.damage is None
        assert synced.store.damage(copy.path, company_id=FIRST) is None
    assert synced.entries() == fresh(synced)


# What does not reach it.


def first_creds(warm: Warm) -> dict[str, Any]:
    creds: dict[str, Any] = warm.execute("SELECT creds FROM whatsapp_auth WHERE company_id = %s", [FIRST])[0][0]
    return creds


OF_FIRST = f"WHERE company_id = '{FIRST}'"
YESTERDAY = (
    f"UPDATE whatsapp_keys SET updated_at = updated_at - interval '1 day' {OF_FIRST}",
    f"UPDATE whatsapp_auth SET updated_at = updated_at - interval '1 day' {OF_FIRST}",
)
DISASTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "the company is deleted": (
        (f"DELETE FROM whatsapp_auth {OF_FIRST}", f"DELETE FROM whatsapp_keys {OF_FIRST}"),
        "it is not in the database any more",
    ),
    "its credentials are deleted": ((f"DELETE FROM whatsapp_auth {OF_FIRST}",), "it has no credentials any more"),
    "its sessions are deleted": (
        (f"DELETE FROM whatsapp_keys {OF_FIRST} AND key_type = 'session'",),
        "session keys",
    ),
    "more than a fifth of its keys are deleted": (
        (f"DELETE FROM whatsapp_keys {OF_FIRST} AND key_type = 'pre-key' AND key_id::int > 2",),
        "of its 40 keys (13 pre-key)",
    ),
    "the tables are emptied": (("TRUNCATE whatsapp_auth, whatsapp_keys",), "it is not in the database any more"),
    "its identity is gone": ((f"UPDATE whatsapp_auth SET creds = creds - 'me' {OF_FIRST}",), "its me.id is gone"),
    "its identity is another": (
        (f"UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{{me,id}}', '\"7999:1@s.whatsapp.net\"') {OF_FIRST}",),
        "its me.id is another one",
    ),
    "its credentials are damaged": (
        (f"UPDATE whatsapp_auth SET creds = creds - 'noiseKey' {OF_FIRST}",),
        "its credentials cannot log in any more",
    ),
    "a type that never expires is gone": (
        (f"DELETE FROM whatsapp_keys {OF_FIRST} AND key_type = 'app-state-sync-version'",),
        "app-state-sync-version keys",
    ),
    "it is of yesterday": (YESTERDAY, "its newest change went back from"),
    "the service runs on with yesterday's": (YESTERDAY, "its newest change went back from"),
}


@pytest.mark.parametrize("disaster", DISASTERS)
def test_after_ten_syncs_of_a_disaster_the_last_good_copy_stands(synced: Warm, disaster: str) -> None:
    statements, reason = DISASTERS[disaster]
    good = synced.whole()
    for statement in statements:
        synced.execute(statement)
    for _ in range(10):
        report = synced.synced()
        assert report.exit_code == 1
        if "runs on" in disaster:
            synced.execute(f"UPDATE whatsapp_auth SET updated_at = now() {OF_FIRST}")
            synced.execute("UPDATE whatsapp_keys SET updated_at = now() WHERE key_type = 'sender-key-memory'")
    row = {row.company: row for row in report.rows}[FIRST]
    assert row.result == "held"
    assert reason in row.reason
    assert synced.whole() == good
    assert len(synced.store.generations(FIRST)) == 1
    said = standby_status(synced.store, companies=(FIRST,), max_age=timedelta(minutes=5), now=datetime.now(UTC))
    assert said.exit_code == 1
    assert [(row.state, row.held) for row in said.rows] == [("held", row.reason)]


@pytest.mark.parametrize(
    ("mark", "value", "reason"),
    [
        ("system_identifier", "7000000000000000001", "the server is another one"),
        ("timeline", 7, "the server is on timeline 1 instead of 7"),
        ("next_xid", 2**40, "at an earlier transaction"),
    ],
)
def test_another_server_or_another_history_is_held_until_it_is_accepted(
    synced: Warm, mark: str, value: Any, reason: str
) -> None:
    good = synced.whole()
    for company in (FIRST, SECOND):
        state = synced.store.state(company)
        assert state.marks is not None
        synced.store.remember(company, replace(state, marks=replace(state.marks, **{mark: value})))
    report = synced.synced()
    assert report.exit_code == 1
    assert report.failure is not None
    assert reason in report.failure.message
    assert "--accept @all" in (report.failure.hint or "")
    assert synced.whole() == good
    assert synced.synced(accept=("@all",)).exit_code == 0
    assert synced.synced().exit_code == 0
    assert synced.copy().generation == synced.copy(SECOND).generation == "00000002"


def test_a_replica_that_lagged_and_was_promoted_is_held_and_the_last_good_copy_restored(
    tmp_path: Path, place: Path, run_opsctl: RunOpsctl
) -> None:
    with embedded_server(tmp_path) as primary, replica_of(primary) as replica:
        fleet = Fleet(Database(primary, "postgres"), place, run_opsctl)
        with fleet.database.connect(autocommit=False) as connection:
            create_schema(connection)
        fleet.seed()
        warm = Warm(fleet, place / "standby")
        promoted = Database(replica, "postgres")
        with fleet.database.connect() as connection:
            connection.execute("SET synchronous_commit = on")  # this commit writes what the others left in memory, too
            connection.execute("CREATE TABLE committed_last ()")
        ((written,),) = fleet.database.execute("SELECT pg_current_wal_lsn()")
        until(lambda: promoted.execute("SELECT pg_last_wal_replay_lsn() >= %s", [written]) == [(True,)])
        promoted.execute("ALTER SYSTEM SET primary_conninfo = ''")
        promoted.execute("SELECT pg_reload_conf()")
        until(lambda: not promoted.execute("SELECT * FROM pg_stat_wal_receiver"))
        warm.execute(f'UPDATE whatsapp_keys SET value = \'{{"went": "on"}}\', updated_at = now() {OF_FIRST}')
        assert warm.synced().exit_code == 0
        good = warm.whole()
        primary.stop()
        promoted.execute("SELECT pg_promote()")
        warm.fleet = Fleet(promoted, place, run_opsctl)
        warm.fleet.env |= fleet.env | {"DATABASE_URL": promoted.url}
        for _ in range(10):
            report = warm.synced()
            assert report.exit_code == 1
        assert {row.result for row in report.rows} == {"held"}
        assert report.failure is not None
        # The second as soon as the new primary has made its first checkpoint.
        reasons = ("at an earlier transaction than the copy", "the server is on timeline 2 instead of 1")
        assert any(reason in report.failure.message for reason in reasons)
        assert warm.whole() == good
        promoted.execute("CHECKPOINT")
        # Each from where its newest row is: the first went on after the replica had stopped to listen.
        document = warm.fleet.restored("--to", place / "automatically")
        assert {company: row["source"].split()[0] for company, row in rows_of(document).items()} == {
            FIRST: "standby",
            SECOND: "database",
        }
        document = warm.fleet.restored("--source", "standby")
        assert results(document) == {FIRST: "restored", SECOND: "restored"}
        files = keys(warm.fleet.folder())
        assert {name: files[name] for name in files if name != "creds.json"} == {
            name: digest for name, digest in good.items() if name not in {MANIFEST_FILE, "creds.json"}
        }


def test_what_was_held_is_copied_once_it_is_accepted_and_only_that(synced: Warm) -> None:
    synced.execute("DELETE FROM whatsapp_keys WHERE key_type = 'session'")
    held = synced.sync("--quiet")
    assert held.returncode == 1
    assert held.stderr.count("\n") == 1
    assert "lost all of its" in held.stderr
    assert "opsctl standby sync --accept @all" in held.stderr
    done = synced.sync("--accept", FIRST, "--json")
    assert done.returncode == 1
    assert {company: row["result"] for company, row in rows_of(done).items()} == {FIRST: "updated", SECOND: "held"}
    assert not [name for name in synced.whole() if name.startswith("session-")]
    assert [name for name in synced.whole(SECOND) if name.startswith("session-")]
    assert synced.copy().held is None
    older = synced.store.generations(FIRST)[1]
    assert synced.store.damage(older.path, company_id=FIRST) is None, "what was replaced is kept"


def test_a_company_whose_end_is_accepted_is_set_aside_for_a_day(synced: Warm) -> None:
    synced.execute(f"DELETE FROM whatsapp_auth {OF_FIRST}")
    synced.execute(f"DELETE FROM whatsapp_keys {OF_FIRST}")
    report = synced.synced(accept=(FIRST,))
    assert [(row.company, row.result) for row in report.rows] == [(FIRST, "let go")]
    assert [copy.company_id for copy in synced.store.copies()] == [SECOND]
    (gone,) = synced.path.glob(".gone-*")
    assert (gone / "ready" / "creds.json").exists()
    assert synced.synced().exit_code == 0
    assert gone.exists()
    synced.synced(now=datetime.now(UTC) + timedelta(hours=25))
    assert not gone.exists()


def test_a_company_that_is_put_back_as_it_was_is_not_held_any_more(synced: Warm) -> None:
    for table in ("whatsapp_auth", "whatsapp_keys"):
        synced.execute(f"CREATE TABLE kept_{table} AS SELECT * FROM {table}")
        synced.execute(f"DELETE FROM {table} {OF_FIRST}")
    assert synced.synced().exit_code == 1
    for table in ("whatsapp_auth", "whatsapp_keys"):
        synced.execute(f"INSERT INTO {table} SELECT * FROM kept_{table} {OF_FIRST}")
    report = synced.synced()
    assert report.exit_code == 0
    assert synced.copy().held is None
    assert synced.entries() == fresh(synced)


def test_the_right_server_after_the_wrong_one_ends_the_hold(synced: Warm) -> None:
    right = synced.store.state(FIRST)
    assert right.marks is not None
    synced.store.remember(FIRST, replace(right, marks=replace(right.marks, timeline=7)))
    assert synced.synced().exit_code == 1
    state = synced.store.state(FIRST)
    synced.store.remember(FIRST, replace(state, marks=right.marks))
    report = synced.synced()
    assert [(row.company, row.result) for row in report.rows] == [(FIRST, "released")]
    assert synced.copy().held is None


def test_a_cleanup_of_what_is_past_its_retention_is_no_disaster(warm: Warm) -> None:
    warm.execute(
        "UPDATE whatsapp_keys SET updated_at = now() - interval '40 days', expires_at = now() - interval '33 days' "
        "WHERE key_type = 'session'"
    )
    warm.synced()
    warm.execute("DELETE FROM whatsapp_keys WHERE key_type = 'session'")
    report = warm.synced()
    assert report.exit_code == 0, report
    assert not [name for name in warm.whole() if name.startswith("session-")]


def test_a_database_that_cannot_be_read_leaves_every_copy_as_it_is(synced: Warm) -> None:
    good = synced.whole()
    synced.execute("DROP TABLE whatsapp_keys")
    done = synced.sync()
    assert done.returncode == 4
    assert "SQLSTATE 42P01" in done.stderr
    assert synced.whole() == good


# What the operator types.


def test_full_reads_everything_again(synced: Warm) -> None:
    (synced.copy().path / "creds.json").write_bytes(b"{}")
    assert synced.sync("--quiet", "--full").returncode == 0
    synced.whole()
    assert synced.copy().generation == synced.copy(SECOND).generation == "00000002"


def test_only_the_companies_that_were_asked_for_are_copied(warm: Warm) -> None:
    done = warm.sync("--company", SECOND, "--json")
    assert set(rows_of(done)) == {SECOND}
    assert [copy.company_id for copy in warm.store.copies()] == [SECOND]
    assert warm.store.checked() is None, "nothing is known of the others"
    for flag in ("--company", "--accept"):
        done = warm.sync(flag, "nobody")
        assert done.returncode == 5
        assert "neither the database nor the standby has a company 'nobody'" in done.stderr


def test_a_dry_run_says_what_would_be_copied_and_held_and_changes_nothing(synced: Warm) -> None:
    synced.execute(f"DELETE FROM whatsapp_keys {OF_FIRST} AND key_type = 'session'")
    synced.execute(f"UPDATE whatsapp_keys SET updated_at = now() WHERE company_id = '{SECOND}'")
    with unchanged(synced.fleet.place), unchanged(synced.path):
        done = synced.sync("--dry-run", "--json")
    assert done.returncode == 1
    assert {company: row["result"] for company, row in rows_of(done).items()} == {FIRST: "held", SECOND: "would copy"}
    synced.synced(accept=(FIRST,))
    assert synced.sync("--dry-run").returncode == 0


def test_a_second_sync_at_once_ends_with_75_and_quietly(synced: Warm) -> None:
    with synced.store.syncing():
        quiet = synced.sync("--quiet")
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (75, "", "")
        assert "another sync works on" in synced.sync().stderr
    assert synced.sync("--quiet").returncode == 0


def test_a_sync_does_not_publish_under_the_hands_of_a_restore(synced: Warm) -> None:
    synced.execute("UPDATE whatsapp_keys SET updated_at = now()")
    with synced.store.locked("a-restore"):
        process = subprocess.Popen(
            [sys.executable, "-m", "opsctl", "standby", "sync", "--quiet"],
            env={**os.environ, **synced.fleet.env, "PYTHONPATH": str(REPOSITORY)},
        )
        time.sleep(1.5)
        assert process.poll() is None
        assert synced.copy().generation == "00000001"
    assert process.wait(30) == 0
    assert synced.copy().generation == "00000002"


def test_a_ready_copy_that_a_restore_took_away_is_made_again(synced: Warm) -> None:
    ready = synced.copy().ready
    assert ready is not None
    shutil.rmtree(ready)
    assert synced.copy().ready is None
    assert synced.sync("--quiet").returncode == 0
    synced.whole()
    shutil.rmtree(ready)
    with synced.store.locked("a-restore"):
        assert synced.store.rebuild_ready(FIRST) == ready
    synced.whole()


def test_two_companies_for_one_folder_are_both_named_and_not_copied(synced: Warm) -> None:
    good = synced.whole()
    synced.fleet.copy_company(f"company_{FIRST}")
    done = synced.sync("--json")
    assert done.returncode == 1
    assert {row["result"] for row in rows_of(done).values()} == {"failed"}
    assert synced.whole() == good


# Bad folders.


def test_a_copy_of_another_environment_is_named_and_neither_used_nor_replaced(synced: Warm) -> None:
    other = {"OPSCTL_ENVIRONMENT": "staging"}
    with unchanged(synced.path / f"company_{FIRST}"):
        done = synced.sync(env=other)
    assert done.returncode == 1
    assert "of the environment 'production'" in done.stderr
    said = synced.status("--json", env=other)
    assert said.returncode == 1
    assert {row["state"] for row in rows_of(said).values()} == {"damaged"}
    assert said.json()["facts"]["rpo_s"] is None


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_a_torn_or_changed_file_is_found_named_and_made_anew(synced: Warm) -> None:
    (synced.path / f"company_{SECOND}").rename(synced.path.with_name("elsewhere"))  # so that it is FIRST's turn
    synced.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [SECOND])
    tear(next(synced.copy().path.glob("session-*")))
    report = synced.synced()
    assert report.exit_code == 1
    assert [(row.company, row.result) for row in report.rows] == [(FIRST, "damaged")]
    assert "is not as its manifest says (" in (report.rows[0].reason or "")
    assert synced.synced().exit_code == 0
    synced.whole()


def test_a_ready_copy_that_was_tampered_with_is_made_anew(synced: Warm) -> None:
    (synced.path / f"company_{SECOND}").rename(synced.path.with_name("elsewhere"))
    synced.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [SECOND])
    ready = synced.copy().ready
    assert ready is not None
    tear(next(ready.glob("session-*")))
    assert synced.synced().exit_code == 0
    synced.whole()


@pytest.mark.parametrize("what", ["manifest", "creds", "generation", "state", "facts", "everything"])
def test_a_copy_that_is_missing_or_torn_is_named_and_made_anew(synced: Warm, what: str) -> None:
    copy = synced.copy()
    place = synced.path / f"company_{FIRST}"
    match what:
        case "manifest":
            tear(copy.path / MANIFEST_FILE)
            (copy.path / MANIFEST_FILE).write_bytes(b"{")
        case "creds":
            (copy.path / "creds.json").unlink()
        case "generation":
            shutil.rmtree(copy.path)
        case "state":
            tear(place / "state.json")
        case "facts":
            tear(copy.path.with_suffix(".json"))
        case _:
            shutil.rmtree(place)
            place.mkdir()
    if what not in {"state", "facts"}:
        said = synced.status("--json", "--company", FIRST)
        assert (said.returncode, rows_of(said)[FIRST]["state"]) == (1, "damaged")
        assert rows_of(said)[FIRST]["damage"]
    assert synced.synced().exit_code == 0
    synced.whole()
    assert synced.entries() == fresh(synced)


def test_a_standby_folder_that_others_may_look_into_is_refused(synced: Warm) -> None:
    synced.path.chmod(0o755)
    done = synced.sync()
    assert done.returncode == 5
    assert "is not for root alone" in done.stderr or "alone" in done.stderr
    assert "chmod 700" in done.stderr


def test_a_standby_folder_that_cannot_be_read_is_named_by_whoever_looks_into_it(synced: Warm) -> None:
    synced.path.rename(synced.path.with_name("elsewhere"))
    synced.path.write_text("a file, where the folder should be")
    said = synced.status("--json")
    assert (said.returncode, said.json()["error"]["kind"]) == (5, "standby-unreadable")
    assert str(synced.path) in said.json()["error"]["message"]
    assert synced.sync().returncode == 5
    restored = synced.fleet.restored()
    assert any("standby is no source" in note and str(synced.path) in note for note in restored["notes"])
    assert {row["source"] for row in restored["rows"]} == {"database"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of four mebibytes."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@needs.namespace("mount")
def test_a_full_disk_leaves_every_copy_as_it_is_and_is_named(warm: Warm, small_disk: Path) -> None:
    env = {"STANDBY_DIR": str(small_disk / "standby")}
    assert warm.sync("--quiet", env=env).returncode == 0
    store = Standby(small_disk / "standby", ENVIRONMENT)
    warm.execute("UPDATE whatsapp_keys SET updated_at = now()")
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler", "bs=4k"], check=False, capture_output=True)
    done = warm.sync(env=env)
    assert done.returncode in {1, 5}, done
    assert "No space left" in done.stderr
    for company in (FIRST, SECOND):
        copy = store.copy(company)
        assert copy is not None
        assert copy.generation == "00000001"
        assert store.damage(copy.path, company_id=company) is None
    (small_disk / "filler").unlink()
    assert warm.sync("--quiet", env=env).returncode == 0


# A kill.


def test_a_sync_killed_at_any_instant_leaves_a_whole_copy_of_every_company(warm: Warm) -> None:
    warm.synced()
    whole = {company: keys(warm.copy(company).path) for company in (FIRST, SECOND)}
    environment = {**os.environ, **warm.fleet.env, "PYTHONPATH": str(REPOSITORY)}
    killed = 0
    for attempt in range(14):
        warm.execute(
            "UPDATE whatsapp_keys SET value = to_jsonb(%s::int), updated_at = now() WHERE key_type = 'session'",
            [attempt],
        )
        words = [sys.executable, "-m", "opsctl", "standby", "sync", "--quiet"]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(0.25 + 0.035 * attempt)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for company in whole:
            copy = warm.copy(company)
            assert copy.damage is None
            assert warm.store.damage(copy.path, company_id=company) is None
            if copy.ready is not None:
                assert warm.store.damage(copy.ready, company_id=company) is None
    assert killed
    assert warm.synced().exit_code == 0
    for company in whole:
        warm.whole(company)
        assert warm.entries(company) == fresh(warm, company)
    assert not list(warm.path.glob("company_*/building"))
    assert not list(warm.path.glob("company_*/trash-*"))


DYING = "from tests.forks import die_at\ndie_at({point})"


def test_a_sync_killed_at_each_of_its_steps_leaves_copies_that_can_be_restored(warm: Warm, forking: Forks) -> None:
    write = "UPDATE whatsapp_keys SET value = to_jsonb(%s::int), updated_at = now() WHERE key_type = 'session'"
    warm.execute(write, [0])
    warm.synced()
    env = {**warm.fleet.env, "HOME": str(warm.fleet.place)}
    killed = newest = 0
    for point in itertools.count(1):
        warm.execute(write, [point])
        done = forking.run("standby", "sync", env=env, before=DYING.format(point=point))
        for company in (FIRST, SECOND):
            copy = warm.copy(company)
            assert copy.damage is None
            assert warm.store.damage(copy.path, company_id=company) is None
        if done.returncode != -signal.SIGKILL:
            break
        killed += 1
        if point % 3 == 0:
            document = warm.fleet.restored("--source", "standby")
            assert set(results(document).values()) <= {"restored", "unchanged"}
            (version,) = {int(path.read_text()) for path in warm.fleet.folder().glob("session-*.json")}
            assert newest <= version <= point
            newest = version
    assert done.returncode == 0, done
    assert killed > 20
    assert newest
    warm.whole()
    assert warm.entries() == fresh(warm)


def test_a_restore_killed_at_each_of_its_steps_leaves_copies_that_can_be_restored(fleet: Fleet, forking: Forks) -> None:
    """Also between taking a ready copy away and making it again, which takes one filesystem for both."""
    warm = Warm(fleet, fleet.place / "standby")
    warm.synced()
    env = {**warm.fleet.env, "HOME": str(warm.fleet.place)}
    words = ("sessions", "restore", "--source", "standby", "--company", FIRST, "--json")
    taken = 0
    for point in itertools.count(1):
        shutil.rmtree(warm.fleet.target, ignore_errors=True)
        done = forking.run(*words, env=env, before=DYING.format(point=point))
        taken += warm.copy().ready is None
        assert warm.store.damage(warm.copy().path, company_id=FIRST) is None
        if done.returncode != -signal.SIGKILL:
            break
        if warm.copy().ready is None:
            document = warm.fleet.restored(*words[2:-1])
            assert results(document)[FIRST] in {"restored", "unchanged"}  # it may have come into place before
            assert set(digests(warm.fleet.folder())) == set(digests(warm.copy().path))
            assert warm.synced().exit_code == 0
            warm.whole()
    assert done.returncode == 0, done
    assert taken > 3


# The live folders.


@pytest.fixture
def switched(synced: Warm) -> Warm:
    """The service runs on the folders, and the database lies behind."""
    synced.fleet.restored()
    owner = synced.store.owner
    with locked_root(synced.fleet.target, owner, run_id="switch") as root:
        write_switch(root.own_fd, SwitchRecord("2026-01-31T03:04:05+00:00", "switch", "host", "switched"))
    return synced


def test_while_a_switch_is_on_record_the_live_folders_are_copied(switched: Warm) -> None:
    folder = switched.fleet.folder()
    changed, deleted = sorted(folder.glob("session-*"))[:2]
    changed.write_bytes(b'{"_sessions":{},"version":"v1"}')
    deleted.unlink()
    (folder / "tctoken-new.json").write_bytes(b'{"token":{"type":"Buffer","data":"AQI="}}')
    switched.execute("DELETE FROM whatsapp_keys")
    done = switched.sync("--json")
    assert done.returncode == 0, done
    assert done.json()["facts"]["source"] == "folders"
    switched.whole()
    assert keys(switched.copy().path) == keys(folder)
    known = switched.entries()["tctoken-new.json"]
    assert (known.key_type, known.key_id) == ("tctoken", "new")
    again = switched.sync("--json")
    assert again.json()["facts"]["unchanged"] == 2


def test_a_torn_file_never_replaces_a_whole_one(switched: Warm) -> None:
    folder = switched.fleet.folder()
    before = keys(switched.copy().path)
    session = min(folder.glob("session-*"))
    for path in (session, folder / "creds.json"):
        tear(path)
    done = switched.sync("--json")
    assert done.returncode == 0, done
    assert "2 torn files were left as the copy has them" in " ".join(done.json()["warnings"])
    after = keys(switched.copy().path)
    assert {name: after[name] for name in (session.name, "creds.json")} == {
        name: before[name] for name in (session.name, "creds.json")
    }
    session.write_bytes(b'{"_sessions":{}}')
    switched.synced()
    assert keys(switched.copy().path)[session.name] == sha256(b'{"_sessions":{}}').hexdigest()


def test_a_live_folder_that_becomes_another_identity_is_held(switched: Warm) -> None:
    creds = switched.fleet.folder() / "creds.json"
    value = json.loads(creds.read_bytes())
    del value["me"]
    creds.write_text(json.dumps(value))
    shutil.rmtree(switched.fleet.folder(SECOND))
    good = switched.whole()
    report = switched.synced()
    assert {row.company: row.result for row in report.rows} == {FIRST: "held", SECOND: "held"}
    assert switched.whole() == good


@pytest.mark.parametrize(("minutes", "code"), [(1, 75), (20, 5)], ids=["under way", "left in the middle"])
def test_while_a_switch_is_half_done_no_copy_changes(synced: Warm, minutes: int, code: int) -> None:
    synced.fleet.restored()
    since = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat(timespec="seconds")
    with locked_root(synced.fleet.target, synced.store.owner, run_id="switch") as root:
        write_switch(root.own_fd, SwitchRecord(since, "switch", "host", switch_record.Phase.STOPPING))
    synced.execute("UPDATE whatsapp_keys SET updated_at = now()")
    good = synced.whole()
    done = synced.sync("--json")
    assert done.returncode == code, done
    assert "a switch is under way since" in done.json()["error"]["message"]
    assert done.json()["error"]["hint"] == "opsctl switch status"
    assert synced.whole() == good


def test_after_the_way_back_the_database_is_copied_again(switched: Warm) -> None:
    switched.synced()
    with locked_root(switched.fleet.target, switched.store.owner, run_id="back") as root:
        clear_switch(root.own_fd)
    switched.execute("UPDATE whatsapp_keys SET updated_at = now() WHERE key_type = 'session'")
    switched.execute("UPDATE whatsapp_auth SET updated_at = now()")
    report = switched.synced()
    assert report.exit_code == 0, report
    assert report.facts["source"] == "database"
    assert switched.entries() == fresh(switched)


# The age.


def test_the_status_says_what_a_restore_from_here_would_lose(synced: Warm) -> None:
    done = synced.status()
    assert done.returncode == 0, done
    assert "would lose at most" in done.stdout
    document = synced.status("--json").json()
    assert document["facts"]["rpo_s"] < 60
    row = {row["company"]: row for row in document["rows"]}[FIRST]
    assert (row["state"], row["keys"], row["generations"], row["ready"]) == ("ok", KEYS, 1, True)
    assert row["verified_age_s"] < 60
    assert row["keys_by_type"]["pre-key"] == 14
    quiet = synced.status("--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert set(rows_of(synced.status("--json", "--company", SECOND))) == {SECOND}
    assert synced.status("--company", "nobody").returncode == 5


def test_a_copy_that_is_too_old_is_named(synced: Warm) -> None:
    time.sleep(1.1)
    done = synced.status(env={"STANDBY_MAX_AGE_SECONDS": "1"})
    assert done.returncode == 1
    assert f"{FIRST} is too old" in done.stderr
    assert "opsctl standby sync" in done.stderr
    synced.synced()  # without any change it is as young as this
    assert synced.status("--json").json()["facts"]["rpo_s"] < 60


def test_a_copy_of_a_time_still_to_come_is_of_unknown_age_until_the_next_sync(synced: Warm) -> None:
    """The clock was ahead while a copy was made, and was then set right."""
    synced.execute("UPDATE whatsapp_keys SET updated_at = now() WHERE company_id = %s", [FIRST])
    assert synced.synced(now=datetime.now(UTC) + timedelta(hours=3)).exit_code == 0
    done = synced.status("--json")
    assert done.returncode == 1, done
    assert {row["state"] for row in rows_of(done).values()} == {"of unknown age"}
    assert done.json()["facts"]["rpo_s"] is None
    restored = synced.fleet.restore("--source", "standby", "--json")
    assert restored.returncode == 0, restored
    assert {row["rpo_s"] for row in restored.json()["rows"]} == {None}
    assert "(nobody knows when: a clock was set back) is missing" in " ".join(restored.json()["warnings"])
    assert synced.synced().exit_code == 0
    done = synced.status("--json")
    assert done.returncode == 0, done
    assert 0 <= done.json()["facts"]["rpo_s"] < 60


def test_replaced_copies_are_kept_as_long_as_the_setting_says(warm: Warm) -> None:
    touch = f"UPDATE whatsapp_keys SET updated_at = now() {OF_FIRST}"
    for hours in (9, 8, 7, 6):
        warm.execute(touch)
        assert warm.synced(now=datetime.now(UTC) - timedelta(hours=hours)).exit_code == 0
    warm.execute(touch)
    assert warm.sync("--quiet", env={"STANDBY_KEEP_HOURS": "24"}).returncode == 0
    assert [copy.generation[-1] for copy in warm.store.generations(FIRST)] == ["5", "4", "3", "2", "1"]
    warm.execute(touch)
    assert warm.sync("--quiet", env={"STANDBY_KEEP_HOURS": "4"}).returncode == 0
    # The fourth was current until a moment ago; those before it were replaced six hours ago and earlier.
    assert [copy.generation[-1] for copy in warm.store.generations(FIRST)] == ["6", "5", "4"]


def test_no_copy_at_all_is_said(warm: Warm) -> None:
    done = warm.status()
    assert done.returncode == 1
    assert "there are no warm copies in" in done.stderr
    assert not warm.path.exists()


def test_nothing_secret_is_told(synced: Warm) -> None:
    assert PLANTED.encode() in b"".join(path.read_bytes() for path in synced.copy().path.iterdir())
    for words in (("sync", "--full", "--verbose"), ("status", "--verbose"), ("status", "--json")):
        synced.fleet.opsctl("standby", *words)  # which looks for every secret
