"""Where a restore writes: what it refuses with nothing changed, whose the files are, and what it would have done."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import pwd
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import needs
from tests.forks import AS_NOBODY
from tests.integration.fleet import FIRST, KEYS, SECOND, Fleet, contents, results, rows_of, tree, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).parents[2]
FILES = KEYS + 1


def write_as_the_service(folder: Path) -> None:
    """What one message does to a folder."""
    creds = json.loads((folder / "creds.json").read_bytes())
    (folder / "creds.json").write_text(json.dumps({**creds, "accountSyncCounter": 99}))


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_file(target: Path) -> None:
    target.write_text("not a folder")


def make_link(target: Path) -> None:
    (target.parent / "elsewhere").mkdir()
    target.symlink_to(target.parent / "elsewhere")


def make_dangling_link(target: Path) -> None:
    target.symlink_to(target.parent / "nowhere")


def make_public(target: Path) -> None:
    target.mkdir()
    target.chmod(0o777)


def make_own_folder_a_file(target: Path) -> None:
    target.mkdir(mode=0o700)
    (target / ".opsctl").write_text("")


def make_own_folder_a_link(target: Path) -> None:
    target.mkdir(mode=0o700)
    make_link(target / ".opsctl")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (make_file, "sessions is not a folder"),
        (make_link, "sessions is a symbolic link"),
        (make_dangling_link, "sessions is a symbolic link"),
        (make_public, "everybody may write to "),
        (make_own_folder_a_file, "sessions/.opsctl is not a folder"),
        (make_own_folder_a_link, "sessions/.opsctl is not a folder"),
    ],
)
def test_a_target_that_is_no_folder_of_ours_is_named_and_left_alone(
    fleet: Fleet, make: Callable[[Path], None], sentence: str
) -> None:
    make(fleet.target)
    fleet.refused(5, sentence)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_target_whose_parent_is_missing_is_named(fleet: Fleet, words: list[str]) -> None:
    fleet.target = fleet.place / "missing" / "sessions"
    fleet.refused(5, f"{fleet.place}/missing does not exist", *words)


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_target_that_cannot_exist_is_named(fleet: Fleet, name: str) -> None:
    (fleet.place / "file").write_text("")
    fleet.target = fleet.place / name
    fleet.refused(5, str(fleet.target))


@needs.root()
def test_a_folder_of_another_user_is_refused_and_says_whose_it_is(fleet: Fleet) -> None:
    fleet.target.mkdir()
    os.chown(fleet.target, pwd.getpwnam("daemon").pw_uid, -1)
    fleet.refused(5, "belongs to daemon, not to nobody (", "--owner", "nobody", "--quiet")


@needs.root()
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_read_only_filesystem_is_named_and_left_alone(fleet: Fleet, words: list[str]) -> None:
    fleet.target.mkdir()
    with mounted(fleet.target, "-t", "tmpfs", "-o", "ro,mode=700", "none"):
        fleet.refused(5, f"{fleet.target} is on a read-only filesystem", *words)


@needs.root()
@pytest.mark.parametrize("limit", ["size=200k", "nr_inodes=60", "nr_inodes=3", "nr_inodes=5"])
def test_a_full_disk_is_named_and_the_old_folders_are_still_there(fleet: Fleet, limit: str) -> None:
    fleet.target.mkdir()
    with mounted(fleet.target, "-t", "tmpfs", "-o", f"{limit},mode=700", "none"):
        if "=3" not in limit:
            fleet.folder().mkdir()
            (fleet.folder() / "creds.json").write_text('{"the": "old one"}')
        fleet.refused(5, f"{fleet.target}: no space left", "--replace", "--yes")
        assert not (fleet.target / ".opsctl").exists()


@needs.root()
def test_a_dry_run_says_that_there_is_not_enough_space(fleet: Fleet) -> None:
    fleet.target.mkdir()
    with mounted(fleet.target, "-t", "tmpfs", "-o", "size=200k,mode=700", "none"):
        document = fleet.restored("--dry-run")
        facts = document["facts"]
        assert facts["space_free_bytes"] <= 200 * 1024 < facts["space_needed_bytes"]
        needed, free = f"{facts['space_needed_bytes']:,}", f"{facts['space_free_bytes']:,}"
        assert f"{needed} bytes are needed at {fleet.target} and {free} are free" in document["warnings"]
        assert f"{needed} bytes needed, {free} free; nothing was changed" in document["summary"]
    assert not [w for w in fleet.restored("--dry-run")["warnings"] if "are needed" in w]


def test_a_restore_ends_with_its_table_the_clock_and_what_to_type_next(fleet: Fleet) -> None:
    fleet.target = fleet.target.with_name("the sessions")
    target = f"'{fleet.target}'"
    text = fleet.restore().stdout
    assert -1 < text.find("Company") < text.find("\nRTO: ") < text.find("\nNext:\n")
    stopped = fleet.restored("--discard-changes", "--yes")["next"]
    running = fleet.opsctl("sessions", "restore", "--to", fleet.target, "--discard-changes", "--yes", "--json")
    assert not [line for line in stopped if line.startswith("pm2 stop")]
    assert [line for line in running.json()["next"] if line.startswith("pm2 stop baileys-whatsapp-service")]
    for lines in (stopped, running.json()["next"]):
        assert lines[0] == f"opsctl sessions verify {target}"
        assert lines[-1] == f"opsctl sessions undo --to {target}"
        assert f"opsctl sessions failback --from {target} --dry-run" in lines
        start = " ".join(lines)
        assert "USE_LEGACY_SUPABASE=false pm2 restart baileys-whatsapp-service --update-env" in start
        for flag in ("USE_REPOSITORY_PATTERN=false", "USE_DATABASE_AUTH_STATE=false", "USE_LEGACY_SUPABASE=false"):
            assert start.count(flag) == 2  # in the service's .env, and at its start


@needs.root()
def test_a_folder_that_cannot_be_exchanged_keeps_its_company_back_and_no_other(fleet: Fleet) -> None:
    fleet.folder().mkdir(parents=True)
    with mounted(fleet.folder(), "-t", "tmpfs", "-o", "mode=700", "none"):
        done = fleet.restore("--replace", "--yes", "--json")
        assert done.returncode == 6, done
        assert results(done) == {FIRST: "refused", SECOND: "restored"}
        assert f"company_{FIRST} cannot be exchanged: " in done.json()["error"]["message"]
    assert fleet.undo("--yes").returncode == 0
    assert fleet.companies() == [f"company_{FIRST}"]


def test_a_folder_that_is_not_ours_is_refused_and_with_replace_set_aside(fleet: Fleet) -> None:
    fleet.folder().mkdir(parents=True)
    (fleet.folder() / "creds.json").write_text('{"somebody": "else\'s"}')
    done = fleet.restore("--json")
    assert done.returncode == 6
    assert results(done) == {FIRST: "refused", SECOND: "restored"}
    sentence = (
        f"what stands in its place (company_{FIRST}) is no folder that was restored here; --replace sets it aside"
    )
    assert rows_of(done)[FIRST]["reason"] == sentence
    assert contents(fleet.folder()) == {"creds.json": b'{"somebody": "else\'s"}'}
    fleet.refused(2, "add --yes", "--replace")
    document = fleet.restored("--replace", "--yes")
    assert results(document) == {FIRST: "restored", SECOND: "unchanged"}
    assert rows_of(document)[FIRST]["files_updated"] == 1
    (aside,) = fleet.target.glob(f".opsctl/aside-*/company_{FIRST}")
    assert contents(aside) == {"creds.json": b'{"somebody": "else\'s"}'}


def test_a_company_folder_that_is_a_link_or_a_file_is_refused_and_with_replace_set_aside_as_it_is(fleet: Fleet) -> None:
    fleet.target.mkdir()
    precious = fleet.place / "precious"
    precious.mkdir()
    (precious / "creds.json").write_text("{}")
    fleet.folder().symlink_to(precious)
    fleet.folder(SECOND).write_text("a file")
    before = contents(precious)
    fleet.refused(5, f"(company_{FIRST}) is no folder that was restored here")
    fleet.restored("--replace", "--yes")
    assert not fleet.folder().is_symlink()
    assert len(contents(fleet.folder())) == FILES + 1
    assert contents(precious) == before
    for _ in range(2):  # undone, redone
        assert fleet.undo("--yes").returncode == 0
    assert len(contents(fleet.folder(SECOND))) == FILES + 1
    assert fleet.undo("--yes").returncode == 0
    assert fleet.folder().readlink() == precious
    assert fleet.folder(SECOND).read_text() == "a file"


def test_a_folder_of_another_environment_or_company_is_refused(fleet: Fleet) -> None:
    fleet.restored(env={"OPSCTL_ENVIRONMENT": "staging"})
    fleet.refused(5, "is no folder that was restored here", env={"SENTRY_ENVIRONMENT": "production"})
    fleet.folder().rename(fleet.place / "swap")
    fleet.folder(SECOND).rename(fleet.folder())
    (fleet.place / "swap").rename(fleet.folder(SECOND))
    fleet.refused(5, "is no folder that was restored here", env={"OPSCTL_ENVIRONMENT": "staging"})


def drop_a_key(folder: Path) -> None:
    next(folder.glob("pre-key-*.json")).unlink()


def add_a_key(folder: Path) -> None:
    (folder / "session-new.0.json").write_text('{"_sessions":{}}')


@pytest.mark.parametrize("write", [write_as_the_service, drop_a_key, add_a_key])
def test_a_folder_that_was_written_since_is_refused_and_only_discard_changes_sets_it_aside(
    fleet: Fleet, write: Callable[[Path], None]
) -> None:
    fleet.restored()
    write(fleet.folder())
    written = contents(fleet.folder())
    done = fleet.refused(6, f"{FIRST}: its folder was written since it was restored", "--replace", "--yes")
    assert "--discard-changes would lose that" in done.stderr
    document = fleet.restored("--discard-changes", "--yes")
    assert results(document) == {FIRST: "restored", SECOND: "unchanged"}
    (aside,) = fleet.target.glob(f".opsctl/aside-*/company_{FIRST}")
    assert contents(aside) == written


def test_what_can_hurt_needs_yes_where_nobody_can_answer_and_a_plain_restore_never_asks(fleet: Fleet) -> None:
    for flag in ("--replace", "--discard-changes"):
        fleet.refused(2, "add --yes", flag)
    assert fleet.restore("--replace", "--json").json()["error"]["kind"] == "usage"
    assert not fleet.target.exists()
    fleet.restored()


def test_a_second_restore_changes_nothing_and_the_first_can_still_be_undone(fleet: Fleet) -> None:
    fleet.folder().mkdir(parents=True)
    (fleet.folder() / "creds.json").write_text('{"the": "old one"}')
    fleet.restored("--replace", "--yes")
    with unchanged(fleet.place):
        assert results(fleet.restored()) == {FIRST: "unchanged", SECOND: "unchanged"}
    write_as_the_service(fleet.folder())
    written = contents(fleet.folder())
    done = fleet.refused(6, f"{FIRST}: its folder was written since it was restored")
    assert SECOND not in done.stderr
    assert contents(fleet.folder()) == written
    assert fleet.undo("--yes", "--discard-changes").returncode == 0
    assert contents(fleet.folder()) == {"creds.json": b'{"the": "old one"}'}


@pytest.mark.parametrize("umask", [0o777, 0o000])
def test_files_are_the_owners_alone_whatever_the_umask(fleet: Fleet, umask: int) -> None:
    before = os.umask(umask)
    try:
        done = fleet.restore()
    finally:
        os.umask(before)
    assert done.returncode == 0, done
    for path in [fleet.target, *fleet.target.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def owners(folder: Path) -> set[str]:
    return {path.owner() for path in [folder, *folder.rglob("*")]}


@needs.root()
def test_files_belong_to_the_owner_that_was_named(fleet: Fleet) -> None:
    document = fleet.restored("--owner", "nobody")
    assert document["facts"]["owner"] == "nobody"
    assert owners(fleet.target) == {"nobody"}
    done = fleet.refused(5, "this machine has no user 'nobody-at-all'", "--owner", "nobody-at-all")
    assert "check --owner" in done.stderr


@needs.root()
def test_the_owner_of_app_dir_is_the_default_and_its_folder_the_default_target(fleet: Fleet) -> None:
    app = fleet.place / "app"
    app.mkdir()
    os.chown(app, pwd.getpwnam("nobody").pw_uid, -1)
    fleet.env["APP_DIR"] = str(app)
    done = fleet.opsctl("sessions", "restore", "--service-stopped")
    assert done.returncode == 0, done
    assert owners(app / "baileys_sessions") == {"nobody"}
    with_root = fleet.place / "roots"
    assert fleet.opsctl("sessions", "restore", "--to", with_root, "--owner", "root").returncode == 0
    assert owners(with_root) == {"root"}


@needs.root()
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_files_that_the_owner_could_not_read_under_that_path_are_not_written(fleet: Fleet, words: list[str]) -> None:
    fleet.place.chmod(0o700)
    fleet.refused(5, f"nobody cannot write or read in {fleet.target}", "--owner", "nobody", *words)


INSTALLED_BELOW_ROOTS_HOME = """
import os, sys
class Unreadable:
    def find_spec(name, path, target=None):
        if os.geteuid() != 0:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Unreadable)
