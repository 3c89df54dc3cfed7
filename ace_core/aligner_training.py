"""Fits the aligner: its heads by contrast over cached text features, then the corrections of items."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.collective import Collective, LocalCollective
from ace_core.config import AlignerSettings
from ace_core.contrast import Pairing, train_contrast
from ace_core.corrections import fit_corrections
from ace_core.errors import CorpusError
from ace_core.fitting import FitHooks
from ace_core.items import MODALITIES, Modality


def fit_aligner(
    features: Mapping[Modality, np.ndarray],
    pairs: CaptionPairs,
    settings: AlignerSettings,
    *,
    validation: CaptionPairs | None = None,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Aligner, dict[str, float]]:
    """Train the heads; every worker returns the same aligner (on CPU) and the last epoch's figures.

    Args:
        features: raw features (n_m, d_m) of each modality, all of the corpus on every worker.
        pairs: captions to train on, all of them on every worker; each worker takes its share of every batch.
        validation: held-out captions, both of items in ``pairs`` and of items that are not; they choose the
            corrections (:mod:`ace_core.corrections`).

    Raises:
        CorpusError: fewer than two captions.
    """
    aligner = new_aligner(features, len(pairs), pairs.pooled.shape[1], settings, seed).to(device)
    pooled = torch.from_numpy(np.asarray(pairs.pooled, np.float32)).to(device)
    _, texts = np.unique(pairs.pooled, axis=0, return_inverse=True)
    metrics = train_contrast(
        "aligner",
        aligner,
        aligner,
        pooled.__getitem__,
        Pairing(features, pairs.rows, texts.reshape(-1)),
        [{"params": list(aligner.parameters()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay}],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        collective=collective or LocalCollective(),
        hooks=hooks or FitHooks(),
        seed=seed,
        device=device,
    )
    return aligner, metrics | fit_corrections(aligner, features, pairs, validation, seed)


def new_aligner(
    features: Mapping[Modality, np.ndarray], captions: int, text_width: int, settings: AlignerSettings, seed: int
) -> Aligner:
    """Heads for the modalities that there are, not trained yet.

    Raises:
        CorpusError: fewer than two captions, or no features.
    """
    widths = {m: features[m].shape[1] for m in MODALITIES if m in features and len(features[m])}
    if captions < 2 or not widths:
        raise CorpusError(
            f"there are {captions} captions to train on",
            remedy="The aligner needs captions of at least some items: add a captions file, or use encoders whose "
            "space is shared with text.",
        )
    torch.manual_seed(seed)
    return Aligner(text_width, widths, settings)
