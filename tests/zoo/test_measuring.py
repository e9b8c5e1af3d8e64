"""Scripts that measure `bench` further: the peak of memory, and capped instruction sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run

from benchmarks import memory
from benchmarks.instruction_sets import _LIBRARIES, environment_of
from cadsurgery.kernels import build, isa

pytestmark = pytest.mark.skipif(not (memory.PROCESS / "status").exists(), reason="Linux tells peaks")


def test_a_peak_is_what_one_call_adds() -> None:
    ballast = torch.ones(2**24)  # 64 MiB; freed before, it must not hide what the call takes
    del ballast
    raised = memory.peak_raised_by(lambda: torch.ones(2**23))
    assert 30 < raised < 40


@pytest.mark.skipif(build.architecture() != "x86-64", reason="names of x86-64")
def test_torch_onednn_and_mkl_are_capped_alike() -> None:
    told = {cap: environment_of(cap) for cap in isa.ISAS}
    assert all(
        one["CADSURGERY_ISA"] == cap and one.keys() == {isa.VARIABLE, *_LIBRARIES}
        for cap, one in told.items()
    )
    assert told["avx2"]["ATEN_CPU_CAPABILITY"] == "avx2" and told["avx2"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert told["avx512vnni"]["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_VNNI"
    assert told["scalar"]["ATEN_CPU_CAPABILITY"] == "default"


@pytest.mark.slow
def test_the_memory_of_each_side_is_in_the_report(command_line: Run, tmp_path: Path) -> None:
    options = ("--fractions", "0.5", "--threads", 1, "--size", 128, 192, "--mask", "none")
    command_line("resnet18", *options, "--output", "memory.json", module="benchmarks.memory")
    (network,) = json.loads((tmp_path / "memory.json").read_text())["networks"]
    high, low, (row,) = network["dense_high"], network["dense_low"], network["rows"]
    assert high["memory_mib"] > low["memory_mib"] > 0
    assert row["memory_ratio"] == pytest.approx(row["memory_mib"] / high["memory_mib"])
