"""Telegram against a server that answers as its API does (https://core.telegram.org/bots/api#making-requests)."""

from __future__ import annotations

import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opsctl
from opsctl import notify, settings, telegram
from opsctl.cli import tree
from opsctl.notify import Notices
from opsctl.report import Ending, Failure, Report, Rto
from tests.integration.receivers import accepts_and_never_answers, drips, free_port, full_backlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.conftest import RunOpsctl
    from tests.forks import Forks
    from tests.integration.fleet import Fleet

TOKEN = "1234567:AAE-x_y0123456789abcdefghijklmnopqr"
CHAT = "-1001234567890"


@dataclass
class Api:
    """Telegram's sendMessage, as far as a bot that only sends can see it."""

    port: int
    down: int | None = None
    """Answer everything with this status."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    @property
    def env(self) -> dict[str, str]:
        return {
            "TELEGRAM_BOT_TOKEN": TOKEN,
            "TELEGRAM_CHAT_ID": CHAT,
            "TELEGRAM_API_URL": f"http://127.0.0.1:{self.port}",
        }

    @property
    def texts(self) -> list[str]:
        return [message["text"] for message in self.messages]

    def answer(self, path: str, kind: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        if self.down:
            more = {"parameters": {"retry_after": 7}} if self.down == 429 else {}
            return self.down, {"ok": False, "error_code": self.down, "description": "it is down", **more}
        if path != f"/bot{TOKEN}/sendMessage":
            known = path.startswith(f"/bot{TOKEN}/")
            code, why = (404, "Not Found") if known else (401, "Unauthorized")
            return code, {"ok": False, "error_code": code, "description": why}
        if kind != "application/json":
            return 400, {"ok": False, "error_code": 400, "description": "Bad Request: message text is empty"}
        message = json.loads(body)
        if wrong := refusal(message):
            return 400, {"ok": False, "error_code": 400, "description": f"Bad Request: {wrong}"}
        self.messages.append(message)
        return 200, {"ok": True, "result": {"message_id": len(self.messages), "text": message["text"]}}


def refusal(message: dict[str, Any]) -> str | None:
    """Why Telegram would not take it: the chat, the markup or the length."""
    if message["chat_id"] != CHAT:
        return "chat not found"
    text = message["text"]
    if message.get("parse_mode") == "HTML":
        left = re.sub(r"<(b|code)>([^<>]*)</\1>", r"\2", text)
        if "<" in left or ">" in left or re.search(r"&(?!(?:lt|gt|amp|quot|#\d+|#x[0-9a-fA-F]+);)", left):
            return "can't parse entities"
        text = html.unescape(left)
    if not text.strip():
        return "message text is empty"
    return "message is too long" if len(text.encode("utf-16-le")) // 2 > 4096 else None


@pytest.fixture
def api() -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, document = told.answer(self.path, self.headers["Content-Type"], body)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Api(server.server_port)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield told
        server.shutdown()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # no .env of the developer
    return tmp_path / "state"


def settings_of(env: dict[str, str], state: Path, **more: str) -> settings.Settings:
    return settings.load(environ={**env, "OPSCTL_STATE_DIR": str(state), **more})


FAILURE = Failure("no-source", "no source is left", "opsctl triage", "runbooks/1-postgresql-unreachable.md")


def ended(failure: Failure = FAILURE, command: str = "sessions restore", rto: Rto | None = None) -> Ending:
    report = Report(failure.message, exit_code=4, failure=failure)
    return Ending(command, "20260131T030400Z-abc123", report, rto, (), 1.5, emergency=True, options={})


def tell(ending: Ending, to: settings.Settings) -> None:
    Notices(to).end(ending, event=False, message=True)


def spooled(state: Path) -> list[Path]:
    return sorted((state / "spool").glob("telegram/*"))


# --- who is told ------------------------------------------------------------------------------------------------------


def test_a_failed_emergency_command_is_told_with_its_clock_runbook_and_next_line(
    run_opsctl: RunOpsctl, tmp_path: Path, api: Api
) -> None:
    env = {
        **api.env,
        "DATABASE_URL": f"postgresql://u@127.0.0.1:{free_port()}/wa",
        "OPSCTL_ENVIRONMENT": "staging & co",
    }
    words = ("sessions", "restore", "--service-stopped", "--to", str(tmp_path / "sessions"))
    assert run_opsctl(*words, env=env).returncode == 4
    [text] = api.texts
    assert text.startswith(f"<b>FAILED: opsctl sessions restore</b>\nstaging &amp; co on {socket.gethostname()}, 20")
    assert re.search(r"RTO: \d+\.\d s of 600 s, NOT met\nNext: <code>.+</code>\nRunbook: runbooks/1-", text)
    assert run_opsctl(*words, "--dry-run", env=env).returncode == 4  # an emergency is not rehearsed aloud
    assert run_opsctl("keys", "stats", env=env).returncode == 4  # and this is none
    assert len(api.texts) == 1


FAILS = """
from opsctl.cli import frame

