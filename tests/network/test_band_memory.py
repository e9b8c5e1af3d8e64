"""Bands take no more memory than was asked for, beside rows of the result and what the mask itself needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import covering, some
from networks import strided, unverified
from PIL import Image
from torch import nn

import cadsurgery as cs
from cadsurgery.data import images

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

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(cs.FileError, match="not enough memory to read") as refusal:
        images.read_image(path)
    assert "--memory" in refusal.value.next
