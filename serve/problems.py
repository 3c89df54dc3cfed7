"""Errors as problem documents (RFC 9457): what was found, where, and the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from serve.calls import Refusal
from serve.schema import Problem

_STATUS = {"query": 422, "media": 422, "missing": 404, "model": 503, "store": 503, "deadline": 504}
_TITLE = {
    "query": "bad query",
    "media": "bad media",
    "missing": "not found",
    "model": "model unavailable",
    "store": "store unavailable",
    "deadline": "too slow",
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


def invalid_request(errors: list[dict]) -> ProblemError:
    """The problem of a request that does not match its schema: the first error, in words."""
    first = errors[0]
    if first.get("type") == "json_invalid" and "body" in first.get("loc", ()):
        why = first.get("ctx", {}).get("error", "malformed")
        return ProblemError(
            400, "bad request", f"the body is not JSON ({why})", remedy="See /openapi.json for examples."
        )
    if not first.get("loc", ("body",))[1:] and first.get("type") == "model_attributes_type":
        return ProblemError(
            422, "bad request", "the body was not sent as JSON", remedy="Send it with Content-Type: application/json."
        )
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    found = str(first.get("msg", "malformed"))
    if "input" in first and first.get("type") != "missing":
        found += f" (found {_short(first['input'])})"
    return ProblemError(422, "bad request", found, where=where, remedy="See /openapi.json for examples.")


def _sendable(text: str) -> str:
    """Half of a surrogate pair can stand in JSON and is quoted back in an error, but cannot be sent as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _short(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
