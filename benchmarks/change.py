"""Items that came after the fit: what `ace add` finds of them, against items that were there, and against a full refit.

A part of the set is left out of everything (aligner, codebooks, captions), then added through the frozen models into a
second segment, as `ace add` does; 1 %, 10 % and 50 % of what was there. Asked is in the gallery of everything. The
rivals, in the same run: the same search after a full refit on everything (whose aligner did train on captions of the
added items), and the frozen dual tower with exact search. The search is the default one with the generator's heads at
their start (they are the codebooks), so that what is measured is the space, the codes and the index.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ace_core.aligner import CaptionPairs
from ace_core.aligner_training import fit_aligner
from ace_core.config import AlignerSettings, GeneratorSettings, QuantizerSettings, SearchSettings
from ace_core.decoding import search_candidates
from ace_core.evaluation import MISSED, compare, compare_unpaired, exact_ranks, ranks_in, summarise
from ace_core.generator.model import Generator
from ace_core.identifiers import sort_order
from ace_core.items import Modality
from ace_core.quantize.fit import fit_quantizer
from ace_core.query import QueryBatch
from ace_core.scoring import Gallery, similarity
from ace_core.walk import Walk
from benchmarks.measure import table
from benchmarks.retrieval_data import DataSet, load_sets, text_table

SHARES = (0.01, 0.10, 0.50)  # added, as a share of what was there
DEPTH = 10
_BATCH = 64


@dataclass(frozen=True)
class Asked:
    """Captions as queries: their rows among all captions, and the items they describe."""

    at: np.ndarray
    gold: np.ndarray


class System:
    """Everything fitted to some items of a set, and all of its items indexed: those in one segment, the others, which
    come later, in another."""

    def __init__(
        self,
        data: DataSet,
        pooled: np.ndarray,
        there: np.ndarray,
        aligner: AlignerSettings,
        quantizer: QuantizerSettings,
    ) -> None:
        begin = time.perf_counter()
        rows = np.flatnonzero(there)
        place = np.cumsum(there) - 1
        trained = there & (data.split == "train")
        kept = data.position == _last(data)
        train = np.flatnonzero(trained[data.rows] & ~kept)
        validate = np.flatnonzero(there[data.rows] & ((data.split == "val")[data.rows] | (trained[data.rows] & kept)))
        starts = np.cumsum([0, *(len(f) for f in data.features.values())])
        part: dict[Modality, np.ndarray] = {
            m: f[there[start : start + len(f)]] for (m, f), start in zip(data.features.items(), starts)
        }

        def pairs(chosen: np.ndarray) -> CaptionPairs:
            return CaptionPairs(pooled[chosen], place[data.rows[chosen]])

        model, _ = fit_aligner(part, pairs(train), aligner, validation=pairs(validate))
        self.queries = model.text_vectors(pooled)
        # What the index knows of an item are the captions it was trained with: of the added ones, none.
        self.items = model.item_vectors(data.features, CaptionPairs(pooled[train], data.rows[train]))
        self.quantizer, _ = fit_quantizer(self.items[rows], data.tokens[rows], quantizer, queries=self.queries[train])
        codes = self.quantizer.assign(self.items, data.tokens)
        errors = np.square(self.items - self.quantizer.reconstruct(codes)).sum(1)
        self.error_ratio = float(errors[~there].mean() / errors[rows].mean()) if (~there).any() else 1.0
        self.galleries, self.rows = [], []
        for members in (rows, np.flatnonzero(~there)):
            if len(members):
                order = members[sort_order(codes[members], self.quantizer.vocab_sizes)]
                self.galleries.append(Gallery.build(codes[order], self.quantizer, self.items[order]))
                self.rows.append(order)
        self.walk = Walk([g.index for g in self.galleries])
        self.generator = Generator(GeneratorSettings(), self.quantizer, pooled.shape[1], 1).eval()
        with torch.inference_mode():
            parts = [model.tower_item(m, torch.from_numpy(f)).numpy() for m, f in data.features.items()]
        self.tower = np.concatenate(parts)
        self.seconds = time.perf_counter() - begin

    @torch.inference_mode()
    def ranks(self, asked: Asked) -> np.ndarray:
        """Rank of each query's item by the served path: drafted identifiers, ranked by 8-bit vectors."""
        out = []
        for start in range(0, len(asked.at), _BATCH):
            queries = self.queries[asked.at[start : start + _BATCH]]
            found = search_candidates(
                self.generator, QueryBatch(torch.from_numpy(queries)), self.walk, settings=SearchSettings()
            )
            scores = np.where(found.valid, similarity(queries, found, self.galleries, self.quantizer), -np.inf)
            top = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
            items = np.full(found.valid.shape, -1, np.int64)
            for number, rows in enumerate(self.rows):
                here = found.valid & (found.segment == number)
                items[here] = rows[found.row[here]]
            out.append(np.take_along_axis(items, top, 1))
        return ranks_in(np.concatenate(out), asked.gold)

    def tower_ranks(self, asked: Asked) -> np.ndarray:
        """The same by the two heads alone, with exact search."""
        ranks = exact_ranks(self.queries[asked.at, :-1], self.tower, asked.gold)
        return np.where(ranks < DEPTH, ranks, MISSED)


