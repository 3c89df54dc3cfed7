"""The server under load, overload and faults, against the bare retriever and against FAISS IVF behind the same ingress.

    python -m benchmarks.serving [--quick] [--items N] [--only PHASE] [--proxy] [--json FILE] [--cache FOLDER]

One machine holds clients, ingress and replicas, so figures are of all of them together; a table says whose CPU a search
took. The ingress listens by itself, as `ace serve` has it; with ``--proxy`` it stands behind Ray Serve's proxy, as
`serve deploy` has it. Identifiers are synthetic, texts all different. The rival reads the same texts through the same
encoder, aligner, batching, ingress and answers; only the search differs: IVF with 8-bit vectors (nprobe 8).

Phases: ``load`` (1, 8 and 32 users), ``overload`` (twice what 32 users get), ``autoscaling`` (up), ``faults``, and
``autoscaling`` again (down); each in a sibling module, all on one server. Unloaded means arrivals at half of what the
server can do. Quickly, only ``load`` and ``faults`` are measured; ``--quick --only PHASE`` measures the others.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster

from ace_core.retriever import Retriever
from benchmarks import serving_autoscaling, serving_faults, serving_overload
from benchmarks.measure import table, write_figures
from benchmarks.serving_faults import Judge
from benchmarks.serving_load import ROLES, batches, closed_loop, text_of
from benchmarks.serving_rival import MARK, build_ivf
from benchmarks.serving_server import Server
from benchmarks.serving_store import build

_PHASES = ("load", "overload", "faults", "autoscaling")
_QUICK_PHASES = ("load", "faults")
_USERS = (1, 8, 32)
_QUANTILES = (0.5, 0.95, 0.99)
_OBJECT_STORE = 100_000_000


def in_process(store: Path, seconds: float) -> np.ndarray:
    """Seconds of single searches with the bare retriever."""
    retriever = Retriever.open(store, verify=False)
    rng = np.random.default_rng(1)
    retriever.search([text_of(rng)], k=10)
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        text, started = text_of(rng), time.perf_counter()
        retriever.search([text], k=10)
        taken.append(time.perf_counter() - started)
    return np.array(taken)


def under_load(address: str, bare: np.ndarray, seconds: float) -> dict[str, float]:
    """Load on ACE and on the rival, beside what the bare retriever took."""
    alone = [float(np.quantile(bare, q) * 1000) for q in _QUANTILES]
    figures = {"in_process_p50_ms": alone[0]}
    rows: list[tuple] = [("in process", 1, *alone, float(1 / bare.mean()), 0, 0)]
    spent: list[tuple] = []
    for name, mark in (("IVF-SQ8", MARK), ("ACE", "")):
        texts = partial(_marked, mark)
        closed_loop(address, 4, 0.5, texts=texts)  # not counted
        for users in _USERS:
            load = closed_loop(address, users, seconds, texts=texts)
            times = [load.quantile(q) for q in _QUANTILES]
            rows.append((name, users, *times, load.throughput, load.statuses[429], load.unexplained))
            spent.append((name, users, *load.cpu_each))
            if not mark:
                figures |= {f"p{int(q * 100)}_ms_{users}": ms for q, ms in zip(_QUANTILES, times)}
                figures[f"throughput_{users}"] = load.throughput
            elif users == 1:
                figures["ivf_p50_ms_1"] = times[0]
    header = ("server", "users", "p50 ms", "p95 ms", "p99 ms", "200/s", "429", "other")
    table("load", header, rows)
    table("CPU ms of a search", ("server", "users", *ROLES), spent)
    table("queries decoded together, of both", ("up to", "batches"), batches(address))
    figures["serving_overhead"] = figures["p50_ms_1"] / figures["in_process_p50_ms"]
    figures["vs_ivf_behind_same_ingress"] = figures["p50_ms_1"] / figures["ivf_p50_ms_1"]
    return figures


def _marked(mark: str, rng: np.random.Generator) -> str:
    return mark + text_of(rng)


def start_cluster(nodes: int) -> Cluster:
    """Nodes on this machine; one CPU each, as Ray counts them, and one more for the first."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    return cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5,000 items, two nodes, short load and faults")
    parser.add_argument("--items", type=int, default=None, help="items of the snapshot (1,000,000)")
    parser.add_argument("--only", choices=_PHASES, default=None, help="one phase (overload includes load)")
    parser.add_argument("--proxy", action="store_true", help="behind Ray Serve's proxy (load and overload)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--cache", type=Path, default=None, help="keep the store here")
    chosen = parser.parse_args()
    items = chosen.items or (5_000 if chosen.quick else 1_000_000)
    nodes = 2 if chosen.quick else 3
    phases = (chosen.only,) if chosen.only else _QUICK_PHASES if chosen.quick else _PHASES
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        store = (chosen.cache or Path(folder)) / f"store-{items}"
        building = beside.submit(prepare, store, items)
        cluster = start_cluster(nodes)
        try:
            snapshot = building.result()
            judging = beside.submit(Judge.of, store, snapshot)  # while the server starts
            machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}"
            print(f"{machine}; {items:,} items, snapshot {snapshot}; Ray {ray.__version__}, {nodes} nodes here")
            if phases == _QUICK_PHASES:
                print("left out of the quick form: overload, autoscaling")
            figures = measure(store, snapshot, judging, nodes, phases, chosen)
        finally:
            ray.shutdown()
            cluster.shutdown()
    write_figures(chosen.json, figures)


def prepare(store: Path, items: int) -> str:
    """The snapshot, and the rival's index beside it."""
    snapshot = build(store, items)
    build_ivf(store, items)
    return snapshot


def measure(
    store: Path,
    snapshot: str,
    judging: Future[Judge],
    nodes: int,
    phases: Sequence[str],
    chosen: argparse.Namespace,
) -> dict[str, float]:
    """The phases, on one server; each finds the replicas that the one before it leaves."""
    quick = chosen.quick
    figures: dict[str, float] = {}
    loaded = bool({"load", "overload"} & set(phases))
    seconds = 0.6 if quick else 10.0
    first = 1 if loaded or "autoscaling" in phases else nodes
    server = Server(store, replicas=first, proxies=chosen.proxy)
    judge = judging.result()
    if loaded:
        figures |= under_load(server.address, in_process(store, seconds), seconds)
    if "overload" in phases:
        figures |= serving_overload.measure(server.address, figures["throughput_32"], 4.0 if quick else 60.0)
    if "autoscaling" in phases:
        figures |= serving_autoscaling.up(server, nodes)
    if "faults" in phases:
        lasting, every = (6.0, 6.0) if quick else (60.0, 8.0)
        figures |= serving_faults.measure(server, judge, store, snapshot, lasting, every, replicas=nodes)
    if "autoscaling" in phases:
        figures |= serving_autoscaling.down(server, nodes, 1.0 if quick else 15.0)
    return figures


if __name__ == "__main__":
    main()
