"""What a process keeps from call to call does not grow with the sizes, masks and batches it has seen.

`benchmarks/soak.py` shows the same of the resident memory over many minutes.
"""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import pytest
import torch
from conftest import Run, images, random_levels, slow
from networks import ManyOperations, adapted_strided, made_once, randomise
from torch import Tensor

import cadsurgery as cs
from benchmarks import soak
from cadsurgery.elements import functional
from cadsurgery.elements.backends.weights import MOST_FORMS, FusedConv
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.kernels.load import library
from cadsurgery.network import points


@made_once
def adapted(mask: object = "edges") -> cs.AdaptiveModel:
    example = images(1, 64, 96)
    return cs.adaptify(randomise(ManyOperations()), mask, example_input=example, verify_laws=False)


def sizes(count: int) -> list[tuple[int, int, int]]:
    return [(1 + place % 3, 48 + 7 * place, 80 + 5 * (place % 7)) for place in range(count)]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), Tensor) for value in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("optimised", [slow(False), True])
@torch.no_grad()
def test_calls_leave_no_tensors_whatever_their_sizes_and_masks(optimised: bool) -> None:
    net = adapted().optimize() if optimised else adapted()
    masks = ("edges", "all", "none", "edges | budget:fraction=0.4", "random:seed=1")
    x = images(2, 64, 96)

    def several(count: int) -> int:
        for place, size in enumerate(sizes(count)):
            net(images(*size), mask=masks[place % len(masks)])
        net(x)
        return live_tensors()

    first = several(10)
    assert several(25) == first
    forms = [weights.packed_cache for weights in gc.get_objects() if type(weights) is FusedConv]
    assert all(len(kept or ()) <= MOST_FORMS for kept in forms)


@pytest.mark.skipif(library() is None, reason="no C compiler here")
@pytest.mark.parametrize("uniform", [False, True])
@torch.no_grad()
def test_products_keep_nothing_for_a_number_of_elements(uniform: bool) -> None:
    """oneDNN would make code for each number, and keep it: 16 MiB here, without bound to speak of."""
    heap = heap_in_use()
    every = [FusedConv(torch.randn(outputs, 64, 1, 1), None, 1, None, {}) for outputs in (64, 24)]
    geometry, window = Geometry((2,)), Window((1, 1))

    def several(count: int, seed: int) -> None:
        torch.manual_seed(seed)
        for place in range(count):
            size = (32 + 2 * place, 32)
            levels = torch.zeros(1, *size, dtype=torch.int64) if uniform else random_levels(1, size, (2,))
            lattice = geometry.lattice(levels).at(1)
            x = Elements(torch.randn(len(lattice), 64), lattice)
            for weights in every:
                functional.fused_conv2d(x, weights, window=window, stage=1)

    several(MOST_FORMS + 1, 0)
    before = heap()
    several(60, 1)
    assert heap() - before < 2 << 20


def heap_in_use() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    """A function that tells how many bytes are allocated, as glibc knows it: what is free but kept does not count."""
    find = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if find is None:
        pytest.skip("this C library does not tell")
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    find.restype = type(
        "Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in names.split()]}
    )
    return lambda: find().uordblks + find().hblkhd


@torch.no_grad()
def test_points_are_read_at_any_number_of_sizes() -> None:
    net = adapted_strided()
    for batch, height, width in sizes(points.MOST_SIZES + 4):
        x, wanted = images(batch, height, width), [torch.tensor([[3.0, 5.0]])] * batch
        found = cs.read_at(net, x, wanted, reach="receptive")
        again = cs.read_at(net, x, wanted)
        torch.testing.assert_close(torch.cat(found), torch.cat(again), atol=1e-4, rtol=1e-4)
    assert all(len(found.lattice_ids) <= points.MOST_SIZES for found in points._EXITS[net.program].values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it")
def test_the_soak_writes_its_figures(command_line: Run, tmp_path: Path) -> None:
    arguments = ("--calls", 4, "--every", 2, "--size", 32, 64, "--network", "squeezenet1_1")
    done = command_line(*arguments, "--sides", "dense", "optimised", module="benchmarks.soak")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["network"] == "squeezenet1_1" and found["setting"]
    for side in ("dense", "optimised"):
        assert [row["calls"] for row in found["sides"][side]] == [0, 2, 4]
        assert all(row["resident"] > row["heap"] > 0 for row in found["sides"][side])
        assert f"{side:10}" in done.out


@pytest.mark.parametrize(
    ("heaps", "grown"),
    [
        ([10, 100, 150, 150, 149, 151, 150, 150], 0.0),  # filled, then flat
        ([10, 20, 30, 40, 50, 60, 70, 80], 40.0),
        ([150, 150, 150, 150, 100, 100, 100, 100], 0.0),
        ([10, 400], 0.0),  # too few to tell
    ],
)
def test_memory_that_grows_after_the_first_quarter_is_seen(heaps: list[float], grown: float) -> None:
    assert soak.growth([{"heap": heap} for heap in heaps]) == grown
