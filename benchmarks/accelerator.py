"""The decoder on an accelerator against the usual ways, on one device in one run.

    python -m benchmarks.accelerator [--quick] [--json FILE] [--device cuda|cpu] [--cache FOLDER]

Searches and steps are captured as CUDA graphs wherever they can be, the rivals' as well; what is timed has come to its
end on the device. With ``--device cpu`` the same tensor operations run on a CPU, uncaptured: that shows that they are
right and what they move, and says nothing about a GPU (nor about ACE on a CPU, which takes compiled kernels:
``benchmarks.decoding``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ace_core.constraint import ConstraintIndex
from ace_core.filters import ItemMask
from ace_core.plan import Plan, Spelling
from ace_core.query import QueryBatch
from ace_core.replay import CudaGraphs, Replay
from ace_core.tensor_walk import TensorWalk
from benchmarks.bart import BartSpeller
from benchmarks.clustered import Codes, World, coded, queries_near
from benchmarks.measure import interleaved, table, write_figures
from benchmarks.rivals import DictTrie, StaticIndex, prefix_function_step
from benchmarks.same_weights import Rival, TableSpeller, top_k

BATCH, BEAM = 32, 20
BATCHES = (1, 4, 16, 32)
_ON_CPU = "THE ACCELERATOR'S FORM ON A CPU, no measure of a GPU"
_WITHOUT = (
    "torch {version} finds no GPU here. On a machine with an NVIDIA GPU, install a build of torch with CUDA "
    "(`pip install torch`, without the CPU index) and run this again; `--device cpu` runs the same operations on a CPU."
)


class Traffic(TorchDispatchMode):
    """Counts what operations there are (views are none), and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in read}
        if all(t.untyped_storage().data_ptr() in places for t in written):
            return out
        self.operations += 1
        # a gather reads as much of its table as it writes
        most = max(t.numel() for t in written) if operation.__name__.startswith(("index", "gather")) else None
        self.bytes += sum(t.nbytes for t in written)
        self.bytes += sum(t.element_size() * (t.numel() if most is None else min(most, t.numel())) for t in read)
        return out


class Device:
    """Where all runs, and how a run is captured and waited for there."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"
        self.title = torch.cuda.get_device_name() if self.is_gpu else _ON_CPU
        self.prefix = "gpu" if self.is_gpu else "tensors_on_cpu"

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return CudaGraphs(self.torch)(run) if self.is_gpu else run

    def timed(self, runs: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, float]:
        """Median seconds of each run, until the device has done it."""

        def to_its_end(run: Callable[[], Any]) -> None:
            run()
            if self.is_gpu:
                torch.cuda.synchronize()

        return interleaved({name: partial(to_its_end, run) for name, run in runs.items()}, seconds=seconds, least=least)


class ReadByBart:
    """A speller as :class:`~ace_core.replay.Replay` asks for it, and for nothing but beams."""

    def __init__(self, speller: BartSpeller, query: QueryBatch) -> None:
        self.vocab_sizes, self.vector = speller.vocab_sizes, query.vector
        self.start, self.step, self.score = speller.start, speller.step, speller.score

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        raise NotImplementedError("BART has no one-shot heads")


def constraint_step(
    codes: Codes, walk: TensorWalk, trie: DictTrie, queries: np.ndarray, device: Device, seconds: float
) -> tuple[dict[str, float], int]:
    """Seconds of one step (mean over levels) of each way; device bytes of STATIC's index."""
    speller = TableSpeller(codes, queries, BEAM)
    tables, noisy = ([t.to(device.torch) for t in given] for given in (speller.tables, speller.noisy))
    index = ConstraintIndex.build(codes.codes, codes.vocab_sizes, len(codes.vocab_sizes) - 1)
    static, rival = StaticIndex(index, device.torch), prefix_function_step(trie, BEAM)
    some = walk.masks([ItemMask.of(np.random.default_rng(0).random(len(codes.codes)) < 0.01)], BATCH)
    rows, filtered = (walk.expand(walk.root(BATCH), tables[0][:, None], BEAM, masks) for masks in (None, some))
    states, totals, lines = rows.codes[..., 0], {}, []  # type: ignore[var-annotated]
    moved: dict[str, list[float]] = {}
    for level in range(1, walk.levels):
        log_probs = noisy[level][:, : rows.score.shape[1]].contiguous()
        of_filtered = noisy[level][:, : filtered.score.shape[1]].contiguous()
        prefixes = rows.codes.flatten(0, 1)
        runs: dict[str, Callable[[], Any]] = {
            "ours": partial(walk.expand, rows, log_probs, BEAM, None),
            "filtered 1 %": partial(walk.expand, filtered, of_filtered, BEAM, some),
            "STATIC gather": partial(static.step, level, states, rows.score, log_probs, BEAM),
            "unmasked top-k": partial(top_k, rows.score, log_probs, BEAM),
        }
        for name, run in runs.items():
            with Traffic() as traffic:
                run()
            moved.setdefault(name, []).append(traffic.bytes / 1e6)
            moved.setdefault(f"{name}, operations", []).append(traffic.operations)
        following, theirs = runs["ours"](), runs["STATIC gather"]()
        filtered = runs["filtered 1 %"]()
        rival_run = partial(rival, prefixes, rows.score, log_probs)
        for best in (rival_run()[0], theirs[0]):
            assert torch.allclose(best, following.score, atol=1e-3), "another top-k than the rivals'"
        captured = {name: device.captured(run) for name, run in runs.items()}
        taken = device.timed(captured | {"prefix function": rival_run}, seconds / (walk.levels - 1), least=3)
        for name, value in taken.items():
            totals[name] = totals.get(name, 0.0) + value / (walk.levels - 1)
        lines.append([f"level {level}", *(1e3 * taken[name] for name in totals)])
        rows, states = following, theirs[3]
    lines.append(["mean", *(1e3 * v for v in totals.values())])
    table(f"constraint step, {len(codes.codes):,} items, batch {BATCH} x beam {BEAM}, ms", ("", *totals), lines)
    table(
        "what a step's operations read and write, MB (mean over levels), and their number",
        ("", "MB", "operations"),
        [[name, float(np.mean(moved[name])), float(np.mean(moved[f"{name}, operations"]))] for name in runs],
    )
    return totals, static.nbytes


