"""Layers of 8-bit networks: convolutions, linear layers and pooling of dense maps, whose pixels are treated as rows."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.choose import Pooling, check_channels, compute
from cadsurgery.elements.backends.integer import (
    IntegerConvolution,
    IntegerWeights,
    QuantParams,
    convolve,
    form_here,
    to_lines,
)
from cadsurgery.elements.backends.weights import Pair
from cadsurgery.elements.kernel_map import read_rows
from cadsurgery.support.errors import InvalidInput

_FOUR = 4  # padded channels of an image: the number of products that one instruction adds up


class IntegerConv(nn.Module):
    """An 8-bit convolution. On a dense map it uses the given stride, padding and dilation; on elements
    `functional.fused_conv2d` uses its weights."""

    def __init__(self, weights: IntegerWeights, window: tuple[Pair, Pair, Pair] | None = None) -> None:
        """Take the weights and, for dense maps, (stride, padding, dilation)."""
        super().__init__()
        self.weights, self.window = weights, window
        for name in ("weight", "scale", "bias"):  # the same tensors, so that meta copies hold no values
            self.register_buffer(name, getattr(weights, name), persistent=False)
        self.weight: Tensor

    @property
    def groups(self) -> int:
        """Channel groups."""
        return self.weights.groups

    def forward(self, image: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve an 8-bit dense map (B, C, H, W); `residual` is added before the activation."""
        assert self.window is not None
        stride, padding, dilation = self.window
        batch, channels, height, width = image.shape
        check_channels(channels, self.weight.shape[1] * self.groups)
        weights, kernel = self.weights, (self.weight.shape[2], self.weight.shape[3])
        if channels <= _FOUR and dilation == (1, 1) and self.groups == 1 and form_here() is not None:
            rows, weights = _lines_of(image, padding, weights), self._by_line
            size = height + 2 * padding[0], width + 2 * padding[1]
            table, out = _read_pixels(batch, size, (kernel[0], 1), stride, (0, 0), (1, 1), kernel[1])
        else:
            rows = _rows_of(image)
            table, out = _read_pixels(batch, (height, width), kernel, stride, padding, dilation)
        more = _rows_of(residual) if residual is not None else None
        reading = (
            None if kernel == stride == (1, 1) and padding == (0, 0) else read_rows(table, has_outside=True)
        )
        return _map_of(convolve(IntegerConvolution(rows, weights, reading, more)), batch, out)

    @property
    def _by_line(self) -> IntegerWeights:
        """Weights for an image of up to four channels, in which one tap reads a whole line of the window."""
        if "by line" not in self.weights.packed_cache:
            weight = self.weight.new_zeros(
                self.weight.shape[0], *self.weight.shape[2:], _FOUR
            )  # (O, kh, kw, 4)
            weight[..., : self.weight.shape[1]] = self.weight.permute(0, 2, 3, 1)
            by_line = weight.flatten(2).transpose(1, 2).unsqueeze(3).contiguous()
            self.weights.packed_cache["by line"] = replace(self.weights, weight=by_line, packed_cache={})
        weights: IntegerWeights = self.weights.packed_cache["by line"]
        return weights

    def extra_repr(self) -> str:
        """Return shape, groups and quantisation parameters for `print`."""
        weights = self.weights
        shape = "x".join(map(str, weights.weight.shape))
        return f"{shape}, groups={weights.groups}, {weights.source} -> {weights.out or 'float32'}"

    def _apply(self, function: Any, recurse: bool = True) -> IntegerConv:
        moved = function(torch.zeros(()))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise InvalidInput(
                f"a copy in 8 bits cannot be moved to {moved.device.type}, {moved.dtype}.",
                why="its weights, grids and kernels are those of this processor.",
                next="move the network it was made from, and optimize() that.",
            )
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weights": replace(self.weights, packed_cache={})}


class IntegerLinear(IntegerConv):
    """A linear layer on the last axis of a dense map."""

    def forward(self, values: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (..., O) from (..., C)."""
        shape = (*values.shape[:-1], self.weight.shape[0])
        more = residual.reshape(-1, shape[-1]) if residual is not None else None
        rows = values.reshape(-1, values.shape[-1])
        return convolve(IntegerConvolution(rows, self.weights, None, more)).view(shape)


def to_bytes(values: Tensor, scale: float, zero: int) -> Tensor:
    """Quantise values to uint8 with the given parameters."""
    return QuantParams(scale, zero).quantise(values)


def from_bytes(values: Tensor, scale: float, zero: int) -> Tensor:
    """Convert uint8 numbers back to float32 values."""
    return QuantParams(scale, zero).dequantise(values)


def max_pool_bytes(image: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Max-pool an 8-bit dense map; the order of the numbers is the order of their values."""
    batch, _, height, width = image.shape
    table, out = _read_pixels(batch, (height, width), kernel, stride, padding, dilation)
    return _map_of(
        compute(Pooling(_rows_of(image), read_rows(table, has_outside=True), -torch.inf, largest=True)),
        batch,
        out,
    )


def _rows_of(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _map_of(rows: Tensor, batch: int, size: Pair) -> Tensor:
    return rows.view(batch, *size, rows.shape[1]).permute(0, 3, 1, 2)


def _lines_of(image: Tensor, padding: Pair, weights: IntegerWeights) -> Tensor:
    """View the pixels of a padded four-channel image as overlapping rows: each row also holds the pixels after it."""
    batch, _, height, width = image.shape
    down, across = padding
    wide, beyond = width + 2 * across, weights.weight.shape[3] - 1
    pixels = batch * (height + 2 * down) * wide
    memory = torch.full(((pixels + beyond) * _FOUR,), weights.source.zero, dtype=torch.uint8)
    to_lines(image, memory, padding)
    return memory.as_strided((pixels, (1 + beyond) * _FOUR), (_FOUR, 1))


@lru_cache(maxsize=32)
def _read_pixels(
    batch: int, size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, wide: int = 1
) -> tuple[Tensor, Pair]:
    """Return the pixel that each tap of a window reads, (n, taps), with the number of pixels for outside positions,
    and the output size. A tap may span `wide` pixels, of which the table holds the first.
    """
    axes, counts = [], []
    for axis, length in enumerate(size):
        span = dilation[axis] * (kernel[axis] - 1) + (wide if axis == 1 else 1)
        count = (length + 2 * padding[axis] - span) // stride[axis] + 1
        first = torch.arange(count) * stride[axis] - padding[axis]
        axes.append(first.unsqueeze(1) + torch.arange(kernel[axis]) * dilation[axis])
        counts.append(count)
    (y, x), (height, width) = axes, size
    image = torch.arange(batch).view(-1, 1, 1, 1, 1) * height
    y, x = y.view(1, counts[0], 1, -1, 1), x.view(1, 1, counts[1], 1, -1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    places = torch.where(inside, (image + y) * width + x, batch * height * width)
    return places.flatten(0, 2).flatten(1).int().contiguous(), (counts[0], counts[1])
