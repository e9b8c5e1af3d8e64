"""Silence the logs, warnings and listings of exporters and quantisers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch.fx import graph_module

from cadsurgery.support import torch_internals


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress logs and warnings in the block, and torch's runtime assertions on sizes in decomposed graphs.

    What fails is raised in our own words. ONNX has no assertions, and creating them can take most of the time."""
    with (
        without_graphs_of_errors(),
        torch_internals.compiler_options.patch(do_not_emit_runtime_asserts=True),
        warnings.catch_warnings(action="ignore"),
    ):
        yield


@contextmanager
def without_graphs_of_errors() -> Iterator[None]:
    """Suppress the graph of thousands of lines that torch logs, and prints to stderr, where torch.export raises.

    Only the two modules that print it are silent: a progress bar on stderr is drawn meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with ExitStack() as silent:
            for module in (graph_module, torch_internals.tracing_for_export):
                silent.enter_context(mock.patch.object(module, "print", lambda *_, **__: None, create=True))
            yield
    finally:
        logging.disable(before)
