"""Instruction sets: those that the processor has, those that CADSURGERY_ISA leaves, and the forms that are chosen."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cap
from stand_ins import needs_compiler

from cadsurgery.kernels import build, dispatch, isa
from cadsurgery.support import processor
from cadsurgery.support.errors import InvalidInput

pytest_plugins = ["stand_ins"]
NEEDS = {one.name: set(one.needs) for one in build.instruction_sets()}


@pytest.mark.smoke
def test_the_cap_leaves_what_needs_no_more_than_it(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, cap_kernels: Cap
) -> None:
    monkeypatch.setattr(isa, "here", lambda: isa.ISAS)
    for cap in isa.ISAS:
        cap_kernels(cap)
        assert isa.allowed() == tuple(name for name in isa.ISAS if NEEDS[name] <= NEEDS[cap])
        assert isa.used() == cap
        cap_kernels(f" {cap.upper()} ")
        assert isa.used() == cap
    if build.architecture() == "x86-64":
        cap_kernels("avx512")
        assert isa.allowed() == ("scalar", "sse4", "avx2", "avx512")
    cap_kernels("")
    assert isa.allowed() == isa.ISAS


@needs_compiler
def test_a_wider_form_than_the_cap_is_never_chosen(packaged: Path, cap_kernels: Cap) -> None:
    """And each choice is the widest that there is a form of."""
    has = {"answer": "int8", "cells": "maps", "size": "warp"}
    for cap in (*isa.here(), ""):
        cap_kernels(cap)
        for name, file in has.items():
            sets = {one for row in build.TABLE if row.name == file for one in row.sets}
            for element in ("float32", "float64") if name == "size" else ("",):
                expected = [one for one in isa.allowed() if one in sets][-1]
                assert dispatch.isa_of(name, element) == expected
                function = dispatch.function(name, element)
                assert function is not None and function.restype is ctypes.c_long
                assert function is dispatch.function(name, element)
                function.restype = ctypes.c_int
                assert function() == {"float32": 4, "float64": 8, "": 42}[element]
                function.restype = ctypes.c_long


@needs_compiler
def test_a_function_that_there_is_no_form_of_is_none(packaged: Path) -> None:
    assert dispatch.function("nothing") is None and dispatch.isa_of("nothing", "float32") == ""
    assert dispatch.function("size") is None and dispatch.function("size", "uint8") is None


@pytest.mark.parametrize("cap", ["avx3", "native", "avx2,avx512", "-"])
def test_an_unknown_cap_is_refused_with_what_there_is(cap: str, packaged: Path, cap_kernels: Cap) -> None:
    cap_kernels(cap)
    asked = (lambda: dispatch.function("answer"), lambda: dispatch.isa_of("answer"))
    for ask in (isa.allowed, isa.used, isa.in_words, *asked):
        with pytest.raises(InvalidInput, match="CADSURGERY_ISA") as caught:
            ask()
        assert repr(cap) in caught.value.what and "unset it" in caught.value.next
        assert all(name in caught.value.why for name in isa.ISAS)
        assert all(name in caught.value.next for name in isa.here())


def test_a_cap_that_the_processor_lacks_is_refused_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, cap_kernels: Cap
) -> None:
    monkeypatch.setattr(isa, "here", lambda: isa.ISAS[:1])
    for cap in isa.ISAS[1:]:
        cap_kernels(cap)
        with pytest.raises(InvalidInput, match=f"not have the instruction set {cap}") as caught:
            isa.allowed()
        assert isa.ISAS[0] in caught.value.why and isa.ISAS[0] in caught.value.next


def test_without_a_library_there_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, cap_kernels: Cap
) -> None:
    """Any known cap is met; an unknown one is refused."""
    monkeypatch.setenv("CADSURGERY_NATIVE", "0")
    for cap in ("", *isa.ISAS):
        cap_kernels(cap)
        assert isa.here() == isa.allowed() == () and isa.used() == ""
        assert dispatch.function("answer") is None and "torch operations" in isa.in_words()
    cap_kernels("avx3")
    with pytest.raises(InvalidInput):
        isa.allowed()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or build.architecture() != "x86-64", reason="reads /proc/cpuinfo")
def test_the_processor_has_what_the_system_says(packaged: Path) -> None:
    flags = set(processor._cpuinfo()["flags"].split())
    v2 = {"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"}
    v3 = v2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    needed = {
        **{"scalar": set(), "sse4": v2, "avx2": v3, "avxvnni": v3 | {"avx_vnni"}, "avx512": v4},
        "avx512vnni": v4 | {"avx512_vnni"},
        "avx512bf16": v4 | {"avx512_vnni", "avx512_bf16"},
        "amx": v4 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    }
    assert isa.here() == tuple(name for name in isa.ISAS if needed[name] <= flags)


def test_the_order_is_from_narrow_to_wide() -> None:
    for names in build.INSTRUCTION_SETS.values():
        for k, one in enumerate(names):
            assert not any(set(other.needs) < set(one.needs) for other in names[k + 1 :])


def test_bits_of_features_are_names() -> None:
    assert isa._names(0) == ("scalar",)
    assert isa._names((1 << len(build.FEATURES)) - 1) == isa.ISAS


# -- in words ------------------------------------------------------------------------------------------


def test_caches_are_those_that_hold_data_in_readable_sizes(tmp_path: Path) -> None:
    found = [
        ("1", "Data", "48K"),
        ("1", "Instruction", "32K"),
        ("2", "Unified", "1280K"),
        ("3", "Unified", "48M"),
    ]
    for k, values in enumerate([*found, ("4", "Unified", "none")]):
        (tmp_path / f"index{k}").mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (tmp_path / f"index{k}" / name).write_text(f"{value}\n")
    assert processor._caches(tmp_path) == "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB"
    assert processor._caches(tmp_path / "none") == ""


def test_families_of_processors() -> None:
    amd = {"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}
    assert processor._family(amd) == "AuthenticAMD family 25 model 1"
    assert (
        processor._family({"CPU implementer": "0x41", "CPU part": "0xd0c"}) == "implementer 0x41 part 0xd0c"
    )
    assert processor._family({}) == ""


@needs_compiler
def test_reports_name_what_is_used_and_the_caps(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, cap_kernels: Cap
) -> None:
    for name in processor.CAPS:
        monkeypatch.delenv(name, raising=False)
    torch_s = torch.backends.cpu.get_cpu_capability()
    assert isa.in_words() == f"kernels {isa.here()[-1]}, torch {torch_s}"
    cap_kernels("scalar")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert isa.in_words().startswith(
        f"kernels scalar, torch {torch_s}, capped by CADSURGERY_ISA=scalar ONEDNN_MAX_"
    )
