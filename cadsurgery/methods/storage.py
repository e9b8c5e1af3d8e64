"""Save and load whatever was made of a network, by any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cadsurgery.methods.anytime import storage as of_exits
from cadsurgery.methods.anytime.model import AnytimeModel
from cadsurgery.methods.anytime.plan import AnytimePlan
from cadsurgery.methods.files import AGAIN
from cadsurgery.methods.resampling import storage as of_samples
from cadsurgery.methods.resampling.model import ResampledModel
from cadsurgery.methods.resampling.plan import ResampledPlan
from cadsurgery.methods.sampling import storage as of_gates
from cadsurgery.methods.sampling.model import SampledModel
from cadsurgery.methods.sampling.plan import SamplingPlan
from cadsurgery.network import storage
from cadsurgery.network.candidates import check_network
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.surgery.plan import Plan

Made = AnytimeModel | ResampledModel | SampledModel
Converted = AdaptiveModel | Made
AnyPlan = Plan | AnytimePlan | ResampledPlan | SamplingPlan


class _Method(NamedTuple):
    """What is made of networks by a method: its type, how it is written and read, and its plan."""

    kind: type[nn.Module]
    save: Callable[..., None]
    load: Callable[..., Converted]
    plan: Any


_METHODS = {
    of_exits.NAME: _Method(AnytimeModel, of_exits.save_anytime, of_exits.load_anytime, AnytimePlan),
    of_gates.NAME: _Method(SampledModel, of_gates.save_sampled, of_gates.load_sampled, SamplingPlan),
    of_samples.NAME: _Method(
        ResampledModel, of_samples.save_resampled, of_samples.load_resampled, ResampledPlan
    ),
}


def save(net: Converted, path: str | Path) -> None:
    """Write a converted network: parameters and buffers, what its method added, plan, options, source and versions.

    The file appears whole or not at all, and holds checksums. No pickle. A mask that is a function or an
    unregistered provider cannot be stored; `load` then asks for one.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: the network is not converted, or an optimised copy.
    """
    own = (method.save for method in _METHODS.values() if isinstance(net, method.kind))
    write: Callable[..., None] = next(own, storage.save)
    write(net, path)


def load(
    path: str | Path, model: nn.Module | None = None, *, mask: object = None, trust: bool = False
) -> Converted:
    """Read a converted network written by `save`, or `push_to_hub`.

    A file is no reason to run code: what it names is built or asked only if it is ours or listed by torchvision or
    timm.

    Args:
        path: the file, or its address on the Hugging Face Hub, `hf:owner/name` or `hf:owner/name@revision`.
        model: the original architecture (any weights); needed if the network was not built by name.
        mask: replaces the stored mask of an adaptive network.
        trust: import and call what the file names, `module:function` of a network or of its mask, whatever it is,
            and make whatever size it asks for.

    Returns:
        The network in evaluation mode. Its plan is made anew and compared with the stored one.

    Raises:
        FileError: missing, damaged or foreign file, one that does not fit the model, one that names code and is not
            trusted, or one of the Hub that cannot be had.
        InvalidInput, CannotConvert: `model` is no network, or wraps, compiles, ... one.
    """
    if model is not None:
        check_network(model)
    method = _method_of(path)
    if method is None:
        return storage.load(path, model, mask=mask, trust=trust)
    if mask is not None:
        raise InvalidInput(f"{path} holds a network without masks.", next="leave out mask=, --mask.")
    header, tensors = storage.open_file(path, True)
    return method.load(path, storage.check_metadata(path, header), tensors, model, trust)


def read_plan(path: str | Path) -> AnyPlan:
    """The plan in a file of any method; no network is built.

    Raises:
        FileError: missing, damaged or foreign file.
    """
    method, values = _method_of(path), storage.check_metadata(path, storage.open_file(path, False)[0])
    if method is None:
        values = storage.read_metadata(path)
    with storage.as_file_error(f"the metadata of {path} is damaged.", AGAIN):
        plan: AnyPlan = (method.plan if method else Plan).from_json(values["plan"])
    return plan


def _method_of(path: str | Path) -> _Method | None:
    """The method of a file; None of an adaptive network."""
    name = storage.read_method(path)
    if name and name not in _METHODS:
        raise FileError(f"{path} was made by a method {name!r:.60}.", next="update cadsurgery.")
    return _METHODS[name] if name else None
