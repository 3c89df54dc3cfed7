"""Constrained beam search: a model spells identifiers, the index lets it spell only those that exist.

Level by level, batched over queries; the model keeps its own state (key-value cache) between levels, and is asked
only about rows that live: three modalities at most after the first token, whatever the beam. A branch stops as soon as
one allowed item is left in it: renormalised over its children, what is left of its identifier is certain; otherwise its
tokens are scored in one pass when all branches have stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ace_core.candidates import Candidates
from ace_core.config import SearchSettings
from ace_core.constraint import ConstraintIndex
from ace_core.plan import Scoring, Spelling, spellings
from ace_core.pool import pooled
from ace_core.query import QueryBatch
from ace_core.rows import Rows
from ace_core.tensor_search import spelled
from ace_core.tensor_walk import TensorWalk
from ace_core.walk import MaskAddresses, Masks, Walk

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

    Returns:
        Candidates, of at most ``limit`` columns.
    """
    return _found(model, query, segments, masks, Spelling("beam", beam, scoring), limit)


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
    return _found(model, query, segments, masks, Spelling("one-shot", draft), limit)


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
    return _found(model, query, segments, masks, Spelling("verify", draft), limit)


def search_candidates(
    model: SpellingModel,
    query: QueryBatch,
    segments: Segments,
    masks: Masks | Sequence[Masks] | None = None,
    *,
    settings: SearchSettings,
    beam: int | None = None,
) -> Candidates:
    """Search as :func:`~ace_core.plan.spellings` says."""
    found = [_found(model, query, segments, masks, how, None) for how in spellings(settings, beam)]
    return found[0] if len(found) == 1 else pooled(*found)


def candidates(walk: Walk, rows: Rows, masks: Masks | Sequence[Masks] | None, limit: int) -> Candidates:
    """Items of rows, which are complete but where the walk ended early because nothing is left."""
    return walk.collect(rows, walk.masks(masks, len(rows.live)), limit if rows.level == walk.levels else 0)


def _found(
    model: SpellingModel, query: QueryBatch, segments: Segments, masks: Masks | Sequence[Masks] | None, how: Spelling,
    limit: int | None,
) -> Candidates:  # fmt: skip
    walk = segments if isinstance(segments, Walk | TensorWalk) else Walk(segments)
    limit = limit or how.limit
    with torch.inference_mode():
        if isinstance(walk, TensorWalk):
            on_device = spelled(model, query, walk, walk.masks(masks, len(query)), how)
            return candidates(walk.host, walk.to_host(on_device.packed()), masks, limit)
        if how.mode == "beam":
            return candidates(
                walk, _spell(model, query, walk, masks, how.width, how.scoring == "children"), masks, limit
            )
        log_probs, addresses = _side_by_side(model, query), walk.masks(masks, len(query))
        if how.mode == "one-shot":
            return walk.draft_items(log_probs, how.width, addresses, limit)
        return candidates(walk, _verified(model, query, walk.draft(log_probs, how.width, addresses)), masks, limit)


def _spell(
    model: SpellingModel, query: QueryBatch, walk: Walk, masks: Masks | Sequence[Masks] | None,
    beam: int, renormalise: bool,
) -> Rows:  # fmt: skip
    """The beam's rows after the last token."""
    queries = len(query)
    addresses, allowed = walk.masks(masks, queries), walk.checked_masks(masks, queries)
    rows, state = walk.root(queries), model.start(query)
    log_probs = _numpy(state.modality_logp[:, None, :])
    place = np.zeros((queries, 1), np.int64)  # where the state has each row
    for level in range(walk.levels):
        if level:
            asked = np.arange(rows.width) < rows.live[:, None]
            if not asked.any():
                break
            undecided = asked & (_allowed_below(walk, rows, allowed) > 1)
            if renormalise:
                asked = undecided
            elif walk.levels - level > 1 and not undecided.any():
                return _score_rest(model, state, walk, rows, addresses, place)
            log_probs, state, place = _step(model, state, rows, asked, place, walk.vocab_sizes[level])
        rows = walk.expand(rows, log_probs, beam, addresses, renormalise=renormalise)
    return rows


