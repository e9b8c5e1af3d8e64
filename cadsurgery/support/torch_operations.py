"""Table of torch's operations and their properties, one entry for all spellings of an operation.

    operation_of(torch.relu_).name == operation_of("relu").name == operation_of(nn.ReLU()).name == "relu"

A spelling is a module class, a function of torch or of `operator`, or the name of a method. In-place spellings, such as
`relu_` and `operator.iadd`, follow from the name. Only operations of kind "mixes" multiply and accumulate;
`support/counting.py` has their MACs. The conversion of an operation to elements is defined by its rule
(`surgery/rules.py`), which is registered for all operations of a kind.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import BuiltinFunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Kind = Literal[
    "value",  # each result value depends on one input value (and on constants)
    "values",  # each result value depends on the values of several tensors at the same position
    "along",  # combines or moves values along axes that are named in the call
    "copies",  # the same values in another type, on another device or in other memory
    "converts",  # the same values in the type and on the device of another argument
    "reshapes",  # the same values in the same order, in another shape
    "permutes",  # the same values with the axes in another order
    "splits",  # parts along an axis, as several tensors
    "selects",  # one part along an axis
    "drops",  # sets random values to zero in training; the identity in evaluation mode
    "drops channels",  # sets random channels or images to zero in training; the identity in evaluation mode
    "fills",  # a new tensor with the same number everywhere
    "asks",  # a size, type or device; reads no values
    "asks rank",  # a property that does not depend on the image: number of axes, memory layout
    "mixes",  # combines positions of the image, on tensors of more than two axes
    "other",
]


@dataclass(frozen=True)
class TorchOperation:
    """Properties of one operation.

    Attributes:
        name: its name in torch.
        kind: how its result depends on its input, see `Kind`.
        adds: True if the result is the sum of the two operands.
        multiplies: True if the result is the product of the two operands.
        makes_nan: True if moderate inputs may give NaN or infinity.
        keeps_values: True if the result equals the input in evaluation mode.
    """

    name: str
    kind: Kind
    adds: bool = False
    multiplies: bool = False
    makes_nan: bool = False
    keeps_values: bool = False


_SPELLINGS: dict[object, TorchOperation] = {}
_NAMED: dict[str, TorchOperation] = {}
_SPACES: tuple[Any, ...] = (F, torch, torch.linalg, torch.special, torch.fft, operator)


# Modules of torch by the name of their operation, e.g. nn.LeakyReLU of leaky_relu; nn.CosineSimilarity has a rule of
# its own, because its axis is in the module.
_MODULES = {
    name.lower(): kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and kind is not nn.CosineSimilarity
}


def _state(kind: Kind, names: str, *modules: type[nn.Module] | str, **facts: bool) -> None:
    """Register operations that have the same properties.

    Args:
        kind: their kind.
        names: their names, separated by spaces; aliases follow a name after `=`.
        modules: module classes that are named otherwise than the operation, or `module:class` of another library.
        facts: further properties, see `TorchOperation`.
    """
    for entry in names.split():
        name, *others = entry.split("=")
        operation = TorchOperation(name, kind, **facts)
        _NAMED.update(dict.fromkeys((name, *others), operation))
        for spelled in (name, *others):
            _SPELLINGS.update(dict.fromkeys(_functions_named(spelled), operation))
            methods = [way for way in _methods_named(spelled) if callable(getattr(Tensor, way, None))]
            _SPELLINGS.update(dict.fromkeys(methods, operation))
        own = _MODULES.get(name.replace("_", ""))
        _SPELLINGS.update(dict.fromkeys((*([own] if own is not None else []), *modules), operation))


def _functions_named(name: str) -> list[Any]:
    """Return the functions of a name, including in-place variants."""
    candidates = [getattr(space, spelled, None) for space in _SPACES for spelled in (name, f"{name}_")]
    candidates += [getattr(operator, f"i{name}", None)] if hasattr(operator, name) else []
    candidates += [getattr(Tensor, spelled, None) for spelled in _methods_named(name)]
    return [function for function in candidates if callable(function)]


def _methods_named(name: str) -> tuple[str, ...]:
    """Return the method names of an operation, including those of Python's operators."""
    operators = (f"__{name}__", f"__r{name}__", f"__i{name}__") if hasattr(operator, name) else ()
    return (name, f"{name}_", *operators)


# -- one value at a time -------------------------------------------------------------------------------

