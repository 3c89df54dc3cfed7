"""Captions that a model wrote: a part of their own, which training reads beside the captions that people wrote."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ace_store import Store

GENERATED_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("content_hash", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("cause", pa.string()),  # why there are none
    ]
)


def read_generated(store: Store, part_id: str) -> pa.Table:
    """What a captions part holds, finished or not: rows of :data:`GENERATED_SCHEMA`."""
    names = [i.path for i in store.listing(f"captions/{part_id}") if i.path.endswith(".parquet")]
    tables = [pq.read_table(p, filesystem=store.filesystem, partitioning=None) for p in names]
    return pa.concat_tables([GENERATED_SCHEMA.empty_table(), *tables])


def with_generated(store: Store, items: pa.Table) -> pa.Table:
    """Items with a column ``generated``: what the latest captions part says of those that have no captions.

    Args:
        items: n rows with ``item_id``.
    """
    return beside(items, latest_generated(store))


def latest_generated(store: Store) -> pa.Table | None:
    """``item_id`` and ``captions`` of the latest captions part; None where there is none."""
    pointer = store.read_json("captions/LATEST")
    manifest = None if pointer is None else store.find("captions", str(pointer["id"]))
    return None if manifest is None else read_generated(store, manifest.id).select(["item_id", "captions"])


def beside(items: pa.Table, generated: pa.Table | None) -> pa.Table:
    """Items with a column ``generated`` from :func:`latest_generated`; as they are where that is None."""
    if generated is None:
        return items
    place = pc.index_in(items.column("item_id"), value_set=generated.column("item_id").combine_chunks())
    return items.append_column("generated", generated.column("captions").take(place))
