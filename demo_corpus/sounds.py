"""Sounds: what is played, on which instrument, how fast, how high; and the words for it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile

from ace_core.errors import SettingsError
from demo_corpus.entries import TRAIN, Entry, choose, number_of, split_of, with_article
from demo_corpus.synthesis import INSTRUMENTS, RATE, mix

ATTRIBUTION = "synthesised by ACE"
LICENCE = "CC0-1.0"

_MAJOR = (0, 2, 4, 5, 7, 9, 11, 12)
_BEATS = {"slow": 0.5, "moderate": 0.28, "fast": 0.13}  # seconds a note
_ROOTS = {"low": 43, "middle": 55, "high": 67}  # MIDI numbers of the lowest note
_SECONDS = 3.2  # patterns are repeated up to about this length

# Each pattern: semitones above the root of the notes of one turn; a tuple sounds together, None is a rest.
_PATTERNS: dict[str, tuple[int | tuple[int, ...] | None, ...]] = {
    "ascending scale": _MAJOR,
    "descending scale": _MAJOR[::-1],
    "ascending arpeggio": (0, 4, 7, 12),
    "descending arpeggio": (12, 7, 4, 0),
    "major chords": ((0, 4, 7), None, (0, 4, 7), None),
    "minor chords": ((0, 3, 7), None, (0, 3, 7), None),
    "single repeated note": (0, 0, 0, 0),
    "trill between two notes": (0, 2, 0, 2),
    "waltz rhythm": (0, (7, 12), (7, 12)),
    "march rhythm": (0, None, 7, None, 0, 0, 7, None),
    "octave leaps": (0, 12, 0, 12),
    "scale up and down": (*_MAJOR, *_MAJOR[-2:0:-1]),
}
# Other words for the same, for paraphrases: {i} is the instrument with its article, {I} without.
_WORDS = {
    "ascending scale": ("a scale going up", "a rising scale, step by step", "notes climbing upwards"),
    "descending scale": ("a scale going down", "a falling scale, step by step", "notes walking downwards"),
    "ascending arpeggio": ("a broken chord going up", "a rising arpeggio", "chord notes leaping upwards"),
    "descending arpeggio": ("a broken chord going down", "a falling arpeggio", "chord notes leaping downwards"),
    "major chords": ("happy chords", "bright major chords", "major triads again and again"),
    "minor chords": ("sad chords", "dark minor chords", "minor triads again and again"),
    "single repeated note": ("one note over and over", "the same note repeated", "a single note, repeated"),
    "trill between two notes": ("two neighbouring notes alternating", "a trill", "a shake between two notes"),
    "waltz rhythm": ("a waltz", "a dance in three-four time", "oom-pah-pah accompaniment"),
    "march rhythm": ("a march", "a marching rhythm", "music to march to"),
    "octave leaps": ("leaps of an octave", "a note jumping up and down an octave", "octaves up and down"),
    "scale up and down": ("a scale up and back down", "a scale there and back", "notes going up, then down"),
}
_TEMPO_WORDS = {
    "slow": ("slowly", "at a slow pace", "calmly"),
    "moderate": ("at a medium pace", "at a moderate tempo", "neither fast nor slow"),
    "fast": ("quickly", "at high speed", "very fast"),
}
_REGISTER_WORDS = {
    "low": ("in the low register", "with deep notes"),
    "middle": ("in the middle register", "with mid-range notes"),
    "high": ("in the high register", "with high notes"),
}


@dataclass(frozen=True)
class Composition:
    """What a clip plays: one of each vocabulary."""

    instrument: str
    pattern: str
    tempo: str
    register: str

    @property
    def key(self) -> str:
        return f"{self.instrument}/{self.pattern}/{self.tempo}/{self.register}"


def compositions(count: int) -> list[Composition]:
    """``count`` different compositions in a fixed mixed order.

    The first 576 differ in instrument, pattern or tempo, so that a caption need not name the register.

    Raises:
        SettingsError: there are not as many.
    """
    triples = [(i, p, t) for i in INSTRUMENTS for p in _PATTERNS for t in _BEATS]
    if count > len(triples) * len(_ROOTS):
        raise SettingsError(
            f"{count} sounds asked for, {len(triples) * len(_ROOTS)} can be composed", remedy="Ask for fewer sounds."
        )
    found: list[Composition] = []
    for turn in range(len(_ROOTS)):
        for i, p, t in sorted(triples, key=lambda triple: number_of("sound:" + "/".join(triple))):
            register = list(_ROOTS)[(number_of(f"register:{i}/{p}/{t}") + turn) % len(_ROOTS)]
            found.append(Composition(i, p, t, register))
    return found[:count]


def entries(count: int) -> Iterator[Entry]:
    """``count`` sounds; two of three FLAC, one of three Ogg Vorbis. Held-out sounds are unseen combinations."""
    for index, composition in enumerate(compositions(count)):
        suffix = ".ogg" if index % 3 == 2 else ".flac"
        slug = composition.key.replace("/", "-").replace(" ", "-")
        split = split_of("sound:" + composition.key)
        yield Entry(
            item_id=f"sound-{slug}",
            path=f"audio/{slug}{suffix}",
            captions=captions_of(composition),
            broad=broad_of(composition) if split == TRAIN else (),
            attributes={
                "split": split,
                "source": "synthesis",
                "attribution": ATTRIBUTION,
                "licence": LICENCE,
                "name": f"{composition.tempo} {composition.pattern} on {with_article(composition.instrument)}",
                "instrument": composition.instrument,
                "pattern": composition.pattern,
                "tempo": composition.tempo,
                "register": composition.register,
            },
            make=lambda composition=composition, suffix=suffix: encoded(play(composition), suffix),  # type: ignore[misc]
        )


def captions_of(composition: Composition) -> tuple[str, ...]:
    """Five texts that name the instrument, the pattern and the tempo, most of them the register too."""
    c, key = composition, composition.key
    words, pace, height = _WORDS[c.pattern], _TEMPO_WORDS[c.tempo], _REGISTER_WORDS[c.register]
    instrument = with_article(c.instrument)
    second = words[1 + number_of(key) % 2]
    return (
        f"{c.tempo} {c.pattern} on {instrument}, {height[0]}",
        f"{instrument} plays {words[0]}, {choose(key + 'a', pace)}, {height[1]}",
        f"{second} played {choose(key + 'b', pace)} on {instrument} {height[0]}",
        f"{height[1]}, {instrument}: {words[0]}, {choose(key + 'c', pace)}",
        f"the sound of {instrument} playing {second} {choose(key + 'd', pace)} {height[1]}",
    )


def broad_of(composition: Composition) -> tuple[str, ...]:
    """Two texts that are true of other sounds too."""
    return with_article(composition.instrument), _WORDS[composition.pattern][0]


def play(composition: Composition) -> np.ndarray:
    """(samples,) float32 at ``RATE`` Hz, about three seconds."""
    beat = _BEATS[composition.tempo]
    root = _ROOTS[composition.register] + number_of("root:" + composition.key) % 5  # not every clip in one key
    turn = _PATTERNS[composition.pattern]
    turns = max(1, round(_SECONDS / (beat * len(turn))))
    notes = []
    for step, note in enumerate(turn * turns):
        for semitone in () if note is None else note if isinstance(note, tuple) else (note,):
            notes.append((step * beat, 440.0 * 2 ** ((root + semitone - 69) / 12), beat * 0.95))
    return mix(notes, INSTRUMENTS[composition.instrument])


def encoded(samples: np.ndarray, suffix: str) -> bytes:
    """The samples as a FLAC or Ogg Vorbis file."""
    out = io.BytesIO()
    container, codec = ("OGG", "VORBIS") if suffix == ".ogg" else ("FLAC", "PCM_16")
    with soundfile.SoundFile(out, "w", RATE, 1, codec, format=container) as file:
        # In blocks: libsndfile's Vorbis encoder overflows the stack on long single writes.
        for first in range(0, len(samples), RATE):
            file.write(samples[first : first + RATE])
    return _with_fixed_serial(out.getvalue()) if suffix == ".ogg" else out.getvalue()


def _with_fixed_serial(ogg: bytes) -> bytes:
    """The same Ogg file with stream serial number 0: libsndfile draws one at random, and builds should be equal."""
    out = bytearray(ogg)
    page = 0
    while page < len(out):
        segments = out[page + 26]
        end = page + 27 + segments + sum(out[page + 27 : page + 27 + segments])
        out[page + 14 : page + 18] = bytes(4)
        out[page + 22 : page + 26] = bytes(4)
        out[page + 22 : page + 26] = _ogg_checksum(bytes(out[page:end])).to_bytes(4, "little")
        page = end
    return bytes(out)


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of polynomial 0x04C11DB7 as Ogg has it: most significant bit first, nothing inverted.

    It is zlib's CRC of the bytes with their bits mirrored, mirrored itself, without zlib's two inversions.
    """
    crc = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)