def against_generate(
    codes: Codes, walk: TensorWalk, trie: DictTrie, batch: int, device: Device, seconds: float
) -> dict[str, float]:
    """Seconds a batch of generate with a prefix function, and of ours: as it comes, and replayed.

    Ours is asserted to find generate's top-k in its order.
    """
    rival = Rival(codes, trie, batch, BEAM, device.torch)
    plan: Plan = (Spelling("beam", BEAM, "children"),)
    read = partial(ReadByBart, rival.speller)
    uncaptured, replay = Replay(read, walk, limit=0), Replay(read, walk)
    with torch.inference_mode():
        for one in (uncaptured, replay, replay, replay):  # as it comes, captured, replayed
            rival.check(one.search(rival.query, None, plan)[1])
        assert uncaptured.captures == 0 and replay.captures == 1, "the search was not captured; the log says why"
        runs: dict[str, Callable[[], Any]] = {
            "generate + prefix function": rival.search,
            "ours, as it comes": partial(uncaptured.search, rival.query, None, plan),
            "ours, replayed": partial(replay.search, rival.query, None, plan),
        }
        return device.timed(runs, seconds, least=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100k items, fewer batch sizes on a CPU, under a minute")
    parser.add_argument("--items", type=int, help="corpus size (default 1M; 100k with --quick)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU")
    parser.add_argument("--json", type=Path, help="write the named figures to this file")
    parser.add_argument("--cache", type=Path, help="folder that keeps identifiers for the next run")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(_WITHOUT.format(version=torch.__version__))
    device = Device(options.device or "cuda")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    items = options.items or (100_000 if options.quick else 1_000_000)
    seconds = 3.0 if options.quick else 20.0
    print(f"{device.title} (torch {torch.__version__})")
    found = coded(World(), items, cache=options.cache)
    codes = Codes(found.codewords, np.unique(found.codes, axis=0), found.order)  # rivals know no shared identifiers
    walk = TensorWalk([ConstraintIndex.build(codes.codes, codes.vocab_sizes)], device.torch)
    trie = DictTrie(codes.codes)
    x, _ = next(World().vectors(2000))
    with torch.inference_mode():
        step, static_bytes = constraint_step(codes, walk, trie, queries_near(x, BATCH)[0], device, seconds)
    count, figures, lines = len(codes.codes), {}, []
    for batch in BATCHES[:2] if options.quick and not device.is_gpu else BATCHES:
        taken = against_generate(codes, walk, trie, batch, device, seconds)
        rival, uncaptured, replayed = taken.values()
        lines.append([batch, *(1e3 * s / batch for s in taken.values()), rival / uncaptured, rival / replayed])
        figures[f"ar_vs_generate_{device.prefix}_batch_{batch}"] = rival / replayed
        figures[f"replayed_vs_as_it_comes_{device.prefix}_batch_{batch}"] = uncaptured / replayed
    table(
        f"the same top-{BEAM} by one 2-layer decoder of width 256, {count:,} items, ms a query: {device.title}",
        ("batch", *taken, "times faster", "replayed"),
        lines,
    )
    sizes = {"ours": walk.nbytes / count, "STATIC": static_bytes / count, "a mask of ours": walk.mask_bytes / count}
    table("bytes an item on the device", ("", "bytes"), list(sizes.items()))
    ours = step["ours"]
    figures |= {
        f"constraint_vs_prefix_fn_{device.prefix}": step["prefix function"] / ours,
        f"constraint_vs_static_{device.prefix}": step["STATIC gather"] / ours,
        f"constraint_vs_unmasked_topk_{device.prefix}": step["unmasked top-k"] / ours,
        f"filtered_1pct_vs_unfiltered_{device.prefix}": step["filtered 1 %"] / ours,
        "device_bytes_per_item": sizes["ours"],
        "device_bytes_vs_static": sizes["STATIC"] / sizes["ours"],
        "items": count,
    }
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
