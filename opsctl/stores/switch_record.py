"""Who owns the sessions: the record of a switch, beside the folders that it is about.

As long as `DIR/.opsctl/switch.json` stands, the folders are the truth and the database is the stale copy: cleanup,
`doctor --fix`, `repair` and `cache warm` change nothing, and standby copies the folders. A record that cannot be read
counts as one, because what it guards cannot be had back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import orjson

from opsctl.errors import Refused, SettingsError
from opsctl.stores.folder import OPSCTL_FOLDER, opened, read_file

if TYPE_CHECKING:
    from pathlib import Path

    from opsctl.settings import Settings

_NAME = "switch.json"
_TEMPORARY = "switch.json.new"


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """A switch that has begun and was not brought back. `since` is ISO 8601 in UTC."""

    since: str
    run_id: str
    host: str
    phase: str
    """The last step that was reached; `switched` when the service runs on the folders."""
    services: tuple[str, ...] = ()
    details: str = ""
    """For a record that cannot be read: why."""


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
    with suppress(FileNotFoundError):  # never written into: the service's user may have put anything there
        os.unlink(_TEMPORARY, dir_fd=own_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_TEMPORARY, flags, 0o600, dir_fd=own_fd), "wb") as file:
        file.write(orjson.dumps(asdict(record)))
        file.flush()
        os.fsync(file.fileno())
    os.rename(_TEMPORARY, _NAME, src_dir_fd=own_fd, dst_dir_fd=own_fd)
    os.fsync(own_fd)


def clear_switch(own_fd: int) -> None:
    """Remove the record, if there is one."""
    with suppress(FileNotFoundError):
        os.unlink(_NAME, dir_fd=own_fd)
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
