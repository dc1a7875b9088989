"""The fallback code: a git worktree of the emergency tag with dependencies and an env file of its own.

Made in peacetime by `switch prepare`, looked at before anything is switched. It is never a checkout in APP_DIR, which
would change the code under services that run. git, the installer and the dry boot run as the service's user.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from opsctl import process, services
from opsctl.errors import OpsctlError, Refused, SettingsError
from opsctl.relocation import Move
from opsctl.report import Column, Report
from opsctl.stores import env_file
from opsctl.stores.folder import opened, read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opsctl.journal import Journal
    from opsctl.process import Account, Finished
    from opsctl.settings import Settings

GIT_TIMEOUT_S = 20.0
INSTALL_TIMEOUT_S = 900.0
DRY_BOOT_VARIABLE = "OPSCTL_DRY_BOOT"
"""Set while the fallback code is only tried: a program that finds it must not connect to WhatsApp."""
_MARKER = ".opsctl-prepared.json"
_HINT = "opsctl switch prepare"


@dataclass(frozen=True, slots=True)
class Fallback:
    """Where the fallback code is, or is to be, and how it is made and tried."""

    app_dir: Path
    folder: Path
    tag: str
    env_name: str
    flags: Mapping[str, str]
    sessions_dir: Path
    install: tuple[str, ...]
    dry_boot: tuple[str, ...]
    dry_boot_s: float
    account: Account

    @property
    def env_file(self) -> Path:
        return self.folder / self.env_name

    @property
    def move(self) -> Move:
        return Move(self.app_dir, self.folder, self.env_file, self.flags)

    @property
    def link(self) -> Path | None:
        """Where the fallback code looks for folders that lie below APP_DIR; None where they lie elsewhere."""
        if not self.sessions_dir.is_relative_to(self.app_dir):
            return None
        return self.folder / self.sessions_dir.relative_to(self.app_dir)

    def run(
        self, words: tuple[str, ...], *, folder: Path, timeout_s: float, more: Mapping[str, str] | None = None
    ) -> Finished:
        """Run a program as the service's user."""
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.account.home),
            "USER": self.account.name,
            "LOGNAME": self.account.name,
            "LANG": "C.UTF-8",
            "GIT_OPTIONAL_LOCKS": "0",  # a look at the worktree writes nothing
            **(more or {}),
        }
        account = self.account if os.geteuid() == 0 and self.account.uid != 0 else None
        try:
            return process.run(words, environment=environment, timeout_s=timeout_s, account=account, folder=folder)
        except OSError as error:
            return process.Finished(127, b"", f"{words[0]}: {error.strerror}")

    def git(self, folder: Path, *words: str) -> str | None:
        """What git prints; None where it fails."""
        done = self.run(("git", *words), folder=folder, timeout_s=GIT_TIMEOUT_S)
        return done.stdout.decode(errors="replace").strip() if done.exit_code == 0 else None


def fallback_of(settings: Settings) -> Fallback:
    """The fallback code that the settings name. Raises `SettingsError` naming those that are missing."""
    needed = ("APP_DIR", "FALLBACK_DIR", "FALLBACK_DRY_BOOT_COMMAND")
    missing = [name for name in needed if not settings[name]]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise SettingsError(f"{', '.join(missing)} {verb} not set", hint="opsctl config show")
    app_dir, folder = Path(settings["APP_DIR"]), Path(settings["FALLBACK_DIR"])
    if folder == app_dir or app_dir.is_relative_to(folder):
        raise SettingsError(f"FALLBACK_DIR ({folder}) is APP_DIR, or above it", hint="choose a folder beside APP_DIR")
    return Fallback(
        app_dir=app_dir,
        folder=folder,
        tag=settings["EMERGENCY_TAG"],
        env_name=settings["SERVICE_ENV_FILE"],
        flags=dict(settings["SWITCH_FLAGS"]),
        sessions_dir=settings.sessions_dir,
        install=settings["FALLBACK_INSTALL_COMMAND"],
        dry_boot=settings["FALLBACK_DRY_BOOT_COMMAND"],
        dry_boot_s=float(settings["FALLBACK_DRY_BOOT_SECONDS"]),
        account=services.account(settings),
    )


# --- looking ----------------------------------------------------------------------------------------------------------


