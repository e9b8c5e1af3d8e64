"""Compile the kernels into one shared library that holds every form of every function.

This file needs only the standard library, so that setup.py can load it by its path. It can also be run as a script:

    python cadsurgery/kernels/build.py kernels.so --compiler aarch64-linux-gnu-gcc --architecture aarch64

A form is one C file compiled for one instruction set and, for most files, one element type. Its functions are called
`<function>_<element>_<instruction set>`. load.py chooses the form that runs, by the features of the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent / "c"
LIBRARY = (
    Path(__file__).parent
    / "lib"
    / {"darwin": "kernels.dylib", "win32": "kernels.dll"}.get(sys.platform, "kernels.so")
)
COMPILER_SECONDS = 180.0  # time limit for one file
BUILD_SECONDS = 600.0  # time limit for all files

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

ELEMENTS: dict[str, tuple[str, ...]] = {
    "float32": ("-DELEMENT=float",),
    "float64": ("-DELEMENT=double", "-DWIDE"),
    "bfloat16": ("-DBF16",),
    "uint8": ("-DBYTES",),
}


class Source(NamedTuple):
    """A row of the build table: a C file and its forms, one for each element type and instruction set.

    Without element types there is one form per instruction set. Without instruction sets the file is compiled once, for
    every processor.
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
_EXACT = ("-ffp-contract=off",)  # one rounding per operation, as in torch
# Compilers vectorise these loops only if square roots do not set errno and divisions do not trap.
_SOLVING = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


def _by_width(name: str, *elements: str) -> tuple[Source, ...]:
    """Return one table row per element type, with the instruction sets of `_VECTORS`."""
    return tuple(Source(name, (element,), _VECTORS[element]) for element in elements)


