"""Count multiply-accumulates (MACs) with one rule per operation, and name the operations without a rule.

Where torch has a formula (`torch.utils.flop_counter`), it is the rule. This module adds rules for operations that
multiply but that torch silently counts as zero. Operations that only move, compare, add or scale single values
(pointwise operations, reductions, norms, pooling, resizing, indexing, copies) have zero MACs and need no rule. Any
other operation without a rule is noted by name in `MacCounter.not_counted`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from cadsurgery.support import meta_tensors
from cadsurgery.support.torch_internals import HigherOrderOperator, OpOverload, TorchDispatchMode
from cadsurgery.support.torch_operations import is_free

_COND = torch.ops.higher_order.cond


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of all operations in its `with` block, on real tensors or on meta tensors.

    Attributes:
        macs: multiply-accumulates so far.
        not_counted: number of calls by operation name, for operations that may multiply and have no rule.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.not_counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _COND:
            return self._larger_branch(*args, **kwargs)
        kind = func if isinstance(func, HigherOrderOperator) else func._overloadpacket
        rule = _torch_rule(kind) or _find_rule(kind)
        if rule is None and isinstance(func, OpOverload):
            with self:  # in inference mode torch passes composite operations undecomposed
                value = func.decompose(*args, **kwargs)
            if value is not NotImplemented:
                return value
        value = meta_tensors.call(func, args, kwargs)
        count = rule(args, kwargs, value) if rule is not None else None
        if count is None:
            self.not_counted[str(kind)] += 1
        else:
            self.macs += count
        return value

    def _larger_branch(
        self, predicate: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], operands: Any = ()
    ) -> Any:
        """Run both branches of `torch.cond` and count the costlier one: meta tensors do not tell which is taken."""
        before, values, counts = self.macs, [], []
        for branch in (if_true, if_false):
            with self:
                values.append(branch(*operands))
            counts.append(self.macs - before)
            self.macs = before
        self.macs += max(counts)
        is_known = not isinstance(predicate, Tensor) or not predicate.is_meta
        return values[0] if not is_known or bool(predicate) else values[1]


def describe_not_counted(names: tuple[str, ...]) -> str:
    """Return a phrase that names the operations missing from a count; empty if there are none."""
    return f"not counted, for want of a rule: {', '.join(names)}" if names else ""


Rule = Callable[[tuple[Any, ...], Mapping[str, Any], Any], int | None]  # (args, kwargs, result) to MACs


def _torch_rule(kind: Any) -> Rule | None:
    """Return the rule of an operation in torch's registry (`register_flop_formula`), if it has one."""
    formula = flop_registry.get(kind)
    if formula is None:
        return None
    return lambda args, kwargs, value: formula(*args, **kwargs, out_val=value) // 2


@cache
def _find_rule(kind: Any) -> Rule | None:
    """Return the rule of an operation outside torch's registry; None if it may multiply and has none."""
    if isinstance(kind, HigherOrderOperator):
        return None
    library, _, name = str(kind).partition(".")
    out_of_place = name.removesuffix("_")
    rule = _RULES.get((library, name)) or _RULES.get((library, out_of_place))
    if rule is not None:
        return lambda args, kwargs, value: rule(*args, value=value, **kwargs)
    torch_rule = _torch_rule(getattr(torch.ops.aten, out_of_place, None)) if library == "aten" else None
    if torch_rule is None and _is_free(kind, library, name):
        return lambda args, kwargs, value: 0
    return torch_rule


def _is_free(kind: Any, library: str, name: str) -> bool:
    """True if the operation is known not to multiply and accumulate."""
    if _is_tagged(kind):
        return True
    if library == "prims":
        return not name.startswith(("fft", "svd"))
    if library == "torchvision":
        return name in ("nms", "roi_pool", "ps_roi_pool")
    base = _FORM.sub("", name.strip("_"))
    is_known = is_free(base) or _FREE.fullmatch(base) is not None
    is_known = is_known or _is_tagged(getattr(torch.ops.aten, base, None))
    return library == "aten" and is_known


def _is_tagged(kind: Any) -> bool:
    """True if torch tags the operation as pointwise or a reduction, or if it is a view."""
    overloads = [getattr(kind, overload) for overload in kind.overloads()] if kind is not None else []
    free = {torch.Tag.pointwise, torch.Tag.reduction}
    return any(free & set(overload.tags) or overload.is_view for overload in overloads)


