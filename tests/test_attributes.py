"""Attributes keep their type, and filters choose exactly the items that a plain loop would."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from ace_core.attributes import attribute_types, common_types, facets, matching, typed_attributes
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
        ({"colour": None}, []),
        ({"colour": ["blue", None]}, [1]),
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
    for bad in ({"size": "large"}, {"size": 2**70}, {"colour": "\ud800"}, {"colour": {"gte": "\ud800"}}):
        with pytest.raises(QueryError, match="cannot be compared"):
            matching(column, bad)


def test_no_attributes_at_all() -> None:
    column = typed_attributes([{}, {}])
    assert len(column) == 2 and matching(column, {}).all() and not matching(column, {"a": 1}).any()


def test_facets_add_up_over_segments(column: pa.StructArray) -> None:
    found = {facet.name: facet for facet in facets([column, typed_attributes([{"colour": "blue"}] * 3)])}
    assert found["colour"].values == (("blue", 4), ("red", 2))
    assert found["size"].type == "int64" and found["size"].distinct == 2


def _by_hand(rows: list[dict]) -> tuple[dict[str, str], list[dict]]:
    """Types and values as a plain loop over Python values finds them."""

    def text(value: object) -> object:
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    types, columns = {}, {}
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        if kinds == {bool}:
            types[name], columns[name] = "bool", values
        elif kinds == {int} and all(abs(v) < 2**62 for v in values if v is not None):
            types[name], columns[name] = "int64", values
        elif kinds and kinds <= {int, float}:
            types[name], columns[name] = "double", [None if v is None else float(v) for v in values]
        else:
            types[name], columns[name] = "string", [text(v) for v in values]
    return types, [{n: columns[n][i] for n in columns} for i in range(len(rows))]


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": 1, "b": "x"}, {"a": 2}, {"b": "y", "c": True}, {}],
        [{"when": "2024-01-02"}, {"when": "2024-01-02T03:04:05Z"}],  # dates stay the text they are
        [{"n": 1}, {"n": 2.5}, {"n": None}],
        [{"n": 1}, {"n": True}],
        [{"n": 1}, {"n": "1"}, {"n": [1, 2]}, {"n": {"deep": None}}],
        [{"n": 2**70}, {"n": 3}],
        [{"only": None}, {"only": None}],
        [{"text": 'quote " and \\ and \n line', "ü": "naïve"}, {"text": ""}],
        [{"same": "one", "k": 5}] * 40,
        [{"list": []}, {"list": ["a"]}],
        [{}, {}],
    ],
)
def test_types_and_values_are_those_of_a_plain_loop(rows: list[dict]) -> None:
    types, values = _by_hand(rows)
    for column in (typed_attributes([json.dumps(r) for r in rows]), typed_attributes(rows)):
        assert {field.name: str(field.type) for field in column.type} == types
        assert column.to_pylist() == values


def test_groups_of_items_share_types() -> None:
    groups = [[{"a": 1, "b": 1}], [{"a": 0.5, "b": "x", "c": None}], [{"c": True}]]
    texts = [pa.array([json.dumps(row) for row in group]) for group in groups]
    types: dict[str, pa.DataType] = {}
    for rows in texts:
        types = common_types(types, attribute_types(rows))
    columns = [typed_attributes(rows, types) for rows in texts]
    assert {str(column.type) for column in columns} == {"struct<a: double, b: string, c: bool>"}
    assert [column.to_pylist()[0] for column in columns] == [
        {"a": 1.0, "b": "1", "c": None}, {"a": 0.5, "b": "x", "c": None}, {"a": None, "b": None, "c": True},
    ]  # fmt: skip
