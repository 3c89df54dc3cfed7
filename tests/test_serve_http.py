"""The HTTP API over real items, with a backend that answers by words in place of the models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ace_core.config import ServeSettings, Settings
from serve.client import Client, ServerError
from serve.http import build_http
from tests.serving_world import CREDIT, THRESHOLD, WordBackend, WorldItem, draw_corpus, publish


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[WorldItem]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, draw_corpus(folder)


@pytest.fixture
def store(tmp_path: Path, corpus: tuple[Path, list[WorldItem]]) -> Path:
    publish(tmp_path / "store", *corpus, removed=["green-square"])
    return tmp_path / "store"


@pytest.fixture
def backend(store: Path) -> WordBackend:
    return WordBackend(str(store))


def _settings(store: Path, **serve) -> Settings:
    return Settings(store=str(store), serve=ServeSettings(**{"watch_seconds": 0.05, "max_k": 100, **serve}))


def _client(settings: Settings, backend: WordBackend) -> TestClient:
    return TestClient(build_http(settings, backend), raise_server_exceptions=False)


@pytest.fixture
def http(store: Path, backend: WordBackend) -> Iterator[TestClient]:
    with _client(_settings(store), backend) as client:
        assert client.get("/readyz").status_code == 200
        yield client


def _search(http: TestClient, **body) -> dict:
    answer = http.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _problem(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["detail"] and problem["title"]
    return problem


# -- searching ---------------------------------------------------------------------------------------------------


def test_search_answers_hits_that_can_be_fetched(http: TestClient) -> None:
    found = _search(http, text="a red circle", k=3)
    assert found["snapshot"] == "first" and found["threshold"] == THRESHOLD
    [result] = found["results"]
    assert result["query"] == "a red circle" and result["confident"] and len(result["hits"]) == 3
    hit = next(h for h in result["hits"] if h["item_id"] == "red-circle")
    assert hit["identifier"] == "image-0-0-0" and hit["tokens"] == [0, 0, 0, 0] and hit["path"] is None
    picture = http.get(hit["media_url"])
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")


def test_several_texts_are_answered_in_order(http: TestClient) -> None:
    found = _search(http, text=["blue square", "440 hertz"], k=1)
    assert [r["hits"][0]["item_id"] for r in found["results"]] == ["blue-square", "tone-440"]


def test_modality_filters_and_k_choose_what_comes_back(http: TestClient) -> None:
    assert {h["modality"] for h in _search(http, text="red", modality=["video"])["results"][0]["hits"]} == {"video"}
    filtered = _search(http, text="red", filters={"corners": {"gte": 3}, "colour": ["blue", "green"]})
    assert [h["item_id"] for h in filtered["results"][0]["hits"]] == ["blue-square", "blue-triangle", "green-triangle"]
    excluded = _search(http, text="red", modality=["image"], filters={"colour": {"not": ["red", "blue", "yellow"]}})
    assert {h["attributes"]["colour"] for h in excluded["results"][0]["hits"]} == {"green"}
    assert len(_search(http, text="red", k=2)["results"][0]["hits"]) == 2


def test_settings_give_the_default_k(store: Path, backend: WordBackend) -> None:
    with _client(_settings(store, max_k=4), backend) as http:
        assert len(_search(http, text="red")["results"][0]["hits"]) == 4
        problem = _problem(http.post("/v1/search", json={"text": "red", "k": 5}), 422)
        assert problem["where"] == "k" and "4" in problem["detail"]


def test_no_confident_match_is_said_and_a_threshold_drops_hits(http: TestClient) -> None:
    guess = _search(http, text="quantum chromodynamics")["results"][0]
    assert not guess["confident"] and guess["hits"]
    assert not _search(http, text="quantum chromodynamics", threshold=0.4)["results"][0]["hits"]
    kept = _search(http, text="red circle", threshold=0.9)
    assert kept["threshold"] == 0.9 and {h["item_id"] for h in kept["results"][0]["hits"]} >= {"red-circle"}
    assert all(h["score"] >= 0.9 for h in kept["results"][0]["hits"])


def test_explain_gives_the_path_coarse_to_fine(http: TestClient) -> None:
    hit = _search(http, text="blue triangle", explain=True, k=1)["results"][0]["hits"][0]
    assert [s["name"] for s in hit["path"]] == ["image", "image-2", "image-2-2", "image-2-2-2"]
    assert [s["probability"] for s in hit["path"]] == [0.9, 0.8, 0.7, 0.6]


def test_the_mode_reaches_the_replica(http: TestClient, backend: WordBackend) -> None:
    _search(http, text="red", mode="one-shot")
    assert backend.calls[-1].options.mode == "one-shot"
    assert backend.calls[-1].deadline > time.time()


def test_search_by_an_item_of_the_corpus(http: TestClient) -> None:
    answer = http.post("/v1/search/by-example", json={"item_id": "clips/red moves", "modality": ["image"], "k": 2})
    assert answer.status_code == 200 and answer.json()["results"][0]["query"] == "clips/red moves"
    assert all("red" in h["item_id"] or "circle" in h["item_id"] for h in answer.json()["results"][0]["hits"])
    _problem(http.post("/v1/search/by-example", json={"item_id": "nothing"}), 404)


def test_search_by_an_uploaded_file(
    http: TestClient, backend: WordBackend, corpus: tuple[Path, list[WorldItem]]
) -> None:
    picture = (corpus[0] / "pictures/red-circle.png").read_bytes()
    answer = http.post(
        "/v1/search/by-example",
        files={"file": ("photo.bin", picture, "application/octet-stream")},
        data={"options": json.dumps({"k": 1, "modality": ["image"]})},
    )
    assert answer.status_code == 200 and answer.json()["results"][0]["query"] == "photo.bin"
    # The kind of file is read from its first bytes, whatever its name says.
    assert backend.calls[-1].modality == "image" and backend.calls[-1].media == picture
    sound = (corpus[0] / "sounds/tone-440.flac").read_bytes()
    assert http.post("/v1/search/by-example", files={"file": ("a.png", sound)}).status_code == 200
    assert backend.calls[-1].modality == "audio"


@pytest.mark.parametrize(
    ("files", "data", "where"),
    [
        ({"file": ("notes.txt", b"hello")}, {}, "file"),
        ({"other": ("a.png", b"x")}, {}, "file"),
        ({"file": ("a.png", b"\x89PNG\r\n\x1a\nbroken")}, {}, "file"),
        ({"file": ("a.png", b"\x89PNG\r\n\x1a\n")}, {"options": '{"kk": 3}'}, "kk"),
    ],
)
def test_a_bad_upload_says_what_is_wrong(http: TestClient, files: dict, data: dict, where: str) -> None:
    problem = _problem(http.post("/v1/search/by-example", files=files, data=data), 422)
    assert problem["where"] == where and problem["remedy"]


@pytest.mark.parametrize(
    ("body", "where", "found"),
    [
        ({}, "text", "required"),
        ({"text": "   "}, "text", "String should have at least 1 character (found"),
        ({"text": []}, "text", "List should have at least 1 item"),
        ({"text": 5}, "text", "should be a valid string, or a valid list (found 5)"),
        ({"text": ["x", ""]}, "text.1", "at least 1 character"),
        ({"text": "x", "k": 0}, "k", "greater than or equal to 1 (found 0)"),
        ({"text": "x", "k": 201}, "k", "up to"),
        ({"text": "x", "modality": ["smell"]}, "modality.0", "'image', 'audio' or 'video'"),
        ({"text": "x", "threshold": 2}, "threshold", "less than"),
        ({"text": "x", "mode": "guess"}, "mode", "beam"),
        ({"text": "x", "modalities": ["image"]}, "modalities", "Extra"),
        ({"text": "x" * 1001}, "text", "at most 1000"),
        ({"text": ["x"] * 33}, "text", "33 texts"),
        ({"text": "x", "filters": {"corners": {"near": 3}}}, "filters.corners.near", "Extra"),
        ({"text": "x", "filters": {"corners": {"gte": [3]}}}, "filters.corners.gte", "a valid integer"),
        ({"text": "x", "filters": {"corners": None}}, "filters.corners", "a valid string, or a valid integer"),
        ({"text": "x", "filters": {"corners": {"gte": "many"}}}, "filters.corners", "whole numbers"),
    ],
)
def test_a_bad_request_says_what_where_and_what_to_do(http: TestClient, body: dict, where: str, found: str) -> None:
    problem = _problem(http.post("/v1/search", json=body), 422)
    assert problem["where"] == where and found in problem["detail"] and problem["remedy"]


def test_a_body_that_is_not_json_is_a_problem(http: TestClient) -> None:
    _problem(http.post("/v1/search", content=b"{text:", headers={"Content-Type": "application/json"}), 400)
    untyped = _problem(http.post("/v1/search", content=b'{"text": "x"}', headers={"Content-Type": "text/plain"}), 422)
    assert "application/json" in untyped["remedy"]
    _problem(http.post("/v1/search/by-example", content=b"\xff\xfe", headers={"Content-Type": "application/json"}), 400)
    bad = {"file": ("a.png", b"\x89PNG\r\n\x1a\n")}
    _problem(http.post("/v1/search/by-example", files=bad, data={"options": "not json"}), 400)
    for problem in (_problem(http.get("/v1/nothing"), 404), _problem(http.put("/v1/search"), 405)):
        assert "openapi" in problem["remedy"]
    for path in ("/v1/items/nobody", "/v1/clusters/image-99", "/media/nobody"):
        assert _problem(http.get(path), 404)["remedy"]


# -- items, media, clusters --------------------------------------------------------------------------------------


def test_an_item_by_its_id(http: TestClient) -> None:
    item = http.get("/v1/items/red-square").json()
    assert item["captions"] == ["a red square", "square in red"] and item["attributes"]["corners"] == 4
    slashed = http.get("/v1/items/clips/red%20moves").json()
    assert slashed["modality"] == "video" and http.get(slashed["media_url"]).headers["content-type"] == "video/mp4"
    assert _problem(http.get("/v1/items/green-square"), 404)["where"] == "item_id"  # it was removed


def test_media_answers_ranges_and_conditions(http: TestClient, corpus: tuple[Path, list[WorldItem]]) -> None:
    whole = (corpus[0] / "sounds/tone-440.flac").read_bytes()
    url, size = "/media/tone-440", len((corpus[0] / "sounds/tone-440.flac").read_bytes())
    full = http.get(url)
    assert full.content == whole and full.headers["accept-ranges"] == "bytes"
    assert full.headers["content-type"] == "audio/flac" and full.headers["content-length"] == str(size)
    for asked, expected, span in [
        ("bytes=0-9", whole[:10], f"bytes 0-9/{size}"),
        ("bytes=100-", whole[100:], f"bytes 100-{size - 1}/{size}"),
        ("bytes=-7", whole[-7:], f"bytes {size - 7}-{size - 1}/{size}"),
        (f"bytes=5-{size * 9}", whole[5:], f"bytes 5-{size - 1}/{size}"),
    ]:
        part = http.get(url, headers={"Range": asked})
        assert part.status_code == 206 and part.content == expected and part.headers["content-range"] == span
    for asked in ("bytes=9-3", "bytes=a-b", "bytes=0-1,5-6", "items=0-1", "bytes=-"):
        assert http.get(url, headers={"Range": asked}).status_code == 200
    for asked in (f"bytes={size}-", "bytes=-0"):
        beyond = http.get(url, headers={"Range": asked})
        assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{size}"
    etag = full.headers["etag"]
    assert http.get(url, headers={"If-None-Match": f'"x", {etag}'}).status_code == 304
    assert http.get(url, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert http.get(url, headers={"Range": "bytes=0-1", "If-Range": '"old"'}).status_code == 200
    head = http.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(size)


def test_clusters_are_browsed_by_prefix(http: TestClient) -> None:
    cluster = http.get("/v1/clusters/image-1").json()
    assert cluster["total"] == 3 and cluster["parent"] == "image"  # four squares, one was removed
    assert {i["item_id"] for i in cluster["items"]} == {"red-square", "blue-square", "yellow-square"}
    assert {c["name"]: c["items"] for c in cluster["children"]} == {"image-1-0": 1, "image-1-2": 1, "image-1-3": 1}
    everything = [
        i["item_id"] for at in (0, 5, 10) for i in http.get(f"/v1/clusters/image?k=5&offset={at}").json()["items"]
    ]
    assert len(everything) == len(set(everything)) == http.get("/v1/clusters/image").json()["total"] == 11
    leaf = http.get("/v1/clusters/image-1-0-1").json()
    assert leaf["total"] == 1 and leaf["children"] == []
    _problem(http.get("/v1/clusters/image-7"), 404)
    for name in ("smell", "image-x", "image-1-0-1-0", "image--1", "image-99999"):
        assert http.get(f"/v1/clusters/{name}").status_code == 422


# -- what is served ----------------------------------------------------------------------------------------------


def test_the_snapshot_says_what_is_served(http: TestClient) -> None:
    snapshot = http.get("/v1/snapshot").json()
    assert snapshot["snapshot"] == "first" and snapshot["items"] == {"image": 11, "audio": 4, "video": 4}
    assert snapshot["removed"] == 1 and snapshot["levels"] == 4 and snapshot["max_k"] == 100
    facets = {f["name"]: f for f in snapshot["facets"]}
    assert set(facets) == {"colour", "corners", "pitch"} and dict(facets["colour"]["values"])["red"] == 4
    assert snapshot["credits"] == [CREDIT]
    assert snapshot["replicas"][0]["replica"] == "replica-1" and snapshot["refused"] is None


def test_a_refused_snapshot_is_said(http: TestClient, backend: WordBackend) -> None:
    backend.refused = "second"
    _search(http, text="red")
    assert "SHA-256" in http.get("/v1/snapshot").json()["refused"]
    metrics = http.get("/metrics").text
    assert 'ace_snapshot_refused{ingress="ingress",replica="replica-1",snapshot="second"} 1.0' in metrics


def test_another_snapshot_is_followed(
    http: TestClient, backend: WordBackend, store: Path, corpus: tuple[Path, list[WorldItem]]
) -> None:
    folder, items = corpus
    old = http.get("/v1/items/yellow-circle")
    assert old.status_code == 200
    publish(store, folder, [i for i in items if "yellow" not in i.item_id], snapshot_id="second")
    end = time.monotonic() + 10
    while http.get("/v1/snapshot").json()["snapshot"] != "second":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert _search(http, text="yellow", threshold=0.5)["results"][0]["hits"] == []
    # Answers of the snapshot before are still on their way to people: what they name can be fetched.
    assert http.get("/media/yellow-circle").status_code == 200
    assert http.get("/v1/clusters/image-0-3").status_code == 404


def test_ready_only_when_a_replica_answers(store: Path, backend: WordBackend) -> None:
    backend.down = True
    with _client(_settings(store), backend) as http:
        assert http.get("/healthz").status_code == 200
        problem = _problem(http.get("/readyz"), 503)
        assert "no replica" in problem["detail"]
        _problem(http.get("/v1/snapshot"), 503)
        backend.down = False
        assert http.get("/readyz").json() == {"ready": True, "snapshot": "first"}


def test_metrics_tell_routes_stages_and_batches(http: TestClient) -> None:
    _search(http, text=["red", "quantum chromodynamics"])
    http.get("/no/such/place")
    text = http.get("/metrics").text
    for line in (
        'ace_requests_total{ingress="ingress",route="/v1/search",status="200"} 1.0',
        'ace_stage_seconds_count{ingress="ingress",stage="search"} 1.0',
        'ace_stage_seconds_count{ingress="ingress",stage="queue"} 1.0',
        'ace_stage_seconds_count{ingress="ingress",stage="transport"} 1.0',
        'ace_batch_queries_sum{ingress="ingress"} 2.0',
        'ace_beam_width_sum{ingress="ingress"} 20.0',
        'ace_unconfident_results_total{ingress="ingress"} 1.0',
        'ace_snapshot_info{ingress="ingress",replica="replica-1",snapshot="first"} 1.0',
        'ace_snapshot_items{ingress="ingress",modality="image"} 11.0',
        'ace_searches_in_flight{ingress="ingress"} 0.0',
        'ace_requests_total{ingress="ingress",route="other",status="404"} 1.0',
    ):
        assert line in text, line


def test_openapi_has_examples_that_work(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for example in schemas["SearchRequest"]["examples"]:
        assert http.post("/v1/search", json=example).status_code == 200
    assert {"/v1/search", "/v1/search/by-example", "/v1/items/{item_id}", "/v1/snapshot"} <= set(document["paths"])
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert schemas["Problem"]["examples"] and schemas["SearchResponse"]["examples"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ("text", "item_id", "k", "modality", "filters", "mode", "threshold", "explain", "colour")


@pytest.mark.parametrize("text", ["\\ud800", "\\u0000", "x\\udfffy"])
@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/by-example"])
def test_characters_that_are_none_are_no_server_error(http: TestClient, path: str, text: str) -> None:
    for field in ("text", "item_id", "mode", f"{text}"):
        body = f'{{"{field}": "{text}", "filters": {{"{text}": "{text}"}}}}'
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, answer.text


@given(
    path=st.sampled_from(("/v1/search", "/v1/search/by-example", "/v1/admin/current")),
    body=st.dictionaries(st.sampled_from(_FIELDS), _JSON) | _JSON,
    valid=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_is_a_server_error(http: TestClient, path: str, body: object, valid: bool) -> None:
    if valid and isinstance(body, dict):
        body |= {"text": "red"} if path == "/v1/search" else {"item_id": "red-circle"}
        body.pop("item_id" if path == "/v1/search" else "text", None)
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500


@given(name=st.text(max_size=40), path=st.sampled_from(("/media/", "/thumb/", "/v1/items/", "/v1/clusters/", "/")))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_is_a_server_error(http: TestClient, name: str, path: str) -> None:
    assert http.get(path + quote(name, safe="/")).status_code < 500


# -- trouble -----------------------------------------------------------------------------------------------------


def test_full_queues_answer_429_at_once(store: Path, backend: WordBackend) -> None:
    with _client(_settings(store), backend) as http:
        backend.full = True
        answer = http.post("/v1/search", json={"text": "red"})
        assert int(answer.headers["retry-after"]) >= 1
        _problem(answer, 429)
        assert 'ace_rejected_total{ingress="ingress",reason="replicas"} 1.0' in http.get("/metrics").text


@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/by-example"])
def test_more_searches_than_the_queue_holds_are_refused(store: Path, backend: WordBackend, path: str) -> None:
    import anyio

    backend.delay = 1.5
    app = build_http(_settings(store, max_queued=2), backend)
    body = {"text": "red"} if path == "/v1/search" else {"item_id": "red-circle"}

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        answers: list[int] = []

        async def one(client: httpx.AsyncClient) -> None:
            answers.append((await client.post(path, json=body)).status_code)

        async with httpx.AsyncClient(transport=transport, base_url="http://ace") as client:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(one, client)
            backend.delay = 0.0
            assert (await client.post(path, json=body)).status_code == 200  # and the places are free again
        return answers

    assert anyio.run(ask) == [429, 429, 429, 200, 200]  # refused at once, while the others are still searched


def test_a_search_past_its_deadline_is_answered_504(store: Path, backend: WordBackend) -> None:
    backend.delay = 5
    with _client(_settings(store, request_seconds=0.2), backend) as http:
        started = time.monotonic()
        _problem(http.post("/v1/search", json={"text": "red"}), 504)
        assert time.monotonic() - started < backend.delay


def test_lost_replicas_and_bugs_are_problems_without_details(http: TestClient, backend: WordBackend) -> None:
    backend.down = True
    answer = http.post("/v1/search", json={"text": "red"})
    _problem(answer, 503)
    assert answer.headers["retry-after"]
    backend.down, backend.broken = False, True
    problem = _problem(http.post("/v1/search", json={"text": "red"}), 500)
    assert "bug" not in json.dumps(problem)


# -- the client --------------------------------------------------------------------------------------------------


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


def test_the_client_searches_and_retries(http: TestClient, corpus: tuple[Path, list[WorldItem]]) -> None:
    flaky = _Flaky(http, 429, 503)
    with Client("http://ace", transport=flaky) as ace:
        found = ace.search("red circle", k=1, modality=["image"], filters={"colour": "red"}, explain=True)
        assert flaky.seen == 3 and found.results[0].hits[0].item_id == "red-circle"
        assert ace.search_by_example(corpus[0] / "pictures/red-circle.png", k=1).results[0].hits
        assert ace.search_by_example("red-circle", k=1).results[0].query == "red-circle"
        item = ace.item("clips/red moves")
        assert ace.media(item) == (corpus[0] / "clips/red moves.mp4").read_bytes()
        assert ace.cluster("image-1", k=2).total == 3 and ace.snapshot().snapshot == "first"


def test_the_client_gives_up_with_the_servers_words(http: TestClient) -> None:
    with Client("http://ace", transport=(flaky := _Flaky(http, 503, 503, 503)), attempts=2) as ace:
        with pytest.raises(ServerError) as refused:
            ace.search("red")
        assert refused.value.status == 503 and flaky.seen == 2
    with Client("http://ace", transport=(flaky := _Flaky(http))) as ace:
        with pytest.raises(ServerError, match="no item") as missing:
            ace.item("nothing")
        assert missing.value.status == 404 and missing.value.where == "item_id" and flaky.seen == 1
