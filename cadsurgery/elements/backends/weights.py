"""A convolution's weight with its bias, groups and activation, and the forms that backends pack it in.

Each backend packs the weight in its own format; packed weights are cached in inference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]  # (vertical, horizontal)
# How many packed forms of a weight are cached, mostly for different shapes of dense maps.
MOST_FORMS = 4
_PACKING = threading.Lock()


@dataclass(frozen=True)
class Activation:
    """A pointwise function that can be applied to a result while it is in the cache.

    Attributes:
        name: name of the function in oneDNN's fused operations.
        scalars: parameters of the function, in oneDNN's order.
        algorithm: variant of the function.
    """

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest value if the function is a clamp; otherwise None."""
        if self.name == "relu":
            return 0.0, float("inf")
        return (self.scalars[0], self.scalars[1]) if self.name == "hardtanh" else None

    def apply_(self, values: Tensor) -> Tensor:
        """Apply the function in place."""
        if self.name == "relu":
            return torch.relu_(values)  # other engines fuse this into a product, but not a clamp
        if self.bounds is not None:
            return values.clamp_(*self.bounds)
        if self.name == "gelu":
            return torch.ops.aten.gelu_(values, approximate=self.algorithm)
        if self.name == "leaky_relu":
            return F.leaky_relu_(values, *self.scalars)
        return _IN_PLACE[self.name](values)


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": lambda values: F.silu(values, inplace=True),
    "hardswish": lambda values: F.hardswish(values, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


@dataclass
class FusedConv:
    """Weight (O, C / groups, kh, kw), bias and activation of a convolution.

    Attributes:
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        groups: channel groups.
        activation: applied last, after the residual.
        packed_cache: packed forms of the weight made so far; None to keep none.
        dense: True if the weight is also packed for the shapes of dense maps.
        phases: weights of each phase of a transposed convolution, if packed forms are kept.
        meets_nan: True if sums may be NaN. oneDNN's clamps turn NaN into numbers and are then not used; the clamps of
            torch and this package preserve NaN, but torch's needs another pass.
        choices: the backends chosen so far (see `choose`), if packed forms are kept.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    activation: Activation | None = None
    packed_cache: dict[Hashable, Any] | None = None
    dense: bool = False
    meets_nan: bool = False
    phases: dict[tuple[int, int], FusedConv] = field(default_factory=dict)
    choices: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def changed(self, **values: Any) -> FusedConv:
        """Return a copy with changed fields, and with its own packed weights and choices if this one keeps any."""
        cache: dict[Hashable, Any] | None = None if self.packed_cache is None else {}
        return replace(self, **values, packed_cache=cache, phases={}, choices={})

    @property
    def without_activation(self) -> FusedConv:
        """The same convolution without its activation; packed weights are shared."""
        return replace(self, activation=None)

    def of_phase(self, first: tuple[int, int], finer: int) -> FusedConv:
        """Return the taps of one phase of a transposed convolution, see `kernel_map`; packed weights are cached."""
        part = self.weight[:, :, first[0] :: finer, first[1] :: finer]
        if self.packed_cache is None:
            return replace(self, weight=part)
        if first not in self.phases:
            self.phases[first] = self.changed(weight=part)
        return replace(self.phases[first], activation=self.activation)

    def finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """Add a residual that broadcasts and apply the activation; in place if the shape allows it."""
        if residual is not None:
            whole = torch.broadcast_shapes(out.shape, residual.shape) == out.shape
            out = out.add_(residual) if whole else out + residual
        return self.activation.apply_(out) if self.activation is not None else out

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in the layout for products of gathered rows.

        Ungrouped: (O, taps * C), taps outermost, which is the order of the values in a gathered row. Grouped:
        (O, C / groups, taps, 1), contiguous, because torch 2.15 on the CPU gives wrong results for a channels_last
        kernel of width one.
        """
        weight = self.weight.to(dtype)
        if self.groups > 1:
            return weight.contiguous().flatten(2).unsqueeze(3)
        return weight.permute(0, 2, 3, 1).flatten(1)

    def bias_as(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias in a dtype."""
        return self.bias.to(dtype) if self.bias is not None else None

    def form(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return a packed form, cached if forms are kept; thread-safe. Beyond `MOST_FORMS` the oldest is dropped."""
        if self.packed_cache is None:
            return make()
        form = self.packed_cache.get(key)
        if form is None:
            with _PACKING:
                form = self.packed_cache.get(key)
                if form is None:
                    form = make()
                    if len(self.packed_cache) >= MOST_FORMS:
                        del self.packed_cache[next(iter(self.packed_cache))]
                    self.packed_cache[key] = form
        return form


def transpose_weight(weight: Tensor, groups: int, turned: bool = False) -> Tensor:
    """Convert the weight (C, O / groups, kh, kw) of a transposed convolution to (O, C / groups, kh, kw), or back.

    With `turned` the kernel is also rotated by 180 degrees: at stride one this gives the equivalent convolution.
    """
    transposed = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return transposed.flip(2, 3) if turned else transposed
