"""Describe values in the messages of errors."""

from __future__ import annotations

from torch import Tensor


def describe(value: object) -> str:
    """Describe the type, dtype and shape of a value for messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # NumPy arrays
        return f"a {value.dtype} {type(value).__name__} of shape {tuple(value.shape)}"
    return " ".join(f"{type(value).__name__} {value!r}".split())[:80]
