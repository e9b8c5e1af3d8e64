"""Save and load converted networks: safetensors for tensors, JSON metadata for everything else."""

from __future__ import annotations

import contextlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import cadsurgery
from cadsurgery.api import adaptify
from cadsurgery.errors import FileError
from cadsurgery.files import written_whole
from cadsurgery.masks import FixedMask, FunctionMask, MaskProvider
from cadsurgery.masks.provider import _PROVIDERS as REGISTERED_MASKS
from cadsurgery.model import AdaptiveModel
from cadsurgery.surgery.plan import Plan
from cadsurgery.zoo import Source, build_model

FORMAT = 1
_KEY = "cadsurgery"
_MASK_TENSOR = "cadsurgery.mask.levels"
_NO_MASK = "a function or provider of your own, which a file cannot hold"


def save(net: AdaptiveModel, path: str | Path) -> None:
    """Write a converted network: parameters and buffers, plan, options, mask, source and versions.

    The file appears whole or not at all. No pickle. A mask that is a function or an unregistered provider
    cannot be stored; `load` then asks for one.

    Raises:
        FileError: the path cannot be written.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()}
    if isinstance(net.mask, FixedMask):
        tensors[_MASK_TENSOR] = net.mask.levels.cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "versions": _versions(),
        "source": net.source.to_dict() if net.source is not None else None,
        "mask": _mask_spec(net.mask),
        "options": {
            "output_stride": net.plan.output_stride,
            "region": net.plan.region,
            "anchor": net.geometry.anchor,
            "fill": net.geometry.fill,
            "pool": net.geometry.pool,
            "patch": net.geometry.patch,
            "statistics": net.geometry.statistics,
        },
        "plan": net.plan.to_json(),
    }
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: str | Path, model: nn.Module | None = None, *, mask: object = None) -> AdaptiveModel:
    """Read a converted network written by `save`.

    Args:
        path: the file.
        model: the original architecture (any weights); needed if the network was not built by name.
        mask: replaces the stored mask.

    Returns:
        The network in evaluation mode. Its plan is made anew and compared with the stored one.

    Raises:
        FileError: missing, truncated or foreign file, or one that does not fit the model.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    levels = tensors.pop(_MASK_TENSOR, None)
    if mask is None:
        mask = levels if levels is not None else metadata["mask"]
    if mask is None:
        raise FileError(
            f"{path} was saved with {_NO_MASK}.",
            next='give one: cs.load(path, mask="edges" or your function).',
        )
    source = Source.from_dict(metadata["source"]) if metadata["source"] else None
    if model is None:
        if source is None:
            raise FileError(
                f"{path} does not say how to build its network.",
                why="the network was converted from a module, not by name.",
                next="pass the original architecture: cs.load(path, model=...).",
            )
        model = build_model(source.name, "none", **source.kwargs)
    stored = Plan.from_json(metadata["plan"])
    options = dict(metadata["options"])
    options["output_stride"] = tuple(options["output_stride"])
    example = torch.zeros(
        stored.example_shape, dtype=next((p.dtype for p in model.parameters()), torch.float32)
    )
    net = adaptify(model.eval(), mask, **options, example_input=example, verify_laws=False)
    if net.plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            where=_first_difference(net.plan, stored),
            why=f"it was written with {_listed(metadata['versions'])}; here are {_listed(_versions())}.",
            next="pass the model it was converted from, or convert again.",
        )
    known = net.state_dict().keys()  # parameters of a mask that was replaced have no place
    tensors = {
        name: value
        for name, value in tensors.items()
        if name in known or not name.startswith("_mask_provider.")
    }
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileError(
            f"the parameters in {path} do not fit the model.",
            why=" ".join(str(error).split())[:400],
            next="pass the architecture it was converted from.",
        ) from error
    net.source = source
    return net


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file says about itself, without its tensors."""
    return _read(Path(path), tensors=False)[0]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileError(f"there is no file {path}.", next="check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            values = {name: file.get_tensor(name) for name in file.keys()} if tensors and text else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is not a readable safetensors file.",
            why=f"{error}; it may be truncated.",
            next="write it again with cs.save or cadsurgery convert.",
        ) from error
    if text is None:
        raise FileError(
            f"{path} was not written by cadsurgery.",
            why="it holds no plan.",
            next="give its weights to cadsurgery convert --weights FILE.",
        )
    metadata = json.loads(text)
    if metadata["format"] > FORMAT:
        raise FileError(
            f"{path} has format {metadata['format']}, this version reads up to {FORMAT}.",
            next="update cadsurgery.",
        )
    return metadata, values


def _mask_spec(mask: MaskProvider) -> str | None:
    if isinstance(mask, FunctionMask) or REGISTERED_MASKS.get(mask.name) is not type(mask):
        return None
    return mask.spec()


def _versions() -> dict[str, str]:
    found = {"cadsurgery": cadsurgery.__version__}
    for package in ("torch", "torchvision", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _first_difference(plan: Plan, stored: Plan) -> str:
    for ours, theirs in zip(plan.decisions, stored.decisions, strict=False):
        if ours != theirs:
            return (
                f"{theirs.node} ({theirs.operation}): stored {theirs.action}, now {ours.node} {ours.action}"
            )
    return f"{len(stored.decisions)} decisions stored, {len(plan.decisions)} now"
