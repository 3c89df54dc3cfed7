"""The six benchmarks of the paper, from a user's own copies in the layouts that they are published in.

| name | annotations, anywhere below the folder | media, anywhere below the folder |
|---|---|---|
| flickr30k | ``dataset_flickr30k.json`` (Karpathy's splits) | ``<filename>`` |
| coco | ``dataset_coco.json`` (Karpathy's splits; ``restval`` is trained on) | ``<filename>`` |
| clotho | ``clotho_captions_{development,validation,evaluation}.csv`` | ``.../<split>/<file_name>`` |
| audiocaps | ``train.csv``, ``val.csv``, ``test.csv`` | named by YouTube id, with or without ``Y`` and start |
| msrvtt | ``MSRVTT_data.json``, ``MSRVTT_train.9k.csv``, ``MSRVTT_JSFUSION_test.csv`` (1k-A) | ``video<n>.mp4`` |
| msvd | ``{train,val,test}_list.txt``; ``AllVideoDescriptions.txt`` or the corpus' CSV | ``<id>_<start>_<end>.avi`` |

A set becomes a captions file that ``ace ingest`` reads. Where no validation split is published, every twentieth
training item validates. Media that are gone (AudioCaps and MSVD lose some every year) are counted, never guessed.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ace_core.errors import CorpusError
from ace_core.items import Modality
from ace_core.media.kinds import modality_of

_VALIDATES = 20
_CLOTHO = {"development": "train", "validation": "val", "evaluation": "test"}
_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class PublishedItem:
    """One item: its file relative to the folder, captions in their published order, "train", "val" or "test"."""

    path: str
    captions: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class PublishedSet:
    """A benchmark as it lies on a user's disk.

    Attributes:
        items: those whose media are there.
        missing: items of each split whose media are not.
    """

    name: str
    modality: Modality
    folder: Path
    items: tuple[PublishedItem, ...]
    missing: dict[str, int]

    def of(self, split: str) -> list[PublishedItem]:
        """The items of a split."""
        return [item for item in self.items if item.split == split]

    def some(self, most: int) -> PublishedSet:
        """At most so many items of each split, evenly spread."""
        parts = [self.of(split) for split in ("train", "val", "test")]
        return replace(self, items=tuple(item for part in parts for item in part[:: max(1, -(-len(part) // most))]))

    def write_captions(self, path: Path) -> None:
        """Write a captions file for ``corpus.captions``, with the split as an attribute."""
        with path.open("w") as f:
            for item in self.items:
                row = {"path": item.path, "captions": item.captions, "split": item.split}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Wanted:
    """An item as the annotations name it: possible file names (suffix left out where ``any_suffix``), best first."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    split: str
    within: str = ""
    any_suffix: bool = False


class _Files:
    """All files below a folder, by name."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CorpusError("the folder does not exist", where=folder, remedy="Give --data the set's folder.")
        self.folder = folder
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[tuple[str, Modality | None], list[str]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                self._by_name[path.name].append(relative)
                self._by_stem[path.stem, modality_of(path.name)].append(relative)

    def media(self, wanted: _Wanted, modality: Modality) -> str | None:
        """The item's file; of several of one name the one in a folder whose name has ``within`` in it."""
        for name in wanted.names:
            found = self._by_stem.get((name, modality), []) if wanted.any_suffix else self._by_name.get(name, [])
            inside = [path for path in found if any(wanted.within in part for part in path.split("/")[:-1])]
            if inside or found:
                return (inside or found)[0]
        return None

    def annotation(self, *names: str) -> Path:
        """The first of some files that is there.

        Raises:
            CorpusError: none is.
        """
        path = self.optional(*names)
        if path is None:
            raise CorpusError(
                f"there is no {' or '.join(names)} below this folder",
                where=self.folder,
                remedy="Keep the annotations, as they are published, in or below the folder given as --data.",
            )
        return path

    def optional(self, *names: str) -> Path | None:
        found = next((self._by_name[name][0] for name in names if self._by_name.get(name)), None)
        return None if found is None else self.folder / found


def load_published(name: str, folder: Path) -> PublishedSet:
    """Read a benchmark from a folder.

    Args:
        name: one of :data:`PUBLISHED`.

    Raises:
        CorpusError: annotations are missing or not as published, or none of the media is there.
    """
    modality, reader = PUBLISHED[name]
    files = _Files(folder)
    try:
        wanted = list(reader(files))
    except (KeyError, ValueError, TypeError, UnicodeDecodeError, csv.Error) as e:
        raise CorpusError(
            f"the annotations of {name} are not as published ({type(e).__name__}: {e})",
            where=folder,
            remedy="Use the original files, unchanged.",
        ) from None
    items, missing, taken = [], Counter[str](), set()
    for entry in wanted:
        path = files.media(entry, modality)
        if path is None or path in taken:
            missing[entry.split] += 1
            continue
        taken.add(path)
        items.append(PublishedItem(path, entry.captions, entry.split))
    if not items:
        example = wanted[0].names[0] if wanted else "none"
        raise CorpusError(
            f"none of the {len(wanted)} files that {name} names is here (the first is {example!r})",
            where=folder,
            remedy="Put the media, with their published names, in or below the folder given as --data.",
        )
    return PublishedSet(name, modality, folder, _with_validation(items), dict(missing))


