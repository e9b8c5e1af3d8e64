"""Files of all methods: safetensors for tensors, JSON metadata for everything else, with checksums of both.

Nothing that a file names is built or run unasked. Each method adds only what is its own, see `ConvertedModel.pack`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.network.storage import (
    FORMAT,
    METHOD,
    OTHER_MODEL,
    as_file_error,
    check_example,
    check_tensors,
    check_types,
    checksum,
)
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.plain import check_fields
from cadsurgery.support.provenance import versions

if TYPE_CHECKING:
    from cadsurgery.methods.converted import ConvertedModel

AGAIN = "fetch the file again, or write it again with cs.save."
_IN_FILE: dict[str, Any] = {
    **{METHOD: str, "format": int, "versions": dict[str, str], "source": dict[str, Any] | None},
    **{"options": dict[str, Any], "plan": str, "tensors": str},
}


@dataclass(frozen=True)
class Stored:
    """Metadata of a file.

    Attributes:
        fields: all of them.
        options: of the method, checked.
        plan: that the network had.
        source: where it came from.
        trust: True if what it names may be imported, see `cadsurgery.load`.
    """

    fields: dict[str, Any]
    options: dict[str, Any]
    plan: Any
    source: Source | None
    trust: bool


def pack(net: ConvertedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Contents of the file of a network: tensors by name, and metadata as plain values.

    Raises:
        InvalidInput: an inference copy.
    """
    if net.is_optimized:
        raise InvalidInput(
            "an optimised network cannot be saved.",
            why="its weights are folded and no longer the original's.",
            next="save the network it was made from, and call optimize() after loading.",
        )
    tensors, more = net.pack()
    is_named = net.source is not None and ":" in net.source.name
    return tensors, {
        **{METHOD: net.method, "format": FORMAT, "versions": versions()},
        **{"source": net.source.to_dict() if is_named and net.source else None, **more},
        **{
            "options": {**net.options, **net.settings},
            "plan": net.plan.to_json(),
            "tensors": checksum(tensors),
        },
    }


def unpack(
    kind: type[ConvertedModel],
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None,
    trust: bool,
) -> ConvertedModel:
    """The network of what `pack` gave, in evaluation mode.

    Args:
        kind: its class.
        path: of the file, for messages.
        values: its metadata.
        tensors: its tensors.
        model: the original architecture; needed if the network was not built by name.
        trust: see `cadsurgery.load`.

    Raises:
        FileError: a damaged file, one that does not fit the model, or an example too large to be made.
    """
    with as_file_error(f"the metadata of {path} is damaged.", AGAIN):
        fields = check_fields(values, {**_IN_FILE, **kind.field_types}, "it")
        options = check_fields(fields["options"], kind.option_types, "options")
        source = Source.from_dict(fields["source"]) if fields["source"] is not None else None
        plan = kind.plan_type.from_json(fields["plan"])
    check_tensors(path, fields["tensors"], tensors)
    check_example(path, plan, trust)
    if source is not None and not trust:
        source = replace(source, untrusted=str(path))
    stored = Stored(fields, options, plan, source, trust)
    kind.check_stored(path, stored, tensors)
    net = kind.rebuild(path, stored, tensors, model)
    net.source = source or net.source
    return net


def check_plan(path: str | Path, plan: Any, stored: Any) -> None:
    """Refuse a network of another plan than the file's."""
    if plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            next="pass the model it was made from, or make it again.",
        )


def fill(path: str | Path, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of a file into a network, all of them.

    Raises:
        FileError: they are not its own.
    """
    check_types(path, tensors, network.state_dict())
    with as_file_error(f"the parameters in {path} do not fit the model.", OTHER_MODEL):
        missing = [name for name in network.state_dict() if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        network.load_state_dict(tensors, assign=True)
