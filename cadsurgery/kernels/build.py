"""Compile the kernels into one shared library that holds every form of every function.

The library is compiled when the package is installed, or for a wheel. This file needs only the standard library, so
that setup.py can load it by its path. It can also be run as a script, after a change of the C files or for another
architecture:

    python cadsurgery/kernels/build.py
    python cadsurgery/kernels/build.py kernels.so --compiler aarch64-linux-gnu-gcc --architecture aarch64

A form is one C file compiled for one instruction set and, for most files, one element type. Its functions are called
`<function>_<element>_<instruction set>`. dispatch.py chooses the form that runs, by the features of the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SOURCES = Path(__file__).parent / "c"
LIBRARY = (
    Path(__file__).parent
    / "lib"
    / {"darwin": "kernels.dylib", "win32": "kernels.dll"}.get(sys.platform, "kernels.so")
)
COMPILER_SECONDS = 180.0  # time limit for one file

# Bit i of `processor_features()` in processor.c stands for feature i.
FEATURES = ("sse4", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "neon", "dotprod", "bf16", "amx")


class InstructionSet(NamedTuple):
    """An instruction set that forms are compiled for.

    Attributes:
        name: suffix of the names of its functions.
        needs: features that the processor must have, from `FEATURES`.
        flags: compiler flags.
        example: an instruction by which to test if the assembler knows the set; empty if every assembler does.
    """

    name: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    example: str = ""


# The levels x86-64-v2, v3 and v4 are spelled out, since compilers before GCC 11 and Clang 12 do not know their names.
_V1 = ("-march=x86-64",)
_V2 = (*_V1, "-mcx16", "-msahf", "-mpopcnt", "-msse3", "-mssse3", "-msse4.1", "-msse4.2")
_V3 = (*_V2, "-mavx", "-mavx2", "-mbmi", "-mbmi2", "-mf16c", "-mfma", "-mlzcnt", "-mmovbe")
_V4 = (*_V3, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")), "-mprefer-vector-width=512")
_OF_V4 = ("sse4", "avx2", "avx512")

# Narrowest first. `SCALAR` disables intrinsics in the sources.
INSTRUCTION_SETS: dict[str, tuple[InstructionSet, ...]] = {
    "x86-64": (
        InstructionSet("scalar", (), (*_V1, "-DSCALAR")),
        InstructionSet("sse4", ("sse4",), _V2),
        InstructionSet("avx2", ("sse4", "avx2"), _V3),
        InstructionSet(
            "avxvnni",
            ("sse4", "avx2", "avxvnni"),
            (*_V3, "-mavxvnni"),
            "{vex} vpdpbusd %ymm0, %ymm1, %ymm2",
        ),
        InstructionSet("avx512", _OF_V4, _V4),
        InstructionSet(
            "avx512vnni",
            (*_OF_V4, "avx512vnni"),
            (*_V4, "-mavx512vnni"),
            "vpdpbusd %zmm0, %zmm1, %zmm2",
        ),
        InstructionSet(
            "avx512bf16",
            (*_OF_V4, "avx512vnni", "avx512bf16"),
            (*_V4, "-mavx512vnni", "-mavx512bf16"),
            "vdpbf16ps %zmm0, %zmm1, %zmm2",
        ),
        InstructionSet(
            "amx",
            (*_OF_V4, "avx512vnni", "avx512bf16", "amx"),
            (*_V4, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
            "tdpbf16ps %tmm0, %tmm1, %tmm2",
        ),
    ),
    "aarch64": (
        InstructionSet("scalar", (), ("-DSCALAR",)),
        InstructionSet("neon", ("neon",), ("-march=armv8-a",)),
        InstructionSet(
            "dotprod", ("neon", "dotprod"), ("-march=armv8.2-a+dotprod",), "sdot v0.4s, v1.16b, v2.16b"
        ),
        InstructionSet(
            "bf16",
            ("neon", "dotprod", "bf16"),
            ("-march=armv8.2-a+dotprod+bf16",),
            "bfdot v0.4s, v1.8h, v2.8h",
        ),
    ),
}
_ANY = (InstructionSet("scalar", (), ("-DSCALAR",)),)
# What each instruction set needs, with bit i for feature i: C files that choose forms get it as a table and as numbers.
_NEEDS = {
    row.name: sum(1 << FEATURES.index(name) for name in row.needs)
    for sets in INSTRUCTION_SETS.values()
    for row in sets
}
_TABLE_OF_SETS = (
    "-DSETS=" + ",".join(f'{{"{name}",{bits}}}' for name, bits in _NEEDS.items()),
    *(f"-DNEEDS_{name}={bits}" for name, bits in _NEEDS.items()),
)

ELEMENTS: dict[str, tuple[str, ...]] = {
    "float32": ("-DELEMENT=float",),
    "float64": ("-DELEMENT=double", "-DWIDE"),
    "bfloat16": ("-DBF16",),
    "uint8": ("-DBYTES",),
}


class KernelSource(NamedTuple):
    """A row of the build table: a C file and its forms, one for each element type and instruction set.

    Without element types there is one form per instruction set. Without instruction sets the file is compiled once, for
    every processor, with the table of instruction sets: `SETS`, and for each the features that it needs, `NEEDS_avx2`.
    """

    name: str
    elements: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("-ffp-contract=fast",)


# float32 has a form for each vector width. The scalar forms of the other types use vectors as wide as those of SSE4.
# float64 is used for checks only, so 32 bytes are wide enough.
_VECTORS = {
    "float32": ("scalar", "sse4", "avx2", "avx512", "neon"),
    "float64": ("scalar", "avx2", "neon"),
    "bfloat16": ("scalar", "avx2", "avx512", "neon"),
    "uint8": ("scalar", "avx2", "avx512", "neon"),
}
_BYTES = ("scalar", "sse4", "avx2", "avxvnni", "avx512vnni", "neon", "dotprod")
_FLOATS = ("float32", "float64", "bfloat16")
_EXACT = (*ELEMENTS["uint8"], "-ffp-contract=off")  # one rounding per operation, as in torch
# Compilers vectorise these loops only if square roots do not set errno and divisions do not trap.
_SOLVING = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


def _by_width(name: str, *elements: str) -> tuple[KernelSource, ...]:
    """Return one table row per element type, with the instruction sets of `_VECTORS`."""
    return tuple(KernelSource(name, (element,), _VECTORS[element]) for element in elements)


# The files that compile longest come first, so that the parallel build does not end with a long one.
TABLE = (
    *_by_width("product", *_FLOATS),
    KernelSource("product", ("bfloat16",), ("avx512bf16", "bf16")),
    *_by_width("grouped", *ELEMENTS),
    KernelSource("grouped", ("bfloat16",), ("avx512bf16",)),
    KernelSource("product_tiles", ("bfloat16",), ("amx",)),
    KernelSource("int8_tiles", (), ("amx",), _EXACT),
    KernelSource("int8", (), _BYTES, _EXACT),
    KernelSource("int8_limited", (), ("avx2",), _EXACT),
    KernelSource("int8_depthwise", (), ("sse4", "avx2", "avxvnni", "avx512vnni"), _EXACT),
    KernelSource("warp", ("float32", "float64"), ("scalar", "avx2", "neon"), _SOLVING),
    *_by_width("move", *ELEMENTS),
    *_by_width("pool", *_FLOATS),
    *_by_width("pixels", *_FLOATS),
    *_by_width("fill", *_FLOATS),
    KernelSource("interpolate", (), _VECTORS["uint8"]),
    KernelSource("maps", (), ("scalar",)),
    KernelSource("processor"),
    KernelSource("convolve"),
    KernelSource("convolve_bytes"),
    KernelSource("pick"),
    KernelSource("resize"),
    KernelSource("cells"),
    KernelSource("onnxruntime"),
)
# Never `-march=native`: other processors than the compiling one may use the library. Never `-fopenmp`: the kernels run
# on torch's threads.
_COMMON = ("-O3", "-fPIC", "-fvisibility=default", "-fopenmp-simd", "-c")
# The library takes memcpy and similar functions from the process, so that it depends on no version of a C library.
_LINK = (
    ("-dynamiclib", "-undefined", "dynamic_lookup")
    if sys.platform == "darwin"
    else ("-shared", "-nostdlib", "-nostartfiles")
)

_MARK = b"cadsurgery_sources="


class BuildError(Exception):
    """The library could not be built; the message gives the reason in one line."""


class Form(NamedTuple):
    """One compiler call: the C file, the suffix of its function names, the flags and the instruction set."""

    source: Path
    suffix: str
    flags: tuple[str, ...]
    set: InstructionSet | None


class Built(NamedTuple):
    """Result of a build: the number of forms, and the instruction sets that the compiler does not know."""

    forms: int
    left_out: tuple[str, ...]


def architecture() -> str:
    """Return the processor's architecture: "x86-64", "aarch64", or the operating system's name for another one."""
    name = platform.machine().lower()
    return {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}.get(name, name)


def instruction_sets(of: str | None = None) -> tuple[InstructionSet, ...]:
    """Return the instruction sets that the kernels are compiled for on an architecture, narrowest first."""
    return INSTRUCTION_SETS.get(of or architecture(), _ANY)


def forms(sources: Path = SOURCES, of: str | None = None) -> list[Form]:
    """Return all forms of the C files in a folder, according to `TABLE`."""
    sets = {row.name: row for row in instruction_sets(of)}
    baseline = tuple(flag for flag in instruction_sets(of)[0].flags if flag != "-DSCALAR")
    listed = []
    for row in TABLE:
        file = sources / f"{row.name}.c"
        if not file.exists():
            continue
        if not row.sets:
            listed.append(Form(file, "", (*row.flags, *baseline, *_TABLE_OF_SETS), None))
        for name in row.sets:
            for element in row.elements or ("",):
                if name in sets:
                    suffix = f"{element}_{name}" if element else name
                    flags = (*row.flags, *sets[name].flags, *ELEMENTS.get(element, ()))
                    listed.append(Form(file, suffix, flags, sets[name]))
    return listed


def fingerprint(sources: Path = SOURCES, of: str | None = None) -> str:
    """Return a hash of everything the library depends on except the compiler: files, flags, architecture."""
    parts = [(of or architecture()).encode(), sys.platform.encode(), " ".join((*_COMMON, *_LINK)).encode()]
    parts += [" ".join((form.source.name, form.suffix, *form.flags)).encode() for form in forms(sources, of)]
    for file in sorted([*sources.glob("*.c"), *sources.glob("*.h")], key=lambda file: file.name):
        parts += [file.name.encode(), file.read_bytes()]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def fingerprint_of(library: bytes) -> str:
    """Return the fingerprint stored in the bytes of a library; empty if there is none."""
    stored = re.search(re.escape(_MARK) + rb"([0-9a-f]{64})", library)
    return stored[1].decode() if stored else ""


def find_compiler() -> list[str] | None:
    """Return the C compiler's command: the variable CC, else the first of cc, gcc and clang on the PATH, else None.

    None on Windows: GCC misaligns vectors of 32 bytes on the stack there (GCC bug 54412).
    """
    return _find("CC", ("cc", "gcc", "clang"))


def find_compiler_of_cpp() -> list[str] | None:
    """Return the C++ compiler's command: the variable CXX, else c++, g++ or clang++; as `find_compiler`."""
    return _find("CXX", ("c++", "g++", "clang++"))


