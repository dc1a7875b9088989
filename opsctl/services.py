"""The door to the service manager: do the services that own the sessions run, and stopping and starting them.

PM2, systemd, or three commands of the operator's. Programs are started from lists of words, under a clock, in an
environment chosen word by word: PM2 keeps what it is started with, and hands it to the service. Stopped means proven:
each service is known to its manager, is not about to be started by it, and has no process.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from opsctl import process
from opsctl.errors import HalfDone, Refused, SettingsError
from opsctl.process import Account

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from opsctl.db import Connection
    from opsctl.settings import Settings

LOOK_TIMEOUT_S = 10.0
"""PM2 and its Node take a second to answer on an idle machine."""
ACT_TIMEOUT_S = 60.0
STAND_STILL_S = 3.0
"""PostgreSQL publishes a session's counters at most a second after its transaction."""
_LOOK_EVERY_S = 0.2
_SOCKET_TIMEOUT_S = 1.0
_CGROUPS = Path("/sys/fs/cgroup")
_HIERARCHIES = ("", "unified", "systemd")
"""Where systemd keeps its groups below that: today, in its hybrid layout, and in the one before."""
_JOURNAL_LINES = 5000


class State(StrEnum):
    """What a service does, as far as it can be proven."""

    RUNNING = "running"
    STARTING = "starting"
    """It has no process at this moment, and its manager will give it one."""
    STOPPED = "stopped"
    """Its manager knows it, will not start it, and it has no process."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Service:
    """One service as its manager sees it now."""

    name: str
    state: State
    said: str
    """The manager's own word, or why it is unknown."""
    pids: tuple[int, ...] = ()
    since: datetime | None = None
    """When its process was started."""
    restarts: int | None = None
    logs: tuple[Path, ...] = ()
    journal: str | None = None
    """The systemd unit whose journal holds its log."""
    cron: str | None = None
    """When PM2 restarts it, which it also does to a service that was stopped."""
    handles: tuple[str, ...] = ()
    """What the manager takes for its name: PM2's ids, because PM2 takes a name for a namespace too."""

    @property
    def known(self) -> bool:
        """Whether the manager could say anything about it."""
        return self.state is not State.UNKNOWN


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether every service is stopped; `reason` names the first that is not, or says why nobody knows."""

    stopped: bool | None
    """None where that is not known."""
    reason: str


class Manager(Protocol):
    """One way to look at services, and the lines that stop and start them."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def look(self, timeout_s: float) -> tuple[Service, ...]: ...
    def stop_lines(self, services: Sequence[Service]) -> list[list[str]]: ...
    def start_lines(self, services: Sequence[Service], *, new_environment: bool) -> list[list[str]]: ...
    def typed(self, verb: Literal["stop", "start"]) -> list[list[str]]: ...
    def run(self, words: Sequence[str], timeout_s: float, more: Mapping[str, str]) -> process.Finished: ...


def manager(settings: Settings) -> Manager | None:
    """The manager that the settings name; None for `none`. Raises `SettingsError` naming what is missing."""
    kind, names, logs = settings["SERVICE_MANAGER"], settings["SERVICE_NAMES"], settings["SERVICE_LOG"]
    if kind == "none":
        return None
    if not names:
        raise SettingsError(f"SERVICE_MANAGER is {kind} and SERVICE_NAMES is not set", hint="set SERVICE_NAMES")
    if kind == "systemd":
        return Systemd(names, logs)
    if kind == "pm2":
        whose = account(settings)
        return Pm2(names, logs, whose, settings["PM2_HOME"] or whose.home / ".pm2")
    commands = [settings[name] for name in _COMMANDS]
    missing = [name for name, words in zip(_COMMANDS, commands, strict=True) if not words]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise SettingsError(f"SERVICE_MANAGER is command and {', '.join(missing)} {verb} not set")
    return Command(names, logs, *commands)


_COMMANDS = ("SERVICE_STATUS_COMMAND", "SERVICE_STOP_COMMAND", "SERVICE_START_COMMAND")


