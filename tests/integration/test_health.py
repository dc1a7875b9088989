"""`opsctl db health`: every check finds the sick state that is made for it, and is quiet where there is none."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

import opsctl
from opsctl.cli.render import table
from opsctl.embedded import Account, EmbeddedServer, embedded_server
from opsctl.operations import health, monitoring
from opsctl.operations.fleet import create_schema, seed_fleet
from opsctl.operations.health_checks import DATABASE_CHECKS, Check, Group, HealthRow, State
from opsctl.settings import load
from tests import needs
from tests.conftest import DEBIAN, EMBEDDED, Database, debian_postgres_bin, each_postgres
from tests.integration.fleet import FIRST, Fleet, unchanged
from tests.integration.silence import answers_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.operations.health_checks import Server

QUIET = {"HEALTH_DISK_PERCENT": "100/100", "HEALTH_REPLY_MS": "9000/9000", "DB_QUERY_LATENCY_THRESHOLD_MS": "9000"}
"""What depends on the machine that runs this."""


def looked(url: str, *groups: Group, **settings: str) -> dict[str, HealthRow]:
    """The rows by check."""
    environ = {"DATABASE_URL": url, "OPSCTL_STATE_DIR": "/nonexistent", **QUIET, **settings}
    return {row.check: row for row in health.examine(load(environ=environ), only=groups).rows}


def states(rows: dict[str, HealthRow]) -> dict[str, State]:
    return {name: row.state for name, row in rows.items()}


@contextmanager
def waiting(database: Database, statement: str) -> Iterator[int]:
    """Another session that is in the middle of a statement; gives its pid."""
    with closing(database.connect()) as connection:
        pid = connection.info.backend_pid

        def work() -> None:
            with connection.cursor() as cursor, suppress(psycopg.errors.QueryCanceled):
                cursor.execute(statement.encode())

        thread = threading.Thread(target=work)
        thread.start()
        until(
            lambda: bool(database.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", [pid]))
        )
        yield pid
        database.execute("SELECT pg_cancel_backend(%s)", [pid])
        thread.join()


def until(true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not true():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def role(database: Database, name: str, more: str = "") -> str:
    """A role that is no superuser, and its address."""
    database.execute(f"DROP OWNED BY {name}") if database.execute(
        f"SELECT 1 FROM pg_roles WHERE rolname = '{name}'"
    ) else (database.execute(f"CREATE ROLE {name} LOGIN"))
    database.execute(f"ALTER ROLE {name} {more or 'LOGIN'}")
    return re.sub(r"//[^@]+@", f"//{name}@", database.url)


# Well


@each_postgres
def test_a_healthy_server_is_quiet(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    rows = looked(fleet.database.url)
    assert {name: row.seen for name, row in rows.items() if row.state is not State.OK} == {}
    assert set(rows) >= {
        *("reply", "role", "clock", "version", "latency", "connections", "blocked", "idle in transaction"),
        *("long queries", "prepared", "wraparound", "dead rows of keys", "vacuum of auth", "cache hit", "size of keys"),
        *("tls", "credentials", "keys", "ages of keys", "expired keys", "mis-typed keys", "standby", "disk of standby"),
    }
    assert re.fullmatch(r"p50 [\d.]+, p95 [\d.]+, p99 [\d.]+ ms of 100", rows["latency"].seen)
    assert rows["keys"].value == 80
    assert rows["keys"].seen.startswith("80: pre-key 28, ")
    assert sum(int(count) for count in re.findall(r" (\d+)(?:,|$)", rows["ages of keys"].seen)) == 80
    assert "opsctl 1" in rows["connections"].seen
    assert (rows["size of keys"].value or 0) > 8192


def test_the_table_fits_80_columns_and_says_what_to_do(fleet: Fleet) -> None:
    settings = load(
        environ={"DATABASE_URL": fleet.database.url, "HEALTH_WRAPAROUND_IDS": "1/2", "OPSCTL_STATE_DIR": "/x"}
    )
    report = health.report(health.examine(settings))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table(report))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("wraparound") and "critical" in line and "████████" in line for line in lines)
    assert any("wraparound is critical: VACUUM (FREEZE)" in warning for warning in report.warnings)
    assert report.exit_code == 1
    assert report.failure is not None
    assert report.failure.message.startswith("wraparound: ")


# Sick


@each_postgres
def test_who_waits_for_a_lock_and_who_holds_it(database: Database) -> None:
    with closing(database.connect(autocommit=False)) as holder:
        holder.execute("LOCK TABLE whatsapp_keys")
        with waiting(database, "SELECT count(*) FROM whatsapp_keys"):
            until(lambda: database.execute("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)])
            row = looked(database.url, Group.SESSIONS, HEALTH_BLOCKED_SESSIONS="1/2")["blocked"]
            assert row.state is State.WARNING
            assert f"for whatsapp_keys; held by pid {holder.info.backend_pid}" in row.seen
            assert f"pg_terminate_backend({holder.info.backend_pid})" in (row.action or "")
            time.sleep(1.05)
            assert looked(database.url, Group.SESSIONS, HEALTH_BLOCKED_S="1/1")["blocked"].state is State.CRITICAL
            assert looked(database.url, Group.SESSIONS)["blocked"].state is State.OK
            # And the check that has to wait for the same lock hides none of the others.
            began = time.monotonic()
            rows = looked(database.url)
            assert time.monotonic() - began < 5
            assert (rows["keys"].state, rows["latency"].state) == (State.UNKNOWN, State.UNKNOWN)
            assert "another session has locked a table" in rows["keys"].seen
            assert rows["credentials"].seen == "0 companies"
            assert rows["tls"].state is rows["wraparound"].state is rows["blocked"].state is State.OK


def test_of_a_chain_of_waiting_sessions_the_root_is_named(database: Database) -> None:
    with closing(database.connect(autocommit=False, application_name="root")) as root:
        root.execute("LOCK TABLE whatsapp_keys")
        # The last of the chain waits longest, so that the longest wait does not name the root by itself.
        middle = "BEGIN; LOCK TABLE whatsapp_auth; SELECT pg_sleep(1); LOCK TABLE whatsapp_keys"
        with ExitStack() as stack:
            first = stack.enter_context(waiting(database, middle))
            held = "SELECT count(*) FROM pg_locks WHERE relation = 'whatsapp_auth'::regclass AND granted"
            until(lambda: database.execute(held) == [(1,)])
            second = stack.enter_context(waiting(database, "TABLE whatsapp_auth"))
            until(lambda: database.execute("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(2,)])
            assert database.execute("SELECT pg_blocking_pids(%s)", [second]) == [([first],)]
            row = looked(database.url, Group.SESSIONS, HEALTH_BLOCKED_SESSIONS="2/3")["blocked"]
            assert row.state is State.WARNING
            assert row.seen.startswith("2 wait, ")
            assert f"held by pid {root.info.backend_pid} (root, " in row.seen
            assert f"pg_terminate_backend({root.info.backend_pid})" in (row.action or "")


@each_postgres
def test_a_check_that_writes_is_refused_by_the_server(fleet: Fleet) -> None:
    fleet.database.execute(
        "CREATE TABLE written (); ALTER TABLE whatsapp_keys RENAME TO keys; ALTER TABLE whatsapp_auth RENAME TO auth; "
        "CREATE FUNCTION writes() RETURNS bool LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO written DEFAULT VALUES; RETURN true; END $$; "
        "CREATE VIEW whatsapp_keys AS SELECT * FROM keys WHERE writes(); "
        "CREATE VIEW whatsapp_auth AS SELECT * FROM auth WHERE writes()"
    )
    rows = looked(fleet.database.url)
    for check in ("credentials", "keys", "latency"):
        assert rows[check].state is State.UNKNOWN
        assert "cannot execute INSERT in a read-only transaction" in rows[check].seen
    assert fleet.database.execute("SELECT count(*) FROM written") == [(0,)]
    assert {rows[check].state for check in ("tls", "wraparound", "connections")} == {State.OK}


@each_postgres
def test_a_statement_ends_after_two_seconds_and_the_other_checks_stay(fleet: Fleet) -> None:
    fleet.database.execute(
        "ALTER TABLE whatsapp_keys RENAME TO keys; CREATE VIEW whatsapp_keys AS SELECT keys.* FROM pg_sleep(10), keys"
    )
    began = time.monotonic()
    rows = looked(fleet.database.url, Group.AUTH, Group.STORAGE)
    assert 1.9 < time.monotonic() - began < 2.6
    assert rows["keys"].state is State.UNKNOWN
    assert "canceling statement due to statement timeout" in rows["keys"].seen
    assert {row.state for check, row in rows.items() if check != "keys"} == {State.OK}
    began = time.monotonic()
    rows = looked(fleet.database.url)
    assert time.monotonic() - began < 5
    assert {check for check, row in rows.items() if row.state is State.UNKNOWN} == {"keys", "latency"}


@each_postgres
def test_open_transactions_that_do_nothing_and_queries_that_run_for_long(database: Database) -> None:
    with closing(database.connect(autocommit=False, application_name="forgotten")) as idle:
        idle.execute("SELECT 1")
        with waiting(database, "SELECT pg_sleep(30), 'a secret'") as pid:
            time.sleep(1.05)
            limits = {"HEALTH_IDLE_TRANSACTION_S": "1/100", "HEALTH_LONG_QUERY_S": "1/1"}
            rows = looked(database.url, Group.SESSIONS, **limits)
            assert (rows["idle in transaction"].state, rows["long queries"].state) == (State.WARNING, State.CRITICAL)
            assert rows["idle in transaction"].seen == f"1, longest 1 s: pid {idle.info.backend_pid} (forgotten)"
            assert f"pg_cancel_backend({pid})" in (rows["long queries"].action or "")
            assert not any("secret" in row.seen for row in rows.values())
            rows = looked(database.url, Group.SESSIONS)
            assert (rows["idle in transaction"].state, rows["long queries"].state) == (State.OK, State.OK)


@pytest.fixture(scope="module", params=[EMBEDDED, DEBIAN])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of 8 connections, of which 3 are a superuser's, with prepared transactions and a certificate.

    The newer one has a ninth, which is reserved for the roles of pg_use_reserved_connections (since PostgreSQL 16).
    """
    bin_dir = None
    if request.param == DEBIAN and (bin_dir := debian_postgres_bin()) is None:
        pytest.skip(f"{needs.NOT_PROVEN}PostgreSQL {DEBIAN}, production's major version")
    settings = {"max_connections": "8", "max_prepared_transactions": "2", "max_wal_senders": "2"}
    if request.param == EMBEDDED:
        settings |= {"max_connections": "9", "reserved_connections": "1"}
    folder = tmp_path_factory.mktemp(f"own{request.param}")
    with ExitStack() as stack:
        if request.param == DEBIAN:  # the embedded one was built without TLS
            certificates = Path("/tmp") / f"opsctl-tls-{os.getpid()}"
            certificates.mkdir(mode=0o755)
            stack.callback(subprocess.run, ["rm", "-rf", str(certificates)], check=True)
            make_certificate(certificates, days=300)
            files = {"ssl_cert_file": "certificate.pem", "ssl_key_file": "key.pem"}
            settings |= {"ssl": "on", **{name: str(certificates / file) for name, file in files.items()}}
        server = stack.enter_context(
            embedded_server(folder, settings=settings, bin_dir=bin_dir, tcp=bin_dir is not None)
        )
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            create_schema(connection)
            connection.execute("CREATE ROLE service LOGIN PASSWORD 'service'")
            connection.execute("GRANT SELECT ON whatsapp_auth, whatsapp_keys TO service")
        yield server


