"""Telegram: what a message says, how it is written, and where it goes (https://core.telegram.org/bots/api#sendmessage).

The bot's token is part of the address, so no error of a request may be shown.
"""

from __future__ import annotations

import html
import json
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from opsctl.report import Outcome
from opsctl.scrub import scrubbed
from opsctl.web import Endpoint

if TYPE_CHECKING:
    from opsctl.report import Ending
    from opsctl.settings import Settings

LIMIT = 4096
"""Telegram refuses what is longer; it counts as UTF-16 does, and here the markup is counted too."""
_SHORT = 500


def message_of(ending: Ending, settings: Settings) -> str:
    """How a run ended, as HTML of at most `LIMIT`, without any secret."""
    report, failure = ending.report, ending.report.failure
    word = {Outcome.OK: "done", Outcome.WARNING: "warning", Outcome.FAILED: "FAILED"}[report.outcome]
    place = f"{settings.environment} on {socket.gethostname()}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    told = [f"{word}: opsctl {ending.command}", place, failure.message if failure else report.summary]
    told += [f"warning: {warning}" for warning in report.warnings]
    title, place, *said = map(html.escape, scrubbed(told, settings.secrets()))
    after = []
    if ending.rto:
        met = {True: "met", False: "NOT met", None: "open"}[ending.rto.met]
        after.append(f"RTO: {ending.rto.elapsed_s:.1f} s of {ending.rto.target_s:g} s, {met}")
    if failure and failure.hint:
        after.append(f"Next: <code>{_short(failure.hint, settings)}</code>")
    if failure and failure.runbook:
        after.append(f"Runbook: {_short(failure.runbook, settings)}")
    before = [f"<b>{_cut(title, _SHORT)}</b>", _cut(place, _SHORT)]
    room = LIMIT - _length("\n".join(["", *before, *after, ""]))
    return "\n".join([*before, _cut("\n".join(said), room), *after])


def _short(text: str, settings: Settings) -> str:
    return _cut(html.escape(scrubbed(text, settings.secrets())), _SHORT)


def _length(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def _cut(escaped: str, room: int) -> str:
    """At most `room` of the text, never through the middle of an escaped character.

    >>> _cut("1 &lt; 2 &amp; 3", 9)
    '1 &lt;...'
    """
    if _length(escaped) <= room:
        return escaped
    kept = escaped.encode("utf-16-le")[: max(0, room - 3) * 2].decode("utf-16-le", errors="ignore")
    start = kept.rfind("&")
    if start > kept.rfind(";"):
        kept = kept[:start]
    return kept.rstrip() + "..."


def request_of(ending: Ending, settings: Settings) -> bytes:
    """The body of the request that sends the message."""
    words = {
        "chat_id": settings["TELEGRAM_CHAT_ID"],
        "text": message_of(ending, settings),
        "parse_mode": "HTML",
        "link_preview_options": {"is_disabled": True},
    }
    return json.dumps(words).encode()


def endpoint(settings: Settings) -> Endpoint:
    """Where messages go to."""
    url = f"{settings['TELEGRAM_API_URL'].rstrip('/')}/bot{settings['TELEGRAM_BOT_TOKEN']}/sendMessage"
    return Endpoint(url, {"Content-Type": "application/json"})
