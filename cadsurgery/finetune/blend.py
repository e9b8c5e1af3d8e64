"""The objective that trains a learned mask: one whole path per level, blended by a sample of the mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cadsurgery.data.samples import Samples, check_data
from cadsurgery.finetune.batches import inputs_of
from cadsurgery.finetune.learning_rates import Draw, derive_seed
from cadsurgery.finetune.objectives import Objective, copy_dense, dense_high, miss, objective
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import FineMapSpec, TrainableMask
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.paths import blend
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.processes import mean_everywhere

_REFUSAL = "can be neither blended nor calibrated"
_INSTEAD = "train it with objective mixed."


@objective("blend")
class Blend(Objective):
    """Cross entropy of whole paths, one per level, blended by a sample of the learned mask.

    The share that the mask keeps high is held at its target. As published (Hesse et al., CVPRW 2023, supplementary),
    except for the options. `network="fixed"` trains the mask alone; `"mixed"` trains the network on the mixed graph
    of inference, and the mask on the blend.
    """

    net: AdaptiveModel
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
            statistics: `separate`: batch norm keeps the statistics of the low path, as published; `shared`: of all
                paths.
            share: how the share kept high is held at its target: `balanced`, scores normalised by the statistics of
                each batch (`TrainableMask.balanced_logits`), or `published`, the squared distance of a second sample's
                share.
            weight: weight of that distance.
            network: how the network is trained: `blend`, as published, `mixed`, or not at all (`fixed`).
            distil: weight of the divergence from the initial dense high network.
            supervision: weight of the labels' cross entropy; 0 learns from the dense network alone.

        Raises:
            UnknownName: there is no such choice.
            InvalidInput: the network is not adaptive as a whole, or has no learned mask.
        """
        super().__init__(net)
        check_name("choice of statistics", statistics, ("separate", "shared"))
        check_name("choice of share", share, ("balanced", "published"))
        check_name("choice of network", network, ("blend", "mixed", "fixed"))
        if isinstance(net, AdaptiveModel):
            whole_program(net, _REFUSAL, _INSTEAD)
        mask = net.mask.find(TrainableMask) if isinstance(net, AdaptiveModel) else None  # type: ignore[type-abstract]
        if mask is None:
            raise InvalidInput(
                "objective blend has no learned mask to train.",
                where=f"network {type(net).__name__}",
                next='convert it with a learned mask: cs.adaptify(model, mask="learned:fraction=0.3").',
            )
        self.separate, self.share, self.weight = statistics == "separate", share, weight
        self.network, self.distil, self.supervision = network, distil, supervision
        self._mask = (mask,)  # in a tuple, because it is a submodule of the network, not of the objective
        self.teacher = copy_dense(net) if distil > 0 else None

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss, its parts, and the share kept high."""
        net, mask = self.net, self._mask[0]
        noise, other = (
            [torch.Generator().manual_seed(derive_seed(draw.seed, at, part)) for at in draw.positions]
            for part in (6, 7)
        )
        recorded: dict[str, Tensor] = {}

        def weigh(features: Tensor, grid: FineMapSpec) -> Tensor:
            # As published, the mask's gradient does not end at the features, unless they are fixed.
            balanced = self.share == "balanced"
            logits = (mask.balanced_logits if balanced else mask.logits)(features, grid)
            kept = mask.kept(logits, grid, None if balanced else other)
            recorded["kept"] = kept + (
                mean_everywhere(kept) - kept.detach()
            )  # value of all processes, own gradient
            return mask.sample(logits, grid, noise)

        with nullcontext() if self.network == "blend" else _fix(net, mask):
            output = blend(net, inputs, weigh, separate=self.separate)
        target = dense_high(self.teacher, inputs) if self.teacher is not None else None
        loss, parts = miss(output, labels, target, self.supervision, self.distil)
        if self.share == "published":
            loss = loss + self.weight * (recorded["kept"] - mask.fraction).square()
        if self.network == "mixed":
            mixed_loss, _ = miss(net(*inputs), labels, target, self.supervision, self.distil)
            loss, parts["mixed"] = loss + mixed_loss, mixed_loss.detach()
        return {"loss": loss, **parts, "kept": recorded["kept"].detach()}


@torch.no_grad()
def calibrate(net: AdaptiveModel, data: Samples) -> float:
    """Set the offset of a learned mask so that it keeps its fraction on these data.

    Training on crops, and averaging weights, shift the fraction.

    Args:
        net: an adaptive network, or its body, with a learned mask.
        data: samples as in training, e.g. whole images of the training data; labels are not used.

    Returns:
        The share kept high on these data afterwards.

    Raises:
        InvalidInput: there is no learned mask or no data, or the network only hosts an adaptive part.
    """
    program = whole_program(net, _REFUSAL, _INSTEAD)
    check_data(data, "calibration")
    mask = net.mask.find(TrainableMask)  # type: ignore[type-abstract]
    if mask is None:
        raise InvalidInput(
            f"mask {net.mask.spec()!r} has learned nothing that could be calibrated.",
            next='train a learned mask first: mask="learned:fraction=0.3", objective blend.',
        )
    logits: list[tuple[Tensor, FineMapSpec]] = []
    with evaluating(net):
        for index in range(len(data)):
            inputs, _ = inputs_of(net, data, index)
            features = program.before(program.bind(*inputs))[program.halves.features]
            grid = program.masking(net.mask).grid(features)
            logits.append((mask.logits(features, grid), grid))
    return mask.balance(logits)


@contextmanager
def _fix(net: AdaptiveModel, mask: TrainableMask) -> Iterator[None]:
    """Inside the `with` block, only the mask gets gradients, and batch norm collects no statistics."""
    mask_parameters = {id(parameter) for parameter in mask.parameters()}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in mask_parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        with evaluating(net):
            yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
