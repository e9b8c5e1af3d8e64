"""The engines of ONNX files; `cadsurgery.support.defaults.ENGINES` lists them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
from torch import Tensor

from cadsurgery.network.export.engine import Engine, import_package
from cadsurgery.support import defaults
from cadsurgery.support.defaults import KERNELS
from cadsurgery.support.errors import check_name


class OnnxRuntime(Engine):
    """An ONNX file in ONNX Runtime.

    Attributes:
        frees_early: True if a value is freed after its last reader. By default ONNX Runtime may run readers late.
    """

    name, package = "ONNX Runtime", "onnxruntime"
    frees_early: ClassVar[bool] = False
    has_8_bit_depthwise = (
        True  # OpenVINO subtracts zero points of gathered rows and transposes them: twice the time
    )

    def _open(self, package: Any, path: Path, threads: int, kernels: str) -> None:
        options = package.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if self.frees_early:
            options.execution_order = package.ExecutionOrder.PRIORITY_BASED
        if kernels:
            options.register_custom_ops_library(kernels)
        # Otherwise the threads of one file keep spinning while another file runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        names = [given.name for given in self._session.get_inputs()]
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in self._session.run(None, values)]


class OnnxRuntimeWithKernels(OnnxRuntime):
    """An ONNX file in ONNX Runtime, with the library of `kernels_for`."""

    name, has_kernels = "ONNX Runtime with kernels", True


class OpenVino(Engine):
    """An ONNX file in OpenVINO, compiled for the shapes of its last call, or once for any size."""

    name, package = "OpenVINO", "openvino"
    has_bfloat16 = True

    def _open(self, package: Any, path: Path, threads: int, kernels: str) -> None:
        self._core = _core(kernels)
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if self._in_bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._model = self._core.read_model(path)
        self._compiled: tuple[list[list[int]], Any] = [], None

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        shapes = [] if self._any_size else [list(value.shape) for value in inputs]
        if not self._compiled[1] or shapes != self._compiled[0]:
            model = self._model.clone()
            if shapes:
                model.reshape(dict(zip(model.inputs, shapes, strict=True)))
            self._compiled = shapes, self._core.compile_model(model, "CPU", self._options)
        outputs = self._compiled[1]([value.numpy() for value in inputs])
        return [torch.from_numpy(outputs[index]) for index in range(len(outputs))]


class OpenVinoWithKernels(OpenVino):
    """An ONNX file in OpenVINO, with the extension of `kernels_for`."""

    name, has_kernels = "OpenVINO with kernels", True


@cache
def _core(extension: str = "") -> Any:
    """Return OpenVINO's core, with or without an extension, one for all files that is never freed.

    If two cores are freed in the order of their creation (openvino 2026.4), the thread keeps a signal stack that no
    longer exists, and the next signal (Ctrl-C, the end of a child process) kills the process.
    """
    core = import_package(OpenVino.package).Core()
    if extension:
        core.add_extension(extension)
    return core


ENGINES: dict[str, type[Engine]] = {name: resolve_name(place) for name, place in defaults.ENGINES.items()}


def options_for(runtime: str) -> dict[str, Any]:
    """Return the options of `export` for files of an engine in `ENGINES`."""
    return {
        "to": "onnx",
        "check_in": runtime.removesuffix(KERNELS),
        "with_kernels": ENGINES[runtime].has_kernels,
    }


def engine_for(name: str, with_kernels: bool) -> type[Engine]:
    """Return the engine that runs a file and is compared with the network.

    Args:
        name: of an engine in `ENGINES` without kernels.
        with_kernels: the file is written with kernels.

    Raises:
        UnknownName: there is no such engine, or none with kernels.
    """
    able = [key for key in ENGINES if not with_kernels or f"{key}{KERNELS}" in ENGINES]
    able = [key for key in able if not ENGINES[key].has_kernels]
    check_name("engine with kernels" if with_kernels else "engine of ONNX files", name, able)
    return ENGINES[f"{name}{KERNELS}" if with_kernels else name]
