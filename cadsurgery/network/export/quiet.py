"""Exporters and quantisers without their notes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notes of other packages about their own code, and without assertions on sizes in graphs that torch
    takes apart, which ONNX has none of and which can take longer than all else."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch._dynamo.config.patch(do_not_emit_runtime_asserts=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
