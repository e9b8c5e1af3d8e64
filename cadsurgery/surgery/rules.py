"""Rules: one function per operation that says what the operation is geometrically.

A rule only decides. It returns a `Treatment`; an operation without a rule, or one a rule does not
understand, is a `barrier` with its reason. The docstring of a rule is the geometric reason why its
treatment is exact. Teach a new operation with `@rule(YourModule)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from cadsurgery.kernel_map import Window
from cadsurgery.surgery.facts import Facts

Kind = Literal["window", "pointwise", "join", "global", "broadcast", "shape", "barrier"]


class Attribute(NamedTuple):
    """A parameter, buffer or module of the network, by qualified name."""

    path: str


@dataclass(frozen=True)
class Treatment:
    """How an operation acts on a lattice.

    Attributes:
        kind: `window` (reads taps around an element), `pointwise` (acts on each element alone), `join`
            (combines elements of one lattice), `global` (one vector per image), `broadcast` (repeats such
            a vector over the map), `shape` (asks for the size), or `barrier`.
        why: the reason, for the plan.
        call: function of `cadsurgery.functional` for windows, globals and norms.
        arguments: its keyword arguments: constants, nodes or `Attribute`s.
        window: kernel, stride, dilation and padding, for windows.
        then: modules applied to the rows afterwards.
    """

    kind: Kind
    why: str = ""
    call: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    window: Window | None = None
    then: tuple[str, ...] = ()


Rule = Callable[[fx.Node, Facts], Treatment]
_RULES: dict[object, Rule] = {}


def rule(*operations: object) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, method names, or `"package.module:Class"` strings.

    Raises:
        ValueError: an operation has a rule already.
    """

    def register(function: Rule) -> Rule:
        for operation in dict.fromkeys(operations):  # torch and functional share some objects
            if operation in _RULES:
                raise ValueError(f"{operation} already has the rule {_RULES[operation].__name__}")
            _RULES[operation] = function
        return function

    return register


def barrier(why: str) -> Treatment:
    """The operation runs dense, and so does what follows from it."""
    return Treatment("barrier", why)


def has_rule(module: nn.Module) -> bool:
    """Whether a module is an operation of its own, rather than made of others."""
    return any(key in _RULES for key in _module_keys(module))


def treat(node: fx.Node, facts: Facts) -> Treatment:
    """The treatment of one node by its rule."""
    found = next((_RULES[key] for key in _operation_keys(node, facts) if key in _RULES), None)
    return found(node, facts) if found else barrier(f"no rule for {operation_name(node, facts)}")


def operation_name(node: fx.Node, facts: Facts) -> str:
    """The name of a node's operation as a user would write it."""
    if node.op == "call_module":
        return type(facts.module(node)).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else node.op


def _operation_keys(node: fx.Node, facts: Facts) -> tuple[object, ...]:
    """What a rule for this node may be registered under. Subclasses do not inherit rules: they may differ."""
    return _module_keys(facts.module(node)) if node.op == "call_module" else (node.target,)


def _module_keys(module: nn.Module) -> tuple[object, ...]:
    kind = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    return (kind, f"{kind.__module__}:{kind.__name__}")


