"""A filter that no item passes is answered with what there is instead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ace_core import no_hits
from ace_core.items import MODALITIES, Modality
from ace_core.no_hits import why_nothing
from ace_core.snapshot import Snapshot
from tests.serving_world import WorldItem, publish

CAMERAS = ["Nikon", "Canon", "Canon", "Sony", "Leica", "Fuji", "Ricoh", "Pentax", "Sigma", "Holga"]


def _snapshot(folder: Path, rows: list[dict], *, removed: tuple[int, ...] = ()) -> Snapshot:
    items = [
        WorldItem(f"i{n}", f"{n}.png", MODALITIES[n % 2], (f"thing {n}",), attributes, (n % 8, n % 16, n // 128))
        for n, attributes in enumerate(rows)
    ]
    publish(folder, folder, items, removed=[f"i{n}" for n in removed])
    return Snapshot.open(folder)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    rows = [
        {
            "camera": CAMERAS[n % 10],
            "year": 1990 + 2 * (n % 10),
            "taken": f"20{n % 20:02d}-01-{n % 28 + 1:02d}",
            "new": n % 5 == 0,
            "title": f"Picture No. {n}",
            "same": 5,
            "mixed": n if n % 2 else "even",
        }
        for n in range(600)
    ]
    rows[1]["camera"] = "Gone"
    return _snapshot(tmp_path_factory.mktemp("store"), rows, removed=(1,))


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"camera": "nikon"}, 'no item passes camera="nikon": did you mean "Nikon"? camera is "Nikon" (60), "Canon"'),
        ({"camera": "leika"}, 'did you mean "Leica"? camera is "Leica" (60), "Canon" (119)'),
        ({"camera": "zzz"}, 'camera is "Canon" (119), "Fuji" (60), "Holga" (60), '),
        ({"camera": "zzz"}, " and 1 more"),
        ({"camera": ["x", "sonny"]}, 'did you mean "Sony"?'),
        ({"camera": {"gte": "X"}}, 'no item passes camera={"gte": "X"}: camera is "Canon"'),
        ({"camera": {"exists": False}}, "all have camera"),
        ({"year": 2031}, "no item passes year=2031: year goes from 1990 to 2008"),
        ({"year": {"gt": 2008}}, "year goes from 1990 to 2008"),
        ({"year": 1995}, "year goes from 1990 to 2008, next to it are 1994 and 1996"),
        ({"same": 4}, "same is 5 everywhere"),
        ({"taken": {"lt": "1999"}}, 'taken goes from "2000-01-01" to "2019-01-28"'),
        ({"new": {"not": [True, False]}}, "new is false (479), true (120)"),
        ({"title": "picture no. 17"}, 'did you mean "Picture No. 17"? title has'),
        ({"title": "no. 59"}, 'did you mean "Picture No. 59" or "Picture No. 590" or "Picture No. 591"? title has'),
        ({"title": "zzz"}, "title has more than 500 values"),
        ({"mixed": "Even"}, 'did you mean "even"?'),
        ({"camera": "x", "year": 1}, "; no item passes year=1: year goes"),
        (
            {"camera": "Nikon", "year": 1992},
            'filters alone passes items, but none passes all of them: camera="Nikon" (60), year=1992 (59)',
        ),
    ],
)
def test_what_there_is_instead_is_said(snapshot: Snapshot, filters: dict, said: str) -> None:
    note = why_nothing(snapshot, (), filters)
    assert said in note and "Gone" not in note
    json.dumps(note).encode() and note.encode()
    assert len(note) < 600


def test_a_modality_counts_as_a_filter(snapshot: Snapshot, tmp_path: Path) -> None:
    assert why_nothing(snapshot, (Modality.VIDEO,), {}) == "no item is video: there are image (300), audio (299)"
    assert "no item of image passes camera=" in why_nothing(snapshot, (Modality.IMAGE,), {"camera": "canon"})
    other = why_nothing(snapshot, (Modality.IMAGE,), {"camera": "Sony"})
    assert '"Nikon" (60)' in other and "Fuji" not in other  # what sounds have is no help
    empty = _snapshot(tmp_path, [{"a": 1}], removed=(0,))
    assert why_nothing(empty, (), {"a": 1}) == "the snapshot has no items"


def test_nothing_is_said_where_something_passes(snapshot: Snapshot) -> None:
    assert why_nothing(snapshot, (), {}) == ""
    assert why_nothing(snapshot, (Modality.AUDIO,), {"camera": "Canon", "year": {"gte": 1990}}) == ""
    rng = np.random.default_rng(0)
    rows = [(CAMERAS[n % 10], 1990 + 2 * (n % 10)) for n in range(600) if n != 1]
    for _ in range(50):
        camera, year = str(rng.choice(CAMERAS)), int(rng.integers(1988, 2012))
        note = why_nothing(snapshot, (), {"camera": camera, "year": year})
        assert (note == "") == ((camera, year) in rows)


def test_long_values_are_not_compared_letter_by_letter(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand long texts, each with hundreds of values, would keep the thread of all searches busy for minutes."""
    compared: list[int] = []
    close = no_hits.difflib.get_close_matches

    def noted(text: str, *args: object, **more: object) -> list[str]:
        compared.append(len(text))
        return close(text, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(no_hits.difflib, "get_close_matches", noted)
    assert 'camera is "Canon"' in why_nothing(snapshot, (), {"camera": ["Canon" * 20_000, "zzz"] * 500})
    assert compared == [3]
    assert why_nothing(snapshot, (), {"camera": ["zz", "zzz", "zzzz", "zzzzz"]}) and compared == [3, 2, 3, 4]
