"""Find the compiled kernels, or compile them, and open the library.

The library of the package comes first, put there by a wheel or by the installation from source; then the one in the
user's cache folder, compiled when it is first needed. Without either, callers use torch's operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from cadsurgery.kernels import build
from cadsurgery.support.errors import CadWarning
from cadsurgery.support.files import cache_folders, is_private, keep_whole, only_one

# Longer than a build may take: who waits for another process sees it succeed or fail.
WAIT_SECONDS = build.BUILD_SECONDS + 30
_LOADS = count()


class Unusable(Exception):
    """A library cannot be used.

    Args:
        reason: why, in a line.
        next: what the user can do.
    """

    def __init__(self, reason: str, next: str) -> None:
        super().__init__(reason)
        self.reason, self.next = reason, next


class Found(NamedTuple):
    """The compiled kernels and where they came from: "package" or "cache"; without any, None and the reason."""

    library: ctypes.CDLL | None
    origin: str


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: CADSURGERY_NATIVE=0, no compiler to build them with, or they cannot be used.

    Warns:
        CadWarning: see `find`.
    """
    return find().library


@cache
def find() -> Found:
    """The compiled kernels, and where they came from.

    Warns:
        CadWarning: there are kernels or a compiler, but the kernels cannot be built or loaded.
    """
    if os.environ.get("CADSURGERY_NATIVE", "1") == "0":
        return Found(None, "CADSURGERY_NATIVE=0")
    try:
        found, origin = _of_package(), "package"
        if found is None:
            found, origin = _of_cache(), "cache"
    except Unusable as error:
        warnings.warn(
            f"the compiled kernels are not used: {error.reason}. Networks run by torch's operations, slower. "
            f"{error.next}",
            CadWarning,
            stacklevel=3,
        )
        return Found(None, error.reason)
    if found is None:
        return Found(None, "there is no C compiler")
    found.processor_features.restype = ctypes.c_ulong
    found.use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    found.use_threads.restype = None
    found.use_threads(*_threads())
    return Found(found, origin)


def _of_package() -> ctypes.CDLL | None:
    """The library inside the package; None if there is none, or if the C files beside it have changed since."""
    path, again = build.LIBRARY, "Install cadsurgery again, or set CADSURGERY_NATIVE=0."
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(f"{path} cannot be read ({error.strerror})", again) from error
    if not build.is_whole(data):
        raise Unusable(f"{path} is damaged", again)
    if _is_stale(data):
        return None
    try:
        return open_library(path, is_own=False)
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be loaded ({error})", again) from error


def _is_stale(data: bytes) -> bool:
    """True if a library was made of other C files than those of the package; False if the package has none."""
    has_sources = (build.SOURCES / "processor.c").exists()
    return has_sources and build.fingerprint_of(data) != build.fingerprint(build.SOURCES)


def _of_cache() -> ctypes.CDLL | None:
    """The library in the cache folder, or in a temporary one where that cannot be used; compiled if it is missing.

    The file's name holds the sources' fingerprint and the compiler's version, not the processor: all forms are in the
    library, and machines of different processors may share the folder.
    """
    compiler = build.find_compiler()
    if compiler is None:
        return _of_another_machine()
    reasons: list[str] = []
    advice = "Give a C compiler that works (CC=gcc), or set CADSURGERY_NATIVE=0."
    name = (
        f"kernels-{build.fingerprint(build.SOURCES)[:16]}-{_version(compiler, advice)}{build.LIBRARY.suffix}"
    )
    for folder in cache_folders("kernels"):
        if _forbids_execution(folder):
            reasons.append(f"{folder} is in a file system that forbids execution (noexec)")
            continue
        try:
            compiled = open_private(folder / name)
            if compiled is None:
                _build_once(compiler, folder / name)
                compiled = open_private(folder / name)
            if compiled is not None:
                return compiled
            reasons.append(f"{folder / name} is not as it was written")
        except build.BuildError as error:
            raise Unusable(f"they could not be built: {error}", advice) from error
        except TimeoutError as error:
            raise Unusable(f"{error}, to build them", "Try again, or set CADSURGERY_NATIVE=0.") from error
        except OSError as error:
            reasons.append(f"{folder}: {error}")
    raise Unusable(
        "; ".join(reasons) or "neither the cache folder nor the temporary one can be written",
        "Set XDG_CACHE_HOME to a folder of yours that nobody else can write to and that allows execution, or set "
        "CADSURGERY_NATIVE=0.",
    )


