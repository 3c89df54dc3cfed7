"""``ace evaluate``: the published search against the dual tower with exact search, on the same features.

Asked are captions that were never trained on: those of held-out items ("unseen"), one of each trained item ("seen"),
and those of items that came after the fits ("added"). The gallery is everything that is live, or everything of one
modality; it is never narrowed to what would be easy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow.compute as pc
import torch
from rich.table import Table

from ace_core.aligner import Aligner
from ace_core.config import Settings
from ace_core.encoders import TextFeatures
from ace_core.errors import CorpusError
from ace_core.evaluation import FEW, Retrieval, exact_ranks, ranks_in, summarise
from ace_core.features import Features, Pairs, last_captions
from ace_core.items import MODALITIES, Modality
from ace_core.manifest import code_version, fingerprint
from ace_core.query import Mode
from ace_core.retriever import Retriever
from ace_core.snapshot import SnapshotManifest
from ace_store import Store
from pipelines.corpus import Corpus, asked_seen, captions_part, load_captions, load_corpus
from pipelines.progress import Reporter, Step
from pipelines.publish import live_ids
from pipelines.shards import indexed_ids
from pipelines.texts import CaptionFeatures

DEPTH = 10
BATCH = 32
RECALLS = ("recall_1", "recall_5", "recall_10")
DUAL_TOWER = "dual tower, exact"

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Line:
    """One measured figure: which queries, in which gallery, by which method."""

    queries: str
    gallery: str
    method: str
    result: Retrieval


class CachedTexts:
    """Captions' features from a texts part, as the text encoder that made them."""

    def __init__(self, captions: CaptionFeatures, identity: str) -> None:
        self._captions = captions
        self.identity = identity
        self.dim = captions.pooled.shape[1]
        self.layers, self.width = captions.hidden.shape[1], captions.hidden.shape[3]

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        rows = self._captions.rows(texts)
        mask = self._captions.mask[rows]
        longest = max(1, int(mask.sum(1).max()))
        hidden = self._captions.hidden[rows][:, :, :longest].astype(np.float32)
        return TextFeatures(
            torch.from_numpy(self._captions.pooled[rows]),
            torch.from_numpy(hidden),
            torch.from_numpy(mask[:, :longest].copy()),
        )


def evaluate_stage(settings: Settings, store: Store, reporter: Reporter) -> dict[str, Any]:
    """Measure the current snapshot; returns (and keeps in ``evaluation/``) what was measured.

    Raises:
        StoreError: nothing is published.
        CorpusError: no caption was kept out of training.
    """
    snapshot = store.snapshot(store.published())
    local = store.mirror(snapshot.id)
    corpus = load_corpus(store, snapshot.inputs["features"], settings)
    kinds = query_kinds(store, snapshot, corpus, settings)
    evaluation_id = fingerprint(
        "evaluation", code_version(), snapshot.id, settings.split.model_dump(), settings.evaluation.model_dump(),
        settings.search.model_dump(), settings.compute.seed,
    )  # fmt: skip
    measured = store.read_json(f"evaluation/{evaluation_id}.json")
    if measured is None:
        texts = captions_part(corpus, settings, store, reporter)
        encoder = CachedTexts(load_captions(store, texts.id), texts.metrics["encoder_identity"])
        retriever = Retriever.open(local, snapshot.id, settings=settings.search, text_encoder=encoder)
        aligner = Aligner.load(store.local_copy("aligner", snapshot.models["aligner"].id))
        lines = measure(retriever, aligner, corpus, kinds, encoder, settings, reporter)
        measured = {
            "id": evaluation_id,
            "snapshot": snapshot.id,
            "lines": [
                {
                    **x.result.as_dict(),
                    "queries_count": x.result.queries,
                    "gallery_count": x.result.gallery,
                    "queries": x.queries,
                    "gallery": x.gallery,
                    "method": x.method,
                }
                for x in lines
            ],
        }
        store.write_json(f"evaluation/{evaluation_id}.json", measured)
    reporter.say(f"written to {store.path('evaluation', evaluation_id + '.json')}")
    if warning := few_queries(measured):
        reporter.say(warning)
    return measured


def query_kinds(store: Store, snapshot: SnapshotManifest, corpus: Corpus, settings: Settings) -> dict[str, Pairs]:
    """Queries that no fit saw, by what their items are to the models; rows into the corpus.

    Raises:
        CorpusError: there are none.
    """
    split = corpus.split
    kinds = {"unseen": split.unseen_queries, "seen": asked_seen(split)}
    generator = store.find("generator", snapshot.models["generator"].id)
    fitted_on = None if generator is None else generator.inputs["features"]
    if fitted_on not in (None, snapshot.inputs["features"]) and store.find("features", str(fitted_on)) is not None:
        known = indexed_ids(store, str(fitted_on))
        new = ~pc.is_in(corpus.features.items.column("item_id"), value_set=known).to_numpy()
        kinds = {name: _only(pairs, ~new) for name, pairs in kinds.items()}
        kinds["added"] = _only(last_captions(corpus.features.items), new)
    limit, seed = settings.evaluation.max_queries, settings.compute.seed
    kinds = {name: pairs.sample(limit, seed) for name, pairs in kinds.items() if len(pairs)}
    if not kinds and len(split.val_shared) and not len(split.val_queries):
        raise CorpusError(
            "every caption that was kept out of training is another item's, too: none asks for one item",
            where=f"snapshot {snapshot.id}",
            remedy="Searches find such items by what they share. To measure recall, give items captions of their own.",
        )
    if not kinds:
        raise CorpusError(
            "no caption was kept out of training, so there is nothing to ask",
            where=f"split.{settings.split.attribute}",
            remedy="Give items two captions, or a split attribute (train, val, test); then run all stages again.",
        )
    return kinds


