"""Open the library of compiled kernels, which is in the package since its installation.

Without the library, callers use torch's operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from cadsurgery.kernels import build
from cadsurgery.support.errors import warn


class Kernels(NamedTuple):
    """The compiled kernels and their file; None without kernels, then with the reason."""

    library: ctypes.CDLL | None
    path: Path | None = None
    reason: str = ""


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None if CADSURGERY_NATIVE=0, or if they are missing or cannot be used.

    Warns:
        CadWarning: see `open_kernels`.
    """
    return open_kernels().library


@cache
def open_kernels() -> Kernels:
    """Open the compiled kernels.

    Warns:
        CadWarning: the kernels are missing, older than the C files of the package, or cannot be loaded.
    """
    if os.environ.get("CADSURGERY_NATIVE", "1") == "0":
        return Kernels(None, reason="CADSURGERY_NATIVE=0")
    if reason := _why_unusable(build.LIBRARY):
        return _without(reason)
    try:
        opened = ctypes.CDLL(str(build.LIBRARY))
    except OSError as error:
        return _without(f"{build.LIBRARY} cannot be loaded ({error})")
    opened.processor_features.restype = ctypes.c_ulong
    opened.use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    opened.use_threads.restype = None
    opened.use_threads(*_threads())
    return Kernels(opened, build.LIBRARY)


def _why_unusable(path: Path) -> str:
    """Return the reason why a library cannot be used; empty if it has the fingerprint of the package's C files.

    A package without C files is trusted to have the library that belongs to it.
    """
    try:
        stored = build.fingerprint_of(path.read_bytes())
    except FileNotFoundError:
        return "they were not compiled when the package was installed"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if (build.SOURCES / "processor.c").exists() and stored != build.fingerprint(build.SOURCES):
        return f"{path} was compiled from other C files than those of the package"
    return ""


def _without(reason: str) -> Kernels:
    warn(
        f"the compiled kernels are not used: {reason}. Networks run on torch's operations, which is slower. Install "
        f"cadsurgery again with a C compiler (in a checkout: python {build.__file__}), or set CADSURGERY_NATIVE=0."
    )
    return Kernels(None, reason=reason)


def _threads() -> tuple[int | None, int | None]:
    """Return the addresses of torch's `torch_parallel_for` or, if torch has none, of `GOMP_parallel`; None if missing.

    The kernels run on torch's threads: a second set of threads would compete for the cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    parallel = _address(folder / name, "torch_parallel_for")
    if parallel is not None:
        return parallel, None
    # torch's wheels contain an OpenMP runtime in one of two folders; other builds of torch load the system's.
    candidates = [*folder.glob("libgomp*.so*"), *folder.parent.with_name("torch.libs").glob("libgomp*.so*")]
    found = (_address(path, "GOMP_parallel") for path in [*sorted(candidates), None])
    return None, next((address for address in found if address), None)


def _address(path: Path | None, name: str) -> int | None:
    """Return the address of a function in a loaded library, or in the process itself if `path` is None."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows cannot search the process itself
        found = ctypes.CDLL(str(path) if path else None, mode=getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_NOW)
        return ctypes.cast(found[name], ctypes.c_void_p).value
    return None
