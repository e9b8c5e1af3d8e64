"""Checkpoints: the whole state of a run after a step in one safetensors file, and the identity of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.method_files import Converted
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.storage import write_tensors
from cadsurgery.support.errors import FileError, TrainingStopped
from cadsurgery.support.files import as_file_error
from cadsurgery.support.provenance import versions
from cadsurgery.support.rows import plain
from cadsurgery.tasks.journal import Identity
from cadsurgery.tasks.task_options import FREE, Settings

FORMAT = 1
_KEY = "cadsurgery.training"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: number of completed steps.
        identity: what the run is of; see `identity_of`.
        tensors: tensors by name: `weights.*`, `optimizer.*`, `ema.*`.
        best_step: step of the best validation, 0 if there was none.
        best: metric of the best validation.
        before: metrics before the first step.
        scaler: state of the gradient scaler.
    """

    step: int
    identity: Identity
    tensors: dict[str, Tensor]
    best_step: int = 0
    best: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the checkpoint atomically; an earlier file stays until then.

        Raises:
            FileError: the path cannot be written.
            TrainingStopped: a weight is not finite.
        """
        for name, value in self.tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingStopped(
                    f"{name} holds numbers that are not finite after step {self.step}.",
                    why="a gradient was not finite.",
                    next="start again in another output folder with a lower lr or with clip=1"
                    + (f"; {path.name} holds the last good state." if path.exists() else "."),
                )
        values = {name: value for name, value in vars(self).items() if name != "tensors"}
        metadata = {"format": FORMAT, "versions": versions(), **values}
        write_tensors(path, self.tensors, {_KEY: json.dumps(metadata)})

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix: `weights`, `optimizer` or `ema`."""
        return {
            key.removeprefix(f"{name}."): value
            for key, value in self.tensors.items()
            if key.startswith(f"{name}.")
        }


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file written by `Checkpoint.write`.

    Raises:
        FileError: the file is missing, truncated or foreign.
    """
    what = f"{path} is not a readable checkpoint of a training run."
    with as_file_error(what, "start again in another output folder."):
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[_KEY])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if metadata.pop("format") > FORMAT:
            raise ValueError("it was written by a later version")
        metadata.pop("versions")
        return Checkpoint(tensors=tensors, **metadata)


def identity_of(net: nn.Module, data: Any, augment: Any, settings: Settings, processes: int) -> Identity:
    """Return the plain values that must be the same when a run is resumed: settings, network, data, processes."""
    shapes = {
        name: [list(p.shape), str(p.dtype)] for name, p in (*net.named_parameters(), *net.named_buffers())
    }
    network: dict[str, Any] = {"type": type(net).__name__, "tensors": _digest(shapes)}
    if isinstance(net, Converted):
        network["plan"] = _digest(net.plan.to_json())
    if isinstance(net, AdaptiveModel):
        geometry = {name: str(value) for name, value in vars(net.geometry).items()}
        network |= {"mask": net.mask.spec(), "geometry": geometry}
    if isinstance(net, ConvertedModel):
        network |= net.identity()
    options = {name: value for name, value in settings.to_dict().items() if name not in FREE}
    described = {
        "name": str(getattr(data, "name", type(data).__name__)),
        "samples": len(data),
        "classes": list(getattr(data, "classes", ())),
        "augment": repr(augment) if is_dataclass(augment) else getattr(augment, "__name__", None),
    }
    identity = {"settings": options, "network": network, "data": described, "processes": processes}
    values: dict[str, Any] = plain(identity)
    return values


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into tensors of the same names, in place.

    Raises:
        FileError: names or shapes differ.
    """
    if tensors.keys() != into.keys() or any(tensors[n].shape != into[n].shape for n in into):
        wrong = sorted(tensors.keys() ^ into.keys())[:3]
        raise FileError(
            f"the checkpoint {path} does not fit the network.",
            where=", ".join(wrong),
            next="start again in another output folder.",
        )
    for name, value in into.items():
        value.copy_(tensors[name])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state, by the names of their parameters."""
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state returned by `optimizer_tensors`, without its first prefix."""
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        is_counter = key == "step"  # counters stay on the CPU
        optimizer.state[parameter][key] = (
            value if is_counter else torch.empty_like(parameter, requires_grad=False).copy_(value)
        )
