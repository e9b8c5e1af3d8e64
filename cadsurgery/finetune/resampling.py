"""Objectives of networks whose input is sampled: where to sample, and the classes of what is sampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.finetune.objectives import Objective, objective, supervised
from cadsurgery.finetune.schedule import Draw
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling import LearnedSampler, ResampledModel, uniform_locations
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating


class _OfSamples(Objective):
    """Base of both: a network whose input is sampled, and labels."""

    net: ResampledModel

    def __init__(self, net: nn.Module) -> None:
        """Create the objective.

        Raises:
            InvalidInput: a network whose input is not sampled.
        """
        super().__init__(net)
        if not isinstance(net, ResampledModel):
            raise InvalidInput(
                f"the input of {type(net).__name__} is not sampled.",
                next="make a network of it with cs.resample, or choose another objective.",
            )

    def known(self, labels: Tensor | None) -> Tensor:
        """The labels of a batch, once there are some.

        Raises:
            InvalidInput: the data has none.
        """
        if labels is None:
            raise InvalidInput(
                "there are no labels to learn from.",
                why="where to sample, and what is there, is learned from labels.",
                next="give labelled data, or sample by a mask, which needs no training.",
            )
        return labels


@objective("locations")
class Locations(_OfSamples):
    """Mean squared distance of the learned sampler's locations from those of the labels; trains the sampler alone."""

    def __init__(self, net: nn.Module) -> None:
        """Create the objective.

        Raises:
            InvalidInput: a network without a learned sampler.
        """
        super().__init__(net)
        if not isinstance(self.net.sampler, LearnedSampler):
            raise InvalidInput(
                f"sampler {self.net.sampler.spec()} learns nothing.",
                next='make the network with cs.resample(model, sampler="learned").',
            )

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Loss, before the locations are put inside the image; and that of the uniform grid."""
        sampler = self.net.sampler
        assert isinstance(sampler, LearnedSampler)
        predicted = sampler.predict(inputs[0]).float()
        wanted = sampler.options.locations_of(self.known(labels)).to(predicted)
        uniform = uniform_locations(sampler.options.grid, predicted).expand_as(wanted)
        return {"loss": F.mse_loss(predicted, wanted), "of_uniform": F.mse_loss(uniform, wanted)}


@objective("sampled")
class Sampled(_OfSamples):
    """Cross entropy of what the network gives of the sampled image, by the labels sampled there; the sampler stays."""

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Loss; of a network with exits the sum of those of all."""
        net, image, labels = self.net, inputs[0], self.known(labels)
        with torch.no_grad(), evaluating(net.sampler), labelled(labels):
            locations = net.sampler(image)
        with labelled(labels):
            output = net.call_network(image, locations, inputs)
        wanted = net.sample_labels(labels, locations)
        several = output if isinstance(output, tuple) else (output,)
        losses = [supervised(one, wanted) for one in several]
        return {"loss": sum(losses[1:], losses[0])}
