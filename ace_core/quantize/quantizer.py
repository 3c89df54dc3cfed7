"""The frozen quantizer: item vectors to identifiers and back.

An identifier is (modality, coarse, fine_1..fine_M). Everything is linear, so a rebuilt item is a plain sum,

    x̂ = mean[modality] + C_coarse[k] + C_1[v_1] + ... + C_M[v_M],

and a query's similarity to it is a sum of one term a token: the reason why the generator's heads can start as the
codebooks. Tokens are chosen in the space of the *metric* A, u = (x - mean[modality]) A, where A A' is the second
moment of the queries: an error costs what it changes in the similarity to a query (the idea of score-aware
quantisation, Guo et al. 2020, in its data-dependent form), not what it measures in a direction nobody asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ace_core.arrays import map_arrays, save_arrays
from ace_core.errors import StoreError
from ace_core.items import MODALITIES
from ace_core.quantize.health import CodebookHealth, measure_health
from ace_core.scoring import Codewords

_BLOCK = 2048  # items, of which tokens are sought together,
_BLOCK_PRODUCTS = 1 << 24  # ... fewer where these are more numbers
_GRAM = 1 << 26  # inner products of words that are held: 256 MB


@dataclass(frozen=True)
class Quantizer:
    """Frozen arrays of a fitted quantizer, all float32.

    Attributes:
        modality_means: (3, D), mean vector of each modality (zero where the corpus has none).
        metric: (D, D), A above.
        coarse: (K, D), K-Means centroids in the metric's space.
        encoder: (D, d), the RQ-VAE's encoder, from what is left after the centroid to the latent space.
        latents: M arrays (V, d), the RQ-VAE's codebooks.
        codebooks: 1 + M arrays (V_l, D): the codewords of the levels after the modality, in the shared space, as they
            were fitted.
        beam: sequences of tokens that are kept at each level while an item's identifier is sought.
    """

    modality_means: np.ndarray
    metric: np.ndarray
    coarse: np.ndarray
    encoder: np.ndarray
    latents: tuple[np.ndarray, ...]
    codebooks: tuple[np.ndarray, ...]
    beam: int = 1

    @property
    def dim(self) -> int:
        return self.modality_means.shape[1]

    @property
    def levels(self) -> int:
        """Length of an identifier: modality, coarse and fine tokens."""
        return 1 + len(self.codebooks)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each level, the modality's 3 first."""
        return (len(MODALITIES), *(len(c) for c in self.codebooks))

    def codewords(self, level: int) -> np.ndarray:
        """(V_l, D) codewords of one level, in 8 bits as they are used everywhere; level 0 gives the modality means."""
        return self.short_codewords.tables[level]

    @cached_property
    def short_codewords(self) -> Codewords:
        """All levels' codewords, the modality's first: what identifiers stand for, to be multiplied with queries."""
        return Codewords([self.modality_means, *self.codebooks])

    @cached_property
    def _words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In the latent space: (d, W) centroids and codebooks side by side, their inner products as
        :func:`ace_core.kernels.assign.assign` takes them, and (L + 1,) where each begins."""
        levels = [self.coarse @ self.encoder, *self.latents]
        words = np.concatenate(levels).astype(np.float32)
        fine = words[len(self.coarse) :]
        held = words if len(words) * len(fine) <= _GRAM else words[:0]
        return np.ascontiguousarray(words.T), held @ fine.T, np.cumsum([0, *map(len, levels)])

    def assign(self, x: np.ndarray, modality_tokens: np.ndarray) -> np.ndarray:
        """Identifiers of item vectors: of the ``beam`` best sequences of tokens at each level, the one whose sum is
        nearest. The coarse tokens among which it is sought are those of the nearest centroids.

        Args:
            x: (n, D) float32 item vectors in the shared space.
            modality_tokens: (n,) ints, 0..2.

        Returns:
            (n, levels) uint16.
        """
        from ace_core import kernels  # the server's ingress reads quantizers, and compiles nothing

        words, gram, offsets = self._words
        to_words = (self.metric @ self.encoder) @ words
        to_coarse = self.metric @ self.coarse.T
        half_words, half_coarse = 0.5 * np.square(words).sum(0), 0.5 * np.square(self.coarse).sum(1)
        block = max(1, min(_BLOCK, _BLOCK_PRODUCTS // words.shape[1]))
        codes = np.empty((len(x), self.levels), np.uint16)
        codes[:, 0] = modality_tokens
        for start in range(0, len(x), block):
            rows = slice(start, start + block)
            centred = np.asarray(x[rows], np.float32) - self.modality_means[codes[rows, 0]]
            products, first = centred @ to_words - half_words, centred @ to_coarse - half_coarse
            kernels.assign(first, products, words, gram, offsets, self.beam, codes[rows, 1:])
        return codes

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Identifiers (n, levels) -> rebuilt item vectors (n, D) float32, not normalised."""
        return self.short_codewords.rebuilt(codes)

    def health(self, codes: np.ndarray, x: np.ndarray) -> CodebookHealth:
        """How well the codebooks are used by these items and how near the rebuilt items are."""
        return measure_health(codes, self.vocab_sizes, x, self.reconstruct(codes))

    def save(self, folder: Path) -> None:
        """Write ``quantizer.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "modality_means": self.modality_means,
            "metric": self.metric,
            "coarse": self.coarse,
            "encoder": self.encoder,
            "beam": np.array([self.beam], np.int64),
        }
        arrays |= {f"latents.{i}": a for i, a in enumerate(self.latents)}
        arrays |= {f"codebooks.{i}": a for i, a in enumerate(self.codebooks)}
        save_arrays(folder / "quantizer.safetensors", arrays)

    @classmethod
    def load(cls, folder: Path) -> Quantizer:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing or holds something else.
        """
        arrays = {k: np.array(v) for k, v in map_arrays(folder / "quantizer.safetensors").items()}
        try:
            levels = sum(k.startswith("codebooks.") for k in arrays)
            return cls(
                modality_means=arrays["modality_means"],
                metric=arrays["metric"],
                coarse=arrays["coarse"],
                encoder=arrays["encoder"],
                latents=tuple(arrays[f"latents.{i}"] for i in range(levels - 1)),
                codebooks=tuple(arrays[f"codebooks.{i}"] for i in range(levels)),
                beam=int(arrays["beam"][0]) if "beam" in arrays else 1,  # as quantizers sought before there was one
            )
        except KeyError as e:
            raise StoreError(f"the quantizer lacks {e}", where=folder, remedy="Fit the quantizer again.") from None
