"""Is WhatsApp connected? Company by company, in the services' own logs after a start, or at an address of theirs."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsctl import services
from opsctl.baileys.log_lines import connected, undecryptable
from opsctl.report import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opsctl.journal import Journal
    from opsctl.services import LogMark, Manager
    from opsctl.settings import Settings

BURST = 5
"""So many undecryptable messages of one company are more than a contact that was late."""
_LOOK_EVERY_S = 0.5
_STATUS_EVERY_S = 3.0
_ADDRESS_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Connections:
    """Who has connected, and how long after the start."""

    companies: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    reached_at: float | None = None
    """Monotonic seconds at which the last one had; None where one is missing."""
    undecryptable: dict[str, int] = field(default_factory=dict)
    """Companies with a burst of messages that cannot be decrypted; under an empty name those that no line names."""
    watched_s: float = 0.0
    down: list[str] = field(default_factory=list)
    """Services that have no process any more."""

    @property
    def missing(self) -> list[str]:
        return [company for company in self.companies if company not in self.seconds]


def wait_connected(
    manager: Manager, mark: LogMark, companies: Sequence[str], settings: Settings, *, journal: Journal
) -> Connections:
    """Wait until every company has connected since the mark, or CONNECT_TIMEOUT_SECONDS are over; then watch the log.

    A service that is given up by its manager meanwhile is not waited for.
    """
    found = Connections(tuple(companies))
    if not companies:
        return found
    looked = services.status(manager)
    with journal.step("WhatsApp connected", total=len(companies)) as advance:
        _wait(manager, mark, found, settings, advance)
    if found.seconds and settings["CONNECT_WATCH_SECONDS"]:
        with journal.step("messages can be decrypted"):
            _watch(looked, mark, found, settings)
    return found


def _wait(
    manager: Manager, mark: LogMark, found: Connections, settings: Settings, advance: Callable[[int], None]
) -> None:
    started = time.monotonic()
    give_up_at = started + settings["CONNECT_TIMEOUT_SECONDS"]
    looked, look_at = services.status(manager), started + _STATUS_EVERY_S
    while time.monotonic() < give_up_at:
        open_now = _open_now(looked, mark, found, settings)
        after_s = round(time.monotonic() - started, 1)
        found.seconds = {company: found.seconds.get(company, after_s) for company in sorted(open_now)}
        advance(len(found.seconds))
        if not found.missing:
            found.reached_at = time.monotonic()
            return
        if time.monotonic() >= look_at:
            looked = services.status(manager)
            found.down = [service.name for service in looked if service.state is services.State.STOPPED]
            if found.down:
                return
            look_at = time.monotonic() + _STATUS_EVERY_S
        time.sleep(_LOOK_EVERY_S)


def _open_now(looked: Sequence[services.Service], mark: LogMark, found: Connections, settings: Settings) -> set[str]:
    if address := settings["CONNECTED_ADDRESS"]:
        return set(found.seconds) | {company for company in found.missing if _answers(address, company)}
    lines = services.lines_after(looked, mark)
    return connected(lines, known=found.companies, patterns=settings["CONNECTED_PATTERNS"])


def _answers(address: str, company: str) -> bool:
    from http import HTTPStatus
    from urllib.parse import quote
    from urllib.request import ProxyHandler, build_opener

    direct = build_opener(ProxyHandler({}))
    asked = address.replace("{company}", quote(company, safe=""))
    with suppress(OSError), direct.open(asked, timeout=_ADDRESS_TIMEOUT_S) as answer:  # refused, late, or an error
        return bool(answer.status == HTTPStatus.OK)
    return False


def _watch(looked: Sequence[services.Service], mark: LogMark, found: Connections, settings: Settings) -> None:
    """Until the time is over, or there is a burst: then nobody has to wait any longer for the news."""
    began = time.monotonic()
    while True:
        told = undecryptable(services.lines_after(looked, mark), known=found.companies)
        found.undecryptable = {company: count for company, count in told.items() if count >= BURST}
        found.watched_s = round(time.monotonic() - began, 1)
        if found.undecryptable or found.watched_s >= settings["CONNECT_WATCH_SECONDS"]:
            return
        time.sleep(min(_LOOK_EVERY_S, settings["CONNECT_WATCH_SECONDS"]))


def connection_failure(found: Connections) -> Failure | None:
    """What to say of companies that have not connected, or cannot read their messages."""
    if found.missing:
        names = ", ".join(map(ascii, found.missing[:5])) + (" ..." if len(found.missing) > 5 else "")
        down = f": {', '.join(found.down)} has no process any more" if found.down else ""
        return Failure(
            "not-connected", f"{len(found.missing)} companies have not connected: {names}{down}", "opsctl triage"
        )
    if found.undecryptable:
        names = ", ".join(f"{name or 'no company named'}: {count}" for name, count in found.undecryptable.items())
        return Failure(
            "undecryptable",
            f"messages cannot be decrypted ({names})",
            "opsctl sessions verify",
            "runbooks/2-corrupted-session-data.md",
        )
    return None
