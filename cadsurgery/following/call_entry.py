"""What a call of a network runs: its class's own `__call__`, where it has one, or its forward.

A class may override `__call__`, e.g. to normalise the image before `super().__call__`, or have no forward at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAMES = ("__call__", "_call_impl")  # the first calls the second, which calls hooks and forward
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def own_call(kind: type) -> Callable[..., Any] | None:
    """Return the function that calls of a class of modules run instead of torch's own; None if they run that. (Torch
    itself overrides it for graphs, without a change.)"""
    name = _own_name(kind)
    return getattr(kind, name) if name else None


def _own_name(kind: type) -> str:
    for name in _NAMES:
        function = getattr(kind, name)
        module = str(getattr(function, "__module__", "")).partition(".")[0]
        if function is not getattr(nn.Module, name) and module != "torch":
            return name
    return ""


def traced_name(kind: type) -> str:
    """Return the name of the method whose parameters are those of a call: a `__call__` that passes everything on has
    those of its forward."""
    name, forward = _own_name(kind), getattr(kind, "forward", nn.Module.forward)
    has_forward = forward is not nn.Module.forward
    return "forward" if not name or (has_forward and not _named_parameters(getattr(kind, name))) else name


def _named_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method that have a name of their own, without `self`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of a call of a network."""
    if own_call(type(model)) is None:
        return inspect.signature(model.forward)
    return inspect.signature(getattr(model, traced_name(type(model))))


def call_alone(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Call a network with arguments by name, without the hooks of the network itself."""
    call = own_call(type(model))
    if call is None:
        return call_by_name(model.forward, signature_of(model), arguments)
    with without_hooks(model):
        return call_by_name(call.__get__(model), signature_of(model), arguments)


def call_by_name(
    function: Callable[..., Any], signature: inspect.Signature, arguments: Mapping[str, Any]
) -> Any:
    """Call a function with arguments by the names of another signature, in whose order it takes them."""
    bound = signature.bind_partial()
    bound.arguments.update(arguments)
    return function(*bound.args, **bound.kwargs)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of a network itself off for a block."""
    state = vars(model)
    before = {name: state[name] for name in _HOOKS}
    state.update({name: type(hooks)() for name, hooks in before.items()})
    try:
        yield
    finally:
        state.update(before)
