"""opsctl in forked processes: a run is spared its imports, and can be given faults that no disk has.

`python -m tests.forks SOCKET` answers each connection with one run: a JSON object in, the run's pid and then its exit
code out, a line each. What is patched by `before`, a Python text, is patched in that run only; `fault_points` below are
for such texts.
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import gc
import importlib
import itertools
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Required, TypedDict, Unpack

from opsctl.__main__ import COLLECT_AFTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """How a run of opsctl ended; a negative code is a signal's."""

    returncode: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.stdout)


class Running:
    """One run, as `subprocess.Popen` shows it: while it goes on, and after. It leads a session of its own."""

    def __init__(self, words: list[str], connection: socket.socket, streams: Mapping[str, str]) -> None:
        self._words = words
        self._connection = connection
        self._streams = streams
        self._answers = connection.makefile()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._words, timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the run alone, if it goes on."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> Finished:
        """Kill it with all that it has started, if it goes on, and take its output away."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self.wait(30)
        out, err = (Path(self._streams[stream]).read_text() for stream in ("stdout", "stderr"))
        for name in self._streams.values():
            Path(name).unlink()
        return Finished(code, out, err)


class Options(TypedDict, total=False):
    """How a run is begun: `before` is a text of Python for it, `inside` one for what it runs of opsctl, in a drill."""

    env: Required[Mapping[str, str]]
    before: str
    inside: str
    stdin: str
    cwd: Path


class Forks:
    """The process that forks, seen from a test. Made by `forks`."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._numbers = itertools.count(1)

    def start(self, *words: str | Path, **options: Unpack[Options]) -> Running:
        """Begin to run opsctl with `env` and PATH, and nothing else of the environment."""
        base = self._address.with_name(f"run-{os.getpid()}-{next(self._numbers)}")
        streams = {stream: str(base.with_suffix(f".{stream}")) for stream in ("stdin", "stdout", "stderr")}
        Path(streams["stdin"]).write_text(options.get("stdin", ""))
        order = {
            "words": [*map(str, words)],
            "env": {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **options["env"]},
            "before": options.get("before", ""),
            "inside": options.get("inside", ""),
            "cwd": str(options.get("cwd", "/")),
            "address": str(self._address),
            **streams,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._address))
        connection.sendall(json.dumps(order).encode() + b"\n")
        return Running(["opsctl", *map(str, words)], connection, streams)

    def run(self, *words: str | Path, timeout: float = 120, **options: Unpack[Options]) -> Finished:
        """`start`, and wait for the end. Raises `subprocess.TimeoutExpired`."""
        running = self.start(*words, **options)
        try:
            running.wait(timeout)
        finally:
            finished = running.end()
        return finished


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Start the process that forks."""
    address = folder / "forks.socket"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forks", str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Forks(address)
        assert process.stdin is not None
        process.stdin.close()


def _serve(address: str) -> None:
    """Until stdin ends."""
    _import_all()
    gc.freeze()  # else each run goes through all of it again, and copies the pages
    gc.set_threshold(COLLECT_AFTER)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listener.fileno(), 0], [], [])
            if 0 in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _import_all() -> None:
    """Once for all runs, also what commands import while they run."""
    import multiprocessing.connection
    import multiprocessing.popen_fork  # noqa: F401

    import certifi  # noqa: F401
    import cryptography.exceptions
    import cryptography.hazmat.backends.openssl
    import cryptography.hazmat.primitives.asymmetric.ed25519
    import cryptography.hazmat.primitives.asymmetric.x25519  # noqa: F401
    import pydantic
    import rich._emoji_codes
    import rich.progress
    import rich.table  # noqa: F401
    import sentry_sdk.envelope
    import sentry_sdk.utils  # noqa: F401
    import tenacity  # noqa: F401
    import typer._adapters
    import typer._click.decorators  # noqa: F401
    import urllib3  # noqa: F401

    import opsctl
    from opsctl import queries
    from opsctl.cli import tree

    for module in pkgutil.walk_packages(opsctl.__path__, "opsctl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    pydantic.TypeAdapter(int)  # imports the rest of it
    for statement in Path(queries.__file__).parent.glob("*.sql"):
        queries.query(statement.stem)
    list(map(codecs.lookup, ("ascii", "latin-1", "utf-8-sig")))
    tree.exit_codes([])  # builds all commands: each run looks there whether it may end as it did


def _answer(connection: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(order)
    with suppress(BrokenPipeError):  # a test that gave up
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(order: dict[str, Any]) -> NoReturn:
    from opsctl import cli
    from opsctl.cli import frame, tree

    os.setsid()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        descriptor = os.open(order[name], flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if order["env"]["PYTHONPATH"] != str(REPOSITORY):  # other modules than those that are imported here
        os.execv(sys.executable, [sys.executable, "-m", "opsctl", *order["words"]])
    sys.argv = ["opsctl", *order["words"]]
    _fork_what_it_runs(Forks(Path(order["address"])), order["inside"])
    try:
        exec(order["before"], {})
        code = frame.main(cli.app)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a fork must never return into the loop of its parent
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    if not order["before"] and "--nagios" not in order["words"] and code not in tree.exit_codes(order["words"]):
        os.write(2, f"opsctl/cli/exits.py does not have that this command ends with {code}\n".encode())
        os._exit(99)
    os._exit(code)


def _fork_what_it_runs(forking: Forks, before: str) -> None:
    from opsctl import process

    start_of_opsctl = process.opsctl_words()
    run_program, start_program = process.run, process.start

    def of_opsctl(words: Sequence[str]) -> Sequence[str] | None:
        length = len(start_of_opsctl)
        return words[length:] if list(words[:length]) == start_of_opsctl else None

    def run(words: Sequence[str], *, environment: Mapping[str, str], timeout_s: float, **more: Any) -> process.Finished:
        own = of_opsctl(words)
        if own is None:
            return run_program(words, environment=environment, timeout_s=timeout_s, **more)
        assert not more
        done = forking.run(*own, env=environment, before=before, cwd=Path.cwd(), timeout=timeout_s)
        return process.Finished(done.returncode, done.stdout.encode(), done.stderr)

    def start(words: Sequence[str], *, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Running:
        own = of_opsctl(words)
        if own is None:
            return start_program(words, environment=environment)
        return forking.start(*own, env=environment, before=before, cwd=Path.cwd())

    process.run, process.start = run, start  # type: ignore[assignment]


THEIR_APP = "\nfrom opsctl import cli\ncli.app = app\n"
"""For the end of `before`: the run is one of the commands that it has made, in `app`."""

AS_NOBODY = "import os; os.chdir('/'); os.setgroups([]); os.setgid(65534); os.setuid(65534)"
"""For `before`: a run of a user who may not even be able to read where opsctl is installed."""


# For `before`: what can be wrong with the calls that change folders


def fault_points(at_point: Callable[[int, str], None], *, no_exchange: bool = False) -> None:
    """Call `at_point(n, name)` before each call of this process (not of its writers) that changes folders.

    With `no_exchange` the flags of renameat2(2) are unknown, as on NFS or FUSE.
    """
    import opsctl.stores.publishing as publishing

    parent = os.getpid()
    count = 0

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **words: Any) -> Any:
            nonlocal count
            if os.getpid() != parent:
                return call(*args, **words)
            count += 1
            at_point(count, name)
            return call(*args, **words)

        return around

    for name in ("rename", "mkdir", "rmdir", "fsync"):
        setattr(os, name, wrapped(name, getattr(os, name)))
    real = publishing._libc

    def no_flags(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    class Library:
        renameat2 = staticmethod(no_flags if no_exchange else wrapped("renameat2", real.renameat2))
        syncfs = staticmethod(wrapped("syncfs", real.syncfs))

    publishing._libc = Library()  # type: ignore[assignment]


def die_at(point: int, *, no_exchange: bool = False) -> None:
    """SIGKILL this run at its `point`-th fault point."""

    def at_point(count: int, _: str) -> None:
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    fault_points(at_point, no_exchange=no_exchange)


if __name__ == "__main__":
    _serve(sys.argv[1])
