"""What a service's log says of its WhatsApp connections: refusals, undecryptable messages, connections that opened.

The lines are those of Baileys 6.7 and 7 (pino's JSON), of libsignal's console, and of services that print
`lastDisconnect` in their own words. A status code counts only beside a word of a WhatsApp connection: every web service
logs a 401 now and then.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final


class Trouble(StrEnum):
    """What no restore, or only a repair, can help against."""

    LOGGED_OUT = "logged-out"
    """401: WhatsApp has removed the device."""
    FORBIDDEN = "forbidden"
    """403: WhatsApp has blocked the account."""
    REPLACED = "replaced"
    """440: another process uses the same identity."""
    UNDECRYPTABLE = "undecryptable"
    """Messages cannot be decrypted: ratchets or pre-keys are not those that the contacts know."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One kind of trouble in a log: how often, of which companies as far as it names them, and the last one's words."""

    trouble: Trouble
    count: int
    companies: tuple[str, ...]
    words: str


_CONNECTION: Final = (
    r"(?i:stream:error|stream errored|connection[ ._]?(?:closed?|errored|failure|update)|last_?disconnect|disconnect"
    r"|logged.?out)"
)


def _code(code: int, *words: str) -> re.Pattern[str]:
    beside = rf"{_CONNECTION}.*\b{code}\b|\b{code}\b.*{_CONNECTION}|\"tag\":\"failure\".*\"reason\":\"{code}\""
    return re.compile("|".join((beside, *words)))


# The first that fits: a device that was removed is told by a conflict too.
_TROUBLES: Final = (
    (Trouble.LOGGED_OUT, _code(401, "device_removed")),
    (Trouble.FORBIDDEN, _code(403)),
    (Trouble.REPLACED, _code(440, "connectionReplaced", r"\"tag\":\"conflict\",\"attrs\":\{\"type\":\"replaced\"")),
    (
        Trouble.UNDECRYPTABLE,
        re.compile(
            "Bad MAC|No matching sessions found|No session record|Invalid PreKey ID|No session found to decrypt"
        ),
    ),
)
_INTERESTING: Final = re.compile(
    r"\b(?:401|403|440)\b|device_removed|replaced|Replaced|Bad MAC|No matching|No session|Invalid PreKey|open|Connected"
)
_OPEN: Final = re.compile(r"opened connection to WA|connection\"?'?\s*[:=]?\s*\"?'?open\b|Connected to WhatsApp")
_CLOSED: Final = re.compile(r"connection\"?'?\s*[:=]?\s*\"?'?(?:closed?|errored)\b|stream errored")
_EPOCH: Final = re.compile(r'"time":(\d{13})\b')
_ISO: Final = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,]\d+)?(Z|[+-]\d\d:?\d\d)?")
_DECRYPTION_WORDS: Final = re.compile("Bad MAC|No matching sessions found|No session record|Invalid PreKey ID")


def hear(lines: Iterable[str], *, known: Sequence[str], since: datetime) -> tuple[Heard, ...]:
    """The troubles that stand at the end of a log, in the order of `Trouble`.

    Lines that say a time before `since` are left out; one without a time has its predecessor's. `known` are the company
    ids to be looked for. A refusal is over when its company connects afterwards, or anybody where it names none.

    >>> lines = ['company 962302 connection closed, status 440', 'company 962302 connection: open']
    >>> hear(lines, known=["962302"], since=datetime(2026, 1, 31, tzinfo=UTC))
    ()
    >>> hear(lines[:1], known=["962302"], since=datetime(2026, 1, 31, tzinfo=UTC))[0].companies
    ('962302',)
    """
    names = _any_of(known)
    found: dict[Trouble, list[tuple[str | None, str]]] = {trouble: [] for trouble in Trouble}
    old = False
    for line in lines:
        moment = _moment(line)
        if moment is not None:
            old = moment < since
        if old or not _INTERESTING.search(line):
            continue
        match = names.search(line) if names else None
        company = match[0] if match else None
        trouble = next((trouble for trouble, pattern in _TROUBLES if pattern.search(line)), None)
        if trouble is not None:
            found[trouble].append((company, line))
        elif _OPEN.search(line):
            for refusal in (Trouble.LOGGED_OUT, Trouble.FORBIDDEN, Trouble.REPLACED):
                found[refusal] = [told for told in found[refusal] if told[0] not in {None, company}]
    return tuple(
        Heard(trouble, len(told), tuple(sorted({name for name, _ in told if name})), _words(trouble, told[-1][1]))
        for trouble, told in found.items()
        if told
    )


def connected(lines: Iterable[str], *, known: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The companies whose last word on it is that their connection has opened, by Baileys' words or by `patterns`.

    A line that names no company counts only where one alone is known.

    >>> sorted(connected(['company 962302 connection open', 'connection open'], known=["962302", "7"], patterns=()))
    ['962302']
    >>> connected(['962302 connection open', '962302 connection closed, 428'], known=["962302"], patterns=())
    set()
    """
    names = _any_of(known, shortest=1)
    found: set[str] = set()
    for line in lines:
        opened = any(pattern in line for pattern in patterns) or _OPEN.search(line)
        if not opened and not _CLOSED.search(line):
            continue
        match = names.search(line) if names else None
        company = match[0] if match else known[0] if len(known) == 1 else None
        if company is None:
            continue
        if opened:
            found.add(company)
        else:
            found.discard(company)
    return found


def undecryptable(lines: Iterable[str], *, known: Sequence[str]) -> Counter[str]:
    """How many lines say of each company that a message cannot be decrypted; of none that is named, under ``."""
    names = _any_of(known, shortest=1)
    told: Counter[str] = Counter()
    for line in lines:
        if _DECRYPTION_WORDS.search(line):
            match = names.search(line) if names else None
            told[match[0] if match else ""] += 1
    return told


def _words(trouble: Trouble, line: str) -> str:
    """A few words of ours for what a line says: nothing of the line itself, which may hold anything, leaves here."""
    codes = {Trouble.LOGGED_OUT: "401", Trouble.FORBIDDEN: "403", Trouble.REPLACED: "440"}
    match = _DECRYPTION_WORDS.search(line)
    return codes.get(trouble) or (match[0] if match else "No session")


def _any_of(known: Sequence[str], *, shortest: int = 3) -> re.Pattern[str] | None:
    names = sorted((name for name in known if len(name) >= shortest), key=len, reverse=True)
    if not names:
        return None
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, names))})(?![A-Za-z0-9])")


def _moment(line: str) -> datetime | None:
    if match := _EPOCH.search(line):
        return datetime.fromtimestamp(int(match[1]) / 1000, UTC)
    if match := _ISO.search(line[:200]):
        day, clock, zone = match.groups()
        try:
            moment = datetime.fromisoformat(f"{day}T{clock}{zone or ''}")
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.astimezone()  # a log without a zone is in this machine's
    return None
