"""Looking at one installation from all sides at once, under one wall clock, changing nothing.

Each probe runs in a thread of its own and tells what it sees as it goes, so that one that hangs costs only what it
would have said. No probe needs another: what their answers mean together is for `opsctl.operations.triage`.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import psycopg

from opsctl import db, services
from opsctl.baileys import buffers, credentials, log_lines
from opsctl.baileys.filenames import CREDS_FILE
from opsctl.errors import DatabaseUnavailable, OpsctlError, SettingsError
from opsctl.operations.sources import TOLERATED_LOSS
from opsctl.queries import query
from opsctl.services import Service, State
from opsctl.stores.folder import OPSCTL_FOLDER, opened, read_file
from opsctl.stores.postgres import snapshot
from opsctl.stores.standby import Standby
from opsctl.stores.switch_record import read_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from opsctl.settings import Settings
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.standby import Copy
    from opsctl.stores.switch_record import SwitchRecord

FULL_BYTES = 16 * 1024 * 1024
"""Fewer free bytes are a full disk: a handful of companies, or one rotation of a log."""
LOCK_WAIT_S = 5.0
"""A session that waits longer for a lock is stuck behind another; the service gives up after 30 s."""
LOG_BYTES = 512 * 1024
LOG_WINDOW = timedelta(minutes=15)
_LEARNING_S = 1.0
_TELLING_S = 0.2
_REWRITING_S = 0.1
UNDECRYPTABLE_BURST = 10
"""Lines in 15 minutes. A message leaves two to five, and one or two messages a day heal by themselves."""


class Fault(StrEnum):
    """What can be wrong."""

    SESSIONS_DISK_FULL = "sessions-disk-full"
    SESSIONS_DISK_FROZEN = "sessions-disk-frozen"
    WAY_OUT = "way-out-unreachable"
    NAME = "name-not-found"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    STARTING = "starting"
    TLS = "tls"
    AUTHENTICATION = "authentication"
    MISSING_DATABASE = "missing-database"
    NO_CONNECTION_LEFT = "too-many-clients"
    FROZEN = "frozen"
    UNUSABLE = "database-unavailable"
    SERVER_DISK_FULL = "disk-full"
    READ_ONLY = "read-only"
    LOCKS = "locked"
    PERMISSION = "permission"
    MISSING_TABLES = "missing-table"
    ROWS_MISSING = "rows-missing"
    CORRUPT_ROWS = "corrupt"
    CORRUPT_CREDS = "corrupt-creds"
    SERVICE_STOPPED = "service-stopped"
    WHATSAPP = "whatsapp-unreachable"
    REPLACED = "replaced"
    LOGGED_OUT = "logged-out"
    FORBIDDEN = "forbidden"
    UNDECRYPTABLE = "undecryptable"


@dataclass(frozen=True, slots=True)
class Sight:
    """One thing that was looked at: `seen` is a sentence, `fault` what is wrong with it, if anything."""

    check: str
    seen: str
    fault: Fault | None = None
    companies: tuple[str, ...] = ()
    pid: int | None = None
    """The session that blocks the others."""
    seconds: float | None = None
    """Since the looking began."""
    skipped: bool = False
    """Whether it was not looked at; `seen` says why."""
    hurried: bool = False
    """Whether that was for want of time."""


@dataclass
class View:
    """Everything that the probes have seen so far, and what is known without them."""

    settings: Settings
    give_up_at: float
    """Monotonic seconds."""
    owner_known: bool = False
    """Whether it could be read if a switch is on record."""
    switch: SwitchRecord | None = None
    manager: services.Manager | None = None
    sessions_dir: Path | None = None
    copies: Sequence[Copy] = ()
    sights: list[Sight] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    logged_in: bool = False
    """Whether the database has let us in."""
    answered: bool = False
    """Whether it has answered a statement."""
    log: str | None = None
    """A file with the service's log, or the unit whose journal it is in."""

    def tell(self, check: str, seen: str, fault: Fault | None = None, **more: Any) -> None:  # noqa: ANN401 - of Sight
        """Called in the probes' threads; appending is one step."""
        seconds = round(time.monotonic() - self.started_at, 2)
        self.sights.append(Sight(check, seen, fault, seconds=seconds, **more))

    def skip(self, check: str, why: str) -> None:
        """Tell what was not looked at."""
        self.tell(check, f"not looked at: {why}", skipped=True)

    def remaining(self) -> float:
        """Seconds that a probe may wait: it has to tell what it saw before the others stop waiting for it."""
        return max(0.05, self.give_up_at - _TELLING_S - time.monotonic())

    def companies(self) -> list[str]:
        """The companies that the standby or the sessions folder knows."""
        known = {copy.company_id for copy in self.copies}
        if self.sessions_dir is not None:
            with suppress(OSError):
                known |= {name.removeprefix("company_") for name in os.listdir(self.sessions_dir)} - {OPSCTL_FOLDER}
        return sorted(known)


