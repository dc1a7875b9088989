from __future__ import annotations

import importlib.util
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from opsctl import embedded
from opsctl.embedded import EmbeddedServerError, embedded_server
from tests import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database

REPOSITORY = Path(embedded.__file__).parents[1]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody can enter, and the temporary folder too: so whatever is left, is left in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def processes_of(folder: Path) -> list[str]:
    """The command lines of the processes that work on the folder's data."""
    lines = subprocess.check_output(["ps", "-eww", "-o", "stat,args"], text=True).splitlines()
    return [line for line in lines if str(folder) in line]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def shared_memory_of(data_dir: Path) -> str:
    """The id of the System V segment that locks the data (line 7 of postmaster.pid: key and id)."""
    return (data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]


def all_shared_memory() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def tree_below(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # the process of a connection that has just been closed
        return []
    return [pid, *(descendant for child in children for descendant in tree_below(child))]


def test_the_server_starts_answers_and_leaves_nothing_behind(scratch: Path) -> None:
    with embedded_server(scratch) as server:
        with psycopg.connect(server.conninfo()) as connection:
            assert connection.info.server_version >= 180000
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
            assert connection.execute("SHOW fsync").fetchone() == ("off",)
        processes = tree_below(server.pid)
        assert len(processes) > 3
        assert server.data_dir.is_relative_to(scratch)
    assert not [pid for pid in processes if alive(pid)]
    assert not processes_of(scratch)
    assert list(scratch.iterdir()) == []


@needs.root()
def test_root_runs_it_as_nobody_in_a_private_folder(scratch: Path) -> None:
    before = scratch.stat()
    with embedded_server(scratch) as server:
        (home,) = scratch.iterdir()
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert Path(f"/proc/{server.pid}").stat().st_uid == home.stat().st_uid != 0
        groups = Path(f"/proc/{server.pid}/status").read_text().split("Groups:")[1].splitlines()[0].split()
        assert "0" not in groups
    assert (scratch.stat().st_mode, scratch.stat().st_uid) == (before.st_mode, before.st_uid)


def test_a_body_that_fails_leaves_nothing_behind(scratch: Path) -> None:
    with pytest.raises(ZeroDivisionError), embedded_server(scratch):
        raise ZeroDivisionError
    assert list(scratch.iterdir()) == []
    assert not processes_of(scratch)


def test_settings_reach_the_server(scratch: Path) -> None:
    with (
        embedded_server(scratch, settings={"application_name": "it's a \\ drill"}, durable=True) as server,
        psycopg.connect(server.conninfo()) as connection,
    ):
        assert connection.execute("SELECT current_setting('application_name')").fetchone() == ("it's a \\ drill",)
        assert connection.execute("SHOW fsync").fetchone() == ("on",)


def test_settings_that_postgresql_refuses_are_named(scratch: Path) -> None:
    with (
        pytest.raises(EmbeddedServerError, match="no_such_setting"),
        embedded_server(scratch, settings={"no_such_setting": "1"}),
    ):
        pytest.fail("it started")
    assert list(scratch.iterdir()) == []


def test_over_tcp_only_the_right_password_opens(scratch: Path) -> None:
    with embedded_server(scratch, tcp=True) as server:
        with psycopg.connect(server.conninfo()) as connection:
            assert connection.info.host == "127.0.0.1"
            assert connection.pgconn.used_password
            assert connection.execute("SHOW password_encryption").fetchone() == ("scram-sha-256",)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.conninfo(password="wrong"))


def test_two_servers_do_not_meet(scratch: Path) -> None:
    with embedded_server(scratch) as one, embedded_server(scratch) as other:
        with psycopg.connect(one.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE only_here")
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            psycopg.connect(other.conninfo("only_here"))


def test_stopped_it_refuses_and_restarted_it_has_its_data(scratch: Path) -> None:
    with embedded_server(scratch) as server:
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("CREATE TABLE kept ()")
        server.stop()
        server.stop()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.conninfo())
        with pytest.raises(EmbeddedServerError, match="stopped"):
            _ = server.pid
        server.restart()
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("SELECT FROM kept")


def test_killed_it_leaves_no_process_and_no_memory_and_restarts(scratch: Path) -> None:
    with embedded_server(scratch, durable=True) as server:
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("CREATE TABLE kept ()")
        processes, segment = tree_below(server.pid), shared_memory_of(server.data_dir)
        assert segment in all_shared_memory()
        server.kill()
        assert not [pid for pid in processes if alive(pid)]
        assert segment not in all_shared_memory()
        server.restart()
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("SELECT FROM kept")


