"""``ace fit quantizer``: K-Means for the coarse token, the RQ-VAE for the fine ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ace_core.config import Settings
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.corpus import corpus_vectors, load_captions, load_corpus
from pipelines.progress import Reporter
from pipelines.train import FitContext, fit_part


def fit_quantizer_stage(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Fit the quantizer on the items that may be trained on; nothing is done when the store has it.

    Raises:
        QualityError: the codebooks collapsed, or too many items share an identifier.
    """
    aligner = store.latest("aligner")
    inputs = {**aligner.inputs, "aligner": aligner.id}
    chosen = {"quantizer": settings.quantizer.model_dump()}
    return fit_part("quantizer", _fit, inputs, chosen, settings, store, reporter, _said)


def _said(metrics: dict[str, Any]) -> str:
    health = metrics["health"]
    return (
        f"identifiers of {len(health['perplexity']) + 1} tokens, cosine of rebuilt items {health['cosine']:.3f}, "
        f"{100 * health['collision_rate']:.1f} % of items share an identifier"
    )


def _fit(context: FitContext) -> dict[str, Any]:
    from ace_core.aligner import Aligner
    from ace_core.quantize.fit import fit_quantizer
    from ace_core.quantize.health import check_health

    corpus = load_corpus(context.store, context.inputs["features"], context.settings)
    captions = load_captions(context.store, context.inputs["texts"])
    aligner = Aligner.load(context.store.local_copy("aligner", context.inputs["aligner"]))
    # Of the whole corpus, held-out items included: identifiers need no captions.
    vectors = corpus_vectors(aligner, corpus, captions)
    tokens = corpus.features.modality_tokens
    group = context.collective
    mine = np.arange(group.rank, len(vectors), group.world_size)
    train_texts = captions.rows(corpus.split.train_pairs.texts)
    quantizer, metrics = fit_quantizer(
        vectors[mine],
        tokens[mine],
        context.settings.quantizer,
        index=mine,
        queries=aligner.text_vectors(captions.pooled[train_texts]),
        collective=group,
        hooks=context.hooks,
        seed=context.settings.compute.seed,
        device=context.device,
    )
    health = quantizer.health(quantizer.assign(vectors, tokens), vectors)
    check_health(health, context.settings.quantizer)
    quantizer.save(context.folder)
    return {"items": len(vectors), "health": health.as_dict(), **metrics}