def _last(data: DataSet) -> np.ndarray:
    """(C,) the place of the last caption of each caption's item."""
    counts = np.bincount(data.rows, minlength=len(data.split))
    return counts[data.rows] - 1


def _asked(data: DataSet, chosen: np.ndarray, most: int) -> Asked:
    """Queries about some items (N,) bool: all captions of test items, the kept one of the others."""
    kept = (data.position == _last(data)) | (data.split == "test")[data.rows]
    at = np.flatnonzero(chosen[data.rows] & kept)
    if len(at) > most:
        at = np.sort(np.random.default_rng(0).choice(at, most, replace=False))
    return Asked(at, data.rows[at])


def measure(data: DataSet, pooled: np.ndarray, settings: dict[str, Any], most: int, resamples: int) -> dict[str, Any]:
    """All shares against one refit."""
    figures: dict[str, Any] = {}
    lines: list[list[Any]] = []
    everything = np.ones(len(data.split), bool)
    refit = System(data, pooled, everything, **settings)
    print(f"  refit on {len(data.split):,} items: {refit.seconds:.0f} s", flush=True)
    order = np.random.default_rng(1).permutation(len(data.split))
    test = data.split == "test"
    for share in SHARES:
        count = max(1, round(len(order) * share / (1 + share)))
        added = np.zeros(len(order), bool)
        added[order[:count]] = True
        frozen = System(data, pooled, ~added, **settings)
        name = f"{100 * share:g}"
        kinds = {
            "added": _asked(data, added, most),
            "added, test split": _asked(data, added & test, most),
            "present, never trained": _asked(data, ~added & test, most),
            "present, trained": _asked(data, ~added & (data.split == "train"), most),
        }
        ranks: dict[tuple[str, str], np.ndarray] = {}
        for kind, asked in kinds.items():
            if not len(asked.at):
                continue
            methods = {
                "added to frozen models": frozen.ranks(asked),
                "full refit": refit.ranks(asked),
                "frozen dual tower, exact": frozen.tower_ranks(asked),
            }
            for method, found in methods.items():
                ranks[kind, method] = found
                r = summarise(found, len(order), groups=asked.gold, resamples=resamples)
                recalls = [
                    f"{100 * i.value:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]" for i in (r.recall_1, r.recall_10)
                ]
                lines.append([f"+{name} %", kind, method, len(asked.at), *recalls])
                figures[f"{kind.replace(', ', '_').replace(' ', '_')}_r10_{method.split()[0]}_{name}"] = (
                    r.recall_10.value
                )
        ours = {kind: ranks[kind, "added to frozen models"] for kind, _ in ranks}
        difference = compare_unpaired(ours["added"], ours["present, never trained"], 10, resamples=resamples)
        _note(figures, f"added_minus_present_r10_{name}", difference)
        ratio = compare(
            ours["added"], ranks["added", "full refit"], 10, groups=kinds["added"].gold, resamples=resamples
        )
        _note(figures, f"added_over_refit_r10_{name}", ratio)
        figures[f"error_ratio_{name}"] = frozen.error_ratio
        print(
            f"  +{name} %: {count} items added to {len(order) - count:,}; fitted in {frozen.seconds:.0f} s", flush=True
        )
    title = f"{data.name}, gallery of all {len(order):,} items, recall in %; {os.cpu_count()} CPU cores"
    table(title, ("added", "asked about", "method", "queries", "R@1", "R@10"), lines)
    return figures


def _note(figures: dict[str, Any], name: str, interval: Any) -> None:
    figures[name] = round(interval.value, 4)
    figures[f"{name}_interval"] = [round(interval.low, 4), round(interval.high, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--set", default="flickr8k", help="which set")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/features"), help="folder for features computed on the way"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="a small part of the set")
    parser.add_argument("--queries", type=int, default=2000, help="queries of each kind at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache: Path = args.cache
    cache.mkdir(parents=True, exist_ok=True)
    data = load_sets(args.data, args.set, cache, most=80 if args.quick else None)
    pooled = text_table(data.captions, cache).pooled
    aligner, quantizer = AlignerSettings(), QuantizerSettings()
    if args.quick:
        aligner = aligner.model_copy(update={"epochs": 5, "batch_size": 128})
        quantizer = quantizer.model_copy(update={"coarse": 16, "fine_codes": 32, "epochs": 2})
        args.queries = min(args.queries, 200)
    settings = {"aligner": aligner, "quantizer": quantizer}
    figures = measure(data, pooled, settings, args.queries, 200 if args.quick else 1000)
    table("figures", ("name", "value"), [(k, v) for k, v in figures.items() if not k.endswith("_interval")])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
