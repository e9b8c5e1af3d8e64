"""A whole network by emulation, told by its plan where the cells are; imports nothing from cadsurgery.

What the plan says of a node is only where its value is computed: dense, or on the cells after which stage; and at which
size it leaves. What the operations do there is `emulation`'s, or written out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from emulation import Emulation, Feature, Padding, fill_cells, finish
from torch import Tensor, fx, nn

NCHW = "bchw"


class NotFollowed(Exception):
    """An operation on cells, or a network, that is not written out here."""


class Told(NamedTuple):
    """What a plan says of a node.

    Attributes:
        inside: whether it is computed on cells.
        stage: adaptive stages passed by its value.
        grid: fine pixels between the samples of its value in the network as written.
        leaves: size at which its value leaves the region, `fine`, `native` or ""; `resized` for a resize that does so.
        layout: order of its axes if it is a map, else "".
        shape: on the example, whose sizes decide whether a resize gives a map as fine as there are cells, or finer.
    """

    inside: bool
    stage: int
    grid: int
    leaves: str
    layout: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cells(Feature):
    """A feature with the order of its axes, and with padding that the window which reads it takes over."""

    layout: str = NCHW
    pad: tuple[Padding, str, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.data.shape[self.layout.index("h")], self.data.shape[self.layout.index("w")]

    @property
    def order(self) -> list[int]:
        """The axes of its data as batch, channels, height, width."""
        channels = [dim for dim, axis in enumerate(self.layout) if axis == "c"]
        return [self.layout.index("b"), *channels, self.layout.index("h"), self.layout.index("w")]

    @property
    def native(self) -> list[int]:
        """Its shape as the network sees it."""
        return [
            -(-n // self.stride) if a in "hw" else n
            for a, n in zip(self.layout, self.data.shape, strict=True)
        ]

    def with_maps(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of maps (B, C, H, W) applied to the data, in its own axes again."""
        ordered = self.data.permute(self.order)
        done = function(ordered.flatten(1, -3) if ordered.dim() > 4 else ordered)
        done = done.unflatten(1, ordered.shape[1:-2]) if ordered.dim() > 4 else done
        return done.permute([self.order.index(dim) for dim in range(len(self.order))])


