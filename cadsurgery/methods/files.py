"""Files of all methods: tensors as safetensors, everything else as JSON metadata, both with checksums.

Nothing that a file names is built or run without the user's consent. A method adds its own fields with
`ConvertedModel.pack`.
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
from cadsurgery.support.errors import FileError
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
        fields: all fields.
        options: the checked options of the method.
        plan: the plan of the network.
        source: where the network came from.
        trust: True if code that the file names may be imported, see `cadsurgery.load`.
    """

    fields: dict[str, Any]
    options: dict[str, Any]
    plan: Any
    source: Source | None
    trust: bool


def pack(net: ConvertedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the contents of a network's file: tensors by name, and metadata as plain values.

    Raises:
        InvalidInput: the network is an inference copy.
    """
    net.check_storable()
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
    """Build the network from the contents of a file, in evaluation mode.

    Args:
        kind: class of the network.
        path: path of the file, for messages.
        values: the metadata.
        tensors: the tensors.
        model: the original architecture; needed if the network was not built by name.
        trust: see `cadsurgery.load`.

    Raises:
        FileError: the file is damaged, does not fit the model, or its example is too large to be created.
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
    """Check that the plan of a converted model equals the plan in the file."""
    if plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            next="pass the model it was made from, or make it again.",
        )


def fill(path: str | Path, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of a file into a network; none may be missing.

    Raises:
        FileError: the tensors do not fit the network.
    """
    check_types(path, tensors, network.state_dict())
    with as_file_error(f"the parameters in {path} do not fit the model.", OTHER_MODEL):
        missing = [name for name in network.state_dict() if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        network.load_state_dict(tensors, assign=True)
