"""From which folder the services run: moving them to the fallback code, and back to exactly what was there.

PM2 keeps a copy of all it was told when a service was first started, and no `restart` changes script or folder. So the
service is deleted from its list and entered again, stopped, with PM2's own `resurrect`, which takes whole definitions:
whoever types `pm2 restart NAME` then gets the fallback code, and the way back gives every word of the first one again.
PM2's saved list (dump.pm2) is changed alike, or a reboot would bring the service up on the database. A systemd unit
gets a drop-in. A start command of the operator's gets the folder and the flags in its environment.
"""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from opsctl.errors import HalfDone, Refused
from opsctl.services import ACT_TIMEOUT_S, LOOK_TIMEOUT_S, Manager, Pm2, Systemd, environment_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opsctl.services import Service

FOLDER_VARIABLE = "SERVICE_DIR"
"""Where a start command of the operator's finds the folder that it is to start the service from."""
DROP_IN = "50-opsctl-switch.conf"
SYSTEMD_UNITS = Path("/etc/systemd/system")
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Move:
    """From `app_dir` to `fallback_dir`, where the service runs with `flags` in its environment."""

    app_dir: Path
    fallback_dir: Path
    env_file: Path
    """The fallback code's own."""
    flags: Mapping[str, str]

    def moved(self, text: str) -> str:
        """A path of the service's folder as one of the fallback's, where it is one; any other text as it is."""
        if _below(text, self.fallback_dir):
            return text
        for root in dict.fromkeys((self.app_dir, self.app_dir.resolve())):
            if _below(text, root):
                return str(self.fallback_dir) + text[len(str(root)) :]
        return text

    def moved_word(self, word: str) -> str:
        """Also of a word such as `--env-file=/srv/app/.env`, or `-/srv/app/.env` in a unit."""
        before, slash, path = word.partition("/")
        return before + self.moved(slash + path) if before == "" or before[-1] in "=-@:+!" else word


def _below(text: str, root: Path) -> bool:
    return text == str(root) or text.startswith(f"{root}/")


class Relocator(Protocol):
    """How one manager's services are moved. What `saved` gives may hold secrets: it is kept 0600 and never shown."""

    def saved(self) -> bytes:
        """All that is needed to have the services again as they are. Raises `Refused` where they cannot be moved."""

    def told(self) -> bytes:
        """The same without asking whether they can be moved: the fallback code may not be there yet."""

    def environment(self, saved: bytes) -> dict[str, str]:
        """What the services find in their environment besides the flags."""

    def there(self, saved: bytes) -> None:
        """Let the services, which are stopped, run from the fallback folder at their next start."""

    def back(self, saved: bytes) -> None:
        """Undo it, however far `there` came."""

    def start_environment(self, *, fallback: bool) -> dict[str, str]:
        """What a start has to be given."""


def relocator(manager: Manager, move: Move) -> Relocator:
    """The one for this manager."""
    if isinstance(manager, Pm2):
        return _MovesPm2(manager, move)
    if isinstance(manager, Systemd):
        return _MovesSystemd(manager, move)
    return _MovesCommand(move)


@dataclass(frozen=True, slots=True)
class Running:
    """What the processes of one service run on, as /proc says."""

    name: str
    folder: str | None
    flags: Mapping[str, str | None]
    """The value of each flag in its environment."""

    def is_fallback(self, move: Move) -> bool:
        """Whether it runs from the fallback folder with the flags in its environment."""
        return self.folder == str(move.fallback_dir.resolve()) and dict(self.flags) == dict(move.flags)


def running(services: Iterable[Service], flags: Iterable[str]) -> list[Running]:
    """One for each process that can be looked at."""
    names, found = list(flags), []
    for service in services:
        for pid in service.pids:
            environment = environment_of(pid)
            if environment is None:
                continue
            folder = None
            with suppress(OSError):
                folder = str(Path(f"/proc/{pid}/cwd").readlink())
            found.append(Running(service.name, folder, {name: environment.get(name) for name in names}))
    return found


# --- PM2 --------------------------------------------------------------------------------------------------------------


_NOT_DEFINED = ("instances", "pm_id", "prev_restart_delay")
"""What PM2's own `save` leaves out, or `resurrect` would start as many again, or under an id that is taken."""
_FILE = "opsctl-switch.json"
_DUMPS = ("dump.pm2", "dump.pm2.bak")


