"""All that is sent about a run: one place, one budget of time, nothing raised, nothing printed.

Each receiver has a thread of its own, so that one that hangs holds up no other. What must arrive is in the spool before
it is tried; whatever is not answered there leaves with a later run.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from opsctl.errors import SettingsError
from opsctl.spool import Spool
from opsctl.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.report import Ending
    from opsctl.settings import Settings
    from opsctl.spool import Waiting
    from opsctl.web import Endpoint

BUDGET_S = 1.7
"""2 s are promised for all that is sent; the rest pays for loading and unloading what sends it, on a machine that is
busy with the emergency itself."""
COOLDOWN_S = 30 * 60.0


class Notices:
    """What one run tells others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def end(self, ending: Ending, *, event: bool) -> str | None:
        """Tell how it ended, and what earlier runs could not; gives the id of the event if Sentry has taken it.

        Takes at most `BUDGET_S`, whatever receivers and the state folder do. An `event` of the same command and kind is
        sent once in `COOLDOWN_S`, in an emergency always.
        """
        until = time.monotonic() + BUDGET_S
        event_id = uuid.uuid4().hex
        taken: list[str] = []
        threads = []
        if self._settings["SENTRY_DSN"]:
            threads.append(_in_background(lambda: self._send_events(ending if event else None, event_id, until, taken)))
        for thread in threads:
            thread.join(until - time.monotonic())
        return event_id if event_id in taken else None

    def _send_events(self, ending: Ending | None, event_id: str, until: float, taken: list[str]) -> None:
        from opsctl import sentry

        fresh = None
        if ending and (ending.emergency or self._first("sentry", ending)):
            fresh = event_id, sentry.envelope(sentry.event_of(ending, self._settings, event_id))
        _deliver(self._spool("sentry"), fresh, lambda: sentry.endpoint(self._settings["SENTRY_DSN"]), until, taken)

    def _first(self, receiver: str, ending: Ending) -> bool:
        name = re.sub(r"[^\w-]+", "-", f"{receiver}-{ending.command}-{ending.kind}")
        return State(self._folder).first_in(name, COOLDOWN_S)

    def _spool(self, receiver: str) -> Spool:
        return Spool(self._folder / "spool" / receiver)

    @property
    def _folder(self) -> Path:
        try:
            return self._settings.state_dir
        except SettingsError:  # a user without a home
            return Path(os.devnull) / "opsctl"  # where nothing is ever found or written


def _in_background(work: Callable[[], None]) -> threading.Thread:
    """Begin `work` in a daemon thread, for which the end of the process does not wait.

    Nothing else bounds a resolver that hangs, an answer that drips or a disk that stalls.
    """

    def quietly() -> None:
        with contextlib.suppress(Exception):  # an alert that fails changes nothing about the command it is about
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def _deliver(
    spool: Spool, fresh: tuple[str, bytes] | None, connect: Callable[[], Endpoint], until: float, taken: list[str]
) -> None:
    """Post what is `fresh` (name, content), then what waits, oldest first, up to the first that is not answered.

    `taken` gets the names that were accepted. Loads and connects to nothing where nothing is to be posted.
    """

    def contents() -> Iterator[Waiting]:
        earlier = spool.names()
        if fresh is not None:
            yield spool.add(*fresh)
        for name in earlier:
            if waiting := spool.claim(name):
                yield waiting

    endpoint = None
    for waiting in contents():
        with waiting.held:
            endpoint = endpoint or connect()
            status = endpoint.post(waiting.content, until)
            if not _is_final(status):
                return
            if status < 300:
                taken.append(waiting.name)
            waiting.forget()


def _is_final(status: int) -> bool:
    """Whether the receiver has taken it or never will; 408, 425 and 429 ask to come again (RFC 9110, 6585)."""
    return 200 <= status < 300 or (400 <= status < 500 and status not in {408, 425, 429})