def test_frozen_it_answers_nobody_and_thawed_it_goes_on(scratch: Path) -> None:
    with embedded_server(scratch) as server, psycopg.connect(server.conninfo(), autocommit=True) as connection:
        server.freeze()
        connection.pgconn.send_query(b"SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            psycopg.connect(server.conninfo(), connect_timeout=2)
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        server.thaw()
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"1"
        assert connection.pgconn.get_result() is None


def test_frozen_it_stops_nevertheless(scratch: Path) -> None:
    with embedded_server(scratch) as server:
        processes = tree_below(server.pid)
        server.freeze()
        server.freeze()
    assert not [pid for pid in processes if alive(pid)]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("then", ["pass", "server.freeze()"])
def test_a_killed_parent_leaves_no_server(scratch: Path, then: str) -> None:
    program = f"""
import sys, time
from pathlib import Path
from opsctl.embedded import embedded_server
with embedded_server(Path(sys.argv[1])) as server:
    {then}
    print(server.pid, server.data_dir, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, scratch], stdout=subprocess.PIPE, cwd=REPOSITORY) as parent:
        assert parent.stdout is not None
        pid, data_dir = parent.stdout.readline().decode().split()
        server, segment = tree_below(int(pid)), shared_memory_of(Path(data_dir))
        parent.send_signal(signal.SIGKILL)
    assert len(server) > 3
    wait_until_gone(server)
    assert segment not in all_shared_memory()


def test_sockets_move_where_their_path_would_be_too_long(scratch: Path) -> None:
    deep = scratch / ("d" * 80)
    deep.mkdir()
    with embedded_server(deep) as server:
        assert server.data_dir.is_relative_to(deep)
        assert not server.socket_dir.is_relative_to(deep)
        psycopg.connect(server.conninfo()).close()
    assert list(scratch.rglob("*")) == [deep]


@needs.root()
def test_a_private_folder_of_root_stays_private(scratch: Path) -> None:
    private = scratch / "private"
    private.mkdir(mode=0o700)
    with embedded_server(private) as server:
        assert server.data_dir.is_relative_to(scratch)
        assert not server.data_dir.is_relative_to(private)
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert list(scratch.rglob("*")) == [private]


@needs.root()
def test_programs_that_nobody_can_reach_are_copied(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec(embedded.WHEEL_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parent
    site = scratch / "site"
    shutil.copytree(wheel / "pginstall18", site / wheel.name / "pginstall18", symlinks=True)
    shutil.copytree(f"{wheel}.libs", site / f"{wheel.name}.libs")
    (site / wheel.name / "__init__.py").write_text("raise AssertionError('imported')")
    site.chmod(0o700)
    monkeypatch.syspath_prepend(str(site))
    with embedded_server(scratch) as server:
        assert server.bin_dir.is_relative_to(server.data_dir.parent)
        psycopg.connect(server.conninfo()).close()
        subprocess.run([server.bin_dir / "pg_dump", "--version"], check=True, stdout=subprocess.DEVNULL)
    assert stat.S_IMODE(site.stat().st_mode) == 0o700


def test_without_the_wheel_the_hint_says_how_to_get_it(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(EmbeddedServerError) as caught, embedded_server(scratch):
        pytest.fail("it started")
    assert caught.value.hint == "pip install 'opsctl[drill]'"
    assert list(scratch.iterdir()) == []


def test_a_folder_without_programs_is_refused(scratch: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="initdb cannot be run"), embedded_server(scratch, bin_dir=scratch):
        pytest.fail("it started")


def test_the_environment_of_the_caller_does_not_reach_the_server(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    with (
        embedded_server(scratch) as server,
        psycopg.connect(server.conninfo(), options="-c search_path=") as connection,
    ):
        assert connection.execute("SELECT setting FROM pg_settings WHERE name = 'log_timezone'").fetchone() == ("UTC",)


def test_each_test_has_a_fresh_database(database: Database) -> None:
    assert database.execute("SELECT count(*) FROM whatsapp_auth") == [(0,)]
    with psycopg.connect(database.url) as connection:
        assert connection.info.dbname == database.name
