"""The server under load, against the bare retriever and against FAISS IVF behind the same ingress.

    python -m benchmarks.serving [--quick] [--items N] [--json FILE] [--cache FOLDER]

One machine holds clients, ingress and replica, so figures are of all of them together. Texts are all different. The
rival reads the same texts through the same encoder, aligner, batching, ingress and page; only the search differs:
IVF with 8-bit vectors (nprobe 8).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import faiss
import httpx
import numpy as np
import ray
import torch

from ace_core.config import ServeSettings, Settings
from ace_core.query import Hit, SearchRequest
from ace_core.retriever import Retriever
from benchmarks.measure import table, write_figures
from benchmarks.serving_store import build, vectors
from serve import app
from serve.replica import Searcher

_WORDS = """
red green blue small large old new wooden metal quiet loud slow fast bright dark round square apple car dog cat bird
tree house river piano guitar drum bell rain wind fire street door window child woman man boat train
""".split()  # noqa: SIM905
_IVF_NAME = "rival.faiss"


class IvfRetriever(Retriever):
    """The same queries, answered by IVF over vectors instead of a generator over identifiers."""

    def search_batch(self, requests: list[SearchRequest]) -> list[list[Hit]]:  # type: ignore[override]
        if not hasattr(self, "_ivf"):
            self._ivf = faiss.read_index(str(self.snapshot.store / _IVF_NAME))
            faiss.ParameterSpace().set_index_parameter(self._ivf, "nprobe", 8)
            faiss.omp_set_num_threads(1)
        vector = self.encode_texts([r.text or "" for r in requests]).vector.numpy()
        k = max(r.k or self.settings.k for r in requests)
        scores, rows = self._ivf.search(vector, k)
        segment = self.snapshot.segments[0]
        answers = []
        for request, row_scores, row_ids in zip(requests, scores, rows):
            hits = []
            for score, row in list(zip(row_scores, row_ids))[: request.k or self.settings.k]:
                item = segment.item(int(row))
                hits.append(
                    Hit(
                        item_id=item.item_id, score=float(score), modality=item.modality, uri=item.uri, mime=item.mime,
                        captions=item.captions, attributes=item.attributes, identifier=item.identifier,
                        log_prob=0.0, similarity=float(score), level_probs=(1.0,) * len(item.identifier),
                    )
                )  # fmt: skip
            answers.append(hits)
        return answers


class IvfSearcher(Searcher):
    """A replica whose engine searches with :class:`IvfRetriever`."""

    def __init__(self, *args) -> None:
        from serve import engine

        engine.Retriever = IvfRetriever  # type: ignore[misc]
        super().__init__(*args)


def build_ivf(store: Path, items: int, dim: int) -> None:
    """Write the rival's index beside the store's parts."""
    lists = 4096 if items >= 500_000 else 256
    index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    blocks = vectors(items, dim)
    first = next(blocks)
    index.train(first)
    index.add(first)
    for block in blocks:
        index.add(block)
    faiss.write_index(index, str(store / _IVF_NAME))


@dataclass(frozen=True)
class Load:
    """What a load got: seconds of each answered search, and the statuses of all."""

    seconds: np.ndarray
    statuses: Counter[int]
    wall: float

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        return float(np.quantile(self.seconds, q) * 1000) if len(self.seconds) else float("nan")

    @property
    def throughput(self) -> float:
        """Searches answered with hits, a second."""
        return len(self.seconds) / self.wall


def _text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(_WORDS, 5))


async def _one(client: httpx.AsyncClient, text: str, seconds: list[float], statuses: Counter[int]) -> int:
    """Ask one search; returns the status, 0 when there was no answer."""
    started = time.perf_counter()
    try:
        status = (await client.post("/v1/search", json={"text": text, "k": 10})).status_code
    except httpx.HTTPError:
        status = 0
    statuses[status] += 1
    if status == 200:
        seconds.append(time.perf_counter() - started)
    return status


def closed_loop(address: str, users: int, duration: float) -> Load:
    """``users`` ask one search after another; who is told to come back waits half a second."""

    async def run() -> Load:
        seconds: list[float] = []
        statuses: Counter[int] = Counter()
        limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)
        async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as client:
            end = time.perf_counter() + duration

            async def user(number: int) -> None:
                rng = np.random.default_rng(number)
                while time.perf_counter() < end:
                    if await _one(client, _text(rng), seconds, statuses) == 429:
                        await asyncio.sleep(0.5)

            started = time.perf_counter()
            await asyncio.gather(*(user(n) for n in range(users)))
            return Load(np.array(seconds), statuses, time.perf_counter() - started)

    return asyncio.run(run())


def open_loop(address: str, rate: float, duration: float) -> Load:
    """Searches arrive ``rate`` times a second, whether the ones before are answered or not."""

    async def run() -> Load:
        seconds: list[float] = []
        statuses: Counter[int] = Counter()
        rng = np.random.default_rng(0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
            started = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for n in range(int(rate * duration)):
                    await asyncio.sleep(max(0.0, started + n / rate - time.perf_counter()))
                    group.create_task(_one(client, _text(rng), seconds, statuses))
            return Load(np.array(seconds), statuses, time.perf_counter() - started)

    return asyncio.run(run())


def in_process(store: Path, seconds: float) -> np.ndarray:
    """Seconds of single searches with the bare retriever."""
    retriever = Retriever.open(store, verify=False)
    rng = np.random.default_rng(1)
    retriever.search([_text(rng)], k=10)
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        text, started = _text(rng), time.perf_counter()
        retriever.search([text], k=10)
        taken.append(time.perf_counter() - started)
    return np.array(taken)


def replica_memory() -> float:
    """Resident megabytes of the decoding replicas (from /proc, so 0 where there is none)."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"Searcher" in (folder / "cmdline").read_bytes()[:60]:
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        except OSError:  # it ended meanwhile
            continue
    return total


