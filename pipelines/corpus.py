"""What every fit begins with: the latest features, which of them may be trained on, and the captions' features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.config import Settings
from ace_core.features import Features, Pairs, Split, read_features, split_of
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.generated import with_generated
from pipelines.progress import Reporter
from pipelines.texts import CaptionFeatures, ensure_texts


@dataclass(frozen=True)
class Corpus:
    """A features part in memory, with its split."""

    features: Features
    split: Split


def load_corpus(store: Store, features_id: str, settings: Settings) -> Corpus:
    """Read a features part and split it; items without captions are trained on what `ace caption` says of them."""
    features = read_features(store.path("features", features_id), store.filesystem)
    return Corpus(features, split_of(with_generated(store, features.items), settings.split))


def captions_part(corpus: Corpus, settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """The features of all captions that are trained on or asked as queries (encoded now unless the store has them)."""
    split = corpus.split
    pairs = (split.train_pairs, split.seen_queries, split.unseen_queries, split.val_queries, split.val_shared)
    return ensure_texts([text for p in pairs for text in p.texts], settings, store, reporter)


def load_captions(store: Store, texts_id: str) -> CaptionFeatures:
    """Open a texts part."""
    return CaptionFeatures.load(store.local_copy("texts", texts_id))


def known_captions(corpus: Corpus, captions: CaptionFeatures) -> CaptionPairs:
    """What an index may know of its items: the training captions, as far as they were encoded."""
    pairs = corpus.split.train_pairs
    chosen = [(row, text) for row, text in zip(pairs.rows.tolist(), pairs.texts) if text in captions]
    return caption_pairs(Pairs(np.array([r for r, _ in chosen], np.int64), [t for _, t in chosen]), captions)


def caption_pairs(pairs: Pairs, captions: CaptionFeatures) -> CaptionPairs:
    """Captions with the items they describe, as the aligner reads them."""
    return CaptionPairs(captions.pooled[captions.rows(pairs.texts)], pairs.rows)


def corpus_vectors(aligner: Aligner, corpus: Corpus, captions: CaptionFeatures) -> np.ndarray:
    """Every item's vector (N, D) as it is indexed: fits, publish and evaluation must agree on it."""
    return aligner.item_vectors(corpus.features.embeddings, known_captions(corpus, captions))


def validation_pairs(split: Split) -> Pairs:
    """What the ranking is tuned on: captions of validation items, and every second kept caption of trained items, so
    that neither kind of item is favoured. The other kept captions are left for the evaluation (:func:`asked_seen`)."""
    seen = split.seen_queries
    return Pairs(np.concatenate([split.val_queries.rows, seen.rows[::2]]), split.val_queries.texts + seen.texts[::2])


def described_pairs(split: Split) -> Pairs:
    """What the aligner's corrections are tuned on: :func:`validation_pairs`, and captions of validation items that
    other items have, too (names of classes), for here whatever a text describes is right."""
    pairs, shared = validation_pairs(split), split.val_shared
    return Pairs(np.concatenate([pairs.rows, shared.rows]), pairs.texts + shared.texts)


def asked_seen(split: Split) -> Pairs:
    """Kept captions of trained items that nothing was tuned on."""
    return Pairs(split.seen_queries.rows[1::2], split.seen_queries.texts[1::2])