def look(settings: Settings, *, give_up_at: float, now: datetime) -> View:
    """Run every probe until all have ended or the clock has. Raises `SettingsError` without a database address."""
    address = db.address(settings)
    view = View(settings, give_up_at)
    # First and alone, though not for long: the others ask the standby and the sessions folder about companies.
    _run(view, {"records": lambda: _learn(view)}, until=min(give_up_at, time.monotonic() + _LEARNING_S))
    probes = {
        "network": lambda: _look_at_network(view, address),
        "database": lambda: _look_at_database(view, address),
        "whatsapp": lambda: _look_at_whatsapp(view),
        "folders": lambda: _look_at_folders(view),
        "service": lambda: _look_at_service(view, now),
    }
    _run(view, probes, until=give_up_at)
    return view


def _run(view: View, probes: Mapping[str, Callable[[], None]], *, until: float) -> None:
    """Run the probes beside each other, and leave those behind that have not ended: no clock reaches into a disk."""
    threads = {
        name: threading.Thread(target=_guarded, args=(view, name, probe), daemon=True) for name, probe in probes.items()
    }
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            known = name in _SILENT
            view.tell(name, "no answer before the time was up", _SILENT.get(name), skipped=not known, hurried=not known)


_SILENT = {"network": Fault.NAME, "whatsapp": Fault.WHATSAPP, "folders": Fault.SESSIONS_DISK_FROZEN}
"""What it means that a probe hangs. Connecting has a clock of its own here, so one of the network waits for a name."""


def _guarded(view: View, name: str, probe: Callable[[], None]) -> None:
    """A probe must not take the others' answers away. Of a bug only the kind is told."""
    try:
        probe()
    except OpsctlError as error:
        view.skip(name, error.message)
    except Exception as error:  # noqa: BLE001 - see above
        view.skip(name, f"a bug in opsctl, {type(error).__name__}")


def _learn(view: View) -> None:
    """What this machine's disk has: the record of a switch, and the warm copies."""
    settings = view.settings
    with suppress(SettingsError):
        view.sessions_dir = settings.sessions_dir
        view.switch = read_switch(view.sessions_dir)
        view.owner_known = True
    try:
        view.manager = services.manager(settings)
    except SettingsError as error:
        view.skip("service", error.message)
    with suppress(OpsctlError, OSError):
        view.copies = Standby(settings.standby_dir, settings.environment).copies()


# --- the network ------------------------------------------------------------------------------------------------------


def _look_at_network(view: View, address: Mapping[str, Any]) -> None:
    """Each host of the connection string: its name, and whether its port lets anybody in."""
    for one in db.each_host(address):
        host, port = str(one.get("hostaddr") or one.get("host") or ""), int(one.get("port", 5432))
        if not host or host.startswith(("/", "@")):
            continue  # a Unix socket, of which the database probe says all there is
        if (fault := _reach(view, "network", host, port)) is not None:
            view.tell("network", *fault)