def _find(variable: str, names: Sequence[str]) -> list[str] | None:
    if sys.platform == "win32":
        return None
    with contextlib.suppress(ValueError):  # an unclosed quotation
        named = shlex.split(os.environ.get(variable, ""))
        if named and (path := shutil.which(named[0])):
            return [path, *named[1:]]
    return next(([path] for name in names if (path := shutil.which(name))), None)


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: those it may run on, and the time that its container, or
    another control group, gets of them, rounded up.

    Args:
        root: the folder below which Linux shows processes and control groups.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores' worth of time that each control group of this process, and those around it, may use."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, place = line.split(":", 2)
        # Version 2 has one tree for all controllers, version 1 one for each.
        folders: tuple[str, ...] = ("",)
        names: tuple[str, ...] = ("cpu.max",)
        if "cpu" in controllers.split(","):
            folders, names = ("cpu", controllers), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        elif controllers:
            continue
        for folder in dict.fromkeys(folders):
            tree = root / "sys/fs/cgroup" / folder
            inside = PurePosixPath(place.strip("/"))
            for group in (inside, *inside.parents):  # in a container the path may be that of the host
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    text = " ".join((tree / group / name).read_text(encoding="ascii") for name in names)
                    quota, period = map(int, text.split())  # "max" is no number, and there -1 is no quota
                    if quota > 0:
                        yield quota / period


