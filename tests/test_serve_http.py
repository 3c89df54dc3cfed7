"""The HTTP application: what it says of itself, what it says in trouble, and that no request is a server error."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serve.calls import ExampleCall, Refusal, Reply, TextCall
from serve.http import build_http
from tests.serving_http import client_of, problem_of, search_for, settings_of
from tests.serving_world import CREDIT, WordBackend, WorldItem, publish


def test_the_snapshot_says_what_is_served(http: TestClient) -> None:
    snapshot = http.get("/v1/snapshot").json()
    assert snapshot["snapshot"] == "first" and snapshot["items"] == {"image": 11, "audio": 4, "video": 4}
    assert snapshot["removed"] == 1 and snapshot["levels"] == 4 and snapshot["max_k"] == 100
    facets = {f["name"]: f for f in snapshot["facets"]}
    assert set(facets) == {"colour", "corners", "pitch"} and dict(facets["colour"]["values"])["red"] == 4
    assert snapshot["credits"] == [CREDIT]
    assert snapshot["replicas"][0]["replica"] == "replica-1" and snapshot["refused"] is None


def test_a_refused_snapshot_is_said(http: TestClient, words: WordBackend) -> None:
    words.refused = "second"
    search_for(http, text="red")
    assert "SHA-256" in http.get("/v1/snapshot").json()["refused"]
    metrics = http.get("/metrics").text
    assert 'ace_snapshot_refused{ingress="ingress",replica="replica-1",snapshot="second"} 1.0' in metrics


def test_another_snapshot_is_followed(
    http: TestClient, words: WordBackend, shapes_store: Path, shapes: tuple[Path, list[WorldItem]]
) -> None:
    folder, items = shapes
    old = http.get("/v1/items/yellow-circle")
    assert old.status_code == 200
    publish(shapes_store, folder, [i for i in items if "yellow" not in i.item_id], snapshot_id="second")
    end = time.monotonic() + 60
    while http.get("/v1/snapshot").json()["snapshot"] != "second":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert search_for(http, text="yellow", threshold=0.5)["results"][0]["hits"] == []
    # Answers of the snapshot before are still on their way to people: what they name can be fetched.
    assert http.get("/media/yellow-circle").status_code == 200
    assert http.get("/v1/clusters/image-0-3").status_code == 404


def test_ready_only_when_a_replica_answers(shapes_store: Path, words: WordBackend) -> None:
    words.down = True
    with client_of(settings_of(shapes_store), words) as http:
        assert http.get("/healthz").status_code == 200
        problem = problem_of(http.get("/readyz"), 503)
        assert "no replica" in problem["detail"]
        problem_of(http.get("/v1/snapshot"), 503)
        words.down = False
        assert http.get("/readyz").json() == {"ready": True, "snapshot": "first"}


def test_metrics_tell_routes_stages_and_batches(http: TestClient) -> None:
    search_for(http, text=["red", "quantum chromodynamics"])
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
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_body_is_a_server_error(http: TestClient, path: str, body: object, valid: bool) -> None:
    if valid and isinstance(body, dict):
        body |= {"text": "red"} if path == "/v1/search" else {"item_id": "red-circle"}
        body.pop("item_id" if path == "/v1/search" else "text", None)
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500


@given(name=st.text(max_size=40), path=st.sampled_from(("/media/", "/thumb/", "/v1/items/", "/v1/clusters/", "/")))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_path_is_a_server_error(http: TestClient, name: str, path: str) -> None:
    assert http.get(path + quote(name, safe="/")).status_code < 500


def test_full_queues_answer_429_at_once(shapes_store: Path, words: WordBackend) -> None:
    with client_of(settings_of(shapes_store), words) as http:
        words.full = True
        answer = http.post("/v1/search", json={"text": "red"})
        assert int(answer.headers["retry-after"]) >= 1
        problem_of(answer, 429)
        assert 'ace_rejected_total{ingress="ingress",reason="replicas"} 1.0' in http.get("/metrics").text


class HeldBackend(WordBackend):
    """Answers no search before it is told to."""

    def __init__(self, store: str) -> None:
        super().__init__(store)
        self.go = asyncio.Event()

    async def search(self, call: TextCall | ExampleCall) -> Reply | Refusal:
        await self.go.wait()
        return await super().search(call)


@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/by-example"])
def test_more_searches_than_the_queue_holds_are_refused(shapes_store: Path, path: str) -> None:
    import anyio

    backend = HeldBackend(str(shapes_store))
    app = build_http(settings_of(shapes_store, max_queued=2), backend)
    body = {"text": "red"} if path == "/v1/search" else {"item_id": "red-circle"}

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        answers: list[int] = []

        async def one(client: httpx.AsyncClient) -> None:
            answers.append((await client.post(path, json=body)).status_code)
            if len(answers) == 3:  # refused at once, while the others are still searched
                backend.go.set()

        async with httpx.AsyncClient(transport=transport, base_url="http://ace") as client:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(one, client)
            assert (await client.post(path, json=body)).status_code == 200  # and the places are free again
        return answers

    assert anyio.run(ask) == [429, 429, 429, 200, 200]


def test_a_search_past_its_deadline_is_answered_504(shapes_store: Path, words: WordBackend) -> None:
    words.delay = 120  # nobody waits for it
    with client_of(settings_of(shapes_store, request_seconds=0.2), words) as http:
        started = time.monotonic()
        problem_of(http.post("/v1/search", json={"text": "red"}), 504)
        assert time.monotonic() - started < words.delay


def test_lost_replicas_and_bugs_are_problems_without_details(http: TestClient, words: WordBackend) -> None:
    words.down = True
    answer = http.post("/v1/search", json={"text": "red"})
    problem_of(answer, 503)
    assert answer.headers["retry-after"]
    words.down, words.broken = False, True
    problem = problem_of(http.post("/v1/search", json={"text": "red"}), 500)
    assert "bug" not in json.dumps(problem)
