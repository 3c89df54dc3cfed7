"""The accelerator's benchmark: that what it calls the same top-k is the same, and what it says without a GPU."""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ace_core.constraint import ConstraintIndex
from ace_core.identifiers import sort_order
from ace_core.plan import Spelling
from ace_core.replay import Replay
from ace_core.tensor_walk import TensorWalk
from benchmarks import accelerator
from benchmarks.clustered import Codes
from benchmarks.rivals import DictTrie
from benchmarks.same_weights import Rival

SIZES = (3, 12, 12, 12)


def test_replayed_beams_are_checked_against_generate():
    rng = np.random.default_rng(0)
    codes = np.unique(np.stack([rng.integers(0, s, 600) for s in SIZES], 1).astype(np.uint16), axis=0)
    codes = codes[sort_order(codes, SIZES)]
    tables = tuple(np.zeros((size, 2), np.float32) for size in SIZES)
    rival = Rival(Codes(tables, codes, np.arange(len(codes))), DictTrie(codes), batch=3, beam=6)
    replay = Replay(partial(accelerator.ReadByBart, rival.speller), TensorWalk([ConstraintIndex.build(codes, SIZES)]))
    with torch.inference_mode():
        for _ in range(3):
            found = replay.search(rival.query, None, (Spelling("beam", 6, "children"),))[1]
            rival.check(found)
        assert replay.captures == 1
        with pytest.raises(AssertionError, match="query 0: not the same top-k"):
            rival.check(replace(found, codes=found.codes[:, ::-1], log_prob=found.log_prob[:, ::-1]))
        with pytest.raises(AssertionError, match="5 identifiers"):
            rival.check(replace(found, valid=found.valid & (np.arange(6) < 5)))
        by_vocabulary = replay.search(rival.query, None, (Spelling("beam", 6),))[1]
        with pytest.raises(AssertionError, match="not the same top-k"):
            rival.check(by_vocabulary)


def test_a_step_moves_what_its_operations_read_and_write():
    table, places = torch.zeros(1000), torch.arange(10)
    with accelerator.Traffic() as traffic:
        found = table.index_select(0, places).view(2, 5)[:1]
    assert found.shape == (1, 5) and traffic.operations == 1
    assert traffic.bytes == 10 * 4 + 10 * 4 + 10 * 8


def test_without_a_gpu_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    with pytest.raises(SystemExit) as ended:
        accelerator.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and "--device cpu" in said
