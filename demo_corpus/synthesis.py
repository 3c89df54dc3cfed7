"""Instruments: additive, frequency-modulation and plucked-string synthesis of single notes.

Each instrument is a function of (frequency in Hz, seconds) to samples. They differ where ears and log-mel statistics
listen: harmonics, attack, decay, vibrato, noise, inharmonicity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RATE = 22_050

Note = Callable[[float, float], np.ndarray]


def _time(seconds: float) -> np.ndarray:
    return np.arange(max(1, round(seconds * RATE))) / RATE


def _envelope(seconds: float, attack: float, release: float, decay: float = 0.0) -> np.ndarray:
    """Linear attack and release around an exponential ``decay`` (in 1 / s)."""
    t = _time(seconds)
    return np.minimum(t / attack, 1) * np.clip((t[-1] - t) / release, 0, 1) * np.exp(-decay * t)


def _partials(
    frequency: float, seconds: float, levels: Sequence[tuple[float, float]], vibrato: tuple[float, float] = (0.0, 5.5)
) -> np.ndarray:
    """Sum of sines at (ratio, level) pairs below the Nyquist frequency; vibrato is (depth, rate in Hz)."""
    t = _time(seconds)
    depth, speed = vibrato
    phase = 2 * np.pi * frequency * t
    if depth:
        phase = phase - frequency * depth / speed * np.cos(2 * np.pi * speed * t)
    out = np.zeros_like(t)
    for ratio, level in levels:
        if frequency * ratio < 0.45 * RATE:
            out += level * np.sin(ratio * phase)
    return out


def _modulated(frequency: float, seconds: float, ratio: float, index: np.ndarray) -> np.ndarray:
    """Chowning's frequency modulation: a sine whose phase a second sine at ``ratio`` moves by ``index`` radians."""
    t = _time(seconds)
    return np.sin(2 * np.pi * frequency * t + index * np.sin(2 * np.pi * frequency * ratio * t))


def church_organ(frequency: float, seconds: float) -> np.ndarray:
    stops = [(0.5, 0.5), (1, 1.0), (2, 0.8), (3, 0.4), (4, 0.6), (6, 0.25), (8, 0.35)]
    return _partials(frequency, seconds, stops) * _envelope(seconds, 0.04, 0.08)


def piano(frequency: float, seconds: float) -> np.ndarray:
    out = np.zeros(len(_time(seconds)))
    for n in range(1, 11):
        stretched = n * np.sqrt(1 + 0.0004 * n * n)  # stiff strings sound sharp in their upper partials
        decay = 1.2 + 0.7 * n
        out += _partials(frequency, seconds, [(stretched, 0.9**n / n)]) * _envelope(seconds, 0.004, 0.03, decay)
    return out


def flute(frequency: float, seconds: float) -> np.ndarray:
    tone = _partials(frequency, seconds, [(1, 1.0), (2, 0.22), (3, 0.06)], vibrato=(0.006, 5.0))
    breath = np.random.default_rng(7).standard_normal(len(tone))
    breath = np.convolve(breath, np.ones(4) / 4, mode="same") * 0.05
    return (tone + breath) * _envelope(seconds, 0.08, 0.08)


def violin(frequency: float, seconds: float) -> np.ndarray:
    saw = [(n, 1 / n) for n in range(1, 18)]
    return _partials(frequency, seconds, saw, vibrato=(0.012, 6.0)) * _envelope(seconds, 0.12, 0.1)


def trumpet(frequency: float, seconds: float) -> np.ndarray:
    brightness = 4.0 * np.minimum(_time(seconds) / 0.06, 1) * _envelope(seconds, 0.02, 0.2)
    return _modulated(frequency, seconds, 1.0, brightness) * _envelope(seconds, 0.03, 0.06)


def clarinet(frequency: float, seconds: float) -> np.ndarray:
    odd = [(n, 0.9 / n) for n in range(1, 14, 2)] + [(2, 0.04)]
    return _partials(frequency, seconds, odd) * _envelope(seconds, 0.05, 0.05)


def bell(frequency: float, seconds: float) -> np.ndarray:
    index = 5.0 * np.exp(-1.5 * _time(seconds))
    return _modulated(frequency, seconds, 1.4, index) * _envelope(seconds, 0.002, 0.05, 1.5)


