"""Searching over HTTP: by text, by an item, by a file; what a bad request is told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.serving_http import client_of, problem_of, search_for, settings_of
from tests.serving_world import THRESHOLD, WordBackend, WorldItem


def test_search_answers_hits_that_can_be_fetched(http: TestClient) -> None:
    found = search_for(http, text="a red circle", k=3)
    assert found["snapshot"] == "first" and found["threshold"] == THRESHOLD
    [result] = found["results"]
    assert result["query"] == "a red circle" and result["confident"] and len(result["hits"]) == 3
    hit = next(h for h in result["hits"] if h["item_id"] == "red-circle")
    assert hit["identifier"] == "image-0-0-0" and hit["tokens"] == [0, 0, 0, 0] and hit["path"] is None
    picture = http.get(hit["media_url"])
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")


def test_several_texts_are_answered_in_order(http: TestClient) -> None:
    found = search_for(http, text=["blue square", "440 hertz"], k=1)
    assert [r["hits"][0]["item_id"] for r in found["results"]] == ["blue-square", "tone-440"]


def test_modality_filters_and_k_choose_what_comes_back(http: TestClient) -> None:
    assert {h["modality"] for h in search_for(http, text="red", modality=["video"])["results"][0]["hits"]} == {"video"}
    filtered = search_for(http, text="red", filters={"corners": {"gte": 3}, "colour": ["blue", "green"]})
    assert [h["item_id"] for h in filtered["results"][0]["hits"]] == ["blue-square", "blue-triangle", "green-triangle"]
    excluded = search_for(http, text="red", modality=["image"], filters={"colour": {"not": ["red", "blue", "yellow"]}})
    assert {h["attributes"]["colour"] for h in excluded["results"][0]["hits"]} == {"green"}
    assert len(search_for(http, text="red", k=2)["results"][0]["hits"]) == 2


def test_an_empty_answer_says_which_values_there_are(http: TestClient) -> None:
    found = search_for(http, text="red", filters={"colour": "Blu"})
    assert found["results"][0]["hits"] == [] and not found["results"][0]["confident"]
    assert 'did you mean "blue"?' in found["note"] and '"red" (4)' in found["note"]
    assert search_for(http, text="red", filters={"colour": "blue"})["note"] is None
    assert search_for(http, text="quantum", threshold=0.4)["note"] is None  # dropped by the threshold: not the filters
    by_item = http.post("/v1/search/by-example", json={"item_id": "red-circle", "filters": {"corners": 9}}).json()
    assert by_item["note"] == "no item passes corners=9: corners goes from 0 to 4"


def test_settings_give_the_default_k(shapes_store: Path, words: WordBackend) -> None:
    with client_of(settings_of(shapes_store, max_k=4), words) as http:
        assert len(search_for(http, text="red")["results"][0]["hits"]) == 4
        problem = problem_of(http.post("/v1/search", json={"text": "red", "k": 5}), 422)
        assert problem["where"] == "k" and "4" in problem["detail"]


def test_no_confident_match_is_said_and_a_threshold_drops_hits(http: TestClient) -> None:
    guess = search_for(http, text="quantum chromodynamics")["results"][0]
    assert not guess["confident"] and guess["hits"]
    assert not search_for(http, text="quantum chromodynamics", threshold=0.4)["results"][0]["hits"]
    kept = search_for(http, text="red circle", threshold=0.9)
    assert kept["threshold"] == 0.9 and {h["item_id"] for h in kept["results"][0]["hits"]} >= {"red-circle"}
    assert all(h["score"] >= 0.9 for h in kept["results"][0]["hits"])


def test_explain_gives_the_path_coarse_to_fine(http: TestClient) -> None:
    hit = search_for(http, text="blue triangle", explain=True, k=1)["results"][0]["hits"][0]
    assert [s["name"] for s in hit["path"]] == ["image", "image-2", "image-2-2", "image-2-2-2"]
    assert [s["probability"] for s in hit["path"]] == [0.9, 0.8, 0.7, 0.6]


def test_the_mode_reaches_the_replica(http: TestClient, words: WordBackend) -> None:
    search_for(http, text="red", mode="one-shot")
    assert words.calls[-1].options.mode == "one-shot"
    assert words.calls[-1].deadline > time.time()


def test_search_by_an_item_of_the_corpus(http: TestClient) -> None:
    answer = http.post("/v1/search/by-example", json={"item_id": "clips/red moves", "modality": ["image"], "k": 2})
    assert answer.status_code == 200 and answer.json()["results"][0]["query"] == "clips/red moves"
    assert all("red" in h["item_id"] or "circle" in h["item_id"] for h in answer.json()["results"][0]["hits"])
    problem_of(http.post("/v1/search/by-example", json={"item_id": "nothing"}), 404)


def test_search_by_an_uploaded_file(http: TestClient, words: WordBackend, shapes: tuple[Path, list[WorldItem]]) -> None:
    picture = (shapes[0] / "pictures/red-circle.png").read_bytes()
    answer = http.post(
        "/v1/search/by-example",
        files={"file": ("photo.bin", picture, "application/octet-stream")},
        data={"options": json.dumps({"k": 1, "modality": ["image"]})},
    )
    assert answer.status_code == 200 and answer.json()["results"][0]["query"] == "photo.bin"
    # The kind of file is read from its first bytes, whatever its name says.
    assert words.calls[-1].modality == "image" and words.calls[-1].media == picture
    sound = (shapes[0] / "sounds/tone-440.flac").read_bytes()
    assert http.post("/v1/search/by-example", files={"file": ("a.png", sound)}).status_code == 200
    assert words.calls[-1].modality == "audio"


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
    problem = problem_of(http.post("/v1/search/by-example", files=files, data=data), 422)
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
    problem = problem_of(http.post("/v1/search", json=body), 422)
    assert problem["where"] == where and found in problem["detail"] and problem["remedy"]


def test_a_body_that_is_not_json_is_a_problem(http: TestClient) -> None:
    problem_of(http.post("/v1/search", content=b"{text:", headers={"Content-Type": "application/json"}), 400)
    untyped = problem_of(http.post("/v1/search", content=b'{"text": "x"}', headers={"Content-Type": "text/plain"}), 422)
    assert "application/json" in untyped["remedy"]
    problem_of(
        http.post("/v1/search/by-example", content=b"\xff\xfe", headers={"Content-Type": "application/json"}), 400
    )
    bad = {"file": ("a.png", b"\x89PNG\r\n\x1a\n")}
    problem = problem_of(http.post("/v1/search/by-example", files=bad, data={"options": "not json"}), 400)
    assert problem["detail"].startswith("the field options is not JSON")
    for problem in (problem_of(http.get("/v1/nothing"), 404), problem_of(http.put("/v1/search"), 405)):
        assert "openapi" in problem["remedy"]
    for path in ("/v1/items/nobody", "/v1/clusters/image-99", "/media/nobody"):
        assert problem_of(http.get(path), 404)["remedy"]
