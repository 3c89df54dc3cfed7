"""Constrained beam search: a model spells identifiers, the index lets it spell only those that exist.

Level by level, batched over queries; the model keeps its own state (key-value cache) between levels, and is asked
only about rows that live: three modalities at most after the first token, whatever the beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ace_core.candidates import Candidates
from ace_core.config import SearchSettings
from ace_core.constraint import ConstraintIndex
from ace_core.pool import pooled
from ace_core.query import QueryBatch
from ace_core.rows import Rows
from ace_core.tensor_walk import TensorWalk
from ace_core.walk import MaskAddresses, Masks, Walk, draft_widths

Scoring = Literal["vocabulary", "children"]
"""Over what a token's probability is normalised: its level's whole vocabulary (comparable between segments, filters
and snapshots), or the allowed children of its row."""

Segments = Sequence[ConstraintIndex] | Walk | TensorWalk
"""Indexes to search as one; a :class:`Walk` saves preparing them for each call, a :class:`TensorWalk` searches on its
device."""


class SpellingModel(Protocol):
    """What the decoder asks of a generator. States are opaque, and never modified once returned."""

    vocab_sizes: tuple[int, ...]

    def start(self, query: QueryBatch) -> Any:
        """State of n queries, with ``state.modality_logp`` (n, V_0) log-probabilities of the first token."""

    def step(
        self, state: Any, tokens: torch.Tensor, parents: torch.Tensor | None, level: int
    ) -> tuple[torch.Tensor, Any]:
        """Log-probabilities (n, B, V_level) of the token at ``level`` >= 1, and the state after it.

        tokens: (n, B) int64 at level - 1; parents: (n, B) int64, the row of ``state`` that each continues, None at
        level 1.
        """

    def score(self, state: Any, tokens: torch.Tensor, parents: torch.Tensor | None, level: int) -> torch.Tensor:
        """Log-probabilities (n, R, m) of given tokens in one pass.

        tokens: (n, R, m + 1) int64 at levels level - 1 .. level + m - 1; the first is read, the others are scored.
        """

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        """Log-probabilities (n, V_l) of every level's tokens, from the query alone."""


def beam_search(
    model: SpellingModel,
    query: QueryBatch,
    segments: Segments,
    masks: Masks | Sequence[Masks] | None = None,
    *,
    beam: int = 20,
    limit: int | None = None,
    scoring: Scoring = "vocabulary",
    finish: int = 0,
) -> Candidates:
    """Spell the most probable identifiers that exist, and return their items.

    Equal identifiers are one row of the beam (a bucket), however many items share it.

    Args:
        model: a generator of the segments' vocabularies.
        query: n queries.
        segments: the indexes to search; see :data:`Segments`.
        masks: allowed items: one mask for each segment, or for each query such a list. A search whose masks leave
            nothing has no candidates.
        beam: identifiers kept at each level.
        limit: candidates returned for a query at most; by default four for each row of the beam.
        scoring: see :data:`Scoring`.
        finish: as soon as no query has more than this many items below its rows, all of them are scored in one pass
            of the model instead of level by level. What is found is at least as probable as without. 0 never does;
            ``scoring="vocabulary"`` only (the other needs every row's children), and not on a :class:`TensorWalk`,
            where looking would hold up the device.

    Returns:
        Candidates, of at most ``limit`` columns.
    """
    renormalise = scoring == "children"
    with torch.inference_mode():
        walk = _prepared(segments)
        if isinstance(walk, TensorWalk):
            rows = _spell_on_device(model, query, walk, masks, beam, renormalise)
        else:
            rows = _spell(model, query, walk, masks, beam, renormalise, 0 if renormalise else finish)
    return _candidates(walk, rows, masks, limit or 4 * beam)


