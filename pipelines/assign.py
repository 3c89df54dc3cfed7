"""Identifiers for the items of a features part, on Ray Data: one file of features at a time goes to an actor that holds
the frozen aligner and codebooks, and comes back as rows of a segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.config import ComputeSettings, SplitSettings
from ace_core.features import embeddings_of
from ace_core.items import MODALITIES, Modality
from ace_core.known_captions import KnownCaptions
from ace_core.manifest import Manifest
from ace_core.quantize.quantizer import Quantizer
from ace_core.segment_writer import segment_rows
from ace_store import Store
from pipelines.cluster import encoder_pool, ensure_ray, map_rows
from pipelines.generated import beside, latest_generated
from pipelines.texts import CaptionFeatures

_READERS = 8  # files of a listing that are read at once
_TOGETHER = 4  # files that a worker gets at once
_GROUP = 128  # files of a listing that are in memory at once


def item_groups(store: Store, features: Manifest, columns: list[str]) -> Iterator[list[tuple[str, pa.Table]]]:
    """Some columns of all items, a few hundred files at a time: paths in the part with their rows, modalities in
    order."""
    read = partial(pq.read_table, columns=columns, filesystem=store.filesystem, partitioning=None)
    files = feature_files(features)
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(files), _GROUP):
            group = files[first : first + _GROUP]
            yield list(zip(group, pool.map(lambda f: read(store.path("features", features.id, f)), group)))


def read_items(
    store: Store, features: Manifest, columns: list[str], of: Callable[[pa.Table], pa.Table] | None = None
) -> pa.Table:
    """Some columns of all items in the order of their files, or what ``of`` makes of them, some 100,000 rows at a
    time: what is in memory is its result."""
    tables = []
    for group in item_groups(store, features, columns):
        rows = pa.concat_tables([table for _, table in group])
        tables.append(rows if of is None else of(rows))
    return pa.concat_tables(tables)


def feature_files(features: Manifest) -> tuple[str, ...]:
    """The files of a features part that hold items."""
    return tuple(f for m in MODALITIES for f in sorted(features.files) if f.startswith(f"{m.value}/"))


@dataclass(frozen=True)
class Assigned:
    """Rows of a segment (see :func:`ace_core.segment_writer.segment_rows`), and the sum of squared distances of their
    vectors from what their identifiers stand for."""

    rows: pa.Table
    error: float


class AssignIdentifiers:
    """Items of one features file to rows of a segment: a plain class over a dictionary of arrays."""

    def __init__(self, store_uri: str, ids: dict[str, str], *, stored: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        store = Store.open(store_uri)
        self._filesystem = store.filesystem
        self._aligner = Aligner.load(store.local_copy("aligner", ids["aligner"]))
        self._quantizer = Quantizer.load(store.local_copy("quantizer", ids["quantizer"]))
        self._stored = stored

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Work of :func:`assign_identifiers` in; ``row``, ``rows`` (Arrow IPC bytes) and ``error`` out."""
        done = [self.assign(*work) for work in zip(batch["path"], batch["chosen"], batch["captioned"], batch["pooled"])]
        return {
            "row": batch["row"],
            "rows": np.array([_to_bytes(one.rows) for one in done], dtype=object),
            "error": np.array([one.error for one in done]),
        }

    def assign(self, path: str, chosen: bytes | None, captioned: bytes, pooled: bytes) -> Assigned:
        """Identifiers of one file's items.

        Args:
            chosen: int32 rows of the file, or None for all.
            captioned: int32 rows of the file that training captions belong to.
            pooled: float32 text features of those captions.
        """
        table = pq.read_table(path, filesystem=self._filesystem, partitioning=None)
        modality = Modality(table.column("modality")[0].as_py())
        pairs = CaptionPairs(
            np.frombuffer(pooled, np.float32).reshape(-1, self._aligner.text_width), np.frombuffer(captioned, np.int32)
        )
        x = self._aligner.item_vectors({modality: embeddings_of(table)}, pairs)
        if chosen is not None:
            rows = np.frombuffer(chosen, np.int32)
            table, x = table.take(pa.array(rows)), x[rows]
        codes = self._quantizer.assign(x, np.full(len(x), modality.token))
        left = x - self._quantizer.reconstruct(codes)
        rows = segment_rows(table.drop_columns("embedding"), codes, left if self._stored else None)
        return Assigned(rows, float(np.square(left).sum()))


def assign_identifiers(
    store: Store,
    features: Manifest,
    ids: dict[str, str],
    captions: CaptionFeatures,
    chosen: np.ndarray | None,
    split: SplitSettings,
    compute: ComputeSettings,
    *,
    stored: bool,
) -> Iterator[Assigned]:
    """Identifiers of the items of a features part, file by file in any order.

    Args:
        ids: of the aligner and the quantizer.
        captions: what is known of captions; items get a share of those that they were trained with.
        chosen: (n,) bool over the part's items, as :func:`read_items` lists them; None for all items.
        stored: also keep what identifiers leave of the items, in 8 bits.
    """
    known, generated = KnownCaptions(pa.array(captions.texts, pa.large_string()), split), latest_generated(store)
    files: list[str] = []
    counts: list[int] = []
    for group in item_groups(store, features, ["item_id", "captions", "attributes"]):
        files += [file for file, _ in group]
        counts += [table.num_rows for _, table in group]
        known.add(beside(pa.concat_tables([table for _, table in group]), generated))
    starts = np.cumsum([0, *counts])
    rows, text_rows = known.trained()
    bounds = np.searchsorted(rows, starts)
    work: dict[str, list[object]] = {"path": [], "chosen": [], "captioned": [], "pooled": []}
    for number, file in enumerate(files):
        start, end = starts[number : number + 2]
        wanted = None if chosen is None else np.flatnonzero(chosen[start:end]).astype(np.int32)
        if wanted is not None and not len(wanted):
            continue
        here = slice(bounds[number], bounds[number + 1])
        work["path"].append(store.path("features", features.id, file))
        work["chosen"].append(None if wanted is None else wanted.tobytes())
        work["captioned"].append((rows[here] - start).astype(np.int32).tobytes())
        work["pooled"].append(np.asarray(captions.pooled[text_rows[here]], np.float32).tobytes())
    del known, rows, text_rows
    yield from _on_ray(store, work, ids, compute, stored)


def _on_ray(
    store: Store, work: dict[str, list[object]], ids: dict[str, str], compute: ComputeSettings, stored: bool
) -> Iterator[Assigned]:
    binary = dict.fromkeys(("chosen", "captioned", "pooled"), pa.large_binary())
    table = pa.table({k: pa.array(v, binary.get(k, pa.string())) for k, v in work.items()})
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    if not table.num_rows:
        return
    ensure_ray(compute)
    pool = replace(encoder_pool(compute, most=table.num_rows), gpus=0)
    kwargs = {"stored": stored, "threads": pool.threads}
    together = max(1, min(_TOGETHER, table.num_rows // (4 * pool.count)))
    for result in map_rows(table, AssignIdentifiers, pool, together, (store.uri, ids), kwargs):
        for rows, error in zip(result["rows"], result["error"]):
            yield Assigned(_from_bytes(rows), float(error))


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()
