"""Clips: a drawing that moves over a plain background, as H.264 in MP4; and the words for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from ace_core.errors import SettingsError
from demo_corpus.entries import TRAIN, Entry, choose, number_of, split_of, with_article
from demo_corpus.pictures import ATTRIBUTION, LICENCE, Picture, catalogue, drawing, drawing_colours

SIDE = 224
FPS = 12
FRAMES = 30  # 2.5 seconds
_OBJECT = 96  # pixels of the drawing at rest

# Groups whose drawings read well while they move.
_GROUPS = ("animals-and-nature", "food-and-drink", "activities", "travel-and-places", "objects")
_SUBGROUPS_OUT = (
    "sky-and-weather", "place-map", "place-geographic", "place-other", "place-building", "place-religious", "time",
    "event", "office", "book-paper", "mail", "sound", "lock", "transport-sign", "hotel",
)  # fmt: skip
_FAMILIAR = ("red apple", "automobile", "soccer ball", "dog", "cat", "balloon", "rocket", "tropical fish")
_BACKGROUNDS = {
    "white": (255, 255, 255), "light blue": (190, 222, 250), "light green": (200, 235, 200),
    "pale yellow": (252, 243, 200), "grey": (205, 205, 208), "pink": (250, 210, 225),
}  # fmt: skip


@dataclass(frozen=True)
class Pose:
    """Where a drawing is at one moment: centre in 0..1 of the frame, size, turn in degrees, opacity."""

    x: float = 0.5
    y: float = 0.5
    size: float = 1.0
    turn: float = 0.0
    opacity: float = 1.0


# Time 0..1 to a pose; and texts about {0}, the thing with its article.
_MOTIONS: dict[str, tuple[Callable[[float], Pose], tuple[str, ...]]] = {
    "left to right": (
        lambda t: Pose(x=0.15 + 0.7 * t),
        ("{0} moves from left to right", "{0} going to the right", "{0} travels rightwards across the picture"),
    ),
    "right to left": (
        lambda t: Pose(x=0.85 - 0.7 * t),
        ("{0} moves from right to left", "{0} going to the left", "{0} travels leftwards across the picture"),
    ),
    "upwards": (
        lambda t: Pose(y=0.85 - 0.7 * t),
        ("{0} rises from the bottom to the top", "{0} going up", "{0} floats upwards"),
    ),
    "downwards": (
        lambda t: Pose(y=0.15 + 0.7 * t * t),
        ("{0} falls from the top to the bottom", "{0} going down", "{0} drops downwards"),
    ),
    "rolling to the right": (
        lambda t: Pose(x=0.15 + 0.7 * t, y=0.7, turn=-360 * t),
        ("{0} rolls from left to right", "{0} rolling along to the right", "{0} tumbles over the ground rightwards"),
    ),
    "spinning": (
        lambda t: Pose(turn=-450 * t),
        ("{0} spins around on the spot", "{0} turning round and round", "{0} rotates in the middle"),
    ),
    "growing": (
        lambda t: Pose(size=0.35 + 1.5 * t),
        ("{0} grows bigger and bigger", "{0} getting larger", "{0} comes closer until it is huge"),
    ),
    "shrinking": (
        lambda t: Pose(size=1.85 - 1.5 * t),
        ("{0} shrinks until it is tiny", "{0} getting smaller", "{0} goes away into the distance"),
    ),
    "appearing": (
        lambda t: Pose(opacity=min(1.0, 1.2 * t)),
        ("{0} slowly appears out of nothing", "{0} fading in", "an empty picture, then {0} becomes visible"),
    ),
    "disappearing": (
        lambda t: Pose(opacity=max(0.0, 1 - 1.2 * t)),
        ("{0} slowly disappears", "{0} fading out", "{0} vanishes and leaves an empty picture"),
    ),
    "bouncing": (
        lambda t: Pose(y=0.75 - 0.5 * abs(np.sin(3 * np.pi * t))),
        ("{0} bounces up and down", "{0} hopping like a ball", "{0} jumps on the spot again and again"),
    ),
}


@dataclass(frozen=True)
class Scene:
    """One clip: what moves, how, in front of what."""

    picture: Picture
    motion: str
    background: str

    @property
    def key(self) -> str:
        return f"{self.picture.code}/{self.motion}"


def scenes(count: int) -> list[Scene]:
    """``count`` different scenes: as few things as give each about six motions, so that held-out scenes are new
    combinations of known things and known motions.

    Raises:
        SettingsError: there are not as many.
    """
    things = [
        p
        for p in catalogue()
        if p.group in _GROUPS
        and p.subgroup not in _SUBGROUPS_OUT
        and with_article(p.name) != p.name  # the texts are in the singular
    ]
    things.sort(key=lambda p: p.name not in _FAMILIAR)
    per_thing = min(6, len(_MOTIONS))
    if count > len(things) * per_thing:
        raise SettingsError(
            f"{count} clips asked for, {len(things) * per_thing} can be made", remedy="Ask for fewer clips."
        )
    motions = list(_MOTIONS)
    found = []
    for index in range(count):
        thing = things[index // per_thing]
        first = number_of("motion:" + thing.code)
        # 11 motions and steps of 2: six different ones for each thing.
        motion = motions[(first + 2 * (index % per_thing)) % len(motions)]
        background = choose(f"background:{thing.code}/{motion}", tuple(_BACKGROUNDS))
        found.append(Scene(thing, motion, background))
    return found


def entries(count: int) -> Iterator[Entry]:
    """``count`` clips of 2.5 seconds."""
    for scene in scenes(count):
        slug = f"{scene.picture.code.lower()}-{scene.motion.replace(' ', '-')}"
        split = split_of("clip:" + scene.key)
        colours = drawing_colours(scene.picture.code)
        yield Entry(
            item_id=f"clip-{slug}",
            path=f"video/{slug}.mp4",
            captions=captions_of(scene),
            broad=broad_of(scene, colours) if split == TRAIN else (),
            attributes={
                "split": split,
                "source": "OpenMoji",
                "attribution": ATTRIBUTION,
                "licence": LICENCE,
                "name": _MOTIONS[scene.motion][1][0].format(with_article(scene.picture.name)),
                "thing": scene.picture.name,
                "motion": scene.motion,
                "background": scene.background,
                "group": scene.picture.group,
                "colour": colours[0] if colours else None,
            },
            make=lambda scene=scene: encoded(frames_of(scene)),  # type: ignore[misc]
        )


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Four texts that name the thing and the motion, one the background too."""
    thing = with_article(scene.picture.name)
    plain, short, long = (text.format(thing) for text in _MOTIONS[scene.motion][1])
    return plain, f"{short} in front of a {scene.background} background", long, f"a clip of {short}"


