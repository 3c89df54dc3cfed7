"""``ace search``: one query in this process, and its answer as a table or as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from rich.table import Table

from ace_core.config import Settings
from ace_core.errors import QueryError
from ace_core.items import Modality
from ace_core.query import Hit
from ace_core.retriever import Retriever
from ace_store import Store
from pipelines.progress import Reporter


@dataclass(frozen=True)
class Answer:
    """The best items for a text, the score below which they are no confident match, and why there are none."""

    hits: list[Hit]
    threshold: float
    note: str = ""


class _Values(yaml.SafeLoader):
    """YAML whose plain words are JSON's: numbers, true and false are read; dates, times, yes and no stay texts."""


_Values.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("bool", r"true$|false$", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Values.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_first))


def search_once(
    settings: Settings, store: Store, text: str, *, k: int | None, modalities: list[str], where: list[str]
) -> Answer:
    """Ask the published corpus in this process.

    Raises:
        StoreError: nothing is published.
        QueryError: an option makes no sense.
    """
    # One query does not pay for hashing every file; `ace publish` and the server do.
    retriever = Retriever.open(store.mirror(), settings=settings.search, verify=False)
    filters = parse_filters(where)
    hits = retriever.search([text], k=k, modality=modalities or None, filters=filters)[0]
    note = "" if hits else retriever.why_nothing([Modality(m) for m in modalities], filters)
    return Answer(hits, retriever.threshold, note)


def parse_filters(conditions: list[str]) -> dict[str, Any]:
    """Filters from ``NAME=VALUE`` conditions; a value is YAML, so it may be a number, ``[a, b]`` or ``{gte: 3}``.

    Raises:
        QueryError: a condition is not of that form.
    """
    filters: dict[str, Any] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        name = name.strip()
        if equals and name in filters:
            raise QueryError(
                f"{name} is asked for twice",
                where="--where",
                remedy=f"Write '{name}=[a, b]' for either value, '{name}={{gte: 1, lt: 5}}' for a range.",
            )
        try:
            filters[name] = _value(value.strip())
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise QueryError(
                f"{condition!r} is not NAME=VALUE",
                where="--where",
                remedy="Write year=2010, 'year={gte: 2010}' or 'year=[2010, 2011]'; quote a text that begins so.",
            )
    return filters


def _value(text: str) -> Any:
    """A text without brackets and quotes is one value, whatever is in it: a colour like #ff0000 is no comment."""
    if text.startswith(("[", "{", '"', "'")):
        return yaml.load(text, _Values)
    loader = _Values("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def print_hits(text: str, found: Answer, reporter: Reporter, *, as_json: bool) -> None:
    """Print an answer to stdout, and to stderr why there is none."""
    hits, threshold = found.hits, found.threshold
    if not hits:
        reporter.say(f"nothing found: {found.note}")
    if as_json:
        rows = [asdict(hit) | {"confident": hit.score >= threshold} for hit in hits]
        reporter.result(json.dumps(rows, indent=1, ensure_ascii=False))
    if as_json or not hits:
        return
    table = Table(title=f'"{text}"', title_justify="left")
    table.add_column("score", justify="right")
    names_files = any(hit.item_id != hit.uri for hit in hits)
    for name in ("kind", "item", "caption", *(["file"] if names_files else [])):
        table.add_column(name, overflow="fold")
    for hit in hits:
        caption = hit.captions[0] if hit.captions else ""
        file = [hit.uri] if names_files else []
        table.add_row(f"{hit.score:.2f}", hit.modality.value, hit.item_id, caption, *file)
    reporter.result(table)
    if hits[0].score < threshold:
        reporter.say(f"no confident match: the best score is below {threshold:.2f}")