def account(settings: Settings) -> Account:
    """SERVICE_USER, else the owner of APP_DIR, else whoever runs this."""
    name, app_dir = settings["SERVICE_USER"], settings["APP_DIR"]
    uid = os.geteuid()
    if app_dir is not None:
        with suppress(OSError):
            uid = app_dir.stat().st_uid
    try:
        entry = pwd.getpwnam(name) if name else pwd.getpwuid(uid)
    except KeyError:
        who = f"SERVICE_USER ({name})" if name else f"the owner of APP_DIR (uid {uid})"
        raise SettingsError(f"{who} is no user of this machine", hint="set SERVICE_USER") from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def status(manager: Manager, *, timeout_s: float = LOOK_TIMEOUT_S) -> tuple[Service, ...]:
    """Every service of SERVICE_NAMES, in that order. What the manager cannot say is `unknown`, with the reason."""
    return manager.look(timeout_s)


def proven_stopped(manager: Manager | None, *, timeout_s: float = LOOK_TIMEOUT_S) -> Proof:
    """Whether every service of SERVICE_NAMES is known to its manager, will not be started by it and has no process."""
    if manager is None:
        return Proof(None, "SERVICE_MANAGER is none, so nobody here can tell")
    return _proof(manager.look(timeout_s))


def _proof(services: Sequence[Service]) -> Proof:
    for service in services:
        if service.state in {State.RUNNING, State.STARTING}:
            pids = f" (pid {', '.join(map(str, service.pids))})" if service.pids else ""
            return Proof(False, f"{service.name} is {service.said}{pids}")
    for service in services:
        if not service.known:
            return Proof(None, f"{service.name}: {service.said}")
    return Proof(True, f"{', '.join(service.name for service in services)}: stopped, no process")


def stands_still(connection: Connection, *, seconds: float = STAND_STILL_S) -> bool:
    """Whether nobody changes the two tables of sessions for some seconds. Needs a connection in autocommit."""
    before = _changes(connection)
    time.sleep(seconds)
    return _changes(connection) == before


@dataclass(frozen=True, slots=True)
class _Changes:
    changes: int


def _changes(connection: Connection) -> int:
    from opsctl import db
    from opsctl.queries import query

    (row,) = db.rows(connection, query("count_changes"), _Changes)
    return row.changes


def typed(manager: Manager | None, verb: Literal["stop", "start"]) -> list[str]:
    """The lines with which a person stops or starts every service."""
    return [shlex.join(words) for words in manager.typed(verb)] if manager else [f"pm2 {verb} SERVICES"]


# --- acting -----------------------------------------------------------------------------------------------------------


def stop(manager: Manager, *, timeout_s: float = ACT_TIMEOUT_S) -> tuple[Service, ...]:
    """Stop every service and prove it: they and all processes below them are gone.

    Raises `Refused` where a service is not known or would not stay stopped (nothing was done), `HalfDone` where one is
    not proven stopped.
    """
    give_up_at = time.monotonic() + timeout_s
    services = _all_known(manager, timeout_s)
    for service in services:
        if service.cron is not None:
            raise Refused(
                f"PM2 restarts {service.name} by cron ({service.cron}), also after a stop",
                kind="service-by-cron",
                hint=f"pm2 restart {service.name} --cron-restart 0; pm2 stop {service.name}",
            )
    processes = {found for service in services for pid in service.pids for found in _with_children(pid)}
    running = [service for service in services if service.state is not State.STOPPED]
    complaint = _run_all(manager, manager.stop_lines(running) if running else [], give_up_at, {})
    while True:
        services = manager.look(LOOK_TIMEOUT_S)  # a look that is cut short proves nothing
        proof = _proof(services)
        left = sorted(pid for pid, started_at in processes if _started_at(pid) == started_at)
        if proof.stopped and not left:
            return services
        if time.monotonic() >= give_up_at or complaint:
            what = proof.reason if not proof.stopped else f"what it had started still runs (pid {left[0]})"
            raise HalfDone(
                f"not stopped: {what}{complaint}", kind="not-stopped", hint="stop it by hand, then look again"
            )
        time.sleep(_LOOK_EVERY_S)


def start(
    manager: Manager,
    *,
    environment: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    timeout_s: float = ACT_TIMEOUT_S,
) -> tuple[Service, ...]:
    """Start every service that does not run, or `only` these, and wait until each has a process.

    `environment` reaches the service through PM2 (`--update-env`) or a start command; a systemd unit reads its own
    EnvironmentFile. What counts is what `environment_of` finds afterwards.

    Raises `Refused` where a service is not known (nothing was done), `HalfDone` where one does not run.
    """
    give_up_at = time.monotonic() + timeout_s
    services = _all_known(manager, timeout_s)
    names = set(manager.names if only is None else only)
    idle = [service for service in services if service.state is not State.RUNNING and service.name in names]
    return _started(manager, idle, names, give_up_at, environment or {})


