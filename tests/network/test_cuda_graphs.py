"""Recorded calls of optimised copies: the same results as without recordings, and nothing but the recording runs.

Without a GPU, a recorder in place of CUDA graphs calls the recorded function again, into the memory of its first
results, and overwrites what all other recordings hold, as graphs with one memory pool may.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import assert_same, covering, images, random_levels
from networks import ManyOperations, randomise, strided, unverified
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs
from cadsurgery.following.graphs import GRAPH_FILE
from cadsurgery.masks import MaskProvider
from cadsurgery.network import cuda_graphs
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.model import OptimizedModel
from cadsurgery.support.torch_internals import tree_leaves

BUDGET = "edges | budget:fraction=0.34"


class Graphs:
    """Stands in for CUDA graphs, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.computes, self.fails = True, False
        self._results: list[list[Tensor]] = []

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = run()
        own = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.recorded += 1
        self._results.append(own)

        def replay() -> None:
            self.replayed += 1
            if self.computes:
                found = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
                for memory, value in zip(own, found, strict=True):
                    memory.copy_(value)
                for others in self._results:
                    if others is not own:
                        torch._foreach_zero_(others)

        return result, replay

    def in_turn(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    monkeypatch.setattr(cuda_graphs, "recorder_for", lambda device: made)
    return made


def converted(
    model: nn.Module | None = None, mask: Any = BUDGET, **options: Any
) -> tuple[cs.AdaptiveModel, OptimizedModel]:
    model = strided(outputs=4, kernel=3) if model is None else model
    net = unverified(model.eval(), mask, example_input=images(1, 64, 96), **options).requires_grad_(False)
    net.normalise_by(images(1, 64, 96))
    fast = net.optimize()
    assert isinstance(fast, OptimizedModel)
    return net, fast


@pytest.mark.parametrize(
    ("name", "mask"),
    covering(
        ["strided", "many operations", "floors"],
        [BUDGET, "edges", "all", "none", "confidence", "levels", "random | budget"],
    ),
)
def test_recorded_calls_give_the_same_and_results_stay(name: str, mask: str, graphs: Graphs) -> None:
    """With floors, too, of which the network's own graph runs where everything is high."""
    model = randomise(ManyOperations()) if name == "many operations" else strided(outputs=4, kernel=3)
    torch.manual_seed(0)
    net, fast = converted(model, **{"coarsest": 32} if name == "floors" else {})
    given: Any
    results = []
    for size in ((64, 96), (64, 96), (96, 64), (64, 96), (96, 64), (64, 96)):
        x = images(1, *size)
        fine, given = tuple(length // net.plan.strides[0] for length in size), mask
        if mask == "levels":
            given = random_levels(1, fine, net.geometry.strides)
        torch.manual_seed(1)
        expected = net(x, mask=given)
        torch.manual_seed(1)
        found = fast(x, mask=given)
        assert torch.equal(fast.levels, net.levels)
        assert fast.active_fraction == net.active_fraction
        results.append((found, expected))
    assert graphs.recorded and graphs.replayed >= graphs.recorded
    for found, expected in results:
        assert_same(found, expected, 1e-4)


def test_nothing_but_the_recording_runs(graphs: Graphs) -> None:
    """Of Python: whatever the depth of the network, as many calls, and none of graphs, layers, maps and masks."""

    def calls(depth: int) -> Counter[str]:
        layers = [part for _ in range(depth) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
        _, fast = converted(nn.Sequential(*strided(), *layers))
        x, graphs.computes = images(1, 64, 96), True
        wanted = [fast(x), fast(x)][1]
        graphs.computes, before = False, graphs.replayed
        found: Counter[str] = Counter()

        def count(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                found[frame.f_code.co_filename] += 1

        sys.setprofile(count)
        try:
            result = fast(x)
        finally:
            sys.setprofile(None)
        assert graphs.replayed == before + 1
        assert torch.equal(result, wanted)
        return found

    shallow, deep = calls(1), calls(9)
    assert shallow == deep
    of_layout = "/cadsurgery/elements/axes.py"  # of the result
    elements = [place for place in deep if "/cadsurgery/elements/" in place and of_layout not in place]
    assert not elements and GRAPH_FILE not in deep
    masks = {place.rpartition("/")[2] for place in deep if "/cadsurgery/masks/" in place}
    assert "filters.py" not in masks and sum(deep.values()) < 1000


def test_a_call_is_recorded_when_its_shape_comes_again(graphs: Graphs) -> None:
    net, fast = converted()
    for at in range(6):
        x = images(1, 64 + 8 * at, 96)
        assert_same(fast(x), net(x), 1e-4)
    assert not graphs.recorded, "shapes that change with each call"
    fast(x)
    assert (graphs.recorded, graphs.replayed) == (1, 1)
    fast(x)
    assert (graphs.recorded, graphs.replayed) == (1, 2)
    fast(torch.cat([x, x]))
    assert graphs.replayed == 2


def test_only_the_recordings_used_last_are_kept(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", 2)
    net, fast = converted()
    one, *others = [images(1, 64 + 8 * at, 96) for at in range(4)]
    fast(one)
    for x in others:
        fast(one)
        for _ in range(2):
            assert_same(fast(x), net(x), 1e-4)
        assert len(fast._recordings) <= 2
    assert graphs.recorded == 4, "the first one was always used last but one"
    for _ in range(3):  # more shapes in turn than are kept: none is recorded in vain
        for x in others:
            fast(x)
    assert graphs.recorded == 4


def test_with_another_mask_images_of_one_bucket_share_a_recording(graphs: Graphs) -> None:
    net, fast = converted(mask="edges")
    levels = [random_levels(2, (8, 12), (2, 2)) for _ in range(2)]
    levels[1] = levels[0].flip(1)  # as many elements
    for at in (0, 1, 0, 1):
        x = images(2, 64, 96)
        assert_same(fast(x, mask=levels[at]), net(x, mask=levels[at]), 1e-4)
        assert torch.equal(fast.levels, net.levels)
    assert graphs.recorded == 2, "the part before the mask, and the rest"


class Probe(MaskProvider):
    """Keeps everything high, after it has called the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Any = None

    def forward(self, image: Tensor, features: Tensor, grid: Any) -> Tensor:
        self.call(image, mask=BUDGET)
        return torch.zeros(grid.batch, *grid.size, dtype=torch.int64)


def test_a_mask_may_call_the_network(graphs: Graphs) -> None:
    net, fast = converted()
    probe, x = Probe(), images(1, 64, 96)
    probe.call = fast
    fast(x)
    for _ in range(4):
        assert_same(fast(x, mask=probe), net(x, mask="all"), 1e-4)
    assert graphs.recorded == 3, "what the mask calls, and the parts before and behind it"


def hook_on(fast: nn.Module, called: list[int]) -> Any:
    inner = next(part for part in fast.modules() if part is not fast and not [*part.children()])
    return inner.register_forward_hook(lambda *_: called.append(1))


def test_hooks_are_called_and_gradients_and_modes_see_a_call(graphs: Graphs) -> None:
    """By a call that is not recorded: hooks on one module and on all, an image that requires a gradient, a mode."""
    _, fast = converted(nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), *strided(outputs=4, kernel=3)))
    x, called = images(1, 64, 96), list[int]()
    expected = [fast(x) for _ in range(3)][-1]
    assert graphs.replayed == 2
    handle = hook_on(fast, called)
    assert_same(fast(x), expected)
    assert called == [1] and graphs.replayed == 2
    handle.remove()
    whole = fast.register_forward_hook(lambda *_: called.append(2))
    assert_same(fast(x), expected)
    assert called == [1, 2] and graphs.replayed == 3, "a hook on the network itself is called anyway"
    whole.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append(3))
    fast(x)
    everywhere.remove()
    assert called.count(3) > 1 and graphs.replayed == 3
    assert not fast(x.requires_grad_()).requires_grad
    x = x.detach()
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() > 0 and graphs.replayed == 3
    with torch.inference_mode():
        assert_same(fast(x), expected)
    with pytest.raises(cs.InvalidInput, match="NaN"):
        fast(torch.full_like(x, torch.nan))
    assert graphs.replayed >= 4 and graphs.recorded == 1


def test_other_weights_modules_and_attributes_of_masks_are_recorded_anew(graphs: Graphs) -> None:
    net, fast = converted()
    x = images(1, 64, 96)

    def same(expected: Tensor | None = None) -> None:
        for _ in range(3):
            assert_same(fast(x), net(x) if expected is None else expected, 1e-4)

    same()
    for value in net.parameters():
        value.mul_(0.9)
    fast.load_state_dict(net.optimize().state_dict())
    same()
    assert graphs.recorded == 2 and len(fast._recordings) == 1
    net.mask.fraction = (0.6,)  # the copy shares it
    same()
    assert graphs.recorded == 3 and len(fast._recordings) == 2
    net.mask = fast.mask = "edges | budget:fraction=0.5"
    same()
    fast.normalisation = net.normalisation = ((0.2,) * 3, (0.4,) * 3)
    same()
    kernels: Any = fast.get_submodule(KERNELS)
    name, layer = next(iter(kernels.named_children()))
    setattr(kernels, name, copy.deepcopy(layer))
    before = graphs.recorded
    same()
    assert graphs.recorded == before + 1
    wide, net = fast.double(), net.double()
    x = x.double()
    for _ in range(3):
        assert_same(wide(x), net(x), 1e-4)


def test_what_cannot_be_recorded_runs_as_it_is(graphs: Graphs) -> None:
    net, fast = converted()
    x, graphs.fails = images(1, 64, 96), True
    for mask in (None, "edges", "all"):
        for _ in range(4):
            assert_same(fast(x, mask=mask), net(x, mask=mask), 1e-4)
    assert not graphs.recorded and not len(fast._recordings)


def test_copies_start_without_recordings(graphs: Graphs) -> None:
    net, fast = converted()
    x = images(1, 64, 96)
    [fast(x) for _ in range(2)]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not len(twin._recordings)
        for _ in range(3):
            assert_same(twin(x), net(x), 1e-4)
    assert graphs.recorded == 3


def test_threads_take_turns(graphs: Graphs) -> None:
    net, fast = converted()
    pictures = [images(1, 64, 96) for _ in range(4)]
    [fast(pictures[0]) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda x: [fast(x) for _ in range(5)], pictures)
    for x, results in zip(pictures, found, strict=True):
        expected = net(x)
        for result in results:
            assert_same(result, expected, 1e-4)


def test_calls_on_the_cpu_are_not_recorded() -> None:
    assert cuda_graphs.recorder_for(torch.device("cpu")) is None
    net, fast = converted()
    x = images(1, 64, 96)
    for _ in range(3):
        assert_same(fast(x), net(x), 1e-4)
    assert not len(fast._recordings)
