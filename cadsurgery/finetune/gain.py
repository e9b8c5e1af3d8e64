"""Fitting a gain mask to images without labels: what each patch loses is measured once, then regressed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.data.datasets import sample_of
from cadsurgery.finetune.batches import Samples, check_data, prepare
from cadsurgery.masks import DetailMask, FineMapSpec, GainMask, MaskProvider
from cadsurgery.masks.context import first_passes
from cadsurgery.masks.filters import mean_of_patches, resize
from cadsurgery.masks.gain import OracleMask
from cadsurgery.masks.options import SHARE, check_options
from cadsurgery.network.model import AdaptiveModel, pictures_for, whole_program
from cadsurgery.support.divergence import divergence, kind_of, maps_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating

_MEASURING = 0.8  # of the time goes into measuring at most; fitting takes seconds
_HELD_OUT = 8  # every so many-th image is not fitted to
STEPS, _BATCH, _RATE, _DECAY = 500, 8, 3e-3, 1e-2
_FLOOR = 0.05  # of the mean loss: what is added before logarithms, below which losses need not be told apart
_RARE = 0.01  # share of the pixels: classes that are rarer still do not count more
BUDGET = 0.1  # share of the patches that `captured` is told for
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the patches that `tolerances` are told for


@dataclass(frozen=True)
class GainFit:
    """Progress of a fit.

    Attributes:
        images: that were measured, the held out ones among them.
        held_out: of them, that were not fitted to.
        seconds: of processor time, all threads.
        captured: share of what the held out images lose with everything downsampled that lies in the tenth of their
            patches ranked best: by `gain`, by `detail`, and by the loss itself (`oracle`).
        tolerances: by share of all patches of all images, the `tolerance` of the mask that keeps so many high.
    """

    images: int
    held_out: int
    seconds: float
    captured: dict[str, float]
    tolerances: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def fit_gain(
    net: AdaptiveModel,
    images: Samples,
    *,
    minutes: float = 5.0,
    seed: int = 0,
    balance: float = 0.0,
    on_image: Callable[[int], None] | None = None,
) -> GainFit:
    """Fit the gain mask of a network, in place, to images without labels; nothing else of the network changes.

    Each image is run once with everything at each level. With the same seed and images, as many of them as fit the
    time, on the CPU with as many threads, the weights are the same bit for bit.

    Args:
        net: an adaptive network with a gain mask, wrapped or not.
        images: as in training; labels do not count.
        minutes: of processor time; images for which there is no time are left out, in an order that the seed decides.
        seed: of the initial weights and the order of the images.
        balance: of class scores, how much more what is lost of rare classes counts: their share of the dense network's
            predictions to the power of minus this; 0 counts all pixels alike, 1 all classes, as mean IoU does.
        on_image: called with the number of images measured so far.

    Raises:
        InvalidInput: a network that is not adaptive as a whole or without a gain mask, an optimised one, fewer than two
            images, or no time.
    """
    begin = time.process_time()
    program = whole_program(net, "has no gain mask that could be fitted")
    check_data(images, "unlabelled")
    mask = _gain_mask(net.mask)
    if mask is None or program.is_fused or not minutes > 0 or len(images) < 2:
        raise InvalidInput(
            f"there is nothing to fit: mask {net.mask.spec()!r}, {len(images)} images, {minutes} minutes.",
            why="it takes a gain mask in a network that is not optimised, two images and some time.",
            next='give the network one, net.mask = "gain | budget:fraction=0.2", and fit it before optimize().',
        )
    check_options("gain", balance=(balance, SHARE))
    device = next(net.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    fast, seen = net.optimize(), list[_Seen]()
    for index in order:
        if len(seen) >= 2 and time.process_time() - begin > 60 * minutes * _MEASURING:
            break
        inputs, _ = prepare(*sample_of(images, index), pictures_for(net), index)
        seen.append(_measure(fast, mask, [value.unsqueeze(0).to(device) for value in inputs]))
        if on_image is not None:
            on_image(len(seen))
    seen = _balance(seen, balance)
    held_out, fitted = seen[::_HELD_OUT], [one for at, one in enumerate(seen) if at % _HELD_OUT]
    with torch.inference_mode(False), torch.enable_grad():
        _fit(mask, fitted, seed)
    with torch.no_grad():
        expected = [mask.expect(one.described) for one in seen]
        smooth = [mask.smooth(losses, one.grid) for losses, one in zip(expected, seen, strict=True)]
        # High is what loses too much at every lower level.
        least = torch.cat([one.amin(1).flatten() for one in smooth]).double()
        tolerances = {f"{share:g}": float(least.quantile(1 - share)) for share in SHARES}
        captured = {
            "gain": _captured(held_out, [losses[:, -1] for losses in expected[::_HELD_OUT]]),
            "detail": _captured(held_out, [one.detail for one in held_out]),
            "oracle": _captured(held_out, [one.losses[:, -1] for one in held_out]),
        }
    return GainFit(len(seen), len(held_out), time.process_time() - begin, captured, tolerances)


@dataclass(frozen=True)
class _Seen:
    """An image, as the mask sees its patches (1, 2 C, h, w), what they lose by level (1, levels, h, w), and how
    `detail` ranks them (1, h, w); of the fine map `grid`. Of class scores also which part of the losses is at pixels of
    each class (classes, levels, h, w), and the share of these pixels (classes,); of others of one class."""

    described: Tensor
    losses: Tensor
    by_class: Tensor
    shares: Tensor
    detail: Tensor
    grid: FineMapSpec


@torch.no_grad()
def _measure(net: AdaptiveModel, mask: GainMask, inputs: list[Tensor]) -> _Seen:
    program, oracle, detail = net.program, OracleMask(), DetailMask()
    with evaluating(net):
        values = program.before(program.bind(*inputs))
        image, features = values[program.halves.image], values[program.halves.features]
        grid = program.masking(mask).grid(features)
        mask.require(features, grid)
        levels = oracle.first_passes(grid.max_level)
        outputs = {level: program.at_level(level, values) for level in levels}
        with first_passes(outputs):
            losses = oracle.losses(image, features, grid)
    return _Seen(
        mask.describe(features, grid.patch),
        losses,
        *_of_classes(outputs, losses, grid),
        mean_of_patches(detail.scores(image, features, grid), grid.patch),
        grid,
    )


def _of_classes(outputs: dict[int, Any], losses: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor]:
    """Losses and shares by predicted class, see `_Seen`."""
    if kind_of(outputs[0]) != "classes":
        return losses, torch.ones(1)
    scores = maps_of(outputs[0])[0]
    pixels = F.one_hot(scores[0].argmax(0), scores.shape[1]).movedim(-1, 0).to(scores)
    parts = [
        mean_of_patches(resize(divergence(outputs[0], outputs[level]) * pixels, grid.size), grid.patch)
        for level in sorted(outputs)[1:]
    ]
    return torch.stack(parts, 1), pixels.mean((1, 2)).cpu()


def _balance(seen: list[_Seen], power: float) -> list[_Seen]:
    """With losses that count by class; they stay what they are on average if they do not depend on the class."""
    shares = torch.stack([one.shares for one in seen]).mean(0)
    weights = (shares + _RARE) ** -power
    weights = weights / (weights * shares).sum()
    return [
        replace(one, losses=torch.einsum("c,clhw->lhw", weights.to(one.by_class), one.by_class)[None])
        for one in seen
    ]


def _fit(mask: GainMask, seen: list[_Seen], seed: int) -> None:
    """Regress the logarithms of the losses, from new weights; standardising is folded into the first layer."""
    described = torch.cat([one.described.flatten(2) for one in seen], 2)
    centre, spread = described.mean((0, 2))[:, None, None], described.std((0, 2))[:, None, None]
    spread = spread.clamp(min=1e-3 * float(spread.mean()) + torch.finfo(spread.dtype).tiny)
    losses = torch.cat([one.losses.flatten(2) for one in seen], 2)
    floor = (_FLOOR * losses.mean((0, 2))[:, None, None]).clamp(min=torch.finfo(losses.dtype).tiny)
    inputs = [(one.described - centre) / spread for one in seen]
    targets = [(one.losses + floor).log() for one in seen]
    mask.restart(seed)
    first, *_, last = (layer for layer in mask.estimator if isinstance(layer, nn.Conv2d))
    assert last.bias is not None and first.bias is not None
    dtype = first.weight.dtype
    with torch.no_grad():
        last.bias.copy_(torch.cat([one.flatten(2) for one in targets], 2).mean((0, 2)))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(mask.estimator.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=STEPS)
    for _ in range(STEPS):
        first_drawn, *others = torch.randperm(len(seen), generator=generator).tolist()
        size = inputs[first_drawn].shape
        batch = [first_drawn, *(at for at in others if inputs[at].shape == size)][:_BATCH]
        mirrored = [-1] if int(torch.randint(2, (), generator=generator)) else []
        shown, wanted = (
            torch.cat([side[at] for at in batch]).flip(mirrored).to(dtype) for side in (inputs, targets)
        )
        (mask.estimator(shown) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        weight = first.weight / spread.to(dtype)
        first.bias -= (weight * centre.to(dtype)).sum((1, 2, 3))
        first.weight.copy_(weight)


def _captured(seen: list[_Seen], ranks: list[Tensor]) -> float:
    """Share of the losses at the lowest level that lies in the patches ranked best, a share of each image's."""
    found = total = 0.0
    for one, scores in zip(seen, ranks, strict=True):
        losses = one.losses[0, -1].flatten()
        best = scores.flatten().topk(round(BUDGET * losses.numel())).indices
        found, total = found + float(losses[best].sum()), total + float(losses.sum())
    return found / total if total else 1.0


def _gain_mask(mask: MaskProvider) -> GainMask | None:
    """The gain mask, or the one inside wrappers."""
    return next((part for part in mask.modules() if isinstance(part, GainMask)), None)
