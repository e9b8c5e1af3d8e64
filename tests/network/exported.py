"""What tests of exported files share: a network to export, and ONNX Runtime to run its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import ManyOperations, randomise
from torch import Tensor

import cadsurgery as cs

onnxruntime = pytest.importorskip("onnxruntime")


def net(mask: Any = "edges", **options: Any) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return cs.adaptify(randomise(ManyOperations()).eval(), mask, verify_laws=False, **options)


class File:
    """An ONNX file run by ONNX Runtime alone."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        names = [one.name for one in self.session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        outputs = [one.name for one in self.session.get_outputs()]
        return dict(zip(outputs, map(torch.from_numpy, self.session.run(outputs, feed)), strict=True))
