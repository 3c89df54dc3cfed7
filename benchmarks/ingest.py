"""Ingestion against a bare encoder loop over the same files, its scaling, its memory, and what it does with bad files.

    python -m benchmarks.ingest [--quick] [--json FILE] [--parts overhead,scaling,memory,corrupt] [--folder FOLDER]
        [--images N] [--sounds N] [--clips N] [--tiny N] [--good N] [--bad N] [--rounds N]

*Overhead*: seconds of ``ace ingest`` over those of a loop that reads, decodes and encodes the same files in as many
processes as ingestion has encoders, minus one; both with the start of their processes and the loading of the encoder,
without Ray's own start. *Steady* leaves the starts out. *Scaling*: files a second after the start, of two encoders over
one. *Memory*: the peak of the driver and everything it started, for a corpus and for one ten times as large. *Corrupt*:
40 kinds of damaged files among good ones; every cause is compared with the damage (``benchmarks/corrupt.py``).

Encoders are the demo's, but for memory and corrupt files a tiny random CLIP encodes the pictures (not quickly, where
loading it takes longer than what it saves). Quickly, corpora are so small that an overhead is mostly the start. On a
machine that others use, compare nothing: what Ray starts gets another share of its time than the loop's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_core.features import read_errors, read_features
from benchmarks.corrupt import DAMAGES, write_corrupt, write_good
from benchmarks.measure import table, write_figures

PARTS = ("overhead", "scaling", "memory", "corrupt")
_STORES = "ingest-stores"  # a folder of the benchmark's own
_STEADY = 200  # files: of fewer, what is left after the start is too little to tell
_SIZES = {
    "images": "pictures whose overhead and scaling are measured",
    "sounds": "sounds whose overhead is measured; 0 for none",
    "clips": "clips whose overhead is measured; 0 for none",
    "tiny": "pictures whose memory is measured, against a tenth of them",
    "good": "good files among the corrupt ones",
    "bad": "corrupt files",
}
_FULL = {"images": 20_000, "sounds": 20_000, "clips": 2_500, "tiny": 100_000, "good": 10_000, "bad": 1_000}
_QUICK = {"images": 120, "sounds": 120, "clips": 12, "tiny": 120, "good": 120, "bad": len(DAMAGES)}


def run(runs: list[list[str]], memory: list[bool], *, bare: bool = False) -> list[dict[str, Any]]:
    """Ingestions (or bare loops) with these settings, one after the other in a process of their own; where ``memory``
    says so, their peak is measured."""
    asked = json.dumps({"bare": bare, "runs": runs, "memory": memory})
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "benchmarks.ingest_run", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads})
    results: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def tiny_clip(folder: Path) -> list[str]:
    """Settings that encode pictures with a random CLIP of 32 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**layers, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**layers, "image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return ["encoders.image.kind=transformers", f"encoders.image.path={folder}", "encoders.image.batch_size=64"]


@dataclass
class Part:
    """Something to measure: ingestions with these settings, bare loops with some of them, and what the results say."""

    runs: list[list[str]]
    figures: Callable[[list[dict[str, Any]]], dict[str, float]]
    loops: int = 0  # how many of the runs, from the first on, are also made as bare loops; their results come last
    memory: bool = False  # whether their memory is watched, which costs time


def whole_modality(folder: Path, name: str, count: int, encoders: int) -> list[str]:
    """Settings that ingest so many files of a modality, which are made unless they are there."""
    corpus = folder / f"{name}-{count}"
    if not corpus.is_dir():
        write_good(corpus, *(count if name == modality else 0 for modality in ("image", "audio", "video")))
    store = folder / _STORES / f"{name}-{count}-{encoders}"
    return [f"corpus.path={corpus}", f"store={store}", f"compute.encoders={encoders}"]


def overhead(folder: Path, sizes: dict[str, int]) -> Part:
    """Each modality by itself, against the bare loop."""
    sizes = {name: count for name, count in sizes.items() if count}
    runs = [whole_modality(folder, name, count, encoders=2) for name, count in sizes.items()]

    def figures(results: list[dict[str, Any]]) -> dict[str, float]:
        found, rows = {}, []
        for name, whole, alone in zip(sizes, results, results[len(sizes) :]):
            found[f"overhead_{name}"] = whole["seconds"] / alone["seconds"] - 1
            if sizes[name] >= _STEADY:
                found[f"overhead_{name}_steady"] = alone["steady_per_second"] / whole["steady_per_second"] - 1
            times = (alone["seconds"], whole["seconds"], whole["start_seconds"])
            rows.append((name, sizes[name], *times, alone["steady_per_second"], whole["steady_per_second"]))
        header = ("corpus", "files", "loop s", "ingest s", "of it start s", "loop files/s", "ingest files/s")
        table("overhead, 2 processes against 2 encoders", header, rows)
        return found

    return Part(runs, figures, loops=len(runs))


