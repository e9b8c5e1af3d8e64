"""Save and load converted networks: safetensors for tensors, JSON metadata for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cadsurgery.api import adaptify
from cadsurgery.candidates import check_network
from cadsurgery.environment import versions
from cadsurgery.errors import CannotConvert, FileError, InvalidInput, first_line
from cadsurgery.files import written_whole
from cadsurgery.masks import FixedMask, MaskProvider
from cadsurgery.masks.basic import TENSOR
from cadsurgery.masks.text import parse
from cadsurgery.model import AdaptiveModel, OptimizedModel
from cadsurgery.surgery.plan import Plan
from cadsurgery.zoo import Source, build_model

FORMAT = 1
T = TypeVar("T")
_KEY = "cadsurgery"
_MASK = "cadsurgery.mask."  # prefix of what belongs to the mask
_NO_MASK = "a function or provider of your own, which a file cannot hold"


def save(net: AdaptiveModel, path: str | Path) -> None:
    """Write a converted network: parameters and buffers, plan, options, mask, source and versions.

    The file appears whole or not at all. No pickle. A mask that is a function or an unregistered provider
    cannot be stored; `load` then asks for one.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: the network is not converted, or an optimised copy.
    """
    path = Path(path)
    if not isinstance(net, AdaptiveModel):
        raise InvalidInput(
            f"{type(net).__name__} is not a converted network.",
            next="save what cs.adaptify gave; of another network torch.save(model.state_dict(), path).",
        )
    if isinstance(net, OptimizedModel) or isinstance(getattr(net, "part", None), OptimizedModel):
        raise InvalidInput(
            "an optimised network cannot be saved.",
            why="its weights are folded and no longer the original's.",
            next="save the network it was made from, and call optimize() after loading.",
        )
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()}
    tensors |= {f"{_MASK}{name}": value.cpu().contiguous() for name, value in net.mask.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "versions": versions(),
        "source": net.source.to_dict() if net.source is not None else None,
        "mask": net.mask.spec() if net.mask.storable else None,
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
        InvalidInput, CannotConvert: `model` is no network, or wraps, compiles, ... one.
    """
    path = Path(path)
    if model is not None:
        check_network(model)
    metadata, tensors = _read(path)
    of_mask = {name[len(_MASK) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    if mask is None and metadata.get("mask") is not None:
        mask = _stored_mask(path, metadata["mask"], of_mask)
    if mask is None:
        raise FileError(
            f"{path} was saved with {_NO_MASK}.",
            next='give one: cs.load(path, mask="edges" or your function).',
        )
    stated = metadata["source"]
    source = _damaged_if_wrong(path, lambda: Source.from_dict(stated)) if stated else None
    if model is None:
        if source is None:
            raise FileError(
                f"{path} does not say how to build its network.",
                why="the network was converted from a module, not by name.",
                next="pass the original architecture: cs.load(path, model=...).",
            )
        model = build_model(source.name, "none", **source.kwargs)
    stored = _damaged_if_wrong(path, lambda: Plan.from_json(metadata["plan"]))
    options = _damaged_if_wrong(path, lambda: {**metadata["options"], "output_stride": stored.output_stride})
    example = torch.zeros(
        stored.example_shape, dtype=next((p.dtype for p in model.parameters()), torch.float32)
    )
    try:
        net = adaptify(model.eval(), mask, **options, example_input=example, verify_laws=False)
    except (CannotConvert, InvalidInput) as error:
        raise FileError(
            f"{path} does not fit this model.",
            why=f"{error.what} {error.why}".strip(),
            next="pass the architecture it was converted from.",
        ) from error
    except TypeError as error:
        raise _damaged(path, first_line(error)) from error
    if net.plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            where=_first_difference(net.plan, stored),
            why=f"it was written with {_listed(metadata['versions'])}; here are {_listed(versions())}.",
            next="pass the model it was converted from, or convert again.",
        )
    try:
        net.load_state_dict(tensors, assign=True)  # the stored types, e.g. bfloat16
    except RuntimeError as error:
        raise FileError(
            f"the parameters in {path} do not fit the model.",
            why=" ".join(str(error).split())[:400],
            next="pass the architecture it was converted from.",
        ) from error
    net.lay_out()
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
            names = list(file.keys()) if tensors and text else []
            # Copied: in the file they lie at any address, and convolutions round by how memory is aligned.
            values = {name: file.get_tensor(name).clone() for name in names}
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
    metadata = _damaged_if_wrong(path, lambda: dict(json.loads(text)))
    missing = {"format", "versions", "source", "mask", "options", "plan"} - metadata.keys()
    if missing or not isinstance(metadata["format"], int):
        raise _damaged(path, f"its metadata lacks {', '.join(sorted(missing)) or 'a format number'}")
    if metadata["format"] > FORMAT:
        raise FileError(
            f"{path} has format {metadata['format']}, this version reads up to {FORMAT}.",
            next="update cadsurgery.",
        )
    return metadata, values


def _damaged_if_wrong(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {first_line(error)}") from error


def _damaged(path: Path, why: str) -> FileError:
    return FileError(
        f"the metadata of {path} is damaged.", why=why, next="write the file again with cs.save."
    )


def _stored_mask(path: Path, spec: str, tensors: dict[str, torch.Tensor]) -> MaskProvider | None:
    """The mask of a spec, with its tensors; None if a tensor that is a mask is missing."""
    mask = parse(spec, lambda: FixedMask(torch.zeros(1, 1)), TENSOR)
    for name, part in mask.named_modules():
        if isinstance(part, FixedMask):
            key = f"{name}.levels".removeprefix(".")
            if key not in tensors:
                return None
            part.levels = tensors[key]
    try:
        mask.load_state_dict(tensors, assign=True)  # the stored types
    except RuntimeError as error:
        raise FileError(
            f"the tensors of mask {spec} in {path} do not fit it.",
            why=" ".join(str(error).split())[:400],
            next='write the file again with cs.save, or give another mask: cs.load(path, mask="edges").',
        ) from error
    return mask


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _first_difference(plan: Plan, stored: Plan) -> str:
    for ours, theirs in zip(plan.decisions, stored.decisions, strict=False):
        if ours != theirs:
            fields = [name for name, value in vars(theirs).items() if getattr(ours, name) != value]
            changes = (
                f"{name} {getattr(theirs, name)!r}, now {getattr(ours, name)!r}" for name in fields[:3]
            )
            return f"{theirs.node} ({theirs.operation}): stored {'; '.join(changes)}"
    return f"{len(stored.decisions)} decisions stored, {len(plan.decisions)} now"