def build(
    compiler: Sequence[str],
    target: Path,
    *,
    sources: Path = SOURCES,
    jobs: int | None = None,
    of: str | None = None,
) -> Built:
    """Compile all forms in parallel and link them into the file `target`, which appears complete or not at all.

    Args:
        compiler: the compiler's command.
        target: the file to write; object files are kept in a temporary folder beside it.
        sources: the folder of the C files.
        jobs: number of compilers that run at the same time; None: the number of cores.
        of: the architecture to compile for; None: this machine's.

    Raises:
        BuildError: a compiler fails, does not end in time or cannot be started.
    """
    if not (sources / "processor.c").exists():
        raise BuildError(f"there are no C files in {sources}")
    define = f'-DFINGERPRINT="{fingerprint(sources, of)}"'
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".objects-") as name:
        compile_form = partial(_compile_form, compiler, Path(name), define)
        with ThreadPoolExecutor(jobs or cores()) as pool:
            tasks = [(form, pool.submit(compile_form, form)) for form in forms(sources, of)]
            try:
                outputs = [(form, task.result()) for form, task in tasks]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        objects = [str(path) for _, path in outputs if path]
        left_out = {form.set.name for form, path in outputs if form.set and not path}
        _compile([*compiler, *_LINK, *objects], target, Path(name), "the link of all files")
    return Built(len(objects), tuple(sorted(left_out)))


