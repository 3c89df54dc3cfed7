"""``ace fit generator``: the model that spells identifiers, and the ranking of what it finds."""

from __future__ import annotations

from typing import Any

from ace_core.config import Settings
from ace_core.errors import StoreError
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.corpus import corpus_vectors, load_captions, load_corpus, validation_pairs
from pipelines.progress import Reporter
from pipelines.train import FitContext, fit_part


def fit_generator_stage(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Train the generator on the latest quantizer's identifiers; nothing is done when the store has it."""
    quantizer = store.latest("quantizer")
    if quantizer.inputs.get("aligner") != store.latest("aligner").id:
        raise StoreError(
            f"the quantizer {quantizer.id} was fitted with another aligner than the latest",
            where=store.uri,
            remedy="Run `ace fit quantizer` first, or `ace fit all`.",
        )
    inputs = {**quantizer.inputs, "quantizer": quantizer.id}
    chosen = {
        "generator": settings.generator.model_dump(),
        "vectors": settings.publish.vectors,  # the ranking is learned with the similarities that will be served
    }
    return fit_part("generator", _fit, inputs, chosen, settings, store, reporter, _said)


def _said(metrics: dict[str, Any]) -> str:
    text = f"loss {metrics['loss']:.3f} after {metrics['steps']:,} steps"
    if "validation_recall_10" in metrics:
        text += (
            f", recall@10 {100 * metrics['validation_recall_10']:.1f} % on {metrics['validation_queries']:,} "
            "validation queries"
        )
    return text


def _fit(context: FitContext) -> dict[str, Any]:
    from ace_core.aligner import Aligner
    from ace_core.encoders import load_text_encoder
    from ace_core.generator.data import TrainingData
    from ace_core.generator.model import Generator
    from ace_core.generator.training import fit_generator
    from ace_core.quantize.quantizer import Quantizer
    from pipelines.ranking import learn_ranking
    from pipelines.texts import text_encoder_of

    settings, store = context.settings, context.store
    corpus = load_corpus(store, context.inputs["features"], settings)
    captions = load_captions(store, context.inputs["texts"])
    aligner = Aligner.load(store.local_copy("aligner", context.inputs["aligner"]))
    quantizer = Quantizer.load(store.local_copy("quantizer", context.inputs["quantizer"]))
    vectors = corpus_vectors(aligner, corpus, captions)
    codes = quantizer.assign(vectors, corpus.features.modality_tokens)

    pairs = corpus.split.train_pairs
    chosen = captions.rows(pairs.texts)
    data = TrainingData(
        vectors=vectors,
        codes=codes,
        query_vectors=aligner.text_vectors(captions.pooled[chosen]),
        hidden=captions.hidden[chosen],
        mask=captions.mask[chosen],
        rows=pairs.rows,
        teacher_scale=aligner.scale,
        plain_vectors=aligner.item_vectors(corpus.features.embeddings),
    )
    layers, width = captions.hidden.shape[1], captions.hidden.shape[3]
    leads = context.collective.rank == 0
    if leads:  # before the training, which a missing model would otherwise end in
        texts = store.find("texts", context.inputs["texts"])
        trained = None if texts is None else texts.inputs.get("text_encoder")
        encoder = load_text_encoder(text_encoder_of(settings.encoders.text, trained, store))
    generator, report = fit_generator(
        Generator(settings.generator, quantizer, width, layers),
        data,
        settings.generator,
        collective=context.collective,
        hooks=context.hooks,
        seed=settings.compute.seed,
        device=context.device,
    )
    metrics: dict[str, Any] = {"loss": report.final, "steps": len(report.losses), "captions": len(chosen)}
    if leads:  # the others are done: nothing below is shared work
        metrics |= learn_ranking(
            context.folder,
            generator=generator,
            quantizer=quantizer,
            aligner=aligner,
            captions=captions,
            encoder=encoder,
            queries=validation_pairs(corpus.split),
            trained=pairs.rows,
            vectors=vectors,
            codes=codes,
            settings=settings.search,
            stored=settings.publish.vectors == "int8",
            seed=settings.compute.seed,
        )
        generator.save(context.folder)
    return metrics