def _step(
    model: SpellingModel, state: Any, rows: Rows, asked: np.ndarray, place: np.ndarray, vocabulary: int
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Ask the model about some of the rows.

    Args:
        asked: (n, width) bool, which ones; those that have more than one next token among them.
        place: (n, B) int64, the state's number of each row that these rows continue.

    Returns:
        Log-probabilities (n, width, V) of the next token, 0 in other rows ((n, 1, V) where there are only others); the
        state that knows the rows asked about, and their place in it, (n, width).
    """
    queries, width = asked.shape
    most = int(asked.sum(1).max())
    if not most:
        return np.zeros((queries, 1, vocabulary), np.float32), state, place
    # the rows asked about come first; what fills a query up to the fullest one is not used
    chosen = np.arange(width)[None] if most == width else np.argsort(~asked, axis=1, kind="stable")[:, :most]
    here = np.arange(queries)[:, None], chosen
    device = state.modality_logp.device
    parents = _tensor(place[here[0], rows.parent[here]], device) if rows.level > 1 else None
    found, state = model.step(state, _tensor(rows.codes[*here, rows.level - 1], device), parents, rows.level)
    log_probs = _numpy(found)
    if most < width:
        scattered = np.zeros((queries, width, vocabulary), log_probs.dtype)
        scattered[here] = log_probs
        log_probs = scattered
    place = np.zeros((queries, width), np.int64)
    place[here] = np.arange(most)
    return log_probs, state, place


def _score_rest(
    model: SpellingModel, state: Any, walk: Walk, rows: Rows, addresses: MaskAddresses, place: np.ndarray
) -> Rows:
    """Complete rows of one allowed item each, the remaining tokens scored in one pass."""
    level, width = rows.level, rows.width
    leaves = rows
    for deeper in range(level, walk.levels):  # certain tokens change no score, and rows keep their order
        certain = np.zeros((len(rows.live), 1, walk.vocab_sizes[deeper]), np.float32)
        leaves = walk.expand(leaves, certain, width, addresses)
    device = state.modality_logp.device
    parents = _tensor(np.take_along_axis(place, rows.parent[:, :width], 1), device) if level > 1 else None
    scored = model.score(state, _tensor(leaves.codes[:, :width, level - 1 :], device), parents, level)
    known = rows.level_log_prob[:, :width, :level]
    return _reordered(leaves, np.concatenate([known, _numpy(scored)], axis=2))


def _allowed_below(walk: Walk, rows: Rows, masks: Sequence[Masks]) -> np.ndarray:
    """(n, width) int64: allowed items below each row, over all segments.

    Args:
        masks: one for each segment, once or for each query.
    """
    queries, width = len(rows.live), rows.width
    counts = np.zeros((queries, width), np.int64)
    sharing: dict[tuple[int, ...], list[int]] = {}  # queries under the same masks
    for at, of_segments in enumerate(masks):
        sharing.setdefault(tuple(map(id, of_segments)), []).append(at)
    for s, segment in enumerate(walk.segments):
        low, high = segment.items_of(rows.level, rows.low[:, :width, s], rows.high[:, :width, s])
        for numbers in sharing.values():
            own = slice(None) if len(sharing) == 1 else numbers
            mask = masks[numbers[0]][s]
            counts[own] += high[own] - low[own] if mask is None else mask.rank(high[own]) - mask.rank(low[own])
    return counts


def _verified(model: SpellingModel, query: QueryBatch, rows: Rows) -> Rows:
    """Complete rows by the decoder's scores of their tokens, in one pass."""
    width = rows.width
    if not width:
        return rows
    state = model.start(query)
    codes = _tensor(rows.codes[:, :width], state.modality_logp.device)
    exact = torch.gather(state.modality_logp, 1, codes[..., 0])[..., None]
    if rows.levels > 1:
        exact = torch.cat([exact, model.score(state, codes, None, 1)], 2)
    return _reordered(rows, _numpy(exact))


def _side_by_side(model: SpellingModel, query: QueryBatch) -> np.ndarray:
    """(n, sum of V_l) log-probabilities of all levels' tokens."""
    return _numpy(torch.cat(model.one_shot(query), 1))


def _reordered(rows: Rows, level_log_prob: np.ndarray) -> Rows:
    """Complete rows, best first by new log-probabilities (n, R, levels) of their first R."""
    width = level_log_prob.shape[1]
    level_log_prob = level_log_prob.astype(np.float64)
    score = np.where(np.arange(width) < rows.live[:, None], level_log_prob.sum(2), -np.inf)
    best = np.argsort(-score, axis=1, kind="stable")
    take = np.arange(len(score))[:, None], best
    out = rows._replace(live=np.isfinite(score).sum(1), block=rows.block[take])  # a copy
    out.score[:], out.level_log_prob[:] = score[take], level_log_prob[take]
    return out


def _tensor(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Whole numbers of any type as int64."""
    return torch.from_numpy(numbers.astype(np.int64)).to(device)


def _numpy(log_probs: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(log_probs.detach().cpu().numpy())
