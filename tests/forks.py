"""opsctl in forked processes: a whole run costs a tenth of a second, and can be given faults that no disk has.

`python -m tests.forks` reads one JSON object per line and answers each with the exit code of a run. What is patched by
`before`, a Python text, is patched in that run only; `fault_points` below are for such texts.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True)
class Forked:
    """How a forked run ended; a negative code is a signal's."""

    returncode: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


class Forks:
    """The process that forks, seen from a test. Made by `forks`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder

    def run(self, *words: str | Path, env: Mapping[str, str], before: str = "") -> Forked:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = self._folder / "stdout", self._folder / "stderr"
        order = {"words": [*map(str, words)], "env": dict(env), "before": before, "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), out.read_text(), err.read_text())


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Start the process that forks; runs know nothing of the tests' environment but what `run` is given."""
    repository = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(repository)},
        cwd=folder,
    ) as process:
        yield Forks(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    # Imported once for all runs, also what commands import while they run.
    import multiprocessing.connection
    import multiprocessing.popen_fork  # noqa: F401

    import certifi  # noqa: F401
    import sentry_sdk.envelope
    import sentry_sdk.utils  # noqa: F401
    import tenacity  # noqa: F401
    import urllib3  # noqa: F401

    import opsctl.operations.restore
    import opsctl.operations.undo
    import opsctl.stores.postgres  # noqa: F401
    from opsctl.cli import app, frame

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    frame.main(app, ["sessions", "list", "--json"])
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _become(order: dict[str, Any]) -> None:
    from opsctl.cli import app, frame

    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    sys.argv = ["opsctl", *order["words"]]
    try:
        exec(order["before"], {})
        code = frame.main(app)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a fork must never return into the loop of its parent
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    os._exit(code)


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
    _serve()
