"""Convolution on elements for CUDA, in Triton: gathering and multiplying in one kernel.

    out[n] = act(sum_t W_t rows[table[n, t]] + bias + residual[n])                             (*)

The kernel is an implicit matrix product with one program per tile of outputs: gathered rows go straight to the
tensor cores and never exist in memory. There are no atomic additions, so forward and backward give the same bits
every time (for the same tile sizes, which are tuned once per shape and machine and stored on disk).

Triton is optional. With TRITON_INTERPRET=1 set before its import the kernels run on CPU tensors, for tests.
The first call with a shape tunes and compiles; make this call before a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.elements.backends import triton_kernels
from cadsurgery.elements.backends.choose import Backend, Convolution, WindowRead, extend
from cadsurgery.elements.backends.weights import Activation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Activations that the kernels support, by name, scalars and algorithm. Leaky ReLU is supported with any slope.
_FUSED = {
    ("relu", (), ""): "relu",
    ("hardtanh", (0.0, 6.0), ""): "relu6",
    ("swish", (), ""): "silu",
    ("hardswish", (), ""): "hardswish",
    ("gelu", (), "none"): "gelu",
    ("sigmoid", (), ""): "sigmoid",
}
# The derivatives of these follow from the output alone, so they stay fused when gradients are needed.
_INVERTIBLE = ("none", "relu", "relu6")
# Number of programs in the weight's backward: enough for any GPU, with partial sums of only about 16 MB.
_PROGRAMS = 1024


class Triton(Backend):
    """One kernel that gathers and multiplies, forward and backward; tables derived from the kernel map are cached."""

    name = "triton"

    def applies(self, work: Convolution) -> bool:
        """Return True for ungrouped and depthwise convolutions on supported GPUs, except plain products of rows."""
        if work.graph or work.is_product or not isinstance(work.reads, WindowRead):
            return False
        return supports(work.rows, work.weights.weight, work.weights.groups)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        assert isinstance(work.reads, WindowRead)
        rows, weights, source, reading = work.rows, work.weights, work.reads.source, work.reading
        derive, key = source.derive, (work.reads.target.key, work.reads.window)
        if reading.sources.shape[0] or work.outside:
            rows, table = extend(rows, reading, work.outside), reading.table
        else:  # a negative entry reads padding, which avoids a copy of the rows with a row of zeros
            count = source.count
            table = derive(("signed", *key), lambda: reading.table.masked_fill(reading.table == count, -1))
        # Computed when a gradient is first needed.
        reverse = derive(("reversed", *key), lambda: cache(lambda: reverse_map(table, rows.shape[0])))
        weight = weights.weight.flatten(1) if weights.groups > 1 else weights.matrix(rows.dtype)
        more = (weights.bias, work.residual, weights.activation, weights.groups)
        return gather_conv(rows, weight, table, *more, reverse)


class ReversedMap(NamedTuple):
    """The inverse of a kernel map: for every row the outputs that read it, at most one per tap in a table row.

    If the same tap of several outputs reads one row (a coarse cell beside fine cells, the padding row), that
    row continues in extra table rows. The gradient of the rows is then (*) itself, followed by a short sum.

    Attributes:
        table: (R + M, taps) int32, the output that reads by this tap, or -1. Table row r < R belongs to row r.
        extras: (M,) int64, R..R+M-1: the extra table rows, grouped by owner.
        owners: (K,) int64, the rows that have extras, each once.
        offsets: (K,) int64, start of each owner's extras.
    """

    table: Tensor
    extras: Tensor
    owners: Tensor
    offsets: Tensor


def available(device: torch.device) -> bool:
    """Return True if the kernels run on this device: NVIDIA from Ampere on (bfloat16, tf32, asynchronous copies)."""
    if not triton_kernels.INSTALLED or triton_kernels.INTERPRETED:
        return triton_kernels.INTERPRETED and device.type == "cpu"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def supports(rows: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Return True if `gather_conv` accepts these operands: one of the three dtypes, ungrouped or depthwise."""
    grouping = groups == 1 or groups == rows.shape[1] == weight.shape[0]
    return grouping and rows.dtype == weight.dtype and rows.dtype in DTYPES and available(rows.device)