_state("value", "identity", keeps_values=True)
_state("value", "relu relu6 leaky_relu prelu elu celu selu gelu rrelu hardtanh sigmoid=expit logsigmoid tanh")
_state("value", "softplus softsign hardshrink softshrink tanhshrink threshold")
_state("value", "silu", "timm.layers.activations_me:SwishMe")
_state("value", "mish", "timm.layers.activations_me:MishMe")
_state("value", "hardswish", "timm.layers.activations_me:HardSwishMe")
_state("value", "hardsigmoid", "timm.layers.activations_me:HardSigmoidMe")
_state("value", "hardmish", "timm.layers.activations_me:HardMishMe")
_state(
    "value",
    "abs=absolute=fabs neg=negative sign=sgn trunc=fix clamp=clip clamp_min clamp_max square "
    "sin cos atan=arctan asinh=arcsinh erf erfc sinc ceil floor round frac positive=pos "
    "fake_quantize_per_tensor_affine bool byte char short int long bitwise_not=invert=__invert__ "
    "logical_not isnan isinf isfinite isneginf isposinf isreal signbit angle fill zero=zero_ "
    "zeros_like ones_like full_like deg2rad rad2deg nan_to_num",
)
_state(
    "value",
    "exp expm1 exp2 log log2 log10 log1p sqrt rsqrt pow reciprocal "
    "tan sinh cosh acos=arccos asin=arcsin acosh=arccosh atanh=arctanh "
    "erfinv logit erfcx entr ndtri i0 i1 lgamma=gammaln digamma=psi "
    "ndtr log_ndtr i0e i1e bessel_j0 bessel_j1 bessel_y0 bessel_y1 airy_ai "
    "modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 "
    "scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0",
    makes_nan=True,
)

# -- the values of several tensors at one position -----------------------------------------------------

_state("values", "add", adds=True)
_state("values", "mul=multiply", multiplies=True)
_state("values", "sub=subtract rsub")
_state("values", "div=divide=true_divide=truediv=__div__=__rdiv__=__idiv__ addcdiv", makes_nan=True)
_state(
    "values",
    "maximum minimum addcmul lerp where fmax fmin hypot copysign heaviside ldexp nextafter "
    "logaddexp logaddexp2 isclose masked_fill logical_and logical_or logical_xor atan2=arctan2 "
    "eq ne=not_equal lt=less le=less_equal gt=greater ge=greater_equal "
    "bitwise_and=and_=__and__=__rand__=__iand__=iand "
    "bitwise_or=or_=__or__=__ror__=__ior__=ior "
    "bitwise_xor=xor=__xor__=__rxor__=__ixor__=ixor",
)
_state(
    "values",
    "fmod remainder floor_divide floordiv mod xlogy xlog1py float_power "
    "igamma igammac gammainc gammaincc polygamma zeta "
    "hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l "
    "legendre_polynomial_p chebyshev_polynomial_t chebyshev_polynomial_u "
    "chebyshev_polynomial_v chebyshev_polynomial_w "
    "shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u "
    "shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w",
    makes_nan=True,
)

# -- along axes that the call names --------------------------------------------------------------------

_state("along", "softmax log_softmax softmin glu normalize max min logsumexp prod cosine_similarity")
_state("along", "cumsum cumprod cummax cummin logcumsumexp diff roll flip nansum nanmean count_nonzero")
_state("along", "all any argmax argmin sort argsort topk kthvalue median nanmedian mode")
_state("along", "aminmax var_mean std_mean", makes_nan=True)
_state("along", "index_select repeat_interleave gather")

# -- the same values -----------------------------------------------------------------------------------

_state("copies", "contiguous clone detach float half double bfloat16 type cpu cuda requires_grad_")
_state("copies", "conj=resolve_conj=resolve_neg=conj_physical=real")
_state("converts", "to type_as as_tensor")
_state("reshapes", "flatten unflatten view reshape squeeze unsqueeze")
_state("permutes", "permute transpose=swapaxes=swapdims movedim=moveaxis t")
_state("splits", "split chunk tensor_split unsafe_split unsafe_chunk")
_state("selects", "unbind select narrow")
_state("drops", "dropout alpha_dropout", keeps_values=True)
_state("drops channels", "dropout1d dropout2d dropout3d feature_alpha_dropout", keeps_values=True)
_state(
    *("drops channels", "drop_path", "timm.layers.drop:DropPath"),
    "torchvision.ops.stochastic_depth:StochasticDepth",
    keeps_values=True,
)

# -- no values of the input ----------------------------------------------------------------------------

_state("fills", "zeros ones full new_zeros new_ones new_full")
_state("asks", "size numel nelement element_size")
_state("asks rank", "dim ndimension stride is_contiguous")
_ATTRIBUTES: dict[str, Kind] = {
    **dict.fromkeys(("shape", "dtype", "device", "is_cuda", "itemsize", "nbytes"), "asks"),
    **dict.fromkeys(("ndim", "requires_grad", "layout"), "asks rank"),
}

