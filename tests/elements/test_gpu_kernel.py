"""The Triton convolution: its laws in Triton's interpreter and on a GPU, its reversed map, its refusals.

Triton decides at import whether it interprets, so the laws run in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadsurgery.elements.backends import gpu, triton_kernels

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
        pytest.param("1", "not slow", id="interpreter"),
        pytest.param("1", "slow", id="interpreter, the others", marks=pytest.mark.slow),
        pytest.param("0", "", id="GPU", marks=needs_gpu),
    ],
)
def test_the_laws_hold(interpreted: str, which: str) -> None:
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


@needs_triton
@pytest.mark.slow
def test_the_benchmark_runs_whole_without_a_gpu(tmp_path: Path) -> None:
    """In the interpreter, with a tiny network: what it prints then means nothing, but a minute of a GPU is dear."""
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    blocks = [(nn.Conv2d(3 if at == 0 else 8, 8, 3, 2, 1), nn.ReLU()) for at in range(5)]\n"
        "    return nn.Sequential(*(part for block in blocks for part in block))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    sizes = "--channels 8 --count 40 --batches 1 --training-batch 1 --size 128 128 --rounds 1 --no-compile"
    command = [sys.executable, "benchmarks/gpu_speed.py", "--device", "cpu", "--model", "tiny:net"]
    lines = tmp_path / "lines.jsonl"
    command += [*sizes.split(), "--json", str(lines)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {line.get("part") for line in found} == {
        None,
        "kernels",
        "maps",
        "networks",
        "training",
        "profile",
        "tiles",
    }
    assert not any("failed" in line for line in found)


@needs_triton
@pytest.mark.skipif(triton_kernels.INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", ["product", "depthwise", "product_weight", "depthwise_weight"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: products use the tensor cores, and their loads are asynchronous, with a buffer for every stage."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    kernel = getattr(triton_kernels, name)
    config = kernel.configs[-1]
    sizes = {"C": 256, "C_OUT": 256, "TAPS": 9, "ACTIVATION": "gelu", "SLOPE": 0.0, "PRECISION": "ieee"}
    constants: dict[str, Any] = {**sizes, **config.kwargs}
    types = {"count": "i32", "bucket": "i32", "length": "i32", "table": "*i32", "partial": "*fp32"}
    names = kernel.arg_names
    source = ASTSource(
        kernel.fn,
        signature={key: "constexpr" if key in constants else types.get(key, "*bf16") for key in names},
        constexprs={(names.index(key),): value for key, value in constants.items() if key in names},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, key in enumerate(names)
            if types.get(key, "*")[0] == "*" and key not in constants
        },
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if name.startswith("product"):
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"]
    if name.startswith("product") and capability == 90:
        wide, high, depth = sorted(config.kwargs.values(), reverse=True)
        assert compiled.metadata.shared >= 2 * (wide + high) * depth * config.num_stages


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


def test_what_it_refuses() -> None:
    rows, table = torch.zeros(4, 6), torch.zeros(5, 9, dtype=torch.int32)
    weight = torch.zeros(8, 54)
    with pytest.raises(ValueError, match="2 groups of 6 channels"):
        gpu.gather_conv(rows, weight, table, groups=2)
    with pytest.raises(ValueError, match=r"weight is \(8, 54\) where \(8, 48\)"):
        gpu.gather_conv(rows, weight, table[:, :8])
    with pytest.raises(ValueError, match=r"residual is \(4, 8\) where \(5, 8\)"):
        gpu.gather_conv(rows, weight, table, residual=torch.zeros(4, 8))


def test_what_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda device: True)
    rows, weight = torch.zeros(4, 6), torch.zeros(6, 9)
    assert gpu.supports(rows, weight) and gpu.supports(rows, weight, groups=6)
    assert gpu.supports(rows.bfloat16(), weight.bfloat16())
    assert not gpu.supports(rows, weight, groups=2)
    assert not gpu.supports(rows, torch.zeros(12, 9), groups=6)
    assert not gpu.supports(rows.double(), weight.double())
    assert not gpu.supports(rows, weight.half())


def test_without_triton_it_imports_and_is_not_available() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from cadsurgery.elements.backends import gpu\n"
        "print([gpu.available(torch.device(name)) for name in ('cpu', 'cuda')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[False, False]\n"
