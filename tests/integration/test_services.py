"""Which services run, stopping and starting them, and proof: a real PM2, a real systemd, real processes, real logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from opsctl import db, process, services
from opsctl.errors import HalfDone, Refused, SettingsError
from opsctl.services import Service, State
from opsctl.settings import load
from tests import needs
from tests.pm2.door import Pm2, pm2
from tests.systemd.door import Systemd, systemd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database

SERVICE = "baileys-whatsapp-service"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Pm2]:
    with pm2() as running:
        yield running


def configured(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], names: str = SERVICE) -> services.Manager:
    """The manager of these settings, with their PATH in force, as in a run of opsctl."""
    monkeypatch.setenv("PATH", settings.get("PATH", os.environ["PATH"]))
    found = services.manager(load(environ={"SERVICE_NAMES": names, **settings}))
    assert found is not None
    return found


def alive(pid: int) -> bool:
    return services._started_at(pid) is not None


def gone(pid: int) -> None:
    """Wait for the end of a process that was killed."""
    give_up_at = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def child_of(pid: int) -> int:
    give_up_at = time.monotonic() + 10
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    return int(found[0])


# --- PM2 --------------------------------------------------------------------------------------------------------------


def test_pm2_tells_what_runs_and_stopping_it_is_proven_down_to_its_children(
    daemon: Pm2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "of the operator")
    daemon.start(SERVICE, env={"USE_DATABASE_AUTH_STATE": "true"})
    manager = configured(monkeypatch, daemon.settings)
    (service,) = services.status(manager)
    assert (service.state, service.said, service.restarts) == (State.RUNNING, "online", 0)
    assert service.since is not None
    assert abs(service.since.timestamp() - time.time()) < 60
    assert [path.name for path in service.logs] == [f"{SERVICE}-out.log", f"{SERVICE}-error.log"]
    (pid,) = service.pids
    child = child_of(pid)
    assert "HOME" in (services.environment_of(pid) or {})
    proof = services.proven_stopped(manager)
    assert (proof.stopped, proof.reason) == (False, f"{SERVICE} is online (pid {pid})")

    (stopped,) = services.stop(manager)
    assert (stopped.state, stopped.pids) == (State.STOPPED, ())
    assert not alive(pid)
    assert not alive(child)
    assert services.proven_stopped(manager).stopped is True
    assert services.stop(manager)[0].state is State.STOPPED  # a second time there is nothing to do

    (again,) = services.start(manager)
    assert again.state is State.RUNNING
    assert (services.environment_of(again.pids[0]) or {})["USE_DATABASE_AUTH_STATE"] == "true"
    (switched,) = services.restart(manager, environment={"USE_DATABASE_AUTH_STATE": "false"})
    assert not alive(again.pids[0])
    found = services.environment_of(switched.pids[0]) or {}
    assert found["USE_DATABASE_AUTH_STATE"] == "false"
    assert "PGPASSWORD" not in found


def test_a_child_that_outlives_its_service_is_not_stopped(daemon: Pm2, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = configured(monkeypatch, daemon.settings, "parent")
    daemon.start("parent", "--no-treekill")
    started = time.monotonic()
    (service,) = services.status(manager)
    look_s = time.monotonic() - started
    child = child_of(service.pids[0])
    try:
        with pytest.raises(HalfDone, match=rf"what it had started still runs \(pid {child}\)"):
            services.stop(manager, timeout_s=5 * look_s)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_worker_of_cluster_mode_tells_its_environment_too(daemon: Pm2, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.start("workers", "-i", "2", env={"USE_LEGACY_SUPABASE": "false"})
    (service,) = services.status(configured(monkeypatch, daemon.settings, "workers"))
    assert len(service.pids) == 2
    for pid in service.pids:
        assert (services.environment_of(pid) or {})["USE_LEGACY_SUPABASE"] == "false"


def test_a_service_without_a_process_that_pm2_will_start_is_not_stopped(
    daemon: Pm2, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.start("crashing", "--restart-delay", "600000", env={"CRASHES": "1"})
    daemon.start("nightly", "--cron-restart", "0 3 * * *")
    daemon("stop", "nightly")
    by_name: dict[str, Service] = {}
    give_up_at = time.monotonic() + 10
    while by_name.get("crashing", Service("", State.RUNNING, "")).said != "waiting restart":
        assert time.monotonic() < give_up_at, by_name
        manager = configured(monkeypatch, daemon.settings, "crashing,nightly")
        by_name = {service.name: service for service in services.status(manager)}
    assert {service.state for service in by_name.values()} == {State.STARTING}
    assert services.proven_stopped(manager).stopped is False
    assert by_name["nightly"].said == "stopped, and PM2 starts it by cron (0 3 * * *)"
    assert services.stop(configured(monkeypatch, daemon.settings, "crashing"))[0].state is State.STOPPED
    manager = configured(monkeypatch, daemon.settings, "nightly")
    with pytest.raises(Refused, match="also after a stop") as refused:
        services.stop(manager)
    for line in (refused.value.hint or "").split("; "):
        daemon(*line.split()[1:])
    assert services.proven_stopped(manager).stopped is True


def test_a_service_that_pm2_has_given_up_is_stopped(daemon: Pm2, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.start("hopeless", "--max-restarts", "1", env={"CRASHES": "1"})
    manager = configured(monkeypatch, daemon.settings, "hopeless")
    give_up_at = time.monotonic() + 10
    while (service := services.status(manager)[0]).said != "errored":
        assert time.monotonic() < give_up_at, service
    assert service.state is State.STOPPED

    def keep_starting() -> None:
        """On a busy machine its process lives long enough to be seen."""
        give_up_at = time.monotonic() + 10
        while time.monotonic() < give_up_at:
            services.start(manager, timeout_s=4)

    with pytest.raises(HalfDone, match="not started: hopeless is"):
        keep_starting()


def test_a_list_that_is_not_of_our_services_proves_nothing(daemon: Pm2, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.start("somebody-elses")
    manager = configured(monkeypatch, daemon.settings, "nobody-knows-me")
    proof = services.proven_stopped(manager)
    assert proof.stopped is None
    assert "does not know it" in proof.reason
    for act in (services.stop, services.start, services.restart):
        with pytest.raises(Refused, match="nobody-knows-me"):
            act(manager)


def test_an_empty_list_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pm2() as empty:
        proof = services.proven_stopped(configured(monkeypatch, empty.settings))
        assert proof.stopped is None
        assert "has no processes at all" in proof.reason
        os.kill(empty.daemon, signal.SIGSTOP)
        try:
            started = time.monotonic()
            frozen = services.proven_stopped(configured(monkeypatch, empty.settings), timeout_s=2)
        finally:
            os.kill(empty.daemon, signal.SIGCONT)
        assert frozen.stopped is None
        assert "does not answer" in frozen.reason
        assert time.monotonic() - started < 3


def test_where_no_daemon_runs_none_is_started(daemon: Pm2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    proof = services.proven_stopped(configured(monkeypatch, {**daemon.settings, "PM2_HOME": str(home)}))
    assert proof.stopped is None
    assert "runs in" in proof.reason
    assert list(home.iterdir()) == []


def test_where_there_is_no_pm2_nothing_is_known(daemon: Pm2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = services.proven_stopped(configured(monkeypatch, {**daemon.settings, "PATH": str(tmp_path)}))
    assert (proof.stopped, proof.reason) == (None, f"{SERVICE}: the program pm2 is not found on PATH")


@needs.root()
def test_root_asks_pm2_as_its_user_and_leaves_nothing_of_roots_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pm2(user="nobody") as theirs:
        theirs.start(SERVICE)
        uid = Path(f"/proc/{theirs.daemon}").stat().st_uid
        # Without SERVICE_USER it is the PM2 of APP_DIR's owner.
        whose = {**theirs.settings, "SERVICE_USER": "", "APP_DIR": str(theirs.home)}
        services.stop(configured(monkeypatch, whose))
        (service,) = services.start(configured(monkeypatch, theirs.settings), environment={"NEW": "1"})
        assert Path(f"/proc/{service.pids[0]}").stat().st_uid == uid != 0
        kept = [path for name in ("logs", "pids", "modules") for path in (theirs.home / name).rglob("*")]
        kept += [*theirs.home.glob("*.log"), *theirs.home.glob("*.sock")]
        assert {path.stat().st_uid for path in kept} == {uid}


# --- systemd ----------------------------------------------------------------------------------------------------------


MANAGER = """
import json
from opsctl import services
from opsctl.errors import HalfDone
from opsctl.settings import load