def _reach(view: View, check: str, host: str, port: int) -> tuple[str, Fault] | None:
    """Resolve and connect, and tell of what goes well. What does not is given back."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"the name {host} is not found ({error.strerror})", Fault.NAME
    numbers = sorted({str(entry[4][0]) for entry in found})
    if numbers != [host]:
        view.tell(check, f"{host} is {', '.join(numbers)}")
    problem = None
    for number in numbers:
        try:
            with socket.create_connection((number, port), timeout=view.remaining()):
                view.tell(check, f"{number}:{port} lets us connect")
                return None
        except TimeoutError:
            problem = problem or (f"{number}:{port} does not answer at all", Fault.TIMEOUT)
        except ConnectionRefusedError:
            problem = (f"nothing listens at {number}:{port}", Fault.REFUSED)
        except OSError as error:
            problem = problem or (f"{number}:{port}: {error.strerror}", Fault.TIMEOUT)
    return problem


def _look_at_whatsapp(view: View) -> None:
    address = view.settings["WHATSAPP_ADDRESS"]
    if address == "none":
        view.skip("whatsapp", "WHATSAPP_ADDRESS is none")
        return
    host, _, port = address.rpartition(":")
    if (problem := _reach(view, "whatsapp", host, int(port))) is not None:
        view.tell("whatsapp", problem[0], Fault.WHATSAPP)
    elif (seen := _greet(view, host, int(port))) is not None:
        view.tell("whatsapp", seen, Fault.WHATSAPP)


def _greet(view: View, host: str, port: int) -> str | None:
    """Begin a TLS connection as the service would. Who answers is not verified: a firewall's answer is none at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=view.remaining()) as connection,
            context.wrap_socket(connection, server_hostname=host) as greeted,
        ):
            view.tell("whatsapp", f"{host}:{port} speaks {greeted.version()}")
    except OSError:  # ssl.SSLError is one
        return f"{host}:{port} lets us connect and does not speak TLS"
    return None


# --- the database -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    in_recovery: bool
    read_only: bool
    connections: int
    usable_connections: int
    has_auth: bool
    has_keys: bool


@dataclass(frozen=True, slots=True)
class _Locks:
    waiting: int
    longest_s: float | None
    blocker_pid: int | None
    blocker_state: str | None
    blocker_application: str | None


def _look_at_database(view: View, address: Mapping[str, Any]) -> None:
    try:
        with db.connect(address, view.remaining()) as connection:
            view.logged_in = True
            view.tell("database", f"{db.place(address)} accepts our login")
            _look_inside(view, connection)
    except DatabaseUnavailable as error:
        if view.answered and error.kind in {"deadline", "frozen"}:  # slow, as a large table on a starved disk is
            view.tell("database", "the rest was not looked at: the time was up", skipped=True, hurried=True)
        else:
            view.tell("database", error.message, _FAULT_OF.get(error.kind, Fault.UNUSABLE))


_FAULT_OF = {
    **{str(fault): fault for fault in Fault},
    "reset": Fault.REFUSED,
    "deadline": Fault.FROZEN,
    "missing-column": Fault.MISSING_TABLES,
}


def _look_inside(view: View, connection: db.Connection) -> None:
    (server,) = db.rows(connection, query("look_at_server"), _Server)
    view.answered = True
    used = f"{server.connections} of {server.usable_connections} connections are in use"
    view.tell("database", used, Fault.NO_CONNECTION_LEFT if server.connections >= server.usable_connections else None)
    if server.in_recovery:
        view.tell("database", "it is a replica in recovery and takes no writes", Fault.READ_ONLY)
    elif server.read_only:
        view.tell("database", "its transactions are read-only by default", Fault.READ_ONLY)
    _look_at_disk(view, connection)
    locks = _look_at_locks(view, connection)
    missing = [
        name for name, there in (("whatsapp_auth", server.has_auth), ("whatsapp_keys", server.has_keys)) if not there
    ]
    if missing:
        view.tell("tables", f"there is no table {' and no table '.join(missing)}", Fault.MISSING_TABLES)
        return
    try:
        with snapshot(connection) as rows:
            _look_at_rows(view, rows)
    except DatabaseUnavailable as error:
        if error.kind == str(Fault.LOCKS):
            connection.execute("ROLLBACK")
            locks = _look_at_locks(view, connection)
        elif error.kind != "deadline" or locks.blocker_pid is None:
            raise
        view.tell("locks", "reading our tables waits for a lock", Fault.LOCKS, pid=locks.blocker_pid)


