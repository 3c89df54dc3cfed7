"""Recall against the size of the gallery, the beam and the time of a query; reliability of the scores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ace_core.config import SearchSettings
from ace_core.evaluation import compare, exact_ranks
from benchmarks.retrieval_system import ONE_SHOT, VERIFIED, Queries, Spaces, System, World, beam_of

_QUERIES = 500
_BEAMS = (5, 10, 20, 50, 100)
_DRAFTS = (25, 50, 100, 200, 400)
_GALLERIES = (250, 500, 1000, 2000, 4000, 8000)
_TIMED = 64  # queries, one by one
_BINS = 8


def curves(world: World, spaces: Spaces, system: System, figures: dict[str, Any]) -> None:
    """Measure a fitted system and put the curves into ``figures["curves"]``: R@10 of unseen items throughout."""
    asked = _some(world.unseen, _QUERIES)
    everything, twins = np.arange(len(spaces.items)), world.data.twins
    galleries = []
    for size, rows in _nested(world, asked):
        rival = exact_ranks(spaces.tower_queries[asked.at], spaces.tower_items, asked.gold, gallery=rows, twins=twins)
        galleries.append({"gallery": size, "dual tower": _recall(rival), "ACE": _recall(system.ranks(asked, rows))})
        print(f"  {galleries[-1]}", flush=True)
    beams = []
    for width in _BEAMS:
        with_pool = _recall(system.ranks(asked, everything, beam_of(width)))
        without = _recall(system.ranks(asked, everything, beam_of(width, pool=0)))
        beams.append({"beam": width, "with the pool": with_pool, "beam alone": without})
        print(f"  {beams[-1]}", flush=True)
    modes = {f"one-shot, draft {d}": ONE_SHOT.model_copy(update={"draft": d}) for d in _DRAFTS}
    modes |= {f"verify, draft {d}": VERIFIED.model_copy(update={"draft": d}) for d in _DRAFTS[:4]}
    modes |= {f"beam {b}": beam_of(b) for b in _BEAMS[:4]}
    times = _milliseconds(system, asked, everything, modes)
    latency = [
        {"search": what, "milliseconds": times[what], "r10": _recall(system.ranks(asked, everything, s))}
        for what, s in modes.items()
    ]
    figures["curves"] = {
        "queries": len(asked.at), "gallery_sizes": galleries, "beams": beams, "latency": latency,
        "scoring": _scorings(system, asked, everything),
        "reliability": _reliability(world, system),
    }  # fmt: skip


def _scorings(system: System, asked: Queries, rows: np.ndarray) -> list[dict[str, Any]]:
    """A beam of 20 by what a token's probability is a share of: milliseconds of a query that comes alone (without the
    pool); R@1, R@5, R@10 as it is spelled, re-ranked, and ranked beside the pool; R@10 less that of the first."""
    settings = {s: beam_of(20).model_copy(update={"scoring": s}) for s in ("vocabulary", "children")}
    bare = {name: s.model_copy(update={"pool": 0}) for name, s in settings.items()}
    times = _milliseconds(system, asked, rows, bare)
    ranks = {
        name: {
            "not re-ranked": system.ranks(asked, rows, bare[name], alone=True),
            "beam alone": system.ranks(asked, rows, bare[name]),
            "with the pool": system.ranks(asked, rows, settings[name]),
        }
        for name in settings
    }
    lines = []
    for name, found in ranks.items():
        line: dict[str, Any] = {"scoring": name, "milliseconds": times[name]}
        for what, r in found.items():
            less = compare(r, ranks["vocabulary"][what], 10, groups=asked.gold, difference=True)
            line[what] = [round(float((r < k).mean()), 4) for k in (1, 5, 10)]
            line[f"{what}, less vocabulary"] = [round(x, 4) for x in (less.value, less.low, less.high)]
        lines.append(line)
        print(f"  {line}", flush=True)
    return lines


def _some(queries: Queries, most: int) -> Queries:
    step = max(1, -(-len(queries.at) // most))
    return Queries(queries.at[::step], queries.gold[::step])


def _recall(ranks: np.ndarray) -> float:
    return round(float((ranks < 10).mean()), 4)


def _nested(world: World, asked: Queries) -> list[tuple[int, np.ndarray]]:
    """Galleries that grow: the asked items, then others in one random order."""
    total = len(world.data.split)
    own = np.unique(asked.gold)
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(total), own))
    sizes = sorted({min(size, total) for size in _GALLERIES if min(size, total) >= len(own)})
    return [(size, np.sort(np.concatenate([own, others[: size - len(own)]]))) for size in sizes]


def _milliseconds(
    system: System, asked: Queries, rows: np.ndarray, modes: Mapping[str, SearchSettings]
) -> dict[str, float]:
    """Median time of one query in each mode, its text encoded already and the gallery built, on one thread. Modes take
    turns, so that a busy machine slows all of them alike."""
    ready = system.ready(rows)
    times: dict[str, list[float]] = {what: [] for what in modes}
    for at in asked.at[:_TIMED]:
        query = system.batch(np.array([at]))
        for what, settings in modes.items():
            begin = time.perf_counter()
            system.search(ready, query, settings)
            times[what].append(time.perf_counter() - begin)
    return {what: round(1000 * float(np.median(t)), 3) for what, t in times.items()}


def _reliability(world: World, system: System) -> list[dict[str, float]]:
    """What the best answers' probabilities promise, and how many are right: test queries, unseen and seen."""
    promised, right = [], []
    for asked in (_some(world.unseen, _QUERIES), _some(world.seen, _QUERIES)):
        found, rows, similar = system.find(asked.at, np.arange(len(system.vectors)), ONE_SHOT)
        score = system.ranker.score(found.log_prob, similar, found.valid)
        best = score.argmax(1)
        at = np.arange(len(best))
        promised.append(system.ranker.probability(score, similar)[at, best])
        right.append(system.right(rows, asked.gold)[at, best])
    p, hit = np.concatenate(promised), np.concatenate(right)
    order = np.argsort(p)
    return [
        {"promised": round(float(p[part].mean()), 4), "right": round(float(hit[part].mean()), 4), "queries": len(part)}
        for part in np.array_split(order, _BINS)
        if len(part)
    ]
