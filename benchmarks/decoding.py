"""The constraint index and constrained search against the usual ways, in one run on one machine.

    python -m benchmarks.decoding [--quick] [--json FILE] [--cache FOLDER]

Everything runs on one thread. Identifiers are residual k-means codes of clustered vectors (modality, coarse 256,
4 x 256). Rivals that need it get the same scores, identifiers and weights, and their results are checked to be equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ace_core.config import GeneratorSettings
from ace_core.constraint import ConstraintIndex
from ace_core.decoding import beam_search, one_shot_search
from ace_core.filters import ItemMask
from ace_core.generator.model import Generator
from ace_core.query import QueryBatch
from ace_core.space import unit_query
from ace_core.walk import Walk
from benchmarks.bart import BartSpeller
from benchmarks.clustered import Codes, World, coded, quantizer_of, queries_near
from benchmarks.measure import interleaved, table, write_figures
from benchmarks.rivals import DictTrie, StaticIndex, prefix_function_step
from benchmarks.same_weights import Rival, TableSpeller, identifiers, in_common, top_k

BATCH, BEAM = 32, 20


def build_figures(codes: Codes, items: int) -> tuple[ConstraintIndex, list]:
    begin = time.perf_counter()
    index = ConstraintIndex.build(codes.codes, codes.vocab_sizes)
    seconds = time.perf_counter() - begin
    return index, [f"{items:,}", index.nbytes / items, seconds, seconds / items * 1e6]


def constraint_step(codes: Codes, index: ConstraintIndex, seconds: float, queries: np.ndarray):
    """Seconds of one step (mean over levels) of each way, and bytes an item of each index."""
    speller = TableSpeller(codes, queries, BEAM)
    walk = Walk([index])
    trie_begin = time.perf_counter()
    trie = DictTrie(codes.codes)
    trie_seconds = time.perf_counter() - trie_begin
    distinct = np.unique(codes.codes, axis=0)
    static = StaticIndex(ConstraintIndex.build(distinct, codes.vocab_sizes, depth=distinct.shape[1] - 1))
    rival = prefix_function_step(trie, BEAM)
    masks = walk.masks(None, BATCH)
    some = walk.masks([ItemMask.of(np.random.default_rng(0).random(index.items) < 0.01)], BATCH)
    rows = walk.expand(walk.root(BATCH), speller.tables[0].numpy()[:, None], BEAM, masks)
    filtered = walk.expand(walk.root(BATCH), speller.tables[0].numpy()[:, None], BEAM, some)
    states = torch.from_numpy(rows.codes[:, :, 0].astype(np.int64))
    ways = ("fused walk", "prefix function", "STATIC gather", "unmasked top-k", "filtered 1 %")
    totals = dict.fromkeys(ways, 0.0)
    lines = []
    for level in range(1, walk.levels):
        width = rows.width
        log_probs = speller.noisy[level][:, :width].contiguous()
        own = log_probs.numpy()
        scores = torch.from_numpy(rows.score[:, :width])
        prefixes = torch.from_numpy(rows.codes[:, :width, :level].reshape(BATCH * width, level).astype(np.int64))
        scores32 = scores.float()
        at = states[:, :width]
        wide = filtered.width
        of_filtered = speller.noisy[level][:, :wide].contiguous().numpy()
        runs: dict[str, Callable[[], Any]] = {
            "fused walk": partial(walk.expand, rows, own, BEAM, masks),
            "prefix function": partial(rival, prefixes, scores32, log_probs),
            "STATIC gather": partial(static.step, level, at, scores32, log_probs, BEAM),
            "unmasked top-k": partial(top_k, scores32, log_probs, BEAM),
            "filtered 1 %": partial(walk.expand, filtered, of_filtered, BEAM, some),
        }
        taken = interleaved(runs, seconds=seconds / (walk.levels - 1))
        following = walk.expand(rows, own, BEAM, masks)
        best = rival(prefixes, scores32, log_probs)[0]
        theirs, _, _, states = static.step(level, at, scores32, log_probs, BEAM)
        assert np.allclose(best.numpy(), following.score, atol=1e-3) and np.allclose(best, theirs, atol=1e-3)
        rows = following
        filtered = walk.expand(filtered, of_filtered, BEAM, some)
        for name, value in taken.items():
            totals[name] += value / (walk.levels - 1)
        lines.append([f"level {level}", *(1e3 * taken[name] for name in totals)])
    lines.append(["mean", *(1e3 * v for v in totals.values())])
    table(f"constraint step, {index.items:,} items, batch {BATCH} x beam {BEAM}, ms", ("", *totals), lines)
    n = index.items
    sizes = {"ours": walk.nbytes / n, "STATIC": static.nbytes / n, "dict trie": trie.nbytes / n}
    table("bytes an item", ("index", "bytes"), list(sizes.items()))
    print(f"  (dict trie built in {trie_seconds:.1f} s)")
    return totals, sizes


def against_generate(
    codes: Codes, index: ConstraintIndex, seconds: float, batch: int, beam: int
) -> tuple[float, float, float]:
    """Search with one decoder's weights: transformers.generate with a prefix function, and ours.

    Ours is asserted to find what generate finds, in the same order.

    Returns:
        how many times faster ours is, in fp32 and in int8; the share of fp32's top-k that int8 finds.
    """
    rival = Rival(codes, DictTrie(codes.codes), batch, beam)
    eighth = BartSpeller(rival.bart, index.vocab_sizes, eight_bit=True)
    walk = Walk([index])

    def ours(model, scoring, limit=None):
        return beam_search(model, rival.query, walk, beam=beam, scoring=scoring, limit=limit)

    fp32, int8 = "ours, fp32, the same scores", "ours, int8"
    by_vocabulary = "ours, fp32, vocabulary scoring", "ours, int8, vocabulary scoring"
    runs = {
        fp32: partial(ours, rival.speller, "children"),
        int8: partial(ours, eighth, "children"),
        by_vocabulary[0]: partial(ours, rival.speller, "vocabulary"),
        by_vocabulary[1]: partial(ours, eighth, "vocabulary"),
    }
    with torch.inference_mode():
        found = {name: run(limit=100 * beam) for name, run in runs.items()}
        rival.check(found[fp32])
        taken = interleaved(
            {(reference := "generate + prefix function, fp32"): rival.search, **runs}, seconds=seconds, least=3
        )
    top = {name: identifiers(candidates) for name, candidates in found.items()}
    times = {name: taken[reference] / value for name, value in taken.items()}
    shares = {name: in_common(top[fp32], top[name]) for name in (fp32, int8)}
    shares |= {name: in_common(top[by_vocabulary[0]], top[name]) for name in by_vocabulary}
    table(
        f"search with one 2-layer decoder of width 256, {index.items:,} items, batch {batch}, beam {beam}",
        ("", "ms a query", "times faster", "of fp32's top-k"),
        [[k, 1e3 * v / batch, times[k], shares.get(k, 1.0)] for k, v in taken.items()],
    )
    return times[fp32], times[int8], shares[int8]


def _generator(codes: Codes) -> Generator:
    """An unfitted generator of the product's default shape over these codewords."""
    words = [np.pad(table, ((0, 0), (0, 1))) for table in codes.codewords]  # the last coordinate is the popularity
    torch.manual_seed(0)
    return Generator(GeneratorSettings(), quantizer_of(words), text_width=32, text_layers=1).eval()


