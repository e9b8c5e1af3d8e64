"""Memory: what bands and masks take, what a process keeps from call to call, and what is said where it ends."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, covering, images, random_levels, slow, some
from networks import ManyOperations, adapted_strided, made_once, randomise, strided, unverified
from PIL import Image
from torch import Tensor, nn

import cadsurgery as cs
from benchmarks import soak
from cadsurgery.data import images as pictures
from cadsurgery.elements import functional
from cadsurgery.elements.backends.weights import MOST_FORMS, FusedConv
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.kernels.load import library
from cadsurgery.network import points

# Bytes a pixel of the picture beside the memory: level maps, and what masks that judge the whole picture make of it.
NEEDS = {
    "all": 3,
    "none": 3,
    "random": 8,
    "content": 3,
    "edges": 3,
    "gradient:sigma=1": 3,
    "content + edges": 3,
    "edges | budget:fraction=0.3": 50,
    "detail": 3,
}
MEMORY = {"detail": 640}  # MiB, with what the mask takes of the whole picture; of others 64
PROGRAM = """
import sys, threading, time, warnings
import torch
from torch import nn
import cadsurgery as cs

warnings.simplefilter("ignore")
torch.set_num_threads(1)
mask, kind, how, memory = sys.argv[1:]
up = nn.Upsample(scale_factor=4, mode=how)
if how == "transposed":
    up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))
layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1)]
floors = {"coarsest": 8} if kind == "floors" else {}
given = {"verify_laws": False, "normalisation": "none", "example_input": torch.rand(1, 3, 64, 64)}
net = cs.adaptify(nn.Sequential(*layers, nn.ReLU(), up).eval(), mask, **given, **floors)
fast = net.optimize(memory=f"{memory}MiB")
picture = torch.zeros(3, 1600, 4000)
picture[:, 300:700, 500:1500] = torch.rand(3, 400, 1000)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
list(fast.rows(picture[:, :256, :512]))
peaks, is_done = [resident()], threading.Event()


def watch():
    while not is_done.wait(0.002):
        peaks.append(resident())


watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
for _ in fast.rows(picture):
    pass
is_done.set()
watcher.join()
print(max(peaks) - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("mask", "kind", "how"),
    covering(some(NEEDS), ["floors", "strides"], ["nearest", "bilinear", "transposed"], few=0),
    ids=str,
)
def test_bands_take_the_memory_that_was_asked_for(mask: str, kind: str, how: str) -> None:
    """The allocator keeps no large blocks here, which belong to no map."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    memory = MEMORY.get(mask, 64)
    command = [sys.executable, "-c", PROGRAM, mask, kind, how, str(memory)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    row_of_results, picture = 24, 1600 * 4000
    assert float(told.stdout) <= 1.1 * memory + row_of_results + NEEDS[mask] * picture / 2**20


# -- what the mask takes ---------------------------------------------------------------------------


LOCAL = ["edges", "content", "edges | dilate:size=5", "edges | budget:fraction=0.3", "content + edges"]
WHOLE = ["random:seed=1", "detail", "detail | budget:fraction=0.3", "edges | smooth"]
SIZE = (512, 640)


def network(mask: str, **options: Any) -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Upsample(scale_factor=4)]
    example = torch.rand(1, 3, 64, 64)
    options = {"normalisation": "imagenet", **options}
    return cs.adaptify(nn.Sequential(*layers).eval(), mask, coarsest=16, example_input=example, **options)


@pytest.mark.parametrize("mask", some(WHOLE))
def test_a_mask_that_sees_all_at_once_needs_memory_for_it(mask: str) -> None:
    net, image = network(mask), torch.rand(1, 3, *SIZE)
    for call in (
        lambda fast: fast(image),
        lambda fast: fast.plan_memory(image),
        lambda fast: fast.rows(image[0]),
    ):
        with pytest.raises(cs.InvalidInput, match=r"are too little for this picture") as refusal:
            call(net.optimize(memory="256KiB"))
        assert "mask" in refusal.value.why and "edges or content" in refusal.value.next
    least = refusal.value.next.split('"')[1]
    walks = net.optimize(memory=least).plan_memory(image)
    assert walks.mask > 0 and "the mask takes" in str(walks)


@pytest.mark.parametrize("mask", [*some(LOCAL), "all"])
def test_a_mask_in_bands_takes_level_maps_only_and_a_uniform_one_none(mask: str) -> None:
    net, image = network(mask), torch.rand(1, 3, *SIZE)
    walks = net.optimize(memory="4MiB").plan_memory(image)
    assert walks.mask <= (0 if mask == "all" else 3 * SIZE[0] * SIZE[1])
    assert ("mask" in str(walks)) == (mask != "all")


# -- where memory ends -----------------------------------------------------------------------------


ENDS = [
    MemoryError("Unable to allocate 732. MiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 478560960 bytes."),
]


@pytest.mark.parametrize("error", ENDS, ids=["Python", "torch"])
def test_a_call_without_memory_names_bands(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    net = unverified(strided(3, outputs=2).eval(), "none")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(net), "answer", fail)
    with pytest.raises(cs.InvalidInput, match="not enough memory for an image of 64 x 96") as refusal:
        net(torch.rand(1, 3, 64, 96))
    assert "optimize(memory=" in refusal.value.next


@pytest.mark.parametrize("error", ENDS, ids=["Python", "torch"])
def test_a_picture_that_is_read_without_memory_names_rows(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pictures.Image, "open", fail)
    with pytest.raises(cs.FileError, match="not enough memory to read") as refusal:
        pictures.read_image(path)
    assert "--memory" in refusal.value.next


# -- what a process keeps does not grow; `benchmarks/soak.py` shows it over many minutes -----------


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
