"""Batch normalisation with weighted statistics for CUDA, in Triton: two reads of the rows forward, two backward.

With weights w that sum to one, m = sum w x, v = sum w (x - m)^2, z = (x - m) / sqrt(v + eps) and y = g z + b,

    dx_i = g / sqrt(v + eps) (dy_i - w_i (sum_j dy_j + z_i sum_j dy_j z_j)).                               (*)

Rows are read and written in their own type; sums are float32, and each program adds a share of the rows, so that
there are no atomic additions and a call repeats its bits. Sums are of d = x - x_0: the variance, sum w d^2 -
(sum w d)^2, would lose its digits if the mean were far from zero. Rows of weight zero are padding and count as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.elements.backends import gpu_tiles, triton_kernels
from cadsurgery.elements.backends.gpu import PROGRAMS, is_wide, operand
from cadsurgery.elements.sizes import divide_up


def normalise(
    rows: Tensor, shares: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows by their weighted mean and variance.

    Args:
        rows: (N, C), some, of a type that `gpu.supports` takes.
        shares: (N,) float32, the weights, which sum to one; 0 for padding.
        weight: (C,) the factor g, or None.
        bias: (C,) the shift b, or None.
        eps: added to the variance.

    Returns:
        The rows (N, C) in their own type, and mean and variance (C,) float32, which have no gradient.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(rows, shares, weight, bias, eps)
    return result


class _Normalise(torch.autograd.Function):
    """Normalise rows, with the gradient (*)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shares: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = rows[0].float()
        off, square = _sums(rows, None, shares, first)
        variance = torch.addcmul(square, off, off, value=-1).clamp_(min=0)
        mean, scale = first + off, (variance + eps).rsqrt_()
        ctx.save_for_backward(rows, shares, mean, scale, weight)
        ctx.mark_non_differentiable(mean, variance)
        ctx.dtype = bias.dtype if bias is not None else None
        return _scaled(rows, None, shares, mean, scale, weight, bias, None), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_statistics: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, mean, scale, weight = ctx.saved_tensors
        sums = _sums(rows, grad, shares, mean)
        of_rows = (
            _scaled(rows, grad, shares, mean, scale, weight, None, sums) if ctx.needs_input_grad[0] else None
        )
        of_weight = (sums[1] * scale).to(weight.dtype) if weight is not None else None
        return of_rows, None, of_weight, sums[0].to(ctx.dtype) if ctx.dtype is not None else None, None


def _sums(rows: Tensor, grad: Tensor | None, shares: Tensor, centre: Tensor) -> Tensor:
    """Return the sums of w d and w d^2 of d = x - `centre`, or with a gradient dy of dy and dy d: (2, C) float32."""
    count, channels = rows.shape
    tile = gpu_tiles.elementwise_tile(channels)
    columns = divide_up(channels, tile.c)
    programs = max(1, min(PROGRAMS // columns, divide_up(count, tile.n)))
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        triton_kernels.norm_sums[(programs, columns)](
            *(operand(rows), operand(grad), shares, centre, partial, count, divide_up(count, programs)),
            **{"C": channels, "BLOCK_N": tile.n, "BLOCK_C": tile.c},
            num_warps=tile.warps,
        )
    return partial.sum(0)


def _scaled(
    rows: Tensor,
    grad: Tensor | None,
    shares: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    """Return the normalised rows; with a gradient dy and its `sums`, see `_sums`, the gradient of the rows."""
    count, channels = rows.shape
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    tile = gpu_tiles.elementwise_tile(channels)
    sizes = {"C": channels, "WIDE": is_wide(rows), "BLOCK_N": tile.n, "BLOCK_C": tile.c}
    with torch.cuda.device_of(rows):
        triton_kernels.norm_rows[(divide_up(count, tile.n), divide_up(channels, tile.c))](
            *(
                operand(rows),
                operand(grad),
                shares,
                mean,
                scale,
                operand(weight),
                operand(bias),
                sums,
                out,
                count,
            ),
            **sizes,
            num_warps=tile.warps,
        )
    return out
