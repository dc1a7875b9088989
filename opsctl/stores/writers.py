"""Writer processes: one reads the stream of one company after another and writes its folder as the service's user.

Why processes: writing a small file costs as much in the kernel as in the interpreter, and one interpreter writes with
one core. Why dropped privileges: files are then born with the right owner, are read back as the user who will read
them, and nothing that user has put in the way can make root follow it.

The parent reads the database and deals whole companies; a company's rows never change hands. Each writer has a queue of
bounded size, so memory does not grow with the fleet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import queue
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from opsctl.errors import OpsctlError, Refused, SourceUnavailable
from opsctl.signals import held_back
from opsctl.stores.folder import Contents, Holding, contents, opened
from opsctl.stores.postgres import parse_rows
from opsctl.stores.records import ManifestDamaged
from opsctl.stores.staging import CompanyWriter, CopyDamaged, Order, Staged, check_written, take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from opsctl.stores.publishing import Owner

_QUEUE_CHUNKS = 16
"""Per writer: 4 MiB of rows read ahead, a handful of ordinary companies."""
MOST_WRITERS = 3
"""With a company of 100,000 keys each, all of opsctl takes 195 MiB; the parent and PostgreSQL need cores too."""
_LOOK_S = 0.5
"""How often a waiting thread looks whether its writer is gone."""
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


# After an `Order`, a writer takes frames of bytes: rows in COPY's text format, and one of these two at the end. No row
# looks like them, because a row ends with a newline.
END = b"end"
ABORT = b"abort"
"""The source failed in the middle of the company: forget it."""


@dataclass(frozen=True, slots=True)
class Adopt:
    """Make another copy of a company this restore's own: every file is held against that copy's manifest first."""

    order: Order
    copy: Path | None
    """The folder to read; None where it was moved to the staged folder's place already."""
    own_creds: bool
    """Whether the order's credentials are the copy's own, so that its manifest speaks of them too."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Look at a staged company once more, by its names, and hold it against what stands in its place."""

    company_id: str
    folder: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """So many keys more are done."""

    keys: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A staged company against its manifest and against the folder in its place, in numbers of files."""

    company_id: str
    holding: Holding
    restored: int
    updated: int
    unchanged: int
    set_aside: int
    written_since: tuple[str, ...]
    """Of a live folder: names that were changed, removed or added since it was published (a sample)."""
    damage: str | None
    """What is not as it was written."""

    @property
    def identical(self) -> bool:
        """Whether publishing would change nothing."""
        return self.holding is Holding.OURS and not (self.restored or self.updated or self.set_aside)


@dataclass(frozen=True, slots=True)
class Aborted:
    """What was begun of a company is left alone from here on: its source failed, or is damaged."""

    company_id: str
    damage: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A writer could not go on: an errno, or a bug's kind and place."""

    code: int | None
    what: str


