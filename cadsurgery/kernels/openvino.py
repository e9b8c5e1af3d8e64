"""Build the extension by which OpenVINO reads files with this package's kernels and runs the kernels."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from cadsurgery.kernels import build
from cadsurgery.kernels.library import Unusable, intact, keep_in_cache, version_of

SOURCE = build.SOURCES / "openvino.cpp"
PACKAGE = "openvino"
# The parts of OpenVINO that are linked; the last is its library of threads, which some builds lack.
_LINKED = ("openvino", "openvino_onnx_frontend", "tbb")


def extension(kernels: Path) -> Path:
    """Return the extension's file for the installed OpenVINO, in the cache folder; compile it if missing.

    Args:
        kernels: the library of kernels, which the extension loads: from its own folder, else from where it is now.

    Raises:
        Unusable: this is not Linux, OpenVINO or a C++ compiler is missing, or the extension cannot be built or kept.
    """
    advice = "Give a C++ compiler that works (CXX=g++), or use ONNX Runtime, which needs none."
    if sys.platform != "linux":
        raise Unusable(f"the extension is built on Linux only, not on {sys.platform}", "Use ONNX Runtime.")
    installed = importlib.util.find_spec(PACKAGE)
    if installed is None or not installed.origin:
        raise Unusable("OpenVINO is not installed", "Install it: pip install 'cadsurgery[export]'.")
    folder = Path(installed.origin).parent
    compiler = build.find_compiler_of_cpp()
    if compiler is None:
        raise Unusable("there is no C++ compiler", advice)
    libraries = [path for name in _LINKED for path in sorted((folder / "libs").glob(f"lib{name}.so*"))[:1]]
    options = [
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-I",
        str(build.SOURCES),
        "-I",
        str(folder / "include"),
    ]
    options += ["-DWITH_TBB"] if any(path.name.startswith("libtbb") for path in libraries) else []
    options += [f"-L{kernels.parent}", f"-l:{kernels.name}", f"-Wl,-rpath,$ORIGIN:{kernels.parent}"]
    command = [*compiler, *options, *map(str, libraries)]
    made_of = [SOURCE, build.SOURCES / "convolve.h", build.SOURCES / "parallel.h"]
    parts = [importlib.metadata.version(PACKAGE), version_of(compiler, advice), *command]
    mark = hashlib.sha256("\0".join(parts).encode() + b"".join(path.read_bytes() for path in made_of))
    try:
        return keep_in_cache(
            f"openvino-{mark.hexdigest()[:16]}.so",
            lambda target: build.compile_extension(command, target, SOURCE),
            intact,
        )[1]
    except (build.BuildError, TimeoutError) as error:
        raise Unusable(f"the extension could not be built: {error}", advice) from error
