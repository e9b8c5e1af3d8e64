"""Find or compile the kernels, and open the library.

The library inside the package (from a wheel or from an installation from source) is preferred. The next choice is the
library in the user's cache folder, which is compiled on first use. Without either, callers use torch's operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from cadsurgery.kernels import build
from cadsurgery.support.errors import CadWarning
from cadsurgery.support.files import cache_folders, is_private, keep_whole, only_one

# Longer than a build may take: a waiting process sees the build of the other process succeed or fail.
WAIT_SECONDS = build.BUILD_SECONDS + 30
_LOADS = count()
T = TypeVar("T")


class Unusable(Exception):
    """A library cannot be used.

    Args:
        reason: the reason in one line.
        next: advice for the user.
    """

    def __init__(self, reason: str, next: str) -> None:
        super().__init__(reason)
        self.reason, self.next = reason, next


class Found(NamedTuple):
    """The compiled kernels, their origin ("package" or "cache") and their file; without kernels None and the reason."""

    library: ctypes.CDLL | None
    origin: str
    path: Path | None = None


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None if CADSURGERY_NATIVE=0, without a compiler, or if they cannot be used.

    Warns:
        CadWarning: see `find`.
    """
    return find().library


def path_of_library() -> Path | None:
    """Return the file of the compiled kernels; None in the cases of `library`.

    Warns:
        CadWarning: see `find`.
    """
    return find().path


@cache
def find() -> Found:
    """Return the compiled kernels and their origin.

    Warns:
        CadWarning: there are kernels or a compiler, but the kernels cannot be built or loaded.
    """
    if os.environ.get("CADSURGERY_NATIVE", "1") == "0":
        return Found(None, "CADSURGERY_NATIVE=0")
    try:
        opened, origin = _of_package(), "package"
        if opened is None:
            opened, origin = _of_cache(), "cache"
    except Unusable as error:
        warnings.warn(
            f"the compiled kernels are not used: {error.reason}. Networks run on torch's operations, which is slower. "
            f"{error.next}",
            CadWarning,
            stacklevel=3,
        )
        return Found(None, error.reason)
    if opened is None:
        return Found(None, "there is no C compiler")
    found, path = opened
    found.processor_features.restype = ctypes.c_ulong
    found.use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    found.use_threads.restype = None
    found.use_threads(*_threads())
    return Found(found, origin, path)


_Opened = tuple[ctypes.CDLL, Path]


def _of_package() -> _Opened | None:
    """Open the library inside the package; None if it is missing or older than the package's C files."""
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
        return open_library(path, is_own=False), path
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be loaded ({error})", again) from error


def _is_stale(data: bytes) -> bool:
    """True if a library was built from other C files than the package's; False if the package has no C files."""
    has_sources = (build.SOURCES / "processor.c").exists()
    return has_sources and build.fingerprint_of(data) != build.fingerprint(build.SOURCES)


def _of_cache() -> _Opened | None:
    """Open the library in the cache folder; compile it if missing.

    The file's name contains the sources' fingerprint and the compiler's version, but not the processor: the library
    holds all forms, and machines with different processors may share the folder.
    """
    compiler = build.find_compiler()
    if compiler is None:
        return _of_another_machine()
    advice = "Give a C compiler that works (CC=gcc), or set CADSURGERY_NATIVE=0."
    name = f"kernels-{build.fingerprint(build.SOURCES)[:16]}-{version_of(compiler, advice)}"
    try:
        return keep_in_cache(
            name + build.LIBRARY.suffix,
            lambda target: build.build(compiler, target, sources=build.SOURCES),
            open_private,
        )
    except build.BuildError as error:
        raise Unusable(f"they could not be built: {error}", advice) from error
    except TimeoutError as error:
        raise Unusable(f"{error}, to build them", "Try again, or set CADSURGERY_NATIVE=0.") from error


def keep_in_cache(
    name: str, make: Callable[[Path], object], open_it: Callable[[Path], T | None]
) -> tuple[T, Path]:
    """Open a file in the cache folder, or in a temporary folder if the cache is unusable; make it if missing.

    Args:
        name: the file's name.
        make: writes the file.
        open_it: returns what is opened; None if the file is missing or not as it was written.

    Raises:
        Unusable: no folder can hold the file.
        BuildError: the file could not be built.
        TimeoutError: another process, which builds it, took too long.
    """
    reasons: list[str] = []
    for folder in cache_folders("kernels"):
        if _forbids_execution(folder):
            reasons.append(f"{folder} is in a file system that forbids execution (noexec)")
            continue
        path = folder / name
        try:
            opened = open_it(path)
            if opened is None:
                _build_once(path, make, open_it)
                opened = open_it(path)
            if opened is not None:
                return opened, path
            reasons.append(f"{path} is not as it was written")
        except (build.BuildError, TimeoutError):
            raise
        except OSError as error:
            reasons.append(f"{folder}: {error}")
    raise Unusable(
        "; ".join(reasons) or "neither the cache folder nor the temporary one can be written",
        "Set XDG_CACHE_HOME to a folder of yours that nobody else can write to and that allows execution, or set "
        "CADSURGERY_NATIVE=0.",
    )


