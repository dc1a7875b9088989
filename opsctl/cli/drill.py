"""The `opsctl drill` commands."""

import typer

app = typer.Typer(help="A whole disaster, rehearsed on an embedded PostgreSQL.")