def _name_activation(activation: Activation | None) -> tuple[str, float] | None:
    """Return name and slope of an activation in the kernels; None if they do not support it."""
    if activation is None:
        return "none", 0.0
    if activation.name == "leaky_relu":
        return "leaky_relu", activation.scalars[0]
    name = _FUSED.get((activation.name, activation.scalars, activation.algorithm))
    return (name, 0.0) if name is not None else None


def reverse_map(table: Tensor, rows: int) -> ReversedMap:
    """Invert the kernel map `table` (N, taps) into `rows` rows; negative entries are ignored.

    This is one stable integer sort. It synchronises with the device, so keep the result as long as the table.
    """
    taps = table.shape[1]
    entry = table.flatten().ge(0).nonzero().squeeze(1)
    output, tap = entry // taps, entry % taps
    key, order = torch.sort(table.flatten()[entry].long() * taps + tap, stable=True)
    output, tap, row = output[order], tap[order], key // taps
    position = torch.arange(len(key), device=table.device)
    # The first slot of each (row, tap) is in the row itself, further slots are in its extras.
    slot = position - torch.searchsorted(key, key)
    needed = torch.zeros(rows, dtype=torch.int64, device=table.device)
    needed.scatter_reduce_(0, row, slot, "amax")
    ends = needed.cumsum(0)
    place = torch.where(slot == 0, row, rows + (ends - needed)[row] + slot - 1)
    count = int(needed.sum())
    readers = torch.full((rows + count, taps), -1, dtype=torch.int32, device=table.device)
    readers[place, tap] = output.to(torch.int32)
    owners = needed.nonzero().squeeze(1)
    extras = torch.arange(rows, rows + count, device=table.device)
    return ReversedMap(readers, extras, owners, (ends - needed)[owners])


def gather_conv(
    rows: Tensor,
    weight: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    groups: int = 1,
    reverse: Callable[[], ReversedMap] | None = None,
) -> Tensor:
    """Compute the convolution (*), (N, O), for operands that `supports` accepts; only the table has no gradient.

    Args:
        rows: (R, C) float32, float16 or bfloat16; sums are float32.
        weight: (O, taps C), taps outermost; depthwise (C, taps).
        table: (N, taps) int32 into the rows; a negative entry reads zero.
        bias: (O,).
        residual: (N, O).
        activation: applied last, inside the kernel if it supports the function.
        groups: 1, or C for a depthwise convolution.
        reverse: returns the inverse of the table, cached by the caller; if None, the inverse is computed.
    """
    channels, outputs, taps = rows.shape[1], weight.shape[0], table.shape[1]
    if groups > 1 and not groups == channels == outputs:
        raise ValueError(f"{groups} groups of {channels} channels are neither ungrouped nor depthwise.")
    expected = {
        "weight": (weight, (outputs, taps * (channels if groups == 1 else 1))),
        "bias": (bias, (outputs,)),
        "residual": (residual, (table.shape[0], outputs)),
    }
    for label, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{label} is {tuple(value.shape)} where {shape} is needed.")
    fused = _name_activation(activation)
    operands = (rows, weight, bias, residual)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        fused = fused if fused is not None and fused[0] in _INVERTIBLE else None
        name = fused[0] if fused is not None else "none"
        out = GatherConv.apply(rows, weight, bias, residual, table, name, groups, reverse)
    else:
        out = _forward(rows, weight, table, bias, residual, *(fused or ("none", 0.0)), groups)
    return out if fused is not None or activation is None else activation.apply_(out)


class GatherConv(torch.autograd.Function):
    """The convolution (*) with gradients; saves its inputs and, if there is an activation, its output."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        table: Tensor,
        activation: str,
        groups: int,
        reverse: Callable[[], ReversedMap] | None,
    ) -> Tensor:
        """See `gather_conv`."""
        out = _forward(rows, weight, table, bias, residual, activation, 0.0, groups)
        ctx.save_for_backward(rows, weight, table, None if activation == "none" else out)
        ctx.activation, ctx.groups, ctx.reverse = activation, groups, reverse
        ctx.dtypes = [x.dtype if x is not None else None for x in (bias, residual)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of rows, weight, bias and residual."""
        rows, weight, table, out = ctx.saved_tensors
        bias_dtype, residual_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        if out is not None:
            open_above = out < 6 if ctx.activation == "relu6" else True
            grad = grad * ((out > 0) & open_above)
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        if needs[0]:
            reverse = ctx.reverse() if ctx.reverse is not None else reverse_map(table, rows.shape[0])
            grad_rows = _grad_rows(grad, weight, reverse, table.shape[1], rows.shape[0], ctx.groups)
        if needs[1]:
            grad_weight = _grad_weight(rows, grad, table, ctx.groups).to(weight.dtype)
        grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype) if needs[2] else None
        grad_residual = grad.to(residual_dtype) if needs[3] else None
        return grad_rows, grad_weight, grad_bias, grad_residual, *(None,) * 4