from opsctl.cli import main
sys.argv[0] = "opsctl"
sys.exit(main())
"""


@needs.root()
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_the_owner_need_not_be_able_to_read_where_opsctl_is_installed(fleet: Fleet, words: list[str]) -> None:
    fleet.key("session", "float.0", '{"number": 1.5}')
    line = ("sessions", "restore", "--to", str(fleet.target), "--owner", "nobody", "--service-stopped", *words)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED_BELOW_ROOTS_HOME, *line],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HOME": str(fleet.place), **fleet.env},
        cwd="/",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done


def run_as_nobody(fleet: Fleet, *words: str) -> tuple[int, str]:
    done = fleet.opsctl("sessions", "restore", "--to", fleet.target, *words, before=AS_NOBODY)
    return done.returncode, done.stderr


@needs.root()
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_only_root_restores_for_somebody_else_or_into_what_it_may_not_write(fleet: Fleet, words: list[str]) -> None:
    with unchanged(fleet.place):
        assert run_as_nobody(fleet, "--owner", "daemon", *words) == (
            5,
            "opsctl sessions restore: only root can write files for daemon\n  next: sudo -u daemon opsctl ...\n",
        )
        code, said = run_as_nobody(fleet, *words)
        assert code == 5
        assert f"nobody may not write in {fleet.place}" in said
    fleet.place.chmod(0o700)
    code, said = run_as_nobody(fleet, *words)
    fleet.place.chmod(0o755)
    assert code == 5
    assert "Permission denied" in said


def test_a_second_run_at_the_same_time_says_who_works_there_and_waits_for_nothing(fleet: Fleet) -> None:
    fleet.target.mkdir(mode=0o700)
    words = [sys.executable, "-m", "opsctl", "sessions", "restore", "--to", str(fleet.target), "--quiet"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HOME": str(fleet.place), **fleet.env}
    before = datetime.now(UTC) - timedelta(seconds=1)
    first = subprocess.Popen(words, env=env)
    try:
        holder = fleet.target / ".opsctl" / "holder.json"
        while not (holder.exists() and holder.read_bytes()):
            assert first.poll() is None
            time.sleep(0.0005)
        first.send_signal(signal.SIGSTOP)
        held = json.loads(holder.read_bytes())
        assert held["pid"] == first.pid
        assert before < datetime.fromisoformat(held["since"]) + timedelta(seconds=1)
        sentence = (
            f"another run works on {fleet.target}: pid {first.pid} on {os.uname().nodename} since {held['since']}"
        )
        for command in (("restore",), ("undo", "--yes")):
            done = fleet.opsctl("sessions", *command, "--to", fleet.target)
            assert done.returncode == 75, done
            assert sentence in done.stderr
        with suppress(ProcessLookupError):
            first.send_signal(signal.SIGCONT)
        assert first.wait(30) == 0
    finally:
        first.kill()
        first.wait()
    assert fleet.companies() == [f"company_{FIRST}", f"company_{SECOND}"]
    assert not holder.exists()


def test_a_dry_run_makes_nothing_and_counts_what_a_restore_would_do(fleet: Fleet) -> None:
    fleet.target.mkdir(mode=0o700)

    def preview(*words: str) -> dict[str, dict[str, object]]:
        with unchanged(fleet.place):
            before = tree(fleet.target)
            document = fleet.restored("--dry-run", *words)
            assert tree(fleet.target) == before
        assert document["facts"]["space_needed_bytes"] >= FILES * 4096
        assert document["facts"]["space_free_bytes"] > 0
        return rows_of(document)

    def counts(row: dict[str, object]) -> list[object]:
        return [row[f"files_{what}"] for what in ("restored", "updated", "unchanged", "set_aside")] + [row["result"]]

    assert counts(preview("--company", FIRST)[FIRST]) == [FILES, 0, 0, 0, "would restore"]
    assert not (fleet.target / ".opsctl").exists()
    fleet.restored()
    assert counts(preview()[FIRST]) == [0, 0, FILES, 0, "unchanged"]
    fleet.database.execute("DELETE FROM whatsapp_keys WHERE company_id = %s AND key_type = 'tctoken'", [FIRST])
    fleet.database.execute(
        "UPDATE whatsapp_keys SET value = value || '{\"x\": 1}' WHERE company_id = %s AND key_type = 'session'", [FIRST]
    )
    fleet.key("session", "one-more", "{}")
    gone, changed = 2, 6
    predicted = counts(preview()[FIRST])
    assert predicted == [1, changed, FILES - gone - changed, gone, "would restore"]
    assert counts(rows_of(fleet.restored())[FIRST])[:4] == predicted[:4]
    write_as_the_service(fleet.folder())
    refused = fleet.restore("--dry-run", "--json")
    assert refused.returncode == 6
    assert results(refused) == {FIRST: "refused", SECOND: "unchanged"}
    assert counts(preview("--discard-changes")[FIRST])[:4] == [0, 1, FILES - gone, 0]
    fleet.target = fleet.place / "new"
    fleet.restored("--dry-run")
    assert not fleet.target.exists()


def test_a_copy_is_fresh_only_by_the_operators_word(fleet: Fleet) -> None:
    done = fleet.opsctl("sessions", "restore", "--to", fleet.target, "--json")
    assert done.returncode == 0
    document = done.json()
    assert {row["copy"] for row in document["rows"]} == {"possibly stale"}
    assert document["facts"]["service_stopped"] == "unknown"
    assert any("this copy is possibly stale" in warning for warning in document["warnings"])
    document = fleet.restored()
    assert {row["copy"] for row in document["rows"]} == {"fresh"}
    assert document["facts"]["service_stopped"] == "operator"
    assert not document["warnings"]


def test_stale_leaves_out_what_a_stale_copy_must_not_hold(fleet: Fleet) -> None:
    done = fleet.opsctl("sessions", "restore", "--to", fleet.target, "--stale", "--json")
    assert done.returncode == 0
    row = rows_of(done)[FIRST]
    assert row["sessions"] == 0
    assert row["dropped_keys"] >= 6
    assert not list(fleet.folder().glob("session-*"))
    assert list(fleet.folder().glob("pre-key-*"))


def test_the_clock_runs_from_the_moment_that_was_said(fleet: Fleet) -> None:
    since = (datetime.now(UTC) - timedelta(minutes=30)).isoformat()
    document = fleet.restored("--since", since)
    assert document["rto"]["elapsed_s"] > 1800
    assert document["rto"]["met"] is False
    assert fleet.restored()["rto"]["elapsed_s"] < 60


def test_what_is_said_is_as_much_as_was_asked_for(fleet: Fleet) -> None:
    quiet = fleet.restore("--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    plain, verbose = fleet.restore(), fleet.restore("--verbose")
    detail = f"{FIRST}: 1 app-state-sync-key, "
    assert detail not in plain.stdout
    assert detail in verbose.stdout
    assert fleet.restore("--json").stdout.count("\n") == 1


def on_a_terminal(fleet: Fleet, *words: str) -> str:
    """What stands on a terminal of 80 x 24 afterwards, without colour."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HOME": str(fleet.place), **fleet.env}
    process = subprocess.Popen(
        [sys.executable, "-m", "opsctl", "sessions", *words, "--to", str(fleet.target)],
        env={**env, "NO_COLOR": "1", "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    with suppress(OSError):  # EIO: the other end is closed
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert process.wait(30) == 0, said
    assert b"\x1b" not in said
    return said.decode().replace("\r\n", "\n")


def test_every_table_is_readable_on_a_terminal_of_80_columns_without_colour(fleet: Fleet) -> None:
    longest = "company_" + "y" * 6
    fleet.copy_company(longest)
    fleet.copy_company("z" * 50, keys=False)
    for words, header, row in [
        (["restore", "--dry-run"], "Company .* Restored +Updated +Unchanged +Set aside +Warn", "would restore"),
        (["restore"], "Company .* Keys +Pre-key +Session +Sender +Warn +Copy +s", "restored .* stale"),
        (["list"], "Company .* Keys +Pre-key +Session +Changed +Database +Folder +Its age", "yes +restored"),
        (["undo", "--dry-run"], "Folder +Action", "take away"),
        (["undo", "--yes"], "Folder +Action", "take away"),
    ]:
        lines = on_a_terminal(fleet, *words).splitlines()
        summary = next(line for line in lines if re.match(r"[0-9]+ (of [0-9]+ )?companies|undoing|restore [0-9]", line))
        table = lines[: lines.index(summary)]
        assert max(map(len, table)) <= 80, lines
        assert re.search(header, table[0]), lines
        assert any(re.search(row, line) for line in table if FIRST in line), lines
        assert any(f"{longest} " in line for line in table), lines  # a usual id is not folded
