"""The typed client: answers, retries, and the server's own words when it gives up."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from ace_core.items import Modality
from serve.client import Client, ServerError
from tests.serving_world import WorldItem


class _Flaky(httpx.BaseTransport):
    """Answers with the given statuses first, then asks the server."""

    def __init__(self, http: TestClient, *statuses: int) -> None:
        self._http, self.statuses, self.seen = http, list(statuses), 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.seen += 1
        if self.statuses and (status := self.statuses.pop(0)):
            return httpx.Response(status, headers={"Retry-After": "0"}, json={"detail": "busy"})
        if self.seen > 10:
            raise httpx.ConnectError("gone")
        answer = self._http.request(
            request.method, str(request.url.copy_with(scheme="http", host="testserver", port=None)),
            content=request.read(), headers=dict(request.headers),
        )  # fmt: skip
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


def test_the_client_searches_and_retries(http: TestClient, shapes: tuple[Path, list[WorldItem]]) -> None:
    flaky = _Flaky(http, 429, 503)
    with Client("http://ace", transport=flaky) as ace:
        found = ace.search("red circle", k=1, modality=["image"], filters={"colour": "red"}, explain=True)
        assert flaky.seen == 3 and found.results[0].hits[0].item_id == "red-circle"
        assert ace.search_by_example(shapes[0] / "pictures/red-circle.png", k=1).results[0].hits
        assert ace.search_by_example("red-circle", k=1).results[0].query == "red-circle"
        item = ace.item("clips/red moves")
        assert ace.media(item) == (shapes[0] / "clips/red moves.mp4").read_bytes()
        assert ace.cluster("image-1", k=2).total == 3 and ace.snapshot().snapshot == "first"


def test_an_address_without_a_scheme_and_one_modality_are_understood(http: TestClient) -> None:
    with Client("ace:8000", transport=_Flaky(http)) as ace:
        for one in ("image", Modality.IMAGE):
            found = ace.search("red circle", k=1, modality=one).results[0].hits
            assert found[0].modality == Modality.IMAGE
    answer = http.post("/v1/search", json={"text": "red", "modality": "video", "k": 3})
    assert {hit["modality"] for hit in answer.json()["results"][0]["hits"]} == {"video"}
    assert http.post("/v1/search", json={"text": "red", "modality": "images"}).status_code == 422


def test_the_client_gives_up_with_the_servers_words(http: TestClient) -> None:
    with Client("http://ace", transport=(flaky := _Flaky(http, 503, 503, 503)), attempts=2) as ace:
        with pytest.raises(ServerError) as refused:
            ace.search("red")
        assert refused.value.status == 503 and flaky.seen == 2
    with Client("http://ace", transport=(flaky := _Flaky(http))) as ace:
        with pytest.raises(ServerError, match="no item") as missing:
            ace.item("nothing")
        assert missing.value.status == 404 and missing.value.where == "item_id" and flaky.seen == 1
