"""Realistic fleets of companies with cryptographically valid sessions: for drills, tests and benchmarks."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psycopg


def create_schema(connection: psycopg.Connection) -> None:
    """Create the tables and indexes of production; the caller commits."""
    connection.execute(files("opsctl").joinpath("queries/schema.sql").read_bytes())
