"""How a loss of fidelity relates to a loss of mIoU, for pictures without labels.

Measured on three trained networks, one of them at two output strides, with all settings of `recommend` on 50 to 60
labelled pictures each: smaller and larger pictures, other output strides, conversions. The share of mIoU that a setting
loses is about 1.17 (1 - fidelity)^3, whatever the setting. Fitted on the other networks, the relation misses the losses
of CamVid's MobileNetV2 by .021 of its mIoU (root mean square), of ESPNet by .011, of VOC's DeepLab by .031 at output
stride 8 and by .021 at 16, where the measured losses themselves have errors of .009, .007, .031 and .030:
docs/currency.txt, by `python -m benchmarks.currency DATA FOLDER --pictures 60 --minutes 90`.

Floors lose more: ESPNet loses .61 of its lack of fidelity on CamVid (docs/currency.txt), since what a floor
changes is not beside boundaries alone. So for floors the whole lack of fidelity is expected to be lost.

Why a power: a small loss of fidelity is of pixels beside boundaries, where the network as given is wrong about as often
as the setting, and labels see little of it; a large one is of whole objects.
"""

from __future__ import annotations

SCALE, POWER = 1.17, 3
LEFT = 0.02  # of mIoU: what the relation misses on a network that it was not fitted on


def expected_loss(fidelity: float, error: float, *, has_floor: bool = False) -> tuple[float, float]:
    """Return the share of mIoU that is expected to be lost, and the standard error of that.

    Args:
        fidelity: mean IoU against the classes of the network as given, 0..1.
        error: standard error of the fidelity.
        has_floor: true for a conversion with floors.
    """
    by_pictures = error_by_pictures(fidelity, error, has_floor=has_floor)
    if has_floor:
        return 1 - fidelity, by_pictures
    lost = SCALE * (1 - fidelity) ** POWER
    return lost, (by_pictures**2 + min(LEFT, lost) ** 2) ** 0.5


def error_by_pictures(fidelity: float, error: float, *, has_floor: bool = False) -> float:
    """Return the part of the standard error of an expected loss that more pictures make smaller.

    Args:
        fidelity: mean IoU against the classes of the network as given, 0..1.
        error: standard error of the fidelity.
        has_floor: true for a conversion with floors.
    """
    if has_floor:
        return error
    return SCALE * POWER * (1 - fidelity) ** (POWER - 1) * error
