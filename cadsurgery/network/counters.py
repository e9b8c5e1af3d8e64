"""Hooks of tools that count work, such as ptflops, on a network whose layers are not called.

They are called with what the layer computes: its rows, as a map of one line. A count is then that of the elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import fx, nn

from cadsurgery.elements.elements import Elements
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.following.hooks import child, is_counter
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.torch_internals import tree_map_only
from cadsurgery.surgery.rewrite import WORK


def calling_counters(program: Program) -> Program:
    """Return a program that runs node by node, and calls the counting hooks of the layer whose work a node does."""

    def note(node: fx.Node, value: Any, known: Mapping[fx.Node, Any]) -> None:
        is_called = node.op == "call_module" or (
            isinstance(node.target, OnRows) and node.target.operation is None
        )
        path = node.meta[WORK][1] if WORK in node.meta and not is_called else ""
        module = child(program.net, path) if path else None  # the network's own hooks get its outputs
        if node.op == "call_function" and module is not None:
            args = fx.map_arg(node.args, known.__getitem__)
            maps = tuple(part for part in args if isinstance(part, Elements))
            _call_counters(module, _as_maps(maps), _as_maps(value))

    return program.interpreted_by(partial(GraphInterpreter, note=note))


def _as_maps(values: Any) -> Any:
    """Return values with elements as maps (1, C, 1, N)."""
    return tree_map_only(Elements, lambda x: x.rows.flatten(1).t()[None, :, None], values)


def _call_counters(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    for hooks, named, given in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, ()),
        (module._forward_hooks, module._forward_hooks_with_kwargs, (output,)),
    ):
        for key, hook in tuple(hooks.items()):
            if is_counter(hook):
                hook(module, inputs, *([{}] if key in named else []), *given)