frame._Frame._report_of = lambda *_: frame._report(4, frame.Failure("invented", "it failed"))
"""


def test_the_commands_that_are_told_are_those_that_the_readme_names(forking: Forks, tmp_path: Path, api: Api) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    paragraph = next(text for text in readme.split("\n\n") if text.startswith("With TELEGRAM_BOT_TOKEN"))
    env = {**api.env, "HOME": str(tmp_path), "OPSCTL_STATE_DIR": str(tmp_path / "state")}
    arguments = {"sessions repair": ("--company", "1", "--from", "standby"), "keys undo": ("RUN",)}
    for name, _ in tree.commands():
        more = arguments.get(name, ("1",) if name == "runbook show" else ())
        assert forking.run(*name.split(), *more, env=env, before=FAILS).returncode == 4, name
    told = [text.partition("</b>")[0].removeprefix("<b>FAILED: opsctl ") for text in api.texts]
    assert len(told) == 5
    assert sorted(told) == sorted(re.findall(r"`(\w+ \w+)`", paragraph))


@pytest.mark.parametrize(
    "words",
    [("sessions", "failback"), ("sessions", "repair", "--company", "962302", "--from", "standby")],
    ids=lambda words: words[1],
)
def test_a_way_back_that_failed_is_told_and_has_no_clock(words: tuple[str, ...], fleet: Fleet, api: Api) -> None:
    assert fleet.restore().returncode == 0
    env = {**api.env, "DATABASE_URL": f"postgresql://u@127.0.0.1:{free_port()}/wa", "SESSIONS_DIR": str(fleet.target)}
    assert fleet.opsctl(*words, "--service-stopped", "--yes", env=env).returncode in {4, 5}
    [text] = api.texts
    assert text.startswith(f"<b>FAILED: opsctl sessions {words[1]}</b>\n")
    assert "RTO" not in text
    assert fleet.opsctl(*words, "--dry-run", env=env).returncode in {4, 5}
    assert len(api.texts) == 1


def test_a_cleanup_tells_what_it_did_and_its_preview_does_not(fleet: Fleet, api: Api) -> None:
    assert fleet.opsctl("keys", "cleanup", "--dry-run", env=api.env).returncode == 0
    assert fleet.opsctl("keys", "cleanup", "--explain", env=api.env).returncode == 0
    assert api.texts == []
    assert fleet.opsctl("keys", "cleanup", "--yes", "--quiet", env=api.env).returncode == 0
    [text] = api.texts
    assert text.startswith("<b>done: opsctl keys cleanup</b>\n")
    assert re.search(r"keys (are expired|deleted)", text)


def test_a_cleanup_that_fails_is_told_too(run_opsctl: RunOpsctl, api: Api) -> None:
    env = {**api.env, "DATABASE_URL": f"postgresql://u@127.0.0.1:{free_port()}/wa"}
    assert run_opsctl("keys", "cleanup", "--yes", env=env).returncode == 4
    assert [text.splitlines()[0] for text in api.texts] == ["<b>FAILED: opsctl keys cleanup</b>"]


@pytest.mark.parametrize("missing", ["TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID"])
def test_without_bot_or_chat_nothing_is_asked(missing: str, state: Path, api: Api) -> None:
    tell(ended(), settings_of({**api.env, missing: ""}, state))
    assert (api.asked, spooled(state)) == (0, [])


def test_the_same_command_and_kind_is_told_once_in_thirty_minutes(state: Path, api: Api) -> None:
    there = settings_of(api.env, state)
    for _ in range(2):
        tell(ended(), there)
    assert len(api.messages) == 1
    tell(ended(replace(FAILURE, kind="half-done")), there)
    tell(ended(command="sessions failback"), there)
    assert len(api.messages) == 3
    for age_min, expected in ((29, 3), (31, 6)):
        for seen in (state / "seen").iterdir():
            os.utime(seen, (time.time() - age_min * 60,) * 2)
        for again in (ended(), ended(replace(FAILURE, kind="half-done")), ended(command="sessions failback")):
            tell(again, there)
        assert len(api.messages) == expected


# --- what is told -----------------------------------------------------------------------------------------------------


@given(
    message=st.text(max_size=6000), hint=st.text(max_size=900), command=st.text(max_size=300), rto=st.booleans(),
    warnings=st.lists(st.text(max_size=3000), max_size=4),
)  # fmt: skip
def test_telegram_takes_whatever_is_told(message: str, hint: str, command: str, rto: bool, warnings: list[str]) -> None:
    there = settings.load(environ={"TELEGRAM_BOT_TOKEN": TOKEN, "TELEGRAM_CHAT_ID": CHAT})
    clock = Rto(600, 12.34, "files", None, ()) if rto else None
    ending = ended(Failure("x", message, hint, "runbooks/1.md"), command, clock)
    ending = replace(ending, report=replace(ending.report, warnings=warnings))
    body = json.loads(telegram.request_of(ending, there))
    assert refusal(body) is None
    assert len(body["text"].encode("utf-16-le")) <= 2 * telegram.LIMIT


@pytest.mark.parametrize("filling", ["x", "&", "😀", "<b>", "]"])
def test_a_long_message_keeps_what_to_type_next(filling: str) -> None:
    there = settings.load(environ={"TELEGRAM_CHAT_ID": CHAT})
    text = telegram.message_of(ended(replace(FAILURE, message=filling * (8000 // len(filling)))), there)
    assert 4000 < len(text.encode("utf-16-le")) // 2 <= 4096
    assert text.endswith("...\nNext: <code>opsctl triage</code>\nRunbook: runbooks/1-postgresql-unreachable.md")


def test_no_secret_is_told(state: Path, api: Api) -> None:
    url = "postgresql://ops:hunter2-s3cr3t@db/wa"
    words = f"{url} hunter2-s3cr3t {TOKEN} 987654321:{'Z' * 35} 79001234567@s.whatsapp.net"
    failure = Failure("x", words, hint=words, runbook=words)
    tell(ended(failure), settings_of(api.env, state, DATABASE_URL=url))
    [text] = api.texts
    for secret in ("hunter2", TOKEN, "AAE-x_y", "ZZZZ", "79001234567"):
        assert secret not in text


# --- when Telegram is away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 429, None])
def test_a_message_that_was_not_answered_leaves_with_the_next_command_and_never_again(
    status: int | None, run_opsctl: RunOpsctl, tmp_path: Path, api: Api
) -> None:
    env = {**api.env, "DATABASE_URL": f"postgresql://u@127.0.0.1:{free_port()}/wa"}
    away = env if status else env | {"TELEGRAM_API_URL": f"http://127.0.0.1:{free_port()}"}
    api.down = status
    assert run_opsctl("keys", "cleanup", "--yes", "--quiet", env=away).returncode == 4
    [kept] = spooled(tmp_path / "state")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert TOKEN not in kept.read_text()
    assert api.messages == []
    api.down = None
    for _ in range(2):  # any command, one that goes well too
        assert run_opsctl("config", "show", env=env).returncode == 0
    assert [text.splitlines()[0] for text in api.texts] == ["<b>FAILED: opsctl keys cleanup</b>"]
    assert spooled(tmp_path / "state") == []


@pytest.mark.parametrize(
    ("wrong", "status"), [({"TELEGRAM_BOT_TOKEN": "7:wrong"}, 401), ({"TELEGRAM_CHAT_ID": "12"}, 400)]
)
def test_a_refusal_is_not_asked_again_and_config_check_names_it(
    wrong: dict[str, str], status: int, run_opsctl: RunOpsctl, state: Path, api: Api
) -> None:
    there = settings_of(api.env | wrong, state)
    tell(ended(), there)
    tell(ended(command="sessions failback"), there)
    assert (api.asked, api.messages, spooled(state)) == (2, [], [])
    assert notify.standing(state, "telegram").status == status

    def seen() -> tuple[str, str]:
        rows = run_opsctl("config", "check", "--json", env=api.env).json()["rows"]
        return next((row["verdict"], row["seen"]) for row in rows if row["check"] == "telegram")

    verdict, said = seen()
    assert (verdict, f"was {status}" in said) == ("warning", True)
    tell(ended(command="sessions undo"), settings_of(api.env, state))
    assert seen() == ("ok", "bot and chat are set")


def test_config_check_names_half_of_the_settings_and_what_waits(run_opsctl: RunOpsctl, state: Path, api: Api) -> None:
    def seen(env: dict[str, str]) -> dict[str, tuple[str, str]]:
        rows = run_opsctl("config", "check", "--json", env=env).json()["rows"]
        return {row["check"]: (row["verdict"], row["seen"]) for row in rows}

    half = {"TELEGRAM_BOT_TOKEN": TOKEN, "HEALTHCHECK_URL": "https://hc.example.com/uuid"}
    assert seen(half)["telegram"] == ("warning", "TELEGRAM_CHAT_ID is not set, so nothing is sent")
    assert seen(half)["dead-man ping"][0] == "warning"
    assert seen({})["telegram"] == ("ok", "not used")
    assert seen({})["dead-man ping"][0] == "ok"
    assert seen({"SENTRY_DSN": "https://k@sentry.example.com/1"})["dead-man ping"] == (
        "warning",
        "only monitors of Sentry would notice a machine that is gone, and GlitchTip has none",
    )
    away = api.env | {"TELEGRAM_API_URL": f"http://127.0.0.1:{free_port()}"}
    tell(ended(), settings_of(away, state))
    assert seen(away)["telegram"] == ("warning", "1 wait because nobody answered")


@contextmanager
def _answers_no_http() -> Iterator[str]:
    with drips(b"HTTP/1.1 200 OK\r\n: what\x00\r\nno header\r\n\r\n") as dsn:
        yield dsn


@pytest.mark.parametrize("endpoint", [accepts_and_never_answers, full_backlog, _answers_no_http])
def test_the_token_is_in_no_error_and_nothing_takes_longer_than_two_seconds(
    endpoint: Callable[[], AbstractContextManager[str]], tmp_path: Path, api: Api
) -> None:
    program = (
        "import sys, time; from opsctl import settings; from tests.integration.test_telegram import ended, tell\n"
        "started = time.monotonic(); tell(ended(), settings.load()); sys.exit(time.monotonic() - started > 2.0)"
    )
    with endpoint() as dsn:
        url = dsn.replace("k@", "").removesuffix("/1")
        env = {**os.environ, **api.env, "TELEGRAM_API_URL": url, "OPSCTL_STATE_DIR": str(tmp_path / "state")}
        words = [sys.executable, "-X", "dev", "-c", program]
        env["PYTHONPATH"] = str(Path(opsctl.__file__).parents[1])
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, TOKEN in done.stdout + done.stderr) == (0, False), done
    for path in (tmp_path / "state").rglob("*"):
        assert TOKEN not in path.name + (path.read_text() if path.is_file() else "")