def manager(*names):
    return services.manager(load(environ={"SERVICE_MANAGER": "systemd", "SERVICE_NAMES": ",".join(names)}))

def refusal(act):
    try:
        act()
    except HalfDone as error:
        return error.message
"""
SLEEP = "[Service]\nExecStart=/bin/sleep 1000\n"


@pytest.fixture(scope="module", params=["unified", "hybrid"])
def units(request: pytest.FixtureRequest) -> Iterator[Systemd]:
    with systemd(request.param) as running:
        yield running


@needs.systemd()
def test_what_systemd_says_of_a_unit_is_read(units: Systemd) -> None:
    for name, text in {
        "runs": SLEEP,
        "rests": SLEEP,
        "failed": "[Service]\nExecStart=/bin/false\n",
        "masked": SLEEP,
        "crashes": "[Service]\nExecStart=/bin/false\nRestart=always\nRestartSec=1000\n",
        "stops": f"{SLEEP}ExecStop=/bin/sleep 1000\n",
    }.items():
        units.unit(f"{name}.service", text)
    units.unit("masked.service", "")  # as `systemctl mask` leaves it
    units("start", "runs", "stops", "failed", "crashes")
    units("stop", "--no-block", "stops")
    seen = units.python(f"""{MANAGER}
names = "runs", "rests", "failed", "masked", "crashes", "stops", "nobody"
print(json.dumps({{s.name: [s.state, s.said, len(s.pids)] for s in services.status(manager(*names))}}))
""")
    assert seen == {
        "runs": [State.RUNNING, "active (running)", 1],
        "rests": [State.STOPPED, "inactive (dead)", 0],
        "failed": [State.STOPPED, "failed (failed)", 0],
        "masked": [State.STOPPED, "inactive (dead)", 0],
        "crashes": [State.STARTING, "activating (auto-restart)", 0],
        "stops": [State.RUNNING, "deactivating (stop)", 2],
        "nobody": [State.UNKNOWN, "systemd says not-found", 0],
    }
    assert units.python(f"""{MANAGER}
