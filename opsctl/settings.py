"""Settings from the environment and one `.env` file: every variable in one table, each value with its origin.

The environment wins over the file. An empty value counts as not set. A value that makes no sense is named and stops
the command: the scripts before us read `parseInt(x) || default`, so garbage silently became the default.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from opsctl.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _text(value: str) -> str:
    return value


def _path(value: str) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError("is the home of a user that does not exist") from None
    if not path.is_absolute():
        raise ValueError("is not an absolute path")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise ValueError(f"has a name of more than {_LONGEST_NAME} bytes")
    return path


_LONGEST_NAME = 255
"""In bytes; no filesystem of Linux takes more (NAME_MAX)."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", value):
            raise ValueError("is not a whole number")
        number = int(value[:20])  # which is out of any range here; int() refuses thousands of digits
        if not low <= number <= high:
            raise ValueError(f"is not between {low} and {high}")
        return number

    return parse


def _share(value: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        raise ValueError("is not a number")
    number = float(value)
    if not 0 < number <= 1:
        raise ValueError("is not a share between 0 and 1")
    return number


class Limits(NamedTuple):
    """From where on something is a warning, and from where on critical."""

    warning: int
    critical: int

    def __str__(self) -> str:
        return f"{self.warning}/{self.critical}"


class Flag(NamedTuple):
    """One environment variable that a switch sets."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def _limits(high: int, *, falling: bool = False) -> Callable[[str], Limits]:
    """`WARNING/CRITICAL`, whole numbers; the second is the larger one, or the smaller one of what gets less."""

    def parse(value: str) -> Limits:
        if not re.fullmatch(r"[0-9]{1,12}/[0-9]{1,12}", value):
            raise ValueError("is not WARNING/CRITICAL, two whole numbers")
        limits = Limits(*map(int, value.split("/")))
        if max(limits) > high:
            raise ValueError(f"is above {high}")
        first, last = reversed(limits) if falling else limits
        if first > last:
            raise ValueError("is critical before it is a warning")
        return limits

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return value

    return parse


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    # `all` and a leading dash would be something else to PM2.
    if not all(re.fullmatch(r"(?!all$)[A-Za-z0-9_@][A-Za-z0-9_.@:-]*", name) for name in names):
        raise ValueError("is not a list of service names with commas between them")
    return names


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(_path(path.strip()) for path in value.split(","))


class Words(tuple[str, ...]):
    """A command line, as a list of words."""

    __slots__ = ()

    def __str__(self) -> str:
        return shlex.join(self)


def _words(value: str) -> Words:
    try:
        return Words(shlex.split(value))
    except ValueError:
        raise ValueError("has an open quote") from None


def _flags(value: str) -> tuple[Flag, ...]:
    flags = tuple(Flag(*flag.strip().split("=", 1)) for flag in value.split(",") if "=" in flag)
    if len(flags) != value.count(",") + 1:
        raise ValueError("is not a list of NAME=value with commas between them")
    if not all(
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and re.fullmatch(r"[\w.:/@+-]*", to) for name, to in flags
    ):
        raise ValueError("is not a list of NAME=value, of plain words")
    return flags


def _patterns(value: str) -> tuple[str, ...]:
    patterns = tuple(pattern.strip() for pattern in value.split(","))
    if not all(patterns):
        raise ValueError("is not a list of words with commas between them")
    return patterns


def _git_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", value) or ".." in value:
        raise ValueError("is not the name of a tag")
    return value


def _file_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value) or value in {".", ".."}:
        raise ValueError("is not the name of a file in the service's folder")
    return value


def _company_address(value: str) -> str:
    if "{company}" not in value:
        raise ValueError("does not say where {company} goes")
    return _http_address(value)


def _host_and_port(value: str) -> str:
    match = re.fullmatch(r"[A-Za-z0-9.-]+:([0-9]{1,5})|none", value)
    if not match or not 0 < int(match[1] or 1) < 65536:
        raise ValueError("is neither host:port nor none")
    return value


class TimeOfDay(NamedTuple):
    """An hour and a minute, UTC."""

    hour: int
    minute: int

    def __str__(self) -> str:
        return f"{self.hour:02}:{self.minute:02}"


def _time_of_day(value: str) -> TimeOfDay:
    match = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", value)
    if not match:
        raise ValueError("is not a time like 03:00")
    return TimeOfDay(int(match[1]), int(match[2]))


def _bot_token(value: str) -> str:
    if not re.fullmatch(r"[0-9]+:[A-Za-z0-9_-]+", value):
        raise ValueError("is not a bot's token, as @BotFather gives it")
    return value


def _chat(value: str) -> str:
    if not re.fullmatch(r"-?[0-9]+|@[A-Za-z0-9_]+", value):
        raise ValueError("is neither a chat's number nor @channel")
    return value


def _http_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
        raise ValueError("is not an http(s) address")
    return value


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: how it is read, what it is for, what it is when nobody sets it."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    meaning: str
    example: str = ""
    secret: bool = False


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "DATABASE_URL",
        _text,
        None,
        "Where PostgreSQL is, as a libpq URL. Wins over POSTGRES_*.",
        "postgresql://user:password@db.example.com:5432/whatsapp?sslmode=verify-full",
        secret=True,
    ),
    Variable("POSTGRES_HOST", _text, None, "Host name, or the folder of a Unix socket.", "db.example.com"),
    Variable("POSTGRES_PORT", _whole(1, 65535), 5432, "TCP port."),
    Variable("POSTGRES_DATABASE", _text, None, "Database name.", "whatsapp"),
    Variable("POSTGRES_USER", _text, None, "Role; SELECT on the two tables is enough to restore.", "opsctl"),
    Variable("POSTGRES_PASSWORD", _text, None, "Its password.", "password", secret=True),
    Variable("POSTGRES_SSL_MODE", _one_of(*SSL_MODES), None, f"TLS: {', '.join(SSL_MODES)}.", "verify-full"),
    Variable(
        "OPSCTL_REPLICA_URL",
        _text,
        None,
        "A replica to restore from when the primary is gone, as a libpq URL.",
        "postgresql://user:password@replica.example.com:5432/whatsapp?sslmode=verify-full",
        secret=True,
    ),
    Variable("SESSIONS_DIR", _path, None, "Folder of the Baileys session folders (company_<id>).", "/srv/sessions"),
    Variable("APP_DIR", _path, None, "The service's folder; its owner owns what is restored.", "/srv/app"),
    Variable(
        "SERVICE_MANAGER",
        _one_of("pm2", "systemd", "command", "none"),
        "none",
        "Who starts and stops the service: pm2, systemd, command (the three commands below) or none.",
    ),
    Variable(
        "SERVICE_NAMES",
        _names,
        (),
        "Every service that owns sessions, with commas between them.",
        "baileys-whatsapp-service",
    ),
    Variable("SERVICE_USER", _text, None, "Whose PM2 it is. Else the owner of APP_DIR.", "app"),
    Variable("PM2_HOME", _path, None, "The folder of that PM2. Else .pm2 in its user's home.", "/home/app/.pm2"),
    Variable(
        "SERVICE_STATUS_COMMAND",
        _words,
        (),
        "Gets a name; exits 0 and prints the pids where it runs, 3 where it is stopped. No shell.",
        "/usr/local/bin/service-status",
    ),
    Variable("SERVICE_STOP_COMMAND", _words, (), "Gets a name and stops it.", "/usr/local/bin/service-stop"),
    Variable("SERVICE_START_COMMAND", _words, (), "Gets a name and starts it.", "/usr/local/bin/service-start"),
    Variable(
        "SERVICE_LOG",
        _paths,
        (),
        "The service's log files, with commas between them, where its manager does not know them.",
        "/var/log/app/service.log",
    ),
    Variable(
        "EMERGENCY_TAG", _git_name, "emergency-file-fallback-v1", "The git tag whose code runs on session folders."
    ),
    Variable(
        "FALLBACK_DIR",
        _path,
        None,
        "The worktree of that tag, with dependencies and an env file of its own; made by opsctl switch prepare.",
        "/srv/app-fallback",
    ),
    Variable(
        "FALLBACK_INSTALL_COMMAND",
        _words,
        Words(("npm", "ci")),
        "Installs its dependencies, in FALLBACK_DIR.",
        "npm ci",
    ),
    Variable(
        "FALLBACK_DRY_BOOT_COMMAND",
        _words,
        (),
        "Loads its code and configuration without connecting; ends with 0, or is stopped after some seconds. No shell.",
        "node -e \"require('./src/config')\"",
    ),
    Variable("FALLBACK_DRY_BOOT_SECONDS", _whole(1, 300), 10, "How long it has to run to count as started, in s."),
    Variable("SERVICE_ENV_FILE", _file_name, ".env", "The service's env file, in APP_DIR and in FALLBACK_DIR."),
    Variable(
        "SWITCH_FLAGS",
        _flags,
        (
            Flag("USE_REPOSITORY_PATTERN", "false"),
            Flag("USE_DATABASE_AUTH_STATE", "false"),
            Flag("USE_LEGACY_SUPABASE", "false"),
        ),
        "What the service needs in its environment to run on session folders.",
    ),
    Variable(
        "CONNECTED_PATTERNS",
        _patterns,
        ("connection open", "Connected to WhatsApp"),
        "What the service logs, beside a company's id, when it is connected; with commas between them.",
    ),
    Variable(
        "CONNECTED_ADDRESS",
        _company_address,
        None,
        "Answers 200 when {company} is connected, for services whose log does not tell.",
        "http://127.0.0.1:3000/health/{company}",
    ),
    Variable("CONNECT_TIMEOUT_SECONDS", _whole(1, 3600), 180, "How long companies may take to connect, in s."),
    Variable(
        "CONNECT_WATCH_SECONDS",
        _whole(0, 600),
        60,
        "How long the log is watched for undecryptable messages once they are connected, in s.",
    ),
    Variable(
        "WHATSAPP_ADDRESS",
        _host_and_port,
        "web.whatsapp.com:443",
        "Where triage looks whether WhatsApp can be reached; none where only a proxy leads there.",
    ),
    Variable("OPSCTL_STATE_DIR", _path, None, "History and alert state. Else $XDG_STATE_HOME/opsctl."),
    Variable("STANDBY_DIR", _path, None, "Folder of the warm copies. Else $OPSCTL_STATE_DIR/standby.", "/srv/standby"),
    Variable("STANDBY_MAX_AGE_SECONDS", _whole(1, 86400), 300, "Alert when a warm copy is older, in seconds."),
    Variable("STANDBY_KEEP_HOURS", _whole(1, 720), 24, "How long replaced warm copies are kept, in hours."),
    Variable("OPSCTL_ENVIRONMENT", _text, None, "Name of this installation. Else SENTRY_ENVIRONMENT.", "production"),
    Variable("RTO_TARGET_SECONDS", _whole(1, 86400), 600, "Recovery time objective, in seconds."),
    Variable("DB_CLEANUP_RETENTION_DAYS", _whole(7, 3650), 30, "Days to keep session keys before cleanup."),
    Variable(
        "STORED_FORM",
        _one_of("json-stringify", "base64"),
        None,
        "How the service stores bytes: json-stringify or base64. Else as each company's rows have them.",
        "json-stringify",
    ),
    Variable("ARCHIVE_KEEP_DAYS", _whole(1, 3650), 90, "Days to keep the rows that were deleted or changed."),
    Variable("CLEANUP_AT", _time_of_day, TimeOfDay(3, 0), "When cron runs the cleanup, in UTC; not with a backup."),
    Variable("DB_QUERY_LATENCY_THRESHOLD_MS", _whole(1, 600000), 500, "Alert threshold for slow queries, in ms."),
    Variable("DB_POOL_USAGE_THRESHOLD", _share, 0.8, "Alert when more of the connections are in use."),
    Variable("HEALTH_REPLY_MS", _limits(60000), Limits(500, 2000), "First reply: warning/critical, in ms."),
    Variable("HEALTH_LATENCY_CRITICAL_MS", _whole(1, 600000), 2000, "From when on slow queries are critical, in ms."),
    Variable("HEALTH_POOL_CRITICAL", _share, 0.9, "Critical when more of the connections are in use."),
    Variable("HEALTH_BLOCKED_S", _limits(86400), Limits(30, 120), "Longest wait for a lock, in s."),
    Variable("HEALTH_BLOCKED_SESSIONS", _limits(10000), Limits(3, 6), "Sessions that wait for locks."),
    Variable("HEALTH_IDLE_TRANSACTION_S", _limits(86400), Limits(60, 300), "Longest idle transaction, in s."),
    Variable("HEALTH_LONG_QUERY_S", _limits(86400), Limits(60, 300), "Longest running query, in s."),
    Variable("HEALTH_PREPARED_S", _limits(86400), Limits(1, 30), "Oldest prepared transaction, in s."),
    Variable("HEALTH_WRAPAROUND_IDS", _limits(2**31), Limits(10**9, 13 * 10**8), "Age of the oldest transaction id."),
    Variable("HEALTH_DEAD_ROWS_PERCENT", _limits(100), Limits(10, 30), "Dead rows of a table, in % of its rows."),
    Variable("HEALTH_VACUUM_DAYS", _limits(3650), Limits(2, 7), "Days since the last vacuum of a table with writes."),
    Variable("HEALTH_FEW_ROWS", _whole(0, 10**9), 10000, "No more dead or unvacuumed rows of a table are not judged."),
    Variable("HEALTH_REPLICATION_S", _limits(86400), Limits(30, 300), "Replication lag, in s."),
    Variable("HEALTH_REPLICATION_MIB", _limits(10**7), Limits(64, 1024), "Replication lag, in MiB of WAL."),
    Variable("HEALTH_CLOCK_SKEW_S", _limits(86400), Limits(2, 5), "Clock skew between here and the server, in s."),
    Variable(
        "HEALTH_CERTIFICATE_DAYS", _limits(3650, falling=True), Limits(30, 7), "Days left of the server's certificate."
    ),
    Variable("HEALTH_DISK_PERCENT", _limits(100), Limits(85, 95), "Use of the disks that are written to, in %."),
    Variable("HEALTH_EXPIRED_KEYS", _limits(10**9), Limits(100, 500), "Keys that a cleanup would delete."),
    Variable("HEALTH_STANDBY_AGE_S", _limits(10**7), Limits(300, 3600), "Age of the oldest warm copy, in s."),
    Variable("CREDENTIALS_CACHE_TTL_MS", _whole(1, 86400000), 300000, "Life of a cached credentials entry, in ms."),
    Variable("CREDENTIALS_CACHE_FILE", _path, None, "The service's cache. Else APP_DIR/.baileys-cache.json."),
    Variable("CACHE_MAX_ENTRIES", _whole(1, 2000), 1000, "Companies in the credentials cache; the oldest go first."),
    Variable(
        "SENTRY_DSN",
        _http_address,
        None,
        "Error tracking (Sentry or GlitchTip). Without it nothing is sent.",
        "https://key@sentry.example.com/1",
        secret=True,
    ),
    Variable("SENTRY_ENVIRONMENT", _text, "production", "Environment that failures are reported under."),
    Variable(
        "HEALTHCHECK_URL",
        _http_address,
        None,
        "Dead-man ping of what cron runs: told /start, nothing more or /EXIT-CODE; {job} becomes the job's name.",
        "https://hc-ping.com/ping-key/{job}?create=1",
        secret=True,
    ),
    Variable(
        "TELEGRAM_BOT_TOKEN",
        _bot_token,
        None,
        "The bot that tells a chat of failed emergency commands and of cleanups.",
        "123456:token-of-the-bot",
        secret=True,
    ),
    Variable("TELEGRAM_CHAT_ID", _chat, None, "The chat: its number, or @channel.", "-1001234567890"),
    Variable(
        "TELEGRAM_API_URL",
        _http_address,
        "https://api.telegram.org",
        "Where Telegram's API is, or a server of your own.",
    ),
)


def _shown(value: Any) -> str:  # noqa: ANN401 - each variable has its own type
    return ",".join(map(str, value)) if type(value) is tuple else str(value)


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value. `origin` is `environment`, the file's path, or `default`."""

    variable: Variable
    value: Any
    origin: str
    problem: str | None = None

    def shown(self) -> str:
        """The value as it may be printed: secrets never are."""
        if self.value is None:
            return ""
        return "********" if self.variable.secret else _shown(self.value)


@dataclass(frozen=True)
class Settings:
    """The effective settings of one run."""

    all: Mapping[str, Setting] = field(repr=False)
    env_file: Path | None

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - each variable has its own type
        return self.all[name].value

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence per variable that makes no sense."""
        return tuple(s.problem for s in self.all.values() if s.problem)

    def require_sound(self) -> None:
        """Raises `SettingsError` naming every variable that makes no sense."""
        if self.problems:
            raise SettingsError("; ".join(self.problems), hint="opsctl config show")

    @property
    def sessions_dir(self) -> Path:
        """SESSIONS_DIR, else APP_DIR/baileys_sessions; raises `SettingsError` naming both."""
        if self["SESSIONS_DIR"]:
            return Path(self["SESSIONS_DIR"])
        if self["APP_DIR"]:
            return Path(self["APP_DIR"]) / "baileys_sessions"
        raise SettingsError("neither SESSIONS_DIR nor APP_DIR is set", hint="set one of them")

    @property
    def cache_file(self) -> Path:
        """CREDENTIALS_CACHE_FILE, else APP_DIR/.baileys-cache.json; raises `SettingsError` naming both."""
        if self["CREDENTIALS_CACHE_FILE"]:
            return Path(self["CREDENTIALS_CACHE_FILE"])
        if self["APP_DIR"]:
            return Path(self["APP_DIR"]) / ".baileys-cache.json"
        raise SettingsError("neither CREDENTIALS_CACHE_FILE nor APP_DIR is set", hint="set one of them")

    @property
    def cache_ttl(self) -> timedelta:
        """CREDENTIALS_CACHE_TTL_MS."""
        return timedelta(milliseconds=self["CREDENTIALS_CACHE_TTL_MS"])

    @property
    def environment(self) -> str:
        """The installation's name: a folder of another environment is never written over."""
        return str(self["OPSCTL_ENVIRONMENT"] or self["SENTRY_ENVIRONMENT"])

    @property
    def state_dir(self) -> Path:
        """OPSCTL_STATE_DIR, else $XDG_STATE_HOME/opsctl, else ~/.local/state/opsctl."""
        if self["OPSCTL_STATE_DIR"]:
            return Path(self["OPSCTL_STATE_DIR"])
        xdg = os.environ.get("XDG_STATE_HOME", "")
        if xdg.startswith("/"):
            return Path(xdg) / "opsctl"
        try:
            return Path.home() / ".local" / "state" / "opsctl"
        except RuntimeError:
            raise SettingsError("this user has no home, and OPSCTL_STATE_DIR is not set") from None

    @property
    def standby_dir(self) -> Path:
        """STANDBY_DIR, else `standby` in the state folder."""
        return Path(self["STANDBY_DIR"]) if self["STANDBY_DIR"] else self.state_dir / "standby"

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, and the password inside a connection string, for whoever scrubs text."""
        found = {str(s.value) for s in self.all.values() if s.variable.secret and s.value}
        found |= {m for value in found for m in re.findall(r"://[^:@/]*:(.+)@", value)}
        found |= {m for value in found for m in re.findall(r"\bpassword\s*=\s*'?([^\s&']+)", value)}
        found |= {os.environ["PGPASSWORD"]} if os.environ.get("PGPASSWORD") else set()
        found |= {unquote(value) for value in found}
        return tuple(sorted(found, key=len, reverse=True))


def load(env_file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. `env_file` must exist when given; otherwise OPSCTL_ENV_FILE, then `./.env` where it exists.

    Values that make no sense are kept as problems, so that `config show` can print them all; every other command calls
    `require_sound`.
    """
    environ = os.environ if environ is None else environ
    named = env_file or (Path(environ["OPSCTL_ENV_FILE"]) if environ.get("OPSCTL_ENV_FILE") else None)
    path = named or Path(".env")
    from_file = _read_env_file(path, required=named is not None)
    settings = {}
    for variable in VARIABLES:
        name = variable.name
        if text := environ.get(name, "").strip():
            settings[name] = _setting(variable, text, "environment")
        elif text := from_file.get(name, "").strip():
            settings[name] = _setting(variable, text, str(path))
        else:
            settings[name] = Setting(variable, variable.default, "default")
    return Settings(settings, path if from_file else None)


def _setting(variable: Variable, text: str, origin: str) -> Setting:
    try:
        return Setting(variable, variable.parse(text), origin)
    except ValueError as error:
        shown = "" if variable.secret else f" ({text[:60]!r})"
        return Setting(variable, variable.default, origin, f"{variable.name}{shown} {error}")


def _read_env_file(path: Path, *, required: bool) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if required:
            raise SettingsError(f"the settings file {path} does not exist", hint="check --env-file") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"the settings file {path} cannot be read: {reason}", hint="check --env-file") from None
    import io

    from dotenv.parser import parse_stream

    # The parser alone, without dotenv's interpolation: a `$` in a password is a `$`, also inside single quotes.
    values = {}
    for line in parse_stream(io.StringIO(text)):
        if line.error:
            _refuse_torn(line.original.string, line.original.line, path)
        elif line.key and line.value is not None:
            values[line.key] = line.value
    return values


def _refuse_torn(line: str, number: int, path: Path) -> None:
    """Raises `SettingsError` for a line of ours that cannot be read; what other programs write there is theirs."""
    name = next((v.name for v in VARIABLES if re.match(rf"\s*(export\s+)?{v.name}\b", line)), None)
    if name:
        raise SettingsError(f"{name} in line {number} of {path} cannot be read", hint="are its quotes closed?")


def env_example() -> str:
    """The text of `.env.example`: every variable, documented; nothing secret has a default."""
    lines = ["# Settings of opsctl. All are optional; the environment wins over this file.", ""]
    for variable in VARIABLES:
        lines.append(f"# {variable.meaning}")
        value = variable.example or ("" if variable.default is None else _shown(variable.default))
        lines += [f"#{variable.name}={value}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(env_example())
