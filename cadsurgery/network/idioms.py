"""Operations in a graph that say the same in more than one way: factors and shifts, and activations written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements.on_rows import OnRows
from cadsurgery.following.graphs import Constants, torch_target
from cadsurgery.support.torch_operations import TorchOperation, is_in_place, name_of, operation_of
from cadsurgery.surgery.rewrite import STAGE

ModuleOf = Callable[[Any], nn.Module | None]


class Affine(NamedTuple):
    """x -> factor x + shift, in float64.

    Attributes:
        factor, shift: (C,), or (1,) for all channels.
        axis: axis of the channels in a dense map, -1 or -3; None if both are one number.
    """

    factor: Tensor
    shift: Tensor
    axis: int | None = None

    def fits(self, channels: int) -> bool:
        """True if the factor and the shift are for so many channels, or for any number."""
        return {self.factor.numel(), self.shift.numel()} <= {1, channels}

    def then(self, later: Affine) -> Affine:
        """Return this one followed by a later one."""
        shift = self.shift * later.factor + later.shift
        return Affine(self.factor * later.factor, shift, later.axis if self.axis is None else self.axis)


class AppliedOperation(NamedTuple):
    """How a value, elements or a dense map, is computed.

    Attributes:
        target: the function or the name of the method; None for a module.
        operands: values and numbers that it reads; parameters where it reads no value.
        options: arguments that are passed by name.
    """

    target: Any
    operands: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def named(self) -> TorchOperation | None:
        """The operation in the table of torch's operations if it is a plain call of two operands; otherwise None."""
        is_plain = self.target is not None and not self.options and len(self.operands) == 2
        return operation_of(self.target) if is_plain else None


def step_of(value: fx.Node) -> AppliedOperation:
    """Return how a value is computed."""
    target = torch_target(value) if value.op != "call_module" else None
    if not isinstance(value.target, OnRows):
        return AppliedOperation(target, value.args, value.kwargs)
    options = {name: part for name, part in value.kwargs.items() if name != "stage"}
    return AppliedOperation(target, value.args[target is None :], options)


def affine_of(step: AppliedOperation, constants: Constants) -> tuple[Affine, fx.Node] | None:
    """Return factor and shift if an operation multiplies a value by constants or adds them, and that value."""
    stated = step.named
    if stated is None:
        return None
    first, second = (_constant(operand, constants) for operand in step.operands)
    if (first is None) == (second is None):
        return None
    number, value = (first, step.operands[1]) if second is None else (second, step.operands[0])
    assert number is not None
    if not isinstance(value, fx.Node) or (second is None and is_in_place(step.target)):
        return None
    (constant, axis), name = number, name_of(step.target)
    one, zero = constant.new_ones(1), constant.new_zeros(1)
    if stated.multiplies:
        return Affine(constant, zero, axis), value
    if stated.adds:
        return Affine(one, constant, axis), value
    if name in ("sub", "subtract"):
        return (Affine(one, -constant, axis) if first is None else Affine(-one, constant, axis)), value
    if name in ("div", "divide", "true_divide", "truediv") and first is None and constant.all():
        return Affine(1 / constant, zero, axis), value
    return None


def _constant(operand: Any, constants: Constants) -> tuple[Tensor, int | None] | None:
    """Return a finite constant for each channel (C,), or (1,) for all, and the axis of the channels."""
    if isinstance(operand, fx.Node):
        held = constants.get(operand)
    elif isinstance(operand, (int, float)) and not isinstance(operand, bool):
        held = torch.tensor([operand], dtype=torch.float64, device="cpu")
    else:
        return None
    if not isinstance(held, Tensor) or not held.dtype.is_floating_point or not held.isfinite().all():
        return None
    count, shape = held.numel(), tuple(held.shape)
    axis = -1 if shape in ((count,), (1, 1, 1, count)) else -3 if shape[-3:] == (count, 1, 1) else None
    if count > 1 and (axis is None or len(shape) > 4):
        return None
    return held.flatten().double(), axis if count > 1 else None


