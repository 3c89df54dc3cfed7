"""The transform that ingestion maps over a corpus: file names in, embeddings or the reason for none out.

A plain class over a dictionary of arrays: Ray Data makes an actor of it, tests call it.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow import fs

from ace_core.config import LimitSettings, MediaEncoderSettings, SegmentSettings
from ace_core.errors import AceError, MediaError
from ace_core.features import embeddings_of
from ace_core.items import Modality, content_hash
from ace_core.media.causes import PASSING, Cause, no_memory
from ace_core.media.isolate import PIECE
from ace_core.media.segments import SLACK, cut
from ace_store import ItemReader, open_location

_File = tuple[int, str, int]  # row, uri, bytes
Span = tuple[float, float] | None  # start and end of a segment in seconds; None for a whole file
_TOGETHER = {"cpu": 32, "cuda": 256}  # files, where the encoder chooses its own batch
_SEGMENTS = 16  # of one file that are decoded before they are encoded
_OPEN = 8  # files of known embeddings in memory


def files_together(encoder: MediaEncoderSettings, device: str) -> int:
    """How many files are decoded, then encoded."""
    return encoder.batch_size if isinstance(encoder.batch_size, int) else _TOGETHER[device]


@dataclass(frozen=True)
class KnownEmbeddings:
    """Where embeddings of an earlier ingestion are, by the hash of the file's bytes: what moved is not encoded again.

    Attributes:
        filesystem: that holds the files.
        where: content hash to segment to (Parquet file, row in it).
    """

    filesystem: fs.FileSystem | None = None
    where: dict[str, dict[Span, tuple[str, int]]] = field(default_factory=dict)
    _open: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    def get(self, content_hash: str) -> dict[Span, np.ndarray]:
        """Embeddings (d,) float16 of a file with these bytes, by segment; empty where none are known."""
        try:
            return {span: self._vectors(path)[row] for span, (path, row) in self.where.get(content_hash, {}).items()}
        except OSError:
            return {}  # removed meanwhile: encode again

    def _vectors(self, path: str) -> np.ndarray:
        vectors = self._open.get(path)
        if vectors is None:  # threads may read the same one twice; none of them can miss it
            table = pq.read_table(path, columns=["embedding"], filesystem=self.filesystem, partitioning=None)
            vectors = embeddings_of(table)
            for old in list(self._open)[: 1 - _OPEN]:
                self._open.pop(old, None)
            self._open[path] = vectors
        return vectors


@dataclass(frozen=True)
class ModalityWork:
    """How the files of one modality are encoded."""

    encoder: MediaEncoderSettings
    known: KnownEmbeddings


class EncodeCorpus:
    """Encodes the files of several modalities in one process: an :class:`EncodeItems` at a time, that of the modality
    whose files come. Work comes modality by modality, so that encoders are loaded once."""

    def __init__(self, work: dict[Modality, ModalityWork], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._work, self._args, self._kwargs = work, args, kwargs
        self._modality: Modality | None = None
        self._items: EncodeItems | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As :meth:`EncodeItems.__call__`, for files of one modality, which ``kind`` (n,) names."""
        modality = Modality(batch["kind"][0])
        if self._items is None or modality is not self._modality:
            self._items = None  # two encoders may not fit the memory
            mine = self._work[modality]
            self._items = EncodeItems(modality, mine.encoder, *self._args, **self._kwargs, known=mine.known)
            self._modality = modality
        return self._items(batch)


