"""`bench` with capped instruction sets: for each of them, a network is measured in a separate process.

The caps of torch, oneDNN and MKL are set together with ours before the process starts, because libraries read them
when they load. OpenVINO obeys oneDNN's cap: in OpenVINO 2026, with AVX2, its convolutions are `brgconv_avx2` and its
fused loops `jit_avx2`, and int8 convolutions take twice the time without VNNI. ONNX Runtime cannot be capped: its
times are the same with every cap.
"""

from __future__ import annotations

import ast
import json
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cadsurgery.elements.backends import costs
from cadsurgery.kernels import isa
from cadsurgery.kernels.library import find
from cadsurgery.support.alone import run_alone
from cadsurgery.support.errors import CadError, InvalidInput, UnknownName
from cadsurgery.support.processor import processor_in_words
from cadsurgery.tasks.bench_report import BenchReport
from cadsurgery.tasks.options import Benchmark

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
_ENGINES = {
    "onnx": "ONNX Runtime runs with all instruction sets of the processor: it cannot be capped.",
}


def environment_of(cap: str) -> dict[str, str]:
    """Return the variables that cap this package, torch, oneDNN and MKL; on processors other than x86 only ours."""
    return {isa.VARIABLE: cap, **dict(zip(_LIBRARIES, _CAPS.get(cap, ()), strict=False))}


def read_caps(caps: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of instruction sets, each once, in order; from a sequence or a comma-separated text."""
    listed = caps.split(",") if isinstance(caps, str) else caps
    return tuple(dict.fromkeys(cap.strip() for cap in listed if cap.strip()))


def check_caps(caps: Sequence[str], networks: Sequence[object], mask: object, setup: Benchmark) -> None:
    """Refuse instruction sets that cannot be measured here, and networks that another process cannot build.

    Raises:
        UnknownName: there is no such instruction set.
        InvalidInput: the processor lacks it, or a network or the mask is given without a name.
    """
    if not caps:
        return
    for cap in caps:
        if cap not in isa.ISAS:
            raise UnknownName("instruction set", cap, isa.ISAS)
    had = isa.here()
    if not had:
        raise InvalidInput(
            "there are no compiled kernels here whose instruction set could be capped.",
            why=f"{find().origin}.",
            next="leave isa out, or install a C compiler.",
        )
    if lacking := [cap for cap in caps if cap not in had]:
        raise InvalidInput(
            f"this processor does not have the instruction set {lacking[0]}.",
            why=f"{processor_in_words()} has {', '.join(had)}.",
            next=f"give some of these: isa={','.join(had)}.",
        )
    if setup.device != "cpu":
        raise InvalidInput(
            f"instruction sets are those of the CPU, and the device is {setup.device}.",
            next="leave isa out, or give device cpu.",
        )
    refusal = "a network or mask without a name cannot be measured with an instruction set."
    need_names(refusal, [*networks, mask])


def need_names(refusal: str, things: Sequence[object]) -> None:
    """Refuse networks and masks that another process cannot build.

    Raises:
        InvalidInput: one of them is no name.
    """
    if not all(isinstance(thing, str) for thing in things):
        raise InvalidInput(
            refusal,
            why="each runs in a process of its own, which builds it anew.",
            next='give names, e.g. "resnet50" or "module:function", and a mask such as "edges".',
        )


def bench_capped(cap: str, setup: Benchmark, **arguments: Any) -> BenchReport:
    """Run `bench` in a process that is capped to an instruction set, and return its report.

    Args:
        cap: name of the instruction set.
        setup: conditions of the measurement.
        arguments: the other arguments of `bench`, by name: plain values.

    Raises:
        CadError: as in `bench`; or the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report"
        options = {**vars(setup), "isa": ""}
        printed = run_alone(
            __name__,
            write_report.__name__,
            repr({"path": str(path), "bench": {**options, **arguments}}),
            environment_of(cap),
            task=f"measure with {cap}",
            next="run it without isa to see the whole error.",
        )
        if error := json.loads(printed):
            raise CadError.from_dict(error)
        report: BenchReport = pickle.loads(path.read_bytes())
    return report


def write_report(task: str) -> None:
    """Run `bench` in this process and write its report to a file; print its error as JSON, or null."""
    from cadsurgery.tasks.bench import bench  # imported here, because that module imports this one

    instructions = ast.literal_eval(task)
    arguments = instructions["bench"]
    if arguments["output"] is not None:
        arguments["output"] = Path(arguments["output"])
    try:
        Path(instructions["path"]).write_bytes(pickle.dumps(bench(**arguments)))
        print("null")
    except CadError as error:
        print(json.dumps(error.to_dict()))


def joined(reports: Sequence[tuple[str, BenchReport]], setup: Benchmark) -> BenchReport:
    """Combine the reports of all instruction sets; the runs of each network stay together."""
    first = reports[0][1].setting
    setting = replace(first, device=processor_in_words(), instruction_sets={})
    caps = {cap: report.setting.instruction_sets for cap, report in reports}
    # Keys of costs contain the instruction set, so they do not collide.
    kinds = {key: cost for _, report in reports for key, cost in report.costs["kinds"].items()}
    engines = {
        setup.runtime,
        *("onnx" if name == "onnxruntime" else name for name in setup.against.split(",")),
    }
    return BenchReport(
        setting,
        tuple(network for _, report in reports for network in report.networks),
        costs.as_record(kinds),
        caps,
        tuple(note for engine, note in _ENGINES.items() if engine in engines),
    )
