"""Calls of dense networks and of networks under masks, as copies in torch or as files in another engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from cadsurgery.data.images import resized
from cadsurgery.masks import MaskProvider
from cadsurgery.methods.side import Side
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export import INT8, export
from cadsurgery.network.export.engine import Engine
from cadsurgery.network.export.engines import ENGINES, options_for
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.macs import MacReport
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.defaults import KERNELS
from cadsurgery.support.files import make_folder
from cadsurgery.support.memory import in_mebibytes
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.tasks.sides.dense_file import write_dense
from cadsurgery.tasks.task_options import Benchmark

Call = Callable[[Tensor], Any]
HIGH, LOW = "dense high", "dense low"
TORCH = "torch"  # the runtime that needs no files
IN_8_BITS = f"onnx{KERNELS}"  # the engine in which 8 bits are measured if none is named
# Engines in which the dense networks are timed too, by package; all files are first written in float32.
RIVALS = {engine.package: name for name, engine in ENGINES.items() if not engine.has_kernels}


@dataclass(frozen=True)
class InTorch:
    """Copies in torch, in the precision of the network."""

    net: AdaptiveModel

    @cached_property
    def fast(self) -> AdaptiveModel:
        """The copy that runs under masks."""
        return self.net.optimize()

    def dense(self, name: str, image: Tensor) -> Call:
        """Return the call of a dense network, `HIGH` or `LOW`, for images of the size of `image`."""
        return dense_twin(self.net, level_of(self.net, name), image)

    def under(self, mask: MaskProvider) -> Call:
        """Return the call of the optimised copy under a mask."""
        return partial(self.fast, mask=mask)


@dataclass(frozen=True)
class InEngine:
    """Files in an engine; each is compared with the network before it is used.

    Attributes:
        net: network to export.
        image: example of the export.
        runtime: name of the engine that runs the files.
        folder: folder for the files.
        dtype: precision of the files.
        calibration: images that int8 is calibrated by.
        threads: number of threads of the engine.
        step: progress callback.
    """

    net: AdaptiveModel
    image: Tensor
    runtime: str
    folder: Path
    dtype: str = "float32"
    calibration: Sequence[Tensor] = ()
    threads: int = 0
    step: Step = silent
    _numbers: Iterator[int] = field(default_factory=count)

    @property
    def engine(self) -> type[Engine]:
        """The engine that runs the files."""
        return ENGINES[self.runtime]

    def _begin(self, name: str) -> tuple[Path, Step]:
        """Return the path of the next file, and the progress callback of its export."""
        words = f"exporting {name} to {self.engine.name}"
        self.step(words)
        return make_folder(self.folder / str(next(self._numbers))) / "net.onnx", within(self.step, words)

    def dense(self, name: str, image: Tensor) -> Call:
        """Return the call of a dense network, `HIGH` or `LOW`, from an ordinary ONNX export."""
        path, step = self._begin(f"{name} {'x'.join(map(str, image.shape[2:]))}")
        write_dense(self.net, level_of(self.net, name), image, path, self.engine)
        if self.dtype == INT8:
            pictures = [(resized(picture, image.shape[2:]),) for picture in self.calibration]
            to_8_bits(path, self.engine, pictures, step=step)
        return self.engine(path, self.threads, self.dtype == "bfloat16")

    def under(self, mask: MaskProvider) -> Call:
        """Return the call of the network under a mask; the file contains the mask and its lattice."""
        path, step = self._begin(f"mask {mask.spec()}")
        self.net.mask = mask
        options = options_for(self.runtime)
        if self.dtype == INT8:
            options |= {"precision": INT8, "calibration": list(self.calibration)}
        export(self.net, self.image, path, step=step, **options)
        return self.engine(path, self.threads)


Runs = InTorch | InEngine  # what creates the calls of a converted network


def scaled_size(size: Sequence[int], scale: float, multiple: int) -> tuple[int, int]:
    """Return the size of resized pictures, in multiples of the coarsest stride, to which the network's grid fits."""
    if scale == 1:
        return size[0], size[1]
    sides = [max(multiple, multiple * math.floor(side * scale / multiple + 0.5)) for side in size]
    return sides[0], sides[1]


def level_of(net: AdaptiveModel, name: str) -> int:
    """Return the level of a dense network, `HIGH` or `LOW`."""
    return {HIGH: 0, LOW: net.geometry.max_level}[name]


def engine_for(runtime: str, dtype: str) -> str:
    """Return the runtime of a measurement: 8 bits are those of files, so torch stands for `IN_8_BITS` there."""
    return IN_8_BITS if (runtime, dtype) == (TORCH, INT8) else runtime


def further_sides(
    net: AdaptiveModel,
    image: Tensor,
    setup: Benchmark,
    runs: Runs,
    counted: MacReport,
    folder: Path,
    step: Step,
) -> Iterator[Side]:
    """Yield the sides that a benchmark asks for beside dense networks and budgets: the dense networks in other engines
    (`against`), in every dtype of each; dense high on smaller pictures, which the call resizes (`smaller`); the network
    as given, or dense low if no level is its own, in bands of rows (`memory`), named by what they take.

    Raises:
        CannotConvert: an operation needs a whole map.
        InvalidInput: the memory is too little.
    """
    if setup.against:
        whole, precise = copy.deepcopy(net).float(), image.float().contiguous()
    for package in setup.against.split(",") if setup.against else ():
        engine = ENGINES[RIVALS[package]]
        for dtype in ("float32", "bfloat16", INT8) if engine.has_bfloat16 else ("float32", INT8):
            place = folder / package / dtype
            files = InEngine(whole, precise, RIVALS[package], place, dtype, [precise], setup.threads, step)
            for name, number in {HIGH: counted.high, LOW: counted.low}.items():
                run, about = (
                    files.dense(name, precise),
                    {"engine": engine.name, "dtype": dtype, "dense": name},
                )
                call = partial(lambda run, _: run(precise), run)  # a file takes the image in float32
                yield Side(f"{name}, {engine.name}, {dtype}", call, number, about=about)
    if setup.smaller:
        size = scaled_size(image.shape[2:], setup.smaller, net.plan.output_stride[1])
        smaller = runs.dense(HIGH, resized(image, size))
        macs = net.macs(resized(image, size), mask="none").high
        yield Side(f"{HIGH} at {size[0]}x{size[1]}", lambda image: smaller(resized(image, size)), macs)
    if setup.memory:
        own, fast = net.plan.identity_level, net.optimize(memory=setup.memory)
        mask, macs = ("all", counted.high) if own == 0 else ("none", counted.low)
        plan = fast.plan_memory(image[:1], mask=mask)
        which = "as given" if own in (0, net.plan.max_level) else LOW
        name = f"{which}, in bands of {plan.band} rows: {in_mebibytes(plan.peak)}"
        yield Side(name, lambda image: fast(image, mask=mask), macs)
