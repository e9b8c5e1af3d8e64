"""Leave out what torch's exporters compute about sizes and types that a file does not need."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

from torch import fx
from torch.fx.experimental import proxy_tensor

from cadsurgery.following.graphs import line_that_runs
from cadsurgery.network.export.unsupported import LINE
from cadsurgery.support import torch_internals


@contextmanager
def following_quickly() -> Iterator[None]:
    """Let torch.export leave out all that a file does not need."""
    with _without_proofs(), _without_assertions(), _without_records():
        yield


def _without_proofs() -> AbstractContextManager[Any]:
    """Decide what torch merely asks about sizes (is it contiguous, is it broadcast) by their ranges alone.

    Proofs from all assertions made so far took a fifth of the time of torch.export. Before torch 2.12 they cannot be
    left out.
    """
    if not torch_internals.is_here("prove_less"):
        return nullcontext()
    return torch_internals.sizes_options.patch(aggressive_guard_free_semantics=1)


def _without_assertions() -> AbstractContextManager[Any]:
    """Let torch.export write no assertions on sizes into its program, from which they would be taken out again.

    It cannot write those on quotients of sizes, and refuses the network.
    """
    return torch_internals.put("insert_assertions", lambda *_, **__: None)


@contextmanager
def _without_records() -> Iterator[None]:
    """Let torch.export record no stacks and no memory formats, and write no Python code of its graphs; of the stack of
    each operation only the line of the network's graph is noted, for errors.

    Nobody reads the rest in a program that becomes an ONNX file; it took a third of the time of torch.export.
    """
    create_node = proxy_tensor.PythonKeyTracer.create_node

    def create_with_line(self: Any, *arguments: Any, **options: Any) -> fx.Node:
        node = create_node(self, *arguments, **options)
        node.meta[LINE] = line_that_runs()
        return node

    with (
        mock.patch.object(fx.config, "do_not_emit_stack_traces", True, create=True),
        mock.patch.object(proxy_tensor.PythonKeyTracer, "create_node", create_with_line),
        torch_internals.put("note_formats", lambda _: None),
        torch_internals.without_code(True),
    ):
        yield


@contextmanager
def without_collections() -> Iterator[None]:
    """Search for no unreachable objects: a graph consists of millions that are reachable, all looked at each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def promoting_without_runs() -> Iterator[None]:
    """Let torch's exporter read the values of nodes whose arguments need no other type, instead of computing them.

    Computing them took as long as translating the program, and longer with every size that it depends on.
    """
    interpreter = torch_internals.promoter
    original = interpreter.run_node
    interpreter.run_node = _run_node
    try:
        yield
    finally:
        interpreter.run_node = original


def _run_node(self: Any, n: fx.Node) -> Any:
    with self._set_current_node(n):
        rule = torch_internals.promotion_of(n, self.type_promotion_table)
        if rule is not None:
            self._maybe_promote_node(n, rule)
    return n.meta["val"] if "val" in n.meta else fx.Interpreter.run_node(self, n)
