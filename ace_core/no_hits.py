"""Why a filter leaves nothing: what the items have in place of what was asked for.

A filter that no item passes is a legal question with an empty answer, and mostly a misspelt value. So the answer comes
with a note: the nearest values that there are, or the range of numbers and dates.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.attributes import FilterValue, matching
from ace_core.items import MODALITIES, Modality
from ace_core.snapshot import Snapshot

_SHOWN = 8  # values that a note lists
_FEW = 500  # values that are compared with what was asked for; of more, those that hold it are
_HEAD = 2 * _FEW  # items that say of most attributes whether their values are few, and dates
_ASKED = 3  # values asked for that are compared
_LONGEST = 60  # characters of a value that is shown, or compared letter by letter
_DATE = r"^\d{4}-\d{2}(-\d{2}([T ].*)?)?$"


def why_nothing(snapshot: Snapshot, modalities: Sequence[Modality], filters: Mapping[str, FilterValue]) -> str:
    """One sentence about the live items of a snapshot that says why none is of these modalities and passes these
    filters; empty where some item does.

    Raises:
        QueryError: a filter makes no sense, see :func:`ace_core.attributes.matching`.
    """
    live = [_live(snapshot, number) for number in range(len(snapshot.segments))]
    kinds = [segment.gallery.codes[:, 0] for segment in snapshot.segments]
    there = sum((np.bincount(kind[rows], minlength=len(MODALITIES)) for kind, rows in zip(kinds, live)), np.zeros(3))
    if not there.any():
        return "the snapshot has no items"
    if modalities:
        live = [rows & np.isin(kind, [m.token for m in modalities]) for kind, rows in zip(kinds, live)]
        if not any(rows.any() for rows in live):
            found = ", ".join(f"{m.value} ({int(n)})" for m, n in zip(MODALITIES, there) if n)
            return f"no item is {' or '.join(modalities)}: there are {found}"
    runs = [run for segment, rows in zip(snapshot.segments, live) for run in _runs(segment.attributes, rows)]
    passing = {name: [matching(run, {name: wanted}) for run in runs] for name, wanted in filters.items()}
    among = f" of {' and '.join(modalities)}" if modalities else ""
    alone = {name: sum(int(mask.sum()) for mask in masks) for name, masks in passing.items()}
    if empty := [name for name, count in alone.items() if not count]:
        return "; ".join(
            f"no item{among} passes {_said(n, filters[n])}: {_there_is(n, filters[n], runs)}" for n in empty
        )
    if any(np.logical_and.reduce(masks).any() for masks in zip(*passing.values())) or not filters:
        return ""
    each = ", ".join(f"{_said(name, filters[name])} ({count})" for name, count in alone.items())
    return f"each of these filters alone passes items{among}, but none passes all of them: {each}"


def _live(snapshot: Snapshot, number: int) -> np.ndarray:
    rows = np.ones(len(snapshot.segments[number]), bool)
    rows[snapshot.removed[number]] = False
    return rows


def _runs(attributes: Sequence[pa.StructArray], rows: np.ndarray) -> list[pa.StructArray]:
    """The runs of one segment, without the items that ``rows`` (bool) leaves out."""
    starts = np.cumsum([0, *map(len, attributes)])
    masks = [rows[start : start + len(run)] for start, run in zip(starts, attributes)]
    return [run if mask.all() else run.filter(pa.array(mask)) for run, mask in zip(attributes, masks)]


def _said(name: str, wanted: FilterValue) -> str:
    return f"{name}={_short(wanted[0] if isinstance(wanted, Sequence) and len(wanted) == 1 else wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _there_is(name: str, wanted: FilterValue, runs: Sequence[pa.StructArray]) -> str:
    """What the items have of an attribute, nearest to what was asked for."""
    columns = [run.field(name).drop_null() for run in runs if run.type.get_field_index(name) >= 0]
    columns = [column for column in columns if len(column)]
    if not columns:
        return f"none has {name}"
    if isinstance(wanted, Mapping) and wanted.get("exists") is False:
        return f"all have {name}"
    asked = _asked(wanted)
    if all(pa.types.is_integer(c.type) or pa.types.is_floating(c.type) for c in columns):
        return _range(name, columns) + _around(columns, [a for a in asked if isinstance(a, int | float)])
    if all(pa.types.is_string(c.type) and _are_dates(c) for c in columns):
        return _range(name, columns)
    return _values(name, columns, [_plain(a) for a in asked])


def _asked(wanted: FilterValue) -> list[Any]:
    """The single values that a filter asks for."""
    if isinstance(wanted, Mapping):
        return []
    return list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]


def _are_dates(column: pa.Array) -> bool:
    return all(pc.all(pc.match_substring_regex(part, _DATE)).as_py() for part in (column[:_HEAD], column))


def _are_few(column: pa.Array) -> bool:
    return all(pc.count_distinct(part).as_py() <= _FEW for part in (column[:_HEAD], column))


def _range(name: str, columns: Sequence[pa.Array]) -> str:
    ends = [pc.min_max(column) for column in columns]
    low, high = min(end["min"].as_py() for end in ends), max(end["max"].as_py() for end in ends)
    return f"{name} is {_short(low)} everywhere" if low == high else f"{name} goes from {_short(low)} to {_short(high)}"


def _around(columns: Sequence[pa.Array], asked: Sequence[float]) -> str:
    """The numbers next to the first that was asked for, where it lies between some."""
    if not asked:
        return ""
    values = np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])
    below, above = values[values < asked[0]], values[values > asked[0]]
    if not len(below) or not len(above):
        return ""
    return f", next to it are {_short(below.max().item())} and {_short(above.min().item())}"


def _values(name: str, columns: Sequence[pa.Array], asked: Sequence[str]) -> str:
    counts: Counter[Any] = Counter()
    few = all(map(_are_few, columns))
    for column in columns if few else _holding(columns, asked):
        for pair in pc.value_counts(column).to_pylist():
            counts[pair["values"]] += pair["counts"]
    near = _nearest(asked, list(counts))
    meant = f"did you mean {' or '.join(map(_short, near))}? " if near else ""
    if not few:
        return f"{meant}{name} has more than {_FEW} values"
    others = [value for value in counts if value not in near]
    ranked = [*near, *sorted(others, key=lambda value: (-counts[value], _plain(value)))]
    more = f" and {len(ranked) - _SHOWN} more" if len(ranked) > _SHOWN else ""
    listed = ", ".join(f"{_short(value)} ({counts[value]})" for value in ranked[:_SHOWN])
    return f"{meant}{name} is {listed}{more}"


def _holding(columns: Sequence[pa.Array], asked: Sequence[str]) -> list[pa.Array]:
    """Of many values those that hold what was asked for, in any case: the first."""
    wanted = [_folded(text) for text in asked[:_ASKED] if text.strip()]
    texts = [column.cast(pa.string()) for column in columns]
    held = [column.filter(pc.match_substring(column, text, ignore_case=True)) for text in wanted for column in texts]
    return [pc.unique(column)[:_FEW] for column in held]


def _nearest(asked: Sequence[str], values: Sequence[Any]) -> list[Any]:
    """The value that is one that was asked for in another case, or up to three that hold it or look most like it."""
    folded: dict[str, Any] = {}
    for value in values:
        folded.setdefault(_folded(_plain(value)), value)
    near: list[Any] = []
    for text in map(_folded, asked[:_ASKED]):
        if text in folded:
            near.append(folded[text])
            continue
        holding = [like for like in folded if len(text) > 2 and text in like]
        near += [folded[like] for like in sorted(holding, key=lambda like: (len(like), like))]
        if len(text) <= _LONGEST:  # of long ones it takes seconds
            near += [folded[like] for like in difflib.get_close_matches(text, folded, cutoff=0.65)]
    return list(dict.fromkeys(near))[:3]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _folded(text: str) -> str:
    return text.casefold().strip()
