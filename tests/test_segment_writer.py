"""A segment is the same whatever order its rows come in, and whether or not they had to wait on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ace_core import segment_writer
from ace_core.constraint import ConstraintIndex
from ace_core.errors import StoreError
from ace_core.scoring import Remainders
from ace_core.segment import Segment
from ace_core.segment_writer import SegmentWriter, segment_rows, write_segment
from tests.tiny_store import item_rows

SIZES = (3, 8, 16, 16)
N = 700


@pytest.fixture(scope="module")
def corpus() -> tuple[pa.Table, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, v, N) for v in SIZES], axis=1).astype(np.uint16)
    codes[::3] = codes[0]  # many items share one identifier
    return item_rows(0, N), codes, rng.standard_normal((N, 12)).astype(np.float32)


def _write(folder: Path, corpus: tuple[pa.Table, np.ndarray, np.ndarray], order: np.ndarray, step: int) -> Segment:
    items, codes, vectors = corpus
    with SegmentWriter(folder, SIZES) as writer:
        for start in range(0, N, step):
            rows = order[start : start + step]
            writer.add(segment_rows(items.take(pa.array(rows)), codes[rows], vectors[rows]))
        writer.finish(folder.name, corpus_root="c", inputs={"aligner": "a"}, metrics={"more": 1})
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".sorting")] == []
    return Segment(folder)


def test_rows_that_wait_on_disk_end_where_rows_in_memory_do(
    tmp_path: Path, corpus: tuple[pa.Table, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    items, codes, vectors = corpus
    whole = _write(tmp_path / "whole", corpus, np.arange(N), N)
    monkeypatch.setattr(segment_writer, "_WAITING", 64)
    spilled = _write(tmp_path / "spilled", corpus, np.random.default_rng(1).permutation(N), 17)
    assert len(spilled.attributes) > 5 and len(whole.attributes) == 1  # runs of items
    for segment in (whole, spilled):
        assert segment.manifest.metrics == {"items": N, "more": 1}
        order = np.array(sorted(range(N), key=lambda i: (codes[i].tolist(), items.column("item_id")[i].as_py())))
        np.testing.assert_array_equal(segment.gallery.codes, codes[order])
        assert segment.items.column("item_id").to_pylist() == items.column("item_id").take(pa.array(order)).to_pylist()
        expected = Remainders.of(vectors[order])
        assert segment.gallery.stored is not None
        np.testing.assert_array_equal(segment.gallery.stored.steps, expected.steps)
        np.testing.assert_array_equal(segment.gallery.stored.scales, expected.scales)
    assert whole.items.equals(spilled.items)
    rows = np.random.default_rng(2).integers(0, N, 40)
    assert spilled.items_at(rows) == whole.items_at(rows)
    for filters in ({"parity": "odd"}, {"number": {"gte": 300}}):
        np.testing.assert_array_equal(spilled.matching(filters), whole.matching(filters))
        assert 0 < spilled.matching(filters).sum() < N


def test_an_attribute_has_one_type_however_late_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "_WAITING", 10)
    items = item_rows(0, 60)
    values = [json.dumps({"n": i, "late": i} if i < 50 else {"n": i + 0.5, "late": "x"}) for i in range(60)]
    items = items.set_column(items.schema.get_field_index("attributes"), "attributes", pa.array(values))
    codes = np.stack([np.arange(60) % v for v in SIZES], axis=1).astype(np.uint16)
    with SegmentWriter(tmp_path / "s", SIZES) as writer:
        for start in range(0, 60, 10):
            writer.add(segment_rows(items.slice(start, 10), codes[start : start + 10]))
        writer.finish("s", corpus_root="c", inputs={}, metrics={})
    segment = Segment(tmp_path / "s")
    assert {str(c.type) for c in segment.attributes} == {"struct<late: string, n: double>"}
    assert segment.matching({"late": 3}).sum() == 1 and segment.matching({"n": {"gt": 50.2}}).sum() == 10


def test_nothing_and_wrong_codes(tmp_path: Path) -> None:
    empty = write_segment(
        tmp_path / "none", segment_id="none", codes=np.empty((0, 4), np.uint16), vocab_sizes=SIZES,
        items=item_rows(0, 0), corpus_root="c", inputs={},
    )  # fmt: skip
    assert empty.metrics["items"] == 0 and len(Segment(tmp_path / "none")) == 0
    with pytest.raises(StoreError, match="which has 16 tokens"):
        write_segment(
            tmp_path / "bad", segment_id="bad", codes=np.full((2, 4), 99, np.uint16), vocab_sizes=(3000,) * 3 + (16,),
            items=item_rows(0, 2), corpus_root="c", inputs={},
        )  # fmt: skip


def test_the_index_spells_every_identifier(corpus: tuple[pa.Table, np.ndarray, np.ndarray]) -> None:
    codes = corpus[1][np.lexsort(corpus[1].T[::-1])]
    index = ConstraintIndex.build(codes, SIZES)
    np.testing.assert_array_equal(np.stack([index.spelled(level) for level in range(4)], axis=1), codes)
