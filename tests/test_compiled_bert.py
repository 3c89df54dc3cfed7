"""The compiled forward pass of a BERT: its parts against their definitions, the whole against PyTorch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from ace_core.encoders.bert import LeanBert, lean_bert
from ace_core.encoders.compiled_bert import CompiledBert
from ace_core.encoders.packed import can_pack
from ace_core.errors import ModelError
from ace_core.kernels.bert import attend, exponents, gelu
from ace_core.kernels.linear import COLUMNS, linear, packed

pytestmark = pytest.mark.skipif(not can_pack("cpu"), reason="BERT is compiled where FBGEMM packs")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("count", range(14))  # every way to share rows out among tiles
def test_linear_is_a_product_with_rounded_weights(count: int) -> None:
    weight, bias = normal(20, 7), np.zeros(32, np.float32)
    bias[:20] = normal(20)
    inputs = normal(count, 9)  # rows may be longer than what is read
    out = np.full((count, 32), np.nan, np.float32)
    linear(inputs, packed(weight), bias, out)
    expected = inputs[:, :7] @ weight.astype(np.float16).astype(np.float32).T + bias[:20]
    np.testing.assert_allclose(out[:, :20], expected, atol=1e-5)
    assert (out[:, 20:] == 0).all()
    linear(inputs, packed(weight).view(np.float16).astype(np.float32), bias, out)
    np.testing.assert_allclose(out[:, :20], expected, atol=1e-5)
    assert COLUMNS == 16


def test_gelu_is_the_exact_one() -> None:
    x = np.concatenate((np.linspace(-12, 12, 200_001), [0.0, -0.0, -1e4, 1e4, 1e-30, -1e-30])).astype(np.float32)
    expected = 0.5 * x.astype(np.float64) * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x.tolist()]))
    gelu(x)
    np.testing.assert_allclose(x, expected, atol=5e-7, rtol=1e-6)


def test_exponents_are_those_of_a_softmax() -> None:
    x = np.linspace(-200, 3, 10_001).astype(np.float32)
    expected = np.exp(x.astype(np.float64) - 3)
    assert exponents(x) == pytest.approx(expected.sum(), rel=1e-6)
    np.testing.assert_allclose(x, expected, atol=3e-7)


@pytest.mark.parametrize(("count", "heads", "size"), [(1, 2, 16), (11, 3, 8), (17, 2, 24), (40, 1, 64)])
def test_attention_is_pytorchs(count: int, heads: int, size: int) -> None:
    width = heads * size
    parts = normal(count, 3 * width + 5) * 3
    query, key, value = torch.from_numpy(parts[:, : 3 * width]).view(1, count, 3, heads, size).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).reshape(count, width)
    out = np.empty((count, width), np.float32)
    attend(parts, width, heads, out)
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def bert() -> tuple[dict[str, torch.Tensor], dict]:
    """Of widths that fill no block, and weights that halving does not round."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=70,
        max_position_embeddings=40,
    )  # fmt: skip
    return BertModel(config).half().float().state_dict(), config.to_dict()


def texts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [11], [40, 3, 1], [30] * 20 + [2] * 44])
def test_hidden_states_are_pytorchs_whatever_texts_travel_together(bert, lengths: list[int], threads: int) -> None:
    weights, config = bert
    ids, mask = texts(lengths)
    compiled = lean_bert(weights, config)
    assert isinstance(compiled, CompiledBert)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        (pooled, hidden), (expected, states) = (model(ids, mask, 2) for model in (compiled, LeanBert(weights, config)))
    torch.set_num_threads(before)
    assert torch.allclose(pooled, expected, atol=1e-5) and hidden.shape == states.shape
    for ours, theirs in zip(hidden.unbind(1), states.unbind(1)):
        assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=2e-5)
        assert (ours[~mask.bool()] == 0).all()


def test_tokens_that_the_model_has_not_are_refused(bert) -> None:
    compiled = lean_bert(*bert)
    with pytest.raises(ModelError, match="to 50 of 50"):
        compiled(torch.tensor([[1, 50]]), torch.ones(1, 2, dtype=torch.int64), 1)
    with pytest.raises(ModelError, match="tokens -1 to"):
        compiled(torch.tensor([[1, -1]]), torch.ones(1, 2, dtype=torch.int64), 1)
    with pytest.raises(ModelError, match="41 places of 40"):
        compiled(torch.ones(1, 41, dtype=torch.int64), torch.ones(1, 41, dtype=torch.int64), 1)