@dataclass(frozen=True)
class Indices(Cells):
    """Of a pooling: which tap of its window each value is; the pooling, and (height, width) of the map it read."""

    pooling: Any = None
    samples: tuple[int, int] = (0, 0)

    def numbered(self, grid: int) -> Tensor:
        """As torch numbers them, at the network's own samples."""
        taps, pooling = self.data[:, :, ::grid, ::grid], self.pooling
        places = []
        for axis, number in enumerate((taps // pooling["kernel"][1], taps % pooling["kernel"][1])):
            first = torch.arange(taps.shape[2 + axis]) * pooling["stride"] - pooling["padding"][2 * axis]
            first = first.view(-1, 1) if axis == 0 else first
            places.append((first + pooling["dilation"][axis] * number).clamp(0, self.samples[axis] - 1))
        return places[0] * self.samples[1] + places[1]


@dataclass(frozen=True)
class Flat:
    """A map (B, C, H, W) as (B, C, positions)."""

    map: Cells


# Functions and methods of each value alone, or of channels along an axis the data has as well.
ALONE = {
    *("relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "elu", "hardswish", "hardsigmoid", "sigmoid"),
    *("tanh", "softplus", "mish", "clamp", "clamp_", "exp", "neg", "abs", "square", "sqrt", "pow", "dropout"),
    "stochastic_depth",
    *("softmax", "log_softmax", "chunk", "split", "contiguous", "clone", "glu", "layer_norm", "linear"),
    *("sigmoid_", "batch_norm", "mul_", "add_", "narrow", "clip", "hardtanh", "normalize"),
}
JOINS = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "maximum", "minimum", "add_", "mul_", "sub_"}
JOINS |= {"addcmul", "where", "div", "lerp"}
GLOBAL = {"mean", "sum", "amax", "amin", "norm", "var", "std", "max"}
PADS = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.PixelUnshuffle)


class PlannedEmulator(fx.Interpreter):
    """Runs a network in evaluation mode by emulation.

    Args:
        model: the network.
        emulation: its level map and options.
        told: what the plan says of each node.
        guide: node whose value is the guide of what leaves at the fine size; "" for none.
    """

    def __init__(
        self, model: nn.Module, emulation: Emulation, told: Mapping[str, Told] | None, guide: str = ""
    ) -> None:
        try:
            traced = fx.symbolic_trace(model)
        except (fx.proxy.TraceError, TypeError) as error:
            raise NotFollowed(f"torch.fx alone cannot trace it: {error}") from error
        unknown = [node.name for node in traced.graph.nodes if told is not None and node.name not in told]
        if unknown:
            raise NotFollowed(f"its plan was made of another trace, without {unknown[0]}")
        explicit(traced)
        super().__init__(traced, garbage_collect_values=False)
        self.emulation, self.told, self.guiding = emulation, dict(told or {}), guide
        self.guide: Tensor | None = None
        self.fine: tuple[int, int] | None = None
        self.small: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}  # what was resized, and how

    # -- values in and out ---------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        self.here = self.told[n.name]
        self.source = self.told[n.all_input_nodes[0].name] if n.all_input_nodes else self.here
        value = super().run_node(n)
        if n.name == self.guiding:
            self.guide = value.clone()
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        def fetched(source: fx.Node) -> Any:
            value, told = self.env[source], self.told[source.name]
            if self.here.inside:
                enters = isinstance(value, Tensor) and told.layout
                return self.enter(value, told) if enters else value
            kept = n.target in (getattr, "size", "dim") or self.here.leaves == "resized"
            return value if kept else self.leave(value, told)

        return fx.map_arg(n.args, fetched), fx.map_arg(n.kwargs, fetched)

    def enter(self, dense: Tensor, told: Told) -> Cells:
        if told.grid > 1:
            return self.come_back(dense, told.grid)
        made = Cells(dense, 0, 1, told.layout)
        self.fine = self.fine or made.size
        return made

    def come_back(self, dense: Tensor, spacing: int) -> Cells:
        """A map on the network's own grid that was computed outside: every fine pixel lies between its samples."""
        for axis in (2, 3):
            last = dense.shape[axis] - 1
            place = torch.arange((last + 1) * spacing).to(dense) / spacing
            place = (place.floor() if self.emulation.fill == "nearest" else place).clamp(max=last)
            low = place.floor().long()
            share = (place - low).view(-1, *(1,) * (3 - axis))
            upper = dense.index_select(axis, (low + 1).clamp(max=last))
            dense = (1 - share) * dense.index_select(axis, low) + share * upper
        return Cells(dense, 0, spacing)

    def leave(self, value: Any, told: Told) -> Any:
        """A value outside the region: dense, at its native size or the fine one."""
        if isinstance(value, Indices):
            return value.numbered(told.grid)
        if not isinstance(value, Cells):
            return value
        fine = told.leaves == "fine"

        def read(maps: Tensor) -> Tensor:
            dense = self.emulation.read(Feature(maps, value.stage), self.guide if fine else None)
            return dense if fine else dense[:, :, :: told.grid, :: told.grid]

        return value.with_maps(read)

    def coarse(self, x: Any, stage: int, size: tuple[int, int] | None = None) -> Any:
        """The cells of a later stage that remain, of a map cut to `size`."""
        if not isinstance(x, Cells) or (x.stage == stage and size in (None, x.size)):
            return x
        height, width = size or x.size

        def kept(maps: Tensor) -> Tensor:
            cut = maps[:, :, :height, :width]
            return fill_cells(cut, self.emulation.side(stage, (height, width)))

        return replace(x, data=x.with_maps(kept), stage=stage)

    # -- operations ----------------------------------------------------------------------------------------

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module, x = self.fetch_attr(target), args[0]
        if not isinstance(x, Cells):
            return module(*args, **kwargs)
        if isinstance(module, nn.MaxPool2d) and module.return_indices:
            return self.pooled_with_indices(x, _written(module))
        if isinstance(module, WINDOWS):
            return self.window(x, **_written(module))
        if isinstance(module, nn.ConstantPad2d | nn.ReflectionPad2d | nn.ReplicationPad2d):
            left, right, top, bottom = module.padding
            value = float(getattr(module, "value", 0.0))
            return self.padded(x, (top, bottom, left, right), PADS.get(type(module), "zeros"), value)
        if isinstance(module, nn.PixelShuffle | nn.CircularPad2d):
            raise NotFollowed(f"no emulation of {type(module).__name__}")
        if isinstance(module, nn.ConvTranspose2d):
            names = ("stride", "padding", "output_padding", "groups", "dilation")
            given = {name: getattr(module, name) for name in names}
            size = kwargs.get("output_size") or (args[1] if len(args) > 1 else None)
            if size is not None:
                least = (
                    (n - 1) * s - 2 * p + k
                    for n, s, p, k in zip(
                        x.native[2:], module.stride, module.padding, module.kernel_size, strict=True
                    )
                )
                given["output_padding"] = tuple(
                    want - have for want, have in zip(size[-2:], least, strict=True)
                )
            return self.transposed(x, module.weight, module.bias, **given)
        if isinstance(module, nn.Upsample):
            given = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
            return self.resize(x, **{name: getattr(module, name) for name in given})
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            how = "mean" if isinstance(module, nn.AdaptiveAvgPool2d) else "amax"
            return self.pooled(x, how, module.output_size)
        if isinstance(module, nn.GroupNorm | nn.InstanceNorm2d):
            groups = getattr(module, "num_groups", x.data.shape[1])
            return self.by_groups(x, groups, module.weight, module.bias, module.eps)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            x = self.coarse(x, self.here.stage)
            ones = torch.ones(x.data.shape[1], dtype=x.data.dtype)
            weight, bias = (ones, ones - 1) if module.weight is None else (module.weight, module.bias)
            normed, _, _ = self.emulation.batch_norm(x, weight, bias, module.eps)
            return replace(x, data=normed.data)
        return self.coarse(replace(x, data=module(x.data)), self.here.stage)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.named(target.__name__, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        def method(self_: Any, *rest: Any, **options: Any) -> Any:
            return getattr(self_, target)(*rest, **options)

        return self.named(target, method, args, kwargs)

    def named(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function or method of that name; without cells among its arguments it is torch's own."""
        if isinstance(args[0], Flat):
            assert name in GLOBAL and args[1] in (2, -1)
            return self.over_image(args[0].map, name, (2, 3), bool(kwargs.get("keepdim")))
        found = [value for value in _leaves((args, kwargs)) if isinstance(value, Cells)]
        if not found and name == "interpolate" and (kwargs.get("size") or args[1:2]):
            made = function(*args, **kwargs)
            given = (
                dict(zip(("size", "scale_factor", "mode", "align_corners"), args[1:], strict=False)) | kwargs
            )
            how = {key: given.get(key) for key in ("mode", "align_corners")}
            self.small[id(made)] = (made, args[0], {**how, "mode": how["mode"] or "nearest"})
            return made
        if not found:
            return function(*args, **kwargs)
        x = args[0]
        if name == "getitem" and isinstance(x, tuple | list):
            return x[args[1]]
        if name in ("getattr", "size", "dim"):
            return self.asked(name, x, *args[1:])
        if name == "new_zeros":
            return x.data.new_zeros(*args[1:])
        if name in ("cat", "stack"):
            return self.joined(lambda *parts: function(parts, *args[1:], **kwargs), x, spread=True)
        if name in JOINS and sum(isinstance(v, Tensor | Cells) for v in _leaves(args)) > 1:
            return self.joined(lambda *parts: function(*parts, **kwargs), args)
        if name in JOINS:
            return replace(found[0], data=function(*_data(args), **kwargs))
        if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
            return self.pooled(x, "mean" if "avg" in name else "amax", args[1])
        if name == "conv_transpose2d":
            order = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
            return self.transposed(x, **dict(zip(order, args[1:], strict=False)), **kwargs)
        if name == "max_pool2d_with_indices":
            kept = {key: value for key, value in kwargs.items() if key != "return_indices"}
            return self.pooled_with_indices(x, _called("max_pool2d", args, kept))
        if name in ("conv2d", "max_pool2d", "avg_pool2d", "pixel_unshuffle"):
            return self.window(x, **_called(name, args, kwargs))
        if name == "interpolate":
            given = dict(zip(("size", "scale_factor", "mode", "align_corners"), args[1:], strict=False))
            given = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None} | given
            return self.resize(x, **(given | kwargs))
        if name == "pad":
            pads, mode, value = [*args[1], 0, 0][:4], "constant", 0.0
            mode, value = kwargs.get("mode", mode), kwargs.get("value") or value
            mode = "zeros" if mode == "constant" else mode
            return self.padded(x, (pads[2], pads[3], pads[0], pads[1]), mode, value)
        if name in ("view", "reshape"):
            return self.viewed(x, args[1:])
        if name == "flatten":
            assert args[1:] == (2,) and x.layout == NCHW
            return Flat(x)
        if name == "group_norm":
            given = {"weight": None, "bias": None, "eps": 1e-5, **kwargs}
            return self.by_groups(x, args[1] if len(args) > 1 else given.pop("num_groups"), **given)
        if name == "instance_norm":
            return self.by_groups(x, x.data.shape[1], None, None, 1e-5)
        if name in ("permute", "transpose"):
            dims = list(range(x.data.dim()))
            if name == "permute":
                dims = [d % len(dims) for d in (args[1] if isinstance(args[1], tuple | list) else args[1:])]
            else:
                dims[args[1]], dims[args[2]] = dims[args[2]], dims[args[1]]
            layout = "".join(x.layout[dim] for dim in dims)
            return replace(x, data=x.data.permute(dims), layout=layout)
        if name in GLOBAL:
            return self.reduced(name, function, x, args[1:], kwargs)
        cut = (name == "getitem" and _cuts(x, args[1])) or (name == "narrow" and x.layout[args[1]] in "hw")
        if name not in ALONE | {"getitem"} or cut:
            raise NotFollowed(f"no emulation of {name}")
        made = function(x.data, *args[1:], **kwargs)
        if isinstance(made, tuple):
            return tuple(self.coarse(replace(x, data=part), self.here.stage) for part in made)
        return self.coarse(replace(x, data=made), self.here.stage)

    @staticmethod
    def asked(name: str, x: Cells, *args: Any) -> Any:
        if name == "getattr":
            return {"shape": torch.Size(x.native), "dtype": x.data.dtype, "device": x.data.device}[args[0]]
        if name == "dim":
            return len(x.layout)
        return torch.Size(x.native)[args[0]] if args else torch.Size(x.native)

    def by_groups(self, x: Cells, groups: int, weight: Any, bias: Any, eps: float) -> Cells:
        x = self.coarse(x, self.here.stage)
        return replace(x, data=self.emulation.group_norm(x, groups, weight, bias, eps).data)

    @staticmethod
    def padded(x: Cells, padding: Padding, mode: str, value: float) -> Cells:
        """A map whose padding the window that reads it takes over."""
        if min(padding) < 0 or mode == "circular":
            raise NotFollowed(f"no emulation of padding {padding}, {mode}")
        return replace(x, pad=(padding, mode, value))

    def window(self, x: Cells, kind: str, **given: Any) -> Cells:
        """A window, with the padding of the map it reads."""
        padding, mode, options = (0, 0, 0, 0), "zeros", {}
        own = given.pop("padding", (0, 0, 0, 0))
        own_mode = given.pop("mode", "zeros")
        if x.pad is not None:
            padding, mode, outside = x.pad
            assert not any(own) or (mode == own_mode == "zeros" and outside == 0 and kind == "conv")
            options["outside"] = outside
            if kind == "avg":
                given["count_include_pad"] = True
        else:
            mode = own_mode
        if mode == "circular":
            raise NotFollowed("no emulation of circular padding")
        common = {"stage": self.here.stage, "spacing": x.stride, **given}
        plain = Feature(x.data, x.stage, x.stride)
        if kind == "unshuffle":
            out = self.emulation.unshuffle(plain, common.pop("factor"), **common)
            return Cells(out.data, out.stage, out.stride)
        common |= {"padding": tuple(a + b for a, b in zip(own, padding, strict=True)), "mode": mode}
        method = {"conv": self.emulation.conv, "max": self.emulation.max_pool, "avg": self.emulation.avg_pool}
        out = method[kind](plain, **common, **options)
        return Cells(out.data, out.stage, out.stride)

    def pooled_with_indices(self, x: Cells, given: dict[str, Any]) -> tuple[Cells, Indices]:
        values = self.window(x, **given)
        pooling = {key: given[key] for key in ("kernel", "stride", "dilation", "padding")}
        taps = self.emulation.max_pool_taps(Feature(x.data, x.stage), **pooling, spacing=x.stride)
        height, width = values.size
        taps = fill_cells(taps[:, :, :height, :width], self.emulation.side(self.here.stage, values.size))
        return values, Indices(
            taps, values.stage, values.stride, pooling=pooling, samples=(x.native[2], x.native[3])
        )

    def transposed(self, x: Cells, weight: Tensor, bias: Any = None, **given: Any) -> Cells:
        """A transposed convolution; of stride one by the ordinary one of the kernel turned by half a turn."""
        given = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1} | given
        groups, (stride, _), more = given["groups"], _two(given["stride"]), _two(given["output_padding"])
        (top, left), dilation = _two(given["padding"]), _two(given["dilation"])
        plain = Feature(x.data, x.stage, x.stride)
        if stride > 1:
            out = self.emulation.transposed(
                plain,
                weight,
                bias,
                stage=self.here.stage,
                stride=stride,
                padding=(top, left),
                more=more,
                spacing=x.stride,
                groups=groups,
            )
            return Cells(out.data, out.stage, out.stride)
        turned = torch.cat([part.transpose(0, 1) for part in weight.flip(2, 3).chunk(groups)])
        height, width = (step * (taps - 1) for step, taps in zip(dilation, weight.shape[2:], strict=True))
        padding = (height - top, height - top + more[0], width - left, width - left + more[1])
        return self.window(
            x, "conv", weight=turned, bias=bias, padding=padding, dilation=dilation, groups=groups
        )

    def resize(
        self, x: Cells, size: Any, scale_factor: Any, mode: str, align_corners: Any, **more: Any
    ) -> Cells | Tensor:
        native, factors = x.native[2:], _two(scale_factor)
        samples, scales = _two(size), None
        if size is None:
            samples = tuple(math.floor(n * float(s)) for n, s in zip(native, factors, strict=True))
            if not more.get("recompute_scale_factor"):
                scales = (1 / factors[0], 1 / factors[1])
        plain, common = Feature(x.data, x.stage, x.stride), {"samples": samples, "mode": mode}
        common["align_corners"] = bool(align_corners)
        assert self.fine is not None
        if self.here.leaves == "resized" or round(self.here.shape[2] / self.source.shape[2]) > x.stride:
            return self.emulation.resize_to_dense(
                plain, spacing=x.stride, scales=scales, guide=self.guide, **common
            )
        spacings = (x.stride, self.here.grid)
        out = self.emulation.resize(
            plain, stage=self.here.stage, spacings=spacings, whole=self.fine, **common
        )
        return Cells(out.data, out.stage, out.stride)

    @staticmethod
    def viewed(x: Cells, shape: Any) -> Cells:
        """Channels regrouped; the image keeps its axes."""
        new = list(shape[0] if isinstance(shape[0], tuple | list) else shape)
        first = len(new) - 2 if x.layout.endswith("hw") else 1
        assert new[first : first + 2] == x.native[x.layout.index("h") :][:2], f"{new} moves the image"
        new[first : first + 2] = x.size
        layout = "b" + "c" * (first - 1) + "hw" + "c" * (len(new) - first - 2)
        return replace(x, data=x.data.reshape(new), layout=layout)

    def joined(self, function: Callable[..., Tensor], values: Any, spread: bool = False) -> Cells:
        """A function of the values of each cell, on the smallest size among them."""
        maps = [value for value in values if isinstance(value, Cells)]
        size = (min(value.size[0] for value in maps), min(value.size[1] for value in maps))
        parts = []
        for value in values:
            if isinstance(value, Cells):
                value = self.coarse(value, self.here.stage, size).data
            elif id(value) in self.small and min(self.small[id(value)][1].shape[2:]) > 1:
                resized, small, how = self.small[id(value)]
                samples = tuple(resized.shape[2:])
                value = self.emulation.spread_small(small, maps[0], self.here.stage, size, samples, **how)
            elif isinstance(value, Tensor) and value.dim() == 4 and min(value.shape[2:]) > 1:
                assert torch.allclose(value, value[:, :, :1, :1].expand_as(value)), "not one vector per image"
                value = value[:, :, :1, :1]
            if spread and value.shape[-1] == 1:
                value = value.expand(-1, -1, *size)
            parts.append(value)
        return replace(maps[0], data=function(*parts), stage=self.here.stage)

    def reduced(self, name: str, function: Callable[..., Any], x: Cells, args: Any, kwargs: Any) -> Any:
        """Over the image, or over channels in each cell."""
        names = {"norm": ("p", "dim", "keepdim"), "var": ("dim", "unbiased", "keepdim")}
        names["std"] = names["var"]
        given = dict(zip(names.get(name, ("dim", "keepdim")), args, strict=False)) | kwargs
        dims = given["dim"] if isinstance(given["dim"], tuple | list) else (given["dim"],)
        axes = {x.layout[dim] for dim in dims}
        if axes == {"c"}:
            made = function(x.data, *args, **kwargs)
            layout = x.layout
            if not given.get("keepdim"):
                layout = "".join(
                    a for d, a in enumerate(layout) if d not in {dim % len(layout) for dim in dims}
                )
            if isinstance(made, tuple):
                return tuple(replace(x, data=part, layout=layout) for part in made)
            return self.coarse(replace(x, data=made, layout=layout), self.here.stage)
        assert axes == {"h", "w"}
        less = given.get("correction", int(given.get("unbiased", True)))
        return self.over_image(x, name, dims, bool(given.get("keepdim")), less)

    def pooled(self, x: Cells, how: str, size: Any) -> Tensor:
        """Adaptive pooling: to one sample, or to bins."""
        bins = _two(size)
        if bins == (1, 1):
            return self.over_image(x, how, (2, 3), True)
        return self.emulation.bins(Feature(x.data, x.stage), bins, x.stride, how == "amax")

    def over_image(self, x: Cells, how: str, dims: Any, keepdim: bool, less: int = 1) -> Tensor:
        """Of each image: pixels by their weight; sums and norms as large as on the network's own grid."""
        dims = [dim % x.data.dim() for dim in dims]
        if how in ("amax", "amin"):
            return getattr(x.data, how)(dims, keepdim=keepdim)
        share = self.emulation.weight_of_pixels(Feature(x.data.permute(x.order), x.stage))
        share = share / share.sum((1, 2), keepdim=True)
        shape = [n if axis in "bhw" else 1 for axis, n in zip(x.layout, x.data.shape, strict=True)]
        share = share.to(x.data.dtype).view(shape)
        samples = math.prod(n for axis, n in zip(x.layout, x.native, strict=True) if axis in "hw")
        mean = (x.data * share).sum(dims, keepdim=True)
        if how in ("var", "std"):
            mean = ((x.data - mean).square() * share).sum(dims, keepdim=True) * samples / (samples - less)
            mean = mean.sqrt() if how == "std" else mean
        elif how == "norm":
            mean = ((x.data.square() * share).sum(dims, keepdim=True) * samples).sqrt()
        elif how == "sum":
            mean = mean * samples
        return mean if keepdim else mean.squeeze(dims)


