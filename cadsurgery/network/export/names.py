"""Names for the outputs of a network, from the structure in which it returns them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path


def output_names(output: Any) -> tuple[str, ...]:
    """A name for each tensor: that of its key or field, a number in a list, `output` alone."""
    leaves, _ = tree_flatten_with_path(output)
    return tuple(
        "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        or "output"
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    )
