"""Round values to 8 bits: weights by the scale with the smallest error, activations by their range."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST, LARGEST_WEIGHT = 255, 127
# Largest sum of two 8-bit weights for which the sum of two products with activations in 0..255 fits into 16 bits. x86
# processors without VNNI add two neighbouring products in 16 bits, by vpmaddubsw, which saturates.
LARGEST_PAIR = (1 << 15) // MOST
_EXACT = 1e-8  # mean squared error of integers that only single precision causes
_CACHED = 1 << 18  # weights rounded at a time, so that they stay in the cache while all scales are tried


class QuantParams(NamedTuple):
    """Quantisation parameters: 8-bit q in 0..255 stands for the value (q - zero) scale.

    Attributes:
        scale: step between two neighbouring values.
        zero: zero point, the q that stands for 0; 0 is always exactly representable.
    """

    scale: float
    zero: int

    @classmethod
    def of_range(cls, low: float, high: float) -> QuantParams:
        """Return parameters for the range from `low` to `high`, extended to contain zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / MOST or 1.0
        return cls(scale, max(0, min(MOST, round(-low / scale))))


def round_weight(weight: Tensor, limited: Literal["any", "adjacent"] | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight (O, ...) to integers in -127..127 with a scale (O,) per output channel.

    For each output, 64 candidate scales make its largest weight an integer of 64 to 127; the one with the smallest
    squared error is used. The gain is largest for few taps and channels; weights that were quantised to 8 bits before,
    with any scale, are kept exactly, with "any" if they are within the limit.

    Args:
        weight: floating-point weights, outputs first.
        limited: integers of an output that together are at most `LARGEST_PAIR`, so that products of two can be added in
            16 bits: "any" two, or two "adjacent" channels (the first with the second, the third with the fourth, ...)
            of equal sign at the same tap; this package's kernels use 32 bits beyond it. A largest weight of 64
            is always possible.
    """
    flat = weight.detach().flatten(1)
    largest = flat.abs().amax(1)
    largest = torch.where(largest > 0, largest, 1.0)
    tried = torch.arange(LARGEST_WEIGHT, LARGEST_WEIGHT // 2, -1)
    fitting = _find_fitting(weight.detach(), largest, tried, limited)
    numbers = torch.empty_like(largest)
    count = max(1, _CACHED // flat.shape[1])
    parts = (*(one.split(count) for one in (numbers, flat, largest)), fitting.split(count, 1))
    for rows, part, most, fits in zip(*parts, strict=True):
        share, least = part / most.unsqueeze(1), torch.full_like(most, torch.inf)
        for number, is_fitting in zip(tried.tolist(), fits, strict=True):
            # Nothing else is of use with "any"; "adjacent" keeps exact ones that do not fit.
            places = is_fitting.nonzero().flatten() if limited == "any" else slice(None)
            values, error = share[places] * number, torch.full_like(most, torch.inf)
            error[places] = values.sub_(values.round()).square_().sum(1).div_(number**2)
            if limited == "adjacent":  # exact ones may exceed the limit, unless one within it is exact, too
                is_exact = error < _EXACT * part.shape[1] / number**2
                error = torch.where(is_exact & ~is_fitting, error.clamp_min(_EXACT / number**2), error)
                is_fitting = is_fitting | is_exact
            nearer = (error < least).logical_and_(is_fitting)
            rows.masked_fill_(nearer, float(number))
            least = torch.where(nearer, error, least)
    scale = largest.double() / numbers
    whole = (flat.double() / scale.unsqueeze(1)).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    return whole.to(torch.int8).view(weight.shape).contiguous(), scale.float()


def _find_fitting(weight: Tensor, largest: Tensor, tried: Tensor, limited: str | None) -> Tensor:
    """Return which of the tried largest integers keep each output within a limit, (tried, O)."""
    flat = weight.flatten(1)
    if limited is None:
        return torch.ones(len(tried), len(flat), dtype=torch.bool)
    if limited == "adjacent":
        by_tap = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        padded = F.pad(by_tap, (0, 0, 0, by_tap.shape[1] % 2))
        ends = torch.stack([sign * (sign * padded).clamp_min(0) for sign in (1, -1)])
        sums = ends.unflatten(2, (-1, 2)).sum(3).abs().flatten(2).amax((0, 2))
        # Each of the two is rounded by at most a half. Two weights of 64 fit exactly.
        most = sums.double() / largest * tried.view(-1, 1) + 1
        return (most <= LARGEST_PAIR) | (tried == tried[-1]).view(-1, 1)
    # Rounding keeps the order, so only the two largest and the two smallest weights have to be checked.
    pairs = torch.stack([flat.topk(min(2, flat.shape[1]), largest=end).values for end in (True, False)], 1)
    # The same division as for the weights, so that ties are rounded the same way.
    in_scale = pairs.double() / (largest.double() / tried.view(-1, 1)).view(len(tried), -1, 1, 1)
    return in_scale.round().sum(3).abs().amax(2) <= LARGEST_PAIR


def mean_error(error: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """Return the mean (O,) of what an error of the weight adds to the sums of a convolution.

    Args:
        error: error of the weight, (O, C / groups, ...), taps last.
        mean: (C,), mean of the input in each channel.
        groups: channel groups.
    """
    by_input = error.double().flatten(2).sum(2) if error.dim() > 2 else error.double()
    return (by_input.unflatten(0, (groups, -1)) * mean.view(groups, 1, -1)).sum(2).flatten()
