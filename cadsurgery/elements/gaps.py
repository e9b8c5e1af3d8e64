"""Filling of positions that were not computed from computed neighbours, with a 7 x 7 Gaussian.

Two published methods compute a map at some positions only and interpolate the others, with different weights:

    prediction at any time (Liu et al. 2022)     g(d) = exp(-w^2 |d|^2), no centre, divided by a constant:
                                                 x(p) = sum_d g(d) x(p + d) / (sum g + e)
    sampling and interpolation (Xie et al. 2020) g(d) = w^2 / (2 pi) exp(-w^2 |d|^2 / 2), normalised:
                                                 x(p) = sum_d g(d) m(p + d) x(p + d) / (sum_d g(d) m(p + d) + e)

where m is the computed share of a position (0..1), e = 1e-5, and positions outside the map contribute nothing.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_map, as_rows
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.backends.works import Filling
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running

REACH = 3  # positions to each side: 7 x 7
LEAST = 1e-5  # e, added to the sum of the weights
_ONE_RESOLUTION = Geometry((), fill="nearest")


def gaussian_fill(
    x: Tensor, mask: Tensor, width: float | Tensor, normalised: bool = False, baseline: Tensor | None = None
) -> Tensor:
    """Fill the positions of a map outside a mask from positions inside: m x + (1 - m) G * (m x); see this module.

    Args:
        x: (B, C, H, W). Values where the mask is zero are not read.
        mask: (B, H, W), bool or shares in 0..1; a full mask returns `x` bit for bit.
        width: w, a number or a tensor without dimensions. A larger w gives a narrower Gaussian; both methods
            start from 3. Gradients flow to it.
        normalised: divide by the weights of the computed neighbours rather than by a constant, see this module.
        baseline: (C,), what values are measured from: positions far from all computed positions get it; default zero.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    if x.dim() != 4 or mask.shape != (x.shape[0], *x.shape[2:]) or mask.dtype.is_complex:
        raise InvalidInput(
            f"a map (B, C, H, W) and a mask (B, H, W) are expected, not {describe(x)} and {describe(mask)}.",
            next="give the mask one value for each position of the map, bool or in 0..1.",
        )
    if isinstance(width, Tensor) and width.dim():
        raise InvalidInput(
            f"the width is {describe(width)}.", next="give one number, or a tensor without dimensions."
        )
    is_hard = mask.dtype == torch.bool
    there = mask if is_hard else mask > 0
    whole = resolution(mask.shape[0], mask.shape[1], mask.shape[2], x.device)
    source = whole.choose(there)
    if source.count == whole.count and is_hard and not (isinstance(width, Tensor) and width.requires_grad):
        return x
    is_soft = not is_hard and (mask.requires_grad or source.count == whole.count)
    if is_soft and normalised and baseline is None:  # every position has a share, as in the training of gates
        return _fill_by_convolution(x, mask.unsqueeze(1).to(x), _gaussian(width, normalised, x))
    rows = as_rows(x).index_select(0, source.anchors)
    shares = None if is_hard else mask.flatten()[source.anchors]
    filled = fill_gaps(Elements(rows, source), whole, width, normalised, baseline, shares).rows
    return as_map(filled, mask.shape[0], (mask.shape[1], mask.shape[2]))


def _fill_by_convolution(x: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """Fill a map (B, C, H, W) whose positions all have a share (B, 1, H, W). The normalised Gaussian is separable, so
    two depthwise convolutions, one along each axis, are enough."""
    reach = weights.shape[0] // 2
    line = weights[reach].to(x) / weights[reach, reach].to(x).sqrt()

    def spread(values: Tensor) -> Tensor:
        channels = values.shape[1]
        taps = line.expand(channels, 1, 1, -1)
        values = F.conv2d(values, taps, padding=(0, reach), groups=channels)
        return F.conv2d(values, taps.transpose(2, 3), padding=(reach, 0), groups=channels)

    own = shares * x
    return own + (1 - shares) * spread(own) / (spread(shares) + LEAST)


def resolution(batch: int, height: int, width: int, device: torch.device | str = "cpu") -> Lattice:
    """Return the lattice of maps with a single resolution; its method `choose` selects a part."""
    return _ONE_RESOLUTION.uniform(0, batch, (height, width), device)


def fill_gaps(
    x: Elements,
    target: Lattice,
    width: float | Tensor,
    normalised: bool = False,
    baseline: Tensor | None = None,
    shares: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Elements:
    """Fill the elements of `target` from computed elements of the same single-resolution lattice; see `gaussian_fill`.

    Args:
        x: the computed elements.
        target: another part of the same lattice, or all of it.
        width: width parameter w of the Gaussian.
        normalised: divide by the weights of the computed neighbours.
        baseline: (C,), what values are measured from; default zero.
        shares: (N,) in 0..1, the computed share of each element; default 1.
        residual: (T, C), added to the filled elements.
        activation: applied last.
    """
    weights = _gaussian(width, normalised, x.rows)
    least = LEAST if normalised else 0.0
    out = compute(Filling(x.rows, x.lattice, target, weights, least, baseline, shares, residual, activation))
    if isinstance(width, Tensor) and width.requires_grad:
        everywhere = torch.ones_like(out, dtype=torch.bool)
        out = torch.where(everywhere, out, width.to(out))  # its gradient is zero, not missing
    return Elements(out, target)


def _gaussian(width: float | Tensor, normalised: bool, like: Tensor) -> Tensor:
    """Return the weights (k, k) of the window without outer rings whose total weight is below rounding error."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(width, Tensor) and (width.requires_grad or running.in_graph):
        return _weights(width.to(like.device, dtype), normalised)
    return _weights_of(float(width), normalised, dtype, like.device)


@cache
def _weights_of(width: float, normalised: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _weights(torch.tensor(width, dtype=dtype, device=device), normalised)


def _weights(width: Tensor, normalised: bool) -> Tensor:
    steps = torch.arange(-REACH, REACH + 1, device=width.device)
    squared, apart = width.square(), (steps.square().unsqueeze(1) + steps.square()).to(width.dtype)
    if normalised:
        weights, least = squared / (2 * math.pi) * torch.exp(-squared * apart / 2), LEAST
    else:
        weights = torch.where(apart > 0, torch.exp(-squared * apart), 0)
        weights, least = weights / (weights.sum() + LEAST), 1.0
    if running.in_graph:
        return weights
    with torch.no_grad():
        ring = torch.maximum(steps.abs().unsqueeze(1), steps.abs())
        negligible = torch.finfo(width.dtype).eps * least
        beyond = [float(torch.where(ring > reach, weights, 0).sum()) for reach in range(1, REACH)]
    reach = next((r for r, mass in enumerate(beyond, 1) if mass <= negligible), REACH)
    inside = slice(REACH - reach, REACH + reach + 1)
    return weights[inside, inside]
