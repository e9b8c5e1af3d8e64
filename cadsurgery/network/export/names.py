"""Name the outputs of a network by the structure in which it returns them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cadsurgery.support.torch_internals import tree_flatten_with_path


def output_names(output: Any) -> tuple[str, ...]:
    """Return a name for each tensor: its key, field or number in a list; `output` for a single tensor."""
    leaves, _ = tree_flatten_with_path(output)
    return tuple(
        "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        or "output"
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    )
