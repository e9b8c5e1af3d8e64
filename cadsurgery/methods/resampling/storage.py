"""Save and load networks whose input is sampled, whatever method made the network inside."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cadsurgery.masks.unit import Normalisation
from cadsurgery.methods import files
from cadsurgery.methods.anytime.model import AnytimeModel
from cadsurgery.methods.anytime.storage import load_anytime, pack_anytime
from cadsurgery.methods.resampling.back import Back
from cadsurgery.methods.resampling.model import SAMPLER, ResampledModel, resample
from cadsurgery.methods.resampling.plan import ResampledPlan
from cadsurgery.methods.resampling.samplers import (
    LabelSampler,
    LearnedSampler,
    MaskSampler,
    UniformSampler,
)
from cadsurgery.methods.resampling.sampling import Mode
from cadsurgery.network import storage
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.storage import OTHER_MODEL, as_file_error, build_stated
from cadsurgery.support.errors import InvalidInput

NAME = "resampling"
_OWN = f"{SAMPLER}."
_MASK = f"{_OWN}mask."
_Inside = Literal["network", "adaptive", "anytime"]
_OPTIONS: dict[str, Any] = {
    "grid": int,
    "smoothness": float,
    "targets": tuple[int, ...] | None,
    "ignore": int | None,
    "share": float,
    "size": tuple[int, int],
    "mode": Mode,
    "back": Back,
}
_MORE: dict[str, Any] = {
    **{"inside": _Inside, "network": dict[str, Any], "sampler": str, "normalisation": dict[str, Any] | None}
}


def save_resampled(net: ResampledModel, path: str | Path) -> None:
    """Write a network whose input is sampled: what its own method writes of it, sampler, plan, options, versions.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: an optimised copy, or a sampler of your own, which a file cannot hold.
    """
    sampler = net.sampler
    is_mask = isinstance(sampler, MaskSampler) and sampler.mask.storable
    if not is_mask and type(sampler) not in (LearnedSampler, LabelSampler, UniformSampler):
        raise InvalidInput(
            f"the sampler {sampler.spec()!r:.80} cannot be stored.",
            why="it is a function or a class of your own, which a file cannot hold.",
            next="save net.network, and call cs.resample on it after loading.",
        )
    inside, tensors, within = _pack(net.network)
    tensors = tensors | {f"{_OWN}{name}": value for name, value in sampler.state_dict().items()}
    unit = sampler.unit.normalisation if isinstance(sampler, MaskSampler) else None
    options = {**asdict(sampler.options), "size": net.size, "mode": net.mode, "back": net.back}
    more: dict[str, Any] = {"inside": inside, "network": within, "sampler": sampler.spec()}
    more["normalisation"] = unit and unit.to_dict()
    files.write(path, tensors, files.describe(NAME, net, tensors, options, **more))


def _pack(network: nn.Module) -> tuple[_Inside, dict[str, Tensor], dict[str, Any]]:
    """Of what method a network is, and what that writes of it."""
    if isinstance(network, AdaptiveModel):
        return "adaptive", *storage.pack(network)
    if isinstance(network, AnytimeModel):
        return "anytime", *pack_anytime(network)
    return "network", network.state_dict(), {}


def load_resampled(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None = None,
    trust: bool = False,
) -> ResampledModel:
    """The network of a file, in evaluation mode.

    Args:
        path: of the file, for messages.
        values: its metadata.
        tensors: its tensors.
        model: the original architecture; needed if the network was not built by name.
        trust: see `cadsurgery.load`.

    Raises:
        FileError: a damaged file, or one that does not fit the model.
    """
    stored = files.read(path, values, tensors, _OPTIONS, ResampledPlan, trust, **_MORE)
    fields, options = stored.fields, stored.options
    with as_file_error(f"the metadata of {path} is damaged.", files.AGAIN):
        unit = fields["normalisation"]
        known = (tuple(unit["mean"]), tuple(unit["std"]), unit["origin"]) if unit is not None else None
        normalisation = Normalisation(*known) if known is not None else None
    storage.check_size(path, max(math.prod(options["size"]), options["grid"] ** 4), trust)
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OWN)}
    network: nn.Module
    if fields["inside"] == "adaptive":
        network = storage.unpack(path, fields["network"], tensors, model, trust=trust)
    elif fields["inside"] == "anytime":
        network = load_anytime(path, fields["network"], tensors, model, trust)
    else:
        network = model if model is not None else build_stated(path, stored.source, tensors)
    sampler: object = fields["sampler"]
    if sampler not in (LearnedSampler.name, LabelSampler.name, UniformSampler.name):
        of_mask = {name[len(_MASK) :]: value for name, value in own.items()}
        sampler = storage.stored_mask(path, fields["sampler"], of_mask, trust)
    with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
        example = files.example_of(stored, network)
        net = resample(network, sampler, **options, example_input=example).eval()
    files.check_plan(path, replace(net.plan, macs=stored.plan.macs), stored.plan)
    files.fill(path, net.sampler, {name[len(_OWN) :]: value for name, value in own.items()})
    if fields["inside"] == "network":
        files.fill(path, net.network, tensors)
    if isinstance(net.sampler, MaskSampler):
        net.sampler.unit.set_once(normalisation)
    net.source = stored.source or net.source
    return net
