"""The HTTP API over a small real corpus, with a backend that answers by words in place of the models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from ace_core.config import ServeSettings, Settings
from serve.http import build_http
from tests.serving_world import WordBackend, WorldItem, draw_corpus, publish


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[WorldItem]]:
    """A folder of pictures, sounds and clips, and what they are."""
    folder = tmp_path_factory.mktemp("shapes")
    return folder, draw_corpus(folder)


@pytest.fixture
def shapes_store(tmp_path: Path, shapes: tuple[Path, list[WorldItem]]) -> Path:
    """A store that publishes them, but for one that was removed."""
    publish(tmp_path / "store", *shapes, removed=["green-square"])
    return tmp_path / "store"


@pytest.fixture
def words(shapes_store: Path) -> WordBackend:
    return WordBackend(str(shapes_store))


@pytest.fixture
def http(shapes_store: Path, words: WordBackend) -> Iterator[TestClient]:
    """A client of a server that is ready."""
    with client_of(settings_of(shapes_store), words) as client:
        assert client.get("/readyz").status_code == 200
        yield client


def settings_of(store: Path, **serve) -> Settings:
    return Settings(store=str(store), serve=ServeSettings(**{"watch_seconds": 0.05, "max_k": 100, **serve}))


def client_of(settings: Settings, backend: WordBackend) -> TestClient:
    return TestClient(build_http(settings, backend), raise_server_exceptions=False)


def search_for(http: TestClient, **body) -> dict:
    """What a search answers."""
    answer = http.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def problem_of(answer: httpx.Response, status: int) -> dict:
    """The problem document of an answer with this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["detail"] and problem["title"]
    return problem
