"""The items that a search by example is of: they are what was asked for, so they are found whatever the search drafts.

An item need not be near its own query (its identifier is coarser than its vector, and the generator prefers what was
described to it), so a search may well miss it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ace_core.candidates import Candidates
from ace_core.filters import ItemMask
from ace_core.pool import pooled

if TYPE_CHECKING:
    from ace_core.decoding import SpellingModel
    from ace_core.query import QueryBatch
    from ace_core.scoring import Gallery

Examples = Sequence[Sequence[tuple[int, int]]]
"""Of each query, the items (segment, row) that it is an example of; none for a text."""


def with_examples(
    candidates: Candidates,
    examples: Examples,
    model: SpellingModel,
    query: QueryBatch,
    galleries: Sequence[Gallery],
    masks: Sequence[Sequence[ItemMask | None]],
) -> tuple[Candidates, np.ndarray]:
    """Candidates, and among them every example that its query's filter lets through.

    Args:
        candidates: of n queries.
        examples: of the same queries.
        model, query: what scores an example that the search missed (its one-shot heads).
        galleries: of the segments.
        masks: of each query, its allowed items by segment.

    Returns:
        The candidates, and (n, c) bool, which of them are examples.
    """
    if any(examples):
        candidates = pooled(candidates, _examples(examples, model, query, galleries, masks))
    asked_for = np.zeros(candidates.valid.shape, bool)
    for number, items in enumerate(examples):
        for segment, row in items:
            asked_for[number] |= (candidates.segment[number] == segment) & (candidates.row[number] == row)
    return candidates, asked_for & candidates.valid


def _examples(
    examples: Examples,
    model: SpellingModel,
    query: QueryBatch,
    galleries: Sequence[Gallery],
    masks: Sequence[Sequence[ItemMask | None]],
) -> Candidates:
    """The examples that pass the filters as candidates, scored by the one-shot heads."""
    allowed = [
        [(segment, row) for segment, row in items if (mask := masks[number][segment]) is None or mask.allows(row)]
        for number, items in enumerate(examples)
    ]
    shape = len(examples), max(map(len, allowed))
    with torch.inference_mode():
        tables = [table.float().cpu().numpy() for table in model.one_shot(query)]
    valid = np.zeros(shape, bool)
    segments, rows = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    level_log_prob = np.full((*shape, len(tables)), -np.inf, np.float32)
    codes = np.zeros((*shape, len(tables)), np.uint16)
    for number, items in enumerate(allowed):
        for column, (segment, row) in enumerate(items):
            at = number, column
            valid[at], segments[at], rows[at] = True, segment, row
            codes[at] = galleries[segment].codes[row]
            level_log_prob[at] = [table[number, code] for table, code in zip(tables, codes[at])]
    return Candidates(
        valid=valid,
        segment=segments,
        row=rows,
        log_prob=level_log_prob.sum(axis=2),
        level_log_prob=level_log_prob,
        codes=codes,
    )
