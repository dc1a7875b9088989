"""A fault at each step of a switch and of the way back: the services end on one side, and it is said on which.

The services are shell programs under three commands of the operator's, so a run takes a moment; git, folders, standby
and PostgreSQL are real. With PM2 and Baileys: test_switch_pm2.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.stores.switch_record import Phase, read_switch
from tests import needs
from tests.conftest import Finished
from tests.integration.fleet import FIRST, SECOND, Fleet
from tests.pm2.door import pm2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.forks import Forks


NAMES = ("sender", "receiver")
TAG = "emergency-file-fallback-v1"
FLAGS = {"USE_REPOSITORY_PATTERN": "false", "USE_DATABASE_AUTH_STATE": "false", "USE_LEGACY_SUPABASE": "false"}
NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere"

STATUS = """\
#!/bin/sh
pid=$(cat "{place}/pid.$1" 2>/dev/null) || exit 3
kill -0 "$pid" 2>/dev/null && echo "$pid" && exit 0
exit 3
"""
STOP = """\
#!/bin/sh
[ -e "{place}/does-not-stop" ] && exit 1
pid=$(cat "{place}/pid.$1" 2>/dev/null) || exit 0
kill "$pid" 2>/dev/null
rm -f "{place}/pid.$1"
"""
START = """\
#!/bin/sh
cd "${SERVICE_DIR:-{place}/app}" || exit 1
[ -e "{place}/does-not-start" ] && [ "$PWD" = "$(cat "{place}/does-not-start")" ] && exit 1
NAME=$1 sh ./service.sh > /dev/null 2>&1 &
echo $! > "{place}/pid.$1"
"""
SERVICE = """\
never=$(cat "{place}/never" 2>/dev/null)
if [ "$NAME" = sender ]; then
    for company in {companies}; do
        [ "$company" = "$never" ] || echo "company $company connection open" >> "{place}/service.log"
    done
    [ -e "{place}/burst" ] && cat "{place}/burst" >> "{place}/service.log"
fi
exec sleep 1000
"""
BOOT = '[ ! -e "{place}/does-not-boot" ] || [ "$USE_LEGACY_SUPABASE" != false ]\n'


def kill_at(number: int, *, module: str = "switch") -> str:
    """A patch: the run is killed at its so many-th word in the record, after it is written."""
    return f"""
import os, signal
import opsctl.operations.{module} as operation
real, written = operation.write_switch, []
def write(own_fd, record):
    real(own_fd, record)
    written.append(record)
    if len(written) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
