"""``ace add | remove | rollback | status | gc``: what is published, changed without a fit; what the store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.options import ConfigOption, SetOption, StoreOption, context_of


def add(
    again: Annotated[
        list[str] | None, typer.Argument(metavar="IDS", help="Removed items to take in again.", show_default=False)
    ] = None,
    removed: Annotated[bool, typer.Option("--removed", help="Take in again all removed by id or attribute.")] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Ingest what is new or changed in the corpus and publish it, without fitting anything again.

    Says how well the codebooks still fit (drift), and what is gone from the corpus.
    """
    from pipelines.change import add_stage
    from pipelines.ingest import ingest as ingest_stage

    context = context_of(config, changes, store)
    context[1].published()  # said now, not after an ingestion
    ingest_stage(*context)
    add_stage(*context, again=again or [], removed=removed)


def remove(
    ids: Annotated[list[str] | None, typer.Argument(metavar="IDS", help="Ids of items.", show_default=False)] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="NAME=VALUE", help="Items with this attribute (several: with all of them)."),
    ] = None,
    gone: Annotated[bool, typer.Option("--gone", help="Items that the last ingestion no longer found.")] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Take items out of every answer: by id, by attribute, or because their file is gone.

    What was removed by id or attribute stays out until it changes, or until
    [bold]ace add IDS[/bold] or [bold]ace add --removed[/bold] takes it in again. Files are left
    where they are.
    """
    from pipelines.change import remove_stage
    from pipelines.search import parse_filters

    _, opened, reporter = context_of(config, changes, store)
    remove_stage(opened, reporter, ids=ids or [], filters=parse_filters(where or []), gone=gone)


def rollback(
    snapshot: Annotated[
        str | None, typer.Argument(metavar="SNAPSHOT", help="The one to return to; by default the one before.")
    ] = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Make an earlier snapshot the current one again; running servers follow by themselves.

    [bold]ace status[/bold] lists the snapshots.
    """
    from pipelines.change import rollback_stage

    _, opened, reporter = context_of(config, changes, store)
    rollback_stage(opened, reporter, snapshot)


def status(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Show the snapshots of the store, which one is current, and how much space everything takes."""
    from pipelines.keep import status_table

    _, opened, reporter = context_of(config, changes, store)
    reporter.result(status_table(opened))


def gc(
    keep: Annotated[int, typer.Option(min=0, help="Newest snapshots to keep beside the current one.")] = 3,
    min_age_hours: Annotated[float, typer.Option(min=0, help="Keep whatever is younger than this.")] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Delete parts of the store that no kept snapshot needs."""
    from datetime import timedelta

    from pipelines.keep import gc_stage

    _, opened, reporter = context_of(config, changes, store)
    for name in gc_stage(opened, reporter, keep=keep, min_age=timedelta(hours=min_age_hours), dry_run=dry_run):
        reporter.say(f"  {name}")
