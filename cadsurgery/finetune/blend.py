"""The objective that trains a learned mask: whole paths, blended by a sample of the mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cadsurgery.data.datasets import sample_of
from cadsurgery.finetune.batches import Samples, check_data, prepare
from cadsurgery.finetune.objectives import Objective, dense_high, miss, objective
from cadsurgery.finetune.schedule import Draw, derive_seed
from cadsurgery.masks import FineMapSpec, LearnedMask, MaskProvider
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.paths import blend
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.processes import mean_everywhere
from cadsurgery.surgery.trace import evaluating


@objective("blend")
class Blend(Objective):
    """Cross entropy of whole paths, one per level, blended by a sample of the learned mask, whose share kept high is
    held at its target.

    As published (Hesse et al., CVPRW 2023, supplementary), but for what the options say. `network="fixed"` trains the
    mask alone, `"mixed"` trains the network on the mixed graph it is used with and the mask on the blend.
    """

    constants = ("teacher",)

    def __init__(
        self,
        net: nn.Module,
        statistics: str = "separate",
        share: str = "balanced",
        weight: float = 1.0,
        network: str = "blend",
        distil: float = 0.0,
        supervision: float = 1.0,
    ) -> None:
        """Create the objective.

        Args:
            net: an adaptive network with a learned mask, wrapped or not.
            statistics: `separate`: batch norm keeps those of the low path, as published; `shared`: of all paths.
            share: what holds the share kept high at its target: `balanced`, scores by the statistics of each batch
                (`LearnedMask.balanced_logits`), or `published`, the squared distance of a second sample's share.
            weight: of that distance.
            network: what trains the network: `blend`, as published, `mixed`, or nothing (`fixed`).
            distil: weight of the divergence from the dense high network as it started.
            supervision: weight of the labels' cross entropy; 0 learns from the dense network alone.

        Raises:
            UnknownName: no such choice.
            InvalidInput: no network that is adaptive as a whole, or one without a learned mask.
        """
        super().__init__(net)
        check_name("choice of statistics", statistics, ("separate", "shared"))
        check_name("choice of share", share, ("balanced", "published"))
        check_name("choice of network", network, ("blend", "mixed", "fixed"))
        _check_whole(net)
        mask = _learned_mask(net.mask) if isinstance(net, AdaptiveModel) else None
        if mask is None:
            raise InvalidInput(
                "objective blend has no learned mask to train.",
                where=f"network {type(net).__name__}",
                next='convert it with a learned mask: cs.adaptify(model, mask="learned:fraction=0.3").',
            )
        self.separate, self.share, self.weight = statistics == "separate", share, weight
        self.network, self.distil, self.supervision = network, distil, supervision
        self._mask = (mask,)  # a tuple: it is a part of the network, not of the objective
        self.teacher: nn.Module | None = None
        if distil > 0:
            self.teacher = copy.deepcopy(net).requires_grad_(False)

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Loss, its parts, and the share kept high."""
        net, mask = self.net, self._mask[0]
        assert isinstance(net, AdaptiveModel)
        noise, other = (
            [torch.Generator().manual_seed(derive_seed(draw.seed, at, part)) for at in draw.positions]
            for part in (6, 7)
        )
        noted: dict[str, Tensor] = {}

        def weigh(features: Tensor, grid: FineMapSpec) -> Tensor:
            # As published, the mask's gradient does not end at the features, unless they are fixed.
            balanced = self.share == "balanced"
            logits = (mask.balanced_logits if balanced else mask.logits)(features, grid)
            kept = mask.kept(logits, grid, None if balanced else other)
            noted["kept"] = kept + (mean_everywhere(kept) - kept.detach())  # of all processes, own gradient
            return mask.sample(logits, grid, noise)

        with nullcontext() if self.network == "blend" else _fix(net, mask):
            output = blend(net, inputs, weigh, separate=self.separate)
        target = dense_high(self.teacher, inputs) if self.teacher is not None else None
        loss, parts = miss(output, labels, target, self.supervision, self.distil)
        if self.share == "published":
            loss = loss + self.weight * (noted["kept"] - mask.fraction).square()
        if self.network == "mixed":
            of_mixed, _ = miss(net(*inputs), labels, target, self.supervision, self.distil)
            loss, parts["mixed"] = loss + of_mixed, of_mixed.detach()
        return {"loss": loss, **parts, "kept": noted["kept"].detach()}


@torch.no_grad()
def calibrate(net: AdaptiveModel, data: Samples) -> float:
    """Set the offset of a learned mask so that it keeps its fraction of some data; training on crops, or averaging
    weights, moves it.

    Args:
        net: an adaptive network, or the body of one, with a learned mask.
        data: samples as in training, e.g. whole images of the training data; labels do not count.

    Returns:
        The share kept high of these data afterwards.

    Raises:
        InvalidInput: no learned mask, no data, or a network that only hosts an adaptive part.
    """
    _check_whole(net)
    check_data(data, "calibration")
    mask = _learned_mask(net.mask)
    if mask is None:
        raise InvalidInput(
            f"mask {net.mask.spec()!r} has learned nothing that could be calibrated.",
            next='train a learned mask first: mask="learned:fraction=0.3", objective blend.',
        )
    program, source = net.program, pictures_for(net)
    device = next(mask.parameters(), torch.empty(0)).device
    logits: list[tuple[Tensor, FineMapSpec]] = []
    with evaluating(net):
        for index in range(len(data)):
            inputs, _ = prepare(*sample_of(data, index), source, index)
            arguments = program.bind(*(value.unsqueeze(0).to(device) for value in inputs))
            features = program.before(arguments)[program.halves.features]
            grid = program.masking(net.mask).grid(features)
            logits.append((mask.logits(features, grid), grid))
    return mask.balance(logits)


def _check_whole(net: nn.Module) -> None:
    """Refuse a network without halves of its own."""
    if isinstance(net, AdaptiveModel) and net.hosts_part:
        raise InvalidInput(
            "a network that only hosts an adaptive part can be neither blended nor calibrated.",
            next="train it with objective mixed.",
        )


def _learned_mask(mask: MaskProvider) -> LearnedMask | None:
    """The learned mask, or the one inside wrappers."""
    if isinstance(mask, LearnedMask):
        return mask
    return next((part for part in map(_learned_mask, mask.parts) if part is not None), None)


@contextmanager
def _fix(net: AdaptiveModel, mask: LearnedMask) -> Iterator[None]:
    """Within, only the mask's parameters take part in gradients, and batch norm keeps no statistics."""
    of_mask = {id(parameter) for parameter in mask.parameters()}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in of_mask]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        with evaluating(net):
            yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
