"""Run settings: as copies in torch, or as files in another engine. Count the work of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.masks import resolve_mask
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export import export
from cadsurgery.network.export.dense import write_dense
from cadsurgery.network.export.engines import ENGINES, options_for
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.macs import dense_macs
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.files import make_folder
from cadsurgery.tasks.recommend.settings import Pair, Setting, scaled_size

TORCH = "torch"
PRECISIONS = ("float32", "bfloat16", "int8")
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
    _nets: dict[tuple[Pair, str], AdaptiveModel] = field(default_factory=dict)
    _fast: dict[int, AdaptiveModel] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def scale(self, setting: Setting, image: Tensor) -> Tensor:
        """Resize a picture (1, 3, H, W) for a setting."""
        height, width = scaled_size(image.shape[2:], setting.scale, self.multiple)
        if (height, width) == tuple(image.shape[2:]):
            return image
        return F.interpolate(image, (height, width), mode="bilinear", antialias=True)

    def make(self, setting: Setting) -> Call:
        """Return the call of a setting, which takes a picture as it is and scales it first."""
        small = self.scale(setting, self.image)
        pair, fill = setting.pair, setting.fill
        if pair is None:
            run: Call = self.model
        elif self.runtime != TORCH:
            run = self._in_engine(setting, self.net(pair, fill), small)
        elif setting.kind == "adaptive":
            run = partial(self.fast(pair, fill), mask=resolve_mask(setting.mask))
        elif self.precision == "int8":
            run = partial(self.fast(pair, fill), mask=setting.typed_mask)
        else:
            net = self.net(pair, fill)
            run = dense_twin(net, _level(net, setting), self._cast(small))
        return partial(self._run, setting, run)

    def _run(self, setting: Setting, run: Call, image: Tensor) -> Any:
        return run(self._cast(self.scale(setting, image)))

    def _cast(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return image.bfloat16() if self.precision == "bfloat16" and self.runtime == TORCH else image

    def net(self, pair: Pair, fill: str) -> AdaptiveModel:
        """Return the network converted for a pair of output strides; converted once."""
        if (pair, fill) not in self._nets:
            options = {**self.options, "output_stride": pair, "fill": fill}
            net = adaptify(self.model, DEFAULT_MASK, **options, example_input=self.image, verify_laws=False)
            pictures_for(net)
            is_cast = self.precision == "bfloat16" and self.runtime == TORCH
            self._nets[pair, fill] = net.bfloat16() if is_cast else net
        return self._nets[pair, fill]

    def fast(self, pair: Pair, fill: str) -> AdaptiveModel:
        """Return the optimised copy of that network; made once."""
        net = self.net(pair, fill)
        if id(net) not in self._fast:
            in_8_bits = {"precision": "int8", "calibration": list(self.calibration)}
            self._fast[id(net)] = net.optimize(**in_8_bits if self.precision == "int8" else {})  # type: ignore[arg-type]
        return self._fast[id(net)]

    def _in_engine(self, setting: Setting, net: AdaptiveModel, small: Tensor) -> Call:
        engine = ENGINES[self.runtime]
        path = make_folder(self.folder / "files" / str(next(self._numbers))) / "net.onnx"
        in_8_bits = self.precision == "int8"
        if setting.kind == "adaptive":
            net.mask = setting.mask
            batches = torch.cat(list(self.calibration)) if in_8_bits else None
            export(net, small, path, int8=batches, **options_for(self.runtime))
        else:
            write_dense(net, _level(net, setting), small, path, engine)
            if in_8_bits:
                to_8_bits(path, engine, [(self.scale(setting, one),) for one in self.calibration])
        run = engine(path, torch.get_num_threads())
        return lambda image: run(image)[0]

    def macs(self, setting: Setting) -> int:
        """Count the multiply-accumulates of the whole network on the first picture."""
        small = self.scale(setting, self.image)
        if setting.kind in ("given", "size"):
            return dense_macs(self.model, small)
        assert setting.pair is not None
        if self.precision == "bfloat16" and self.runtime == TORCH:
            small = small.bfloat16()
        net = self.net(setting.pair, setting.fill)
        if setting.kind == "adaptive":
            return net.macs(small, mask=setting.mask).mask
        report = net.macs(small, mask="none")
        return report.high if setting.stride == setting.pair[0] else report.low


def _level(net: AdaptiveModel, setting: Setting) -> int:
    """Return the level at which all cells of a network have the setting's output stride."""
    return net.plan.strides.index(setting.stride)
