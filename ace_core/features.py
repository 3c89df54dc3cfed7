"""Features: what ingestion writes and every later stage reads, and which of it is kept out of training.

A features part holds ``<modality>/*.parquet`` (one row an item, :func:`features_schema`) and ``errors/*.parquet``
(one row a file that could not be used, :data:`ERRORS_SCHEMA`). Embeddings are float16 and L2-normalised, in Arrow's
own ``fixed_shape_tensor`` type, which any Arrow reader knows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ace_core.attributes import typed_attributes
from ace_core.config import SplitSettings
from ace_core.errors import StoreError
from ace_core.items import MODALITIES, Modality

ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("modality", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("attributes", pa.string()),  # JSON object
        ("content_hash", pa.string()),
        ("mime", pa.string()),
        ("start_seconds", pa.float64()),
        ("end_seconds", pa.float64()),
        ("stamp", pa.string()),  # size and time of the file when it was read: equal stamps are not read again
    ]
)
ERRORS_SCHEMA = pa.schema([(n, pa.string()) for n in ("item_id", "uri", "modality", "cause", "detail")])


def features_schema(dim: int) -> pa.Schema:
    """Columns of a features file for embeddings of ``dim`` numbers."""
    return ITEM_SCHEMA.append(pa.field("embedding", pa.fixed_shape_tensor(pa.float16(), [dim])))


def with_embeddings(items: pa.Table, embeddings: np.ndarray) -> pa.Table:
    """Append embeddings (n, d) to n rows of :data:`ITEM_SCHEMA`, as float16."""
    flat = pa.array(np.ascontiguousarray(embeddings, np.float16).reshape(-1))
    dim = embeddings.shape[1]
    storage = pa.FixedSizeListArray.from_arrays(flat, dim)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), [dim]), storage)
    return items.select(ITEM_SCHEMA.names).append_column("embedding", column).cast(features_schema(dim))


def embeddings_of(table: pa.Table) -> np.ndarray:
    """The ``embedding`` column as an array (n, d) float16."""
    column = table.column("embedding")
    dim = column.type.shape[0]
    if not table.num_rows:
        return np.empty((0, dim), np.float16)
    return np.concatenate([chunk.to_numpy_ndarray() for chunk in column.chunks])


@dataclass(frozen=True)
class Features:
    """A corpus in memory.

    Attributes:
        items: n rows of :data:`ITEM_SCHEMA`, grouped by modality in the order of ``MODALITIES``, by id within each.
        embeddings: (n_m, d_m) float16 for each modality that has items, rows in the order of ``items``.
    """

    items: pa.Table
    embeddings: dict[Modality, np.ndarray]

    def __len__(self) -> int:
        return self.items.num_rows

    @cached_property
    def modality_tokens(self) -> np.ndarray:
        """(n,) int64, position of each item's modality in ``MODALITIES``."""
        return np.concatenate(
            [np.full(len(self.embeddings[m]), m.token, np.int64) for m in MODALITIES if m in self.embeddings]
            or [np.empty(0, np.int64)]
        )

    def rows_of(self, modality: Modality) -> slice:
        """The rows of ``items`` that hold a modality."""
        start = 0
        for m in MODALITIES:
            count = len(self.embeddings.get(m, ()))
            if m == modality:
                return slice(start, start + count)
            start += count
        raise AssertionError(modality)

    def counts(self) -> dict[str, int]:
        """Items of each modality."""
        return {m.value: len(self.embeddings[m]) for m in MODALITIES if m in self.embeddings}


