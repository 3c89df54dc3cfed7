"""The plots of the retrieval benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.plots import draw

CURVES = {
    "queries": 500,
    "gallery_sizes": [{"gallery": g, "dual tower": 0.6 / g**0.1, "ACE": 0.7 / g**0.1} for g in (250, 1000)],
    "beams": [{"beam": b, "with the pool": 0.4, "beam alone": b / 300} for b in (10, 100)],
    "latency": [
        {"search": f"{mode} {n}", "milliseconds": n / 10, "r10": 0.4}
        for mode in ("one-shot, draft", "beam")
        for n in (9, 99)
    ],
    "reliability": [{"promised": p, "right": p / 2, "queries": 9} for p in (0.1, 0.8)],
}


def test_every_curve_becomes_a_picture(tmp_path: Path) -> None:
    paths = draw({"curves": CURVES}, tmp_path / "docs")
    assert [p.name for p in paths] == ["recall_gallery.png", "recall_beam.png", "recall_latency.png", "reliability.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 400 and len(set(picture.convert("L").resize((50, 50)).tobytes())) > 20


def test_figures_without_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="curves"):
        draw({"unseen_test_r1_ratio": 1.0}, tmp_path)