@dataclass(frozen=True, slots=True)
class _MovesPm2:
    manager: Pm2
    move: Move

    def saved(self) -> bytes:
        definitions = self._definitions()
        for definition in definitions:
            here, script = str(definition.get("pm_cwd")), str(definition.get("pm_exec_path"))
            for path in (here, script):
                if not _below(self.move.moved(path), self.move.fallback_dir):
                    raise Refused(
                        f"{definition['name']} runs {path}, which is not below APP_DIR ({self.move.app_dir})",
                        kind="foreign-folder",
                        hint="opsctl config show",
                    )
            if not Path(self.move.moved(script)).is_file():
                raise Refused(
                    f"the fallback code has no {self.move.moved(script)}, which {definition['name']} starts",
                    kind="not-prepared",
                    hint="opsctl switch prepare",
                )
        return self._stored(definitions)

    def told(self) -> bytes:
        return self._stored(self._definitions())

    def _stored(self, definitions: Sequence[Mapping[str, Any]]) -> bytes:
        return orjson.dumps({"definitions": definitions, "dumps": self._dumps()})

    def environment(self, saved: bytes) -> dict[str, str]:
        first = orjson.loads(saved)["definitions"][0]
        return {
            name: self.move.moved(value) if name in _FOLDER_NAMES else value
            for name, value in first["env"].items()
            if isinstance(value, str)
        }

    def there(self, saved: bytes) -> None:
        stored = orjson.loads(saved)
        self._enter([self._moved(definition) for definition in stored["definitions"]])
        for name, entries in stored["dumps"].items():
            self._replace_dump(name, [self._moved(entry) for entry in entries])

    def back(self, saved: bytes) -> None:
        stored = orjson.loads(saved)
        self._enter(stored["definitions"])
        for name in _DUMPS:
            saved_since = any(entry.get("name") in self.manager.names for entry in self._read_dump(name))
            if name in stored["dumps"] or saved_since:  # by whoever typed `pm2 save` meanwhile
                self._replace_dump(name, stored["dumps"].get(name, stored["definitions"]))

    def start_environment(self, *, fallback: bool) -> dict[str, str]:  # noqa: ARG002 - the definition has it all
        return {}

    def _definitions(self) -> list[dict[str, Any]]:
        """What PM2 was told of the services, in the order of its ids."""
        entries, problem = self.manager.listed(LOOK_TIMEOUT_S)
        known = {entry.get("name") for entry in entries}
        missing = [name for name in self.manager.names if name not in known]
        if problem or missing:
            raise Refused(problem or f"PM2 does not know {missing[0]}", kind="service-unknown", hint="pm2 list")
        return [
            {name: value for name, value in entry["pm2_env"].items() if name not in _NOT_DEFINED}
            for entry in sorted(entries, key=lambda entry: int(entry.get("pm_id") or 0))
            if entry.get("name") in self.manager.names
        ]

    def _moved(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        moved = dict(definition)
        for name in ("pm_cwd", "cwd", "pm_exec_path", "exec_interpreter", "PWD"):
            if isinstance(moved.get(name), str):
                moved[name] = self.move.moved(moved[name])
        for name in ("args", "node_args"):
            if isinstance(moved.get(name), list):
                moved[name] = [self.move.moved_word(w) if isinstance(w, str) else w for w in moved[name]]
        environment = dict(moved.get("env") or {})
        for name in _FOLDER_NAMES & environment.keys():
            environment[name] = self.move.moved(environment[name])
        moved["env"] = {**environment, **self.move.flags}
        return {**moved, **self.move.flags}

    def _enter(self, definitions: Sequence[Mapping[str, Any]]) -> None:
        """Put the definitions, stopped, in place of what PM2 has of the services. Does nothing where it has them."""
        give_up_at = time.monotonic() + ACT_TIMEOUT_S
        entries, problem = self.manager.listed(LOOK_TIMEOUT_S)
        if problem:
            raise HalfDone(f"the services cannot be moved: {problem}", kind="not-moved", hint="pm2 list")
        ours = [entry for entry in entries if entry.get("name") in self.manager.names]
        if _told_apart(entry["pm2_env"] for entry in ours) == _told_apart(definitions):
            return
        if ours:
            self._pm2("delete", *(str(entry["pm_id"]) for entry in ours), give_up_at=give_up_at)
        path = self.manager.home / _FILE
        self._write(path.name, orjson.dumps([{**definition, "status": "stopped"} for definition in definitions]))
        try:
            more = {"PM2_DUMP_FILE_PATH": str(path), "PM2_DUMP_BACKUP_FILE_PATH": str(path)}
            self._pm2("resurrect", give_up_at=give_up_at, more=more)
        finally:
            path.unlink(missing_ok=True)
        entries, problem = self.manager.listed(LOOK_TIMEOUT_S)
        ours = [entry for entry in entries if entry.get("name") in self.manager.names]
        if problem or _told_apart(entry["pm2_env"] for entry in ours) != _told_apart(definitions):
            raise HalfDone(
                f"PM2 does not have the services as they should be{': ' + problem if problem else ''}",
                kind="not-moved",
                hint="pm2 list, then type it again",
            )

    def _pm2(self, *words: str, give_up_at: float, more: Mapping[str, str] | None = None) -> None:
        done = self.manager.run(("pm2", *words), max(1.0, give_up_at - time.monotonic()), more or {})
        if done.exit_code != 0:
            ended = "did not end" if done.exit_code is None else f"ended with {done.exit_code}"
            raise HalfDone(f"pm2 {words[0]} {ended}", kind="not-moved", hint="pm2 list, then type it again")

    def _dumps(self) -> dict[str, list[dict[str, Any]]]:
        """What PM2's saved lists have of the services."""
        found = {}
        for name in _DUMPS:
            entries = [entry for entry in self._read_dump(name) if entry.get("name") in self.manager.names]
            if entries:
                found[name] = entries
        return found

    def _read_dump(self, name: str) -> list[dict[str, Any]]:
        try:
            descriptor = os.open(self.manager.home / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                entries = orjson.loads(file.read())
        except (OSError, orjson.JSONDecodeError):
            return []
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    def _replace_dump(self, name: str, ours: Sequence[Mapping[str, Any]]) -> None:
        """Exchange the services in a saved list; what else was saved meanwhile stays."""
        others = [entry for entry in self._read_dump(name) if entry.get("name") not in self.manager.names]
        new = f"{name}.opsctl"
        try:
            self._write(new, orjson.dumps([*others, *ours], option=orjson.OPT_INDENT_2))
            (self.manager.home / new).replace(self.manager.home / name)
        except OSError as error:
            why = f"PM2's saved list {self.manager.home / name} cannot be changed: {error.strerror}"
            raise HalfDone(why, kind="not-moved", hint="pm2 save, when all is done") from None

    def _write(self, name: str, data: bytes) -> None:
        """A file in PM2's folder, only for its user. The folder is that user's: nothing that stands there is opened."""
        account = self.manager.account
        descriptor = os.open(self.manager.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=descriptor)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=descriptor), "wb") as file:
                if os.fstat(file.fileno()).st_uid != account.uid:
                    os.fchown(file.fileno(), account.uid, account.gid)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        finally:
            os.close(descriptor)