operation.write_switch = write
"""


class Scene:
    """Two companies in a database and in the standby, two services that run on the database, a prepared fallback."""

    def __init__(self, fleet: Fleet, forking: Forks) -> None:
        self.fleet = fleet
        self.place = fleet.place
        self.forking = forking
        self.app, self.fallback = self.place / "app", self.place / "fallback"
        self.sessions = self.app / "baileys_sessions"
        self.env = {
            **fleet.env,
            "PATH": os.environ["PATH"],
            "HOME": str(self.place),
            "APP_DIR": str(self.app),
            "FALLBACK_DIR": str(self.fallback),
            "FALLBACK_DRY_BOOT_COMMAND": "sh boot.sh",
            "FALLBACK_INSTALL_COMMAND": "sh install.sh",
            "STANDBY_DIR": str(self.place / "standby"),
            "SERVICE_MANAGER": "command",
            "SERVICE_NAMES": ",".join(NAMES),
            "SERVICE_LOG": str(self.place / "service.log"),
            "CONNECT_TIMEOUT_SECONDS": "10",
            "CONNECT_WATCH_SECONDS": "0",
        }
        for name, text in (("status", STATUS), ("stop", STOP), ("start", START)):
            path = self.place / name
            path.write_text(text.replace("{place}", str(self.place)))
            path.chmod(0o755)
            self.env[f"SERVICE_{name.upper()}_COMMAND"] = str(path)

    def install(self) -> None:
        self.app.mkdir(exist_ok=True)
        companies = f"{FIRST} {SECOND}"
        for name, text in (("service.sh", SERVICE), ("boot.sh", BOOT)):
            (self.app / name).write_text(text.replace("{place}", str(self.place)).replace("{companies}", companies))
        (self.app / "package.json").write_text("{}")
        (self.app / "install.sh").write_text("mkdir -p node_modules/some\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "one")
        self.git("tag", TAG)
        (self.app / ".env").write_text("TOKEN=planted-token\nUSE_LEGACY_SUPABASE=true\n")
        self.start()
        assert self.run("standby", "sync").returncode == 0

    def git(self, *words: str | Path) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        return subprocess.run(
            ["git", *identity, *words], cwd=self.app, capture_output=True, text=True, check=True
        ).stdout

    def outage(self) -> None:
        self.env["DATABASE_URL"] = NOWHERE

    def start(self, folder: Path | None = None) -> None:
        for name in NAMES:
            subprocess.run(
                [self.place / "start", name],
                env={"PATH": self.env["PATH"], "SERVICE_DIR": str(folder or self.app)},
                check=True,
            )

    def stop(self) -> None:
        for name in NAMES:
            subprocess.run([self.place / "stop", name], check=False)

    def run(self, *words: str | Path, before: str = "", env: Mapping[str, str] | None = None) -> Finished:
        done = self.forking.run(*words, env={**self.env, **(env or {})}, before=before)
        said = done.stdout + done.stderr
        assert not [secret for secret in (*self.fleet.secrets, "planted-token") if secret in said]
        assert "Traceback" not in said
        assert "bug in opsctl" not in said
        return Finished(done.returncode, done.stdout, done.stderr)

    def switch(self, *words: str, before: str = "", env: Mapping[str, str] | None = None) -> Finished:
        return self.run("sessions", "restore", "--switch", "--yes", "--json", *words, before=before, env=env)

    def failback(self, *words: str, before: str = "") -> Finished:
        return self.run("sessions", "failback", "--yes", "--json", *words, before=before)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = self.run("switch", "status", "--json").json()
        return document

    def phase(self) -> str | None:
        record = read_switch(self.sessions)
        return None if record is None else str(record.phase)

    def runs_in(self) -> list[Path | None]:
        """Where each service's process works; None for one that does not run."""
        found: list[Path | None] = []
        for name in NAMES:
            folder = None
            with suppress(OSError, ValueError):
                folder = Path(f"/proc/{int((self.place / f'pid.{name}').read_text())}/cwd").readlink()
            found.append(folder)
        return found

    def pids(self) -> list[str]:
        return [path.read_text() for path in sorted(self.place.glob("pid.*"))]

    def kill(self) -> None:
        for pid in self.pids():
            with suppress(OSError, ValueError):
                os.kill(int(pid), signal.SIGKILL)

    def on_database(self) -> None:
        """The services run on the database, and no switch is on record."""
        assert self.runs_in() == [self.app, self.app]
        assert self.phase() is None
        assert self.status()["facts"]["owner"] == "database"

    def on_folders(self) -> None:
        """The services run the fallback code with the flags, and both companies have their folders."""
        assert self.runs_in() == [self.fallback, self.fallback]
        assert self.phase() == Phase.SWITCHED
        for name in NAMES:
            environ = (
                Path(f"/proc/{(self.place / f'pid.{name}').read_text().strip()}/environ").read_bytes().split(b"\0")
            )
            assert {f"{flag}={value}".encode() for flag, value in FLAGS.items()} <= set(environ)
        assert {p.name for p in self.sessions.iterdir()} >= {f"company_{FIRST}", f"company_{SECOND}"}
        status = self.run("switch", "status", "--json")
        assert (status.returncode, status.json()["facts"]["owner"]) == (0, "folders")


@pytest.fixture
def unprepared(fleet: Fleet, forking: Forks) -> Iterator[Scene]:
    scene = Scene(fleet, forking)
    scene.install()
    yield scene
    scene.kill()


@pytest.fixture
def scene(unprepared: Scene) -> Scene:
    done = unprepared.run("switch", "prepare")
    assert done.returncode == 0, done
    return unprepared


# --- there and back ---------------------------------------------------------------------------------------------------


def test_with_the_database_gone_the_services_run_on_the_standbys_folders_until_they_are_brought_back(
    scene: Scene,
) -> None:
    url = scene.env["DATABASE_URL"]
    scene.outage()
    triage = scene.run("triage", "--json", env={"WHATSAPP_ADDRESS": "none"}).json()
    assert triage["next"] == ["opsctl sessions restore --switch"]
    done = scene.switch()
    assert done.returncode == 0, done
    document = done.json()
    assert [(row["company"], row["source"].split()[0]) for row in document["rows"]] == [
        (FIRST, "standby"),
        (SECOND, "standby"),
    ]
    assert (document["rto"]["scope"], document["rto"]["met"]) == ("connected", True)
    scene.on_folders()
    assert (scene.fallback / ".env").read_text().startswith("TOKEN=planted-token\nUSE_LEGACY_SUPABASE=false\n")
    assert (scene.app / ".env").read_text() == "TOKEN=planted-token\nUSE_LEGACY_SUPABASE=true\n"
    # A second time it only looks whether all is well.
    pids = scene.pids()
    again = scene.switch()
    assert again.returncode == 0, again
    assert "nothing was restored again" in " ".join(again.json()["notes"])
    assert scene.pids() == pids

    refused = scene.failback()  # the database is still gone
    assert refused.returncode == 4, refused
    scene.on_folders()
    assert scene.pids() == pids
    scene.env["DATABASE_URL"] = url
    session = next((scene.sessions / f"company_{FIRST}").glob("session-*.json"))
    session.write_text(session.read_text().replace('"version":"v1"', '"version":"v2"'))
    back = scene.failback()
    assert back.returncode == 0, back
    assert [row["result"] for row in back.json()["rows"]] == ["brought back", "brought back"]
    scene.on_database()
    assert scene.run("sessions", "verify", "--against", "database").returncode == 0


