"""Items: what is known of one, its bytes, a small picture of it, and those that are spelled alike."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from starlette.responses import Response

from ace_core.segment import StoredItem
from serve import media, thumbs
from serve.catalog import cluster_name, parse_cluster
from serve.problems import ProblemError, no_such_item
from serve.schema import ClusterChild, ClusterResponse, ItemOut
from serve.service import Service
from serve.thumbs import ThumbSize


def add_items(app: FastAPI, service: Service) -> None:
    """``/v1/items``, ``/media``, ``/thumb`` and ``/v1/clusters``."""

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