Reply = Advanced | Staged | Compared | Aborted | Failed


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where writers write: `building_fd` is None where everything is only computed."""

    path: Path
    root_fd: int | None
    building_fd: int | None
    owner: Owner
    environment: str


class Writers:
    """The pool, as a context manager. Must be entered before any thread or connection exists: it forks."""

    def __init__(self, workplace: Workplace, *, count: int | None = None) -> None:
        self._workplace = workplace
        self._count = count or max(1, min(MOST_WRITERS, len(os.sched_getaffinity(0))))
        self._lanes: list[Lane] = []
        self.replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()

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
            process = context.Process(target=_work, args=(theirs, others, self._workplace), daemon=True)
            process.start()
            self._lanes.append(Lane(ours, process, self.replies))
        for lane, (_, theirs) in zip(self._lanes, pipes, strict=True):
            theirs.close()
            lane.start()

    def __exit__(self, *_: object) -> None:
        with held_back():
            for lane in self._lanes:
                lane.stop()

    @property
    def previewing(self) -> bool:
        """Whether everything is only computed; then a comparison follows each staged company by itself."""
        return self._workplace.building_fd is None

    def begin(self, order: Order | Adopt) -> Lane:
        """The least busy writer, with the company begun; after an `Order` its rows follow."""
        lane = min(self._lanes, key=lambda lane: lane.waiting)
        lane.put(order)
        return lane

    def verify(self, staged: Iterable[Staged]) -> None:
        """Deal the staged companies out for reading back."""
        for index, company in enumerate(staged):
            self._lanes[index % self._count].put(Verify(company.company_id, company.folder))

    def wait(self, remaining: Callable[[], float | None]) -> Reply:
        """The next reply. Raises what a failed writer means, or `SourceUnavailable` past the deadline."""
        try:
            reply = self.replies.get(timeout=remaining())
        except queue.Empty:
            raise SourceUnavailable(
                "the files were not written before the deadline",
                kind="deadline",
                hint="type it again with a longer --deadline",
            ) from None
        if isinstance(reply, Failed):
            raise _failure(reply, self._workplace)
        return reply


def _failure(failed: Failed, workplace: Workplace) -> OpsctlError:
    path = workplace.path
    if failed.code in {errno.ENOSPC, errno.EDQUOT}:
        return Refused(f"{path}: no space left", kind="disk-full", hint=f"df -h {path}; df -i {path}")
    if failed.code == errno.EROFS:
        return Refused(f"{path} is on a read-only filesystem", hint="pass another --to")
    if failed.code in {errno.EACCES, errno.EPERM}:
        return Refused(
            f"{workplace.owner.name} cannot write or read in {path}", hint="check the owner and mode of its parents"
        )
    return OpsctlError(f"writing the files failed: {failed.what}")


class Lane:
    """One writer process seen from the parent: a bounded queue to it, a thread each way."""

    def __init__(
        self, connection: Connection[Any, Any], process: BaseProcess, replies: queue.SimpleQueue[Reply]
    ) -> None:
        self._connection = connection
        self._process = process
        self._replies = replies
        self._queue: queue.Queue[bytes | Order | Adopt | Verify] = queue.Queue(_QUEUE_CHUNKS)
        self._gone = threading.Event()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def start(self) -> None:
        threading.Thread(target=self._feed, daemon=True).start()
        threading.Thread(target=self._collect, daemon=True).start()

    def put(self, message: bytes | Order | Adopt | Verify) -> None:
        """Hand a message over; waits while the writer is behind. A writer that is gone has already replied `Failed`."""
        while not self._gone.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(message, timeout=_LOOK_S)
                return

    def stop(self) -> None:
        """End the writer. Its threads end by themselves, and with them the connection.

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
                self._replies.put(Failed(None, "a writer process was killed"))


def _work(connection: Connection[Any, Any], others: list[Connection[Any, Any]], workplace: Workplace) -> None:
    """A writer process, from birth to the end of its stream."""
    for other in others:
        other.close()  # else a writer would keep its siblings' streams open after the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    gc.disable()  # a writer makes no cycles, and collecting through 100,000 entries costs a tenth of its time
    try:
        _become(workplace.owner)
        _Writer(connection, workplace).run()
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


def _become(owner: Owner) -> None:
    os.umask(0o077)
    if os.geteuid() == 0 and owner.uid != 0:
        try:
            os.initgroups(owner.name, owner.gid)
        except (KeyError, OSError):  # a user without an account has no other groups
            os.setgroups([])
        os.setresgid(owner.gid, owner.gid, owner.gid)
        os.setresuid(owner.uid, owner.uid, owner.uid)
    # After the change of user, which clears it (prctl(2)): a killed parent takes its writers with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Comparison:
    """What is new against what is there, name by name: only the digests of what is there stand in memory."""

    def __init__(self, there: Contents) -> None:
        self._there = there
        self._restored = self._updated = self._unchanged = 0

    def visit(self, name: str, digest: str) -> None:
        old = self._there.digests.get(name)
        if old is None:
            self._restored += 1
        elif old == bytes.fromhex(digest):
            self._unchanged += 1
        else:
            self._updated += 1

    def result(self, company_id: str, damage: str | None) -> Compared:
        there = self._there
        return Compared(
            company_id=company_id,
            holding=there.holding,
            restored=self._restored,
            updated=self._updated,
            unchanged=self._unchanged,
            set_aside=len(there.digests) - self._updated - self._unchanged,
            written_since=(there.changed + there.missing + there.added)[:5],
            damage=damage,
        )