def make_certificate(folder: Path, *, days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=days, hours=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "key.pem"
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    if os.geteuid() == 0:
        account = Account.for_server()
        os.chown(file, account.uid, account.gid)


def renew_certificate(server: EmbeddedServer, *, days: int) -> Path:
    """Give the server another certificate, and wait until it shows that one; where its file is."""
    with psycopg.connect(server.conninfo(sslmode="require"), autocommit=True) as connection:
        file = Path(connection.execute("SHOW ssl_cert_file").fetchall()[0][0])
        make_certificate(file.parent, days=days)
        connection.execute("SELECT pg_reload_conf()")
    url = server.conninfo(sslmode="require")
    until(lambda: round(looked(url, Group.TLS)["certificate"].value or 0) == days)
    return file


def url_of(server: EmbeddedServer, user: str = "postgres", **more: Any) -> str:
    """As a keyword string, which DATABASE_URL may be too."""
    return server.conninfo(user=user, host=str(server.socket_dir), **more)


def test_connections_near_the_limit_of_the_server_or_of_a_role_and_none_left(own: EmbeddedServer, fleet: Fleet) -> None:
    url = url_of(own)
    assert states(looked(url, Group.SESSIONS))["connections"] is State.OK
    with ExitStack() as stack:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER ROLE service CONNECTION LIMIT 2")
        stack.enter_context(closing(psycopg.connect(url_of(own, "service", application_name="baileys"))))
        rows = looked(url, Group.SESSIONS)
        assert (rows["connections of service"].state, rows["connections of service"].value) == (State.OK, 50)
        stack.enter_context(closing(psycopg.connect(url_of(own, "service", application_name="baileys"))))
        rows = looked(url, Group.SESSIONS)
        assert rows["connections of service"].state is State.CRITICAL
        assert rows["connections of service"].seen == "2 of 2: its own limit"
        assert (rows["connections"].value, rows["connections"].state) == (60, State.OK)
        assert rows["connections"].seen == "3 of 5: baileys 2, opsctl 1"
        assert looked(url, Group.SESSIONS, DB_POOL_USAGE_THRESHOLD="0.5")["connections"].state is State.WARNING
        assert (
            looked(url, Group.SESSIONS, HEALTH_POOL_CRITICAL="0.6", DB_POOL_USAGE_THRESHOLD="0.1")["connections"].state
            is State.CRITICAL
        )
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER ROLE service CONNECTION LIMIT -1")
        for _ in range(3):
            stack.enter_context(closing(psycopg.connect(url_of(own, "service"))))
        assert looked(url, Group.SESSIONS)["connections"].state is State.CRITICAL
        done = fleet.opsctl("db", "health", "--json", env={"DATABASE_URL": url_of(own, "service")})
        assert (done.returncode, done.json()["error"]["kind"]) == (4, "too-many-clients")
        rows_here = {row["check"]: row["state"] for row in done.json()["rows"]}
        assert rows_here["reply"] == "critical"
        assert "standby" in rows_here  # what is of this machine is looked at all the same


def test_a_prepared_transaction_that_nobody_ended(own: EmbeddedServer) -> None:
    assert looked(url_of(own), Group.SESSIONS)["prepared"].state is State.OK
    with psycopg.connect(url_of(own), autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE orphan ()")
        connection.execute("PREPARE TRANSACTION 'forgotten'")
        prepared_at = time.monotonic()
        time.sleep(1.05)
        row = looked(url_of(own), Group.SESSIONS)["prepared"]
        at_most_s = time.monotonic() - prepared_at + 1
        connection.execute("ROLLBACK PREPARED 'forgotten'")
    oldest = re.fullmatch("1, oldest ([0-9]+) s", row.seen)
    assert row.state is State.WARNING
    assert oldest is not None
    assert 1 <= int(oldest[1]) <= at_most_s


def test_tls_and_the_days_that_the_certificate_has_left(own: EmbeddedServer) -> None:
    if own.password is None:
        assert looked(url_of(own), Group.TLS)["tls"].seen == "a socket of this machine"
        return

    def over_tcp(mode: str) -> dict[str, HealthRow]:
        return looked(own.conninfo(sslmode=mode), Group.TLS)

    folder = renew_certificate(own, days=300).parent
    assert states(over_tcp("require")) == {"tls": State.WARNING, "certificate": State.OK}
    assert states(over_tcp("disable")) == {"tls": State.OK}  # within this machine
    verified = looked(own.conninfo(sslmode="verify-ca", sslrootcert=str(folder / "certificate.pem")), Group.TLS)
    assert states(verified) == {"tls": State.OK, "certificate": State.OK}
    for days, state in ((20, State.WARNING), (5, State.CRITICAL), (-3, State.CRITICAL)):
        renew_certificate(own, days=days)
        row = over_tcp("require")["certificate"]
        assert row.state is state
        assert ("ended" if days < 0 else f"in {days} days") in row.seen
    assert looked(own.conninfo(sslmode="require"), Group.TLS, HEALTH_CERTIFICATE_DAYS="0/0")["certificate"].state is (
        State.CRITICAL
    )


def test_a_connection_to_another_machine_has_to_be_encrypted(own: EmbeddedServer) -> None:
    if own.password is None:
        return
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as anywhere:
        anywhere.connect(("198.51.100.1", 9))  # which sends nothing
        address = anywhere.getsockname()[0]
    root = renew_certificate(own, days=300)
    with answers_once(own.port, host=address) as port:

        def over_network(mode: str, **more: str) -> dict[str, HealthRow]:
            return looked(own.conninfo(host=address, port=port, sslmode=mode, **more), Group.TLS)

        row = over_network("disable")["tls"]
        assert (row.state, row.seen) == (State.WARNING, "not encrypted")
        assert row.action == "sslmode=verify-full in DATABASE_URL"
        assert over_network("verify-ca", sslrootcert=str(root))["tls"].state is State.OK


def test_a_certificate_that_is_not_shown_costs_two_seconds_or_what_is_left_of_the_command(own: EmbeddedServer) -> None:
    if own.password is None:
        return

    def says_yes_and_no_more(client: socket.socket) -> None:
        time.sleep(1.5)
        with suppress(OSError):  # it has gone by then, if it had less time
            client.sendall(b"S")

    for budget_s, longest_s in ((5.0, 2.3), (1.2, 1.4)):
        with answers_once(own.port, then=says_yes_and_no_more) as port:
            environ = {"DATABASE_URL": own.conninfo(sslmode="require", port=port), "OPSCTL_STATE_DIR": "/nonexistent"}
            began = time.monotonic()
            seen = health.examine(load(environ=environ), only=[Group.TLS], budget_s=budget_s)
            assert time.monotonic() - began < longest_s
        assert {row.check: row.state for row in seen.rows} == {"tls": State.WARNING, "certificate": State.UNKNOWN}


@each_postgres
def test_dead_rows_a_vacuum_that_never_was_and_transaction_ids_that_run_out(database: Database) -> None:
    database.execute("ALTER TABLE whatsapp_keys SET (autovacuum_enabled = false)")
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO whatsapp_keys SELECT 'a', 'session', n::text, '{}' FROM generate_series(1, 15000) AS n"
        )
        connection.execute("DELETE FROM whatsapp_keys WHERE key_id::int > 2000")
        connection.execute("SELECT pg_stat_force_next_flush()")
    rows = looked(database.url, Group.STORAGE, HEALTH_VACUUM_DAYS="0/1")
    assert (rows["dead rows of keys"].state, rows["vacuum of keys"].state) == (State.CRITICAL, State.WARNING)
    assert rows["dead rows of keys"].seen == "13,000 dead beside 2,000 live"
    assert "none since the server started" in rows["vacuum of keys"].seen
    assert (rows["dead rows of auth"].state, rows["vacuum of auth"].state) == (State.OK, State.OK)
    rows = looked(database.url, Group.STORAGE, HEALTH_VACUUM_DAYS="0/1", HEALTH_FEW_ROWS="13000")
    assert (rows["dead rows of keys"].state, rows["vacuum of keys"].state) == (State.OK, State.WARNING)
    rows = looked(database.url, Group.STORAGE, HEALTH_VACUUM_DAYS="0/1", HEALTH_FEW_ROWS="28000")
    assert rows["vacuum of keys"].state is State.OK  # 15,000 were inserted and 13,000 deleted
    assert (
        looked(database.url, Group.STORAGE, HEALTH_DEAD_ROWS_PERCENT="80/99")["dead rows of keys"].state
        is State.WARNING
    )
    database.execute("VACUUM whatsapp_keys")
    rows = looked(database.url, Group.STORAGE, HEALTH_WRAPAROUND_IDS="1/2147483648", HEALTH_DISK_PERCENT="0/100")
    assert (rows["dead rows of keys"].state, rows["vacuum of keys"].state) == (State.OK, State.OK)
    assert (rows["wraparound"].state, rows["disk of standby"].state) == (State.WARNING, State.WARNING)


@pytest.mark.parametrize("major", [EMBEDDED, DEBIAN])
def test_multixact_ids_run_out_too(major: int, tmp_path: Path) -> None:
    bin_dir = debian_postgres_bin() if major == DEBIAN else None
    if major == DEBIAN and bin_dir is None:
        pytest.skip(f"{needs.NOT_PROVEN}PostgreSQL {DEBIAN}, production's major version")
    with embedded_server(tmp_path, bin_dir=bin_dir) as server:
        row = looked(server.conninfo(), Group.STORAGE, HEALTH_WRAPAROUND_IDS="50000/60000")["wraparound"]
        assert row.state is State.OK
        server.stop()
        # As if 55,000 had been used: their pages are there, and empty.
        done = Account.for_server().run(
            server.bin_dir / "pg_resetwal", "--multixact-ids=55000,1", "-D", server.data_dir
        )
        assert done.returncode == 0, done.stderr
        with (server.data_dir / "pg_multixact" / "offsets" / "0000").open("r+b") as pages:
            pages.truncate(32 * 8192)
        server.start()
        row = looked(server.conninfo(), Group.STORAGE, HEALTH_WRAPAROUND_IDS="50000/60000")["wraparound"]
        assert (row.state, row.value) == (State.WARNING, 54_999)


@each_postgres
def test_a_primary_that_is_read_only_and_clocks_apart(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(looked(database.url, Group.REACH))["role"] is State.OK
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    assert states(looked(database.url, Group.REACH))["role"] is State.CRITICAL
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3)
    row = looked(database.url, Group.REACH)["clock"]
    assert row.state is State.WARNING
    # Less by half of the time that the answer took.
    assert 2 < float(row.seen.removesuffix(" s apart from this host")) <= 3.1
    assert looked(database.url, Group.REACH, HEALTH_CLOCK_SKEW_S="1/2")["clock"].state is State.CRITICAL


def test_slow_answers_and_a_pg_dump_that_is_too_old(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "pg_dump"
    program.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 13.4'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    limits = {"DB_QUERY_LATENCY_THRESHOLD_MS": "9000", "HEALTH_REPLY_MS": "0/60000"}
    rows = looked(database.url, Group.REACH, **limits)
    assert (rows["version"].state, rows["reply"].state) == (State.WARNING, State.WARNING)
    assert rows["version"].seen.endswith("pg_dump 13")
    database.execute(
        "ALTER TABLE whatsapp_auth RENAME TO slow; "
        "CREATE VIEW whatsapp_auth AS SELECT * FROM slow "
        "UNION ALL SELECT md5(random()::text), '{}', now(), now() FROM pg_sleep(0.02)"
    )
    rows = looked(database.url, Group.REACH, DB_QUERY_LATENCY_THRESHOLD_MS="20", HEALTH_LATENCY_CRITICAL_MS="9000")
    assert rows["latency"].state is State.WARNING
    probes = int(rows["latency"].seen.split()[-1])
    assert 10 < probes < 100  # they end after a second
    rows = looked(database.url, Group.REACH, DB_QUERY_LATENCY_THRESHOLD_MS="5", HEALTH_LATENCY_CRITICAL_MS="20")
    assert rows["latency"].state is State.CRITICAL


@each_postgres
def test_what_the_service_keeps_there(fleet: Fleet) -> None:
    fleet.database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [FIRST])
    fleet.database.execute(
        "UPDATE whatsapp_keys SET updated_at = now() - interval '31 days', expires_at = now() - interval '1 day'"
    )
    fleet.key("lid", "mapping-1", '"1"')
    rows = looked(fleet.database.url, Group.AUTH, HEALTH_EXPIRED_KEYS="1/1000")
    by_type = dict(fleet.database.execute("SELECT key_type, count(*) FROM whatsapp_keys GROUP BY 1"))
    expected = by_type["session"] + by_type["sender-key-memory"]
    assert (rows["expired keys"].value, rows["expired keys"].state) == (expected, State.WARNING)
    assert looked(fleet.database.url, Group.AUTH, HEALTH_EXPIRED_KEYS="1/1")["expired keys"].state is State.CRITICAL
    assert looked(fleet.database.url, Group.AUTH, DB_CLEANUP_RETENTION_DAYS="40")["expired keys"].value == 0
    assert (rows["mis-typed keys"].state, rows["mis-typed keys"].value) == (State.WARNING, 1)
    assert (rows["credentials"].state, rows["credentials"].seen) == (State.OK, "1 companies")
    assert (rows["orphaned keys"].state, rows["orphaned keys"].value) == (State.WARNING, 1)
    assert f"'{FIRST}'" in (rows["orphaned keys"].action or "")
    assert rows["ages of keys"].seen == "< 1 d 1, 1-7 0, 7-14 0, 14-30 0, > 30 80"
    fleet.database.execute("DELETE FROM whatsapp_auth")
    assert looked(fleet.database.url, Group.AUTH)["credentials"].state is State.CRITICAL


def test_ages_are_counted_to_the_second_at_the_edges_of_their_classes(empty_fleet: Fleet) -> None:
    for days in (1, 7, 14, 30):
        for number, side in enumerate(("+ interval '20 s'", "- interval '20 s'")):
            empty_fleet.key("session", f"{days}-{number}", "{}")
            empty_fleet.database.execute(
                f"UPDATE whatsapp_keys SET updated_at = now() - interval '{days} days' {side} "
                f"WHERE key_id = '{days}-{number}'"
            )
    seen = looked(empty_fleet.database.url, Group.AUTH)["ages of keys"].seen
    assert seen == "< 1 d 1, 1-7 2, 7-14 2, 14-30 2, > 30 1"
    empty_fleet.database.execute("DELETE FROM whatsapp_keys WHERE key_id <> '7-0'")
    assert "1-7 1, 7-14 0" in looked(empty_fleet.database.url, Group.AUTH)["ages of keys"].seen
    empty_fleet.database.execute("UPDATE whatsapp_keys SET updated_at = updated_at - interval '40 s'")
    assert "1-7 0, 7-14 1" in looked(empty_fleet.database.url, Group.AUTH)["ages of keys"].seen
    empty_fleet.database.execute("UPDATE whatsapp_keys SET updated_at = now() - interval '14 days' - interval '20 s'")
    assert "7-14 0, 14-30 1" in looked(empty_fleet.database.url, Group.AUTH)["ages of keys"].seen


@pytest.mark.parametrize("prefix", ["app", "lid", "pre", "sender"])
def test_each_type_that_the_early_migration_left_is_found(empty_fleet: Fleet, prefix: str) -> None:
    empty_fleet.key("session", "1", "{}")
    assert looked(empty_fleet.database.url, Group.AUTH)["mis-typed keys"].state is State.OK
    empty_fleet.key(prefix, "key-1", "{}")
    row = looked(empty_fleet.database.url, Group.AUTH)["mis-typed keys"]
    assert (row.state, row.value, row.action) == (State.WARNING, 1, "opsctl keys doctor")


@pytest.mark.parametrize(
    ("count", "state"),
    [(99, State.OK), (100, State.WARNING), (499, State.WARNING), (500, State.CRITICAL)],
)
def test_keys_past_their_expiry_are_too_many_from_100_and_from_500(
    empty_fleet: Fleet, count: int, state: State
) -> None:
    empty_fleet.database.execute(
        "INSERT INTO whatsapp_keys SELECT 'a', 'session', n::text, '{}', now(), now() - interval '31 days', "
        f"now() - interval '1 s' FROM generate_series(1, {count}) AS n"
    )
    row = looked(empty_fleet.database.url, Group.AUTH)["expired keys"]
    assert (row.value, row.state) == (count, state)


@each_postgres
def test_without_pg_monitor_it_says_what_it_may_not_see_and_does_not_fail(fleet: Fleet) -> None:
    url = role(fleet.database, "onlooker")
    fleet.database.execute("GRANT SELECT ON whatsapp_auth TO onlooker")
    rows = looked(url)
    assert (rows["privileges"].state, rows["connections"].state) == (State.HIDDEN, State.OK)
    assert (rows["idle in transaction"].state, rows["long queries"].state) == (State.HIDDEN, State.HIDDEN)
    assert (rows["credentials"].state, rows["keys"].state, rows["latency"].state) == (
        State.OK,
        State.HIDDEN,
        State.HIDDEN,
    )
    assert not any(row.state in {State.CRITICAL, State.UNKNOWN} for row in rows.values())
    environ = {"DATABASE_URL": url, "OPSCTL_STATE_DIR": "/nonexistent", **QUIET}
    assert health.report(health.examine(load(environ=environ))).exit_code == 0
    fleet.database.execute("GRANT pg_monitor TO onlooker; GRANT SELECT ON whatsapp_keys TO onlooker")
    assert State.HIDDEN not in states(looked(url)).values()


def test_a_check_that_fails_hides_none_of_the_others(database: Database) -> None:
    database.execute("DROP TABLE whatsapp_keys")
    rows = looked(database.url)
    assert (rows["keys"].state, rows["latency"].state) == (State.CRITICAL, State.CRITICAL)
    assert 'relation "whatsapp_keys" does not exist' in rows["keys"].seen
    assert rows["credentials"].seen == "0 companies"
    assert rows["reply"].state is rows["connections"].state is rows["wraparound"].state is rows["tls"].state is State.OK


def test_credentials_and_keys_do_not_hide_each_other(fleet: Fleet) -> None:
    url = role(fleet.database, "half")
    fleet.database.execute("GRANT pg_monitor TO half; GRANT SELECT ON whatsapp_keys TO half")
    rows = looked(url, Group.AUTH)
    assert (rows["credentials"].state, rows["keys"].state) == (State.HIDDEN, State.OK)
    fleet.database.execute("REVOKE SELECT ON whatsapp_keys FROM half; GRANT SELECT ON whatsapp_auth TO half")
    rows = looked(url, Group.AUTH)
    assert (rows["credentials"].state, rows["keys"].state) == (State.OK, State.HIDDEN)
    fleet.database.execute("ALTER TABLE whatsapp_auth RENAME TO gone")
    rows = looked(fleet.database.url, Group.AUTH)
    assert (rows["credentials"].state, rows["keys"].state, rows["keys"].value) == (State.CRITICAL, State.OK, 80)
    assert {"ages of keys", "expired keys", "mis-typed keys"} <= rows.keys()
    assert "orphaned keys" not in rows  # of which nobody knows
    fleet.database.execute("ALTER TABLE gone RENAME TO whatsapp_auth; ALTER TABLE whatsapp_keys RENAME TO gone")
    rows = looked(fleet.database.url, Group.AUTH)
    assert (rows["credentials"].state, rows["credentials"].value) == (State.OK, 2)
    assert rows["keys"].state is State.CRITICAL


@pytest.mark.parametrize(("budget_s", "why"), [(5.0, "stopped answering in the middle"), (1.0, "not all was answered")])
def test_a_server_that_freezes_in_the_middle_is_critical_and_costs_no_more_than_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float, why: str
) -> None:
    with embedded_server(tmp_path) as server:
        with psycopg.connect(server.conninfo()) as connection:
            create_schema(connection)

        def freeze(_: Server) -> Iterator[HealthRow]:
            server.freeze()
            yield HealthRow("ice", Group.STORAGE, State.OK, "frozen")

        monkeypatch.setattr(health, "DATABASE_CHECKS", (Check("ice", Group.STORAGE, freeze), *DATABASE_CHECKS))
        settings = load(environ={"DATABASE_URL": server.conninfo(), "OPSCTL_STATE_DIR": "/nonexistent", **QUIET})
        for only in ((), (Group.STORAGE,)):
            began = time.monotonic()
            seen = health.examine(settings, only=only, budget_s=budget_s)
            assert time.monotonic() - began < budget_s + 0.5
            server.thaw()
            rows = {row.check: row for row in seen.rows}
            assert rows["reply"].state is State.CRITICAL
            assert f", then {why}" in rows["reply"].seen
            assert rows["reply"].seen.startswith("connected")
            assert len(rows) == len(seen.rows)
            assert rows["sizes"].seen == "not asked: the connection is gone"
            states_there = {
                row.state for row in seen.rows if row.check not in {"reply", "ice", "standby", "disk of standby"}
            }
            assert states_there == {State.UNKNOWN}
            assert health.report(seen).exit_code == 1
            answer = monitoring.plugin(seen)
            assert (answer.code, answer.line[:24]) == (2, "OPSCTL CRITICAL: reply: ")
            monitoring.write_metrics(seen, tmp_path / "opsctl.prom")
            assert "opsctl_health_up 0.0" in (tmp_path / "opsctl.prom").read_text()


