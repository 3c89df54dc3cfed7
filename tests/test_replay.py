"""Searches captured and replayed: the same answers as uncaptured ones, whatever the batch, the texts and the masks."""

import copy
import inspect
import logging
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from ace_core.candidates import Candidates
from ace_core.config import SearchSettings
from ace_core.decoding import search_candidates
from ace_core.filters import ItemMask
from ace_core.generator.read_once import ReadOnce
from ace_core.plan import Plan, Spelling, spellings
from ace_core.replay import BATCHES, CudaGraphs, Found, Replay, Run
from ace_core.tensor_walk import TensorWalk
from ace_core.walk import Walk
from tests.decoding_reference import build
from tests.small_generator import ITEMS, SIZES, small_queries, small_world

SETTINGS = {
    "beam": SearchSettings(mode="beam", beam=7, pool=0),
    "children": SearchSettings(mode="beam", beam=7, pool=0, scoring="children"),
    "pool": SearchSettings(mode="beam", beam=7, pool=20),
    "one-shot": SearchSettings(draft=20),
    "verify": SearchSettings(mode="verify", draft=20),
}
ONE_SHOT: Plan = (Spelling("one-shot", 9),)


class Recorded:
    """What a CUDA graph does, in slow motion: results always lie where they lay when the search was captured."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.captured += 1
        kept = run()

        def replay() -> Found:
            self.replayed += 1
            fresh = run()
            for there, new in zip((kept.vector, *kept.rows), (fresh.vector, *fresh.rows)):
                there.copy_(new)
            return kept

        return replay


@pytest.fixture(scope="module")
def world():
    """Three segments, and the generator."""
    _, ordered, generator, _ = small_world()
    part_of = np.random.default_rng(1).integers(0, 3, ITEMS)
    return [build(ordered[part_of == part], SIZES)[0] for part in range(3)], generator


def _replay(world, capture=None, **options) -> Replay:
    segments, generator = world
    return Replay(partial(ReadOnce, generator), TensorWalk(segments), capture=capture or Recorded(), **options)


def _mask(segments, seed: int, share: float = 0.4) -> list[ItemMask]:
    rng = np.random.default_rng(seed)
    return [ItemMask.of(rng.random(s.items) < share) for s in segments]


def _agree(found: Candidates, expected: Candidates) -> None:
    assert found.valid.tolist() == expected.valid.tolist()
    np.testing.assert_array_equal(found.segment, expected.segment)
    np.testing.assert_array_equal(found.row, expected.row)
    # one-shot heads round the query on a CPU: a last bit of it may be 1e-3 of a score
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=2e-3)
    np.testing.assert_allclose(found.level_log_prob, expected.level_log_prob, atol=2e-3)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_replayed_and_as_it_comes_the_same(world, name, masked):
    segments, generator = world
    # of a draft, tensors keep their widths down to the last token, where the CPU looks at all items below
    settings, walk = SETTINGS[name], Walk(segments) if name in ("beam", "children") else TensorWalk(segments)
    capture = Recorded()
    replay = _replay(world, capture)
    for count, positions in ((3, 6), (4, 16), (1, 3), (1, 40), (5, None), (3, 5), (2, 17), (40, 7)):
        masks = [_mask(segments, q % 5) for q in range(count)] if masked else None
        for seed in range(3):  # as it comes, captured, replayed
            query = small_queries(count, positions, seed)
            vector, found = replay.search(query, masks, spellings(settings))
            model = ReadOnce(generator, query)
            _agree(found, search_candidates(model, query, walk, masks, settings=settings))
            torch.testing.assert_close(vector, model.vector, atol=1e-5, rtol=1e-5)
    assert capture.captured == replay.captures == 7 and capture.replayed > 14  # 32 and 8 of the 40; 3, 3 and 4 are one


@pytest.mark.parametrize("name", ["beam", "children"])
def test_compiled_as_one_graph_the_same(world, name):
    """A compiler as what captures: it sees one graph, reads where queries are put, and is made once for a size."""
    segments, generator = world
    settings, walk = SETTINGS[name], Walk(segments)
    torch._dynamo.reset()
    replay = _replay(world, partial(torch.compile, backend="eager", fullgraph=True, dynamic=False))
    for seed, count in enumerate((3, 3, 3, 4)):
        query, masks = small_queries(count, 6, seed), [_mask(segments, seed + q) for q in range(count)]
        found = replay.search(query, masks, spellings(settings))[1]
        _agree(found, search_candidates(generator, query, walk, masks, settings=settings))
    assert replay.captures == 1


def test_alone_or_in_a_batch_the_same(world):
    replay = _replay(world)
    plan = spellings(SETTINGS["pool"])
    query, masks = small_queries(9), [_mask(world[0], q) for q in range(9)]
    for _ in range(2):
        together = replay.search(query, masks, plan)[1]
    for q in range(9):
        for _ in range(2):
            alone = replay.search(query[q : q + 1], masks[q], plan)[1]
        ok = together.valid[q]
        assert together.row[q][ok].tolist() == alone.row[0].tolist()
        np.testing.assert_allclose(together.log_prob[q][ok], alone.log_prob[0], atol=2e-3)


def test_results_outlive_the_next_replay(world):
    replay = _replay(world)
    for _ in range(2):
        replay.search(small_queries(2), None, ONE_SHOT)
    vector, found = replay.search(small_queries(2, seed=1), None, ONE_SHOT)
    before = vector.clone(), found.log_prob.copy()
    replay.search(small_queries(2, seed=2), None, ONE_SHOT)
    assert torch.equal(vector, before[0]) and np.array_equal(found.log_prob, before[1])


def test_a_capture_serves_what_is_padded_to_it_and_nothing_else(world):
    segments, _ = world
    replay = _replay(world)

    def captures(count: int, positions: int | None = 6, mask: int | None = None, plan: Plan = ONE_SHOT) -> int:
        for _ in range(2):
            masks = None if mask is None else _mask(segments, mask)
            replay.search(small_queries(count, positions), masks, plan)
        return replay.captures

    assert captures(3) == 1 and captures(4, 16) == 1 and captures(3, 1) == 1
    assert captures(5) == 2 and captures(3, 17) == 3 and captures(3, None) == 4
    assert captures(3, mask=1) == 5 and captures(4, mask=2) == 5  # masks change, the capture stays
    assert captures(3, plan=(Spelling("one-shot", 10),)) == 6
    assert captures(3, plan=(Spelling("beam", 9),)) == 7


def test_the_first_search_of_a_kind_is_not_captured_and_the_oldest_capture_goes(world):
    capture = Recorded()
    replay = _replay(world, capture, limit=2)
    for number, count in enumerate((1, 2, 4)):
        replay.search(small_queries(count), None, ONE_SHOT)
        assert capture.captured == number
        replay.search(small_queries(count), None, ONE_SHOT)
        assert capture.captured == number + 1
    assert replay.captures == 2
    replay.search(small_queries(2), None, ONE_SHOT)
    assert capture.captured == 3  # still there
    replay.search(small_queries(1), None, ONE_SHOT)
    replay.search(small_queries(1), None, ONE_SHOT)
    assert capture.captured == 4


def test_warming_captures_every_size(world):
    segments, _ = world
    capture = Recorded()
    replay = _replay(world, capture)
    for size in reversed(BATCHES):
        replay.warm(small_queries(1), None, ONE_SHOT, size)
    assert capture.captured == replay.captures == len(BATCHES)
    for count in range(1, 33):
        replay.search(small_queries(count), None, ONE_SHOT)
    assert capture.captured == len(BATCHES)
    replay.warm(small_queries(1), _mask(segments, 0), ONE_SHOT, 4)
    assert capture.captured == replay.captures == len(BATCHES) + 1


def _refuses(run: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def _forgets(run: Run) -> Run:
    kept = run()
    return lambda: Found(kept.vector + 0.5, kept.rows)


@pytest.mark.parametrize(("capture", "said"), [(_refuses, "not permitted"), (_forgets, "something else")])
def test_what_cannot_be_captured_runs_as_it_comes_and_says_so_once(world, capture, said, caplog):
    segments, generator = world
    replay, walk = _replay(world, capture), Walk(segments)
    with caplog.at_level(logging.WARNING):
        replay.warm(small_queries(1), None, spellings(SETTINGS["beam"]), 32)
        for count in (1, 3, 3, 3):
            query = small_queries(count)
            found = replay.search(query, None, spellings(SETTINGS["beam"]))[1]
            _agree(found, search_candidates(generator, query, walk, settings=SETTINGS["beam"]))
    assert replay.captures == 0
    assert len(caplog.records) == 1 and said in caplog.text and "run slower" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_cuda_graph_is_captured_beside_other_work_and_leaves_the_stream_as_it_was(monkeypatch, fails):
    """The order of calls, against torch.cuda's own signatures; that CUDA does as it is told, only a GPU can say."""
    said: list[str] = []
    stream = ["default"]

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(which: Stream):
        before, stream[0] = stream[0], which.name
        yield
        stream[0] = before

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    signature = inspect.signature(torch.cuda.graph)

    @contextmanager
    def capture(*args, **options):
        bound = signature.bind(*args, **options).arguments
        assert isinstance(bound["cuda_graph"], Graph) and bound["pool"] == "pool"
        assert bound["capture_error_mode"] == "thread_local"
        stream[0] = bound["stream"].name
        yield
        if fails:
            raise RuntimeError("capture failed")  # and torch leaves the stream
        stream[0] = "default"

    for name, fake in {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device: Stream(), "CUDAGraph": Graph, "stream": on,
        "graph": capture, "current_stream": lambda device: Stream("default"),
        "set_stream": lambda which: stream.__setitem__(0, which.name),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = CudaGraphs(torch.device("cuda"))

    def run() -> str:
        said.append(f"run on {stream[0]}")
        return "found"

    if fails:
        with pytest.raises(RuntimeError, match="capture failed"):
            graphs(run)
    else:
        replay = graphs(run)
        assert replay() == replay() == "found"
    warmed = ["side waits for default", "run on side", "default waits for side", "run on side"]
    assert said == warmed + ["replay"] * (0 if fails else 2)
    assert stream == ["default"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SETTINGS)
def test_on_a_gpu_graphs_find_what_the_search_finds(world, name, caplog):
    segments, generator = world
    read = partial(ReadOnce, copy.deepcopy(generator).to("cuda"))
    walk, plan = TensorWalk(segments, "cuda"), spellings(SETTINGS[name])
    replay, uncaptured = Replay(read, walk), Replay(read, walk, limit=0)
    for count, positions in ((1, 5), (3, 17), (32, 6), (40, None)):
        for seed in range(4):
            query = small_queries(count, positions, seed).to("cuda")
            masks = [_mask(segments, seed + q % 3) for q in range(count)]
            vector, found = replay.search(query, masks, plan)
            same, expected = uncaptured.search(query, masks, plan)
            _agree(found, expected)
            torch.testing.assert_close(vector, same, atol=1e-4, rtol=1e-4)
            if name in ("beam", "children"):
                cpu = small_queries(count, positions, seed)
                _agree(found, search_candidates(generator, cpu, Walk(segments), masks, settings=SETTINGS[name]))
    assert replay.captures == 5 and uncaptured.captures == 0 and not caplog.records
