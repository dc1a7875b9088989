"""Settings: what is taken from where, and that nothing that makes no sense becomes a default."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from opsctl import db
from opsctl.errors import SettingsError
from opsctl.settings import VARIABLES, Settings, env_example, load

REPOSITORY = Path(__file__).parents[2]
SECRET = "hunter2-s3cr3t"

DEFAULTS = {
    "DATABASE_URL": None,
    "OPSCTL_REPLICA_URL": None,
    "POSTGRES_HOST": None,
    "POSTGRES_PORT": 5432,
    "POSTGRES_DATABASE": None,
    "POSTGRES_USER": None,
    "POSTGRES_PASSWORD": None,
    "POSTGRES_SSL_MODE": None,
    "SESSIONS_DIR": None,
    "APP_DIR": None,
    "SERVICE_MANAGER": "none",
    "SERVICE_NAMES": (),
    "SERVICE_USER": None,
    "PM2_HOME": None,
    "SERVICE_STATUS_COMMAND": (),
    "SERVICE_STOP_COMMAND": (),
    "SERVICE_START_COMMAND": (),
    "SERVICE_LOG": (),
    "EMERGENCY_TAG": "emergency-file-fallback-v1",
    "FALLBACK_DIR": None,
    "FALLBACK_INSTALL_COMMAND": ("npm", "ci"),
    "FALLBACK_DRY_BOOT_COMMAND": (),
    "FALLBACK_DRY_BOOT_SECONDS": 10,
    "SERVICE_ENV_FILE": ".env",
    "SWITCH_FLAGS": (
        ("USE_REPOSITORY_PATTERN", "false"),
        ("USE_DATABASE_AUTH_STATE", "false"),
        ("USE_LEGACY_SUPABASE", "false"),
    ),
    "CONNECTED_PATTERNS": ("connection open", "Connected to WhatsApp"),
    "CONNECTED_ADDRESS": None,
    "CONNECT_TIMEOUT_SECONDS": 180,
    "CONNECT_WATCH_SECONDS": 60,
    "WHATSAPP_ADDRESS": "web.whatsapp.com:443",
    "OPSCTL_STATE_DIR": None,
    "STANDBY_DIR": None,
    "STANDBY_MAX_AGE_SECONDS": 300,
    "STANDBY_KEEP_HOURS": 24,
    "OPSCTL_ENVIRONMENT": None,
    "RTO_TARGET_SECONDS": 600,
    "DB_CLEANUP_RETENTION_DAYS": 30,
    "STORED_FORM": None,
    "ARCHIVE_KEEP_DAYS": 90,
    "DB_QUERY_LATENCY_THRESHOLD_MS": 500,
    "DB_POOL_USAGE_THRESHOLD": 0.8,
    "HEALTH_REPLY_MS": (500, 2000),
    "HEALTH_LATENCY_CRITICAL_MS": 2000,
    "HEALTH_POOL_CRITICAL": 0.9,
    "HEALTH_BLOCKED_S": (30, 120),
    "HEALTH_BLOCKED_SESSIONS": (3, 6),
    "HEALTH_IDLE_TRANSACTION_S": (60, 300),
    "HEALTH_LONG_QUERY_S": (60, 300),
    "HEALTH_PREPARED_S": (1, 30),
    "HEALTH_WRAPAROUND_IDS": (1_000_000_000, 1_300_000_000),
    "HEALTH_DEAD_ROWS_PERCENT": (10, 30),
    "HEALTH_VACUUM_DAYS": (2, 7),
    "HEALTH_FEW_ROWS": 10_000,
    "HEALTH_REPLICATION_S": (30, 300),
    "HEALTH_REPLICATION_MIB": (64, 1024),
    "HEALTH_CLOCK_SKEW_S": (2, 5),
    "HEALTH_CERTIFICATE_DAYS": (30, 7),
    "HEALTH_DISK_PERCENT": (85, 95),
    "HEALTH_EXPIRED_KEYS": (100, 500),
    "HEALTH_STANDBY_AGE_S": (300, 3600),
    "CREDENTIALS_CACHE_TTL_MS": 300000,
    "CREDENTIALS_CACHE_FILE": None,
    "CACHE_MAX_ENTRIES": 1000,
    "SENTRY_DSN": None,
    "SENTRY_ENVIRONMENT": "production",
    "HEALTHCHECK_URL": None,
    "CLEANUP_AT": (3, 0),
    "TELEGRAM_BOT_TOKEN": None,
    "TELEGRAM_CHAT_ID": None,
    "TELEGRAM_API_URL": "https://api.telegram.org",
}


def settings_of(tmp_path: Path, file: str = "", **environ: str) -> Settings:
    env_file = tmp_path / ".env"
    env_file.write_text(file, encoding="utf-8")
    return load(env_file, environ)


def test_what_nobody_sets_has_its_documented_default() -> None:
    settings = load(environ={})
    assert {name: settings[name] for name in settings.all} == DEFAULTS
    assert {setting.origin for setting in settings.all.values()} == {"default"}
    assert settings.problems == ()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DATABASE_URL", "postgresql://user@db/whatsapp", "postgresql://user@db/whatsapp"),
        ("POSTGRES_PORT", "65535", 65535),
        ("HEALTH_BLOCKED_S", "5/5", (5, 5)),
        ("HEALTH_CERTIFICATE_DAYS", "60/14", (60, 14)),
        ("POSTGRES_SSL_MODE", "verify-full", "verify-full"),
        ("SESSIONS_DIR", "/srv/sessions", Path("/srv/sessions")),
        ("APP_DIR", "~root/app", Path("~root/app").expanduser()),
        ("RTO_TARGET_SECONDS", " +300 ", 300),
        ("RTO_TARGET_SECONDS", "0600", 600),
        ("DB_CLEANUP_RETENTION_DAYS", "7", 7),
        ("DB_POOL_USAGE_THRESHOLD", "1", 1.0),
        ("DB_POOL_USAGE_THRESHOLD", ".5", 0.5),
        ("SENTRY_DSN", "https://key@sentry.example.com/1", "https://key@sentry.example.com/1"),
        ("CLEANUP_AT", "4:05", (4, 5)),
        ("HEALTHCHECK_URL", "https://hc.example.com/{job}?create=1", "https://hc.example.com/{job}?create=1"),
        ("TELEGRAM_BOT_TOKEN", "123456:AA-b_c", "123456:AA-b_c"),
        ("TELEGRAM_CHAT_ID", "-1001234567890", "-1001234567890"),
        ("TELEGRAM_CHAT_ID", "@on_call", "@on_call"),
        ("SERVICE_NAMES", "a, b@1.service ,c", ("a", "b@1.service", "c")),
        ("SERVICE_LOG", "/var/log/a, /var/log/b", (Path("/var/log/a"), Path("/var/log/b"))),
        ("SERVICE_STOP_COMMAND", "/bin/my-stop --now; rm", ("/bin/my-stop", "--now;", "rm")),
    ],
)
def test_a_value_is_read_alike_from_the_environment_and_from_the_file(
    tmp_path: Path, name: str, text: str, value: Any
) -> None:
    from_environment = settings_of(tmp_path, **{name: text})
    assert (from_environment[name], from_environment.all[name].origin) == (value, "environment")
    from_file = settings_of(tmp_path, f"{name}={text}\n")
    assert (from_file[name], from_file.all[name].origin) == (value, str(tmp_path / ".env"))


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    assert settings_of(tmp_path, "POSTGRES_HOST=file", POSTGRES_HOST="environment")["POSTGRES_HOST"] == "environment"


@pytest.mark.parametrize("nothing", ["", "  ", "\n"])
def test_an_empty_value_is_not_set_and_lets_the_next_one_speak(tmp_path: Path, nothing: str) -> None:
    assert settings_of(tmp_path, "POSTGRES_HOST=file", POSTGRES_HOST=nothing)["POSTGRES_HOST"] == "file"
    assert settings_of(tmp_path, "RTO_TARGET_SECONDS=''", RTO_TARGET_SECONDS=nothing)["RTO_TARGET_SECONDS"] == 600


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("POSTGRES_PORT", "0", "('0') is not between 1 and 65535"),
        ("POSTGRES_PORT", "65536", "('65536') is not between 1 and 65535"),
        ("POSTGRES_SSL_MODE", "yes", "('yes') is not one of disable, allow, prefer, require, verify-ca, verify-full"),
        ("SESSIONS_DIR", "sessions", "('sessions') is not an absolute path"),
        ("APP_DIR", "./app", "('./app') is not an absolute path"),
        ("OPSCTL_STATE_DIR", "state", "('state') is not an absolute path"),
        ("APP_DIR", f"/srv/{'ü' * 128}/app", "has a name of more than 255 bytes"),
        ("APP_DIR", "~nobody-of-this-name/app", "is the home of a user that does not exist"),
        ("RTO_TARGET_SECONDS", "ten", "('ten') is not a whole number"),
        ("RTO_TARGET_SECONDS", "600s", "('600s') is not a whole number"),
        ("RTO_TARGET_SECONDS", "6e2", "('6e2') is not a whole number"),
        ("RTO_TARGET_SECONDS", "600.5", "('600.5') is not a whole number"),
        ("RTO_TARGET_SECONDS", "٦٠٠", "is not a whole number"),
        ("RTO_TARGET_SECONDS", "0", "('0') is not between 1 and 86400"),
        ("RTO_TARGET_SECONDS", "-600", "('-600') is not between 1 and 86400"),
        ("RTO_TARGET_SECONDS", "9" * 5000, "is not between 1 and 86400"),
        ("CLEANUP_AT", "24:00", "('24:00') is not a time like 03:00"),
        ("HEALTHCHECK_URL", "hc-ping.com/key", "HEALTHCHECK_URL is not an http(s) address"),
        ("TELEGRAM_BOT_TOKEN", "123456:a/../b", "TELEGRAM_BOT_TOKEN is not a bot's token"),
        ("TELEGRAM_CHAT_ID", "vosarsen", "('vosarsen') is neither a chat's number nor @channel"),
        ("DB_CLEANUP_RETENTION_DAYS", "6", "('6') is not between 7 and 3650"),
        ("DB_QUERY_LATENCY_THRESHOLD_MS", "0", "('0') is not between 1 and 600000"),
        ("CREDENTIALS_CACHE_TTL_MS", "-1", "('-1') is not between 1 and 86400000"),
        ("HEALTH_BLOCKED_S", "30", "('30') is not WARNING/CRITICAL, two whole numbers"),
        ("HEALTH_BLOCKED_S", "120/30", "('120/30') is critical before it is a warning"),
        ("HEALTH_CERTIFICATE_DAYS", "7/30", "('7/30') is critical before it is a warning"),
        ("HEALTH_DISK_PERCENT", "85/101", "('85/101') is above 100"),
        ("DB_POOL_USAGE_THRESHOLD", "80", "('80') is not a share between 0 and 1"),
        ("DB_POOL_USAGE_THRESHOLD", "80%", "('80%') is not a number"),
        ("DB_POOL_USAGE_THRESHOLD", "0", "('0') is not a share between 0 and 1"),
        ("DB_POOL_USAGE_THRESHOLD", "-0.5", "('-0.5') is not a number"),
        ("DB_POOL_USAGE_THRESHOLD", "nan", "('nan') is not a number"),
        ("SENTRY_DSN", SECRET, "is not an http(s) address"),
        ("EMERGENCY_TAG", "--help", "is not the name of a tag"),
        ("FALLBACK_DIR", "fallback", "is not an absolute path"),
        ("SERVICE_ENV_FILE", "../.env", "is not the name of a file in the service's folder"),
        ("SWITCH_FLAGS", "USE_X", "is not a list of NAME=value"),
        ("SWITCH_FLAGS", "USE_X=$(id)", "is not a list of NAME=value, of plain words"),
        ("CONNECTED_PATTERNS", "open,,", "is not a list of words"),
        ("CONNECTED_ADDRESS", "http://localhost/health", "does not say where {company} goes"),
        ("WHATSAPP_ADDRESS", "web.whatsapp.com", "('web.whatsapp.com') is neither host:port nor none"),
        ("WHATSAPP_ADDRESS", "web.whatsapp.com:0", "is neither host:port nor none"),
        ("SERVICE_MANAGER", "init", "('init') is not one of pm2, systemd, command, none"),
        ("SERVICE_NAMES", "all", "('all') is not a list of service names"),
        ("SERVICE_NAMES", "a,,b", "('a,,b') is not a list of service names"),
        ("SERVICE_NAMES", "--version", "('--version') is not a list of service names"),
        ("SERVICE_LOG", "/var/log/a,b", "('/var/log/a,b') is not an absolute path"),
        ("SERVICE_STOP_COMMAND", "a 'b", "has an open quote"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_and_stops(tmp_path: Path, name: str, text: str, problem: str) -> None:
    for settings in (settings_of(tmp_path, **{name: text}), settings_of(tmp_path, f"{name}={text}")):
        (told,) = settings.problems
        assert told.startswith(name)
        assert problem in told
        assert SECRET not in told
        assert len(told) < 200
        with pytest.raises(SettingsError, match=f"^{name} ") as stopped:
            settings.require_sound()
        assert stopped.value.exit_code == 3


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "RTO_TARGET_SECONDS=x", POSTGRES_PORT="y")
    with pytest.raises(SettingsError, match=r"POSTGRES_PORT .*; RTO_TARGET_SECONDS "):
        settings.require_sound()


# The file


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("POSTGRES_PASSWORD='a$b${HOME}c'", "a$b${HOME}c"),
        ('POSTGRES_PASSWORD="a$b${HOME}c"', "a$b${HOME}c"),
        ("POSTGRES_PASSWORD=a$b${HOME}c", "a$b${HOME}c"),
        ("POSTGRES_PASSWORD=a#b", "a#b"),
        ("POSTGRES_PASSWORD=a #b", "a"),
        ("POSTGRES_PASSWORD='a #b'", "a #b"),
        ("POSTGRES_PASSWORD=a=b", "a=b"),
        ("POSTGRES_PASSWORD=a # POSTGRES_PASSWORD=b", "a"),
        ("export POSTGRES_PASSWORD=a", "a"),
        (" POSTGRES_PASSWORD = a ", "a"),
        ("POSTGRES_PASSWORD=a\nPOSTGRES_PASSWORD=b", "b"),
        ("POSTGRES_PASSWORD=a\r\nPOSTGRES_USER=b\r\n", "a"),
        ("\ufeffPOSTGRES_PASSWORD=a", "a"),
        ("POSTGRES_PASSWORD=пароль", "пароль"),
        ("#POSTGRES_PASSWORD=a", None),
        ("POSTGRES_PASSWORD", None),
    ],
)
def test_a_line_is_read_as_dotenv_reads_it_but_a_dollar_is_a_dollar(
    tmp_path: Path, line: str, value: str | None
) -> None:
    assert settings_of(tmp_path, line)["POSTGRES_PASSWORD"] == value


def test_a_line_of_ours_that_cannot_be_read_stops_and_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^POSTGRES_PASSWORD in line 2 of \S+ cannot be read$") as stopped:
        settings_of(tmp_path, f"POSTGRES_USER=user\nexport POSTGRES_PASSWORD='{SECRET}\n")
    assert SECRET not in f"{stopped.value} {stopped.value.hint}"


def test_a_line_of_another_program_that_cannot_be_read_is_not_ours_to_judge(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "OTHER='open\n- what is this\nPOSTGRES_USER=user\n")
    assert settings["POSTGRES_USER"] == "user"
    assert capfd.readouterr() == ("", "")


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.env"
    with pytest.raises(SettingsError, match=r"nowhere\.env does not exist"):
        load(missing, {})
    with pytest.raises(SettingsError, match=r"nowhere\.env does not exist"):
        load(environ={"OPSCTL_ENV_FILE": str(missing)})


def test_without_a_name_it_is_the_env_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / ".env").write_text("POSTGRES_USER=here")
    monkeypatch.chdir(tmp_path)
    assert load(environ={})["POSTGRES_USER"] == "here"
    monkeypatch.chdir(tmp_path / "below")
    assert load(environ={})["POSTGRES_USER"] is None, "no search upwards: the file would depend on where one stands"


@pytest.mark.parametrize("content", [b"POSTGRES_USER=\xff\n", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "odd.env"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"odd\.env cannot be read: (Is a directory|not UTF-8 text)"):
        load(path, {})


# What follows from them


def test_the_sessions_folder_is_named_or_below_the_service(tmp_path: Path) -> None:
    assert settings_of(tmp_path, APP_DIR="/srv/app").sessions_dir == Path("/srv/app/baileys_sessions")
    assert settings_of(tmp_path, APP_DIR="/srv/app", SESSIONS_DIR="/srv/s").sessions_dir == Path("/srv/s")
    with pytest.raises(SettingsError, match="neither SESSIONS_DIR nor APP_DIR is set"):
        _ = settings_of(tmp_path).sessions_dir


def test_the_environment_is_named_or_sentrys(tmp_path: Path) -> None:
    assert settings_of(tmp_path).environment == "production"
    assert settings_of(tmp_path, SENTRY_ENVIRONMENT="staging").environment == "staging"
    assert settings_of(tmp_path, SENTRY_ENVIRONMENT="a", OPSCTL_ENVIRONMENT="b").environment == "b"


def test_no_secret_is_shown_or_represented(tmp_path: Path) -> None:
    secret = {v.name for v in VARIABLES if v.secret}
    assert secret == {
        "DATABASE_URL", "OPSCTL_REPLICA_URL", "POSTGRES_PASSWORD", "SENTRY_DSN", "HEALTHCHECK_URL", "TELEGRAM_BOT_TOKEN"
    }  # fmt: skip
    settings = settings_of(
        tmp_path,
        f"DATABASE_URL=postgresql://user:{SECRET}@db/whatsapp\nSENTRY_DSN=https://{SECRET}@sentry.example.com/1",
        POSTGRES_PASSWORD=SECRET,
        OPSCTL_REPLICA_URL=f"postgresql://user:{SECRET}@replica/whatsapp",
        TELEGRAM_BOT_TOKEN=f"123456:{SECRET}",
        HEALTHCHECK_URL=f"https://hc-ping.com/{SECRET}/{{job}}",
    )
    assert {settings.all[name].shown() for name in secret} == {"********"}
    assert SECRET not in repr(settings)
    assert SECRET in settings.secrets()


# .env.example


def test_the_example_file_is_generated_and_says_what_the_code_does(tmp_path: Path) -> None:
    generated = subprocess.run(
        [sys.executable, "-m", "opsctl.settings"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert generated == env_example() == (REPOSITORY / ".env.example").read_text(), "run: python -m opsctl.settings"
    assert settings_of(tmp_path, generated).env_file is None, "every line of it is a comment"


def test_every_line_of_the_example_file_is_sound_once_it_is_set(tmp_path: Path) -> None:
    set_all = re.sub(r"^#(?=[A-Z_]+=)", "", env_example(), flags=re.MULTILINE)
    settings = settings_of(tmp_path, set_all)
    assert settings.problems == ()
    for variable in VARIABLES:
        assert settings[variable.name] == variable.default or settings.all[variable.name].origin != "default"


def test_the_warm_copies_lie_in_their_own_folder_else_in_the_state_folder(tmp_path: Path) -> None:
    assert settings_of(tmp_path, OPSCTL_STATE_DIR="/state").standby_dir == Path("/state/standby")
    assert settings_of(tmp_path, OPSCTL_STATE_DIR="/state", STANDBY_DIR="/srv/standby").standby_dir == Path(
        "/srv/standby"
    )


def test_the_cache_is_where_it_is_said_to_be_else_in_the_services_folder() -> None:
    assert load(environ={"APP_DIR": "/srv/app"}).cache_file == Path("/srv/app/.baileys-cache.json")
    assert load(environ={"APP_DIR": "/srv/app", "CREDENTIALS_CACHE_FILE": "/a/b.json"}).cache_file == Path("/a/b.json")
    assert load(environ={"CREDENTIALS_CACHE_TTL_MS": "1500"}).cache_ttl == timedelta(seconds=1.5)
    with pytest.raises(SettingsError, match="neither CREDENTIALS_CACHE_FILE nor APP_DIR is set"):
        _ = load(environ={}).cache_file


def test_a_database_url_wins_over_the_single_parts() -> None:
    parts = {"POSTGRES_HOST": "parts", "POSTGRES_DATABASE": "y", "POSTGRES_PORT": "5433", "POSTGRES_USER": "u"}
    of_parts = db.address(load(environ=parts))
    assert {name: of_parts[name] for name in ("host", "port", "dbname", "user")} == {
        "host": "parts", "port": 5433, "dbname": "y", "user": "u"
    }  # fmt: skip
    both = db.address(load(environ={"DATABASE_URL": "postgresql://whole/x", **parts}))
    assert (both["host"], both["dbname"]) == ("whole", "x")
    assert not {"port", "user"} & both.keys()
