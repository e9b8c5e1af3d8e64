"""Silence the logs and warnings of exporters and quantisers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress logs and warnings in the block, and torch's runtime assertions on sizes in decomposed graphs.

    What fails is raised in our own words. ONNX has no assertions, and creating them can take most of the time."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # of an error torch would log the whole graph
    try:
        with torch._dynamo.config.patch(do_not_emit_runtime_asserts=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
