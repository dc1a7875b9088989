"""One SQL statement per file, named as the function that runs it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import LiteralString


@cache
def query(name: str) -> LiteralString:
    """The text of `<name>.sql`, which is ours and holds no values."""
    text: LiteralString = files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
    return text
