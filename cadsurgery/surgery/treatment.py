"""Treatments of operations, and the registry of the rules that return them.

A rule takes a node and the facts and returns a `Treatment`; it changes nothing. An operation without a rule, or one
that its rule cannot handle, is a `barrier` with a reason. Our rules are in `surgery/rules.py`; users add their own with
`@cadsurgery.rule(TheirModule)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.axes import NCHW
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.operations import Operation, operation_of
from cadsurgery.following.facts import Facts, MapFacts
from cadsurgery.following.hooks import act_alike, own_class, stays_whole
from cadsurgery.following.tracer import HOOKS
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.plain import docstring_of
from cadsurgery.support.provenance import same_place
from cadsurgery.support.torch_operations import is_kind

Kind = Literal["window", "pad", "resize", "pointwise", "join", "global", "broadcast", "shape", "barrier"]


class Cause(Enum):
    """Cause of an operation's exclusion from the region."""

    OPERATION = "no rule lets it pass there"
    POSITIONS = "it joins all positions of the image"
    PADDING = "it pads a map for what is no window of the region"
    ASKED = "it is not in the region that was asked for"
    CELLS = "it reads finer than the cells that a dilation stands for"
    COPY = "it reads a moved copy of the picture, on which the mask does not lie"
    END = "nothing of the region needs what it yields"


@dataclass(frozen=True)
class Barrier:
    """An operation that runs dense: the reason in words for users, and its cause for decisions in code."""

    why: str
    cause: Cause = Cause.OPERATION


class Attribute(NamedTuple):
    """A parameter, buffer or module of the network, by qualified name."""

    path: str


@dataclass(frozen=True)
class Call:
    """A call on rows; nodes of maps among its arguments stand for their rows. As an argument of a treatment it is a
    call on parameters.

    Attributes:
        target: a function, or the name of a method; None returns the first argument unchanged.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    target: Callable[..., Any] | str | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Treatment:
    """Treatment of an operation: the way it acts on elements.

    Attributes:
        kind: `window` (reads taps around an element), `pad` (belongs to the window that follows), `resize`
            (changes to a finer grid), `pointwise` (acts on each element by itself), `join` (combines elements of one
            lattice), `global` (one vector per image), `broadcast` (repeats such a vector over the map),
            `shape` (reads only the size), or `barrier`.
        why: the reason, for the plan; by default the first line of the rule's docstring.
        call: the operation on elements: a function of `cadsurgery.functional` or its name, or a function declared by
            `@cadsurgery.operation`; None if the operation runs on rows.
        arguments: keyword arguments of `call`: constants, nodes, `Attribute`s, or `Call`s on these.
        window: kernel size, stride, dilation and padding, for windows, pads, and resizes that read a window.
        then: modules applied to the rows afterwards.
        rows: the call on rows, if it is not the operation's own call.
        layout: axes of the result, if they differ from those of the map that is read.
        scale: factor by which the result of a resize is finer.
        last_only: why a resize is possible only at the end of the region, or "".
        axes: the layout that `call` requires of the map; "" for any.
        spaced: true if `call` takes the spacing of the network's own grid.
        reads: the map that `call` reads, if it is not the first argument.
        leaves_by: function that makes its dense map on the network's own grid, if it is not `to_dense`.
        covers: a kernel size that must equal the map's size in every call, or None.
        or_more: `covers` may be larger than the map.
        cause: cause of a barrier.
    """

    kind: Kind
    why: str = ""
    call: Callable[..., Any] | str | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    window: Window | None = None
    then: tuple[str, ...] = ()
    rows: Call | None = None
    layout: str = ""
    scale: int = 1
    last_only: str = ""
    axes: str = NCHW
    spaced: bool = False
    reads: fx.Node | None = None
    leaves_by: Callable[..., Any] | None = None
    covers: Any = None
    or_more: bool = False
    cause: Cause = Cause.OPERATION

    def __post_init__(self) -> None:
        """Replace the name of an operation by its function.

        Raises:
            UnknownName: there is no operation of that name.
            InvalidInput: the function is not declared as an operation.
        """
        if isinstance(self.call, str):
            if self.call and not hasattr(functional, self.call):
                raise UnknownName("operation on elements", self.call, vars(functional))
            object.__setattr__(self, "call", getattr(functional, self.call) if self.call else None)
        if self.call is not None and operation_of(self.call) is None:
            raise InvalidInput(
                f"{getattr(self.call, '__name__', self.call)!r} is not declared as an operation on elements.",
                why="what it reads is not known, so that neither its place in a plan nor its cost would be.",
                next='put @cadsurgery.operation(reads="window") or the like above the function.',
            )

    @property
    def operation(self) -> Operation | None:
        """The operation on elements of `call`; None if the operation runs on rows."""
        return operation_of(self.call)


Rule = Callable[[fx.Node, MapFacts], Treatment]
_RULES: dict[object, Rule] = {}
_OF_VECTORS: set[Rule] = set()


def rule(*operations: object, of_vectors: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, method names, or `"package.module:Name"` strings.

    A module class with a rule is a single operation: tracing does not go into it. The rule is called as
    `rule(node, facts)` for every node that reads a map, and returns a `Treatment`:

        @cs.rule(MyActivation)
        def my_activation(node, facts):
            \"\"\"Acts on each value by itself.\"\"\"
            return cs.Treatment("pointwise")

    Args:
        operations: the operations that the rule treats.
        of_vectors: call the rule also if the operation reads no map but one vector per image.

    A rule that is defined again, as in a notebook cell that runs twice, replaces the former definition.

    Raises:
        ValueError: an operation already has another rule.
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            known = _RULES.get(operation, function)
            if not same_place(known, function):  # torch and functional share some objects
                raise ValueError(f"{operation} already has the rule {_RULES[operation].__name__}")
        _RULES.update(dict.fromkeys(operations, function))
        _OF_VECTORS.update([function] if of_vectors else [])
        return function

    return register


def first_line(function: Rule) -> str:
    """Return the first line of a rule's docstring, which is its geometric reason."""
    return docstring_of(function).partition("\n")[0]


