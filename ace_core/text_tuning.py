"""Trains the text encoder on a corpus' captions, against the frozen features of its items.

Two heads are trained with it and thrown away: the aligner is fitted afterwards, on the features of the encoder as it
is then. That keeps every later stage as it is with a frozen encoder: captions are encoded once and cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ace_core.aligner_training import new_aligner
from ace_core.collective import Collective, LocalCollective
from ace_core.config import AlignerSettings, TextTuningSettings
from ace_core.contrast import Pairing, train_contrast
from ace_core.encoders.trainable import TrainableText
from ace_core.fitting import FitHooks
from ace_core.items import Modality


def tune_text_encoder(
    encoder: TrainableText,
    features: Mapping[Modality, np.ndarray],
    texts: Sequence[str],
    rows: np.ndarray,
    heads: AlignerSettings,
    settings: TextTuningSettings,
    *,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Train in place (the encoder ends on the CPU); returns the last epoch's figures.

    Args:
        features: raw features (n_m, d_m) of each modality, all of the corpus on every worker.
        texts: the captions to train on, all of them on every worker.
        rows: (P,) int64, the item that each describes.
        heads: of the heads trained beside it: their shape and rates.

    Raises:
        CorpusError: fewer than two captions.
    """
    tokens = encoder.tokens(texts)
    with torch.inference_mode():
        width = encoder.eval()(tokens[:1]).shape[1]
    aligner = new_aligner(features, len(texts), width, heads, seed)
    module = nn.ModuleList([encoder, aligner]).to(device)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    return train_contrast(
        "text encoder",
        module,
        aligner,
        lambda chosen: encoder([tokens[i] for i in chosen.tolist()]),
        Pairing(features, rows, np.unique(np.asarray(texts, object), return_inverse=True)[1]),
        [
            {"params": trained, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
            {"params": list(aligner.parameters()), "lr": heads.learning_rate, "weight_decay": heads.weight_decay},
        ],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        collective=collective or LocalCollective(),
        hooks=hooks or FitHooks(),
        seed=seed,
        device=device,
    )
