"""Rules: one function per operation that returns the operation's treatment on elements.

The docstring of a rule is the geometric reason why its treatment is exact. The plan shows its first line unless the
treatment gives another reason. See `surgery/treatment.py` for treatments, docs/extending.md for a worked example.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.axes import (
    NCHW,
    channel_dims,
    image_dims,
    is_flat,
    row_dim,
)
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.sizes import pair_of
from cadsurgery.following.arguments import Arguments
from cadsurgery.following.facts import Facts, MapFacts
from cadsurgery.following.hooks import acts_as
from cadsurgery.following.read import Known
from cadsurgery.following.read import read as follow
from cadsurgery.support.torch_operations import name_of, spellings
from cadsurgery.surgery.channel_rules import concatenation
from cadsurgery.surgery.rule_arguments import (
    arguments_of,
    axes_of,
    options_of,
    pooling_options,
    redirect,
)
from cadsurgery.surgery.treatment import (
    Attribute,
    Call,
    Cause,
    Kind,
    Treatment,
    barrier,
    first_line,
    growing,
    has_rule,
    operation_name,
    rule,
    rule_of,
    ruled_functions,
    treat,
)

# Code that looks up rules imports these names from here, so that all rules of this module are registered.
__all__ = [
    "Attribute",
    "Call",
    "Treatment",
    "barrier",
    "has_rule",
    "read",
    "rule",
    "ruled_functions",
    "treat",
]


def read(model: nn.Module, example: Arguments | None, exactly: bool = False) -> Facts:
    """Return graph and facts of a network; operations with a rule are single nodes. See `following.read`."""
    return follow(model, example, Known(has_rule, ruled_functions), exactly)


# -- convolutions and pooling: windows -----------------------------------------------------------------


@rule(nn.Conv2d)
def convolution(node: fx.Node, facts: MapFacts) -> Treatment:
    """Its taps read the cells at their fine positions, so each element sees the dense receptive field."""
    options = options_of(node, facts)
    return _treat_window(functional.conv2d, _window(options), **_weights(options))


@rule("timm.layers.conv2d_same:Conv2dSame")
def convolution_same(node: fx.Node, facts: MapFacts) -> Treatment:
    """Its taps read the cells at their fine positions, after the padding the map's own size asks for."""
    options = options_of(node, facts)
    return _treat_window(functional.conv2d, _window(options, same=True), **_weights(options))


@rule("timm.layers.cond_conv2d:CondConv2d")
def convolution_per_image(node: fx.Node, facts: MapFacts) -> Treatment:
    """A convolution with a kernel for each image, mixed from experts; its taps are those of any convolution."""
    conv: Any = facts.module(node)
    options = options_of(node, facts)
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    mixed = {"mix": arguments_of(node, "x", "routing_weights")["routing_weights"], **_weights(options)}
    window = _window(options, same=conv.dynamic_padding)
    return _treat_window(functional.conv2d_per_image, window, **mixed, shape=shape)