def require_prepared(fallback: Fallback) -> None:
    """Raises `Refused` naming the first thing that is not as `switch prepare` leaves it. Changes nothing."""
    commit = _commit_of_tag(fallback)
    if not fallback.folder.is_dir():
        raise _not_prepared(f"{fallback.folder} does not exist")
    _require_worktree(fallback, commit)
    if not _installed(fallback, commit):
        raise _not_prepared(f"the dependencies in {fallback.folder} are missing, or of another commit")
    env_file.require_writable(fallback.env_file)
    if (wrong := _wrong_link(fallback)) is not None:
        raise _not_prepared(wrong)


def require_boots(fallback: Fallback, environment: Mapping[str, str]) -> None:
    """Start the fallback code with the flags, without letting it do anything. Raises `Refused` where it does not run.

    It must end with 0, or still run after FALLBACK_DRY_BOOT_SECONDS, when it is stopped.
    """
    more = {**environment, **fallback.flags, DRY_BOOT_VARIABLE: "1"}
    done = fallback.run(fallback.dry_boot, folder=fallback.folder, timeout_s=fallback.dry_boot_s, more=more)
    if done.exit_code in {0, None}:
        return
    flags = " ".join(f"{name}={shlex.quote(value)}" for name, value in fallback.flags.items())
    raise Refused(
        f"the fallback code does not start with {flags}: {fallback.dry_boot[0]} ended with {done.exit_code}",
        kind="dry-boot",
        hint=f"cd {shlex.quote(str(fallback.folder))} && {flags} {shlex.join(fallback.dry_boot)}",
    )


def _not_prepared(what: str) -> Refused:
    return Refused(f"the fallback code is not ready: {what}", kind="not-prepared", hint=_HINT)


def _commit_of_tag(fallback: Fallback) -> str:
    """Raises `Refused`. Not `git tag -l`, which ends with 0 also where there is no such tag."""
    if shutil.which("git") is None:
        raise Refused("the program git is not found on PATH", kind="no-git")
    if fallback.git(fallback.app_dir, "rev-parse", "--git-dir") is None:
        raise Refused(f"{fallback.app_dir} is no git repository", kind="no-git", hint="opsctl config show")
    commit = fallback.git(fallback.app_dir, "rev-parse", "--verify", "--quiet", f"refs/tags/{fallback.tag}^{{commit}}")
    if not commit:
        raise Refused(
            f"the tag {fallback.tag} does not exist in {fallback.app_dir}",
            kind="no-tag",
            hint=f"git -C {shlex.quote(str(fallback.app_dir))} fetch --tags",
        )
    return commit