def read_features(folder: str | Path, filesystem: fs.FileSystem | None = None) -> Features:
    """Read a finished features part whole.

    Args:
        folder: the part's folder, or its path on ``filesystem``.

    Raises:
        StoreError: there are no items in it, or the files of one modality hold embeddings of different widths.
    """
    filesystem = filesystem or fs.LocalFileSystem()
    tables, embeddings = [], {}
    for modality in MODALITIES:
        selector = fs.FileSelector(f"{folder}/{modality.value}", allow_not_found=True)
        paths = sorted(i.path for i in filesystem.get_file_info(selector) if i.path.endswith(".parquet"))
        if not paths:
            continue
        try:
            table = pa.concat_tables([pq.read_table(p, filesystem=filesystem, partitioning=None) for p in paths])
        except pa.ArrowInvalid as e:
            raise StoreError(
                f"the {modality.value} features cannot be read together ({e})",
                where=folder,
                remedy="Delete this part and run `ace ingest` again.",
            ) from None
        # Shards end in the order in which encoders finish: sort, so that the same corpus always reads the same.
        table = table.take(pc.sort_indices(table, sort_keys=[("item_id", "ascending")]))
        tables.append(table.select(ITEM_SCHEMA.names))
        embeddings[modality] = embeddings_of(table)
    if not tables:
        raise StoreError("the features hold no items", where=folder, remedy="Run `ace ingest`, or check the id.")
    return Features(pa.concat_tables(tables).combine_chunks(), embeddings)


def read_errors(folder: str | Path, filesystem: fs.FileSystem | None = None) -> pa.Table:
    """The files that could not be used, in :data:`ERRORS_SCHEMA`, by id."""
    filesystem = filesystem or fs.LocalFileSystem()
    selector = fs.FileSelector(f"{folder}/errors", allow_not_found=True)
    paths = sorted(i.path for i in filesystem.get_file_info(selector) if i.path.endswith(".parquet"))
    names = ERRORS_SCHEMA.names
    tables = [pq.read_table(p, columns=names, filesystem=filesystem, partitioning=None) for p in paths]
    return pa.concat_tables([ERRORS_SCHEMA.empty_table(), *tables]).sort_by("item_id")


@dataclass(frozen=True)
class Pairs:
    """Captions and the items they describe: ``rows`` (p,) int64 into ``Features.items``, ``texts`` of length p."""

    rows: np.ndarray
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, limit: int, seed: int) -> Pairs:
        """At most ``limit`` of them, the same ones for the same seed, in order."""
        if len(self) <= limit:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False))
        return Pairs(self.rows[chosen], [self.texts[i] for i in chosen])


@dataclass(frozen=True)
class Split:
    """Which items and captions a fit may see.

    Attributes:
        trained: (n,) bool, items whose captions may be trained on (they may have none).
        held_out: (n,) bool, the others.
        train_pairs: captions to train on.
        seen_queries: captions of trained items that were kept out of training.
        unseen_queries: captions of held-out items, for the test.
        val_queries: captions of held-out items, for the ranking mix and the calibration.
        val_shared: captions of validation items that other items have, too: they ask for what they describe, not for
            one item.
    """

    trained: np.ndarray
    held_out: np.ndarray
    train_pairs: Pairs
    seen_queries: Pairs
    unseen_queries: Pairs
    val_queries: Pairs
    val_shared: Pairs


def split_of(items: pa.Table, settings: SplitSettings) -> Split:
    """Decide what is trained on.

    Items name their split in an attribute. Where no item of the corpus does, ``settings.fraction`` of the captioned
    items are held out, chosen by the hash of their id (so that a growing corpus keeps its split), every second one
    for validation. A caption that several items share is trained on (those of trained items), and is no query: no one
    item answers it.

    Args:
        items: n rows with columns ``item_id``, ``captions`` and ``attributes``. A column ``generated`` holds captions
            that no person wrote: they are trained on, and nothing is ever asked with them.
    """
    captions = _Captions.of(items.column("captions"))
    held_out, validation = _held_out(items, captions, settings)
    kept, trained = captions.kept_and_trained(held_out, settings)
    rows, texts = _training(items, captions, trained, held_out)
    asked = held_out[captions.rows] & captions.unique
    to_validate = validation[captions.rows]
    shared = to_validate & ~captions.unique
    return Split(
        ~held_out,
        held_out,
        Pairs(rows, texts.to_pylist()),
        captions.pairs(kept),
        captions.pairs(asked & ~to_validate),
        captions.pairs(asked & to_validate),
        captions.pairs(shared),
    )


def last_captions(items: pa.Table) -> Pairs:
    """Each item's last caption, where no other item has it: what a :func:`split` trains on, keeps or asks with."""
    captions = _Captions.of(items.column("captions"))
    last = np.diff(captions.rows, append=len(captions.counts)) > 0
    return captions.pairs(last & captions.unique)


