"""The bank of queries measures what a plain loop over all of it measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ace_core.popularity import NEAREST, Bank


def _texts(count: int, spread: float) -> torch.Tensor:
    """Unit vectors (count, 60) that lean on few directions the more the smaller ``spread`` is."""
    draw = torch.randn(count, 60, generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.normalize(draw * torch.exp(-torch.arange(60) / spread), dim=1)


@pytest.mark.parametrize("spread", [5.0, 1e6])
def test_nearest_is_the_mean_of_the_largest_similarities(spread: float) -> None:
    queries, x = _texts(640, spread), _texts(1100, spread)
    bank = Bank(queries.half())
    assert bank.rank > 55 if spread > 60 else bank.rank < 20
    every = np.sort((x @ queries.T).numpy(), axis=1)
    expected = every[:, -640 // NEAREST :].mean(1)
    found = bank.nearest(x).numpy()
    assert found.shape == (1100,)
    np.testing.assert_allclose(found, expected, atol=0.06)
    assert np.corrcoef(found, expected)[0, 1] > 0.95


def test_a_small_bank_gives_its_nearest_query() -> None:
    queries = _texts(5, 1e6)
    np.testing.assert_allclose(Bank(queries).nearest(queries).numpy(), np.ones(5), atol=0.02)
