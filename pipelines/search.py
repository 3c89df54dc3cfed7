"""``ace search``: one query in this process, and its answer as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import yaml
from rich.table import Table

from ace_core.config import Settings
from ace_core.errors import QueryError
from ace_core.query import Hit
from ace_core.retriever import Retriever
from ace_store import Store
from pipelines.progress import Reporter


def search_once(
    settings: Settings, store: Store, text: str, *, k: int | None, modalities: list[str], where: list[str]
) -> tuple[list[Hit], float]:
    """The best items for a text, and the score below which they are no confident match.

    Raises:
        StoreError: nothing is published.
        QueryError: an option makes no sense.
    """
    # One query does not pay for hashing every file; `ace publish` and the server do.
    retriever = Retriever.open(store.mirror(), settings=settings.search, verify=False)
    hits = retriever.search([text], k=k, modality=modalities or None, filters=parse_filters(where))[0]
    return hits, retriever.threshold


def parse_filters(conditions: list[str]) -> dict[str, Any]:
    """Filters from ``NAME=VALUE`` conditions; a value is YAML, so it may be a number or ``{gte: 3}``.

    Raises:
        QueryError: a condition is not of that form.
    """
    filters: dict[str, Any] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise QueryError(
                f"{condition!r} is not NAME=VALUE",
                where="--where",
                remedy="Write year=2010, 'year={gte: 2010}' or 'year=[2010, 2011]'.",
            )
        filters[name.strip()] = yaml.safe_load(value)
    return filters


def print_hits(text: str, found: tuple[list[Hit], float], reporter: Reporter, *, as_json: bool) -> None:
    """Print an answer to stdout."""
    hits, threshold = found
    if as_json:
        rows = [asdict(hit) | {"confident": hit.score >= threshold} for hit in hits]
        reporter.result(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if not hits:
        reporter.say("nothing in the corpus passes these filters")
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
