"""``ace fit text``: trains the text encoder on the corpus' captions, where ``text_tuning.layers`` asks for it."""

from __future__ import annotations

from typing import Any

from ace_core.config import Settings
from ace_core.errors import SettingsError
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.corpus import load_corpus
from pipelines.progress import Reporter
from pipelines.train import FitContext, fit_part


def fit_text_stage(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Train the text encoder on the latest features; nothing is done when that was done before.

    The part is an ordinary checkpoint of transformers. Later stages encode captions with it, and snapshots carry it.

    Raises:
        SettingsError: no layer is to be trained, or more than there are.
        CorpusError: there are no captions to train on.
    """
    from ace_core.encoders import load_text_encoder

    if not settings.text_tuning.layers:
        raise SettingsError(
            "the text encoder stays frozen",
            where="text_tuning.layers is 0",
            remedy="Set text_tuning.layers to how many of its last layers to train, or to all.",
        )
    chosen = {
        "text_tuning": settings.text_tuning.model_dump(),
        "aligner": settings.aligner.model_dump(),  # heads of this shape are trained beside it
        "trained_from": load_text_encoder(settings.encoders.text).identity,
    }
    inputs = {"features": store.latest("features").id}
    return fit_part("text_encoder", _fit, inputs, chosen, settings, store, reporter, _said)


def _said(metrics: dict[str, Any]) -> str:
    return f"trained on {metrics['captions']:,} captions, loss {metrics['loss']:.3f}"


def _fit(context: FitContext) -> dict[str, Any]:
    from ace_core.encoders import text_model_path
    from ace_core.encoders.trainable import TrainableText
    from ace_core.text_tuning import tune_text_encoder

    settings = context.settings
    corpus = load_corpus(context.store, context.inputs["features"], settings)
    pairs = corpus.split.train_pairs
    encoder = TrainableText(
        text_model_path(settings.encoders.text), settings.encoders.text, settings.text_tuning.layers
    )
    metrics = tune_text_encoder(
        encoder,
        corpus.features.embeddings,
        pairs.texts,
        pairs.rows,
        settings.aligner,
        settings.text_tuning,
        collective=context.collective,
        hooks=context.hooks,
        seed=settings.compute.seed,
        device=context.device,
    )
    if context.collective.rank == 0:
        encoder.save(context.folder)
    return {**metrics, "captions": len(pairs.texts)}