# The files that compile longest come first, so that the parallel build does not end with a long one.
TABLE = (
    *_by_width("product", *_FLOATS),
    Source("product", ("bfloat16",), ("avx512bf16", "bf16")),
    *_by_width("grouped", *ELEMENTS),
    Source("grouped", ("bfloat16",), ("avx512bf16",)),
    Source("expand", ("bfloat16",), ("avx512bf16",)),
    Source("product_tiles", ("bfloat16",), ("amx",)),
    Source("int8_tiles", (), ("amx",), _EXACT),
    Source("int8", (), _BYTES, _EXACT),
    Source("int8_limited", (), ("avx2",), _EXACT),
    Source("int8_depthwise", (), ("sse4", "avx2", "avxvnni", "avx512vnni"), _EXACT),
    Source("warp", ("float32", "float64"), ("scalar", "avx2", "neon"), _SOLVING),
    *_by_width("move", *ELEMENTS),
    *_by_width("pool", *ELEMENTS),
    *_by_width("fill", *_FLOATS),
    Source("interpolate", (), _VECTORS["uint8"]),
    Source("maps", (), ("scalar",)),
    Source("processor"),
    Source("convolve"),
    Source("convolve_bytes"),
    Source("pick"),
    Source("resize"),
    Source("cells"),
    Source("onnxruntime"),
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
_HASH = hashlib.sha256().digest_size


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
    known = {one.name: one for one in instruction_sets(of)}
    found = []
    for row in TABLE:
        file = sources / f"{row.name}.c"
        if not file.exists():
            continue
        if not row.sets:
            baseline = tuple(flag for flag in instruction_sets(of)[0].flags if flag != "-DSCALAR")
            found.append(Form(file, "", (*row.flags, *baseline), None))
        for name in row.sets:
            for element in row.elements or ("",):
                if name in known:
                    suffix = f"{element}_{name}" if element else name
                    flags = (*row.flags, *known[name].flags, *ELEMENTS.get(element, ()))
                    found.append(Form(file, suffix, flags, known[name]))
    return found


def fingerprint(sources: Path = SOURCES, of: str | None = None) -> str:
    """Return a hash of everything the library depends on except the compiler: files, flags, architecture."""
    parts = [(of or architecture()).encode(), sys.platform.encode(), " ".join((*_COMMON, *_LINK)).encode()]
    parts += [" ".join((form.source.name, form.suffix, *form.flags)).encode() for form in forms(sources, of)]
    for file in sorted([*sources.glob("*.c"), *sources.glob("*.h")], key=lambda file: file.name):
        parts += [file.name.encode(), file.read_bytes()]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def fingerprint_of(library: bytes) -> str:
    """Return the fingerprint stored in the bytes of a library; empty if there is none."""
    begin = library.find(_MARK) + len(_MARK)
    found = re.match(rb"[0-9a-f]{64}", library[begin : begin + 64]) if begin >= len(_MARK) else None
    return found[0].decode() if found else ""


def is_whole(library: bytes) -> bool:
    """True if the bytes of a library end with the hash of all preceding bytes.

    Libraries for macOS have no such hash, because the loader would refuse it; it checks the library's signature itself.
    """
    return sys.platform == "darwin" or hashlib.sha256(library[:-_HASH]).digest() == library[-_HASH:]


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
        if named and (found := shutil.which(named[0])):
            return [found, *named[1:]]
    return next(([found] for name in names if (found := shutil.which(name))), None)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(
    compiler: Sequence[str],
    target: Path,
    *,
    sources: Path = SOURCES,
    jobs: int | None = None,
    seconds: float = BUILD_SECONDS,
) -> Built:
    """Compile all forms in parallel and link them into the file `target`.

    A separate process runs the compilers. It ends them when this process ends, even if this process is killed.

    Args:
        compiler: the compiler's command.
        target: the file to write; object files are kept in a temporary folder beside it.
        sources: the folder of the C files.
        jobs: number of compilers that run at the same time; None: the number of cores.
        seconds: time limit for the whole build.

    Raises:
        BuildError: a compiler fails, does not end in time or cannot be started.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # no Python interpreter can be started
        return compile_library(compiler, target, sources=sources, jobs=jobs, seconds=seconds)
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(target), "--watched"]
    command += [
        "--sources",
        str(sources),
        "--compiler",
        json.dumps(list(compiler)),
        "--seconds",
        str(seconds),
    ]
    command += ["--jobs", str(jobs or cores())]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it closes when this process ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{sys.executable} could not be started: {error}") from error
    with process:
        try:
            assert process.stdout is not None
            lines = _read_within(process, seconds + 10).decode(errors="replace").strip().splitlines()
        finally:
            if process.poll() is None:
                _end_group(process)
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
        if "error" in answer:
            raise BuildError(answer["error"])
        return Built(answer["forms"], tuple(answer["left_out"]))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise BuildError(f"the process that runs the compiler ended early: {reason}") from error


def _read_within(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return the output of a process until the process closes it; the input stays open meanwhile."""
    parts: list[bytes] = []

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            parts.append(process.stdout.read())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(seconds)
    if reader.is_alive():
        _end_group(process)
        reader.join(5)
        raise BuildError(f"the compilers did not end within {seconds:g} seconds")
    return b"".join(parts)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


class _Compilers:
    """The running compilers."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, command: Sequence[str], log: Path, seconds: float) -> int:
        """Run a command and return its exit status; its output goes to the file `log`.

        A file, unlike a pipe, does not keep us waiting for child processes that the command leaves behind.

        Raises:
            BuildError: the command cannot be started or does not end in time.
        """
        environment = {**os.environ, "LC_ALL": "C"}  # English messages, so that errors are recognised
        try:
            with log.open("wb") as output, self._lock:
                if self._ended:
                    raise BuildError("another file could not be compiled")
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
                )
                self._running.add(process)
        except OSError as error:
            raise BuildError(f"{command[0]} could not be started: {error.strerror or error}") from error
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"{command[0]} did not end within {seconds:.0f} seconds: {shlex.join(command)}"
            ) from error
        finally:
            with self._lock:
                self._running.discard(process)
            if process.poll() is None:
                process.kill()

    def end(self) -> None:
        """Kill the running compilers and start no others."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()


def compile_library(
    compiler: Sequence[str],
    target: Path,
    *,
    sources: Path = SOURCES,
    jobs: int | None = None,
    seconds: float = BUILD_SECONDS,
    of: str | None = None,
    compilers: _Compilers | None = None,
) -> Built:
    """Compile and link like `build`, but run the compilers directly; `of` may name another architecture.

    Raises:
        BuildError: a compiler fails, does not end in time or cannot be started.
    """
    running, end = compilers or _Compilers(), time.monotonic() + seconds
    all_forms = forms(sources, of)
    if not any(form.source.stem == "processor" for form in all_forms):
        raise BuildError(f"there are no C files in {sources}")
    define = f'-DFINGERPRINT="{fingerprint(sources, of)}"'
    left_out: set[str] = set()

    def run(command: Sequence[str], log: Path) -> int:
        return running.run(command, log, min(COMPILER_SECONDS, end - time.monotonic()))

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".objects-") as name:
        folder = Path(name)

        def compile_form(form: Form) -> Path | None:
            out = folder / f"{form.source.stem}_{form.suffix}.o"
            log = out.with_suffix(".log")
            macro = f"-DSUFFIX(name)=name##_{form.suffix}" if form.suffix else define
            command = [*compiler, *_COMMON, *form.flags, macro, str(form.source), "-o", str(out)]
            if run(command, log) == 0 and out.exists():
                return out
            if form.set and form.set.example and not is_known(form.set):
                left_out.add(form.set.name)
                return None
            raise BuildError(_compiler_message(compiler, log, form.source.name))

        known: dict[str, bool] = {}
        probe_lock = threading.Lock()

        def is_known(one: InstructionSet) -> bool:
            with probe_lock:
                if one.name not in known:
                    probe = folder / f"probe_{one.name}.c"
                    probe.write_text(f'void probe(void) {{ __asm__("{one.example}"); }}\n')
                    command = [*compiler, "-c", *one.flags, str(probe), "-o", str(probe.with_suffix(".o"))]
                    known[one.name] = run(command, probe.with_suffix(".log")) == 0
                return known[one.name]

        with ThreadPoolExecutor(jobs or cores()) as pool:
            tasks = [pool.submit(compile_form, form) for form in all_forms]
            try:
                wait(tasks, return_when=FIRST_EXCEPTION)
                failed = [task.exception() for task in tasks if task.done() and task.exception()]
                if failed and failed[0]:
                    raise failed[0]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                running.end()
                raise
        objects = [str(out) for task in tasks if (out := task.result())]
        whole, log = folder / "whole", folder / "link.log"
        if run([*compiler, *_LINK, *objects, "-o", str(whole)], log) != 0 or not whole.exists():
            raise BuildError(_compiler_message(compiler, log, "the link of all files"))
        _seal(whole)
        whole.replace(target)
    return Built(len(objects), tuple(sorted(left_out)))


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
        whole, log = Path(folder) / "whole", Path(folder) / "log"
        run = [command[0], str(source), *command[1:], "-o", str(whole)]
        if _Compilers().run(run, log, COMPILER_SECONDS) != 0 or not whole.exists():
            raise BuildError(_compiler_message(command, log, source.name))
        _seal(whole)
        whole.replace(target)