def _query(codes: Codes, world: World, batch: int) -> QueryBatch:
    x, _ = next(world.vectors(2000))
    queries, _ = queries_near(x, batch)
    return QueryBatch(unit_query(torch.from_numpy(np.pad(queries, ((0, 0), (0, 1))))))


def by_size(world: World, corpora: dict[int, tuple[Codes, ConstraintIndex]], seconds: float) -> dict[str, float]:
    """Ratios of search times: the largest corpus to the smallest, and a filter that keeps 1 % to none."""
    runs = {}
    for items, (codes, index) in corpora.items():
        generator, query, walk = _generator(codes), _query(codes, world, BATCH), Walk([index])
        some = [ItemMask.of(np.random.default_rng(0).random(index.items) < 0.01)]
        for name, mask in ((f"{items:,}", None), (f"{items:,}, filter keeps 1 %", some)):
            runs["beam", name] = lambda g=generator, q=query, w=walk, m=mask: beam_search(g, q, w, m, beam=BEAM)
            runs["one-shot", name] = lambda g=generator, q=query, w=walk, m=mask: one_shot_search(g, q, w, m, draft=200)
    taken = interleaved(runs, seconds=seconds)  # type: ignore[arg-type, type-var]
    small, large = min(corpora), max(corpora)
    table(
        f"search by corpus size (generator of the default shape, batch {BATCH}, beam {BEAM}, draft 200), ms a query",
        ("items", "beam", "one-shot"),
        [[n, *(1e3 * taken[m, n] / BATCH for m in ("beam", "one-shot"))] for _, n in list(runs)[::2]],  # type: ignore[index]
    )
    figures = {}
    for mode in ("beam", "one-shot"):
        plain = taken[mode, f"{large:,}"]  # type: ignore[index]
        figures[f"{mode} large"] = plain / taken[mode, f"{small:,}"]  # type: ignore[index]
        figures[f"{mode} filtered"] = taken[mode, f"{large:,}, filter keeps 1 %"] / plain  # type: ignore[index]
    return figures


