"""The constraint index and item masks: properties over random corpora."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core.arrays import map_arrays, save_arrays
from ace_core.constraint import ConstraintIndex, pointer_levels
from ace_core.errors import StoreError
from ace_core.filters import ItemMask
from tests.decoding_reference import build, corpora


@settings(deadline=None)
@given(corpora())
def test_nodes_are_the_distinct_prefixes_and_intervals_of_the_items(corpus):
    codes, sizes = corpus
    index, ordered, _ = build(codes, sizes)
    assert index.items == len(codes)
    for level in range(index.levels):
        flat = level >= index.depth
        prefixes = ordered if flat else np.unique(ordered[:, : level + 1], axis=0)
        assert index.level_tokens(level).tolist() == prefixes[:, level].tolist()
        assert index.spelled(level).tolist() == ordered[:, level].tolist()
        low, high = index.items_of(level, np.arange(len(prefixes)), np.arange(len(prefixes)) + 1)
        for node, prefix in enumerate(prefixes):
            inside = ordered[low[node] : high[node], : level + 1]
            assert (inside == prefix[: level + 1]).all()
            count = 1 if flat else (ordered[:, : level + 1] == prefix).all(1).sum()
            assert high[node] - low[node] == count


@settings(deadline=None)
@given(corpora(min_items=1))
def test_first_child_points_at_the_children(corpus):
    codes, sizes = corpus
    index, ordered, _ = build(codes, sizes)
    for level, pointers in enumerate(index.first_child):
        assert pointers.dtype == np.int32
        assert (np.diff(pointers) >= 1).all()
        for node in range(len(index.tokens[level])):
            low, high = index.items_of(level, np.array([node]), np.array([node + 1]))
            column = ordered[low[0] : high[0], level + 1]
            children = column if level + 1 == index.depth else np.unique(column)
            assert index.level_tokens(level + 1)[pointers[node] : pointers[node + 1]].tolist() == children.tolist()


def test_tokens_are_narrow_where_the_vocabulary_is():
    codes = np.array([[0, 0, 0], [2, 256, 255]], np.uint16)
    index = ConstraintIndex.build(codes, (3, 257, 256), 2)
    assert [t.dtype for t in index.tokens] == [np.uint8, np.uint16] and index.tail.dtype == np.uint8
    assert ConstraintIndex.build(codes, (3, 257, 256), 1).tail.dtype == np.uint16
    assert ConstraintIndex.build(codes[:, :2], (3, 257), 0).tail.dtype == np.uint16


def test_pointers_end_where_few_items_share_a_prefix():
    sizes = (3, 256, 256, 256, 256, 256)
    assert [pointer_levels(sizes, items) for items in (0, 16, 17, 10_000, 100_000, 10**6, 10**7, 10**10)] == [
        0, 0, 1, 2, 3, 3, 4, 5,
    ]  # fmt: skip
    assert pointer_levels((3,), 10**6) == 0
    assert ConstraintIndex.build(np.zeros((1000, 3), np.uint16), (3, 256, 256)).depth == 2


def test_four_bytes_an_item():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (200_000, 5)).astype(np.uint16)
    codes[:, :2] %= 16
    index = ConstraintIndex.build(codes[np.lexsort(codes.T[::-1])], (256,) * 5)
    assert index.depth == 2 and index.nbytes / index.items <= 4


def test_items_out_of_order_are_refused():
    with pytest.raises(StoreError, match="not sorted"):
        ConstraintIndex.build(np.array([[0, 1, 1], [0, 1, 0]], np.uint16), (3, 2, 2))
    with pytest.raises(StoreError, match="not sorted"):
        ConstraintIndex.build(np.array([[1, 0], [0, 1]], np.uint16), (3, 2))


@settings(deadline=None)
@given(corpora())
def test_saved_and_mapped_back_it_is_the_same(tmp_path_factory, corpus):
    codes, sizes = corpus
    index, _, _ = build(codes, sizes)
    path = tmp_path_factory.mktemp("index") / "constraint.safetensors"
    index.save(path)
    loaded = ConstraintIndex.load(path)
    assert loaded.vocab_sizes == sizes
    for a, b in zip(
        (*index.tokens, *index.first_child, index.tail), (*loaded.tokens, *loaded.first_child, loaded.tail)
    ):
        assert a.dtype == b.dtype and (a == b).all()
        assert not b.flags.writeable or not len(b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("tokens_0"), "'tokens_0' is missing"),
        (lambda a: a.pop("tail"), "'tokens_1' is missing"),
        (lambda a: a.update(tail=a["tail"][:, :0]), "tail of shape"),
        (lambda a: a.update(first_child_0=a["first_child_0"] + 1), "level 0 does not fit level 1"),
        (lambda a: a.update(first_child_0=a["first_child_0"][1:]), "level 0 does not fit level 1"),
        (lambda a: a.update(tail=a["tail"].astype(np.uint16)), "tokens of level 1 are uint16"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    index = ConstraintIndex.build(np.array([[0, 1], [0, 2], [1, 1]], np.uint16), (3, 4), 1)
    path = tmp_path / "constraint.safetensors"
    index.save(path)
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    change(arrays)
    save_arrays(path, arrays)
    with pytest.raises(StoreError, match=message):
        ConstraintIndex.load(path)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=300))
def test_a_mask_counts_what_it_allows(allowed):
    allowed = np.array(allowed, bool)
    mask = ItemMask.of(allowed)
    assert mask.items == len(allowed)
    assert (mask.to_bool() == allowed).all()
    edges = np.arange(len(allowed) + 1)
    assert mask.rank(edges).tolist() == [int(allowed[:i].sum()) for i in edges]


def test_a_file_from_before_there_were_tails_is_read(tmp_path):
    codes = np.array([[0, 1, 2], [0, 1, 2], [0, 2, 1], [2, 0, 0]], np.uint16)
    index = ConstraintIndex.build(codes, (3, 3, 3), 2)
    path = tmp_path / "constraint.safetensors"
    index.save(path)
    arrays = {k: np.array(v) for k, v in map_arrays(path).items()}
    arrays["tokens_2"] = arrays.pop("tail")[:, 0]
    save_arrays(path, arrays)
    loaded = ConstraintIndex.load(path)
    assert loaded.depth == 2
    assert [loaded.spelled(level).tolist() for level in range(3)] == codes.T.tolist()
