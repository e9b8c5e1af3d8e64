"""Build the extension by which OpenVINO reads files with this package's kernels and runs the kernels.

OpenVINO's interface is C++, which differs from version to version. OpenVINO may be installed after this package, so
the extension is compiled for the installed version when it is first asked for, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from cadsurgery.kernels import build
from cadsurgery.support.errors import NotInstalled
from cadsurgery.support.files import cache_folder

SOURCE = build.SOURCES / "openvino.cpp"
PACKAGE = "openvino"
# The parts of OpenVINO that are linked; the last is its library of threads, which some builds lack.
_LINKED = ("openvino", "openvino_onnx_frontend", "tbb")
_ADVICE = "Give a C++ compiler that works (CXX=g++), or use ONNX Runtime, which needs none."


class Unusable(Exception):
    """The extension cannot be used.

    Args:
        reason: the reason in one line.
        next: advice for the user.
    """

    def __init__(self, reason: str, next: str = _ADVICE) -> None:
        super().__init__(reason)
        self.reason, self.next = reason, next


def extension(kernels: Path) -> Path:
    """Return the extension's file for the installed OpenVINO, in the cache folder; compile it if missing.

    Args:
        kernels: the library of kernels, which the extension loads: from its own folder, else from where it is now.

    Raises:
        Unusable: this is not Linux, a C++ compiler is missing, or the extension cannot be built or kept.
        NotInstalled: OpenVINO is missing.
    """
    command = _command(kernels)
    folder = cache_folder()
    if folder is None:
        raise Unusable(
            "the cache folder cannot be written", "Set XDG_CACHE_HOME to a folder that only you can write."
        )
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise Unusable(
            f"the cache folder {folder} is on a file system from which no code is run (noexec)",
            "Set XDG_CACHE_HOME to a folder on another one.",
        )
    path = folder / f"openvino-{_digest(command)}.so"
    if not path.exists():
        try:
            build.compile_extension(command, path, SOURCE)
        except (build.BuildError, OSError) as error:
            raise Unusable(f"the extension could not be built: {error}") from error
    return path


def _command(kernels: Path) -> list[str]:
    """Return the compiler's command with its options.

    Raises:
        Unusable: this is not Linux, or a C++ compiler is missing.
        NotInstalled: OpenVINO is.
    """
    if sys.platform != "linux":
        raise Unusable(f"the extension is built on Linux only, not on {sys.platform}", "Use ONNX Runtime.")
    installed = importlib.util.find_spec(PACKAGE)
    if installed is None or not installed.origin:
        raise NotInstalled(
            "there are no kernels for OpenVINO without it.", next="pip install 'cadsurgery[export]'"
        )
    compiler = build.find_compiler_of_cpp()
    if compiler is None:
        raise Unusable("there is no C++ compiler")
    folder = Path(installed.origin).parent
    libraries = [path for name in _LINKED for path in sorted((folder / "libs").glob(f"lib{name}.so*"))[:1]]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{build.SOURCES}", f"-I{folder / 'include'}"]
    options += ["-DWITH_TBB"] if any(path.name.startswith("libtbb") for path in libraries) else []
    options += [f"-L{kernels.parent}", f"-l:{kernels.name}", f"-Wl,-rpath,$ORIGIN:{kernels.parent}"]
    return [*compiler, *options, *map(str, libraries)]


def _digest(command: list[str]) -> str:
    """Return a hash of everything the extension depends on."""
    files = [SOURCE, build.SOURCES / "convolve.h", build.SOURCES / "parallel.h"]
    parts = [importlib.metadata.version(PACKAGE), *command]
    content = "\0".join(parts).encode() + b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()[:16]
