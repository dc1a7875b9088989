"""What a crontab says (crontab(5)): its lines, their environment, and the minutes at which they run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import tzinfo

DEFAULT_PATH = "/usr/bin:/bin"
"""Where cron looks for programs if a crontab does not say."""
_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MONTHS = dict(
    zip(["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], range(1, 13), strict=True)
)
_DAYS = dict(zip(["sun", "mon", "tue", "wed", "thu", "fri", "sat"], range(7), strict=True))
_FIELDS: tuple[tuple[int, int, Mapping[str, int]], ...] = (
    (0, 59, {}),
    (0, 23, {}),
    (1, 31, {}),
    (1, 12, _MONTHS),
    (0, 7, _DAYS),
)
_FIELD = r"[0-9A-Za-z*,/-]+"
_LINE = re.compile(rf"\s*(?P<off>#[#\s]*)?(?P<when>@[a-z]+|{_FIELD}(?:\s+{_FIELD}){{4}})\s+(?P<rest>\S.*)")
_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(.*?)\s*")


@dataclass(frozen=True, slots=True)
class Times:
    """The minutes at which something runs, by the clock of a place."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool
    """Where day of month and of week are both restricted, one of them is enough."""

    def on(self, day: datetime) -> bool:
        """Whether anything runs on the day."""
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (by_month or by_week if self.either_day else by_month and by_week)

    def at(self, moment: datetime) -> bool:
        """Whether it runs in this minute."""
        return moment.minute in self.minutes and moment.hour in self.hours and self.on(moment)

    def starts(self, since: datetime, days: int, zone: tzinfo) -> Iterator[datetime]:
        """Every start, in UTC, in so many days after `since`, by the clock of `zone`."""
        first = since.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
        for day in (first + timedelta(days=n) for n in range(days + 2)):
            if not self.on(day):
                continue
            for hour in self.hours:
                for minute in self.minutes:
                    start = day.replace(hour=hour, minute=minute, tzinfo=zone).astimezone(UTC)
                    if since <= start < since + timedelta(days=days):
                        yield start


def times(expression: str) -> Times | None:
    """Five fields, or one of the words that stand for them; None for what is neither.

    >>> times("*/20 3 * * mon-fri").minutes == {0, 20, 40}
    True
    """
    words = _MACROS.get(expression, expression).lower().split()
    if len(words) != len(_FIELDS):
        return None
    try:
        minutes, hours, days, months, weekdays = (_values(w, *f) for w, f in zip(words, _FIELDS, strict=True))
    except ValueError:
        return None
    restricted = not words[2].startswith("*") and not words[4].startswith("*")
    return Times(minutes, hours, days, months, frozenset(day % 7 for day in weekdays), restricted)


def _values(word: str, low: int, high: int, names: Mapping[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        if span == "*":
            start, end = low, high
        else:
            start = names[first] if first in names else int(first)
            end = (names[last] if last in names else int(last)) if dash else (high if slash else start)
        if not low <= start <= end <= high:
            raise ValueError(word)
        found.update(range(start, end + 1, int(step) if slash else 1))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class CrontabLine:
    """One line that runs something, or would if it were not commented out."""

    number: int
    when: str
    command: str
    off: bool
    environment: Mapping[str, str] = field(default_factory=dict)


def lines(text: str, *, with_user: bool) -> Iterator[CrontabLine]:
    """The lines of a crontab; those of /etc/crontab and /etc/cron.d name a user before the command."""
    environment: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if found := _LINE.fullmatch(line):
            command = found["rest"]
            if with_user:
                command = "".join(command.split(None, 1)[1:])
            if found["off"] is None or times(found["when"]):
                yield CrontabLine(number, found["when"], command, found["off"] is not None, dict(environment))
        elif found := _NAME.fullmatch(line):
            value = found[2]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            environment[found[1]] = value[1:-1] if quoted else value
