"""What an aligner adds to its heads, chosen for each modality on validation queries.

Three corrections (see :mod:`ace_core.aligner`): how much an item leans towards its captions, how much of its popularity
is taken off, and the offset between captioned items and others. On a large corpus of sentences all of them help; where
captions name classes, or are few, some of them find less than the heads alone. So all, half and none of each are tried,
and what counts is that queries of neither kind (for captioned items, for others) find less than by the heads alone,
and then the geometric mean of what both find.

Where items have a single caption, none can be kept out to ask for captioned items with. Then training captions ask,
each mixed with another one until the heads find no more of them than they find of what they never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.fitting import generator_for
from ace_core.items import MODALITIES, Modality
from ace_core.popularity import Bank

_SMALLEST_BANK = 256
_QUERIES = 500  # of each kind
_GALLERY = 20_000  # items that a validation query's own competes with
_FEWEST_QUERIES = 10  # of each kind: fewer choose nothing
_SHARES = (1.0, 0.5, 0.0)
_DILUTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_OFFSETS = np.round(np.arange(-0.05, 0.2001, 0.01), 2)


@torch.inference_mode()
def fit_corrections(
    aligner: Aligner,
    features: Mapping[Modality, np.ndarray],
    pairs: CaptionPairs,
    validation: CaptionPairs | None,
    seed: int,
) -> dict[str, float]:
    """Fill the bank with training captions and set every modality's corrections; returns them by name.

    Where validation has not enough queries for items without captions, memory and popularity stay as set, and the
    offset makes captioned items the first wrong answer as often as their number bears out.

    Args:
        features: raw features (n_m, d_m) of each modality.
        pairs: training captions, ``validation`` held-out ones; rows count the modalities in ``MODALITIES`` order.
    """
    texts = _texts_of(aligner, pairs, seed)
    if len(texts) >= _SMALLEST_BANK and aligner.settings.popularity:
        aligner.bank = texts.half()
    bank = Bank(texts)
    vectors = torch.from_numpy(aligner.text_vectors(pairs.pooled)[:, :-1].copy())
    rows = np.asarray(pairs.rows, np.int64)
    figures: dict[str, float] = {}
    start = 0
    for m in MODALITIES:
        count = len(features.get(m, ()))
        mine = (rows >= start) & (rows < start + count)
        if count and mine.any():
            heads = [
                aligner.tower_item(m, torch.from_numpy(np.asarray(features[m][i : i + 4096], np.float32)))
                for i in range(0, count, 4096)
            ]
            memory = torch.zeros(count, aligner.dim - 1)
            memory.index_add_(0, torch.from_numpy(rows[mine] - start), vectors[torch.from_numpy(mine)])
            part = _Part(aligner, torch.cat(heads), memory, bank)
            asked = _asked(aligner, part, pairs, validation, start, count)
            chosen = _evened(aligner, part, (validation, pairs), start) if asked is None else _best(part, asked)
            figures |= _set(aligner, m, part, chosen)
        start += count
    return figures


@dataclass(frozen=True)
class _Choice:
    """Weights of memory and popularity, and the offset of captioned items."""

    memory: float
    popularity: float
    offset: float


class _Part:
    """The items of one modality: the heads' vectors (n, D - 1) and the sum of each item's captions' (n, D - 1)."""

    def __init__(self, aligner: Aligner, heads: torch.Tensor, memory: torch.Tensor, bank: Bank) -> None:
        self.settings, self.banked, self.bank = aligner.settings, bool(len(aligner.bank)), bank
        self.heads, self.captioned = heads, memory.square().sum(1) > 0
        self.memory = F.normalize(memory, dim=-1)

    def vectors(self, weight: float, rows: torch.Tensor) -> torch.Tensor:
        """Items (n, D - 1) that lean towards their captions by so much."""
        leaning = F.normalize((1 - weight) * self.heads[rows] + weight * self.memory[rows], dim=-1)
        return torch.where(self.captioned[rows, None], leaning, self.heads[rows])


@dataclass(frozen=True)
class _Asked:
    """Validation queries of one modality: vectors (n, D - 1); ``right`` (n, c) bool over ``gallery`` (c,) rows, all
    items that a text of theirs describes; ``known`` (n,) bool, asks for a captioned item."""

    queries: torch.Tensor
    gallery: torch.Tensor
    right: torch.Tensor
    known: torch.Tensor


