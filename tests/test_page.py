"""The search page in a headless Chromium, as a person uses it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import httpx
from playwright.sync_api import Page, Route, expect

from ace_core.config import ServeSettings, Settings
from serve.auth import new_key
from tests.browsing import MARKS, Site, cards, serve_page, until
from tests.serving_world import CREDIT, WordBackend

pytestmark = MARKS


def _search(page: Page, text: str) -> None:
    page.get_by_label("What are you looking for?").fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=f"“{text}”")).to_be_visible()


def test_a_search_shows_pictures_sounds_and_clips(site: Site, page: Page) -> None:
    page.goto(site.address)
    expect(page.get_by_role("heading", name="From this corpus")).to_be_visible()
    _search(page, "red circle")
    first = page.locator(".card").first
    expect(first).to_contain_text("circle")
    expect(first).to_contain_text(re.compile(r"9\d %"))
    until(lambda: set(cards(page)[:2]) == {"red-circle", "clips/red moves"}, "both red circles come first")
    shown = page.locator(".card[data-id=red-circle] img")
    shown.scroll_into_view_if_needed()
    page.wait_for_function("e => e.complete && e.naturalWidth === 96", arg=shown.element_handle())
    clip = page.locator(".card[data-id='clips/red moves'] video")
    assert clip.get_attribute("src") == "/media/clips/red%20moves"
    expect(page.locator(".card[data-id='tone-440'] .sound")).to_have_count(1)
    assert page.title() == "red circle · ACE"


def test_hits_below_the_threshold_are_marked(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=red+circle&m=image")
    expect(page.locator(".card").first).to_be_visible()
    scores = page.locator(".card .score").evaluate_all("all => all.map(s => parseInt(s.textContent.match(/\\d+/)[0]))")
    expect(page.locator(".card.less")).to_have_count(sum(score < 50 for score in scores))
    assert 0 < page.locator(".card.less").count() < len(scores)


def test_a_sound_shows_its_waveform_and_plays(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=440+hertz&m=audio")
    card = page.locator(".card[data-id='tone-440']")
    expect(card.locator("time")).to_have_text("1.0 s")  # read from the decoded file
    card.get_by_role("button", name="Play a tone of 440 hertz").click()
    page.wait_for_function("a => a.currentTime > 0 || a.ended", arg=card.locator("audio").element_handle())


def test_a_clip_shows_its_middle_and_plays_from_its_beginning(site: Site, page: Page) -> None:
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(f"{site.address}/?q=red&m=video")
    card = page.locator(".card[data-id='clips/red moves']")
    expect(card.locator(".tile")).to_have_class(re.compile("white|whole"))  # its middle picture is there
    assert not any("/media/" in url for url in fetched), "nothing of the clip itself is fetched before it is played"
    card.get_by_role("button", name="Play a red circle moves to the right").click()
    clip = card.locator("video").element_handle()
    page.wait_for_function("v => v.played.length", arg=clip)
    assert page.evaluate("v => v.played.start(0)", clip) < 0.3  # its middle is at 0.5
    expect(card.get_by_role("button", name="Pause a red circle moves to the right")).to_be_visible()


def test_the_grid_shows_thumbnails_and_the_original_where_there_is_none(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=red+circle&m=image")
    shown = page.locator(".card[data-id=red-circle] img")
    expect(shown).to_have_attribute("src", re.compile(r"^/thumb/red-circle\?size=(256|512)$"))
    page.route("**/thumb/**", lambda route: route.fulfill(status=503))
    page.reload()
    expect(shown).to_have_attribute("src", re.compile("/media/red-circle$"))
    page.wait_for_function("e => e.complete && e.naturalWidth === 96", arg=shown.element_handle())


def test_modalities_and_filters_narrow_the_search(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=red")
    expect(page.locator(".card")).to_have_count(20)
    page.get_by_role("button", name=re.compile("^Pictures")).click()
    expect(page.locator(".card")).to_have_count(12)
    page.get_by_role("button", name=re.compile("^Filters")).click()
    page.get_by_role("button", name=re.compile("^blue")).click()
    expect(page.locator(".card")).to_have_count(3)
    page.get_by_role("button", name=re.compile("^green")).click()
    expect(page.locator(".card")).to_have_count(6)
    until(lambda: all(name.startswith(("blue", "green")) for name in cards(page)), "only blue and green are shown")
    page.reload()  # the address holds all of it
    expect(page.locator(".card")).to_have_count(6)
    page.go_back()
    expect(page.locator(".card")).to_have_count(3)
    page.get_by_role("button", name=re.compile("^Filters")).click()
    page.get_by_role("button", name="Clear all filters").click()
    expect(page.locator(".card")).to_have_count(12)


def test_no_match_is_said_plainly(site: Site, page: Page) -> None:
    page.goto(site.address)
    _search(page, "quantum chromodynamics")
    expect(page.get_by_text("No confident match", exact=True)).to_be_visible()
    page.goto(f"{site.address}/?q=red&f.colour=%22mauve%22")
    expect(page.locator(".empty p")).to_contain_text('No item passes colour="mauve": colour is "blue" (4), "green" (4)')
    page.get_by_role("button", name="Search without filters").click()
    expect(page.locator(".card")).to_have_count(20)


def test_more_like_this_and_back(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=blue+square&m=image")
    page.locator(".card[data-id=blue-square]").get_by_role("button", name="More like a blue square, picture").click()
    expect(page.get_by_role("heading", name="Like “a blue square”")).to_be_visible()
    expect(page).to_have_url(re.compile("m=image.*like=blue-square|like=blue-square.*m=image"))
    expect(page.locator(".card").first).to_have_attribute("data-id", "blue-square")
    page.go_back()
    expect(page.get_by_role("heading", name="“blue square”")).to_be_visible()


def test_a_file_can_be_picked_or_dropped_to_search_by(site: Site, page: Page) -> None:
    page.goto(site.address)
    picture = site.corpus / "pictures/red-circle.png"
    page.get_by_label("File to search by").set_input_files(picture)
    expect(page.get_by_role("heading", name="Like red-circle.png")).to_be_visible()
    until(lambda: "red-circle" in cards(page)[:2], "the picture finds itself")
    page.goto(site.address)
    expect(page.locator(".card").first).to_be_visible()
    data = page.evaluate_handle(
        """bytes => { const d = new DataTransfer();
        d.items.add(new File([new Uint8Array(bytes)], 'dropped.png', { type: 'image/png' })); return d; }""",
        list(picture.read_bytes()),
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    expect(page.get_by_text("Drop a picture")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    expect(page.get_by_role("heading", name="Like dropped.png")).to_be_visible()
    expect(page.get_by_text("Drop a picture")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Drop it again")


def test_a_bad_file_says_what_is_wrong(site: Site, page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    page.goto(site.address)
    page.get_by_label("File to search by").set_input_files(tmp_path / "notes.txt")
    expect(page.get_by_role("alert")).to_contain_text("not a picture, sound or clip")


def test_identifier_chips_browse_the_cluster(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=blue+square&m=image")
    chips = page.locator(".card[data-id=blue-square] .spell a")
    expect(chips).to_have_count(4)
    chips.nth(1).click()
    expect(page.get_by_text("4 items whose identifier begins like this")).to_be_visible()
    expect(page).to_have_url(re.compile("cluster=image-1"))
    until(lambda: all(name.endswith("square") for name in cards(page)), "only squares are shown")
    page.get_by_role("navigation", name="Finer clusters").get_by_role("link").first.click()
    expect(page.get_by_text("1 item whose identifier begins like this")).to_be_visible()


def test_one_item_is_looked_at_and_linked_to(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=red+square&m=image")
    page.get_by_role("button", name="Look at a red square, picture").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="a red square")).to_be_visible()
    expect(dialog).to_contain_text("square in red")
    expect(dialog.locator(".steps li")).to_have_count(4)  # how it was spelled, with probabilities
    expect(dialog.locator(".steps li").last).to_contain_text("60 %")
    expect(dialog).to_contain_text("corners")
    address = page.url
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page).not_to_have_url(re.compile("item="))
    page.goto(address)
    expect(page.get_by_role("dialog").get_by_role("heading", name="a red square")).to_be_visible()


def test_the_search_can_be_copied_as_curl(site: Site, page: Page) -> None:
    page.goto(f"{site.address}/?q=it's+red&m=image&f.corners=4")
    page.get_by_role("button", name="curl").click()
    expect(page.locator("#toast")).to_have_text("Command copied")
    command = page.evaluate("navigator.clipboard.readText()")
    words = shlex.split(command)
    assert words[:3] == ["curl", "-s", f"{site.address}/v1/search"]
    body = json.loads(words[-1])
    assert body["text"] == "it's red" and body["modality"] == ["image"] and body["filters"] == {"corners": [4]}


def test_a_server_error_is_said_and_can_be_tried_again(site: Site, page: Page) -> None:
    page.goto(site.address)
    site.backend.broken = True
    page.get_by_label("What are you looking for?").fill("red")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong")
    site.backend.broken = False
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".card").first).to_be_visible()


class Held:
    """Requests of a page that go no further before they are let go; the first ``but`` of them are not held."""

    def __init__(self, page: Page, pattern: str, but: int = 0) -> None:
        self._left, self._held, self._holds = but, list[Route](), True
        page.route(pattern, lambda route: self._come(route))

    def _come(self, route: Route) -> None:
        if self._holds and not self._left:
            self._held.append(route)
            return
        self._left -= self._left > 0
        route.continue_()

    def let_go(self) -> None:
        self._holds = False
        for route in self._held:
            route.continue_()


def test_a_busy_server_is_waited_for(site: Site, page: Page) -> None:
    searches = Held(page, "**/v1/search", but=1)
    site.backend.full = True
    page.goto(f"{site.address}/?q=red")
    expect(page.locator("#said")).to_contain_text("busy")
    site.backend.full = False
    searches.let_go()
    expect(page.locator(".card").first).to_be_visible()


def test_what_is_typed_before_the_page_is_filled_stays(site: Site, page: Page) -> None:
    snapshot = Held(page, "**/v1/snapshot")
    page.goto(site.address)
    field = page.get_by_label("What are you looking for?")
    field.fill("red circle")
    snapshot.let_go()
    expect(page.get_by_role("heading", name="From this corpus")).to_be_visible()
    expect(field).to_have_value("red circle")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="“red circle”")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name="From this corpus")).to_be_visible()
    expect(field).to_have_value("")


def test_the_footer_names_snapshot_credits_and_refusals(site: Site, page: Page) -> None:
    site.backend.refused = "second"
    until(lambda: httpx.get(f"{site.address}/v1/snapshot").json()["refused"], "the refusal is heard of")
    page.goto(site.address)
    expect(page.locator("footer")).to_contain_text("first")
    expect(page.locator("footer")).to_contain_text("20 items")
    expect(page.locator("footer")).to_contain_text(CREDIT)
    expect(page.locator("#refused")).to_contain_text("SHA-256")


def test_a_key_is_asked_for_and_opens_everything(page_world: Path, page: Page) -> None:
    secret, line = new_key("read", "page")
    (page_world / "keys.txt").write_text(line)
    settings = Settings(store=str(page_world / "store"), serve=ServeSettings(keys_file=str(page_world / "keys.txt")))
    server, thread, address = serve_page(settings, WordBackend(str(page_world / "store")))
    try:
        page.goto(f"{address}/?q=red+circle")
        page.get_by_label("API key", exact=True).last.fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("dialog")).to_contain_text("not known here")
        page.get_by_label("API key", exact=True).last.fill(secret)
        page.get_by_role("button", name="Use this key").click()
        picture = page.locator(".card[data-id=red-circle] img")
        page.wait_for_function("e => e.complete && e.naturalWidth === 96", arg=picture.element_handle())
        page.goto("about:blank")  # it shall ask for nothing more while the server stops
    finally:
        server.should_exit = True
        thread.join(10)
