"""Sums over rows in torch: weighted means, norms by them, and products in blocks that keep their digits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.elements.sizes import divide_up
from cadsurgery.support.autocast import no_autocast
from cadsurgery.support.running import running

_BLOCK = 512  # rows whose products are added in float32; sums of blocks are added in float64
_BLOCKS = 16  # blocks that are multiplied at once, while they are in the cache


def as_map_of_rows(rows: Tensor) -> Tensor:
    """View rows (N, C) on a GPU as a channels_last map (1, C, N, 1), whose norms read memory in order."""
    if rows.device.type != "cuda" or running.in_graph:
        return rows
    return rows.reshape(1, *rows.shape, 1).transpose(1, 2)


def back_to_rows(normalised: Tensor) -> Tensor:
    """Return rows (N, C) of a normalised map of `_as_map`, or of rows."""
    return (
        normalised if normalised.dim() == 2 else normalised.transpose(1, 2).reshape(-1, normalised.shape[1])
    )


class _WeightedNorm(torch.autograd.Function):
    """Normalise rows by their weighted mean and variance, with the gradient in closed form.

    The weights w sum to one. With y = g z + b, z = (x - sum w x) / sqrt(v + eps) and v = sum w (x - mean)^2,
    dx_i = g / sqrt(v + eps) (dy_i - w_i (sum_j dy_j + z_i sum_j dy_j z_j)).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, share: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(rows):
            mean = weigh_rows(share, rows)
            variance = weigh_rows(share, (rows - mean).square_())
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(rows, share, mean, scale, weight)
        ctx.mark_non_differentiable(mean, variance)
        if running.is_exported:  # torch would ask whether there are rows at all
            normalised = (rows - mean) * (scale if weight is None else scale * weight)
            return normalised if bias is None else normalised + bias, mean, variance
        normalised = F.batch_norm(as_map_of_rows(rows), mean, variance, weight, bias, False, 0.0, eps)
        return back_to_rows(normalised), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_statistics: Tensor) -> tuple[Tensor | None, ...]:
        rows, share, mean, scale, weight = ctx.saved_tensors
        z = (rows - mean).mul_(scale)
        of_bias = grad.sum(0)
        of_weight = torch.mul(grad, z).sum(0)
        of_rows = torch.addcmul(of_bias, z, of_weight).mul_(-share.unsqueeze(1)).add_(grad)
        of_rows.mul_(scale if weight is None else scale * weight)
        present = weight is not None
        return of_rows, None, of_weight if present else None, of_bias if present else None, None


def weigh_rows(share: Tensor, values: Tensor) -> Tensor:
    """Return the weighted sum (C,) of rows (N, C) with weights (N,); see `sum_products`."""
    return sum_products(share.unsqueeze(1), values).squeeze(0)


def sum_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum the outer products of rows (N, ..., I) and (N, ..., J): (..., I, J) in the dtype of `left`.

    One product over millions of rows loses digits in float32. Products are added up in blocks of rows, and the sums of
    the blocks in float64. Rows of `right` that have a narrower dtype are converted block by block.
    """
    product = "kn...i,kn...j->k...ij"
    count, dtype = left.shape[0], left.dtype
    # Engines cannot bound how much a last block of any size lacks, and add one product in blocks of their own.
    is_one = left.is_meta or (running.is_exported and not isinstance(count, int))
    if not is_one and (running.in_graph):  # fill up the last block
        blocks = divide_up(count, _BLOCK)
        missing = blocks * _BLOCK - count
        whole = [
            torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))).view(blocks, _BLOCK, *rows.shape[1:])
            for rows in (left, right.to(dtype))
        ]
        return torch.einsum(product, *whole).sum(0, dtype=torch.float64).to(dtype)
    if is_one or count <= _BLOCK or running.is_recorded:  # or it is counted or recorded
        right = right.to(dtype)
        if left.dim() == 2:
            return left.transpose(0, 1) @ right
        return torch.einsum("n...i,n...j->...ij", left, right)
    end, parts = count // _BLOCK * _BLOCK, []
    for start in range(0, end, _BLOCKS * _BLOCK):
        block = slice(start, min(start + _BLOCKS * _BLOCK, end))
        several = [rows[block].unflatten(0, (-1, _BLOCK)) for rows in (left, right)]
        parts.append(torch.einsum(product, several[0], several[1].to(dtype)).sum(0, dtype=torch.float64))
    if end < count:
        parts.append(torch.einsum("n...i,n...j->...ij", left[end:], right[end:].to(dtype)).double())
    return torch.stack(parts).sum(0).to(dtype)


def normalise_rows(
    rows: Tensor, share: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows (N, C) by their mean and variance with weights (N,), which sum to one; return these, too."""
    found: tuple[Tensor, Tensor, Tensor] = _WeightedNorm.apply(rows, share, weight, bias, eps)
    return found
