"""What an accelerator must be able to do with a search, held on a CPU: one graph, on one device, of fixed shapes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ace_core.decoding import beam_search
from ace_core.filters import ItemMask
from ace_core.generator.read_once import ReadOnce
from ace_core.merged import MergedIndex
from ace_core.plan import Plan, Spelling
from ace_core.tensor_search import spelled
from ace_core.tensor_walk import TensorWalk
from benchmarks.bart import BartSpeller, random_bart
from tests.small_generator import ITEMS, SIZES, small_queries, small_world

PLANS: list[Plan] = [
    (Spelling("beam", 7), Spelling("one-shot", 9)),
    (Spelling("beam", 7, "children"),),
    (Spelling("verify", 9),),
]


class OneDevice(TorchDispatchMode):
    """Fails where an operation reads or writes a tensor of another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{operation} reads or writes {tensor.device}"
        return out


def _search(read, walk: TensorWalk, plan: Plan):
    def search(query, masks):
        model = read(query)
        return [spelled(model, query, walk, masks, how).packed() for how in plan]

    return search


def _on_meta(masked: bool, bart: bool = False):
    """A model (the generator, or BART as the benchmark spells it) on the device that has shapes and no data: how it
    reads, a walk, queries and masks."""
    index, _, generator, _ = small_world()
    walk = TensorWalk([index, index], "meta")
    some = [ItemMask.of(np.arange(ITEMS) % share == 0) for share in (2, 3)]
    masks = walk.masks(some, 3) if masked else None
    query = small_queries(3).to("meta")
    if bart:
        speller = BartSpeller(random_bart(SIZES, width=32).to("meta"), SIZES)
        return lambda query: speller, walk, replace(query, hidden=torch.empty(3, 1, 6, 32, device="meta")), masks
    assert len(generator._codeword_sizes) == len(SIZES)  # made by the first search, which is never captured
    return partial(ReadOnce, generator.to("meta")), walk, query, masks


@pytest.mark.parametrize(
    ("plan", "masked", "bart"),
    [*((plan, masked, False) for plan in PLANS for masked in (False, True)), (PLANS[1], True, True)],
)
def test_a_search_is_one_graph_and_never_looks_at_the_data(plan, masked, bart):
    """Whatever depends on the data (a branch, .item(), a shape), or on the host, fails where there is no data."""
    read, walk, query, masks = _on_meta(masked, bart)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    search = _search(read, walk, plan)
    torch._dynamo.reset()
    with torch.inference_mode():
        with OneDevice("meta") as ran:
            eager = search(query, masks)
        compiled = torch.compile(search, backend=backend, fullgraph=True, dynamic=False)(query, masks)
    assert [rows.shape for rows in compiled] == [rows.shape for rows in eager] and ran.operations > 100
    (graph,) = graphs
    called = {getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes}
    assert "index_select" in called and "topk" in called
    assert not called & {"tensor", "as_tensor", "from_numpy", "cpu", "cuda", "item", "tolist", "numpy", "nonzero"}


@pytest.mark.parametrize("leak", ["tensor", "item", "other device"])
def test_that_test_sees_what_a_capture_would_stumble_over(leak, monkeypatch):
    read, walk, query, masks = _on_meta(False)
    plain = TensorWalk.expand

    def leaking(self, rows, log_probs, *args, **options):
        if leak == "item":
            float(log_probs.max())
        elif leak == "tensor":
            log_probs = log_probs + torch.tensor([0.0])
        else:
            rows.codes.index_select(0, torch.arange(3))
        return plain(self, rows, log_probs, *args, **options)

    monkeypatch.setattr(TensorWalk, "expand", leaking)
    with torch.inference_mode(), OneDevice("meta"), pytest.raises((AssertionError, RuntimeError)):
        _search(read, walk, PLANS[0])(query, masks)


def _items(walk: TensorWalk, masks, generator, query) -> list[list[int]]:
    """Rows of the items that the queries find under masks, by tensors and by kernels."""
    found = beam_search(generator, query, walk, masks, beam=ITEMS, limit=ITEMS)
    expected = beam_search(generator, query, walk.host, masks, beam=ITEMS, limit=ITEMS)
    rows = [sorted(r[v].tolist()) for r, v in zip(found.row, found.valid)]
    assert rows == [sorted(r[v].tolist()) for r, v in zip(expected.row, expected.valid)]
    return rows


def test_masks_stay_on_the_device_and_make_room_for_others(monkeypatch):
    index, _, generator, _ = small_world()
    walk = TensorWalk([index])
    made = []
    plain = MergedIndex.bitmap
    monkeypatch.setattr(MergedIndex, "bitmap", lambda self, masks: made.append(masks) or plain(self, masks))
    masks = [[ItemMask.of(np.arange(ITEMS) % 97 == n)] for n in range(97)]
    for n in (0, 1, 0, 1):
        (rows,) = _items(walk, masks[n], generator, small_queries(1))
        assert rows == [item for item in range(ITEMS) if item % 97 == n]
    assert len(made) == 2
    table = walk.masks(masks[0], 1).bitmaps
    for begin in range(0, 90, 30):  # more than there is room for
        several = [*masks[begin : begin + 30], [None]]
        rows = _items(walk, several, generator, small_queries(31))
        assert rows[:30] == [[i for i in range(ITEMS) if i % 97 == n] for n in range(begin, begin + 30)]
        assert rows[30] == list(range(ITEMS))
    assert walk.masks(masks[89], 1).bitmaps is table  # where a capture reads
    assert len(made) == 90
    _items(walk, masks, generator, small_queries(97))  # more at once: for this search only
    assert walk.masks(masks[89], 1).bitmaps is table and len(made) == 90 + 97
    _items(walk, masks[0], generator, small_queries(1))
    assert len(made) == 90 + 97 + 1  # was pushed out
