"""Identifiers: checks and order."""

import numpy as np
import pytest

from ace_core.errors import StoreError
from ace_core.identifiers import check_identifiers, sort_order


def test_the_order_is_lexicographic_and_stable():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (500, 4)).astype(np.uint16)
    expected = sorted(range(500), key=lambda i: (*codes[i].tolist(), i))
    assert sort_order(codes, (3, 3, 3, 3)).tolist() == expected


def test_a_token_outside_its_level_is_refused_by_name():
    codes = np.array([[0, 1], [2, 7]], np.uint16)
    check_identifiers(codes, (3, 8))
    with pytest.raises(StoreError, match="item 1 has token 7 at level 1, which has 7 tokens"):
        check_identifiers(codes, (3, 7))
    with pytest.raises(StoreError, match="item 1 has token 7"):
        sort_order(codes, (3, 7))


@pytest.mark.parametrize("codes", [np.zeros((2, 3), np.uint16), np.zeros((2, 2), np.int64), np.zeros(2, np.uint16)])
def test_another_shape_or_type_is_refused(codes):
    with pytest.raises(StoreError, match="expected uint16"):
        check_identifiers(codes, (3, 8))