# --- nothing is changed -----------------------------------------------------------------------------------------------


def no_tag(scene: Scene) -> None:
    scene.git("tag", "--delete", TAG)


def other_tag(scene: Scene) -> None:
    scene.git("commit", "--quiet", "--allow-empty", "-m", "two")
    scene.git("tag", "--force", TAG)


def first_tag(scene: Scene) -> None:
    scene.git("tag", "--force", TAG, scene.git("rev-list", "--max-parents=0", "HEAD").strip())


def no_dependencies(scene: Scene) -> None:
    shutil.rmtree(scene.fallback / "node_modules")


def changed_code(scene: Scene) -> None:
    (scene.fallback / "service.sh").write_text("exit 1\n")


def code_of_the_tag(scene: Scene) -> None:
    scene.git("-C", scene.fallback, "checkout", "--quiet", ".")


def linked_env_file(scene: Scene) -> None:
    (scene.fallback / ".env").rename(scene.place / "elsewhere")
    (scene.fallback / ".env").symlink_to(scene.place / "elsewhere")


def own_env_file(scene: Scene) -> None:
    (scene.place / "elsewhere").rename(scene.fallback / ".env")


def no_boot(scene: Scene) -> None:
    (scene.place / "does-not-boot").touch()


def boot(scene: Scene) -> None:
    (scene.place / "does-not-boot").unlink()


def no_link(scene: Scene) -> None:
    (scene.fallback / "baileys_sessions").unlink()
    (scene.fallback / "baileys_sessions").mkdir()


def no_source(scene: Scene) -> None:
    (scene.place / "standby").rename(scene.place / "away")


def source(scene: Scene) -> None:
    (scene.place / "away").rename(scene.place / "standby")


def no_service(scene: Scene) -> None:
    (scene.place / "status").rename(scene.place / "status.away")
    (scene.place / "status").write_text("#!/bin/sh\nexit 4\n")
    (scene.place / "status").chmod(0o755)


def service(scene: Scene) -> None:
    (scene.place / "status.away").rename(scene.place / "status")


def no_worktree(scene: Scene) -> None:
    shutil.rmtree(scene.fallback)


def prepared(scene: Scene) -> None:
    done = scene.run("switch", "prepare")
    assert done.returncode == 0, done


def test_what_is_missing_is_found_before_anything_is_changed(scene: Scene) -> None:
    scene.outage()
    pids = scene.pids()
    for break_it, mend, sentence, hint in (
        (no_tag, first_tag, f"the tag {TAG} does not exist", "fetch --tags"),
        (other_tag, first_tag, f"is not at the tag {TAG}", "opsctl switch prepare"),
        (no_dependencies, prepared, "the dependencies in", "opsctl switch prepare"),
        (changed_code, code_of_the_tag, "files of the tag are changed in", "status"),
        (linked_env_file, own_env_file, ".env: Too many levels of symbolic links", "ls -l"),
        (no_boot, boot, "the fallback code does not start with USE_REPOSITORY_PATTERN=false", "sh boot.sh"),
        (no_link, prepared, "baileys_sessions does not lead to", "opsctl switch prepare"),
        (no_source, source, "no source can be used, so no service is touched", "opsctl triage"),
        (no_service, service, "sender: ", "opsctl config show"),
        (no_worktree, prepared, "fallback does not exist", "opsctl switch prepare"),
    ):
        break_it(scene)
        before = everything(scene)
        done = scene.switch()
        assert done.returncode == (4 if break_it is no_source else 5), (break_it, done)
        assert sentence in done.json()["error"]["message"], break_it
        assert hint in done.json()["error"]["hint"]
        assert everything(scene) == before
        preview = scene.run("sessions", "restore", "--switch", "--dry-run")
        assert preview.returncode == done.returncode
        assert sentence in preview.stderr
        mend(scene)
    done = scene.run("sessions", "restore", "--switch", "--dry-run")  # all is mended
    assert done.returncode == 0, done
    assert "sender, receiver would be stopped, moved from" in done.stdout
    assert (scene.pids(), scene.phase()) == (pids, None)


def everything(scene: Scene) -> dict[str, bytes | str]:
    """All that lies below the place but opsctl's own state, and links by where they lead."""
    found: dict[str, bytes | str] = {}
    for path in scene.place.rglob("*"):
        name = str(path.relative_to(scene.place))
        if not name.startswith("state"):
            found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


def test_one_company_is_not_switched_while_the_services_hold_more(scene: Scene) -> None:
    done = scene.switch("--company", FIRST)
    assert done.returncode == 5, done
    assert f"the services hold every company, also '{SECOND}'" in done.json()["error"]["message"]
    scene.on_database()


