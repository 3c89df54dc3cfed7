"""The layers of a BERT over a few texts, in one call: linear layers, attention, GELU and norms, none of it padded."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from ace_core.kernels.compiled import compiled
from ace_core.kernels.linear import COLUMNS, linear

_SUMS = {"reassoc", "nsz", "contract"}  # the order of a sum may be what suits the machine


class Norm(NamedTuple):
    """Layer norms: gain and shift (layers, width) float32."""

    gain: np.ndarray
    shift: np.ndarray


class Linear(NamedTuple):
    """The same linear layer of all layers: weights (layers, blocks, inputs, 16) uint16, bias (layers, blocks * 16)."""

    weights: np.ndarray
    bias: np.ndarray


class Model(NamedTuple):
    """The weights of a BERT: embeddings of tokens (words, width) and of where they stand (places, width), their norm as
    one layer's, then what each layer does, in order; ``joined`` gives queries, keys and values."""

    words: np.ndarray
    places: np.ndarray
    first_norm: Norm
    joined: Linear
    mix: Linear
    mix_norm: Norm
    widen: Linear
    narrow: Linear
    narrow_norm: Norm
    heads: int
    eps: np.float32


@partial(compiled, fastmath=_SUMS)
def power(x):
    """e^x of a float32 of at most 0, to 2e-7 of 1: 2^n times the Taylor polynomial of 2^f, f within a half of 0."""
    y = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    n = np.floor(y + np.float32(0.5))
    f = (y - n) * np.float32(0.6931471805599453)
    p = np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@partial(compiled, fastmath=_SUMS)
def exponents(x):
    """Replace every x of a (k,) float32 by e^(x - the largest), and return their sum."""
    most = x[0]
    for i in range(len(x)):
        most = max(most, x[i])
    total = np.float32(0)
    for i in range(len(x)):
        x[i] = power(x[i] - most)
        total += x[i]
    return total


@partial(compiled, fastmath=_SUMS)
def gelu(x):
    """Replace every x of a (k,) float32 by x P(X < x) of a standard normal X, to 5e-7: the error function by formula
    7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions."""
    for i in range(len(x)):
        z = abs(x[i]) * np.float32(0.7071067811865476)
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
        p = np.float32(1.061405429)
        p = p * t - np.float32(1.453152027)
        p = p * t + np.float32(1.421413741)
        p = p * t - np.float32(0.284496736)
        p = p * t + np.float32(0.254829592)
        beyond = np.float32(0.5) * p * t * power(-z * z)  # P(X > |x|)
        x[i] *= np.float32(1) - beyond if x[i] > np.float32(0) else beyond


@partial(compiled, fastmath=_SUMS)
def norm(x, gain, shift, eps):
    """Layer norm of x (k,) float32, in place."""
    count = np.float32(len(x))
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d]
    mean = total / count
    square = np.float32(0)
    for d in range(len(x)):
        square += (x[d] - mean) * (x[d] - mean)
    scale = np.float32(1) / math.sqrt(square / count + eps)
    for d in range(len(x)):
        x[d] = (x[d] - mean) * scale * gain[d] + shift[d]


@partial(compiled, fastmath=_SUMS)
def add_and_norm(x, more, gain, shift, eps):
    """Add ``more`` to x, both (k,) float32, and norm the sum in place."""
    for d in range(len(x)):
        x[d] += more[d]
    norm(x, gain, shift, eps)


