"""Looking for planted secrets, in every spelling that a program could let them out in."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Secret:
    """Something that must not leave; `name` says what it is and may be printed."""

    name: str
    plain: str
    """One spelling that anything can hold, the name of a file too."""
    spellings: tuple[bytes, ...]

    @classmethod
    def text(cls, name: str, value: str) -> Secret:
        """A password, a token, an identity: as it is, as URLs and JSON write it, and in base64."""
        spelt = (value, quote(value, safe=""), quote(value), quote_plus(value), json.dumps(value)[1:-1])
        return cls(name, spelt[1], (*(word.encode() for word in spelt), base64.b64encode(value.encode())))

    @classmethod
    def key(cls, name: str, value: bytes) -> Secret:
        """The bytes of a key: in base64, hexadecimal, as Node and Python print them, as a list of numbers."""
        return cls(
            name,
            value.hex(),
            (
                value,
                base64.b64encode(value).rstrip(b"="),
                base64.urlsafe_b64encode(value).rstrip(b"="),
                value.hex().encode(),
                value.hex(" ").encode(),
                ",".join(map(str, value)).encode(),
                ", ".join(map(str, value)).encode(),
                repr(value)[2:-1].encode(),
            ),
        )


@dataclass(frozen=True, slots=True)
class Leak:
    """A secret that was found."""

    secret: Secret
    channel: str
    where: str


@dataclass
class Search:
    """What was looked through, by channel, and what was found."""

    secrets: tuple[Secret, ...]
    pieces: Counter[str] = field(default_factory=Counter)
    leaks: list[Leak] = field(default_factory=list)

    def look(self, channel: str, where: str, content: bytes, *, allowed: Iterable[str] = ()) -> list[Leak]:
        """Look through one piece, also inside what is compressed; gives what it had. `allowed` are secrets' names."""
        self.pieces[channel] += 1
        texts = [content, *_unpacked(content)]
        found = [
            Leak(secret, channel, where)
            for secret in self.secrets
            if secret.name not in allowed and any(s in text for s in secret.spellings for text in texts)
        ]
        self.leaks += found
        return found

    def look_below(self, folder: Path, channel: str, *, allowed: Iterable[str] = ()) -> None:
        """Look through every file below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                self.look(channel, str(path.relative_to(folder)), path.read_bytes(), allowed=allowed)

    def look_at_names(self, folder: Path, *, allowed_in: Iterable[Path] = ()) -> None:
        """Look through the names of everything below a folder, but what is in the folders that may have them."""
        for path in sorted(folder.rglob("*")):
            if not any(place in path.parents for place in allowed_in):
                self.look("file names", str(path.relative_to(folder)), str(path.relative_to(folder)).encode())


def _unpacked(content: bytes) -> Iterator[bytes]:
    if content[:2] == b"\x1f\x8b":
        try:
            yield gzip.decompress(content)
        except (OSError, EOFError, zlib.error):  # cut off: what is whole of it
            yield zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content)