def batches(address: str) -> list[tuple[str, int]]:
    """Histogram of queries decoded together: (up to, batches)."""
    rows, before = [], 0.0
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        if line.startswith("ace_batch_queries_bucket"):
            label, value = line.partition('le="')[2].partition('"')[0], float(line.split()[-1])
            if value > before:
                rows.append((label, int(value - before)))
            before = value
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 items, under two minutes")
    parser.add_argument("--items", type=int, default=None, help="items of the snapshot (1,000,000)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--cache", type=Path, default=None, help="keep the store here")
    chosen = parser.parse_args()
    items = chosen.items or (100_000 if chosen.quick else 1_000_000)
    seconds = 5.0 if chosen.quick else 20.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = (chosen.cache or Path(folder)) / f"store-{items}"
        snapshot = build(store, items)
        if not (store / _IVF_NAME).exists():
            build_ivf(store, items, Retriever.open(store, verify=False).encode_texts(["a"]).vector.shape[1])
        print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; snapshot {snapshot}, {items:,} items")
        write_figures(chosen.json, measure(store, seconds, overload_seconds=2 * seconds if chosen.quick else 60))


def measure(store: Path, seconds: float, overload_seconds: float) -> dict[str, float]:
    """All figures, printed as tables on the way."""
    bare = in_process(store, seconds)
    figures = {"in_process_p50_ms": float(np.median(bare) * 1000)}
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    settings = Settings(store=str(store), serve=ServeSettings(port=0, watch_seconds=30))
    p50: dict[str, float] = {}
    alone = [float(np.quantile(bare, q) * 1000) for q in (0.5, 0.95, 0.99)]
    rows: list[tuple] = [("in process", 1, *alone, float(1 / bare.mean()), 0)]
    for name, replica in (("ACE", Searcher), ("IVF-SQ8", IvfSearcher)):
        address = app.run(settings, blocking=False, on_ready=lambda _: None, replica=replica)
        closed_loop(address, 4, 2)
        for users in (1, 8, 32):
            load = closed_loop(address, users, seconds)
            rows.append(
                (name, users, *(load.quantile(q) for q in (0.5, 0.95, 0.99)), load.throughput, load.statuses[429])
            )
            if replica is Searcher:
                figures |= {f"p{int(q * 100)}_ms_{users}": load.quantile(q) for q in (0.5, 0.95, 0.99)}
                figures[f"throughput_{users}"] = load.throughput
            p50[f"{name} {users}"] = load.quantile(0.5)
        if replica is Searcher:
            table("queries decoded together", ("up to", "batches"), batches(address))
            figures |= overload(address, figures, overload_seconds)
        app.stop()
    table("load", ("server", "users", "p50 ms", "p95 ms", "p99 ms", "answered/s", "429"), rows)
    figures["serving_overhead"] = figures["p50_ms_1"] / figures["in_process_p50_ms"]
    figures["vs_ivf_behind_same_ingress"] = p50["ACE 1"] / p50["IVF-SQ8 1"]
    return figures


def overload(address: str, figures: dict[str, float], duration: float) -> dict[str, float]:
    """Twice what the server can do."""
    before = replica_memory()
    load = open_loop(address, 2 * figures["throughput_32"], duration)
    rows = [(str(status), count) for status, count in sorted(load.statuses.items())]
    table(f"2x overload for {duration:g} s", ("status", "searches"), rows)
    return {
        "overload_non_200_429": float(sum(n for status, n in load.statuses.items() if status not in (200, 429))),
        "overload_p99_ms": load.quantile(0.99),
        "overload_p99_ratio": load.quantile(0.99) / figures["p99_ms_32"],
        "overload_memory_growth_mb": replica_memory() - before,
    }


if __name__ == "__main__":
    main()
