"""Sizes of all values of a program for images of one shape, and the work of its steps: a run without values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cadsurgery.methods.anytime.program import Program
from cadsurgery.methods.steps import call
from cadsurgery.network.macs import to_meta
from cadsurgery.support.counting import MacCounter


@dataclass(frozen=True)
class Shapes:
    """What is known of a run before it.

    Attributes:
        sizes: height and width of each value that is a map, by step.
        numbers: values that are sizes, by step.
        macs: multiply-accumulates of each step where everything is computed.
        channels: of each map.
        not_counted: operations that are not among the multiply-accumulates, because no rule says how much.
    """

    sizes: dict[str, tuple[int, int]]
    numbers: dict[str, Any]
    macs: dict[str, int]
    channels: dict[str, int]
    not_counted: list[str]


def shapes_of(program: Program, ghost: nn.Module, arguments: dict[str, Any]) -> Shapes:
    """What a call with such arguments makes, on a network without values."""
    found, env = Shapes({}, {}, {}, {}, []), dict[str, Any]()
    arguments = tree_map(to_meta, arguments)
    with torch.no_grad(), MacCounter() as counter:
        for step in (step for segment in program.segments for step in segment):
            before = counter.macs
            value = to_meta(call(ghost, step, env.__getitem__, arguments))
            env[step.name] = value
            found.macs[step.name] = counter.macs - before
            if isinstance(value, Tensor) and value.dim() == 4:
                found.sizes[step.name] = (value.shape[2], value.shape[3])
                found.channels[step.name] = value.shape[1]
            elif _is_number(value):
                found.numbers[step.name] = value
            for name in step.frees:
                del env[name]
    found.not_counted.extend(sorted(counter.not_counted))
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return isinstance(value, int) and not isinstance(value, bool)
