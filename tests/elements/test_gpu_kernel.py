"""The Triton convolution: its laws in Triton's interpreter and on a GPU, its reversed map, its refusals, and what a
whole network asks of a GPU.

Triton decides at import whether it interprets, so the laws run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ManyOperations, randomise, strided
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.elements import sizes
from cadsurgery.elements.backends import gpu, gpu_maps, triton_kernels
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.support import device_checks
from cadsurgery.support.running import Running

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not triton_kernels.INSTALLED, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and gpu.available(torch.device("cuda"))),
    reason="no CUDA device from Ampere on",
)


@needs_triton
@pytest.mark.parametrize(
    ("interpreted", "which"),
    [
        pytest.param("1", "slow or not slow", id="interpreter", marks=pytest.mark.slow),
        pytest.param("0", "", id="GPU", marks=needs_gpu),
    ],
)
def test_the_laws_hold(interpreted: str, which: str) -> None:
    if "CADSURGERY_FEW" in os.environ:
        which = "not slow"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": interpreted, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/elements/gpu_kernel_laws.py",
        "--noconftest",
        "--durations=5",
    ]
    done = subprocess.run(
        [*command, "-m", which, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout)


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    rows, taps, count = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    entries = draw(st.lists(st.integers(-1, rows - 1), min_size=count * taps, max_size=count * taps))
    return torch.tensor(entries, dtype=torch.int32).view(count, taps), rows


@settings(max_examples=100, deadline=None)
@given(tables())
def test_a_reversed_map_lists_every_reader_of_a_row_once(drawn: tuple[torch.Tensor, int]) -> None:
    table, rows = drawn
    reverse = gpu.reverse_map(table, rows)
    ranges = pairwise([*reverse.offsets.tolist(), len(reverse.extras)])
    listed = {row: [row] for row in range(rows)}
    for owner, (start, end) in zip(reverse.owners.tolist(), ranges, strict=True):
        listed[owner] += reverse.extras[start:end].tolist()
    assert sorted(chain(*listed.values())) == list(range(len(reverse.table)))
    found = Counter(
        (int(output), tap, row)
        for row, places in listed.items()
        for place in places
        for tap, output in enumerate(reverse.table[place])
        if output >= 0
    )
    expected = Counter(
        (output, tap, int(row))
        for output, taps in enumerate(table)
        for tap, row in enumerate(taps)
        if row >= 0
    )
    assert found == expected


class _Launched:
    """Stands in for a kernel: it is launched, and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Copies(TorchDispatchMode):
    """Lists operations that copy from the CPU to the GPU, which wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = [
            {x.device.type for x in tree_leaves(part) if isinstance(x, torch.Tensor)}
            for part in (args, result)
        ]
        if "cpu" in devices[0] and "cuda" in devices[1]:
            self.found.append(str(function))
        return result


def _on_a_gpu_that_is_not_there(fast: torch.nn.Module) -> None:
    """Replace the weights of an optimised copy by weights on a GPU that have shapes and no values."""
    for module in fast.modules():
        if isinstance(module, PackedConv):
            module._packed = None
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    there = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device="cuda:0"
                    )
                    tensors[name] = (
                        torch.nn.Parameter(there) if isinstance(value, torch.nn.Parameter) else there
                    )


# Networks that may ask a GPU for values; each of the others has an operation that the ones before have not.
ASKED_OF_TOYS: dict[str, Callable[[], torch.nn.Module]] = {
    "strided": lambda: strided(outputs=4, kernel=3),
    "many operations": lambda: randomise(ManyOperations()),
    "floors": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()),
        *(
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(8, 4, 3, 1, 1),
        ),
    ),
}
_LARGER = (
    *("fcn_resnet50", "lraspp_mobilenet_v3_large", "densenet121", "regnet_y_400mf", "convnext_tiny"),
    *("shufflenet_v2_x0_5", "googlenet", "hrnet_w18_small", "ghostnet_100", "skresnet18"),
)
ASKED = [*ASKED_OF_TOYS, *(pytest.param(name, marks=pytest.mark.slow) for name in _LARGER)]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("name", "mask"), covering([*ASKED], ["edges | budget:fraction=0.4", "all"]))
def test_a_call_under_a_budget_asks_the_gpu_for_nothing(
    name: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes on a GPU that is not there: any value that Python asks for is an error, and so are tensors on the CPU in
    the second call. Only the checks of the image's values, which a recording leaves out, would wait."""
    make = ASKED_OF_TOYS.get(name, lambda: cs.build_model(name, weights="none"))
    example = torch.randn(1, 3, 128, 160)
    options = {"coarsest": 32} if name == "floors" else {}
    net = cs.adaptify(make().eval(), "edges", example_input=example, verify_laws=False, **options)
    fast = net.optimize()
    smooth = torch.nn.functional.avg_pool2d(example, 9, 1, 4)
    fast(smooth)  # the first picture decides about the normalisation
    monkeypatch.setattr(gpu_maps, "available", lambda device: device.type == "cuda")
    monkeypatch.setattr(gpu, "available", gpu_maps.available)
    monkeypatch.setattr(Running, "is_observed", False)
    for name, value in vars(triton_kernels).items():
        if hasattr(value, "arg_names"):
            monkeypatch.setattr(triton_kernels, name, _Launched())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(device_checks, "is_capturing", lambda device: True)
    copies = _Copies()
    with FakeTensorMode(), torch.inference_mode():
        sizes._on_gpu.cache_clear()
        _on_a_gpu_that_is_not_there(fast)
        x = torch.empty(2, 3, 128, 160, device="cuda:0")
        fast(x, mask=mask)
        with copies:
            out = fast(x, mask=mask)
    sizes._on_gpu.cache_clear()
    assert not copies.found
    assert tree_leaves(out)[0].device.type == "cuda"