def restart(
    manager: Manager, *, environment: Mapping[str, str] | None = None, timeout_s: float = ACT_TIMEOUT_S
) -> tuple[Service, ...]:
    """Stop every service, proven, and start it again with `environment` (see `start`)."""
    give_up_at = time.monotonic() + timeout_s
    services = stop(manager, timeout_s=timeout_s)
    return _started(manager, services, set(manager.names), give_up_at, environment or {})


def _all_known(manager: Manager, timeout_s: float) -> tuple[Service, ...]:
    services = manager.look(min(timeout_s, LOOK_TIMEOUT_S))
    for service in services:
        if not service.known:
            raise Refused(f"{service.name}: {service.said}", kind="service-unknown", hint="opsctl config show")
    return services


def _started(
    manager: Manager, idle: Sequence[Service], names: set[str], give_up_at: float, environment: Mapping[str, str]
) -> tuple[Service, ...]:
    lines = manager.start_lines(idle, new_environment=bool(environment)) if idle else []
    complaint = _run_all(manager, lines, give_up_at, environment)
    while True:
        services = manager.look(LOOK_TIMEOUT_S)  # a look that is cut short proves nothing
        waiting = [service for service in services if service.state is not State.RUNNING and service.name in names]
        if not waiting:
            return services
        if time.monotonic() >= give_up_at or complaint:
            first = waiting[0]
            hint = f"tail -n 50 {first.logs[-1]}" if first.logs else f"journalctl -n 50 -u {first.name}"
            raise HalfDone(f"not started: {first.name} is {first.said}{complaint}", kind="not-started", hint=hint)
        time.sleep(_LOOK_EVERY_S)


def _run_all(manager: Manager, lines: list[list[str]], give_up_at: float, environment: Mapping[str, str]) -> str:
    """Run the lines; gives what the first that failed has to say, as the end of a sentence."""
    for words in lines:
        done = manager.run(words, max(1.0, give_up_at - time.monotonic()), environment)
        if done.exit_code != 0:
            ended = "did not end" if done.exit_code is None else f"ended with {done.exit_code}"
            return f"; {words[0]} {words[1]} {ended}"
    return ""


def pm2_processes(settings: Settings, *, timeout_s: float = LOOK_TIMEOUT_S) -> list[dict[str, Any]]:
    """What PM2 knows of each process it has, with its environment; none where it cannot be asked."""
    whose = account(settings)
    listed, _ = Pm2((), (), whose, settings["PM2_HOME"] or whose.home / ".pm2").listed(timeout_s)
    return [{"name": entry.get("name"), **_mapping(entry.get("pm2_env"))} for entry in listed]


