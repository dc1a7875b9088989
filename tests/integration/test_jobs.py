"""What cron runs is watched: check-ins, a dead-man ping, the last run on disk, and a warning about an unusual one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import opsctl
from opsctl import jobs, sentry, settings
from opsctl.report import Ending, Report
from opsctl.state import State
from tests import needs
from tests.forks import THEIR_APP
from tests.integration.receivers import HANGING, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.forks import Finished, Forks
    from tests.integration.fleet import Fleet
    from tests.integration.receivers import Kent, Recorder

PROGRAM = """\
import sys, time
from typing import Annotated
import typer
from opsctl import errors
from opsctl.cli import frame
from opsctl.report import Report

app, keys, standby = typer.Typer(), typer.Typer(), typer.Typer()
app.add_typer(keys, name="keys")
app.add_typer(standby, name="standby")

@keys.callback()
def group() -> None: ...

@standby.callback()
def other() -> None: ...

@frame.command(keys, "cleanup", examples=[], deadline_s=None)
def cleanup(ctx: typer.Context, end: Annotated[str, typer.Option()] = "0", dry_run: frame.DryRun = False) -> Report:
    "Ends as it is told to."
    if end == "wait":
        sys.stderr.write("waiting\\n")
        time.sleep(30)
    if end == "locked":
        raise errors.AlreadyRunning("pid 7 is at it")
    if end == "bug":
        raise ValueError(end)
    failure = None if end == "0" else frame.Failure("invented", "it failed")
    return Report("done", exit_code=int(end), failure=failure, facts={"keys": 5000, "deleted": 600})

@frame.command(standby, "sync", examples=[])
def sync(ctx: typer.Context) -> Report:
    "No cleanup."
    return Report("done")
