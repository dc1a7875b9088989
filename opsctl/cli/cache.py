"""`opsctl cache ...`: the service's credentials cache."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.frame import Companies, DryRun, Group, Invocation, Yes, command
from opsctl.report import Report

if TYPE_CHECKING:
    from opsctl.stores.cache_file import CredentialsCache

app = typer.Typer(cls=Group, help="The service's credentials cache: inspect, warm, clear.")


class Against(StrEnum):
    """What the cache can be held against."""

    DATABASE = "database"


@command(
    app,
    "inspect",
    examples=(
        "opsctl cache inspect                       ages, validity, never a secret",
        "opsctl cache inspect /srv/app/.baileys-cache.json --company 962302",
        "opsctl cache inspect --against database    what has drifted",
    ),
)
def inspect(
    ctx: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Else CREDENTIALS_CACHE_FILE, else APP_DIR/.baileys-cache.json."),
    ] = None,
    company: Companies = None,
    against: Annotated[
        Against | None, typer.Option("--against", help="Also compare every entry with the database.")
    ] = None,
) -> Report:
    """Would the cache carry the service through an outage? Per company: age, validity, creds, account.

    Accounts are shown as fingerprints. The cache holds credentials and no keys.
    """
    from opsctl.operations.cache import inspect_cache

    run: Invocation = ctx.obj
    return inspect_cache(
        file.absolute() if file else run.settings.cache_file,
        ttl=run.settings.cache_ttl,
        companies=tuple(company or ()),
        open_snapshot=run.database() if against else None,
        journal=run.journal,
    )


@command(
    app,
    "warm",
    examples=("opsctl cache warm              every company that can log in", "opsctl cache warm --company 962302"),
)
def warm(ctx: typer.Context, company: Companies = None, dry_run: DryRun = False) -> Report:
    """Fill the cache from PostgreSQL, before the service starts. One that runs overwrites it at its next save."""
    from opsctl.operations.cache import find_creds, preview_warm, warm_cache
    from opsctl.stores.switch_record import refuse_while_switched

    run: Invocation = ctx.obj
    refuse_while_switched(run.settings, "cache warm")
    usable, left_out = find_creds(run.database(), companies=tuple(company or ()), journal=run.journal)
    if dry_run:
        return preview_warm(usable, left_out, path=run.settings.cache_file)
    return warm_cache(_cache(run), usable, left_out, journal=run.journal)


@command(
    app,
    "clear",
    examples=("opsctl cache clear --yes", "opsctl cache clear --company 962302 --dry-run"),
)
def clear(ctx: typer.Context, company: Companies = None, dry_run: DryRun = False, yes: Yes = False) -> Report:
    """Empty the cache, or forget one company: the service then starts from PostgreSQL or not at all."""
    from opsctl.operations.cache import clear_cache, preview_clear

    run: Invocation = ctx.obj
    companies = tuple(company or ())
    if dry_run:
        return preview_clear(run.settings.cache_file, companies=companies)
    run.confirm(f"Clear {', '.join(companies) or 'every company'} from {run.settings.cache_file}?")
    return clear_cache(_cache(run), companies=companies)


def _cache(run: Invocation) -> "CredentialsCache":
    from opsctl.stores.cache_file import CredentialsCache

    settings = run.settings
    return CredentialsCache(settings.cache_file, ttl=settings.cache_ttl, max_entries=settings["CACHE_MAX_ENTRIES"])
