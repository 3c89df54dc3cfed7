"""What the ingress knows of the served snapshot without asking a replica: items, clusters, facets, credits.

Opened memory-mapped, without any model. It follows the replicas, not ``CURRENT``: a snapshot that they refuse is
never listed, and what a search returned can always be fetched. The one before stays open for the answers still on
their way.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ace_core.attributes import Facet, facets
from ace_core.errors import QueryError, StoreError
from ace_core.identifiers import prefix_interval
from ace_core.items import MODALITIES, Modality
from ace_core.segment import StoredItem
from ace_core.snapshot import Snapshot
from ace_store.store import Store

CREDIT_ATTRIBUTE = "attribution"
_KEPT = 2
_MAX_CREDITS = 20
_MAX_CHILDREN = 200


def cluster_name(tokens: tuple[int, ...]) -> str:
    """A prefix of an identifier in words: ``(0, 12, 7)`` is ``image-12-7``."""
    return "-".join([MODALITIES[tokens[0]].value, *map(str, tokens[1:])])


def parse_cluster(name: str) -> tuple[int, ...]:
    """The tokens of ``image-12-7``.

    Raises:
        QueryError: it is not a modality followed by numbers.
    """
    modality, *rest = name.split("-")
    if modality not in {m.value for m in MODALITIES} or not all(
        t.isascii() and t.isdigit() and len(t) <= 5 and int(t) < 65536 for t in rest
    ):
        raise QueryError(
            f"{name!r} is not the name of a cluster",
            where="cluster",
            remedy="Write a modality and tokens, such as image-12-7.",
        )
    return (Modality(modality).token, *map(int, rest))


@dataclass(frozen=True)
class Cluster:
    """Live items that share a prefix: how many, the finer clusters with their sizes (largest first), and a page."""

    total: int
    children: tuple[tuple[str, int], ...]
    items: tuple[StoredItem, ...]


class View:
    """One opened snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._find = lru_cache(maxsize=4096)(snapshot.find)

    @property
    def id(self) -> str:
        return self.snapshot.id

    @property
    def levels(self) -> int:
        """Tokens of an identifier, the modality's included."""
        return self.snapshot.segments[0].gallery.codes.shape[1]

    def item(self, item_id: str) -> StoredItem | None:
        """A live item by its id."""
        found = self._find(item_id)
        return None if found is None else self.snapshot.segments[found[0]].item(found[1])

    @cached_property
    def facets(self) -> list[Facet]:
        """Attributes that can be filtered by."""
        columns = [column for segment in self.snapshot.segments for column in segment.attributes]
        return [facet for facet in facets(columns) if facet.name != CREDIT_ATTRIBUTE]

    @cached_property
    def credits(self) -> list[str]:
        """Distinct attribution notes of the items, the most frequent first."""
        counts: dict[str, int] = {}
        for column in (column for segment in self.snapshot.segments for column in segment.attributes):
            if column.type.get_field_index(CREDIT_ATTRIBUTE) >= 0:
                for pair in column.field(CREDIT_ATTRIBUTE).drop_null().value_counts().to_pylist():
                    counts[str(pair["values"])] = counts.get(str(pair["values"]), 0) + pair["counts"]
        return sorted(counts, key=lambda note: (-counts[note], note))[:_MAX_CREDITS]

    def cluster(self, tokens: tuple[int, ...], *, offset: int, k: int) -> Cluster:
        """Live items whose identifiers begin with ``tokens``, in the order of their identifiers."""
        total = 0
        children: dict[int, int] = {}
        page: list[StoredItem] = []
        for segment, removed in zip(self.snapshot.segments, self.snapshot.removed):
            low, high = prefix_interval(segment.gallery.codes, tokens)
            gone = removed[np.searchsorted(removed, low) : np.searchsorted(removed, high)]
            if len(tokens) < self.levels:
                column = segment.gallery.codes[:, len(tokens)]
                counts = np.bincount(column[low:high])
                counts -= np.bincount(column[gone], minlength=len(counts))
                for token in np.flatnonzero(counts).tolist():
                    children[token] = children.get(token, 0) + int(counts[token])
            first, wanted = max(0, offset - total), k - len(page)
            # As many rows as could be needed: a cluster may hold millions.
            rows = np.arange(low, min(high, low + first + wanted + len(gone)))
            rows = rows[~np.isin(rows, gone)][first : first + wanted]
            page += [segment.item(int(row)) for row in rows]
            total += high - low - len(gone)
        largest = sorted(children.items(), key=lambda pair: (-pair[1], pair[0]))[:_MAX_CHILDREN]
        return Cluster(total, tuple((cluster_name((*tokens, t)), n) for t, n in largest), tuple(page))


class Catalog:
    """The newest snapshots that replicas were seen to serve."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._views: OrderedDict[str, View] = OrderedDict()
        self._opening = asyncio.Lock()

    @property
    def newest(self) -> View:
        """The snapshot that replicas were last seen to switch to.

        Raises:
            StoreError: no replica has answered yet.
        """
        if not self._views:
            raise StoreError("no snapshot is open yet", remedy="Ask again when /readyz answers 200.")
        return next(reversed(self._views.values()))

    @property
    def newest_id(self) -> str | None:
        """Id of :attr:`newest`, None before the first."""
        return next(reversed(self._views), None)

    async def follow(self, snapshot_id: str) -> None:
        """Open a snapshot that a replica serves, and make it the newest."""
        async with self._opening:
            if snapshot_id not in self._views:
                self._views[snapshot_id] = await asyncio.to_thread(_open, self._store, snapshot_id)
            self._views.move_to_end(snapshot_id)
            while len(self._views) > _KEPT:
                self._views.popitem(last=False)

    def item(self, item_id: str) -> StoredItem | None:
        """An item of the newest snapshot, or of the one before it.

        Raises:
            StoreError: no replica has answered yet, so that nothing is known of any item.
        """
        views = list(self._views.values()) or [self.newest]  # a copy: follow() may come in between, in another thread
        return next((item for view in reversed(views) if (item := view.item(item_id))), None)


def _open(store: str, snapshot_id: str) -> View:
    # Hashes were checked by the replica that serves it.
    view = View(Snapshot.open(Store.open(store).mirror(snapshot_id), snapshot_id, verify=False))
    _ = view.facets, view.credits  # read once here, not in a request
    return view
