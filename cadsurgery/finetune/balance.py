"""Class balance: weights of classes with which a mean over pixels sees rare classes as mean IoU does.

A pixel of class c whose prediction is wrong costs that class about 1 / N_c of its IoU, where N_c is the number of its
pixels, and so about 1 / (C N_c) of the mean IoU over C classes. In the plain mean over all N pixels every pixel
counts 1 / N, whatever its class: a class of 0.2 % of the pixels hardly counts, and a fit may give it up for small
gains elsewhere. Weights proportional to 1 / p_c, the inverse of the class's share p_c = N_c / N of the pixels, give
each class the same say:

    w_c = (p_c + r)^-b / sum_k p_k (p_k + r)^-b

With the power b = 0 all pixels count the same, with b = 1 all classes do. The bound r = 0.01 keeps a few pixels of a
very rare class from deciding everything: no class has more than (1 + r) / r = 101 times the weight of another. The
mean weight over all pixels is 1, so that losses, and learning rates, keep their scale.

The classes are those that the dense network predicts, so no labels are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cadsurgery.support.divergence import maps_of
from cadsurgery.support.errors import InvalidInput

RARE = 0.01  # share of pixels below which a rarer class gets hardly more weight


def class_weights(shares: Tensor, power: float = 1.0) -> Tensor:
    """Return the weights of the classes (C,) for their shares of all pixels (C,), see this module.

    Args:
        shares: share of the pixels of each class; the sum is 1.
        power: 0 weights all pixels equally, 1 all classes.
    """
    weights = (shares + RARE) ** -power
    return weights / (weights * shares).sum()


def pixel_weights(target: Any, weights: Sequence[float]) -> Tensor:
    """Return the weight of the predicted class at each pixel of an output, (B, h, w).

    Args:
        target: class scores of the dense network.
        weights: weights of the classes.

    Raises:
        InvalidInput: the output is not a single map with as many classes.
    """
    maps = maps_of(target)
    if len(maps) > 1 or maps[0].shape[1] != len(weights):
        shapes = ", ".join(str(tuple(scores.shape)) for scores in maps)
        raise InvalidInput(
            f"there are {len(weights)} class_weights for outputs of {shapes}.",
            why="only class scores, a single map (B, C, H, W), can be weighted by class.",
            next="give a number for each class, or leave class_weights out.",
        )
    return maps[0].new_tensor(weights)[maps[0].argmax(1)]
