"""What the three makers of the demo corpus hand to the builder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ace_core.items import AttributeValue

TRAIN, VALIDATION, TEST = "train", "val", "test"
_VALIDATION_SHARE, _TEST_SHARE = 0.10, 0.15


@dataclass(frozen=True)
class Entry:
    """One item of the corpus.

    Attributes:
        item_id: unique and stable.
        path: where the media file goes, below the corpus folder.
        captions: texts that say what this item is and no other.
        broad: texts that are true of it and of others ("a red fruit"): written for training items only, because as
            evaluation queries they would have many right answers and count as one.
        attributes: flat; ``split`` among them.
        make: renders the file.
    """

    item_id: str
    path: str
    captions: tuple[str, ...]
    make: Callable[[], bytes]
    broad: tuple[str, ...] = ()
    attributes: dict[str, AttributeValue] = field(default_factory=dict)


def number_of(text: str) -> int:
    """A fixed pseudo-random number of a text: choices that are the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def split_of(concept: str) -> str:
    """Train, val (about 10 %) or test (about 15 %) by the concept: items of one concept stay together."""
    share = number_of("split:3:" + concept) / (1 << 48)  # a draw in which red fruits are trained on and held out
    if share < _TEST_SHARE:
        return TEST
    return VALIDATION if share < _TEST_SHARE + _VALIDATION_SHARE else TRAIN


def choose(key: str, options: tuple[str, ...]) -> str:
    """One of the options, always the same for a key."""
    return options[number_of(key) % len(options)]


def with_article(name: str) -> str:
    """``name`` with its indefinite article; plurals and proper names go without."""
    first = name.split()[0]
    head = re.split(" (?:with|of|in|on|at|from|for) ", name)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "os"))
    if (
        (plural and first != "person")
        or not first[0].isalpha()
        or first[0].isupper()
        or first in ("people", "men", "women")
    ):
        return name
    vowel = first[0] in "aeiou" and not first.startswith(("one", "uni", "use", "eu"))
    return f"{'an' if vowel else 'a'} {name}"