def marimba(frequency: float, seconds: float) -> np.ndarray:
    bar = _partials(frequency, seconds, [(1, 1.0)]) * _envelope(seconds, 0.003, 0.02, 7)
    return bar + _partials(frequency, seconds, [(3.9, 0.5), (9.2, 0.2)]) * _envelope(seconds, 0.002, 0.02, 28)


def music_box(frequency: float, seconds: float) -> np.ndarray:
    comb = [(2, 1.0), (4.02, 0.3), (10.9, 0.25)]
    return _partials(frequency, seconds, comb) * _envelope(seconds, 0.002, 0.05, 4)


def guitar(frequency: float, seconds: float) -> np.ndarray:
    """Karplus-Strong: a burst of noise in a loop as long as the period, smoothed at each turn."""
    return _plucked(frequency, seconds, smoothing=0.5, loss=0.996)


def banjo(frequency: float, seconds: float) -> np.ndarray:
    bright = _plucked(frequency, seconds, smoothing=0.12, loss=0.985)
    return np.diff(bright, prepend=0.0) * 2


def _plucked(frequency: float, seconds: float, smoothing: float, loss: float) -> np.ndarray:
    period = max(2, round(RATE / frequency))
    turn = np.random.default_rng(period).uniform(-1, 1, period)
    turns = []
    for _ in range(int(seconds * RATE / period) + 1):
        turns.append(turn)
        turn = loss * ((1 - smoothing) * turn + smoothing * np.roll(turn, 1))
    return np.concatenate(turns)[: len(_time(seconds))] * _envelope(seconds, 0.002, 0.03)


def accordion(frequency: float, seconds: float) -> np.ndarray:
    reed = [(n, 1 / n**0.8) for n in range(1, 12)]
    beating = _partials(frequency * 0.994, seconds, reed) + _partials(frequency * 1.006, seconds, reed)
    return beating * _envelope(seconds, 0.06, 0.06)


def double_bass(frequency: float, seconds: float) -> np.ndarray:
    string = [(n, 0.7**n) for n in range(1, 8)]
    return _partials(frequency / 2, seconds, string) * _envelope(seconds, 0.02, 0.05, 2.5)


def game_console(frequency: float, seconds: float) -> np.ndarray:
    t = _time(seconds)
    # A pulse that is up for a quarter of its period; the levels balance, so that notes begin without a thump.
    return np.where((frequency * t) % 1 < 0.25, 0.9, -0.3) * _envelope(seconds, 0.002, 0.01)


def whistle(frequency: float, seconds: float) -> np.ndarray:
    return _partials(frequency * 2, seconds, [(1, 1.0)], vibrato=(0.02, 7.0)) * _envelope(seconds, 0.05, 0.05)


def sitar(frequency: float, seconds: float) -> np.ndarray:
    string = _plucked(frequency, seconds, smoothing=0.3, loss=0.998)
    drone = _partials(frequency, seconds, [(n, 0.12) for n in range(5, 16)], vibrato=(0.01, 4.0))
    return np.tanh(2.5 * string) * 0.7 + drone * _envelope(seconds, 0.15, 0.05, 2.0)


INSTRUMENTS: dict[str, Note] = {
    "church organ": church_organ,
    "piano": piano,
    "flute": flute,
    "violin": violin,
    "trumpet": trumpet,
    "clarinet": clarinet,
    "bell": bell,
    "marimba": marimba,
    "music box": music_box,
    "guitar": guitar,
    "banjo": banjo,
    "accordion": accordion,
    "double bass": double_bass,
    "game console": game_console,
    "whistle": whistle,
    "sitar": sitar,
}


def mix(notes: Sequence[tuple[float, float, float]], play: Note) -> np.ndarray:
    """One instrument playing (start in s, frequency in Hz, length in s) notes -> (samples,) float32 at RATE.

    Peaks lie at 0.8 of full scale; a short silence follows the last note.
    """
    end = max(start + length for start, _, length in notes) + 0.1
    out = np.zeros(round(end * RATE) + 1)
    for start, frequency, length in notes:
        sound = play(frequency, length)
        first = round(start * RATE)
        out[first : first + len(sound)] += sound[: len(out) - first]
    return (out * (0.8 / max(np.abs(out).max(), 1e-9))).astype(np.float32)
