"""The sides of `bench`: dense networks and budgets, as copies in torch or as files in another engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.masks import Budget
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export import export
from cadsurgery.network.export.dense import write_dense
from cadsurgery.network.export.engines import (
    ENGINES,
    Engine,
    OnnxRuntime,
    OpenVino,
    OpenVinoInBfloat16,
    options_for,
)
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.files import make_folder
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.tasks.export import images_like
from cadsurgery.tasks.options import Benchmark
from cadsurgery.tasks.recommend.settings import scaled_size
from cadsurgery.tasks.side import Side

Call = Callable[[Tensor], object]
HIGH, LOW = "dense high", "dense low"
INT8 = "int8"
# Engines in which the dense networks are timed too, by package and dtype; all files are first written in float32.
RIVALS: dict[str, dict[str, type[Engine]]] = {
    "onnxruntime": {"float32": OnnxRuntime, INT8: OnnxRuntime},
    "openvino": {"float32": OpenVino, "bfloat16": OpenVinoInBfloat16, INT8: OpenVino},
}


class Runs(Protocol):
    """Creates the calls that are timed."""

    def dense(self, name: str, image: Tensor | None = None) -> Call:
        """Return the call of a dense network, `HIGH` or `LOW`, for images of the size of `image`."""

    def under(self, budget: Budget) -> Call:
        """Return the call of the network under a budget."""


@dataclass(frozen=True)
class InTorch:
    """Copies in torch. In int8, the dense networks are the same copy with one level everywhere."""

    net: AdaptiveModel
    image: Tensor
    setup: Benchmark
    step: Step = silent

    @cached_property
    def fast(self) -> AdaptiveModel:
        """The copy that is timed under budgets."""
        if self.setup.dtype != INT8:
            return self.net.optimize()
        folder = self.setup.calibration
        images = (
            images_like(self.image, pictures_for(self.net), Path(folder)) if folder else self.image.split(1)
        )
        return self.net.optimize(precision=INT8, calibration=list(images), step=self.step)

    @property
    def quantisation(self) -> Any:
        """Summary of the layers in int8; None for a copy in another precision."""
        return self.fast.quantisation if self.setup.dtype == INT8 else None

    def dense(self, name: str, image: Tensor | None = None) -> Call:
        """Return the call of a dense network, `HIGH` or `LOW`."""
        if self.setup.dtype == INT8:
            return partial(self.fast, mask={HIGH: "all", LOW: "none"}[name])
        return dense_twin(self.net, level_of(self.net, name), self.image if image is None else image)

    def under(self, budget: Budget) -> Call:
        """Return the call of the optimised copy under a budget."""
        return partial(self.fast, mask=budget)


@dataclass(frozen=True)
class InEngine:
    """Files in an engine; each is compared with the network before it is timed.

    Attributes:
        net: network to export.
        image: example of the export; int8 files are calibrated on it.
        engine: engine that runs the files.
        setup: dtype and number of threads.
        folder: folder for the files.
        step: progress callback.
        writer: engine in which a file is compared, if not in `engine`.
    """

    net: AdaptiveModel
    image: Tensor
    engine: type[Engine]
    setup: Benchmark
    folder: Path
    step: Step
    writer: type[Engine] | None = None

    def _step(self, name: str) -> Step:
        return within(self.step, f"exporting {name} to {self.engine.name}")

    def _path(self, name: str) -> Path:
        self.step(f"exporting {name} to {self.engine.name}")
        return make_folder(self.folder / name) / "net.onnx"

    def dense(self, name: str, image: Tensor | None = None) -> Call:
        """Return the call of a dense network, `HIGH` or `LOW`, from an ordinary ONNX export."""
        image = self.image if image is None else image
        words = f"{name} {'x'.join(map(str, image.shape[2:]))}"
        path = self._path(words)
        write_dense(self.net, level_of(self.net, name), image, path, self.writer or self.engine)
        if self.setup.dtype == INT8:
            to_8_bits(path, self.engine, [(image,)], step=self._step(words))
        return self.engine(path, self.setup.threads)

    def under(self, budget: Budget) -> Call:
        """Return the call of the network under a budget; the file contains its mask and lattice."""
        name = f"budget {budget.fraction!r}"
        path = self._path(name)
        self.net.mask = budget
        batches = self.image if self.setup.dtype == INT8 else None
        options = options_for(self.setup.runtime)
        export(self.net, self.image, path, int8=batches, step=self._step(name), **options)
        return self.engine(path, self.setup.threads)


def smaller_sides(net: AdaptiveModel, image: Tensor, setup: Benchmark, runs: Runs) -> list[Side]:
    """Return the side of dense high on smaller pictures, which the call resizes; none without `setup.smaller`."""
    if not setup.smaller:
        return []
    size = scaled_size(image.shape[2:], setup.smaller, net.plan.output_stride[1])

    def shrink(image: Tensor) -> Tensor:
        small = F.interpolate(image.float(), size, mode="bilinear", antialias=True).to(image.dtype)
        return small.contiguous(memory_format=suggested)

    is_rows = image.is_contiguous(memory_format=torch.channels_last)
    suggested = torch.channels_last if is_rows else torch.contiguous_format
    run = runs.dense(HIGH, shrink(image))
    macs = net.macs(shrink(image), mask="none").high
    return [Side(f"{HIGH} at {size[0]}x{size[1]}", lambda image: run(shrink(image)), macs)]


def level_of(net: AdaptiveModel, name: str) -> int:
    """Return the level of a dense network, `HIGH` or `LOW`."""
    return {HIGH: 0, LOW: net.geometry.max_level}[name]


def runs_of(net: AdaptiveModel, image: Tensor, setup: Benchmark, folder: Path, step: Step) -> Runs:
    """Return the maker of a network's calls, in torch or in the requested engine."""
    if setup.runtime not in ENGINES:
        return InTorch(net, image, setup, step)
    return InEngine(net, image, ENGINES[setup.runtime], setup, folder, step)


def rival_sides(net: AdaptiveModel, image: Tensor, setup: Benchmark, folder: Path, step: Step) -> list[Side]:
    """Return the dense networks in other engines, in every dtype of each: high, then low."""
    if not setup.against:
        return []
    net, sides = copy.deepcopy(net).float(), []
    counted = net.macs(image, mask="none")
    macs = {HIGH: counted.high, LOW: counted.low}
    for package in setup.against.split(","):
        for dtype, engine in RIVALS[package].items():
            engine_setup, place = replace(setup, dtype=dtype), folder / package / dtype
            files = InEngine(net, image, engine, engine_setup, place, step, RIVALS[package]["float32"])
            for name, count in macs.items():
                run, about = files.dense(name), {"engine": engine.name, "dtype": dtype, "dense": name}
                call = partial(lambda run, _: run(image), run)  # a file takes the image in float32
                sides.append(Side(f"{name}, {engine.name}, {dtype}", call, count, about=about))
    return sides
