"""Searching: by text, by an item of the corpus, by an uploaded file."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from ace_core.media.kinds import modality_of, sniff
from serve.calls import ExampleCall, TextCall
from serve.problems import ProblemError, invalid_request, not_json
from serve.schema import ExampleRequest, SearchOptions, SearchRequest, SearchResponse
from serve.service import Service

Body = TypeVar("Body", bound=BaseModel)


def add_search(app: FastAPI, service: Service) -> None:
    """``POST /v1/search`` and ``POST /v1/search/by-example``."""
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
        wanted = _parse(SearchOptions, text.encode(), "the field options")
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


def _parse(model: type[Body], data: bytes, what: str = "the body") -> Body:
    try:
        return model.model_validate_json(data)
    except ValidationError as e:
        errors: list[dict[str, Any]] = [dict(error) for error in e.errors(include_url=False)]
        if errors[0]["type"] == "json_invalid":
            raise not_json(errors[0]["ctx"]["error"], what) from None
        raise invalid_request(errors, from_json(data)) from None


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