def one_shot_search(
    model: SpellingModel,
    query: QueryBatch,
    segments: Segments,
    masks: Masks | Sequence[Masks] | None = None,
    *,
    draft: int = 200,
    limit: int | None = None,
) -> Candidates:
    """Identifiers whose tokens are most probable each by itself: one look at the query, no decoder.

    Args:
        draft: identifiers found; on the way to them, see :func:`~ace_core.walk.draft_widths`.
        limit: candidates returned for a query at most; by default two for each of the draft.
        (others as in :func:`beam_search`)
    """
    walk = _prepared(segments)
    limit = limit or 2 * draft
    with torch.inference_mode():
        if isinstance(walk, Walk):
            return walk.draft_items(_side_by_side(model, query), draft, walk.masks(masks, len(query)), limit)
        rows = _draft(model, query, walk, masks, draft)
    return _candidates(walk, rows, masks, limit)


def verified_search(
    model: SpellingModel,
    query: QueryBatch,
    segments: Segments,
    masks: Masks | Sequence[Masks] | None = None,
    *,
    draft: int = 200,
    limit: int | None = None,
) -> Candidates:
    """Identifiers drafted as :func:`one_shot_search` does, scored exactly by the decoder in one pass.

    The log-probabilities are those that :func:`beam_search` gives (scoring by vocabulary).
    """
    walk = _prepared(segments)
    with torch.inference_mode():
        rows = _draft(model, query, walk, masks, draft)
        width = rows.width
        if width:
            state = model.start(query)
            codes = torch.from_numpy(np.ascontiguousarray(rows.codes[:, :width])).to(state.modality_logp.device)
            first = torch.gather(state.modality_logp, 1, codes[..., 0])[..., None]
            exact = torch.cat([first, model.score(state, codes, None, 1)], 2) if walk.levels > 1 else first
            rows = _reordered(rows, _numpy(exact), width)
    return _candidates(walk, rows, masks, limit or 2 * draft)


def search_candidates(
    model: SpellingModel,
    query: QueryBatch,
    segments: Segments,
    masks: Masks | Sequence[Masks] | None = None,
    *,
    settings: SearchSettings,
    beam: int | None = None,
) -> Candidates:
    """Search in the mode, and with the widths, of ``settings``; ``beam`` takes the place of ``settings.beam``.

    Where a beam's candidates are ranked again (``settings.rerank``), drafted ones join them (``settings.pool``) with
    the log-probabilities of the one-shot heads.
    """
    beam = beam or settings.beam
    if settings.mode == "beam":
        found = beam_search(model, query, segments, masks, beam=beam, scoring=settings.scoring, finish=settings.finish)
        if not (settings.pool and settings.rerank):
            return found
        return pooled(found, one_shot_search(model, query, segments, masks, draft=settings.pool))
    search = one_shot_search if settings.mode == "one-shot" else verified_search
    return search(model, query, segments, masks, draft=max(settings.draft, beam))


def _prepared(segments: Segments) -> Walk | TensorWalk:
    return segments if isinstance(segments, Walk | TensorWalk) else Walk(segments)


def _spell(
    model: SpellingModel, query: QueryBatch, walk: Walk, masks: Masks | Sequence[Masks] | None,
    beam: int, renormalise: bool, finish: int,
) -> Rows:  # fmt: skip
    addresses = walk.masks(masks, len(query))
    rows = walk.root(len(query))
    state = model.start(query)
    log_probs = state.modality_logp[:, None, :]
    for level in range(walk.levels):
        if level:
            width = rows.width
            if not width:
                break
            tokens, parents = _tokens(rows, width, log_probs.device), _parents(rows, width, log_probs.device)
            if walk.levels - level > 1 and walk.items_below(rows).max() <= finish:
                return _finish(model, state, walk, rows, addresses, finish, parents, beam)
            log_probs, state = model.step(state, tokens, parents if level > 1 else None, level)
        rows = walk.expand(rows, _numpy(log_probs), beam, addresses, renormalise=renormalise)
    return rows


def _spell_on_device(
    model: SpellingModel, query: QueryBatch, walk: TensorWalk, masks: Masks | Sequence[Masks] | None,
    beam: int, renormalise: bool,
) -> Rows:  # fmt: skip
    """:func:`_spell` without looking at the data until the end."""
    on_device = walk.masks(masks, len(query))
    rows = walk.root(len(query))
    state = model.start(query)
    log_probs = state.modality_logp[:, None, :]
    for level in range(walk.levels):
        if level:
            log_probs, state = model.step(state, rows.codes[..., -1], rows.parent if level > 1 else None, level)
        rows = walk.expand(rows, log_probs, beam, on_device, renormalise=renormalise)
    return walk.to_host(rows)


