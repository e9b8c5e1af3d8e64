"""Layers for inference: a convolution or linear layer fused with its bias and activation, with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.choose import check_channels, compute
from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.weights import Activation, FusedConv, Pair
from cadsurgery.elements.backends.works import Convolution
from cadsurgery.support.running import running


class PackedConv(nn.Module):
    """A fused convolution for inference: weight, bias and activation, with the weight packed for the backends.

    Called on a dense map it is a convolution with the given stride, padding and dilation; on elements
    `functional.fused_conv2d` uses its weights.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        groups: int = 1,
        activation: Activation | None = None,
        window: tuple[Pair, Pair, Pair] | None = None,
    ) -> None:
        """Take a weight (O, C / groups, kh, kw), a bias (O,), and for dense maps (stride, padding, dilation)."""
        super().__init__()
        layout = torch.channels_last if groups == 1 else torch.contiguous_format
        self.register_buffer("weight", weight.detach().clone(memory_format=layout))
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)
        self.weight: Tensor
        self.bias: Tensor | None
        self.groups, self.activation, self.window = groups, activation, window
        self.meets_nan = False  # see `FusedConv`
        self._packed: FusedConv | None = None

    @property
    def weights(self) -> FusedConv:
        """The weight with its packed forms."""
        if self._packed is None:
            dense = self.window is not None
            parts = (self.weight, self.bias, self.groups, self.activation)
            self._packed = FusedConv(*parts, {}, dense, self.meets_nan)
        return self._packed

    def forward(self, image: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve a dense map; `residual` is added before the activation."""
        assert self.window is not None
        return convolve(self.weights, image, *self.window, residual)

    def extra_repr(self) -> str:
        """Return shape, groups and activation for `print`."""
        shape = "x".join(map(str, self.weight.shape))
        return f"{shape}, groups={self.groups}, activation={self.activation and self.activation.name}"

    def _apply(self, function: Any, recurse: bool = True) -> PackedConv:
        self._packed = None
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None  # it was packed from the old weight
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}


class PackedLinear(PackedConv):
    """A linear layer on the last axis of a dense map, computed as a product of rows."""

    def forward(self, values: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (..., O) from (..., C); `residual`, any tensor that broadcasts, is added before the activation."""
        shape = (*values.shape[:-1], self.weight.shape[0])
        rows = values.reshape(-1, values.shape[-1])
        if residual is not None and residual.shape != shape:
            plain = compute(Convolution(rows, self.weights.without_activation, None))
            return self.weights.finish(plain.view(shape), residual)
        more = residual.reshape(-1, shape[-1]) if residual is not None else None
        return compute(Convolution(rows, self.weights, None, residual=more)).view(shape)


class ScaleShift(nn.Module):
    """Batch normalisation with fixed statistics, as one factor and one shift per channel, and the activation behind it.

    Called on a dense map (B, C, H, W), or where one number serves all channels on any tensor; on elements
    `functional.scale_and_shift` uses it.
    """

    def __init__(self, scale: Tensor, shift: Tensor, activation: Activation | None = None) -> None:
        """Take the factors and shifts, (C,) or (1,): in float32 also for narrower types, as torch computes norms."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.scale: Tensor
        self.shift: Tensor
        self.activation = activation

    def forward(self, values: Tensor, last: bool = False) -> Tensor:
        """Normalise values, whose channels are their third axis from the end, or with `last` their last one."""
        is_number = self.scale.numel() == self.shift.numel() == 1
        if not is_number and not running.in_graph:  # one channel would be repeated
            check_channels(values.shape[-1 if last else -3], max(self.scale.numel(), self.shift.numel()))
        shape, wide = (-1,) if last or is_number else (-1, 1, 1), values.to(self.scale.dtype)
        changed = torch.addcmul(self.shift.view(shape), wide, self.scale.view(shape)).to(values.dtype)
        return self.activation.apply_(changed) if self.activation is not None else changed
