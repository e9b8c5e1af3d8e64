"""Promote the types of arguments for ONNX without running the program on symbolic tensors once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.onnx._internal.fx.passes import type_promotion


@contextmanager
def promoting_without_runs() -> Iterator[None]:
    """Let torch's exporter read the values of nodes whose arguments need no other type, instead of computing them.

    Computing them took as long as translating the program, and longer with every size that it depends on.
    """
    interpreter = type_promotion._TypePromotionInterpreter
    original = interpreter.run_node
    interpreter.run_node = _run_node  # type: ignore[method-assign]
    try:
        yield
    finally:
        interpreter.run_node = original  # type: ignore[method-assign]


def _run_node(self: Any, n: fx.Node) -> Any:
    with self._set_current_node(n):
        rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
        if rule is not None:
            self._maybe_promote_node(n, rule)
    return n.meta["val"] if "val" in n.meta else fx.Interpreter.run_node(self, n)
