"""A small corpus and a generator with random weights, for tests of the decoder."""

import numpy as np
import torch

from ace_core.config import GeneratorSettings
from ace_core.constraint import ConstraintIndex
from ace_core.generator.model import Generator
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import QueryBatch
from ace_core.space import unit_query
from tests.decoding_reference import build

SIZES = (3, 6, 5, 7)
ITEMS, DIM, WIDTH, TEXT = 150, 9, 24, (2, 12)


def small_world() -> tuple[ConstraintIndex, np.ndarray, Generator, QueryBatch]:
    """(index, sorted codes, generator with random weights, four queries)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, s, ITEMS) for s in SIZES], 1).astype(np.uint16)
    index, ordered, _ = build(codes, SIZES)
    tables = [rng.standard_normal((s, DIM)).astype(np.float32) / 3 for s in SIZES]
    same = np.eye(DIM, dtype=np.float32)
    quantizer = Quantizer(tables[0], same, tables[1], same, tuple(tables[2:]), tuple(tables[1:]))
    settings = GeneratorSettings(width=WIDTH, heads=2, layers=2)
    generator = Generator(settings, quantizer, text_width=TEXT[1], text_layers=TEXT[0]).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "_codewords" not in name and "scale" not in name:
                parameter.normal_(0, 0.3)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False  # a virtual query has no token
    query = QueryBatch(unit_query(torch.randn(4, DIM)), torch.randn(4, TEXT[0], 6, TEXT[1]), mask)
    return index, ordered, generator, query


def small_queries(count: int, positions: int | None = 6, seed: int = 0) -> QueryBatch:
    """Texts of one to ``positions`` tokens (some of none), or virtual queries, as :func:`small_world` reads them."""
    rng = torch.Generator().manual_seed(1000 * count + seed)
    vector = unit_query(torch.randn(count, DIM, generator=rng))
    if positions is None:
        return QueryBatch(vector)
    lengths = torch.randint(0, positions + 1, (count,), generator=rng)
    lengths[-1] = positions
    mask = torch.arange(positions) < lengths[:, None]
    return QueryBatch(vector, torch.randn(count, TEXT[0], positions, TEXT[1], generator=rng), mask)
