"""Attributes of items: typed columns, and the filters that choose items by them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.errors import QueryError

FilterValue = str | int | float | bool | Sequence[str | int | float | bool] | Mapping[str, Any]
"""A value (equal), a list (any of), or a mapping with ``gte``, ``gt``, ``lte``, ``lt``, ``not`` or ``exists``."""

_COMPARE = {"gte": pc.greater_equal, "gt": pc.greater, "lte": pc.less_equal, "lt": pc.less}
_MAX_FACET_VALUES = 50


def typed_attributes(rows: Sequence[str | Mapping[str, Any]]) -> pa.StructArray:
    """One struct column from the attributes of n items, each given as a mapping or as JSON text.

    A field is bool, int64 or float64 when all its values are; everything else (mixed values, lists, nested values)
    becomes text, so that a filter always compares like with like.
    """
    parsed = [json.loads(row) if isinstance(row, str) else row for row in rows]
    names = sorted({name for row in parsed for name in row})
    columns = [_typed_column([row.get(name) for row in parsed]) for name in names]
    if not names:
        return pa.array([{}] * len(parsed), pa.struct([]))
    return pa.StructArray.from_arrays(columns, names)


def _typed_column(values: list[Any]) -> pa.Array:
    kinds = {type(v) for v in values if v is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int}:
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array([_text(v) for v in values], pa.string())


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
        except pa.ArrowException as e:
            raise QueryError(
                f"the filter value {wanted!r} cannot be compared with {column.type}",
                where=f"filters.{name}",
                remedy=str(e),
            ) from None
    return keep


def _passes_without(name: str, wanted: FilterValue) -> bool:
    """Whether an item that lacks the attribute passes."""
    if not isinstance(wanted, Mapping):
        return False
    _check_operators(name, wanted)
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