"""


class Machine:
    """Runs the invented jobs as cron does, or on a terminal."""

    def __init__(self, folder: Path, forking: Forks) -> None:
        self.folder = folder
        self._forking = forking
        self.before: tuple[str, ...] = ()
        self.state = folder / "state"
        self.program = folder / "program.py"
        self.program.write_text(f"{PROGRAM}\nsys.exit(frame.main(app))\n")
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(opsctl.__file__).parents[1]),
            "HOME": str(folder),
            "OPSCTL_STATE_DIR": str(self.state),
        }

    def words(self, *words: str) -> list[str]:
        return [*self.before, sys.executable, str(self.program), *words]

    def run(self, *words: str, **env: str) -> Finished:
        return self._forking.run(
            *words, env={**self.env, **env}, before=PROGRAM + THEIR_APP, cwd=self.folder, timeout=30
        )

    def started(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """The same with all of Python's start."""
        return subprocess.run(
            self.words(*words), env={**self.env, **env}, cwd=self.folder, check=False, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    @contextlib.contextmanager
    def running(self, *words: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(
            self.words(*words), env={**self.env, **env}, cwd=self.folder, stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def last_run(self, job: str = "keys-cleanup") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "jobs" / job / "last-run.json").read_text())
        return found


@pytest.fixture
def machine(tmp_path: Path, forking: Forks) -> Machine:
    return Machine(tmp_path, forking)


# --- check-ins --------------------------------------------------------------------------------------------------------


def test_a_job_checks_in_twice_under_one_id_and_makes_its_monitor(machine: Machine, kent: Kent) -> None:
    done = machine.run("keys", "cleanup", SENTRY_DSN=kent.dsn, OPSCTL_ENVIRONMENT="staging", CLEANUP_AT="04:30")
    assert (done.returncode, done.stderr) == (0, "")
    first, last = kent.events()
    assert (first["status"], last["status"]) == ("in_progress", "ok")
    assert first["check_in_id"] == last["check_in_id"]
    assert 0 < last["duration"] < 30
    for check_in in (first, last):
        assert (check_in["monitor_slug"], check_in["environment"]) == ("opsctl-keys-cleanup", "staging")
        assert check_in["monitor_config"] == {
            "schedule": {"type": "crontab", "value": "30 4 * * *"},
            "timezone": "UTC",
            "checkin_margin": 5,
            "max_runtime": 120,
            "failure_issue_threshold": 2,
            "recovery_threshold": 1,
        }


def test_every_job_has_a_monitor_of_its_own(machine: Machine, recorder: Recorder) -> None:
    machine.run("standby", "sync", SENTRY_DSN=recorder.dsn)
    assert {c["monitor_slug"] for c in recorder.check_ins} == {"opsctl-standby-sync"}
    assert {c["monitor_config"]["schedule"]["value"] for c in recorder.check_ins} == {"* * * * *"}
    assert len({job.name for job in jobs.JOBS}) == len(jobs.JOBS)


@pytest.mark.parametrize(
    ("job", "max_runtime", "failures"),
    [("standby-sync", 10, 3), ("db-health", 2, 2), ("keys-cleanup", 120, 2), ("drill-run", 30, 1)],
)
def test_a_monitor_has_the_limits_of_its_job(job: str, max_runtime: int, failures: int, tmp_path: Path) -> None:
    there = settings.load(environ={"OPSCTL_STATE_DIR": str(tmp_path)})
    [of_name] = [found for found in jobs.JOBS if found.name == job]
    content = sentry.check_in(of_name, there, "0" * 32, status="ok").splitlines()[-1]
    config = json.loads(content)["monitor_config"]
    assert (config["max_runtime"], config["checkin_margin"]) == (max_runtime, 5)
    assert (config["failure_issue_threshold"], config["recovery_threshold"]) == (failures, 1)


@pytest.mark.parametrize(
    ("end", "code", "status", "pinged"),
    [
        ("0", 0, "ok", ["/start", ""]),
        ("1", 1, "error", ["/start", "/1"]),
        ("6", 6, "error", ["/start", "/6"]),
        ("bug", 70, "error", ["/start", "/70"]),
        ("locked", 75, "ok", ["/start"]),  # the one that holds the lock says how it ended
    ],
)
def test_the_final_exit_code_decides_what_is_told(
    end: str, code: int, status: str, pinged: list[str], machine: Machine, recorder: Recorder
) -> None:
    ping = f"{recorder.url}/ping/{{job}}?create=1"
    done = machine.run("keys", "cleanup", "--end", end, SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=ping)
    assert done.returncode == code
    assert [c["status"] for c in recorder.check_ins] == ["in_progress", status]
    paths, queries = zip(*(ping.split("?") for ping in recorder.pings), strict=True)
    assert list(paths) == [f"/ping/keys-cleanup{word}" for word in pinged]
    [query] = set(queries)
    assert query.startswith("create=1&rid=")
    assert uuid.UUID(query.partition("rid=")[2]).hex == recorder.check_ins[0]["check_in_id"]


def test_a_job_that_is_stopped_says_so(machine: Machine, recorder: Recorder) -> None:
    env = {"SENTRY_DSN": recorder.dsn, "HEALTHCHECK_URL": recorder.url}
    with machine.running("keys", "cleanup", "--end", "wait", **env) as process:
        assert process.stderr
        assert process.stderr.readline() == b"waiting\n"
        for _ in range(200):
            if recorder.check_ins and recorder.pings:
                break
            time.sleep(0.05)
        assert [c["status"] for c in recorder.check_ins] == ["in_progress"]  # while it works, not afterwards
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert recorder.check_ins[-1]["status"] == "error"
    assert recorder.pings[-1].startswith("/143?")
    assert machine.last_run()["exit_code"] == 143


def test_nobody_is_told_of_a_part_of_a_job_or_of_one_that_a_person_sees(machine: Machine, recorder: Recorder) -> None:
    env = {"SENTRY_DSN": recorder.dsn, "HEALTHCHECK_URL": recorder.url}
    machine.run("keys", "cleanup", "--dry-run", **env)
    person, program = pty.openpty()
    words = machine.words("keys", "cleanup")
    subprocess.run(words, env={**machine.env, **env}, cwd=machine.folder, stdin=program, stderr=program, check=True)
    for descriptor in (person, program):
        os.close(descriptor)
    assert recorder.received == []
    assert not (machine.state / "jobs").exists()


def test_a_ping_carries_no_word_of_the_job(machine: Machine, recorder: Recorder) -> None:
    machine.run("keys", "cleanup", "--end", "1", HEALTHCHECK_URL=f"{recorder.url}/secret-uuid")
    for request in recorder.received:
        assert b"it failed" not in request
        assert machine.folder.name.encode() not in request


def test_signals_are_never_spooled(machine: Machine, recorder: Recorder) -> None:
    recorder.status = 500
    machine.run("keys", "cleanup", SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=recorder.url)
    assert not (machine.state / "spool").exists()
    before = len(recorder.received)
    assert before == 4
    machine.run("keys", "cleanup", "--dry-run", SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=recorder.url)
    assert len(recorder.received) == before


@pytest.mark.parametrize("status", [400, 404, 410, 301])
@pytest.mark.parametrize("end", ["0", "1"])
def test_signals_that_are_refused_are_one_line_and_in_the_last_run(
    end: str, status: int, machine: Machine, recorder: Recorder
) -> None:
    recorder.status = status
    words = ("keys", "cleanup", "--end", end, "--quiet")
    silent = machine.run(*words)
    done = machine.run(*words, SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=f"{recorder.url}/{{job}}")
    assert (done.returncode, done.stdout) == (int(end), "")
    [line] = done.stderr.removeprefix(silent.stderr).splitlines()
    sentences = [
        f"Sentry answers {status} to check-ins, so nobody watches this job (SENTRY_DSN)",
        f"the dead-man ping is answered {status}: is HEALTHCHECK_URL still right?",
    ]
    assert line == f"opsctl keys cleanup: warning: {'; '.join(sentences)}"
    kept = machine.last_run()
    assert kept["warnings"] == sentences
    assert (kept["exit_code"], kept["outcome"]) == (int(end), "warning" if end == "0" else "failed")
    recorder.status = 200
    assert machine.run(*words, SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=recorder.url).stderr == silent.stderr
    assert machine.last_run()["warnings"] == []


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_receiver_that_is_in_trouble_itself_is_no_warning(status: int, machine: Machine, recorder: Recorder) -> None:
    recorder.status = status
    done = machine.run("keys", "cleanup", "--quiet", SENTRY_DSN=recorder.dsn, HEALTHCHECK_URL=recorder.url)
    assert (done.returncode, done.stderr, machine.last_run()["warnings"]) == (0, "", [])


# --- what it costs ----------------------------------------------------------------------------------------------------


def added_seconds(machine: Machine, **env: str) -> float:
    """What telling adds to a job that fails; the best of three pairs, because the machine does other things too."""
    added: list[float] = []
    while len(added) < 3 and min(added, default=9.0) > 2.0:
        times = []
        for told in ({}, env):
            started = time.monotonic()
            done = machine.started("keys", "cleanup", "--end", "1", "--quiet", **told)
            times.append(time.monotonic() - started)
            assert (done.returncode, done.stderr) == (1, "opsctl keys cleanup: it failed\n")
        added.append(times[1] - times[0])
    return min(added)


def everybody(url: str) -> dict[str, str]:
    """Every receiver there is, at one address."""
    telegram = {"TELEGRAM_BOT_TOKEN": "1:token", "TELEGRAM_CHAT_ID": "1", "TELEGRAM_API_URL": url}
    return {"SENTRY_DSN": url.replace("//", "//k@") + "/1", "HEALTHCHECK_URL": f"{url}/{{job}}", **telegram}


def delivered_later(machine: Machine, recorder: Recorder) -> bool:
    """Whether the next run brings the one event and the one message that waited, and the one after it nothing."""
    for _ in range(2):
        machine.started("keys", "cleanup", "--dry-run", **everybody(recorder.url))
    messages = [request for request in recorder.received if b"/bot1:token/sendMessage" in request]
    return (len(recorder.events), len(messages), len(recorder.received)) == (1, 1, 2)


@pytest.mark.parametrize("endpoint", HANGING.values(), ids=HANGING.keys())
def test_receivers_that_all_hang_add_two_seconds_in_all(
    endpoint: Callable[[], contextlib.AbstractContextManager[str]], machine: Machine, recorder: Recorder
) -> None:
    with endpoint() as dsn:
        assert 0.5 < added_seconds(machine, **everybody(dsn.replace("k@", "").removesuffix("/1"))) <= 2.0
    assert [len(list((machine.state / "spool").glob(f"{name}/*"))) for name in ("sentry", "telegram")] == [1, 1]
    assert delivered_later(machine, recorder)


@needs.namespace("mount")
def test_a_resolver_that_hangs_for_all_receivers_adds_two_seconds_in_all(
    machine: Machine, silent_resolver: tuple[str, ...], recorder: Recorder
) -> None:
    machine.before = silent_resolver
    assert 0.5 < added_seconds(machine, **everybody("http://sinks.example.com")) <= 2.0
    assert delivered_later(machine, recorder)


def test_receivers_that_refuse_fail_or_are_slow_add_two_seconds_in_all(machine: Machine, recorder: Recorder) -> None:
    assert added_seconds(machine, **everybody(f"http://127.0.0.1:{free_port()}")) <= 2
    recorder.status = 500
    assert added_seconds(machine, **everybody(recorder.url)) <= 2
    recorder.received.clear()
    recorder.status = 200
    assert delivered_later(machine, recorder)
    recorder.delay_s = 0.7
    assert added_seconds(machine, **everybody(recorder.url)) <= 2.0


# --- the last run -----------------------------------------------------------------------------------------------------


def test_the_last_run_of_a_job_is_kept_for_whoever_looks(machine: Machine) -> None:
    done = machine.run("keys", "cleanup", "--json")
    kept = machine.last_run()
    document = json.loads(done.stdout)
    assert {name: kept[name] for name in ("command", "run_id", "exit_code", "outcome", "summary", "error")} == {
        name: document[name] for name in ("command", "run_id", "exit_code", "outcome", "summary", "error")
    }
    assert kept["measures"] == {"elapsed_s": kept["elapsed_s"], "keys": 5000, "deleted": 600}
    for path in (machine.state / "jobs").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)

    machine.run("keys", "cleanup", "--end", "1")
    assert (machine.last_run()["exit_code"], machine.last_run()["error"]["kind"]) == (1, "invented")
    machine.run("keys", "cleanup", "--end", "locked")  # found another at work: no run of its own
    machine.run("keys", "cleanup", "--dry-run")
    assert machine.last_run()["exit_code"] == 1
    assert len(machine.last_run()["recent"]) == 1


