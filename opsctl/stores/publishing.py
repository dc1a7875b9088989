"""Putting finished company folders in place of the ones there, so that a kill at any instant leaves one whole.

Below the sessions folder lies `.opsctl/` (0700). A run R works in `staging-R/building/` and moves each folder that is
complete, verified and synced into `staging-R/ready/`, from where it is exchanged with the folder in place; what stands
in `ready/` afterwards is the old one. At the end `ready/` becomes `aside-R/`. So every state can be read off the
folders alone: in `ready/`, a folder whose manifest names R was not published; any other was set aside. No journal has
to be kept in step with them. Where the filesystem has no exchange, `staging-R/old/` (in an undo: `undoing-R/`) holds
the folder that was in place between two renames, and whoever finds one there completes the exchange.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import shutil
import signal
import socket
import stat
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from opsctl.baileys.filenames import CREDS_FILE, MANIFEST_FILE
from opsctl.errors import Locked, Refused
from opsctl.signals import held_back
from opsctl.stores.folder import OPSCTL_FOLDER, opened, origin_of, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASIDE_KEPT = timedelta(days=7)

_BUILDING, _READY, _OLD = "building", "ready", "old"
_STAGING, _ASIDE, _UNDOING, _TRASH = "staging-", "aside-", "undoing-", "trash-"
_HOLDER = "holder.json"
_FLUSH_EVERY_S = 1.0

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files session folders are: the service's user."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of(cls, path: Path) -> Owner:
        """The owner of an existing path."""
        status = path.stat()
        return cls(_user_name(status.st_uid), status.st_uid, status.st_gid)

    @classmethod
    def named(cls, name: str) -> Owner:
        """By login name. Raises `Refused` where there is none."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise Refused(f"this machine has no user {name!r}", hint="check --owner") from None
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    @classmethod
    def current(cls) -> Owner:
        """Whoever runs this."""
        return cls(_user_name(os.geteuid()), os.geteuid(), os.getegid())


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class SessionsRoot:
    """A sessions folder that may be written: opened, ours to use, locked. Made by `locked_root`."""

    def __init__(self, path: Path, fd: int, own_fd: int, owner: Owner) -> None:
        self.path = path
        self.fd = fd
        self.own_fd = own_fd
        self.owner = owner

    @contextmanager
    def staging(self, run_id: str) -> Iterator[Staging]:
        """A place to build folders for run `run_id`. On leaving: old folders are set aside, the rest is removed."""
        staging = None
        with ExitStack() as descriptors:
            try:
                with held_back():
                    fd = descriptors.enter_context(self._made(_STAGING + run_id, self.own_fd))
                    building = descriptors.enter_context(self._made(_BUILDING, fd))
                    ready = descriptors.enter_context(self._made(_READY, fd))
                    staging = Staging(self, run_id, building, ready)
                yield staging
            finally:
                with held_back(signal.SIGALRM):  # what was done was done in time
                    self._settle(run_id, published=None if staging is not None and staging.published else False)

    @contextmanager
    def _made(self, name: str, dir_fd: int) -> Iterator[int]:
        os.mkdir(name, 0o700, dir_fd=dir_fd)
        with opened(name, dir_fd=dir_fd) as fd:
            _give(fd, self.owner)
            yield fd

    def recover(self) -> tuple[str, ...]:
        """Settle what killed runs left: old folders are set aside, unpublished ones become trash. Names the runs."""
        runs = self.unfinished_runs()
        for run_id in runs:
            kept = self._settle(run_id, published=None)
            self.forget_aside(kept, newest=run_id)
        for name in os.listdir(self.own_fd):
            if name.startswith(_UNDOING):
                self._complete_undo(name.removeprefix(_UNDOING))
        return runs

    def unfinished_runs(self) -> tuple[str, ...]:
        """Runs that were killed, or that work while one looks without the lock."""
        return tuple(n.removeprefix(_STAGING) for n in sorted(os.listdir(self.own_fd)) if n.startswith(_STAGING))

    def _settle(self, run_id: str, *, published: bool | None) -> set[str]:
        """End a run's staging, and name the folders that it set aside. `published` None: read it off the folders."""
        name = _STAGING + run_id
        kept: set[str] = set()
        if not _exists(name, self.own_fd):
            return kept
        with opened(name, dir_fd=self.own_fd) as fd:
            if _exists(_OLD, fd) and _exists(_READY, fd):
                with opened(_OLD, dir_fd=fd) as old, opened(_READY, dir_fd=fd) as ready:
                    self._complete(old, ready, publishing=run_id)
            if _exists(_READY, fd):
                with opened(_READY, dir_fd=fd) as ready, opened(_BUILDING, dir_fd=fd) as building:
                    for folder in os.listdir(ready):
                        if _run_of(folder, ready) == run_id:
                            os.rename(folder, folder, src_dir_fd=ready, dst_dir_fd=building)
                        else:
                            kept.add(folder)
                if kept or published or (published is None and self.published_by(run_id)):
                    os.rename(_READY, _ASIDE + run_id, src_dir_fd=fd, dst_dir_fd=self.own_fd)
        os.rename(name, _TRASH + run_id, src_dir_fd=self.own_fd, dst_dir_fd=self.own_fd)
        os.fsync(self.own_fd)
        return kept

    def _complete(self, old: int, here: int, *, publishing: str | None) -> None:
        """Finish the exchanges that left a folder in `old`; when publishing, with none but a folder of that run."""
        for folder in os.listdir(old):
            waits = _exists(folder, here) and (publishing is None or _run_of(folder, here) == publishing)
            if not _exists(folder, self.fd) and waits:
                os.rename(folder, folder, src_dir_fd=here, dst_dir_fd=self.fd)
            if not _exists(folder, self.fd):
                os.rename(folder, folder, src_dir_fd=old, dst_dir_fd=self.fd)
            elif not _exists(folder, here):
                os.rename(folder, folder, src_dir_fd=old, dst_dir_fd=here)

    def _complete_undo(self, run_id: str) -> None:
        with opened(_UNDOING + run_id, dir_fd=self.own_fd) as old:
            if os.listdir(old):
                with opened(_ASIDE + run_id, dir_fd=self.own_fd) as aside:
                    self._complete(old, aside, publishing=None)
        os.rmdir(_UNDOING + run_id, dir_fd=self.own_fd)

    def published_by(self, run_id: str) -> list[str]:
        """The folders in place that run `run_id` put there."""
        return [f for f in sorted(os.listdir(self.fd)) if f != OPSCTL_FOLDER and _run_of(f, self.fd) == run_id]

    def forget_aside(self, folders: set[str], *, newest: str) -> None:
        """Of what earlier runs set aside, drop those of `folders` (run `newest` set them aside again) and the old."""
        now = datetime.now(UTC)
        for name in os.listdir(self.own_fd):
            if not name.startswith(_ASIDE) or name == _ASIDE + newest:
                continue
            with opened(name, dir_fd=self.own_fd) as aside:
                there = set(os.listdir(aside))
                undoable = there.union(self.published_by(name.removeprefix(_ASIDE)))  # also what was new
                age = now - datetime.fromtimestamp(os.fstat(aside).st_ctime, UTC)
                if undoable <= folders or age > ASIDE_KEPT:
                    os.rename(name, _TRASH + name, src_dir_fd=self.own_fd, dst_dir_fd=self.own_fd)
                    continue
                for folder in there & folders:
                    trash = f"{_TRASH}{name}-{folder}"
                    os.rename(folder, trash, src_dir_fd=aside, dst_dir_fd=self.own_fd)

    def remove_trash(self) -> None:
        """Delete what nobody needs any more, also what killed runs left of it."""
        for name in os.listdir(self.own_fd):
            if name.startswith(_TRASH):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.own_fd)

    def undoable_runs(self) -> list[str]:
        """The runs whose publishing can be undone, newest first."""
        return sorted((n.removeprefix(_ASIDE) for n in os.listdir(self.own_fd) if n.startswith(_ASIDE)), reverse=True)

    def undoable(self, run_id: str) -> dict[str, bool]:
        """The folders that undoing `run_id` would exchange: True where one was set aside, else False."""
        with opened(_ASIDE + run_id, dir_fd=self.own_fd) as aside:
            return dict.fromkeys(self.published_by(run_id), False) | dict.fromkeys(sorted(os.listdir(aside)), True)

    def undo(self, run_id: str, folder: str) -> None:
        """Exchange one published folder with the one set aside, or take it away where there was none before."""
        with opened(_ASIDE + run_id, dir_fd=self.own_fd) as aside:
            if not _exists(folder, aside):
                os.rename(folder, folder, src_dir_fd=self.fd, dst_dir_fd=aside)
            elif not _exists(folder, self.fd):
                os.rename(folder, folder, src_dir_fd=aside, dst_dir_fd=self.fd)
            else:
                exchange(folder, aside, self.fd, old=f"../{_UNDOING}{run_id}")
            os.fsync(aside)
        os.fsync(self.fd)


