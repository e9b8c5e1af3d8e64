"""The laws of the kernels for every form: those that this processor runs, and those for ARM in an emulator.

The suite itself runs the forms of the widest instruction set that is allowed. Here the laws run again for each other
one that the processor has, in a process whose kernels CADSURGERY_ISA caps. Tiles of AMX are emulated by plain loops on
every processor, beside vectors that it has. Torch does not run in the emulator: `laws.c`
is a program of its own, which compares the forms for aarch64 with plain loops. It needs the Debian packages qemu-user
and gcc-aarch64-linux-gnu:

    python -m pytest -m slow tests/kernels/test_forms.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT, thorough

from cadsurgery.kernels import build, isa

SECONDS = 550  # for a process with the laws of a form
LAWS = (
    "tests/laws/test_backend_laws.py::test_a_convolution_is_that_of_the_reference",
    "tests/laws/test_backend_laws.py::test_every_other_task_is_that_of_the_reference",
    "tests/laws/test_integer_laws.py",
    "tests/laws/test_geometry_laws.py::test_compiled_cells_and_kernel_maps_are_those_of_torch",
    "tests/laws/test_backend_laws.py::test_rows_are_mixed_alike_wherever_they_are_read",
    "tests/methods/test_resampling.py::test_compiled_code_inverts_as_torch_does",
)
OF_KERNELS = "(native or mixed_alike or not test_backend_laws)"
# The suite itself runs the laws of 8 bits for each form; here they run for the form that is chosen.
CHOSEN = " and ".join((OF_KERNELS, *(f"not {name}]" for name in isa.ISAS)))

# The laws in `laws.c` of each C file of which there are forms for aarch64, and of those for AMX.
IN_C = {
    "product": ("product",),
    "product_tiles": ("product",),
    "grouped": ("grouped",),
    "move": ("mix", "gather_mixing", "mix_lines"),
    "pool": ("pool",),
    "fill": ("fill",),
    "maps": ("find_cells", "shift_taps"),
    "interpolate": ("resize", "interpolation_error"),
    "warp": ("invert",),
    "int8": ("convolve",),
    "int8_tiles": ("convolve",),
}
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
# Processors of the emulator: the oldest of the architecture, which lacks the dot product, and one that has everything.
OLDEST, NEWEST = ("-cpu", "cortex-a53"), ("-cpu", "max")


def skip_unless_run_here(name: str) -> None:
    """Skip what this processor cannot run, and what the suite itself runs."""
    if not isa.here():
        pytest.skip("there are no compiled kernels here")
    if name not in isa.here():
        model = isa.processor().model or "this processor"
        pytest.skip(f"not run: {model} does not have the instruction set {name}")
    if name == isa.used():
        pytest.skip(f"the suite itself runs the forms of {name}")


def run_laws(name: str, *options: str, library: Path | None = None) -> None:
    """The laws of the kernels in a process whose kernels are those of an instruction set, or of another library.

    Raises:
        AssertionError: one of them does not hold; the message is what pytest says.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {isa.VARIABLE: name, "OMP_NUM_THREADS": "1"}
    if library is not None:
        environment |= {
            "EMULATED_TILES": str(library),
            "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, ROOT))),
        }
    which = "not slow" if "CADSURGERY_FEW" in os.environ else "slow or not slow"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-x",
        "-m",
        which,
        *LAWS,
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_laws_that_run_again_are_there() -> None:
    for path, _, name in (law.partition("::") for law in LAWS):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else (ROOT / path).exists()


BETWEEN = ("sse4", "avxvnni", "avx512bf16", "avx512vnni")  # sets whose neighbours prove nearly the same


@pytest.mark.slow
@pytest.mark.parametrize("name", [thorough(one) if one in BETWEEN else one for one in isa.ISAS])
def test_all_cases_of_the_laws_hold_for_the_forms_of_every_instruction_set(name: str) -> None:
    skip_unless_run_here(name)
    run_laws(name, "-k", CHOSEN)


# -- tiles of AMX, emulated ---------------------------------------------------------------------------------

on_x86 = pytest.mark.skipif(build.architecture() != "x86-64", reason="AMX is of x86-64")
needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")


@pytest.fixture(params=[thorough("scalar"), "avx2", thorough("avx512")])
def emulating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiler's command, for a table in which amx is emulated beside an instruction set that the processor has."""
    beside = next((one for one in build.instruction_sets() if one.name == request.param), None)
    if beside is None or request.param not in isa.here():
        pytest.skip(f"not run: {isa.processor().model or 'this processor'} does not have {request.param}")
    amx = next(one for one in build.instruction_sets() if one.name == "amx")
    narrow = [one for one in build.instruction_sets() if set(one.needs) <= set(beside.needs)]
    sets = (*narrow, amx._replace(flags=beside.flags, example=""))
    monkeypatch.setitem(build.INSTRUCTION_SETS, "x86-64", sets)
    compiler = build.find_compiler()
    assert compiler is not None
    return [*compiler, "-DEMULATE_TILES"]


@pytest.mark.slow
@on_x86
@needs_compiler
def test_amx_laws_in_c_hold_for_emulated_tiles(emulating: list[str], tmp_path: Path) -> None:
    found = programs(emulating, "x86-64", ["amx"], tmp_path)
    assert {law for _, _, laws in found for law in laws} == {"product_bfloat16_amx", "convolve_amx"}
    for form, program, laws in found:
        (done,) = run_all([[str(program), features(form)]])
        assert hold(done, laws), done.stdout + done.stderr


