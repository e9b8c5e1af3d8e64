"""Silence the logs, warnings and listings of exporters and quantisers."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress logs and warnings in the block, and torch's runtime assertions on sizes in decomposed graphs.

    What fails is raised in our own words. ONNX has no assertions, and creating them can take most of the time."""
    with (
        without_graphs_of_errors(),
        torch._dynamo.config.patch(do_not_emit_runtime_asserts=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_graphs_of_errors() -> Iterator[None]:
    """Suppress the graph of thousands of lines that torch.export logs, and prints to stderr, where it raises.

    What else is printed there in the block appears behind it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()) as printed:
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        logging.disable(before)
