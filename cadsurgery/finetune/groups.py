"""Groups of trained parameters with their learning rates: classifier, backbone, mask, adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cadsurgery.finetune.batches import Batch
from cadsurgery.finetune.learning_rates import Draw, derive_seed
from cadsurgery.finetune.objectives import Objective
from cadsurgery.methods.converted import METHODS, ConvertedModel
from cadsurgery.network.adapters import ADAPTERS
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import InvalidInput, first_line
from cadsurgery.support.torch_internals import BatchNorm
from cadsurgery.surgery.refusals import BACKBONE_NAMES
from cadsurgery.tasks.task_options import Settings


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one rate, or not at all.

    Attributes:
        name: `classifier`, `backbone`, `mask`, `adapters`, `fixed`, or the group of a method, e.g. `exits` or `gates`
            (with AdamW split by the number of values of a tensor).
        factor: factor of the learning rate; 0 for fixed parameters.
        parameters: parameters by name; every parameter is in exactly one group.
    """

    name: str
    factor: float
    parameters: dict[str, nn.Parameter]

    def describe(self) -> dict[str, object]:
        """Return the name, the factor, the numbers of tensors and values, and the first names."""
        return {
            "group": self.name,
            "factor": self.factor,
            "tensors": len(self.parameters),
            "values": sum(p.numel() for p in self.parameters.values()),
            "first": list(self.parameters)[:3],
        }


def freeze_unused(objective: Objective, batch: Batch, seed: int) -> None:
    """Freeze the parameters that get no gradient, found by a backward pass on two images; nothing else changes.

    So every trained parameter takes part in every step, as distributed training requires.

    Raises:
        InvalidInput: batch norm would be trained on a single value per channel.
    """
    parameters = list(objective.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        return
    batch = batch.first(2).to(parameters[0].device)
    torch.manual_seed(derive_seed(seed, 5))
    statistics = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    try:
        objective(batch.inputs, batch.labels, Draw(seed, 0, batch.positions))["loss"].backward()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InvalidInput(
            "batch norm cannot be trained on one value per channel.",
            why=first_line(error),
            next='set batch to 2 or more, or batch_norm="frozen".',
        ) from error
    finally:
        for buffer, before in statistics:
            buffer.copy_(before)
    for parameter in parameters:
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def own_parts(net: nn.Module) -> dict[str, set[nn.Parameter]]:
    """Return the parameters that the original network does not have, by the name of their group."""
    if isinstance(net, AdaptiveModel):
        adapters = net.adapters if net.adapters is not None else nn.ModuleDict()
        return {"mask": set(net.mask.parameters()), "adapters": set(adapters.parameters())}
    if not isinstance(net, ConvertedModel):
        return {}
    return {
        **(own_parts(net.inner) if net.inner is not net else {}),
        net.group: set(net.own_parameters().values()),
    }


def trained_alone(net: nn.Module, train: str) -> set[nn.Parameter]:
    """Return the only parameters that the setting `train` lets change; an empty set for all.

    Raises:
        InvalidInput: the network has no such part.
    """
    kind = next((kind for kind in METHODS.values() if kind.group == train and kind.group_in_words), None)
    if kind is None:
        return set()
    if not isinstance(net, kind):
        raise InvalidInput(
            f'train="{train}" needs {kind.group_in_words}, not {type(net).__name__}.',
            next=f"convert it first with {kind.converted_by}.",
        )
    return own_parts(net)[train]


def make_groups(
    parameters: Mapping[str, nn.Parameter], net: nn.Module, settings: Settings
) -> tuple[Group, ...]:
    """Group the parameters of a network's objective; parameters that need no gradient are `fixed`.

    The classifier is every top-level child whose name is not a usual name of a backbone; without a backbone by name,
    it is the last child with parameters. Parameters that the objective adds are trained like the backbone. For a
    network with a sampled input, this applies to the inner network.

    Raises:
        InvalidInput: no parameter is left to train.
    """
    of_methods = [kind.group for kind in METHODS.values() if kind.group]
    factors = dict.fromkeys(("classifier", "backbone", "mask", "adapters", *of_methods), 1.0)
    factors |= {"backbone": settings.backbone_factor, "mask": settings.mask_factor, "fixed": 0.0}
    own, by_length = own_parts(net), {kind.group for kind in METHODS.values() if kind.by_length}
    classifier = _classifier(net.inner if isinstance(net, ConvertedModel) else net)
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in factors}
    for name, parameter in parameters.items():
        group = next((part for part, values in own.items() if parameter in values), "")
        group = group or ("classifier" if parameter in classifier else "backbone")
        groups[group if parameter.requires_grad else "fixed"][name] = parameter
    if not any(groups[name] for name in factors if name != "fixed"):
        raise InvalidInput(
            "no parameter is left to train.",
            why="all are frozen, or none takes part in the objective.",
            next='call net.requires_grad_(True), or train with freeze="" and another objective.',
        )
    made = [Group(name, factors[name], groups[name]) for name in factors if groups[name]]
    if settings.optimizer == "adamw":
        made = [
            part for group in made for part in (_by_length(group) if group.name in by_length else [group])
        ]
    return tuple(made)