class EncodeItems:
    """Reads, decodes and encodes the files of one modality. What fails becomes a row with its cause.

    Args:
        corpus: the corpus folder or URI.
        threads: CPU threads for decoding and encoding.
        device: "cpu" or "cuda".
        segments: how long files are cut; None leaves all of them whole.
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
        segments: SegmentSettings | None = None,
        known: KnownEmbeddings | None = None,
    ) -> None:
        from ace_core.encoders import load_media_encoder
        from ace_core.encoders.batching import MOST, BatchTrial

        self._encoder = load_media_encoder(modality, encoder, limits, device)
        if "torch" in sys.modules:  # not every encoder needs it, and it takes seconds to load
            sys.modules["torch"].set_num_threads(threads)
        self._together = files_together(encoder, device)
        self._batch = encoder.batch_size if isinstance(encoder.batch_size, int) else None
        self._trial = BatchTrial(MOST[device])
        self._reader = ItemReader(open_location(corpus))
        self._limits = limits
        self._overlap = segments.overlap if segments else 0.0
        self._segment_seconds = segments.seconds(modality) if segments else 0.0
        self._known = known or KnownEmbeddings()
        self._threads = threads
        # A thread of its own would cost a short sound a twentieth of its time.
        self._map = map if threads == 1 else ThreadPoolExecutor(threads).map
        self._encoding = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode n files.

        Args:
            batch: ``row`` (n,) int64 and ``uri`` (n,) of files below the corpus folder, ``bytes`` (n,) their sizes.

        Returns:
            m >= n rows, as a long file has one for each of its segments: ``row``; ``start`` and ``end`` (m,) float64
            seconds, NaN for a whole file; ``cause`` (m,) text, empty for a good one, else why it is none, and
            ``detail``; ``content_hash`` (m,); ``embedding`` (m, d) float16, zero for a bad one; ``reused`` (m,) bool.
        """
        files = list(zip(batch["row"].tolist(), batch["uri"], batch["bytes"]))
        loaded: list[_Loaded] = []
        for first in range(0, len(files), self._together):  # what is decoded waits in memory
            asked = questions(files[first : first + self._together], self._threads)
            group = [one for loaded_together in self._map(self._load, asked) for one in loaded_together]
            self._encode([one for one in group if one.decoded is not None])
            loaded += group
        embeddings = np.zeros((len(loaded), self._encoder.dim), np.float16)
        for number, one in enumerate(loaded):
            if one.embedding is not None:
                embeddings[number] = one.embedding
        return {
            "row": np.array([one.row for one in loaded], np.int64),
            "start": np.array([one.span[0] if one.span else math.nan for one in loaded], np.float64),
            "end": np.array([one.span[1] if one.span else math.nan for one in loaded], np.float64),
            "cause": np.array([one.cause for one in loaded], dtype=object),
            "detail": np.array([one.detail for one in loaded], dtype=object),
            "content_hash": np.array([one.content_hash for one in loaded], dtype=object),
            "reused": np.array([one.reused for one in loaded], bool),
            "embedding": embeddings,
        }

    @staticmethod
    def lost(rows: np.ndarray, reason: str) -> dict[str, np.ndarray]:
        """What :meth:`__call__` would say of files (n,) that its process died on."""
        count = len(rows)
        return {
            "row": rows,
            "start": np.full(count, np.nan),
            "end": np.full(count, np.nan),
            "cause": np.array([Cause.CRASHED.value] * count, dtype=object),
            "detail": np.array([f"the encoder's process died on it, twice ({reason})"] * count, dtype=object),
            "content_hash": np.array([""] * count, dtype=object),
            "reused": np.zeros(count, bool),
            "embedding": np.zeros((count, 0), np.float16),
        }

    def _load(self, files: list[_File]) -> list[_Loaded]:
        """Files decoded, with one question to the decoder; the segments of long ones, decoded and encoded; or why
        not."""
        loaded: list[list[_Loaded]] = []  # of each file
        asked: list[tuple[int, bytes]] = []
        for number, (row, uri, size) in enumerate(files):
            whole = _Loaded(row)
            loaded.append([whole])
            try:
                if size > self._limits.max_bytes:  # known from the listing: not worth reading
                    limit = self._limits.max_bytes
                    raise MediaError(Cause.TOO_LARGE, f"the file has {size:,} bytes, the limit is {limit:,}")
                data = self._read(uri)
                whole.content_hash = content_hash(data)
                if known := self._known.get(whole.content_hash):
                    spans = sorted(known, key=_start)
                    loaded[number] = [replace(whole, span=s, embedding=known[s], reused=True) for s in spans]
                else:
                    asked.append((number, data))
            except Exception as e:  # whatever a file makes us do, it is that file's row and nobody else's
                whole.fail(e)
        most = SLACK * self._segment_seconds if self._segment_seconds else math.inf
        answers = self._encoder.decoder.wholes([data for _, data in asked], most)
        for (number, data), answer in zip(asked, answers):
            (whole,) = loaded[number]
            if isinstance(answer, Exception):
                whole.fail(answer)
            elif isinstance(answer, float):
                try:
                    loaded[number] = self._parts(whole, data, answer)
                except Exception as e:
                    whole.fail(e)
            else:
                whole.decoded = answer
        return [one for of_file in loaded for one in of_file]

    def _parts(self, whole: _Loaded, data: bytes, seconds: float) -> list[_Loaded]:
        spans = cut(seconds, self._segment_seconds, self._overlap)
        parts: list[_Loaded] = []
        with self._encoder.decoder.opened(data) as media:
            for first in range(0, len(spans), _SEGMENTS):  # encoded as they come: hours of it would fill the memory
                group = [replace(whole, span=span) for span in spans[first : first + _SEGMENTS]]
                for one in group:
                    try:
                        one.decoded = media.part(*(one.span or ()))
                    except MediaError as e:
                        one.fail(e)
                self._encode([one for one in group if one.decoded is not None])
                parts += group
        if all(one.cause for one in parts):  # a bad file is one row, however long it is
            return [_one_for_all(parts)]
        return parts

    def _read(self, uri: str) -> bytes:
        try:
            return self._reader.read(uri)
        except OSError as e:
            raise MediaError(Cause.UNREADABLE, f"the file cannot be read ({e})") from None

    def _encode(self, items: list[_Loaded]) -> None:
        """Encode decoded items, in batches of the set size, or of the one that the trial is at."""
        with self._encoding:
            first = 0
            while first < len(items):
                size = self._batch or self._trial.size
                self._encode_batch(items[first : first + size])
                first += size

    def _encode_batch(self, items: list[_Loaded]) -> None:
        began = time.perf_counter()
        try:
            vectors = self._encoder.encode([one.decoded for one in items])
            self._trial.ran(len(items), time.perf_counter() - began)
            for one, vector in zip(items, vectors):
                one.embedding = vector.astype(np.float16)
        except Exception as e:
            if len(items) == 1:
                items[0].fail(e)
            elif _out_of_memory(e):
                self._trial.too_large(len(items))
                for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                    self._encode_batch(half)
                return
            else:  # one of them is the cause: the others shall not suffer for it
                for one in items:
                    self._encode_batch([one])
                return
        for one in items:
            one.decoded = None
            if one.embedding is not None and not (np.isfinite(one.embedding).all() and one.embedding.any()):
                one.embedding = None
                nothing = "the encoder finds nothing in it (its vector is zero or not finite)"
                one.fail(MediaError(Cause.NO_CONTENT, nothing))