def test_a_folder_in_the_way_is_refused_and_everything_is_undone(scene: Scene) -> None:
    (scene.sessions / f"company_{FIRST}").mkdir(parents=True)
    (scene.sessions / f"company_{FIRST}" / "creds.json").write_text("{}")
    done = scene.switch()
    assert done.returncode == 5, done
    assert "everything is as it was, and on the database: sender, receiver" in done.json()["error"]["message"]
    scene.on_database()
    assert (scene.sessions / f"company_{FIRST}" / "creds.json").read_text() == "{}"
    assert not (scene.sessions / f"company_{SECOND}").exists()


def test_a_service_that_does_not_stop_is_left_running_on_the_database(scene: Scene) -> None:
    (scene.place / "does-not-stop").touch()
    done = scene.switch()
    assert done.returncode == 5, done
    assert "stopping the services: not stopped: sender is running" in done.json()["error"]["message"]
    scene.on_database()


def test_only_the_services_that_ran_are_started_again(scene: Scene) -> None:
    subprocess.run([scene.place / "stop", "receiver"], check=True)
    (scene.sessions / f"company_{FIRST}").mkdir(parents=True)
    (scene.sessions / f"company_{FIRST}" / "creds.json").write_text("{}")
    assert scene.switch().returncode == 5
    assert scene.runs_in() == [scene.app, None]


@pytest.mark.parametrize("missing", ["program", "processes"])
def test_a_pm2_that_is_missing_or_somebody_elses_proves_nothing(scene: Scene, missing: str) -> None:
    with pm2() as manager:
        path = manager.path if missing == "processes" else "/usr/bin:/bin"
        done = scene.switch(env={**manager.settings, "PATH": path})
    assert done.returncode == 5, done
    expected = "has no processes at all: is it the right one?" if missing == "processes" else "pm2 is not found on PATH"
    assert expected in done.json()["error"]["message"]
    scene.on_database()


def test_an_undo_that_fails_says_so_and_the_next_run_goes_on(scene: Scene) -> None:
    scene.outage()
    (scene.place / "does-not-start").write_text(str(scene.app))
    broken = "import opsctl.operations.switch as s\ndef no(*_): raise s.Refused('no')\ns.env_file.set_variables = no\n"
    done = scene.switch(before=broken)
    assert done.returncode == 6, done
    message = done.json()["error"]["message"]
    assert "setting the flags: no; and it could not be undone: stopping the services: not started" in message
    assert "The sessions belong to the database, and the services are stopped" in message
    assert scene.runs_in() == [None, None]
    status = scene.run("switch", "status", "--json")
    assert status.returncode == 1
    assert status.json()["next"][0].startswith("opsctl sessions restore --switch")
    assert scene.switch().returncode == 0
    scene.on_folders()


# --- after the start --------------------------------------------------------------------------------------------------


def test_services_that_do_not_come_up_are_on_the_side_of_the_folders_and_started_by_the_same_line(scene: Scene) -> None:
    (scene.place / "does-not-start").write_text(str(scene.fallback))
    done = scene.switch()
    assert done.returncode == 6, done
    document = done.json()
    assert "not started: sender is stopped" in document["error"]["message"]
    assert "the sessions belong to the folders now" in document["error"]["message"]
    assert document["rto"]["met"] is False
    status = scene.run("switch", "status", "--json")
    assert (status.returncode, status.json()["facts"]["owner"]) == (1, "folders")
    (scene.place / "does-not-start").unlink()
    assert scene.switch().returncode == 0
    scene.on_folders()


def test_a_company_that_never_connects_is_named_and_nothing_is_undone(scene: Scene) -> None:
    (scene.place / "never").write_text(SECOND)
    done = scene.switch(env={"CONNECT_TIMEOUT_SECONDS": "1"})
    assert done.returncode == 6, done
    document = done.json()
    assert document["error"]["kind"] == "not-connected"
    assert f"1 companies have not connected: '{SECOND}'" in document["error"]["message"]
    assert {row["company"]: row["connected_s"] is not None for row in document["rows"]} == {FIRST: True, SECOND: False}
    assert (document["rto"]["scope"], document["rto"]["met"]) == ("connected", False)
    scene.on_folders()
    with (scene.place / "service.log").open("a") as log:
        log.write(f'{{"level":30,"company":"{SECOND}","msg":"opened connection to WA"}}\n')
    assert scene.switch().returncode == 0


def test_messages_that_cannot_be_decrypted_are_told_and_nothing_is_undone(scene: Scene) -> None:
    (scene.place / "burst").write_text(f"{FIRST}: failed to decrypt: Bad MAC\n" * 5)
    done = scene.switch(env={"CONNECT_WATCH_SECONDS": "1"})
    assert done.returncode == 1, done
    assert done.json()["error"]["kind"] == "undecryptable"
    assert f"{FIRST}: 5" in done.json()["error"]["message"]
    scene.on_folders()