# -- more than one position ----------------------------------------------------------------------------

_state("mixes", "scaled_dot_product_attention", nn.MultiheadAttention)
_state("mixes", "matmul=__matmul__ unfold lstm gru baddbmm einsum bmm grid_sample")
_state("mixes", "fft fft2 fftn ifft ifft2 ifftn rfft rfft2 rfftn irfft irfft2 irfftn hfft ihfft")
_state("other", "mvlgamma multigammaln var std inv inverse pinv", makes_nan=True)


def operation_of(target: Any) -> TorchOperation | None:
    """Return the operation of a module, module class, function or method name; None if the table has none."""
    if isinstance(target, nn.Module):
        target = type(target)
    if isinstance(target, type):
        named = f"{target.__module__}:{target.__name__}"
        return _SPELLINGS.get(target) or _SPELLINGS.get(named)
    try:
        return _SPELLINGS.get(target)
    except TypeError:  # an unhashable callable
        return None


def is_free(name: str) -> bool:
    """True if the operation of this name in torch's dispatcher is known to have zero MACs."""
    return name in _NAMED and _NAMED[name].kind not in ("mixes", "other")


def is_kind(target: Any, *kinds: Kind) -> bool:
    """True if an operation is in the table with one of these kinds."""
    operation = operation_of(target)
    return operation is not None and operation.kind in kinds


def spellings(*kinds: Kind) -> tuple[object, ...]:
    """Return all spellings of the operations of these kinds, as arguments for `@rule`."""
    return tuple(spelling for spelling, operation in _SPELLINGS.items() if operation.kind in kinds)


def name_of(target: Any) -> str:
    """Return the name of a function or method."""
    return str(getattr(target, "__name__", target))


def is_in_place(target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """True if a call writes its result into its first argument.

    Args:
        target: a module, a function or the name of a method.
        args, kwargs: arguments of the call, perhaps with `inplace`.
    """
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    name = name_of(target)
    if name.startswith("__"):  # `x.__iadd__(y)`, if there is also `x.__add__(y)`
        return name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    if getattr(target, "__module__", "") == "_operator":  # and_, or_ and not_ are only spelled so
        return name[0] == "i" and (hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_"))
    if name.endswith("_") and not name.startswith("_"):
        return True
    if not callable(target):
        return False
    place = _place_of_inplace(target)
    flag = args[place] if place is not None and len(args) > place else (kwargs or {}).get("inplace")
    return bool(flag)


@cache
def _place_of_inplace(function: Any) -> int | None:
    """Return the position of a function's parameter `inplace`; None if it has no such parameter."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # compiled functions have no signature
        return None
    return names.index("inplace") if "inplace" in names else None


def may_make_nan(target: Any) -> bool:
    """True if a call may give NaN or infinity for moderate inputs, or comes from a library unknown here."""
    operation = operation_of(target)
    if operation is not None:
        return operation.makes_nan
    origin = str(getattr(target, "__module__", "") or "")
    is_known = isinstance(target, (str, BuiltinFunctionType)) or origin.startswith(
        ("torch", "_operator", "cadsurgery", "math", "builtins")
    )
    return not is_known


def asks(node: fx.Node, *, of_rank: bool = False) -> bool:
    """True if a node reads a size, type or device but no values; with `of_rank` only properties that do not depend on
    the image count."""
    kind = _ATTRIBUTES.get(str(node.args[1])) if node.target is getattr else None
    if node.op == "call_method" and (operation := operation_of(node.target)) is not None:
        kind = operation.kind
    if node.op == "call_method" and node.target == "type" and len(node.args) == 1 and not node.kwargs:
        kind = "asks"  # the name of the type; with another one it converts
    return kind == "asks rank" or (not of_rank and (kind == "asks" or node.target is len))


# Operations whose results jump where two values change their order or stop being equal.
_CHOICES = frozenset(
    (
        *("argmax", "argmin", "sort", "argsort", "msort", "topk", "kthvalue", "median", "nanmedian", "mode"),
        *("eq", "ne", "isclose", "nonzero", "argwhere", "unique", "nms", "batched_nms"),
    )
)


def chooses(node: fx.Node) -> bool:
    """True if a node chooses among values, or asks which are equal: of values that are equal but for rounding, rounding
    decides."""
    indices = name_of(node.target) in ("max", "min") and any(
        user.target is operator.getitem and user.args[1] == 1 for user in node.users
    )
    return indices or name_of(node.target) in _CHOICES