def _texts_of(aligner: Aligner, pairs: CaptionPairs, seed: int) -> torch.Tensor:
    """(m, D - 1) vectors of distinct training captions, at most ``bank`` of them."""
    distinct = np.unique(np.asarray(pairs.pooled, np.float32), axis=0)
    order = torch.randperm(len(distinct), generator=generator_for(seed, 5)).numpy()
    chosen = distinct[np.sort(order[: aligner.settings.bank])]
    return torch.from_numpy(aligner.text_vectors(chosen)[:, :-1].copy())


def _asked(
    aligner: Aligner, part: _Part, pairs: CaptionPairs, validation: CaptionPairs | None, start: int, count: int
) -> _Asked | None:
    """The modality's validation queries, or None where there are too few for items without captions."""
    if validation is None:
        return None
    owner = np.concatenate((validation.rows, pairs.rows)).astype(np.int64) - start
    pooled = np.concatenate((validation.pooled, pairs.pooled)).astype(np.float32)
    here = np.flatnonzero((owner >= 0) & (owner < count))
    captioned = part.captioned.numpy()[owner[here]]
    held_out = here < len(validation)
    known, other, trained = here[held_out & captioned], here[held_out & ~captioned], here[~held_out]
    derived = len(known) < _FEWEST_QUERIES
    kinds = [trained if derived else known, other]
    if min(len(k) for k in kinds) < _FEWEST_QUERIES:
        return None
    chosen = np.concatenate([k[:: -(-len(k) // _QUERIES)] for k in kinds])
    # an item is right for a query where any of its captions, held out or not, is the query's text
    text = np.unique(pooled, axis=0, return_inverse=True)[1].reshape(-1)
    described = here[np.isin(text[here], text[chosen])]
    gold = np.unique(owner[described])
    others = np.random.default_rng(0).permutation(count)[: max(0, _GALLERY - len(gold))]
    gallery = np.union1d(gold, others)
    right = torch.zeros(len(chosen), len(gallery), dtype=torch.bool)
    place = np.searchsorted(gallery, owner[described])
    for text_id in np.unique(text[chosen]):
        asking = torch.from_numpy(np.flatnonzero(text[chosen] == text_id))
        right[asking[:, None], torch.from_numpy(place[text[described] == text_id])] = True
    queries = torch.from_numpy(aligner.text_vectors(pooled[chosen])[:, :-1].copy())
    asked = _Asked(queries, torch.from_numpy(gallery), right, part.captioned[torch.from_numpy(owner[chosen])])
    return _diluted(part, asked) if derived else asked


def _diluted(part: _Part, asked: _Asked) -> _Asked:
    """Queries for captioned items that are training captions, made as hard as captions that nobody trained on: among
    all items the heads find no more of them than of the other queries among the items without captions."""
    known, rest = asked.known, ~part.captioned[asked.gallery]
    own, heads = asked.queries[known], part.heads[asked.gallery]
    mixed_in = own[torch.from_numpy(np.random.default_rng(1).permutation(len(own)))]
    unseen = _found(asked.queries[~known] @ heads[rest].T, asked.right[~known][:, rest])
    tried = [F.normalize(own + share * mixed_in, dim=-1) for share in _DILUTIONS]
    far = [abs(_found(queries @ heads.T, asked.right[known]) - unseen) for queries in tried]
    queries = asked.queries.clone()
    queries[known] = tried[int(np.argmin(far))]
    return replace(asked, queries=queries)


def _found(scores: torch.Tensor, right: torch.Tensor) -> float:
    """Mean reciprocal rank of the best right item (n, c)."""
    best = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
    return float((1 / (1 + ((scores > best) & ~right).sum(1).double())).mean())


def _best(part: _Part, asked: _Asked) -> _Choice:
    settings = part.settings
    tried: dict[_Choice, tuple[float, float]] = {}
    captioned = part.captioned[asked.gallery]
    for memory in sorted({share * settings.caption_memory for share in _SHARES}, reverse=True):
        x = part.vectors(memory, asked.gallery)
        similar = asked.queries @ x.T
        near = part.bank.nearest(x) if part.banked else torch.zeros(len(x))
        for popularity in sorted({share * settings.popularity * part.banked for share in _SHARES}, reverse=True):
            found = _mean_reciprocal_ranks(similar - popularity * near, asked, captioned)
            tried |= {_Choice(memory, popularity, float(o)): f for o, f in zip(_OFFSETS, found)}
    alone = tried[_Choice(0.0, 0.0, 0.0)]

    def merit(choice: _Choice) -> tuple[float, float, float]:
        """Neither kind worse than by the heads, then both, then as little as will do."""
        ratios = [found / max(own, 1e-6) for found, own in zip(tried[choice], alone)]
        little = -(choice.memory + choice.popularity + abs(choice.offset))
        return round(min(1.0, *ratios), 2), round(float(np.sum(np.log(np.maximum(ratios, 1e-6)))), 6), little

    return max(tried, key=merit)


def _evened(aligner: Aligner, part: _Part, texts: Sequence[CaptionPairs | None], start: int) -> _Choice:
    """The weights as they are set, and an offset that needs no queries for captioned items; the first of ``texts`` that
    has enough captions of the part's items is asked."""
    memory, popularity = part.settings.caption_memory, part.settings.popularity * part.banked
    if part.captioned.all() or not part.captioned.any() or not memory:
        return _Choice(memory, popularity, 0.0)
    count = len(part.heads)
    gallery = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(count)[:_GALLERY]))
    x = part.vectors(memory, gallery)
    items = x if not part.banked else torch.cat((x, -popularity * part.bank.nearest(x)[:, None]), 1)
    captioned = part.captioned[gallery]
    for asked in texts:
        rows = np.empty(0, np.int64) if asked is None else np.asarray(asked.rows, np.int64) - start
        here = np.flatnonzero((rows >= 0) & (rows < count))
        if asked is None or len(here) < _FEWEST_QUERIES:
            continue
        here = here[:: -(-len(here) // _QUERIES)]
        queries = torch.from_numpy(aligner.text_vectors(asked.pooled[here])[:, : items.shape[1]].copy())
        scores = queries @ items.T
        scores[torch.from_numpy(rows[here])[:, None] == gallery] = -torch.inf
        best, other = (scores.masked_fill(~side, -torch.inf).max(1).values for side in (captioned, ~captioned))
        shares = [float((best - float(o) > other).double().mean()) for o in _OFFSETS]
        fair = float(captioned.double().mean())
        return _Choice(memory, popularity, float(min(zip(np.abs(np.subtract(shares, fair)), _OFFSETS))[1]))
    return _Choice(memory, popularity, 0.0)


def _mean_reciprocal_ranks(scores: torch.Tensor, asked: _Asked, captioned: torch.Tensor) -> list[tuple[float, float]]:
    """For each of the offsets: of queries for captioned items, and of the others. A kind is answered by right items of
    its kind (where captions name classes, captioned classmates would hide that no other item is found); those of the
    other are no wrong answers.

    Scores (n, c) are sorted once; an offset only moves the captioned ones against the others.
    """
    lowest = torch.full_like(scores, -1e9)
    sides = []
    for side in (captioned, ~captioned):
        own = torch.where(asked.right & side, scores, lowest).max(1).values
        rivals = torch.where(asked.right | ~side, lowest, scores).sort(1).values
        sides.append((own, rivals.contiguous()))
    (own_c, rivals_c), (own_u, rivals_u) = sides
    out = []
    for offset in _OFFSETS:
        level = torch.where(asked.known, own_c - float(offset), own_u)[:, None]
        above = [
            rivals.shape[1] - torch.searchsorted(rivals, level + shift, right=True)
            for rivals, shift in ((rivals_c, float(offset)), (rivals_u, 0.0))
        ]
        reciprocal = 1 / (1 + above[0] + above[1]).double().squeeze(1)
        out.append((float(reciprocal[asked.known].mean()), float(reciprocal[~asked.known].mean())))
    return out


def _set(aligner: Aligner, modality: Modality, part: _Part, chosen: _Choice) -> dict[str, float]:
    at = modality.token
    aligner.memory_weight[at], aligner.popularity_weight[at] = chosen.memory, chosen.popularity
    aligner.offset[at] = chosen.offset
    if part.banked:
        x = part.vectors(chosen.memory, torch.arange(len(part.heads)))
        aligner.centre[at] = chosen.popularity * part.bank.nearest(x).mean()
    name = modality.value
    return {
        f"{name}_caption_memory": chosen.memory,
        f"{name}_popularity": chosen.popularity,
        f"{name}_captioned_offset": chosen.offset,
    }
