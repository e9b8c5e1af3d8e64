"""Operations that read a window around an element: convolutions, pooling, space to depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.dense import spread_of
from cadsurgery.elements.backends.graph_sizes import require_equal
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.reference import gather_blocks
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.backends.works import Convolution, Pooling, TransposedConvolution, WindowRead, extend
from cadsurgery.elements.elements import Elements, check_joint, common_lattice, own_image, rows_on
from cadsurgery.elements.kernel_map import Window, divisors, kernel_map, phases, read_rows
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.support.autocast import autocast
from cadsurgery.support.errors import InvalidInput


def _macs_of_weight(out: Elements, x: Elements, weight: Tensor, *rest: Any, **options: Any) -> int:
    """Count one MAC per result element and weight entry; in a transposed convolution only the entries of the element's
    phase count, or on a uniform lattice, as in torch, all entries for every input sample."""
    window: Window = options["window"]
    if window.finer == 1:
        return out.lattice.count * weight.numel()
    spread = spread_of(WindowRead(x.lattice, out.lattice, window))
    if spread is not None:
        return x.lattice.batch * spread.shifts**2 * math.prod(spread.samples) * weight.numel()
    if window.has_equal_phases and out.lattice.capacity is None:
        return out.lattice.count * weight.numel() // window.finer**2
    every, _ = phases(x.lattice, out.lattice, window)
    return sum(phase.table.numel() for phase in every) * weight[:, :, 0, 0].numel()


def _macs_of_weights(
    out: Elements, x: Elements, weights: FusedConv | PackedConv, *rest: Any, **options: Any
) -> int:
    return _macs_of_weight(out, x, weights.weight, **options)


def _macs_of_shape(out: Elements, *rest: Any, shape: tuple[int, ...], **options: Any) -> int:
    return out.lattice.count * math.prod(shape)


@operation(reads="window", macs=_macs_of_weight)
def conv2d(
    x: Elements,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    stage: int | Lattice,
    groups: int = 1,
    size: Sequence[int] | None = None,
) -> Elements:
    """Compute a convolution at the elements of the lattice after `stage`.

    out(e) = sum_t w[t] X(a(e) + S (d t - p)): dilated for cells that are kept, strided for cells that are
    downsampled here (Hesse et al. 2023, Fig. 8c). A window with `finer > 1` is a transposed convolution onto the
    lattice of an earlier stage: out(e) = sum_t w[t] X(a(e) + (S / f) (p - t)), summed over the taps of the element's
    own phase.

    Args:
        x: elements (N, C).
        weight: (O, C / groups, kh, kw), also for a transposed convolution, see `transpose_weight`.
        bias: (O,) or None.
        window: window of the operation in the network, with the spacing of its grid.
        stage: stage of the output (at least the input's, except for upsampling) or its lattice. The same holds for all
            functions in this module.
        groups: channel groups.
        size: output size of a transposed convolution that the network asks for; the last two numbers are samples.
    """
    window, target = target_of(x, window, stage, size)
    rows, weight, bias = autocast(x.rows, weight, bias)
    if rows.dtype != weight.dtype:  # backends would convert the weight, and answer in the wrong type
        raise TypeError(f"the elements are {rows.dtype}, the weight is {weight.dtype}")
    return _convolve(rows, FusedConv(weight, bias, groups), WindowRead(x.lattice, target, window))


def _convolve(
    rows: Tensor, weights: FusedConv, reads: WindowRead, residual: Tensor | None = None
) -> Elements:
    work = TransposedConvolution if reads.window.finer > 1 else Convolution
    return Elements(compute(work(rows, weights, reads, reads.window.outside or 0.0, residual)), reads.target)


@operation(reads="window", macs=_macs_of_weights)
def fused_conv2d(
    x: Elements,
    weights: FusedConv | PackedConv,
    residual: Elements | None = None,
    *,
    window: Window,
    stage: int | Lattice | None,
    size: Sequence[int] | None = None,
    joint: tuple[int, str] | None = None,
) -> Elements:
    """Compute `conv2d`, add a residual and apply an activation in the same pass; without gradients.

    Args:
        x: elements (N, C); a pointwise window also accepts additional channel axes before the last.
        weights: weight, bias, groups and activation.
        residual: elements of the output's stage or an earlier stage.
        window: window of the operation in the network, with the spacing of its grid.
        stage: stage of the output; None for the input's.
        size: see `conv2d`.
        joint: how the residual is joined, see `check_joint`.

    Raises:
        InvalidInput: see `check_joint`.
    """
    stage = x.lattice.stage if stage is None else stage
    window, target = target_of(x, window, stage, size)
    if residual is not None:
        check_joint(joint, target, residual.lattice)
    weights = weights.weights if isinstance(weights, PackedConv) else weights
    rows = autocast(x.rows)[0]
    if residual is not None and not _is_of(residual, target, (*rows.shape[1:-1], weights.weight.shape[0])):
        plain = fused_conv2d(x, weights.without_activation, window=window, stage=target)
        target = common_lattice(target.stage if target.part is None else target, plain, residual)
        return Elements(weights.finish(rows_on(plain, target), rows_on(residual, target)), target)
    more = rows_on(residual, target).to(rows.dtype) if residual is not None else None
    return _convolve(rows, weights, WindowRead(x.lattice, target, window), more)


def _is_of(residual: Elements, target: Lattice, channels: tuple[int, ...]) -> bool:
    """Return True if a residual has the product's size and channels; otherwise (rare) it is added separately."""
    large = all(a >= b for a, b in zip(residual.lattice.size, target.size, strict=True))
    return large and residual.rows.shape[1:] == channels


@operation(reads="window", macs=_macs_of_shape)
def conv2d_per_image(
    x: Elements,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    stage: int | Lattice,
    shape: tuple[int, ...],
    groups: int = 1,
) -> Elements:
    """Compute a convolution whose kernel is a mixture of experts chosen per image (Yang et al. 2019, CondConv).

    Args:
        x: elements (N, C).
        mix: (B, experts), weight of each expert for each image.
        weight: (experts, O * C / groups * kh * kw).
        bias: (experts, O) or None.
        window: window of the operation.
        stage: stage of the output.
        shape: shape of one kernel, (O, C / groups, kh, kw).
        groups: channel groups.
    """
    window, target = target_of(x, window, stage)
    weights = (mix @ weight).view(-1, *shape)
    biases = mix @ bias if bias is not None else [None] * len(weights)
    reading = WindowRead(x.lattice, target, window).reading
    rows, table = extend(x.rows, reading, window.outside or 0.0), reading.table
    is_split = target.has_known_counts
    tables = table.split(target.counts.tolist()) if is_split else [table] * target.batch
    parts = []
    for mixture, offset, entries in zip(weights, biases, tables, strict=True):
        values, mixture, offset = autocast(rows, mixture, offset)
        parts.append(compute(Convolution(values, FusedConv(mixture, offset, groups), read_rows(entries))))
    return Elements(torch.cat(parts) if is_split else own_image(torch.stack(parts), target), target)


@operation(reads="window", outside=-math.inf, drops=True)
def max_pool2d(x: Elements, window: Window, stage: int | Lattice) -> Elements:
    """Compute the maximum over the window at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (atrous pooling).
    """
    window, target = target_of(x, window, stage)
    if window.is_pointwise:
        return Elements(_subsample(x, target), target)
    outside = -torch.inf if window.outside is None else window.outside
    reads = WindowRead(x.lattice, target, window, drops(target, window))
    return Elements(compute(Pooling(x.rows, reads, outside, largest=True)), target)


@operation(reads="window", drops=True)
def avg_pool2d(
    x: Elements,
    window: Window,
    stage: int | Lattice,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Elements:
    """Compute the mean over the window at the elements of the lattice after `stage`; see `max_pool2d`.

    Args:
        x: elements.
        window: window of the operation.
        stage: stage of the output.
        count_include_pad: count padding in the divisor, as in torch; positions beyond the padding never count.
        divisor: fixed divisor to use instead.
    """
    window, target = target_of(x, window, stage)
    if window.is_pointwise:
        rows = _subsample(x, target)
        return Elements(rows if divisor is None else rows / divisor, target)
    drop = drops(target, window)
    reads = WindowRead(x.lattice, target, window, drop)
    total = compute(Pooling(x.rows, reads, window.outside or 0.0, largest=False))
    if divisor is not None or total.is_meta:
        return Elements(total / (divisor or 1), target)
    counts = divisors(x.lattice, target, window, drop=drop, padding=count_include_pad)
    return Elements(total / counts.unsqueeze(1).to(total), target)


@operation(reads="window", drops=True)
def pixel_unshuffle(x: Elements, window: Window, stage: int | Lattice) -> Elements:
    """Compute space to depth: the values under an r x r window are concatenated along the channels.

    Raises:
        InvalidInput: a side of the network's own map is no multiple of r, which torch refuses, too.
    """
    height, width = x.lattice.samples(window.spacing)
    reason = f"sides of a pixel unshuffle are multiples of {window.stride}"
    wholes = [length // window.stride * window.stride for length in (height, width)]
    if not all([require_equal(*pair, reason) for pair in zip((height, width), wholes, strict=True)]):
        raise InvalidInput(
            f"a map of {height}x{width} samples cannot be put into channels by {window.stride}x{window.stride}.",
            why="torch refuses that, too.",
            next=f"pad or resize the image so that both sides of the map are multiples of {window.stride}.",
        )
    window, target = target_of(x, window, stage)
    reading = kernel_map(x.lattice, target, window, drop=drops(target, window))
    rows = extend(x.rows, reading, 0.0)
    parts = [block.transpose(1, 2).flatten(1) for block in gather_blocks(rows, reading.table)]
    return Elements(torch.cat(parts), target)


def drops(target: Lattice, window: Window) -> bool:
    """Return True if cells that are not downsampled here pass unchanged."""
    return target.geometry.pool == "drop" and window.stride > 1


def _subsample(x: Elements, target: Lattice) -> Tensor:
    """Select the rows of a pooling with one tap; the result has its own memory, which callers may overwrite."""
    rows = rows_on(x, target)
    return rows.clone() if rows is x.rows else rows


def target_of(
    x: Elements, window: Window, stage: int | Lattice, samples: Sequence[int] | None = None
) -> tuple[Window, Lattice]:
    """Return the window with its padding resolved, and the lattice of its output."""
    lattice = x.lattice
    if isinstance(stage, Lattice):
        return window.fit(lattice.size), stage
    if window.finer == 1:  # the common case is looked up rather than computed
        window, size = lattice.derive(("target", window), lambda: _fit(window, lattice.size))
        return window, lattice.at(stage, size)
    window = window.fit(lattice.size)
    counts = window.finer_samples(lattice.size) if samples is None else samples[-2:]
    return window, lattice.resample(stage, lattice.holding(counts, window.output_spacing))


def _fit(window: Window, size: tuple[int, int]) -> tuple[Window, tuple[int, int]]:
    """Return the window with its padding resolved, and the fine size of its output."""
    window = window.fit(size)
    return window, window.output_size(size)
