"""Learns how answers are ranked, on validation queries, by the very search that will be served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ace_core.aligner import Aligner
from ace_core.candidates import Candidates
from ace_core.config import SearchSettings
from ace_core.decoding import search_candidates
from ace_core.encoders import TextEncoder
from ace_core.features import Pairs
from ace_core.generator.model import Generator
from ace_core.generator.refinement import choose_refinement
from ace_core.identifiers import sort_order
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import QueryBatch
from ace_core.ranking import Ranker, even_weights, fit_ranker
from ace_core.retriever import RANKING_NAME
from ace_core.scoring import Gallery, similarity
from ace_core.walk import Walk
from pipelines.texts import CaptionFeatures

MAX_QUERIES = 2000
MIN_QUERIES = 20  # fewer teach nothing: the default mix stands
BATCH = 32
NONSENSE = 300  # texts that mean nothing, beside the validation queries


def caption_batches(
    texts: list[str], captions: CaptionFeatures, aligner: Aligner, batch: int = BATCH
) -> Iterator[QueryBatch]:
    """Captions as queries, from their cached features."""
    rows = captions.rows(texts)
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        mask = captions.mask[chosen]
        longest = max(1, int(mask.sum(1).max()))
        with torch.inference_mode():
            vector = aligner.text(torch.from_numpy(captions.pooled[chosen]))
        hidden = torch.from_numpy(captions.hidden[chosen][:, :, :longest].astype(np.float32))
        yield QueryBatch(vector, hidden, torch.from_numpy(mask[:, :longest].copy()))


def nonsense(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Up to ``count`` texts that look like these and mean nothing: their words with the letters in any order."""
    rng = np.random.default_rng(seed)
    out = []
    for row in rng.permutation(len(texts))[:count].tolist():
        mixed = " ".join("".join(rng.permutation(list(word))) for word in texts[row].split())
        if mixed != " ".join(texts[row].split()):
            out.append(mixed)
    return out


def text_batches(texts: Sequence[str], encoder: TextEncoder, aligner: Aligner) -> Iterator[QueryBatch]:
    """Texts as queries, encoded here."""
    for start in range(0, len(texts), BATCH):
        with torch.inference_mode():
            features = encoder.encode(texts[start : start + BATCH])
            yield QueryBatch(aligner.text(features.pooled), features.hidden, features.mask)


def learn_ranking(
    folder: Path,
    *,
    generator: Generator,
    quantizer: Quantizer,
    aligner: Aligner,
    captions: CaptionFeatures,
    encoder: TextEncoder,
    queries: Pairs,
    trained: np.ndarray,
    vectors: np.ndarray,
    codes: np.ndarray,
    settings: SearchSettings,
    stored: bool,
    seed: int,
) -> dict[str, Any]:
    """Fit the ranking on validation queries and write it to the generator's folder; first of all choose how much of
    its learned correction the generator adds to a query (it must be saved afterwards).

    Args:
        encoder: what encoded the captions; encodes :func:`nonsense`.
        queries: captions of validation items, rows into ``vectors``.
        trained: rows of items whose captions were trained on; queries for them and for others weigh the same.
        vectors: (N, D) float32, the whole corpus' items. codes: (N, levels), their identifiers.
        stored: similarities are also measured with what codes leave of the items, in 8 bits.

    Returns:
        figures: the number of queries and their recall.
    """
    queries = queries.sample(MAX_QUERIES, seed)
    modality = codes[:, 0]
    order = sort_order(codes, quantizer.vocab_sizes)
    codes = codes[order]
    gallery = Gallery.build(codes, quantizer, vectors[order] if stored else None)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    gold = place[queries.rows]
    seen = np.isin(queries.rows, trained)
    batches = caption_batches(queries.texts, captions, aligner)
    refinement = choose_refinement(generator, batches, queries.rows, vectors, modality, trained=seen, seed=seed)
    batches = caption_batches(queries.texts, captions, aligner)
    refined, candidates = _search(generator, batches, gallery, settings)
    if len(queries) < MIN_QUERIES:
        Ranker().save(folder / RANKING_NAME)
        return {"validation_queries": len(queries), "refinement": refinement}
    similar = similarity(refined, candidates, [gallery], quantizer)
    right = candidates.valid & (candidates.row == gold[:, None])
    asked = text_batches(nonsense(queries.texts, NONSENSE, seed), encoder, aligner)
    off, strays = _search(generator, asked, gallery, settings)
    nearest = np.where(strays.valid, similarity(off, strays, [gallery], quantizer), -np.inf).max(1, initial=-np.inf)
    ranker = fit_ranker(
        candidates.log_prob, similar, right, valid=candidates.valid, weight=even_weights(seen), nonsense=nearest
    )
    ranker.save(folder / RANKING_NAME)
    score = ranker.score(candidates.log_prob, similar, candidates.valid)
    own = np.where(right, score, -np.inf).max(1)
    rank = np.where(right.any(1), (score > own[:, None]).sum(1), score.shape[1])
    return {
        "validation_queries": len(queries),
        "refinement": refinement,
        "validation_recall_1": float((rank < 1).mean()),
        "validation_recall_10": float((rank < 10).mean()),
        "validation_reached": float(right.any(1).mean()),
    }


def _search(
    generator: Generator, batches: Iterator[QueryBatch], gallery: Gallery, settings: SearchSettings
) -> tuple[np.ndarray, Candidates]:
    walk = Walk([gallery.index])
    found: list[Candidates] = []
    refined = [np.empty((0, generator.dim), np.float32)]
    for batch in batches:
        with torch.inference_mode():
            refined.append(generator.refine(batch).float().numpy())
        found.append(search_candidates(generator, batch, walk, settings=settings))
    return np.concatenate(refined), _stack(found)


def _stack(found: list[Candidates]) -> Candidates:
    """Candidates of several batches in one, padded to the widest."""
    width = max((c.valid.shape[1] for c in found), default=1)

    def join(name: str, fill: float) -> np.ndarray:
        arrays = [getattr(c, name) for c in found]
        return np.concatenate(
            [
                np.pad(a, [(0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)], constant_values=fill)
                for a in arrays
            ]
            or [np.empty((0, width))]
        )

    return Candidates(
        valid=join("valid", False).astype(bool),
        segment=join("segment", 0),
        row=join("row", 0),
        log_prob=join("log_prob", -np.inf),
        level_log_prob=join("level_log_prob", -np.inf),
        codes=join("codes", 0),
    )
