"""The search page for everybody: by keyboard, on any width, light or dark, before anything answers, and axe's rules."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browsing import MARKS, Site, cards, focused, until

pytestmark = MARKS


def test_the_keyboard_is_enough(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=red&m=image")
    expect(page.locator(".card")).to_have_count(12)
    page.keyboard.press("ArrowRight")
    until(lambda: focused(page) == cards(page)[0], "the first card has the focus")
    page.keyboard.press("ArrowRight")
    until(lambda: focused(page) == cards(page)[1], "the second card has the focus")
    page.keyboard.press("ArrowDown")
    until(lambda: focused(page) != cards(page)[1], "the focus moves down")
    above, under = (page.locator(f".card[data-id='{name}']").bounding_box() for name in (cards(page)[1], focused(page)))
    assert above and under and under["x"] == above["x"] and under["y"] > above["y"]
    page.keyboard.press("ArrowUp")
    until(lambda: focused(page) == cards(page)[1], "the focus moves up again")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page).not_to_have_url(re.compile("item="))
    until(lambda: focused(page) == cards(page)[1], "the focus comes back to where it was")
    page.keyboard.press("/")
    page.keyboard.type("blue triangle")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="“blue triangle”")).to_be_visible()
    until(lambda: cards(page) and cards(page)[0].startswith("blue-triangle"), "the new answer is shown")
    page.keyboard.press("ArrowRight")
    until(lambda: focused(page) == cards(page)[0], "the first card has the focus")
    page.keyboard.press("m")
    expect(page.get_by_role("heading", name="Like “a blue triangle”")).to_be_visible()


def test_dark_mode_follows_the_system_and_the_button(site: Site, page: Page) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="dark")
    page.goto(site.address)
    dark = page.evaluate(paper)  # before anything is pressed
    page.get_by_role("button", name="Switch between light and dark").click()
    until(lambda: page.evaluate(paper) != dark, "the colours change")
    page.reload()
    until(lambda: page.evaluate(paper) != dark, "the choice is kept")


@pytest.mark.parametrize("width", [320, 390, 820, 1600])
def test_nothing_runs_off_the_side(site: Site, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/", "/?q=red+circle", "/?cluster=image", "/?q=red&item=red-square"):
        page.goto(site.address + path)
        expect(page.locator(".card").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_painted_before_anything_is_asked(site: Site, page: Page) -> None:
    page.route("**/v1/**", lambda route: None)  # the API never answers
    page.goto(site.address)
    expect(page.get_by_label("What are you looking for?")).to_be_visible()
    assert page.evaluate("performance.getEntriesByType('resource').filter(r => !r.name.includes('/v1/')).length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path", ["/", "/?q=red+circle", "/?q=quantum", "/?cluster=image-1", "/?q=red&item=red-square", "/?q=x&f.no=1"]
)
def test_it_is_accessible(site: Site, page: Page, path: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.goto(site.address + path)
    expect(page.locator(".card, .empty").first).to_be_visible()
    page.get_by_role("button", name=re.compile("^Filters")).dispatch_event("click")
    found = Axe().run(page)
    assert not found.response["violations"], [
        (v["id"], [n["html"] for n in v["nodes"]][:3]) for v in found.response["violations"]
    ]