def test_an_unusual_run_is_one_line_and_a_warning_to_sentry(machine: Machine, recorder: Recorder) -> None:
    state = State(machine.state)
    usual = {"elapsed_s": 600.0, "keys": 20_000, "deleted": 600}
    state.keep("jobs/keys-cleanup/last-run", {"recent": [usual] * 5})
    done = machine.run("keys", "cleanup", "--quiet", SENTRY_DSN=recorder.dsn)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert "too fast: this run took " in done.stderr
    assert "and usually it takes 600 s; far off the usual: 5,000 keys in the table in this run" in done.stderr
    [event] = recorder.events
    assert (event["level"], event["tags"]["kind"]) == ("warning", "warning")
    assert [c["status"] for c in recorder.check_ins] == ["in_progress", "ok"]


@pytest.mark.parametrize("kept", ['{"recent": 7}', '{"recent": [7, {"keys": "x"}]}', "[]", "torn {", ""])
def test_a_last_run_that_somebody_changed_stops_nothing(kept: str, machine: Machine) -> None:
    path = machine.state / "jobs" / "keys-cleanup" / "last-run.json"
    path.parent.mkdir(parents=True)
    path.write_text(kept)
    done = machine.run("keys", "cleanup", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.last_run()["exit_code"] == 0


# --- what is unusual --------------------------------------------------------------------------------------------------

CLEANUP = next(job for job in jobs.JOBS if job.command == "keys cleanup")


def ran(state: State, elapsed_s: float, *, exit_code: int = 0, job: jobs.Job = CLEANUP, **facts: int) -> list[str]:
    """One run; what was said about it."""
    report = Report("done", exit_code=exit_code, facts=facts)
    said = list(jobs.unusual(job, state, report, elapsed_s))
    ending = Ending(job.command, "run", report, None, (), elapsed_s, emergency=False, options={})
    jobs.remember(job, state, ending)
    return said


@pytest.mark.parametrize("seed", range(5))
def test_thirty_healthy_runs_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    chance, state, keys = random.Random(seed), State(tmp_path), 20_000
    for _ in range(30):
        keys += chance.randrange(-300, 600)
        assert ran(state, chance.uniform(3, 20), keys=keys, deleted=chance.randrange(150, 1400)) == []


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"elapsed_s": 0.9}, "too fast"),
        ({"deleted": 3}, "3 deleted keys in this run, and usually 600"),
        ({"deleted": 60_000}, "60,000 deleted keys"),
        ({"keys": 9_000}, "9,000 keys in the table in this run, and usually 20,000"),
        ({"keys": 0}, "0 keys in the table"),
        ({"keys": 41_000}, "41,000 keys"),
    ],
)
def test_too_fast_too_little_and_far_off_are_said_until_they_are_usual(
    run: dict[str, Any], said: str, tmp_path: Path
) -> None:
    state = State(tmp_path)
    usual: dict[str, Any] = {"elapsed_s": 10.0, "keys": 20_000, "deleted": 600}
    for _ in range(jobs.FEWEST - 1):
        assert ran(state, **usual) == []
    assert ran(state, **(usual | run)) == []  # four runs are no custom
    assert ran(state, **usual) == []
    [sentence] = ran(state, **(usual | run))
    assert said in sentence
    assert ran(state, exit_code=6, **(usual | run)) == []  # which says enough itself
    for _ in range(jobs.REMEMBERED):
        ran(state, **(usual | run))
    assert ran(state, **(usual | run)) == []