# --- PM2 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pm2:
    """PM2 of one user, in one folder."""

    names: tuple[str, ...]
    logs: tuple[Path, ...]
    account: Account
    home: Path

    def look(self, timeout_s: float) -> tuple[Service, ...]:
        listed, problem = self.listed(timeout_s)
        if problem is None and not listed:
            problem = f"the PM2 of {self.account.name} in {self.home} has no processes at all: is it the right one?"
        return tuple(
            self._service(name, [entry for entry in listed if entry.get("name") == name], problem)
            for name in self.names
        )

    def listed(self, timeout_s: float) -> tuple[list[dict[str, Any]], str | None]:
        """PM2's whole process list, or why there is none. It holds the environments, and so secrets."""
        problem = self._unreachable()
        if problem is not None:
            return [], problem
        found = _process_list(self.run(("pm2", "jlist"), timeout_s, {}).stdout)
        return found or [], None if found is not None else f"PM2 of {self.account.name} does not answer"

    def _unreachable(self) -> str | None:
        """Why PM2 cannot be asked. It starts a daemon wherever it finds none, so the daemon is looked for first."""
        if os.geteuid() not in {0, self.account.uid}:
            return f"only root and {self.account.name} can ask the PM2 of {self.account.name}"
        if shutil.which("pm2") is None:
            return "the program pm2 is not found on PATH"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(_SOCKET_TIMEOUT_S)
            try:
                client.connect(str(self.home / "rpc.sock"))
            except OSError:
                return f"no PM2 of {self.account.name} runs in {self.home}"
        return None

    def _service(self, name: str, entries: Sequence[Mapping[str, Any]], problem: str | None) -> Service:
        if not entries:
            said = problem or f"the PM2 of {self.account.name} does not know it"
            return Service(name, State.UNKNOWN, said, logs=self.logs)
        details = [_mapping(entry.get("pm2_env")) for entry in entries]
        words = [str(detail.get("status")) for detail in details]
        pids = tuple(pid for entry in entries if _started_at(pid := int(entry.get("pid") or 0)) is not None)
        crons = [str(detail["cron_restart"]) for detail in details if detail.get("cron_restart") not in _NO_CRON]
        said = ", ".join(dict.fromkeys(words))
        if pids:
            state = State.RUNNING
        elif not set(words) <= _PM2_AT_REST:
            state = State.STARTING
        elif crons:
            state, said = State.STARTING, f"{said}, and PM2 starts it by cron ({crons[0]})"
        else:
            state = State.STOPPED
        uptimes = [detail["pm_uptime"] for detail in details if isinstance(detail.get("pm_uptime"), int)]
        return Service(
            name,
            state,
            said,
            pids,
            since=datetime.fromtimestamp(max(uptimes) / 1000, UTC) if uptimes and pids else None,
            restarts=sum(int(detail.get("restart_time") or 0) for detail in details),
            logs=tuple(dict.fromkeys([*self.logs, *_pm2_logs(details)])),
            cron=crons[0] if crons else None,
            handles=tuple(str(entry.get("pm_id")) for entry in entries),
        )

    def stop_lines(self, services: Sequence[Service]) -> list[list[str]]:
        return [["pm2", "stop", *_handles(services)]]

    def start_lines(self, services: Sequence[Service], *, new_environment: bool) -> list[list[str]]:
        if new_environment:
            return [["pm2", "restart", *_handles(services), "--update-env"]]
        return [["pm2", "start", *_handles(services)]]

    def typed(self, verb: Literal["stop", "start"]) -> list[list[str]]:
        as_its_user = [] if os.geteuid() == self.account.uid else ["sudo", "-iu", self.account.name]
        return [[*as_its_user, "pm2", verb, *self.names]]

    def run(self, words: Sequence[str], timeout_s: float, more: Mapping[str, str]) -> process.Finished:
        """Run PM2 as its user, in that user's environment: `--update-env` hands it to the service."""
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.account.home),
            "USER": self.account.name,
            "LOGNAME": self.account.name,
            "PM2_HOME": str(self.home),
            **more,
        }
        account = self.account if os.geteuid() == 0 and self.account.uid != 0 else None
        return _run(words, environment, timeout_s, account)


_PM2_AT_REST = {"stopped", "errored"}
"""`errored`: it ended too often, and PM2 has given it up."""
_NO_CRON = {None, "", "0", 0}


