"""Timing and printing for the benchmarks. The machine may be shared: medians of interleaved runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def interleaved(runs: Mapping[str, Callable[[], Any]], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Median seconds of each run, taken in turns so that a busy machine slows all of them alike.

    Args:
        seconds: for all runs together; every run is made ``least`` times whatever it takes, after one that is not
            counted.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(t) for t in times.values()) < least:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(t)) for name, t in times.items()}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print one table."""
    text = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *text]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), *text]:
        print("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))))


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Print named figures, and write them as JSON."""
    table("figures", ("name", "value"), list(figures.items()))
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
