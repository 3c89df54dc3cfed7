"""The constraint index and constrained search against the usual ways, in one run on one machine.

    python -m benchmarks.decoding [--quick] [--json FILE] [--cache FOLDER]

Everything runs on one thread. Identifiers are residual k-means codes of clustered vectors (modality, coarse 256,
4 x 256). Rivals that need it get the same scores, identifiers and weights, and their results are checked to be equal.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import torch

from ace_core.config import GeneratorSettings
from ace_core.constraint import ConstraintIndex
from ace_core.decoding import beam_search, one_shot_search
from ace_core.filters import ItemMask
from ace_core.query import QueryBatch
from ace_core.walk import Walk
from benchmarks.bart import BartSpeller, generate, random_bart
from benchmarks.clustered import Codes, World, coded, queries_near
from benchmarks.measure import interleaved, table, write_figures
from benchmarks.rivals import DictTrie, StaticIndex, prefix_function_step

BATCH, BEAM = 32, 20


class TableSpeller:
    """Log-probabilities from the codebooks and the query, no decoder: what is left is the cost of the search."""

    def __init__(self, codes: Codes, queries: np.ndarray, noise: float = 1.0) -> None:
        self.vocab_sizes = codes.vocab_sizes
        self.tables = [torch.from_numpy(t) for t in codes.tables(queries)]
        generator = torch.Generator().manual_seed(0)
        self.noisy = [  # a decoder's scores differ between the rows of a beam
            torch.log_softmax(t[:, None] + noise * torch.randn(len(t), BEAM, t.shape[1], generator=generator), -1)
            for t in self.tables
        ]

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        return [t[: len(query)] for t in self.tables]


def build_figures(codes: Codes, items: int) -> tuple[ConstraintIndex, list]:
    begin = time.perf_counter()
    index = ConstraintIndex.build(codes.codes, codes.vocab_sizes)
    seconds = time.perf_counter() - begin
    return index, [f"{items:,}", index.nbytes / items, seconds, seconds / items * 1e6]


def constraint_step(codes: Codes, index: ConstraintIndex, seconds: float, queries: np.ndarray):
    """Seconds of one step (mean over levels) of each way, and bytes an item of each index."""
    speller = TableSpeller(codes, queries)
    walk = Walk([index])
    trie_begin = time.perf_counter()
    trie = DictTrie(codes.codes)
    trie_seconds = time.perf_counter() - trie_begin
    static = StaticIndex(index)
    rival = prefix_function_step(trie, BEAM)
    masks = walk.masks(None, BATCH)
    some = walk.masks([ItemMask.of(np.random.default_rng(0).random(index.items) < 0.01)], BATCH)
    rows = walk.expand(walk.root(BATCH), speller.tables[0].numpy()[:, None], BEAM, masks)
    filtered = walk.expand(walk.root(BATCH), speller.tables[0].numpy()[:, None], BEAM, some)
    states = torch.from_numpy(rows.codes[:, :, 0].astype(np.int64))
    totals = {"fused walk": 0.0, "prefix function": 0.0, "STATIC gather": 0.0, "unmasked top-k": 0.0, "filtered 1 %": 0.0}
    lines = []
    for level in range(1, walk.levels):
        width = rows.width
        log_probs = speller.noisy[level][:, :width].contiguous()
        own = log_probs.numpy()
        scores = torch.from_numpy(rows.score[:, :width])
        prefixes = torch.from_numpy(rows.codes[:, :width].reshape(BATCH * width, level).astype(np.int64))
        scores32 = scores.float()
        at = states[:, :width]
        wide = filtered.width
        of_filtered = speller.noisy[level][:, :wide].contiguous().numpy()
        runs = {
            "fused walk": lambda r=rows, lp=own: walk.expand(r, lp, BEAM, masks),
            "prefix function": lambda p=prefixes, s=scores32, lp=log_probs: rival(p, s, lp),
            "STATIC gather": lambda a=at, s=scores32, lp=log_probs, v=level: static.step(v, a, s, lp, BEAM),
            "unmasked top-k": lambda s=scores32, lp=log_probs: (lp + s[..., None]).flatten(1).topk(BEAM, dim=1),
            "filtered 1 %": lambda r=filtered, lp=of_filtered: walk.expand(r, lp, BEAM, some),
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
    sizes = {"ours": index.nbytes / n, "STATIC": static.nbytes / n, "dict trie": trie.nbytes / n}
    table("bytes an item", ("index", "bytes"), list(sizes.items()))
    print(f"  (dict trie built in {trie_seconds:.1f} s)")
    return totals, sizes


def against_generate(codes: Codes, index: ConstraintIndex, seconds: float, batch: int, beam: int) -> dict[str, float]:
    """Search with one decoder's weights: transformers.generate with a prefix function, and ours."""
    bart = random_bart(index.vocab_sizes)
    speller = BartSpeller(bart, index.vocab_sizes)
    eighth = speller.quantised()
    offsets = speller.offsets
    trie = DictTrie(codes.codes)
    walk = Walk([index])
    torch.manual_seed(1)
    query = QueryBatch(
        torch.zeros(batch, 1), torch.randn(batch, 1, 16, bart.config.d_model), torch.ones(batch, 16, dtype=torch.bool)
    )

    def allowed(_, sent):
        prefix = [t - o for t, o in zip(sent.tolist()[1:], offsets)]
        return [t + offsets[len(prefix)] for t in trie.children(prefix)]

    def ours(model, **more):
        return beam_search(model, query, walk, beam=beam, **more)

    with torch.inference_mode():
        tokens, _ = generate(bart, query, beam, index.levels, allowed)
        found = ours(speller, scoring="children", limit=100 * beam)
        for q in range(batch):
            distinct = list(dict.fromkeys(map(tuple, found.codes[q][found.valid[q]].tolist())))
            assert distinct == [tuple((row - torch.tensor(offsets)).tolist()) for row in tokens[q]], "not the same top-k"
        taken = interleaved(
            {
                "generate + prefix function, fp32": lambda: generate(bart, query, beam, index.levels, allowed),
                "ours, fp32, the same scores": lambda: ours(speller, scoring="children"),
                "ours, fp32": lambda: ours(speller),
                "ours, fp32, early finish": lambda: ours(speller, finish=4 * beam),
                "ours, int8": lambda: ours(eighth),
                "ours, int8, early finish": lambda: ours(eighth, finish=4 * beam),
            },
            seconds=seconds, least=3,
        )  # fmt: skip
    base = taken["generate + prefix function, fp32"]
    table(
        f"search with one 2-layer decoder of width 256, {index.items:,} items, batch {batch}, beam {beam}",
        ("", "ms a query", "times faster"), [[k, 1e3 * v / batch, base / v] for k, v in taken.items()],
    )  # fmt: skip
    return {name: base / value for name, value in taken.items()}


def by_size(worlds: dict[int, tuple[Codes, ConstraintIndex]], seconds: float) -> dict[str, float]:
    """Search time at several corpus sizes, autoregressive (a decoder of the product's own) and one-shot."""
    from ace_core.generator import Generator

    runs = {}
    for items, (codes, index) in worlds.items():
        queries, _ = queries_near(np.concatenate([c for c in codes.codewords[1:2]]), BATCH)
        generator = Generator.from_codewords(GeneratorSettings(), codes.codewords)  # type: ignore[attr-defined]
        query = QueryBatch(torch.from_numpy(queries))
        walk = Walk([index])
        runs[f"beam, {items:,}"] = lambda g=generator, q=query, w=walk: beam_search(g, q, w, beam=BEAM)
        runs[f"one-shot, {items:,}"] = lambda g=generator, q=query, w=walk: one_shot_search(g, q, w, draft=200)
    return interleaved(runs, seconds=seconds)