@rule(F.conv2d, torch.conv2d)
def convolution_function(node: fx.Node, facts: MapFacts) -> Treatment:
    """Its taps read the cells at their fine positions, whatever its weight is computed from."""
    options = arguments_of(node, "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1)
    weight = options["weight"]
    if weight not in facts.shapes or facts.layout(weight):
        return barrier("its weight is not a tensor of known shape")
    window = _window({**options, "kernel_size": tuple(facts.shapes[weight][2:])})
    return _treat_window(functional.conv2d, window, **_weights(options))


@rule(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)
def max_pooling(node: fx.Node, facts: MapFacts) -> Treatment:
    """A maximum over taps at fine positions; what is outside the map is never the largest."""
    options = pooling_options(node, facts)
    if options["return_indices"]:
        if any(user.target is not operator.getitem for user in node.users):
            return barrier("its values and its indices are read as one")
        return _treat_window(functional.max_pool2d_with_indices, _window(options))
    if _covers_image(options, node, facts):
        return _pool_image(functional.global_max, "The maximum over the whole image.", options, node)
    return _treat_window(functional.max_pool2d, _window(options))


@rule(nn.AvgPool2d, F.avg_pool2d)
def average_pooling(node: fx.Node, facts: MapFacts) -> Treatment:
    """A mean over taps at fine positions, divided as torch divides at the border."""
    options = pooling_options(node, facts)
    if _covers_image(options, node, facts):
        return _pool_image(functional.global_mean, "The mean over the image, weighed by area.", options, node)
    kwargs = {"count_include_pad": options["count_include_pad"], "divisor": options["divisor_override"]}
    return _treat_window(functional.avg_pool2d, _window(options), **kwargs)


@rule("timm.layers.pool2d_same:MaxPool2dSame")
def max_pooling_same(node: fx.Node, facts: MapFacts) -> Treatment:
    """A maximum over taps at fine positions, after the padding the map's own size asks for."""
    return _treat_window(functional.max_pool2d, _window(pooling_options(node, facts), same=True))


@rule("timm.layers.pool2d_same:AvgPool2dSame")
def average_pooling_same(node: fx.Node, facts: MapFacts) -> Treatment:
    """A mean over taps at fine positions and the padding the map's own size asks for."""
    return _treat_window(functional.avg_pool2d, _window(pooling_options(node, facts), same=True))


@rule(nn.PixelUnshuffle, F.pixel_unshuffle)
def space_to_depth(node: fx.Node, facts: MapFacts) -> Treatment:
    """The values under a window side by side: taps at fine positions, like a convolution's."""
    factor = options_of(node, facts, "x", "downscale_factor")["downscale_factor"]
    return _treat_window(functional.pixel_unshuffle, _window({"kernel_size": factor, "stride": factor}))


@rule(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, F.pad)
def padding(node: fx.Node, facts: MapFacts) -> Treatment:
    """Padding belongs to the window that reads it, which then reads beyond the border."""
    if node.op == "call_module":
        module: Any = facts.module(node)
        modes = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
        pads = tuple(module.padding)
        mode = next((mode for kind, mode in modes.items() if isinstance(module, kind)), "zeros")
        value = getattr(module, "value", 0.0)
    else:
        options = arguments_of(node, "input", "pad", mode="constant", value=None)
        pads, value = options["pad"], options["value"] or 0.0
        mode = "zeros" if options["mode"] == "constant" else options["mode"]
    layout = facts.layout(node.args[0])
    known = facts.number(pads)
    if not isinstance(known, tuple) or not all(isinstance(pad, int) for pad in known):
        return barrier("how much it pads is not known")
    pads = tuple(pads) if isinstance(pads, list) else pads
    if not any(known) and pads == known:
        return Treatment("pointwise", "Padding by nothing.", rows=Call(None, (node.args[0],)))
    if pads != known and (same := _same_for_readers(node, pads, known, layout, mode, facts)) is not None:
        arguments = (("pads", tuple(pads)), ("reader", same))
        why = "Padding that a stride asks for; it belongs to the window that reads it."
        call = functional.check_same_padding
        outside = same._replace(outside=float(value))
        return Treatment("pad", why, window=outside, call=call, arguments=arguments, spaced=True)
    if pads != known:
        return _pad_below(pads, known, layout, mode, value)
    by_axis = list(zip(pads[::2], pads[1::2], strict=True))
    padded = {axis for axis, pair in zip(layout[::-1], by_axis, strict=False) if any(pair)}
    if padded <= {"c"}:
        return _pad_channels(node, layout, by_axis, mode, value)
    crops = any(pad < 0 for pad in _padding_in_all(node, known, mode, facts))
    if crops and any(pad > 0 for pad in known):
        return barrier(f"it crops the map at one border and pads it at another, by {known}")
    if crops or (not any(pads[::2]) and _makes_sizes_fit(node, facts)):
        return _pad_below(pads, known, layout, mode, value)
    if layout != NCHW or "c" in padded or mode == "circular":
        return barrier("it pads across opposite borders, or channels and image at once")
    (left, right), (top, bottom) = by_axis[0], by_axis[1] if len(by_axis) > 1 else (0, 0)
    window = Window((1, 1), padding=(top, bottom, left, right), mode=mode, outside=float(value))
    return Treatment("pad", window=window)


def _same_for_readers(
    node: fx.Node, pads: Any, known: tuple[int, ...], layout: str, mode: str, facts: MapFacts
) -> Window | None:
    """Return the common window of all readers of a padded map, if the padding is what their stride requires."""
    windows = {_reader_window(user, facts) for user in node.users}
    window = windows.pop() if len(windows) == 1 else None
    if window is None or layout != NCHW or mode != "zeros" or len(known) != 4 or not isinstance(pads, tuple):
        return None
    most = max(step * (taps - 1) for step, taps in zip(window.dilation, window.kernel, strict=True))
    if most > 1 and pads[::2] == (0, 0):  # on one side only, where a stride may ask for some on both
        return None
    source: Any = node.args[0]
    kinds = [window, window._replace(lower=True)]
    left, right = pads[:2]
    if (
        isinstance(left, fx.Node) and left.target is operator.sub and left.args[1] is right
    ):  # of an even amount
        kinds.reverse()
    for one in kinds:
        top, bottom, left, right = one.fit((facts.shapes[source][2], facts.shapes[source][3])).padding
        if known == (left, right, top, bottom) and any(known):
            return one
    return None


def _reader_window(user: fx.Node, facts: MapFacts) -> Window | None:
    """Return the window of an unpadded convolution or pooling, with the padding that its stride requires."""
    known = rule_of(user, facts)
    if known not in (convolution, convolution_function, max_pooling, average_pooling):
        return None
    options = options_of(user, facts, "input", "weight", bias=None, stride=1, padding=0, dilation=1)
    if known is convolution_function:
        options["kernel_size"] = tuple(facts.shapes.get(options["weight"], ())[2:])
    elif user.op != "call_module":
        return None
    if not options["kernel_size"] or options["padding"] == "same" or any(pair_of(options["padding"])):
        return None
    window = _window(options, same=True)
    return window if isinstance(window, Window) else None


def _padding_in_all(node: fx.Node, known: tuple[int, ...], mode: str, facts: MapFacts) -> tuple[int, ...]:
    """Return the widths of a padding together with that of the map that it reads, if both are one padding: a crop of
    what was padded before leaves some of it, and any other crop is no padding of the window that reads it."""
    before = facts.pads.get(node.args[0])  # type: ignore[arg-type]
    if before is None or before.mode != mode or len(known) > 4:
        return known
    top, bottom, left, right = before.padding
    return tuple(a + b for a, b in zip(known, (left, right, top, bottom), strict=False))


def _makes_sizes_fit(node: fx.Node, facts: MapFacts) -> bool:
    """True if the padding only makes the map as large as the maps that it is joined with."""
    joins = [user for user in node.users if rule_of(user, facts) in (arithmetic, concatenation)]
    return len(joins) == len(node.users) and all(
        any(facts.is_map(other) and rule_of(other, facts) is not padding for other in user.all_input_nodes)
        for user in joins
    )


def _pad_below(pads: Any, known: tuple[int, ...], layout: str, mode: str, value: Any) -> Treatment:
    """Treat padding (or cropping) at the lower and right border by amounts that are known only in the call."""
    if layout != NCHW or any(known[4:]) or mode not in ("zeros", "replicate"):
        return barrier(
            "it pads other axes than those of the image, or by more than a constant, as far as sizes ask"
        )
    if any(known[0:4:2]):
        down = next(iter(known[2:3]), 0)
        return barrier(f"it moves the map by {known[0]} samples to the right and {down} down")
    arguments = (
        ("pads", (*pads[:4], 0, 0)[:4] if isinstance(pads, (tuple, list)) else pads),
        ("value", float(value) if mode == "zeros" else None),
    )
    why = "At the lower and right border, where it moves no anchor; how much is known in the call."
    return Treatment("pointwise", why, call=functional.pad, arguments=arguments, spaced=True)


def _pad_channels(
    node: fx.Node, layout: str, by_axis: list[tuple[int, int]], mode: str, value: Any
) -> Treatment:
    pairs = {len(layout) - 1 - i: pair for i, pair in enumerate(by_axis)}
    rows = [pairs.get(dim, (0, 0)) for dim in channel_dims(layout)]
    flat = [size for pair in rows[::-1] for size in pair]
    how = "constant" if mode == "zeros" else mode
    return Treatment("pointwise", rows=Call(F.pad, (node.args[0], flat, how, value)))


@rule("timm.layers.padding:pad_same")
def padding_same(node: fx.Node, facts: MapFacts) -> Treatment:
    """Padding that depends on the map's size; it belongs to the window that reads it."""
    options = arguments_of(node, "x", "kernel_size", "stride", dilation=(1, 1), value=0.0)
    window = _window(options, same=True)
    if isinstance(window, str):
        return barrier(window)
    return Treatment("pad", window=window._replace(outside=float(options["value"])))


# -- the image as a whole ------------------------------------------------------------------------------


@rule(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d)
def adaptive_pooling(node: fx.Node, facts: MapFacts) -> Treatment:
    """The mean over the image, or over the bins it is cut into, each element weighed by its area."""
    module = facts.module(node) if node.op == "call_module" else None
    largest = acts_as(module, nn.AdaptiveMaxPool2d) or node.target is F.adaptive_max_pool2d
    why = "The maximum over the image, or over the bins it is cut into." if largest else ""
    options = options_of(node, facts, "x", "output_size", return_indices=False)
    size = pair_of(options["output_size"])
    if size == (1, 1):
        return Treatment("global", why, functional.global_max if largest else functional.global_mean)
    if not all(isinstance(bins, int) for bins in size):
        return barrier("how many bins it has follows from the size of the map")
    if options["return_indices"] or facts.layout(node.args[0]) != NCHW:
        return barrier("its indices, or its axes, are those of a dense map")
    arguments = (("size", size), ("largest", largest))
    return Treatment("global", why, functional.pool_to_bins, arguments, spaced=True)


@rule(torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.amin, "amin")
@rule(torch.var, "var", torch.std, "std", torch.norm, "norm", torch.linalg.vector_norm, torch.linalg.norm)
def reduction(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over the image: means weighed by area, sums scaled to the network's own grid. Over channels: row by row."""
    how = operation_name(node, facts).removeprefix("Tensor.").removeprefix("linalg_").removeprefix("vector_")
    names = {"norm": ("x", "p", "dim", "keepdim"), "var": ("x", "dim", "unbiased", "keepdim")}
    names["std"] = names["var"]
    stated = arguments_of(node, *names.get(how, ("x", "dim", "keepdim")))
    options = {"p": 2, "ord": 2, "dim": None, "keepdim": False, "correction": 1, **stated}
    if isinstance(options["dim"], bool):  # var(x, unbiased), over everything
        return barrier(f"a {how} over the whole batch")
    if "unbiased" in options:
        options["correction"] = int(bool(options["unbiased"]))
    layout = facts.layout(node.args[0])
    dims = axes_of(options["dim"], layout)
    is_euclidean = options["p"] in (2, "fro") and options["ord"] in (2, "fro", None)
    spectral = (
        node.target is torch.linalg.norm
        and len(dims or ()) == 2
        and 2 in (stated.get("p"), stated.get("ord"))
    )
    if dims is None or spectral or (how == "norm" and not is_euclidean):
        return barrier(f"a {how} over {options['dim']} that no lattice has")
    over_image = set(dims) & set(image_dims(layout))
    if not over_image:
        return _over_channels(node, facts, dims, bool(options["keepdim"]))
    if over_image != set(image_dims(layout)) or layout.index("b") in dims:
        return barrier(f"{how} over {options['dim']} joins some positions of the image and not others")
    arguments = {"how": how, "dims": dims, "keepdim": bool(options["keepdim"])}
    arguments["correction"] = options["correction"]
    return Treatment("global", call=functional.global_reduce, arguments=tuple(arguments.items()), spaced=True)


@rule(nn.GroupNorm, F.group_norm)
def group_norm(node: fx.Node, facts: MapFacts) -> Treatment:
    """Mean and variance of each image and group, over elements weighed by area; then affine."""
    options = options_of(node, facts, "input", "num_groups", weight=None, bias=None, eps=1e-5)
    return _pointwise_by(functional.group_norm, **_affine(options), groups=options["num_groups"])


@rule(nn.InstanceNorm2d, F.instance_norm)
def instance_norm(node: fx.Node, facts: MapFacts) -> Treatment:
    """Mean and variance of each image and channel, over elements weighed by area; then affine."""
    usual: dict[str, Any] = {"running_mean": None, "running_var": None, "weight": None, "bias": None}
    options = options_of(node, facts, "input", **usual, use_input_stats=True, momentum=0.1, eps=1e-5)
    of_call = options["use_input_stats"] and options["running_mean"] is None
    if options.get("track_running_stats") or not of_call:
        return barrier("it has running statistics of single images")
    return _pointwise_by(functional.group_norm, **_affine(options), groups=facts.shapes[node][1])


@rule("timm.layers.evo_norm:group_std")
def group_deviation(node: fx.Node, facts: MapFacts) -> Treatment:
    """The standard deviation of each image and group, over elements weighed by area, on every element."""
    options = arguments_of(node, "x", groups=32, eps=1e-5, flatten=False)
    return _pointwise_by(functional.group_deviation, groups=options["groups"], eps=options["eps"])


# -- normalisation and dropout -------------------------------------------------------------------------


@rule(nn.BatchNorm2d, nn.SyncBatchNorm)
def batch_norm(node: fx.Node, facts: MapFacts) -> Treatment:
    """An affine map per channel; in training, statistics over the elements, weighed by their area."""
    norm: Any = facts.module(node)
    of_batch = norm.running_mean is None or norm.running_var is None
    call = functional.norm_of_batch if of_batch else functional.batch_norm
    return _pointwise_by(call, norm=Attribute(str(node.target)))


@rule("timm.layers.norm_act:BatchNormAct2d")
def batch_norm_act(node: fx.Node, facts: MapFacts) -> Treatment:
    """Batch normalisation followed by its own pointwise activation."""
    return replace(batch_norm(node, facts), then=(f"{node.target}.drop", f"{node.target}.act"))


@rule(F.batch_norm)
def batch_norm_function(node: fx.Node, facts: MapFacts) -> Treatment:
    """An affine map per channel with fixed statistics."""
    options = arguments_of(node, "input", "mean", "var", weight=None, bias=None, training=False)
    if options["training"] or facts.layout(node.args[0])[1] != "c":
        return barrier("it takes its statistics from a dense batch")
    return Treatment("pointwise")


@rule(nn.LayerNorm, F.layer_norm, nn.RMSNorm, F.rms_norm)
def layer_norm(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over the channels of each element, which are the columns of its row."""
    shape = options_of(node, facts, "input", "normalized_shape")["normalized_shape"]
    axes = facts.layout(node.args[0])[-len(shape) :]
    if set(axes) != {"c"}:
        return barrier("it normalises over positions of the image")
    return Treatment("pointwise")


@rule(nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout, "timm.layers.drop:DropPath")
@rule("torchvision.ops.stochastic_depth:StochasticDepth")
def dropout_per_image(node: fx.Node, facts: MapFacts) -> Treatment:
    """Scales whole channels or whole images, wherever their elements are."""
    of_channels = (nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
    axes = NCHW if isinstance(facts.module(node), of_channels) else ""
    treatment = _pointwise_by(functional.drop_per_image, dropout=Attribute(str(node.target)))
    return replace(treatment, axes=axes)


@rule(F.dropout2d, F.dropout3d, F.feature_alpha_dropout)
def dropout_function(node: fx.Node, facts: MapFacts) -> Treatment:
    """Changes whole channels or whole images, wherever their elements are."""
    default = node.target is not F.feature_alpha_dropout  # its `training` defaults to False
    options = arguments_of(node, "input", p=0.5, training=default)
    own = {name: options[name] for name in ("p", "training")}
    return _pointwise_by(functional.drop_channels, how=operation_name(node, facts), **own)


# -- each element alone --------------------------------------------------------------------------------


@rule(*spellings("value", "copies", "drops"))
def pointwise(node: fx.Node, facts: MapFacts) -> Treatment:
    """Acts on each value alone, so it is valid on any lattice."""
    tensors = [source for source in node.all_input_nodes if facts.shapes.get(source)]
    # The weight of prelu is one number per channel, of rows and of maps alike.
    is_prelu = operation_name(node, facts) == "prelu"
    alone = is_prelu or node.op == "call_module" or tensors == [node.args[0]]
    return Treatment("pointwise") if alone else arithmetic(node, facts)


@rule(*spellings("converts"))
def conversion(node: fx.Node, facts: MapFacts) -> Treatment:
    """Another type or device for each value."""
    if not facts.layout(node.args[0]):
        return Treatment("shape")
    maps = [source for source in node.all_input_nodes if facts.layout(source)]
    return Treatment("pointwise" if len(maps) == 1 else "join")


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
def like_a_map(node: fx.Node, facts: MapFacts) -> Treatment:
    """Takes the type and device of a map, and none of its values."""
    return Treatment("shape")


_ORDERS = ("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal")


@rule(*spellings("values"))
def arithmetic(node: fx.Node, facts: MapFacts) -> Treatment:
    """Combines the values of one cell; operands of an earlier stage are subsampled first."""
    if name_of(node.target) == "where" and len(node.args) + len(node.kwargs) == 1:
        return barrier("it returns the places of values, whose number depends on the image")
    maps = [source for source in node.all_input_nodes if facts.layout(source) and source in facts.floating]
    is_choice = name_of(node.target) in ("eq", "ne", "not_equal", "isclose")
    compares = is_choice or name_of(node.target) in _ORDERS
    if len(maps) > 1 and (is_choice or (compares and any(_is_largest(source, facts) for source in maps))):
        return barrier(
            "it asks which values are equal, and between interpolated values rounding decides that"
        )
    return Treatment("join", first_line(arithmetic))


def _is_largest(node: fx.Node, facts: MapFacts) -> bool:
    """True if a map is a max pooling at the grid of what it reads: each of its values equals one of that map's."""
    known, source = rule_of(node, facts), node.all_input_nodes[:1]
    is_pooled = known in (max_pooling, max_pooling_same) and bool(source)
    return is_pooled and facts.images.get(node) == facts.images.get(source[0])


@rule(nn.Linear, F.linear)
def linear(node: fx.Node, facts: MapFacts) -> Treatment:
    """A matrix on the channels of each element."""
    if facts.layout(node.args[0])[-1] != "c":
        return barrier("it mixes the positions of the image", Cause.POSITIONS)
    return Treatment("pointwise")


# -- another resolution --------------------------------------------------------------------------------


@rule(F.interpolate, F.upsample, nn.Upsample, of_vectors=True)
@rule(nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, of_vectors=True)
def resizing(node: fx.Node, facts: MapFacts) -> Treatment:
    """Between coarse cells it reads as torch does; what was never downsampled is taken over."""
    source: Any = node.args[0] if node.args else node.kwargs["input"]
    usual: dict[str, Any] = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    usual |= {"recompute_scale_factor": None, "antialias": False}
    options = options_of(node, facts, "x", **usual)
    if not facts.layout(source):
        return _resize_small(node, facts, source, options)
    if options["mode"] not in ("nearest", "nearest-exact", "bilinear") or options["antialias"]:
        return barrier(f"its mode {options['mode']!r} reads more than the neighbours")
    if (stride := _whole_division(options)) is not None and not options["align_corners"]:
        return _subsampling(options["mode"], stride)
    arguments = tuple(
        (name, options[name]) for name in usual if name != "antialias" and options[name] is not None
    )
    scale = _scale(facts.shapes[source][2:], facts.shapes[node][2:])
    last_only = "" if scale else "it resizes the map by no whole factor"
    if options["mode"] == "nearest-exact":
        last_only = "its mode 'nearest-exact' reads another cell than the one a sample lies in"
    return Treatment(
        "resize", call=functional.resize, arguments=arguments, scale=scale or 1, last_only=last_only
    )


def _whole_division(options: dict[str, Any]) -> int | None:
    """Return how many times coarser the result of a resize is, if its factor is 1 / n; else None."""
    factor, other = pair_of(options["scale_factor"])
    fits = isinstance(factor, float) and factor == other and 0 < factor < 1 and (1 / factor).is_integer()
    return (
        round(1 / factor)
        if fits and options["size"] is None and not options["recompute_scale_factor"]
        else None
    )


def _subsampling(mode: str, stride: int) -> Treatment:
    """Treat a resize to a coarser grid as a strided window: a single sample (nearest) or a mean of four (bilinear)."""
    if mode == "nearest":
        rest = 1 - stride  # an incomplete window at the lower and right border gives no sample
        window: Any = Window((1, 1), stride, padding=(0, rest, 0, rest))
        why = "It takes every so many-th sample, as a stride does."
    elif mode == "bilinear" and stride == 2:
        window, why = (
            _window({"kernel_size": 2, "stride": 2}),
            "Half way between two samples in both axes: the mean of four.",
        )
    else:
        return barrier(f"it resizes the map to a {stride}-th in mode {mode!r}")
    treatment = _treat_window(functional.max_pool2d if mode == "nearest" else functional.avg_pool2d, window)
    return replace(treatment, why=why)


@rule(nn.PixelShuffle, F.pixel_shuffle)
def depth_to_space(node: fx.Node, facts: MapFacts) -> Treatment:
    """An element takes the channels of its phase on the output's own grid."""
    factor = options_of(node, facts, "x", "upscale_factor")["upscale_factor"]
    return Treatment("resize", call=functional.pixel_shuffle, scale=factor)


@rule(nn.MaxUnpool2d, F.max_unpool2d)
def max_unpooling(node: fx.Node, facts: MapFacts) -> Treatment:
    """It runs dense: on elements whole networks took up to three times as long."""
    return barrier("it puts values at places of a dense map")


@rule(nn.ConvTranspose2d, F.conv_transpose2d, torch.conv_transpose2d)
def transposed_convolution(node: fx.Node, facts: MapFacts) -> Treatment:
    """An element reads the taps of its own phase on the output's own grid, at their fine positions."""
    usual = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    options = options_of(node, facts, "input", "weight", **usual)
    if node.op == "call_module":
        kernel, size = options["kernel_size"], arguments_of(node, "input", output_size=None)["output_size"]
    elif options["weight"] not in facts.shapes or facts.layout(options["weight"]):
        return barrier("its weight is not a tensor of known shape")
    else:
        kernel, size = tuple(facts.shapes[options["weight"]][2:]), None
    window = _transposed_window(
        kernel, *(options[name] for name in ("stride", "padding", "output_padding", "dilation"))
    )
    if isinstance(window, str):
        return barrier(window)
    groups, ordinary = options["groups"], window.finer == 1
    arguments = {
        "weight": Call(functional.transpose_weight, (options["weight"], groups, ordinary)),
        "bias": options["bias"],
        "groups": groups,
    }
    if ordinary:
        return _treat_window(functional.conv2d, window, **arguments)
    if size is not None:
        arguments["size"] = size
    items, scale = tuple(arguments.items()), window.finer
    grows = any(taps - sum(cut) > scale for taps, cut in zip(kernel, _cuts(window), strict=True))
    why = (
        f"it gives more than {scale} samples for each that it reads, which makes the map grow"
        if grows
        else ""
    )
    kind: Kind = "barrier" if grows else "resize"
    return Treatment(kind, why, functional.conv2d, items, window, scale=1 if grows else scale)


def _cuts(window: Window) -> tuple[tuple[int, ...], ...]:
    """Return what a transposed convolution crops of its result, for each axis."""
    return window.padding[:2], window.padding[2:]


def _transposed_window(kernel: Any, stride: Any, padding: Any, more: Any, dilation: Any) -> Window | str:
    """Return the window of a transposed convolution, an ordinary one for stride 1, or the reason why there is none."""
    kernel, padding, more, dilation = pair_of(kernel), pair_of(padding), pair_of(more), pair_of(dilation)
    if not all(isinstance(value, int) for value in (*kernel, *pair_of(stride), *padding, *more, *dilation)):
        return "its window is computed while the network runs"
    (stride, other), by_axis = pair_of(stride), list(zip(kernel, padding, more, dilation, strict=True))
    if stride != other:
        return f"stride {(stride, other)} differs between the axes"
    if stride == 1:
        pads = [(step * (taps - 1) - cut, extra) for taps, cut, extra, step in by_axis]
        (top, below), (left, beside) = pads
        window = Window(kernel, 1, dilation, (top, top + below, left, left + beside))
        return growing(window) or window
    if dilation != (1, 1):
        return "a transposed convolution with stride and dilation leaves positions without taps"
    if min(kernel) < stride:
        return "its kernel is smaller than its stride, so that positions are left without taps"
    (top, below), (left, beside) = ((cut, cut - extra) for _, cut, extra, _ in by_axis)
    return Window(kernel, padding=(top, below, left, beside), finer=stride)


@rule("expand", of_vectors=True)
def broadcast(node: fx.Node, facts: MapFacts) -> Treatment:
    """One vector per image repeated over a map is the same vector for every element."""
    return _broadcast(node, facts, node.args[0])


def _resize_small(node: fx.Node, facts: MapFacts, source: Any, options: dict[str, Any]) -> Treatment:
    """Treat the resize of a value outside the region: one vector per image, or a small map that elements read from."""
    is_small = facts.is_map(node) and source in facts.shapes and options["size"] is not None
    plain = options["mode"] in ("nearest", "bilinear") and not options["antialias"]
    if is_flat(facts.shapes.get(source, ()), NCHW) or not (is_small and plain):
        return _broadcast(node, facts, source)
    arguments = tuple((name, options[name]) for name in ("size", "mode", "align_corners"))
    return Treatment(
        "broadcast", "every element reads it at its place, as torch resizes", arguments=arguments
    )


def _broadcast(node: fx.Node, facts: MapFacts, source: Any) -> Treatment:
    shape = tuple(facts.shapes.get(source, ()))
    if not facts.layout(source) and is_flat(shape, NCHW) and facts.is_map(node):
        return Treatment("broadcast", first_line(broadcast))
    if facts.layout(source) and facts.shapes[source] == facts.shapes[node]:
        return Treatment("pointwise", first_line(broadcast), rows=Call(None, (source,)))
    new = tuple(facts.shapes[node])
    if facts.layout(source) == NCHW and shape[1] == 1 and new == (shape[0], new[1], *shape[2:]):
        why = "the same value in every channel of an element"
        return Treatment("pointwise", why, rows=Call("repeat", (source, 1, new[1])))
    return barrier(f"{operation_name(node, facts)} changes the resolution")


# -- sizes, products and attention ---------------------------------------------------------------------


# Attributes of a map that elements have, or know of the network's own map.
_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "layout", "itemsize")


@rule("size", "dim", getattr, "numel", "nelement", "ndimension", "element_size")
def shape(node: fx.Node, facts: MapFacts) -> Treatment:
    """Asks for the size of the map, which is the one the network itself would see."""
    if node.target is getattr and node.args[1] == "data":
        why = "The values without their history, which each element has for itself."
        return Treatment("pointwise", why, rows=Call(getattr, (node.args[0], "data")))
    if node.target is getattr and node.args[1] not in _ATTRIBUTES:
        return barrier(f"reads the attribute {node.args[1]!r} of a map")
    return Treatment("shape")


@rule(torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm", "__matmul__")
def matrix_product(node: fx.Node, facts: MapFacts) -> Treatment:
    """A sum over positions weighs them by area; a matrix per image acts on the channels of each element."""
    first: Any = node.args[0]
    second: Any = node.args[1]
    left, right = facts.layout(first), facts.layout(second)
    if left and right:
        sums = left[-1] == "p" and right[-2:] == "pc" and left[-2] == "c" and left[:-2] == right[:-2]
        if sums and left[0] == "b":
            arguments = (("other", second), ("name", node.name))
            return Treatment("global", call=functional.sum_of_products, arguments=arguments, spaced=True)
        return barrier("attention mixes all positions of the map")
    matrix, layout = (second, left) if left else (first, right)
    shape = facts.shapes.get(matrix, ())
    inner = layout[:-1] if left else layout[:-2] + layout[-1]
    acts = layout[-1 if left else -2] == "c" and layout[0] == "b"
    if not acts or len(shape) > len(layout) or (len(shape) > 2 and not set(inner[1:-1]) <= {"c"}):
        return barrier("it mixes the positions of the image", Cause.POSITIONS)
    call = (("matrix", matrix), ("transposed", not left))
    reads = first if left else second
    return Treatment("pointwise", call=functional.matrix_on_rows, arguments=call, axes="", reads=reads)


@rule(F.scaled_dot_product_attention, nn.MultiheadAttention, torch.baddbmm, "baddbmm")
def attention(node: fx.Node, facts: MapFacts) -> Treatment:
    """Every position looks at every other, so all would need one resolution."""
    return barrier("attention mixes all positions of the map")


# -- helpers -------------------------------------------------------------------------------------------


def _weights(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a convolution besides its window."""
    return {name: options[name] for name in ("weight", "bias", "groups")}


def _scale(before: Sequence[int], after: Sequence[int]) -> int:
    """Return how many times finer a map of size `after` is than one of size `before`; 0 if it is coarser.

    Sizes are rounded at every stride, so several factors may fit; powers of two are preferred. A map that is one sample
    larger or smaller has the same grid, stretched.
    """
    near = range(1, 2 * max(a // max(b, 1) for b, a in zip(before, after, strict=True)) + 2)
    fitting = [s for s in near if all(abs(a - b * s) < s for b, a in zip(before, after, strict=True))]
    exact = [s for s in fitting if all(a == b * s for b, a in zip(before, after, strict=True))]
    powers = [s for s in fitting if s & (s - 1) == 0]
    stretched = min(before) > 2 and all(abs(a - b) <= 1 for b, a in zip(before, after, strict=True))
    return next(iter(exact or powers or fitting), int(stretched))


def _over_channels(node: fx.Node, facts: MapFacts, dims: tuple[int, ...], keepdim: bool) -> Treatment:
    """Treat a reduction over channel axes only, row by row."""
    layout = facts.layout(node.args[0])
    if any(layout[dim] != "c" for dim in dims):
        return barrier("it joins the images of the batch")
    index = 2 if "norm" in operation_name(node, facts) else 1
    call = redirect(node, index, tuple(row_dim(layout, dim) for dim in dims))
    after = layout if keepdim else "".join(axis for dim, axis in enumerate(layout) if dim not in dims)
    return Treatment("pointwise", rows=call, layout=after)


def _window(options: dict[str, Any], same: bool = False) -> Window | str:
    """Return the window of a convolution or pooling, or the reason why there is none; with `same` its padding depends
    on the map's size."""
    kernel, stride = pair_of(options["kernel_size"]), pair_of(options["stride"])
    dilation, padding = pair_of(options.get("dilation", 1)), 0 if same else options.get("padding", 0)
    mode = "zeros" if same else options.get("padding_mode", "zeros")
    if not all(isinstance(value, int) for value in (*kernel, *stride, *dilation)):
        return "its window is computed while the network runs"
    if stride[0] != stride[1]:
        return f"stride {stride} differs between the axes"
    if mode == "circular":
        return "circular padding joins opposite borders"
    total_y, total_x = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
    if padding == "same":
        pads = (total_y // 2, total_y - total_y // 2, total_x // 2, total_x - total_x // 2)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else pair_of(padding)
        pads = (vertical, vertical, horizontal, horizontal)
    ceil_mode = not same and options.get("ceil_mode", False)
    window = Window(kernel, stride[0], dilation, pads, mode, ceil_mode, same=same)
    return growing(window) or window


def _affine(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a norm that do not choose what its statistics are over."""
    return {name: options[name] for name in ("weight", "bias", "eps")}


def _pointwise_by(call: Callable[..., Any], **arguments: Any) -> Treatment:
    """Treat an operation that a function on elements does to each element."""
    return Treatment("pointwise", call=call, arguments=tuple(arguments.items()))


def _treat_window(call: Callable[..., Any], window: Window | str, **arguments: Any) -> Treatment:
    if isinstance(window, str):
        return barrier(window)
    return Treatment("window", call=call, arguments=tuple(arguments.items()), window=window)


def _pool_image(call: Callable[..., Any], why: str, options: dict[str, Any], node: fx.Node) -> Treatment:
    """Treat a pooling over the whole image; its window is checked in every call unless it is computed from the map."""
    covers = _unless_own_size(options["kernel_size"], node)
    return Treatment("global", why, call=call, covers=covers, or_more=options["ceil_mode"])


def _covers_image(options: dict[str, Any], node: fx.Node, facts: MapFacts) -> bool:
    """True if a pooling window is computed from the map's size and covers the whole map, or if it is larger than the
    map and reads what there is of it."""
    kernel, layout = options["kernel_size"], facts.layout(node.args[0])
    if layout != NCHW or any(pair_of(options["padding"])) or options["divisor_override"] is not None:
        return False
    lengths, sides = pair_of(facts.number(kernel)), tuple(facts.shapes[node.args[0]][2:])  # type: ignore[index]
    if lengths == sides:
        return pair_of(kernel) != lengths
    is_apart = pair_of(options["stride"]) in (lengths, pair_of(kernel))
    return options["ceil_mode"] and is_apart and all(map(operator.gt, lengths, sides))


def _unless_own_size(kernel: Any, node: fx.Node) -> Any:
    """Return the kernel size of a pooling, or None if it is computed as the size of the map that it reads."""
    if isinstance(kernel, fx.Node) and kernel.target is operator.getitem:
        whole, part = kernel.args
        is_own = part in (slice(2, None), slice(-2, None)) and _is_size_of(whole, node.args[0])
    else:
        axes = kernel if isinstance(kernel, (tuple, list)) else ()
        is_own = len(axes) == 2 and all(_is_length_of(node.args[0], *pair) for pair in enumerate(axes, 2))
    return None if is_own else kernel


def _is_size_of(value: Any, source: Any) -> bool:
    """True if a node is the size of a map."""
    asks = isinstance(value, fx.Node) and (
        (value.target == "size" and len(value.args) == 1) or value.args[1:] == ("shape",)
    )
    return asks and value.args[0] is source


def _is_length_of(source: Any, axis: int, value: Any) -> bool:
    """True if a node is the length of an axis of a map (B, C, H, W)."""
    while isinstance(value, fx.Node) and value.target is int:
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.args[1:] not in ((axis,), (axis - 4,)):
        return False
    by_call = value.op == "call_method" and value.target == "size" and value.args[0] is source
    return by_call or (value.target is operator.getitem and _is_size_of(value.args[0], source))
