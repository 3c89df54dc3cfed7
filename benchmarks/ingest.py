"""Ingestion against a bare encoder loop over the same files, its scaling, its memory, and what it does with bad files.

    python -m benchmarks.ingest [--quick] [--json FILE] [--parts overhead,scaling,memory,corrupt] [--folder FOLDER]

*Overhead*: seconds of ``ace ingest`` over those of a loop that reads, decodes and encodes the same files in as many
processes as ingestion has encoders, minus one; both with the start of their processes and the loading of the encoder,
without Ray's own start. *Steady* leaves the starts out. *Scaling*: files a second after the start, of two encoders over
one. *Memory*: the peak of the driver and everything it started, for a corpus and for one ten times as large. *Corrupt*:
40 kinds of damaged files among good ones; every cause is compared with the damage (``benchmarks/corrupt.py``).

Encoders are the demo's, but for memory and corrupt files a tiny random CLIP encodes the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ace_core.features import read_errors, read_features
from benchmarks.corrupt import DAMAGES, write_corrupt, write_good
from benchmarks.measure import table, write_figures

PARTS = ("overhead", "scaling", "memory", "corrupt")


def run(settings: list[str], *, bare: bool = False, workers: int = 2) -> dict[str, Any]:
    """One run in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}
    asked = json.dumps({"bare": bare, "workers": workers, "settings": [*settings, f"compute.encoders={workers}"]})
    command = [sys.executable, "-m", "benchmarks.ingest_run", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads})
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def tiny_clip(folder: Path) -> list[str]:
    """Settings that encode pictures with a random CLIP of 32 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**layers, "vocab_size": 99},
        vision_config={**layers, "image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return ["encoders.image.kind=transformers", f"encoders.image.path={folder}", "encoders.image.batch_size=64"]


def measure_overhead(folder: Path, sizes: dict[str, int], workers: int) -> dict[str, float]:
    """Each modality by itself, against the bare loop."""
    figures, rows = {}, []
    for name, count in sizes.items():
        corpus = folder / f"overhead-{name}"
        write_good(corpus, *(count if name == modality else 0 for modality in ("image", "audio", "video")))
        settings = [f"corpus.path={corpus}", f"store={folder / f'store-{name}'}"]
        alone = run(settings, bare=True, workers=workers)
        whole = run(settings, workers=workers)
        figures[f"overhead_{name}"] = whole["seconds"] / alone["seconds"] - 1
        figures[f"overhead_{name}_steady"] = alone["steady_per_second"] / whole["steady_per_second"] - 1
        rows.append(
            (name, count, alone["seconds"], whole["seconds"], whole["start_seconds"], alone["steady_per_second"],
             whole["steady_per_second"])
        )  # fmt: skip
    header = ("corpus", "files", "loop s", "ingest s", "of it start s", "loop files/s", "ingest files/s")
    table(f"overhead, {workers} processes or encoders", header, rows)
    return figures


def measure_scaling(folder: Path, count: int) -> dict[str, float]:
    """The same pictures with one encoder and with two."""
    corpus = folder / "scaling"
    write_good(corpus, pictures=count, sounds=0, clips=0)
    rates = []
    for workers in (1, 2):
        settings = [f"corpus.path={corpus}", f"store={folder / f'store-scaling-{workers}'}"]
        rates.append(run(settings, workers=workers)["steady_per_second"])
    table("scaling", ("encoders", "files/s"), list(zip((1, 2), rates)))
    return {"scaling_1_to_2": rates[1] / rates[0]}


def measure_memory(folder: Path, count: int) -> dict[str, float]:
    """Peak memory of a corpus of tiny pictures and of one ten times as large."""
    clip = tiny_clip(folder / "clip")
    peaks = []
    for size in (count, 10 * count):
        corpus = folder / f"memory-{size}"
        write_good(corpus, pictures=size, sounds=0, clips=0)
        result = run([f"corpus.path={corpus}", f"store={folder / f'store-memory-{size}'}", *clip])
        peaks.append(result["peak_bytes"])
    table("memory", ("pictures", "peak MB"), [(count, peaks[0] / 1e6), (10 * count, peaks[1] / 1e6)])
    return {"rss_growth_tenfold": peaks[1] / peaks[0]}


def prove_corrupt(folder: Path, good: int, bad: int) -> dict[str, float]:
    """Bad files of all kinds among good ones: what becomes of each."""
    corpus, store = folder / "corrupt", folder / "store-corrupt"
    write_good(corpus, pictures=good * 7 // 10, sounds=good * 26 // 100, clips=good - good * 7 // 10 - good * 26 // 100)
    kinds = write_corrupt(corpus / "bad", bad)
    result = run([f"corpus.path={corpus}", f"store={store}", *tiny_clip(folder / "clip")])
    features = store / "features" / result["features"]
    indexed = Counter(read_features(features).items.column("item_id").to_pylist())
    causes = {e["item_id"]: e["cause"] for e in read_errors(features).to_pylist()}
    wrong = [(i, kinds[i], causes.get(i, "indexed")) for i in kinds if causes.get(i) not in DAMAGES[kinds[i]].causes]
    for item, kind, cause in wrong[:20]:
        print(f"  wrong: {item}: {kind}, {cause}")
    expected = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()} - set(kinds)
    rows = sorted(Counter(causes.values()).items(), key=lambda pair: -pair[1])
    table(
        f"{bad:,} corrupt files of {len(DAMAGES)} kinds among {good:,}, {result['seconds']:.0f} s",
        ("cause", "files"),
        rows,
    )
    return {
        "indexed": sum(indexed.values()),
        "quarantined": len(set(causes) & set(kinds)),
        "wrong_cause": len(wrong),
        "lost": len(expected - set(indexed)),
        "twice": sum(count - 1 for count in indexed.values()) + len(set(indexed) & set(causes)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead, scaling, memory and quarantine of `ace ingest`.")
    parser.add_argument("--quick", action="store_true", help="small corpora; under a minute")
    parser.add_argument("--json", type=Path, help="write the named figures here")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, help="where corpora and stores are made; by default a temporary folder")
    parser.add_argument("--images", type=int, help="pictures of the overhead's and the scaling's corpus")
    options = parser.parse_args()
    parts = options.parts.split(",")
    images = options.images or (120 if options.quick else 20_000)
    sizes = {"image": images, "audio": images // 4, "video": images // 8}
    figures: dict[str, Any] = {"images": images, "cores": os.cpu_count(), "quick": options.quick}
    with tempfile.TemporaryDirectory(prefix="ace-ingest-") as temporary:
        folder = options.folder or Path(temporary)
        if "overhead" in parts:
            figures |= measure_overhead(folder, sizes, workers=2)
        if "scaling" in parts:
            figures |= measure_scaling(folder, images)
        if "memory" in parts:
            figures |= measure_memory(folder, 40 if options.quick else 10_000)
        if "corrupt" in parts:
            figures |= prove_corrupt(folder, *((80, 40) if options.quick else (10_000, 1_000)))
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
