"""What every fit begins with: the latest features, which of them may be trained on, and the captions' features."""

from __future__ import annotations

from dataclasses import dataclass

from ace_core.config import Settings
from ace_core.features import Features, Split, read_features, split_of
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.progress import Reporter
from pipelines.texts import CaptionFeatures, ensure_texts


@dataclass(frozen=True)
class Corpus:
    """A features part in memory, with its split."""

    features: Features
    split: Split


def load_corpus(store: Store, features_id: str, settings: Settings) -> Corpus:
    """Read a features part and split it."""
    features = read_features(store.path("features", features_id), store.filesystem)
    return Corpus(features, split_of(features.items, settings.split))


def captions_part(corpus: Corpus, settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """The features of all captions that are trained on or asked as queries (encoded now unless the store has them)."""
    split = corpus.split
    pairs = (split.train_pairs, split.seen_queries, split.unseen_queries, split.val_queries)
    return ensure_texts([text for p in pairs for text in p.texts], settings, store, reporter)


def load_captions(store: Store, texts_id: str) -> CaptionFeatures:
    """Open a texts part."""
    return CaptionFeatures.load(store.local_copy("texts", texts_id))
