"""A headless Chromium at the search page: real items, a backend of words in place of models."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn

from ace_core.config import ServeSettings, Settings
from serve.http import build_http
from tests.serving_world import WordBackend, draw_corpus, publish

if TYPE_CHECKING:  # every test session reads this module; few open a browser
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
_MILLISECONDS = 20_000  # a busy machine takes seconds for what takes milliseconds elsewhere


@dataclass(frozen=True)
class Site:
    address: str
    backend: WordBackend
    corpus: Path


def serve_page(settings: Settings, backend: WordBackend) -> tuple[uvicorn.Server, threading.Thread, str]:
    server = uvicorn.Server(uvicorn.Config(build_http(settings, backend), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def page_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page_world")
    publish(folder / "store", folder / "corpus", draw_corpus(folder / "corpus"))
    return folder


@pytest.fixture(scope="module")
def running(page_world: Path) -> Iterator[Site]:
    backend = WordBackend(str(page_world / "store"))
    settings = Settings(store=str(page_world / "store"), serve=ServeSettings(watch_seconds=0.1))
    server, thread, address = serve_page(settings, backend)
    yield Site(address, backend, page_world / "corpus")
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def site(running: Site) -> Iterator[Site]:
    yield running
    running.backend.down = running.backend.broken = running.backend.full = False
    running.backend.refused, running.backend.delay = None, 0.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test on any error in its console but those of a failed request."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(_MILLISECONDS)
    errors: list[str] = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "status of" not in m.text else None)
    yield page
    context.close()
    assert not errors


def cards(page: Page) -> list[str]:
    return page.locator(".card").evaluate_all("cards => cards.map(c => c.dataset.id)")


def until(holds: Callable[[], object], what: str) -> None:
    """Wait for something that no locator can say."""
    end = time.monotonic() + _MILLISECONDS / 1000
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def focused(page: Page) -> str | None:
    return page.evaluate("document.activeElement.closest('.card')?.dataset.id")  # type: ignore[no-any-return]