def _compile_form(compiler: Sequence[str], folder: Path, define: str, form: Form) -> Path | None:
    """Compile one form and return its object file; None if the compiler does not know the instruction set."""
    output = folder / f"{form.source.stem}_{form.suffix}.o"
    macro = f"-DSUFFIX(name)=name##_{form.suffix}" if form.suffix else define
    command = [*compiler, *_COMMON, *form.flags, macro, str(form.source)]
    try:
        return _compile(command, output, folder, form.source.name)
    except BuildError:
        if form.set and form.set.example and not _is_known(compiler, folder, form):
            return None
        raise


def _is_known(compiler: Sequence[str], folder: Path, form: Form) -> bool:
    """True if the compiler can assemble the example instruction of a form's instruction set."""
    assert form.set is not None
    probe = folder / f"probe_{form.source.stem}_{form.suffix}.c"
    probe.write_text(f'void probe(void) {{ __asm__("{form.set.example}"); }}\n')
    try:
        _compile([*compiler, "-c", *form.set.flags, str(probe)], probe.with_suffix(".o"), folder, probe.name)
    except BuildError:
        return False
    return True


def compile_extension(command: Sequence[str], target: Path, source: Path) -> None:
    """Compile one C++ file into a shared library that other software loads.

    Args:
        command: the compiler's command and its options.
        target: the file to write.
        source: the C++ file.

    Raises:
        BuildError: the compiler fails, does not end in time or cannot be started.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".objects-") as folder:
        _compile([command[0], str(source), *command[1:]], target, Path(folder), source.name)


def _compile(command: Sequence[str], target: Path, folder: Path, what: str) -> Path:
    """Run a compiler that writes into a temporary folder, then move its output to `target`.

    Raises:
        BuildError: the compiler fails, does not end in time or cannot be started.
    """
    output = folder / f"new-{target.name}"
    try:
        done = subprocess.run(
            [*command, "-o", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},  # English messages, so that errors are recognised
            timeout=COMPILER_SECONDS,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end within {COMPILER_SECONDS:g} seconds ({what})") from error
    if done.returncode != 0 or not output.exists():
        raise BuildError(_compiler_message(command[0], done.stdout.decode(errors="replace"), what))
    return output.replace(target)


def _compiler_message(compiler: str, text: str, what: str) -> str:
    """Summarise a compiler's failure in one line: its first errors, or its last lines if none is marked as an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if re.search(r"\berror\b|\bundefined\b", line, re.IGNORECASE)]
    message, name = " / ".join(marked[:3] or lines[-3:]), Path(compiler).name
    return f"{name} says {message} ({what})" if message else f"{name} gave no file and no reason ({what})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: compile and print the result or the error."""
    parser = argparse.ArgumentParser(description="Compile the kernels into one shared library.")
    parser.add_argument(
        "target", type=Path, nargs="?", default=LIBRARY, help="the file to write; the package's if not given"
    )
    parser.add_argument("--compiler", default="", help="the C compiler's command; CC or cc if not given")
    parser.add_argument("--architecture", choices=sorted(INSTRUCTION_SETS), help="if not this machine's")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the folder of the C files")
    options = parser.parse_args(arguments)
    try:
        command = shlex.split(options.compiler) or find_compiler()
        if not command:
            raise BuildError("there is no C compiler on the PATH")
        options.target.parent.mkdir(parents=True, exist_ok=True)
        built = build(command, options.target, sources=options.sources, of=options.architecture)
    except (BuildError, OSError) as error:
        print(f"the kernels could not be compiled: {error}", file=sys.stderr)
        return 1
    print(describe(built))
    return 0


def describe(built: Built) -> str:
    """Describe the result of a build in one line."""
    without = f", without {', '.join(built.left_out)}" if built.left_out else ""
    return f"{built.forms} forms of the kernels compiled{without}"


if __name__ == "__main__":
    sys.exit(main())
