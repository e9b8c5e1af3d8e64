"""The calls of settings: what is run on a picture, in torch or in an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.masks import resolve_mask
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.export.engines import ENGINES, options_for
from cadsurgery.network.macs import dense_macs
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.tasks.recommend.settings import Pair, Setting
from cadsurgery.tasks.sides.engines import (
    HIGH,
    INT8,
    LOW,
    TORCH,
    InEngine,
    InTorch,
    Runs,
    resized,
    scaled_size,
)

PRECISIONS = ("float32", "bfloat16", INT8)
Call = Callable[[Tensor], Any]


@dataclass
class Calls:
    """The calls of the settings of one network, for pictures of one size.

    Attributes:
        model: the network as given, in channels_last memory.
        image: (1, 3, H, W), the first picture.
        options: further ones of `adaptify`.
        multiple: sides of resized pictures are multiples of this number of pixels.
        runtime: `torch`, `onnx`, `onnx-kernels`, `openvino` or `openvino-kernels`.
        precision: one of `PRECISIONS`.
        calibration: pictures (1, 3, H, W) for the calibration of int8.
        folder: folder for the files of an engine.
    """

    model: nn.Module
    image: Tensor
    options: Mapping[str, Any]
    multiple: int
    runtime: str
    precision: str
    calibration: Sequence[Tensor]
    folder: Path
    _runs: dict[tuple[Pair, str], Runs] = field(default_factory=dict)

    def scale(self, setting: Setting, image: Tensor) -> Tensor:
        """Resize a picture (1, 3, H, W) for a setting, in the precision of the network."""
        image = resized(image, scaled_size(image.shape[2:], setting.scale, self.multiple))
        image = image.contiguous(memory_format=torch.channels_last)
        return image.bfloat16() if self._is_cast else image

    @property
    def _is_cast(self) -> bool:
        return self.precision == "bfloat16" and self.runtime == TORCH

    def make(self, setting: Setting) -> Call:
        """Return the call of a setting, which takes a picture as it is and scales it first."""
        run: Any = self.model
        if setting.pair is not None and setting.kind == "adaptive":
            run = self.runs(setting.pair, setting.fill).under(resolve_mask(setting.mask))
        elif setting.pair is not None:
            name = HIGH if setting.stride == setting.pair[0] else LOW
            run = self.runs(setting.pair, setting.fill).dense(name, self.scale(setting, self.image))
        return partial(self._run, setting, run)

    def _run(self, setting: Setting, run: Call, image: Tensor) -> Any:
        output = run(self.scale(setting, image))
        return output[0] if setting.pair is not None and self.runtime != TORCH else output

    def runs(self, pair: Pair, fill: str) -> Runs:
        """Return the maker of calls of the network converted for a pair of output strides, which is converted once."""
        if (pair, fill) not in self._runs:
            options = {**self.options, "output_stride": pair, "fill": fill}
            net = adaptify(self.model, DEFAULT_MASK, **options, example_input=self.image, verify_laws=False)
            pictures_for(net)
            self._runs[pair, fill] = self._runs_of(net.bfloat16() if self._is_cast else net, pair, fill)
        return self._runs[pair, fill]

    def _runs_of(self, net: AdaptiveModel, pair: Pair, fill: str) -> Runs:
        if self.runtime == TORCH:
            return InTorch(net, self.image, self.precision, self.calibration)
        folder, options = self.folder / "files" / f"{pair[0]}-{pair[1]}-{fill}", options_for(self.runtime)
        threads, engine = torch.get_num_threads(), ENGINES[self.runtime]
        return InEngine(
            net, self.image, engine, folder, self.precision, self.calibration, threads, options=options
        )

    def macs(self, setting: Setting) -> int:
        """Count the multiply-accumulates of the whole network on the first picture."""
        if setting.pair is None or setting.kind in ("given", "size"):
            return dense_macs(
                self.model,
                resized(self.image, scaled_size(self.image.shape[2:], setting.scale, self.multiple)),
            )
        net, small = self.runs(setting.pair, setting.fill).net, self.scale(setting, self.image)
        if setting.kind == "adaptive":
            return net.macs(small, mask=setting.mask).mask
        report = net.macs(small, mask="none")
        return report.high if setting.stride == setting.pair[0] else report.low
