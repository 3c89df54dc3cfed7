"""What the retrieval benchmark measures: a set dealt into parts, the aligned space, a quantizer with a generator."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.aligner_training import fit_aligner
from ace_core.candidates import Candidates
from ace_core.config import AlignerSettings, GeneratorSettings, QuantizerSettings, SearchSettings
from ace_core.decoding import search_candidates
from ace_core.evaluation import ranks_in
from ace_core.fitting import FitHooks, Progress
from ace_core.generator.data import TrainingData
from ace_core.generator.model import Generator
from ace_core.generator.refinement import choose_refinement
from ace_core.generator.training import fit_generator
from ace_core.identifiers import sort_order
from ace_core.items import MODALITIES
from ace_core.manifest import fingerprint
from ace_core.quantize.fit import fit_quantizer
from ace_core.query import QueryBatch
from ace_core.ranking import Ranker, even_weights, fit_ranker
from ace_core.scoring import Gallery, similarity
from ace_core.walk import Walk
from benchmarks.retrieval_data import DataSet, TextTable

_QUERIES_AT_ONCE = 250
_SEEN_QUERIES = 2500
_RANKING_QUERIES = 600

VERIFIED = SearchSettings(mode="verify")
ONE_SHOT = SearchSettings(mode="one-shot")
"""Settings of the measured searches: their defaults are the product's."""


def beam_of(width: int, *, pool: int | None = None) -> SearchSettings:
    """A beam of so many rows, with the pool of drafted items that the product ranks beside it (or another)."""
    settings = SearchSettings(mode="beam", beam=width)
    return settings if pool is None else settings.model_copy(update={"pool": pool})


@dataclass(frozen=True)
class Queries:
    """Captions that ask: ``at`` (n,) into the text table, ``gold`` (n,) item rows."""

    at: np.ndarray
    gold: np.ndarray

    def of(self, rows: np.ndarray) -> Queries:
        """Those that ask for one of some items."""
        mine = np.isin(self.gold, rows)
        return Queries(self.at[mine], self.gold[mine])


@dataclass(frozen=True)
class World:
    """A set, its texts and who is who.

    Attributes:
        train: captions that are trained on. validation: unseen, then seen. unseen, seen: what the tables ask.
        present: (N,) bool, items that the quantizer and the generator are fitted on.
    """

    data: DataSet
    text: TextTable
    train: np.ndarray
    validation: np.ndarray
    unseen: Queries
    seen: Queries
    present: np.ndarray

    @property
    def test_items(self) -> np.ndarray:
        return np.flatnonzero(self.data.split == "test")

    def pairs(self, at: np.ndarray) -> CaptionPairs:
        return CaptionPairs(self.text.pooled[at], self.data.rows[at])