# Replication


@pytest.mark.parametrize("major", [EMBEDDED, DEBIAN])
def test_a_replica_that_lags_seen_from_both_sides_and_slots_that_nobody_reads(major: int, tmp_path: Path) -> None:
    bin_dir = debian_postgres_bin() if major == DEBIAN else None
    if major == DEBIAN and bin_dir is None:
        pytest.skip(f"{needs.NOT_PROVEN}PostgreSQL {DEBIAN}, production's major version")
    settings = {"min_wal_size": "32MB", "max_wal_size": "48MB"}
    with embedded_server(tmp_path, bin_dir=bin_dir, settings=settings) as primary, replica_of(primary) as replica:
        with psycopg.connect(primary.conninfo(), autocommit=True) as connection:
            create_schema(connection)
            until(lambda: connection.execute("SELECT count(replay_lsn) FROM pg_stat_replication").fetchone() == (1,))
            rows = looked(primary.conninfo(), Group.REPLICATION)
            assert states(rows) == {"replica replica": State.OK, "slot replica": State.OK}
            assert rows["slot replica"].seen.startswith("active, keeps ")
            until(lambda: states(looked(replica.conninfo(), Group.REPLICATION)) == {"replay": State.OK})
            assert looked(replica.conninfo(), Group.REACH)["role"].state is State.WARNING
            with psycopg.connect(replica.conninfo(), autocommit=True) as there:
                there.execute("SELECT pg_wal_replay_pause()")
                until(lambda: there.execute("SELECT pg_get_wal_replay_pause_state()").fetchone() == ("paused",))
            connection.execute(
                "INSERT INTO whatsapp_auth SELECT n, to_jsonb(repeat(n::text, 200)) FROM generate_series(1, 5000) n"
            )
            time.sleep(1.05)
            row = looked(primary.conninfo(), Group.REPLICATION, HEALTH_REPLICATION_MIB="1/2")["replica replica"]
            assert (row.state, row.unit) == (State.CRITICAL, "MiB")
            row = looked(replica.conninfo(), Group.REPLICATION, HEALTH_REPLICATION_S="1/100")["replay"]
            assert row.state is State.WARNING

            with psycopg.connect(replica.conninfo(), autocommit=True) as there:
                there.execute("SELECT pg_wal_replay_resume()")
                there.execute("ALTER SYSTEM SET recovery_min_apply_delay = '1500ms'")
                there.execute("SELECT pg_reload_conf()")
            until(lambda: connection.execute(CAUGHT_UP).fetchone() == (True,))

            def lagging(limits: str) -> tuple[State, str]:
                """With something to replay: the lag of a replica that has caught up is soon forgotten."""
                connection.execute("INSERT INTO whatsapp_auth VALUES (gen_random_uuid(), '{}')")
                row = looked(primary.conninfo(), Group.REPLICATION, HEALTH_REPLICATION_S=limits)["replica replica"]
                return row.state, row.unit

            until(lambda: lagging("1/100") == (State.WARNING, "s"))
            until(lambda: lagging("1/1") == (State.CRITICAL, "s"))

            connection.execute("SELECT pg_create_physical_replication_slot('left', true)")
            row = looked(primary.conninfo(), Group.REPLICATION)["slot left"]
            assert (row.state, row.seen.split(",")[0]) == (State.WARNING, "inactive")
            connection.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
            connection.execute("SELECT pg_reload_conf()")
            for number in range(4):
                connection.execute("SELECT pg_logical_emit_message(true, 'x', %s)", [str(number)])
                connection.execute("SELECT pg_switch_wal()")
            connection.execute("CHECKPOINT")
            row = looked(primary.conninfo(), Group.REPLICATION)["slot left"]
            assert row.state is State.CRITICAL
            assert "pg_drop_replication_slot('left')" in (row.action or "")
        primary.stop()
        until(lambda: looked(replica.conninfo(), Group.REPLICATION)["replay"].seen.endswith("nobody sends to it"))