def scaling(folder: Path, count: int) -> Part:
    """The same pictures with one encoder and with two."""
    runs = [whole_modality(folder, "image", count, encoders) for encoders in (1, 2)]

    def figures(results: list[dict[str, Any]]) -> dict[str, float]:
        rates = [result["steady_per_second"] for result in results]
        table("scaling", ("encoders", "files/s"), list(zip((1, 2), rates)))
        return {"scaling_1_to_2": rates[1] / rates[0]}

    return Part(runs, figures)


def memory(folder: Path, count: int, encoders: int, encoder: list[str]) -> Part:
    """Peak memory of a corpus of tiny pictures and of a tenth of it."""
    runs = [[*whole_modality(folder, "image", size, encoders), *encoder] for size in (count // 10, count)]

    def figures(results: list[dict[str, Any]]) -> dict[str, float]:
        small, large = (result["peak_bytes"] for result in results)
        table("memory", ("pictures", "peak MB"), [(count // 10, small / 1e6), (count, large / 1e6)])
        return {"rss_growth_tenfold": large / small}

    return Part(runs, figures, memory=True)


def corrupt(folder: Path, good: int, bad: int, encoder: list[str]) -> Part:
    """Bad files of all kinds among good ones: what becomes of each."""
    corpus, store = folder / "corrupt", folder / _STORES / "corrupt"
    write_good(corpus, pictures=good * 7 // 10, sounds=good * 26 // 100, clips=good - good * 7 // 10 - good * 26 // 100)
    expected = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()}
    kinds = write_corrupt(corpus / "bad", bad)

    def figures(results: list[dict[str, Any]]) -> dict[str, float]:
        features = store / "features" / results[0]["features"]
        indexed = Counter(read_features(features).items.column("item_id").to_pylist())
        errors = read_errors(features).to_pylist()
        causes = {e["item_id"]: e["cause"] for e in errors}
        wrong = [i for i in kinds if causes.get(i) not in DAMAGES[kinds[i]].causes]
        for item in wrong[:20]:
            print(f"  wrong: {item}: {kinds[item]}, {causes.get(item, 'indexed')}")
        title = f"{bad:,} corrupt files of {len(DAMAGES)} kinds among {good:,}, {results[0]['seconds']:.0f} s"
        table(title, ("cause", "files"), Counter(causes.values()).most_common())
        return {
            "indexed": sum(indexed.values()),
            "quarantined": len(set(causes) & set(kinds)),
            "wrong_cause": len(wrong),
            "lost": len(expected - set(indexed)),
            "twice": sum(n - 1 for n in indexed.values()) + len(set(indexed) & set(causes)) + len(errors) - len(causes),
        }

    return Part([[f"corpus.path={corpus}", f"store={store}", *encoder]], figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead, scaling, memory and quarantine of `ace ingest`.")
    parser.add_argument("--quick", action="store_true", help="small corpora; under a minute")
    parser.add_argument("--json", type=Path, help="write the named figures here")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, help="where corpora and stores are made; by default a temporary folder")
    parser.add_argument("--rounds", type=int, default=1, help="all of it so often; the fastest of each run counts")
    for name, what in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=what)
    options = parser.parse_args()
    parts, quick = options.parts.split(","), options.quick
    given = {name: getattr(options, name) for name in _SIZES}
    size = {name: given[name] if given[name] is not None else (_QUICK if quick else _FULL)[name] for name in _SIZES}
    figures: dict[str, Any] = {"cores": os.cpu_count(), "quick": quick, **size}
    with tempfile.TemporaryDirectory(prefix="ace-ingest-") as temporary:
        folder = options.folder or Path(temporary)

        def small() -> list[str]:
            return [] if quick else tiny_clip(folder / "clip")

        makers: dict[str, Callable[[], Part]] = {
            "memory": lambda: memory(folder, size["tiny"], 1 if quick else 2, small()),
            "overhead": lambda: overhead(
                folder, {"image": size["images"], "audio": size["sounds"], "video": size["clips"]}
            ),
            "scaling": lambda: scaling(folder, size["images"]),
            "corrupt": lambda: corrupt(folder, size["good"], size["bad"], small()),
        }
        made = [make() for name, make in makers.items() if name in parts]
        bare = [settings for part in made for settings in part.runs[: part.loops]]
        # What two parts ask for is made once. Quickly: one Ray for all of it. Otherwise each run by itself, so that
        # none inherits another's memory.
        every = list({tuple(settings): settings for part in made for settings in part.runs}.values())
        watched = [any(settings in part.runs for part in made if part.memory) for settings in every]
        rounds = []
        for _ in range(options.rounds):
            shutil.rmtree(folder / _STORES, ignore_errors=True)  # or there would be nothing to do
            loops = run(bare, [False] * len(bare), bare=True)
            apart = [run([one], [memory])[0] for one, memory in zip(every, watched)] if not quick else []
            rounds.append(loops + (apart or run(every, watched)))
        fastest = [min(same, key=lambda result: result["seconds"]) for same in zip(*rounds)]
        loops, results = fastest[: len(bare)], fastest[len(bare) :]
        for part in made:
            mine = [results[every.index(settings)] for settings in part.runs]
            alone, loops = loops[: part.loops], loops[part.loops :]
            figures |= part.figures(mine + alone)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
