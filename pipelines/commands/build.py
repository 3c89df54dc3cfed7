"""``ace ingest | caption | fit ... | publish``: from media to what can be searched."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.options import ConfigOption, SetOption, StoreOption, context_of

fit_app = typer.Typer(no_args_is_help=True, help="Fit the models: aligner, quantizer, generator, or all of them.")


def ingest(config: ConfigOption = None, changes: SetOption = None, store: StoreOption = None) -> None:
    """Turn the media of a corpus into features.

    [bold]corpus.path[/bold] is a folder of images, audio and video (captions in
    captions.jsonl, .csv or .parquet, or in a text file beside each item), a
    webdataset of tar shards, or a table of uris or bytes. Unchanged files are
    not encoded again. Files that cannot be used are named and kept in a table,
    each with its cause; they never stop the rest, and are tried again once they
    change ([bold]touch[/bold] one to try it as it is), or by the next ingestions where
    the cause may have passed (a timeout, memory that ran out, ...; [bold]corpus.tries[/bold]).
    """
    from pipelines.ingest import ingest as stage

    stage(*context_of(config, changes, store))


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


def publish(
    removed: Annotated[bool, typer.Option("--removed", help="Also what was removed by id or attribute.")] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Make the ingested corpus searchable, as a new snapshot that replaces the current one atomically."""
    from pipelines.publish import publish_stage

    publish_stage(*context_of(config, changes, store), removed=removed)