class _Writer:
    """Inside the writer process: messages in, folders and replies out."""

    def __init__(self, connection: Connection[Any, Any], workplace: Workplace) -> None:
        self._connection = connection
        self._place = workplace
        if workplace.root_fd is not None:
            # As the user who will read the sessions, by the path it will read them under.
            os.close(os.open(workplace.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        else:
            with contextlib.suppress(FileNotFoundError):  # what is refused to this user raises another error
                workplace.path.stat()

    def run(self) -> None:
        """Serve until the parent closes the stream (EOFError)."""
        while True:
            message = self._connection.recv()
            if isinstance(message, Verify):
                self._connection.send(self._verified(message))
            else:
                self._company(message)

    def _company(self, message: Order | Adopt) -> None:
        # Of its own, so that nothing of a company stays in memory after it.
        order = message.order if isinstance(message, Adopt) else message
        with self._folder(order.folder, made=not isinstance(message, Adopt) or message.copy is not None) as folder:
            writer = CompanyWriter(order, folder)
            try:
                if isinstance(message, Adopt):
                    self._adopt(message, writer, folder)
                else:
                    self._rows(writer)
            except CopyDamaged as error:
                self._connection.send(Aborted(order.origin.company_id, str(error)))
                return
            self._connection.send(writer.finish())
            if folder is None:
                comparison = _Comparison(self._there(order.origin.company_id, order.folder))
                for name, digest in writer.digests():
                    comparison.visit(name, digest)
                self._connection.send(comparison.result(order.origin.company_id, None))

    @contextlib.contextmanager
    def _folder(self, name: str, *, made: bool) -> Iterator[int | None]:
        building_fd = self._place.building_fd
        if building_fd is None:
            yield None
            return
        if made:
            os.mkdir(name, 0o700, dir_fd=building_fd)
        with opened(name, dir_fd=building_fd) as folder_fd:
            yield folder_fd

    def _rows(self, writer: CompanyWriter) -> None:
        add = writer.add
        while (frame := self._connection.recv_bytes()) != END:
            if frame == ABORT:
                raise CopyDamaged("its source failed")
            keys = 0
            for keys, record in enumerate(parse_rows(frame), 1):  # noqa: B007 - how many there were is told below
                add(record)
            self._connection.send(Advanced(keys))

    def _adopt(self, message: Adopt, writer: CompanyWriter, folder_fd: int | None) -> None:
        with contextlib.ExitStack() as stack:
            source_fd = folder_fd
            if message.copy is not None:
                try:
                    source_fd = stack.enter_context(opened(message.copy))
                except OSError as error:
                    raise CopyDamaged(f"{self._place.owner.name} cannot read it: {error.strerror}") from None
            if source_fd is not None:
                take_over(
                    writer,
                    source_fd,
                    in_place=message.copy is None,
                    own_creds=message.own_creds,
                    advance=lambda keys: self._connection.send(Advanced(keys)),
                )

    def _verified(self, order: Verify) -> Compared:
        comparison = _Comparison(self._there(order.company_id, order.folder))
        try:
            with opened(order.folder, dir_fd=self._place.building_fd) as folder_fd:
                damage = check_written(folder_fd, comparison.visit)
        except (ManifestDamaged, OSError) as error:
            damage = f"its folder cannot be read back: {error}"
        return comparison.result(order.company_id, damage)

    def _there(self, company_id: str, folder: str) -> Contents:
        if self._place.root_fd is None:
            return Contents(Holding.NOTHING, None, {})
        try:
            with opened(folder, dir_fd=self._place.root_fd) as fd:
                return contents(fd, company_id=company_id, environment=self._place.environment)
        except FileNotFoundError:
            return Contents(Holding.NOTHING, None, {})
        except OSError:  # no folder, or none that we may look into
            return Contents(Holding.FOREIGN, None, {})