def test_small_numbers_are_chance(tmp_path: Path) -> None:
    for _ in range(jobs.FEWEST):
        assert ran(State(tmp_path), 1.0, keys=400, deleted=90) == []
    assert ran(State(tmp_path), 0.01, keys=10, deleted=0) == []


def test_a_drill_that_restored_far_less_than_usual_is_said(tmp_path: Path) -> None:
    [drill] = [job for job in jobs.JOBS if job.command == "drill run"]
    for _ in range(jobs.FEWEST):
        assert ran(State(tmp_path), 60.0, job=drill, files_restored=46_360) == []
    assert ran(State(tmp_path), 60.0, job=drill, files_restored=46_000) == []
    assert ran(State(tmp_path), 60.0, job=drill, files_restored=2_318) == [
        "far off the usual: 2,318 restored files in this run, and usually 46,360"
    ]


def test_the_jobs_that_there_are_report_what_is_measured(fleet: Fleet) -> None:
    lines = {
        "keys cleanup": ("--yes", "--quiet"),
        "standby sync": ("--quiet",),
        "drill run": ("--quiet", "--companies", "2", "--keys", "40"),
    }
    assert {job.command for job in jobs.JOBS if job.measures} == set(lines)
    for command, flags in lines.items():
        job = jobs.job_of(command, {})
        assert job
        env = {"STANDBY_DIR": str(fleet.place / "standby")}
        assert fleet.opsctl(*command.split(), *flags, env=env).returncode == 0
        last_run = State(fleet.state).kept(f"jobs/{job.name}/last-run")
        assert {measure.fact for measure in job.measures} < set(last_run["measures"])
    assert last_run["measures"]["files_restored"] == 2 * 41  # the keys, and creds.json
