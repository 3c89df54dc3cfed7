"""Rows found by a text without reading the column."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa

from ace_core.lookup import Lookup, checksums
from ace_core.manifest import MANIFEST_NAME
from ace_core.segment import Segment
from tests.tiny_store import TinyStore, content_hash, content_of


def test_rows_are_those_of_a_scan() -> None:
    # "plumless" and "buckeroo" have the same CRC-32
    texts = ["b", "plumless", "a", "buckeroo", "", "a", "größer", "plumless"]
    column = pa.chunked_array([texts[:3], texts[3:]])
    lookup = Lookup.of(checksums(column))
    for text in (*texts, "c", "\ud800"):
        assert lookup.rows_of(text, column) == [row for row, held in enumerate(texts) if held == text]
    none = pa.chunked_array([], pa.string())
    assert Lookup.of(checksums(none)).rows_of("a", none) == []


def test_a_segment_without_the_file_finds_the_same(tmp_path: Path) -> None:
    store = TinyStore(tmp_path)
    store.segment("new", 280, 20)
    new = tmp_path / "segments" / "new"
    assert (new / "lookup.safetensors").is_file()
    old = shutil.copytree(new, tmp_path / "segments" / "old")
    (old / "lookup.safetensors").unlink()
    manifest = json.loads((old / MANIFEST_NAME).read_text())
    del manifest["files"]["lookup.safetensors"]
    (old / MANIFEST_NAME).write_text(json.dumps(manifest))
    for segment in (Segment(new), Segment(old)):
        ids = segment.items.column("item_id").to_pylist()
        assert [segment.row_of(item_id) for item_id in ids] == list(range(20)) and segment.row_of("item-0001") is None
        parts = segment.rows_of_content(content_hash(content_of(299)))
        assert [ids[row] for row in parts] == sorted(["item-0298", "item-0299"], key=ids.index)
        assert segment.rows_of_content("") == []


def test_what_serves_on_is_found_by_after_its_files_are_deleted(tmp_path: Path) -> None:
    """`ace gc`, or a mirror that follows it, may delete a segment while a server still has it open."""
    TinyStore(tmp_path).segment("one", 280, 20)
    segment = Segment(tmp_path / "segments" / "one")
    shutil.rmtree(segment.folder)
    row = segment.row_of("item-0299")
    assert row is not None and segment.item(row).item_id == "item-0299"
    assert row in segment.rows_of_content(content_hash(content_of(299)))
