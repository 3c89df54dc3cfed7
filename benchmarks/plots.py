"""Draws what ``python -m benchmarks.retrieval --parts main,curves --json FILE`` measured.

python -m benchmarks.plots FILE --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_SIZE = (5.2, 3.6)
_DPI = 130


def draw(figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write four PNG files of the curves; returns their paths.

    Raises:
        KeyError: the figures hold no curves.
    """
    measured = figures["curves"]
    folder.mkdir(parents=True, exist_ok=True)
    queries = f"{measured['queries']} queries for unseen items"

    def recall_axes(ax: Axes, x: str) -> None:
        ax.set(xlabel=x, ylabel="R@10 %", title=queries)
        ax.set_ylim(bottom=0)
        ax.legend()

    def gallery(ax: Axes) -> None:
        _lines(ax, measured["gallery_sizes"], "gallery")
        ax.set_xscale("log")
        recall_axes(ax, "items in the gallery")

    def beam(ax: Axes) -> None:
        _lines(ax, measured["beams"], "beam")
        ax.set_xscale("log")
        recall_axes(ax, "beam")

    def latency(ax: Axes) -> None:
        points = measured["latency"]
        for mode in dict.fromkeys(p["search"].split()[0].rstrip(",") for p in points):
            mine = sorted((p["milliseconds"], 100 * p["r10"]) for p in points if p["search"].startswith(mode))
            ax.plot(*zip(*mine), marker="o", label=mode)
        recall_axes(ax, "milliseconds a query, text encoded, one thread")

    def reliability(ax: Axes) -> None:
        points = measured["reliability"]
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
        ax.plot([p["promised"] for p in points], [p["right"] for p in points], marker="o")
        ax.set(xlabel="probability of the best answer", ylabel="share that is right", title="calibration, test queries")

    paths = []
    for name, fill in {
        "recall_gallery": gallery,
        "recall_beam": beam,
        "recall_latency": latency,
        "reliability": reliability,
    }.items():
        figure, axes = plt.subplots(figsize=_SIZE)
        fill(axes)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
        plt.close(figure)
    return paths


def _lines(ax: Axes, points: Sequence[dict[str, float]], x: str) -> None:
    for name in points[0]:
        if name != x:
            ax.plot([p[x] for p in points], [100 * p[name] for p in points], marker="o", label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="JSON file of the retrieval benchmark")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the PNG files")
    args = parser.parse_args()
    for path in draw(json.loads(args.figures.read_text()), args.out):
        print(path)


if __name__ == "__main__":
    main()
