"""Options that every command shares, and what they make: settings, the opened store, and where progress is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ace_core.config import Settings
    from ace_store import Store
    from pipelines.progress import Reporter

CONFIG_NAME = "ace.yaml"

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help=f"YAML file of settings; {CONFIG_NAME} here, if there is one.", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated."),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or s3:// prefix for everything ACE writes.", show_default="setting: store"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings_of(config: Path | None, changes: list[str] | None, store: str | None) -> Settings:
    """The settings that a command line asks for."""
    from ace_core.settings_file import load_settings

    if config is None and Path(CONFIG_NAME).is_file():
        config = Path(CONFIG_NAME)
    overrides = tuple(changes or ()) + ((f"store={store}",) if store is not None else ())
    return load_settings(config, overrides)


def context_of(config: Path | None, changes: list[str] | None, store: str | None) -> tuple[Settings, Store, Reporter]:
    """What most commands begin with."""
    from ace_store import Store
    from pipelines.progress import Reporter

    settings = settings_of(config, changes, store)
    return settings, Store.open(settings.store), Reporter()