# -- activations ---------------------------------------------------------------------------------------


def name_activations(graph: fx.Graph, module: ModuleOf) -> None:
    """Replace x sigmoid(x) and x clamp(x + 3, 0, 6) / 6 by torch's functions, so that they can be fused."""
    for value in list(graph.nodes):
        if value.op == "output" or not (named := _named(value, module)):
            continue
        function, source = named
        with graph.inserting_before(value):
            on_rows = isinstance(value.target, OnRows)
            result = graph.call_function(OnRows(function) if on_rows else function, (source,))
        result.meta.update(value.meta)
        value.replace_all_uses_with(result)


def _named(value: fx.Node, module: ModuleOf) -> tuple[Callable[[Tensor], Tensor], fx.Node] | None:
    """Return the activation that a value is, and what it is applied to."""
    factor, inner = _without_factors(value)
    for source, gate in _pairs(inner):
        share, gate = _without_factors(gate)
        name = _name(gate, module)
        if name in _GATED and math.isclose(factor * share, 1.0) and step_of(gate).operands[0] is source:
            function = _GATED[name]
        elif math.isclose(factor * share * 6, 1.0, rel_tol=1e-6) and _is_shifted_clamp(gate, source, module):
            function = F.hardswish
        else:
            continue
        if (
            not isinstance(value.target, OnRows)
            or source.meta.get(STAGE) == value.meta.get(STAGE) is not None
        ):
            return function, source
    return None


_GATED: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": F.silu, "hardsigmoid": F.hardswish}


def _pairs(value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the factors of a product of two values, in both orders."""
    step = step_of(value)
    is_product = step.named is not None and step.named.multiplies
    if is_product and all(isinstance(operand, fx.Node) for operand in step.operands):
        first, second = step.operands
        yield first, second
        if not is_in_place(step.target):
            yield second, first


def _without_factors(value: fx.Node) -> tuple[float, fx.Node]:
    """Return the number by which a value is multiplied, and the value without it."""
    factor, step = 1.0, step_of(value)
    while (number := _factor(step)) is not None:
        factor, value = factor * number, next(part for part in step.operands if isinstance(part, fx.Node))
        step = step_of(value)
    return factor, value


def _factor(step: AppliedOperation) -> float | None:
    """Return the number by which an operation multiplies its only value; None for any other operation."""
    stated = step.named
    if stated is None:
        return None
    numbers = [part for part in step.operands if isinstance(part, (int, float))]
    if len(numbers) != 1 or not all(isinstance(part, (int, float, fx.Node)) for part in step.operands):
        return None
    if stated.multiplies:
        return float(numbers[0])
    is_divided = name_of(step.target) in ("div", "truediv") and step.operands[1] is numbers[0]
    return 1 / numbers[0] if is_divided and numbers[0] else None


def _name(value: fx.Node, module: ModuleOf) -> str | None:
    """Return the name of the operation that computes a value from one other value."""
    step = step_of(value)
    stated = operation_of(module(value) if step.target is None else step.target)
    return (
        stated.name
        if stated is not None and step.operands and isinstance(step.operands[0], fx.Node)
        else None
    )


_BOUNDS = ("min", "min_val", "max", "max_val")


def _is_shifted_clamp(value: fx.Node, source: fx.Node, module: ModuleOf) -> bool:
    """True if a value is clamp(source + 3, 0, 6)."""
    step, name = step_of(value), _name(value, module)
    called: Any = module(value)
    if name == "hardtanh" or name == "clamp":
        named = step.options
        bounds = (*step.operands[1:], *(named[part] for part in _BOUNDS if part in named))[:2]
        is_clamp = ((called.min_val, called.max_val) if called is not None else bounds) == (0, 6)
    else:
        is_clamp = name == "relu6"
    if not is_clamp:
        return False
    shifted = step_of(step.operands[0])
    is_sum = shifted.named is not None and shifted.named.adds and not is_in_place(shifted.target)
    return is_sum and shifted.operands in ((source, 3), (3, source))