def test_an_address_can_tell_what_the_log_does_not(scene: Scene) -> None:
    (scene.place / "never").write_text(SECOND)
    asked: list[str] = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if asked.count(self.path) > 1 else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = scene.switch(env={"CONNECTED_ADDRESS": f"http://127.0.0.1:{server.server_port}/{{company}}"})
        server.shutdown()
    assert done.returncode == 0, done
    assert set(asked) == {f"/{FIRST}", f"/{SECOND}"}


def test_without_a_restart_everything_is_ready_and_a_person_starts_it(scene: Scene) -> None:
    done = scene.switch("--skip-restart")
    assert done.returncode == 0, done
    assert done.json()["rto"]["met"] is None
    assert scene.runs_in() == [None, None]
    assert scene.phase() == Phase.READY
    assert done.json()["next"][0] == f"{scene.place}/start sender"
    assert scene.switch("--skip-restart").returncode == 5
    assert scene.switch().returncode == 0
    scene.on_folders()


def test_a_service_that_somebody_started_on_the_database_again_is_found(scene: Scene) -> None:
    assert scene.switch().returncode == 0
    scene.stop()
    scene.start()
    status = scene.run("switch", "status", "--json")
    assert status.returncode == 1
    assert (
        "sender, receiver runs on PostgreSQL, while the folders own the sessions" in status.json()["error"]["message"]
    )
    assert status.json()["next"][0] == f"{scene.place}/stop sender"
    done = scene.switch()
    assert done.returncode == 5, done
    assert "while the folders own the sessions: stop it" in done.json()["error"]["message"]
    scene.stop()
    assert scene.switch().returncode == 0
    scene.on_folders()


# --- killed, stopped, at the same time --------------------------------------------------------------------------------


def test_killed_after_each_word_in_the_record_the_same_line_goes_on_to_the_end(scene: Scene) -> None:
    scene.outage()
    phases = []
    for number in (*range(1, 12), 1, 2):  # the last two go on after everything was in place
        done = scene.switch(before=kill_at(number))
        assert done.returncode == -signal.SIGKILL, done
        phases.append(scene.phase())
        if phases[-1] == Phase.SWITCHED:
            break
        folders = {path for path in scene.runs_in() if path}
        assert folders <= {scene.app}, (phases, folders)  # never between
        assert scene.status()["facts"]["owner"] == (
            "folders" if phases[-1] in {Phase.READY, Phase.STARTING} else "database"
        )
    assert [phase for phase in Phase if phase in phases] == list(Phase)[:8]
    assert scene.switch().returncode == 0
    scene.on_folders()


@pytest.mark.parametrize("number", [1, 3, 6, 8, 10])
def test_killed_before_the_start_failback_undoes_it(scene: Scene, number: int) -> None:
    scene.outage()
    assert scene.switch(before=kill_at(number)).returncode == -signal.SIGKILL
    done = scene.failback()
    assert done.returncode == 0, done
    assert "is undone; on the database as before: sender, receiver" in done.json()["summary"]
    scene.on_database()
    assert not [path for path in scene.sessions.iterdir() if path.name.startswith("company_")]


def test_killed_and_with_nothing_left_to_restore_from_the_rerun_undoes_it(scene: Scene) -> None:
    scene.outage()
    assert scene.switch(before=kill_at(9)).returncode == -signal.SIGKILL
    no_source(scene)
    done = scene.switch()
    assert done.returncode == 5, done
    assert "no source can be used" in done.json()["error"]["message"]
    scene.on_database()


def test_stopped_by_a_signal_before_the_start_it_is_undone(scene: Scene) -> None:
    scene.outage()
    stopped = kill_at(8).replace("SIGKILL", "SIGTERM")
    done = scene.switch(before=stopped)
    assert done.returncode == 143, done
    scene.on_database()


def test_a_second_shell_is_told_who_works(scene: Scene) -> None:
    scene.outage()
    waiting = (
        "import opsctl.operations.switch as s, time, pathlib\nreal = s.services.stop\n"
        f"s.services.stop = lambda m: (pathlib.Path({str(scene.place / 'in')!r}).touch(), time.sleep(2), real(m))[2]"
    )
    results: list[Finished] = []
    first = threading.Thread(target=lambda: results.append(scene.switch(before=waiting)))
    first.start()
    while not (scene.place / "in").exists():
        time.sleep(0.01)
    second = scene.switch()
    looked = scene.status()
    early = scene.run("standby", "sync")
    cleanup = scene.run("keys", "cleanup", "--yes")
    first.join()
    assert second.returncode == 75, second
    assert "another run works on" in second.json()["error"]["message"]
    assert (looked["exit_code"], "somebody works on it" in looked["error"]["message"]) == (1, True)
    assert early.returncode == 75, early
    assert "a switch is under way" in early.stderr
    assert cleanup.returncode == 5, cleanup
    assert results[0].returncode == 0, results
    scene.on_folders()