class StridedEmulator(PlannedEmulator):
    """Runs a *strided* network of which no plan says anything.

    The first map with `high` input pixels per sample is the fine map; every strided operation after it is an adaptive
    stage. Features leave as they are, see `finish`.
    """

    def __init__(self, model: nn.Module, emulation: Emulation, high: int, entering: str = "") -> None:
        super().__init__(model, emulation, None)
        self.high, self.entering, self.strides = high, entering, dict[fx.Node, int]()

    def run_node(self, n: fx.Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        stride = _two(module.stride)[0] if isinstance(module, WINDOWS) else 1
        stages = [one.stage for one in map(self.env.get, n.all_input_nodes) if isinstance(one, Cells)]
        self.told[n.name] = Told(True, max(stages, default=0) + (stride > 1), 1, "", "", ())
        value = super().run_node(n)
        before = max((self.strides[one] for one in n.all_input_nodes), default=0)
        self.strides[n] = max(before, 1) * stride
        if not isinstance(value, Cells) and before < self.high == self.strides[n]:
            value = Cells(value, 0, 1)
        if n.name == self.entering:
            assert isinstance(value, Cells) and value.stage == 0
            self.guide = value.data
        return value

    def window(self, x: Cells, kind: str, **given: Any) -> Cells:
        corners = (given.get("kernel"), given.get("padding")) == ((2, 2), (0, 0, 0, 0))
        if kind != "max" or self.emulation.pool != "drop" or given["stride"] == 1 or not corners:
            return super().window(x, kind, **given)
        out = self.emulation.drop_pool(x, stage=self.here.stage, spacing=x.stride)
        return Cells(out.data, out.stage, out.stride)


def emulate(model: nn.Module, image: Tensor, emulation: Emulation, high: int, entering: str = "") -> Any:
    """Output of a strided network for an image batch; features that leave it are read at the fine size, with the value
    of the node `entering`, if one is named, as a guide."""
    emulator = StridedEmulator(model, emulation, high, entering)
    value = emulator.run(image)
    assert emulator.guide is not None or not entering, f"no node {entering}"
    return finish(emulation, value, emulator.guide)


def explicit(traced: fx.GraphModule) -> None:
    """Whoever reads a value after it was changed in place reads what it was changed to."""
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            changes = bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
        else:
            name = str(getattr(node.target, "__name__", node.target))
            changes = name in ("iadd", "isub", "imul") or (name.endswith("_") and not name.endswith("__"))
            changes |= bool(node.kwargs.get("inplace"))
        if changes and node.op != "output":
            for user in list(node.args[0].users):
                if order[user] > order[node]:
                    user.replace_input_with(node.args[0], node)
    traced.recompile()


def _written(module: nn.Module) -> dict[str, Any]:
    """A window's module as `PlannedEmulator.window` takes it."""
    if isinstance(module, nn.PixelUnshuffle):
        return {"kind": "unshuffle", "factor": module.downscale_factor}
    kernel, stride = _two(module.kernel_size), _two(module.stride)
    assert stride[0] == stride[1]
    given: dict[str, Any] = {"stride": stride[0]}
    if isinstance(module, nn.Conv2d):
        dilation = _two(module.dilation)
        reach = [step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True)]
        if module.padding == "same":
            padding = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
        else:
            top, left = (0, 0) if module.padding == "valid" else _two(module.padding)
            padding = (top, top, left, left)
        weights = {"weight": module.weight, "bias": module.bias, "groups": module.groups}
        mode = module.padding_mode
        return {"kind": "conv", "padding": padding, "dilation": dilation, "mode": mode, **weights, **given}
    top, left = _two(module.padding)
    given |= {"padding": (top, top, left, left), "kernel": kernel, "ceil_mode": bool(module.ceil_mode)}
    if isinstance(module, nn.MaxPool2d):
        return {"kind": "max", "dilation": _two(module.dilation), **given}
    counted = {"count_include_pad": module.count_include_pad, "divisor": module.divisor_override}
    return {"kind": "avg", **counted, **given}


