"""This package's operations of torch, and the table of those that engines have kernels for.

A row of `KERNELS` is all that Python knows of an operation for engines: torch's signature, from which its ONNX schema
follows (tensors are inputs, whole numbers together one input `sizes`, and floats attributes), the results' shapes, and
its names in files. They exist in exported programs alone. `kernels/c/onnxruntime.c` and `openvino.cpp` register them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("cadsurgery", "FRAGMENT")


def define(
    signature: str,
    like: Callable[..., Any],
    by: Callable[..., Any] | None = None,
    on: str = "CompositeExplicitAutograd",
) -> None:
    """Define `torch.ops.cadsurgery.NAME`.

    Args:
        signature: in torch's language.
        like: returns tensors of the results' shapes and dtypes, for tracing.
        by: computes the results; None for an operation that exists in traced graphs alone.
        on: torch's dispatch key of `by`.
    """
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    torch.library.register_fake(f"cadsurgery::{name}", like)
    if by is not None:
        _LIBRARY.impl(name, by, on)


class Kernel(NamedTuple):
    """An operation that engines have kernels for.

    Attributes:
        signature: torch's, with the names of the results.
        like: see `define`.
        names: those of its kernels in files; of several by the number of the weight's dimensions.
    """

    signature: str
    like: Callable[..., Any]
    names: str | dict[int, str]

    @property
    def operation(self) -> Any:
        """The operation of torch."""
        return getattr(torch.ops.cadsurgery, self.signature.partition("(")[0]).default

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each argument by its name: `Tensor`, `int` or `float`."""
        return {one.name: str(one.type).replace("SymInt", "int") for one in self.operation._schema.arguments}


def _unknown() -> Any:
    return torch.library.get_ctx().new_dynamic_size()


def _table(*inputs: Tensor) -> Tensor:
    *_, targets, _, down, across = inputs
    return targets.new_empty(targets.shape[0], down.shape[0] * across.shape[0])


def _table_and_halo(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table, shape = _table(*inputs), (_unknown(), 4)
    return table, table.new_empty(shape), table.new_empty(shape, dtype=torch.float32)


_ROWS = "Tensor rows, Tensor table, Tensor sources, Tensor shares"
_LEVELS = "Tensor levels, Tensor sides"
_TAPS = f"{_LEVELS}, Tensor anchors, Tensor index, Tensor targets, Tensor size, Tensor down, Tensor across"

KERNELS = (
    Kernel(
        f"convolve_rows({_ROWS}, Tensor weight, Tensor bias, Tensor residual, float outside, float low, float high)"
        " -> Tensor out",
        lambda rows, table, *more: rows.new_empty(table.shape[0], more[3].shape[0]),
        {2: "ConvolveDepthwise", 3: "Convolve", 4: "ConvolveGroups"},
    ),
    Kernel(
        f"pick_rows({_ROWS}) -> Tensor out",
        lambda rows, table, *halo: rows.new_empty(table.shape[0], rows.shape[1]),
        "Pick",
    ),
    Kernel(
        "interpolation_error(Tensor rows, SymInt batch, SymInt height, SymInt width) -> Tensor out",
        lambda rows, *size: rows.new_empty(size),
        "InterpolationError",
    ),
    Kernel(
        f"read_pixels(Tensor rows, {_LEVELS}, Tensor index, SymInt spacing) -> Tensor out",
        lambda rows, levels, sides, index, spacing: rows.new_empty(
            levels.shape[0], *(-(-length // spacing) for length in levels.shape[1:]), rows.shape[1]
        ),
        "ReadPixels",
    ),
    Kernel(
        f"find_cells({_LEVELS}) -> (Tensor anchors, Tensor index)",
        lambda levels, sides: (levels.new_empty(_unknown()), levels.new_empty(levels.numel())),
        "FindCells",
    ),
    Kernel(
        f"read_taps({_TAPS}) -> (Tensor table, Tensor sources, Tensor shares)",
        _table_and_halo,
        "ReadTaps",
    ),
    Kernel(f"read_near_taps({_TAPS}) -> Tensor table", _table, "ReadNearTaps"),
)

for _kernel in KERNELS:
    define(_kernel.signature, _kernel.like)
