"""Every wait for PostgreSQL ends by our own clock: frozen, silent, unreachable, nameless, locked, restarting."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opsctl import db
from opsctl.embedded import EmbeddedServer, embedded_server
from opsctl.operations.fleet import create_schema
from tests import needs
from tests.conftest import Database
from tests.integration.fleet import FIRST, SECOND, Fleet, contents, results, rows_of, unchanged
from tests.integration.silence import accepts_and_never_answers, cuts_off, full_backlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Finished, RunOpsctl
    from tests.forks import Forks

MAIN = "from opsctl.cli import main; main()"
REPOSITORY = Path(__file__).parents[2]
START_S = 1.5
"""What a run may take besides the waiting, on a machine that does other things too."""


@pytest.fixture(scope="module")
def private_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of our own, to be frozen, with a log of its connections."""
    with embedded_server(tmp_path_factory.mktemp("frozen"), tcp=True, settings={"log_connections": "on"}) as server:
        with Database(server, "postgres").connect() as connection:
            connection.execute("CREATE DATABASE template_fleet")
        with Database(server, "template_fleet").connect() as connection:
            create_schema(connection)
        yield server


@pytest.fixture
def lonely(private_server: EmbeddedServer, place: Path, run_opsctl: RunOpsctl) -> Iterator[Fleet]:
    """A fleet on a server of its own, with its folders restored."""
    admin = Database(private_server, "postgres")
    admin.execute("DROP DATABASE IF EXISTS fleet WITH (FORCE)")
    admin.execute("CREATE DATABASE fleet TEMPLATE template_fleet")
    fleet = Fleet(Database(private_server, "fleet"), place, run_opsctl)
    fleet.seed()
    fleet.env["DATABASE_URL"] = tcp_url(private_server)
    fleet.restored()
    fleet.database.execute("UPDATE whatsapp_auth SET creds = creds || '{\"accountSyncCounter\": 99}'")
    yield fleet
    private_server.thaw()


def tcp_url(server: EmbeddedServer, *, port: int | None = None, database: str = "fleet", password: str = "") -> str:
    return f"postgresql://postgres:{password or server.password}@127.0.0.1:{port or server.port}/{database}"


def ends_with_4(fleet: Fleet, *words: str, between: tuple[float, float], kind: str) -> Finished:
    """A restore that gives up in this time, with nothing changed."""
    with unchanged(fleet.place):
        started = time.monotonic()
        done = fleet.restore("--json", *words)
        took = time.monotonic() - started
    assert done.returncode == 4, done
    assert between[0] <= took <= between[1] + START_S, done
    assert done.json()["error"]["kind"] == kind, done
    return done


# --- a server, or an address, that says nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent", "words", "between"),
    [
        (accepts_and_never_answers, ("--deadline", "3"), (3, 3.5)),
        (full_backlog, ("--deadline", "3"), (3, 3.5)),
        (full_backlog, (), (5, 5.5)),
    ],
    ids=["accepts and never answers", "lets nobody connect", "without a deadline"],
)
def test_an_address_that_says_nothing_is_given_up(
    empty_fleet: Fleet,
    silent: Callable[[], contextlib.AbstractContextManager[int]],
    words: tuple[str, ...],
    between: tuple[float, float],
) -> None:
    with silent() as port:
        empty_fleet.env["DATABASE_URL"] = f"postgresql://u:p@127.0.0.1:{port}/db"
        done = ends_with_4(empty_fleet, *words, between=between, kind="frozen")
    assert f"127.0.0.1:{port}/db did not answer within" in done.json()["error"]["message"]


def test_a_server_that_is_frozen_before_we_connect_is_given_up(lonely: Fleet, private_server: EmbeddedServer) -> None:
    private_server.freeze()
    ends_with_4(lonely, "--deadline", "3", between=(3, 3.5), kind="frozen")


def test_a_host_list_shares_one_budget(empty_fleet: Fleet) -> None:
    with accepts_and_never_answers() as one, accepts_and_never_answers() as other:
        empty_fleet.env["DATABASE_URL"] = f"postgresql://u:p@127.0.0.1:{one},127.0.0.1:{other}/db"
        ends_with_4(empty_fleet, "--deadline", "3", between=(3, 3.5), kind="frozen")


