"""Recall of ACE against dual towers on the same frozen features, in one run.

    python -m benchmarks.retrieval --data FOLDER --json FILE [--quick]

Splits: training items keep one caption back (half of those validate, half ask for *seen* items); validation and test
items are *unseen*: in the index, without captions. Half of the test items are *present* when quantizer and generator
are fitted, half are *added* afterwards. Everything that is chosen is chosen on validation queries.

With several sets of different modalities (``--set tuxpaint_stamps,esc10,fluent_emoji_anim``) the part ``mixed``
compares one generator for all with one for each. Figures with ``--json`` are drawn by ``python -m benchmarks.plots``.

The rival is the aligner's two heads with exact search (Aligner.tower_*), the same heads that ACE is built on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel

from ace_core.config import AlignerSettings, GeneratorSettings, QuantizerSettings
from ace_core.evaluation import Interval, compare, compare_unpaired, exact_ranks, ivf_results, ranks_in, summarise
from ace_core.quantize.fit import fit_quantizer
from ace_core.scoring import Remainders
from benchmarks.measure import table
from benchmarks.retrieval_curves import curves
from benchmarks.retrieval_data import load_sets, text_table
from benchmarks.retrieval_system import (
    ONE_SHOT,
    VERIFIED,
    Queries,
    Spaces,
    System,
    World,
    beam_of,
    fit_spaces,
    joint_and_alone,
    make_world,
)

_PARTS = ("untrained", "main", "no-captions", "ablation")
_QUICK_PARTS = _PARTS[:3]
_QUERIES_AT_ONCE = 250
_DRAFT = VERIFIED.draft

Settings = TypeVar("Settings", bound=BaseModel)


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
        if not len(q.at):
            print(f"\n{where}: no item has a caption to spare", flush=True)
            continue

        def exact(queries: np.ndarray, items: np.ndarray, q: Queries = q, gallery: np.ndarray = gallery) -> np.ndarray:
            return exact_ranks(queries[q.at], items, q.gold, gallery=gallery, twins=twins)

        rival = exact(spaces.tower_queries, spaces.tower_items)
        corrected = exact(spaces.queries, spaces.items)
        ceiling = exact(spaces.queries, rebuilt)
        lists = max(4, int(len(gallery) ** 0.5))
        probed = ivf_results(
            spaces.tower_queries[q.at], spaces.tower_items[gallery], lists=lists, probes=max(1, lists // 16), k=10
        )
        ivf = ranks_in(np.where(probed >= 0, gallery[probed], -1), q.gold, twins)
        best, alone = system.ranks(q, gallery), system.ranks(q, gallery, alone=True)
        one_shot = system.ranks(q, gallery, ONE_SHOT, alone=True)
        beams = {b: system.ranks(q, gallery, beam_of(b)) for b in (10, 100)}
        bare = {b: system.ranks(q, gallery, beam_of(b, pool=0)) for b in (10, 100)}
        methods = {
            "dual tower, exact": rival,
            "dual tower, FAISS IVF 1/16": ivf,
            "ACE space, exact": corrected,
            "ACE codes, exact (ceiling)": ceiling,
            "generator alone, one-shot": one_shot,
            "generator alone, verified": alone,
            "ACE, beam 10 without a pool": bare[10],
            "ACE, beam 100 without a pool": bare[100],
            "ACE, beam 10": beams[10],
            "ACE, beam 100": beams[100],
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
        report.note(
            f"{name}_beam10_minus_beam100_without_pool_r10",
            compare(bare[10], bare[100], 10, difference=True, **options),
        )
        if name == "unseen_all":
            added = ~world.present[q.gold]
            if added.all() or not added.any():
                continue  # so few queries that they ask for one kind only
            report.note("added_minus_present_r10", compare_unpaired(best[added], best[~added], 10, resamples=resamples))
    for target, source in {
        "generator_alone_vs_ceiling_r1": "unseen_test_alone_vs_ceiling_r1",
        "ceiling_r1_vs_exact": "unseen_test_ceiling_r1_vs_exact",
    }.items():
        for suffix in ("", "_interval"):
            report.figures[target + suffix] = report.figures[source + suffix]
    health = system.quantizer.health(system.codes, system.vectors)
    report.note("collision_rate", _share(health.collision_rate, health.items, resamples))
    report.figures["health"] = health.as_dict()


def _share(value: float, count: int, resamples: int) -> Interval:
    draws = np.random.default_rng(0).binomial(count, value, resamples) / count
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def untrained(world: World, spaces: Spaces, settings: QuantizerSettings, report: Report) -> None:
    """What the heads give before any training (they start as the codebooks): the best 200 by q · x̂, re-ranked by
    8-bit vectors. All in NumPy, for all queries in a minute."""
    tokens, here = world.data.tokens, np.flatnonzero(world.present)
    everything = np.arange(len(spaces.items))
    cases = {"untrained": (spaces.items, spaces.queries[world.train]), "untrained_no_caption": (spaces.plain, None)}
    for case, (items, asked) in cases.items():
        quantizer, _ = fit_quantizer(items[here], tokens[here], settings, queries=asked)
        rebuilt = quantizer.reconstruct(quantizer.assign(items, tokens))
        stored = rebuilt + Remainders.of(items - rebuilt).rows(everything)
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
    items = spaces.plain
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


def mixed(systems: dict[str, System], world: World, report: Report) -> None:
    """One generator for all modalities against one for each, every query in the gallery of its own modality: answers
    re-ranked by 8-bit vectors, and what the generators find alone."""
    for name, rows in world.data.rows_of_modality().items():
        for kind, asked in (("unseen", world.unseen.of(rows)), ("seen", world.seen.of(rows))):
            if not len(asked.at):
                continue
            for what, alone in (("", False), (" alone", True)):
                ranks = {which: systems[which].ranks(asked, rows, alone=alone) for which in ("joint", name)}
                for which, found in ranks.items():
                    report.row(f"{name}, {kind}: {which} generator{what}", found, len(rows), asked.gold)
                for k in (1, 10):
                    difference = compare(
                        ranks["joint"], ranks[name], k, groups=asked.gold, resamples=report.resamples, difference=True
                    )
                    suffix = "_generator_alone" if alone else ""
                    report.note(f"mixed_{name}_{kind}_joint_minus_alone_r{k}{suffix}", difference)
    report.show("one generator for several modalities, and one for each")


def _changed(settings: Settings, changes: list[str]) -> Settings:
    """Settings with ``KEY=VALUE`` changes."""
    return type(settings).model_validate(settings.model_dump() | dict(c.split("=", 1) for c in changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--set", default="flickr8k", help="which set, or several of different modalities: a,b,c")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/features"), help="folder for features computed on the way"
    )
    parser.add_argument("--quick", action="store_true", help="a small part, under a minute; no ablation unless asked")
    parser.add_argument("--queries", type=int, default=5000, help="queries of each kind at most")
    parser.add_argument("--captions", type=int, help="captions kept of each item at most (default: all)")
    parser.add_argument("--aligner", action="append", default=[], metavar="KEY=VALUE", help="an aligner setting")
    parser.add_argument("--generator", action="append", default=[], metavar="KEY=VALUE", help="a generator setting")
    parser.add_argument("--quantizer", action="append", default=[], metavar="KEY=VALUE", help="a quantizer setting")
    parser.add_argument("--parts", help=f"which tables, by default {','.join(_PARTS)}; also: curves, mixed")
    parser.add_argument("--ablation-captions", type=int, default=4000, help="captions that ablated generators train on")
    args = parser.parse_args()
    if args.quick:
        args.queries, args.ablation_captions = min(args.queries, 60), min(args.ablation_captions, 128)
    torch.set_num_threads(1)
    cache: Path = args.cache
    cache.mkdir(parents=True, exist_ok=True)
    data = load_sets(args.data, args.set, cache, most=40 if args.quick else None, captions=args.captions)
    world = make_world(data, text_table(data.captions, cache), args.queries)
    aligner, quantizer, generator = AlignerSettings(), QuantizerSettings(), GeneratorSettings()
    if args.quick:
        aligner = aligner.model_copy(update={"epochs": 8, "batch_size": 128})
        quantizer = quantizer.model_copy(update={"coarse": 16, "fine_codes": 32, "epochs": 2})
        generator = generator.model_copy(update={"epochs": 1, "r_drop": 0.0})
    aligner = _changed(aligner, args.aligner)
    quantizer, generator = _changed(quantizer, args.quantizer), _changed(generator, args.generator)
    print(f"{args.set}: {len(data.split)} items, {len(world.train)} training captions", flush=True)
    report = Report(100 if args.quick else 1000)
    report.figures["settings"] = {
        "aligner": aligner.model_dump(), "quantizer": quantizer.model_dump(), "generator": generator.model_dump(),
    }  # fmt: skip
    spaces = fit_spaces(world, aligner, cache)
    parts = args.parts.split(",") if args.parts else _QUICK_PARTS if args.quick else _PARTS
    if parts == _QUICK_PARTS:
        print("left out of the quick form: ablation", flush=True)

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
        print(
            f"  generator: {system.seconds:.0f} s; refinement {system.model.refinement.tolist()}, {system.ranker}",
            flush=True,
        )
        measure(world, spaces, system, report)
        written()
        if "curves" in parts:
            curves(world, spaces, system, report.figures)
            written()
    if "no-captions" in parts:
        no_captions(world, spaces, quantizer, generator.model_copy(update={"r_drop": 0.0}), report)
        written()
    if "ablation" in parts:
        chosen = world.train[:: max(1, len(world.train) // args.ablation_captions)]
        small = generator.model_copy(update={"epochs": 1 if args.quick else 3})
        ablation(world, spaces, quantizer, small, chosen, report)
        written()
    if "mixed" in parts:
        mixed(dict(joint_and_alone(world, cache, aligner, quantizer, generator)), world, report)
        written()


if __name__ == "__main__":
    main()
