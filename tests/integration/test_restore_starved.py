"""A server that has hardly anything left to give is enough: one connection, two SELECTs, a second of patience."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from opsctl.embedded import Account, embedded_server
from opsctl.operations.fleet import create_schema
from tests import needs
from tests.conftest import Database, each_postgres
from tests.integration.fleet import FIRST, SECOND, Fleet, contents, results, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opsctl.embedded import EmbeddedServer
    from tests.conftest import RunOpsctl
    from tests.forks import Forks


@pytest.fixture
def role(fleet: Fleet) -> Iterator[str]:
    """A role with SELECT on the two tables and nothing else; the fleet's address is its own."""
    name = f"reader_{fleet.database.name}_{os.getpid()}"
    run = fleet.database.execute
    run(f"CREATE ROLE {name} LOGIN NOINHERIT")
    run(f"REVOKE ALL ON DATABASE {fleet.database.name} FROM PUBLIC")
    run("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    run(f"GRANT CONNECT ON DATABASE {fleet.database.name} TO {name}")
    run(f"GRANT USAGE ON SCHEMA public TO {name}")
    run(f"GRANT SELECT ON whatsapp_auth, whatsapp_keys TO {name}")
    fleet.env["DATABASE_URL"] = fleet.database.url.replace("//postgres@", f"//{name}@")
    yield name
    run(f"DROP OWNED BY {name}")
    run(f"DROP ROLE {name}")


def slow_down(fleet: Fleet, seconds_per_row: float, *grant_to: str) -> None:
    """Reading keys takes this long for each, as from a disk that is dying."""
    fleet.database.execute("ALTER TABLE whatsapp_keys RENAME TO whatsapp_keys_on_disk")
    fleet.database.execute(
        "CREATE VIEW whatsapp_keys AS SELECT k.* FROM whatsapp_keys_on_disk AS k "
        f"WHERE pg_sleep({seconds_per_row}) IS NOT NULL"
    )
    for name in grant_to:
        fleet.database.execute(f"GRANT SELECT ON whatsapp_keys TO {name}")


@each_postgres
def test_one_connection_of_a_role_that_may_only_read_the_two_tables_is_enough(
    fleet: Fleet, role: str, database: Database
) -> None:
    database.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1")
    assert set(results(fleet.restored()).values()) == {"restored"}
    for words in (("sessions", "verify", "--against", "database"), ("sessions", "list")):
        done = fleet.opsctl(*words, env={"SESSIONS_DIR": str(fleet.target)})
        assert done.returncode == 0, done


def test_a_second_connection_is_not_there_to_be_had(fleet: Fleet, role: str) -> None:
    fleet.database.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1")
    with psycopg.connect(fleet.database.conninfo, user=role), closing_in(4):
        fleet.refused(4, "the server has no free connection")


@pytest.mark.parametrize("function", ["pg_control_system()", "pg_control_checkpoint()"])
def test_a_role_that_may_not_look_at_the_servers_identity_restores_and_says_what_that_costs(
    fleet: Fleet, role: str, function: str
) -> None:
    fleet.database.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    document = fleet.restored()
    assert document["facts"]["system_identifier"] is None
    assert document["facts"]["timeline"] is None
    done = fleet.restore("--verbose")
    assert "will not recognise the server by it" in done.stdout + done.stderr


@contextmanager
def closing_in(seconds: float) -> Iterator[None]:
    """The block may take so long, and no longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def test_a_server_whose_connections_are_all_taken_but_one_is_enough(
    tmp_path: Path, place: Path, run_opsctl: RunOpsctl
) -> None:
    settings = {"max_connections": "6", "superuser_reserved_connections": "2", "reserved_connections": "0"}
    with embedded_server(tmp_path, settings=settings) as server, ExitStack() as taken:
        database = Database(server, "postgres")
        with database.connect() as connection:
            create_schema(connection)
            connection.execute("CREATE ROLE service LOGIN")
            connection.execute("GRANT SELECT ON whatsapp_auth, whatsapp_keys TO service")
        fleet = Fleet(database, place, run_opsctl)
        fleet.seed()
        fleet.env["DATABASE_URL"] = database.url.replace("//postgres@", "//service@")
        for _ in range(3):
            taken.enter_context(closing(database.connect(user="service")))
        fleet.restored()
        taken.enter_context(closing(database.connect(user="service")))
        with closing_in(2.5):
            fleet.refused(4, "the server has no free connection")


@each_postgres
def test_the_timeouts_of_a_role_do_not_end_a_slow_read(fleet: Fleet, role: str, database: Database) -> None:
    timeouts = ["statement_timeout", "idle_in_transaction_session_timeout"]
    if database.execute("SELECT 1 FROM pg_settings WHERE name = 'transaction_timeout'"):
        timeouts.append("transaction_timeout")
    for timeout in timeouts:
        database.execute(f"ALTER ROLE {role} SET {timeout} = '1s'")
    slow_down(fleet, 0.03, role)  # 80 keys: 2.4 s to count them, 1.2 s for each company's 40
    ended = (psycopg.errors.QueryCanceled, psycopg.errors.TransactionTimeout)
    with database.connect(user=role) as connection, pytest.raises(ended):
        connection.execute("SELECT count(value) FROM whatsapp_keys")
    assert results(fleet.restored("--company", FIRST)) == {FIRST: "restored"}


def test_a_role_that_is_read_only_by_default_restores(fleet: Fleet, role: str) -> None:
    fleet.database.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    fleet.database.execute(f"ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
    fleet.restored()


def test_odd_settings_of_a_role_change_no_byte_of_what_is_restored(fleet: Fleet, role: str) -> None:
    fleet.restored()
    plain = {company: contents(fleet.folder(company)) for company in (FIRST, SECOND)}
    for setting, value in (
        ("timezone", "Asia/Kathmandu"),
        ("datestyle", "German"),
        ("bytea_output", "escape"),
        ("client_encoding", "LATIN1"),
        ("standard_conforming_strings", "off"),
    ):
        fleet.database.execute(f"ALTER ROLE {role} SET {setting} = '{value}'")
    rows = rows_of(fleet.restored())
    assert {row["result"] for row in rows.values()} == {"unchanged"}
    assert {company: contents(fleet.folder(company)) for company in (FIRST, SECOND)} == plain


@pytest.mark.parametrize("table", ["whatsapp_auth", "whatsapp_keys"])
def test_a_table_that_another_session_has_locked_is_not_waited_for_longer_than_two_seconds(
    fleet: Fleet, table: str
) -> None:
    with fleet.database.connect(autocommit=False) as other:
        other.execute(SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(Identifier(table)))
        # A queue behind the lock, as in a pile-up: who comes later waits for all of them.
        with closing_in(4):
            fleet.refused(4, "another session has locked a table")


# --- a pooler in between ----------------------------------------------------------------------------------------------


@contextmanager
def pgbouncer(server: EmbeddedServer, folder: Path, *, settings: str = "") -> Iterator[str]:
    """A pooler in transaction mode in front of the server: the start of a DATABASE_URL, up to the database."""
    port = 6432
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={server.socket_dir} port={server.port}\n"
        f"[pgbouncer]\nunix_socket_dir = {folder}\nlisten_port = {port}\nlisten_addr =\n"
        f"auth_type = trust\nauth_file = {folder}/users\npool_mode = transaction\nlogfile = {folder}/log\n{settings}\n"
    )
    account = Account.for_server()
    for path in (folder, *folder.iterdir()):
        os.chown(path, account.uid, account.gid)
    program = "/usr/sbin/pgbouncer"
    with subprocess.Popen(
        [program, "--quiet", folder / "pgbouncer.ini"],
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            while not (folder / f".s.PGSQL.{port}").exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.01)
            yield f"postgresql://postgres@{quote(str(folder), safe='')}:{port}"
        finally:
            process.terminate()


@pytest.fixture
def pooler(fleet: Fleet, place: Path) -> Iterator[None]:
    folder = place / "pooler"
    folder.mkdir(0o700)
    with pgbouncer(fleet.database.server, folder, settings="default_pool_size = 1\nquery_wait_timeout = 30") as start:
        fleet.env["DATABASE_URL"] = f"{start}/{fleet.database.name}"
        yield


@needs.root()
@needs.debian("pgbouncer")
def test_through_a_transaction_pooler_everything_is_restored_and_what_is_lost_is_said(
    fleet: Fleet, pooler: None
) -> None:
    document = fleet.restored()
    assert set(results(document).values()) == {"restored"}
    (warning,) = (warning for warning in document["warnings"] if "pooler" in warning)
    assert "its own timeouts apply" in warning
    assert "may go on there" in warning
    assert "transaction pooler" in fleet.restore().stdout


@needs.root()
@needs.debian("pgbouncer")
def test_nothing_of_one_run_stays_on_the_connection_that_the_pooler_gives_to_the_next(
    fleet: Fleet, pooler: None
) -> None:
    fleet.restored()
    with psycopg.connect(fleet.env["DATABASE_URL"], autocommit=True, prepare_threshold=None) as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone()
            for name in ("statement_timeout", "lock_timeout", "transaction_read_only")
        ]
    assert shown == [("0",), ("0",), ("off",)]


@needs.root()
@needs.debian("pgbouncer")
def test_a_pooler_whose_connections_are_all_busy_is_given_up_at_the_deadline(fleet: Fleet, pooler: None) -> None:
    with psycopg.connect(fleet.env["DATABASE_URL"], prepare_threshold=None) as busy:
        busy.execute("SELECT 1")
        with closing_in(4):
            done = fleet.restore("--deadline", "2")
        assert done.returncode == 4
        assert "PostgreSQL was not done when the deadline came" in done.stderr
    assert not fleet.target.exists()
    fleet.restored()


def test_without_a_pooler_nothing_is_said_of_one(fleet: Fleet) -> None:
    assert not [warning for warning in fleet.restored()["warnings"] if "pooler" in warning]


def test_a_shell_that_lets_no_file_grow_is_named_and_nothing_is_changed(fleet: Fleet, forking: Forks) -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"  # a manifest is larger
    env = {**fleet.env, "SESSIONS_DIR": str(fleet.target), "HOME": str(fleet.place)}
    done = forking.run("sessions", "restore", "--json", env=env, before=limited)
    assert done.returncode == 5, done
    assert done.json()["error"]["hint"] == "ulimit -f unlimited"
    assert not list(fleet.target.glob("company_*"))