def _grad_rows(
    grad: Tensor, weight: Tensor, reverse: ReversedMap, taps: int, count: int, groups: int
) -> Tensor:
    """Compute the gradient of the rows (count, C): (*) over the inverse map, then extras are added to their owners."""
    if groups == 1:
        weight = weight.reshape(weight.shape[0], taps, -1).permute(2, 1, 0).flatten(1)
    parts = _forward(grad, weight, reverse.table, None, None, "none", 0.0, groups)
    of_rows = parts[:count]
    if len(reverse.owners):
        sums = F.embedding_bag(reverse.extras, parts, reverse.offsets, mode="sum")
        of_rows[reverse.owners] += sums  # owners are distinct, so this is a plain write in a fixed order
    return of_rows


def _forward(
    rows: Tensor,
    weight: Tensor,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    groups: int,
) -> Tensor:
    count, outputs = table.shape[0], weight.shape[0]
    out = rows.new_empty(count, outputs)
    if not count:
        return out
    rows, weight, bias, residual = map(_operand, (rows, weight, bias, residual))
    table = table.contiguous()
    sizes = {"C": rows.shape[1], "TAPS": table.shape[1], "ACTIVATION": activation, "SLOPE": slope}
    arguments = (rows, weight, table, bias, residual, out, count, count.bit_length())
    with torch.cuda.device_of(rows):
        if groups > 1:
            triton_kernels.depthwise[
                lambda meta: (_cdiv(count, meta["BLOCK_N"]), _cdiv(outputs, meta["BLOCK_C"]))
            ](*arguments, **sizes)
        else:
            triton_kernels.product[
                lambda meta: (_cdiv(count, meta["BLOCK_N"]) * _cdiv(outputs, meta["BLOCK_O"]),)
            ](*arguments, C_OUT=outputs, PRECISION=_precision(), **sizes)
    return out


def _grad_weight(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    """Compute the float32 gradient of the weight: each program sums a share of the outputs; the shares are added."""
    (count, taps), channels, outputs = table.shape, rows.shape[1], grad.shape[1]
    rows, grad, table = _operand(rows), _operand(grad), table.contiguous()
    tiles = taps * _cdiv(channels, 64) * (_cdiv(outputs, 64) if groups == 1 else 1)
    shares = max(1, min(_PROGRAMS // tiles, _cdiv(count, 256)))
    depth = channels if groups == 1 else 1
    if not count:
        return rows.new_zeros(outputs, taps * depth, dtype=torch.float32)
    partial = rows.new_empty(shares, outputs, taps * depth, dtype=torch.float32)
    sizes = {"C": channels, "TAPS": taps}
    arguments = (rows, grad, table, partial, count, _cdiv(count, shares), count.bit_length())
    with torch.cuda.device_of(rows):
        if groups > 1:
            triton_kernels.depthwise_weight[lambda meta: (taps * _cdiv(channels, meta["BLOCK_C"]), shares)](
                *arguments, **sizes
            )
        else:
            triton_kernels.product_weight[
                lambda meta: (
                    taps * _cdiv(outputs, meta["BLOCK_O"]) * _cdiv(channels, meta["BLOCK_C"]),
                    shares,
                )
            ](*arguments, C_OUT=outputs, PRECISION=_precision(), **sizes)
    return partial.sum(0)


def _operand(x: Any) -> Any:
    """Prepare a tensor or None for the kernels; Triton 3.9's interpreter cannot multiply bfloat16."""
    if x is None:
        return None
    wide = triton_kernels.INTERPRETED and x.dtype == torch.bfloat16
    return x.contiguous().float() if wide else x.contiguous()


def _cdiv(length: int, block: int) -> int:
    return -(-length // block)


def _precision() -> str:
    """Return the precision of float32 products, following torch's setting for matrix products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
