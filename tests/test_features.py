"""Features on disk and the split into what is trained on and what is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ace_core.config import SplitSettings
from ace_core.errors import StoreError
from ace_core.features import (
    ERRORS_SCHEMA,
    ITEM_SCHEMA,
    embeddings_of,
    features_schema,
    last_captions,
    read_errors,
    read_features,
    split_of,
    with_embeddings,
)
from ace_core.items import Modality
from ace_core.known_captions import KnownCaptions


def _rows(ids: list[str], modality: str, **columns: list[object]) -> pa.Table:
    n = len(ids)
    data: dict[str, list[object]] = {
        "item_id": list(ids),
        "uri": [f"{i}.bin" for i in ids],
        "modality": [modality] * n,
        "captions": [[f"caption of {i}"] for i in ids],
        "attributes": ["{}"] * n,
        "content_hash": ["0" * 32] * n,
        "mime": ["image/png"] * n,
        "start_seconds": [None] * n,
        "end_seconds": [None] * n,
        "stamp": ["1-1"] * n,
    }
    return pa.table(data | columns, schema=ITEM_SCHEMA)


def _write(folder: Path, modality: str, name: str, ids: list[str], dim: int) -> np.ndarray:
    vectors = np.random.default_rng(len(ids)).normal(size=(len(ids), dim)).astype(np.float16)
    (folder / modality).mkdir(parents=True, exist_ok=True)
    pq.write_table(with_embeddings(_rows(ids, modality), vectors), folder / modality / f"{name}.parquet")
    return vectors


def test_embeddings_survive_parquet_exactly(tmp_path: Path) -> None:
    vectors = _write(tmp_path, "image", "a", ["x", "y", "z"], 5)
    table = pq.read_table(tmp_path / "image" / "a.parquet")
    assert table.schema.equals(features_schema(5))
    np.testing.assert_array_equal(embeddings_of(table), vectors)
    assert embeddings_of(table.slice(1, 1)).shape == (1, 5)
    assert embeddings_of(table.slice(0, 0)).shape == (0, 5)


def test_items_are_grouped_by_modality_and_sorted_whatever_the_shards(tmp_path: Path) -> None:
    video = _write(tmp_path, "video", "v", ["v2", "v1"], 3)
    second = _write(tmp_path, "image", "b", ["i3", "i1"], 4)
    first = _write(tmp_path, "image", "a", ["i2"], 4)
    features = read_features(tmp_path)
    assert features.items.column("item_id").to_pylist() == ["i1", "i2", "i3", "v1", "v2"]
    np.testing.assert_array_equal(features.embeddings[Modality.IMAGE], np.stack([second[1], first[0], second[0]]))
    np.testing.assert_array_equal(features.embeddings[Modality.VIDEO], video[::-1])
    assert features.modality_tokens.tolist() == [0, 0, 0, 2, 2]
    assert features.rows_of(Modality.AUDIO) == slice(3, 3)
    assert features.rows_of(Modality.VIDEO) == slice(3, 5)
    assert features.counts() == {"image": 3, "video": 2}
    assert "embedding" not in features.items.column_names


def test_an_empty_part_and_mixed_widths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="hold no items"):
        read_features(tmp_path)
    _write(tmp_path, "image", "a", ["x"], 3)
    _write(tmp_path, "image", "b", ["y"], 4)
    with pytest.raises(StoreError, match="cannot be read together"):
        read_features(tmp_path)


def test_errors_are_read_back_by_id(tmp_path: Path) -> None:
    assert read_errors(tmp_path).num_rows == 0
    (tmp_path / "errors").mkdir()
    for number, item in enumerate(("b", "a")):
        row = {"item_id": item, "uri": "u", "modality": "image", "cause": "corrupt", "detail": "d"}
        pq.write_table(pa.Table.from_pylist([row], ERRORS_SCHEMA), tmp_path / "errors" / f"{number}.parquet")
    assert read_errors(tmp_path).column("item_id").to_pylist() == ["a", "b"]


def _split_table() -> pa.Table:
    captions = [["a", "b"], ["c"], ["d", "shared"], ["e", "shared"], ["f", "g"], ["h"], []]
    splits = ["train", None, "train", "test", "test", "val", "train"]
    attributes = [json.dumps({"split": s} if s else {}) for s in splits]
    return _rows(list("0123456"), "image", captions=captions, attributes=attributes)


def test_last_captions_are_those_that_a_fit_knows() -> None:
    """What asks for an added item is encoded with the split's texts, wherever its item is; a shared one need not be."""
    items = _split_table()
    last = last_captions(items)
    assert list(zip(last.rows.tolist(), last.texts)) == [(0, "b"), (1, "c"), (4, "g"), (5, "h")]
    split = split_of(items, SplitSettings())
    lists = split.train_pairs, split.seen_queries, split.unseen_queries, split.val_queries, split.val_shared
    assert set(last.texts) <= {text for pairs in lists for text in pairs.texts}


