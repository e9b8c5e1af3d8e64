"""Say where the time of an export goes: CPU seconds of each step, and the largest memory of the process.

    python -m benchmarks.export_time NETWORK HEIGHTxWIDTH FORM [--mask MASK] [--twice]

NETWORK is a name that `cadsurgery convert` takes, with random weights. FORM is static, dynamic, level_map or int8 (a
static file, calibrated by 8 random pictures). Seconds are CPU time of this process (`time.process_time`), so
that other programs on the machine disturb them little, in one thread of torch; a step does not contain the steps below
it that have a line of their own. `benchmarks.networks` has networks of the kinds that took longest, and the same with
twice the blocks: context_guided, factorised and unet, each also with _twice.
`--twice` exports the network of that name with _twice, too, and prints how many times as long that takes; twice the
blocks should take at most 2.3 times the time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cadsurgery as cs
from cadsurgery.tasks.open import example_batch, open_converted

FORMS: dict[str, dict[str, bool]] = {
    "static": {},
    "dynamic": {"dynamic": True},
    "level_map": {"level_map": True},
    "int8": {},
}
# Functions that stand for a step: module, name in it, words of the report.
STEPS = (
    ("cadsurgery.network.model", "AdaptiveModel.forward", "network in torch"),
    ("cadsurgery.network.model", "AdaptiveModel.optimize", "choice of forms"),
    ("torch.export", "export", "torch.export"),
    ("torch.onnx._internal.exporter._fx_passes", "decompose_with_registry", "decomposition"),
    ("torch.onnx._internal.exporter._fx_passes", "insert_type_promotion_nodes", "promotion of types"),
    ("torch.onnx._internal.exporter._registration", "ONNXRegistry.from_torchlib", "table of translations"),
    ("torch.onnx._internal.exporter._core", "_exported_program_to_onnx_program", "translation to ONNX"),
    ("cadsurgery.network.export.onnx", "tidy", "optimiser: others"),
    ("onnxscript.optimizer", "fold_constants_ir", "optimiser: constants"),
    ("torch.onnx", "ONNXProgram.save", "writing"),
    ("onnx.checker", "check_model", "checker and shapes"),
    ("cadsurgery.network.export.engines", "OnnxRuntime._open", "engine: opening"),
    ("cadsurgery.network.export.engines", "OnnxRuntime._run", "engine: running"),
    ("cadsurgery.network.export.int8", "quantise", "8 bits: others"),
    ("cadsurgery.network.export.in_bytes", "round_weight", "8 bits: weights"),
    ("cadsurgery.network.export.int8", "_reduce", "8 bits: means and ranges"),
)


class Clock:
    """CPU and wall seconds by step, without those of the steps called inside."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._steps = ["rest"]
        self._cpu, self._now = time.process_time(), time.perf_counter()

    @contextmanager
    def inside(self, step: str) -> Iterator[None]:
        """Count the time of a block for a step."""
        self.turn()
        self._steps.append(step)
        self.calls[step] += 1
        try:
            yield
        finally:
            self.turn()
            self._steps.pop()

    def turn(self) -> None:
        """Count the time since the last turn for the current step."""
        cpu, now = time.process_time(), time.perf_counter()
        self.seconds[self._steps[-1]] += cpu - self._cpu
        self.wall[self._steps[-1]] += now - self._now
        self._cpu, self._now = cpu, now

    def timed(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        """Return a function that counts its time."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.inside(step):
                return function(*arguments, **options)

        return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the functions of `STEPS` in the block."""
    with ExitStack() as stack:
        for module, name, step in STEPS:
            *owners, attribute = name.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            own, is_for_class = getattr(owner, attribute), isinstance(vars(owner)[attribute], classmethod)
            timed: Any = clock.timed(own.__func__ if is_for_class else own, step)
            stack.enter_context(
                mock.patch.object(owner, attribute, classmethod(timed) if is_for_class else timed)
            )
        yield


def main() -> None:
    """Export a network, and perhaps the one with twice its blocks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("size")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--mask", default="detail | budget:fraction=0.3")
    parser.add_argument("--twice", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # waiting threads would count
    seconds = export_and_report(options.network, options)
    if options.twice:
        ratio = export_and_report(f"{options.network}_twice", options) / seconds
        print(f"twice the blocks take {ratio:.2f} times the time")


def export_and_report(name: str, options: argparse.Namespace) -> float:
    """Export a network, print a line for each step, and return the CPU seconds of all."""
    torch.manual_seed(0)
    net = open_converted(name, options.mask).eval()
    height, width = map(int, options.size.split("x"))
    image = example_batch(net.source, None, (height, width), 0)
    shown: dict[str, Any] = {}
    if options.form == "int8":
        shown = {"precision": "int8", "calibration": [torch.rand_like(image) for _ in range(8)]}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, watched(clock):
        report = cs.export(net, image, Path(folder) / "net.onnx", **shown, **FORMS[options.form])
        clock.turn()
    for step, seconds in clock.seconds.most_common():
        print(f"{step:28} {clock.calls[step]:4} calls {seconds:8.1f} s CPU {clock.wall[step]:8.1f} s wall")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name} {options.size} {options.form}: {clock.seconds.total():.1f} s CPU, "
        f"{clock.wall.total():.1f} s wall, {memory:.0f} MiB at most, {report.bytes / 2**20:.1f} MiB, "
        f"difference {report.difference:.0e}"
    )
    return clock.seconds.total()


if __name__ == "__main__":
    main()
