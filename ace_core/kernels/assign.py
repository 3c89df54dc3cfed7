"""Tokens whose codewords sum up to something near a vector: a beam over the levels, for many vectors."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import compiled


@compiled
def assign(first, products, words, gram, offsets, beam, codes):
    """Fill ``codes`` with the best of the ``beam`` sequences of tokens that are kept at every level.

    A sequence scores z · s - |s|² / 2, s being the sum of its words: the largest is nearest to z. Of what a further
    word w adds, z · w - |w|² / 2 is given, and the sequence's own s · w is taken from it.

    Args:
        first: (n, K) float32, by which tokens of the first level are chosen.
        products: (n, W) float32, z · w - |w|² / 2 of all levels' words side by side.
        words: (d, W) float32.
        gram: (W, W - K) float32, the words' inner products with those of all levels but the first; or (0, W - K) where
            these would take too much memory: then they are computed for the sequences that are kept.
        offsets: (L + 1,) int64, where each level's words begin, and where the last one's end.
        codes: (n, L) uint16.
    """
    levels, count = len(offsets) - 1, words.shape[1]
    rest, rest_then = np.empty((beam, count), np.float32), np.empty((beam, count), np.float32)
    tokens, tokens_then = np.zeros((beam, levels), np.int64), np.zeros((beam, levels), np.int64)
    score, score_then = np.empty(beam, np.float32), np.empty(beam, np.float32)
    parent, token = np.empty(beam, np.int64), np.empty(beam, np.int64)
    for i in range(len(codes)):
        live = np.int64(0)
        score[:] = -np.inf
        for v in range(offsets[1]):
            if first[i, v] > score[beam - 1]:
                live = _keep(first[i, v], np.int64(0), np.int64(v), live, beam, score, parent, token)
        if live == 0:  # not a number: near to nothing, and no concern of the item before
            codes[i] = 0
            continue
        for b in range(live):
            tokens[b, 0], score[b] = token[b], products[i, token[b]]
            _without(products[i], token[b], offsets[1], words, gram, rest[b])
        for level in range(1, levels):
            begin, end = offsets[level], offsets[level + 1]
            kept = np.int64(0)
            most = beam if level + 1 < levels else np.int64(1)
            worst = np.float32(-np.inf)
            score_then[:most] = worst
            for b in range(live):
                for w in range(begin, end):
                    value = score[b] + rest[b, w]
                    if value > worst:
                        kept = _keep(value, np.int64(b), np.int64(w), kept, most, score_then, parent, token)
                        worst = score_then[most - 1]
            for b in range(kept):
                of, word = parent[b], token[b]
                for above in range(level):
                    tokens_then[b, above] = tokens[of, above]
                tokens_then[b, level] = word - begin
                _without(rest[of], word, end, words, gram, rest_then[b])
            rest, rest_then, tokens, tokens_then = rest_then, rest, tokens_then, tokens
            score, score_then, live = score_then, score, kept
        for level in range(levels):
            codes[i, level] = tokens[0, level]


@compiled
def _without(line, word, begin, words, gram, out):
    """Fill ``out`` from ``begin`` on with what a line is less the inner products of a word with those there."""
    count = len(line)
    if len(gram):
        before = count - gram.shape[1]
        for w in range(begin, count):
            out[w] = line[w] - gram[word, w - before]
        return
    for w in range(begin, count):
        out[w] = line[w]
    for d in range(len(words)):
        number, numbers = words[d, word], words[d]
        for w in range(begin, count):
            out[w] -= number * numbers[w]


@compiled
def _keep(value, of, word, kept, most, score, parent, token):
    """Put a value that is above the last of the ``most`` best so far, ``kept`` of them, among these, best first; of
    equal ones the earlier stays before. Returns how many there are."""
    at = min(kept, most - 1)
    while at > 0 and value > score[at - 1]:
        score[at], parent[at], token[at] = score[at - 1], parent[at - 1], token[at - 1]
        at -= 1
    score[at], parent[at], token[at] = value, of, word
    return min(kept + 1, most)
