"""``ace search | evaluate | serve | demo | settings``: what is published, asked; all of it tried; what can be set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import ConfigOption, JsonOption, SetOption, StoreOption, context_of, settings_of


def search(
    words: Annotated[list[str], typer.Argument(metavar="TEXT", help="What to look for, in words.")],
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Results wanted.", show_default="setting: search.k")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option("--modality", "-m", help="image, audio or video; may be repeated.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="NAME=VALUE", help="Only such items; also 'year={gte: 2010}', 'colour=\\[red, blue]'."
        ),
    ] = None,
    json_output: JsonOption = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Ask the published corpus, and print what it finds. Starts no server and no Ray."""
    from pipelines.search import print_hits, search_once

    settings, opened, reporter = context_of(config, changes, store)
    text = " ".join(words)
    hits = search_once(settings, opened, text, k=k, modalities=modality or [], where=where or [])
    print_hits(text, hits, reporter, as_json=json_output)


def evaluate(
    json_output: JsonOption = False, config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None
) -> None:
    """Measure recall on captions that were kept out of training, against exact search on the same features.

    The rival is the dual tower: queries and items as vectors, compared one by one.
    Figures of few queries come with their intervals.
    """
    import json

    from pipelines.evaluate import as_table, evaluate_stage

    settings, opened, reporter = context_of(config, changes, store)
    measured = evaluate_stage(settings, opened, reporter)
    reporter.result(json.dumps(measured, indent=1) if json_output else as_table(measured))


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="setting: serve.host")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="setting: serve.port")] = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Serve the published corpus: a search page and an HTTP API. Runs until Ctrl-C."""
    from pipelines.cluster import ensure_ray, worker_logs
    from serve.app import run

    def ready(address: str) -> None:
        reporter.say(f"search page: {address}   (Ctrl-C stops it)")
        reporter.say(f"what goes wrong is in the server's log: {worker_logs()}")

    extra = [f"serve.{k}={v}" for k, v in (("host", host), ("port", port)) if v is not None]
    settings, opened, reporter = context_of(config, [*(changes or []), *extra], store)
    opened.published()
    reporter.say("starting the server ...")
    ensure_ray(settings.compute)
    run(
        settings,
        blocking=True,
        on_ready=ready,
        on_stop=lambda: reporter.say("stopping the server ..."),
    )
    reporter.say("stopped")


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's corpus and store go.")] = Path("demo"),
    pictures: Annotated[int, typer.Option(min=60, help="Pictures of the demo corpus.")] = 1500,
    sounds: Annotated[int, typer.Option(min=20, help="Sounds of the demo corpus.")] = 400,
    clips: Annotated[int, typer.Option(min=20, help="Video clips of the demo corpus.")] = 240,
    port: Annotated[int, typer.Option(help="Port of the search page; 0 takes a free one.")] = 8000,
    ci: Annotated[bool, typer.Option("--ci", help="A small corpus; ask the server over HTTP and stop.")] = False,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Stop after the evaluation.")] = False,
    changes: SetOption = None,
) -> None:
    """Make a corpus of pictures, sounds and clips, do everything with it, and open a search page.

    Needs no network and no data: only [bold]pip install 'ace-retrieval\\[demo]'[/bold].
    Run it again and it goes on where it stopped.
    """
    from pipelines.demo import DemoSize, run_demo

    size = DemoSize.for_ci() if ci else DemoSize(pictures, sounds, clips)
    run_demo(folder, size, changes or [], port=0 if ci else port, check=ci, serve=not no_serve)


def settings(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Print all settings as they would be used, as YAML to start a settings file from, each with what it does."""
    from pipelines.describe import describe_settings

    typer.echo(describe_settings(settings_of(config, changes, store)), nl=False)
