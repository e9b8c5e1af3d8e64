"""oneDNN generates code for each shape that it meets. Masks that change from image to image must not make it do so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, covering, thorough

# A film under a threshold, with another number of elements in every image. Prints a line before each image.
FILM = """
import sys

import torch
from networks import build

import cadsurgery as cs

name, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.manual_seed(0)
frames = torch.rand(8, 1, 3, 96, 128)
for k, frame in enumerate(frames):  # first the most and the least detail, so that each backend has served
    frame[..., 16 * (8, 1, 2, 3, 4, 5, 6, 7)[k] :] = 0.5
mask = "edges:threshold=0.5,dilation=3"
net = cs.adaptify(build(name, by=2), mask=mask, output_stride=(8, 32), example_input=frames[0])
fast, kept = net.optimize().to(dtype), set()
with torch.inference_mode():
    for k, frame in enumerate(frames):
        print(f"frame {k}", flush=True)
        fast(frame.to(dtype))
        kept.add(fast.active_fraction)
print("end", len(kept), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    covering(
        [("resnet18", "1"), thorough(("mobilenet_v2", "1")), thorough(("resnet18", "0"))],
        ["float32", thorough("bfloat16")],
        few=0,
    ),
    ids=str,
)
def test_a_film_makes_no_code(case: tuple[str, str], dtype: str) -> None:
    """From the third image on. (Without kernels grouped convolutions are torch's, for which this does not hold.)"""
    name, kernels = case
    environment = {**os.environ, "CADSURGERY_NATIVE": kernels, "ONEDNN_VERBOSE": "profile_create"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", FILM, name, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, _, after = done.stdout.partition("frame 2\n")
    assert "create:cache_miss" in before, "oneDNN does not say what it makes"
    made = [line for line in after.splitlines() if "create:cache_miss" in line]
    assert not made, "\n".join(made[:5])
    assert int(after.splitlines()[-1].removeprefix("end ")) >= 6  # numbers of elements