def _arguments(node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
    """Positional and keyword arguments by name."""
    return {**defaults, **dict(zip((*names, *defaults), node.args, strict=False)), **node.kwargs}


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return (values[0], values[-1])


def _window(
    kernel: Any, stride: Any, padding: Any, dilation: Any, mode: str = "zeros", ceil_mode: bool = False
) -> Window | str:
    """The window, or why there is none."""
    kernel, stride, dilation = _pair(kernel), _pair(stride), _pair(dilation)
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
        vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
        pads = (vertical, vertical, horizontal, horizontal)
    partial = stride[0] - 1 if ceil_mode else 0
    if pads[0] + pads[1] + partial > total_y or pads[2] + pads[3] + partial > total_x:
        return f"its padding {pads} makes the map grow"
    return Window(kernel, stride[0], dilation, pads, mode, ceil_mode)


def _windowed(call: str, why: str, window: Window | str, **arguments: Any) -> Treatment:
    if isinstance(window, str):
        return barrier(window)
    return Treatment("window", why, call, tuple(arguments.items()), window)


@rule(nn.Conv2d)
def convolution(node: fx.Node, facts: Facts) -> Treatment:
    """Its taps read the cells at their fine positions, so each element sees the dense receptive field."""
    conv: Any = facts.module(node)
    window = _window(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    weight = Attribute(f"{node.target}.weight")
    bias = Attribute(f"{node.target}.bias") if conv.bias is not None else None
    return _windowed("conv2d", _why(convolution), window, weight=weight, bias=bias, groups=conv.groups)


@rule(F.conv2d, torch.conv2d)
def convolution_function(node: fx.Node, facts: Facts) -> Treatment:
    """Its taps read the cells at their fine positions, so each element sees the dense receptive field."""
    given = _arguments(node, "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1)
    shape = facts.shapes.get(given["weight"])
    if shape is None:
        return barrier("its weight is not a tensor of known shape")
    window = _window(tuple(shape[2:]), given["stride"], given["padding"], given["dilation"])
    kept = {name: given[name] for name in ("weight", "bias", "groups")}
    return _windowed("conv2d", _why(convolution_function), window, **kept)


@rule(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
def max_pooling(node: fx.Node, facts: Facts) -> Treatment:
    """A maximum over taps at fine positions; what is outside the map is never the largest."""
    given = _pooling(node, facts)
    if given.get("return_indices"):
        return barrier("its indices refer to a dense map")
    window = _window(
        given["kernel_size"],
        given["stride"],
        given["padding"],
        given["dilation"],
        "zeros",
        given["ceil_mode"],
    )
    return _windowed("max_pool2d", _why(max_pooling), window)


@rule(nn.AvgPool2d, F.avg_pool2d)
def average_pooling(node: fx.Node, facts: Facts) -> Treatment:
    """A mean over taps at fine positions, divided as torch divides at the border."""
    given = _pooling(node, facts)
    window = _window(given["kernel_size"], given["stride"], given["padding"], 1, "zeros", given["ceil_mode"])
    kept = {"count_include_pad": given["count_include_pad"], "divisor": given["divisor_override"]}
    return _windowed("avg_pool2d", _why(average_pooling), window, **kept)


def _pooling(node: fx.Node, facts: Facts) -> dict[str, Any]:
    defaults: dict[str, Any] = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    defaults |= {"count_include_pad": True, "divisor_override": None}
    if node.op == "call_module":
        given = {**defaults, **vars(facts.module(node))}
    elif node.target is F.avg_pool2d:
        names = (
            "input",
            "kernel_size",
            "stride",
            "padding",
            "ceil_mode",
            "count_include_pad",
            "divisor_override",
        )
        given = {**defaults, "stride": None, **_arguments(node, *names)}
    else:
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {**defaults, "stride": None, **_arguments(node, *names)}
    given["stride"] = given["kernel_size"] if given["stride"] in (None, []) else given["stride"]
    return given


@rule(nn.BatchNorm2d)
def batch_norm(node: fx.Node, facts: Facts) -> Treatment:
    """An affine map per channel; in training, statistics over the elements, weighed by their area."""
    return Treatment("pointwise", _why(batch_norm), "batch_norm", (("norm", Attribute(str(node.target))),))


@rule("timm.layers.norm_act:BatchNormAct2d")
def batch_norm_act(node: fx.Node, facts: Facts) -> Treatment:
    """Batch normalisation followed by its own pointwise activation."""
    parts = tuple(f"{node.target}.{name}" for name in ("drop", "act"))
    arguments = (("norm", Attribute(str(node.target))),)
    return Treatment("pointwise", _why(batch_norm_act), "batch_norm", arguments, then=parts)


@rule(nn.Dropout2d, "timm.layers.drop:DropPath", "torchvision.ops.stochastic_depth:StochasticDepth")
def dropout_per_image(node: fx.Node, facts: Facts) -> Treatment:
    """Scales whole channels or whole images, wherever their elements are."""
    arguments = (("dropout", Attribute(str(node.target))),)
    return Treatment("pointwise", _why(dropout_per_image), "drop_per_image", arguments)


@rule(
    *(
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
    ),
    *(
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Hardtanh,
        nn.Sigmoid,
        nn.LogSigmoid,
        nn.Tanh,
        nn.Softplus,
        nn.Softsign,
    ),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Dropout, nn.AlphaDropout),
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
    *(F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.logsigmoid, F.dropout, F.prelu),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.abs, torch.neg),
    *(torch.sqrt, torch.rsqrt, torch.square, torch.pow, torch.clamp, operator.neg, operator.pow),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "exp", "abs", "neg", "sqrt", "rsqrt", "square", "pow"),
    *("clamp", "clamp_", "contiguous", "clone", "detach", "float", "half", "double", "type_as"),
    *("timm.layers.activations_me:SwishMe", "timm.layers.activations:Swish", "timm.layers.activations:GELU"),
    *(
        "timm.layers.activations:GELUTanh",
        "timm.layers.activations:Sigmoid",
        "timm.layers.activations:HardSwish",
    ),
)
def pointwise(node: fx.Node, facts: Facts) -> Treatment:
    """Acts on each value alone, so it is valid on any lattice."""
    return Treatment("pointwise", _why(pointwise))


@rule(
    F.softmax,
    F.log_softmax,
    torch.softmax,
    torch.log_softmax,
    "softmax",
    "log_softmax",
    nn.Softmax,
    nn.LogSoftmax,
)
def softmax(node: fx.Node, facts: Facts) -> Treatment:
    """Over the channels of each element, which are the columns of its row."""
    given = _arguments(node, "input", "dim")
    dim = getattr(facts.module(node), "dim", None) if node.op == "call_module" else given.get("dim")
    return Treatment("pointwise", _why(softmax)) if dim == 1 else barrier(f"softmax over dimension {dim}")


@rule(
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul),
    *(
        operator.truediv,
        operator.itruediv,
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.maximum,
        torch.minimum,
    ),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum"),
)
def arithmetic(node: fx.Node, facts: Facts) -> Treatment:
    """Combines the values of one cell; operands of an earlier stage are subsampled first."""
    return Treatment("join", _why(arithmetic))