def barrier(why: str, cause: Cause = Cause.OPERATION) -> Treatment:
    """Return the treatment of an operation that runs dense, as do the operations that depend on it."""
    return Treatment("barrier", why, cause=cause)


def is_mixer(node: fx.Node, facts: Facts) -> bool:
    """True if a node's operation mixes all positions of the image, as in transformers and recurrent networks; it may
    have a rule or not."""
    mixes = any(is_kind(key, "mixes") for key in _operation_keys(node, facts))
    if node.target is torch.einsum:  # of a map and weights it mixes channels
        mixes = sum(source.op != "get_attr" for source in node.all_input_nodes) > 1
    return mixes and len(facts.shapes.get(node, "any")) > 2


def has_rule(module: nn.Module, *, of_package: bool = False) -> bool:
    """True if a module has a rule, so that it is a single operation; with `of_package` only rules of this package
    count."""
    known = next((_RULES[key] for key in _module_keys(module) if key in _RULES), None)
    return known is not None and (not of_package or known.__module__.startswith("cadsurgery."))


def ruled_functions() -> tuple[Callable[..., Any], ...]:
    """Return the Python functions that have a rule; tracing does not go into them."""
    functions = []
    for key in _RULES:
        if isinstance(key, str) and ":" in key:
            module, _, name = key.partition(":")
            key = getattr(sys.modules.get(module), name, None)
        if isinstance(key, FunctionType) and not key.__module__.startswith("torch."):
            functions.append(key)
    return tuple(functions)


def rule_of(node: fx.Node, facts: Facts) -> Rule | None:
    """Return the rule for a node's operation, if there is one."""
    return next((_RULES[key] for key in _operation_keys(node, facts) if key in _RULES), None)


def why_whole(node: fx.Node, facts: Facts) -> str:
    """Return why the module of a node must be called on dense maps, or ""."""
    return stays_whole(facts.module(node), HOOKS in node.meta) if node.op == "call_module" else ""