def _by_length(group: Group) -> list[Group]:
    """Split a group by the number of values of a tensor, each part at 1 / number of the rate.

    AdamW moves every value by the rate, whatever its gradient, and a gate's score is a sum over its weight's values.
    At one rate for all, a step would change the score by the rate times their number (1440 for 160 channels), but
    the bias by the rate.
    """
    parts: dict[int, dict[str, nn.Parameter]] = {}
    for name, parameter in group.parameters.items():
        parts.setdefault(parameter.numel(), {})[name] = parameter
    return [
        Group(group.name if length == 1 else f"{group.name} of {length} values", group.factor / length, part)
        for length, part in sorted(parts.items())
    ]


def _classifier(net: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the classifier, without those that it shares with the backbone."""
    added = {"_mask_provider", ADAPTERS, *(kind.child for kind in METHODS.values())}
    every = {name: set(child.parameters()) for name, child in net.named_children() if name not in added}
    parts = {name: parameters for name, parameters in every.items() if parameters}
    backbone = parts.keys() & set(BACKBONE_NAMES) or set(list(parts)[:-1])
    heads = (parameters for name, parameters in parts.items() if name not in backbone)
    return set[nn.Parameter]().union(*heads).difference(*(parts[name] for name in backbone))


def make_optimizer(groups: Iterable[Group], settings: Settings) -> torch.optim.Optimizer:
    """Create SGD or AdamW for the trained groups; the learning rate is set at each step."""
    trained = [
        {"params": list(group.parameters.values()), "factor": group.factor}
        for group in groups
        if group.factor > 0
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


IsFixed = Callable[[str], bool]


def stem_of(net: nn.Module) -> IsFixed:
    """Return a function that tells if a module or parameter, by name, is used only before the adaptive region.

    Raises:
        InvalidInput: the network is not adaptive, so it has no region.
    """
    if not isinstance(net, AdaptiveModel):
        raise InvalidInput(
            'freeze="stem" needs an adaptive network.',
            why="the stem is what comes before the adaptive region.",
            next='convert it first with cs.adaptify, or train with freeze="".',
        )
    before: dict[str, bool] = {}
    for decision in net.plan.decisions:
        path = ".".join(filter(None, (net.plan.part, decision.path)))
        is_before = decision.action == "dense" and not decision.after
        before[path] = is_before and before.get(path, True)

    def is_stem(name: str) -> bool:
        """Decide by the innermost module that the plan names."""
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((before[path] for path in paths if path and path in before), False)

    return is_stem


def set_modes(net: nn.Module, is_fixed: IsFixed, settings: Settings) -> None:
    """Set training mode, except for fixed modules and frozen batch norms; where a method's group is trained alone, the
    mode that it needs, see `ConvertedModel.train_part`."""
    net.train(settings.train == "all")
    if isinstance(net, ConvertedModel) and settings.train == net.group:
        net.train_part()
    frozen = settings.batch_norm == "frozen"
    for path, module in net.named_modules():
        if is_fixed(path) or (frozen and isinstance(module, BatchNorm)):
            module.training = False
