"""``ace demo``: a corpus of pictures, sounds and clips, everything done with it, and a search page at the end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ace_core.config import Settings
from ace_core.errors import AceError
from ace_core.items import Modality
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.cluster import ensure_ray
from pipelines.evaluate import as_table, evaluate_stage
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_generator import fit_generator_stage
from pipelines.fit_quantizer import fit_quantizer_stage
from pipelines.ingest import ingest
from pipelines.progress import Reporter, duration
from pipelines.publish import publish_stage

CHECKED_CAPTIONS = 20
FOUND_SHARE = 0.5  # of captions that were trained on, whose item must be among the first ten
HTTP_SECONDS = 60.0


@dataclass(frozen=True)
class DemoSize:
    """Items of the demo corpus, and queries of each kind that are measured."""

    pictures: int
    sounds: int
    clips: int
    queries: int = 400

    @classmethod
    def for_ci(cls) -> DemoSize:
        """Small, yet with every kind of medium."""
        return cls(pictures=240, sounds=60, clips=40, queries=100)


class DemoError(AceError):
    """The demo's server does not answer as it should."""

    title = "demo failed"


def run_demo(folder: Path, size: DemoSize, changes: list[str], *, port: int, check: bool, serve: bool) -> None:
    """Run the demo; returns when the server is stopped, or after its check.

    Args:
        changes: settings as ``section.key=value``, over the demo's own.
        check: query the server over HTTP, then stop it.
        serve: start the server at all.

    Raises:
        DemoError: a check failed.
    """
    started = time.monotonic()
    reporter = Reporter()
    settings = demo_settings(folder, size, port, changes)
    store = Store.open(settings.store)
    build_corpus(folder / "corpus", size, reporter)
    ingest(settings, store, reporter)
    fit_aligner_stage(settings, store, reporter)
    fit_quantizer_stage(settings, store, reporter)
    fit_generator_stage(settings, store, reporter)
    publish_stage(settings, store, reporter)
    reporter.result(as_table(evaluate_stage(settings, store, reporter)))
    reporter.say(f"everything took {duration(time.monotonic() - started)}; running it again takes seconds")
    reporter.say(f'ask from here too: ace search "a red fruit" --store {settings.store}')
    if not serve:
        return
    from serve.app import run, stop

    reporter.say("starting the server ...")
    ensure_ray(settings.compute)
    if not check:
        run(
            settings,
            blocking=True,
            on_ready=lambda address: reporter.say(f"search page: {address}   (Ctrl-C stops it)"),
            on_stop=lambda: reporter.say("stopping the server ..."),
        )
        return
    address = run(settings, blocking=False, on_ready=lambda address: reporter.say(f"search page: {address}"))
    try:
        check_server(address, folder / "corpus", reporter)
    finally:
        stop(ray_too=settings.compute.address is None)


def demo_settings(folder: Path, size: DemoSize, port: int, changes: list[str]) -> Settings:
    """The defaults, in the demo's folder."""
    own = (
        f"store={folder / 'store'}",
        f"corpus.path={folder / 'corpus'}",
        f"evaluation.max_queries={size.queries}",
        f"serve.port={port}",
    )
    return load_settings(None, (*own, *changes))


def build_corpus(folder: Path, size: DemoSize, reporter: Reporter) -> None:
    """Render what is missing of the demo corpus."""
    from demo_corpus.build import build_demo_corpus

    total = size.pictures + size.sounds + size.clips
    with reporter.step("make the demo corpus", total) as step:
        before = {"pictures": 0, "sounds": size.pictures, "clips": size.pictures + size.sounds}

        def progress(kind: str, done: int, _: int) -> None:
            if kind != step.note:
                step.restart_pace()
            step.update(before[kind] + done, kind)

        build_demo_corpus(folder, size.pictures, size.sounds, size.clips, progress)


def check_server(address: str, corpus: Path, reporter: Reporter) -> None:
    """Ask the server what a person would, and look at the answers.

    Raises:
        DemoError: says which answer is wrong.
    """
    rows = [json.loads(line) for line in (corpus / "captions.jsonl").read_text().splitlines()]
    with httpx.Client(base_url=address, timeout=HTTP_SECONDS) as client:
        page = client.get("/")
        _expect(page.status_code == 200 and "<html" in page.text.lower(), "the search page is not served", address)
        _expect(client.get("/readyz").status_code == 200, "the server is not ready", address)
        trained = [row for row in rows if row.get("split", "train") == "train"]
        asked = trained[:: max(1, len(trained) // CHECKED_CAPTIONS)][:CHECKED_CAPTIONS]
        found = sum(
            any(hit["item_id"] == row["item_id"] for hit in _search(client, row["captions"][0], k=10)) for row in asked
        )
        reporter.say(f"asked for {len(asked)} items by a caption: {found} among the first ten answers")
        _expect(found >= FOUND_SHARE * len(asked), f"only {found} of {len(asked)} captions find their item", address)
        for modality in Modality:
            hits = _search(client, "something that moves", k=5, modality=[modality.value])
            _expect(
                len(hits) == 5 and all(hit["modality"] == modality.value for hit in hits),
                f"a search for {modality.value} only finds {[hit['modality'] for hit in hits]}",
                address,
            )
            media = client.get(hits[0]["media_url"])
            _expect(
                media.status_code == 200
                and media.headers["content-type"] == hits[0]["mime"]
                and len(media.content) > 0,
                f"the file of {hits[0]['item_id']} is not served",
                address,
            )
    reporter.say("the server answers as it should")


def _search(client: httpx.Client, text: str, **options: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/search", json={"text": text, **options})
    _expect(answer.status_code == 200, f"a search answers {answer.status_code}: {answer.text[:200]}", client.base_url)
    hits: list[dict[str, Any]] = answer.json()["results"][0]["hits"]
    return hits


def _expect(fine: bool, found: str, where: object) -> None:
    if not fine:
        raise DemoError(found, where=where, remedy="Run `ace demo` again; if it stays, please report it.")
