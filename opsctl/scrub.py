"""What never leaves: secrets that are known, and what looks like one, masked in any text or JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TEXT_LIMIT = 8192
"""A longer text is not sent at all: cut in two, a secret no longer looks like one."""
MASK = "[secret]"

# Every repetition that something must follow has a limit, so that no text takes long: the time is the budget's.
_QUOTE = r"\\{0,7}[\"']"  # JSON inside JSON has its quotes escaped, three levels deep
_BYTE = rf"(?:{_QUOTE}\d+{_QUOTE}\s*:\s*)?\d{{1,3}}"  # of [12, 34] or of {"0": 12, "1": 34}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?P<level>\\{1,7})".*?(?<!\\)(?P=level)\""""
_HIDDEN_NAMES = "passw(?:or)?d|passphrase|pwd|secret|token|private|key_?data|pairing_?code"
_SYSTEM_FOLDERS = "etc|home|media|mnt|opt|root|run|srv|tmp|usr|var"

SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), instead)
    for pattern, instead in (
        # what a connection string says before its host; a password may hold an @ or a /
        (r"://\S*@", f"://{MASK}@"),
        (r"-----BEGIN [^-]*-----.*?(?:-----END [^-]*-----|\Z)", MASK),
        # keys as Baileys and Node write bytes, also where the text was cut off
        (rf"\{{\s*{_QUOTE}type{_QUOTE}\s*:\s*{_QUOTE}Buffer{_QUOTE}.*?(?:\}}|\Z)", MASK),
        (rf"\{{\s*{_QUOTE}data{_QUOTE}\s*:\s*(?:\[[^\]]*\]|{_QUOTED})\s*,\s*{_QUOTE}type{_QUOTE}[^}}]*\}}?", MASK),
        (r"<Buffer [^>]*>?", MASK),
        (rf"(?:{_BYTE}\s*,\s*){{15,}}{_BYTE}", MASK),
        # password=... as libpq writes it, "password": ... as JSON does
        (rf"(?i)((?:{_HIDDEN_NAMES})\w{{0,32}}(?:\s*=|{_QUOTE}\s*[:=])\s*)(?:{_QUOTED}|\S+)", rf"\1{MASK}"),
        # WhatsApp addresses, and what looks like the phone number in them
        (r"(?<!\d)\d{5,}(?:[-._:]\d+){0,3}@[\w.-]+", MASK),
        (r"(?<![A-Za-z\d.])\+?\d{10,15}(?!\d)", MASK),
        # the token of a Telegram bot, which every address of its API holds
        (r"\d{6,}:[\w-]{30,}", MASK),
        # 32 bytes or more in hexadecimal or base64; a path is told apart by its first folder or by its lower case
        (r"[0-9a-fA-F]{64,}", MASK),
        (rf"(?<![\w+/-])(?!/(?:{_SYSTEM_FOLDERS})/)(?=[a-z0-9+/_-]*[A-Z])[A-Za-z0-9+/_-]{{43,}}={{0,2}}", MASK),
    )
)


def scrubbed(value: Any, secrets: Iterable[str]) -> Any:  # noqa: ANN401 - any JSON, the shape is kept
    """The value as plain JSON without secrets: neither the known ones in any spelling, nor what looks like one.

    >>> scrubbed({"to": "postgresql://user:password@db/wa", "why": "wrong word: hunter2"}, ["hunter2"])
    {'to': 'postgresql://[secret]@db/wa', 'why': 'wrong word: [secret]'}
    """
    spellings = sorted({s for secret in secrets if secret for s in _spellings(secret)}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, spellings)) or r"(?!)", re.IGNORECASE)

    def clean(value: Any) -> Any:  # noqa: ANN401
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {str(k): clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [clean(v) for v in value]
        text = str(value).encode(errors="replace").decode()  # a file name may hold bytes that JSON cannot
        if len(text) > TEXT_LIMIT:
            return f"[a text of {len(text)} characters]"
        text = known.sub(MASK, text)
        for shape, instead in SHAPES:
            text = shape.sub(instead, text)
        return text

    return clean(value)


def _spellings(secret: str) -> Iterator[str]:
    """A secret as it is, as a URL writes it, and as it stands between quotes."""
    for plain in {secret, unquote(secret)}:
        yield plain
        yield quote(plain)
        yield quote(plain, safe="")
        yield quote_plus(plain)
        yield json.dumps(plain)[1:-1]
        yield json.dumps(plain, ensure_ascii=False)[1:-1]
        yield repr(plain)[1:-1]