class Staging:
    """The staging of one run: writers fill `building_fd`, `publish` puts folders in place."""

    def __init__(self, root: SessionsRoot, run_id: str, building_fd: int, ready_fd: int) -> None:
        self._root = root
        self._ready = ready_fd
        self.run_id = run_id
        self.building_fd = building_fd
        self.published = False
        self._discarded = 0

    def sync(self) -> None:
        """One sync of the filesystem for all that was written. Raises OSError for what the disk did not take."""
        sync_filesystem(self.building_fd)

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Let the disk work while writers do: what is left for `sync` afterwards is little.

        A block that fails does not wait for the disk.
        """
        stop = threading.Event()
        # Opened for itself: the kernel tells a failed write to each open file once, and `sync` has to hear of it too.
        own_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.building_fd)

        def flush() -> None:
            while not stop.wait(_FLUSH_EVERY_S):
                _libc.syncfs(own_fd)
            os.close(own_fd)

        thread = threading.Thread(target=flush, name="flush", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()

    def take(self, ready: Path, folder: str) -> bool:
        """Move a copy that stands ready to where `folder` is built. False where only a copy of it can be made."""
        try:
            os.rename(ready, folder, dst_dir_fd=self.building_fd)
        except OSError as error:
            if error.errno in {errno.EXDEV, errno.ENOENT, errno.EACCES, errno.EPERM}:
                return False
            raise
        return True

    def discard(self, folder: str) -> None:
        """Out of the way with what was built of a company, for another try. It is deleted when all is done."""
        self._discarded += 1
        with suppress(FileNotFoundError):
            aside = f".discarded-{self._discarded}"
            os.rename(folder, aside, src_dir_fd=self.building_fd, dst_dir_fd=self.building_fd)

    def publish(self, folder: str) -> None:
        """Put one verified folder in place."""
        os.rename(folder, folder, src_dir_fd=self.building_fd, dst_dir_fd=self._ready)
        self.published = True  # from here on a rename may have happened, whatever comes back
        if not _rename(folder, self._ready, self._root.fd, _RENAME_NOREPLACE):
            exchange(folder, self._ready, self._root.fd, old=f"../{_OLD}")

    def sync_names(self) -> None:
        """Make the exchanges durable."""
        os.fsync(self._ready)
        os.fsync(self._root.fd)


def sync_filesystem(fd: int) -> None:
    """syncfs(2) of the filesystem that `fd` is on. Raises OSError for what the disk did not take."""
    if _libc.syncfs(fd) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def exchange(folder: str, here: int, there: int, *, old: str) -> None:
    """Exchange two folders of one name in one step, or put it there where there is none.

    Where the filesystem cannot: in two renames, between which what was there stands in `old`, a path from `here`.
    """
    was_there = _exists(folder, there)
    if was_there and _rename(folder, here, there, _RENAME_EXCHANGE):
        return
    with suppress(FileExistsError):
        os.mkdir(old, 0o700, dir_fd=here)
    with opened(old, dir_fd=here) as old_fd:
        if was_there:
            os.rename(folder, folder, src_dir_fd=there, dst_dir_fd=old_fd)
        try:
            os.rename(folder, folder, src_dir_fd=here, dst_dir_fd=there)
        except OSError:
            if was_there:
                os.rename(folder, folder, src_dir_fd=old_fd, dst_dir_fd=there)
            raise
        if was_there:
            os.rename(folder, folder, src_dir_fd=old_fd, dst_dir_fd=here)
    os.rmdir(old, dir_fd=here)


def _rename(folder: str, source: int, target: int, flag: int) -> bool:
    """renameat2(2). False where the flag cannot be honoured: no such operation here, or a target in the way."""
    name = folder.encode()
    if _libc.renameat2(source, name, target, name, flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EEXIST}:
        return False
    raise OSError(code, os.strerror(code), folder)


def _exists(name: str, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _run_of(folder: str, dir_fd: int) -> str | None:
    try:
        with opened(folder, dir_fd=dir_fd) as fd:
            origin = origin_of(fd)
    except OSError:
        return None
    return origin.run_id if origin else None


def _give(fd: int, owner: Owner) -> None:
    if os.fstat(fd).st_uid != owner.uid:
        os.fchown(fd, owner.uid, owner.gid)


def check_root(path: Path, owner: Owner) -> None:
    """Raises `Refused` for a target that is not a folder of this service; a missing one is fine if it can be made."""
    if owner.uid != os.geteuid() and os.geteuid() != 0:
        raise Refused(f"only root can write files for {owner.name}", hint=f"sudo -u {owner.name} opsctl ...")
    try:
        status = path.lstat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise Refused(f"{path.parent} does not exist", hint="make the folder, or pass another --to") from None
        _check_writable(path.parent)
        return
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}", hint="pass another --to") from None
    if stat.S_ISLNK(status.st_mode):
        raise Refused(f"{path} is a symbolic link", hint="pass the folder it points to as --to")
    if not stat.S_ISDIR(status.st_mode):
        raise Refused(f"{path} is not a folder", hint="pass another --to")
    if status.st_uid not in {owner.uid, os.geteuid()}:
        raise Refused(
            f"{path} belongs to {_user_name(status.st_uid)}, not to {owner.name}",
            hint=f"pass --owner {_user_name(status.st_uid)}, or another --to",
        )
    if any((path / name).exists() for name in (CREDS_FILE, MANIFEST_FILE)):
        raise Refused(f"{path} is one company's folder", hint=f"pass the folder it lies in: --to {path.parent}")
    if status.st_mode & stat.S_IWOTH:
        raise Refused(f"everybody may write to {path}", hint=f"chmod o-w {path}")
    _check_writable(path)


def _check_writable(folder: Path) -> None:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise Refused(f"{folder} is on a read-only filesystem", hint="pass another --to")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise Refused(f"{_user_name(os.geteuid())} may not write in {folder}", hint="check its owner and mode")


@contextmanager
def locked_root(path: Path, owner: Owner, *, run_id: str) -> Iterator[SessionsRoot]:
    """Open a sessions folder for writing, making it where it is missing, under its one lock.

    Raises `Refused` (the folder is not ours to write), `Locked` (another run holds it).
    """
    check_root(path, owner)
    with _translating(path), _only_for_the_owner():
        made = not path.exists()
        if made:
            path.mkdir(0o700)
        try:
            with opened(path) as fd:
                if made:
                    _give(fd, owner)
                _lock(fd, path)
                with _own_folder(path, fd, owner) as own:
                    _write_holder(own, run_id)
                    root = SessionsRoot(path, fd, own, owner)
                    try:
                        yield root
                    finally:
                        with held_back(signal.SIGALRM):
                            root.remove_trash()
                            with suppress(OSError):
                                os.unlink(_HOLDER, dir_fd=own)
        finally:
            if made:
                with suppress(OSError):  # as long as nothing is in it
                    path.rmdir()


@contextmanager
def readable_root(path: Path, owner: Owner) -> Iterator[SessionsRoot | None]:
    """A sessions folder to look at, without its lock; None where no restore has left anything. Makes nothing."""
    check_root(path, owner)
    with _translating(path), ExitStack() as stack:
        try:
            fd = stack.enter_context(opened(path))
            own = stack.enter_context(_own_folder(path, fd, None))
        except FileNotFoundError:
            yield None
        else:
            yield SessionsRoot(path, fd, own, owner)


@contextmanager
def _only_for_the_owner() -> Iterator[None]:
    """No umask of the shell may shut us out of folders that we make, or let others in."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _own_folder(path: Path, fd: int, owner: Owner | None) -> Iterator[int]:
    """`.opsctl`, for `owner` made where it is missing and taken away again where it stays empty."""
    if owner is not None:
        with suppress(FileExistsError):
            os.mkdir(OPSCTL_FOLDER, 0o700, dir_fd=fd)
    if not stat.S_ISDIR(os.stat(OPSCTL_FOLDER, dir_fd=fd, follow_symlinks=False).st_mode):
        raise Refused(f"{path / OPSCTL_FOLDER} is not a folder", hint="look at what it is, and move it away")
    with opened(OPSCTL_FOLDER, dir_fd=fd) as own:
        if owner is not None:
            _give(own, owner)
        try:
            yield own
        finally:
            if owner is not None:
                with suppress(OSError):
                    os.rmdir(OPSCTL_FOLDER, dir_fd=fd)


