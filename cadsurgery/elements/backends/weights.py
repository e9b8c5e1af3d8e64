"""A convolution's weight, and its products with rows and dense maps, fused with residual and activation.

`FusedConv` holds a weight with its bias, groups and activation. oneDNN multiplies rows by a linear layer, whose packed
weight serves any number of rows, and convolves dense maps with weights packed for their shape. Each backend packs the
weight in its own format; packed weights are cached in inference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import Convolution, compute
from cadsurgery.elements.lattice import Lattice
from cadsurgery.kernels.load import is_observed

Pair = tuple[int, int]  # (vertical, horizontal)
_ONEDNN = (torch.float32, torch.bfloat16)
# Size of a block that stays in the cache until the next operation reads it.
_BLOCK_BYTES = 1 << 20
# A product with fewer rows, or fewer values (torch's own limit), does not use oneDNN's usual kernels and is summed in a
# different order. From these sizes on the result of a row has the same bits for any number of rows.
_FEWEST_ROWS, _FEWEST_VALUES = 64, 20480
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


class Factors(NamedTuple):
    """Scale and shift of each level, (levels + 1, C) each; level 0 has 1 and 0."""

    scale: Tensor
    shift: Tensor

    def of_rows(self, lattice: Lattice, like: Tensor) -> Factors:
        """Return the factors for rows (N, ..., C) in the dtype of `like`: (C,) for all rows, or one per row."""
        level = lattice.uniform_level
        if level is not None:
            return Factors(*(value[level].to(like.dtype) for value in self))
        places, wide = lattice.level_of_rows.to(like.device), (-1, *(1,) * (like.dim() - 2), like.shape[-1])
        return Factors(*(value.to(like.dtype).index_select(0, places).view(wide) for value in self))

    def apply(self, rows: Tensor, lattice: Lattice) -> Tensor:
        """Scale and shift the rows (N, ..., C) of a lattice."""
        scale, shift = self.of_rows(lattice, rows)
        return rows * scale + shift


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
        counts: row counts of the first uniform maps that were multiplied.
        phases: weights of each phase of a transposed convolution, if packed forms are kept.
        meets_nan: True if sums may be NaN. oneDNN's clamps turn NaN into numbers and are then not used; the clamps of
            torch and this package preserve NaN, but torch's needs another pass.
        levels: scale and shift of each level, applied to the sum with its bias.
        of_levels: weights of single levels, if packed forms are kept.
        choices: the backends chosen so far (see `choose`), if packed forms are kept.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    activation: Activation | None = None
    packed_cache: dict[Hashable, Any] | None = None
    dense: bool = False
    meets_nan: bool = False
    counts: set[int] = field(default_factory=set)
    phases: dict[tuple[int, int], FusedConv] = field(default_factory=dict)
    levels: Factors | None = None
    of_levels: dict[int, FusedConv] = field(default_factory=dict)
    choices: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def is_recurring_row_count(self, count: int) -> bool:
        """Return True if a row count is one of the first few seen for uniform maps; the answer never changes."""
        if len(self.counts) < MOST_FORMS:
            self.counts.add(count)
        return count in self.counts

    def changed(self, **values: Any) -> FusedConv:
        """Return a copy with changed fields, and with its own packed weights and choices if this one keeps any."""
        kept: dict[Hashable, Any] | None = None if self.packed_cache is None else {}
        return replace(self, **values, packed_cache=kept, counts=set(), phases={}, of_levels={}, choices={})

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

    def at_level(self, level: int) -> FusedConv:
        """Return the convolution for rows of a single level, with scale and shift folded into weight and bias."""
        if self.levels is None or level == 0:
            return replace(self, levels=None)
        if level not in self.of_levels:
            scale, shift = (value[level].double() for value in self.levels)
            bias = self.bias.double() * scale + shift if self.bias is not None else shift
            weight = self.weight.double() * scale.view(-1, 1, 1, 1)
            folded = {"weight": weight.to(self.weight), "bias": bias.to(self.weight)}
            self.of_levels[level] = self.changed(**folded, levels=None)
        return replace(self.of_levels[level], activation=self.activation)

    def on_rows(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (n, O) from gathered rows (n, taps * C), taps outermost; ungrouped.

        `residual` (n, O) is added before the activation.
        """
        if self.packed_cache is None or not _has_onednn(rows) or not rows.numel():
            multiply = product if self.packed_cache is None and rows.numel() else F.linear
            return self.finish(multiply(rows, self.matrix(rows.dtype), self.bias_as(rows.dtype)), residual)
        # The packed weight of a linear layer serves any number of rows. The packed weight of a convolution serves one
        # shape only: with another shape it is reordered in every call, which is far slower.
        weight = self.form(
            ("rows", rows.dtype),
            lambda: torch.ops.mkldnn._reorder_linear_weight(self.matrix(rows.dtype).contiguous()),
        )
        bias, act = self.bias_as(rows.dtype), self.activation
        if residual is None:
            return self._rest(_LINEAR(rows, weight, bias, *self._fused))
        residual = residual.contiguous()
        if act is None:
            return _LINEAR.binary(rows, residual, weight, bias, "add")
        if act.name == "relu" and rows.shape[0] > rows.shape[1] and not self.meets_nan:
            # A convolution fuses both. Reordering its weight in every call is cheaper than the separate pass below.
            point = self.matrix(rows.dtype)[:, :, None, None]
            out = self._onednn(_image(rows), point, _image(residual), ((1, 1), (0, 0), (1, 1)), 1)
            return out.permute(0, 2, 3, 1).reshape(rows.shape[0], -1)
        # The activation is applied block by block, while the sums are in the cache.
        out = rows.new_empty(rows.shape[0], self.weight.shape[0])
        length = max(64, _BLOCK_BYTES // max(1, out.shape[1] * out.element_size()))
        for part, more, whole in zip(
            rows.split(length), residual.split(length), out.split(length), strict=True
        ):
            whole.copy_(act.apply_(_LINEAR.binary(part, more, weight, bias, "add")))
        return out

    def on_elements(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute `on_rows` such that the bits of a row do not depend on the number of rows."""
        if self.packed_cache is None:
            return self.on_rows(rows, residual)
        count, fewest = rows.shape[0], _fewest(rows)
        if not 0 < count < fewest:
            return self.on_rows(rows, residual)
        more = _fill(residual, fewest) if residual is not None else None
        return self.on_rows(_fill(rows, fewest), more)[:count]

    def on_image(
        self, image: Tensor, stride: Pair, padding: Pair, dilation: Pair, residual: Tensor | None = None
    ) -> Tensor:
        """Compute an ordinary convolution of a dense map (B, C, H, W).

        `residual` is added before the activation; it may be any tensor that broadcasts to the result.
        """
        if residual is not None and residual.shape != self._shape(image, stride, padding, dilation):
            return self.finish(self.without_activation.on_image(image, stride, padding, dilation), residual)
        weight, bias = self.weight.to(image.dtype), self.bias_as(image.dtype)
        is_pointwise = self.groups == 1 and (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)
        if self.dense and is_pointwise and not torch.compiler.is_compiling():
            return self._on_pixels(image, residual)
        if not _has_onednn(image) or not image.numel():
            out = F.conv2d(image, weight, bias, stride, padding, dilation, self.groups)
            return self.finish(out, residual)
        image = image.contiguous(memory_format=torch.channels_last)
        if self.dense:
            shape, pack = list(image.shape), torch.ops.mkldnn._reorder_convolution_weight
            weight = self.form(
                ("image", image.dtype, stride, padding, dilation, *shape),
                lambda: pack(weight.contiguous(), padding, stride, dilation, self.groups, shape),
            )
        return self._onednn(image, weight, residual, (stride, padding, dilation), self.groups)

    def _on_pixels(self, image: Tensor, residual: Tensor | None) -> Tensor:
        """Compute a 1x1 convolution of a dense map as a product of its pixels, viewed as rows."""

        def rows(values: Tensor | None) -> Any:
            return values.permute(0, 2, 3, 1).reshape(-1, values.shape[1]) if values is not None else None

        out = compute(Convolution(rows(image), self, None, residual=rows(residual)))
        return out.view(image.shape[0], *image.shape[2:], -1).permute(0, 3, 1, 2)

    def finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """Add a residual that broadcasts and apply the activation; in place if the shape allows it."""
        if residual is not None:
            whole = torch.broadcast_shapes(out.shape, residual.shape) == out.shape
            out = out.add_(residual) if whole else out + residual
        return self.activation.apply_(out) if self.activation is not None else out

    def _onednn(
        self,
        image: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        window: tuple[Pair, Pair, Pair],
        groups: int,
    ) -> Tensor:
        bias, act, (stride, padding, dilation) = self.bias_as(image.dtype), self.activation, window
        numbers = (padding, stride, dilation, groups)
        if residual is None and act is None and self.packed_cache is None:
            return F.conv2d(image, weight, bias, *window, groups)
        if residual is None:
            return self._rest(_POINTWISE(image, weight, bias, *numbers, *self._fused))
        relu = act is not None and act.name == "relu" and not self.meets_nan
        # Torch itself adds and clamps where oneDNN does not support the map or might read it as contiguous. Torch has
        # no bfloat16 version of this.
        if image.dtype == torch.bfloat16:
            plain = groups == 1 and min(image.shape[1], weight.shape[0]) > 1
            relu = relu and plain and image.shape[2] * image.shape[3] > 1
        residual = residual.contiguous(memory_format=torch.channels_last)
        then = ("add", 1.0, "relu" if relu else None, (), "")
        out = _POINTWISE.binary(image, residual, weight, bias, *numbers, *then)
        return out if relu or act is None else act.apply_(out)

    def _shape(self, image: Tensor, *window: Pair) -> tuple[int, ...]:
        """Return the shape of the result for an image."""
        axes = zip(image.shape[2:], self.weight.shape[2:], *window, strict=True)
        sizes = ((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in axes)
        return image.shape[0], self.weight.shape[0], *sizes

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

    @property
    def _fused(self) -> tuple[str, tuple[float, ...], str]:
        """The activation in the format of oneDNN's fused operations."""
        act = None if self._is_apart else self.activation
        return (act.name, act.scalars, act.algorithm) if act is not None else ("none", (), "")

    @property
    def _is_apart(self) -> bool:
        """True if the activation must not be fused into a oneDNN operation."""
        return self.meets_nan and self.activation is not None and self.activation.bounds is not None

    def _rest(self, out: Tensor) -> Tensor:
        """Apply the activation, if it was not fused."""
        return self.activation.apply_(out) if self._is_apart and self.activation is not None else out

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


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `rows @ weight.T + bias` for (n, K) rows and an (O, K) weight; differentiable."""
    if rows.device.type == "cpu" and rows.dtype in _ONEDNN:
        count, fewest = rows.shape[0], _fewest(rows)
        if 0 < count < fewest:
            rows = _fill(rows, fewest)
        out = F.conv2d(_image(rows), weight[:, :, None, None], bias)
        return out.permute(0, 2, 3, 1).reshape(rows.shape[0], -1)[:count]
    return F.linear(rows, weight, bias)


def _fewest(rows: Tensor) -> int:
    """Return how many rows of this length a product needs at least; 0 while torch traces or counts operations."""
    return 0 if is_observed() else max(_FEWEST_ROWS, _FEWEST_VALUES // rows.shape[1] + 1)


def _fill(rows: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to `count` rows."""
    return F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _image(rows: Tensor | None) -> Any:
    """View rows (n, C) as a channels_last image with exactly these strides; otherwise torch would silently copy it."""
    return rows.reshape(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2) if rows is not None else None


def _has_onednn(values: Tensor) -> bool:
    """Return True if oneDNN's fused operations can be used; they have no gradients, and torch cannot count them."""
    return (
        _POINTWISE is not None
        and values.device.type == "cpu"
        and values.dtype in _ONEDNN
        and (values.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and not is_observed()
        and not (torch.is_grad_enabled() and values.requires_grad)
    )


_FUSED = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_POINTWISE: Any = getattr(_FUSED, "_convolution_pointwise", None)
_LINEAR: Any = getattr(_FUSED, "_linear_pointwise", None)
