"""Training objectives: modules that run the network on a batch and return its loss.

An objective owns the network (`net`) so that a distributed wrapper around it sees every parameter it uses. A new
objective is a subclass decorated with `@objective(name)`; its constructor's options are those of the settings.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.labels import as_classes
from cadsurgery.elements.sizes import divide_up
from cadsurgery.finetune.balance import pixel_weights
from cadsurgery.finetune.learning_rates import Draw
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import Budget, FineMapSpec, MaskProvider, labelled, resolve_mask
from cadsurgery.masks.basic import UniformMask
from cadsurgery.masks.filters import on_samples
from cadsurgery.methods.anytime import AnytimeModel
from cadsurgery.methods.resampling import LearnedSampler, ResampledModel, uniform_locations
from cadsurgery.methods.sampling import SampledModel
from cadsurgery.methods.sampling.gates import DECAY
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.divergence import KINDS, Kind, class_scores, divergence, maps_of, resize
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.plain import docstring_of
from cadsurgery.support.processes import mean_everywhere
from cadsurgery.support.provenance import check_unclaimed

AUXILIARY_WEIGHT = 0.5  # as in torchvision's reference training of segmentation networks

OBJECTIVES: dict[str, type[Objective]] = {}
O = TypeVar("O", bound="type[Objective]")  # noqa: E741


class Objective(nn.Module):
    """Base of all objectives.

    Attributes:
        constants: names of children that never change, e.g. a teacher; checkpoints omit them, and a resumed run
            creates them again from the starting weights.
        needs: class of the network that it trains, what another network lacks, and the method that makes one; None
            for any network.
    """

    constants: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[type[nn.Module], str, str] | None] = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if self.needs is not None and not isinstance(net, self.needs[0]):
            raise InvalidInput(
                f"{type(net).__name__} {self.needs[1]}.",
                next=f"convert it first with {self.needs[2]}, or choose another objective.",
            )
        self.net = net

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, without those of constants."""
        return {name: value for name, value in self.own_tensors().items() if isinstance(value, nn.Parameter)}

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers by name, without those of constants; checkpoints contain these."""
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        return {name: value for name, value in tensors if name.partition(".")[0] not in self.constants}

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Compute scalars of one batch: `loss`, which is minimised, and others for the log, e.g. `active_fraction`.

        Args:
            inputs: arguments of the network, each (B, ...).
            labels: (B, H, W) int64, 255 where ignored; None for data without labels.
            draw: the random state of the step, the only permitted source of random numbers.
        """
        raise NotImplementedError

    def active_fraction(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the active fraction of the network's last call as a scalar; nothing for a dense network."""
        if not isinstance(self.net, AdaptiveModel):
            return {}
        return {"active_fraction": loss.new_tensor(self.net.active_fraction)}


def objective(name: str) -> Callable[[O], O]:
    """Register a class of objectives under a name.

    A class that is defined again, e.g. by running a notebook cell twice, replaces the earlier definition.

    Raises:
        ValueError: another class has this name.
    """

    def register(kind: O) -> O:
        check_unclaimed("objective", name, kind, OBJECTIVES)
        OBJECTIVES[name] = kind
        return kind

    return register


def list_objectives() -> dict[str, str]:
    """Return the name and the first line of the docstring of every objective."""
    return {name: docstring_of(kind).partition("\n")[0] for name, kind in OBJECTIVES.items()}


def make_objective(name: str, net: nn.Module, options: Mapping[str, Any]) -> Objective:
    """Create the objective with this name for a network.

    Raises:
        UnknownName: there is no such objective or option.
        InvalidInput: an option's value, or the network, does not fit.
    """
    check_name("objective", name, OBJECTIVES)
    names = list(inspect.signature(OBJECTIVES[name]).parameters)[1:]
    for option in options:
        check_name(f"option of objective {name!r}", option, names)
    return OBJECTIVES[name](net, **options)


@objective("mixed")
class Mixed(Objective):
    """Cross entropy of the network under its own mask, i.e. at mixed resolution as in inference."""

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss and the active fraction."""
        loss, _ = miss(self.net(*inputs), labels)
        return {"loss": loss, **self.active_fraction(loss)}


@objective("divergence")
class Divergence(Objective):
    """Divergence of the network under its own mask from the dense high network: learns from images without labels.

    The teacher is the initial network (`initial`) or the current one (`self`), with everything kept high, in
    evaluation mode. Outputs are class scores or other maps, see `cadsurgery.support.divergence`. The mean over pixels
    hardly sees rare classes; with `class_weights` they count more, see `cadsurgery.finetune.balance`. If there are
    labels, their cross entropy is added.
    """

    net: AdaptiveModel
    constants = ("teacher",)
    needs = (AdaptiveModel, "has no dense network beside it, whose outputs it could learn", "cs.adaptify")

    def __init__(
        self,
        net: nn.Module,
        teacher: str = "initial",
        temperature: float = 1.0,
        weight: float = 1.0,
        supervision: float = 0.0,
        kind: Kind = "auto",
        class_weights: Sequence[float] = (),
    ) -> None:
        """Create the objective.

        Args:
            net: an adaptive network.
            teacher: `initial` or `self`.
            temperature: temperature that softens the class scores of both networks.
            weight: weight of the divergence.
            supervision: weight of the labels' cross entropy.
            kind: kind of the outputs, `classes`, `values` or `auto`.
            class_weights: weights of the classes that the teacher predicts in the divergence; default 1 each.

        Raises:
            InvalidInput: a value is out of range, or the network is not adaptive.
            UnknownName: there is no such teacher or kind.
        """
        super().__init__(net)
        _check_numbers({"class_weights": min(class_weights, default=0.0)}, {"temperature": temperature})
        check_name("teacher", teacher, ("initial", "self"))
        check_name("kind of output", kind, KINDS)
        self.miss = partial(
            miss,
            supervision=supervision,
            weight=weight,
            temperature=temperature,
            kind=kind,
            class_weights=tuple(class_weights),
        )
        self.teacher = copy_dense(self.net) if teacher == "initial" else None

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss, its parts, and the active fraction."""
        output = self.net(*inputs, mask=self.mask(draw))
        fraction = self.active_fraction(maps_of(output)[0])
        # The teacher runs after the student, because autocast caches weights, and those cast here have no gradient.
        target = dense_high(self.net if self.teacher is None else self.teacher, inputs)
        loss, parts = self.miss(output, labels, target)
        return {"loss": loss, **parts, **fraction}

    def mask(self, draw: Draw) -> MaskProvider | None:
        """Return the mask of a step; None for the network's own."""
        return None


@objective("any-budget")
class AnyBudget(Divergence):
    """Divergence from the dense high network, and cross entropy of labels, at another budget in each step.

    The result is one network for all budgets.

    A budget keeps the patches that a ranking scores highest. Budgets 0 and 1 are drawn more often than others, as in
    the sandwich rule of slimmable networks (Yu & Huang, ICCV 2019).
    """

    def __init__(
        self,
        net: nn.Module,
        low: float = 0.0,
        high: float = 1.0,
        fractions: tuple[float, ...] | list[float] = (),
        extremes: float = 0.25,
        ranking: tuple[str, ...] | list[str] | str = ("own", "random"),
        teacher: str = "initial",
        temperature: float = 1.0,
        weight: float = 1.0,
        supervision: float = 1.0,
        kind: Kind = "auto",
        class_weights: Sequence[float] = (),
    ) -> None:
        """Create the objective.

        Args:
            net: an adaptive network.
            low: smallest fraction of patches kept high.
            high: largest fraction.
            fractions: fractions to draw from, instead of the range.
            extremes: probability of a step at exactly `low` or `high` (or the ends of the list).
            ranking: masks that rank the patches, used in turns: `own` (the network's mask), `random` blocks, or any
                other, e.g. `edges:threshold=0.2`.
            teacher, temperature, weight, kind, class_weights: as in `Divergence`.
            supervision: weight of the labels' cross entropy; 0 learns from the dense network alone, which avoids
                overfitting to few labels.

        Raises:
            InvalidInput: a value is out of range, the network is not adaptive, or its own mask ranks no patches.
            UnknownName: there is no such mask, teacher or kind.
        """
        super().__init__(net, teacher, temperature, weight, supervision, kind, class_weights)
        ends = tuple(fractions) or (low, high)
        if not all(0 <= f <= 1 for f in ends) or low > high or not 0 <= extremes <= 1:
            raise InvalidInput(
                f"objective any-budget with low={low}, high={high}, fractions={tuple(fractions)}, "
                f"extremes={extremes}.",
                next="fractions and extremes are in 0..1, low is at most high.",
            )
        self.fractions, self.low, self.high = tuple(fractions), min(ends), max(ends)
        self.extremes = extremes
        names = (ranking,) if isinstance(ranking, str) else tuple(ranking)
        self.rankings = tuple(name if name in ("own", "random") else resolve_mask(name) for name in names)
        if "own" in self.rankings and isinstance(_ranker(self.net.mask), UniformMask):
            raise InvalidInput(
                f"the network's own mask {self.net.mask.spec()!r} ranks no patch above another.",
                where="objective any-budget",
                next="train with ranking=edges or ranking=random, or convert with another mask.",
            )

    def mask(self, draw: Draw) -> MaskProvider:
        """Return the budget of a step over the ranking of that step."""
        return Budget(self._ranking(draw), self.fraction(draw))

    def fraction(self, draw: Draw) -> float:
        """Return the fraction of a step, the same in all processes."""
        random = draw.of_step()
        if random.random() < self.extremes:
            return float(random.choice((self.low, self.high)))
        if self.fractions:
            return float(random.choice(self.fractions))
        return float(random.uniform(self.low, self.high))

    def _ranking(self, draw: Draw) -> MaskProvider:
        chosen = self.rankings[draw.step % len(self.rankings)]
        if isinstance(chosen, MaskProvider):
            return chosen.to(next(self.net.parameters()).device)
        return _ranker(self.net.mask) if chosen == "own" else DrawnBlocks(draw)


class DrawnBlocks(MaskProvider):
    """Random scores in blocks of 1, 2 or 4 patches; an image's blocks depend only on its position in the data."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Draw scores (B, h, w) in 0..1."""
        maps = []
        for random in self.draw.of_images():
            side = grid.patch * int(random.choice((1, 2, 4)))
            blocks = random.random([divide_up(length, side) for length in grid.size])
            maps.append(on_samples(torch.from_numpy(blocks), side, grid.size))
        return torch.stack(maps).to(features.device)


def _ranker(mask: MaskProvider) -> MaskProvider:
    """Return the mask that provides the scores: the mask inside budgets."""
    return _ranker(mask.mask) if isinstance(mask, Budget) else mask


@objective("anytime")
class Anytime(Objective):
    """Sum of the cross entropies of the aggregated predictions of all exits.

    Without labels, or with a weight for it, the sum of their divergences from the last exit with everything computed.
    Trained as published (Liu et al. 2022): where an exit is confident, later losses train earlier exits.
    """

    net: AnytimeModel
    needs = (AnytimeModel, "has no exits", "cs.anytime")

    def __init__(
        self,
        net: nn.Module,
        weights: tuple[float, ...] | list[float] = (),
        class_weights: tuple[float, ...] | list[float] = (),
        divergence: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Create the objective.

        Args:
            net: a network with exits.
            weights: weights of the exits; default 1 each.
            class_weights: weights of the classes in the cross entropy; default 1 each.
            divergence: weight of the divergence; default: 1 without labels, else 0.
            temperature: temperature that softens the class scores of both.

        Raises:
            InvalidInput: the network has no exits, or weights have the wrong number or are below zero.
        """
        super().__init__(net)
        exits = len(self.net.plan.exits)
        for name, values, count in (
            ("weights", weights, exits),
            ("class_weights", class_weights, self.net.plan.classes),
        ):
            if values and (len(values) != count or min(values) < 0):
                raise InvalidInput(
                    f"objective anytime with {name}={tuple(values)}.",
                    next=f"give {count} numbers of at least 0.",
                )
        _check_numbers({"divergence": divergence}, {"temperature": temperature})
        self.weights = tuple(weights) or (1.0,) * exits
        self.class_weights, self.divergence, self.temperature = tuple(class_weights), divergence, temperature

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss, and the loss of each exit."""
        share = self.divergence if self.divergence is not None else float(labels is None)
        target = None
        if share:
            with torch.no_grad(), evaluating(self.net):
                *_, target = self.net(*inputs, threshold=self.net.everything)
        outputs = self.net(*inputs)
        balance = outputs[0].new_tensor(self.class_weights).float() if self.class_weights else None
        losses = [
            miss(output, labels, target, 1.0, share, self.temperature, "classes", label_weights=balance)[0]
            for output in outputs
        ]
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        assert isinstance(total, Tensor)
        return {"loss": total, **{f"exit_{n}": loss.detach() for n, loss in enumerate(losses, 1)}}


@objective("sparse")
class Sparse(Objective):
    """Cross entropy, or without labels divergence from the dense network, plus the openness of a network's gates.

    Trained as published (Xie et al., ECCV 2020): every position is weighted by its gate's share, with noise, at a
    falling temperature. The dense network is the current one if gates alone are trained, otherwise the initial one.
    """

    net: SampledModel
    constants = ("teacher",)
    needs = (SampledModel, "has no gates", "cs.sample")

    def __init__(
        self,
        net: nn.Module,
        weight: float = 0.05,
        divergence: float | None = None,
        temperature: float = 1.0,
        kind: Kind = "auto",
        decay: float = DECAY,
        start: float | None = None,
    ) -> None:
        """Create the objective.

        Args:
            net: a network with gates.
            weight: weight of the openness of the gates, 0..1 (`SampledModel.sparse_loss`); published: 0.02 to 0.2.
            divergence: weight of the divergence; default: 1 without labels, else 0.
            temperature: temperature that softens the class scores of both.
            kind: kind of the outputs, `classes`, `values` or `auto`.
            decay: factor of the gates' temperature in each step, as published .99998: to .03 after 175 000 steps.
            start: initial temperature of the gates; default: their current one, at first 1, as published. While
                shares are soft, closed positions are restored by the centre of the Gaussian, which counts with its
                share; for a short training start low, e.g. at .1.

        Raises:
            InvalidInput: the network has no gates, or a value is out of range.
            UnknownName: there is no such kind.
        """
        super().__init__(net)
        check_name("kind of output", kind, KINDS)
        least = {"weight": weight, "divergence": divergence}
        _check_numbers(least, {"temperature": temperature, "start": start})
        if not 0 < decay <= 1:
            raise InvalidInput(f"the objective has decay={decay}.", next="give a decay in 0..1, above 0.")
        if start is not None:
            for gate in self.net.gates:
                gate.temperature.fill_(start)
        self.weight, self.divergence, self.temperature = weight, divergence, temperature
        self.kind, self.decay = kind, decay
        trained = {parameter for parameter in net.parameters() if parameter.requires_grad}
        gates_alone = trained <= set(self.net.own_parameters().values())
        learns = divergence != 0
        self.teacher = None if gates_alone or not learns else copy_dense(net)

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Return the loss, its parts, and the openness of the gates."""
        self.net.seed, self.net.step, self.net.decay = draw.seed, draw.step, self.decay
        share = self.divergence if self.divergence is not None else float(labels is None)
        output = self.net(*inputs)
        sparse = self.net.sparse_loss()
        target = None
        if share:
            teacher: Any = self.net if self.teacher is None else self.teacher
            with torch.no_grad(), evaluating(teacher):
                target = teacher.dense(*inputs)
        loss, parts = miss(output, labels, target, 1.0, share, self.temperature, kind=self.kind)
        return {"loss": loss + self.weight * sparse, **parts, "open": sparse.detach()}


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


def _check_numbers(least: Mapping[str, float | None], above: Mapping[str, float | None]) -> None:
    """Refuse numbers of `least` below 0, and numbers of `above` that are not above 0; None is not given."""
    for values, words in ((least, "at least 0"), (above, "above 0")):
        for name, value in values.items():
            if value is not None and not (value > 0 or (value == 0 and values is least)):
                raise InvalidInput(f"the objective has {name}={value}.", next=f"give {name} {words}.")


def copy_dense(net: nn.Module) -> nn.Module:
    """Copy a network for later comparisons."""
    return copy.deepcopy(net).requires_grad_(False)


def dense_high(net: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Return the teacher's outputs: everything kept high, in evaluation mode, without gradients."""
    with torch.no_grad(), evaluating(net):
        return net(*inputs, mask="all")


def miss(
    output: Any,
    labels: Tensor | None,
    target: Any = None,
    supervision: float = 1.0,
    weight: float = 1.0,
    temperature: float = 1.0,
    kind: Kind = "auto",
    class_weights: Sequence[float] = (),
    label_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted loss of an output from labels and from a target; also return both parts, for the log.

    Args:
        output: output of the network.
        labels: (B, H, W), or None.
        target: output of `dense_high`, or None.
        supervision: weight of the cross entropy, see `supervised`.
        weight: weight of the divergence: T² times its mean over pixels, T the temperature (Hinton et al. 2015).
        temperature: as in `divergence`.
        kind: kind of the output without labels; labels imply class scores.
        class_weights: weights of the target's classes in that mean; default 1 each.
        label_weights: weights of the labels' classes in the cross entropy; default 1 each.

    Raises:
        InvalidInput: there are neither labels nor a target, or the output or the weights do not fit them.
    """
    losses, parts = [], {}
    if labels is not None:
        parts["entropy"] = supervised(output, labels, label_weights)
        losses.append(supervision * parts["entropy"])
    if target is not None:
        kind = kind if labels is None else "classes"
        apart = divergence(target, output, kind, temperature)
        if class_weights:
            apart = apart * pixel_weights(target, class_weights)
        parts["divergence"] = temperature**2 * apart.mean()
        losses.append(weight * parts["divergence"])
    if not losses:
        raise InvalidInput(
            "there are no labels to learn from.",
            why="the data has none, and this objective learns from nothing else.",
            next="learn from the dense network: objective divergence or any-budget, or blend with distil=1.",
        )
    return sum(losses[1:], losses[0]), {name: value.detach() for name, value in parts.items()}


def supervised(output: Any, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the cross entropy of the logits, plus half that of entry `aux` of a dictionary."""
    loss = cross_entropy(class_scores(output), labels, weight)
    if isinstance(output, Mapping) and isinstance(output.get("aux"), Tensor):
        loss = loss + AUXILIARY_WEIGHT * cross_entropy(output["aux"], labels, weight)
    return loss


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the mean cross entropy over labelled pixels, optionally weighted by class; 0 without labelled pixels.

    Logits (B, C, h, w) are resized to the labels (B, H, W). With several processes, each divides its sum by the mean
    number of labelled pixels per process: so the mean of the losses, and of the gradients, is that over all labelled
    pixels.
    """
    logits, labels = resize(logits.float(), labels.shape[-2:]), as_classes(labels)
    total = F.cross_entropy(logits, labels, weight, ignore_index=IGNORED, reduction="sum")
    is_known = labels != IGNORED
    mass = is_known.sum() if weight is None else weight[torch.where(is_known, labels, 0)][is_known].sum()
    count = mean_everywhere(mass.double())
    return total / count.clamp(min=1e-6).to(total)
