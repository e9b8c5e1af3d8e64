"""The Triton kernels compiled for GPUs that are not there: each tile that a rule may choose, on six generations.

A program must fit: no registers are spilled, and no more shared memory is asked for than the GPU has. What can be
multiplied on the tensor cores is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import covering, thorough

from cadsurgery.elements.backends import gpu_tiles, triton_kernels
from cadsurgery.elements.backends.gpu_tiles import Device, Tile

pytestmark = [
    pytest.mark.skipif(not triton_kernels.INSTALLED, reason="Triton is not installed"),
    pytest.mark.skipif(triton_kernels.INTERPRETED, reason="interpreted kernels cannot be compiled"),
]
# Bytes of shared memory that a program can use, by compute capability: A100, RTX 30, RTX 40, H100, B200, RTX 50
# (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# In the default run Hopper, in the slow part a GPU of each kind: 86 and 89 multiply as 80 does, with the memory of 120.
QUICK = (90,)
CAPABILITIES = [one if one in QUICK else thorough(one, few=3) for one in SHARED if one not in (86, 89)]


# Types of arguments that are not rows, in Triton's words; integers of 32 bits otherwise.
POINTERS = {"table": "*i32", "partial": "*fp32", "sources": "*i32", "shares": "*fp32", "used": "*i32"}
POINTERS |= {
    "levels": "*i8",
    "sides": "*i32",
    "flags": "*i32",
    "ranks": "*i32",
    "anchors": "*i64",
    "index": "*i32",
}
POINTERS |= {
    "places": "*i32",
    "samples": "*i32",
    "targets": "*i64",
    "wanted": "*i32",
    "readers": "*i64",
    "starts": "*i64",
}
POINTERS |= {"centre": "*fp32", "scale": "*fp32", "totals": "*fp32"}
ROWS = ("rows", "halo", "weight", "bias", "residual", "own", "out", "grad", "sums")


class Compiled(NamedTuple):
    """What a program takes: registers and spilled bytes of a thread, bytes of shared memory; and its code."""

    registers: int
    spilled: int
    shared: int
    ptx: str

    @property
    def has_tensor_cores(self) -> bool:
        """True if it multiplies on the tensor cores."""
        return re.search(r"\bwgmma\.mma_async|\bmma\.sync|tcgen05\.mma", self.ptx) is not None


def compile_for(
    name: str,
    capability: int,
    dtype: str,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    absent: tuple[str, ...] = (),
) -> Compiled:
    """Compile a kernel of `triton_kernels` for a compute capability such as 90, with rows of a dtype such as bf16.

    Args:
        name: the kernel.
        capability: compute capability of the GPU, times ten.
        dtype: of rows, weights and results, in Triton's words.
        constants: its compile-time constants.
        warps: warps of a program.
        stages: blocks in flight.
        absent: arguments that are None.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(triton_kernels, name)
    names = kernel.arg_names
    given = {key: value for key, value in constants.items() if key in names} | dict.fromkeys(absent)
    types = {**POINTERS, "shift": "i64", **dict.fromkeys(ROWS, f"*{dtype}")}
    signature = {key: "constexpr" if key in given else types.get(key, "i32") for key in names}
    aligned = [i for i, key in enumerate(names) if signature[key].startswith("*") or key == "shift"]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in given.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Compiled(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory (stack and spills) of a thread."""
    import triton

    found = shutil.which("cuobjdump") or str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [found, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", done.stdout).group(1))
        for key in ("REG", "STACK", "LOCAL")  # type: ignore[union-attr]
    )
    return registers, stack + local


class Kind(NamedTuple):
    """A type of rows, and how products of it are computed."""

    dtype: str
    size: int
    precision: str = "tf32"

    @property
    def is_full(self) -> bool:
        """True for float32 without TF32."""
        return self.precision == "ieee"


KINDS = (Kind("bf16", 2), Kind("fp16", 2), Kind("fp32", 4), Kind("fp32", 4, "ieee"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set


def device_of(capability: int) -> Device:
    return Device(SHARED[capability], 108, capability)


def check(compiled: Compiled, capability: int, what: object, has_product: bool = False) -> None:
    # The assembler keeps some words of a program in local memory while it has registers to spare: no spills.
    is_full = compiled.registers > 128
    assert compiled.spilled == 0 or (not is_full and compiled.spilled <= 8), (
        f"{what} spills {compiled.spilled} bytes"
    )
    assert compiled.shared <= SHARED[capability], f"{what} takes {compiled.shared} bytes of shared memory"
    if has_product:
        assert compiled.has_tensor_cores, f"{what} does not multiply on the tensor cores"


def compile_product(
    tile: Tile,
    kind: Kind,
    capability: int,
    channels: int = 256,
    outputs: int = 256,
    taps: int = 9,
    groups: int = 1,
    residual: bool = False,
    halo: bool = True,
    samples: bool = False,
) -> Compiled:
    constants = {"C": channels, "C_OUT": outputs, "TAPS": taps, "GROUPS": groups, "ACTIVATION": "relu"}
    constants |= {"SLOPE": 0.0, "PRECISION": kind.precision, "WIDE": False, "HALO": halo}
    constants |= {"BLOCK_N": tile.n, "BLOCK_O": tile.o, "BLOCK_C": tile.c, "ACROSS": 3}
    absent = (*(() if residual else ("residual",)), *(() if taps > 1 else ("table",)))
    absent += () if samples else ("places",)
    return compile_for("product", capability, kind.dtype, constants, tile.warps, tile.stages, absent)


@pytest.mark.thorough(few=3)
@pytest.mark.parametrize(
    ("kind", "residual", "samples", "capability"), covering(KINDS, [False, True], [False, True], CAPABILITIES)
)
def test_every_tile_of_a_product_fits(kind: Kind, capability: int, residual: bool, samples: bool) -> None:
    tiles = gpu_tiles.usable_products(
        256, kind.size, gpu_tiles.tile_kind(kind.is_full, residual), device_of(capability)
    )
    assert tiles
    for tile in tiles if capability not in QUICK else tiles[:2]:
        taps = 1 if residual and not samples else 9
        compiled = compile_product(tile, kind, capability, residual=residual, taps=taps, samples=samples)
        check(compiled, capability, (tile, kind), has_product=not kind.is_full)
        if not kind.is_full:
            assert "cp.async" in compiled.ptx, "loads are asynchronous"


# Every shape class: odd and even channels, fewer than a block and many blocks; taps of the usual windows.
CHANNELS, TAPS = (3, 5, 33, 64, 96, 320, 2048), (1, 4, 9, 25)


@pytest.mark.thorough(few=3)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gradients_of_weights_fit(capability: int) -> None:
    shapes = [(256, 256), (33, 21)] if capability not in QUICK else [(256, 256)]
    for (channels, outputs), kind in product(shapes, KINDS):
        tile = gpu_tiles.weight_tile(outputs, channels, kind.size, kind.is_full, device_of(capability))
        constants = {"C": channels, "C_OUT": outputs, "TAPS": 9, "GROUPS": 1, "PRECISION": kind.precision}
        constants["HALO"] = True
        constants |= {"BLOCK_N": tile.n, "BLOCK_O": tile.o, "BLOCK_C": tile.c}
        compiled = compile_for("product_weight", capability, kind.dtype, constants, tile.warps, tile.stages)
        check(compiled, capability, (channels, outputs, tile, kind), has_product=not kind.is_full)


def _others(channels: int, taps: int) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, constants and absent arguments of the kernels that only move and add rows, or make maps."""
    moving, depthwise = gpu_tiles.elementwise_tile(channels), gpu_tiles.depthwise_tile(channels)
    tile = {"C": channels, "WIDE": False, "BLOCK_N": moving.n, "BLOCK_C": moving.c}
    of_depthwise = {"C": channels, "TAPS": taps, "BLOCK_N": depthwise.n, "BLOCK_C": depthwise.c}
    act = {"ACTIVATION": "gelu", "SLOPE": 0.0}
    size = {"HEIGHT": 33, "WIDTH": 65, "BLOCK": 256}
    window = {"TARGET_HEIGHT": 33, "TARGET_WIDTH": 65, "DOWN": 3, "ACROSS": taps // 3 or 1, "WIDE": False}
    of_window = {**of_depthwise, "ACROSS": 3, "WIDE": False, "HALO": True}
    return [
        ("depthwise", {**of_window, **act}, ("places",)),
        ("depthwise", {**of_window, **act}, ()),
        ("pool", {**of_window, "LARGEST": True, "OUTSIDE": float("-inf")}, ()),
        ("pool", {**of_window, "LARGEST": False, "OUTSIDE": 0.0}, ()),
        ("place_taps", {**size, **window}, ()),
        ("read_samples", size, ()),
        ("read_samples", size, ("wanted", "ranks")),
        ("depthwise_weight", {**of_depthwise, "HALO": True}, ()),
        ("blend", {**tile, "READ": 4}, ()),
        ("blend", {**tile, "READ": 4}, ("used",)),
        ("finish", {**tile, **act}, ()),
        ("weigh", tile, ()),
        *(("norm_sums", tile, absent) for absent in ((), ("grad",))),
        *(("norm_rows", tile, absent) for absent in (("bias",), ("grad", "totals"))),
        (
            "spread_back",
            {"C": channels, "READ": 4, "BLOCK_C": min(1024, 1 << (channels - 1).bit_length())},
            (),
        ),
        ("find_anchors", size, ()),
        ("place_cells", size, ()),
        ("read_taps", {**size, **window}, ()),
        ("read_taps", {**size, **window}, ("wanted",)),
        ("read_halo", {"WIDE": False, "BLOCK": 256}, ()),
        ("mix_between", size, ()),
    ]


@pytest.mark.thorough(few=3)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_that_move_rows_and_make_maps_fit(capability: int) -> None:
    shapes = [(3, 25, "fp16"), (2048, 4, "fp32")] if capability not in QUICK else [(256, 9, "bf16")]
    for channels, taps, dtype in shapes:
        for name, constants, absent in _others(channels, taps):
            compiled = compile_for(name, capability, dtype, constants, 4, 1, absent)
            check(compiled, capability, (name, channels, taps, dtype))


def test_every_kernel_is_compiled_here() -> None:
    compiled = {"product", "product_weight", *(name for name, *_ in _others(8, 9))}
    jitted = {
        name for name, value in vars(triton_kernels).items() if hasattr(value, "arg_names") and name[0] != "_"
    }
    assert jitted == compiled
