"""How a loss of fidelity relates to a loss of mIoU, for pictures without labels.

Preliminary: the relation is that of one network (CamVid's MobileNetV2 at output stride 8), on which settings with
1 - fidelity of .15 lose 1 to 4 % of their mIoU, of .3 about 9 %, and smaller pictures more. `benchmarks/currency.py`
measures it on other networks, too; with the 12 pictures of VOC that were tried, errors are larger than what is to be
told. A choice without labels is therefore said to be uncertain.
"""

from __future__ import annotations

SCALE, POWER = 0.8, 2
LEFT = 0.02  # of mIoU: how much settings of the same fidelity differ


def expected_loss(fidelity: float, error: float) -> tuple[float, float]:
    """Return the share of mIoU that is expected to be lost, and the standard error of that.

    Args:
        fidelity: mean IoU against the classes of the network as given, 0..1.
        error: standard error of the fidelity.
    """
    lack = 1 - fidelity
    lost = SCALE * lack**POWER
    slope = SCALE * POWER * lack ** (POWER - 1)
    return lost, ((slope * error) ** 2 + min(LEFT, lost) ** 2) ** 0.5
