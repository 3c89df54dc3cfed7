"""``ace fit aligner``: the heads that bring captions and media into one space."""

from __future__ import annotations

from typing import Any

from ace_core.config import Settings
from ace_core.errors import CorpusError
from ace_core.manifest import Manifest
from ace_core.quantize.fit import MIN_ITEMS
from ace_store import Store
from pipelines.corpus import caption_pairs, captions_part, described_pairs, load_captions, load_corpus
from pipelines.progress import Reporter
from pipelines.train import FitContext, fit_part

FEW_CAPTIONS = 200  # below, a person is told what to expect


def fit_aligner_stage(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Fit the aligner on the latest features; nothing is done when the store has it.

    Raises:
        CorpusError: there are no captions to learn from, or too few items for the fits that follow.
    """
    features = store.latest("features")
    items = sum(features.metrics["items"].values())
    if items < MIN_ITEMS:  # said now, not by the quantizer after the aligner was fitted
        raise CorpusError(
            f"{items} items are too few to learn identifiers for",
            where=features.settings["corpus_root"],
            remedy=f"Ingest at least {MIN_ITEMS}.",
        )
    corpus = load_corpus(store, features.id, settings)
    if len(corpus.split.train_pairs) < 2:
        raise CorpusError(
            f"{len(corpus.features):,} items have {len(corpus.split.train_pairs)} captions to train on",
            where=features.settings["corpus_root"],
            remedy="Describe at least some of the items: captions.jsonl, .csv or .parquet in the corpus folder, or a "
            "text file beside each item; then run `ace ingest` again (nothing is encoded twice). Or let a model "
            "describe them: `ace caption`.",
        )
    if (captions := len(corpus.split.train_pairs)) < FEW_CAPTIONS:
        reporter.say(
            f"{captions} captions are few to learn from: expect poor answers until more items are described, by people "
            "or by `ace caption`"
        )
    texts = captions_part(corpus, settings, store, reporter)
    inputs = {"features": features.id, "texts": texts.id} | texts.inputs
    chosen = {"aligner": settings.aligner.model_dump()}
    return fit_part("aligner", _fit, inputs, chosen, settings, store, reporter, _said)


def _said(metrics: dict[str, Any]) -> str:
    return f"trained on {metrics['captions']:,} captions, loss {metrics['loss']:.3f}"


def _fit(context: FitContext) -> dict[str, Any]:
    from ace_core.aligner_training import fit_aligner

    corpus = load_corpus(context.store, context.inputs["features"], context.settings)
    captions = load_captions(context.store, context.inputs["texts"])
    pairs = corpus.split.train_pairs
    aligner, metrics = fit_aligner(
        corpus.features.embeddings,
        caption_pairs(pairs, captions),
        context.settings.aligner,
        validation=caption_pairs(described_pairs(corpus.split), captions),
        collective=context.collective,
        hooks=context.hooks,
        seed=context.settings.compute.seed,
        device=context.device,
    )
    aligner.save(context.folder)
    return {"captions": len(pairs), **metrics}