def _training(
    items: pa.Table, captions: _Captions, trained: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, pa.Array]:
    rows, texts = captions.rows[trained], captions.texts.filter(pa.array(trained))
    if "generated" not in items.column_names:
        return rows, texts
    more = _Captions.of(items.column("generated"))
    chosen = ~held_out[more.rows] & (captions.counts[more.rows] == 0)
    rows = np.concatenate([rows, more.rows[chosen]])
    order = np.argsort(rows, kind="stable")
    texts = pa.concat_arrays([texts, more.texts.filter(pa.array(chosen))])
    return rows[order], texts.take(pa.array(order))


@dataclass(frozen=True)
class _Captions:
    """All c captions of n items, in order.

    Attributes:
        texts: (c,) large strings.
        rows: (c,) int64, each caption's item.
        code: (c,) equal for equal texts.
        counts: (n,) captions of each item.
        unique: (c,) bool, no other item has this caption.
    """

    texts: pa.Array
    rows: np.ndarray
    code: np.ndarray
    counts: np.ndarray
    unique: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Captions:
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        texts = pc.list_flatten(column).cast(pa.large_string())
        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        rows = np.repeat(np.arange(len(counts)), counts)
        encoded = texts.dictionary_encode()
        code = encoded.indices.to_numpy().astype(np.int64)
        of_items = np.unique(code * max(1, len(counts)) + rows) // max(1, len(counts))
        uses = np.bincount(of_items, minlength=len(encoded.dictionary))
        return cls(texts, rows, code, counts, uses[code] == 1)

    def kept_and_trained(self, held_out: np.ndarray, settings: SplitSettings) -> tuple[np.ndarray, np.ndarray]:
        """(c,) bool each: captions of trained items kept out as queries, and captions to train on."""
        last = np.cumsum(self.counts)[self.rows] - 1  # each item's last caption
        mine = ~held_out[self.rows]
        keeps = mine & (self.counts[self.rows] > 1) & self.unique[last] & settings.keep_one_caption
        kept = keeps & (last == np.arange(len(last)))
        return kept, mine & ~(keeps & (self.code == self.code[last]))

    def pairs(self, chosen: np.ndarray) -> Pairs:
        return Pairs(self.rows[chosen], self.texts.filter(pa.array(chosen)).to_pylist())


def _held_out(items: pa.Table, captions: _Captions, settings: SplitSettings) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool each: items whose captions are not trained on, and those of them that validate."""
    column = split_names(items, settings)
    if column.null_count == len(column):
        return hashed_split(items.column("item_id"), captions.counts > 0, settings)
    held_out = pc.is_in(column, value_set=pa.array(settings.held_out, pa.string())).to_numpy()
    return held_out, held_out & pc.fill_null(pc.equal(column, settings.validation), False).to_numpy()


def split_names(items: pa.Table, settings: SplitSettings) -> pa.ChunkedArray:
    """(n,) text: the split that each item's attributes name; null where they name none."""
    names = [_names(chunk, settings.attribute) for chunk in items.column("attributes").chunks]
    return pa.chunked_array(names, pa.string())


def _names(attributes: pa.Array, name: str) -> pa.Array:
    found = typed_attributes(attributes)
    at = found.type.get_field_index(name)
    return pa.nulls(len(found), pa.string()) if at < 0 else found.field(at).cast(pa.string())


def hashed_split(ids: pa.ChunkedArray, captioned: np.ndarray, settings: SplitSettings) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool each: captioned items held out by the hash of their id, and those of them that validate."""
    held_out, validation = np.zeros(len(captioned), bool), np.zeros(len(captioned), bool)
    others = [name for name in settings.held_out if name != settings.validation] or [settings.validation]
    rows = np.flatnonzero(captioned)
    for row, item_id in zip(rows.tolist(), ids.take(pa.array(rows)).to_pylist()):
        number = int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "big")
        name = settings.validation if number & 1 else others[0]
        held_out[row] = (number >> 1) / 2**63 < settings.fraction and name in settings.held_out
        validation[row] = held_out[row] and name == settings.validation
    return held_out, validation