def _require_worktree(fallback: Fallback, commit: str) -> None:
    top = fallback.git(fallback.folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != fallback.folder.resolve():
        raise _not_prepared(f"{fallback.folder} is no git worktree")
    if _common_dir(fallback, fallback.folder) != _common_dir(fallback, fallback.app_dir):
        raise _not_prepared(f"{fallback.folder} is a worktree of another repository than {fallback.app_dir}")
    if fallback.git(fallback.folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}") != commit:
        raise _not_prepared(f"{fallback.folder} is not at the tag {fallback.tag}")
    if changed := _changed(fallback):
        raise Refused(
            f"files of the tag are changed in {fallback.folder}: {', '.join(map(ascii, changed[:3]))}",
            kind="not-prepared",
            hint=f"git -C {shlex.quote(str(fallback.folder))} status",
        )


def _common_dir(fallback: Fallback, folder: Path) -> Path | None:
    found = fallback.git(folder, "rev-parse", "--git-common-dir")
    return (folder / found).resolve() if found else None


def _changed(fallback: Fallback) -> list[str]:
    """Files of the tag that are not as the tag has them; what lies beside them (node_modules, .env) is meant to."""
    status = fallback.git(fallback.folder, "status", "--porcelain", "--untracked-files=no")
    if status is None:
        raise _not_prepared(f"git cannot look at {fallback.folder}")
    return [line[2:].strip() for line in status.splitlines()]


def _installed(fallback: Fallback, commit: str) -> bool:
    """Whether the dependencies are those of this commit, and still there. Raises `Refused`."""
    try:
        with opened(fallback.folder) as fd:
            found = orjson.loads(read_file(fd, _MARKER))
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(found, dict) and found.items() >= _installation(fallback, commit).items()


def _installation(fallback: Fallback, commit: str) -> dict[str, Any]:
    """What `switch prepare` leaves as its last word; a package that needs no others has no folder of them."""
    lock, modules = fallback.folder / "package-lock.json", fallback.folder / "node_modules"
    digest = sha256(lock.read_bytes()).hexdigest() if lock.is_file() else ""
    return {"commit": commit, "lock": digest, "node_modules": modules.is_dir()}


def _wrong_link(fallback: Fallback) -> str | None:
    """Why the fallback code would not find the restored folders: it would make new identities in an empty one."""
    link = fallback.link
    if link is None:
        return None
    if not link.is_symlink() or link.readlink() != fallback.sessions_dir:
        return f"{link} does not lead to {fallback.sessions_dir}"
    return None


# --- preparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrepareRow:
    """One part of the fallback code."""

    part: str
    result: str
    """`ready` (nothing had to be done), `made`, or `would be made`."""
    seen: str


_COLUMNS = (Column("Part", "part"), Column("Result", "result"), Column("Seen", "seen"))


def prepare(fallback: Fallback, *, journal: Journal, environment: Mapping[str, str], dry_run: bool = False) -> Report:
    """Make what is missing of the fallback code, and try it. Twice is as good as once. APP_DIR is only read.

    Raises `Refused` where something stands in the way, or where the code does not start.
    """
    making = _Preparing(fallback, dry_run=dry_run)
    for name, part in making.parts():
        with journal.step(name):
            part()
    waiting = [row for row in making.rows if row.result == _WOULD]
    if dry_run and waiting:
        summary = f"{len(waiting)} parts of the fallback code would be made; nothing was changed"
        return _prepared(fallback, making, summary, ["opsctl switch prepare"])
    with journal.step("start it once with the flags"):
        require_boots(fallback, environment)
    making.rows.append(PrepareRow("dry boot", "ready", f"{shlex.join(fallback.dry_boot)[:60]} with the flags"))
    return _prepared(
        fallback,
        making,
        f"the fallback code in {fallback.folder} is ready",
        ["opsctl sessions restore --switch --dry-run"],
    )


def _prepared(fallback: Fallback, making: _Preparing, summary: str, next_lines: list[str]) -> Report:
    return Report(
        summary=summary,
        rows=making.rows,
        columns=_COLUMNS,
        facts={"folder": str(fallback.folder), "tag": fallback.tag, "commit": making.commit},
        warnings=making.warnings,
        next_lines=next_lines,
    )


_READY, _MADE, _WOULD = "ready", "made", "would be made"


class _Preparing:
    """The parts, in order. A dry run only says what is missing."""

    def __init__(self, fallback: Fallback, *, dry_run: bool) -> None:
        self.fallback = fallback
        self.dry_run = dry_run
        self.rows: list[PrepareRow] = []
        self.warnings: list[str] = []
        self.commit = ""

    def parts(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("look for the tag", self._tag),
            ("the worktree", self._worktree),
            ("the dependencies", self._dependencies),
            ("the env file", self._env),
            ("the sessions folder", self._link),
        ]

    def _settle(self, part: str, seen: str, *, missing: bool) -> bool:
        """Note a part; whether it is to be made now."""
        self.rows.append(PrepareRow(part, (_WOULD if self.dry_run else _MADE) if missing else _READY, seen))
        return missing and not self.dry_run

    def _tag(self) -> None:
        self.commit = _commit_of_tag(self.fallback)
        self._settle("tag", f"{self.fallback.tag} is {self.commit[:12]}", missing=False)

    def _worktree(self) -> None:
        fallback = self.fallback
        try:
            there = any(fallback.folder.iterdir())
        except FileNotFoundError:
            there = False
        if not there:
            if self._settle("worktree", str(fallback.folder), missing=True):
                self._make_folder()
                self._git(fallback.app_dir, "worktree", "prune")
                self._git(fallback.app_dir, "worktree", "add", "--detach", str(fallback.folder), self.commit)
            return
        try:
            _require_worktree(fallback, self.commit)
        except Refused as error:
            if not error.message.endswith(f"is not at the tag {fallback.tag}") or _changed(fallback):
                raise Refused(error.message, kind=error.kind, hint=f"look at {fallback.folder}") from None
            if self._settle("worktree", f"{fallback.folder}, of another commit", missing=True):
                self._git(fallback.folder, "checkout", "--quiet", "--detach", self.commit)
        else:
            self._settle("worktree", str(fallback.folder), missing=False)

    def _make_folder(self) -> None:
        """As root for the service's user, who may not be allowed to make one there."""
        folder, account = self.fallback.folder, self.fallback.account
        try:
            folder.mkdir(mode=0o755, exist_ok=True)
            if folder.stat().st_uid != account.uid:
                os.chown(folder, account.uid, account.gid)
        except OSError as error:
            raise Refused(f"{folder} cannot be made: {error.strerror}", hint=f"ls -ld {folder.parent}") from None

    def _git(self, folder: Path, *words: str) -> None:
        done = self.fallback.run(("git", *words), folder=folder, timeout_s=INSTALL_TIMEOUT_S)
        if done.exit_code != 0:
            said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.exit_code}"]
            raise Refused(f"git {' '.join(words[:2])}: {said[0][:200]}", kind="git", hint=_HINT)

    def _dependencies(self) -> None:
        fallback = self.fallback
        marker = fallback.folder / _MARKER
        if not fallback.folder.is_dir():
            self._settle("dependencies", shlex.join(fallback.install), missing=True)
            return
        there = _installed(fallback, self.commit)
        if not self._settle("dependencies", shlex.join(fallback.install), missing=not there):
            return
        marker.unlink(missing_ok=True)
        if (fallback.folder / "package.json").exists():
            done = fallback.run(fallback.install, folder=fallback.folder, timeout_s=INSTALL_TIMEOUT_S)
            if done.exit_code != 0:
                ended = "did not end" if done.exit_code is None else f"ended with {done.exit_code}"
                line = f"cd {shlex.quote(str(fallback.folder))} && {shlex.join(fallback.install)}"
                raise Refused(f"{shlex.join(fallback.install)} {ended}", kind="dependencies", hint=line)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(marker, orjson.dumps({**_installation(fallback, self.commit), "prepared_at": at}))

    def _write(self, path: Path, data: bytes) -> None:
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            if os.fstat(descriptor).st_uid != self.fallback.account.uid:
                os.fchown(descriptor, self.fallback.account.uid, self.fallback.account.gid)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        new.replace(path)

    def _env(self) -> None:
        fallback = self.fallback
        path, theirs = fallback.env_file, fallback.app_dir / fallback.env_name
        if not fallback.folder.is_dir() or not os.path.lexists(path):
            source = theirs if theirs.exists() else None
            seen = (
                f"{path.name}, a copy of APP_DIR's with the flags" if source else f"{path.name}, with the flags alone"
            )
            if self._settle("env file", seen, missing=True):
                env_file.write_copy(source, path, uid=fallback.account.uid, gid=fallback.account.gid)
                env_file.set_variables(path, fallback.flags)
            return
        env_file.require_writable(path)
        found = env_file.values(path)
        wrong = [name for name, value in fallback.flags.items() if found.get(name) != value]
        if self._settle(
            "env file", f"{path.name} has the flags" if not wrong else ", ".join(wrong), missing=bool(wrong)
        ):
            env_file.set_variables(path, fallback.flags)
        with suppress(OpsctlError):
            lacking = sorted(env_file.values(theirs).keys() - found.keys())
            if lacking:
                self.warnings.append(f"{theirs} sets {', '.join(map(ascii, lacking[:5]))}, and {path} does not")

    def _link(self) -> None:
        fallback, link = self.fallback, self.fallback.link
        if link is None:
            self._settle("sessions folder", f"{fallback.sessions_dir}, which the service has to be told", missing=False)
            return
        if not self._settle(
            "sessions folder", f"a link to {fallback.sessions_dir}", missing=_wrong_link(fallback) is not None
        ):
            return
        with suppress(FileNotFoundError):
            found = link.lstat()
            if stat.S_ISLNK(found.st_mode):
                link.unlink()
            elif stat.S_ISDIR(found.st_mode):
                self._remove_empty(link)
            else:
                raise Refused(
                    f"{link} is in the way of the sessions folder", kind="not-prepared", hint=f"look at {link}"
                )
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(fallback.sessions_dir)

    @staticmethod
    def _remove_empty(link: Path) -> None:
        try:
            link.rmdir()
        except OSError:
            raise Refused(
                f"{link} holds something, and the service would find that instead of the restored folders",
                kind="not-prepared",
                hint=f"look at {link}, and move it away",
            ) from None


def facts_of(fallback: Fallback) -> dict[str, Any]:
    """What a report says of the fallback code."""
    return {"fallback_dir": str(fallback.folder), "tag": fallback.tag}
