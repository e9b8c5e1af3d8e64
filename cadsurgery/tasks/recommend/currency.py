"""How a loss of fidelity relates to a loss of mIoU, for pictures without labels.

Preliminary: the relation is that of one network, CamVid's MobileNetV2 at output stride 8. Its settings with
1 - fidelity of .15 lose .5 to 3 % of their mIoU on 233 pictures (recipes/camvid_mobilenetv2), those of .3 about 9 %
on twelve (`python -m benchmarks.currency DATA FOLDER --pictures 12 --minutes 6`, which takes 1 - fidelity too). On
twelve pictures of VOC the standard errors, 5 to 17 %, are larger than the losses. Each report therefore calls a
choice without labels uncertain.
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
