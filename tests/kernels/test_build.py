"""The library of kernels: what it is compiled of, with which compilers, and what becomes of compilers that fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT, some
from environments import NAME, belonging
from stand_ins import COMPILER, needs_compiler, posix, script, write_stand_ins

from cadsurgery.kernels import build

pytest_plugins = ["stand_ins"]
pytestmark = [posix, needs_compiler]
OPTIONAL = [one for one in build.instruction_sets() if one.example]


def compiler() -> list[str]:
    assert COMPILER is not None
    return COMPILER


# -- the table -----------------------------------------------------------------------------------------


def test_every_source_is_in_the_table_and_every_name_in_it_is_known() -> None:
    rows = {row.name for row in build.TABLE}
    assert {file.stem for file in build.SOURCES.glob("*.c")} <= rows
    names = {one.name for sets in build.INSTRUCTION_SETS.values() for one in sets}
    assert {name for row in build.TABLE for name in row.sets} <= names
    assert {name for row in build.TABLE for name in row.elements} <= set(build.ELEMENTS)
    needs = {need for sets in build.INSTRUCTION_SETS.values() for one in sets for need in one.needs}
    assert needs <= set(build.FEATURES)


@pytest.mark.parametrize("of", [*build.INSTRUCTION_SETS, "riscv64"])
def test_no_two_forms_have_the_same_names_and_every_architecture_has_a_scalar_form(of: str) -> None:
    found = [(form.source, form.suffix) for form in build.forms(of=of)]
    assert len(set(found)) == len(found)
    assert all(
        "-march=native" not in form.flags and "-fopenmp" not in form.flags for form in build.forms(of=of)
    )
    assert "scalar" in {one.name for one in build.instruction_sets(of)}


# -- what is built -------------------------------------------------------------------------------------


def test_a_library_holds_the_fingerprint_of_its_sources(built: Path) -> None:
    data = built.read_bytes()
    assert build.fingerprint_of(data) == build.fingerprint(built.parent / "c") != ""
    assert build.fingerprint_of(b"") == ""


def test_a_fingerprint_changes_with_every_file_and_the_architecture(sources: Path) -> None:
    found = {build.fingerprint(sources, of) for of in ("x86-64", "aarch64", "riscv64")}
    for name in ("maps.c", "parallel.h", "vector.h"):
        with (sources / name).open("a") as file:
            file.write("\n")
        found.add(build.fingerprint(sources))
    assert len(found) == 6


def test_a_library_asks_for_nothing_but_functions_of_the_c_library(built: Path) -> None:
    """And for no version of them, so that a wheel runs wherever torch's wheels do."""
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf")
    command = ["readelf", "--dynamic", "--version-info", "--wide", str(built)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "NEEDED" not in said and "GLIBC" not in said


def test_the_folder_of_the_target_has_nothing_else(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "kernels.so"
    target.parent.mkdir()
    result = build.build(compiler(), target, sources=sources, jobs=2)
    assert list(target.parent.iterdir()) == [target] and result.forms == len(build.forms(sources))


def test_the_command_line_compiles(sources: Path, tmp_path: Path) -> None:
    """Into the package if no other file is named: after a change of the C files of a checkout."""
    command = [sys.executable, "-I", "-S", build.__file__, str(tmp_path / "lib" / "kernels.so"), "--sources"]
    done = subprocess.run([*command, str(sources)], capture_output=True, text=True)
    forms = len(build.forms(sources))
    assert done.returncode == 0 and done.stdout.startswith(f"{forms} forms of the kernels compiled")
    assert build.fingerprint_of((tmp_path / "lib" / "kernels.so").read_bytes()) == build.fingerprint(sources)
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "could not be compiled: there are no C files" in done.stderr


@pytest.mark.parametrize("missing", some(OPTIONAL, every=3), ids=lambda one: one.name)
def test_forms_whose_flags_the_compiler_does_not_know_are_left_out(
    missing: build.InstructionSet, sources: Path, tmp_path: Path
) -> None:
    flag = missing.flags[-1]
    old = script(
        tmp_path / "old-cc",
        f'case " $* " in *" {flag} "*) echo "error: unrecognized option {flag}" >&2; exit 1;; esac\n'
        f'exec {compiler()[0]} "$@"',
    )
    result = build.build([str(old)], tmp_path / "kernels.so", sources=sources)
    known = {form.set.name for form in build.forms(sources) if form.set}
    assert missing.name in result.left_out or missing.name not in known
    without = [form for form in build.forms(sources) if not form.set or form.set.name not in result.left_out]
    assert result.forms == len(without)


# -- compilers that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maps.c", "int8.c"])
def test_a_compile_error_is_told_by_its_errors_not_by_warnings(
    name: str, sources: Path, tmp_path: Path
) -> None:
    (sources / name).write_text("#warning first of all\nint SUFFIX(f)(void) { return nowhere; }\n")
    with pytest.raises(build.BuildError, match=f"error: .*nowhere.*{name}") as caught:
        build.build(compiler(), tmp_path / "kernels.so", sources=sources)
    assert "first of all" not in str(caught.value) and not (tmp_path / "kernels.so").exists()
    assert not list(tmp_path.glob(".objects-*"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 0", "gave no file"),
        ("echo broken >&2; exit 3", "says broken"),
        ("kill -9 $$", "gave no file and no reason"),
        ("exec sleep 600", "did not end within"),
        (None, "could not be started"),
    ],
)
def test_a_compiler_that_does_nothing_is_said(
    text: str | None, why: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "did not end within":
        monkeypatch.setattr(build, "COMPILER_SECONDS", 0.2)
    command = [str(script(tmp_path / "cc", text) if text else tmp_path / "none")]
    with pytest.raises(build.BuildError, match=why):
        build.build(command, tmp_path / "kernels.so", sources=sources)
    assert not list(tmp_path.glob(".objects-*"))


# -- wheels --------------------------------------------------------------------------------------------

RUN = """
import ctypes
from cadsurgery.kernels import load, build, dispatch, isa
assert build.LIBRARY.is_file() and str(build.LIBRARY).startswith({folder!r}), build.LIBRARY
assert build.find_compiler() is None and isa.used() == isa.here()[-1] != "", isa.in_words()
Body, parts = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_long, ctypes.c_void_p), []
load.library().cadsurgery_share(
    ctypes.c_long(10), ctypes.c_long(3), Body(lambda begin, end, _: parts.append((begin, end))), None
)
assert sorted(parts) == [(0, 3), (3, 6), (6, 9), (9, 10)], parts
cells = dispatch.function("cells")
cells.restype = ctypes.c_int
assert cells() == 42
"""

NETWORK = """
from torch import nn
def network():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers).eval()
"""


def copy_of_package(folder: Path) -> Path:
    """The files that a wheel is made of, with stand-ins for the kernels: those are compiled where this is installed."""
    left_out = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "cadsurgery", folder / "cadsurgery", ignore=left_out)
    shutil.rmtree(folder / "cadsurgery" / "kernels" / "c")
    write_stand_ins(folder / "cadsurgery" / "kernels" / "c")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_wheel(folder: Path, **environment: str) -> Path:
    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "-m", "pip", "wheel", str(folder), "--no-deps", "--no-build-isolation", "-v"]
    done = subprocess.run(
        [*command, "-w", str(folder / "wheels")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_is_all_that_is_needed_beside_the_base_packages(tmp_path: Path) -> None:
    """Neither the checkout, nor an extra, nor a compiler: it converts, its kernels are used, and nothing is missing."""
    wheel = make_wheel(copy_of_package(tmp_path / "copy"))
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    place, folder = tmp_path / "environment", tmp_path / "folder"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    link_base_packages(packages)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(place / "bin" / "python"),
        "install",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)  # pip looks for what it requires
    shutil.rmtree(tmp_path / "copy")
    folder.mkdir()
    environment = {"PATH": os.devnull, "HOME": str(tmp_path)}

    def run(program: str, *arguments: str, **variables: str) -> None:
        command, options = [str(place / "bin" / program), *arguments], {**environment, **variables}
        done = subprocess.run(command, env=options, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("python", "-W", "error::UserWarning", "-c", RUN.format(folder=str(packages.resolve())))
    (folder / "mine.py").write_text(NETWORK)
    command = (
        "convert",
        "--model",
        "mine:network",
        "--size",
        "32x48",
        "--mask",
        "edges",
        "-o",
        "net.safetensors",
    )
    run("cadsurgery", *command, CADSURGERY_NATIVE="0")  # the stand-ins of the kernels compute nothing
    assert (folder / "net.safetensors").is_file()
    there = {path.relative_to(packages).as_posix() for path in packages.glob("cadsurgery*/**/*")}
    ours = {path for path in tracked("cadsurgery") if not path.startswith("cadsurgery/kernels/c/")}
    assert ours and ours <= there and any(path.startswith("cadsurgery/kernels/c/") for path in there)
    assert any(re.fullmatch(r"cadsurgery-[^/]+\.dist-info/licenses/LICENSE", path) for path in there)


def tracked(folder: str) -> set[str]:
    """Files of the checkout in a folder, without what is made there."""
    made = {"__pycache__", "lib"}
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if made.isdisjoint(path.parts)}


def link_base_packages(packages: Path) -> None:
    """Give an environment the base packages, and nothing else that is installed here."""
    for name in belonging(()) - {NAME}:
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:  # for another platform
            continue
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution(name).locate_file(top))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["switched off", "an error"])
def test_where_nothing_can_be_compiled_the_wheel_is_for_every_platform(how: str, tmp_path: Path) -> None:
    folder = copy_of_package(tmp_path / "copy")
    if how == "an error":
        (folder / "cadsurgery" / "kernels" / "c" / "processor.c").write_text("#error no\n")
        wheel = make_wheel(folder)
    else:
        wheel = make_wheel(folder, CADSURGERY_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cadsurgery/kernels/c/processor.c" in names and "cadsurgery/kernels/c/parallel.h" in names
    assert not [name for name in names if "kernels/lib/" in name]
