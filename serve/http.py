"""The HTTP API and the page, as one FastAPI application over a :class:`serve.calls.Backend`. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ace_core.config import Settings
from ace_core.errors import AceError
from ace_core.media.kinds import modality_of, sniff
from ace_core.segment import StoredItem
from serve import media, thumbs
from serve.auth import KeyRing
from serve.calls import Backend, ExampleCall, TextCall
from serve.catalog import cluster_name, parse_cluster
from serve.gate import Gate
from serve.listen import listening
from serve.problems import ProblemError, invalid_request, no_such_item, of_status
from serve.schema import (
    ClusterChild,
    ClusterResponse,
    ExampleRequest,
    FacetOut,
    ItemOut,
    MoveRequest,
    MoveResponse,
    Problem,
    ReadyResponse,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    SnapshotResponse,
)
from serve.service import Service, problem_of
from serve.thumbs import ThumbSize

Body = TypeVar("Body", bound=BaseModel)

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
    _add_page(app)
    _add_search(app, service)
    _add_items(app, service)
    _add_operations(app, service)
    _finish_openapi(app)
    return app


def _add_search(app: FastAPI, service: Service) -> None:
    limits = service.settings.serve

    @app.post("/v1/search", response_model_exclude_none=False, tags=["search"])
    async def search(request: SearchRequest) -> SearchResponse:
        """Search by text, or by several texts at once. All results come from one snapshot."""
        texts = request.texts()
        if len(texts) > limits.max_texts:
            raise ProblemError(
                422,
                "bad query",
                f"{len(texts)} texts, this server takes up to {limits.max_texts}",
                where="text",
                remedy="Send them in several requests, or raise serve.max_texts.",
            )
        call = TextCall(texts, service.options(request), service.deadline())
        return await service.search(call, request, texts)

    @app.post(
        "/v1/search/by-example",
        tags=["search"],
        openapi_extra={"requestBody": {"required": True, "content": _example_content()}},
    )
    async def search_by_example(request: Request) -> SearchResponse:
        """Search by an item of the corpus (JSON), or by an uploaded picture, sound or clip (multipart form: `file`, and
        optionally `options`, the JSON of the other fields)."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
            return await _by_upload(request)
        wanted = _parse(ExampleRequest, await request.body())
        call = ExampleCall(service.options(wanted), service.deadline(), item_id=wanted.item_id)
        return await service.search(call, wanted, (wanted.item_id,))

    async def _by_upload(request: Request) -> SearchResponse:
        deadline = service.deadline()
        async with request.form(max_files=1, max_fields=4) as form:
            file, text = form.get("file"), form.get("options", "{}")
            if not isinstance(file, UploadFile) or not isinstance(text, str):
                raise ProblemError(
                    422, "bad request", "the form has no file", where="file", remedy="Send the file as field `file`."
                )
            data, name = await file.read(), file.filename or "upload"
        wanted = _parse(SearchOptions, text.encode())
        modality = modality_of("x" + (sniff(data) or "")) or modality_of(name)
        if modality is None:
            raise ProblemError(
                422,
                "bad media",
                f"{name!r} is not a picture, sound or clip of a known kind",
                where="file",
                remedy="Send JPEG, PNG, WebP, FLAC, Ogg, MP3, WAV, MP4 or WebM.",
            )
        call = ExampleCall(service.options(wanted), deadline, media=data, modality=modality.value)
        return await service.search(call, wanted, (name,))


def _parse(model: type[Body], data: bytes) -> Body:
    try:
        return model.model_validate_json(data)
    except ValidationError as e:
        errors = [dict(error) for error in e.errors(include_url=False)]
        body = None if errors[0]["type"] == "json_invalid" else from_json(data)
        raise invalid_request(errors, body) from None


def _example_content() -> dict[str, Any]:
    options = {"type": "string", "description": "JSON of the search options", "example": '{"modality": ["video"]}'}
    return {
        "application/json": {"schema": ExampleRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}, "options": options},
            }
        },
    }


