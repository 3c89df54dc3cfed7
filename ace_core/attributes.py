"""Attributes of items: typed columns, and the filters that choose items by them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as pa_json

from ace_core.errors import QueryError

FilterValue = str | int | float | bool | Sequence[str | int | float | bool] | Mapping[str, Any]
"""A value (equal), a list (any of), or a mapping with ``gte``, ``gt``, ``lte``, ``lt``, ``not`` or ``exists``."""

_COMPARE = {"gte": pc.greater_equal, "gt": pc.greater, "lte": pc.less_equal, "lt": pc.less}
_MAX_FACET_VALUES = 50
_KINDS = {"int64": "whole numbers", "double": "numbers", "bool": "true and false", "string": "texts"}


def attribute_types(rows: pa.Array) -> dict[str, pa.DataType]:
    """The type of each attribute of n items, given as JSON text: bool, int64 or float64 when all its values are, null
    when it has none; everything else (mixed values, lists, nested values) is text."""
    found = _read(rows.unique(), None)
    if found is not None and not any(pa.types.is_nested(t) for t in found.schema.types):
        # Arrow takes texts that look like dates for dates.
        plain = (pa.types.is_boolean, pa.types.is_int64, pa.types.is_float64, pa.types.is_null)
        return {f.name: f.type if any(is_(f.type) for is_ in plain) else pa.string() for f in found.schema}
    types: dict[str, pa.DataType] = {}
    for text in rows.unique().to_pylist():
        types = common_types(types, {name: _type(value) for name, value in json.loads(text).items()})
    return types


def common_types(some: Mapping[str, pa.DataType], others: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The types of attributes that two groups of items can share: text where nothing else holds both."""
    return {name: _common(some.get(name, pa.null()), others.get(name, pa.null())) for name in {**some, **others}}


def typed_attributes(
    rows: Sequence[str | Mapping[str, Any]] | pa.Array, types: Mapping[str, pa.DataType] | None = None
) -> pa.StructArray:
    """One struct column from the attributes of n items, each given as a mapping or as JSON text.

    Every field has one type (:func:`attribute_types`), so that a filter always compares like with like.

    Args:
        types: of all attributes, where more items than these share the column; by default as these items have them.
    """
    if not isinstance(rows, pa.Array):
        rows = pa.array([row if isinstance(row, str) else json.dumps(row) for row in rows], pa.string())
    types = attribute_types(rows) if types is None else types
    kinds = {name: pa.string() if pa.types.is_null(types[name]) else types[name] for name in sorted(types)}
    if not kinds:
        return pa.array([{}] * len(rows), pa.struct([]))
    # Many items have the same attributes: each text is parsed once.
    encoded = rows.dictionary_encode()
    table = _read(encoded.dictionary, pa.schema(list(kinds.items())))
    if table is None:
        parsed = [json.loads(text) for text in encoded.dictionary.to_pylist()]
        columns = [_typed_column([row.get(name) for row in parsed], kind) for name, kind in kinds.items()]
    else:
        columns = [table.column(name).combine_chunks() for name in kinds]
    return pa.StructArray.from_arrays(columns, list(kinds)).take(encoded.indices)