def _with_validation(items: list[PublishedItem]) -> tuple[PublishedItem, ...]:
    if any(item.split == "val" for item in items):
        return tuple(items)
    trained = [i for i, item in enumerate(items) if item.split == "train"]
    validating = set(trained[_VALIDATES - 1 :: _VALIDATES] or trained[-1:])
    return tuple(replace(item, split="val") if i in validating else item for i, item in enumerate(items))


def _karpathy(file_name: str) -> Callable[[_Files], Iterator[_Wanted]]:
    """``{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}``."""

    def read(files: _Files) -> Iterator[_Wanted]:
        for image in _json(files.annotation(file_name))["images"]:
            captions = tuple(s["raw"].strip() for s in image["sentences"])
            yield _Wanted((image["filename"],), captions, _KARPATHY[image["split"]], image.get("filepath", ""))

    return read


def _clotho(files: _Files) -> Iterator[_Wanted]:
    """``file_name,caption_1,...,caption_5``; version 1 has no validation file."""
    files.annotation("clotho_captions_development.csv")
    files.annotation("clotho_captions_evaluation.csv")
    for part, split in _CLOTHO.items():
        path = files.optional(f"clotho_captions_{part}.csv")
        for row in _csv(path) if path else ():
            captions = tuple(row[f"caption_{i}"].strip() for i in range(1, 6))
            yield _Wanted((row["file_name"], row["file_name"].strip()), captions, split, within=part)


def _audiocaps(files: _Files) -> Iterator[_Wanted]:
    """``audiocap_id,youtube_id,start_time,caption``; a clip has one row a caption."""
    for split in ("train", "val", "test"):
        clips: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in _csv(files.annotation(f"{split}.csv")):
            clips[row["youtube_id"], row["start_time"]].append(row)
        for (video, start), rows in clips.items():
            begin = int(float(start))
            names = [f"{prefix}{video}{end}" for prefix in ("", "Y") for end in (
                "", f"_{begin}", f"_{begin}_{begin + 10}", f"_{1000 * begin}_{1000 * (begin + 10)}",
            )]  # fmt: skip
            names += [row["audiocap_id"] for row in rows]
            captions = tuple(row["caption"].strip() for row in rows)
            yield _Wanted(tuple(names), captions, split, within=split, any_suffix=True)


def _msrvtt(files: _Files) -> Iterator[_Wanted]:
    """1k-A: 9,000 videos with 20 sentences each are trained on; 1,000 videos have one query each."""
    captions: dict[str, list[str]] = defaultdict(list)
    for sentence in _json(files.annotation("MSRVTT_data.json"))["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"].strip())
    for row in _csv(files.annotation("MSRVTT_train.9k.csv")):
        yield _Wanted((row["video_id"],), tuple(captions[row["video_id"]]), "train", any_suffix=True)
    for row in _csv(files.annotation("MSRVTT_JSFUSION_test.csv")):
        yield _Wanted((row["video_id"],), (row["sentence"].strip(),), "test", any_suffix=True)


def _msvd(files: _Files) -> Iterator[_Wanted]:
    """1,200 / 100 / 670 clips with about 40 English sentences each."""
    captions: dict[str, list[str]] = defaultdict(list)
    path = files.annotation("AllVideoDescriptions.txt", "MSR Video Description Corpus.csv", "video_corpus.csv")
    if path.suffix == ".txt":  # "<clip> <sentence>" after a head of lines that begin with "#"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            clip, _, text = line.strip().partition(" ")
            if text and not clip.startswith("#"):
                captions[clip].append(text.strip())
    else:
        for row in _csv(path):
            if row["Language"] == "English" and row["Description"]:
                captions[f"{row['VideoID']}_{row['Start']}_{row['End']}"].append(row["Description"].strip())
    for split in ("train", "val", "test"):
        for line in files.annotation(f"{split}_list.txt").read_text().splitlines():
            clip = line.strip()
            if clip:
                yield _Wanted((clip,), tuple(captions[clip]), split, any_suffix=True)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        yield from csv.DictReader(f)


PUBLISHED: dict[str, tuple[Modality, Callable[[_Files], Iterator[_Wanted]]]] = {
    "flickr30k": (Modality.IMAGE, _karpathy("dataset_flickr30k.json")),
    "coco": (Modality.IMAGE, _karpathy("dataset_coco.json")),
    "clotho": (Modality.AUDIO, _clotho),
    "audiocaps": (Modality.AUDIO, _audiocaps),
    "msrvtt": (Modality.VIDEO, _msrvtt),
    "msvd": (Modality.VIDEO, _msvd),
}
"""Readers by name."""
