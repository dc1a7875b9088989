"""The lines that cron needs, taken by the real crontab, systemd and PM2; and what is wrong with installed ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsctl
from opsctl.operations import cron as operation
from tests import needs
from tests.pm2.door import Pm2, pm2
from tests.systemd.door import systemd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

JOBS = ("standby sync", "db health", "keys cleanup", "drill run")
_MOUNTS = """
mount --bind "$SPOOL" /var/spool/cron/crontabs
mount --bind "$CRON_D" /etc/cron.d
exec "$@"
"""


class Machine:
    """A machine of its own as far as cron goes: opsctl and crontab run where nobody else's crontabs are."""

    inside: tuple[str, ...] = ()
    """What is typed before a command, where only that sees the machine's systemd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool, self.cron_d, self.programs = folder / "spool", folder / "cron.d", folder / "programs"
        for made in (self.spool, self.cron_d, self.programs):
            made.mkdir()
        self.env_file = folder / "settings.env"
        self.set()
        self.path = f"{self.programs}:{os.environ['PATH']}"

    def set(self, *settings: str) -> None:
        self.env_file.write_text("\n".join([f"OPSCTL_STATE_DIR={self.folder / 'state'}", *settings]))

    def run(self, *words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": self.path,
            "PYTHONPATH": str(Path(opsctl.__file__).parents[1]),
            "HOME": str(self.folder),
            "SPOOL": str(self.spool),
            "CRON_D": str(self.cron_d),
            **env,
        }
        inside = [*self.inside, "unshare", "-m", "sh", "-euc", _MOUNTS, "sh", *words]
        return subprocess.run(
            inside, env=environment, input=stdin, capture_output=True, text=True, check=False, timeout=60
        )

    def opsctl(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "opsctl", *words, "--env-file", str(self.env_file), **env)

    def show(self, *words: str) -> str:
        done = self.opsctl("cron", "show", *words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def install(self, text: str) -> None:
        done = self.run("crontab", "-", stdin=text)
        assert (done.returncode, done.stderr) == (0, ""), text

    def check(self) -> dict[str, tuple[str, str, str | None]]:
        done = self.opsctl("cron", "show", "--check", "--json")
        rows = json.loads(done.stdout)["rows"]
        assert done.returncode == (0 if all(row["state"] == "ok" for row in rows) else 1), done
        return {row["job"]: (row["state"], row["seen"], row["action"]) for row in rows}


def eventually(seen: Callable[[], bool]) -> bool:
    """Whether it was seen within ten seconds."""
    until = time.monotonic() + 10
    while not (found := seen()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def daemon(machine: Machine) -> Iterator[None]:
    """A process that is called as cron's daemon is, and runs nothing."""
    program = Path(shutil.copy(shutil.which("sleep") or "", machine.programs / "cron"))
    with subprocess.Popen([program, "60"]) as process:
        yield
        process.kill()
    program.unlink()


in_a_mount_namespace = needs.namespace("mount")
with_crontab = needs.debian("cron")


# --- crontab ----------------------------------------------------------------------------------------------------------