def _of_another_machine() -> ctypes.CDLL | None:
    """A library that a machine with a compiler left in the cache folder that they share."""
    with contextlib.suppress(OSError):
        pattern = f"kernels-{build.fingerprint(build.SOURCES)[:16]}-*{build.LIBRARY.suffix}"
        for folder in cache_folders("kernels"):
            for path in sorted(folder.glob(pattern)):
                with contextlib.suppress(OSError):
                    if (found := open_private(path)) is not None:
                        return found
    if build.LIBRARY.exists():
        raise Unusable(
            f"{build.LIBRARY} was made of other C files than those of the package, and there is no C compiler",
            "Install cadsurgery again, or install a C compiler.",
        )
    return None


def _version(compiler: Sequence[str], advice: str) -> str:
    try:
        command = [*compiler, "--version"]
        done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unusable(f"{compiler[0]} does not tell its version ({error})", advice) from error
    return hashlib.sha256(done.stdout + " ".join(compiler[1:]).encode()).hexdigest()[:8]


def _build_once(compiler: Sequence[str], target: Path) -> None:
    """Build a library while other processes that want it wait, or wait until another process has built it.

    Raises:
        BuildError: it could not be built, by this process or by the one that it waited for.
        TimeoutError: the other process took too long.
        OSError: the folder cannot be written.
    """
    failure = target.with_suffix(".failed")
    before = _modified(failure)
    with only_one(target.parent / "lock", WAIT_SECONDS):
        if open_private(target) is not None:
            return
        if _modified(failure) != before:  # tried while this process waited: it would fail again
            raise build.BuildError(failure.read_text(encoding="utf-8"))
        try:
            with keep_whole(target) as folder:
                build.build(compiler, folder / "successor", sources=build.SOURCES)
        except build.BuildError as error:
            failure.write_text(str(error), encoding="utf-8")
            raise
        failure.unlink(missing_ok=True)


def _modified(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _forbids_execution(folder: Path) -> bool:
    """True if no library can be loaded from a folder, as its file system was mounted."""
    if not hasattr(os, "statvfs") or not hasattr(os, "ST_NOEXEC"):
        return False
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def open_private(path: Path) -> ctypes.CDLL | None:
    """The library of a file of the cache; None if it is missing, cut off, changed, a link or not this user's alone.

    Raises:
        OSError: the file is as it was written, but the loader refuses it.
    """
    try:
        return open_library(path, is_own=True)
    except (FileNotFoundError, PermissionError, ValueError):
        return None


def open_library(path: Path, is_own: bool) -> ctypes.CDLL:
    """The library of a file that is whole: one that is cut off would end the process when it is first used.

    Its last bytes are the hash of all before them. Loaded is the very file that was looked at, by its descriptor,
    whatever its name stands for by then.

    Args:
        path: the file.
        is_own: refuse a file that is a link, or that another user could have written.

    Raises:
        ValueError: it is not whole, or another's.
        OSError: it cannot be read, or the loader refuses it.
    """
    # A queue in the place of the file would block without O_NONBLOCK.
    flags = getattr(os, "O_NOFOLLOW", 0) * is_own | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if is_own and path.is_symlink():
            raise ValueError(f"{path} is a link") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        if is_own and not is_private(os.fstat(descriptor)):
            raise ValueError(f"{path} is not this user's alone")
        if not build.is_whole(file.read()):
            raise ValueError(f"{path} is damaged")
        # A name that was not loaded before: for one that was, the loader gives what it stood for then.
        name = f"/proc/self/fd/{'./' * next(_LOADS)}{descriptor}"
        return ctypes.CDLL(name if os.path.exists(name) else str(path))


def _threads() -> tuple[int | None, int | None]:
    """Addresses of torch's `torch_parallel_for`, and of `GOMP_parallel` where torch has none; None where there is none.

    The threads are those that torch has: a second set of them would compete for the cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    parallel = _address(folder / name, "torch_parallel_for")
    if parallel is not None:
        return parallel, None
    # Wheels bring an OpenMP runtime in one of two folders; other builds of torch have loaded the system's.
    candidates = [*folder.glob("libgomp*.so*"), *folder.parent.with_name("torch.libs").glob("libgomp*.so*")]
    found = (_address(path, "GOMP_parallel") for path in [*sorted(candidates), None])
    return None, next((address for address in found if address), None)


def _address(path: Path | None, name: str) -> int | None:
    """Where a function of a library that is loaded lies; without a path that of the process itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no library of the process
        found = ctypes.CDLL(str(path) if path else None, mode=getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_NOW)
        return ctypes.cast(found[name], ctypes.c_void_p).value
    return None
