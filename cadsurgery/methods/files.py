"""What the files of all methods hold, and how it is read: each method adds only what is its own.

Safetensors for tensors, JSON metadata for everything else; nothing that a file names is built or run unasked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.network.storage import (
    FORMAT,
    KEY,
    METHOD,
    OTHER_MODEL,
    as_file_error,
    check_example,
    check_tensors,
    check_types,
    checksum,
    encode_with_checksum,
    write_tensors,
)
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.plain import check_fields
from cadsurgery.support.provenance import versions

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
    """

    fields: dict[str, Any]
    options: dict[str, Any]
    plan: Any
    source: Source | None


def describe(
    method: str,
    net: ConvertedModel,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Metadata of a network with a plan and a source.

    Args:
        method: its name.
        net: the network.
        tensors: that the file will hold.
        options: that the method needs to make it again.
        more: further fields.

    Raises:
        InvalidInput: an inference copy.
    """
    if net.is_optimized:
        raise InvalidInput(
            "an optimised network cannot be saved.",
            why="its weights are folded and no longer the original's.",
            next="save the network it was made from, and call optimize() after loading.",
        )
    is_named = net.source is not None and ":" in net.source.name
    return {
        **{METHOD: method, "format": FORMAT, "versions": versions()},
        **{"source": net.source.to_dict() if is_named else None, **more, "options": options},
        **{"plan": net.plan.to_json(), "tensors": checksum(tensors)},
    }


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a file; it appears whole or not at all."""
    write_tensors(Path(path), tensors, {KEY: encode_with_checksum(metadata)})


def read(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    plan: Any,
    trust: bool,
    **more: Any,
) -> Stored:
    """The metadata of a file, checked, as its tensors are.

    Args:
        path: of the file, for messages.
        values: its metadata.
        tensors: its tensors.
        options: the types of the method's.
        plan: the class of its plans.
        trust: see `cadsurgery.load`.
        more: the types of further fields.

    Raises:
        FileError: a damaged file, or an example too large to be made.
    """
    with as_file_error(f"the metadata of {path} is damaged.", AGAIN):
        fields = check_fields(values, {**_IN_FILE, **more}, "it")
        checked = check_fields(fields["options"], options, "options")
        source = Source.from_dict(fields["source"]) if fields["source"] is not None else None
        stored = plan.from_json(fields["plan"])
    check_tensors(path, fields["tensors"], tensors)
    check_example(path, stored, trust)
    if source is not None and not trust:
        source = replace(source, untrusted=str(path))
    return Stored(fields, checked, stored, source)


def example_of(stored: Stored, network: nn.Module) -> Tensor:
    """An image batch of the shape of the plan's example, of the network's type."""
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    return torch.zeros(stored.plan.example_shape, dtype=dtype)


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
