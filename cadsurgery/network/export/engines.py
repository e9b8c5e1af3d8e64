"""Run ONNX files in their engines, each as a function from tensors to a list of tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cadsurgery.network.export.kernels import kernels_for
from cadsurgery.support.errors import CannotConvert, describe_error, import_optional


class Engine:
    """A file opened in an engine, on the CPU.

    Attributes:
        name: the engine's name.
        package: the Python package of the engine.
        has_kernels: True if this package's kernels run in it; files are then written `with_kernels`.
        runs_bodies: True if it runs such files without the kernels, too.
        has_8_bit_depthwise: see `cadsurgery.elements.backends.target.Target`.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    has_kernels: ClassVar[bool] = False
    runs_bodies: ClassVar[bool] = True
    has_8_bit_depthwise: ClassVar[bool] = False

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a file, to be run by a number of threads; 0 leaves the number to the engine.

        Raises:
            CannotConvert: the engine refuses the file.
            CadError: the engine's package is not installed; or see `kernels_for`.
        """
        package = import_package(self.package)
        kernels = kernels_for(self.package) if self.has_kernels else ""
        try:
            self._open(package, path, threads, kernels)
        except Exception as error:
            raise CannotConvert(
                f"{self.name} does not take the file.",
                why=describe_error(error),
                next="report it with the name of the network and the version of the engine.",
            ) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the file and return its outputs in order.

        Raises:
            CannotConvert: the file does not run on these inputs.
        """
        try:
            return self._run(*inputs)
        except Exception as error:
            raise CannotConvert(
                f"{self.name} does not run the file on {', '.join(str(tuple(value.shape)) for value in inputs)}.",
                why=describe_error(error),
                next="report it with the name of the network and the version of the engine.",
            ) from error

    def _open(self, package: Any, path: Path, threads: int, kernels: str) -> None:
        raise NotImplementedError

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        raise NotImplementedError


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
    """An ONNX file in OpenVINO, compiled for the shapes of its last call, in single precision."""

    name, package = "OpenVINO", "openvino"
    runs_bodies = False
    precision = "f32"

    def _open(self, package: Any, path: Path, threads: int, kernels: str) -> None:
        self._core = _core(kernels)
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._model = self._core.read_model(path)
        self._compiled: tuple[list[list[int]], Any] = [], None

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        shapes = [list(value.shape) for value in inputs]
        if shapes != self._compiled[0]:
            model = self._model.clone()
            model.reshape(dict(zip(model.inputs, shapes, strict=True)))
            self._compiled = shapes, self._core.compile_model(model, "CPU", self._options)
        outputs = self._compiled[1]([value.numpy() for value in inputs])
        return [torch.from_numpy(outputs[index]) for index in range(len(outputs))]


class OpenVinoInBfloat16(OpenVino):
    """An ONNX file in OpenVINO, in bfloat16 if the processor supports it."""

    precision = "bf16"


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


_KERNELS = "-kernels"  # ends the names of engines with this package's kernels
ENGINES: dict[str, type[Engine]] = {
    "onnx": OnnxRuntime,
    f"onnx{_KERNELS}": OnnxRuntimeWithKernels,
    "openvino": OpenVino,
    f"openvino{_KERNELS}": OpenVinoWithKernels,
}


def options_for(runtime: str) -> dict[str, Any]:
    """Return the options of `export` for files of an engine in `ENGINES`."""
    return {
        "to": "onnx",
        "check_in": runtime.removesuffix(_KERNELS),
        "with_kernels": ENGINES[runtime].has_kernels,
    }


def engines_for(name: str, with_kernels: bool) -> list[type[Engine]]:
    """Return the engines that run a file and are compared with the network.

    Args:
        name: of an engine in `ENGINES` without kernels.
        with_kernels: the file is written with kernels.
    """
    plain = [ENGINES[name]]
    if not with_kernels:
        return plain
    return [*(plain if plain[0].runs_bodies else []), ENGINES[f"{name}{_KERNELS}"]]


def import_package(package: str) -> Any:
    """Import a package of the extra `export`.

    Raises:
        CadError: the package is not installed.
    """
    return import_optional(
        package, f"a file for this engine needs {package}.", "pip install 'cadsurgery[export]'"
    )
