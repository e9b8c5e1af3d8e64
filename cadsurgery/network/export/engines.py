"""Files in the engines they are for: each a function of tensors that gives a list of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cadsurgery.support.errors import CannotConvert, describe_error, import_optional


class Engine:
    """A file in an engine, on the CPU.

    Attributes:
        package: that it comes in.
        format: of its files, see `cadsurgery.export`.
    """

    package: ClassVar[str]
    format: ClassVar[Literal["onnx", "aoti"]]

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open it, to be run by so many threads; 0 for the engine's own choice.

        Raises:
            CannotConvert: the engine does not take the file.
        """
        raise NotImplementedError

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Its outputs in order."""
        raise NotImplementedError


class OnnxRuntime(Engine):
    """An ONNX file in ONNX Runtime."""

    package, format = "onnxruntime", "onnx"

    def __init__(self, path: Path, threads: int = 0) -> None:
        """See `Engine`."""
        onnxruntime = import_package(self.package)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Else the threads of one file go on waiting busily while another is run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _refused("ONNX Runtime", error) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Its outputs in order."""
        names = [one.name for one in self._session.get_inputs()]
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in self._session.run(None, values)]


class OpenVino(Engine):
    """An ONNX file in OpenVINO, compiled for the shapes of its last call, in single precision."""

    package, format = "openvino", "onnx"

    def __init__(self, path: Path, threads: int = 0) -> None:
        """See `Engine`."""
        openvino = import_package(self.package)
        self._core = openvino.Core()
        self._options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._compiled: tuple[list[list[int]], Any] = [], None
        try:
            self._model = self._core.read_model(path)
        except Exception as error:
            raise _refused("OpenVINO", error) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Its outputs in order."""
        shapes = [list(one.shape) for one in inputs]
        if shapes != self._compiled[0]:
            model = self._model.clone()
            model.reshape(dict(zip(model.inputs, shapes, strict=True)))
            self._compiled = shapes, self._core.compile_model(model, "CPU", self._options)
        found = self._compiled[1]([one.numpy() for one in inputs])
        return [torch.from_numpy(found[index].copy()) for index in range(len(found))]


class Inductor(Engine):
    """A package of AOTInductor, run by the threads of torch."""

    package, format = "torch", "aoti"

    def __init__(self, path: Path, threads: int = 0) -> None:
        """See `Engine`."""
        try:
            self._run = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise _refused("AOTInductor", error) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Its outputs in order."""
        return [leaf for leaf in tree_leaves(self._run(*inputs)) if isinstance(leaf, Tensor)]


ENGINES: dict[str, type[Engine]] = {"onnx": OnnxRuntime, "openvino": OpenVino, "aoti": Inductor}


def import_package(package: str) -> Any:
    """A package of the extra `export`.

    Raises:
        CadError: it is not installed.
    """
    return import_optional(
        package, f"a file for this engine needs {package}.", "pip install 'cadsurgery[export]'"
    )


def _refused(engine: str, error: Exception) -> CannotConvert:
    return CannotConvert(
        f"{engine} does not take the file.",
        why=describe_error(error),
        next="report it with the name of the network and the version of the engine.",
    )