def floor(world: World, codes: Codes, index: ConstraintIndex, seconds: float) -> None:
    """Arithmetic that one query needs, at this machine's best rate, against what a search takes."""
    generator, query, walk = _generator(codes), _query(codes, world, BATCH), Walk([index])
    a = torch.randn(512, 512)
    taken = interleaved(
        {
            "rate": lambda: a @ a,
            "beam": lambda: beam_search(generator, query, walk, beam=BEAM),
            "one-shot": lambda: one_shot_search(generator, query, walk, draft=200),
        },
        seconds=seconds,
    )
    rate = 2 * 512**3 / taken["rate"]
    dim = codes.codewords[0].shape[1] + 1
    heads = sum(codes.vocab_sizes) * dim
    layers = sum(p.numel() for part in (generator._layers, generator._deltas) for p in part.parameters())
    rows = [3] + [BEAM] * (walk.levels - 2)
    needed = {
        "beam": 2 * sum(r * (layers + heads / walk.levels) for r in rows),
        "one-shot": 2.0 * (heads + sum(p.numel() for p in generator._refine_feed.parameters())),
    }
    table(
        f"the floor: arithmetic of one query at {rate / 1e9:.0f} GFLOP/s (one thread)",
        ("mode", "MFLOP", "floor ms", "search ms", "times the floor"),
        [
            [m, f / 1e6, 1e3 * f / rate, 1e3 * taken[m] / BATCH, taken[m] / BATCH / (f / rate)]
            for m, f in needed.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100k items at most, under a minute")
    parser.add_argument("--items", type=int, nargs="+", help="corpus sizes (default 10k, 100k, 1M, 10M)")
    parser.add_argument("--json", type=Path, help="write the named figures to this file")
    parser.add_argument("--cache", type=Path, help="folder that keeps identifiers for the next run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    sizes = options.items or ([10_000, 100_000] if options.quick else [10_000, 100_000, 1_000_000, 10_000_000])
    seconds = 2.0 if options.quick else 20.0
    world = World()
    corpora: dict[int, tuple[Codes, ConstraintIndex]] = {}
    lines = []
    for items in sorted(sizes):
        codes = coded(world, items, cache=options.cache)
        index, line = build_figures(codes, items)
        corpora[items] = codes, index
        lines.append(line)
    table("index", ("items", "bytes an item", "build s", "build s per million"), lines)
    # the dict trie of the rivals takes half a kilobyte an item
    middle = max(n for n in corpora if n <= 1_000_000)
    codes, index = corpora[middle]
    x, _ = next(world.vectors(2000))
    step, bytes_of = constraint_step(codes, index, seconds, queries_near(x, BATCH)[0])
    fp32, int8, in_common = against_generate(codes, index, 2 * seconds, batch=4, beam=BEAM)
    scaling = by_size(world, {n: corpora[n] for n in (min(corpora), max(corpora))}, seconds)
    floor(world, codes, index, seconds / 2)
    write_figures(
        options.json,
        {
            "constraint_items": middle,
            "constraint_vs_prefix_fn": step["prefix function"] / step["fused walk"],
            "constraint_vs_static": step["STATIC gather"] / step["fused walk"],
            "constraint_vs_unmasked_topk": step["unmasked top-k"] / step["fused walk"],
            "bytes_per_item": bytes_of["ours"],
            "bytes_vs_dict_trie": bytes_of["dict trie"] / bytes_of["ours"],
            "bytes_vs_static": bytes_of["STATIC"] / bytes_of["ours"],
            "build_seconds_per_million": lines[-1][-1],
            "ar_vs_generate_fp32": fp32,
            "ar_vs_generate_int8": int8,
            "int8_share_of_fp32_top_k": in_common,
            "smallest_items": min(corpora),
            "largest_items": max(corpora),
            "ten_million_vs_ten_thousand_ar": scaling["beam large"],
            "ten_million_vs_ten_thousand_one_shot": scaling["one-shot large"],
            "filtered_1pct_vs_unfiltered": scaling["beam filtered"],
            "filtered_1pct_vs_unfiltered_one_shot": scaling["one-shot filtered"],
        },
    )


if __name__ == "__main__":
    main()
