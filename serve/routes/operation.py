"""Operation: what is served, whether it is alive and ready, metrics, and publishing another snapshot."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from serve.schema import FacetOut, MoveRequest, MoveResponse, ReadyResponse, SnapshotResponse
from serve.service import Service


def add_operation(app: FastAPI, service: Service) -> None:
    """``/v1/snapshot``, ``/healthz``, ``/readyz``, ``/metrics`` and ``/v1/admin``."""

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
