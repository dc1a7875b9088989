"""Who owns the sessions: the record of a switch, beside the folders that it is about.

As long as `DIR/.opsctl/switch.json` stands, the folders are the truth and the database is the stale copy: cleanup,
`doctor --fix`, `repair` and `cache warm` change nothing, and standby copies the folders. A record that cannot be read
counts as one, because what it guards cannot be had back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import orjson

from opsctl.errors import Refused, SettingsError
from opsctl.stores.folder import OPSCTL_FOLDER, opened, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from opsctl.settings import Settings

_NAME = "switch.json"
_BEFORE = "switch-before.json"
_TEMPORARY = ".new"


class Phase(StrEnum):
    """How far a switch, or the way back, has come. Written before each step, and after it."""

    STOPPING = "stopping the services"
    SYNCING = "syncing the warm copies"
    RESTORING = "restoring the folders"
    FLAGGING = "setting the flags"
    MOVING = "moving the services to the fallback code"
    READY = "ready to be started"
    """Everything is in place; a start by hand makes the folders the truth."""
    STARTING = "starting on the folders"
    SWITCHED = "switched"
    RETURNING = "bringing the rows back"
    RETURNED = "the rows are back"
    LEAVING = "starting on PostgreSQL"


BEFORE_THE_START = frozenset({Phase.STOPPING, Phase.SYNCING, Phase.RESTORING, Phase.FLAGGING, Phase.MOVING})
"""The folders are not the truth yet: whoever comes by completes these, or undoes them."""
ROWS_ARE_BACK = frozenset({Phase.RETURNED, Phase.LEAVING})
"""The database is the truth again; only code and start are left to do."""


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """A switch that has begun and was not brought back. `since` is ISO 8601 in UTC."""

    since: str
    run_id: str
    host: str
    phase: str
    """The last step that was reached, one of `Phase`; `switched` when the service runs on the folders."""
    services: tuple[str, ...] = ()
    details: str = ""
    """For a record that cannot be read: why."""
    done: bool = True
    """Whether that step was done to its end."""

    @property
    def is_switching(self) -> bool:
        """Whether it has not come to the start: the database is the truth, and services are stopped or moved."""
        return self.phase in BEFORE_THE_START

    @property
    def folders_are_the_truth(self) -> bool:
        """Whether the sessions belong to the folders. A record that cannot be read says so too."""
        return self.phase not in BEFORE_THE_START | ROWS_ARE_BACK


def read_switch(sessions_dir: Path) -> SwitchRecord | None:
    """The record beside the folders of `sessions_dir`; None where there is none. Never raises for a damaged one."""
    try:
        with opened(sessions_dir) as fd, opened(OPSCTL_FOLDER, dir_fd=fd) as own:
            data = read_file(own, _NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return SwitchRecord("unknown", "unknown", "unknown", "unreadable", details=error.strerror or "unreadable")
    try:
        found = orjson.loads(data)
        known = {field.name for field in fields(SwitchRecord)}
        values = {name: value for name, value in found.items() if name in known}
        return SwitchRecord(**{**values, "services": tuple(values.get("services", ()))})
    except (orjson.JSONDecodeError, TypeError, AttributeError):
        return SwitchRecord("unknown", "unknown", "unknown", "unreadable", details="it is torn")


def write_switch(own_fd: int, record: SwitchRecord) -> None:
    """Put the record in place in one step, synced. `own_fd` is the sessions folder's `.opsctl`."""
    _put(own_fd, _NAME, asdict(record))


def write_before(own_fd: int, before: Mapping[str, Any]) -> None:
    """Keep what a switch found, for the way back. It may hold secrets of the services' environments: 0600."""
    _put(own_fd, _BEFORE, before)


def read_before(own_fd: int) -> dict[str, Any]:
    """What a switch found; empty where nothing is kept, or it cannot be read."""
    try:
        found = orjson.loads(read_file(own_fd, _BEFORE))
    except (OSError, orjson.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _put(own_fd: int, name: str, value: Mapping[str, Any]) -> None:
    with suppress(FileNotFoundError):  # never written into: the service's user may have put anything there
        os.unlink(name + _TEMPORARY, dir_fd=own_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name + _TEMPORARY, flags, 0o600, dir_fd=own_fd), "wb") as file:
        file.write(orjson.dumps(value))
        file.flush()
        os.fsync(file.fileno())
    os.rename(name + _TEMPORARY, name, src_dir_fd=own_fd, dst_dir_fd=own_fd)
    os.fsync(own_fd)


def clear_switch(own_fd: int) -> None:
    """Remove the record, if there is one, and then what it needed."""
    for name in (_NAME, _BEFORE):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=own_fd)
    os.fsync(own_fd)


def refuse_while_switched(settings: Settings, what: str) -> None:
    """Raises `Refused` where a switch is on record: `what` would change a database that is the stale copy."""
    try:
        sessions_dir = settings.sessions_dir
    except SettingsError:  # no folders, so none that own the sessions
        return
    record = read_switch(sessions_dir)
    if record is not None:
        raise Refused(
            f"{what} changes nothing while the service runs on the folders in {sessions_dir} "
            f"(switched {record.since}, {record.phase})",
            kind="switched",
            hint="opsctl switch status",
        )
