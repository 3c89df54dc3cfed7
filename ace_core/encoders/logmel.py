"""Sounds without a network: a fixed vector of log-mel, rhythm and pitch-interval statistics.

What each block is for:
- *timbre*: level, spread and percentiles of the log-mel spectrum (which instrument, how high);
- *course*: the first cosine terms of each band's level over time (rises, falls, swells);
- *rhythm*: modulation spectrum of the onset strength in four bands (how fast, how regular);
- *intervals*: how well the semitone spectrum matches itself, moved by -12..12 semitones, a moment later
  (ascending or descending, steps or leaps) and at the same moment (chords).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ace_core.config import LimitSettings
from ace_core.encoders.protocol import normalised
from ace_core.items import Modality
from ace_core.manifest import fingerprint
from ace_core.media.decoders import AudioDecoder
from ace_core.media.isolate import guarded

RATE = 16_000
_WINDOW = 2048  # 128 ms: semitones are apart from 200 Hz on
_ONSET_WINDOW = 512  # 32 ms: onsets stay sharp
_HOP = 160  # 10 ms
_MELS = 64
_FLOOR = 80.0  # dB below the loudest moment
_LOWEST_NOTE, _SEMITONES = 36, 72  # MIDI numbers: C2 (65 Hz) to B7
_COURSE_TERMS = 4
_MODULATIONS = np.geomspace(0.5, 20.0, 32)  # Hz
_LATER = (0.06, 0.12, 0.25, 0.5)  # seconds between the two spectra that are matched
_SHIFTS = np.arange(-12, 13)
_REVISION = 1  # raise it with any change of the numbers below: vectors of two revisions must not meet


def mel_filters(bands: int, bins: int, rate: int, low: float = 30.0) -> np.ndarray:
    """(bands, bins) triangular filters, equally wide on the mel scale 2595 log10(1 + f / 700), of unit area each."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(2595 * np.log10(1 + low / 700), top, bands + 2) / 2595) - 1)
    return _triangles(edges, bins, rate)


def _triangles(edges: np.ndarray, bins: int, rate: int) -> np.ndarray:
    frequencies = np.linspace(0, rate / 2, bins)
    # Low bands can be narrower than a bin: widen them to one, or they would be empty.
    width = rate / 2 / (bins - 1)
    centre = edges[1:-1, None]
    below = np.maximum(centre - edges[:-2, None], width)
    above = np.maximum(edges[2:, None] - centre, width)
    rising = 1 - (centre - frequencies) / below
    falling = 1 - (frequencies - centre) / above
    filters = np.clip(np.minimum(rising, falling), 0, None)
    return (filters / np.maximum(filters.sum(1, keepdims=True), 1e-12)).astype(np.float32)


def _power(samples: np.ndarray, window: int) -> np.ndarray:
    """(frames, window / 2 + 1) power spectra, one every 10 ms, centred."""
    padded = np.pad(samples, window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::_HOP]
    parts = [
        np.abs(np.fft.rfft(frames[i : i + 512] * np.hanning(window).astype(np.float32), axis=1)) ** 2
        for i in range(0, len(frames), 512)
    ]
    return np.concatenate(parts).astype(np.float32)


def _decibels(power: np.ndarray) -> np.ndarray:
    """0..1: 1 is the loudest value of the sound, 0 lies 80 dB below it. Loudness itself is not kept."""
    level = 10 * np.log10(np.maximum(power, 1e-10))
    return np.clip((level - level.max()) / _FLOOR + 1, 0, 1)


def _unit(block: np.ndarray) -> np.ndarray:
    return normalised(block.reshape(1, -1))[0]


