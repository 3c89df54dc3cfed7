"""The transform that ingestion maps over a corpus: file names in, embeddings or the reason for none out.

A plain class over a dictionary of arrays: Ray Data makes an actor of it, tests call it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow import fs

from ace_core.config import LimitSettings, MediaEncoderSettings
from ace_core.errors import AceError, MediaError
from ace_core.features import embeddings_of
from ace_core.items import Modality
from ace_store import ItemReader, open_location


@dataclass(frozen=True)
class KnownEmbeddings:
    """Where embeddings of an earlier ingestion are, by the hash of the file's bytes: what moved is not encoded again.

    Attributes:
        filesystem: that holds the files.
        where: content hash to (Parquet file, row in it).
    """

    filesystem: fs.FileSystem | None = None
    where: dict[str, tuple[str, int]] = field(default_factory=dict)

    def get(self, content_hash: str) -> np.ndarray | None:
        """The embedding (d,) float16 of a file with these bytes, or None."""
        if content_hash not in self.where:
            return None
        path, row = self.where[content_hash]
        try:
            table = pq.read_table(path, columns=["embedding"], filesystem=self.filesystem, partitioning=None)
        except OSError:
            return None  # removed meanwhile: encode again
        return embeddings_of(table.slice(row, 1))[0]


class EncodeItems:
    """Reads, decodes and encodes the files of one modality. What fails becomes a row with its cause.

    Args:
        corpus: the corpus folder or URI.
        threads: CPU threads for decoding and encoding.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        modality: Modality,
        encoder: MediaEncoderSettings,
        limits: LimitSettings,
        corpus: str,
        *,
        threads: int,
        device: str,
        known: KnownEmbeddings | None = None,
    ) -> None:
        import torch

        from ace_core.encoders import load_media_encoder

        torch.set_num_threads(threads)
        self._encoder = load_media_encoder(modality, encoder, limits, device)
        self._reader = ItemReader(open_location(corpus))
        self._limits = limits
        self._known = known or KnownEmbeddings()
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode n files.

        Args:
            batch: ``row`` (n,) int64 and ``uri`` (n,) of files below the corpus folder, ``bytes`` (n,) their sizes.

        Returns:
            ``row``; ``cause`` (n,) text, empty for a good file, else why it is none, and ``detail``;
            ``content_hash`` (n,); ``embedding`` (n, d) float16, zero for a bad file; ``reused`` (n,) bool.
        """
        loaded = list(self._pool.map(self._load, batch["uri"], batch["bytes"]))
        good = [i for i, one in enumerate(loaded) if one.cause == "" and one.embedding is None]
        self._encode([loaded[i] for i in good])
        embeddings = np.zeros((len(loaded), self._encoder.dim), np.float16)
        for number, one in enumerate(loaded):
            if one.embedding is not None:
                embeddings[number] = one.embedding
        return {
            "row": batch["row"],
            "cause": np.array([one.cause for one in loaded], dtype=object),
            "detail": np.array([one.detail for one in loaded], dtype=object),
            "content_hash": np.array([one.content_hash for one in loaded], dtype=object),
            "reused": np.array([one.reused for one in loaded], bool),
            "embedding": embeddings,
        }

    def _load(self, uri: str, size: int) -> _Loaded:
        out = _Loaded()
        try:
            if size > self._limits.max_bytes:  # known from the listing: not worth reading
                raise MediaError("too-large", f"the file has {size:,} bytes, the limit is {self._limits.max_bytes:,}")
            data = self._read(uri)
            out.content_hash = hashlib.blake2b(data, digest_size=16).hexdigest()
            out.embedding = self._known.get(out.content_hash)
            out.reused = out.embedding is not None
            if out.embedding is None:
                out.decoded = self._encoder.decode(data)
        except Exception as e:  # whatever a file makes a decoder do, it is that file's row and nobody else's
            out.fail(e)
        return out

    def _read(self, uri: str) -> bytes:
        try:
            return self._reader.read(uri)
        except OSError as e:
            raise MediaError("unreadable", f"the file cannot be read ({e})") from None

    def _encode(self, items: list[_Loaded]) -> None:
        if not items:
            return
        try:
            for one, vector in zip(items, self._encoder.encode([one.decoded for one in items])):
                one.embedding = vector.astype(np.float16)
        except Exception:
            if len(items) > 1:  # one of them is the cause: the others shall not suffer for it
                for one in items:
                    self._encode([one])
                return
            try:
                items[0].embedding = self._encoder.encode([items[0].decoded])[0].astype(np.float16)
            except Exception as e:
                items[0].fail(e)
        for one in items:
            one.decoded = None
            if one.embedding is not None and not (np.isfinite(one.embedding).all() and one.embedding.any()):
                one.embedding = None
                one.fail(MediaError("no-content", "the encoder finds nothing in it (its vector is zero or not finite)"))


@dataclass
class _Loaded:
    """One file on its way."""

    cause: str = ""
    detail: str = ""
    content_hash: str = ""
    decoded: Any = None
    embedding: np.ndarray | None = None
    reused: bool = False

    def fail(self, error: Exception) -> None:
        self.cause = str(error.cause) if isinstance(error, MediaError) else "unexpected"
        self.detail = error.found if isinstance(error, AceError) else f"{type(error).__name__}: {error}"
        self.decoded = None
