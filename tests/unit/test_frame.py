"""Every way a command can end, seen from outside: real processes, real pipes, real terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import opsctl
from opsctl.cli import frame
from tests import needs
from tests.forks import THEIR_APP, Finished

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.conftest import RunOpsctl
    from tests.forks import Forks

REPOSITORY = Path(__file__).parents[2]
COMMANDS = [sys.executable, str(Path(__file__).with_name("invented_commands.py"))]
INVENTED = f"from tests.unit.invented_commands import app{THEIR_APP}"
SECRET = "a-row-with-a-private-key"

ENVELOPE = [
    "schema",
    "command",
    "run_id",
    "outcome",
    "exit_code",
    "summary",
    "facts",
    "rows",
    "warnings",
    "next",
    "rto",
    "error",
    "sentry_event_id",
    "notes",
]
"""The promise to whoever parses: a key may be added at the end, and none may go."""


class Place:
    """A folder to run the invented commands in, with an environment that has nothing of whoever runs the tests."""

    def __init__(self, folder: Path, forking: Forks) -> None:
        self.folder = folder
        self._forking = forking
        self.state = folder / "state"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(REPOSITORY),
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "OPSCTL_STATE_DIR": str(self.state),
        }

    def start(self, *words: str, before: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        """A process of its own from its first import on."""
        environ = {**self.environ, **options.pop("env", {})}
        return subprocess.Popen([*before, *COMMANDS, *words], env=environ, **{"cwd": self.folder, **options})

    def started(self, *words: str, before: tuple[str, ...] = (), **options: Any) -> Finished:
        """`start` and wait for the end, without a terminal."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(*words, before=before, **{**streams, **options}) as process:
            out, err = process.communicate(timeout=60)
        return Finished(process.returncode, out.decode(), err.decode())

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> Finished:
        """The same in a process that is forked where everything is imported already."""
        return self._forking.run(*words, env={**self.environ, **(env or {})}, before=INVENTED, cwd=self.folder)

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell in which $OPSCTL is the invented command line."""
        environ = {**self.environ, "OPSCTL": " ".join(COMMANDS)}
        return subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=environ, capture_output=True, text=True, check=False, timeout=60
        )

    def json(self, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The document of a `run` with `--json`."""
        return document_of(self.run(*words, "--json", env=env))


def document_of(done: Finished, *, beside: str = "") -> dict[str, Any]:
    """The one document of `--json`, checked against the process's exit code and for silence `beside` it."""
    assert done.stderr == beside
    assert done.stdout.count("\n") == 1
    document: dict[str, Any] = done.json()
    assert document["exit_code"] == done.returncode
    assert list(document) == ENVELOPE
    return document


class Terminal:
    """The invented commands on a terminal of their own, as their session's controlling one."""

    def __init__(self, place: Place, *words: str, columns: int = 80, env: Mapping[str, str] | None = None) -> None:
        self.screen = ""
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, columns))
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = place.start(*words, before=("setsid", "--ctty"), env=env or {}, **streams)
        os.close(slave)

    def until(self, text: str) -> None:
        while text not in self.screen:
            assert self._read(), f"ended without {text!r}: {self.screen}"

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def hang_up(self) -> None:
        os.close(self._master)

    def end(self) -> int:
        """The exit code; `screen` is complete then."""
        while self._read():
            pass
        self.hang_up()
        return self.process.wait(60)

    def _read(self) -> bool:
        try:
            read = os.read(self._master, 65536)
        except OSError:  # EIO: the last process on the terminal has closed it
            return False
        self.screen += read.decode()
        return bool(read)


@pytest.fixture
def place(tmp_path: Path, forking: Forks) -> Place:
    return Place(tmp_path, forking)