# --- the way back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def switched(scene: Scene) -> Scene:
    assert scene.switch().returncode == 0
    session = next((scene.sessions / f"company_{FIRST}").glob("session-*.json"))
    session.write_text(session.read_text().replace('"version":"v1"', '"version":"v2"'))
    return scene


def test_killed_anywhere_on_the_way_back_the_same_line_ends_it(switched: Scene) -> None:
    seen = []
    for number in (1, 2, 1):  # the last one goes on after the rows were back
        done = switched.failback(before=kill_at(number, module="switch_back"))
        assert done.returncode == -signal.SIGKILL, done
        seen.append(switched.phase())
        status = switched.status()
        assert status["exit_code"] == 1
        assert status["facts"]["owner"] == ("folders" if seen[-1] == Phase.RETURNING else "database")
    assert seen == [Phase.RETURNING, Phase.RETURNED, Phase.LEAVING]
    done = switched.failback()
    assert done.returncode == 0, done
    switched.on_database()
    assert switched.run("sessions", "verify", "--against", "database").returncode == 0


AFTER_THE_START = """
import os, signal
import opsctl.operations.switch_back as operation
operation.clear_switch = lambda _: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_after_the_start_on_the_database_the_same_line_only_looks_whether_all_is_well(switched: Scene) -> None:
    assert switched.failback(before=AFTER_THE_START).returncode == -signal.SIGKILL
    assert (switched.phase(), switched.runs_in()) == (Phase.LEAVING, [switched.app, switched.app])
    pids = switched.pids()
    done = switched.failback()
    assert done.returncode == 0, done
    assert switched.pids() == pids
    switched.on_database()


BEFORE_THE_WORD = """
import os, signal
import opsctl.operations.switch_back as operation
real = operation.write_switch
def write(own_fd, record):
    if record.phase == operation.Phase.RETURNED:
        os.kill(os.getpid(), signal.SIGKILL)
    real(own_fd, record)
operation.write_switch = write
"""


def test_rows_that_are_back_and_folders_that_live_on_are_brought_back_again(switched: Scene) -> None:
    assert switched.failback(before=BEFORE_THE_WORD).returncode == -signal.SIGKILL
    assert switched.phase() == Phase.RETURNING
    assert switched.switch().returncode == 0
    switched.on_folders()
    session = next((switched.sessions / f"company_{FIRST}").glob("session-*.json"))
    session.write_text(session.read_text().replace('"version":"v2"', '"version":"v3"'))
    time.sleep(0.01)
    done = switched.failback()
    assert done.returncode == 0, done
    switched.on_database()
    assert switched.run("sessions", "verify", "--against", "database").returncode == 0


IN_THE_MIDDLE_OF_ROWS = """
import os, signal
import opsctl.operations.failback as failback
real, companies = failback.check_rows, []
def check(*words):
    real(*words)
    companies.append(1)
    if len(companies) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)  # written and read back, and not yet committed
