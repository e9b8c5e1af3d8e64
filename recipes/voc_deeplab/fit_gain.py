"""Fit a gain mask to images without labels: measure the loss of each patch once, then regress it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.data.samples import Samples, check_data
from cadsurgery.finetune.balance import class_weights
from cadsurgery.finetune.batches import inputs_of
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import DetailMask, FineMapSpec
from cadsurgery.masks.context import first_passes
from cadsurgery.masks.filters import mean_of_patches, resize
from cadsurgery.masks.mask_options import SHARE, check_options
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.support.divergence import divergence, kind_of, maps_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.rows import Plain
from recipes.voc_deeplab.gain import GainMask, OracleMask

_MEASURING = 0.8  # largest share of the time for measuring; fitting takes seconds
_HELD_OUT = 8  # every 8th image is held out
STEPS, _BATCH, _RATE, _DECAY = 500, 8, 3e-3, 1e-2
_FLOOR = 0.05  # offset before logarithms, relative to the mean loss: smaller losses need not be distinguished
BUDGET = 0.1  # share of the patches for which `captured` is computed
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)  # shares of the patches for which `tolerances` are computed


@dataclass(frozen=True)
class GainFit(Plain):
    """Result of a fit.

    Attributes:
        images: number of measured images, including those held out.
        held_out: number of images held out from the fit.
        seconds: processor time of all threads.
        captured: of the held-out images' loss with everything downsampled, the share that lies in the tenth of their
            patches ranked best by `gain`, by `detail`, and by the loss itself (`oracle`).
        tolerances: by share of all patches of all images, the `tolerance` at which the mask keeps this share high.
    """

    images: int
    held_out: int
    seconds: float
    captured: dict[str, float]
    tolerances: dict[str, float]


def fit_gain(
    net: AdaptiveModel,
    images: Samples,
    *,
    minutes: float = 5.0,
    seed: int = 0,
    balance: float = 0.0,
) -> GainFit:
    """Fit the gain mask of a network, in place, to images without labels; nothing else in the network changes.

    Each image is run with everything at each level. The weights are reproducible bit for bit with the same seed, the
    same images (as many as fit the time), and on the CPU the same number of threads.

    Args:
        net: an adaptive network with a gain mask, wrapped or not.
        images: as in training; labels are not used.
        minutes: processor time; images beyond it are skipped, in an order determined by the seed.
        seed: seed of the initial weights and of the order of images.
        balance: for class scores, the power of `cadsurgery.finetune.balance`: 0 weights losses at all pixels equally,
            1 all classes that the dense network predicts, as mean IoU does.

    Raises:
        InvalidInput: the network is not adaptive as a whole, has no gain mask or is optimised; there are fewer than
            two images, or no time.
    """
    begin = time.process_time()
    program = whole_program(net, "has no gain mask that could be fitted")
    check_data(images, "unlabelled")
    mask = net.mask.find(GainMask)
    if mask is None or program.is_fused or not minutes > 0 or len(images) < 2:
        raise InvalidInput(
            f"there is nothing to fit: mask {net.mask.spec()!r}, {len(images)} images, {minutes} minutes.",
            why="fitting needs a gain mask in a network that is not optimised, two images and some time.",
            next='give the network a gain mask, net.mask = "gain | budget:fraction=0.2", and fit it before optimize().',
        )
    check_options("gain", balance=(balance, SHARE))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    fast, seen = net.optimize(), list[_Measured]()
    for index in order:
        if len(seen) >= 2 and time.process_time() - begin > 60 * minutes * _MEASURING:
            break
        inputs, _ = inputs_of(net, images, index)
        seen.append(_measure(fast, mask, inputs))
    seen = _balance(seen, balance)
    held_out, fitted = seen[::_HELD_OUT], [image for at, image in enumerate(seen) if at % _HELD_OUT]
    with torch.inference_mode(False), torch.enable_grad():
        _fit(mask, fitted, seed)
    with torch.no_grad():
        expected = [mask.expect(image.described) for image in seen]
        smooth = [mask.smooth(losses, image.grid) for losses, image in zip(expected, seen, strict=True)]
        # A patch is kept high if it loses too much at every lower level.
        least = torch.cat([losses.amin(1).flatten() for losses in smooth]).double()
        tolerances = {f"{share:g}": float(least.quantile(1 - share)) for share in SHARES}
        captured = {
            "gain": _captured(held_out, [losses[:, -1] for losses in expected[::_HELD_OUT]]),
            "detail": _captured(held_out, [image.detail for image in held_out]),
            "oracle": _captured(held_out, [image.losses[:, -1] for image in held_out]),
        }
    return GainFit(len(seen), len(held_out), time.process_time() - begin, captured, tolerances)


@dataclass(frozen=True)
class _Measured:
    """Measurements on one image with the fine map `grid`.

    Attributes:
        described: inputs of the mask, (1, 2 C, h, w) by patch.
        losses: losses by level, (1, levels, h, w).
        by_class: losses at the pixels of each class, (classes, levels, h, w); one class unless outputs are class
            scores.
        shares: share of these pixels, (classes,).
        detail: ranking by the `detail` mask, (1, h, w).
    """

    described: Tensor
    losses: Tensor
    by_class: Tensor
    shares: Tensor
    detail: Tensor
    grid: FineMapSpec


@torch.no_grad()
def _measure(net: AdaptiveModel, mask: GainMask, inputs: tuple[Tensor, ...]) -> _Measured:
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
    return _Measured(
        mask.describe(features, grid.patch),
        losses,
        *_split_by_class(outputs, losses, grid),
        mean_of_patches(detail.scores(image, features, grid), grid.patch),
        grid,
    )


def _split_by_class(outputs: dict[int, Any], losses: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor]:
    """Return losses and shares by predicted class, see `_Measured`."""
    if kind_of(outputs[0]) != "classes":
        return losses, torch.ones(1)
    scores = maps_of(outputs[0])[0]
    pixels = F.one_hot(scores[0].argmax(0), scores.shape[1]).movedim(-1, 0).to(scores)
    parts = [
        mean_of_patches(resize(divergence(outputs[0], outputs[level]) * pixels, grid.size), grid.patch)
        for level in sorted(outputs)[1:]
    ]
    return torch.stack(parts, 1), pixels.mean((1, 2)).cpu()


def _balance(seen: list[_Measured], power: float) -> list[_Measured]:
    """Weight losses by class; the mean stays the same if losses do not depend on the class."""
    shares = torch.stack([image.shares for image in seen]).mean(0)
    weights = class_weights(shares, power)
    return [
        replace(image, losses=torch.einsum("c,clhw->lhw", weights.to(image.by_class), image.by_class)[None])
        for image in seen
    ]


def _fit(mask: GainMask, seen: list[_Measured], seed: int) -> None:
    """Regress the logarithms of the losses from new weights; the standardisation is folded into the first layer."""
    described = torch.cat([image.described.flatten(2) for image in seen], 2)
    centre, spread = described.mean((0, 2))[:, None, None], described.std((0, 2))[:, None, None]
    spread = spread.clamp(min=1e-3 * float(spread.mean()) + torch.finfo(spread.dtype).tiny)
    losses = torch.cat([image.losses.flatten(2) for image in seen], 2)
    floor = (_FLOOR * losses.mean((0, 2))[:, None, None]).clamp(min=torch.finfo(losses.dtype).tiny)
    inputs = [(image.described - centre) / spread for image in seen]
    targets = [(image.losses + floor).log() for image in seen]
    mask.restart(seed)
    first, *_, last = (layer for layer in mask.estimator if isinstance(layer, nn.Conv2d))
    assert last.bias is not None and first.bias is not None
    dtype = first.weight.dtype
    with torch.no_grad():
        last.bias.copy_(torch.cat([logs.flatten(2) for logs in targets], 2).mean((0, 2)))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(mask.estimator.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=STEPS)
    for _ in range(STEPS):
        first_drawn, *others = torch.randperm(len(seen), generator=generator).tolist()
        size = inputs[first_drawn].shape
        batch = [first_drawn, *(at for at in others if inputs[at].shape == size)][:_BATCH]
        mirrored = [-1] if int(torch.randint(2, (), generator=generator)) else []
        predictors, logs = (
            torch.cat([side[at] for at in batch]).flip(mirrored).to(dtype) for side in (inputs, targets)
        )
        (mask.estimator(predictors) - logs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        weight = first.weight / spread.to(dtype)
        first.bias -= (weight * centre.to(dtype)).sum((1, 2, 3))
        first.weight.copy_(weight)


def _captured(seen: list[_Measured], ranks: list[Tensor]) -> float:
    """Return the share of the losses at the lowest level that lies in the best-ranked patches of each image."""
    captured = total = 0.0
    for image, scores in zip(seen, ranks, strict=True):
        losses = image.losses[0, -1].flatten()
        best = scores.flatten().topk(round(BUDGET * losses.numel())).indices
        captured, total = captured + float(losses[best].sum()), total + float(losses.sum())
    return captured / total if total else 1.0
