"""What runs a file is an `Engine`: a function from tensors to a list of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from cadsurgery.network.export.kernels import kernels_for
from cadsurgery.support.errors import CannotConvert, describe_error, import_optional
from cadsurgery.support.kinds import HOW_TO_OPEN, has_kernels


class Engine:
    """A file opened in an engine, on the CPU.

    Attributes:
        name: the engine's name.
        package: the Python package of the engine.
        has_kernels: True if this package's kernels run in it; files are then written `with_kernels`.
        has_8_bit_depthwise: see `cadsurgery.support.running.Target`.
        has_bfloat16: True if it can run a file in bfloat16.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    has_kernels: ClassVar[bool] = False
    has_8_bit_depthwise: ClassVar[bool] = False
    has_bfloat16: ClassVar[bool] = False

    def __init__(
        self, path: Path, threads: int = 0, in_bfloat16: bool = False, any_size: bool = False
    ) -> None:
        """Open a file, to be run by a number of threads; 0 leaves the number to the engine.

        Args:
            path: file in single precision.
            threads: number of threads.
            in_bfloat16: multiply in bfloat16; for engines with `has_bfloat16`.
            any_size: prepare the file once for all sizes, where the engine can also prepare it for each.

        Raises:
            CannotConvert: the engine refuses the file.
            CadError: the engine's package is not installed; or see `kernels_for`.
        """
        package = import_package(self.package)
        kernels = kernels_for(self.package) if self.has_kernels else ""
        self._in_bfloat16, self._any_size = in_bfloat16, any_size
        try:
            self._open(package, path, threads, kernels)
        except Exception as error:
            if not self.has_kernels and has_kernels(path):
                raise CannotConvert(
                    f"{self.name} does not take a file with this package's kernels.",
                    where=str(path),
                    why=f"the library of the kernels is not registered: {describe_error(error)}",
                    next=HOW_TO_OPEN,
                ) from error
            raise self._refusal("does not take the file", error) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the file and return its outputs in order.

        Raises:
            CannotConvert: the file does not run on these inputs.
        """
        try:
            return self._run(*inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
            raise self._refusal(f"does not run the file on {shapes}", error) from error

    def _refusal(self, what: str, error: Exception) -> CannotConvert:
        return CannotConvert(
            f"{self.name} {what}.",
            why=describe_error(error),
            next="report it with the name of the network and the version of the engine.",
        )

    def _open(self, package: Any, path: Path, threads: int, kernels: str) -> None:
        raise NotImplementedError

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        raise NotImplementedError


def check_packages(engine: type[Engine]) -> None:
    """Refuse to write a file for an engine where a package is missing, before any work.

    Raises:
        NotInstalled: the package is not installed.
    """
    for package in ("onnx", "onnxscript", engine.package):
        import_package(package)


def import_package(package: str) -> Any:
    """Import a package of the extra `export`.

    Raises:
        NotInstalled: the package is not installed.
    """
    return import_optional(
        package, f"a file for this engine needs {package}.", "pip install 'cadsurgery[export]'"
    )
