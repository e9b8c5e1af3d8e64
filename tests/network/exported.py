"""What tests of exported files share: a network to export, and ONNX Runtime to run its file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from networks import ManyOperations, made_once, randomise
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.network.export.engines import OpenVino

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ENGINES_HERE = ("onnx", *(("openvino",) if importlib.util.find_spec("openvino") else ()))
# Operations that the oldest ONNX Runtime of the tested range, 1.20, does not have for int8, the type of level maps.
NOT_OF_INT8 = {"Where", "Min", "Max"}


@made_once
def net(mask: Any = "edges", **options: Any) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return cs.adaptify(randomise(ManyOperations()).eval(), mask, verify_laws=False, **options)


class File:
    """An ONNX file run by ONNX Runtime alone; older versions could run it, too."""

    def __init__(self, path: Path) -> None:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        narrow = {
            one.name for one in graph.value_info if one.type.tensor_type.elem_type == onnx.TensorProto.INT8
        }
        for node in graph.node:
            assert node.op_type not in NOT_OF_INT8 or narrow.isdisjoint(node.input), node
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        names = [one.name for one in self.session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        outputs = [one.name for one in self.session.get_outputs()]
        return dict(zip(outputs, map(torch.from_numpy, self.session.run(outputs, feed)), strict=True))


def in_openvino(path: Path) -> Callable[[Tensor], dict[int, Tensor]]:
    """An ONNX file that OpenVINO compiles once, for all the sizes that it takes."""
    pytest.importorskip("openvino")
    run = OpenVino(path, any_size=True)
    return lambda image: dict(enumerate(run(image)))


def assert_same_file(
    path: Path, net: cs.AdaptiveModel, *images: Tensor, tolerance: float = 1e-4, opened: Any = File
) -> None:
    """A file gives what the network gives, and its level map, which keeps a part of an image."""
    run = opened(path)
    for image in images:
        with torch.no_grad():
            expected = tree_leaves(net(image))
        *outputs, levels = run(image).values()
        for found, value in zip(outputs, expected, strict=True):
            assert_same(found, value, tolerance)
        assert torch.equal(levels, net.levels)
