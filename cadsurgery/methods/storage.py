"""Save and load whatever was made of a network, by any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from cadsurgery.methods.anytime import storage as of_exits
from cadsurgery.methods.anytime.model import AnytimeModel
from cadsurgery.methods.resampling import storage as of_samples
from cadsurgery.methods.resampling.model import ResampledModel
from cadsurgery.methods.sampling import storage as of_gates
from cadsurgery.methods.sampling.model import SampledModel
from cadsurgery.network import storage
from cadsurgery.network.candidates import check_network
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import FileError, InvalidInput

Converted = AdaptiveModel | AnytimeModel | ResampledModel | SampledModel
_LOADERS: dict[str, Callable[..., Converted]] = {
    of_exits.NAME: of_exits.load_anytime,
    of_gates.NAME: of_gates.load_sampled,
    of_samples.NAME: of_samples.load_resampled,
}


def save(net: Converted, path: str | Path) -> None:
    """Write a converted network: parameters and buffers, what its method added, plan, options, source and versions.

    The file appears whole or not at all, and holds checksums. No pickle. A mask that is a function or an
    unregistered provider cannot be stored; `load` then asks for one.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: the network is not converted, or an optimised copy.
    """
    if isinstance(net, AnytimeModel):
        of_exits.save_anytime(net, path)
    elif isinstance(net, SampledModel):
        of_gates.save_sampled(net, path)
    elif isinstance(net, ResampledModel):
        of_samples.save_resampled(net, path)
    else:
        storage.save(net, path)


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
    method = storage.read_method(path)
    if not method:
        return storage.load(path, model, mask=mask, trust=trust)
    if mask is not None:
        raise InvalidInput(f"{path} holds a network without masks.", next="leave out mask=.")
    if method not in _LOADERS:
        raise FileError(f"{path} was made by a method {method!r:.60}.", next="update cadsurgery.")
    header, tensors = storage.open_file(path, True)
    return _LOADERS[method](path, storage.check_metadata(path, header), tensors, model, trust)