def _seal(library: Path) -> None:
    """Append the hash of its bytes to a library; see `is_whole`."""
    if sys.platform != "darwin":
        with library.open("ab") as file:
            file.write(hashlib.sha256(library.read_bytes()).digest())


def _compiler_message(compiler: Sequence[str], log: Path, what: str) -> str:
    """Summarise a compiler's failure in one line: its first errors, or its last lines if none is marked as an error."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if re.search(r"\berror\b|\bundefined\b", line, re.IGNORECASE)]
    message = " / ".join(marked[:3] or lines[-3:])
    name = Path(compiler[0]).name
    return f"{name} says {message} ({what})" if message else f"{name} gave no file and no reason ({what})"


def _watch(parent: int, compilers: _Compilers) -> None:
    """End this process and all its children as soon as its parent has ended."""

    def end() -> None:
        compilers.end()
        if os.name == "posix":  # the group includes the processes that compilers start
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def until_input_ends() -> None:
        while os.read(0, 1):  # not `sys.stdin`: Python needs its lock to exit
            pass
        end()

    def until_adopted() -> None:
        # The input may stay open after the parent has ended: in other processes that the parent had forked.
        while os.getppid() == parent:
            time.sleep(0.2)
        end()

    threading.Thread(target=until_input_ends, daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=until_adopted, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: compile, and print the result or the error as one line of JSON."""
    parser = argparse.ArgumentParser(description="Compile the kernels into one shared library.")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--compiler", default="", help="the C compiler's command; CC or cc if not given")
    parser.add_argument("--architecture", choices=sorted(INSTRUCTION_SETS), help="if not this machine's")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the folder of the C files")
    parser.add_argument("--jobs", type=int, default=cores(), help="how many compilers run at the same time")
    parser.add_argument("--seconds", type=float, default=BUILD_SECONDS, help="the time limit")
    parser.add_argument("--watched", action="store_true", help="end as soon as the parent process ends")
    options = parser.parse_args(arguments)
    compilers = _Compilers()
    if options.watched:
        _watch(os.getppid(), compilers)
        command = json.loads(options.compiler)
    else:
        command = shlex.split(options.compiler) or find_compiler()
    try:
        if not command:
            raise BuildError("there is no C compiler on the PATH")
        built = compile_library(
            command,
            options.target,
            sources=options.sources,
            jobs=options.jobs,
            seconds=options.seconds,
            of=options.architecture,
            compilers=compilers,
        )
        answer: dict[str, Any] = built._asdict()
    except (BuildError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    if "error" in answer and options.watched and os.name == "posix":
        os.killpg(0, signal.SIGKILL)  # also ends children of a killed compiler
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
