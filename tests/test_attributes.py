"""Attributes keep their type, and filters choose exactly the items that a plain loop would."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from ace_core.attributes import facets, matching, typed_attributes
from ace_core.errors import QueryError

ROWS = [
    {"colour": "red", "size": 3, "price": 1.5, "new": True, "mixed": 1, "tags": ["a", "b"]},
    {"colour": "blue", "size": 5, "price": 2, "new": False, "mixed": "one"},
    {"colour": "red", "size": None, "new": True},
    {},
]


@pytest.fixture(scope="module")
def column() -> pa.StructArray:
    return typed_attributes([json.dumps(row) for row in ROWS])


def test_types_survive(column: pa.StructArray) -> None:
    types = {field.name: str(field.type) for field in column.type}
    assert types == {
        "colour": "string", "size": "int64", "price": "double", "new": "bool", "mixed": "string", "tags": "string",
    }  # fmt: skip
    assert column.field("mixed").to_pylist() == ["1", "one", None, None]


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        ({}, [0, 1, 2, 3]),
        ({"colour": "red"}, [0, 2]),
        ({"colour": ["red", "blue"], "new": True}, [0, 2]),
        ({"size": {"gte": 4}}, [1]),
        ({"price": {"gt": 1, "lt": 2}}, [0]),
        ({"size": {"exists": False}}, [2, 3]),
        ({"colour": {"not": "red"}}, [1]),
        ({"mixed": 1}, [0]),
        ({"absent": "x"}, []),
        ({"absent": {"exists": False}}, [0, 1, 2, 3]),
        ({"absent": {"gte": 3}}, []),
        ({"absent": {"not": "x"}}, []),
        ({"colour": []}, []),
    ],
)
def test_filters(column: pa.StructArray, filters: dict, rows: list[int]) -> None:
    assert np.flatnonzero(matching(column, filters)).tolist() == rows


def test_bad_filters_say_why(column: pa.StructArray) -> None:
    with pytest.raises(QueryError, match="unknown operator 'like'"):
        matching(column, {"colour": {"like": "r%"}})
    with pytest.raises(QueryError, match="unknown operator 'like'"):
        matching(column, {"absent": {"like": "r%"}})
    with pytest.raises(QueryError, match="cannot be compared"):
        matching(column, {"size": {"gte": "large"}})
    with pytest.raises(QueryError, match="cannot be compared"):
        matching(column, {"size": "large"})


def test_no_attributes_at_all() -> None:
    column = typed_attributes([{}, {}])
    assert len(column) == 2 and matching(column, {}).all() and not matching(column, {"a": 1}).any()


def test_facets_add_up_over_segments(column: pa.StructArray) -> None:
    found = {facet.name: facet for facet in facets([column, typed_attributes([{"colour": "blue"}] * 3)])}
    assert found["colour"].values == (("blue", 4), ("red", 2))
    assert found["size"].type == "int64" and found["size"].distinct == 2
