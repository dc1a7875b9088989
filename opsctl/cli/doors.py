"""What several commands hand to their operations: the sessions folder, whose it is, connections, the archive."""

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.cli.frame import Invocation
    from opsctl.db import Connection
    from opsctl.stores.publishing import Owner
    from opsctl.stores.rewriting import Archiving

    OpenConnection = Callable[[], AbstractContextManager[Connection]]

_CONNECT_S, _NOBODY_WRITES_S = 2.0, 6.0
"""For connecting, and standing still for three seconds: a frozen server must not use the deadline up."""


def sessions_dir(run: "Invocation", given: "Path | None", option: str) -> "Path":
    """What `option` gave, else the settings' folder. Raises `SettingsError` naming all three ways."""
    from opsctl.errors import SettingsError

    if given is not None:
        return given.absolute()
    try:
        return run.settings.sessions_dir
    except SettingsError as error:
        raise SettingsError(error.message, hint=f"{error.hint}, or pass {option}") from None


def sessions_dir_if_set(run: "Invocation") -> "Path | None":
    """The settings' folder, where there is one."""
    from opsctl.errors import SettingsError

    with suppress(SettingsError):
        return run.settings.sessions_dir
    return None


def owner(run: "Invocation", name: str | None, target: "Path") -> "Owner":
    """--owner, else the owner of APP_DIR, else of the folder as it stands, else whoever runs this."""
    from opsctl.errors import SettingsError
    from opsctl.stores.publishing import Owner

    if name is not None:
        return Owner.named(name)
    app_dir = run.settings["APP_DIR"]
    if app_dir is not None:
        with suppress(OSError):
            if app_dir.is_dir():
                return Owner.of(app_dir)
        raise SettingsError(f"APP_DIR ({app_dir}) is not a folder", hint="correct it, or pass --owner USER")
    try:
        return Owner.of(target)
    except OSError:  # missing, or out of reach: for `check_root` to say
        return Owner.current()


def connection(run: "Invocation") -> "OpenConnection":
    """Opens a connection under the run's deadline, when called; PostgreSQL shows it under the command's name."""
    from opsctl import db
    from opsctl.stores.keys import application_name

    address = db.address(run.settings) | {"application_name": application_name(run.command)}
    return lambda: db.connect(address, run.deadline.remaining())


def short_connection(run: "Invocation") -> "OpenConnection | None":
    """Opens a connection for a look at who writes; None where no database is set."""
    from opsctl import db
    from opsctl.errors import SettingsError

    try:
        address = db.address(run.settings)
    except SettingsError:
        return None
    return lambda: db.connect(address, _NOBODY_WRITES_S, connect_s=_CONNECT_S)


def place(run: "Invocation") -> str:
    """The database's name for people."""
    from opsctl import db

    return db.place(db.address(run.settings))


def archiving(run: "Invocation") -> "Archiving":
    """How this run archives the rows that it changes."""
    from opsctl.stores.rewriting import Archiving

    settings = run.settings
    return Archiving(
        run_id=run.run_id,
        command=run.command,
        environment=settings.environment,
        database=place(run),
        state_dir=settings.state_dir,
        keep=timedelta(days=settings["ARCHIVE_KEEP_DAYS"]),
    )
