"""Labels are numbers of classes: whole numbers, in whatever type they come."""

from __future__ import annotations

import torch
from torch import Tensor

from cadsurgery.support.errors import InvalidInput


def as_classes(labels: Tensor, where: str = "", what: str = "labels") -> Tensor:
    """Return labels, or predicted classes, as int64; floating-point numbers may be whole numbers only.

    Args:
        labels: any shape.
        where: where they are, for the message.
        what: what they are, for the message.

    Raises:
        InvalidInput: a value is no whole number, such as a class divided by 255.
    """
    if labels.dtype == torch.int64:
        return labels
    if labels.is_complex() or labels.is_quantized:
        raise _refusal(f"the {what} are {labels.dtype}.", where)
    if labels.is_floating_point():
        broken = labels[labels != labels.round()]  # NaN is one of these
        broken = broken if broken.numel() else labels[labels.isinf()]
        if broken.numel():
            raise _refusal(f"the {what} hold {float(broken[0]):.6g}, which is no class.", where)
    return labels.long()


def _refusal(what: str, where: str) -> InvalidInput:
    return InvalidInput(
        what,
        where=where,
        why="a class is a whole number. ToTensor divides the values of a picture by 255, those of labels as well: "
        "class 3 becomes 0.0118.",
        next="read labels without it: torchvision.transforms.PILToTensor(), or torch.from_numpy(np.array(labels)).",
    )
