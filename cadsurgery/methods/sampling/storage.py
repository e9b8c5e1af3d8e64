"""Save and load networks with gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadsurgery.methods import files
from cadsurgery.methods.sampling.model import SampledModel, is_own, sample
from cadsurgery.methods.sampling.plan import SamplingPlan
from cadsurgery.network.candidates import check_network
from cadsurgery.network.storage import OTHER_MODEL, as_file_error, build_stated

NAME = "sampling"
_OPTIONS: dict[str, Any] = {
    "where": str | tuple[str, ...],
    "grid": int,
    "temperature": float,
    "noise": bool,
    "seed": int,
}


def save_sampled(net: SampledModel, path: str | Path) -> None:
    """Write a network with gates: parameters and buffers, gates, plan, options, source and versions.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: an optimised copy.
    """
    own = {name: getattr(net, name) for name in ("grid", "temperature", "noise", "seed")}
    tensors = net.state_dict()
    files.write(path, tensors, files.describe(NAME, net, tensors, {**net.options, **own}))


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
    stored = files.read(path, values, tensors, _OPTIONS, SamplingPlan, trust)
    if model is None:
        of_model = {name: value for name, value in tensors.items() if not is_own(name)}
        model = build_stated(path, stored.source, of_model)
    with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
        example = files.example_of(stored, check_network(model))
        seed = stored.options.pop("seed")
        net = sample(model, **stored.options, example_input=example).eval()
        net.seed = seed
    files.check_plan(path, net.plan, stored.plan)
    files.fill(path, net, tensors)
    net.source = stored.source or net.source
    return net
