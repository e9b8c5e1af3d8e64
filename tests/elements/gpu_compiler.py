"""Compile Triton kernels for GPUs that are not there, and read what a program takes of one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from cadsurgery.elements.backends import triton_kernels

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