@in_a_mount_namespace
@with_crontab
def test_the_lines_are_taken_by_crontab_and_then_nothing_is_missing(machine: Machine, daemon: None) -> None:
    assert {job: row[0] for job, row in machine.check().items()} == dict.fromkeys(JOBS, "missing")
    machine.install("MAILTO=ops\n17 * * * * somebody else's\n" + machine.show())
    assert {job: row[0] for job, row in machine.check().items()} == dict.fromkeys([*JOBS, "cron itself"], "ok")
    quiet = machine.opsctl("cron", "show", "--check", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@in_a_mount_namespace
@with_crontab
@pytest.mark.parametrize(
    "spoiled",
    [
        {
            "standby sync": (r"(?m)^(?=.*standby sync --quiet)", "#", "disabled", "commented out"),
            "db health": (r"(?m)^.*db health --quiet\n", "", "missing", "nothing runs it"),
            "keys cleanup": (r"(?m)^0 3 ", "10 4 ", "off time", "its monitor expects 0 3 * * * UTC"),
            "drill run": (r"(?m)^(.*drill run --quiet\n)", r"\1\1", "twice", "line"),
        },
        {
            "standby sync": (r"(?m)^\* \* \* \* \* ", "*/2 * * * * ", "off time", "its monitor expects * * * * * UTC"),
            "db health": (r"(?m)^\*/5 \* \* \* \* ", "@hourly ", "off time", "its monitor expects */5 * * * * UTC"),
            "keys cleanup": ("--yes ", "", "asks", "without --yes"),
            "drill run": (r"\S+/opsctl drill", "opsctl drill", "not found", "no opsctl on its PATH (/nowhere)"),
        },
        {
            "db health": (r"(?m)^\*/5 \* \* \* \* ", "@reboot ", "unclear", "@reboot"),
            "keys cleanup": ("cleanup --yes", "cleanup --yes --dry-run", "missing", "nothing runs it"),
            "drill run": (r"\S+/opsctl drill", "/nowhere/opsctl drill", "not found", "no opsctl on its PATH"),
        },
        {"keys cleanup": (r"\Z", "0 3 * * 1 pg_dump wa\n", "collides", "a backup runs in that minute")},
        {"keys cleanup": (r"\Z", "*/15 * * * * /srv/bin/Backup.sh\n", "collides", "a backup runs in that minute")},
        {"db health": (r"(?m)^.*db health --quiet\n", "* * * * * archive-wal-for-backup\n", "missing", "nothing")},
    ],
)
def test_what_is_wrong_with_the_crontab_is_found(
    spoiled: dict[str, tuple[str, str, str, str]], machine: Machine, daemon: None
) -> None:
    text = re.sub(r'PATH=".*"', 'PATH="/nowhere"', machine.show())
    # As a real installation is called, wherever the tests run from.
    program = machine.programs / "opsctl"
    program.touch(0o755)
    text = re.sub(r"\S+ -m opsctl|\S+/opsctl(?= \w+ \w+)", str(program), text)
    for old, new, _, _ in spoiled.values():
        text, count = re.subn(old, new, text)
        assert count
    machine.install(text)
    for job, (state, seen, action) in machine.check().items():
        *_, expected_state, expected = spoiled.get(job, ("ok", ""))
        assert (job, state) == (job, expected_state)
        assert expected in seen
        assert bool(action) == (state != "ok")


@in_a_mount_namespace
@with_crontab
def test_a_line_of_cron_d_counts_and_a_second_one_elsewhere_is_named(machine: Machine, daemon: None) -> None:
    text = machine.show()
    machine.install(text)
    [line] = re.findall(r"(?m)^(0 3 \* \* \* )(.*)$", text)
    (machine.cron_d / "opsctl").write_text(f"{line[0]}root {line[1]}\n")
    (machine.cron_d / "old.dpkg-dist").write_text(f"{line[0]}root {line[1]}\n")  # which cron does not read
    state, seen, _ = machine.check()["keys cleanup"]
    assert (state, seen.count(" and ")) == ("twice", 1)
    assert "/etc/cron.d/opsctl, line 1" in seen
    machine.install(text.replace(line[1], "true"))
    assert machine.check()["keys cleanup"][0] == "ok"


@in_a_mount_namespace
@with_crontab
def test_a_crontab_without_a_daemon_is_no_schedule(machine: Machine) -> None:
    machine.install(machine.show())
    # In a namespace of processes, where no cron of this machine is seen.
    apart = ("unshare", "-p", "-f", "--mount-proc", sys.executable, "-m", "opsctl", "cron", "show", "--check", "--json")
    done = machine.run(*apart, "--env-file", str(machine.env_file))
    assert done.returncode == 1
    assert json.loads(done.stdout)["rows"][-1]["state"] == "stopped"


@in_a_mount_namespace
@with_crontab
def test_the_cleanup_is_put_where_no_backup_runs_and_is_expected_there(machine: Machine, daemon: None) -> None:
    machine.install(
        "0,30 3 * * * pg_dump wa | gzip >/srv/wa.sql.gz\n0 4 1 1 * /srv/bin/yearly-backup\n#30 4 * * * pg_dump\n"
    )
    text = machine.show()
    assert re.search(r"(?m)^# A backup runs at the cleanup's minute \(crontab of \w+, line 1\), .* at 04:30\.$", text)
    assert re.search(r"(?m)^30 4 \* \* \* .*keys cleanup", text)
    assert 'CLEANUP_AT="04:30"' in text
    for form in ("systemd", "pm2"):
        assert re.search(r"CLEANUP_AT.{1,4}04:30", machine.show("--as", form))
    machine.install("0,30 3 * * * pg_dump wa\n" + text)
    assert machine.check()["keys cleanup"][0] == "ok"


@in_a_mount_namespace
@with_crontab
def test_the_time_of_the_settings_is_the_one_that_is_expected(machine: Machine, daemon: None) -> None:
    machine.set("CLEANUP_AT=05:17")
    text = machine.show()
    assert re.search(r"(?m)^17 5 \* \* \* .*keys cleanup", text)
    assert f'OPSCTL_ENV_FILE="{machine.env_file}"' in text
    machine.install(text)
    assert machine.check()["keys cleanup"][0] == "ok"
    machine.set("CLEANUP_AT=05:18")
    assert machine.check()["keys cleanup"][2] == "set CLEANUP_AT=05:17, or move it"


@in_a_mount_namespace
@with_crontab
def test_what_cron_would_not_know_is_said(machine: Machine) -> None:
    done = machine.opsctl("cron", "show", STANDBY_DIR="/srv/standby", POSTGRES_PASSWORD="hunter2-s3cr3t")
    assert "# Cron does not know what is set in this shell only: POSTGRES_PASSWORD, STANDBY_DIR.\n" in done.stdout
    assert "hunter2" not in done.stdout
    machine.install(done.stdout)


@in_a_mount_namespace
@with_crontab
def test_a_line_runs_as_cron_runs_it_alone_unreadable_for_others_and_with_an_end(machine: Machine) -> None:
    text = machine.show()
    state = machine.folder / "state"
    [line] = re.findall(r"(?m)^\*/5 \* \* \* \* (.*)$", text)
    assert "timeout -k 30 120 " in line
    environment = dict(re.findall(r'(?m)^(\w+)="(.*)"$', text))
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), f"HOME={machine.folder}"]
    # From a checkout the program is the interpreter, which has to find opsctl.
    words += [f"PYTHONPATH={Path(opsctl.__file__).parents[1]}", "/bin/sh", "-c", line]
    done = machine.run(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done  # there is no database
    assert state.stat().st_mode & 0o777 == 0o700
    lock = state / "cron-db-health.lock"
    assert lock.stat().st_mode & 0o777 == 0o600
    held = machine.run("flock", str(lock), *words)
    assert (held.returncode, held.stdout, held.stderr) == (75, "", "")


class _Summer(tzinfo):
    """An hour ahead of UTC, and two from April to September."""

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=2 if moment and 4 <= moment.month < 10 else 1)

    def dst(self, moment: datetime | None) -> timedelta:
        return self.utcoffset(moment) - timedelta(hours=1)

    def tzname(self, moment: datetime | None) -> str:
        return "SUMMER"


