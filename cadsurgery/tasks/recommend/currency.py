"""How a loss of fidelity relates to a loss of mIoU, fitted on trained networks with labels.

`benchmarks/currency.py` measures both for every setting of the trained networks and fits, over all of them,

    lost share of mIoU = a (1 - fidelity),

with the root mean square of what is left. How well that predicts is told by the networks it was not fitted on, one left
out at a time: docs/recommend.md has the figures.
"""

from __future__ import annotations

LOSS_FOR_LACK = 0.2  # a
LEFT = 0.01  # root mean square, of networks left out


def expected_loss(fidelity: float, error: float) -> tuple[float, float]:
    """The share of mIoU that is expected to be lost, and its error.

    Args:
        fidelity: mean IoU against the classes of the network as given.
        error: standard error of that.
    """
    lost = LOSS_FOR_LACK * (1 - fidelity)
    return lost, ((LOSS_FOR_LACK * error) ** 2 + (LEFT if lost else 0.0) ** 2) ** 0.5
