"""Whole searches as tensor operations of fixed shapes, without looking at the data: what an accelerator runs, as it
comes or captured (:mod:`ace_core.replay`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ace_core.plan import Spelling
from ace_core.tensor_walk import TensorMasks, TensorRows, TensorWalk
from ace_core.walk import draft_widths

if TYPE_CHECKING:
    from ace_core.decoding import SpellingModel
    from ace_core.query import QueryBatch


def spelled(
    model: SpellingModel, query: QueryBatch, walk: TensorWalk, masks: TensorMasks | None, how: Spelling
) -> TensorRows:
    """Complete rows (n, at most ``how.width``), best first."""
    if how.mode == "beam":
        return _beam(model, query, walk, masks, how)
    rows = _draft(model, query, walk, masks, how.width)
    return rows if how.mode == "one-shot" else _verified(model, query, walk, rows)


def _beam(
    model: SpellingModel, query: QueryBatch, walk: TensorWalk, masks: TensorMasks | None, how: Spelling
) -> TensorRows:
    rows = walk.root(len(query))
    state = model.start(query)
    log_probs = state.modality_logp[:, None, :]
    for level in range(walk.levels):
        if level:
            log_probs, state = model.step(state, rows.codes[..., -1], rows.parent if level > 1 else None, level)
        rows = walk.expand(rows, log_probs, how.width, masks, renormalise=how.scoring == "children")
    return rows


def _draft(
    model: SpellingModel, query: QueryBatch, walk: TensorWalk, masks: TensorMasks | None, keep: int
) -> TensorRows:
    rows = walk.root(len(query))
    for log_probs, width in zip(model.one_shot(query), draft_widths(keep, walk.levels, walk.host.depth)):
        rows = walk.expand(rows, log_probs[:, None, :], width, masks)
    return rows


def _verified(model: SpellingModel, query: QueryBatch, walk: TensorWalk, rows: TensorRows) -> TensorRows:
    """Complete rows by the decoder's scores of their tokens, in one pass."""
    state = model.start(query)
    exact = state.modality_logp.gather(1, rows.codes[..., 0])[..., None]
    if walk.levels > 1:
        exact = torch.cat([exact, model.score(state, rows.codes, None, 1)], 2)
    alive = rows.score > -torch.inf
    score = torch.where(alive, exact.double().sum(2), -torch.inf)
    score, order = score.sort(dim=1, descending=True, stable=True)
    of_token = order[..., None].expand(-1, -1, walk.levels)
    return replace(
        rows,
        low=rows.low.gather(1, order),
        high=rows.high.gather(1, order),
        score=score,
        codes=rows.codes.gather(1, of_token),
        level_log_prob=exact.gather(1, of_token),
    )