def _of_another_machine() -> _Opened | None:
    """Open a library in the cache folder that another machine with a compiler has built."""
    with contextlib.suppress(OSError):
        pattern = f"kernels-{build.fingerprint(build.SOURCES)[:16]}-*{build.LIBRARY.suffix}"
        for folder in cache_folders("kernels"):
            for path in sorted(folder.glob(pattern)):
                with contextlib.suppress(OSError):
                    if (found := open_private(path)) is not None:
                        return found, path
    if build.LIBRARY.exists():
        raise Unusable(
            f"{build.LIBRARY} was made of other C files than those of the package, and there is no C compiler",
            "Install cadsurgery again, or install a C compiler.",
        )
    return None


def version_of(compiler: Sequence[str], advice: str) -> str:
    """Return a hash of a compiler's version and options.

    Raises:
        Unusable: the compiler does not run.
    """
    try:
        command = [*compiler, "--version"]
        done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unusable(f"{compiler[0]} does not tell its version ({error})", advice) from error
    return hashlib.sha256(done.stdout + " ".join(compiler[1:]).encode()).hexdigest()[:8]


def _build_once(
    target: Path, make: Callable[[Path], object], open_it: Callable[[Path], object | None]
) -> None:
    """Build a library, or wait until another process has built it; other processes wait in turn.

    Raises:
        BuildError: the library could not be built, by this process or by the other one.
        TimeoutError: the other process took too long.
        OSError: the folder cannot be written.
    """
    failure = target.with_suffix(".failed")
    before = _modified(failure)
    with only_one(target.parent / "lock", WAIT_SECONDS):
        if open_it(target) is not None:
            return
        if _modified(failure) != before:  # a build failed while this process waited, and would fail again
            raise build.BuildError(failure.read_text(encoding="utf-8"))
        try:
            with keep_whole(target) as folder:
                make(folder / "successor")
        except build.BuildError as error:
            failure.write_text(str(error), encoding="utf-8")
            raise
        failure.unlink(missing_ok=True)


def _modified(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _forbids_execution(folder: Path) -> bool:
    """True if the folder's file system is mounted without permission to execute, so that no library can be loaded."""
    if not hasattr(os, "statvfs") or not hasattr(os, "ST_NOEXEC"):
        return False
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def open_private(path: Path) -> ctypes.CDLL | None:
    """Open a library of the cache; None if the file is missing, truncated, changed, a link or writable by others.

    Raises:
        OSError: the file is intact, but the loader refuses it.
    """
    try:
        return open_library(path, is_own=True)
    except (FileNotFoundError, PermissionError, ValueError):
        return None


def open_library(path: Path, is_own: bool) -> ctypes.CDLL:
    """Load a library after checking that its file is complete; a truncated library would crash the process.

    The checked file itself is loaded, through its descriptor, even if its name is replaced meanwhile.

    Args:
        path: the file.
        is_own: refuse a file that is a link, or that another user could have written.

    Raises:
        ValueError: the file is damaged, or another user could have written it.
        OSError: the file cannot be read, or the loader refuses it.
    """
    with _checked(path, is_own) as descriptor:
        # A new name each time: for a known name the loader would return the library loaded before.
        name = f"/proc/self/fd/{'./' * next(_LOADS)}{descriptor}"
        return ctypes.CDLL(name if os.path.exists(name) else str(path))


def intact(path: Path) -> Path | None:
    """Return the path of a library of the cache, which an engine opens itself; None in the cases of `open_private`."""
    try:
        with _checked(path, is_own=True):
            return path
    except (FileNotFoundError, PermissionError, ValueError):
        return None


@contextlib.contextmanager
def _checked(path: Path, is_own: bool) -> Iterator[int]:
    """Open a library and yield its descriptor. The last bytes of the file are the hash of the others.

    Raises: see `open_library`.
    """
    # O_NONBLOCK: opening a FIFO of this name would block.
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
        yield descriptor


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
