"""Data sets of the retrieval benchmark: a folder with one ``captions.jsonl`` a set, features cached beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ace_core.config import LimitSettings, MediaEncoderSettings, TextEncoderSettings
from ace_core.encoders import load_media_encoder, load_text_encoder
from ace_core.errors import CorpusError
from ace_core.items import Modality

_BATCH = 64
_MAX_TOKENS = 24
MODALITY = {
    "flickr8k": Modality.IMAGE,
    "tuxpaint_stamps": Modality.IMAGE,
    "esc10": Modality.AUDIO,
    "urbansound8k_subset": Modality.AUDIO,
    "fluent_emoji_anim": Modality.VIDEO,
}
_CLASS_CAPTIONS = ("esc10", "urbansound8k_subset")
_ENCODER = {Modality.IMAGE: "efficientnet-lite0", Modality.AUDIO: "log-mel", Modality.VIDEO: "frames"}
_LEFT_OUT_SPLIT = "val"


@dataclass(frozen=True)
class TextTable:
    """Text features of distinct texts, and where each text is in them."""

    pooled: np.ndarray
    hidden: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class DataSet:
    """One set.

    Attributes:
        name: which; several joined by commas.
        features: (n_m, d_m) float32 raw item features of each modality; all rows below count them in this order.
        split: (N,) "train", "val" or "test".
        captions: texts, and ``rows`` (C,) the item and ``position`` (C,) the place among its item's captions of each.
        twins: (N,) groups of items that are equally right (a class, where captions describe classes), or None.
    """

    name: str
    features: dict[Modality, np.ndarray]
    split: np.ndarray
    captions: list[str]
    rows: np.ndarray
    position: np.ndarray
    twins: np.ndarray | None

    @property
    def tokens(self) -> np.ndarray:
        """(N,) the modality token of each item."""
        return np.concatenate([np.full(len(f), m.token) for m, f in self.features.items()])

    def rows_of_modality(self) -> dict[str, np.ndarray]:
        """Item rows of each modality."""
        return {m.value: np.flatnonzero(self.tokens == m.token) for m in self.features}


def load_sets(data: Path, names: str, cache: Path, *, most: int | None = None, captions: int | None = None) -> DataSet:
    """Read one set, or several of different modalities as one corpus (``a,b,c``).

    Args:
        most, captions: as in :func:`load_set`.

    Raises:
        CorpusError: the folder lacks a set, or two of them have one modality.
    """
    sets = [load_set(data, name, cache, most=most, captions=captions) for name in names.split(",")]
    sets.sort(key=lambda s: next(iter(s.features)).token)
    features = {m: f for s in sets for m, f in s.features.items()}
    if len(features) != len(sets):
        raise CorpusError(f"two of {names} have one modality", remedy="Name one set of each modality.")
    starts = np.cumsum([0, *(len(s.split) for s in sets)])
    twins = None
    if any(s.twins is not None for s in sets):  # an item without a class is its own
        groups = [start + (np.arange(len(s.split)) if s.twins is None else s.twins) for s, start in zip(sets, starts)]
        twins = np.concatenate(groups)
    return DataSet(
        name=names,
        features=features,
        split=np.concatenate([s.split for s in sets]),
        captions=[c for s in sets for c in s.captions],
        rows=np.concatenate([s.rows + start for s, start in zip(sets, starts)]),
        position=np.concatenate([s.position for s in sets]),
        twins=twins,
    )


def load_set(data: Path, name: str, cache: Path, *, most: int | None = None, captions: int | None = None) -> DataSet:
    """Read a set, computing what features are not there yet.

    Args:
        most: items kept of each split (a quick run), evenly spread; None for all.
        captions: captions kept of each item at most, the first ones; None for all.

    Raises:
        CorpusError: the folder lacks the set.
    """
    path = data / name / "captions.jsonl"
    if not path.is_file():
        raise CorpusError(f"there is no set {name}", where=path, remedy="Give --data the folder that holds the sets.")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    split = np.array([e["split"] for e in entries])
    if _LEFT_OUT_SPLIT not in split:  # every fifth item of the training part validates
        trained = np.flatnonzero(split == "train")[::5]
        split[trained] = _LEFT_OUT_SPLIT
    kept = np.arange(len(entries))
    if most is not None:
        parts = [np.flatnonzero(split == s) for s in ("train", "val", "test")]
        kept = np.sort(np.concatenate([p[:: max(1, -(-len(p) // most))] for p in parts]))
    features = _features(data, name, entries, cache)[kept]
    entries, split = [entries[i] for i in kept], split[kept]
    pairs = [(row, i, c) for row, e in enumerate(entries) for i, c in enumerate(e["captions"][:captions])]
    labels = np.unique([e.get("label") or "" for e in entries], return_inverse=True)[1].reshape(-1)
    return DataSet(
        name=name,
        features={MODALITY[name]: features},
        split=split,
        captions=[c for _, _, c in pairs],
        rows=np.array([r for r, _, _ in pairs], np.int64),
        position=np.array([i for _, i, _ in pairs], np.int64),
        twins=labels if name in _CLASS_CAPTIONS else None,
    )


def _features(data: Path, name: str, entries: Sequence[dict], cache: Path) -> np.ndarray:
    given = sorted((data / "features").glob(f"{name}.*.npy"))
    if given:
        return np.load(given[0]).astype(np.float32)
    modality = MODALITY[name]
    encoder = load_media_encoder(modality, MediaEncoderSettings(kind=_ENCODER[modality]), LimitSettings())
    path = cache / f"{name}.{encoder.identity}.npy"
    if path.is_file():
        return np.load(path)
    out = []
    for i in range(0, len(entries), _BATCH):
        batch = [encoder.decoder((data / name / e["path"]).read_bytes()) for e in entries[i : i + _BATCH]]
        out.append(encoder.encode(batch))
        print(f"  {name}: {i + len(batch)} of {len(entries)} items encoded", flush=True)
    features = np.concatenate(out).astype(np.float32)
    np.save(path, features)
    return features


def text_table(texts: Sequence[str], cache: Path, say: Callable[[str], None] = print) -> TextTable:
    """Text features of every text, in order, float16 token features of at most 24 tokens; cached by content."""
    encoder = load_text_encoder(TextEncoderSettings(max_tokens=_MAX_TOKENS))
    key = hashlib.sha256("\n".join([encoder.identity, *texts]).encode()).hexdigest()[:12]
    names = [cache / f"text.{key}.{part}.npy" for part in ("pooled", "hidden", "mask")]
    if all(n.is_file() for n in names):
        return TextTable(np.load(names[0]), np.load(names[1], mmap_mode="r"), np.load(names[2]))
    n = len(texts)
    pooled = np.zeros((n, encoder.dim), np.float32)
    hidden = np.zeros((n, encoder.layers, _MAX_TOKENS, encoder.width), np.float16)
    mask = np.zeros((n, _MAX_TOKENS), bool)
    order = np.argsort([len(t) for t in texts], kind="stable")
    for i in range(0, n, _BATCH):
        chosen = order[i : i + _BATCH]
        found = encoder.encode([texts[j] for j in chosen])
        length = min(_MAX_TOKENS, found.mask.shape[1])
        pooled[chosen] = found.pooled.numpy()
        hidden[chosen, :, :length] = found.hidden[:, :, :length].numpy()
        mask[chosen, :length] = found.mask[:, :length].numpy()
        if i % (100 * _BATCH) == 0:
            say(f"  {i} of {n} captions encoded")
    np.save(names[0], pooled)
    np.save(names[1], hidden)
    np.save(names[2], mask)
    return TextTable(pooled, hidden, mask)