def _called(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """A window's function, by the module that does the same."""
    if name == "pixel_unshuffle":
        return {"kind": "unshuffle", "factor": args[1]}
    if name == "conv2d":
        names = ("weight", "bias", "stride", "padding", "dilation", "groups")
        given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given |= dict(zip(names, args[1:], strict=False)) | kwargs
        weight = given["weight"]
        top, left = _two(given["padding"])
        return {
            "kind": "conv",
            "padding": (top, top, left, left),
            "dilation": _two(given["dilation"]),
            "stride": _two(given["stride"])[0],
            **{key: given[key] for key in ("bias", "groups")},
            "weight": weight,
        }
    pool = nn.MaxPool2d if name == "max_pool2d" else nn.AvgPool2d
    return _written(pool(*args[1:], **kwargs))


def _cuts(x: Cells, index: Any) -> bool:
    """Whether an index takes a part of the image."""
    places = index if isinstance(index, tuple | list) else (index,)
    whole = slice(None)
    if Ellipsis in [place for place in places if not isinstance(place, slice)]:
        return True
    axes = iter(x.layout)
    return any(place is not None and next(axes, "h") in "hw" and place != whole for place in places)


def _two(value: Any) -> tuple[Any, Any]:
    return (value[0], value[-1]) if isinstance(value, tuple | list) else (value, value)


def _leaves(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in _leaves(value)]
    return [values]


def _data(values: Any) -> Any:
    return [value.data if isinstance(value, Cells) else value for value in values]