def test_split_follows_the_attribute() -> None:
    split = split_of(_split_table(), SplitSettings())
    assert split.trained.tolist() == [True, True, True, False, False, False, True]
    assert (split.held_out == ~split.trained).all()
    assert list(zip(split.unseen_queries.rows.tolist(), split.unseen_queries.texts)) == [(3, "e"), (4, "f"), (4, "g")]
    assert list(zip(split.val_queries.rows.tolist(), split.val_queries.texts)) == [(5, "h")]
    assert len(split.val_shared) == 0
    shared = split_of(_split_table(), SplitSettings(validation="test")).val_shared
    assert list(zip(shared.rows.tolist(), shared.texts)) == [(3, "shared")]
    # One caption of an item is kept out of training; one that another item has too is trained on and never asked.
    assert list(zip(split.seen_queries.rows.tolist(), split.seen_queries.texts)) == [(0, "b")]
    assert list(zip(split.train_pairs.rows.tolist(), split.train_pairs.texts)) == [
        (0, "a"), (1, "c"), (2, "d"), (2, "shared"),
    ]  # fmt: skip


def test_every_split_setting_changes_the_split() -> None:
    table = _split_table()
    assert "b" in split_of(table, SplitSettings(keep_one_caption=False)).train_pairs.texts
    assert split_of(table, SplitSettings(held_out=("val",))).trained[3]
    assert split_of(table, SplitSettings(validation="test")).val_queries.texts == ["e", "f", "g"]
    assert (
        split_of(table, SplitSettings(attribute="other")).trained.sum()
        != split_of(table, SplitSettings()).trained.sum()
    )


def test_without_the_attribute_items_are_held_out_by_their_id() -> None:
    ids = [f"item-{i}" for i in range(2000)]
    table = _rows(ids, "image", captions=[[f"c{i}"] if i % 2 else [] for i in range(2000)])
    split = split_of(table, SplitSettings(fraction=0.2))
    assert not split.held_out[::2].any()  # nothing to ask of an item without captions
    assert 0.16 < split.held_out[1::2].mean() < 0.24
    assert 60 < len(split.val_queries) < 140 and 60 < len(split.unseen_queries) < 140
    assert not set(split.val_queries.rows) & set(split.unseen_queries.rows)
    larger = _rows([*ids, "new"], "image", captions=[[f"c{i}"] if i % 2 else [] for i in range(2000)] + [["n"]])
    np.testing.assert_array_equal(split_of(larger, SplitSettings(fraction=0.2)).held_out[:2000], split.held_out)


def test_sampling_queries_is_fixed_by_the_seed() -> None:
    pairs = split_of(_rows([str(i) for i in range(300)], "image"), SplitSettings(fraction=0)).train_pairs
    one, other = pairs.sample(50, seed=1), pairs.sample(50, seed=2)
    assert len(one) == 50 and one.texts == pairs.sample(50, seed=1).texts and one.texts != other.texts
    assert all(text == f"caption of {i}" for i, text in zip(_ids(one.rows), one.texts))
    assert pairs.sample(1000, seed=1) is pairs


def _ids(rows: np.ndarray) -> list[str]:
    return [[str(i) for i in range(300)][row] for row in rows]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 400])
def test_known_captions_are_those_that_are_trained_on(named: bool, batch: int) -> None:
    rng = np.random.default_rng(batch)
    few = [f"text {i}" for i in range(300)]  # many items share one
    captions = [[few[i] for i in rng.integers(0, 300, rng.integers(0, 4))] for _ in range(400)]
    captions[5] = ["own", "twice", "twice"]
    table = _rows([f"item-{i}" for i in range(400)], "image", captions=captions)
    if named:  # only the last ones say so
        splits = [{}] * 300 + [{"split": ("train", "val", "test")[i % 3]} for i in range(100)]
        table = table.set_column(4, "attributes", pa.array([json.dumps(s) for s in splits]))
    generated = [[few[i] for i in rng.integers(0, 300, 2)] if i % 2 else None for i in range(400)]
    table = table.append_column("generated", pa.array(generated, pa.list_(pa.string())))
    for settings in (SplitSettings(fraction=0.3), SplitSettings(keep_one_caption=False)):
        pairs = split_of(table, settings).train_pairs
        encoded = [*few[::2], "own", "twice"]
        expected = [(row, text) for row, text in zip(pairs.rows.tolist(), pairs.texts) if text in encoded]
        known = KnownCaptions(pa.array(encoded, pa.large_string()), settings)
        for first in range(0, 400, batch):
            known.add(table.slice(first, batch))
        rows, texts = known.trained()
        assert list(zip(rows.tolist(), (encoded[i] for i in texts))) == expected and len(expected) > 50
    assert len(KnownCaptions(pa.array([], pa.large_string()), SplitSettings()).trained()[0]) == 0