failback.check_rows = check
"""


def test_killed_in_the_middle_of_a_failback_the_database_has_whole_companies_and_a_rerun_ends_it(
    switched: Scene,
) -> None:
    for company in (FIRST, SECOND):
        for path in (switched.sessions / f"company_{company}").glob("session-*.json"):
            path.write_text(path.read_text().replace('"version":"v1"', '"version":"v2"'))
    rows = "SELECT company_id, count(*) FROM whatsapp_keys WHERE value->>'version' = 'v2' GROUP BY 1"
    sessions = {c: len(list((switched.sessions / f"company_{c}").glob("session-*.json"))) for c in (FIRST, SECOND)}
    seen = []
    for number in (1, 2):
        killed = switched.failback(before=IN_THE_MIDDLE_OF_ROWS.replace("{number}", str(number)))
        assert killed.returncode == -signal.SIGKILL, killed
        seen.append(dict(switched.fleet.database.execute(rows)))
    assert seen == [{}, {FIRST: sessions[FIRST]}]
    done = switched.failback()
    assert done.returncode == 0, done
    assert dict(switched.fleet.database.execute(rows)) == sessions
    switched.on_database()


def test_killed_on_the_way_back_before_the_rows_are_back_the_services_can_go_on_on_the_folders(switched: Scene) -> None:
    assert switched.failback(before=kill_at(1, module="switch_back")).returncode == -signal.SIGKILL
    assert switched.switch().returncode == 0
    switched.on_folders()


def test_a_conflict_is_told_before_any_service_is_stopped(switched: Scene) -> None:
    pids = switched.pids()
    switched.fleet.database.execute(
        "UPDATE whatsapp_keys SET value = value || '{\"other\": 1}', updated_at = now() + interval '1 hour' "
        "WHERE company_id = %s AND key_type = 'session'",
        [FIRST],
    )
    done = switched.failback()
    assert done.returncode == 5, done
    assert switched.pids() == pids
    switched.on_folders()


def test_where_rows_cannot_be_written_the_services_go_on_on_the_folders(switched: Scene) -> None:
    broken = "import opsctl.operations.failback as f\ndef no(*_): raise f.Refused('not today')\nf._write = no\n"
    done = switched.failback(before=broken)
    assert done.returncode == 6, done  # the other company had nothing to be written
    assert "not today" in done.json()["error"]["message"]
    assert "the services run on them" in " ".join(done.json()["notes"])
    switched.on_folders()
    assert switched.failback().returncode == 0
    switched.on_database()


def test_services_that_do_not_start_on_the_database_are_told_and_the_rows_are_back(switched: Scene) -> None:
    (switched.place / "does-not-start").write_text(str(switched.app))
    done = switched.failback()
    assert done.returncode == 6, done
    assert "the rows are back, and PostgreSQL owns the sessions" in done.json()["summary"]
    (switched.place / "does-not-start").unlink()
    assert switched.failback().returncode == 0
    switched.on_database()


def test_a_company_that_does_not_connect_on_the_database_is_named(switched: Scene) -> None:
    (switched.place / "never").write_text(SECOND)
    switched.env["CONNECT_TIMEOUT_SECONDS"] = "1"
    done = switched.failback()
    assert done.returncode == 6, done
    assert f"1 companies have not connected: '{SECOND}'" in done.json()["error"]["message"]
    switched.on_database()


def test_where_what_the_services_were_is_lost_a_person_starts_them_and_the_same_line_ends_it(switched: Scene) -> None:
    (switched.sessions / ".opsctl" / "switch-before.json").unlink()
    done = switched.failback()
    assert done.returncode == 6, done
    assert "not known any more" in done.json()["error"]["message"]
    switched.start()
    assert switched.failback().returncode == 0
    switched.on_database()


def test_folders_that_a_service_runs_on_are_not_exchanged_under_it(switched: Scene) -> None:
    for words in (("--yes",), ("--dry-run",), ("--yes", "--discard-changes")):
        done = switched.run("sessions", "undo", *words)
        assert done.returncode == 5, done
        assert "are those of a switch" in done.stderr
    switched.on_folders()


def test_one_company_alone_is_not_brought_back_while_the_services_hold_all(switched: Scene) -> None:
    done = switched.failback("--company", FIRST)
    assert done.returncode == 5, done
    assert "the services hold every company" in done.json()["error"]["message"]
    switched.on_folders()


# --- preparing --------------------------------------------------------------------------------------------------------


def results(done: Finished) -> dict[str, str]:
    return {row["part"]: row["result"] for row in done.json()["rows"]}


def test_prepare_makes_what_is_missing_and_nothing_twice(unprepared: Scene) -> None:
    head = unprepared.git("rev-parse", "HEAD")
    before = everything(unprepared)
    shown = unprepared.run("switch", "prepare", "--dry-run", "--json")
    assert everything(unprepared) == before
    assert shown.returncode == 0, shown
    assert set(results(shown).values()) == {"ready", "would be made"}
    assert set(results(unprepared.run("switch", "prepare", "--json")).values()) == {"ready", "made"}
    again = unprepared.run("switch", "prepare", "--json")
    assert set(results(again).values()) == {"ready"}
    assert (unprepared.fallback / ".env").stat().st_mode & 0o777 == 0o600
    assert (unprepared.fallback / "baileys_sessions").readlink() == unprepared.sessions
    assert unprepared.git("rev-parse", "HEAD") == head
    # The tag moved: the worktree follows, with its own dependencies again.
    other_tag(unprepared)
    moved = results(unprepared.run("switch", "prepare", "--json"))
    assert (moved["worktree"], moved["dependencies"], moved["env file"]) == ("made", "made", "ready")
    # What was lost is made again, and a line that the service's file has and the fallback's lacks is named.
    shutil.rmtree(unprepared.fallback / "node_modules")
    (unprepared.fallback / ".env").write_text("USE_LEGACY_SUPABASE=true\n")
    mended = unprepared.run("switch", "prepare", "--json")
    assert (results(mended)["dependencies"], results(mended)["env file"]) == ("made", "made")
    assert "sets 'TOKEN'" in mended.json()["warnings"][0]
    shutil.rmtree(unprepared.fallback)
    assert results(unprepared.run("switch", "prepare", "--json"))["worktree"] == "made"


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (no_tag, "does not exist"),
        (no_boot, "does not start with"),
        (
            lambda s: (
                (s.app / "package.json").unlink()
                or s.git("commit", "-aqm", "x")
                or (s.fallback.mkdir(), (s.fallback / "x").touch())
            ),
            "is no git worktree",
        ),
    ],
    ids=["no tag", "no boot", "something in the way"],
)
def test_prepare_says_what_stands_in_its_way(unprepared: Scene, break_it: Any, sentence: str) -> None:
    break_it(unprepared)
    done = unprepared.run("switch", "prepare", "--json")
    assert done.returncode == 5, done
    assert sentence in done.json()["error"]["message"]


@needs.root()
def test_root_prepares_for_the_services_user_in_a_place_that_only_root_may_write(unprepared: Scene) -> None:
    for path in [unprepared.app, *unprepared.app.rglob("*")]:
        shutil.chown(path, "nobody")
    done = unprepared.run("switch", "prepare", "--json")
    assert done.returncode == 0, done
    owner = unprepared.app.stat().st_uid
    found = {path: path.lstat().st_uid for path in unprepared.fallback.iterdir()}
    assert {path.name for path, uid in found.items() if uid != owner} <= {"baileys_sessions"}  # a link
    assert (unprepared.fallback / ".env").stat().st_mode & 0o777 == 0o600
    done = unprepared.switch()
    assert done.returncode == 0, done
    unprepared.on_folders()
    assert {path.stat().st_uid for path in unprepared.sessions.rglob("creds.json")} == {owner}


def test_each_setting_of_the_fallback_code_counts(unprepared: Scene) -> None:
    unprepared.git("tag", "another-tag")
    (unprepared.app / ".env.production").write_text("USE_X=on # of the service\n")
    unprepared.env |= {
        "EMERGENCY_TAG": "another-tag",
        "SERVICE_ENV_FILE": ".env.production",
        "SWITCH_FLAGS": "USE_X=off, USE_Y=no",
        "FALLBACK_DRY_BOOT_COMMAND": "sleep 600",  # what still runs then has started
        "FALLBACK_DRY_BOOT_SECONDS": "1",
    }
    unprepared.git("tag", "--delete", TAG)
    started = time.monotonic()
    done = unprepared.run("switch", "prepare", "--json")
    assert done.returncode == 0, done
    assert 1 <= time.monotonic() - started < 10
    assert (unprepared.fallback / ".env.production").read_text() == "USE_X=off # of the service\nUSE_Y=no\n"
    assert unprepared.switch().returncode == 0
    environ = Path(f"/proc/{(unprepared.place / 'pid.sender').read_text().strip()}/environ").read_bytes()
    assert {b"USE_X=off", b"USE_Y=no"} <= set(environ.split(b"\0"))
    assert unprepared.status()["rows"][0]["flags"] == {"USE_X": "off", "USE_Y": "no"}


def test_prepare_says_when_dependencies_cannot_be_installed(unprepared: Scene) -> None:
    done = unprepared.run("switch", "prepare", "--json", env={"FALLBACK_INSTALL_COMMAND": "false"})
    assert done.returncode == 5, done
    assert "false ended with 1" in done.json()["error"]["message"]
    assert unprepared.switch().returncode == 5


def test_prepare_leaves_the_fallback_code_alone_while_it_is_in_use(switched: Scene) -> None:
    done = switched.run("switch", "prepare")
    assert done.returncode == 5, done
    assert "the fallback code is in use" in done.stderr


@pytest.mark.parametrize(
    ("words", "env", "code", "sentence"),
    [
        (("--skip-restart",), {}, 2, "--skip-restart is of --switch"),
        (("--switch", "--yes", "--to", "/elsewhere"), {}, 2, "the service reads"),
        (("--switch", "--yes"), {"SERVICE_MANAGER": "none"}, 3, "SERVICE_MANAGER is none"),
        (("--switch", "--yes"), {"FALLBACK_DIR": ""}, 3, "FALLBACK_DIR is not set"),
        (("--switch", "--yes"), {"FALLBACK_DRY_BOOT_COMMAND": ""}, 3, "FALLBACK_DRY_BOOT_COMMAND is not set"),
        (("--switch",), {}, 2, "this asks before it acts"),
    ],
)
def test_a_line_that_makes_no_sense_is_said_to(
    unprepared: Scene, words: tuple[str, ...], env: dict[str, str], code: int, sentence: str
) -> None:
    done = unprepared.run("sessions", "restore", *words, env=env)
    assert done.returncode == code, done
    assert sentence in done.stderr


def test_a_plain_restore_wants_the_services_proven_stopped(unprepared: Scene) -> None:
    refused = unprepared.run("sessions", "restore", "--service-stopped")
    assert refused.returncode == 5, refused
    assert "the service is not proven stopped: sender is running" in refused.stderr
    accepted = unprepared.run("sessions", "restore", "--accept-live-service", "--json")
    assert (accepted.returncode, accepted.json()["facts"]["service_stopped"]) == (0, "unknown")
    unprepared.stop()
    proven = unprepared.run("sessions", "restore", "--json")
    assert (proven.returncode, proven.json()["facts"]["service_stopped"]) == (0, "proven")
