"""Ingestions, or bare encoder loops over the same files, in a process of their own: ``benchmarks.ingest`` starts it and
reads the line of JSON that it prints.

    python -m benchmarks.ingest_run '{"bare": false, "runs": [["corpus.path=..."]], "memory": [false]}'
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ace_core.config import Settings
from ace_core.items import Modality
from ace_core.media.kinds import modality_of
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.progress import Reporter, Step

_BATCH = 16


class Watch(threading.Thread):
    """The most memory that this process and all that it started held at once, in bytes; of shared pages, its part."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.peak = max(self.peak, sum(_share(pid) for pid in _family(os.getpid())))

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def _family(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        one = queue.pop()
        found.append(one)
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                queue += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def _share(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


class Timed(Reporter):
    """Notes when the first encoded files come back, and when, and how many, have of as many batches as there are
    encoders: from then on nothing is counted that was done meanwhile."""

    def __init__(self, encoders: int) -> None:
        super().__init__(quiet=True)
        self.first: float | None = None
        self.since: tuple[float, int] | None = None
        self._encoders, self._batches, self._files = encoders, 0, 0

    def came(self, count: int) -> None:
        now = time.perf_counter()
        self.first = self.first or now
        self._batches, self._files = self._batches + 1, self._files + count
        if self._batches == self._encoders:
            self.since = now, self._files

    @contextmanager
    def step(self, name: str, total: int, unit: str = "items") -> Iterator[Step]:
        with super().step(name, total, unit) as step:
            yield _Noting(self, step)  # type: ignore[misc]


class _Noting:
    """A step that tells its reporter of every advance."""

    def __init__(self, reporter: Timed, step: Step) -> None:
        self._reporter, self._step = reporter, step

    def advance(self, count: int, note: str | None = None) -> None:
        self._step.advance(count, note)
        self._reporter.came(count)


def pipeline(settings: Settings, *, memory: bool) -> dict[str, Any]:
    """``ace ingest`` as it is, Ray's own start not counted. To watch its memory takes a tenth of a core, which a bare
    loop does not pay: only where memory is asked for (else the peak is 0)."""
    from pipelines.cluster import ensure_ray
    from pipelines.ingest import ingest

    ensure_ray(settings.compute)
    watch, reporter = Watch(), Timed(settings.compute.encoders or 1)
    if memory:
        watch.start()
    began = time.perf_counter()
    manifest = ingest(settings, Store.open(settings.store), reporter)
    ended = time.perf_counter()
    peak = watch.stop() if memory else 0
    assert reporter.first is not None
    files = sum(manifest.metrics["items"].values()) + sum(manifest.metrics["errors"].values())
    since, before = reporter.since or (began, 0)
    if before == files:  # so few that all came back together: there is no steady part
        since, before = began, 0
    return {
        "seconds": ended - began,
        "start_seconds": reporter.first - began,
        "steady_per_second": (files - before) / max(ended - since, 1e-9),
        "peak_bytes": peak,
        "features": manifest.id,
        "metrics": manifest.metrics,
    }


def _loop(settings: Settings, paths: list[str]) -> float:
    """Read, decode and encode files in this process with one thread (``OMP_NUM_THREADS`` says so), nothing else;
    returns the seconds without loading the encoder."""
    from ace_core.encoders import load_media_encoder

    modality = modality_of(paths[0]) or Modality.IMAGE
    limits = settings.limits.model_copy(update={"isolate": False})
    encoder = load_media_encoder(modality, settings.encoders.media(modality), limits)
    began = time.perf_counter()
    for first in range(0, len(paths), _BATCH):
        encoder.encode([encoder.decoder(Path(path).read_bytes()) for path in paths[first : first + _BATCH]])
    return time.perf_counter() - began


def bare(settings: Settings) -> dict[str, Any]:
    """The encoder loop alone, the files dealt to as many processes as ingestion would have encoders."""
    workers = settings.compute.encoders or 1
    paths = sorted(str(p) for p in Path(settings.corpus.path).rglob("*") if p.is_file())
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        loops = list(pool.map(_loop, [settings] * workers, [paths[w::workers] for w in range(workers)]))
    return {"seconds": time.perf_counter() - began, "steady_per_second": len(paths) / max(loops)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    runs = [(load_settings(None, tuple(settings)), memory) for settings, memory in zip(asked["runs"], asked["memory"])]
    results = [bare(settings) if asked["bare"] else pipeline(settings, memory=memory) for settings, memory in runs]
    print(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
