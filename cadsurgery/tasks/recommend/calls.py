"""The calls of settings: what is run on a picture, in torch or in an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.images import resized
from cadsurgery.masks import resolve_mask
from cadsurgery.network.adaptify import adaptify, copy_network
from cadsurgery.network.export import INT8
from cadsurgery.network.macs import dense_macs
from cadsurgery.network.model import pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.errors import CannotConvert, describe_error
from cadsurgery.tasks.recommend.settings import Setting
from cadsurgery.tasks.sides.engine_sides import (
    HIGH,
    LOW,
    TORCH,
    Call,
    InEngine,
    InTorch,
    Runs,
    scaled_size,
)

PRECISIONS = ("float32", "bfloat16", INT8)


@dataclass
class Calls:
    """The calls of the settings of one network, for pictures of one size.

    Attributes:
        model: the network as given, in channels_last memory.
        image: (1, 3, H, W), the first picture.
        options: further ones of `adaptify`.
        multiple: sides of resized pictures are multiples of this number of pixels.
        runtime: `torch`, or an engine.
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
    _runs: dict[str, Runs] = field(default_factory=dict)

    def scale(self, setting: Setting, image: Tensor) -> Tensor:
        """Resize a picture (1, 3, H, W) for a setting, in the precision of the network."""
        image = resized(image, scaled_size(image.shape[2:], setting.scale, self.multiple))
        image = image.contiguous(memory_format=torch.channels_last)
        return image.bfloat16() if self._is_cast else image

    @property
    def _is_cast(self) -> bool:
        return self.precision == "bfloat16" and self.runtime == TORCH

    @cached_property
    def _given(self) -> nn.Module:
        return copy_network(self.model).bfloat16() if self._is_cast else self.model

    def make(self, setting: Setting) -> Call:
        """Return the call of a setting, which takes a picture as it is and scales it first.

        Raises:
            CannotConvert: torch does not compile the network.
        """
        if setting.kind == "compiled":
            return partial(self._run, setting, self._compiled(setting))
        if not setting.is_converted:
            return partial(self._run, setting, self._given)
        if setting.kind == "adaptive":
            run = self.runs(setting).under(resolve_mask(setting.mask))
        else:
            name = HIGH if setting.pair and setting.stride == setting.pair[0] else LOW
            run = self.runs(setting).dense(name, self.scale(setting, self.image))
        return partial(self._run, setting, run)

    def _compiled(self, setting: Setting) -> Call:
        """Return the network as given after `torch.compile`, which the first call compiles for its size."""
        compiled = torch.compile(self._given, dynamic=False)
        try:
            with torch.inference_mode():
                compiled(self.scale(setting, self.image))
        except Exception as error:  # what torch cannot compile, or has no compiler for
            raise CannotConvert(f"torch.compile: {describe_error(error)}") from error
        return compiled

    def _run(self, setting: Setting, run: Call, image: Tensor) -> Any:
        output = run(self.scale(setting, image))
        return output[0] if setting.is_converted and self.runtime != TORCH else output

    def runs(self, setting: Setting) -> Runs:
        """Return the maker of calls of the network of a setting, which is converted once for each pair and fill, or
        floor."""
        name = (
            f"floor-{setting.coarsest}"
            if setting.pair is None
            else "{}-{}-{}".format(*setting.pair, setting.fill)
        )
        if name not in self._runs:
            options = {**self.options, **setting.conversion}
            net = adaptify(self.model, DEFAULT_MASK, **options, example_input=self.image, verify_laws=False)
            pictures_for(net)
            net = net.bfloat16() if self._is_cast else net
            files = self.folder / "files" / name, self.precision, self.calibration, torch.get_num_threads()
            self._runs[name] = InTorch(net)
            if self.runtime != TORCH:
                self._runs[name] = InEngine(net, self.image, self.runtime, *files)
        return self._runs[name]

    def macs(self, setting: Setting) -> int:
        """Count the multiply-accumulates of the whole network on the first picture."""
        if not setting.is_converted or setting.kind in ("given", "compiled", "size"):
            return dense_macs(self._given, self.scale(setting, self.image))
        net, small = self.runs(setting).net, self.scale(setting, self.image)
        if setting.kind == "adaptive":
            return net.macs(small, mask=setting.mask).mask
        report = net.macs(small, mask="none")
        return report.high if setting.pair and setting.stride == setting.pair[0] else report.low