def treat(node: fx.Node, facts: MapFacts) -> Treatment:
    """Return the treatment of a node by its rule; padding before a window becomes part of the window."""
    known = rule_of(node, facts)
    reads_map = any(facts.layout(value) for value in node.all_input_nodes)
    if not reads_map and known not in _OF_VECTORS:
        return Treatment("shape")
    if reason := why_whole(node, facts):
        return barrier(reason)
    if known is None:
        return barrier(f"no rule for {operation_name(node, facts)}")
    treatment = known(node, facts)
    if not treatment.why:
        treatment = replace(treatment, why=first_line(known))
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source in facts.pads and treatment.kind != "shape":
        return _add_padding(treatment, facts.pads[source])
    return treatment


def _add_padding(treatment: Treatment, pad: Window) -> Treatment:
    """Add the padding of the map that a window or another padding reads to that one's own."""
    window = treatment.window
    if treatment.kind == "pad" and window is not None and _are_one_padding(pad, window):
        both: Any = tuple(a + b for a, b in zip(window.padding, pad.padding, strict=True))
        return replace(treatment, window=window._replace(padding=both))
    if treatment.kind != "window" or window is None:
        return barrier("reads a padded map without a window that would reach into the padding")
    ignored = treatment.operation.outside if treatment.operation is not None else 0.0
    own = any(window.padding) or window.same
    if own and (pad.same or pad.mode != window.mode or (pad.mode == "zeros" and pad.outside != ignored)):
        return barrier("its padding and that of the map it reads differ")
    if pad.same and (pad.kernel, pad.stride, pad.dilation) != (window.kernel, window.stride, window.dilation):
        return barrier("the map it reads was padded for another window")
    total: Any = tuple(a + b for a, b in zip(window.padding, pad.padding, strict=True))
    outside = None if pad.outside == ignored else pad.outside
    window = window._replace(padding=total, mode=pad.mode, same=pad.same, lower=pad.lower, outside=outside)
    if reason := growing(window):
        return barrier(reason)
    # An average pooling counts explicit padding in its divisor.
    counted = tuple((k, True if k == "count_include_pad" else v) for k, v in treatment.arguments)
    return replace(treatment, window=window, arguments=counted)


def _are_one_padding(first: Window, then: Window) -> bool:
    """True if a padding of a padded map is the same as one padding by their sum."""
    of_one_kind = (first.mode, first.outside, first.same) == (then.mode, then.outside, False)
    return of_one_kind and not then.same and then.mode in ("zeros", "replicate")


_MAY_GROW = ContextVar("maps may grow", default=False)


@contextmanager
def maps_may_grow() -> Iterator[None]:
    """Let rules inside the block take windows whose padding makes the map grow, as dense maps may."""
    token = _MAY_GROW.set(True)
    try:
        yield
    finally:
        _MAY_GROW.reset(token)


def growing(window: Window) -> str:
    """Return why a window cannot be evaluated on the existing elements (its padding makes the map grow), or ""."""
    if _MAY_GROW.get():
        return ""
    partial = window.stride - 1 if window.ceil_mode else 0
    reach = [step * (taps - 1) for step, taps in zip(window.dilation, window.kernel, strict=True)]
    top, bottom, left, right = window.padding
    if top + bottom + partial > reach[0] or left + right + partial > reach[1]:
        return f"its padding {window.padding} makes the map grow"
    return ""


def operation_name(node: fx.Node, facts: Facts) -> str:
    """Return the name of a node's operation as a user would write it."""
    if node.op == "call_module":
        return type(facts.module(node)).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else node.op


def _operation_keys(node: fx.Node, facts: Facts) -> tuple[object, ...]:
    """Return the keys that a rule for this node may be registered under.

    Subclasses inherit a rule if they do the same, see `act_alike`.
    """
    if node.op == "call_module":
        return _module_keys(facts.module(node))
    named = f"{getattr(node.target, '__module__', '')}:{getattr(node.target, '__name__', '')}"
    return (node.target, named)


def _module_keys(module: nn.Module) -> tuple[object, ...]:
    kinds = act_alike(own_class(module))
    return tuple(key for kind in kinds for key in (kind, f"{kind.__module__}:{kind.__name__}"))