@pytest.mark.parametrize(
    ("hours", "cleanup", "drill"),
    [(0, "0 3 * * *", "0 4 2 * *"), (5.5, "30 8 * * *", "30 9 2 * *"), (-8, "0 19 * * *", "0 20 1 * *"),
     (14, "0 17 * * *", "0 18 2 * *")],
)  # fmt: skip
def test_a_crontab_goes_by_the_machine_s_clock(hours: float, cleanup: str, drill: str) -> None:
    zone = timezone(timedelta(hours=hours))
    assert operation._by_the_clock_here("0 3 * * *", zone)[0] == cleanup
    assert operation._by_the_clock_here("0 4 2 * *", zone)[0] == drill
    assert operation._by_the_clock_here("*/5 * * * *", zone) == ("*/5 * * * *", "")


def test_a_clock_that_is_put_forward_is_warned_of() -> None:
    when, note = operation._by_the_clock_here("0 3 * * *", _Summer())
    assert when in {"0 4 * * *", "0 5 * * *"}
    assert "when it is put forward or back, change this line" in note


LIMITS_MIN = {"standby sync": 10, "db health": 2, "keys cleanup": 120, "drill run": 30}


def test_every_line_has_the_limit_of_its_monitor(machine: Machine) -> None:
    for form, pattern in {
        "crontab": r"timeout -k 30 (\d+) .*opsctl (\w+ \w+) ",
        "systemd": r"TimeoutStartSec=(\d+)\n(?:.*\n){2}ExecStart=.*opsctl (\w+ \w+) ",
        "pm2": r"timeout -k 30 (\d+) .*opsctl (\w+ \w+) ",
    }.items():
        found = {job: int(limit_s) / 60 for limit_s, job in re.findall(pattern, machine.show("--as", form))}
        assert found == LIMITS_MIN, form


# --- systemd ----------------------------------------------------------------------------------------------------------


