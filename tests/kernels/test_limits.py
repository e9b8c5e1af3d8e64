"""No compiled function reads or writes beyond the buffers that it is given, whatever the numbers of a call are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, thorough
from torch import Tensor

from cadsurgery.kernels import build, dispatch, isa
from cadsurgery.kernels.load import open_kernels
from cadsurgery.kernels.packing import pack
from cadsurgery.support.errors import CadError

SECONDS = 590
FUZZ = Path(__file__).parent / "fuzz.py"
KINDS = (
    "product",
    "grouped",
    "convolve",
    "gather_mixing",
    "fill",
    "pool",
    "shift_taps",
    "invert",
    "pack_product",
)

pytestmark = pytest.mark.skipif(open_kernels().library is None, reason="there are no compiled kernels")


def fuzz(library: Path, seed: int, calls: int, **environment: str) -> set[str]:
    """Run the calls in a process of its own, and return the functions that were called."""
    command = [sys.executable, str(FUZZ), str(library), str(seed), str(calls)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, thorough(1)])
def test_calls_that_do_not_fit_are_refused_or_stay_within_their_buffers(seed: int) -> None:
    called = fuzz(build.LIBRARY, seed, 1 if seed == 0 else 12)
    assert all(any(name.startswith(kind) for name in called) for kind in KINDS)


@pytest.mark.thorough
def test_the_same_holds_for_what_the_functions_keep_on_their_stacks(tmp_path: Path) -> None:
    """By the compiler's address sanitiser, for the narrowest and the widest vectors of this processor."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    place = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not Path(place.strip()).is_absolute():
        pytest.skip("the compiler has no address sanitiser")
    here = [one for one in build.instruction_sets() if one.name in isa.here()]
    vectors = [one for one in here if one.name in ("scalar", "avx2", "neon")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.INSTRUCTION_SETS, build.architecture(), tuple(vectors))
        build.build([*compiler, "-fsanitize=address"], tmp_path / "kernels.so")
    options = "detect_leaks=0:verify_asan_link_order=0"
    called = fuzz(tmp_path / "kernels.so", 2, 5, LD_PRELOAD=place.strip(), ASAN_OPTIONS=options)
    assert all(any(name.startswith(kind) for name in called) for kind in KINDS)


def ints(*numbers: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def mixing() -> tuple[str, list[object], list[object]]:
    """Weighted sums of two of three rows, five times: a kernel of a reading, with buffers of its own."""
    table = torch.zeros(5, 2, dtype=torch.int32)
    reading = [torch.rand(3, 7), None, torch.zeros(7), table, 3, 5, 2, 7, 7]
    return "mix", reading, [torch.rand(5, 2), torch.empty(5, 7)]


def finding() -> tuple[str, list[object], list[object]]:
    """The cells of two level maps of 3 x 5 pixels: a kernel of a structure alone, which counts."""
    levels = torch.zeros(2, 3, 5, dtype=torch.int8)
    found = [torch.empty(30, dtype=torch.int64), torch.empty(30, dtype=torch.int32), ints(0, 0)]
    return "find_cells", [levels, ints(1), *found, 2, 3, 5], []


@pytest.mark.parametrize(("make", "whole"), [(mixing, 0), (finding, 30)])
def test_the_first_buffer_that_holds_too_little_is_named(make: Callable[[], Any], whole: int) -> None:
    name, values, arguments = make()
    kernel = dispatch.function(name, "float32" if arguments else "")
    assert dispatch.call(kernel, values, *arguments) == whole
    buffers = [one for one in (*values, *arguments) if one is None or isinstance(one, Tensor)]
    checked = 0
    for place, buffer in enumerate(buffers):
        if buffer is None or (name == "find_cells" and place == 1):  # the sides may be fewer than the levels
            continue
        given = [buffer.flatten()[:-1] if one is buffer else one for one in (*values, *arguments)]
        with pytest.raises(CadError, match=f"{name}.* too little memory as its buffer {place}"):
            dispatch.call(kernel, given[: len(values)], *given[len(values) :])
        checked += 1
    assert checked >= 4


def test_the_buffers_of_an_array_and_their_place_are_compared_too() -> None:
    form = f"product_float32_{dispatch.isa_of('product', 'float32')}"
    weight, bias = torch.rand(6, 5, 3, 3), torch.rand(6)
    assert len(pack(form, weight, 1, bias)) == 2
    with pytest.raises(CadError, match=f"pack_{form} is given numbers that cannot be"):
        pack(form, weight, 1, bias[:-1])
    name, values, arguments = mixing()
    with pytest.raises(CadError, match="a tensor on meta"):
        dispatch.call(
            dispatch.function(name, "float32"), values, *arguments[:-1], torch.empty(5, 7, device="meta")
        )