@rule(torch.cat, torch.concat, torch.concatenate)
def concatenation(node: fx.Node, facts: Facts) -> Treatment:
    """Channels side by side, cell by cell."""
    given = _arguments(node, "tensors", dim=0)
    dim = given.get("axis", given["dim"])
    return Treatment("join", _why(concatenation)) if dim in (1, -3) else barrier(f"cat over dimension {dim}")


@rule(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d)
def adaptive_pooling(node: fx.Node, facts: Facts) -> Treatment:
    """To one sample: the mean over the image with each element weighed by its area, or the maximum."""
    by_module = node.op == "call_module"
    size: Any = (
        facts.module(node).output_size
        if by_module
        else _arguments(node, "input", "output_size")["output_size"]
    )
    if _pair(size) != (1, 1):
        return barrier(f"pooling to {size} cuts the map into uneven bins")
    name = type(facts.module(node)).__name__ if by_module else getattr(node.target, "__name__", "")
    is_max = node.target is F.adaptive_max_pool2d or "Max" in name
    return Treatment("global", _why(adaptive_pooling), "global_max" if is_max else "global_mean")


@rule(torch.mean, "mean")
def mean(node: fx.Node, facts: Facts) -> Treatment:
    """Over both image axes: the mean with each element weighed by its area."""
    given = _arguments(node, "input", dim=None, keepdim=False)
    dims = given["dim"] if isinstance(given["dim"], (tuple, list)) else (given["dim"],)
    if {dim % 4 if isinstance(dim, int) else dim for dim in dims} != {2, 3}:
        return barrier(f"mean over {given['dim']} is not over the image")
    return Treatment("global", _why(mean), "global_mean", (("keepdim", bool(given["keepdim"])),))


@rule(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
@rule("expand", "expand_as")
def broadcast(node: fx.Node, facts: Facts) -> Treatment:
    """One vector per image resized to a map is the same vector for every element."""
    source = node.args[0] if node.args else None
    shape = facts.shapes.get(source, ()) if isinstance(source, fx.Node) else ()
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return Treatment("broadcast", _why(broadcast))
    return barrier(f"{operation_name(node, facts)} changes the resolution")


@rule("size", "dim", getattr)
def shape(node: fx.Node, facts: Facts) -> Treatment:
    """Asks for the size of the map, which is the one the network itself would see."""
    if node.target is getattr and node.args[1] not in ("shape", "device", "dtype", "ndim"):
        return barrier(f"reads the attribute {node.args[1]!r} of a map")
    return Treatment("shape", _why(shape))


def _why(function: Rule) -> str:
    return (function.__doc__ or "").splitlines()[0]
