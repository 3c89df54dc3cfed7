"""Drift: whether the frozen codebooks still fit what is added, and when a refit is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ace_core.manifest import Manifest
from ace_core.segment import Segment
from ace_core.snapshot import Snapshot
from ace_store import Store
from pipelines.progress import counted

# A refit is advised beyond these. The first two are ratios of added to published items; the third is the
# Jensen-Shannon divergence in bits (0 equal, 1 disjoint) of how both spread over the coarse cells.
MAX_ERROR_RATIO = 1.25
MAX_COLLISION_RATIO = 2.0
MAX_BALANCE_SHIFT = 0.35
MIN_ITEMS = 50  # fewer say nothing about a distribution
# Codebooks fit their own items best. Items of the same distribution that came later had 1.63, 1.63 and 1.79 times the
# error at 29, 27 and 20 fitted items a code, 2.6 to 3.8 times at 7 to 5 (benchmarks/change.py): below 1 + 20 / items.
UNSEEN_ERROR = 20


@dataclass(frozen=True)
class Drift:
    """Added items against those of the snapshot before.

    Attributes:
        items: added items.
        error_ratio: mean squared distance of an item from its rebuilt self, against what items that were not fitted
            have where nothing drifted.
        collision_rate: share of added items whose identifier another item of the corpus has too.
        collision_before: the same of the published items among themselves.
        balance_shift: divergence of the coarse cells' shares, in bits.
    """

    items: int
    error_ratio: float
    collision_rate: float
    collision_before: float
    balance_shift: float

    @property
    def refit_due(self) -> bool:
        """Whether a figure is beyond its limit, for enough items to tell."""
        crowded = self.collision_rate > max(0.05, MAX_COLLISION_RATIO * self.collision_before)
        far = self.error_ratio > MAX_ERROR_RATIO
        return self.items >= MIN_ITEMS and (far or crowded or self.balance_shift > MAX_BALANCE_SHIFT)

    def __str__(self) -> str:
        shared, before = 100 * self.collision_rate, 100 * self.collision_before
        text = (
            f"drift of {counted(self.items, 'added item')}: quantisation error {self.error_ratio:.2f}x what is to be "
            f"expected, {shared:.1f} % share an identifier (before: {before:.1f} %), "
            f"coarse cells shifted by {self.balance_shift:.2f} bits"
        )
        if self.items < MIN_ITEMS:
            return f"{text}; too few to tell whether a refit is due"
        return text + ("; a refit is due (`ace fit all`, `ace publish`)" if self.refit_due else "; no refit needed")


def measure_drift(snapshot: Snapshot, added: Segment, store: Store, removed: Sequence[np.ndarray]) -> Drift:
    """Compare a new segment with the snapshot that it joins: one pass over the identifiers that are there, no sort.

    Args:
        removed: for each segment of the snapshot, sorted rows that are not there once the new one has joined: an item
            that replaces itself, or comes back, shares its identifier with nobody.
    """
    before = [
        np.delete(s.gallery.codes, rows, axis=0) if len(rows) else s.gallery.codes
        for s, rows in zip(snapshot.segments, removed)
    ]
    codes = added.gallery.codes
    shared = _repeated(codes)
    keys = _keys(codes)
    for old in map(_keys, before):
        at = np.searchsorted(old, keys)
        shared |= old[np.minimum(at, len(old) - 1)] == keys if len(old) else False
    published = sum(len(c) for c in before)
    quantizer = store.find("quantizer", snapshot.manifest.models["quantizer"].id)
    expected = float("nan") if quantizer is None else _expected_error(quantizer)
    return Drift(
        items=len(codes),
        error_ratio=float(added.manifest.metrics["error"]) / max(expected, 1e-12),
        collision_rate=float(shared.mean()),
        collision_before=sum(int(_repeated(c).sum()) for c in before) / max(1, published),
        balance_shift=_divergence(np.sum([_cells(c, added) for c in before], axis=0), _cells(codes, added)),
    )


def _expected_error(quantizer: Manifest) -> float:
    """The error of items that were not fitted, from that of those that were."""
    figures = quantizer.metrics
    return float(figures["health"]["error"]) * (1 + UNSEEN_ERROR * figures["fine_codes"] / figures["items"])


def _repeated(codes: np.ndarray) -> np.ndarray:
    """(n,) bool: which of a segment's identifiers (n, levels) another of its items has too; they are sorted."""
    same = np.zeros(len(codes) + 1, bool)
    same[1:-1] = (codes[1:] == codes[:-1]).all(axis=1)
    return same[1:] | same[:-1]


def _keys(codes: np.ndarray) -> np.ndarray:
    """(n,) byte strings in the order of the identifiers (n, levels)."""
    return np.ascontiguousarray(codes.astype(">u2")).view(f"S{2 * codes.shape[1]}").reshape(-1)


def _cells(codes: np.ndarray, segment: Segment) -> np.ndarray:
    """Items of each (modality, coarse) cell."""
    modalities, coarse = segment.gallery.index.vocab_sizes[:2]
    return np.bincount(codes[:, 0].astype(np.int64) * coarse + codes[:, 1], minlength=modalities * coarse)


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits of two histograms."""
    p, q = a / max(a.sum(), 1), b / max(b.sum(), 1)
    middle = (p + q) / 2

    def against(x: np.ndarray) -> float:
        some = x > 0
        return float((x[some] * np.log2(x[some] / middle[some])).sum())

    return (against(p) + against(q)) / 2