class LogMelSounds:
    """Log-mel statistics behind the ``MediaEncoder`` protocol."""

    modality = Modality.AUDIO
    shares_text_space = False

    def __init__(self, limits: LimitSettings) -> None:
        self.decoder = guarded(AudioDecoder(limits, RATE))
        self.dim = len(self.features(np.zeros(RATE, np.float32)))
        self.identity = fingerprint("log-mel", _REVISION, RATE, self.dim)

    @cached_property
    def _mel(self) -> np.ndarray:
        return mel_filters(_MELS, _WINDOW // 2 + 1, RATE)

    @cached_property
    def _onset_mel(self) -> np.ndarray:
        return mel_filters(32, _ONSET_WINDOW // 2 + 1, RATE)

    @cached_property
    def _semitone(self) -> np.ndarray:
        notes = np.arange(_LOWEST_NOTE - 1, _LOWEST_NOTE + _SEMITONES + 1)
        return _triangles(440.0 * 2 ** ((notes - 69) / 12), _WINDOW // 2 + 1, RATE)

    def encode(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(n, dim) float32, L2-normalised, of n sounds (samples,) float32, mono at 16 kHz, of any lengths."""
        if not batch:
            return np.empty((0, self.dim), np.float32)
        return normalised(np.stack([self.features(samples) for samples in batch]))

    def features(self, samples: np.ndarray) -> np.ndarray:
        """(dim,) float32 of one sound: blocks of equal weight."""
        power = _power(samples, _WINDOW)
        mel = _decibels(power @ self._mel.T)
        # Silence says nothing about the timbre: only frames within 40 dB of the loudest count.
        active = mel[mel.max(axis=1) > 0.5] if (mel > 0.5).any() else mel
        onsets = _decibels(_power(samples, _ONSET_WINDOW) @ self._onset_mel.T)
        semitones = power @ self._semitone.T
        blocks = [*_timbre(active), _course(mel), *_rhythm(onsets), *_intervals(semitones)]
        return np.concatenate([_unit(block) for block in blocks]).astype(np.float32)


def _timbre(mel: np.ndarray) -> list[np.ndarray]:
    """Level, percentiles and spread of each band, and how quickly it changes; the common level is taken out."""
    mean = mel.mean(axis=0)
    low, high = np.percentile(mel, [15, 85], axis=0)
    delta = np.abs(np.diff(mel, axis=0)).mean(axis=0) if len(mel) > 1 else np.zeros(mel.shape[1])
    return [mean - mean.mean(), np.concatenate([low - low.mean(), high - high.mean()]), mel.std(axis=0), delta]


def _course(mel: np.ndarray) -> np.ndarray:
    """(bands * terms,): discrete cosine terms 1.. of each band over time."""
    time = (np.arange(len(mel)) + 0.5) / len(mel)
    terms = np.cos(np.pi * np.arange(1, _COURSE_TERMS + 1)[:, None] * time)
    return terms @ mel / len(mel)


def _rhythm(levels: np.ndarray) -> list[np.ndarray]:
    """Modulation spectrum of the onset strength in four bands, and the rate of onsets."""
    rises = np.maximum(np.diff(levels, axis=0, prepend=levels[:1]), 0)
    bands = np.stack([part.sum(axis=1) for part in np.array_split(rises, 4, axis=1)])
    bands = bands - bands.mean(axis=1, keepdims=True)
    time = np.arange(bands.shape[1]) * (_HOP / RATE)
    waves = np.exp(-2j * np.pi * _MODULATIONS[:, None] * time)
    modulation = np.abs(bands @ waves.T) / np.maximum(np.abs(bands).sum(axis=1, keepdims=True), 1e-9)
    strength = rises.sum(axis=1)
    peak = (
        (strength[1:-1] > strength[:-2]) & (strength[1:-1] >= strength[2:]) & (strength[1:-1] > 0.25 * strength.max())
    )
    rate = np.log2(1 + peak.sum() / (len(strength) * _HOP / RATE))
    bumps = np.exp(-((rate - np.linspace(0, 5, 16)) ** 2) / 0.18)  # a soft histogram is easier to read than a number
    return [modulation, bumps]


def _intervals(power: np.ndarray) -> list[np.ndarray]:
    """Match of the semitone spectrum with itself, shifted in pitch: later in time, and at once."""
    notes = np.sqrt(power)
    # Only what stands out of its surroundings is a note.
    notes = np.maximum(notes - 0.5 * (np.roll(notes, 1, axis=1) + np.roll(notes, -1, axis=1)), 0)
    loud = np.linalg.norm(notes, axis=1)
    notes = notes / np.maximum(np.maximum(loud, 0.05 * loud.max())[:, None], 1e-9)
    padded = np.pad(notes, ((0, 0), (12, 12)))
    later = []
    for seconds in _LATER:
        step = round(seconds * RATE / _HOP)
        if len(notes) <= step:
            later.append(np.zeros(len(_SHIFTS)))
            continue
        match = np.array(
            [(notes[:-step] * padded[step:, 12 + s : 12 + s + _SEMITONES]).sum(axis=1).mean() for s in _SHIFTS]
        )
        match[12] = 0  # the same note held: says nothing about the direction
        later.append(match)
    at_once = np.array([(notes * padded[:, 12 + s : 12 + s + _SEMITONES]).sum(axis=1).mean() for s in range(1, 13)])
    direction = np.array([m[13:].sum() - m[:12].sum() for m in later])
    return [np.stack(later), at_once, direction]