def _read(texts: pa.Array, schema: pa.Schema | None) -> pa.Table | None:
    """JSON objects as a table; None where Arrow cannot (mixed types), or would read something else than Python."""
    data = "\n".join(texts.to_pylist()).encode()
    try:
        table = pa_json.read_json(
            pa.BufferReader(data),
            pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pa_json.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowException:
        return None
    return table if table.num_rows == len(texts) else None


def _type(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else pa.float64()
    return pa.float64() if isinstance(value, float) else pa.string()


def _common(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if a.equals(b) or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    numbers = (pa.int64(), pa.float64())
    return pa.float64() if a in numbers and b in numbers else pa.string()


def _typed_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array([_text(v) for v in values], kind)
    return pa.array([None if v is None else kind.to_pandas_dtype()(v) for v in values], kind)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def matching(attributes: pa.StructArray, filters: Mapping[str, FilterValue]) -> np.ndarray:
    """Which of n items pass every filter.

    Args:
        attributes: (n,) struct column of :func:`typed_attributes`.
        filters: attribute name to :data:`FilterValue`. An item that lacks the attribute never passes, except
            ``{"exists": false}``.

    Returns:
        (n,) bool.

    Raises:
        QueryError: a filter's operator is unknown, or its value cannot be compared with the attribute.
    """
    keep = np.ones(len(attributes), bool)
    names = {field.name for field in attributes.type}
    for name, wanted in filters.items():
        if name not in names:
            keep &= _passes_without(name, wanted)
            continue
        column = attributes.field(name)
        try:
            keep &= _matches(name, column, wanted)
        # Another kind of value, a number of more than 64 bits, half of a surrogate pair.
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            raise QueryError(
                f"the filter value {wanted!r} cannot be compared with {_KINDS.get(str(column.type), column.type)}",
                where=f"filters.{name}",
                remedy=f"Give {name} a value, or a list of values, of that kind.",
            ) from None
    return keep


def check_names(filters: Mapping[str, FilterValue], columns: Sequence[pa.StructType]) -> None:
    """A misspelt attribute must not look like a corpus without such items.

    Raises:
        QueryError: a filter names an attribute that no column has, and does not ask for its absence.
    """
    known = {field.name for column in columns for field in column}
    for name, wanted in filters.items():
        if name not in known and not _asks_for_absence(wanted):
            raise QueryError(
                f"no item has an attribute {name!r}",
                where=f"filters.{name}",
                remedy=f"There are {', '.join(sorted(known))}." if known else "The corpus has no attributes.",
            )


def _passes_without(name: str, wanted: FilterValue) -> bool:
    """Whether an item that lacks the attribute passes."""
    if isinstance(wanted, Mapping):
        _check_operators(name, wanted)
    return _asks_for_absence(wanted)


def _asks_for_absence(wanted: FilterValue) -> bool:
    """Whether items that lack the attribute, and only those, pass: ``{"exists": false}``."""
    if not isinstance(wanted, Mapping):
        return False
    return bool(wanted) and all(operator == "exists" and not value for operator, value in wanted.items())


def _check_operators(name: str, wanted: Mapping[str, Any]) -> None:
    for operator in wanted:
        if operator not in (*_COMPARE, "not", "exists"):
            raise QueryError(
                f"unknown operator {operator!r}",
                where=f"filters.{name}",
                remedy="Use a value, a list of values, or gte, gt, lte, lt, not, exists.",
            )


def _matches(name: str, column: pa.Array, wanted: FilterValue) -> np.ndarray:
    if isinstance(wanted, Mapping):
        _check_operators(name, wanted)
        keep = np.ones(len(column), bool)
        for operator, value in wanted.items():
            if operator in _COMPARE:
                keep &= _dense(_COMPARE[operator](column, pa.scalar(value)))
            elif operator == "not":
                keep &= _dense(pc.is_valid(column)) & ~_dense(pc.is_in(column, value_set=_value_set(column, value)))
            else:
                keep &= _dense(pc.is_valid(column)) == bool(value)
        return keep
    return _dense(pc.is_in(column, value_set=_value_set(column, wanted)))


def _value_set(column: pa.Array, value: Any) -> pa.Array:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    values = [v for v in values if v is not None]  # which would stand for the items that lack the attribute
    if pa.types.is_string(column.type):
        values = [_text(v) for v in values]
    return pa.array(values).cast(column.type)


def _dense(mask: pa.Array) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False).astype(bool)


@dataclass(frozen=True)
class Facet:
    """A filterable attribute: its type, and its values with counts (most frequent first) where they are few."""

    name: str
    type: str
    values: tuple[tuple[Any, int], ...]
    distinct: int


def facets(columns: Sequence[pa.StructArray]) -> list[Facet]:
    """Facets of the attributes of several segments together, by name."""
    counts: dict[str, dict[Any, int]] = {}
    types: dict[str, str] = {}
    for column in columns:
        for field in column.type:
            found = pc.value_counts(column.field(field.name).drop_null())
            per_value = counts.setdefault(field.name, {})
            types.setdefault(field.name, str(field.type))
            for value, count in zip(found.field("values").to_pylist(), found.field("counts").to_pylist()):
                per_value[value] = per_value.get(value, 0) + count
    out = []
    for name in sorted(counts):
        ranked = sorted(counts[name].items(), key=lambda pair: (-pair[1], str(pair[0])))
        shown = ranked if len(ranked) <= _MAX_FACET_VALUES else []
        out.append(Facet(name, types[name], tuple(shown), len(ranked)))
    return out
