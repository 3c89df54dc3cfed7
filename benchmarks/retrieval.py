"""Recall of ACE against dual towers on the same frozen features, in one run.

    python -m benchmarks.retrieval --data FOLDER --json FILE [--quick]

Splits: training items keep one caption back (half of those validate, half ask for *seen* items); validation and test
items are *unseen*: in the index, without captions. Half of the test items are *present* when quantizer and generator
are fitted, half are *added* afterwards. Everything that is chosen is chosen on validation queries.

The rival is the aligner's two heads with exact search (Aligner.tower_*), the same heads that ACE is built on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ace_core.aligner import Aligner, CaptionPairs, fit_aligner
from ace_core.config import AlignerSettings, GeneratorSettings, QuantizerSettings
from ace_core.constraint import ConstraintIndex
from ace_core.decoding import Candidates, beam_search, one_shot_search, verified_search
from ace_core.evaluation import Interval, compare, compare_unpaired, exact_ranks, ivf_results, ranks_in, summarise
from ace_core.fitting import FitHooks, Progress
from ace_core.generator.data import TrainingData
from ace_core.generator.model import Generator
from ace_core.generator.training import fit_generator
from ace_core.identifiers import sort_order
from ace_core.manifest import fingerprint
from ace_core.quantize.fit import fit_quantizer
from ace_core.query import QueryBatch
from ace_core.ranking import Ranker, fit_ranker
from ace_core.scoring import Gallery, StoredVectors, similarity
from benchmarks.measure import table
from benchmarks.retrieval_data import DataSet, TextTable, load_set, text_table

_QUERIES_AT_ONCE = 250
_DRAFT = 200
_SEEN_QUERIES = 2500
_RANKING_QUERIES = 600


@dataclass(frozen=True)
class Queries:
    """Captions that ask: ``at`` (n,) into the text table, ``gold`` (n,) item rows."""

    at: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True)
class World:
    """A set, its texts and who is who.

    Attributes:
        train: captions that are trained on. validation: unseen, then seen. unseen, seen: what the tables ask.
        present: (N,) bool, items that the quantizer and the generator are fitted on.
    """

    data: DataSet
    text: TextTable
    train: np.ndarray
    validation: np.ndarray
    unseen: Queries
    seen: Queries
    present: np.ndarray

    @property
    def test_items(self) -> np.ndarray:
        return np.flatnonzero(self.data.split == "test")

    def pairs(self, at: np.ndarray) -> CaptionPairs:
        return CaptionPairs(self.text.pooled[at], self.data.rows[at])


def make_world(data: DataSet, text: TextTable, most_queries: int) -> World:
    """Deal captions and items to their parts; at most so many queries of each kind, evenly spread."""
    split = data.split[data.rows]
    counts = np.bincount(data.rows, minlength=len(data.split))
    last = (data.position == counts[data.rows] - 1) & (counts[data.rows] > 1)
    kept = np.flatnonzero((split == "train") & last)
    kept = kept[:: max(1, len(kept) // _SEEN_QUERIES)]
    test = np.flatnonzero(split == "test")
    test = test[:: max(1, -(-len(test) // most_queries))]
    seen = kept[1::2][:most_queries]
    tested = np.flatnonzero(data.split == "test")
    present = np.ones(len(data.split), bool)
    present[tested[1::2]] = False
    return World(
        data=data,
        text=text,
        train=np.flatnonzero((split == "train") & ~last),
        validation=np.concatenate([np.flatnonzero(split == "val"), kept[::2]]),
        unseen=Queries(test, data.rows[test]),
        seen=Queries(seen, data.rows[seen]),
        present=present,
    )


class System:
    """One ACE: quantizer and generator on an aligned space, with everything that a search needs."""

    def __init__(
        self, world: World, vectors: np.ndarray, queries: np.ndarray, scale: float, *,
        quantizer: QuantizerSettings, generator: GeneratorSettings, captions: np.ndarray,
        plain: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Fit.

        Args:
            vectors: (N, D) items. queries: (C, D) every caption's vector. scale: of the aligned space.
            captions: those that the generator is trained on.
            plain: (N, D) items without their captions' share.
        """
        self.world, self.vectors, self.queries = world, vectors, queries
        tokens = np.full(len(vectors), world.data.modality.token)
        here = np.flatnonzero(world.present)
        self.quantizer, _ = fit_quantizer(
            vectors[here], tokens[here], quantizer, queries=queries[captions] if len(captions) else None
        )
        self.codes = self.quantizer.assign(vectors, tokens)
        local = np.full(len(vectors), -1)
        local[here] = np.arange(len(here))
        text = world.text
        training = TrainingData(
            vectors=vectors[here],
            codes=self.codes[here],
            query_vectors=queries[captions],
            hidden=np.asarray(text.hidden[captions]),
            mask=text.mask[captions],
            rows=local[world.data.rows[captions]],
            teacher_scale=scale,
            plain_vectors=None if plain is None else plain[here],
        )
        torch.manual_seed(0)
        model = Generator(generator, self.quantizer, text.hidden.shape[3], text.hidden.shape[1])
        begin = time.perf_counter()
        self.model, self.report = fit_generator(model, training, generator, hooks=FitHooks(on_progress=_show))
        self.seconds = time.perf_counter() - begin
        self.ranker = Ranker(generator=0.0, similarity=scale)
        self._found: dict[tuple[str, int, int, int, int], tuple[Candidates, np.ndarray, np.ndarray]] = {}

    def batch(self, at: np.ndarray) -> QueryBatch:
        mask = self.world.text.mask[at]
        longest = int(mask.sum(1).max())
        hidden = np.asarray(self.world.text.hidden[at])[:, :, :longest].astype(np.float32)
        return QueryBatch(
            torch.from_numpy(self.queries[at]), torch.from_numpy(hidden), torch.from_numpy(mask[:, :longest].copy())
        )

    def gallery(self, rows: np.ndarray) -> tuple[Gallery, np.ndarray]:
        """Items as a searched segment, and the corpus row of each."""
        order = rows[sort_order(self.codes[rows], self.quantizer.vocab_sizes)]
        index = ConstraintIndex.build(self.codes[order], self.quantizer.vocab_sizes)
        return Gallery(index, self.codes[order], StoredVectors.of(self.vectors[order])), order

    def find(
        self, at: np.ndarray, rows: np.ndarray, mode: str, width: int
    ) -> tuple[Candidates, np.ndarray, np.ndarray]:
        """Candidates of the queries ``at``, their corpus rows (n, c; -1 where not valid) and similarities (n, c)."""
        gallery, order = self.gallery(rows)
        found, similar = [], []
        for i in range(0, len(at), _QUERIES_AT_ONCE):
            query = self.batch(at[i : i + _QUERIES_AT_ONCE])
            if mode == "beam":
                part = beam_search(self.model, query, [gallery.index], beam=width, limit=width)
            else:
                search = verified_search if mode == "verify" else one_shot_search
                part = search(self.model, query, [gallery.index], draft=width, limit=width)
            with torch.inference_mode():
                refined = self.model.refine(query).numpy()
            similar.append(similarity(refined, part, [gallery], self.quantizer))
            found.append(part)
        whole = _joined(found)
        return whole, np.where(whole.valid, order[whole.row], -1), _padded(similar, whole.valid.shape[1])

    def fit_ranking(self) -> None:
        """Learn the mix on validation queries in the gallery of everything."""
        at = self.world.validation
        at = at[:: max(1, len(at) // _RANKING_QUERIES)]
        found, rows, similar = self.find(at, np.arange(len(self.vectors)), "verify", _DRAFT)
        right = self.right(rows, self.world.data.rows[at])
        self.ranker = fit_ranker(found.log_prob, similar, right, valid=found.valid, start=self.ranker)

    def right(self, rows: np.ndarray, gold: np.ndarray) -> np.ndarray:
        twins = self.world.data.twins
        return rows == gold[:, None] if twins is None else (twins[rows] == twins[gold][:, None]) & (rows >= 0)

    def ranks(
        self, asked: Queries, rows: np.ndarray, *, mode: str = "verify", width: int = _DRAFT, alone: bool = False
    ) -> np.ndarray:
        """Ranks of the golds: by the ranker, or (``alone``) by the generator's log-probability."""
        key = (mode, width, len(rows), len(asked.at), int(asked.at[0]))
        if key not in self._found:  # one search serves both orders
            self._found = {key: self.find(asked.at, rows, mode, width)}
        found, items, similar = self._found[key]
        ranker = Ranker(generator=1.0, similarity=0.0) if alone else self.ranker
        order = np.argsort(-ranker.score(found.log_prob, similar, found.valid), axis=1, kind="stable")
        return ranks_in(np.take_along_axis(items, order, 1), asked.gold, self.world.data.twins)


def _joined(parts: Sequence[Candidates]) -> Candidates:
    width = max(p.valid.shape[1] for p in parts)
    arrays = {
        name: _padded([getattr(p, name) for p in parts], width)
        for name in ("valid", "segment", "row", "log_prob", "level_log_prob", "codes")
    }
    return Candidates(**arrays)


def _padded(parts: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = [np.pad(p, [(0, 0), (0, width - p.shape[1])] + [(0, 0)] * (p.ndim - 2)) for p in parts]
    return np.concatenate(out)


def _show(progress: Progress) -> None:
    if progress.step % 50 == 0:
        print(f"    {progress.stage} {progress.step}/{progress.total} loss {progress.metrics['loss']:.3f}", flush=True)


@dataclass(frozen=True)
class Spaces:
    """The aligned space: ACE's vectors, the plain tower's, and the scale."""

    aligner: Aligner
    items: np.ndarray
    plain: np.ndarray
    queries: np.ndarray
    tower_items: np.ndarray
    tower_queries: np.ndarray


def fit_spaces(world: World, settings: AlignerSettings, cache: Path) -> Spaces:
    """Fit the aligner, or read the one that an earlier run fitted to the same data with the same settings."""
    features = {world.data.modality: world.data.features}
    train = world.pairs(world.train)
    known = hashlib.sha256(world.data.features.tobytes() + train.rows.tobytes() + world.validation.tobytes())
    folder = cache / f"aligner.{fingerprint(world.data.name, settings.model_dump(), known.hexdigest())}"
    if folder.is_dir():
        aligner = Aligner.load(folder)
    else:
        aligner, metrics = fit_aligner(features, train, settings, validation=world.pairs(world.validation))
        print(f"  aligner: {metrics}", flush=True)
        aligner.save(folder)
    queries = aligner.text_vectors(world.text.pooled)
    with torch.inference_mode():
        tower = aligner.tower_item(world.data.modality, torch.from_numpy(world.data.features)).numpy()
    plain = aligner.item_vectors(features)
    return Spaces(aligner, aligner.item_vectors(features, train), plain, queries, tower, queries[:, :-1])


class Report:
    """Named figures with intervals, and printed tables."""

    def __init__(self, resamples: int) -> None:
        self.figures: dict[str, Any] = {}
        self.rows: list[list[Any]] = []
        self.resamples = resamples

    def note(self, name: str, interval: Interval) -> None:
        self.figures[name] = round(interval.value, 4)
        self.figures[name + "_interval"] = [round(interval.low, 4), round(interval.high, 4)]
        print(f"  {name} = {interval}", flush=True)

    def row(self, what: str, ranks: np.ndarray, gallery: int, gold: np.ndarray) -> None:
        r = summarise(ranks, gallery, groups=gold, resamples=self.resamples)
        shown = [
            f"{100 * i.value:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]"
            for i in (r.recall_1, r.recall_5, r.recall_10)
        ]
        self.rows.append([what, r.queries, gallery, *shown, r.mrr_10.value, r.median_rank])
        self.figures.setdefault("tables", {})[what] = r.as_dict()

    def show(self, title: str) -> None:
        table(title, ("method", "queries", "gallery", "R@1 %", "R@5 %", "R@10 %", "MRR@10", "median"), self.rows)
        self.rows = []


def measure(world: World, spaces: Spaces, system: System, report: Report) -> None:
    """The main table: every method, unseen and seen items, both galleries."""
    everything, tests = np.arange(len(spaces.items)), world.test_items
    twins, resamples = world.data.twins, report.resamples
    asked = {
        "unseen, test gallery": (world.unseen, tests),
        "unseen, everything": (world.unseen, everything),
        "seen, everything": (world.seen, everything),
    }
    short = {"unseen, test gallery": "unseen_test", "unseen, everything": "unseen_all", "seen, everything": "seen_all"}
    rebuilt = system.quantizer.reconstruct(system.codes)
    for where, (q, gallery) in asked.items():

        def exact(queries: np.ndarray, items: np.ndarray, q: Queries = q, gallery: np.ndarray = gallery) -> np.ndarray:
            return exact_ranks(queries[q.at], items, q.gold, gallery=gallery, twins=twins)

        rival = exact(spaces.tower_queries, spaces.tower_items)
        corrected = exact(spaces.queries, spaces.items)
        ceiling = exact(spaces.queries, rebuilt)
        lists = max(4, int(len(gallery) ** 0.5))
        found = ivf_results(
            spaces.tower_queries[q.at], spaces.tower_items[gallery], lists=lists, probes=max(1, lists // 16), k=10
        )
        ivf = ranks_in(np.where(found >= 0, gallery[found], -1), q.gold, twins)
        best, alone = system.ranks(q, gallery), system.ranks(q, gallery, alone=True)
        one_shot = system.ranks(q, gallery, mode="one-shot", alone=True)
        beams = {b: system.ranks(q, gallery, mode="beam", width=b) for b in (10, 100)}
        methods = {
            "dual tower, exact": rival,
            "dual tower, FAISS IVF 1/16": ivf,
            "ACE space, exact": corrected,
            "ACE codes, exact (ceiling)": ceiling,
            "generator alone, one-shot": one_shot,
            "generator alone, verified": alone,
            "ACE, beam 10 + 8-bit vectors": beams[10],
            "ACE, beam 100 + 8-bit vectors": beams[100],
            "ACE, verified + 8-bit vectors": best,
        }
        for what, ranks in methods.items():
            report.row(f"{where}: {what}", ranks, len(gallery), q.gold)
        report.show(where)
        name = short[where]
        for k in (1, 10):
            report.note(f"{name}_r{k}_ratio", compare(best, rival, k, groups=q.gold, resamples=resamples))
        options: dict[str, Any] = {"groups": q.gold, "resamples": resamples}
        report.note(f"{name}_one_shot_vs_ceiling_r1", compare(one_shot, ceiling, 1, **options))
        report.note(f"{name}_alone_vs_ceiling_r1", compare(alone, ceiling, 1, **options))
        report.note(f"{name}_ceiling_r1_vs_exact", compare(ceiling, corrected, 1, **options))
        report.note(f"{name}_beam10_minus_beam100_r10", compare(beams[10], beams[100], 10, difference=True, **options))
        if name == "unseen_all":
            added = ~world.present[q.gold]
            report.note("added_minus_present_r10", compare_unpaired(best[added], best[~added], 10, resamples=resamples))
    for target, source in {
        "generator_alone_vs_ceiling_r1": "unseen_test_alone_vs_ceiling_r1",
        "ceiling_r1_vs_exact": "unseen_test_ceiling_r1_vs_exact",
    }.items():
        for suffix in ("", "_interval"):
            report.figures[target + suffix] = report.figures[source + suffix]
    health = system.quantizer.health(system.codes, system.vectors)
    report.figures["collision_rate"] = health.collision_rate
    report.figures["health"] = health.as_dict()


def untrained(world: World, spaces: Spaces, settings: QuantizerSettings, report: Report) -> None:
    """What the heads give before any training (they start as the codebooks): the best 200 by q · x̂, re-ranked by
    8-bit vectors. All in NumPy, for all queries in a minute."""
    tokens, here = np.full(len(spaces.items), world.data.modality.token), np.flatnonzero(world.present)
    everything = np.arange(len(spaces.items))
    cases = {"untrained": (spaces.items, spaces.queries[world.train]), "untrained_no_caption": (spaces.plain, None)}
    for case, (items, asked) in cases.items():
        quantizer, _ = fit_quantizer(items[here], tokens[here], settings, queries=asked)
        rebuilt = quantizer.reconstruct(quantizer.assign(items, tokens))
        stored = StoredVectors.of(items).rows(everything)
        for where, q, gallery in (
            ("unseen_test", world.unseen, world.test_items),
            ("unseen_all", world.unseen, everything),
            ("seen_all", world.seen, everything),
        ):
            found = []
            for i in range(0, len(q.at), _QUERIES_AT_ONCE):
                query = spaces.queries[q.at[i : i + _QUERIES_AT_ONCE]]
                top = np.argsort(-query @ rebuilt[gallery].T, 1)[:, :_DRAFT]
                again = np.argsort(-np.take_along_axis(query @ stored[gallery].T, top, 1), 1)
                found.append(gallery[np.take_along_axis(top, again, 1)])
            best = ranks_in(np.concatenate(found), q.gold, world.data.twins)
            tower = (spaces.queries, items) if asked is None else (spaces.tower_queries, spaces.tower_items)
            rival = exact_ranks(tower[0][q.at], tower[1], q.gold, gallery=gallery, twins=world.data.twins)
            report.row(f"{case} {where}: exact search", rival, len(gallery), q.gold)
            report.row(f"{case} {where}: 200 by codes + 8-bit vectors", best, len(gallery), q.gold)
            for k in (1, 10):
                ratio = compare(best, rival, k, groups=q.gold, resamples=report.resamples)
                report.note(f"{case}_{where}_r{k}_ratio", ratio)
    report.show("before the generator is trained")


def no_captions(
    world: World, spaces: Spaces, quantizer: QuantizerSettings, generator: GeneratorSettings, report: Report
) -> None:
    """The aligned space as if it had come with its encoders: no caption reaches index, quantizer or generator."""
    items = spaces.aligner.item_vectors({world.data.modality: world.data.features})
    system = System(
        world, items, spaces.queries, spaces.aligner.scale, quantizer=quantizer, generator=generator,
        captions=np.empty(0, np.int64),
    )  # fmt: skip
    everything, q = np.arange(len(items)), world.unseen
    exact = exact_ranks(spaces.queries[q.at], items, q.gold, twins=world.data.twins)
    best = system.ranks(q, everything)
    alone = system.ranks(q, everything, alone=True)
    report.row("exact search in that space", exact, len(items), q.gold)
    report.row("generator alone, verified", alone, len(items), q.gold)
    report.row("ACE, verified + 8-bit vectors", best, len(items), q.gold)
    report.show("no captions at all, virtual queries only; unseen, everything")
    for k in (1, 10):
        report.note(f"no_caption_r{k}_ratio", compare(best, exact, k, groups=q.gold, resamples=report.resamples))


def ablation(
    world: World, spaces: Spaces, quantizer: QuantizerSettings, generator: GeneratorSettings, captions: np.ndarray,
    report: Report,
) -> None:  # fmt: skip
    """The generator alone with each part removed, all trained alike on a part of the captions."""
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "full": ({}, {}),
        "without R-Drop": ({}, {"r_drop": 0.0}),
        "without K-Means (2 cells)": ({"coarse": 2}, {}),
        "without RQ-VAE (K-Means of 256 and one fine level of 16)": (
            {"coarse": 256, "fine_levels": 1, "fine_codes": 16},
            {},
        ),
        "without fusion (plain cross-attention)": ({}, {"coarse_fusion": False, "fine_fusion": False}),
        "without virtual queries": ({}, {"virtual_queries": 0.0}),
        "without soft targets": ({}, {"soft_targets": 0.0, "item_smoothing": 0.0}),
    }
    results = {}
    everything = np.arange(len(spaces.items))
    for what, (q_change, g_change) in variants.items():
        system = System(
            world, spaces.items, spaces.queries, spaces.aligner.scale,
            quantizer=quantizer.model_copy(update=q_change), generator=generator.model_copy(update=g_change),
            captions=captions, plain=spaces.plain,
        )  # fmt: skip
        row = {}
        for where, gallery in (("test", world.test_items), ("all", everything)):
            ranks = system.ranks(world.unseen, gallery, alone=True)
            report.row(f"{what} ({where})", ranks, len(gallery), world.unseen.gold)
            r = summarise(ranks, len(gallery), groups=world.unseen.gold, resamples=report.resamples)
            row[where] = {
                "r1": r.recall_1.value,
                "r1_interval": [r.recall_1.low, r.recall_1.high],
                "r10": r.recall_10.value,
            }
        results[what] = row
    report.figures["ablation_r1"] = results
    report.show("ablation: generator alone, unseen items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--set", default="flickr8k", help="which set")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--cache", type=Path, help="folder for features computed on the way (default: FOLDER of --json)"
    )
    parser.add_argument("--quick", action="store_true", help="a small part, in a minute or two")
    parser.add_argument("--queries", type=int, default=5000, help="queries of each kind at most")
    parser.add_argument("--generator", action="append", default=[], metavar="KEY=VALUE", help="a generator setting")
    parser.add_argument("--parts", default="untrained,main,no-captions,ablation", help="which tables")
    parser.add_argument("--ablation-captions", type=int, default=4000, help="captions that ablated generators train on")
    args = parser.parse_args()
    if args.quick:
        args.queries, args.ablation_captions = min(args.queries, 150), min(args.ablation_captions, 256)
    torch.set_num_threads(1)
    cache = args.cache or (args.json.parent if args.json else Path.cwd())
    cache.mkdir(parents=True, exist_ok=True)
    data = load_set(args.data, args.set, cache, most=60 if args.quick else None)
    world = make_world(data, text_table(data.captions, cache), args.queries)
    aligner, quantizer, generator = AlignerSettings(), QuantizerSettings(), GeneratorSettings()
    if args.quick:
        aligner = aligner.model_copy(update={"epochs": 8, "batch_size": 128})
        quantizer = quantizer.model_copy(update={"coarse": 16, "fine_codes": 32, "epochs": 2})
        generator = generator.model_copy(update={"epochs": 1, "r_drop": 0.0})
    changes = dict(change.split("=", 1) for change in args.generator)
    generator = GeneratorSettings.model_validate(generator.model_dump() | changes)
    print(f"{args.set}: {len(data.split)} items, {len(world.train)} training captions", flush=True)
    report = Report(100 if args.quick else 1000)
    report.figures["settings"] = {
        "aligner": aligner.model_dump(), "quantizer": quantizer.model_dump(), "generator": generator.model_dump(),
    }  # fmt: skip
    spaces = fit_spaces(world, aligner, cache)
    parts = args.parts.split(",")

    def written() -> None:
        if args.json:
            args.json.write_text(json.dumps(report.figures, indent=1) + "\n")

    if "untrained" in parts:
        untrained(world, spaces, quantizer, report)
        written()
    if "main" in parts:
        system = System(
            world, spaces.items, spaces.queries, spaces.aligner.scale, quantizer=quantizer, generator=generator,
            captions=world.train, plain=spaces.plain,
        )  # fmt: skip
        system.fit_ranking()
        report.figures["generator_seconds"] = round(system.seconds)
        report.figures["ranker"] = [system.ranker.generator, system.ranker.similarity]
        print(f"  generator: {system.seconds:.0f} s; ranker {system.ranker}", flush=True)
        measure(world, spaces, system, report)
        written()
    if "no-captions" in parts:
        no_captions(world, spaces, quantizer, generator.model_copy(update={"r_drop": 0.0}), report)
        written()
    if "ablation" in parts:
        chosen = world.train[:: max(1, len(world.train) // args.ablation_captions)]
        small = generator.model_copy(update={"epochs": 1 if args.quick else 3})
        ablation(world, spaces, quantizer, small, chosen, report)
        written()


if __name__ == "__main__":
    main()
