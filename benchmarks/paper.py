"""The paper's table on a user's own copy of a benchmark, by the product's own stages, in one command.

    python -m benchmarks.paper --dataset flickr30k --data FOLDER --encoder openai/clip-vit-base-patch32 --json FILE

Reads the set in its published layout (:mod:`benchmarks.published`), ingests it, fits, publishes and asks every test
caption: in the gallery of test items (as papers do) and of everything. Items outside the training split have no caption
in the index and were never trained on; the paper captions its test items, so its figures are no like for like. Killed,
the same command goes on where it was. Settings change with ``--set section.key=value``. Quickly, a few items of each
split are taken, one epoch: that everything is in its place, and no figure of the set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ace_core.aligner import Aligner
from ace_core.config import Settings
from ace_core.encoders import load_media_encoder
from ace_core.errors import CorpusError
from ace_core.evaluation import compare, exact_ranks, ranks_in, summarise
from ace_core.features import Features
from ace_core.items import Modality
from ace_core.retriever import Retriever
from ace_core.settings_file import load_settings
from ace_store import Store
from benchmarks.measure import table, write_figures
from benchmarks.published import PUBLISHED, PublishedSet, load_published
from pipelines.corpus import Corpus, asked_seen, load_corpus
from pipelines.evaluate import BATCH, DEPTH, tower_items
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_generator import fit_generator_stage
from pipelines.fit_quantizer import fit_quantizer_stage
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.publish import publish_stage

SAID = {  # ACE (arXiv 2406.17507): R@1, R@5, R@10 where it states them
    "flickr30k": (81.78, 96.1, 98.38),
    "coco": (52.4, 77.5, None),
    "clotho": (46.4, 70.6, 76.0),
    "audiocaps": (49.8, None, None),
    "msrvtt": (52.6, 75.4, 84.2),
    "msvd": (63.6, None, None),
}
_QUICK_ITEMS, _QUICK_QUERIES = 60, 200  # of each split; of each kind
HEADER = ("method", "queries", "gallery", "R@1 %", "R@5 %", "R@10 %")


def settings_of(published: PublishedSet, encoder: str | None, store: Path, changes: Sequence[str]) -> Settings:
    """The product's settings for a set; its captions file is written beside the store."""
    store.mkdir(parents=True, exist_ok=True)
    captions = store / f"{published.name}.captions.jsonl"
    published.write_captions(captions)
    own = [
        f"store={store}",
        f"corpus.path={published.folder}",
        f"corpus.captions={captions}",
        "corpus.listed_only=true",
        "segments.audio_seconds=0",  # an item is a file
        "segments.video_seconds=0",
    ]
    if encoder is not None:
        for part in ("text", published.modality.value):
            own += [f"encoders.{part}.kind=transformers", f"encoders.{part}.path={encoder}"]
    return load_settings(None, (*own, *changes))


def run_stages(settings: Settings, store: Store, reporter: Reporter) -> None:
    """Everything from media to a published snapshot."""
    ingest(settings, store, reporter)
    for stage in (fit_aligner_stage, fit_quantizer_stage, fit_generator_stage):
        stage(settings, store, reporter)
    publish_stage(settings, store, reporter)