@in_a_mount_namespace
@needs.debian("systemd")
def test_systemd_finds_no_fault_in_the_units(machine: Machine) -> None:
    units = machine.folder / "units"
    units.mkdir()
    machine.set("STANDBY_DIR='/srv/100% \"warm\" $copies'")
    script = machine.show("--as", "systemd")
    assert script.splitlines()[-2].startswith("systemctl enable --now opsctl-standby-sync.timer")
    here = re.sub(r"(?m)^systemctl .*", "", script).replace("/etc/systemd/system", str(units))
    subprocess.run(["sh"], input=here, text=True, check=True)
    files = sorted(units.iterdir())
    assert len(files) == 2 * len(JOBS)
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "OnCalendar=*-*-* 03:00:00 UTC" in (units / "opsctl-keys-cleanup.timer").read_text()
    for word in ("UMask=0077", "TimeoutStartSec=7200", "SuccessExitStatus=75", f"OPSCTL_ENV_FILE={machine.env_file}"):
        assert word in (units / "opsctl-keys-cleanup.service").read_text()


@in_a_mount_namespace
@needs.systemd()
def test_systemd_takes_the_units_and_its_timers_are_read(machine: Machine) -> None:
    ran = machine.folder / "ran"
    stand_in = machine.programs / "opsctl"  # not on the machine that tests it
    stand_in.write_text(f'#!/bin/sh\numask >>{ran}\necho "$@" >>{ran}\n')
    stand_in.chmod(0o755)
    script = re.sub(r"(?m)^(ExecStart=).*/opsctl ", rf"\1{stand_in} ", machine.show("--as", "systemd"))
    with systemd() as running:
        machine.inside = running.inside

        def states() -> dict[str, str]:
            return {job: row[0] for job, row in machine.check().items()}

        assert states() == dict.fromkeys(JOBS, "missing")
        done = machine.run("sh", stdin=script)
        assert (done.returncode, done.stdout) == (0, ""), done
        assert states() == dict.fromkeys(JOBS, "ok")
        running("start", "opsctl-keys-cleanup.service")
        assert "0077\nkeys cleanup --yes --quiet\n" in ran.read_text()

        drill = "opsctl-drill-run.timer"
        running("stop", drill)
        assert machine.check()["drill run"][:2] == ("disabled", f"{drill}: the timer is inactive")
        running("disable", drill)
        running("start", drill)
        fleeting = f"{drill}: started, but disabled: gone after a reboot"
        assert machine.check()["drill run"][:2] == ("disabled", fleeting)
        running("enable", "--runtime", drill)
        assert machine.check()["drill run"][:2] == ("disabled", fleeting.replace("but disabled", "but enabled-runtime"))
        running("disable", "--runtime", drill)
        running("stop", drill)
        whole = (running.units / drill).read_text()
        running.unit(drill, whole.partition("[Install]")[0])
        running("start", drill)
        assert states()["drill run"] == "ok"  # static: somebody else has it started
        running("stop", drill)
        (running.units / drill).unlink()
        running("daemon-reload")
        assert states()["drill run"] == "missing"

        def at(name: str, when: str) -> None:
            running.unit(f"{name}.timer", f"[Timer]\nOnCalendar={when}\n[Install]\nWantedBy=timers.target\n")
            running("enable", f"{name}.timer")
            running("restart", f"{name}.timer")

        running.unit("dump.service", "[Service]\nType=oneshot\nExecStart=/usr/bin/pg_dump wa\n")
        at("dump", "*-*-* 03:00:00 UTC")
        assert states()["keys cleanup"] == "collides"
        running("disable", "dump.timer")
        assert states()["keys cleanup"] == "collides"
        at("dump", "*-*-* 03:30:00 UTC")
        assert states()["keys cleanup"] == "ok"
        running("disable", "--now", "dump.timer")

        at("opsctl-keys-cleanup", "*-*-* 03:30:00 UTC")
        assert states()["keys cleanup"] == "off time"
        cleanup = running.units / "opsctl-keys-cleanup.service"
        running.unit(cleanup.name, cleanup.read_text().replace("[Service]", "[Service]\nEnvironment=CLEANUP_AT=03:30"))
        assert states()["keys cleanup"] == "ok"
        at("opsctl-db-health", "Mon,Tue *-*-* 00:00:00")
        assert states()["db health"] == "unclear"


# --- PM2 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running_pm2() -> Iterator[Pm2]:
    with pm2() as running:
        yield running


@pytest.fixture
def pm2_daemon(running_pm2: Pm2, machine: Machine) -> Iterator[Pm2]:
    """The machine's own, empty before and afterwards."""
    machine.set("SERVICE_MANAGER=pm2", "SERVICE_NAMES=app", f"PM2_HOME={running_pm2.home}")
    machine.path = running_pm2.path
    yield running_pm2
    running_pm2("delete", "all")