def _draft(
    model: SpellingModel, query: QueryBatch, walk: Walk | TensorWalk, masks: Masks | Sequence[Masks] | None, keep: int
) -> Rows:  # fmt: skip
    if isinstance(walk, Walk):
        return walk.draft(_side_by_side(model, query), keep, walk.masks(masks, len(query)))
    on_device = walk.masks(masks, len(query))
    rows = walk.root(len(query))
    for log_probs, width in zip(model.one_shot(query), draft_widths(keep, walk.levels, walk.host.depth)):
        rows = walk.expand(rows, log_probs[:, None, :], width, on_device)
    return walk.to_host(rows)


def _side_by_side(model: SpellingModel, query: QueryBatch) -> np.ndarray:
    """(n, sum of V_l) log-probabilities of all levels' tokens."""
    return _numpy(torch.cat(model.one_shot(query), 1))


def _finish(
    model: SpellingModel, state: Any, walk: Walk, rows: Rows, addresses: MaskAddresses, most: int,
    parents: torch.Tensor, beam: int,
) -> Rows:  # fmt: skip
    """Complete all identifiers below ``rows`` and score their remaining tokens in one pass."""
    level = rows.level
    queries = len(rows.live)
    leaves, ancestor = rows, np.arange(rows.score.shape[1])[None].repeat(queries, 0)
    for deeper in range(level, walk.levels):
        # every child of every row: equal scores, and room for all of them
        equal = replace(leaves, block=leaves.block.copy())
        equal.score[:] = 0
        leaves = walk.expand(equal, np.zeros((queries, 1, walk.vocab_sizes[deeper]), np.float32), most, addresses)
        ancestor = np.take_along_axis(ancestor, leaves.parent, 1)
    width = leaves.width
    device = parents.device
    tokens = torch.from_numpy(np.ascontiguousarray(leaves.codes[:, :width, level - 1 :])).to(device)
    ancestor = ancestor[:, :width]
    known = rows.level_log_prob[np.arange(queries)[:, None], ancestor, :level]
    continues = torch.gather(parents, 1, torch.from_numpy(ancestor).to(device)) if level > 1 else None
    scored = _numpy(model.score(state, tokens, continues, level)).astype(np.float64)
    return _reordered(leaves, np.concatenate([known, scored], axis=2), beam)


def _reordered(rows: Rows, level_log_prob: np.ndarray, beam: int) -> Rows:
    """The best ``beam`` complete rows by new log-probabilities (n, R, levels) of their first R."""
    width = level_log_prob.shape[1]
    level_log_prob = level_log_prob.astype(np.float64)
    score = np.where(np.arange(width) < rows.live[:, None], level_log_prob.sum(2), -np.inf)
    best = np.argsort(-score, axis=1, kind="stable")[:, :beam]
    take = np.arange(len(score))[:, None], best
    live = np.minimum(np.isfinite(score).sum(1), beam)
    out = replace(rows, live=live, block=rows.block[take])  # a copy
    out.score[:], out.level_log_prob[:] = score[take], level_log_prob[take]
    return out


def _tokens(rows: Rows, width: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows.codes[:, :width, rows.level - 1])).to(device)


def _parents(rows: Rows, width: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows.parent[:, :width])).to(device)


def _numpy(log_probs: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(log_probs.detach().cpu().numpy())


def _candidates(walk: Walk | TensorWalk, rows: Rows, masks: Masks | Sequence[Masks] | None, limit: int) -> Candidates:
    """Items of rows, which are complete but where the walk ended early because nothing is left."""
    walk = walk.host if isinstance(walk, TensorWalk) else walk
    return walk.collect(rows, walk.masks(masks, len(rows.live)), limit if rows.level == walk.levels else 0)
