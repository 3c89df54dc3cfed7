"""The ``ace`` command. Everything heavy is imported when a command needs it, so that ``ace --help`` answers at once."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ace_core.errors import AceError, SettingsError
from pipelines.options import ConfigOption, JsonOption, SetOption, StoreOption, context_of, settings_of

INTERRUPTED = 130  # also what typer returns for Ctrl-C


class _Commands(TyperGroup):
    """All commands; lets the callback see the words of the one that was asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.obj = list(args)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they are needed; groups of commands come last by themselves."""
        names = super().list_commands(ctx)
        names.remove("fit")
        names.insert(names.index("publish"), "fit")
        return names


app = typer.Typer(
    name="ace",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Search images, audio and video by describing them: a model reads the words and spells the item.

To try it: [bold]ace demo[/bold]. With your own folder of media:

    ace ingest --set corpus.path=FOLDER    media to features
    ace fit all                            learn identifiers, and to spell them
    ace publish                            make the corpus searchable
    ace search "a red fruit"               ask
    ace serve                              a search page and an HTTP API

Every step says what it did, can be stopped at any moment, and goes on from
there when run again.""",
)
fit_app = typer.Typer(no_args_is_help=True, help="Fit the models: aligner, quantizer, generator, or all of them.")
app.add_typer(fit_app, name="fit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ace {version('ace-retrieval')}")
        raise typer.Exit


@app.callback()
def on_cluster(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help="Run the command as a job on the cluster with this dashboard (http://HEAD:8265).",
        ),
    ] = None,
) -> None:
    """Hand the whole command to a cluster where one is named."""
    if address is None:
        return
    from pipelines.remote import entrypoint, run_as_job

    command: Any = context.command
    inner, words, names = context, list(context.obj), []
    while isinstance(command, TyperGroup):
        name, command, words = command.resolve_command(inner, words)
        inner = command.make_context(name, list(words), parent=inner)
        names.append(str(name))
    values = inner.params
    line = entrypoint(names, command, values)
    settings = settings_of(values["config"], values["changes"], values["store"])
    raise typer.Exit(run_as_job(address, line, settings, lambda text: typer.echo(text, err=True)))


@app.command()
def ingest(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Turn the media of a corpus into features.

    [bold]corpus.path[/bold] is a folder of images, audio and video (captions in
    captions.jsonl, .csv or .parquet, or in a text file beside each item), a
    webdataset of tar shards, or a table of uris or bytes. Unchanged files are
    not encoded again. Files that cannot be used are named and kept in a table,
    each with its cause; they never stop the rest, and are tried again once they
    change ([bold]touch[/bold] one to try it as it is).
    """
    from pipelines.ingest import ingest as stage

    stage(*context_of(config, changes, store))


@app.command()
def caption(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Write captions for items that have none, with a captioning model.

    Set [bold]caption.image[/bold] (BLIP, GIT, ...) or [bold]caption.audio[/bold] to a model's
    folder or hub name. What is generated stays apart from what people wrote:
    fits train on it, and recall is never measured with it.
    """
    from pipelines.caption import caption_stage

    caption_stage(*context_of(config, changes, store))


@fit_app.command("text")
def fit_text(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Train the text encoder on the captions ([bold]text_tuning.layers[/bold]); by default it stays frozen."""
    from pipelines.fit_text import fit_text_stage

    fit_text_stage(*context_of(config, changes, store))


@fit_app.command("aligner")
def fit_aligner(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Learn the space that captions and media share."""
    from pipelines.fit_aligner import fit_aligner_stage

    fit_aligner_stage(*context_of(config, changes, store))


@fit_app.command("quantizer")
def fit_quantizer(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Learn the identifiers: one coarse token, then fine ones."""
    from pipelines.fit_quantizer import fit_quantizer_stage

    fit_quantizer_stage(*context_of(config, changes, store))


@fit_app.command("generator")
def fit_generator(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Train the model that reads a query and spells identifiers."""
    from pipelines.fit_generator import fit_generator_stage

    fit_generator_stage(*context_of(config, changes, store))


@fit_app.command("all")
def fit_all(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Fit the aligner, the quantizer and the generator, one after the other; before them the text encoder, if set."""
    from pipelines.fit_aligner import fit_aligner_stage
    from pipelines.fit_generator import fit_generator_stage
    from pipelines.fit_quantizer import fit_quantizer_stage
    from pipelines.fit_text import fit_text_stage

    context = context_of(config, changes, store)
    if context[0].text_tuning.layers:
        fit_text_stage(*context)
    fit_aligner_stage(*context)
    fit_quantizer_stage(*context)
    fit_generator_stage(*context)


@app.command()
def publish(
    removed: Annotated[bool, typer.Option("--removed", help="Also what was removed by id or attribute.")] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Make the ingested corpus searchable, as a new snapshot that replaces the current one atomically."""
    from pipelines.publish import publish_stage

    publish_stage(*context_of(config, changes, store), removed=removed)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def status(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Show the snapshots of the store, which one is current, and how much space everything takes."""
    from pipelines.keep import status_table

    _, opened, reporter = context_of(config, changes, store)
    reporter.result(status_table(opened))


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="setting: serve.host")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="setting: serve.port")] = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Serve the published corpus: a search page and an HTTP API. Runs until Ctrl-C."""
    from pipelines.cluster import ensure_ray
    from serve.app import run

    extra = [f"serve.{k}={v}" for k, v in (("host", host), ("port", port)) if v is not None]
    settings, opened, reporter = context_of(config, [*(changes or []), *extra], store)
    opened.published()
    reporter.say("starting the server ...")
    ensure_ray(settings.compute)
    run(
        settings,
        blocking=True,
        on_ready=lambda address: reporter.say(f"search page: {address}   (Ctrl-C stops it)"),
        on_stop=lambda: reporter.say("stopping the server ..."),
    )
    reporter.say("stopped")


@app.command()
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


@app.command()
def settings(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Print all settings as they would be used, as YAML to start a settings file from, each with what it does."""
    from pipelines.describe import describe_settings

    typer.echo(describe_settings(settings_of(config, changes, store)), nl=False)


def show_error(error: AceError) -> None:
    """What was found, where, and the remedy, on stderr."""
    lines = [f"error: {error.found}"]
    if error.where:
        lines.append(f"  where:  {error.where}")
    if error.remedy:
        lines.append(f"  remedy: {error.remedy}")
    typer.echo("\n".join(lines), err=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors that have a remedy are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before torch is loaded: threads that wait shall sleep (see pipelines.cluster, which says it to Ray's workers).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code: Any = app(args=arguments, standalone_mode=False)
        if code != INTERRUPTED:
            return int(code) if isinstance(code, int) else 0
    except AceError as e:
        show_error(e)
        return e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        pass
    except Exception as e:
        # Wrong options: typer's own errors say what is wrong and exit with 2.
        if not hasattr(e, "format_message") or not hasattr(e, "exit_code"):
            raise
        if message := e.format_message():  # none where the help itself was shown, for want of a command
            show_error(SettingsError(message, remedy="`ace --help`, or `ace COMMAND --help`, shows what there is."))
        return int(e.exit_code)
    typer.echo("stopped; the same command goes on from here", err=True)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