def _process_list(output: bytes) -> list[dict[str, Any]] | None:
    """PM2's process list, which may stand below lines of advertisement. None where there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"["):
            with suppress(orjson.JSONDecodeError):
                found = orjson.loads(line)
                if isinstance(found, list):
                    return [entry for entry in found if isinstance(entry, dict)]
    return None


def _pm2_logs(details: Iterable[Mapping[str, Any]]) -> Iterator[Path]:
    for detail in details:
        for name in ("pm_out_log_path", "pm_err_log_path"):
            path = detail.get(name)
            if isinstance(path, str) and path.startswith("/") and path != os.devnull:
                yield Path(path)


def _handles(services: Sequence[Service]) -> list[str]:
    return [handle for service in services for handle in service.handles]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- systemd ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Systemd:
    """systemd of this machine."""

    names: tuple[str, ...]
    logs: tuple[Path, ...]

    def look(self, timeout_s: float) -> tuple[Service, ...]:
        give_up_at = time.monotonic() + timeout_s
        return tuple(self._service(name, max(0.1, give_up_at - time.monotonic())) for name in self.names)

    def _service(self, name: str, timeout_s: float) -> Service:
        done = self.run(("systemctl", "show", "--property", _PROPERTIES, "--", name), timeout_s, {})
        said = dict(line.split("=", 1) for line in done.stdout.decode(errors="replace").splitlines() if "=" in line)
        load, active = said.get("LoadState", ""), said.get("ActiveState", "")
        if done.exit_code != 0 or load not in {"loaded", "masked"}:
            why = f"systemd says {load}" if load else "systemctl does not answer"
            return Service(name, State.UNKNOWN, why, logs=self.logs)
        pids = tuple(dict.fromkeys([*_number(said.get("MainPID")), *_control_group(said.get("ControlGroup", ""))]))
        if pids or active in {"active", "reloading"}:
            state = State.RUNNING
        else:
            state = State.STOPPED if active in {"inactive", "failed"} else State.STARTING
        left_behind = ", but not all that it started" if pids and active in {"inactive", "failed"} else ""
        return Service(
            name,
            state,
            f"{active} ({said.get('SubState', '')}){left_behind}",
            pids,
            since=_epoch(said.get("ExecMainStartTimestamp", "")) if pids else None,
            restarts=next(iter(_number(said.get("NRestarts"), least=0)), None),
            logs=self.logs,
            journal=None if self.logs else name,
            handles=(name,),
        )

    def stop_lines(self, services: Sequence[Service]) -> list[list[str]]:
        return [["systemctl", "stop", "--", *_handles(services)]]

    def start_lines(self, services: Sequence[Service], *, new_environment: bool) -> list[list[str]]:  # noqa: ARG002
        return [["systemctl", "start", "--", *_handles(services)]]

    def typed(self, verb: Literal["stop", "start"]) -> list[list[str]]:
        return [["systemctl", verb, *self.names]]

    def run(self, words: Sequence[str], timeout_s: float, more: Mapping[str, str]) -> process.Finished:  # noqa: ARG002
        return _run_systemd(words, timeout_s)


_PROPERTIES = "LoadState,ActiveState,SubState,MainPID,ControlGroup,NRestarts,ExecMainStartTimestamp"


def _run_systemd(words: Sequence[str], timeout_s: float) -> process.Finished:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC", "SYSTEMD_PAGER": ""}
    return _run(words, environment, timeout_s, None)


def _control_group(name: str) -> list[int]:
    """The processes of a unit's control group, which outlive a main process that left them behind."""
    if not name.startswith("/"):
        return []
    pids: list[int] = []
    for hierarchy in _HIERARCHIES:
        with suppress(OSError):
            for path in (_CGROUPS / hierarchy / name.lstrip("/")).rglob("cgroup.procs"):
                pids += map(int, path.read_text(encoding="ascii").split())
    return pids


