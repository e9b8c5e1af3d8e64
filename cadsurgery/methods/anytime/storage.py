"""Save and load networks with exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadsurgery.methods import files
from cadsurgery.methods.anytime.heads import HeadKind
from cadsurgery.methods.anytime.model import AnytimeModel, Confidence, Fill, anytime, is_own
from cadsurgery.methods.anytime.plan import AnytimePlan
from cadsurgery.network.candidates import check_network
from cadsurgery.network.storage import OTHER_MODEL, as_file_error, build_stated, check_width

NAME = "anytime"
_OPTIONS: dict[str, Any] = {
    "exits": tuple[str, ...],
    "head": HeadKind,
    "classes": int,
    "hidden": int | None,
    "fill": Fill,
    "threshold": float | tuple[float, ...],
    "confidence": Confidence,
}


def save_anytime(net: AnytimeModel, path: str | Path) -> None:
    """Write a network with exits: parameters and buffers, heads, plan, options, source and versions.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: an optimised copy.
    """
    files.write(path, *pack_anytime(net))


def pack_anytime(net: AnytimeModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the file of a network with exits holds: tensors by name, and metadata as plain values.

    Raises:
        InvalidInput: an optimised copy.
    """
    tensors, options = (
        net.state_dict(),
        {**net.options, "threshold": net.threshold, "confidence": net.confidence},
    )
    return tensors, files.describe(NAME, net, tensors, options)


def load_anytime(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None = None,
    trust: bool = False,
) -> AnytimeModel:
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
    stored = files.read(path, values, tensors, _OPTIONS, AnytimePlan, trust)
    check_width(path, max(stored.options["classes"], stored.options["hidden"] or 0), tensors)
    if model is None:
        of_model = {name: value for name, value in tensors.items() if not is_own(name)}
        model = build_stated(path, stored.source, of_model)
    with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
        example = files.example_of(stored, check_network(model))
        net = anytime(model, **stored.options, example_input=example).eval()
    files.check_plan(path, net.plan, stored.plan)
    files.fill(path, net, tensors)
    net.source = stored.source or net.source
    return net
