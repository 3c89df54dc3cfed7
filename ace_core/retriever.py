"""The whole read path in one process: a text, a vector or a file in; ranked items out. No Ray needed.

from ace_core.retriever import Retriever
retriever = Retriever.open("demo/store")
for hit in retriever.search(["a red fruit"], k=5)[0]:
    print(hit.score, hit.item_id, hit.captions)
"""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ace_core.aligner import Aligner
from ace_core.attributes import FilterValue, check_names
from ace_core.candidates import Candidates
from ace_core.config import LimitSettings, SearchSettings
from ace_core.decoding import search_candidates
from ace_core.encoders import TextEncoder
from ace_core.errors import QueryError
from ace_core.examples import with_examples
from ace_core.filters import ItemMask
from ace_core.generator.model import Generator
from ace_core.generator.read_once import ReadOnce
from ace_core.items import MODALITIES, Modality
from ace_core.no_hits import why_nothing
from ace_core.plan import spellings
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import Hit, Mode, QueryBatch, SearchRequest
from ace_core.query_encoder import QueryEncoder
from ace_core.ranking import Ranker
from ace_core.replay import BATCHES, Replay
from ace_core.scoring import similarity
from ace_core.segment import StoredItem
from ace_core.snapshot import Snapshot
from ace_core.space import cosine
from ace_core.tensor_walk import TensorWalk
from ace_core.walk import Masks, Walk

RANKING_NAME = "ranking.json"
_MASK_CACHE = 64
_PROBE = SearchRequest(text="a")

GENERATOR_ONLY = Ranker(generator=1.0, similarity=0.0)
"""`search.rerank: false`: the generator's own order."""