@contextmanager
def _translating(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise Refused(f"{path}: no space left", kind="disk-full", hint=f"df -h {path}; df -i {path}") from None
        if error.errno == errno.EROFS:
            raise Refused(f"{path} is on a read-only filesystem", hint="pass another --to") from None
        if error.errno in {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR}:
            raise Refused(f"{path}: {error.strerror}", hint="check its owner and mode") from None
        if error.errno == errno.EIO:
            raise Refused(f"the disk of {path} fails: {error.strerror}", kind="disk", hint="dmesg | tail") from None
        raise


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(f"another run works on {path}: {_holder(path)}", hint="wait for it, then type it again") from None


def working_on(path: Path) -> str | None:
    """Who holds the lock of a sessions folder now (pid, host, since); None where nobody does."""
    with suppress(OSError), opened(path) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(path)
    return None


def _holder(path: Path) -> str:
    try:
        with opened(path) as fd, opened(OPSCTL_FOLDER, dir_fd=fd) as own:
            holder = orjson.loads(read_file(own, _HOLDER))
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its pid is not known"


def _write_holder(own_fd: int, run_id: str) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": run_id,
    }
    with suppress(FileNotFoundError):  # never written into: the service's user may have put anything there
        os.unlink(_HOLDER, dir_fd=own_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError), os.fdopen(os.open(_HOLDER, flags, 0o600, dir_fd=own_fd), "wb") as file:
        file.write(orjson.dumps(holder))  # on a full disk the lock still holds, only nameless
