"""Open networks that users specify by file, name, `module:function` or as objects; and example images for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.channels import check_bands, statistics_of
from cadsurgery.data.hub import is_address
from cadsurgery.data.images import check_size, normalise, read_picture_for, resized, street_scene
from cadsurgery.data.networks import Source, build_again, build_model, source_of
from cadsurgery.data.onnx_files import is_onnx
from cadsurgery.data.samples import MOST, pictures_of
from cadsurgery.masks.unit import BANDS, read_normalisation
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.method_files import load as load_any
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.storage import load, read_method
from cadsurgery.support import files
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.errors import FileError, InvalidInput, UnknownName
from cadsurgery.support.kinds import CONVERTED, check_kind, kind_by_ending, kind_refused, of_another_kind
from cadsurgery.support.provenance import describe_run
from cadsurgery.tasks.task_options import Conversion

Strides = tuple[int, int] | Sequence[tuple[int, int] | None]  # one pair (high, low), or several
DEFAULT_SIZE = (512, 1024)
_LIBRARIES = ("torchvision", "timm")
_A_NAME = "the name of a network"


def is_file(network: object) -> bool:
    """True if `network` refers to a converted file, local or on the Hub, instead of a name or an ONNX file."""
    if not isinstance(network, str) or is_onnx(network):
        return False
    return is_address(network) or network.endswith(".safetensors") or files.is_file(network)


def open_any(network: object, trust: bool = False) -> ConvertedModel | None:
    """Return a network made by a method of `cadsurgery.methods`, also from its file; None for anything else.

    Args:
        network: a network, or anything that specifies one.
        trust: see `cadsurgery.load`.
    """
    if isinstance(network, ConvertedModel):
        return network
    if not isinstance(network, str) or not is_file(network) or not read_method(network):
        return None
    return cast(ConvertedModel, load_any(network, trust=trust))


Pictures = Callable[[Source], Iterable[Tensor]]  # those that a command reads, for a network of a source


def with_statistics(options: Mapping[str, Any], source: Source, pictures: Pictures | None) -> dict[str, Any]:
    """Return options of a conversion with mean and deviation of the pictures in place of the normalisation `bands`.

    Raises:
        InvalidInput: there are no pictures.
    """
    if options.get("normalisation") != BANDS or pictures is None:
        return dict(options)
    return {**options, "normalisation": statistics_of(pictures(source))}


def read_by(
    net: nn.Module, bands: Sequence[int] = (), normalisation: object = None, pictures: Pictures | None = None
) -> None:
    """Set how a converted network reads pictures from now on, where it is said: its bands, and its normalisation.

    Raises:
        InvalidInput: see `read_normalisation` and `with_statistics`.
    """
    if not bands and normalisation is None:
        return
    source = _of_bands(source_of(net), bands)
    chosen = with_statistics({"normalisation": normalisation}, source, pictures)["normalisation"]
    if chosen is not None and isinstance(net, AdaptiveModel) and not net.hosts_part:
        net.normalisation = chosen
    else:
        source = normalised_by(source, chosen)
    if getattr(net, "source", None) is not None:  # a network without a name has no record
        net.source = source  # type: ignore[assignment]


def normalised_by(source: Source, normalisation: object) -> Source:
    """Return the source with mean and deviation of the option `normalisation`; as it is for None or raw."""
    if normalisation is None:
        return source
    read = read_normalisation(normalisation, source.channels)
    return replace(source, mean=read.mean, std=read.std) if read.mean else source


def original(
    network: str | nn.Module, weights: str = "auto", num_classes: int | None = None, bands: Sequence[int] = ()
) -> tuple[nn.Module, Source]:
    """Build a network to convert; return it and its source.

    Args:
        network: a name, `module:function`, an ONNX file, or a module, which is returned unchanged.
        weights: weights of a network by name; see `build_model`.
        num_classes: number of classes of a torchvision or timm network; a function chooses its classes itself.
        bands: which bands of pictures it reads, counted from 1; its source has them.

    Raises:
        FileError: `network` is a file or folder instead of a name, or there is no such file.
    """
    if isinstance(network, nn.Module):
        return network, _of_bands(source_of(network), bands)
    _refuse_file(network)
    torch.manual_seed(0)  # random weights are the same in every run
    library, _, function = network.partition(":")
    try:
        built = build_model(
            network, weights, num_classes=None if function and library not in _LIBRARIES else num_classes
        )
    except UnknownName as error:
        raise of_another_kind(network, what=_A_NAME) or error from None  # a folder
    built.cad_source = _of_bands(source_of(built), bands)  # type: ignore[assignment]
    return built, source_of(built)


def _refuse_file(network: str) -> None:
    """Refuse a file in place of the name of a network, but for an ONNX file, which holds one.

    Raises:
        FileError: it is a file, or it ends like one and there is no such file.
    """
    if is_onnx(network):
        return
    if is_address(network):
        raise kind_refused(network, CONVERTED, _A_NAME)
    if files.is_file(network):
        check_kind(network, what=_A_NAME)
    elif kind_by_ending(network) is not None or network.endswith(".safetensors"):
        refusal = files.absent(network)
        raise FileError(refusal.what, next=f"{refusal.next} Or give {_A_NAME}.")


def open_converted(
    network: str,
    mask: object = None,
    options: Mapping[str, Any] | None = None,
    *,
    weights: str = "none",
    num_classes: int | None = None,
    bands: Sequence[int] = (),
    pictures: Pictures | None = None,
    trust: bool = False,
) -> AdaptiveModel:
    """Open a converted file, optionally with another mask, or convert a network by name without verification.

    How it reads pictures may be changed for both: `bands`, and the `normalisation` of the options, for which `pictures`
    are read if it is that of the bands.

    Raises:
        InvalidInput: options other than the defaults for a file, which is converted already.
    """
    options = options or {}
    check_options(network, options)
    if not is_file(network):
        built, source = original(network, weights, num_classes, bands)
        options = with_statistics(options, source, pictures)
        net = adaptify(built, mask or DEFAULT_MASK, **options, verify_laws=False)
        pictures_for(net)
        return net
    net = load(network, mask=mask or None, trust=trust)
    read_by(net, bands, options.get("normalisation"), pictures)
    return net


def check_options(network: object, options: Mapping[str, Any]) -> None:
    """Refuse conversion options for a file unless they are the defaults; its normalisation may be changed.

    Raises:
        InvalidInput: the file is converted already.
    """
    fixed = {name: value for name, value in options.items() if name != "normalisation"}
    changed = [name for name, value in fixed.items() if value != getattr(Conversion(), name)]
    if changed and is_file(network):
        check_kind(str(network), CONVERTED)
        raise InvalidInput(
            f"{network} is converted already; {', '.join(changed)} cannot be changed.",
            next="leave these options out, or convert the network again with them.",
        )


def pairs_of(output_stride: Strides) -> list[tuple[int, int] | None]:
    """Return the pairs of output strides that are meant: those of a list, or one that is given alone.

    Raises:
        InvalidInput: neither a pair nor a list of pairs.
    """
    listed = list(output_stride)
    if len(listed) == 2 and all(isinstance(stride, int) for stride in listed):
        return [(listed[0], listed[1])]  # type: ignore[list-item]
    if any(pair is not None and (isinstance(pair, (int, str)) or len(pair) != 2) for pair in listed):
        raise InvalidInput(
            f"output_stride={output_stride!r} is neither a pair (high, low) nor a list of pairs.",
            next="give output_stride=(8, 16), or [(8, 16), (8, 32)] to compare several.",
        )
    return listed  # type: ignore[return-value]


def at_strides(
    network: str | nn.Module,
    output_stride: Strides,
    options: Mapping[str, Any],
    *,
    mask: object = DEFAULT_MASK,
    weights: str = "auto",
    bands: Sequence[int] = (),
    pictures: Pictures | None = None,
    trust: bool = False,
) -> tuple[list[AdaptiveModel], Source]:
    """Return a converted network for each pair of output strides, and their common source.

    A network that is converted already keeps its mask and its other options; without pairs it is returned unchanged.

    Args:
        network: a file, a name or `module:function`, a module, or a converted network.
        output_stride: a pair (high, low), or several; None for the network's own; default: the pair in the options.
        options: options of `adaptify` for a network that is not converted yet.
        mask: mask of such a network.
        weights: weights of a network by name.
        bands, pictures: see `open_converted`.
        trust: run code that a file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: no pair of output strides, or other ones for a converted network that cannot be rebuilt by name.
    """
    options = {name: value for name, value in options.items() if value is not None}
    pair = options.pop("output_stride", None)
    pairs = pairs_of(output_stride) or ([pair] if pair is not None else [])
    opened = load(network, trust=trust) if isinstance(network, str) and is_file(network) else network
    if not isinstance(opened, AdaptiveModel):
        opened, source = original(opened, weights, bands=bands)
        options = with_statistics(options, source, pictures)
    else:
        read_by(opened, bands, options.pop("normalisation", None), pictures)
        source = pictures_for(opened)
        if not pairs:
            return [opened], _of_bands(source, bands)
        geometry, mask = opened.geometry, opened.mask
        reading = ("anchor", "fill", "pool", "patch", "statistics")
        options = {name: getattr(geometry, name) for name in reading}
        options |= {"region": opened.plan.region, "outputs": opened.plan.returned}
        options |= {"normalisation": opened.normalisation}
        opened = unconverted(opened)
    nets = [
        adaptify(opened, mask, output_stride=pair, verify_laws=False, **options) for pair in pairs or [None]
    ]
    sources = [pictures_for(net) for net in nets]
    return nets, _of_bands(replace(source, mean=sources[0].mean, std=sources[0].std), bands)


def _of_bands(source: Source, bands: Sequence[int]) -> Source:
    return replace(source, bands=check_bands(bands)) if bands else source


def unconverted(net: AdaptiveModel) -> nn.Module:
    """Return the network that was converted, built anew, with the weights that the converted one has now.

    Raises:
        InvalidInput: the network has no name by which it can be built.
        FileError: an untrusted file names code of others.
    """
    source = pictures_for(net)
    if ":" not in source.name:
        raise InvalidInput(
            "a converted network without a name cannot be built again as it was, or for other output strides.",
            next="pass the original network instead.",
        )
    state = net.state_dict()  # has the original's names; mask and adapters are stored beside it
    model = build_again(source, state)
    model.load_state_dict(state)
    model.cad_source = source  # type: ignore[assignment]
    return model


def weights_in_words(network: object, source: Source) -> str:
    """Describe the weights of a network. The source describes the weights only of a network by name."""
    if not isinstance(network, str):
        return "weights as they were given"
    if not is_file(network):
        return source.note
    return f"weights in {network}, at first {source.note.removeprefix('weights ').removeprefix('are ')}"


def provenance(network: object, source: Source, device: torch.device) -> dict[str, Any]:
    """Return the provenance of a report made now: `model`, `weights`, `random`, and the result of `describe_run`."""
    return {
        "model": source.name,
        "weights": weights_in_words(network, source),
        "random": source.weights == "random",
        **describe_run(device),
    }


def example_image(
    path: Path | None,
    size: tuple[int, int] | None,
    seed: int = 0,
    source: Source | None = None,
    bands: Sequence[int] = (),
) -> Tensor:
    """Return an image (C, H, W) in 0..1 as a network of this source reads it: the file, or a generated street scene.

    Without a source it has the bands of the file, or those that are named; a scene is in colour.
    """
    check_size(size)
    if path is None:
        return street_scene(*(size or DEFAULT_SIZE), seed, 3 if source is None else source.channels)
    return read_picture_for(source, path, size, bands=bands)


def example_batch(
    source: Source | None, path: Path | None = None, size: tuple[int, int] | None = None, seed: int = 0
) -> Tensor:
    """Return the example image, normalised for a network of this source: (1, C, H, W)."""
    size = size or (source.size if source is not None else None)
    return normalise(example_image(path, size, seed, source), source).unsqueeze(0)


def pictures_like(
    data: SegmentationData, size: tuple[int, int], source: Source, most: int = MOST
) -> list[Tensor]:
    """Read pictures of data as a network of this source reads them, each as a batch (1, C, H, W) of a size, normalised.

    Args:
        data: see `open_pictures`.
        size: (height, width).
        source: of the network.
        most: number of pictures at most, evenly spread, see `pictures_of`.

    Raises:
        CadError: a picture cannot be read, or has no bands that the network reads.
    """
    images = pictures_of(data, most)(source)
    return [normalise(resized(image[None], size), source) for image in images]
