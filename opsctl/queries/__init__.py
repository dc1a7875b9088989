"""One SQL statement per file, named as the function that runs it.

A condition that several statements must agree on has a file of its own: `<expired>` stands for `expired.condition`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import LiteralString

_HERE = Path(__file__).parent


@cache
def query(name: str) -> LiteralString:
    """The text of `<name>.sql`, which is ours and holds no values."""
    return _text(f"{name}.sql").replace("<expired>", _text("expired.condition").strip())


@cache
def _text(name: str) -> LiteralString:
    text: LiteralString = (_HERE / name).read_text(encoding="utf-8")
    return text
