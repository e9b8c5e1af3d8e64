"""Save and load networks whose input is sampled, whatever method made the network inside."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.masks.unit import Normalisation
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
from cadsurgery.network.storage import (
    FORMAT,
    KEY,
    LONGEST,
    METHOD,
    OTHER_MODEL,
    build_stated,
    check_tensors,
    check_types,
    checksum,
    refuse,
    seal,
    write_tensors,
)
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.plain import check_fields
from cadsurgery.support.provenance import versions

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
_IN_FILE: dict[str, Any] = {
    **{METHOD: str, "format": int, "versions": dict[str, str], "source": dict[str, Any] | None},
    **{"inside": _Inside, "network": dict[str, Any], "sampler": str, "normalisation": dict[str, Any] | None},
    **{"options": dict[str, Any], "plan": str, "tensors": str},
}


def save_resampled(net: ResampledModel, path: str | Path) -> None:
    """Write a network whose input is sampled: what its own method writes of it, sampler, plan, options, versions.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: an optimised copy, or a sampler of your own, which a file cannot hold.
    """
    if net.is_optimized:
        raise InvalidInput(
            "an optimised network cannot be saved.",
            why="its weights are folded and no longer the original's.",
            next="save the network it was made from, and call optimize() after loading.",
        )
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
    metadata = {
        METHOD: NAME,
        "format": FORMAT,
        "versions": versions(),
        "source": net.source.to_dict() if ":" in net.source.name else None,
        "inside": inside,
        "network": within,
        "sampler": sampler.spec(),
        "normalisation": unit and unit.to_dict(),
        "options": {**asdict(sampler.options), "size": net.size, "mode": net.mode, "back": net.back},
        "plan": net.plan.to_json(),
        "tensors": checksum(tensors),
    }
    write_tensors(Path(path), tensors, {KEY: seal(metadata)})


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
    with refuse(
        f"the metadata of {path} is damaged.", "fetch the file again, or write it again with cs.save."
    ):
        fields = check_fields(values, _IN_FILE, "it")
        options = check_fields(fields["options"], _OPTIONS, "options")
        source = Source.from_dict(fields["source"]) if fields["source"] is not None else None
        stored = ResampledPlan.from_json(fields["plan"])
        unit = fields["normalisation"]
        known = (tuple(unit["mean"]), tuple(unit["std"]), unit["origin"]) if unit is not None else None
        normalisation = Normalisation(*known) if known is not None else None
    check_tensors(path, fields["tensors"], tensors)
    longest = max(math.prod(stored.example_shape), math.prod(options["size"]), options["grid"] ** 4)
    if longest > LONGEST and not trust:
        raise FileError(
            f"the metadata of {path} is damaged.",
            why=f"an example of {longest} values is too large to be made on the word of a file.",
            next="if you know the file, pass trust=True (--trust).",
        )
    if source is not None and not trust:
        source = replace(source, untrusted=str(path))
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OWN)}
    network: nn.Module
    if fields["inside"] == "adaptive":
        network = storage.unpack(path, fields["network"], tensors, model, trust=trust)
    elif fields["inside"] == "anytime":
        network = load_anytime(path, fields["network"], tensors, model, trust)
    else:
        network = model if model is not None else build_stated(path, source, tensors)
    sampler: object = fields["sampler"]
    if sampler not in (LearnedSampler.name, LabelSampler.name, UniformSampler.name):
        of_mask = {name[len(_MASK) :]: value for name, value in own.items()}
        sampler = storage.stored_mask(path, fields["sampler"], of_mask, trust)
    with refuse(f"{path} does not fit this model.", OTHER_MODEL):
        dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
        example = torch.zeros(stored.example_shape, dtype=dtype)
        net = resample(network, sampler, **options, example_input=example).eval()
    if replace(net.plan, macs=stored.macs) != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            next="pass the model it was made from, or make it again.",
        )
    parts: list[tuple[nn.Module, dict[str, Tensor]]] = [
        (net.sampler, {name[len(_OWN) :]: value for name, value in own.items()})
    ]
    if fields["inside"] == "network":
        parts.append((net.network, tensors))
    for part, found in parts:
        check_types(path, found, part.state_dict())
        with refuse(f"the parameters in {path} do not fit the model.", OTHER_MODEL):
            part.load_state_dict(found, assign=True)
    if isinstance(net.sampler, MaskSampler):
        net.sampler.unit.settle(normalisation)
    net.source = source or net.source
    return net
