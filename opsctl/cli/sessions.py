"""The `opsctl sessions` commands."""

import typer

app = typer.Typer(help="Baileys session folders: restore, verify, list, undo.")
