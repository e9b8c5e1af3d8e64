"""No compiled function reads or writes beyond the buffers that it is given, whatever the numbers of a call are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from cadsurgery.kernels import build, isa
from cadsurgery.kernels.library import find

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

pytestmark = pytest.mark.skipif(find().library is None, reason="there are no compiled kernels")


def fuzz(library: Path, seed: int, calls: int, **environment: str) -> set[str]:
    """Run the calls in a process of its own, and return the functions that were called."""
    command = [sys.executable, str(FUZZ), str(library), str(seed), str(calls)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_calls_that_do_not_fit_are_refused_or_stay_within_their_buffers(seed: int) -> None:
    called = fuzz(build.LIBRARY, seed, 3 if seed == 0 else 12)
    assert all(any(name.startswith(kind) for name in called) for kind in KINDS)


@pytest.mark.slow
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
