"""Save and load the networks of all methods."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cadsurgery.following.arguments import outside_inference_mode
from cadsurgery.methods import anytime, resampling, sampling  # noqa: F401  # they register themselves
from cadsurgery.methods.converted import ConvertedModel, kind_of, pack, unpack
from cadsurgery.methods.report import MethodPlan
from cadsurgery.network import storage
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.unconvertible import check_network
from cadsurgery.surgery.plan import Plan

Converted = AdaptiveModel | ConvertedModel
AnyPlan = Plan | MethodPlan


def save(net: Converted, path: str | Path) -> None:
    """Write a converted network: parameters and buffers, tensors the method added, plan, options, source and
    versions.

    The file is written atomically, has checksums and contains no pickle. A mask that is a function or an unregistered
    provider cannot be stored; `load` then asks for one.

    Raises:
        FileError: the path cannot be written.
        InvalidInput: the network is not converted, or is an optimised copy.
    """
    tensors, metadata = pack(net)
    storage.write_tensors(Path(path), tensors, {storage.KEY: storage.encode_with_checksum(metadata)})


@outside_inference_mode
def load(
    path: str | Path, model: nn.Module | None = None, *, mask: object = None, trust: bool = False
) -> Converted:
    """Read a converted network written by `save` or `push`.

    A file cannot make this function run foreign code: unless `trust` is set, a network or function that it names
    must be part of this package or listed by torchvision or timm.

    Args:
        path: the file, or its address on the Hugging Face Hub, `hf:owner/name` or `hf:owner/name@revision`.
        model: the original architecture (any weights); needed if the network was not built by name.
        mask: replaces the stored mask of an adaptive network.
        trust: import and call any `module:function` that the file names for its network or mask, and create tensors
            of any size it asks for.

    Returns:
        The network in evaluation mode. Its plan is computed again and compared with the stored plan.

    Raises:
        FileError: the file is missing, damaged, foreign, does not fit the model, names code without being trusted, or
            cannot be fetched from the Hub.
        InvalidInput, CannotConvert: `model` is not a network, or wraps or compiles one.
    """
    if model is not None:
        check_network(model)
    header, tensors = storage.open_file(path, True)
    return unpack(path, storage.check_metadata(path, header), tensors, model, mask=mask, trust=trust)


def read_plan(path: str | Path) -> AnyPlan:
    """Read the plan from a file of any method, without building a network.

    Raises:
        FileError: the file is missing, damaged or foreign.
    """
    values = storage.check_metadata(path, storage.open_file(path, False)[0])
    plan: AnyPlan = storage.read_stored(path, values, kind_of(path, values) or storage.Adaptive).plan
    return plan