def _only(pairs: Pairs, keep: np.ndarray) -> Pairs:
    chosen = np.flatnonzero(keep[pairs.rows])
    return Pairs(pairs.rows[chosen], [pairs.texts[i] for i in chosen])


def measure(
    retriever: Retriever,
    aligner: Aligner,
    corpus: Corpus,
    kinds: dict[str, Pairs],
    encoder: CachedTexts,
    settings: Settings,
    reporter: Reporter,
) -> list[Line]:
    """Every kind of query, by every method in the gallery of everything, by the served one in that of each modality."""
    features = corpus.features
    rows_by_id = {item_id: row for row, item_id in enumerate(features.items.column("item_id").to_pylist())}
    live = pc.is_in(features.items.column("item_id"), value_set=live_ids(retriever.snapshot)).to_numpy()
    items = tower_items(aligner, features)
    lines: list[Line] = []
    present = [m for m in MODALITIES if m in features.embeddings]
    galleries: list[Modality | None] = [None, *present] if len(present) > 1 else [None]
    total = sum(len(p) for p in kinds.values()) * (len(MODES) + 1 + (2 if len(present) > 1 else 0))
    with reporter.step("ask", total, "queries") as step:
        for kind, pairs in kinds.items():
            with torch.inference_mode():
                vectors = aligner.eval().tower_text(encoder.encode(pairs.texts).pooled).numpy()
            for modality in galleries:
                gallery = _gallery(features, live, modality)
                asked = np.flatnonzero(np.isin(pairs.rows, gallery))
                if not len(asked):
                    continue
                gold, texts = pairs.rows[asked], [pairs.texts[i] for i in asked]
                ranks = {DUAL_TOWER: exact_ranks(vectors[asked], items, gold, gallery=gallery)}
                step.advance(len(asked))
                for mode in MODES if modality is None else (settings.search.mode,):
                    found = _found(retriever, texts, modality, mode, rows_by_id, step)
                    ranks[mode] = ranks_in(found, gold)
                for method, r in ranks.items():
                    result = summarise(
                        r, len(gallery), groups=gold, resamples=settings.evaluation.bootstrap,
                        seed=settings.compute.seed,
                    )  # fmt: skip
                    lines.append(Line(kind, "all" if modality is None else modality.value, method, result))
    return lines


def tower_items(aligner: Aligner, features: Features) -> np.ndarray:
    """The rival's item vectors (N, D - 1): the plain heads, on the same features."""
    with torch.inference_mode():
        parts = [
            aligner.eval().tower_item(m, torch.from_numpy(features.embeddings[m].astype(np.float32))).numpy()
            for m in MODALITIES
            if m in features.embeddings
        ]
    return np.concatenate(parts)


def _gallery(features: Features, live: np.ndarray, modality: Modality | None) -> np.ndarray:
    rows = np.arange(len(features)) if modality is None else np.arange(len(features))[features.rows_of(modality)]
    return rows[live[rows]]


def _found(
    retriever: Retriever,
    texts: list[str],
    modality: Modality | None,
    mode: Mode,
    rows_by_id: dict[str, int],
    step: Step,
) -> np.ndarray:
    """Rows (n, DEPTH) of what the search answers, -1 where it ends."""
    out = np.full((len(texts), DEPTH), -1, np.int64)
    for start in range(0, len(texts), BATCH):
        answers = retriever.search(texts[start : start + BATCH], k=DEPTH, modality=modality, mode=mode)
        for number, hits in enumerate(answers, start=start):
            out[number, : len(hits)] = [rows_by_id[hit.item_id] for hit in hits]
        step.advance(len(answers))
    return out


def few_queries(measured: dict[str, Any]) -> str:
    """Which figures are of too few queries to say much, and how wide they are; empty for none."""
    few = [line for line in measured["lines"] if line["queries_count"] < FEW]
    if not few:
        return ""
    groups = dict.fromkeys(f"{x['queries']} in {x['gallery']}: {x['queries_count']}" for x in few)
    off = max(max(x[k]["high"] - x[k]["value"], x[k]["value"] - x[k]["low"]) for x in few for k in RECALLS)
    return (
        f"warning: fewer than {FEW} queries say little ({', '.join(groups)}): their recall may lie "
        f"{100 * off:.0f} points from what was measured (95 % intervals in brackets). More "
        "captions kept out of training make it sharper."
    )


def as_table(measured: dict[str, Any]) -> Table:
    """The figures for a terminal; those of few queries with their 95 % intervals."""
    table = Table(title=f"Recall in %, snapshot {measured['snapshot']}")
    for name in ("queries", "gallery", "method"):
        table.add_column(name)
    for name in ("R@1", "R@5", "R@10", "MRR"):
        table.add_column(name, justify="right")
    last = None
    for line in measured["lines"]:
        group = (line["queries"], line["gallery"])
        if last not in (None, group):
            table.add_section()
        table.add_row(
            f"{line['queries']} ({line['queries_count']:,})" if group != last else "",
            f"{line['gallery']} ({line['gallery_count']:,} items)" if group != last else "",
            line["method"],
            *(_percent(line[k], line["queries_count"] < FEW) for k in RECALLS),
            f"{line['mrr_10']['value']:.3f}",
        )
        last = group
    return table


def _percent(figure: dict[str, float], wide: bool) -> str:
    interval = f" [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]" if wide else ""
    return f"{100 * figure['value']:.1f}{interval}"