def questions(files: list[_File], threads: int) -> Iterator[list[_File]]:
    """Files, in order, in groups that a decoder is asked about at once: some for every thread, none of many bytes."""
    most = -(-len(files) // threads)
    group: list[_File] = []
    size = 0
    for file in files:
        if group and (len(group) == most or size + file[2] > PIECE):
            yield group
            group, size = [], 0
        group.append(file)
        size += file[2]
    yield group


def _out_of_memory(error: Exception) -> bool:
    import torch

    if not isinstance(error, torch.OutOfMemoryError):
        return False
    torch.cuda.empty_cache()
    return True


def _one_for_all(parts: list[_Loaded]) -> _Loaded:
    """Of n bad segments, the row of their file: it is tried again if one of them would be, or else has the cause of
    most."""
    passing = [one for one in parts if one.cause in PASSING]
    counts = Counter(one.cause for one in passing or parts)
    cause, count = counts.most_common(1)[0]
    first = next(one for one in parts if one.cause == cause)
    also = "" if count == len(parts) else f"; so {count:,} of {len(parts):,} segments, all bad"
    return replace(first, span=None, detail=first.detail + also)


def _start(span: Span) -> float:
    return span[0] if span else 0.0


@dataclass
class _Loaded:
    """One file, or one segment of it, on its way."""

    row: int
    span: Span = None
    cause: str = ""
    detail: str = ""
    content_hash: str = ""
    decoded: Any = None
    embedding: np.ndarray | None = None
    reused: bool = False

    def fail(self, error: Exception) -> None:
        if isinstance(error, MemoryError):
            error = no_memory()
        self.cause = str(error.cause if isinstance(error, MediaError) else Cause.UNEXPECTED)
        self.detail = error.found if isinstance(error, AceError) else f"{type(error).__name__}: {error}"
        self.decoded = None