@pytest.mark.slow
@on_x86
@needs_compiler
@pytest.mark.parametrize("emulating", ["avx2"], indirect=True)
def test_amx_laws_hold_for_emulated_tiles(emulating: list[str], tmp_path: Path) -> None:
    """With the packing in Python, and that of files."""
    library = tmp_path / "kernels.so"
    build.build(emulating, library)
    library.chmod(0o600)
    run_laws("amx", "-k", CHOSEN, "-p", "emulated_tiles", library=library)


def run_all(commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Run commands, two at a time."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=build.COMPILER_SECONDS)

    with ThreadPoolExecutor(min(2, build.cores())) as pool:
        return list(pool.map(run, commands))


def compile_all(commands: Sequence[Sequence[str]]) -> None:
    for done in run_all(commands):
        assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stderr}"


def named(suffix: str) -> list[str]:
    """The flag by which a form's functions get their names."""
    return [f"-DSUFFIX(name)=name##_{suffix}"] if suffix else []


def programs(
    compiler: Sequence[str], of: str, sets: Sequence[str], folder: Path
) -> list[tuple[build.Form, Path, set[str]]]:
    """For every suffix a form that has it, the program with its laws, and the names of those laws."""
    forms = [form for form in build.forms(of=of) if form.set is None or form.set.name in sets]
    objects = {form: str(folder / f"{form.source.stem}_{form.suffix}.o") for form in forms}
    compile_all(
        [
            [*compiler, *build._COMMON, *form.flags, *named(form.suffix), str(form.source), "-o", out]
            for form, out in objects.items()
        ]
    )
    by_suffix: dict[str, list[build.Form]] = {}
    for form in forms:
        if form.source.stem in IN_C:
            by_suffix.setdefault(form.suffix, []).append(form)
    common = [out for form, out in objects.items() if not form.suffix]
    found, commands = [], []
    for suffix, own in by_suffix.items():
        files = [form.source.stem for form in own]
        program = folder / f"laws_{suffix}"
        element = build.ELEMENTS.get(suffix.partition("_")[0], ())
        commands.append(
            [
                *(
                    *compiler,
                    "-O1",
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-ffp-contract=off",
                    "-static",
                    "-pthread",
                ),
                *(*named(suffix), *element, *(f"-DOF_{file}" for file in files)),
                *(str(Path(__file__).with_name("laws.c")), *(objects[form] for form in own), *common),
                *("-lm", "-o", str(program)),
            ]
        )
        laws = {f"{law}_{suffix}" for law in chain.from_iterable(IN_C[file] for file in files)}
        laws -= {f"mix_lines_{suffix}"} if "-DBYTES" in element else set()  # of maps, which are floats
        found.append((own[0], program, laws))
    compile_all(commands)
    return found


def features(form: build.Form) -> str:
    """The processor's features that a form needs, as the bits of a number."""
    assert form.set is not None
    return str(sum(1 << build.FEATURES.index(name) for name in form.set.needs))


def hold(done: subprocess.CompletedProcess[str], laws: set[str]) -> bool:
    """Whether a program has said of every law that it holds."""
    return done.returncode == 0 and laws <= set(re.findall(r"^ok (\w+)", done.stdout, re.MULTILINE))


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the program is linked statically, for Linux")
@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
def test_the_laws_in_c_hold_for_the_forms_of_this_processor(tmp_path: Path) -> None:
    """A check of the program, and of every form that it reads and writes nothing behind a row."""
    compiler = build.find_compiler()
    assert compiler is not None
    if not isa.here():
        pytest.skip("there are no compiled kernels here")
    for form, program, laws in programs(compiler, build.architecture(), isa.here(), tmp_path):
        (done,) = run_all([[str(program), features(form)]])
        assert hold(done, laws), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    CROSS is None, reason="not run: there is no aarch64-linux-gnu-gcc (gcc-aarch64-linux-gnu)"
)
@pytest.mark.skipif(EMULATOR is None, reason="not run: there is no qemu-aarch64 (Debian package qemu-user)")
def test_the_laws_in_c_hold_for_neon_in_an_emulator(tmp_path: Path) -> None:
    """The forms of the architecture's baseline run on its oldest processor, those with the dot product on no older one
    than has it."""
    assert CROSS is not None and EMULATOR is not None
    sets = [one.name for one in build.instruction_sets("aarch64")]
    files = {form.source.stem for form in build.forms(of="aarch64") if form.suffix}
    assert files == set(IN_C) - {"product_tiles", "int8_tiles"}  # of x86-64
    for form, program, laws in programs([CROSS], "aarch64", sets, tmp_path):
        assert form.set is not None
        needs_more = form.set.name != "neon" and form.set.name != "scalar"
        (done,) = run_all([[EMULATOR, *(NEWEST if needs_more else OLDEST), str(program), features(form)]])
        assert hold(done, laws), done.stdout + done.stderr
        if needs_more:
            (refused,) = run_all([[EMULATOR, *OLDEST, str(program), features(form)]])
            assert refused.returncode == 3 and "lacks" in refused.stdout, refused.stdout + refused.stderr
