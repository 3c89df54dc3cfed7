"""The ``ace`` command. Everything heavy is imported when a command needs it, so that ``ace --help`` answers at once."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ace_core.errors import AceError, SettingsError, is_full, storage_error
from pipelines.commands import ask, build, change
from pipelines.options import settings_of

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
for _command in (
    *(build.ingest, build.caption, build.publish),
    *(change.add, change.remove, change.rollback, change.status, change.gc),
    *(ask.search, ask.evaluate, ask.serve, ask.demo, ask.settings),
):
    app.command()(_command)
app.add_typer(build.fit_app, name="fit")


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
    except OSError as e:
        if not is_full(e):
            raise
        show_error(found := storage_error(e))
        return found.exit_code
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
