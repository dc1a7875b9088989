"""One last sync of the warm copies after the services were stopped, if the database answers within two seconds."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from opsctl import db
from opsctl.errors import OpsctlError
from opsctl.journal import Journal
from opsctl.operations.standby import SyncWish, sync_standby
from opsctl.stores.live import LiveDatabase
from opsctl.stores.postgres import snapshot
from opsctl.stores.standby import Standby

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.settings import Settings
    from opsctl.stores.publishing import Owner

LIMIT_S = 2.0


def last_sync(settings: Settings, owner: Owner, *, run_id: str) -> str | None:
    """Why the warm copies are not of after the stop; None where they are, or where none are kept."""
    if not settings.standby_dir.is_dir():
        return None
    wish = SyncWish(
        run_id=run_id,
        keep=timedelta(hours=settings["STANDBY_KEEP_HOURS"]),
        retention=timedelta(days=settings["DB_CLEANUP_RETENTION_DAYS"]),
    )

    @contextmanager
    def open_live() -> Iterator[LiveDatabase]:
        connecting = db.connect(db.address(settings), LIMIT_S, connect_s=LIMIT_S)
        with connecting as connection, snapshot(connection) as opened:
            yield LiveDatabase(opened)

    standby = Standby(settings.standby_dir, settings.environment, owner)
    try:
        report = sync_standby(open_live, standby, wish, journal=Journal(), now=datetime.now(UTC))
    except OpsctlError as error:
        return error.message
    return report.failure.message if report.failure else None