def _add_items(app: FastAPI, service: Service) -> None:
    async def find(item_id: str) -> StoredItem:
        item = await asyncio.to_thread(service.catalog.item, item_id)
        if item is None:
            raise no_such_item(item_id)
        return item

    @app.get("/v1/items/{item_id:path}", tags=["items"])
    async def item(item_id: str) -> ItemOut:
        """An item: what is known of it, its identifier, and where its bytes are."""
        return service.item(await find(item_id))

    @app.head("/media/{item_id:path}", include_in_schema=False, response_class=Response)
    @app.get("/media/{item_id:path}", tags=["items"], response_class=Response)
    async def media_of(item_id: str, request: Request) -> Response:
        """The bytes of an item. Takes ranges and conditions; opens only what the snapshot lists."""
        found = await find(item_id)
        file = await asyncio.to_thread(media.resolve, found.root, found.uri)
        return media.respond(file, found.mime, request.headers, head=request.method == "HEAD")

    @app.head("/thumb/{item_id:path}", include_in_schema=False, response_class=Response)
    @app.get("/thumb/{item_id:path}", tags=["items"], response_class=Response)
    async def thumbnail_of(item_id: str, request: Request, size: ThumbSize = ThumbSize.SMALL) -> Response:
        """A small WebP picture of an item: a picture itself, a clip's middle. `size` is its longer side in pixels."""
        found = await find(item_id)
        thumb = await service.thumbnail(found, size, request.headers.get("if-none-match"))
        headers = {"ETag": thumb.etag, "Cache-Control": "private, max-age=3600"}
        if not thumb.data:
            return Response(status_code=304, headers=headers)
        return Response(thumb.data, media_type=thumbs.MIME, headers=headers)

    @app.get("/v1/clusters/{name}", tags=["items"])
    async def cluster(
        name: Annotated[str, PathParameter(json_schema_extra={"pattern": r"^(image|audio|video)(-\d{1,5})*$"})],
        offset: Annotated[int, Query(ge=0, le=100_000_000)] = 0,
        k: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> ClusterResponse:
        """Items whose identifiers begin alike, for example `image-12-7`, and the finer clusters inside."""
        tokens = parse_cluster(name)
        view = service.catalog.newest
        found = await asyncio.to_thread(view.cluster, tokens, offset=offset, k=k)
        if not found.total:
            remedy = "Take the name from an answer's identifier, or from this route's children."
            raise ProblemError(404, "not found", f"no identifier begins with {name}", where="name", remedy=remedy)
        return ClusterResponse(
            snapshot=view.id,
            name=cluster_name(tokens),
            parent=cluster_name(tokens[:-1]) if len(tokens) > 1 else None,
            total=found.total,
            children=[ClusterChild(name=child, items=count) for child, count in found.children],
            items=[service.item(i) for i in found.items],
        )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/v1/snapshot", tags=["operation"])
    async def snapshot() -> SnapshotResponse:
        """What is served: counts, attributes to filter by, credits, and the state of the replicas."""
        view = service.catalog.newest
        replicas = service.replicas()
        manifest = view.snapshot.manifest
        return SnapshotResponse(
            snapshot=view.id,
            created_at=manifest.created_at,
            items=manifest.items,
            removed=manifest.removed,
            levels=view.levels,
            facets=[
                FacetOut(name=f.name, type=f.type, distinct=f.distinct, values=list(f.values)) for f in view.facets
            ],
            credits=view.credits,
            replicas=replicas,
            refused=next((r.reason for r in replicas if r.reason), None),
            max_k=service.settings.serve.max_k,
        )

    @app.get("/healthz", tags=["operation"], response_class=JSONResponse)
    async def healthz() -> Response:
        """Whether this process is alive."""
        return JSONResponse({"alive": True})

    @app.get("/readyz", tags=["operation"])
    async def readyz() -> ReadyResponse:
        """Whether a replica has answered a probe query; 503 otherwise."""
        return ReadyResponse(ready=True, snapshot=(await service.ready()).snapshot)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/admin/current", status_code=202, tags=["operation"])
    async def move_current(request: MoveRequest) -> MoveResponse:
        """Publish another snapshot of the store, for example the one before. Replicas switch within seconds."""
        previous = await service.move_current(request.snapshot)
        return MoveResponse(snapshot=request.snapshot, previous=previous)


def _add_page(app: FastAPI) -> None:
    page = resources.files("serve").joinpath("ui/index.html").read_bytes()
    etag = f'"{hashlib.sha256(page).hexdigest()[:24]}"'
    headers = {"Content-Security-Policy": _page_policy(page.decode()), "Cache-Control": "no-cache", "ETag": etag}

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _page_policy(page: str) -> str:
    """A policy that runs the page's own script and style, named by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{d}'" for d in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


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