# Prefixes and suffixes with which torch names variants of an operation and its gradient.
_FORM = re.compile(
    r"^foreach_|(_copy|_functional|_forward|_helper|_impl|_forward_only|_data|_backward|_backward_data"
    r"|_backward_reduce|_backward_elemt|_jvp)$"
)
# Further operations with zero MACs that torch tags neither as pointwise nor as a reduction or view, and that
# `torch_operations` does not list.
_FREE = re.compile(
    "|".join(
        (
            r"\w*pool\w*|upsample_\w+|pixel_(un)?shuffle|channel_shuffle",
            r"\w*(batch|layer|group|rms|instance)_norm\w*|(native_|embedding_re|re)?norm|weight_norm_interface",
            r"\w*softmax\w*|log_sigmoid|rrelu_with_noise|add_relu|prelu_kernel|thnn_fused_\w+|\w*loss\w*",
            r"binary_cross_entropy\w*|(log)?cum\w+|dist|trace|linalg_cross|polar|complex",
            r"(unsafe_)?(masked_)?index\w*|masked_\w+|scatter\w*|\w+_scatter|select\w*|slice\w*|diagonal|take|put",
            r"embedding\w*|nonzero\w*|searchsorted|bucketize|isin|segment_reduce|(nan)?median",
            r"unique\w*|histc|histogram\w*|bincount|hash_tensor",
            r"cat|stack|chunk_cat|block_diag|diag_embed|rot90|repeat\w*|(constant|reflection|replication)_pad\w*",
            r"im2col|col2im|unfold|tril\w*|triu\w*|unsafe_(split\w*|view)|reshape\w*|resize\w*|mkldnn_(reshape|transpose)",
            r"(new_)?(empty|full|zero|zeros|ones|fill|rand|randn|randint|randperm|random|eye|arange|range|linspace|logspace)",
            r"(new_)?(empty|full|zeros|ones|rand|randn|randint)_\w+|scalar_tensor|\w+_window|efficientzerotensor|from_file",
            r"bernoulli|binomial|cauchy|exponential|geometric|(log_)?normal|multinomial|poisson|uniform|philox\w*",
            r"standard_gamma|sample_dirichlet|(native|fused)_dropout|fft_r?fftfreq|transform_bias_rescale_qkv",
            r"to(_\w+)?|dequantize|quantize_per\w+|fake_quantize\w*|int_repr|q_\w+|qscheme|copy\w*|lift|convert_\w+|pin_memory",
            r"lazy_clone|set|shallow_copy_data|assert\w*|functional_(assert|sym)\w*|local_scalar_dense|is_\w+|allclose",
            r"has_\w+|use_\w+|linalg_check_errors|pack_padded_sequence|fused_sdp_choice|dense_dim|sparse_dim|nnz|dim[IV]|record_stream|nested_\w+|new_zeros\w*",
        )
    )
)

_RULES: dict[tuple[str, str], Callable[..., int | None]] = {}


def _counts(names: str, library: str = "aten") -> Callable[[Any], Any]:
    """Register a rule for operations, whose names spaces separate: it returns MACs from the arguments and the result
    `value`, or None if unknown."""

    def declare(rule: Any) -> Any:
        _RULES.update({(library, name): rule for name in names.split()})
        return rule

    return declare


@_counts("mv dot vdot")
def _vectors(a: Tensor, b: Tensor, **_: Any) -> int:
    return a.numel()