SLOT = ("--create-slot", "--slot=replica")
CAUGHT_UP = "SELECT replay_lsn = pg_current_wal_lsn() FROM pg_stat_replication"


@contextmanager
def replica_of(primary: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A streaming replica beside the primary's data folder."""
    account = Account.for_server()
    home = primary.data_dir.parent / "replica"
    home.mkdir(mode=0o700)
    os.chown(home, account.uid, account.gid)
    replica = EmbeddedServer(home, socket_dir=home, bin_dir=primary.bin_dir, account=account, tcp=False)
    source = f"host={primary.socket_dir} user=postgres application_name=replica"
    done = account.run(
        primary.bin_dir / "pg_basebackup", "-D", replica.data_dir, "-d", source, "-R", "--checkpoint=fast", *SLOT
    )
    assert done.returncode == 0, done.stderr
    with (replica.data_dir / "postgresql.conf").open("a") as conf:
        conf.write(f"unix_socket_directories = '{home}'\n")
    replica.start()
    try:
        yield replica
    finally:
        replica.stop()


# The standby


def test_the_age_of_the_oldest_warm_copy_counts(fleet: Fleet) -> None:
    standby = {"STANDBY_DIR": str(fleet.place / "standby")}
    assert fleet.opsctl("standby", "sync", env=standby).returncode == 0
    row = looked(fleet.database.url, Group.AUTH, **standby)["standby"]
    assert row.state is State.OK, row
    assert row.seen.startswith("2 companies, oldest ")
    time.sleep(1.05)
    assert (
        looked(fleet.database.url, Group.AUTH, HEALTH_STANDBY_AGE_S="1/1", **standby)["standby"].state is State.CRITICAL
    )


def test_a_warm_copy_that_is_held_is_said(fleet: Fleet) -> None:
    standby = {"STANDBY_DIR": str(fleet.place / "standby")}
    assert fleet.opsctl("standby", "sync", env=standby).returncode == 0
    fleet.database.execute(
        "DELETE FROM whatsapp_auth WHERE company_id = %(id)s; ".replace("%(id)s", f"'{FIRST}'")
        + f"DELETE FROM whatsapp_keys WHERE company_id = '{FIRST}'"
    )
    assert fleet.opsctl("standby", "sync", env=standby).returncode == 1
    row = looked(fleet.database.url, Group.AUTH, **standby)["standby"]
    assert (row.state, row.action) == (State.WARNING, "opsctl standby status")
    assert row.seen.endswith(", 1 held or damaged")


def test_warm_copies_that_are_damaged_are_said(database: Database, tmp_path: Path) -> None:
    (tmp_path / "standby" / "company_1" / "generations" / "00000001").mkdir(parents=True)
    row = looked(database.url, Group.AUTH, STANDBY_DIR=str(tmp_path / "standby"))["standby"]
    assert (row.state, row.action) == (State.WARNING, "opsctl standby status")
    assert "1 held or damaged" in row.seen
    (tmp_path / "file").touch()
    assert looked(database.url, Group.AUTH, STANDBY_DIR=str(tmp_path / "file"))["standby"].state is State.UNKNOWN


# The disks

FILL = """
for name in sessions cache state standby; do mount -t tmpfs -o size=1m,nr_inodes=100 tmpfs "$0/$name"; done
head -c 960k /dev/zero > "$0/sessions/bytes"
head -c 900k /dev/zero > "$0/cache/bytes"
for number in $(seq 97); do : > "$0/standby/$number"; done
exec "$@"
"""


@needs.root()
@needs.namespace("mount")
def test_the_disks_of_what_we_write_run_out_of_bytes_or_of_inodes(database: Database, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("sessions", "cache", "state", "standby")}
    for folder in folders.values():
        folder.mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(opsctl.__file__).parents[1]),
        "DATABASE_URL": database.url,
        "SESSIONS_DIR": str(folders["sessions"]),
        "CREDENTIALS_CACHE_FILE": str(folders["cache"] / "cache.json"),
        "OPSCTL_STATE_DIR": str(folders["state"]),
        "STANDBY_DIR": str(folders["standby"]),
    }
    words = [sys.executable, "-m", "opsctl", "db", "health", "--json", "--only", "storage"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FILL, str(tmp_path), *words], env=environ, capture_output=True, check=False
    )
    rows = {row["check"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name: rows[f"disk of {name}"]["state"] for name in folders} == {
        "sessions": "warning",
        "cache": "warning",
        "state": "ok",
        "standby": "critical",
    }
    assert f"df -h {folders['sessions']}; df -i {folders['sessions']}" == rows["disk of sessions"]["action"]


# What comes out


def test_performance_data_are_in_the_units_and_ranges_of_the_plugin_guidelines_on_one_line() -> None:
    rows = (
        HealthRow("reply", Group.REACH, State.OK, "connected\nin 12 ms | at once", 12.0, "ms", 500, 2000),
        HealthRow("certificate", Group.TLS, State.OK, "", 40.0, "d", 30, 7, falling=True),
        HealthRow("a 'quoted'=name", Group.AUTH, State.UNKNOWN, "first line\nsecond | line\r\n"),
        HealthRow("size of keys", Group.STORAGE, State.OK, "", 8192.0, "B"),
        HealthRow("connections", Group.SESSIONS, State.OK, "", 60.0, "%", 80, 90),
    )
    answer = monitoring.plugin(health.Health(rows, 0.0, 0.0, ""))
    assert answer.code == 3
    text, _, data = answer.line.partition(" | ")
    assert text == "OPSCTL UNKNOWN: a 'quoted'=name: first line second / line"
    assert data == "'reply'=0.012s;0.5;2 'certificate'=40;30:;7: 'size of keys'=8192B;; 'connections'=60%;80;90"
    for state, code in ((State.OK, 0), (State.HIDDEN, 0), (State.WARNING, 1), (State.CRITICAL, 2), (State.UNKNOWN, 3)):
        answer = monitoring.plugin(health.Health((HealthRow("a", Group.AUTH, state, "x\ny"),), 0.0, 0.0, ""))
        assert (answer.code, answer.line.count("\n")) == (code, 0)


def test_json_has_every_row_and_the_figures(fleet: Fleet) -> None:
    with unchanged(fleet.place):
        done = fleet.opsctl("db", "health", "--json", "--only", "sessions", "--only", "auth", env=QUIET)
    assert done.returncode == 0
    document = done.json()
    assert {row["group"] for row in document["rows"]} == {"sessions", "auth"}
    assert document["facts"]["worst"] == "ok"
    assert document["facts"]["queries_ms"] <= document["facts"]["elapsed_ms"]
    row = next(row for row in document["rows"] if row["check"] == "connections")
    assert (row["unit"], row["warning"], row["critical"]) == ("%", 80, 90)
    assert fleet.opsctl("db", "health", "--only", "everything").returncode == 2
    assert fleet.opsctl("db", "health", env={"DATABASE_URL": ""}).returncode == 3


def test_nagios_gets_one_line_with_performance_data_and_its_own_exit_codes(fleet: Fleet) -> None:
    def plugin(*words: str, **env: str) -> tuple[int, str]:
        done = fleet.opsctl("db", "health", "--nagios", "--only", "sessions", *words, env=env)
        assert done.stdout.count("\n") == 1
        return done.returncode, done.stdout

    code, line = plugin()
    assert code == 0
    text, _, data = line.rstrip("\n").partition(" | ")
    assert text == "OPSCTL OK: 5 checks"
    assert re.fullmatch(r"('[^'=|]+'=[\d.]+(%|s|B)?;[\d.:]*;[\d.:]*( |$))+", data)
    assert "'connections'=1%;80;90" in data
    settings = load(environ={**fleet.env, "DB_POOL_USAGE_THRESHOLD": "0.001"})
    answer = monitoring.plugin(health.examine(settings, only=[Group.SESSIONS]))
    assert answer.code == 1
    assert answer.line.startswith("OPSCTL WARNING: connections: 1 of 97: opsctl 1 | 'connections'=1%;0.1;90 ")
    code, line = plugin(DB_POOL_USAGE_THRESHOLD="0.001", HEALTH_POOL_CRITICAL="0.001")
    assert (code, line.split(":")[0]) == (2, "OPSCTL CRITICAL")
    nowhere = load(environ={**fleet.env, "DATABASE_URL": "postgresql://u@127.0.0.1:1/db"})
    answer = monitoring.plugin(health.examine(nowhere, only=[Group.SESSIONS]))
    assert (answer.code, answer.line.split(": ")[:2]) == (2, ["OPSCTL CRITICAL", "reply"])
    code, line = plugin(HEALTH_BLOCKED_S="2/1")
    assert (code, line.split(":")[0]) == (3, "OPSCTL UNKNOWN")
    assert plugin("--json")[0] == 3
    assert fleet.opsctl("db", "health", "--nagios", "--nonsense").returncode == 3


def test_prometheus_gets_a_file_in_one_step(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "opsctl.prom"
    done = fleet.opsctl("db", "health", "--quiet", "--only", "auth", "--prometheus", file, env=QUIET)
    assert (done.returncode, done.stdout) == (0, "")
    found = {
        (sample.name, sample.labels.get("check"), sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }
    assert found["opsctl_health_value", "keys", None] == 80
    assert found["opsctl_health_state", "expired keys", None] == 0
    assert found["opsctl_health_threshold", "expired keys", "critical"] == 500
    assert found["opsctl_health_up", None, None] == 1
    assert time.time() - found["opsctl_health_timestamp_seconds", None, None] < 60
    assert [path.name for path in tmp_path.glob("opsctl.prom*")] == ["opsctl.prom"]
    assert file.stat().st_mode & 0o777 == 0o644  # the collector is another user
    done = fleet.opsctl("db", "health", "--only", "auth", "--prometheus", tmp_path / "missing" / "x.prom")
    assert (done.returncode, "cannot be written" in done.stderr) == (5, True)
    env = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/db"}
    assert fleet.opsctl("db", "health", "--only", "auth", "--prometheus", file, env=env).returncode == 4
    assert "opsctl_health_up 0.0" in file.read_text()
    (tmp_path / "without" / "prometheus_client").mkdir(parents=True)
    (tmp_path / "without" / "prometheus_client" / "__init__.py").write_text("raise ModuleNotFoundError")
    env = {"PYTHONPATH": f"{tmp_path / 'without'}:{Path(opsctl.__file__).parents[1]}"}
    done = fleet.opsctl("db", "health", "--only", "tls", "--prometheus", file, env=env)
    assert (done.returncode, "pip install 'opsctl[metrics]'" in done.stderr) == (2, True)


def test_a_reader_of_the_prometheus_file_never_sees_half(tmp_path: Path) -> None:
    file = tmp_path / "opsctl.prom"
    rows = tuple(HealthRow(f"check {number}", Group.AUTH, State.OK, "", float(number)) for number in range(500))
    seen = health.Health(rows, 0.0, 0.0, "")
    before = os.umask(0o077)
    try:
        monitoring.write_metrics(seen, file)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644
    whole = {file.read_text().count("\n")}
    inodes, read = {file.stat().st_ino}, set[int]()
    ended = threading.Event()

    def reader() -> None:
        while not ended.is_set():
            with file.open() as opened:
                inodes.add(os.fstat(opened.fileno()).st_ino)
                read.add(opened.read().count("\n"))

    thread = threading.Thread(target=reader)
    thread.start()
    for _ in range(30):
        monitoring.write_metrics(seen, file)
    ended.set()
    thread.join()
    assert read == whole
    assert len(inodes) > 1


def test_watch_with_json_is_json_lines_as_often_as_was_asked_for(fleet: Fleet) -> None:
    words = ("db", "health", "--watch", "--json", "--only", "sessions")
    done = fleet.opsctl(*words, "--every", "0.2", "--deadline", "2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert 3 <= len(lines) <= 10
    assert {line["schema"] for line in lines} == {"opsctl/1"}
    trend = next(row["trend"] for row in lines[-1]["rows"] if row["check"] == "connections")
    assert len(trend) == len(lines)
    assert fleet.opsctl(*words, "--every", "30", "--deadline", "1").stdout.count("\n") == 1
    done = fleet.opsctl(*words, "--nagios")
    assert done.returncode == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_in_the_middle_of_a_statement_ends_it_and_is_no_row(
    fleet: Fleet, number: signal.Signals, code: int
) -> None:
    environ = {**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1])}
    line = [sys.executable, "-m", "opsctl", "db", "health", "--watch", "--json", "--only", "reach"]
    with closing(fleet.database.connect(autocommit=False)) as holder:
        holder.execute("LOCK TABLE whatsapp_auth")  # which the latency is measured with, not by one statement alone
        with subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: fleet.database.execute("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)])
            process.send_signal(number)
            try:
                stdout, _ = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    document = json.loads(stdout)
    assert (process.returncode, document["exit_code"], document["rows"]) == (code, code, [])


def test_a_reader_that_goes_away_ends_the_watch(fleet: Fleet) -> None:
    environ = {**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1])}
    line = f"{sys.executable} -m opsctl db health --watch --every 0.2 --json --only sessions"
    line += " | head -1 | wc -l; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["1", "141"], done


def test_on_a_terminal_it_is_redrawn_with_its_trend_until_ctrl_c(fleet: Fleet) -> None:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (40, 80))
    environ = {**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1])}
    words = [sys.executable, "-m", "opsctl", "db", "health", "--watch", "--every", "0.2", "--only", "sessions"]
    with subprocess.Popen(
        words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**environ, "TERM": "xterm-256color"},
        start_new_session=True,
    ) as process:
        os.close(slave)
        drawn = b""  # a piece may end within a character
        while drawn.count(b"Ctrl-C ends it") < 3:
            drawn += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while piece := os.read(master, 65536):
                drawn += piece
        except OSError:
            pass
        os.close(master)
    screen = drawn.decode()
    assert process.returncode == 130
    assert "▁▁▁" in screen
    assert "Trend" in screen
    assert "stopped by SIGINT" in screen


SHOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "health": (("db", "health"), ("wraparound", "critical", "████████", "VACUUM (FREEZE)", "warning: ")),
    "inspect": (("cache", "inspect"), ("962302", "expired", "962303", "valid", "ok")),
    "stats": (("keys", "stats"), ("962302", "962303", "pre-key", "session")),
    "drill": (("drill", "run", "--companies", "1", "--keys", "40"), ("restore", "6 of 6 checks passed", "RTO: ")),
    "history": (("drill", "history"), ("Verdict", "passed", "1 of 1 drills passed")),
}


def on_a_terminal(fleet: Fleet, *words: str, frames: int = 0, **env: str) -> str:
    """What a terminal of 80 columns and 24 lines gets; a watch is ended after so many frames."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    environ = {**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1]), **env}
    line = [sys.executable, "-m", "opsctl", *words]
    drawn = b""
    with subprocess.Popen(
        line, stdin=slave, stdout=slave, stderr=slave, env={**environ, "TERM": "xterm-256color"}, start_new_session=True
    ) as process:
        os.close(slave)
        with suppress(OSError):  # EIO: nobody has it open any more
            while piece := os.read(master, 65536):
                drawn += piece
                if frames and drawn.count(b"Ctrl-C ends it") >= frames:
                    process.send_signal(signal.SIGINT)
                    frames = 0
    os.close(master)
    return drawn.decode(errors="replace")  # a signal may cut a character


def lines_of(drawn: str) -> list[str]:
    """Without what moves the cursor, clears a line or makes it bold."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-HJKhlm]", "", drawn))


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[0-9;]*m")


