"""Similarities of candidates: from codes alone, and with what codes leave of the items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ace_core import scoring
from ace_core.candidates import Candidates
from ace_core.errors import StoreError
from ace_core.identifiers import sort_order
from ace_core.manifest import hash_folder, read_manifest, write_manifest
from ace_core.quantize.quantizer import Quantizer
from ace_core.scoring import Gallery, Remainders, similarity
from ace_core.segment import Segment
from tests.tiny_store import TinyStore

DIM, ITEMS = 40, 500


@pytest.fixture(scope="module")
def world() -> tuple[Quantizer, np.ndarray, np.ndarray]:
    """A quantizer, items of unit norm, and their identifiers, sorted."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ITEMS, DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    same = np.eye(DIM, dtype=np.float32)
    tables = tuple((x[rng.integers(0, ITEMS, 16)] * scale).astype(np.float32) for scale in (1.0, 0.6, 0.4))
    means = np.zeros((3, DIM), np.float32)
    quantizer = Quantizer(means, same, tables[0], same, tables[1:], tables)
    codes = quantizer.assign(x, np.arange(ITEMS) % 3)
    order = sort_order(codes, quantizer.vocab_sizes)
    return quantizer, x[order], codes[order]


def _candidates(codes: np.ndarray, rows: np.ndarray, segment: np.ndarray, valid: np.ndarray) -> Candidates:
    log_prob = np.where(valid, 0.0, -np.inf).astype(np.float32)
    tokens = np.where(valid[..., None], codes[rows], 0).astype(np.uint16)
    return Candidates(valid, segment, np.where(valid, rows, 0), log_prob, np.zeros(tokens.shape, np.float32), tokens)


def test_similarity_is_the_product_with_the_items_vector(
    world: tuple[Quantizer, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, x, codes = world
    monkeypatch.setattr(scoring, "_BLOCK", 64)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((4, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows, segment = rng.integers(0, ITEMS, (4, 30)), rng.integers(0, 2, (4, 30))
    valid = rng.random((4, 30)) < 0.8
    galleries = [Gallery.build(codes, quantizer, x), Gallery.build(codes, quantizer)]
    found = similarity(queries, _candidates(codes, rows, segment, valid), galleries, quantizer)
    vectors = np.where(
        (segment == 0)[..., None], x[rows], quantizer.reconstruct(codes[rows.ravel()]).reshape(4, 30, -1)
    )
    exact = np.einsum("nd,ncd->nc", queries.astype(np.float64), vectors)
    np.testing.assert_allclose(found, np.where(valid, exact, 0), atol=5e-3)
    np.testing.assert_allclose(found[segment == 1], np.where(valid, exact, 0)[segment == 1], atol=1e-4)
    for number, gallery in enumerate(galleries):  # what is shown of an item is what it was ranked by
        here = valid & (segment == number)
        shown = np.einsum("nd,nd->n", queries[np.nonzero(here)[0]], gallery.vectors(rows[here], quantizer))
        np.testing.assert_allclose(found[here], shown, atol=1e-4)


def test_a_remainder_in_8_bits_is_nearer_than_the_vector_in_8_bits(
    world: tuple[Quantizer, np.ndarray, np.ndarray],
) -> None:
    _, x, _ = world
    rebuilt = x + 0.02 * np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    whole, left = Remainders.of(x), Remainders.of(x - rebuilt)
    rows = np.arange(ITEMS)
    error = np.abs(x - rebuilt - left.rows(rows)).mean()
    assert error < np.abs(x - whole.rows(rows)).mean() / 4
    assert left.nbytes == whole.nbytes == ITEMS * (DIM + 4)


def test_rounding_of_codewords_is_in_what_is_stored(world: tuple[Quantizer, np.ndarray, np.ndarray]) -> None:
    quantizer, x, codes = world
    gallery, rows = Gallery.build(codes, quantizer, x), np.arange(ITEMS)
    assert gallery.stored is not None
    half = gallery.stored.scales[:, None] / 2 + 1e-6  # what 8 bits of a remainder leave, and no more
    assert (np.abs(gallery.vectors(rows, quantizer) - x) <= half).all()
    fitted = sum(table[codes[:, 1 + level]] for level, table in enumerate(quantizer.codebooks))
    rounding = quantizer.reconstruct(codes) - fitted
    assert (np.abs(gallery.vectors(rows, quantizer) - rounding - x) > half).any()  # off if it were not


def test_a_segment_of_whole_vectors_is_refused_by_name(tmp_path: Path) -> None:
    TinyStore(tmp_path).segment("old", 0, 30, stored=True)
    folder = tmp_path / "segments" / "old"
    (folder / "remainders.safetensors").rename(folder / "vectors.safetensors")
    manifest = read_manifest(folder, expect="segment")
    write_manifest(folder, manifest.model_copy(update={"files": hash_folder(folder)}))
    with pytest.raises(StoreError, match=r"format 1 .*`ace publish`"):
        Segment(folder)
