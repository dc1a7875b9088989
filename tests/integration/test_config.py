"""`opsctl config`: what is set, and every finding about an installation, as an operator sees them."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsctl.settings import VARIABLES
from tests import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunOpsctl

SECRET = "hunter2-s3cr3t"
REPOSITORY = Path(__file__).parents[2]


class Installation:
    """A machine on which a restore could begin; a test then spoils one thing."""

    def __init__(self, folder: Path, run_opsctl: RunOpsctl) -> None:
        self.run_opsctl = run_opsctl
        self.folder = folder / "app"
        self.sessions = self.folder / "baileys_sessions"
        self.sessions.mkdir(parents=True, mode=0o700)
        self.env_file = folder / "settings.env"
        self.env_file.write_text("")
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.env = {
            "APP_DIR": str(self.folder),
            "DATABASE_URL": f"postgresql://user:{SECRET}@db.example.com/whatsapp",
            "SENTRY_DSN": "http://key@127.0.0.1:9/1",
            "HEALTHCHECK_URL": "http://127.0.0.1:9/ping/{job}",
            "PATH": f"{self.programs}:/usr/bin:/bin",
        }
        self.crontab("echo '0 3 * * * opsctl drill run'")

    def crontab(self, script: str) -> None:
        """What the program `crontab` does here: the real one would read the crontabs of whoever runs the tests."""
        program = self.programs / "crontab"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def check(self) -> dict[str, Any]:
        done = self.run_opsctl("config", "check", "--json", "--env-file", self.env_file, env=self.env)
        assert SECRET not in done.stdout + done.stderr
        document: dict[str, Any] = done.json()
        verdicts = {row["verdict"] for row in document["rows"]}
        assert done.returncode == document["exit_code"] == (1 if "failed" in verdicts else 0)
        assert document["outcome"] == next(v for v in ("failed", "warning", "ok") if v in verdicts)
        return document

    def finding(self, check: str) -> tuple[str, str, str | None]:
        """Verdict, what was seen, what to do; every other check is as well as it was."""
        (row,) = (row for row in self.check()["rows"] if row["check"] == check)
        return row["verdict"], row["seen"], row["action"]

    def rows_inside(self, *before: str) -> dict[str, tuple[str, str]]:
        """Check and verdict with what was seen, in a process that `before` starts."""
        words = [*before, sys.executable, "-m", "opsctl", "config", "check", "--json"]
        env = {**self.env, "PYTHONPATH": str(REPOSITORY), "HOME": str(self.folder)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        return {row["check"]: (row["verdict"], row["seen"]) for row in json.loads(done.stdout)["rows"]}


@pytest.fixture
def installation(run_opsctl: RunOpsctl) -> Iterator[Installation]:
    # Not in pytest's folder, which keeps every other user out.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield Installation(folder, run_opsctl)


# show


def test_show_names_every_variable_with_its_value_and_origin(tmp_path: Path, run_opsctl: RunOpsctl) -> None:
    env_file = tmp_path / "here.env"
    env_file.write_text("POSTGRES_HOST=db.example.com\n")
    done = run_opsctl("config", "show", "--json", "--env-file", env_file, env={"RTO_TARGET_SECONDS": "300"})
    rows = {row["variable"]: (row["value"], row["origin"]) for row in done.json()["rows"]}
    assert list(rows) == [variable.name for variable in VARIABLES]
    assert rows["RTO_TARGET_SECONDS"] == ("300", "environment")
    assert rows["POSTGRES_HOST"] == ("db.example.com", str(env_file))
    assert rows["POSTGRES_PORT"] == ("5432", "default")
    assert done.returncode == 0


def test_show_prints_meanings_with_verbose_only(run_opsctl: RunOpsctl) -> None:
    assert "Recovery time objective" not in run_opsctl("config", "show").stdout
    assert "Recovery time objective" in run_opsctl("config", "show", "--verbose").stdout


def test_show_masks_secrets(run_opsctl: RunOpsctl) -> None:
    env = {"DATABASE_URL": SECRET, "POSTGRES_PASSWORD": SECRET, "SENTRY_DSN": f"https://{SECRET}@sentry.example.com/1"}
    for flags in ((), ("--json",), ("--verbose",)):
        done = run_opsctl("config", "show", *flags, env=env)
        assert done.stdout.count("********") == 3
        assert SECRET not in done.stdout + done.stderr


def test_show_shows_all_and_ends_with_3_where_something_makes_no_sense(run_opsctl: RunOpsctl) -> None:
    env = {"RTO_TARGET_SECONDS": "ten", "POSTGRES_PORT": "0", "SENTRY_DSN": SECRET}
    done = run_opsctl("config", "show", env=env)
    assert done.returncode == 3
    for problem in ("('ten') is not a whole number", "('0') is not between", "SENTRY_DSN is not an http(s) address"):
        assert problem in done.stderr
        assert problem in " ".join(done.stdout.split())
    assert SECRET not in done.stdout + done.stderr
    rows = run_opsctl("config", "show", "--json", env=env).json()["rows"]
    assert [row["variable"] for row in rows if row["problem"]] == ["POSTGRES_PORT", "RTO_TARGET_SECONDS", "SENTRY_DSN"]


def test_show_of_a_file_that_is_missing_is_3(run_opsctl: RunOpsctl) -> None:
    assert run_opsctl("config", "show", "--env-file", "nowhere.env").returncode == 3


# check


def test_a_sound_installation_is_0_and_says_what_was_seen(installation: Installation) -> None:
    document = installation.check()
    assert {row["verdict"] for row in document["rows"]} <= {"ok", "warning"}
    assert [row["check"] for row in document["rows"] if row["verdict"] != "ok"] in ([], ["free space"])
    seen = {row["check"]: row["seen"] for row in document["rows"]}
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert seen["database address"] == "db.example.com:5432/whatsapp (not connected to)"
    assert seen["service user"] == f"{me} (uid {os.geteuid()}), who owns {installation.folder}"
    assert seen["sessions folder"] == f"{installation.sessions} of {me} (0700)"


def test_quiet_is_one_line_where_something_failed(installation: Installation) -> None:
    del installation.env["DATABASE_URL"]
    done = installation.run_opsctl("config", "check", "--quiet", env=installation.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "opsctl config check: 1 of 13 checks failed: database address "
        "(set DATABASE_URL or POSTGRES_HOST and POSTGRES_DATABASE)\n"
    )


def test_a_setting_that_makes_no_sense_fails(installation: Installation) -> None:
    installation.env["RTO_TARGET_SECONDS"] = "ten"
    verdict, seen, action = installation.finding("settings")
    assert (verdict, action) == ("failed", "opsctl config show")
    assert seen == "RTO_TARGET_SECONDS ('ten') is not a whole number"


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, "ok"), (0o640, "ok"), (0o644, "failed"), (0o604, "failed")])
def test_a_settings_file_with_secrets_is_not_for_everybody(installation: Installation, mode: int, verdict: str) -> None:
    installation.env_file.write_text(f"POSTGRES_PASSWORD={SECRET}\n")
    installation.env_file.chmod(mode)
    assert installation.finding("settings file")[0] == verdict


def test_a_settings_file_without_secrets_may_be_read_by_everybody(installation: Installation) -> None:
    installation.env_file.write_text("POSTGRES_HOST=db.example.com\n")
    installation.env_file.chmod(0o644)
    assert installation.finding("settings file")[0] == "ok"


def test_without_app_dir_the_service_user_is_a_guess(installation: Installation) -> None:
    installation.env["SESSIONS_DIR"] = str(installation.sessions)
    del installation.env["APP_DIR"]
    assert installation.finding("service user")[::2] == ("warning", "set APP_DIR")


def test_an_app_dir_that_is_not_there_fails(installation: Installation) -> None:
    installation.env["APP_DIR"] = "/nowhere/app"
    assert installation.finding("service user")[0] == "failed"


@needs.namespace("user")
def test_a_user_who_cannot_give_files_to_the_service_is_told_who_can(installation: Installation) -> None:
    # A namespace in which this process's user is somebody, and root, who owns APP_DIR, is somebody else.
    os.chown(installation.folder, pwd.getpwnam("daemon").pw_uid, -1)
    verdict, seen = installation.rows_inside("unshare", "--user", "--map-user=54321")["this user"]
    assert verdict == "failed"
    assert seen == "54321 (uid 54321) cannot give files to nobody; only root and nobody can"


def test_a_sessions_folder_that_is_not_there_yet_will_be_made(installation: Installation) -> None:
    installation.sessions.rmdir()
    verdict, seen, _ = installation.finding("sessions folder")
    assert (verdict, seen) == ("ok", f"{installation.sessions} is not there yet; restore will make it")
    assert not installation.sessions.exists()


def test_a_sessions_folder_in_a_folder_that_is_not_there_fails(installation: Installation) -> None:
    installation.env["SESSIONS_DIR"] = "/nowhere/sessions"
    assert installation.finding("sessions folder")[:2] == ("failed", "/nowhere does not exist")


def test_no_sessions_folder_at_all_fails(installation: Installation) -> None:
    del installation.env["APP_DIR"]
    assert installation.finding("sessions folder")[:2] == ("failed", "neither SESSIONS_DIR nor APP_DIR is set")
    assert installation.finding("free space")[0] == "warning"


def test_a_symbolic_link_or_a_file_as_sessions_folder_fails(installation: Installation) -> None:
    installation.sessions.rmdir()
    installation.sessions.symlink_to(installation.programs)
    assert installation.finding("sessions folder")[:2] == ("failed", f"{installation.sessions} is a symbolic link")
    installation.sessions.unlink()
    installation.sessions.write_text("")
    assert installation.finding("sessions folder")[:2] == ("failed", f"{installation.sessions} is not a folder")


def test_a_sessions_folder_that_everybody_may_write_fails(installation: Installation) -> None:
    installation.sessions.chmod(0o777)
    verdict, _, action = installation.finding("sessions folder")
    assert (verdict, action) == ("failed", f"chmod o-w {installation.sessions}")


@needs.root()
def test_a_sessions_folder_of_another_user_fails_and_one_of_root_is_warned_of(installation: Installation) -> None:
    daemon, nobody = pwd.getpwnam("daemon").pw_uid, pwd.getpwnam("nobody").pw_uid
    os.chown(installation.folder, daemon, -1)
    os.chown(installation.sessions, nobody, -1)
    assert installation.finding("sessions folder")[0] == "failed"
    os.chown(installation.sessions, 0, -1)
    installation.sessions.chmod(0o770)
    assert installation.finding("sessions folder")[0] == "failed"
    os.chown(installation.sessions, 0, pwd.getpwnam("daemon").pw_gid)
    verdict, _, action = installation.finding("sessions folder")
    assert (verdict, action) == ("warning", f"chown daemon {installation.sessions}")
    os.chown(installation.sessions, daemon, -1)
    assert installation.finding("sessions folder")[0] == "ok"


@needs.root()
def test_a_folder_on_the_way_that_the_service_cannot_enter_fails(installation: Installation) -> None:
    daemon = pwd.getpwnam("daemon").pw_uid
    locked = installation.folder / "locked"
    (locked / "sessions").mkdir(parents=True)
    os.chown(installation.folder, daemon, -1)
    os.chown(locked / "sessions", daemon, -1)
    locked.chmod(0o700)
    installation.env["SESSIONS_DIR"] = str(locked / "sessions")
    verdict, seen, _ = installation.finding("sessions folder")
    assert verdict == "failed"
    assert seen == f"the mode of {locked} keeps daemon from writing to {locked}/sessions"


@needs.namespace("mount")
def test_a_sessions_folder_on_a_read_only_mount_fails_also_for_root(installation: Installation) -> None:
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    rows = installation.rows_inside("unshare", "--mount", "sh", "-c", script, str(installation.sessions))
    assert rows["sessions folder"] == ("failed", f"{installation.sessions} is on a read-only filesystem")


@needs.namespace("mount")
@pytest.mark.parametrize(("options", "verdict"), [("size=8m", "failed"), ("size=4g,nr_inodes=1000", "warning")])
def test_a_filesystem_that_is_nearly_full_is_told(installation: Installation, options: str, verdict: str) -> None:
    script = f'mount -t tmpfs -o {options},mode=700 none "$0" && exec "$@"'
    rows = installation.rows_inside("unshare", "--mount", "sh", "-c", script, str(installation.sessions))
    assert rows["free space"][0] == verdict


def test_a_state_folder_that_cannot_be_written_is_a_warning(installation: Installation) -> None:
    installation.env["OPSCTL_STATE_DIR"] = str(installation.env_file)
    verdict, seen, action = installation.finding("state folder")
    assert (verdict, action) == ("warning", "set OPSCTL_STATE_DIR")
    assert "there will be no history" in seen


def test_a_standby_folder_that_cannot_be_written_is_a_warning(installation: Installation) -> None:
    standby = installation.folder / "standby"
    installation.env["STANDBY_DIR"] = str(standby)
    assert installation.finding("standby folder")[:2] == ("ok", f"{standby}, not there yet")
    standby.write_text("")
    verdict, seen, action = installation.finding("standby folder")
    assert (verdict, action) == ("warning", "set STANDBY_DIR")
    assert "cannot write in" in seen


def test_a_standby_folder_that_others_may_look_into_fails(installation: Installation) -> None:
    standby = installation.folder / "standby"
    standby.mkdir(mode=0o700)
    installation.env["STANDBY_DIR"] = str(standby)
    assert installation.finding("standby folder")[:2] == ("ok", str(standby))
    standby.chmod(0o750)
    verdict, seen, action = installation.finding("standby folder")
    assert verdict == "failed"
    assert "alone" in seen
    assert action is not None
    assert f"chmod 700 {standby}" in action


def test_a_standby_folder_from_which_nothing_can_be_renamed_is_a_warning(installation: Installation) -> None:
    here = Path(tempfile.gettempdir()).stat().st_dev
    places = [path for path in ("/dev/shm", "/var/tmp", str(Path.cwd())) if Path(path).is_dir()]
    elsewhere = next((path for path in places if Path(path).stat().st_dev != here), None)
    if elsewhere is None:
        pytest.skip(f"{needs.NOT_PROVEN}a standby folder on another filesystem")
    with tempfile.TemporaryDirectory(dir=elsewhere) as other:
        installation.env["STANDBY_DIR"] = other
        verdict, seen, _ = installation.finding("standby folder")
    assert verdict == "warning"
    assert "on another filesystem than the sessions" in seen


def test_a_database_address_that_is_none_fails_without_a_word_of_it(installation: Installation) -> None:
    installation.env["DATABASE_URL"] = f"postgresql://user:{SECRET}%zz@db/whatsapp"
    assert installation.finding("database address")[:2] == ("failed", "DATABASE_URL is not a connection string")


def test_without_error_tracking_failures_reach_nobody(installation: Installation) -> None:
    del installation.env["SENTRY_DSN"]
    assert installation.finding("error tracking")[0] == "warning"


@pytest.mark.parametrize(
    ("script", "verdict", "words"),
    [
        ("echo '0 3 * * * opsctl drill run'; echo '# opsctl'", "ok", ": 1"),
        ("echo '# opsctl'; echo '* * * * * other'", "warning", ": none"),
        ("echo 'no crontab for me' >&2; exit 1", "warning", ": none"),
        ("echo 'you are not allowed' >&2; exit 1", "warning", ": not readable"),
    ],
)
def test_who_runs_cron_is_told(installation: Installation, script: str, verdict: str, words: str) -> None:
    installation.crontab(script)
    found, seen, _ = installation.finding("cron")
    assert found == verdict
    assert words in seen


@needs.root()
def test_root_is_told_of_the_service_users_jobs_too(installation: Installation) -> None:
    os.chown(installation.folder, pwd.getpwnam("daemon").pw_uid, -1)
    installation.crontab("""[ "$2$3" = -udaemon ] && echo '* * * * * opsctl standby sync'""")
    assert "daemon: 1" in installation.finding("cron")[1]
