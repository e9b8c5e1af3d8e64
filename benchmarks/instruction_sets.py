"""`cadsurgery bench` with capped instruction sets, each network with each set in a process of its own.

    python -m benchmarks.instruction_sets avx2,avx512 REPORT.json --model resnet50 --model mobilenet_v2 --fill linear

What follows the file are options of `cadsurgery bench`. The report is that of `bench --json` with the networks of all
sets, and in `caps` what the libraries used; `benchmarks/speed_report.py` makes a table of each set.

The caps of torch, oneDNN and MKL are set together with ours before the process starts, because libraries read them
when they load. OpenVINO obeys oneDNN's cap: in OpenVINO 2026, with AVX2, its convolutions are `brgconv_avx2` and its
fused loops `jit_avx2`, and int8 convolutions take twice the time without VNNI. ONNX Runtime cannot be capped: its
times are the same with every cap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cadsurgery.kernels import isa
from cadsurgery.support.processor import processor_in_words

# For each of our names, the values of ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS. MKL
# multiplies float32 matrices for torch, and ignores the other variables.
_LIBRARIES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_CAPS = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "sse4": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avxvnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}


def environment_of(cap: str) -> dict[str, str]:
    """Return the variables that cap this package, torch, oneDNN and MKL; on processors other than x86 only ours."""
    return {isa.VARIABLE: cap, **dict(zip(_LIBRARIES, _CAPS.get(cap, ()), strict=False))}


def run(cap: str, options: list[str]) -> dict[str, Any]:
    """Run `cadsurgery bench` in a process that is capped, and return its report."""
    command = [sys.executable, "-m", "cadsurgery.cli", "bench", *options, "--json"]
    environment = {**os.environ, **environment_of(cap)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def join(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Combine the reports of all instruction sets."""
    first = next(iter(reports.values()))
    caps = {cap: report["instruction_sets"] for cap, report in reports.items()}
    networks = [{**network, "isa": cap} for cap, report in reports.items() for network in report["networks"]]
    common = {key: value for key, value in first.items() if key != "instruction_sets"}
    return {
        **common,
        "device": processor_in_words(),
        "caps": caps,
        "networks": networks,
    }


def main() -> None:
    """Measure with each instruction set, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("caps", help=f"of this processor: {', '.join(isa.here())}")
    parser.add_argument("output", type=Path)
    arguments, options = parser.parse_known_args()
    caps = arguments.caps.split(",")
    if lacking := [cap for cap in caps if cap not in isa.here()]:
        parser.error(f"this processor has {', '.join(isa.here())}, not {', '.join(lacking)}")
    reports = {cap: run(cap, options) for cap in caps}
    arguments.output.write_text(json.dumps(join(reports)) + "\n")


if __name__ == "__main__":
    main()
