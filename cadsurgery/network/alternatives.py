"""What the refusal of a network names instead: its largest part that converts, and what lets the whole convert."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from cadsurgery.following.arguments import Arguments, run_forward
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.facts import default_examples
from cadsurgery.following.trace import CannotFollow, evaluating
from cadsurgery.support.errors import CadError, CannotConvert
from cadsurgery.surgery.decide import make_plan
from cadsurgery.surgery.rules import read

_MOST_PARTS = 12  # number of parts that are tried if a network cannot be traced
_MOST_SWITCHES = 6  # number of attributes and arguments that are tried


def name_alternatives(
    model: nn.Module, refusal: CannotConvert, example: Arguments | None = None
) -> CannotConvert:
    """Return a refusal of a whole network that names what can be converted instead, each tried before it is named.

    Args:
        model: the network.
        refusal: the error without alternatives.
        example: arguments of a call of the network; by default small random images of several sizes are tried.
    """
    parts = {name: getattr(refusal, name) for name in ("where", "why", "next")}
    advice = []
    if name := _largest_part(model):
        advice.append(f"convert its {name} and put it back: {_put_back(name)}")
    if switch := name_switch(model, refusal, example):
        advice.append(f"convert the whole network {switch}")
    if advice:
        first, _, others = parts["next"].partition(", or ")
        advice.append(others if first.startswith("convert") else parts["next"])
        parts["next"] = ", or ".join(advice)
    return CannotConvert(refusal.what, **parts)


def _put_back(path: str) -> str:
    """Return the line of Python that converts a part in its place."""
    if all(name.isidentifier() for name in path.split(".")):
        return f'model.{path} = cs.adaptify(model.{path}, outputs="native")'
    return f'model.set_submodule("{path}", cs.adaptify(model.get_submodule("{path}"), outputs="native"))'


def _largest_part(model: nn.Module) -> str:
    """Return the name of a network's largest strided convolutional module that can be traced, or ""."""
    parts = [
        (sum(p.numel() for p in part.parameters()), name) for name, part in model.named_modules() if name
    ]
    for _, name in sorted(parts, key=lambda pair: -pair[0])[:_MOST_PARTS]:
        part = model.get_submodule(name)
        strided = [
            module for module in part.modules() if isinstance(module, nn.Conv2d) and max(module.stride) > 1
        ]
        if len(strided) > 1 and type(part).forward is not nn.Module.forward:
            with contextlib.suppress(CadError):
                make_plan(read(part, None))
                return name
    return ""


def name_switch(model: nn.Module, refusal: CannotConvert, example: Arguments | None = None) -> str:
    """Return how a truth value is set with which a network that ends in numpy can be converted whole: an attribute that
    its forward reads, or an argument of the call, as detectors have to return their maps; "" if there is none."""
    if not (isinstance(refusal, CannotFollow) and refusal.is_of_any_size):
        return ""  # networks that end in numpy are refused soon; to try switches of others may take minutes
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    read_by_forward = code.co_names if code is not None else ()
    attributes = [name for name in read_by_forward if isinstance(vars(model).get(name), bool)]
    for name in [name for name in attributes if name != "training"][:_MOST_SWITCHES]:
        value = not vars(model)[name]
        setattr(model, name, value)
        try:
            if _converts(model, example):
                return f"after model.{name} = {value}, with which it returns something else"
        finally:
            setattr(model, name, not value)
    defaults = {name: one.default for name, one in signature_of(model).parameters.items()}
    truths = ((name, value) for name, value in defaults.items() if isinstance(value, bool))
    for name, value in islice(truths, _MOST_SWITCHES):
        for call in _calls(model, example):
            if _converts(model, {**call, name: not value}):
                first = next(iter(call))
                return f'for calls with {name}: example_input={{"{first}": images, "{name}": {not value}}}'
    return ""


def _converts(model: nn.Module, example: Arguments | None) -> bool:
    with contextlib.suppress(CadError):
        make_plan(read(model, example))
        return True
    return False


def _calls(model: nn.Module, example: Arguments | None) -> Iterator[Arguments]:
    """Yield the arguments of one call that the network takes."""
    calls = [example] if example is not None else default_examples(model)

    def runs(call: Arguments) -> bool:
        with contextlib.suppress(Exception), torch.no_grad(), evaluating(model):
            run_forward(model, call)
            return True
        return False

    with contextlib.suppress(CannotConvert):
        yield from islice((call for call in calls if runs(call)), 1)