@pytest.fixture
def waiting(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the middle of its work."""
    process = place.start("wait", "cleaned-up", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr
    assert process.stderr.readline() == b"waiting\n"
    yield process
    process.kill()
    process.communicate()


# How it ends


def test_done_is_0_with_the_summary_on_stdout_and_nothing_on_stderr(place: Place) -> None:
    done = place.run("group", "done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 companies restored\n", "")
    assert place.json("group", "done")["outcome"] == "ok"


def test_a_warning_is_0_and_printed(place: Place) -> None:
    done = place.run("group", "warned")
    assert (done.returncode, done.stdout) == (0, "restored\nwarning: one key was odd\n")
    document = place.json("group", "warned")
    assert (document["outcome"], document["warnings"]) == ("warning", ["one key was odd"])


@pytest.mark.parametrize("code", [1, 5, 6])
def test_a_report_may_end_with_1_5_or_6_and_says_why_on_stderr(place: Place, code: int) -> None:
    done = place.run("group", f"code-{code}")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == (
        f"opsctl group code-{code}: it ended with {code}\n  next: opsctl triage\n"
        "  runbook: opsctl runbook show 1-postgresql-unreachable\n"
    )
    document = place.json("group", f"code-{code}")
    assert document["outcome"] == "failed"
    assert document["error"] == {
        "kind": "invented",
        "message": f"it ended with {code}",
        "hint": "opsctl triage",
        "runbook": "runbooks/1-postgresql-unreachable.md",
    }


def test_what_was_done_is_printed_beside_what_was_not(place: Place) -> None:
    done = place.run("group", "half")
    assert done.returncode == 6
    assert re.findall(r"^(\w)\s+(\d)", done.stdout, re.MULTILINE) == [("a", "1"), ("b", "0")]
    assert "1 of 2 companies restored\nwarning: b is torn\n" in done.stdout
    assert done.stdout.endswith("\nNext:\n  opsctl sessions verify\n")
    assert done.stderr == "opsctl group half: b is missing\n"


def test_a_report_that_is_unwell_without_a_failure_is_1_and_a_warning(place: Place) -> None:
    assert place.json("group", "unwell")["outcome"] == "warning"
    assert place.run("group", "unwell").returncode == 1


@pytest.mark.parametrize(
    ("name", "code", "kind"),
    [
        ("usage-error", 2, "usage"),
        ("settings-error", 3, "settings"),
        ("source-error", 4, "no-source"),
        ("database-error", 4, "timeout"),
        ("refused-error", 5, "refused"),
        ("half-done-error", 6, "half-done"),
        ("locked-error", 75, "locked"),
        ("base-error", 70, "bug"),
    ],
)
def test_each_error_class_has_its_exit_code_and_kind(place: Place, name: str, code: int, kind: str) -> None:
    document = place.json("group", name)
    assert (document["exit_code"], document["error"]["kind"], document["outcome"]) == (code, kind, "failed")
    done = place.run("group", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"opsctl group {name}: {document['summary']}\n")


@pytest.mark.parametrize("name", ["bug", "exits", "broken-pipe"])
def test_a_bug_is_70_and_says_where_it_is_but_neither_its_message_nor_a_traceback(place: Place, name: str) -> None:
    done = place.run("group", name)
    assert (done.returncode, done.stdout) == (70, "")
    assert re.search(r"this is a bug in opsctl: \w+ at invented_commands\.py:\d+ in \w+\n", done.stderr)
    document = place.json("group", name)
    assert (document["exit_code"], document["error"]["kind"]) == (70, "bug")
    assert SECRET not in done.stderr + json.dumps(document)
    assert "Traceback" not in done.stderr


def test_opsctl_debug_prints_the_way_of_a_bug_and_still_not_its_message(place: Place) -> None:
    done = place.run("group", "bug", env={"OPSCTL_DEBUG": "1"})
    assert 'invented_commands.py", line' in done.stderr
    assert "ValueError: " not in done.stderr


def test_a_value_that_cannot_be_shown_is_a_bug_that_does_not_hide_what_was_done(place: Place) -> None:
    done = place.run("group", "unshowable")
    assert (done.returncode, done.stdout) == (70, "done all the same\n")
    document = place.json("group", "unshowable")
    assert (document["exit_code"], document["summary"]) == (70, "done all the same")
    assert SECRET not in done.stderr + json.dumps(document)


# Lines that make no sense

USAGE = {
    "unknown option": (["group", "done", "--nonsense"], "No such option: --nonsense"),
    "misspelt option": (["group", "done", "--verbos"], "--verbose"),
    "bad value": (["peace", "--size", "large"], "--size': Input should be a valid integer"),
    "missing argument": (["wait"], "Missing argument 'cleaned_up'"),
    "unknown command": (["group", "don"], "No such command 'don'. Did you mean 'done'?"),
    "unknown group": (["grup"], "Did you mean 'group'?"),
    "no command": (["group"], None),
    "a deadline of nothing": (["group", "done", "--deadline", "0"], "not a number of seconds from 0.1"),
    "a deadline that is no number": (["group", "done", "--deadline", "nan"], "not a number of seconds"),
    "an endless deadline": (["group", "done", "--deadline", "inf"], "not a number of seconds"),
    "a time that is none": (["emergency", "--since", "yesterday"], "'yesterday' is not a time"),
    "a time of no zone": (["emergency", "--since", "2026-01-31T03:04"], "in UTC it is 2026-01-31T03:04Z"),
    "a time to come": (["emergency", "--since", "2999-01-31T03:04Z"], "is in the future"),
}


@pytest.mark.parametrize(("words", "message"), USAGE.values(), ids=USAGE.keys())
def test_a_line_that_makes_no_sense_is_2_in_words_and_in_json(
    place: Place, words: list[str], message: str | None
) -> None:
    done = place.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: opsctl")
    assert "Traceback" not in done.stderr
    document = place.json(*words)
    assert (document["exit_code"], document["error"]["kind"], document["outcome"]) == (2, "usage", "failed")
    assert document["error"]["hint"].endswith("--help")
    if message:
        assert message in " ".join(done.stderr.split())
        assert message in document["error"]["message"]


def test_a_group_without_a_command_lists_its_commands(place: Place) -> None:
    assert "\nCommands:\n  done" in place.run("group").stderr


# Signals and the deadline


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=lambda s: str(s)
)
def test_a_signal_lets_the_command_clean_up_and_answer(
    place: Place, waiting: subprocess.Popen[bytes], number: signal.Signals, code: int
) -> None:
    waiting.send_signal(number)
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == code
    assert (place.folder / "cleaned-up").exists()
    document = json.loads(out)
    assert (document["exit_code"], document["error"]["kind"]) == (code, "interrupted")
    assert document["summary"] == f"stopped by {number.name}"
    assert err == b""


def test_a_second_sigterm_does_not_tear_the_cleaning_up(place: Place) -> None:
    process = place.start("wait", "cleaned-up", "--once-more", stderr=subprocess.PIPE)
    assert process.stderr
    while b"waiting" not in process.stderr.readline():
        pass
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (place.folder / "cleaned-up").exists()


def test_under_nohup_a_hang_up_is_ignored(place: Place) -> None:
    process = place.start("wait", "cleaned-up", before=("nohup",), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr
    while b"waiting" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_terminal_that_hangs_up_lets_the_command_clean_up(place: Place) -> None:
    terminal = Terminal(place, "wait", "cleaned-up")
    terminal.until("waiting")
    terminal.hang_up()
    assert terminal.process.wait(60) == 129
    assert (place.folder / "cleaned-up").exists()


def test_ctrl_c_ends_a_command_with_130(place: Place) -> None:
    terminal = Terminal(place, "wait", "cleaned-up")
    terminal.until("waiting")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "opsctl wait: stopped by SIGINT" in terminal.screen
    assert "Traceback" not in terminal.screen


def test_a_command_that_does_not_look_at_the_clock_is_stopped_after_its_deadline(place: Place) -> None:
    started = time.monotonic()
    document = document_of(place.run("wait", "cleaned-up", "--deadline", "0.1", "--json"), beside="waiting\n")
    assert time.monotonic() - started < 10
    assert (document["exit_code"], document["error"]["kind"]) == (4, "deadline")
    assert document["summary"] == "not done within 0.1 s"
    assert (place.folder / "cleaned-up").exists()


# Streams that break


def test_a_reader_that_goes_away_changes_neither_the_exit_code_nor_stderr(place: Place) -> None:
    for words in ("group done", "group done --json", "--help", "group done --help"):
        done = place.shell(f"$OPSCTL {words} | head -0; exit ${{PIPESTATUS[0]}}")
        assert (done.returncode, done.stderr) == (0, ""), words
    for words in ("group half", "group half --json"):
        assert place.shell(f"$OPSCTL {words} | head -0; exit ${{PIPESTATUS[0]}}").returncode == 6


def test_a_failure_is_told_on_stderr_also_where_nobody_reads_stdout(place: Place) -> None:
    assert place.shell("$OPSCTL group half | head -0").stderr == "opsctl group half: b is missing\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(place: Place, closed: str) -> None:
    for words, code in (("group done", 0), ("group done --json", 0), ("group half", 6), ("group nothing", 2)):
        done = place.shell(f"$OPSCTL {words} {closed}")
        assert done.returncode == code, words
        assert "Traceback" not in done.stderr


def test_an_answer_that_cannot_be_written_is_said_and_never_0(place: Place) -> None:
    for words, code in (("group done", 70), ("group done --json", 70), ("--help", 70), ("group half", 6)):
        done = place.shell(f"$OPSCTL {words} > /dev/full")
        assert done.returncode == code, words
        assert "opsctl: the answer could not be written: No space left on device\n" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_device_behind_stderr_changes_nothing(place: Place) -> None:
    assert place.shell("$OPSCTL group half 2> /dev/full").returncode == 6
    assert place.shell("$OPSCTL emergency 2> /dev/full").returncode == 0


@pytest.mark.parametrize("encoding", [{"LANG": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX"}], ids=str)
def test_no_locale_makes_an_answer_raise(place: Place, encoding: dict[str, str]) -> None:
    assert place.started("group", "nasty", "--verbose", env=encoding).returncode == 0
    assert place.started("group", "table", env=encoding).returncode == 0
    document = document_of(place.started("group", "nasty", "--json", env=encoding))
    assert document["facts"] == {"huge": 2**70}


# What it prints


def test_quiet_says_nothing_on_success_and_one_line_on_anything_else(place: Place) -> None:
    done = place.run("emergency", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name, code, line in (
        ("warned", 0, "opsctl group warned: one key was odd\n"),
        ("code-5", 5, "opsctl group code-5: it ended with 5 (opsctl triage)\n"),
        ("unwell", 1, "opsctl group unwell: the pool is full\n"),
        ("half", 6, "opsctl group half: b is missing\n"),
    ):
        done = place.run("group", name, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_verbose_prints_the_details_too(place: Place) -> None:
    assert place.run("group", "done", "-v").stdout == "2 companies restored\n  a detail\n"


def test_json_keeps_types_and_speaks_utf_8(place: Place) -> None:
    assert place.json("group", "facts")["facts"] == {"size_bytes": 1, "folder": "/srv", "nothing": None}
    rows = place.json("group", "half")["rows"]
    assert rows == [{"company_id": "a", "keys": 1, "note": None}, {"company_id": "b", "keys": 0, "note": "torn"}]


def test_json_holds_text_that_is_not_utf_8_as_it_is(place: Place) -> None:
    document = place.json("group", "nasty")
    assert document["rows"][0]["company_id"].startswith("\x1b]0;title\x07 [bold]x [/x] \u202egnp.exe \udcff")


@pytest.mark.parametrize("name", ["nasty", "nasty-error"])
@pytest.mark.parametrize("color", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_what_data_holds_never_reaches_the_terminal_as_control_characters(
    place: Place, name: str, color: dict[str, str]
) -> None:
    terminal = Terminal(place, "group", name, "--verbose", env=color)
    assert terminal.end() == (5 if name == "nasty-error" else 0)
    assert r"\x1b]0;title\x07" in terminal.screen
    for forbidden in ("\x1b]", "\x07", "\u202e", "\udcff"):
        assert forbidden not in terminal.screen
    without_styles = re.sub(r"\x1b\[[0-9;]*m", "", terminal.screen)
    assert "\x1b" not in without_styles
    assert "[bold]x" in without_styles


@pytest.mark.parametrize("color", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_no_color_and_dumb_terminals_get_plain_text(place: Place, color: dict[str, str]) -> None:
    terminal = Terminal(place, "group", "table", env=color)
    assert terminal.end() == 0
    assert "\x1b" not in terminal.screen


def test_a_table_fits_a_terminal_of_40_columns_and_loses_nothing(place: Place) -> None:
    terminal = Terminal(place, "group", "table", columns=40, env={"NO_COLOR": "1"})
    assert terminal.end() == 0
    lines = terminal.screen.splitlines()
    assert max(map(len, lines)) <= 40
    assert "1,234,567" in terminal.screen
    assert terminal.screen.count("word") == 20
    assert "".join(line[:20] for line in lines).count("b") >= 60


def test_a_pipe_gets_rows_that_are_not_wrapped(place: Place) -> None:
    assert f"\n{'b' * 60} " in place.run("group", "table", env={"COLUMNS": "40"}).stdout


def test_a_step_with_a_total_has_a_bar_on_a_terminal_while_it_goes_on_and_none_in_a_pipe(place: Place) -> None:
    terminal = Terminal(place, "wait", "cleaned-up")
    terminal.until("1/2")
    terminal.type("\x03")
    assert terminal.end() == 130
    process = place.start("wait", "cleaned-up", "--deadline", "1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=60)
    assert b"1/2" not in stderr


def test_steps_are_timed_on_stderr_as_they_end(place: Place) -> None:
    done = place.run("emergency", "--nap-s", "0.2")
    assert re.fullmatch(r"  export session files +0\.[2-9]\d s\n", done.stderr)
    terminal = Terminal(place, "emergency", "--nap-s", "0.3", columns=40)
    assert terminal.end() == 0
    assert re.search(r"export session files +0\.[3-9]\d s", terminal.screen)


# Settings


def test_an_env_file_that_is_missing_is_3_and_one_that_is_there_is_used(place: Place) -> None:
    document = place.json("emergency", "--env-file", "nowhere.env")
    assert (document["exit_code"], document["summary"]) == (3, "the settings file nowhere.env does not exist")
    (place.folder / "here.env").write_text("OPSCTL_ENVIRONMENT=staging\n")
    assert place.json("emergency", "--env-file", "here.env")["facts"]["environment"] == "staging"
    assert place.json("emergency")["facts"]["environment"] == "production"


def test_settings_that_make_no_sense_stop_every_command_but_those_that_look_at_them(place: Place) -> None:
    garbage = {"RTO_TARGET_SECONDS": "ten minutes"}
    document = place.json("emergency", env=garbage)
    assert (document["exit_code"], document["error"]["hint"]) == (3, "opsctl config show")
    assert document["summary"] == "RTO_TARGET_SECONDS ('ten minutes') is not a whole number"
    assert place.json("peace", env=garbage)["facts"]["problems"] == [document["summary"]]


def test_only_a_command_that_asks_for_it_has_no_deadline(place: Place) -> None:
    assert place.json("peace")["facts"]["remaining_s"] is None
    assert 0 < place.json("peace", "--deadline", "5")["facts"]["remaining_s"] <= 5
    assert 55 < place.json("ask", "--yes")["facts"]["remaining_s"] <= 60


# Confirmation


def test_without_a_terminal_a_question_needs_yes(place: Place) -> None:
    done = place.run("ask")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("  next: add --yes\n")
    assert place.run("ask", "--yes").returncode == 0
    assert place.run("ask", "-y").returncode == 0


def test_json_never_asks_even_on_a_terminal(place: Place) -> None:
    terminal = Terminal(place, "ask", "--json")
    assert terminal.end() == 2
    assert json.loads(terminal.screen)["error"]["hint"] == "add --yes"


@pytest.mark.parametrize(
    ("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 5), ("\n", 5), ("\x04", 5), ("yo\n", 5), ("\xff\n", 5)]
)
def test_on_a_terminal_only_a_yes_goes_on(place: Place, answer: str, code: int) -> None:
    terminal = Terminal(place, "ask")
    terminal.until("Delete [bold] 3 keys? [y/N] ")
    terminal.type(answer)
    assert terminal.end() == code
    assert ("deleted" in terminal.screen) == (code == 0)
    assert ("not confirmed, so nothing was changed" in terminal.screen) == (code == 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_question_is_a_signal(place: Place, number: signal.Signals) -> None:
    terminal = Terminal(place, "ask")
    terminal.until("[y/N]")
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    assert f"stopped by {number.name}" in terminal.screen


def test_thinking_does_not_use_the_deadline_up(place: Place) -> None:
    terminal = Terminal(place, "ask", "--deadline", "0.5")
    terminal.until("[y/N]")
    time.sleep(4)  # longer than the deadline and its backstop together
    terminal.type("y\n")
    assert terminal.end() == 0


# Help


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_with_the_examples_and_fits_80_columns(place: Place, flag: str) -> None:
    done = place.run("emergency", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith(
        "Examples:\n    opsctl emergency\n    opsctl emergency --since 2026-01-31T03:04Z --json"
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    for flag_ in ("--json", "--quiet", "--verbose", "--env-file", "--deadline", "--company", "--since"):
        assert flag_ in done.stdout


def test_help_speaks_the_flags_own_words_for_values(place: Place) -> None:
    help_text = place.run("emergency", "--help").stdout
    for words in ("--deadline SECONDS", "--env-file FILE", "--since TIME", "--company ID"):
        assert words in help_text


def test_the_version_is_told_also_beside_settings_that_make_no_sense(run_opsctl: RunOpsctl) -> None:
    for words in (["--version"], ["--version", "sessions", "restore"]):
        done = run_opsctl(*words, env={"RTO_TARGET_SECONDS": "ten minutes"})
        assert (done.returncode, done.stdout, done.stderr) == (0, f"opsctl {opsctl.__version__}\n", "")


# The clock and the history


def test_the_rto_is_printed_and_open_until_whatsapp_is_connected(place: Place) -> None:
    assert re.search(
        r"RTO: \d\.\d s of 600 s, open \(files; WhatsApp's connection is not measured\)", place.run("emergency").stdout
    )
    rto = place.json("emergency")["rto"]
    assert list(rto) == ["target_s", "elapsed_s", "scope", "met", "steps"]
    assert (rto["target_s"], rto["scope"], rto["met"]) == (600.0, "files", None)
    assert [(s["name"], s["ok"]) for s in rto["steps"]] == [("export session files", True)]
    assert place.json("emergency", "--met")["rto"]["met"] is True
    assert place.json("group", "done")["rto"] is None


def test_an_emergency_that_failed_still_tells_its_clock_and_is_not_met(place: Place) -> None:
    document = place.json("emergency", "--unreachable", "--company", "962302")
    assert (document["exit_code"], document["rto"]["scope"], document["rto"]["met"]) == (4, "files", False)
    assert "NOT met" in place.run("emergency", "--unreachable").stderr + place.run("emergency", "--unreachable").stdout


def test_slower_than_the_target_is_0_and_not_met(place: Place) -> None:
    document = place.json("emergency", "--met", "--nap-s", "1", env={"RTO_TARGET_SECONDS": "1"})
    assert (document["exit_code"], document["rto"]["met"]) == (0, False)


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%MZ", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S+00:00"])
def test_since_counts_from_the_outage(place: Place, form: str) -> None:
    outage = datetime.now(UTC) - timedelta(minutes=20)
    rto = place.json("emergency", "--met", "--since", outage.strftime(form))["rto"]
    assert 1190 < rto["elapsed_s"] < 1290
    assert rto["met"] is False


def test_since_understands_other_zones(place: Place) -> None:
    moscow = datetime.now(UTC) - timedelta(minutes=20) + timedelta(hours=3)
    elapsed_s = place.json("emergency", "--since", f"{moscow:%Y-%m-%dT%H:%M:%S}+03:00")["rto"]["elapsed_s"]
    assert 1190 < elapsed_s < 1290


def test_the_clock_starts_with_the_process_not_with_the_body(place: Place) -> None:
    started = time.monotonic()
    elapsed_s = document_of(place.started("emergency", "--json"))["rto"]["elapsed_s"]
    assert 0.05 < elapsed_s <= time.monotonic() - started + 0.02  # the kernel counts in ticks of 10 ms


def test_a_timed_run_is_a_line_of_history_that_only_its_owner_reads(place: Place) -> None:
    place.started("emergency", umask=0)
    place.started("emergency", "--met", umask=0)
    place.run("group", "done")
    history = place.state / "history.jsonl"
    assert stat.S_IMODE(place.state.stat().st_mode) == 0o700
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    files, connected = map(json.loads, history.read_text().splitlines())
    assert list(files) == [
        "at", "run_id", "command", "exit_code", "elapsed_s", "target_s", "scope", "facts", "met", "steps",
    ]  # fmt: skip
    assert (files["command"], files["scope"], files["met"]) == ("emergency", "files", None)
    assert (connected["scope"], connected["met"]) == ("connected", True)


def test_without_a_setting_the_history_is_below_the_home(place: Place) -> None:
    place.run("emergency", env={"OPSCTL_STATE_DIR": ""})
    assert (place.folder / ".local/state/opsctl/history.jsonl").exists()
    place.run("emergency", env={"OPSCTL_STATE_DIR": "", "XDG_STATE_HOME": str(place.folder / "xdg")})
    assert (place.folder / "xdg/opsctl/history.jsonl").exists()


def test_a_file_in_the_way_of_the_state_folder_stops_nothing(place: Place) -> None:
    place.state.write_text("in the way")
    assert place.json("emergency")["exit_code"] == 0


@needs.namespace("mount")
def test_a_state_folder_on_a_read_only_mount_stops_nothing(place: Place) -> None:
    place.state.mkdir()
    mounted = 'mount --bind "$OPSCTL_STATE_DIR" "$OPSCTL_STATE_DIR" && mount -o remount,ro,bind "$OPSCTL_STATE_DIR"'
    before = ("unshare", "--mount", "sh", "-c", f'{mounted} && ! touch "$OPSCTL_STATE_DIR/x" 2>&- && exec "$@"', "sh")
    assert document_of(place.started("emergency", "--json", before=before))["exit_code"] == 0
    assert list(place.state.iterdir()) == []


@needs.namespace("user")
def test_a_user_without_a_home_is_told_that_there_is_no_history(place: Place) -> None:
    before = ("unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "--unset=HOME")
    done = place.started("emergency", before=before, env={"OPSCTL_STATE_DIR": ""})
    assert done.returncode == 0, done.stderr
    assert "opsctl: this run could not be kept in the history: SettingsError\n" in done.stderr


def test_the_command_tree_imports_nothing_that_only_some_commands_need() -> None:
    words = [sys.executable, "-c", "import sys, opsctl.cli; print(*sys.modules)"]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith(("opsctl.operations", "opsctl.stores", "opsctl.baileys"))}
    assert ours <= {"opsctl.operations", "opsctl.operations.faults"}
    others = {
        "opsctl.db",
        "opsctl.services",
        "opsctl.settings",
        "psycopg",
        "sentry_sdk",
        "cryptography",
        "rich",
        "orjson",
    }
    assert not others & set(loaded)


def test_ctrl_c_while_it_starts_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time; print('importing', flush=True); time.sleep(30)")
    process = subprocess.Popen(
        [sys.executable, "-m", "opsctl", "triage"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{Path(opsctl.__file__).parents[1]}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


def test_only_the_group_that_is_typed_is_built() -> None:
    """Typer takes as long for the whole tree as most commands run."""
    app, plain, broken = typer.Typer(), typer.Typer(), typer.Typer()
    app.add_typer(plain, name="plain")
    app.add_typer(broken, name="broken")
    plain.command("look")(lambda: None)
    plain.callback()(lambda: None)

    def unbuildable() -> None:
        """Of a type that nobody finds, which Typer says as soon as it builds the command."""

    unbuildable.__annotations__["return"] = "NoSuchType"
    broken.command()(unbuildable)
    assert frame.main(app, ["plain", "look"]) == 0
    assert frame.main(app, ["broken", "unbuildable"]) == 70
    assert frame.main(app, []) == 70
