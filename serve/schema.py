"""Requests and responses of the HTTP API, with the examples that its OpenAPI document shows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from ace_core.items import AttributeValue, Modality
from ace_core.query import Mode

MAX_TEXT = 1000

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]
Scalar = str | int | float | bool
Modalities = Annotated[
    list[Modality],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=list[Modality] | Modality
    ),
]


class Strict(BaseModel):
    """A request body: unknown fields are refused, so that a typo is never silently ignored."""

    model_config = ConfigDict(extra="forbid")


class FilterTerms(Strict):
    """Conditions on one attribute; all of them must hold."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    gte: Scalar | None = Field(None, description="at least")
    gt: Scalar | None = Field(None, description="more than")
    lte: Scalar | None = Field(None, description="at most")
    lt: Scalar | None = Field(None, description="less than")
    not_: Scalar | list[Scalar] | None = Field(None, alias="not", description="none of these values")
    exists: bool | None = Field(None, description="whether the item has the attribute")


Filter = Scalar | Annotated[list[Scalar], Field(min_length=1, max_length=1000)] | FilterTerms


class SearchOptions(Strict):
    """What a text search and a search by example have in common."""

    modality: Modalities = Field(default_factory=list, description="kinds to search (or one by itself); empty for all")
    filters: dict[str, Filter] = Field(
        default_factory=dict, max_length=32, description="attribute to value, list of values (any of), or conditions"
    )
    k: int | None = Field(None, ge=1, strict=True, description="results wanted; by default the server's setting")
    mode: Mode | None = Field(None, description="all tokens at once, verified by the decoder, or token by token (beam)")
    threshold: float | None = Field(
        None, ge=0, le=1, description="drop hits that score less; also what counts as confident"
    )
    explain: bool = Field(False, strict=True, description="add how each identifier was spelled, coarse to fine")

    def filter_values(self) -> dict[str, Any]:
        """Filters as the retriever takes them."""
        return {
            name: value.model_dump(by_alias=True, exclude_none=True) if isinstance(value, FilterTerms) else value
            for name, value in self.filters.items()
        }


class SearchRequest(SearchOptions):
    """A search by text."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"text": "a red fruit", "k": 5},
                {"text": ["slow church organ", "dog barking"], "modality": ["audio"], "explain": True},
                {
                    "text": "animal",
                    "filters": {"group": ["animals", "food"], "colour": {"not": "red"}},
                    "threshold": 0.5,
                },
            ]
        },
    )
    text: Text | Annotated[list[Text], Field(min_length=1)] = Field(description="one text, or several")

    def texts(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


class ExampleRequest(SearchOptions):
    """A search by an item of the corpus."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"item_id": "openmoji-1F34E", "modality": ["video"], "k": 10}]}
    )
    item_id: Annotated[str, StringConstraints(min_length=1, max_length=2000)] = Field(
        description="the item to search like"
    )


class PathStep(BaseModel):
    """One token of an identifier as it was spelled."""

    name: str = Field(description="the identifier up to here")
    token: int
    probability: float = Field(description="of this token, given the ones before it")


class ItemOut(BaseModel):
    """An item of the corpus."""

    item_id: str
    modality: Modality
    media_url: str = Field(description="where its bytes are, relative to the server")
    thumb_url: str | None = Field(None, description="where a small picture of it is (add `size`); none of a sound")
    mime: str
    captions: list[str]
    attributes: dict[str, AttributeValue]
    identifier: str = Field(description="coarse to fine; every prefix names a cluster")
    tokens: list[int] = Field(description="the identifier's tokens, the modality's first")
    start_seconds: float | None = None
    end_seconds: float | None = None


class HitOut(ItemOut):
    """A found item."""

    score: float = Field(description="calibrated probability that this is what was asked for")
    similarity: float = Field(
        description="cosine of the query and the item, -1 .. 1; a score also weighs how near an item is to all queries"
    )
    log_prob: float = Field(description="of the identifier, under the generator")
    path: list[PathStep] | None = Field(None, description="only with explain")


class Result(BaseModel):
    """The answer to one text or example."""

    query: str
    confident: bool = Field(description="whether the best score reaches the threshold")
    hits: list[HitOut]


_HIT_EXAMPLE: dict[str, Any] = {
    "item_id": "openmoji-1F34E",
    "modality": "image",
    "media_url": "/media/openmoji-1F34E",
    "thumb_url": "/thumb/openmoji-1F34E",
    "mime": "image/png",
    "captions": ["red apple"],
    "attributes": {"group": "food-drink"},
    "identifier": "image-12-7-201-33",
    "tokens": [0, 12, 7, 201, 33],
    "start_seconds": None,
    "end_seconds": None,
    "score": 0.83,
    "similarity": 0.71,
    "log_prob": -2.4,
    "path": None,
}


class SearchResponse(BaseModel):
    """All results come from one snapshot."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "snapshot": "3f2a90c1d4e5",
                    "threshold": 0.31,
                    "took_ms": 12.5,
                    "note": None,
                    "results": [{"query": "a red fruit", "confident": True, "hits": [_HIT_EXAMPLE]}],
                }
            ]
        }
    )
    snapshot: str
    threshold: float
    took_ms: float
    note: str | None = Field(
        None, description="where no item passes the modalities and filters: why, and which values there are"
    )
    results: list[Result]


class ClusterChild(BaseModel):
    """A finer cluster inside a cluster."""

    name: str
    items: int


class ClusterResponse(BaseModel):
    """Items whose identifiers share a prefix."""

    snapshot: str
    name: str
    parent: str | None
    total: int = Field(description="items in the cluster")
    children: list[ClusterChild] = Field(description="its finer clusters, the largest first")
    items: list[ItemOut]


class FacetOut(BaseModel):
    """An attribute that can be filtered by."""

    name: str
    type: str
    distinct: int
    values: list[tuple[AttributeValue, int]] = Field(description="values and counts, where they are few")


class ReplicaOut(BaseModel):
    """What one decoding replica serves, as last heard."""

    replica: str
    snapshot: str
    loaded_at: float
    refused: str | None = Field(description="a published snapshot that failed its checks and is not served")
    reason: str | None
    seen_seconds_ago: float


class SnapshotResponse(BaseModel):
    """What is being served."""

    snapshot: str
    created_at: str
    items: dict[str, int] = Field(description="items by modality")
    removed: int
    levels: int = Field(description="tokens of an identifier, the modality's included")
    facets: list[FacetOut]
    credits: list[str] = Field(description="attribution notes of the items")
    replicas: list[ReplicaOut]
    refused: str | None = Field(description="why the newest published snapshot is not the one served")
    max_k: int


class ReadyResponse(BaseModel):
    ready: bool
    snapshot: str


class Problem(BaseModel):
    """An error (RFC 9457, ``application/problem+json``)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:ace:problem:bad-query",
                    "title": "bad query",
                    "status": 422,
                    "detail": "unknown operator 'near'",
                    "where": "filters.width",
                    "remedy": "Use a value, a list of values, or gte, gt, lte, lt, not, exists.",
                }
            ]
        }
    )
    type: str
    title: str
    status: int
    detail: str
    where: str = ""
    remedy: str = ""


class MoveRequest(Strict):
    """Which snapshot to publish."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"snapshot": "3f2a90c1d4e5"}]})
    snapshot: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")


class MoveResponse(BaseModel):
    snapshot: str
    previous: str | None