import os
os.environ["PATH"] = "/nonexistent"
(service,) = services.status(manager("runs"))
print(json.dumps([service.state, service.said]))
""") == [State.UNKNOWN, "systemctl does not answer"]


@needs.systemd()
def test_a_unit_is_stopped_down_to_what_it_has_started(units: Systemd) -> None:
    units.unit("wa.service", "[Service]\nExecStart=/bin/sh -c 'echo up; sleep 1000 & exec sleep 1000'\n")
    units.unit("leaves.service", "[Service]\nKillMode=process\nExecStart=/bin/sh -c 'sleep 1000 & exec sleep 1000'\n")
    units.unit("stubborn.service", "[Service]\nExecStart=/bin/sh -c 'trap : TERM; while :; do sleep 0.1; done'\n")
    units("start", "wa", "leaves", "stubborn")
    said = units.python(f"""{MANAGER}
import time
wa = manager("wa")
(before,) = services.status(wa)
said = {{"pids": len(before.pids), "age_s": time.time() - before.since.timestamp(), "restarts": before.restarts}}
said["proof of a running one"] = services.proven_stopped(wa).stopped
(stopped,) = services.stop(wa)
said["stopped"] = [stopped.state, services.proven_stopped(wa).stopped, [services._started_at(p) for p in before.pids]]
(started,) = services.start(wa)
said["started"] = [started.state, started.pids != before.pids]
said["logged"] = services.last_lines((started,), limit_bytes=1000)
said["leaves"] = refusal(lambda: services.stop(manager("leaves"), timeout_s=2))
said["stubborn"] = refusal(lambda: services.stop(manager("stubborn"), timeout_s=1))
print(json.dumps(said))
""")
    assert 0 <= said.pop("age_s") < 60
    assert said.pop("leaves").startswith("not stopped: leaves is inactive (dead), but not all that it started (pid ")
    assert said.pop("stubborn").startswith("not stopped: stubborn is deactivating (stop-sigterm) (pid ")
    assert said == {
        "pids": 2,
        "restarts": 0,
        "proof of a running one": False,
        "stopped": [State.STOPPED, True, [None, None]],
        "started": [State.RUNNING, True],
        "logged": ["up", "up"],
    }


# --- the operator's own commands --------------------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


STATUS = """\
#!/bin/sh
pid=$(cat "$0.$1" 2>/dev/null) || exit 4
[ "$pid" = stopped ] && exit 3
echo "$pid"
"""
STOP = """\
#!/bin/sh
kill "$(cat "${0%stop}status.$1")" && echo stopped > "${0%stop}status.$1"
"""
START = """\
#!/bin/sh
sleep 1000 > /dev/null 2>&1 &
echo $! > "${0%start}status.$1"
"""


@contextmanager
def own_commands(tmp_path: Path) -> Iterator[dict[str, str]]:
    for name, text in (("status", STATUS), ("stop", STOP), ("start", START)):
        program(tmp_path / name, text)
    yield {
        "SERVICE_MANAGER": "command",
        "SERVICE_STATUS_COMMAND": f"'{tmp_path / 'status'}'",
        "SERVICE_STOP_COMMAND": str(tmp_path / "stop"),
        "SERVICE_START_COMMAND": str(tmp_path / "start"),
        "SERVICE_LOG": f"{tmp_path / 'service.log'}, {tmp_path / 'other.log'}",
    }
    for path in tmp_path.glob("status.*"):
        if path.read_text().strip().isdigit():
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_the_operators_own_commands_get_the_name_and_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_commands(tmp_path) as settings:
        manager = configured(monkeypatch, settings)
        assert services.proven_stopped(manager).reason.endswith("ended with 4")
        with pytest.raises(Refused):
            services.stop(manager)
        (tmp_path / f"status.{SERVICE}").write_text("stopped")
        assert services.proven_stopped(manager).stopped is True
        (running,) = services.start(manager)
        assert alive(running.pids[0])
        assert running.logs == (tmp_path / "service.log", tmp_path / "other.log")
        assert services.proven_stopped(manager).stopped is False
        services.stop(manager)
        assert not alive(running.pids[0])


def test_a_command_that_hangs_is_given_up_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_commands(tmp_path) as settings:
        program(tmp_path / "status", '#!/bin/sh\nsleep 1000 & echo $! > "$0.child"\nwait\n')
        started = time.monotonic()
        proof = services.proven_stopped(configured(monkeypatch, settings), timeout_s=0.5)
        assert time.monotonic() - started < 2
        assert (proof.stopped, proof.reason.rpartition(" status ")[2]) == (
            None,
            f"{SERVICE}: {tmp_path}/status did not end in time",
        )
        gone(int((tmp_path / "status.child").read_text()))


def test_a_program_that_is_not_there_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"SERVICE_STATUS_COMMAND": "/no/such", "SERVICE_STOP_COMMAND": "x", "SERVICE_START_COMMAND": "x"}
    manager = configured(monkeypatch, {"SERVICE_MANAGER": "command", **settings})
    assert services.proven_stopped(manager).stopped is None


def test_a_program_run_as_nobody_has_nobodys_rights(tmp_path: Path) -> None:
    account = process.Account("nobody", 65534, 65534, Path("/")) if os.geteuid() == 0 else None
    done = process.run(["id", "-u"], environment={"PATH": os.environ["PATH"]}, timeout_s=5, account=account)
    assert int(done.stdout) == (65534 if account else os.geteuid())


# --- settings ---------------------------------------------------------------------------------------------------------


def test_without_a_manager_nobody_can_tell() -> None:
    assert services.manager(load(environ={})) is None
    assert services.proven_stopped(None).stopped is None


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"SERVICE_MANAGER": "pm2"}, "SERVICE_NAMES is not set"),
        ({"SERVICE_MANAGER": "pm2", "SERVICE_NAMES": "a", "SERVICE_USER": "no-such-user"}, "SERVICE_USER"),
        ({"SERVICE_MANAGER": "command", "SERVICE_NAMES": "a"}, "SERVICE_STATUS_COMMAND, SERVICE_STOP_COMMAND"),
    ],
)
def test_a_manager_that_lacks_a_setting_says_which(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        services.manager(load(environ=environ))


# --- logs -------------------------------------------------------------------------------------------------------------


def test_what_is_logged_after_a_moment_is_read_through_rotation_and_cutting(tmp_path: Path) -> None:
    out, err, later, pipe = (tmp_path / name for name in ("out.log", "err.log", "later.log", "pipe"))
    service = Service("s", State.RUNNING, "online", logs=(out, err, later, pipe))
    out.write_text("old\n")
    err.write_text("a long old line\n")
    os.mkfifo(pipe)
    mark = services.mark_logs((service, service))
    assert services.lines_after((service,), mark) == []
    with out.open("a") as file:
        file.write("new\n")
    assert services.lines_after((service,), mark) == ["new"]
    out.rename(tmp_path / "out.log.1")
    out.write_text("rotated\n")
    err.write_text("cut\n")
    later.write_text("born\n")
    assert services.lines_after((service,), mark) == ["rotated", "cut", "born"]


def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(1000)))
    lines = services.last_lines((Service("s", State.RUNNING, "", logs=(log, tmp_path / "none")),), limit_bytes=100)
    assert lines == [f"line {number}" for number in range(1000 - len(lines), 1000)]
    assert 8 < len(lines) < 12


# --- the database -----------------------------------------------------------------------------------------------------


WRITER = """
import psycopg, sys, time
time.sleep(0.1)
psycopg.connect(sys.argv[1], autocommit=True).execute("INSERT INTO whatsapp_auth VALUES ('1', '{}')")
"""


def test_tables_that_nobody_writes_stand_still_and_others_do_not(database: Database) -> None:
    with db.connect(psycopg.conninfo.conninfo_to_dict(database.conninfo), 30) as connection:
        assert services.stands_still(connection, seconds=0.2) is True
        writer = subprocess.Popen([sys.executable, "-c", WRITER, database.conninfo])
        assert services.stands_still(connection, seconds=3) is False
        assert writer.wait() == 0
