"""Items over HTTP: what is known of one, its bytes by ranges, clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ace_core.errors import StoreError
from serve.catalog import Catalog
from tests.serving_http import problem_of
from tests.serving_world import WorldItem


def test_an_item_by_its_id(http: TestClient) -> None:
    item = http.get("/v1/items/red-square").json()
    assert item["captions"] == ["a red square", "square in red"] and item["attributes"]["corners"] == 4
    slashed = http.get("/v1/items/clips/red%20moves").json()
    assert slashed["modality"] == "video" and http.get(slashed["media_url"]).headers["content-type"] == "video/mp4"
    assert problem_of(http.get("/v1/items/green-square"), 404)["where"] == "item_id"  # it was removed


def test_before_a_snapshot_is_open_no_item_is_said_to_be_missing(shapes_store: Path) -> None:
    with pytest.raises(StoreError, match="no snapshot is open yet"):
        Catalog(str(shapes_store)).item("red-square")


def test_media_answers_ranges_and_conditions(http: TestClient, shapes: tuple[Path, list[WorldItem]]) -> None:
    whole = (shapes[0] / "sounds/tone-440.flac").read_bytes()
    url, size = "/media/tone-440", len((shapes[0] / "sounds/tone-440.flac").read_bytes())
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
    problem_of(http.get("/v1/clusters/image-7"), 404)
    for name in ("smell", "image-x", "image-1-0-1-0", "image--1", "image-99999"):
        assert http.get(f"/v1/clusters/{name}").status_code == 422