@_counts("addmv")
def _added_vector(bias: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return a.numel()


@_counts("addr")
def _outer(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return a.numel() * b.numel()


@_counts("addbmm _addmm_activation")
def _added_product(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return a.numel() * b.shape[-1]


@_counts("_int_mm _weight_int8pack_mm mkldnn_linear")
def _product(a: Tensor, b: Tensor, *_: Any, value: Tensor, **__: Any) -> int:
    return value.numel() * a.shape[-1]


@_counts("_trilinear")
def _product_of_three(
    a: Tensor, b: Tensor, c: Tensor, of_a: list[int], of_b: list[int], of_c: list[int], *_: Any, **__: Any
) -> int:
    shapes = []
    for tensor, places in ((a, of_a), (b, of_b), (c, of_c)):
        shape = list(tensor.shape)
        for place in places:
            shape.insert(place, 1)
        shapes.append(shape)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


@_counts("mkldnn_convolution _nnpack_spatial_convolution cudnn_convolution_relu cudnn_convolution_add_relu")
@_counts("_conv_depthwise2d conv_depthwise3d slow_conv_dilated2d slow_conv_dilated3d slow_conv3d_forward")
def _convolution(x: Tensor, weight: Tensor, *_: Any, value: Tensor, **__: Any) -> int:
    return value.shape[0] * math.prod(value.shape[2:]) * weight.numel()


@_counts("cudnn_convolution_transpose slow_conv_transpose2d slow_conv_transpose3d")
def _transposed_convolution(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.shape[0] * math.prod(x.shape[2:]) * weight.numel()


@_counts("conv_tbc")
def _convolution_of_sequences(x: Tensor, weight: Tensor, *_: Any, value: Tensor, **__: Any) -> int:
    return value.shape[0] * value.shape[1] * weight.numel()


_BILINEAR = 4  # input values read and multiplied for each bilinear sample


@_counts("deform_conv2d", library="torchvision")
def _deformable_convolution(x: Tensor, weight: Tensor, *_: Any, value: Tensor, **__: Any) -> int:
    positions = value.shape[0] * math.prod(value.shape[2:])
    return positions * (weight.numel() + _BILINEAR * x.shape[1] * math.prod(weight.shape[2:]))


@_counts("roi_align ps_roi_align", library="torchvision")
def _aligned_regions(x: Tensor, boxes: Tensor, *options: Any, value: Any, **_: Any) -> int | None:
    pooled, samples = value[0] if isinstance(value, tuple) else value, int(options[3])
    if samples <= 0:  # their number depends on the boxes' sizes
        return None
    return int(pooled.numel()) * samples**2 * _BILINEAR


_BY_MODE = {0: _BILINEAR, 1: 0, 2: 20}  # bilinear, nearest, bicubic (4 sums of 4 values, and a sum of these)


@_counts("grid_sampler_2d _grid_sampler_2d_cpu_fallback cudnn_grid_sampler")
def _sampled(x: Tensor, grid: Tensor, mode: int = 0, *_: Any, value: Tensor, **__: Any) -> int:
    return value.numel() * _BY_MODE[mode]


@_counts("grid_sampler_3d")
def _sampled_volume(x: Tensor, grid: Tensor, mode: int = 0, *_: Any, value: Tensor, **__: Any) -> int:
    return value.numel() * (2 * _BILINEAR if mode == 0 else 0)


@_counts("affine_grid_generator cudnn_affine_grid_generator")
def _affine_grid(theta: Tensor, *_: Any, value: Tensor, **__: Any) -> int:
    return value.numel() * theta.shape[-1]


@_counts("_scaled_dot_product_flash_attention_for_cpu")  # counted by torch itself from 2.15 on
@_counts("_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps")
def _attention(query: Tensor, key: Tensor, value_: Tensor, *_: Any, **__: Any) -> int:
    return query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value_.shape[-1]


@_counts("_native_multi_head_attention")
def _multi_head_attention(
    query: Tensor, key: Tensor, value_: Tensor, width: int, *_: Any, **__: Any
) -> int | None:
    if query.is_nested:
        return None
    projections = (2 * query.numel() + key.numel() + value_.numel()) * width
    return projections + 2 * query.numel() * key.shape[1]


@_counts("_transformer_encoder_layer_fwd")
def _encoder_layer(x: Tensor, width: int, *rest: Any, value: Any, **options: Any) -> int | None:
    if x.is_nested:
        return None
    wide, narrow = rest[12], rest[14]  # the weights of the two linear layers after the attention
    attention = _multi_head_attention(x, x, x, width)
    return int(attention) + x.numel() // width * (wide.numel() + narrow.numel())


@_counts("mkldnn_rnn_layer")
def _recurrent_layer(x: Tensor, of_input: Tensor, of_state: Tensor, *_: Any, **__: Any) -> int:
    return x.shape[0] * x.shape[1] * (of_input.numel() + of_state.numel())