class Retriever:
    """A snapshot with its models, ready to answer. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        queries: QueryEncoder,
        quantizer: Quantizer,
        generator: Generator,
        ranker: Ranker,
        settings: SearchSettings,
        device: str,
    ) -> None:
        self.snapshot = snapshot
        self.settings = settings
        self.queries = queries
        self.device = device
        self._quantizer = quantizer
        self._generator = generator.to(device).eval()
        self._ranker = ranker
        self._galleries = [segment.gallery for segment in snapshot.segments]
        indexes = [gallery.index for gallery in self._galleries]
        self._walk: Walk | Replay
        if device == "cpu":
            self._walk = Walk(indexes)
        else:
            self._walk = Replay(partial(ReadOnce, self._generator), TensorWalk(indexes, device))
        self._masks: OrderedDict[str, list[ItemMask | None]] = OrderedDict()
        self._notes: OrderedDict[str, str] = OrderedDict()

    @classmethod
    def open(
        cls,
        store: str | Path,
        snapshot_id: str | None = None,
        *,
        settings: SearchSettings | None = None,
        limits: LimitSettings | None = None,
        device: str = "cpu",
        verify: bool = True,
        text_encoder: TextEncoder | None = None,
    ) -> Retriever:
        """Open a local store's snapshot (by default the current one) with its models.

        Args:
            limits: what a file that is searched by may cost.
            verify: check every file's SHA-256 before use.
            text_encoder: a loaded encoder to reuse when a snapshot replaces another.

        Raises:
            StoreError: nothing is published, a part is damaged, or parts do not belong together.
            ModelError: the text encoder cannot be had here.
        """
        snapshot = Snapshot.open(Path(store), snapshot_id, verify=verify)
        quantizer = Quantizer.load(snapshot.model_folder("quantizer"))
        queries = QueryEncoder(
            snapshot,
            Aligner.load(snapshot.model_folder("aligner")),
            quantizer,
            limits=limits or LimitSettings(),
            device=device,
            text_encoder=text_encoder,
        )
        generator_folder = snapshot.model_folder("generator")
        return cls(
            snapshot,
            queries=queries,
            quantizer=quantizer,
            generator=Generator.load(generator_folder),
            ranker=Ranker.load(generator_folder / RANKING_NAME),
            settings=settings or SearchSettings(),
            device=device,
        )

    @property
    def threshold(self) -> float:
        """Scores below this are no confident match."""
        return self._ranker.threshold

    def search(
        self,
        texts: Sequence[str],
        *,
        k: int | None = None,
        modality: Modality | str | Sequence[Modality | str] | None = None,
        filters: Mapping[str, FilterValue] | None = None,
        mode: Mode | None = None,
        beam: int | None = None,
    ) -> list[list[Hit]]:
        """The k best items for each text, best first; fewer when fewer pass the filters.

        Raises:
            QueryError: a text is empty, or a filter or modality makes no sense.
        """
        modalities = _modalities(modality)
        return self.search_batch(
            [
                SearchRequest(text=t, k=k, modalities=modalities, filters=filters or {}, mode=mode, beam=beam)
                for t in texts
            ]
        )

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer requests together: texts are encoded in one pass, and requests with the same mode and beam are decoded
        in one, each under its own filters. Every answer is the same as if its request had come alone."""
        answers: list[list[Hit]] = [[] for _ in requests]
        groups: dict[tuple[Mode, int], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            beam = max(request.beam or self.settings.beam, request.k or self.settings.k)
            groups[request.mode or self.settings.mode, beam].append(number)
        queries = self.queries.batch(requests) if requests else None
        for (mode, beam), numbers in groups.items():
            assert queries is not None
            batch = queries if len(groups) == 1 else queries[torch.tensor(numbers)]
            masks = [self._item_masks(requests[number]) for number in numbers]
            model, candidates = self._candidates(batch, masks, mode, beam)
            kept = [requests[number].k or self.settings.k for number in numbers]
            best = None
            if any(requests[number].filters for number in numbers):
                best = self._best_unfiltered(model, batch, [requests[number] for number in numbers], mode, beam)
            examples = [requests[number].examples for number in numbers]
            candidates, asked_for = with_examples(candidates, examples, model, batch, self._galleries, masks)
            for number, hits in zip(numbers, self._rank(model.vector, candidates, kept, best, asked_for)):
                answers[number] = hits
        return answers

    def warming(self) -> Iterator[Callable[[], object]]:
        """What to do so that no search waits for it, in short pieces: a search, and on an accelerator captures of the
        searches that are asked for most (a short text, in the settings' mode, unfiltered), in batches of every size."""
        yield partial(self.search_batch, [_PROBE])
        if isinstance(self._walk, Replay):
            yield from (partial(self._capture, size) for size in reversed(BATCHES))

    def _capture(self, size: int) -> None:
        assert isinstance(self._walk, Replay)
        plan = spellings(self.settings, max(self.settings.beam, self.settings.k))
        self._walk.warm(self.queries.batch([_PROBE]), self._item_masks(_PROBE), plan, size)

    def warm(self) -> None:
        """All of :meth:`warming` at once."""
        for piece in self.warming():
            piece()

    def why_nothing(self, modalities: Sequence[Modality], filters: Mapping[str, FilterValue]) -> str:
        """Why a search of these modalities, under these filters, finds nothing at all: one sentence, with the values
        that there are (:mod:`ace_core.no_hits`); empty where it finds something."""
        key = _key(modalities, filters)
        if key not in self._notes:
            self._notes[key] = why_nothing(self.snapshot, modalities, filters)
            if len(self._notes) > _MASK_CACHE:
                self._notes.popitem(last=False)
        return self._notes[key]

    def item(self, item_id: str) -> StoredItem | None:
        """What the snapshot holds of an item, or None."""
        found = self.snapshot.find(item_id)
        return None if found is None else self.snapshot.segments[found[0]].item(found[1])

    def _item_masks(self, request: SearchRequest) -> list[ItemMask | None]:
        """One mask a segment: live items of the wanted modalities that pass the filters; None where all do."""
        key = _key(request.modalities, request.filters)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key]
        check_names(request.filters, [run.type for s in self.snapshot.segments for run in s.attributes])
        masks: list[ItemMask | None] = []
        for segment, removed in zip(self.snapshot.segments, self.snapshot.removed):
            allowed = np.ones(len(segment), bool)
            allowed[removed] = False
            if request.modalities:
                allowed &= np.isin(segment.gallery.codes[:, 0], [m.token for m in request.modalities])
            if request.filters:
                allowed &= segment.matching(request.filters)
            masks.append(None if allowed.all() else ItemMask.of(allowed))
        self._masks[key] = masks
        if len(self._masks) > _MASK_CACHE:
            self._masks.popitem(last=False)
        return masks

    def _candidates(
        self, batch: QueryBatch, masks: Sequence[Masks], mode: Mode, beam: int, model: ReadOnce | None = None
    ) -> tuple[ReadOnce, Candidates]:
        """What a search finds under each query's masks, and the generator that has read the queries (``model``, where
        it has)."""
        settings = self.settings.model_copy(update={"mode": mode})
        if isinstance(self._walk, Replay):
            vector, found = self._walk.search(batch, masks, spellings(settings, beam))
            return ReadOnce(self._generator, batch, vector), found
        model = model or ReadOnce(self._generator, batch)
        return model, search_candidates(model, batch, self._walk, masks, settings=settings, beam=beam)

    def _best_unfiltered(
        self, model: ReadOnce, batch: QueryBatch, requests: Sequence[SearchRequest], mode: Mode, beam: int
    ) -> np.ndarray:
        """(n,) the best score that each query finds without its filters: what a filter leaves is a match if it is about
        as good, not for being alone. -inf where there is no filter."""
        masks = [self._item_masks(replace(request, filters={})) for request in requests]
        _, found = self._candidates(batch, masks, "one-shot" if self.settings.rerank else mode, beam, model)
        filtered = np.array([bool(request.filters) for request in requests])
        score, _ = self._scored(model.vector, found)
        return np.where(filtered, score.max(axis=1, initial=-np.inf), -np.inf)

    def _scored(self, refined: torch.Tensor, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Scores and similarities (n, c) of candidates."""
        similar = similarity(refined.float().cpu().numpy(), candidates, self._galleries, self._quantizer)
        return self._ranking.score(candidates.log_prob, similar, candidates.valid), similar

    @property
    def _ranking(self) -> Ranker:
        return self._ranker if self.settings.rerank else GENERATOR_ONLY

    def _rank(
        self,
        refined: torch.Tensor,
        candidates: Candidates,
        kept: Sequence[int],
        best: np.ndarray | None,
        asked_for: np.ndarray,
    ) -> list[list[Hit]]:
        """The best ``kept`` candidates of each query as hits, by the ranker's score; before them those (n, c) that the
        query is an example of, for certain."""
        if not candidates.valid.any():
            return [[] for _ in kept]
        score, similar = self._scored(refined, candidates)
        probability = self._ranking.probability(score, similar, best)
        probability = np.where(asked_for, 1.0, probability)
        order = np.argsort(np.where(asked_for, -np.inf, -score), axis=1, kind="stable")
        chosen = [
            (number, int(column))
            for number, limit in enumerate(kept)
            for column in order[number, :limit]
            if candidates.valid[number, column]
        ]
        answers: list[list[Hit]] = [[] for _ in kept]
        queries = refined.float().cpu().numpy()
        items, vectors = self._read(candidates, chosen, queries.shape[1])
        cosines = cosine(queries[[number for number, _ in chosen]], vectors).tolist()
        for at, item, similar_to in zip(chosen, items, cosines):
            answers[at[0]].append(
                Hit(
                    item_id=item.item_id,
                    score=float(probability[at]),
                    modality=item.modality,
                    uri=item.uri,
                    mime=item.mime,
                    captions=item.captions,
                    attributes=item.attributes,
                    identifier=item.identifier,
                    log_prob=float(candidates.log_prob[at]),
                    similarity=similar_to,
                    level_probs=tuple(np.exp(candidates.level_log_prob[at]).tolist()),
                    start_seconds=item.start_seconds,
                    end_seconds=item.end_seconds,
                )
            )
        return answers

    def _read(
        self, candidates: Candidates, chosen: Sequence[tuple[int, int]], dim: int
    ) -> tuple[list[StoredItem], np.ndarray]:
        """The items of some candidates (query, column) and their vectors (m, dim), each segment's read in one go."""
        items: dict[int, StoredItem] = {}
        vectors = np.zeros((len(chosen), dim), np.float32)
        for number, segment in enumerate(self.snapshot.segments):
            here = [i for i, at in enumerate(chosen) if candidates.segment[at] == number]
            if here:
                rows = np.array([candidates.row[chosen[i]] for i in here])
                items |= zip(here, segment.items_at(rows))
                vectors[here] = segment.gallery.vectors(rows, self._quantizer)
        return [items[i] for i in range(len(chosen))], vectors


def _key(modalities: Sequence[Modality], filters: Mapping[str, FilterValue]) -> str:
    return json.dumps([sorted(modalities), dict(filters)], sort_keys=True, default=str)


def _modalities(given: Modality | str | Sequence[Modality | str] | None) -> tuple[Modality, ...]:
    names = [] if given is None else [given] if isinstance(given, str) else list(given)
    try:
        return tuple(Modality(name) for name in names)
    except ValueError:
        raise QueryError(f"unknown modality in {names}", remedy=f"Choose from {', '.join(MODALITIES)}.") from None
