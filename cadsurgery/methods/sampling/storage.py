"""Save and load networks with gates: safetensors for tensors, JSON metadata for everything else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.methods.sampling.model import SampledModel, is_own, sample
from cadsurgery.methods.sampling.plan import SamplingPlan
from cadsurgery.network.candidates import check_network
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

NAME = "sampling"
_OPTIONS: dict[str, Any] = {
    "where": str | tuple[str, ...],
    "grid": int,
    "temperature": float,
    "noise": bool,
    "seed": int,
}
_IN_FILE: dict[str, Any] = {
    **{METHOD: str, "format": int, "versions": dict[str, str], "source": dict[str, Any] | None},
    **{"options": dict[str, Any], "plan": str, "tensors": str},
}


def save_sampled(net: SampledModel, path: str | Path) -> None:
    """Write a network with gates: parameters and buffers, gates, plan, options, source and versions.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: an optimised copy.
    """
    if net.is_optimized:
        raise InvalidInput(
            "an optimised network cannot be saved.",
            why="its weights are folded and no longer the original's.",
            next="save the network it was made from, and call optimize() after loading.",
        )
    tensors = net.state_dict()
    metadata = {
        METHOD: NAME,
        "format": FORMAT,
        "versions": versions(),
        "source": net.source.to_dict() if net.source is not None and ":" in net.source.name else None,
        "options": {
            **net.options,
            **{name: getattr(net, name) for name in ("grid", "temperature", "noise", "seed")},
        },
        "plan": net.plan.to_json(),
        "tensors": checksum(tensors),
    }
    write_tensors(Path(path), tensors, {KEY: seal(metadata)})


def load_sampled(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None = None,
    trust: bool = False,
) -> SampledModel:
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
        stored = SamplingPlan.from_json(fields["plan"])
    check_tensors(path, fields["tensors"], tensors)
    if math.prod(stored.example_shape) > LONGEST and not trust:
        raise FileError(
            f"the metadata of {path} is damaged.",
            why=f"an example of shape {stored.example_shape} is too large to be made on the word of a file.",
            next="if you know the file, pass trust=True (--trust).",
        )
    if source is not None and not trust:
        source = replace(source, untrusted=str(path))
    if model is None:
        model = build_stated(
            path, source, {name: value for name, value in tensors.items() if not is_own(name)}
        )
    with refuse(f"{path} does not fit this model.", OTHER_MODEL):
        dtype = next((p.dtype for p in check_network(model).parameters()), torch.float32)
        seed = options.pop("seed")
        net = sample(model, **options, example_input=torch.zeros(stored.example_shape, dtype=dtype)).eval()
        net.seed = seed
    if net.plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            next="pass the model it was converted from, or convert again.",
        )
    check_types(path, tensors, net.state_dict())
    with refuse(f"the parameters in {path} do not fit the model.", OTHER_MODEL):
        missing = [name for name in net.state_dict() if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        net.load_state_dict(tensors, assign=True)
    net.source = source or net.source
    return net
