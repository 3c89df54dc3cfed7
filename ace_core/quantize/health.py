"""Codebook health: is every code used, do items share identifiers, how near are rebuilt items.

A quantizer that collapsed trains and publishes without an error and then finds nothing. The gate stops it with the
figures in hand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ace_core.config import QuantizerSettings
from ace_core.errors import QualityError


@dataclass(frozen=True)
class CodebookHealth:
    """Figures of a quantizer on a corpus.

    Attributes:
        items: number of items measured.
        utilisation: share of each level's codes (levels after the modality) that at least one item uses.
        perplexity: exp(entropy) of each level's code usage over the most it could be: the smaller of the level's
            number of codes and the number of items (1 is even use).
        collision_rate: share of items whose identifier another item has too.
        buckets: {bucket size: number of identifiers with so many items}.
        cosine: mean cosine of an item vector and its rebuilt vector.
        error: mean squared distance of an item vector and its rebuilt vector.
    """

    items: int
    utilisation: tuple[float, ...]
    perplexity: tuple[float, ...]
    collision_rate: float
    buckets: dict[int, int]
    cosine: float
    error: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        out = asdict(self)
        out["buckets"] = {str(k): v for k, v in self.buckets.items()}
        return out


def measure_health(
    codes: np.ndarray, vocab_sizes: tuple[int, ...], x: np.ndarray, rebuilt: np.ndarray
) -> CodebookHealth:
    """Measure identifiers (n, levels) of items x (n, D) against their rebuilt vectors (n, D)."""
    n = len(codes)
    utilisation, perplexity = [], []
    for level, size in enumerate(vocab_sizes[1:], start=1):
        share = np.bincount(codes[:, level], minlength=size) / n
        used = share[share > 0]
        utilisation.append(float(len(used) / size))
        perplexity.append(float(np.exp(-(used * np.log(used)).sum()) / min(size, n)))
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    buckets = {int(s): int(c) for s, c in zip(*np.unique(sizes, return_counts=True))}
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(rebuilt, axis=1)
    cosine = (x * rebuilt).sum(1) / np.maximum(norms, 1e-12)
    return CodebookHealth(
        items=n,
        utilisation=tuple(utilisation),
        perplexity=tuple(perplexity),
        collision_rate=float(sizes[sizes > 1].sum() / n),
        buckets=buckets,
        cosine=float(cosine.mean()),
        error=float(np.square(x - rebuilt).sum(1).mean()),
    )


def check_health(health: CodebookHealth, settings: QuantizerSettings) -> None:
    """The gate.

    Raises:
        QualityError: codes collapsed (perplexity below ``min_perplexity``) or too many items share an identifier
            (``max_collision_rate``).
    """
    figures = (
        f"perplexity {', '.join(f'{p:.2f}' for p in health.perplexity)} of each level's best; "
        f"{100 * health.collision_rate:.1f} % of {health.items} items share an identifier; "
        f"largest bucket {max(health.buckets)}; cosine {health.cosine:.3f}"
    )
    if min(health.perplexity) < settings.min_perplexity:
        level = int(np.argmin(health.perplexity)) + 1
        raise QualityError(
            f"the quantizer collapsed at level {level}: {figures}",
            where="quantizer.min_perplexity",
            remedy="Use fewer codes (quantizer.coarse, quantizer.fine_codes) or a lower quantizer.learning_rate; if "
            "the features are all alike, look at the encoder.",
        )
    if health.collision_rate > settings.max_collision_rate:
        raise QualityError(
            f"too many items share an identifier: {figures}",
            where="quantizer.max_collision_rate",
            remedy="Raise quantizer.fine_levels or quantizer.fine_codes; if the corpus holds many copies of the same "
            "file, raise quantizer.max_collision_rate.",
        )
