"""A small typed client of the API, with retries.

from serve.client import Client
with Client("http://127.0.0.1:8000") as ace:
    for hit in ace.search("a red fruit", k=5).results[0].hits:
        print(hit.score, hit.item_id)
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from ace_core.errors import AceError
from ace_core.items import Modality
from serve.schema import ClusterResponse, ItemOut, Mode, Problem, SearchResponse, SnapshotResponse

_RETRIED = frozenset({429, 502, 503})
_LONGEST_WAIT = 10.0
Model = TypeVar("Model", bound=BaseModel)


class ServerError(AceError):
    """The server refused or failed. ``status`` is the HTTP status, 0 when it could not be reached."""

    title = "server"

    def __init__(
        self, status: int, found: str, *, where: object = "", remedy: str = "", retry_after: float | None = None
    ) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(found, where=where, remedy=remedy)


def _worth_a_retry(error: BaseException) -> bool:
    return isinstance(error, ServerError) and (error.status in _RETRIED or error.status == 0)


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for, or 0.2, 0.4, 0.8 ... seconds."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ServerError) else None
    return min(_LONGEST_WAIT, 0.1 * 2**state.attempt_number if asked is None else asked)


class Client:
    """Speaks to one server. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        attempts: int = 4,
        timeout: float = 30,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connects on the first call.

        Args:
            address: where the server is; http:// where nothing else is said.
            key: API key, if the server asks for one.
            attempts: how often a call is made in all when the server is busy, restarting or away.
            timeout: seconds of one attempt.
            transport: in place of the network, for tests.
        """
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = address if "://" in address else f"http://{address}"
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout, transport=transport)
        self._attempts = attempts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(
        self,
        text: str | Sequence[str],
        *,
        k: int | None = None,
        modality: str | Iterable[Modality | str] = (),
        filters: Mapping[str, Any] | None = None,
        mode: Mode | None = None,
        threshold: float | None = None,
        explain: bool = False,
    ) -> SearchResponse:
        """Search by one text, or by several at once.

        Raises:
            ServerError: it was refused, or the server stayed away or busy through all attempts.
        """
        body = _options(k, modality, filters, mode, threshold, explain)
        body["text"] = text if isinstance(text, str) else list(text)
        return self._call(SearchResponse, "POST", "/v1/search", json=body)

    def search_by_example(
        self,
        example: str | Path,
        *,
        k: int | None = None,
        modality: str | Iterable[Modality | str] = (),
        filters: Mapping[str, Any] | None = None,
        mode: Mode | None = None,
        threshold: float | None = None,
        explain: bool = False,
    ) -> SearchResponse:
        """Search by an item id (text) or by a file (:class:`~pathlib.Path`). Raises as :meth:`search`."""
        body = _options(k, modality, filters, mode, threshold, explain)
        if isinstance(example, str):
            return self._call(SearchResponse, "POST", "/v1/search/by-example", json={**body, "item_id": example})
        kind = mimetypes.guess_type(example.name)[0] or "application/octet-stream"
        files = {"file": (example.name, example.read_bytes(), kind)}
        return self._call(
            SearchResponse, "POST", "/v1/search/by-example", files=files, data={"options": json.dumps(body)}
        )

    def item(self, item_id: str) -> ItemOut:
        """What the server knows of an item. Raises as :meth:`search`."""
        return self._call(ItemOut, "GET", f"/v1/items/{_quoted(item_id)}")

    def cluster(self, name: str, *, offset: int = 0, k: int = 50) -> ClusterResponse:
        """Items whose identifiers begin like ``name``. Raises as :meth:`search`."""
        return self._call(ClusterResponse, "GET", f"/v1/clusters/{_quoted(name)}", params={"offset": offset, "k": k})

    def snapshot(self) -> SnapshotResponse:
        """What is being served. Raises as :meth:`search`."""
        return self._call(SnapshotResponse, "GET", "/v1/snapshot")

    def media(self, item: ItemOut) -> bytes:
        """The bytes of an item or hit. Raises as :meth:`search`."""
        return self._send("GET", item.media_url).content

    def _call(self, model: type[Model], method: str, path: str, **content: Any) -> Model:
        return model.model_validate_json(self._send(method, path, **content).content)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        for attempt in Retrying(
            stop=stop_after_attempt(self._attempts), wait=_wait, retry=retry_if_exception(_worth_a_retry), reraise=True
        ):
            with attempt:
                return self._once(method, path, **content)
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.TransportError as e:
            raise ServerError(
                0, f"the server cannot be reached ({type(e).__name__})", where=self._http.base_url, remedy="Is it up?"
            ) from e
        if answer.is_success:
            return answer
        asked = answer.headers.get("retry-after", "")
        try:
            problem = Problem.model_validate_json(answer.content)
            detail, where, remedy = problem.detail, problem.where, problem.remedy
        except ValueError:  # not ours: a proxy's answer
            detail, where, remedy = f"the server answered {answer.status_code}", path, ""
        raise ServerError(
            answer.status_code,
            detail,
            where=where,
            remedy=remedy,
            retry_after=float(asked) if asked.isdigit() else None,
        )


def _options(
    k: int | None,
    modality: str | Iterable[Modality | str],
    filters: Mapping[str, Any] | None,
    mode: Mode | None,
    threshold: float | None,
    explain: bool,
) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "k": k,
        "modality": [modality] if isinstance(modality, str) else [str(m) for m in modality],
        "filters": dict(filters or {}),
        "mode": mode,
        "threshold": threshold,
        "explain": explain,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _quoted(name: str) -> str:
    return quote(name, safe="")