def _look_at_locks(view: View, connection: db.Connection) -> _Locks:
    (locks,) = db.rows(connection, query("look_at_locks"), _Locks)
    if locks.waiting:
        who = f"{locks.blocker_application or 'unnamed'}, {locks.blocker_state or 'hidden'}"
        seen = f"{locks.waiting} sessions wait for a lock, the first for {locks.longest_s or 0:.0f} s"
        stuck = (locks.longest_s or 0) >= LOCK_WAIT_S
        view.tell(
            "locks",
            f"{seen}, behind session {locks.blocker_pid} ({who})",
            Fault.LOCKS if stuck else None,
            pid=locks.blocker_pid,
        )
    return locks


def _look_at_disk(view: View, connection: db.Connection) -> None:
    """Let the server sort something on its disk."""
    connection.execute("BEGIN READ ONLY")
    try:
        connection.execute(query("fill_work_memory"))
        connection.execute(query("spill_to_disk"))
    except psycopg.errors.DiskFull as error:
        view.tell("server's disk", f"it is full: {error.diag.message_primary}", Fault.SERVER_DISK_FULL)
    except psycopg.errors.ConfigurationLimitExceeded:  # the role's temp_file_limit
        view.skip("server's disk", "this role may not use it for sorting")
    else:
        view.tell("server's disk", "it takes 4 MB")
    connection.execute("ROLLBACK")


def _look_at_rows(view: View, rows: Snapshot) -> None:
    """Credentials first, which are few; then the number of keys, against the standby."""
    creds = rows.all_creds()
    view.tell("rows", f"{len(creds)} companies have credentials", None if creds else Fault.ROWS_MISSING)
    copies = {copy.company_id: copy for copy in view.copies if copy.damage is None}
    gone = tuple(sorted(copies.keys() - creds.keys()))
    if gone and creds:
        view.tell("rows", "the standby has companies that the database lacks", Fault.ROWS_MISSING, companies=gone)
    broken: dict[str, str] = {}
    for company_id, data in creds.items():
        copy = copies.get(company_id)
        if (problem := _creds_problem(data, copy.me_sha256 if copy else None)) is not None:
            broken[company_id] = problem
    if broken:
        company, reason = next(iter(broken.items()))
        view.tell("credentials", f"company {company}: {reason}", Fault.CORRUPT_CREDS, companies=tuple(sorted(broken)))
    else:
        view.tell("credentials", f"those of {len(creds)} companies are sound")
    _look_at_counts(view, rows, copies)


def _creds_problem(creds: bytes, me_sha256: str | None) -> str | None:
    """Why these credentials will not log in as the account that the standby knows."""
    examined = credentials.examine(buffers.normalise(creds).data)
    if examined.unusable:
        return next(f.message for f in examined.findings if f.severity is credentials.Severity.UNUSABLE)
    if me_sha256 is None:
        return None
    if examined.me_id is None or not examined.registered:
        return "its pairing is gone, and the standby has it"
    if credentials.me_fingerprint(examined.me_id) != me_sha256:
        return "it is another account than the standby's"
    return None


def _look_at_counts(view: View, rows: Snapshot, copies: Mapping[str, Copy]) -> None:
    counted = rows.tenants()
    if rows.damage:
        view.tell("rows", f"the table of keys is damaged: {rows.damage}", Fault.CORRUPT_ROWS)
        return
    total = sum(tenant.key_count for tenant in counted)
    empty = total == 0 and any(tenant.has_creds for tenant in counted)
    view.tell("rows", f"{total:,} keys of {len(counted)} companies", Fault.ROWS_MISSING if empty else None)
    poorer = tuple(
        tenant.company_id
        for tenant in counted
        if (copy := copies.get(tenant.company_id)) and tenant.key_count < (copy.key_count or 0) * (1 - TOLERATED_LOSS)
    )
    if poorer and not empty:
        seen = "the database lacks more than a fifth of the keys that the standby has"
        view.tell("rows", seen, Fault.ROWS_MISSING, companies=poorer)


# --- this machine -----------------------------------------------------------------------------------------------------