@pytest.fixture
def sick(fleet: Fleet) -> Fleet:
    """A fleet with something to say: an old transaction id, and one entry of the cache expired."""
    fleet.env |= {"HEALTH_WRAPAROUND_IDS": "1/2", "APP_DIR": str(fleet.place), **QUIET}
    assert fleet.opsctl("cache", "warm").returncode == 0
    file = fleet.place / ".baileys-cache.json"
    content = json.loads(file.read_bytes())
    content[FIRST]["timestamp"] -= 600_000
    file.write_text(json.dumps(content))
    return fleet


def test_on_a_terminal_of_80_columns_no_line_is_wider_and_the_words_that_matter_need_no_colour(sick: Fleet) -> None:
    for name, (words, wanted) in SHOWN.items():
        drawn = on_a_terminal(sick, *words, NO_COLOR="1")
        lines = lines_of(drawn)
        assert [line for line in lines if len(line) > 80] == [], name
        assert not COLOUR.search(drawn), name
        text = " ".join(" ".join(lines).split())
        assert [word for word in wanted if word not in text] == [], (name, text)


def test_a_watch_on_a_terminal_of_80_columns_is_readable_without_colour(sick: Fleet) -> None:
    drawn = on_a_terminal(sick, "db", "health", "--watch", "--every", "0.2", frames=2, NO_COLOR="1")
    lines = lines_of(drawn)
    assert [line for line in lines if len(line) > 80] == []
    assert not COLOUR.search(drawn)
    assert sum(bool(re.match("wraparound +critical ", line)) for line in lines) >= 2
    assert any("Trend" in line for line in lines)


def test_a_run_without_valued_options_imports_no_pydantic(fleet: Fleet) -> None:
    environ = {**fleet.env, **QUIET, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1])}
    for words, imported in (((), False), (("--every", "5"), True)):
        line = [sys.executable, "-X", "importtime", "-m", "opsctl", "db", "health", *words]
        done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done
        assert (" pydantic\n" in done.stderr) is imported


def test_a_silent_address_ends_in_time(fleet: Fleet) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/db"
        done = fleet.opsctl("db", "health", "--json", env={"DATABASE_URL": url})
    assert done.returncode == 4
    assert done.json()["facts"]["elapsed_ms"] < 6000
    assert done.json()["rows"][0]["check"] == "reply"


def test_a_large_table_is_scanned_once(database: Database) -> None:
    with database.connect(autocommit=False) as connection:
        seed_fleet(connection, companies=1, keys_per_company=3000, seed=1, key_pair_pool=4)
    scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'whatsapp_keys'"
    with database.connect() as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
    before = database.execute(scans)[0][0]
    looked(database.url)
    until(lambda: database.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'opsctl'") == [(0,)])
    # The sample of keys begins a scan too, and ends it after 50 rows.
    assert database.execute(scans)[0][0] - before <= 2