@partial(compiled, fastmath=_SUMS)
def attend(parts, width, heads, out):
    """Attention of one text's t tokens to each other.

    Args:
        parts: (t, at least 3 width) float32: queries, keys, values.
        out: (t, width) float32, filled.
    """
    count, size = len(parts), width // heads
    scale = np.float32(1 / math.sqrt(size))
    keys = np.zeros((-(-count // COLUMNS), size, COLUMNS), np.float32)
    values = np.zeros((-(-size // COLUMNS), count, COLUMNS), np.float32)
    scores = np.empty((count, len(keys) * COLUMNS), np.float32)
    read = np.empty((count, len(values) * COLUMNS), np.float32)
    nothing = np.zeros(max(scores.shape[1], read.shape[1]), np.float32)
    total = np.empty(count, np.float32)
    for head in range(heads):
        query, key, value = head * size, width + head * size, 2 * width + head * size
        for j in range(count):
            for d in range(size):
                keys[j // COLUMNS, d, j % COLUMNS] = parts[j, key + d] * scale
            for d in range(size):
                values[d // COLUMNS, j, d % COLUMNS] = parts[j, value + d]
        linear(parts[:, query:], keys, nothing, scores)
        for i in range(count):
            total[i] = exponents(scores[i, :count])
        linear(scores, values, nothing, read)
        for i in range(count):
            for d in range(size):
                out[i, query + d] = read[i, d] / total[i]


@partial(compiled, fastmath=_SUMS)
def pool(states, out):
    """The mean of some tokens' states (t, width) float32, L2-normalised, into ``out`` (width,)."""
    out[:] = np.float32(0)
    for token in range(len(states)):
        for d in range(len(out)):
            out[d] += states[token, d]
    square = np.float32(0)
    for d in range(len(out)):
        square += out[d] * out[d]
    scale = np.float32(1) / math.sqrt(max(square, np.float32(1e-24)))
    for d in range(len(out)):
        out[d] *= scale


@compiled
def forward(ids, lengths, model, states, pooled):
    """The layers of a BERT over some texts.

    Args:
        ids: (n, t) int64, real tokens first; lengths: (n,) int64, how many are, at least 1.
        model: a :class:`Model`.
        states: (n, S, t, width) float32, filled with those of the last S layers at real tokens.
        pooled: (n, width) float32, filled with the mean of the last layer's, L2-normalised.
    """
    layers, width, eps = len(model.joined.weights), model.words.shape[1], model.eps
    not_kept = layers - states.shape[1]
    count = lengths.sum()
    x = np.empty((count, width), np.float32)
    read = np.empty((count, width), np.float32)
    parts = np.empty((count, model.joined.bias.shape[1]), np.float32)
    wide = np.empty((count, model.widen.bias.shape[1]), np.float32)
    more = np.empty((count, model.narrow.bias.shape[1]), np.float32)
    row = 0
    for text in range(len(ids)):
        for place in range(lengths[text]):
            for d in range(width):
                x[row, d] = model.words[ids[text, place], d] + model.places[place, d]
            norm(x[row], model.first_norm.gain[0], model.first_norm.shift[0], eps)
            row += 1
    for layer in range(layers):
        linear(x, model.joined.weights[layer], model.joined.bias[layer], parts)
        row = 0
        for text in range(len(ids)):
            end = row + lengths[text]
            attend(parts[row:end], width, model.heads, read[row:end])
            row = end
        linear(read, model.mix.weights[layer], model.mix.bias[layer], more)
        for i in range(count):
            add_and_norm(x[i], more[i, :width], model.mix_norm.gain[layer], model.mix_norm.shift[layer], eps)
        linear(x, model.widen.weights[layer], model.widen.bias[layer], wide)
        for i in range(count):
            gelu(wide[i])
        linear(wide, model.narrow.weights[layer], model.narrow.bias[layer], more)
        for i in range(count):
            add_and_norm(x[i], more[i, :width], model.narrow_norm.gain[layer], model.narrow_norm.shift[layer], eps)
        if layer >= not_kept:
            row = 0
            for text in range(len(ids)):
                for position in range(lengths[text]):  # one by one: a slice assigned to takes seconds to compile
                    for d in range(width):
                        states[text, layer - not_kept, position, d] = x[row, d]
                    row += 1
    row = 0
    for text in range(len(ids)):
        end = row + lengths[text]
        pool(x[row:end], pooled[text])
        row = end