def _look_at_folders(view: View) -> None:
    for check, path in _places(view):
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        found = os.statvfs(there)
        free_bytes = found.f_bavail * found.f_frsize
        no_files = found.f_files > 0 and found.f_favail == 0
        full = free_bytes < FULL_BYTES or no_files
        what = "no file can be made" if no_files else f"{free_bytes / 1024**2:,.0f} MiB are free"
        view.tell(check, f"{what} in {there}", Fault.SESSIONS_DISK_FULL if full else None)
    if view.switch is not None and view.sessions_dir is not None:
        _look_at_live_creds(view, view.sessions_dir)


def _places(view: View) -> Iterator[tuple[str, Path]]:
    if view.sessions_dir is None:
        view.skip("sessions folder", "neither SESSIONS_DIR nor APP_DIR is set")
    else:
        yield "sessions folder", view.sessions_dir
    with suppress(SettingsError):
        yield "standby folder", view.settings.standby_dir


def _look_at_live_creds(view: View, sessions_dir: Path) -> None:
    """While the service runs on folders, theirs are the credentials that count."""
    broken: dict[str, str] = {}
    names = sorted(name for name in os.listdir(sessions_dir) if name.startswith("company_"))
    for name in names:
        problem = _live_creds_problem(sessions_dir / name)
        if problem is not None:  # Baileys writes in place: it may have been in the middle
            time.sleep(_REWRITING_S)
            problem = _live_creds_problem(sessions_dir / name)
        if problem is not None:
            broken[name.removeprefix("company_")] = problem
    if broken:
        company, problem = next(iter(broken.items()))
        view.tell("live folders", f"company {company}: {problem}", Fault.CORRUPT_CREDS, companies=tuple(broken))
    else:
        view.tell("live folders", f"the credentials of {len(names)} companies are sound")


def _live_creds_problem(folder: Path) -> str | None:
    try:
        with opened(folder) as fd:
            return _creds_problem(read_file(fd, CREDS_FILE), None)
    except OSError as error:
        return f"{CREDS_FILE}: {error.strerror}"


def _look_at_service(view: View, now: datetime) -> None:
    found: tuple[Service, ...] = ()
    if view.manager is None:
        if view.settings["SERVICE_MANAGER"] == "none":
            view.skip("service", "SERVICE_MANAGER is none")
        logs = view.settings["SERVICE_LOG"]
        found = (Service("service", State.UNKNOWN, "", logs=logs),) if logs else ()
    else:
        found = services.status(view.manager, timeout_s=view.remaining())
        for service in found:
            view.tell("service", *_of_service(service))
    if found:
        _listen(view, found, now)


def _of_service(service: Service) -> tuple[str, Fault | None]:
    if not service.known:
        return f"{service.name}: {service.said}", None
    pids = f" (pid {', '.join(map(str, service.pids))})" if service.pids else ""
    restarts = f", restarted {service.restarts} times" if service.restarts else ""
    seen = f"{service.name} is {service.said}{pids}{restarts}"
    return seen, None if service.state is State.RUNNING else Fault.SERVICE_STOPPED


def _listen(view: View, found: Sequence[Service], now: datetime) -> None:
    """The end of the service's log. A file that nobody has written for 15 minutes says nothing of now."""
    since = now - LOG_WINDOW
    view.log = next((str(path) for service in found for path in reversed(service.logs)), found[0].journal)
    lines = services.last_lines(found, limit_bytes=LOG_BYTES, since=since, timeout_s=view.remaining())
    heard = log_lines.hear(lines, known=view.companies(), since=since)
    if not lines:
        view.skip("log", "nothing was logged in the last 15 minutes, or nobody knows where")
    elif not heard:
        view.tell("log", "no refusal by WhatsApp and no undecryptable message in the last 15 minutes")
    for told in heard:
        few = told.trouble is log_lines.Trouble.UNDECRYPTABLE and told.count < UNDECRYPTABLE_BURST
        times = "once" if told.count == 1 else f"{told.count} times"
        view.tell(
            "log",
            f'"{told.words}" {times} in the last 15 minutes',
            None if few else _FAULT_OF[told.trouble],
            companies=told.companies,
        )