@needs.namespace("mount")
def test_a_name_server_that_does_not_answer_is_given_up(
    empty_fleet: Fleet, silent_resolver: tuple[str, ...], tmp_path: Path
) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [*silent_resolver, sys.executable, "-m", "opsctl", "sessions", "restore", "--deadline", "3"],
        env={
            **empty_fleet.env,
            "DATABASE_URL": "postgresql://u:p@db.example.com/db",
            "SESSIONS_DIR": str(empty_fleet.target),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(tmp_path),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done
    assert 3 <= time.monotonic() - started <= 3.5 + START_S
    assert "db.example.com:5432/db did not answer" in done.stderr
    assert not empty_fleet.target.exists()


# --- in the middle of a step ------------------------------------------------------------------------------------------


IMPATIENT = "import opsctl.db as db; db.Connection.stall_s = db.STALL_S = 1"


def copying(fleet: Fleet, *words: str, slow: str = "COPY", before: str = "") -> subprocess.Popen[str]:
    """A restore in the middle of the first statement with this word in it, which reads five keys a second."""
    fleet.database.execute("ALTER TABLE whatsapp_keys RENAME TO whatsapp_keys_on_disk")
    fleet.database.execute(
        "CREATE VIEW whatsapp_keys AS SELECT * FROM whatsapp_keys_on_disk "
        f"WHERE position('{slow}' in current_query()) = 0 OR pg_sleep(0.2) IS NOT NULL"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{MAIN}", "sessions", "restore", "--to", fleet.target, *words],
        env={**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HOME": str(fleet.place)},
        cwd=fleet.place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    reading = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'opsctl' AND query LIKE %s"
    while not fleet.database.execute(reading, [f"%{slow}%"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.3)
    return process


def test_a_server_that_freezes_in_the_middle_of_a_copy_is_given_up_at_the_deadline(
    lonely: Fleet, private_server: EmbeddedServer
) -> None:
    with unchanged(lonely.target):
        started = time.monotonic()
        process = copying(lonely, "--deadline", "3")
        private_server.freeze()
        _, stderr = process.communicate(timeout=20)
        took = time.monotonic() - started
    assert process.returncode == 4
    assert 2.5 <= took <= 3.5 + START_S
    assert "PostgreSQL was not done when the deadline came" in stderr


def test_a_server_that_freezes_in_the_middle_of_a_copy_is_given_up_after_some_seconds_of_silence(
    lonely: Fleet, private_server: EmbeddedServer
) -> None:
    assert db.STALL_S == 10
    process = copying(lonely, before=IMPATIENT)
    private_server.freeze()
    started = time.monotonic()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 4
    assert 0.5 <= time.monotonic() - started <= 1.5 + START_S
    assert "PostgreSQL stopped answering in the middle of a step" in stderr


@pytest.mark.parametrize("slow", ["COPY", "count"])
def test_a_server_that_is_slow_is_not_given_up(lonely: Fleet, slow: str) -> None:
    # It takes longer than the silence after which one counts as frozen; while it counts, a server is silent.
    rows = 15
    lonely.database.execute(
        "DELETE FROM whatsapp_keys WHERE (company_id, key_type, key_id) NOT IN "
        "(SELECT company_id, key_type, key_id FROM whatsapp_keys ORDER BY 1, 2, 3 LIMIT %s)",
        [rows],
    )
    padding = "x" * 9000  # PostgreSQL sends rows by 8 KiB
    lonely.database.execute("UPDATE whatsapp_keys SET value = value || jsonb_build_object('note', %s::text)", [padding])
    started = time.monotonic()
    process = copying(lonely, "--company", FIRST, slow=slow, before=IMPATIENT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert time.monotonic() - started > 0.2 * rows


def test_a_server_that_freezes_while_it_counts_is_given_up_in_time_for_a_decision(
    lonely: Fleet, private_server: EmbeddedServer
) -> None:
    lonely.env["STANDBY_DIR"] = str(lonely.place / "standby")
    assert lonely.opsctl("standby", "sync").returncode == 0
    process = copying(lonely, "--json", "--discard-changes", "--yes", slow="count")
    private_server.freeze()
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    document = json.loads(stdout)
    assert {row["source"].split()[0] for row in document["rows"]} == {"standby"}
    (decision_s,) = [s["seconds"] for s in document["rto"]["steps"] if s["name"] == "ask every source"]
    assert decision_s <= 5
    assert any("did not finish counting" in note for note in document["notes"])


def test_a_server_that_freezes_in_the_middle_of_a_copy_leaves_the_rest_to_the_standby(
    lonely: Fleet, private_server: EmbeddedServer
) -> None:
    lonely.env["STANDBY_DIR"] = str(lonely.place / "standby")
    assert lonely.opsctl("standby", "sync").returncode == 0
    process = copying(lonely, "--json", "--discard-changes", "--yes", before=IMPATIENT)
    private_server.freeze()
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    document = json.loads(stdout)
    assert {row["source"].split()[0] for row in document["rows"]} == {"standby"}
    assert results(document) == {FIRST: "restored", SECOND: "restored"}
    for company in (FIRST, SECOND):
        assert any(f"{company}: from standby" in warning for warning in document["warnings"])
    assert any("stopped answering in the middle of a step" in warning for warning in document["warnings"])
    assert lonely.opsctl("sessions", "verify", lonely.target).returncode == 0


def test_a_server_that_counts_slowly_is_waited_for_though_the_standby_is_ready(lonely: Fleet) -> None:
    lonely.env["STANDBY_DIR"] = str(lonely.place / "standby")
    lonely.database.execute("DELETE FROM whatsapp_keys WHERE company_id = %s", [SECOND])
    assert lonely.opsctl("standby", "sync").returncode == 0
    process = copying(lonely, "--json", "--discard-changes", "--yes", slow="count")  # of 40 keys, five a second
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    document = json.loads(stdout)
    (decision_s,) = [s["seconds"] for s in document["rto"]["steps"] if s["name"] == "ask every source"]
    assert 6 < decision_s <= 14
    assert {row["source"] for row in document["rows"]} == {"database"}


def test_a_server_that_is_slow_is_given_up_at_the_deadline(lonely: Fleet) -> None:
    with unchanged(lonely.target):
        started = time.monotonic()
        process = copying(lonely, "--deadline", "3")
        _, stderr = process.communicate(timeout=20)
        took = time.monotonic() - started
    assert process.returncode == 4
    assert 2.5 <= took <= 3.5 + START_S
    assert "PostgreSQL was not done when the deadline came" in stderr


def test_a_server_that_dies_in_the_middle_of_a_copy_is_no_source(lonely: Fleet) -> None:
    with unchanged(lonely.target):
        process = copying(lonely)
        lonely.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'opsctl'"
        )
        _, stderr = process.communicate(timeout=5)
    assert process.returncode == 4
    assert "PostgreSQL" in stderr


def _is_connected(pid: int, port: int) -> bool:
    """Whether a process has a connection to a port of this machine (proc_pid_net(5))."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(f":{port:04X}")}
    with contextlib.suppress(OSError):  # one is closed meanwhile
        return any(str(fd.readlink()) in sockets for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("when", ["before connecting", "in the middle of a COPY"])
def test_a_signal_is_answered_at_once_while_the_server_is_frozen(
    lonely: Fleet, private_server: EmbeddedServer, number: signal.Signals, code: int, when: str
) -> None:
    with unchanged(lonely.target):
        if when == "before connecting":
            private_server.freeze()
            process = subprocess.Popen(
                [sys.executable, "-m", "opsctl", "sessions", "restore", "--to", lonely.target],
                env={**lonely.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while not _is_connected(process.pid, private_server.port):
                time.sleep(0.01)
        else:
            process = copying(lonely)
            private_server.freeze()
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
        took = time.monotonic() - started
    assert process.returncode == code, stderr
    assert took < 2, took  # nobody waits for the server, which is given up after 5 s; a busy machine takes one to end
    assert "Traceback" not in stderr


# --- what is tried again, and what is not -----------------------------------------------------------------------------


@dataclass
class Door:
    """In front of a server: turns the first clients away, counts all and lets the rest through."""

    port: int
    server: EmbeddedServer
    turned_away: int
    state: str
    came_at: list[float] = field(default_factory=list)

    def serve(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listening.accept()[0]
                self.came_at.append(time.monotonic())
                if len(self.came_at) <= self.turned_away:
                    threading.Thread(target=self._turn_away, args=(client,), daemon=True).start()
                else:
                    threading.Thread(target=self._through, args=(client,), daemon=True).start()

    def _turn_away(self, client: socket.socket) -> None:
        with client:
            if self.state == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            while client.recv(8) == b"\x00\x00\x00\x08\x04\xd2\x16/":  # SSLRequest; anything longer is the start-up
                client.sendall(b"N")
            client.recv(4096)
            fields = f"SFATAL\0VFATAL\0C{self.state}\0Mthe database system is starting up\0\0".encode()
            client.sendall(b"E" + struct.pack(">i", len(fields) + 4) + fields)

    def _through(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.server.port)) as there:

            def pump(source: socket.socket, target: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while data := source.recv(65536):
                        target.sendall(data)
                    target.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(there, client), daemon=True)
            back.start()
            pump(client, there)
            back.join()


@contextlib.contextmanager
def door(server: EmbeddedServer, *, turned_away: int, state: str) -> Iterator[Door]:
    with socket.create_server(("127.0.0.1", 0), backlog=20) as listening:
        counting = Door(listening.getsockname()[1], server, turned_away, state)
        thread = threading.Thread(target=counting.serve, args=(listening,), daemon=True)
        thread.start()
        yield counting
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("state", ["57P03", "reset"])
def test_a_server_that_is_starting_up_is_tried_again_after_100_and_200_ms(
    lonely: Fleet, private_server: EmbeddedServer, state: str
) -> None:
    with door(private_server, turned_away=2, state=state) as counting:
        lonely.env["DATABASE_URL"] = tcp_url(private_server, port=counting.port)
        assert set(results(lonely.restored()).values()) == {"restored"}
    first, second, third = counting.came_at
    assert 0.1 <= second - first < 0.19 + START_S
    assert 0.2 <= third - second < 0.39 + START_S


def test_after_three_attempts_a_server_that_is_starting_up_is_given_up(
    lonely: Fleet, private_server: EmbeddedServer
) -> None:
    with door(private_server, turned_away=9, state="57P03") as counting:
        lonely.env["DATABASE_URL"] = tcp_url(private_server, port=counting.port)
        ends_with_4(lonely, between=(0.3, 1), kind="starting")
    assert len(counting.came_at) == 3


def test_a_server_that_comes_up_meanwhile_is_reached(tmp_path: Path, place: Path, run_opsctl: RunOpsctl) -> None:
    with embedded_server(tmp_path, tcp=True) as server:
        with Database(server, "postgres").connect() as connection:
            create_schema(connection)
        fleet = Fleet(Database(server, "postgres"), place, run_opsctl)
        fleet.seed()
        with socket.socket() as listening:  # bound, and not listening yet: connections are refused
            listening.bind(("127.0.0.1", 0))
            counting = Door(listening.getsockname()[1], server, 0, "")
            fleet.env["DATABASE_URL"] = tcp_url(server, port=counting.port, database="postgres")
            ready = fleet.place / "refused"
            process = subprocess.Popen(
                [sys.executable, "-c", ANNOUNCING, ready, "sessions", "restore", "--to", fleet.target],
                env={**fleet.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while not ready.exists():  # its first attempt was refused
                assert process.poll() is None
                time.sleep(0.001)
            listening.listen()
            threading.Thread(target=counting.serve, args=(listening,), daemon=True).start()
            _, stderr = process.communicate(timeout=20)
            assert process.returncode == 0, stderr
            listening.shutdown(socket.SHUT_RDWR)


ANNOUNCING = """
import sys, pathlib
import opsctl.db as db
from opsctl.cli import main
ready = pathlib.Path(sys.argv[1])
real = db._connection_failure
def failure(*given):
    ready.touch()
    return real(*given)
db._connection_failure = failure
sys.argv = ["opsctl", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(
    ("address", "logged"),
    [
        ({"password": "wrong"}, 'password authentication failed for user "postgres"'),
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
    ],
    ids=["wrong password", "missing database"],
)
def test_what_waiting_cannot_mend_is_tried_once(
    lonely: Fleet, private_server: EmbeddedServer, address: dict[str, str], logged: str
) -> None:
    lonely.env["DATABASE_URL"] = tcp_url(private_server, **address)  # type: ignore[arg-type]
    offset = private_server.log_file.stat().st_size
    ends_with_4(lonely, between=(0, 1), kind="authentication" if "password" in address else "missing-database")
    log = private_server.log_file.read_bytes()[offset:].decode()
    assert log.count("connection received") == 1
    assert log.count(logged) == 1


# --- the deadline, after something was published ----------------------------------------------------------------------


SLOW_PUBLISHING = """
import time
import opsctl.cli.frame as frame, opsctl.stores.publishing as publishing
frame.BACKSTOP_S = 0.2
real = publishing.Staging.publish
def publish(self, folder):
    if self.published:
        time.sleep({second})
    real(self, folder)
    time.sleep({after})
publishing.Staging.publish = publish
"""


@pytest.mark.parametrize(
    ("second", "after"),
    [(0, 2.1), (9, 0)],
    ids=["between two companies", "in the middle of one"],
)
def test_a_deadline_after_something_was_published_ends_with_6_and_names_what_is_missing(
    fleet: Fleet, forking: Forks, second: float, after: float
) -> None:
    fleet.restored()
    before = contents(fleet.folder(SECOND))
    fleet.database.execute("UPDATE whatsapp_auth SET creds = creds || '{\"accountSyncCounter\": 99}'")
    env = {**fleet.env, "SESSIONS_DIR": str(fleet.target), "HOME": str(fleet.place)}
    slow = SLOW_PUBLISHING.format(second=second, after=after)
    done = forking.run("sessions", "restore", "--service-stopped", "--json", "--deadline", "2", env=env, before=slow)
    document = done.json()
    assert done.returncode == document["exit_code"] == 6, done
    rows = {row["company"]: row for row in document["rows"]}
    assert (rows[FIRST]["result"], rows[SECOND]["result"]) == ("restored", "too late")
    assert f"1 companies are missing: {SECOND}" in document["error"]["message"]
    assert contents(fleet.folder(SECOND)) == before
    assert b'"accountSyncCounter":99' in contents(fleet.folder(FIRST))["creds.json"]
    assert [path.name for path in (fleet.target / ".opsctl").iterdir() if not path.name.startswith("aside-")] == []
    assert rows_of(fleet.restored())[SECOND]["result"] == "restored"


def test_a_deadline_that_passes_while_old_folders_are_deleted_takes_nothing_back(fleet: Fleet, forking: Forks) -> None:
    for counter in (1, 2):  # twice: the second restore has something to delete
        fleet.restored()
        fleet.database.execute(f"UPDATE whatsapp_auth SET creds = creds || '{{\"accountSyncCounter\": {counter}}}'")
    slow = """
import time
import opsctl.cli.frame as frame, opsctl.stores.publishing as publishing
frame.BACKSTOP_S = 0.2
real = publishing.SessionsRoot.remove_trash
def remove_trash(self):
    time.sleep(2.5)
    real(self)
publishing.SessionsRoot.remove_trash = remove_trash
"""
    env = {**fleet.env, "SESSIONS_DIR": str(fleet.target), "HOME": str(fleet.place)}
    done = forking.run("sessions", "restore", "--service-stopped", "--json", "--deadline", "2", env=env, before=slow)
    assert done.returncode == 0, done
    assert {row["result"] for row in done.json()["rows"]} == {"restored"}


READING = {
    "sessions list": (),
    "sessions restore": ("--discard-changes", "--service-stopped", "--dry-run"),
    "sessions verify": ("--against", "database"),
    "sessions failback": ("--dry-run", "--service-stopped"),
    "standby sync": (),
    "standby sync --dry-run": (),
    "keys stats": (),
    "keys cleanup": ("--dry-run",),
    "keys doctor": (),
    "cache warm": ("--dry-run",),
}


@pytest.mark.parametrize("command", READING)
def test_what_only_reads_is_made_anew_where_the_connection_breaks_off_in_the_middle(
    lonely: Fleet, private_server: EmbeddedServer, command: str
) -> None:
    words = (*command.split(), *READING[command], "--json")
    lonely.env |= {
        "STANDBY_DIR": str(lonely.place / "standby"),
        "SESSIONS_DIR": str(lonely.target),
        "CREDENTIALS_CACHE_FILE": str(lonely.place / "cache.json"),
    }
    expected = lonely.opsctl(*words)
    assert expected.returncode in {0, 1}, expected  # 1: something was found
    with cuts_off(private_server.port, times=2, word=7) as cutter:
        lonely.env["DATABASE_URL"] = tcp_url(private_server, port=cutter.port)
        done = lonely.opsctl(*words)
        assert cutter.cut == 2
        assert cutter.let_through == 1
    assert done.returncode == expected.returncode, done
    assert "error" not in done.json() or done.json()["error"] == expected.json()["error"]
    with cuts_off(private_server.port, times=3, word=7) as cutter:
        lonely.env["DATABASE_URL"] = tcp_url(private_server, port=cutter.port)
        done = lonely.opsctl(*words)
        assert (cutter.cut, cutter.let_through) == (3, 0)
    assert done.json()["error"]["kind"] == "reset", done
