"""Networks that users name, by file, name, `module:function` or as they are, opened; and images to try them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cadsurgery.data.hub import is_address
from cadsurgery.data.images import check_size, normalise, read_image, street_scene
from cadsurgery.data.networks import WEIGHTS, Source, build_again, build_model, source_of
from cadsurgery.methods.storage import SiblingModel
from cadsurgery.methods.storage import load as load_any
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.storage import load, read_method
from cadsurgery.support import files
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.provenance import describe_run
from cadsurgery.tasks.options import Conversion

DEFAULT_SIZE = (512, 1024)
_LIBRARIES = ("torchvision", "timm")


def is_file(network: object) -> bool:
    """True if a network is meant as a converted file, here or on the Hub, not as a name."""
    if not isinstance(network, str):
        return False
    return is_address(network) or network.endswith(".safetensors") or files.is_file(network)


def open_any(network: object, trust: bool = False) -> SiblingModel | None:
    """A network that any method made, or that of a file; None if it is neither.

    Args:
        network: anything that names a network, or one.
        trust: see `cadsurgery.load`.
    """
    if isinstance(network, SiblingModel):
        return network
    if not isinstance(network, str) or not is_file(network) or not read_method(network):
        return None
    return cast(SiblingModel, load_any(network, trust=trust))


def original(
    network: str | nn.Module, weights: str = "auto", num_classes: int | None = None
) -> tuple[nn.Module, Source]:
    """A network to convert, and where it comes from.

    Args:
        network: a name or `module:function`, or a module, which is taken as it is.
        weights: of a network by name; see `build_model`.
        num_classes: of a network of torchvision or timm; a function decides on its classes itself.

    Raises:
        FileError: there is no such file.
        InvalidInput: a file is no name of a network.
    """
    if isinstance(network, nn.Module):
        return network, source_of(network)
    if is_address(network) or Path(network).suffix in WEIGHTS:
        if not is_address(network) and not files.is_file(network):
            refusal = files.absent(network)
            raise FileError(refusal.what, next=f"{refusal.next} Or give the name of a network.")
        raise InvalidInput(
            f"{network} is a file, not the name of a network.",
            why="what is converted is a network by name, with weights from a file if you like.",
            next="give the name of its network, and --weights FILE for its weights.",
        )
    torch.manual_seed(0)  # random weights, where they are random, are the same in every run
    library, _, function = network.partition(":")
    built = build_model(
        network, weights, num_classes=None if function and library not in _LIBRARIES else num_classes
    )
    return built, source_of(built)


def open_converted(
    network: str,
    mask: object = None,
    options: Mapping[str, Any] | None = None,
    *,
    weights: str = "none",
    num_classes: int | None = None,
    trust: bool = False,
) -> AdaptiveModel:
    """A converted network: a file's, with another mask if one is given, or one by name, converted without verification.

    Raises:
        InvalidInput: options for a file that are not the defaults: it is converted already.
    """
    options = options or {}
    check_options(network, options)
    if not is_file(network):
        built, _ = original(network, weights, num_classes)
        net = adaptify(built, mask or "edges", **options, verify_laws=False)
        pictures_for(net)
        return net
    return load(network, mask=mask or None, trust=trust)


def check_options(network: object, options: Mapping[str, Any]) -> None:
    """Refuse options of a conversion for a file that are not the defaults.

    Raises:
        InvalidInput: it is converted already.
    """
    changed = [name for name, value in options.items() if value != getattr(Conversion(), name)]
    if changed and is_file(network):
        raise InvalidInput(
            f"{network} is converted already; {', '.join(changed)} cannot be changed.",
            next="leave these options out, or convert the network anew with them.",
        )


def at_strides(
    network: str | nn.Module,
    pairs: Sequence[tuple[int, int] | None],
    options: Mapping[str, Any],
    *,
    mask: object = "edges",
    weights: str = "auto",
    trust: bool = False,
) -> tuple[list[AdaptiveModel], Source]:
    """A converted network for each pair of output strides, and where all of them come from.

    One that is converted already keeps its mask and its other options; without pairs it is the one.

    Args:
        network: a file, a name or `module:function`, a module, or a converted network.
        pairs: (high, low); None for the network's own; default: those of the options.
        options: of `adaptify` for a network that is not converted yet.
        mask: likewise.
        weights: of a network by name.
        trust: run code that a file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: other output strides for a converted network that cannot be built again by name.
    """
    options = {name: value for name, value in options.items() if value is not None}
    pair = options.pop("output_stride", None)
    pairs = pairs or ([pair] if pair is not None else [])
    opened = load(network, trust=trust) if isinstance(network, str) and is_file(network) else network
    if not isinstance(opened, AdaptiveModel):
        opened, source = original(opened, weights)
    else:
        source = pictures_for(opened)
        if not pairs:
            return [opened], source
        if ":" not in source.name:
            raise InvalidInput(
                "a converted network of no name cannot be given other output strides.",
                next="pass the original network instead.",
            )
        state, geometry, mask = opened.state_dict(), opened.geometry, opened.mask
        reading = ("anchor", "fill", "pool", "patch", "statistics")
        options = {name: getattr(geometry, name) for name in reading}
        options |= {"region": opened.plan.region, "outputs": opened.plan.returned}
        options |= {"normalisation": opened.normalisation}
        opened = build_again(source, state)
        opened.load_state_dict(state)
        opened.cad_source = source  # type: ignore[assignment]
    nets = [
        adaptify(opened, mask, output_stride=pair, verify_laws=False, **options) for pair in pairs or (None,)
    ]
    known = [pictures_for(net) for net in nets]
    return nets, replace(source, mean=known[0].mean, std=known[0].std)


def weights_in_words(network: object, source: Source) -> str:
    """Which weights a network has; how it was built tells that of a name only, others may have been trained since."""
    if not isinstance(network, str):
        return "weights as they were given"
    if not is_file(network):
        return source.note
    return f"weights in {network}, at first {source.note.removeprefix('weights ').removeprefix('are ')}"


def provenance(network: object, source: Source, device: torch.device) -> dict[str, Any]:
    """The provenance of a report on a network, made here and now: `model`, `weights`, if they are `random`,
    and what `describe_run` gives."""
    words = weights_in_words(network, source)
    return {
        "model": source.name,
        "weights": words,
        "random": source.weights == "random",
        **describe_run(device),
    }


def example_image(path: Path | None, size: tuple[int, int] | None, seed: int = 0) -> Tensor:
    """(3, H, W) in 0..1: the file, or a generated street scene."""
    check_size(size)
    return street_scene(*(size or DEFAULT_SIZE), seed) if path is None else read_image(path, size)


def example_batch(
    source: Source | None, path: Path | None = None, size: tuple[int, int] | None = None, seed: int = 0
) -> Tensor:
    """(1, 3, H, W): the example image as a network of this source expects it."""
    return normalise(example_image(path, size, seed), source).unsqueeze(0)