_FOLDER_NAMES = {"PWD", "INIT_CWD", "npm_config_local_prefix"}


def _told_apart(definitions: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What tells one set of definitions from another: names, folders, scripts, words and environments."""
    return sorted(
        (
            str(definition.get("name")),
            str(definition.get("pm_cwd")),
            str(definition.get("pm_exec_path")),
            str(definition.get("args")),
            str(sorted((k, v) for k, v in (definition.get("env") or {}).items() if k != "unique_id")),
        )
        for definition in definitions
    )


# --- systemd ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MovesSystemd:
    manager: Systemd
    move: Move

    def saved(self) -> bytes:
        """Nothing: a drop-in is made from what systemd says, never from a file that the service's user could write."""
        for name in self.manager.names:
            self._drop_in(name)
        return b"{}"

    def told(self) -> bytes:
        return b"{}"

    def environment(self, saved: bytes) -> dict[str, str]:  # noqa: ARG002 - a unit's environment is built at its start
        return {}

    def there(self, saved: bytes) -> None:  # noqa: ARG002 - see `saved`
        for name in self.manager.names:
            path = self._path(name)
            if path.exists():
                continue
            text = self._drop_in(name)
            flags = "".join(f"{flag}={shlex.quote(value)}\n" for flag, value in self.move.flags.items())
            try:
                path.parent.mkdir(mode=0o755, exist_ok=True)
                _flags_file(path).write_text(flags, encoding="utf-8")
                new = path.with_suffix(".new")
                new.write_text(text, encoding="utf-8")
                new.replace(path)
            except OSError as error:
                raise HalfDone(f"{path} cannot be written: {error.strerror}", kind="not-moved") from None
        self._reload()

    def back(self, saved: bytes) -> None:  # noqa: ARG002 - see `saved`
        for name in self.manager.names:
            path = self._path(name)
            with suppress(OSError):
                for made in (path, _flags_file(path), path.with_suffix(".new")):
                    made.unlink(missing_ok=True)
                path.parent.rmdir()
            if path.exists():
                raise HalfDone(f"{path} cannot be removed", kind="not-moved", hint=f"rm {path}")
        self._reload()

    def start_environment(self, *, fallback: bool) -> dict[str, str]:  # noqa: ARG002 - the unit has it all
        return {}

    @staticmethod
    def _path(name: str) -> Path:
        unit = name if name.endswith(".service") else f"{name}.service"
        return SYSTEMD_UNITS / f"{unit}.d" / DROP_IN

    def _reload(self) -> None:
        done = self.manager.run(("systemctl", "daemon-reload"), ACT_TIMEOUT_S, {})
        if done.exit_code != 0:
            raise HalfDone("systemctl daemon-reload failed", kind="not-moved", hint="systemctl daemon-reload")

    def _drop_in(self, name: str) -> str:
        done = self.manager.run(("systemctl", "cat", "--", name), LOOK_TIMEOUT_S, {})
        said = done.stdout.decode(errors="replace").partition(f"# {self._path(name)}\n")[0]  # without one of ours
        told = _unit_words(said) if done.exit_code == 0 else {}
        starts = told.get("ExecStart", [])
        if not starts:
            raise Refused(f"systemd does not say how it starts {name}", kind="service-unknown", hint="systemctl cat")
        folder = (told.get("WorkingDirectory") or [""])[-1]
        moved = [" ".join(self.move.moved_word(word) for word in line.split(" ")) for line in starts]
        if moved == starts and self.move.moved(folder) == folder:
            raise Refused(
                f"{name} does not run from APP_DIR ({self.move.app_dir})", kind="foreign-folder", hint="systemctl cat"
            )
        files = [self.move.moved_word(path) for path in told.get("EnvironmentFile", [])]
        lines = ["# Written by opsctl: the service runs on its session folders. `opsctl sessions failback` removes it."]
        lines += ["[Service]", f"WorkingDirectory={self.move.fallback_dir}", "ExecStart="]
        lines += [f"ExecStart={line}" for line in moved]
        # A later file wins over an earlier one, and every file over Environment. The flags have one of their own: to
        # systemd a comment behind a value, which the service may skip, is a part of it.
        lines += ["EnvironmentFile=", *(f"EnvironmentFile={path}" for path in files)]
        lines += [f"EnvironmentFile={path}" for path in (self.move.env_file, _flags_file(self._path(name)))]
        return "\n".join(lines) + "\n"


def _flags_file(drop_in: Path) -> Path:
    """The env file beside a drop-in, which has the flags alone."""
    return drop_in.with_suffix(".env")


def _unit_words(text: str) -> dict[str, list[str]]:
    """The [Service] section of `systemctl cat`: each name with its values, an empty one forgetting those before."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line.strip()
        elif section == "[Service]" and "=" in line and not line.startswith(("#", ";")):
            name, value = (part.strip() for part in line.split("=", 1))
            found[name] = [*found.get(name, []), value] if value else []
    return found


# --- the operator's own commands --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MovesCommand:
    move: Move

    def saved(self) -> bytes:
        return b"{}"

    def told(self) -> bytes:
        return b"{}"

    def environment(self, saved: bytes) -> dict[str, str]:  # noqa: ARG002 - there is none
        return {}

    def there(self, saved: bytes) -> None:
        """Nothing is kept anywhere: each start is told."""

    def back(self, saved: bytes) -> None:
        """Nothing was changed."""

    def start_environment(self, *, fallback: bool) -> dict[str, str]:
        if fallback:
            return {FOLDER_VARIABLE: str(self.move.fallback_dir), **self.move.flags}
        return {FOLDER_VARIABLE: str(self.move.app_dir)}
