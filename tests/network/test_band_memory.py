"""Bands take no more memory than was asked for, beside rows of the result and what the mask itself needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import covering, some

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
