"""Manifests and arrays: damage, other versions and other kinds are refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ace_core.arrays import map_arrays, save_arrays
from ace_core.errors import AceError, MediaError, StoreError
from ace_core.manifest import (
    MANIFEST_NAME,
    Manifest,
    fingerprint,
    hash_folder,
    read_manifest,
    verify_files,
    write_manifest,
)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    (tmp_path / "data.bin").write_bytes(b"0123456789")
    write_manifest(tmp_path, Manifest(kind="aligner", id="a1", files=hash_folder(tmp_path)))
    return tmp_path


def test_round_trip(part: Path) -> None:
    manifest = read_manifest(part, expect="aligner")
    assert manifest.files["data.bin"].bytes == 10
    verify_files(part, manifest)


def test_refusals(part: Path) -> None:
    manifest = read_manifest(part, expect="aligner")
    with pytest.raises(StoreError, match="expected a quantizer, found a aligner"):
        read_manifest(part, expect="quantizer")
    (part / "data.bin").write_bytes(b"012345678X")
    with pytest.raises(StoreError, match="does not match its SHA-256"):
        verify_files(part, manifest)
    verify_files(part, manifest, hashes=False)
    (part / "data.bin").write_bytes(b"01")
    with pytest.raises(StoreError, match="has 2 bytes"):
        verify_files(part, manifest, hashes=False)
    (part / "data.bin").unlink()
    with pytest.raises(StoreError, match="missing"):
        verify_files(part, manifest)
    raw = json.loads((part / MANIFEST_NAME).read_text())
    (part / MANIFEST_NAME).write_text(json.dumps(raw | {"format_version": 99}))
    with pytest.raises(StoreError, match="format version 99"):
        read_manifest(part, expect="aligner")
    (part / MANIFEST_NAME).write_text(json.dumps({k: v for k, v in raw.items() if k != "id"}))
    with pytest.raises(StoreError, match="malformed"):
        read_manifest(part, expect="aligner")
    (part / MANIFEST_NAME).write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        read_manifest(part, expect="aligner")
    (part / MANIFEST_NAME).unlink()
    with pytest.raises(StoreError, match="no finished aligner"):
        read_manifest(part, expect="aligner")


def test_fingerprint_depends_on_every_part() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) != fingerprint({"a": 1}, "x")


def test_arrays_are_mapped_read_only(tmp_path: Path) -> None:
    arrays = {
        "tokens": np.arange(7, dtype=np.uint8),
        "codes": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "pointers": np.arange(5, dtype=np.int32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_arrays(tmp_path / "a.safetensors", arrays)
    mapped = map_arrays(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert mapped[name].dtype == array.dtype and np.array_equal(mapped[name], array)
        assert mapped[name].flags.aligned
    assert isinstance(mapped["codes"].base, np.memmap) or isinstance(mapped["codes"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped["codes"][0] = 1


def test_damaged_arrays(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read"):
        map_arrays(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(StoreError, match="cannot read"):
        map_arrays(tmp_path / "junk.safetensors")


def test_errors_travel_between_processes() -> None:
    for error in (StoreError("found", where="here", remedy="Do this."), MediaError("truncated", "found", where="f")):
        copy = pickle.loads(pickle.dumps(error))  # as Ray carries exceptions
        assert type(copy) is type(error) and str(copy) == str(error) and isinstance(copy, AceError)
    assert str(error) == "found [f]" and copy.cause == "truncated"
