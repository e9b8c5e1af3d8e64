"""Compiled code: C files, compiled once per machine with the C compiler found there, kept in the user's cache folder.

Without a compiler (or with CADSURGERY_NATIVE=0) `library()` is None, and callers use torch operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cadsurgery.support.errors import CadWarning
from cadsurgery.support.files import cache_folder, is_private, keep_whole

NATIVE, INTEGERS, WARP, MAPS = (
    Path(__file__).with_name(f"{name}.c") for name in ("native", "integer", "warp", "maps")
)
_LOADS = count()
_HASH = hashlib.sha256().digest_size
_WIDEST = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = ("-O3", "-march=native", *_WIDEST, "-ffp-contract=fast", "-fopenmp", "-fPIC", "-c")
ELEMENTS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("float32", "-DELEMENT=float"),
    torch.float64: ("float64", "-DELEMENT=double", "-DWIDE"),
    torch.bfloat16: ("bfloat16", "-DBF16"),
    torch.uint8: ("uint8", "-DBYTES"),
}
# Of `warp.c`, whose loops become vectors where no root sets errno and no quotient is caught.
WARP_ELEMENTS = {torch.float32: "float32", torch.float64: "float64"}
_WARP_FLAGS = ("-fno-math-errno", "-fno-trapping-math")
# Forms of `integer.c`, by the instructions they need; a compiler or a processor that has none of them builds none.
_PLAIN_FLAGS = ("-O3", "-mtune=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-c")
INTEGER_FORMS = {
    "vnni": ("-DVNNI", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", *_WIDEST),
    "avx2": ("-mavx2", "-mfma"),
}


def is_observed() -> bool:
    """Whether torch counts, records or compiles what is called: it does not see compiled code."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def has_pairs(dtype: torch.dtype) -> bool:
    """Whether the processor has sums of products of two values of a type side by side, as AVX512-BF16 has."""
    return dtype == torch.bfloat16 and hasattr(library(), "depthwise_bfloat16")


@cache
def library() -> Any:
    """The compiled code, or None.

    Warns:
        CadWarning: a compiler is there, but could not build it.
    """
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc")
    if compiler is None or os.environ.get("CADSURGERY_NATIVE", "1") == "0" or platform.system() != "Linux":
        return None
    try:
        folder = cache_folder()
        if folder is None:
            return None
        target = folder / f"native-{_fingerprint(compiler)}.so"
        compiled = _load(target)
        if compiled is None:
            _build(compiler, target)
            compiled = _load(target)
        return compiled
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        warnings.warn(
            f"the compiled code could not be built: {compiler} says {said[0] if said else error}. Networks run by "
            "torch's operations, slower. Give a C compiler that works (CC=gcc), or set CADSURGERY_NATIVE=0.",
            CadWarning,
            stacklevel=2,
        )
        return None
    except (OSError, subprocess.SubprocessError):
        return None


def _load(path: Path) -> Any:
    """The library of a file, if it is this user's and whole: one that is cut off would end the process, and every
    later one, when it is first used. None otherwise.

    Its last bytes are the hash of all before them. What is loaded is the very file that was looked at, by its
    descriptor, whatever its name stands for by then.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read() if is_private(os.fstat(descriptor)) else b""
        if hashlib.sha256(data[:-_HASH]).digest() != data[-_HASH:]:
            return None
        # A name that was not loaded before: for one that was, the loader gives what it stood for then.
        name = f"/proc/self/fd/{'./' * next(_LOADS)}{descriptor}"
        # OpenMP's symbols are those of torch's own runtime: a second one would compete for the cores.
        return ctypes.CDLL(name if os.path.exists(name) else str(path))


def _build(compiler: str, target: Path) -> None:
    with keep_whole(target) as folder:
        objects = []
        forms: list[tuple[Path, tuple[str, ...]]] = [(MAPS, ("pixels",))]
        forms += [(NATIVE, form) for form in ELEMENTS.values()]
        forms += [(WARP, (*ELEMENTS[dtype], *_WARP_FLAGS)) for dtype in WARP_ELEMENTS]
        for source, (name, *flags) in forms:
            objects.append(f"{folder}/{source.stem}_{name}.o")
            suffix = f"-DSUFFIX(name)=name##_{name}"
            command = [compiler, *_FLAGS, *flags, suffix, str(source), "-o", objects[-1]]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        for name, needed in INTEGER_FORMS.items():
            target_file, suffix = f"{folder}/{name}.o", f"-DSUFFIX(name)=name##_{name}"
            command = [compiler, *_PLAIN_FLAGS, *needed, suffix, str(INTEGERS), "-o", target_file]
            if subprocess.run(command, check=False, capture_output=True, timeout=120).returncode == 0:
                objects.append(target_file)
        whole = folder / "successor"
        link = [compiler, "-shared", "-nostdlib", "-nostartfiles", *objects, "-o", str(whole)]
        subprocess.run(link, check=True, capture_output=True, timeout=120)
        with whole.open("ab") as file:
            file.write(hashlib.sha256(whole.read_bytes()).digest())


def _fingerprint(compiler: str) -> str:
    """What the compiled code depends on, besides the machine: source, flags, compiler."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    flags = [
        *_FLAGS,
        *_WARP_FLAGS,
        *_PLAIN_FLAGS,
        *(flag for form in INTEGER_FORMS.values() for flag in form),
    ]
    sources = (source.read_bytes() for source in (NATIVE, INTEGERS, WARP, MAPS))
    parts = (*sources, " ".join(flags).encode(), version)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