def make_world(data: DataSet, text: TextTable, most_queries: int) -> World:
    """Deal captions and items to their parts; at most so many queries of each kind and modality, evenly spread."""
    split = data.split[data.rows]
    counts = np.bincount(data.rows, minlength=len(data.split))
    last = (data.position == counts[data.rows] - 1) & (counts[data.rows] > 1)
    own = [np.flatnonzero(data.tokens[data.rows] == m.token) for m in data.features]
    kept = [at[(split[at] == "train") & last[at]] for at in own]
    kept = [at[:: max(1, len(at) // _SEEN_QUERIES)] for at in kept]
    tests = [at[split[at] == "test"] for at in own]
    test = np.concatenate([at[:: max(1, -(-len(at) // most_queries))] for at in tests])
    seen = np.concatenate([at[1::2][:most_queries] for at in kept])
    tested = np.flatnonzero(data.split == "test")
    present = np.ones(len(data.split), bool)
    present[tested[1::2]] = False
    return World(
        data=data,
        text=text,
        train=np.flatnonzero((split == "train") & ~last),
        validation=np.concatenate([np.flatnonzero(split == "val"), *(at[::2] for at in kept)]),
        unseen=Queries(test, data.rows[test]),
        seen=Queries(seen, data.rows[seen]),
        present=present,
    )


@dataclass(frozen=True)
class Spaces:
    """The aligned space: ACE's vectors, with and without captions, the plain tower's, and the scale."""

    aligner: Aligner
    items: np.ndarray
    plain: np.ndarray
    queries: np.ndarray
    tower_items: np.ndarray
    tower_queries: np.ndarray


def fit_spaces(world: World, settings: AlignerSettings, cache: Path) -> Spaces:
    """Fit the aligner, or read the one that an earlier run fitted to the same data with the same settings."""
    features = world.data.features
    train = world.pairs(world.train)
    known = hashlib.sha256(b"".join(f.tobytes() for f in features.values()))
    known.update(train.rows.tobytes() + world.validation.tobytes())
    folder = cache / f"aligner.{fingerprint(world.data.name, settings.model_dump(), known.hexdigest())}"
    if folder.is_dir():
        aligner = Aligner.load(folder)
    else:
        aligner, metrics = fit_aligner(features, train, settings, validation=world.pairs(world.validation))
        print(f"  aligner: {metrics}", flush=True)
        aligner.save(folder)
    queries = aligner.text_vectors(world.text.pooled)
    with torch.inference_mode():
        parts = [aligner.tower_item(m, torch.from_numpy(features[m])).numpy() for m in MODALITIES if m in features]
    items = aligner.item_vectors(features, train)
    return Spaces(aligner, items, aligner.item_vectors(features), queries, np.concatenate(parts), queries[:, :-1])


@dataclass(frozen=True)
class Ready:
    """A gallery to search: the segment, its walk, and the corpus row of each of its items."""

    gallery: Gallery
    walk: Walk
    order: np.ndarray


class System:
    """One ACE: quantizer and generator on an aligned space, with everything that a search needs."""

    def __init__(
        self, world: World, vectors: np.ndarray, queries: np.ndarray, scale: float, *,
        quantizer: QuantizerSettings, generator: GeneratorSettings, captions: np.ndarray,
        plain: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Fit.

        Args:
            vectors: (N, D) items. queries: (C, D) every caption's vector. scale: of the aligned space.
            captions: those that the generator is trained on.
            plain: (N, D) items without their captions' share.
        """
        self.world, self.vectors, self.queries = world, vectors, queries
        tokens = world.data.tokens
        here = np.flatnonzero(world.present)
        self.quantizer, _ = fit_quantizer(
            vectors[here], tokens[here], quantizer, queries=queries[captions] if len(captions) else None
        )
        self.codes = self.quantizer.assign(vectors, tokens)
        local = np.full(len(vectors), -1)
        local[here] = np.arange(len(here))
        text = world.text
        training = TrainingData(
            vectors=vectors[here],
            codes=self.codes[here],
            query_vectors=queries[captions],
            hidden=np.asarray(text.hidden[captions]),
            mask=text.mask[captions],
            rows=local[world.data.rows[captions]],
            teacher_scale=scale,
            plain_vectors=None if plain is None else plain[here],
        )
        torch.manual_seed(0)
        model = Generator(generator, self.quantizer, text.hidden.shape[3], text.hidden.shape[1])
        begin = time.perf_counter()
        self.model, self.report = fit_generator(model, training, generator, hooks=FitHooks(on_progress=_show))
        self.seconds = time.perf_counter() - begin
        if len(captions):
            at = self._validation()
            batches = [self.batch(at[i : i + _QUERIES_AT_ONCE]) for i in range(0, len(at), _QUERIES_AT_ONCE)]
            choose_refinement(self.model, batches, world.data.rows[at], vectors, tokens, trained=self._trained(at))
        self.ranker = Ranker(generator=0.0, similarity=scale)
        self._found: tuple[object, tuple[Candidates, np.ndarray, np.ndarray]] | None = None

    def _validation(self) -> np.ndarray:
        """Validation captions of items that this system was fitted on, evenly spread over each modality's."""
        rows = self.world.data.rows
        at = self.world.validation[self.world.present[rows[self.world.validation]]]
        most = min(_RANKING_QUERIES, 2 * len(self.world.unseen.at))
        tokens = self.world.data.tokens[rows[at]]
        own = [at[tokens == m] for m in np.unique(tokens)]
        return np.concatenate([a[:: max(1, len(a) // most)] for a in own])

    def _trained(self, at: np.ndarray) -> np.ndarray:
        """(n,) bool, which captions are of trained items."""
        rows = self.world.data.rows
        return np.isin(rows[at], rows[self.world.train])

    def batch(self, at: np.ndarray) -> QueryBatch:
        mask = self.world.text.mask[at]
        longest = int(mask.sum(1).max())
        hidden = np.asarray(self.world.text.hidden[at])[:, :, :longest].astype(np.float32)
        return QueryBatch(
            torch.from_numpy(self.queries[at]), torch.from_numpy(hidden), torch.from_numpy(mask[:, :longest].copy())
        )

    def ready(self, rows: np.ndarray) -> Ready:
        """Items (corpus rows) as a searched segment."""
        order = rows[sort_order(self.codes[rows], self.quantizer.vocab_sizes)]
        gallery = Gallery.build(self.codes[order], self.quantizer, self.vectors[order])
        return Ready(gallery, Walk([gallery.index]), order)

    def find(
        self, at: np.ndarray, rows: np.ndarray, settings: SearchSettings
    ) -> tuple[Candidates, np.ndarray, np.ndarray]:
        """Candidates of the queries ``at``, their corpus rows (n, c; -1 where not valid) and similarities (n, c)."""
        ready = self.ready(rows)
        parts = [
            self.search(ready, self.batch(at[i : i + _QUERIES_AT_ONCE]), settings)
            for i in range(0, len(at), _QUERIES_AT_ONCE)
        ]
        whole = _joined([found for found, _ in parts])
        similar = _padded([s for _, s in parts], whole.valid.shape[1])
        return whole, np.where(whole.valid, ready.order[whole.row], -1), similar

    def search(self, ready: Ready, query: QueryBatch, settings: SearchSettings) -> tuple[Candidates, np.ndarray]:
        """Candidates and their similarities: what a server does with queries whose text is encoded."""
        found = search_candidates(self.model, query, ready.walk, settings=settings)
        with torch.inference_mode():
            refined = self.model.refine(query).numpy()
        return found, similarity(refined, found, [ready.gallery], self.quantizer)

    def fit_ranking(self) -> None:
        """Learn the mix on validation queries in the gallery of everything."""
        at = self._validation()
        found, rows, similar = self.find(at, np.arange(len(self.vectors)), VERIFIED)
        right = self.right(rows, self.world.data.rows[at])
        self.ranker = fit_ranker(
            found.log_prob, similar, right, valid=found.valid, weight=even_weights(self._trained(at)), start=self.ranker
        )

    def right(self, rows: np.ndarray, gold: np.ndarray) -> np.ndarray:
        """(n, c) bool: which found rows answer their query."""
        twins = self.world.data.twins
        return rows == gold[:, None] if twins is None else (twins[rows] == twins[gold][:, None]) & (rows >= 0)

    def ranks(
        self, asked: Queries, rows: np.ndarray, settings: SearchSettings = VERIFIED, *, alone: bool = False
    ) -> np.ndarray:
        """Ranks of the golds: by the ranker, or (``alone``) by the generator's log-probability."""
        key = (settings, len(rows), len(asked.at), int(asked.at[0]))
        if self._found is None or self._found[0] != key:  # one search serves both orders
            self._found = key, self.find(asked.at, rows, settings)
        found, items, similar = self._found[1]
        ranker = Ranker(generator=1.0, similarity=0.0) if alone else self.ranker
        order = np.argsort(-ranker.score(found.log_prob, similar, found.valid), axis=1, kind="stable")
        return ranks_in(np.take_along_axis(items, order, 1), asked.gold, self.world.data.twins)


def joint_and_alone(
    world: World, cache: Path, aligner: AlignerSettings, quantizer: QuantizerSettings, generator: GeneratorSettings
) -> Mapping[str, System]:
    """One system for all modalities of a world, and one for each by itself, on one aligned space."""
    spaces = fit_spaces(world, aligner, cache)
    systems = {}
    for name, rows in {"joint": np.arange(len(spaces.items)), **world.data.rows_of_modality()}.items():
        present = world.present & np.isin(np.arange(len(world.present)), rows)
        part = World(world.data, world.text, world.train, world.validation, world.unseen, world.seen, present)
        mine = world.train[np.isin(world.data.rows[world.train], rows)]
        systems[name] = System(
            part, spaces.items, spaces.queries, spaces.aligner.scale,
            quantizer=quantizer, generator=generator, captions=mine, plain=spaces.plain,
        )  # fmt: skip
    return systems


def _joined(parts: Sequence[Candidates]) -> Candidates:
    width = max(p.valid.shape[1] for p in parts)
    arrays = {
        name: _padded([getattr(p, name) for p in parts], width)
        for name in ("valid", "segment", "row", "log_prob", "level_log_prob", "codes")
    }
    return Candidates(**arrays)


def _padded(parts: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = [np.pad(p, [(0, 0), (0, width - p.shape[1])] + [(0, 0)] * (p.ndim - 2)) for p in parts]
    return np.concatenate(out)


def _show(progress: Progress) -> None:
    if progress.step % 50 == 0:
        print(f"    {progress.stage} {progress.step}/{progress.total} loss {progress.metrics['loss']:.3f}", flush=True)