def jobs_for_pm2(machine: Machine, program: str) -> Path:
    """The file that PM2 is given, with a program of ours in opsctl's place."""
    stand_in = machine.programs / "opsctl"
    stand_in.write_text(program)
    stand_in.chmod(0o755)
    file = machine.folder / "opsctl.config.js"
    file.write_text(
        re.sub(r"[^\s\"]+ -m opsctl|[^\s\"]+/opsctl(?= \w+ \w+)", str(stand_in), machine.show("--as", "pm2"))
    )
    return file


@in_a_mount_namespace
def test_pm2_takes_the_file_and_its_list_is_read(machine: Machine, pm2_daemon: Pm2) -> None:
    pm2_daemon("start", jobs_for_pm2(machine, "#!/bin/sh\n"))  # PM2 runs each at once: not on the machine that tests it
    assert {job: row[0] for job, row in machine.check().items()} == dict.fromkeys(JOBS, "ok")
    pm2_daemon("delete", "opsctl-drill-run")
    pm2_daemon(
        "start", "/bin/true", "--name", "dump", "--no-autorestart", "--cron-restart", "0 3 * * *", "--", "pg_dump"
    )
    states = {job: row[0] for job, row in machine.check().items()}
    assert (states["drill run"], states["keys cleanup"]) == ("missing", "collides")


@in_a_mount_namespace
def test_a_job_of_pm2_is_disabled_without_its_cron_and_not_because_it_rests(machine: Machine, pm2_daemon: Pm2) -> None:
    ran = machine.folder / "ran"
    program = machine.programs / "opsctl"
    program.write_text(f"#!/bin/sh\necho >>{ran}\n")
    program.chmod(0o755)
    job = ("--no-autorestart", "--interpreter", "none", "--cron-restart")
    pm2_daemon("start", program, "--name", "health", *job, "*/5 * * * *", "--", "db", "health")
    pm2_daemon("stop", "health")
    assert machine.check()["db health"][0] == "ok"
    pm2_daemon("restart", "health", "--cron-restart", "0")
    assert machine.check()["db health"][:2] == ("disabled", "PM2's health: PM2 has no cron restart for it")
    # What that stands on: PM2 stops a process, and not its cron.
    pm2_daemon("start", program, "--name", "each-second", *job, "* * * * * *")
    pm2_daemon("stop", "each-second")
    before = len(ran.read_text())
    assert eventually(lambda: len(ran.read_text()) > before)


@in_a_mount_namespace
def test_pm2_runs_a_job_once_and_gives_it_the_time_to_tidy_up(machine: Machine, pm2_daemon: Pm2) -> None:
    ran, tidied = machine.folder / "ran", machine.folder / "tidied"
    program = (
        f"#!/bin/sh\necho $1 >>{ran}\n[ $1 = keys ] || exit 1\n"
        f"trap 'sleep 3; echo >{tidied}; exit 130' INT\nwhile :; do sleep 0.1; done\n"
    )
    pm2_daemon("start", jobs_for_pm2(machine, program))
    assert eventually(lambda: len(ran.read_text().split()) >= len(JOBS))
    pm2_daemon("stop", "opsctl-keys-cleanup")  # which is what it does with one that is due again
    assert tidied.exists()
    # Those two are due once a day and once a month; the others' minute may begin meanwhile.
    runs = Counter(ran.read_text().split())
    assert (set(runs), runs["keys"], runs["drill"]) == ({"db", "drill", "keys", "standby"}, 1, 1)
    entries = [entry["pm2_env"] for entry in json.loads(pm2_daemon("jlist"))]
    assert {(entry["autorestart"], entry["kill_timeout"]) for entry in entries} == {(False, 30_000)}


def test_json_has_every_job_with_its_command_and_its_time(machine: Machine) -> None:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(opsctl.__file__).parents[1]), "HOME": "/root"}
    line = [sys.executable, "-m", "opsctl", "cron", "show", "--as", "systemd", "--json"]
    done = subprocess.run(line, env=env, cwd=machine.folder, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["facts"]["form"] == "systemd"
    assert [(row["job"], row["when"]) for row in document["rows"]][:3] == [
        ("standby sync", "* * * * *"),
        ("db health", "*/5 * * * *"),
        ("keys cleanup", "0 3 * * *"),
    ]
    assert all(shlex.split(row["command"])[-1] == "--quiet" for row in document["rows"])
