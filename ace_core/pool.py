"""A beam's candidates beside those that the one-shot heads draft: what both found is ranked together.

A beam of ten spells ten identifiers; whatever ranks them finely (stored vectors) cannot bring back what the ten do not
hold. The heads draft hundreds from one look at the query, for less than one step of the decoder (simultaneous scores
beside sequential ones: PAG, Zeng et al. 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ace_core.candidates import Candidates

_ROW_BITS = 40


def pooled(first: Candidates, second: Candidates) -> Candidates:
    """Candidates of ``first``, then those of ``second`` that it does not hold, by falling log-probability.

    Args:
        first, second: of the same n queries over the same segments, c_1 and c_2 columns. What both hold keeps the
            log-probabilities of ``first``.

    Returns:
        (n, c) with c at most c_1 + c_2.
    """
    valid = np.concatenate([first.valid, second.valid], axis=1)
    item = np.concatenate([(c.segment << _ROW_BITS) + c.row for c in (first, second)], axis=1)
    item = np.where(valid, item, -1 - np.arange(item.shape[1]))  # what is not there equals nothing
    order = np.argsort(item, axis=1, kind="stable")
    sorted_items = np.take_along_axis(item, order, 1)
    again = np.zeros_like(valid)
    np.put_along_axis(again, order[:, 1:], sorted_items[:, 1:] == sorted_items[:, :-1], 1)
    valid &= ~again
    log_prob = np.where(valid, np.concatenate([first.log_prob, second.log_prob], axis=1), -np.inf)
    width = int(valid.sum(1).max(initial=0))
    best = np.argsort(-log_prob, axis=1, kind="stable")[:, :width]
    kept = np.take_along_axis(valid, best, 1)

    def taken(name: str, blank: float) -> np.ndarray:
        both = np.concatenate([getattr(first, name), getattr(second, name)], axis=1)
        index = best if both.ndim == 2 else best[..., None]
        out = np.take_along_axis(both, index, 1)
        return np.where(kept if both.ndim == 2 else kept[..., None], out, np.asarray(blank, out.dtype))

    return type(first)(
        valid=kept,
        segment=taken("segment", 0),
        row=taken("row", 0),
        log_prob=taken("log_prob", -np.inf),
        level_log_prob=taken("level_log_prob", -np.inf),
        codes=taken("codes", 0),
    )
