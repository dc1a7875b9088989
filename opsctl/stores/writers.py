"""Writer processes: one reads the stream of one company after another and writes its folder as the service's user.

Why processes: writing a small file costs as much in the kernel as in the interpreter, and one interpreter writes with
one core. Why dropped privileges: files are then born with the right owner, are read back as the user who will read
them, and nothing that user has put in the way can make root follow it.

After an `Order`, a writer takes frames of rows in COPY's text format, and `END` or `ABORT` after them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from opsctl.baileys import credentials
from opsctl.errors import OpsctlError, Refused, SourceUnavailable
from opsctl.stores.folder import Contents, Holding, contents, opened
from opsctl.stores.lanes import ABORT, END, Failed, Lane, Lanes, die_with_parent
from opsctl.stores.postgres import parse_rows
from opsctl.stores.records import ManifestDamaged
from opsctl.stores.staging import CompanyWriter, CopyDamaged, Order, Staged, check_written, take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from opsctl.stores.publishing import Owner


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
    """The pool, as a context manager. It forks."""

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self._lanes = Lanes(self._serve)
        self.replies = self._lanes.replies

    def __enter__(self) -> Self:
        self._lanes.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lanes.__exit__()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        _import_the_rest()
        _become(self._workplace.owner)
        _Writer(connection, self._workplace).run()

    @property
    def previewing(self) -> bool:
        """Whether everything is only computed; then a comparison follows each staged company by itself."""
        return self._workplace.building_fd is None

    def begin(self, order: Order | Adopt) -> Lane:
        """The least busy writer, with the company begun; after an `Order` its rows follow."""
        lane = self._lanes.least_busy()
        lane.put(order)
        return lane

    def verify(self, staged: Iterable[Staged]) -> None:
        """Deal the staged companies out for reading back."""
        for index, company in enumerate(staged):
            self._lanes[index].put(Verify(company.company_id, company.folder))

    def wait(self, remaining: Callable[[], float | None]) -> Reply:
        """The next reply. Raises what a failed writer means, or `SourceUnavailable` past the deadline."""
        try:
            reply: Reply = self.replies.get(timeout=remaining())
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
    if failed.code == errno.EFBIG:
        return Refused(f"{path}: a file would be larger than this process may write", hint="ulimit -f unlimited")
    if failed.code == errno.EROFS:
        return Refused(f"{path} is on a read-only filesystem", hint="pass another --to")
    if failed.code in {errno.EACCES, errno.EPERM}:
        return Refused(
            f"{workplace.owner.name} cannot write or read in {path}", hint="check the owner and mode of its parents"
        )
    return OpsctlError(f"writing the files failed: {failed.what}")


def _import_the_rest() -> None:
    """What is imported where it is used: once it is the owner, a process may not be able to read this program's files.

    A program below root's home is such a case.
    """
    credentials.key_pair_matches(bytes(32), b"")
    credentials.verify_signature(bytes(32), b"", bytes(64))


def _become(owner: Owner) -> None:
    os.umask(0o077)
    if os.geteuid() == 0 and owner.uid != 0:
        try:
            os.initgroups(owner.name, owner.gid)
        except (KeyError, OSError):  # a user without an account has no other groups
            os.setgroups([])
        os.setresgid(owner.gid, owner.gid, owner.gid)
        os.setresuid(owner.uid, owner.uid, owner.uid)
    die_with_parent()


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