def broad_of(scene: Scene, colours: tuple[str, ...]) -> tuple[str, ...]:
    """Texts that are true of other clips too: "a red fruit moves from left to right"."""
    kind = scene.picture.kind
    if not kind or not colours:
        return ()
    return (_MOTIONS[scene.motion][1][0].format(with_article(f"{colours[0]} {kind}")),)


def frames_of(scene: Scene) -> Iterator[np.ndarray]:
    """The frames of a scene, (224, 224, 3) uint8."""
    # Drawn at twice the size: it stays sharp when it grows.
    sprite = Image.fromarray(drawing(scene.picture.code, 2 * _OBJECT))
    pose_at = _MOTIONS[scene.motion][0]
    for index in range(FRAMES):
        frame = Image.new("RGB", (SIDE, SIDE), _BACKGROUNDS[scene.background])
        pose = pose_at(index / (FRAMES - 1))
        side = max(1, round(_OBJECT * pose.size))
        moved = sprite.resize((side, side), Image.Resampling.BILINEAR)
        if pose.turn:
            moved = moved.rotate(pose.turn, Image.Resampling.BILINEAR)
        mask = moved.getchannel("A").point(lambda a, opacity=pose.opacity: round(a * opacity))  # type: ignore[misc]
        frame.paste(moved, (round(pose.x * SIDE - side / 2), round(pose.y * SIDE - side / 2)), mask)
        yield np.asarray(frame)


def encoded(frames: Iterator[np.ndarray]) -> bytes:
    """Frames as H.264 in MP4, the same bytes every time (one thread)."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23", "threads": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