def measure(published: PublishedSet, settings: Settings, store: Store, queries: int) -> tuple[list[list[Any]], dict]:
    """Table rows and figures of the published snapshot; at most so many queries of each kind, evenly spread."""
    snapshot = store.snapshot(store.published())
    corpus = load_corpus(store, snapshot.inputs["features"], settings)
    retriever = Retriever.open(store.mirror(snapshot.id), snapshot.id, settings=settings.search)
    aligner = Aligner.load(store.local_copy("aligner", snapshot.models["aligner"].id))
    row_of = {item_id: row for row, item_id in enumerate(corpus.features.items.column("item_id").to_pylist())}
    test = np.array([row_of[item.path] for item in published.of("test") if item.path in row_of], np.int64)
    if not len(test):
        raise CorpusError(
            "not one test item could be ingested", where=published.folder, remedy="`ace status` names the causes."
        )
    everything = np.arange(len(row_of))
    unseen = [(row_of[i.path], text) for i in published.of("test") if i.path in row_of for text in i.captions]
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {"missing": published.missing, "ingested": len(row_of)}
    for where, asked, gallery in (
        ("unseen_test", unseen, test),
        ("unseen_all", unseen, everything),
        ("seen_all", _seen(corpus), everything),
    ):
        asked = asked[:: max(1, -(-len(asked) // queries))]
        if not asked:
            continue
        gold, texts = np.array([row for row, _ in asked], np.int64), [text for _, text in asked]
        filters = {"split": "test"} if where == "unseen_test" else {}
        ranks = _rivals(texts, gold, gallery, retriever, aligner, corpus.features, settings, published.modality)
        ours = f"ACE, {settings.search.mode}"
        ranks[ours] = _ace(texts, gold, retriever, row_of, filters)
        for method, found in ranks.items():
            r = summarise(found, len(gallery), groups=gold, resamples=settings.evaluation.bootstrap)
            recalls = (r.recall_1, r.recall_5, r.recall_10)
            shown = [f"{100 * i.value:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]" for i in recalls]
            rows.append([f"{where}: {method}", r.queries, r.gallery, *shown])
            figures.setdefault("tables", {})[f"{where}: {method}"] = r.as_dict()
        for k in (1, 10):
            ratio = compare(ranks[ours], ranks["dual tower, exact"], k, groups=gold)
            figures[f"{where}_r{k}_ratio"] = round(ratio.value, 4)
            figures[f"{where}_r{k}_ratio_interval"] = [round(ratio.low, 4), round(ratio.high, 4)]
    return rows, figures


def _seen(corpus: Corpus) -> list[tuple[int, str]]:
    pairs = asked_seen(corpus.split)
    return list(zip(pairs.rows.tolist(), pairs.texts))


def _rivals(
    texts: Sequence[str], gold: np.ndarray, gallery: np.ndarray, retriever: Retriever, aligner: Aligner,
    features: Features, settings: Settings, modality: Modality,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Ranks by exact search: in the encoders' own space, where they share one, and by the trained dual tower."""
    pooled = torch.cat(
        [retriever.queries.text_encoder.encode(texts[i : i + BATCH]).pooled for i in range(0, len(texts), BATCH)]
    )
    ranks = {}
    encoder = load_media_encoder(modality, settings.encoders.media(modality), settings.limits)
    if encoder.shares_text_space and settings.encoders.text.path == settings.encoders.media(modality).path:
        items = features.embeddings[modality].astype(np.float32)
        ranks["encoders alone, exact"] = exact_ranks(pooled.numpy(), items, gold, gallery=gallery)
    with torch.inference_mode():
        queries = aligner.tower_text(pooled).numpy()
    ranks["dual tower, exact"] = exact_ranks(queries, tower_items(aligner, features), gold, gallery=gallery)
    return ranks


def _ace(
    texts: Sequence[str], gold: np.ndarray, retriever: Retriever, row_of: dict[str, int], filters: dict[str, Any]
) -> np.ndarray:
    found = np.full((len(texts), DEPTH), -1, np.int64)
    for start in range(0, len(texts), BATCH):
        answers = retriever.search(list(texts[start : start + BATCH]), k=DEPTH, filters=filters)
        for number, hits in enumerate(answers, start=start):
            found[number, : len(hits)] = [row_of[hit.item_id] for hit in hits]
    return ranks_in(found, gold)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(PUBLISHED), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with annotations and media, as published")
    parser.add_argument(
        "--encoder", help="folder or hub name of a dual encoder (CLIP, SigLIP, CLAP, X-CLIP); default: the demo's"
    )
    parser.add_argument("--store", type=Path, help="folder for what is fitted (default: ./paper-DATASET[-quick])")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the product")
    parser.add_argument("--queries", type=int, default=25_000, help="queries of each kind at most")
    parser.add_argument("--quick", action="store_true", help="60 items of each split, one epoch of the generator")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    published = load_published(args.dataset, args.data)
    if args.quick:
        published = published.some(_QUICK_ITEMS)
    quick = ["generator.epochs=1", "generator.r_drop=0", "evaluation.bootstrap=100"] if args.quick else []
    store_folder = (args.store or Path(f"paper-{args.dataset}{'-quick' if args.quick else ''}")).absolute()
    settings = settings_of(published, args.encoder, store_folder, [*quick, *args.set])
    counts = ", ".join(f"{len(published.of(s)):,} {s}" for s in ("train", "val", "test"))
    taken = f", at most {_QUICK_ITEMS} of each split" if args.quick else ""
    print(f"{published.name}: {counts}{taken}; without media: {published.missing or 'none'}", flush=True)
    store = Store.open(settings.store)
    run_stages(settings, store, Reporter())
    queries = min(args.queries, _QUICK_QUERIES) if args.quick else args.queries
    rows, figures = measure(published, settings, store, queries)
    said = [f"{x:.1f}" if x is not None else "-" for x in SAID[args.dataset]]
    rows.append(["the paper's ACE (ImageBind, captioned test items)", "", "", *said])
    table(f"{published.name}, {args.encoder or 'the demo encoders'}", HEADER, rows)
    about = {"dataset": published.name, "quick": args.quick, "encoder": args.encoder or "embedded"}
    write_figures(args.json, {**about, **figures})


if __name__ == "__main__":
    main()
