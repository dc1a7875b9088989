"""The `opsctl config` commands."""

import typer

app = typer.Typer(help="Effective settings and whether this installation is ready.")
