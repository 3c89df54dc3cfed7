"""Which captions an index may know of its items, found in one pass over a corpus that fits in no memory.

What :func:`ace_core.features.split_of` trains on depends on all of the corpus in two ways: whether any item names its
split, and whether a caption belongs to one item only. Both are settled at the end, from a few numbers for each caption
that was encoded; a caption that was not is no caption that the index could know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.config import SplitSettings
from ace_core.features import hashed_split, split_names


@dataclass(frozen=True)
class _Encoded:
    """Encoded captions of some items.

    Attributes:
        rows: (p,) int64 the item of each.
        texts: (p,) int32 which of the encoded texts it is.
        last: (p,) int32 the same of its item's last caption; -1 where that was not encoded.
        several: (p,) bool, its item has more captions.
    """

    rows: np.ndarray
    texts: np.ndarray
    last: np.ndarray
    several: np.ndarray


class KnownCaptions:
    """The training captions of a corpus that were encoded, as ``split_of(items).train_pairs`` has them.

    Args:
        encoded: (m,) large strings, distinct.
    """

    def __init__(self, encoded: pa.Array, settings: SplitSettings) -> None:
        self._encoded = encoded
        self._settings = settings
        self._named = False  # whether an item was seen that names its split
        self._by_name: list[np.ndarray] = []
        self._by_hash: list[np.ndarray] = []
        self._uses = np.zeros(len(encoded), np.int32)  # items that have a text among their captions
        self._captions: list[_Encoded] = []
        self._generated: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, items: pa.Table) -> None:
        """Take the next n items: columns as of :func:`ace_core.features.split_of`."""
        counts, rows, texts = self._flat(items.column("captions"))
        last = np.cumsum(counts)[rows] - 1
        known = texts >= 0
        here = _Encoded(rows + self._count, texts, texts[last], counts[rows] > 1)
        self._captions.append(_Encoded(*(column[known] for column in vars(here).values())))
        of_items = np.unique(rows[known] * len(self._encoded) + texts[known]) % max(1, len(self._encoded))
        self._uses += np.bincount(of_items, minlength=len(self._encoded)).astype(np.int32)
        if "generated" in items.column_names:
            _, rows, texts = self._flat(items.column("generated"))
            chosen = (texts >= 0) & (counts[rows] == 0)
            self._generated.append((rows[chosen] + self._count, texts[chosen]))
        names = split_names(items, self._settings)
        self._named |= names.null_count < len(names)
        self._by_name.append(pc.is_in(names, value_set=pa.array(self._settings.held_out, pa.string())).to_numpy())
        if not self._named:
            self._by_hash.append(hashed_split(items.column("item_id"), counts > 0, self._settings)[0])
        self._count += items.num_rows

    def trained(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (p,) int64 of items, in order, and which of the encoded texts (p,) int32 belong to them."""
        if not self._count:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        mine = ~np.concatenate(self._by_name if self._named else self._by_hash)
        columns = zip(*(vars(part).values() for part in self._captions))
        all_ = _Encoded(*(np.concatenate(column) for column in columns))
        keeps = all_.several & (all_.last >= 0) & self._settings.keep_one_caption
        keeps[keeps] = self._uses[all_.last[keeps]] == 1
        chosen = mine[all_.rows] & ~(keeps & (all_.texts == all_.last))
        rows, texts = all_.rows[chosen], all_.texts[chosen]
        for more, of_more in self._generated:
            rows = np.concatenate([rows, more[mine[more]]])
            texts = np.concatenate([texts, of_more[mine[more]]])
        order = np.argsort(rows, kind="stable")
        return rows[order], texts[order]

    def _flat(self, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Captions (n,) of each item, and of all c captions the item (c,) int64 and the text (c,) int32, or -1."""
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        flat = pc.list_flatten(column).cast(pa.large_string())
        texts = pc.fill_null(pc.index_in(flat, value_set=self._encoded), -1).to_numpy().astype(np.int32)
        return counts, np.repeat(np.arange(len(counts)), counts), texts
