"""Every verdict of triage, from a fault that is injected into something real, each within five seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from opsctl.embedded import EmbeddedServer, embedded_server
from opsctl.operations.fleet import create_schema
from opsctl.operations.probes import Fault
from opsctl.operations.triage import ADVICE
from opsctl.stores.standby import Facts
from opsctl.stores.switch_record import SwitchRecord, write_switch
from tests import needs
from tests.baileys.door import HERE as BAILEYS
from tests.baileys.door import install, node
from tests.conftest import Database
from tests.integration.fleet import FIRST, KEYS, SECOND, Fleet
from tests.integration.silence import accepts_and_never_answers, full_backlog
from tests.integration.test_database_deadlines import tcp_url
from tests.integration.test_restore_damage import VALUE, damage
from tests.integration.test_restore_killed import mounted_fuse
from tests.integration.test_restore_targets import mounted
from tests.integration.test_services import own_commands, program
from tests.pm2.door import pm2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.conftest import RunOpsctl

ROOT = Path(__file__).parents[2]
LONGEST_S = 5.0


@dataclass
class Scene:
    """A fleet on a shared server, and what triage says of it."""

    fleet: Fleet

    def looks(self, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON document, in time, with a fitting exit code.

        Late is late by what it takes here, at that moment, to start and end a process. A machine that is too busy to
        look to the end says so, and is given another five seconds, and as many once more.
        """
        for _ in range(3):
            started = time.monotonic()
            found = self._look(*words, env=env)
            took_s = time.monotonic() - started
            hurried = any("the time was up" in warning for warning in found["warnings"])
            if found["facts"]["verdict"] is not None or not hurried:
                break
        if "--deadline" not in words and took_s > LONGEST_S:
            started = time.monotonic()
            self.fleet.opsctl("--version")
            assert took_s <= LONGEST_S + 3 * (time.monotonic() - started), found
        return found

    def _look(self, *words: str, env: Mapping[str, str] | None) -> dict[str, Any]:
        done = self.fleet.opsctl("triage", "--json", *words, env=env)
        found: dict[str, Any] = done.json()
        assert done.returncode == (0 if found["facts"]["verdict"] is None else 1), done
        return found

    def sees(self, fault: Fault, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """This verdict, with evidence, a runbook's section that exists, and a line to type."""
        found = self.looks(*words, env=env)
        assert found["facts"]["verdict"] == str(fault), found
        assert found["error"]["kind"] == str(fault)
        assert found["error"]["hint"] == found["next"][0]
        assert any(row["verdict"] == str(fault) for row in found["rows"])
        assert found["facts"]["evidence"]
        page, _, section = found["error"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(), re.MULTILINE)
        assert section in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        return found


@pytest.fixture
def scene(fleet: Fleet) -> Scene:
    fleet.target.mkdir()
    fleet.env |= {"SESSIONS_DIR": str(fleet.target), "WHATSAPP_ADDRESS": "none"}
    return Scene(fleet)


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of our own, with few connections, to be locked out of and frozen."""
    few = {"max_connections": "6", "superuser_reserved_connections": "0", "reserved_connections": "0"}
    with embedded_server(tmp_path_factory.mktemp("triage"), tcp=True, settings=few) as server:
        Database(server, "postgres").execute("CREATE DATABASE fleet")
        with Database(server, "fleet").connect() as connection:
            create_schema(connection)
        yield server


@pytest.fixture
def over_tcp(tcp_server: EmbeddedServer, place: Path, run_opsctl: RunOpsctl) -> Iterator[Scene]:
    fleet = Fleet(Database(tcp_server, "fleet"), place, run_opsctl)
    fleet.target.mkdir()
    fleet.env |= {
        "DATABASE_URL": tcp_url(tcp_server),
        "SESSIONS_DIR": str(fleet.target),
        "WHATSAPP_ADDRESS": "none",
    }
    yield Scene(fleet)
    tcp_server.thaw()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


# --- nothing is broken ------------------------------------------------------------------------------------------------


@contextmanager
def speaks_tls(tmp_path: Path) -> Iterator[int]:
    """Somebody at a port who answers a TLS greeting."""
    key, certificate = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=greet, args=(server.accept()[0],), daemon=True).start()

        def greet(client: socket.socket) -> None:
            with suppress(OSError), context.wrap_socket(client, server_side=True) as greeted:
                greeted.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def certified(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate for localhost that nobody has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / "key.pem", folder / "certificate.pem"
    clear = serialization.NoEncryption()
    paths[0].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, clear),
    )
    paths[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[0].chmod(0o600)
    return paths


def test_where_nothing_is_broken_it_ends_with_0_and_says_who_owns_the_sessions(scene: Scene, tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    log.write_text("all is well\n")
    with speaks_tls(tmp_path) as port, own_commands(tmp_path) as commands:
        subprocess.run([tmp_path / "start", "service"], check=True)
        env = {**commands, "SERVICE_NAMES": "service", "WHATSAPP_ADDRESS": f"127.0.0.1:{port}"}
        found = scene.looks(env=env)
        long = scene.fleet.opsctl("triage", "--verbose", "--deadline", "30", env=env)
    assert found["facts"] == {"verdict": None, "owner": "database", "since": None}
    assert found["next"] == []
    assert {row["verdict"] for row in found["rows"]} == {"ok"}
    checks = {row["check"] for row in found["rows"]}
    assert checks >= {
        "database",
        "server's disk",
        "rows",
        "credentials",
        "sessions folder",
        "service",
        "log",
        "whatsapp",
    }
    assert "the sessions belong to PostgreSQL: no switch is on record" in long.stdout
    assert "127.0.0.1:" in long.stdout
    assert "80 keys of 2 companies" in long.stdout


def test_without_an_address_it_says_which_setting_is_missing(run_opsctl: RunOpsctl) -> None:
    done = run_opsctl("triage")
    assert done.returncode == 3
    assert "set DATABASE_URL" in done.stderr


# --- the way to the database ------------------------------------------------------------------------------------------


def test_refused(scene: Scene) -> None:
    url = f"postgresql://u:p@127.0.0.1:{closed_port()}/db"
    found = scene.sees(Fault.REFUSED, env={"DATABASE_URL": url})
    assert "nothing listens at 127.0.0.1:" in found["error"]["message"]
    assert found["next"] == ["pm2 stop SERVICES", "opsctl sessions restore --service-stopped"]
    text = scene.fleet.opsctl("triage", env={"DATABASE_URL": url})
    assert "next: pm2 stop SERVICES" in text.stderr
    assert "runbook: opsctl runbook show 1-postgresql-unreachable#the-lines-to-type" in text.stderr
    assert "sessions folder" not in text.stdout  # what is sound is for --verbose


def test_where_the_services_can_be_switched_one_line_does_it(scene: Scene, tmp_path: Path) -> None:
    with own_commands(tmp_path) as commands:
        env = {**commands, "SERVICE_NAMES": "service", "DATABASE_URL": f"postgresql://u:p@127.0.0.1:{closed_port()}/db"}
        by_hand = scene.sees(Fault.REFUSED, env=env)["next"]
        (tmp_path / "fallback" / ".git").mkdir(parents=True)
        prepared = scene.sees(Fault.REFUSED, env={**env, "FALLBACK_DIR": str(tmp_path / "fallback")})["next"]
    assert by_hand == [f"{tmp_path}/stop service", "opsctl sessions restore --service-stopped"]
    assert prepared == ["opsctl sessions restore --switch"]


def test_refused_at_a_socket(scene: Scene) -> None:
    scene.sees(Fault.REFUSED, env={"DATABASE_URL": f"host={scene.fleet.place} user=u dbname=db"})


def test_name_not_found(scene: Scene) -> None:
    found = scene.sees(Fault.NAME, env={"DATABASE_URL": "postgresql://u:p@no-such-host.invalid/db"})
    assert "the name no-such-host.invalid is not found" in found["error"]["message"]


@needs.namespace("mount")
def test_a_name_server_that_does_not_answer(scene: Scene, silent_resolver: tuple[str, ...]) -> None:
    url = "postgresql://u:p@db.example.com/db"
    started = time.monotonic()
    done = subprocess.run(
        [*silent_resolver, sys.executable, "-m", "opsctl", "triage", "--json"],
        env={**scene.fleet.env, "DATABASE_URL": url, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        cwd=scene.fleet.place,
        capture_output=True,
        check=False,
    )
    assert time.monotonic() - started <= 2 * LONGEST_S  # 5 s with nothing else to do; the name server never answers
    found = json.loads(done.stdout)
    assert found["facts"]["verdict"] == "name-not-found"
    assert found["facts"]["evidence"] == "no answer before the time was up"


def test_a_host_that_drops_what_we_send(scene: Scene) -> None:
    with full_backlog() as port:
        found = scene.sees(Fault.TIMEOUT, env={"DATABASE_URL": f"postgresql://u:p@127.0.0.1:{port}/db"})
    assert "does not answer at all" in found["error"]["message"]


def test_one_that_accepts_and_never_answers(scene: Scene) -> None:
    with accepts_and_never_answers() as port:
        found = scene.sees(
            Fault.FROZEN, "--deadline", "3", env={"DATABASE_URL": f"postgresql://u:p@127.0.0.1:{port}/db"}
        )
    assert any("lets us connect" in row["seen"] for row in found["rows"])


def test_a_server_that_is_frozen(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    tcp_server.freeze()
    over_tcp.sees(Fault.FROZEN)


def test_another_host_of_the_list_that_answers_is_enough(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    over_tcp.fleet.seed()
    url = tcp_url(tcp_server).replace("@127.0.0.1:", f"@127.0.0.1:{closed_port()},127.0.0.1:")
    found = over_tcp.looks(env={"DATABASE_URL": url})
    assert found["facts"]["verdict"] is None
    assert any(row["seen"].endswith("; another host does") for row in found["rows"])


def test_a_server_that_shuts_down(over_tcp: Scene, tmp_path: Path) -> None:
    with embedded_server(tmp_path, tcp=True) as server, psycopg.connect(server.conninfo()):
        os.kill(server.pid, signal.SIGTERM)  # a smart shutdown waits for our session
        time.sleep(0.2)
        found = over_tcp.sees(Fault.STARTING, env={"DATABASE_URL": tcp_url(server, database="postgres")})
    assert found["next"][0] == "opsctl triage"


def test_the_wrong_password(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    found = over_tcp.sees(Fault.AUTHENTICATION, env={"DATABASE_URL": tcp_url(tcp_server, password="wrong")})
    assert found["next"][0] == "opsctl config show"


def test_a_database_that_is_gone(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    url = tcp_url(tcp_server, database="gone")
    found = over_tcp.sees(Fault.MISSING_DATABASE, env={"DATABASE_URL": url})
    assert found["facts"]["runbook"].startswith("runbooks/4-")


def test_out_of_connections(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    taken = []
    with suppress(psycopg.OperationalError):
        while True:
            taken.append(psycopg.connect(tcp_server.conninfo("fleet")))
    over_tcp.sees(Fault.NO_CONNECTION_LEFT)
    taken.pop().close()
    time.sleep(0.3)
    last = over_tcp.sees(Fault.NO_CONNECTION_LEFT)  # the one that we took ourselves
    assert "6 of 6 connections are in use" in last["facts"]["evidence"]
    for connection in taken:
        connection.close()


@needs.debian("pgbouncer")
def test_out_of_connections_at_a_pooler(over_tcp: Scene, tcp_server: EmbeddedServer, place: Path) -> None:
    port = closed_port()
    place.chmod(0o777)
    (place / "users").write_text(f'"postgres" "{tcp_server.password}"\n')
    (place / "pgbouncer.ini").write_text(
        f"[databases]\nfleet = host=127.0.0.1 port={tcp_server.port}\n"
        f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\nunix_socket_dir=\nauth_type=scram-sha-256\n"
        f"auth_file={place}/users\nmax_client_conn=1\n"
    )
    as_nobody = {"user": 65534} if os.geteuid() == 0 else {}
    program_ = needs.program("pgbouncer")
    assert program_
    pooler = subprocess.Popen([program_, "-q", place / "pgbouncer.ini"], stderr=subprocess.DEVNULL, **as_nobody)  # type: ignore[call-overload]
    try:
        give_up_at = time.monotonic() + 10
        while True:
            with suppress(psycopg.OperationalError):
                held = psycopg.connect(tcp_url(tcp_server, port=port))
                break
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        over_tcp.sees(Fault.NO_CONNECTION_LEFT, env={"DATABASE_URL": tcp_url(tcp_server, port=port)})
        held.close()
    finally:
        pooler.kill()
        pooler.wait()


@needs.postgres15()
def test_a_server_that_wants_tls_and_one_whose_certificate_is_nobodys(over_tcp: Scene, tmp_path: Path) -> None:
    with embedded_server(tmp_path, bin_dir=needs.POSTGRESQL_15, tcp=True) as server:
        for path in certified(tmp_path):
            target = server.data_dir / path.name
            shutil.copy(path, target)
            owner = server.data_dir.stat()
            os.chown(target, owner.st_uid, owner.st_gid)
            target.chmod(0o600)
        with (server.data_dir / "postgresql.conf").open("a") as conf:
            conf.write("ssl = on\nssl_key_file = 'key.pem'\nssl_cert_file = 'certificate.pem'\n")
        (server.data_dir / "pg_hba.conf").write_text("local all all trust\nhostssl all all all scram-sha-256\n")
        server.restart()
        url = tcp_url(server, database="postgres")
        over_tcp.sees(Fault.TLS, env={"DATABASE_URL": f"{url}?sslmode=disable"})
        over_tcp.sees(Fault.TLS, env={"DATABASE_URL": f"{url}?sslmode=verify-full&sslrootcert=system"})


def test_a_server_without_tls(over_tcp: Scene, tcp_server: EmbeddedServer) -> None:
    over_tcp.sees(Fault.TLS, env={"DATABASE_URL": f"{tcp_url(tcp_server)}?sslmode=require"})


# --- inside the database ----------------------------------------------------------------------------------------------


@needs.namespace("mount")
def test_a_server_whose_disk_is_full(over_tcp: Scene, place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=120m,mode=755", "tmpfs"), embedded_server(disk, tcp=True) as server:
        with Database(server, "postgres").connect() as connection:
            create_schema(connection)
        fill(disk)
        url = tcp_url(server, database="postgres")
        found = over_tcp.sees(Fault.SERVER_DISK_FULL, env={"DATABASE_URL": url})
        assert "No space left on device" in found["facts"]["evidence"]
        assert found["next"][0] == "df -h"  # the server is on this machine
        (disk / "filler").unlink()


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(1024 * 1024))


def test_read_only(scene: Scene) -> None:
    scene.fleet.database.execute(f"ALTER DATABASE {scene.fleet.database.name} SET default_transaction_read_only = on")
    scene.sees(Fault.READ_ONLY)


def test_a_server_in_recovery(over_tcp: Scene, tmp_path: Path) -> None:
    with embedded_server(tmp_path, tcp=True) as server:
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        found = over_tcp.sees(Fault.READ_ONLY, env={"DATABASE_URL": tcp_url(server, database="postgres")})
    assert "replica in recovery" in found["facts"]["evidence"]


def test_a_table_that_somebody_has_locked(scene: Scene) -> None:
    with scene.fleet.database.connect(autocommit=False, application_name="migration") as culprit:
        culprit.execute("LOCK TABLE whatsapp_auth")
        found = scene.sees(Fault.LOCKS)
        pid = culprit.info.backend_pid
    assert found["next"][0] == f'sudo -u postgres psql -c "SELECT pg_terminate_backend({pid})"'


def test_sessions_that_wait_for_a_row(scene: Scene) -> None:
    update = "UPDATE whatsapp_auth SET updated_at = now() WHERE company_id = %s"
    with (
        scene.fleet.database.connect(autocommit=False, application_name="forgotten") as culprit,
        scene.fleet.database.connect() as waiting,
    ):
        culprit.execute(update, [FIRST])
        pid = culprit.info.backend_pid

        def wait() -> None:
            waiting.execute(update, [FIRST])

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(5.1)
        try:
            found = scene.sees(Fault.LOCKS)
        finally:  # else closing what waits would wait too
            culprit.rollback()
            thread.join()
    blocker = rf"behind session {pid} \(forgotten, idle in transaction\)"
    assert re.fullmatch(rf"1 sessions wait for a lock, the first for \d+ s, {blocker}", found["facts"]["evidence"])


def test_a_role_that_may_not_read(scene: Scene) -> None:
    database = scene.fleet.database
    database.execute("DROP ROLE IF EXISTS reader")
    database.execute("CREATE ROLE reader LOGIN")
    found = scene.sees(Fault.PERMISSION, env={"DATABASE_URL": database.url.replace("//postgres@", "//reader@")})
    assert found["next"][0].endswith('psql -c "GRANT SELECT ON whatsapp_auth, whatsapp_keys TO reader"')
    database.execute("DROP ROLE reader")


def test_a_statement_that_the_server_refuses(scene: Scene) -> None:
    scene.fleet.database.execute("ALTER TABLE whatsapp_auth RENAME TO elsewhere")
    scene.fleet.database.execute(
        "CREATE VIEW whatsapp_auth AS SELECT 1 / 0 AS company_id, creds, updated_at FROM elsewhere"
    )
    found = scene.sees(Fault.UNUSABLE)
    assert "SQLSTATE 22012" in found["facts"]["evidence"]


def test_missing_tables(scene: Scene) -> None:
    scene.fleet.database.execute("DROP TABLE whatsapp_keys")
    found = scene.sees(Fault.MISSING_TABLES)
    assert found["facts"]["evidence"] == "there is no table whatsapp_keys"


@pytest.mark.parametrize("table", ["whatsapp_auth", "whatsapp_keys"])
def test_a_table_that_is_empty(scene: Scene, table: str) -> None:
    scene.fleet.database.execute(f"TRUNCATE {table}")
    scene.sees(Fault.ROWS_MISSING)


@contextmanager
def copied(fleet: Fleet) -> Iterator[dict[str, str]]:
    """The settings of a standby that has a copy of every company."""
    fleet.target.rmdir()
    fleet.restored()
    for company in (FIRST, SECOND):
        generations = fleet.place / "standby" / f"company_{company}" / "generations"
        shutil.copytree(fleet.folder(company), generations / "00000001")
        facts = Facts("00000001", "2026-01-31T03:04:05+00:00", KEYS, {}, None, None)
        (generations / "00000001.json").write_text(json.dumps(asdict(facts)))
    yield {"STANDBY_DIR": str(fleet.place / "standby")}


def test_what_the_standby_has_and_the_database_lost(scene: Scene) -> None:
    database = scene.fleet.database
    with copied(scene.fleet) as env:
        assert scene.looks(env=env)["facts"]["verdict"] is None

        database.execute(
            "DELETE FROM whatsapp_keys WHERE company_id = %s AND ctid IN (SELECT ctid FROM whatsapp_keys "
            "WHERE company_id = %s LIMIT 10)",
            [FIRST, FIRST],
        )
        found = scene.sees(Fault.ROWS_MISSING, env=env)
        assert f"more than a fifth of the keys that the standby has ({FIRST})" in found["error"]["message"]

        database.execute("UPDATE whatsapp_auth SET creds = creds - 'me' - 'account' WHERE company_id = %s", [FIRST])
        database.execute(
            "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{me,id}', '\"1:2@s.whatsapp.net\"') "
            "WHERE company_id = %s",
            [SECOND],
        )
        found = scene.looks(env=env)
        (row,) = [row for row in found["rows"] if row["verdict"] == "corrupt-creds"]
        assert row["companies"] == [FIRST, SECOND]
        assert "its pairing is gone, and the standby has it" in row["seen"]

        database.execute("DELETE FROM whatsapp_auth WHERE company_id = %s", [SECOND])
        found = scene.sees(Fault.ROWS_MISSING, env=env)
        assert f"companies that the database lacks ({SECOND})" in found["error"]["message"]
        assert found["next"][-1] == f"opsctl sessions repair --company {SECOND} --from standby --dry-run"


def test_a_page_that_the_server_cannot_read(scene: Scene) -> None:
    damage(scene.fleet, VALUE.replace("updated_at", "CASE WHEN damaged(company_id) THEN updated_at END AS updated_at"))
    found = scene.sees(Fault.CORRUPT_ROWS)
    assert "SQLSTATE XX001" in found["facts"]["evidence"]


def test_credentials_that_are_corrupt(scene: Scene) -> None:
    scene.fleet.database.execute(
        "UPDATE whatsapp_auth SET creds = jsonb_set(creds, '{noiseKey,private,data}', %s) WHERE company_id = %s",
        ['"AAAA"', SECOND],
    )
    found = scene.sees(Fault.CORRUPT_CREDS)
    assert SECOND in found["error"]["message"]
    assert FIRST not in found["error"]["message"]


# --- this machine -----------------------------------------------------------------------------------------------------


@needs.namespace("mount")
def test_a_sessions_folder_whose_disk_is_full_comes_before_everything(scene: Scene) -> None:
    with mounted(scene.fleet.target, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        fill(scene.fleet.target)
        url = f"postgresql://u:p@127.0.0.1:{closed_port()}/db"
        found = scene.sees(Fault.SESSIONS_DISK_FULL, env={"DATABASE_URL": url})
    assert found["facts"]["also"] == ["refused"]
    assert str(scene.fleet.target) in found["next"][0]


@needs.namespace("mount")
def test_a_sessions_folder_in_which_no_file_can_be_made(scene: Scene) -> None:
    with mounted(scene.fleet.target, "-t", "tmpfs", "-o", "size=64m,nr_inodes=8", "tmpfs"):
        with suppress(OSError):
            for number in range(9):
                (scene.fleet.target / f"file-{number}").touch()
        scene.sees(Fault.SESSIONS_DISK_FULL)


@needs.root()
@needs.debian("fuse2fs")
@needs.debian("e2fsprogs")
def test_a_disk_that_does_not_answer(scene: Scene) -> None:
    with mounted_fuse() as mount:
        (filesystem,) = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"fuse2fs\0" in path.read_bytes() and str(mount).encode() in path.read_bytes()
        ]
        os.kill(filesystem, signal.SIGSTOP)
        try:
            found = scene.sees(Fault.SESSIONS_DISK_FROZEN, env={"SESSIONS_DIR": str(mount / "sessions")})
        finally:
            os.kill(filesystem, signal.SIGCONT)
    assert found["facts"]["owner"] is None
    assert "who owns the sessions is not known" in found["summary"]


def test_a_service_that_is_stopped(scene: Scene, tmp_path: Path) -> None:
    with own_commands(tmp_path) as commands:
        (tmp_path / "status.service").write_text("stopped")
        found = scene.sees(Fault.SERVICE_STOPPED, env={**commands, "SERVICE_NAMES": "service"})
        assert found["next"] == [f"tail -n 50 {tmp_path}/other.log", f"{tmp_path}/start service"]


def test_a_service_that_pm2_has_stopped(scene: Scene) -> None:
    with pm2() as daemon:
        daemon.start("service")
        daemon("stop", "service")
        # Node alone may take longer to start than five seconds here; the others prove the time.
        env = {**daemon.settings, "SERVICE_NAMES": "service"}
        found = scene.sees(Fault.SERVICE_STOPPED, "--deadline", "20", env=env)
    assert found["facts"]["evidence"] == "service is stopped"
    assert found["next"][-1] == "pm2 start service"


def test_a_manager_that_hangs_takes_no_time_from_the_others(scene: Scene, tmp_path: Path) -> None:
    with own_commands(tmp_path) as commands:
        program(tmp_path / "status", "#!/bin/sh\nsleep 1000\n")
        found = scene.looks(env={**commands, "SERVICE_NAMES": "service"})
    assert found["facts"]["verdict"] is None
    (service,) = [row for row in found["rows"] if row["check"] == "service"]
    assert "did not end in time" in service["seen"]


# --- WhatsApp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [full_backlog, accepts_and_never_answers])
def test_whatsapp_that_does_not_answer(scene: Scene, silent: Callable[[], Any]) -> None:
    with silent() as port:
        found = scene.sees(Fault.WHATSAPP, "--deadline", "2.5", env={"WHATSAPP_ADDRESS": f"127.0.0.1:{port}"})
    assert "restoring cannot help" in found["error"]["message"]
    assert found["next"] == [f"curl -sSv -o /dev/null -m 5 https://127.0.0.1:{port}/"]


def test_whatsapp_that_is_blocked(scene: Scene) -> None:
    scene.sees(Fault.WHATSAPP, env={"WHATSAPP_ADDRESS": f"127.0.0.1:{closed_port()}"})


def test_the_way_out(scene: Scene) -> None:
    env = {"WHATSAPP_ADDRESS": "no-such-host.invalid:443", "DATABASE_URL": "postgresql://u:p@no-such-host.invalid/db"}
    found = scene.sees(Fault.WAY_OUT, env=env)
    assert found["facts"]["also"] == ["name-not-found"]


def said_by_baileys(trouble: str, company: str) -> str:
    """What a real one logs of a trouble."""
    install(BAILEYS / "v7")
    words = [node(), str(BAILEYS / "troubles.mjs"), "--version=7", f"--trouble={trouble}", f"--company={company}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("trouble", "fault", "section"),
    [
        ("401", Fault.LOGGED_OUT, "when-restoring-cannot-help"),
        ("403", Fault.FORBIDDEN, "when-restoring-cannot-help"),
        ("440", Fault.REPLACED, "when-restoring-cannot-help"),
        ("undecryptable", Fault.UNDECRYPTABLE, "undecryptable-messages"),
    ],
)
def test_what_the_services_log_says(scene: Scene, tmp_path: Path, trouble: str, fault: Fault, section: str) -> None:
    log = tmp_path / "service.log"
    scene.fleet.folder().mkdir()
    log.write_text(said_by_baileys(trouble, FIRST))
    env = {"SERVICE_LOG": str(log)}
    found = scene.sees(fault, env=env)
    assert found["facts"]["runbook"].endswith(section)
    assert f"({FIRST})" in found["error"]["message"]
    assert f"tail -n 50 {log}" in found["next"]


def test_a_log_that_nobody_writes_any_more_says_nothing_of_now(scene: Scene, tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    log.write_text("2 minutes ago: connection closed, status 440\n")
    scene.sees(Fault.REPLACED, env={"SERVICE_LOG": str(log)})
    os.utime(log, (time.time() - 3600,) * 2)
    assert scene.looks(env={"SERVICE_LOG": str(log)})["facts"]["verdict"] is None


# --- who owns the sessions --------------------------------------------------------------------------------------------


def switch(fleet: Fleet) -> None:
    own = fleet.target / ".opsctl"
    own.mkdir(exist_ok=True)
    fd = os.open(own, os.O_RDONLY)
    write_switch(fd, SwitchRecord("2026-01-31T03:04:05Z", "run", "host", "switched"))
    os.close(fd)


def test_while_the_sessions_live_in_folders_the_database_comes_last(scene: Scene, tmp_path: Path) -> None:
    fleet = scene.fleet
    fleet.target.rmdir()
    fleet.restored()
    switch(fleet)
    found = scene.looks()
    assert found["facts"] == {"verdict": None, "owner": "folders", "since": "2026-01-31T03:04:05Z"}
    assert "what PostgreSQL has is the stale copy" in found["summary"]
    assert found["next"] == ["opsctl sessions failback --dry-run"]

    dead = {"DATABASE_URL": f"postgresql://u:p@127.0.0.1:{closed_port()}/db"}
    found = scene.sees(Fault.REFUSED, env=dead)
    assert found["next"] == ["opsctl triage"]  # no restore over living folders
    assert found["facts"]["runbook"].endswith("#way-back")

    log = fleet.place / "service.log"
    log.write_text(f"company {FIRST} failed to decrypt: No session record\n" * 20)
    found = scene.sees(Fault.UNDECRYPTABLE, env={**dead, "SERVICE_LOG": str(log)})
    assert found["next"] == ["opsctl sessions verify", f"tail -n 50 {log}"]

    (fleet.folder() / "creds.json").write_text(json.dumps({"torn": 1})[:5])
    found = scene.sees(Fault.CORRUPT_CREDS, env=dead)
    assert found["facts"]["also"] == ["refused"]
    assert f"company {FIRST}" in found["error"]["message"]
    assert found["next"][-1] == "opsctl sessions verify"


def test_every_line_that_is_advised_is_one_that_opsctl_takes(run_opsctl: RunOpsctl) -> None:
    lines = {line for advice in ADVICE.values() for line in advice.lines if line.startswith("opsctl ")}
    lines |= {"opsctl sessions restore --switch", "opsctl sessions restore --service-stopped"}
    lines |= {"opsctl sessions repair --company 1 --from standby --dry-run", "opsctl sessions failback --dry-run"}
    for line in lines:
        assert run_opsctl(*line.split()[1:], "--help").returncode == 0, line
    assert set(ADVICE) == set(Fault)


def test_every_fault_has_a_test_here() -> None:
    text = Path(__file__).read_text()
    told = {fault.name for fault in Fault if f"Fault.{fault.name}" in text}
    assert {fault.name for fault in Fault} - told == set()
