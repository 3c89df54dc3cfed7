"""The HTTP API and the page, as one FastAPI application over a :class:`serve.calls.Backend`. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ace_core.config import Settings
from ace_core.errors import AceError
from serve.auth import KeyRing
from serve.calls import Backend
from serve.gate import Gate
from serve.listen import listening
from serve.problems import ProblemError, invalid_request, of_status
from serve.routes.items import add_items
from serve.routes.operation import add_operation
from serve.routes.page import add_page
from serve.routes.search import add_search
from serve.schema import Problem
from serve.service import Service, problem_of

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "the body cannot be read",
        401: "no key, or one that is not known",
        403: "a key that may only read",
        404: "not there",
        413: "body too large",
        422: "the request makes no sense; says where and what to do",
        429: "every queue is full; see Retry-After",
        503: "no replica can answer now",
        504: "not answered within the deadline",
    }.items()
}


def build_http(settings: Settings, backend: Backend, *, ingress: str = "ingress", listens: bool = False) -> FastAPI:
    """The application.

    Args:
        backend: the decoding replicas.
        ingress: name of this process in the metrics.
        listens: it also answers at ``serve.host`` and ``serve.port`` itself, while it runs.

    Raises:
        SettingsError: the key file cannot be used.
    """
    keys = KeyRing(Path(settings.serve.keys_file) if settings.serve.keys_file else None)
    service = Service(settings, backend, keys, ingress)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(service.running())
            if listens:
                chosen = settings.serve
                await stack.enter_async_context(
                    listening(app, chosen.host, chosen.port, body_seconds=chosen.request_seconds + 5)
                )
            yield

    app = FastAPI(
        title="ACE",
        summary="Describe it, and the model spells the item.",
        description="Generative cross-modal retrieval. With a key file, send `Authorization: Bearer KEY`.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=_PROBLEMS,
    )
    app.add_middleware(
        Gate,
        keys=keys,
        admission=service.admission,
        metrics=service.metrics,
        max_body_bytes=settings.serve.max_body_bytes,
    )
    _add_errors(app)
    add_page(app)
    add_search(app, service)
    add_items(app, service)
    add_operation(app, service)
    _finish_openapi(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def problem(_: Request, error: ProblemError) -> Response:
        return error.response()

    @app.exception_handler(AceError)
    async def ace_error(_: Request, error: AceError) -> Response:
        return problem_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(list(error.errors()), error.body).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return of_status(error.status_code, str(error.detail), error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        # The server logs the traceback; what it says is nobody else's business.
        detail = "something went wrong in this server"
        return ProblemError(500, "server error", detail, remedy="See its log.").response()


def _finish_openapi(app: FastAPI) -> None:
    """Say in the OpenAPI document what FastAPI cannot know: where the key goes, and the type of an error."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]
            for operation in (o for path in document["paths"].values() for o in path.values()):
                for status, response in operation["responses"].items():
                    if status >= "4" and "application/json" in response.get("content", {}):
                        response["content"] = {"application/problem+json": response["content"]["application/json"]}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
