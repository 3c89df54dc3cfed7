"""Thumbnails: right sizes, made once, kept within bounds, and never dearer than the limits."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from ace_core.config import LimitSettings, Settings
from ace_core.snapshot import Snapshot
from serve.calls import Overloaded
from serve.http import build_http
from serve.thumbs import Thumbnails, ThumbSize
from tests.serving_world import WordBackend, draw_corpus, publish


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thumbs")
    publish(folder / "store", folder / "corpus", draw_corpus(folder / "corpus"))
    return folder / "store"


@contextmanager
def _opened(store: Path, limits: LimitSettings | None = None) -> Iterator[TestClient]:
    settings = Settings(store=str(store), limits=limits or LimitSettings())
    with TestClient(build_http(settings, WordBackend(settings.store))) as http:
        assert http.get("/readyz").status_code == 200
        yield http


def _picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp", answer.text
    return Image.open(io.BytesIO(answer.content))


def _refused(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json"
    return answer.json()["detail"]


def test_thumbnails_of_pictures_and_clips(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    items = draw_corpus(folder)
    Image.new("RGB", (1600, 800), "red").save(folder / "pictures/red-circle.png")
    (folder / "pictures/red-square.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    publish(tmp_path / "store", folder, items)
    with _opened(tmp_path / "store") as http:
        url = http.get("/v1/items/red-circle").json()["thumb_url"]
        assert _picture(http.get(url)).size == (256, 128)
        assert _picture(http.get(url, params={"size": 512})).size == (512, 256)
        small = _picture(http.get("/thumb/blue-square"))
        assert small.size == (96, 96)  # never larger than the original
        middle = small.convert("RGB").getpixel((48, 48))
        assert isinstance(middle, tuple) and middle[2] > 180 > middle[0]
        assert _picture(http.get("/thumb/clips/red%20moves")).size == (96, 96)
        found = http.post("/v1/search", json={"text": "red circle", "modality": ["image"], "k": 1}).json()
        hit = found["results"][0]["hits"][0]
        assert hit["thumb_url"] == "/thumb/red-circle"
        assert http.get("/v1/items/tone-440").json()["thumb_url"] is None
        for path in ("/thumb/tone-440", "/thumb/red-square", f"{url}?size=300", f"{url}?size=100000"):
            _refused(http.get(path), 422)
        _refused(http.get("/thumb/nothing"), 404)
        first = http.get(url)
        assert "max-age" in first.headers["cache-control"]
        for tag in (first.headers["etag"], f'"x", {first.headers["etag"]}'):
            unchanged = http.get(url, headers={"If-None-Match": tag})
            assert unchanged.status_code == 304 and not unchanged.content
        assert http.get(url, headers={"If-None-Match": '"old"'}).content == first.content
        Image.new("RGB", (800, 1600), "blue").save(folder / "pictures/red-circle.png")
        changed = http.get(url, headers={"If-None-Match": first.headers["etag"]})
        assert _picture(changed).size == (128, 256)  # the file is another one now


def test_thumbnails_are_made_once_kept_and_bounded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    go = threading.Event()
    encoded = Thumbnails._encoded

    def counted(self: Thumbnails, file, item, size) -> bytes:
        made.append(item.item_id)
        assert go.wait(60)
        return encoded(self, file, item, size)

    monkeypatch.setattr(Thumbnails, "_encoded", counted)
    view = Snapshot.open(store, "first", verify=False)
    items = [view.segments[0].item(row) for row in range(3)]

    async def ask() -> None:
        thumbs = Thumbnails(LimitSettings(), kept_bytes=10_000, max_waiting=2)
        try:
            go.set()
            async with anyio.create_task_group() as group:
                for _ in range(5):  # all at once: the first one makes it for all
                    group.start_soon(thumbs.of, items[0], ThumbSize.SMALL)
            await thumbs.of(items[0], ThumbSize.SMALL)
            assert made == [items[0].item_id]
            go.clear()
            making = [asyncio.ensure_future(thumbs.of(i, ThumbSize.LARGE)) for i in items[:2]]
            while len(thumbs._making) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await thumbs.of(items[2], ThumbSize.LARGE)
            go.set()
            await asyncio.gather(*making)
        finally:
            thumbs.close()
        forgetful = Thumbnails(LimitSettings(), kept_bytes=0)
        try:
            made.clear()
            assert (await forgetful.of(items[0], ThumbSize.SMALL)).data
            assert (await forgetful.of(items[0], ThumbSize.SMALL)).data
            assert len(made) == 2  # nothing fits
        finally:
            forgetful.close()

    anyio.run(ask)


def test_a_thumbnail_may_cost_no_more_than_the_limits(store: Path) -> None:
    with _opened(store, LimitSettings(max_pixels=5000)) as http:  # by the header, before a pixel is decoded
        assert "pixels" in _refused(http.get("/thumb/red-circle"), 422)
    with _opened(store, LimitSettings(max_bytes=50)) as http:  # before a byte is read
        assert "bytes" in _refused(http.get("/thumb/red-circle"), 422)
