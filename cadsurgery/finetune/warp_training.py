"""Objectives of networks with a sampled input: sampling locations, and classes of the sampled image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.finetune.learning_rates import Draw
from cadsurgery.finetune.objectives import Objective, objective, supervised
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling import LearnedSampler, ResampledModel, uniform_locations
from cadsurgery.support.errors import InvalidInput


class _SampledObjective(Objective):
    """Base of both objectives: needs a network with a sampled input, and labels."""

    net: ResampledModel
    needs = (ResampledModel, "has an input that is not sampled", "cs.resample")

    def known(self, labels: Tensor | None) -> Tensor:
        """Return the labels of a batch, which must exist.

        Raises:
            InvalidInput: the data have no labels.
        """
        if labels is None:
            raise InvalidInput(
                "there are no labels to learn from.",
                why="sampling locations and classes are learned from labels.",
                next="give labelled data, or sample by a mask, which needs no training.",
            )
        return labels


@objective("locations")
class Locations(_SampledObjective):
    """Mean squared distance of the learned sampler's locations from their targets; trains the sampler alone."""

    def __init__(self, net: nn.Module) -> None:
        """Create the objective.

        Raises:
            InvalidInput: the network has no learned sampler.
        """
        super().__init__(net)
        if not isinstance(self.net.sampler, LearnedSampler):
            raise InvalidInput(
                f"sampler {self.net.sampler.spec()} learns nothing.",
                next='make the network with cs.resample(model, sampler="learned").',
            )

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss, before the locations are clamped to the image, and the loss of the uniform grid."""
        sampler = self.net.sampler
        assert isinstance(sampler, LearnedSampler)
        predicted = sampler.predict(inputs[0]).float()
        targets = sampler.options.locations_of(self.known(labels)).to(predicted)
        uniform = uniform_locations(sampler.options.grid, predicted).expand_as(targets)
        return {"loss": F.mse_loss(predicted, targets), "of_uniform": F.mse_loss(uniform, targets)}


@objective("sampled")
class Sampled(_SampledObjective):
    """Cross entropy on the sampled image, with labels sampled at the same locations; the sampler is not trained."""

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss; for a network with exits, the sum over the exits."""
        net, image, labels = self.net, inputs[0], self.known(labels)
        with torch.no_grad(), evaluating(net.sampler), labelled(labels):
            locations = net.sampler(image)
        with labelled(labels):
            output = net.call_network(image, locations, inputs)
        sampled_labels = net.sample_labels(labels, locations)
        outputs = output if isinstance(output, tuple) else (output,)
        losses = [supervised(prediction, sampled_labels) for prediction in outputs]
        return {"loss": sum(losses[1:], losses[0])}
