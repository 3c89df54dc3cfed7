"""Errors as problem documents (RFC 9457): what was found, where, and the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from serve.calls import Refusal
from serve.schema import Problem

EXAMPLES = "See /openapi.json for examples."
FIND_IDS = "Take an id from the answer to a search; /v1/snapshot says which snapshot is served."
_STATUSES = {
    404: ("not found", "/openapi.json lists the routes."),
    405: ("method not allowed", "/openapi.json lists the routes and their methods."),
    413: ("too large", "Send a smaller file or fewer texts."),
}
_STATUS = {"query": 422, "media": 422, "missing": 404, "model": 503, "store": 503, "deadline": 504, "failed": 500}
_TITLE = {
    "query": "bad query",
    "media": "bad media",
    "missing": "not found",
    "model": "model unavailable",
    "store": "store unavailable",
    "deadline": "too slow",
    "failed": "search failed",
}


class ProblemError(Exception):
    """Raised by a route to answer with a problem document."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        where: str = "",
        remedy: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.problem = Problem(
            type=f"urn:ace:problem:{title.replace(' ', '-')}",
            title=title,
            status=status,
            detail=_sendable(detail),
            where=_sendable(where),
            remedy=_sendable(remedy),
        )
        self.headers = dict(headers or {})
        super().__init__(detail)

    def response(self) -> Response:
        return Response(
            self.problem.model_dump_json(),
            status_code=self.problem.status,
            headers=self.headers,
            media_type="application/problem+json",
        )


def refused(refusal: Refusal) -> ProblemError:
    """The problem that a replica's refusal becomes."""
    return ProblemError(
        _STATUS[refusal.kind],
        _TITLE[refusal.kind],
        refusal.found,
        where=refusal.where,
        remedy=refusal.remedy,
    )


def overloaded(retry_after: int) -> ProblemError:
    return ProblemError(
        429,
        "overloaded",
        "every queue of this server is full",
        remedy=f"Try again in {retry_after} s.",
        headers={"Retry-After": str(retry_after)},
    )


def no_such_item(item_id: str) -> ProblemError:
    """The problem of an id that the served snapshot does not have."""
    return refused(Refusal("missing", f"the snapshot has no item {item_id!r}", "item_id", FIND_IDS))


def of_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ProblemError:
    """The problem of a request that did not reach a route."""
    title, remedy = _STATUSES.get(status, ("bad request", EXAMPLES))
    return ProblemError(status, title, detail, remedy=remedy, headers=headers)


def invalid_request(errors: list[dict[str, Any]], body: object = None) -> ProblemError:
    """The problem of a request that does not match its schema: the first field that is wrong, in words.

    Args:
        errors: as pydantic lists them; those of a field with several types come one for each type.
        body: the parsed body that they are about.
    """
    first = errors[0]
    if first.get("type") == "json_invalid":
        return not_json(first.get("ctx", {}).get("error", "malformed"))
    if not first.get("loc", ("body",))[1:] and first.get("type") == "model_attributes_type":
        return ProblemError(
            422, "bad request", "the body was not sent as JSON", remedy="Send it with Content-Type: application/json."
        )
    places = [_place(error, body) for error in errors]
    place = max((p for p in places if p[:1] == places[0][:1]), key=len)
    here = [error for error, other in zip(errors, places) if other == place]
    # Where some type fits, what is wrong is not the type.
    here = [error for error in here if not _of_another_type(error)] or here
    said = list(dict.fromkeys(str(error.get("msg", "malformed")) for error in here))
    found = ", or ".join([said[0], *(text.removeprefix("Input should be ") for text in said[1:])])
    if "input" in here[0] and here[0].get("type") != "missing":
        found += f" (found {_short(here[0]['input'])})"
    return ProblemError(422, "bad request", found, where=".".join(map(str, place)), remedy=EXAMPLES)


def not_json(why: object, what: str = "the body") -> ProblemError:
    """The problem of a body, or another text, that is no JSON at all."""
    return ProblemError(400, "bad request", f"{what} is not JSON ({why})", remedy=EXAMPLES)


def _place(error: dict[str, Any], body: object) -> tuple[str | int, ...]:
    """The path of an error's field in the body, without the types that pydantic tried and names in between."""
    parts = tuple(part for part in error.get("loc", ()) if part != "body")
    if not isinstance(body, dict):
        return parts
    path, inside = [], body
    for number, part in enumerate(parts):
        if part in inside if isinstance(inside, dict) else isinstance(inside, list) and isinstance(part, int):
            inside = inside[part]
        elif error.get("type") != "missing" or number < len(parts) - 1:
            continue
        path.append(part)
    return tuple(path)


def _of_another_type(error: dict[str, Any]) -> bool:
    return str(error.get("type", "")).endswith(("_type", "_parsing"))


def _sendable(text: str) -> str:
    """Half of a surrogate pair can stand in JSON and is quoted back in an error, but cannot be sent as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _short(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