def _epoch(text: str) -> datetime | None:
    """`Tue 2026-11-24 22:50:01 UTC`, as systemctl writes a time in UTC."""
    with suppress(ValueError):
        return datetime.strptime(text, "%a %Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
    return None


def _number(text: str | None, *, least: int = 1) -> list[int]:
    return [int(text)] if text and text.isdigit() and int(text) >= least else []


# --- the operator's own commands --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Command:
    """Each command gets a service's name as its last word. The status command answers as init scripts do (LSB)."""

    names: tuple[str, ...]
    logs: tuple[Path, ...]
    status_command: tuple[str, ...]
    stop_command: tuple[str, ...]
    start_command: tuple[str, ...]

    def look(self, timeout_s: float) -> tuple[Service, ...]:
        give_up_at = time.monotonic() + timeout_s
        return tuple(self._service(name, max(0.1, give_up_at - time.monotonic())) for name in self.names)

    def _service(self, name: str, timeout_s: float) -> Service:
        done = self.run((*self.status_command, name), timeout_s, {})
        words = done.stdout.decode(errors="replace").split()
        pids = tuple(int(word) for word in words if word.isdigit() and _started_at(int(word)) is not None)
        if done.exit_code == _LSB_RUNNING or pids:
            state, said = State.RUNNING, "running"
        elif done.exit_code == _LSB_STOPPED:
            state, said = State.STOPPED, "stopped"
        else:
            ended = "did not end in time" if done.exit_code is None else f"ended with {done.exit_code}"
            state, said = State.UNKNOWN, f"{self.status_command[0]} {ended}"
        return Service(name, state, said, pids, logs=self.logs, handles=(name,))

    def stop_lines(self, services: Sequence[Service]) -> list[list[str]]:
        return [[*self.stop_command, service.name] for service in services]

    def start_lines(self, services: Sequence[Service], *, new_environment: bool) -> list[list[str]]:  # noqa: ARG002
        return [[*self.start_command, service.name] for service in services]

    def typed(self, verb: Literal["stop", "start"]) -> list[list[str]]:
        command = self.stop_command if verb == "stop" else self.start_command
        return [[*command, name] for name in self.names]

    def run(self, words: Sequence[str], timeout_s: float, more: Mapping[str, str]) -> process.Finished:
        names = ("PATH", "HOME", "USER", "LOGNAME", "LANG")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        return _run(words, {**environment, **more}, timeout_s, None)


_LSB_RUNNING, _LSB_STOPPED = 0, 3  # Linux Standard Base, "Init Script Actions", status


def _run(
    words: Sequence[str], environment: Mapping[str, str], timeout_s: float, account: Account | None
) -> process.Finished:
    try:
        return process.run(words, environment=environment, timeout_s=timeout_s, account=account)
    except OSError as error:
        return process.Finished(127, b"", f"{words[0]}: {error.strerror}")


# --- processes --------------------------------------------------------------------------------------------------------


def environment_of(pid: int) -> dict[str, str] | None:
    """The environment that a process was started with; None where it is gone or not ours to read.

    What a program sets for itself (dotenv) is not in it. A worker of PM2's cluster mode carries its own as JSON.
    """
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    found = dict(entry.split("=", 1) for entry in data.decode(errors="surrogateescape").split("\0") if "=" in entry)
    with suppress(orjson.JSONDecodeError, UnicodeEncodeError):
        cluster = orjson.loads(found.get("pm2_env", ""))
        if isinstance(cluster, dict):
            found |= {name: value for name, value in cluster.items() if isinstance(value, str)}
    return found


def _with_children(pid: int) -> Iterator[tuple[int, int]]:
    """A process and all below it, each with when it was started, which tells it from a later one of the same number."""
    started_at = _started_at(pid)
    if started_at is None:
        return
    yield pid, started_at
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _with_children(int(child))


def _started_at(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where there is none, or only its remains (zombie)."""
    if pid <= 0:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else int(fields[19])


# --- logs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogMark:
    """A moment in the logs of some services: what is written after it can be read."""

    at: float
    """Seconds since the epoch, for journals."""
    ends: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    """Inode and size of each file at that moment."""

    def kept(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"at": self.at, "ends": {str(path): list(end) for path, end in self.ends.items()}}

    @classmethod
    def of_kept(cls, kept: object) -> LogMark:
        """What `kept` gave; the beginning of all logs where that is lost."""
        if not isinstance(kept, dict):
            return cls(0.0)
        return cls(kept["at"], {Path(path): (inode, size) for path, (inode, size) in kept["ends"].items()})


def mark_logs(services: Sequence[Service]) -> LogMark:
    """Remember where the logs end now."""
    ends = {}
    for path in _log_files(services):
        with suppress(OSError):
            found = path.stat()
            ends[path] = (found.st_ino, found.st_size)
    return LogMark(time.time(), ends)


def lines_after(services: Sequence[Service], mark: LogMark, *, timeout_s: float = LOOK_TIMEOUT_S) -> list[str]:
    """What the services have logged since, file by file. A file that was rotated or cut is read from its start."""
    lines: list[str] = []
    for path in _log_files(services):
        inode, size = mark.ends.get(path, (0, 0))
        with suppress(OSError):
            found = path.stat()
            start = size if found.st_ino == inode and found.st_size >= size else 0
            lines += _read(path, start).splitlines()
    for service in services:
        if service.journal:
            lines += _journal(service.journal, timeout_s, f"--since=@{mark.at:.3f}")
    return lines


def last_lines(
    services: Sequence[Service], *, limit_bytes: int, since: datetime | None = None, timeout_s: float = LOOK_TIMEOUT_S
) -> list[str]:
    """The end of the services' logs: at most `limit_bytes` of each file, and no file last written before `since`."""
    lines: list[str] = []
    for path in _log_files(services):
        with suppress(OSError):
            found = path.stat()
            if since is not None and found.st_mtime < since.timestamp():
                continue
            start = max(0, found.st_size - limit_bytes)
            lines += _read(path, start).splitlines()[1 if start else 0 :]  # the first is torn
    for service in services:
        if service.journal:
            which = [f"--since=@{since.timestamp():.0f}"] if since else []
            lines += _journal(service.journal, timeout_s, f"--lines={_JOURNAL_LINES}", *which)
    return lines


def _log_files(services: Sequence[Service]) -> list[Path]:
    return list(dict.fromkeys(path for service in services for path in service.logs))


def _read(path: Path, start: int) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        file.seek(start)
        return file.read().decode(errors="replace")


def _journal(unit: str, timeout_s: float, *which: str) -> list[str]:
    words = ["journalctl", "--no-pager", "--quiet", "--output=cat", *which, f"--unit={unit}"]
    return _run_systemd(words, timeout_s).stdout.decode(errors="replace").splitlines()
