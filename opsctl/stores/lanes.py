"""Forked processes that are dealt whole companies, each behind a queue of bounded size.

One interpreter works with one core. The parent reads the database and deals; a company's rows never change hands, and
memory does not grow with the fleet.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import queue
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from opsctl.signals import held_back

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_QUEUE_CHUNKS = 8
"""Per process: 2 MiB of rows read ahead, a few ordinary companies."""
MOST_LANES = 3
"""With a company of 100,000 keys each, all of a restore takes 195 MiB; the parent and PostgreSQL need cores too."""
_LOOK_S = 0.5
"""How often a waiting thread looks whether its process is gone."""
_PR_SET_PDEATHSIG = 1  # sys/prctl.h

# What follows a company's rows. No row looks like them, because a row ends with a newline.
END = b"end"
ABORT = b"abort"
"""The source failed in the middle of the company: forget it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A process could not go on: an errno, or a bug's kind and place."""

    code: int | None
    what: str


class Lanes:
    """The processes, as a context manager. `serve` is what each of them does with its end of a pipe, until EOFError.

    Everything that they send is in `replies`; a process that ends otherwise has sent `Failed`.
    """

    def __init__(self, serve: Callable[[Connection[Any, Any]], None], *, count: int | None = None) -> None:
        self._serve = serve
        self._count = count or max(1, min(MOST_LANES, len(os.sched_getaffinity(0))))
        self._lanes: list[Lane] = []
        self.replies: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        try:
            with held_back():
                self._fork()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(self._count)]
        for ours, theirs in pipes:
            others = [end for pipe in pipes for end in pipe if end is not theirs]
            process = context.Process(target=_work, args=(theirs, others, self._serve), daemon=True)
            process.start()
            self._lanes.append(Lane(ours, process, self.replies))
        for lane, (_, theirs) in zip(self._lanes, pipes, strict=True):
            theirs.close()
            lane.start()

    def __exit__(self, *_: object) -> None:
        with held_back():
            for lane in self._lanes:
                lane.stop()

    def __getitem__(self, number: int) -> Lane:
        """One lane; numbers go round."""
        return self._lanes[number % self._count]

    def least_busy(self) -> Lane:
        """The lane with the shortest queue."""
        return min(self._lanes, key=lambda lane: lane.waiting)


class Lane:
    """One process seen from the parent: a bounded queue to it, a thread each way."""

    def __init__(self, connection: Connection[Any, Any], process: BaseProcess, replies: queue.SimpleQueue[Any]) -> None:
        self._connection = connection
        self._process = process
        self._replies = replies
        self._queue: queue.Queue[Any] = queue.Queue(_QUEUE_CHUNKS)
        self._gone = threading.Event()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def start(self) -> None:
        threading.Thread(target=self._feed, daemon=True).start()
        threading.Thread(target=self._collect, daemon=True).start()

    def put(self, message: object) -> None:
        """Hand a message over; waits while the process is behind. One that is gone has already replied `Failed`."""
        while not self._gone.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(message, timeout=_LOOK_S)
                return

    def stop(self) -> None:
        """End the process. Its threads end by themselves, and with them the connection.

        They are not waited for, nor is their queue touched: a signal that was raised in the middle of `put` has left
        the queue's lock behind it, taken for ever.
        """
        self._gone.set()
        self._process.kill()
        self._process.join()

    def _feed(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._gone.is_set():
                try:
                    message = self._queue.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(message, bytes):
                    self._connection.send_bytes(message)
                else:
                    self._connection.send(message)

    def _collect(self) -> None:
        try:
            while True:
                self._replies.put(self._connection.recv())
        except (EOFError, OSError):
            if not self._gone.is_set():
                self._gone.set()
                self._replies.put(Failed(None, "one of its processes was killed"))


def _work(
    connection: Connection[Any, Any],
    others: list[Connection[Any, Any]],
    serve: Callable[[Connection[Any, Any]], None],
) -> None:
    """A process, from birth to the end of its stream."""
    for other in others:
        other.close()  # else it would keep its siblings' streams open after the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    gc.disable()  # nobody here makes cycles, and collecting through 100,000 entries costs a tenth of the time
    die_with_parent()
    try:
        serve(connection)
    except EOFError:
        pass
    except OSError as error:
        _last_word(connection, Failed(error.errno, error.strerror or type(error).__name__))
    except Exception as error:  # noqa: BLE001 - its message could hold a key; the parent reports the bug
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace else "?"
        _last_word(connection, Failed(None, f"{type(error).__name__} at {where}"))
    os._exit(0)  # nothing of the parent's is to be flushed or finalised twice


def _last_word(connection: Connection[Any, Any], failed: Failed) -> None:
    with contextlib.suppress(OSError):
        connection.send(failed)


def die_with_parent() -> None:
    """A killed parent takes this process with it. A change of user clears that (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
