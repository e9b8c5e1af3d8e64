"""Build networks by name, from torchvision, timm, `module:function` or an ONNX file, with pretrained weights if
available."""

from __future__ import annotations

import fnmatch
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cadsurgery.data.hub import offline_without_network
from cadsurgery.data.onnx_files import digest, is_onnx, read_onnx
from cadsurgery.data.weight_files import is_weights, load_weights, split_entry
from cadsurgery.support import files
from cadsurgery.support.errors import (
    CadError,
    FileError,
    InvalidInput,
    UnknownName,
    first_line,
)
from cadsurgery.support.plain import check_fields
from cadsurgery.support.provenance import find_function, untrusted

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Arguments of torchvision's builders that change the parameters or the forward pass. Pretrained weights may set them;
# they are read from the built network so that it can be built again without its weights.
_DECISIVE = ("aux_loss", "aux_logits", "transform_input")
# Builder arguments accepted from an untrusted file: they only choose shapes, and none of them reads files or addresses.
_SHAPING = {
    *("num_classes", "in_chans", "output_stride", "features_only", "out_indices", "global_pool"),
    *("width_mult", "groups", "width_per_group", "replace_stride_with_dilation", "zero_init_residual"),
    *("dropout", "drop_rate", "drop_path_rate", "act_layer", "norm_layer", "trainable_backbone_layers"),
    *("init_weights", *_DECISIVE),
}
_SMALL, _FEW = 4096, 10_000_000  # limits of such an argument and of extra parameter values in a builder
# Parts of the names of torchvision's networks for image pairs, for video and with quantised weights.
_NO_IMAGES = ("raft", "quantized", "r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")


@dataclass(frozen=True)
class Source:
    """Record of how a network was built, from which a file can build it again.

    Attributes:
        name: `torchvision:NAME`, `timm:NAME`, `module:function` or, without its folder, `onnx:FILE`.
        kwargs: arguments of its builder.
        weights: origin of its weights: a name, a file, or `random`.
        note: remark about the weights for the user.
        mean: mean of the expected images per channel, on a scale of 0..1.
        std: standard deviation of the expected images per channel.
        size: height and width of the images, if the network takes no others.
        bands: which bands of a file the network reads, counted from 1, in their order; empty for all.
        license: licence of the weights, by its name on the Hub where it has one; "" if nothing states it.
        channels: number of channels that the network's first layer reads; found in the network, not recorded.
        untrusted: path of the file this source was read from, if the user has not declared it trusted; then none of its
            code is run.
        folder: folder in which an ONNX file is looked for; no file records it.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str = "random"
    note: str = ""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    bands: tuple[int, ...] = ()
    license: str = ""
    channels: int = field(default=3, compare=False)
    untrusted: str = field(default="", compare=False)
    folder: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        absent = {*_NOT_WRITTEN, *(name for name in ("size", "bands", "license") if not getattr(self, name))}
        return {name: value for name, value in asdict(self).items() if name not in absent}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Source:
        """Rebuild a source from the values of `to_dict`.

        Raises:
            ValueError, TypeError: the values are not those of a source.
        """
        hints = {name: hint for name, hint in get_type_hints(Source).items() if name not in _NOT_WRITTEN}
        source = Source(**check_fields(values, hints, "the source"))
        if not all(map(math.isfinite, source.mean + source.std)) or 0 in source.std:
            raise ValueError(f"mean {source.mean} or standard deviation {source.std}")
        if any(band < 1 for band in source.bands):
            raise ValueError(f"bands {source.bands}")
        return source

    def read_from(self, path: str | Path, trust: bool) -> Source:
        """Return the source as it was read from a file: whether the user trusts it, and the folder it lies in."""
        return replace(self, untrusted="" if trust else str(path), folder=str(Path(path).parent))


_NOT_WRITTEN = ("channels", "untrusted", "folder")  # fields that no file records


def build_model(
    name: str, weights: str = "auto", *, num_classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build a network by name, in evaluation mode; `model.cad_source` records how it was built.

    Args:
        name: a torchvision or timm name (torchvision wins if both have it; `timm:NAME` chooses),
            `module:function` for a network of your own, or the path of an ONNX file.
        weights: `"auto"` takes the library's best weights from its cache or the internet; if there are none, the
            weights stay random and the note says so. `"none"` keeps random weights. Otherwise the name of torchvision
            weights (e.g. `"IMAGENET1K_V2"`), a timm tag, or a file (`.safetensors`, `.pth`, `.ckpt`), in which a state
            dict that fits is searched; `FILE:ENTRY` names one of several, e.g. `"net.pth:model_ema"`. A function and an
            ONNX file bring their own.
        num_classes: number of outputs. If the pretrained weights are for another number, the fitting tensors are
            loaded; the others stay random, and the note names them.
        kwargs: arguments of the builder, e.g. `aux_loss=True`.

    Raises:
        UnknownName: there is no such network, or there are no such weights.
        FileError: the named weights, weight file or ONNX file are not available.
        CannotConvert: an ONNX file cannot be read, see `onnx_files.read_onnx`.
    """
    library, _, rest = name.partition(":")
    if not (library and rest):
        library, rest = "torchvision" if name in _torchvision_names() else "timm", name
    builders = {"torchvision": _torchvision_builder, "timm": _timm_builder}
    if is_onnx(name):
        build = _onnx_builder(Path(name.removeprefix("onnx:")))
    else:
        build = builders[library](rest) if library in builders else _function_builder(library, rest)
    path, entry = split_entry(weights)
    if weights not in ("auto", "none") and (is_weights(path) or files.exists(path)):
        model, source = build(
            "none", kwargs if num_classes is None else {**kwargs, "num_classes": num_classes}
        )
        note, license = load_weights(model, path, entry)
        # The name instead of the path: converted networks are shared and should not reveal local folders.
        source = replace(source, weights=path.name, note=note, license=license)
    else:
        model, source = _of_classes(build, weights, kwargs, num_classes)
    model.cad_source = replace(source, channels=channels_of(model))  # type: ignore[assignment]
    return model.eval()


def build_again(source: Source, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network that a source describes, with random weights.

    For an untrusted file only networks of torchvision and timm are built, only with arguments that choose their shapes,
    and only if they are not far larger than the tensors of the file. An ONNX file is read if it lies beside that file
    or in the current folder, and has not changed.

    Args:
        source: record of `build_model`.
        state: tensors that will be loaded into the network.

    Raises:
        FileError: an untrusted file describes any other network.
        UnknownName: the network is not installed here.
    """
    if is_onnx(source.name):
        return build_model(str(_place_of_onnx(source)), "none", sha256=source.kwargs.get("sha256", ""))
    if not source.untrusted:
        return build_model(source.name, "none", **source.kwargs)
    library, colon, _ = source.name.partition(":")
    if colon and library not in ("torchvision", "timm"):
        raise untrusted(source.untrusted, _call(source), "the architecture: cs.load(path, model=...)")
    largest = max((size for value in state.values() if value.numel() for size in value.shape), default=0)
    for name, value in source.kwargs.items():
        if name not in _SHAPING or not _is_small(value, max(largest, _SMALL)):
            code = f"{_call(source)}: argument {name!r:.60}"
            raise untrusted(source.untrusted, code, "the architecture: cs.load(path, model=...)")
    with _limit(4 * sum(value.numel() for value in state.values()) + _FEW, source):
        return build_model(source.name, "none", **source.kwargs)


def _place_of_onnx(source: Source) -> Path:
    """Return the ONNX file that a source names: in its folder, else in the current one."""
    name = Path(source.name.removeprefix("onnx:")).name
    places = [Path(source.folder) / name, Path(name)]
    place = next((place for place in places if files.is_file(place)), None)
    if place is None:
        raise FileError(
            f"the network's ONNX file {name:.200} is not here.",
            why="the converted file names it and holds the weights, but not the graph.",
            next=f"put {name:.200} beside the converted file, or pass the network: cs.load(path, "
            'model=cs.build_model("FOLDER/FILE.onnx")).',
        )
    return place


def _call(source: Source) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in source.kwargs.items())
    text = f"{source.name}({arguments})"
    return text if len(text) <= 400 else f"{text[:400]}..."


def _is_small(value: Any, largest: int) -> bool:
    """True if an argument is a plain value, or a short list of plain values, without large numbers or long texts."""
    if isinstance(value, list):
        return len(value) <= 64 and not any(isinstance(v, list) or not _is_small(v, largest) for v in value)
    if isinstance(value, str):
        return len(value) <= 40
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= largest)


@contextmanager
def _limit(most: int, source: Source) -> Iterator[None]:
    """Refuse a network that is built in this thread as soon as its parameters have more than `most` values."""
    thread, values = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal values
        if threading.get_ident() == thread and parameter is not None:
            values += parameter.numel()
            if values > most:
                raise FileError(
                    f"{source.untrusted} names a network far larger than the tensors it holds.",
                    where=_call(source),
                    next="pass the architecture it was converted from: cs.load(path, model=...).",
                )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def source_of(network: nn.Module) -> Source:
    """Return the source of a network; for a network of your own, a source with its type's name.

    Mean and standard deviation are those recorded by a converted network, else those of its `pretrained_cfg` (timm),
    else ImageNet's.
    """
    source = _recorded(network)
    if source is None:
        name, note = type(network).__name__, "weights as they were given"
        source = Source(name, {}, "own", note, *_statistics(network), license=license_of(network))
    source = replace(source, channels=channels_of(network))
    normalisation: Any = getattr(network, "normalisation", None)
    mean, is_part = getattr(normalisation, "mean", None), getattr(network, "hosts_part", False)
    if mean and isinstance(mean, tuple) and not is_part:  # for a part these are statistics of its own input
        return replace(source, mean=mean, std=normalisation.std)
    return source


def _recorded(network: nn.Module) -> Source | None:
    """Return the source that a converted network, or `build_model`, has recorded."""
    sources = (getattr(network, name, None) for name in ("source", "cad_source"))
    return next((source for source in sources if isinstance(source, Source)), None)


def license_of(network: nn.Module) -> str:
    """Return the licence of a network's weights: what a converted network or the record of `build_model` states, else
    its `pretrained_cfg` (timm) or those of its parts; several with commas between, "" if nothing states one."""
    if (stated := getattr(network, "license", "")) and isinstance(stated, str):
        return stated
    if (recorded := _recorded(network)) is not None:
        return recorded.license
    configs = map(_config, network.modules())
    found = dict.fromkeys(config.get("license") for config in configs)
    return ", ".join(license for license in found if license and isinstance(license, str))


_SMALL_IMAGE = (64, 64)  # on which a network is asked whether it takes so many channels


def channels_of(network: nn.Module) -> int:
    """Return how many channels the pictures of a network have: those that its first convolution reads.

    A first convolution may read rearranged pixels. If it does not read three channels, as most do, the network is
    asked: it reads colour if it runs on that and not on as many channels.
    """
    shape = getattr(getattr(network, "plan", None), "example_shape", None)
    if shape is not None and not getattr(network, "hosts_part", False):
        return int(shape[1])
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels == _COLOUR:
        return _COLOUR
    return next(
        (count for count in (first.in_channels, _COLOUR) if _runs_on(network, first, count)),
        first.in_channels,
    )


_COLOUR = len(IMAGENET_MEAN)


def _runs_on(network: nn.Module, first: nn.Conv2d, channels: int) -> bool:
    """True if a network runs on a small picture of so many channels; its state stays as it is."""
    modes = {module: module.training for module in network.modules()}
    image = torch.zeros(1, channels, *_SMALL_IMAGE, dtype=first.weight.dtype, device=first.weight.device)
    try:
        network.eval()
        with torch.no_grad():
            network(image)
    except Exception:  # any error: the network decides what it takes
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    return True


def class_names(source: Source) -> tuple[str, ...]:
    """Return the names of the classes of torchvision weights, in order; empty for other weights."""
    import torchvision

    library, _, name = source.name.partition(":")
    is_listed = library == "torchvision" and name in torchvision.models.list_models()
    weights: Any = torchvision.models.get_model_weights(name) if is_listed else ()
    return next(
        (tuple(entry.meta.get("categories", ())) for entry in weights if entry.name == source.weights), ()
    )


def stated_statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Return mean and standard deviation of the images that a network expects, and their origin in words: its library
    or its `pretrained_cfg`; None if neither states them."""
    source, stated = getattr(network, "cad_source", None), _config(network)
    if isinstance(source, Source) and source.name.partition(":")[0] in ("torchvision", "timm"):
        return source.mean, source.std, f"stated by {source.name}"
    if stated.get("mean") and stated.get("std"):
        return tuple(stated["mean"]), tuple(stated["std"]), "stated by its pretrained_cfg"
    return None


def _statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of a network's `pretrained_cfg`, or ImageNet's."""
    stated = _config(network)
    return tuple(stated.get("mean") or IMAGENET_MEAN), tuple(stated.get("std") or IMAGENET_STD)


def _config(network: nn.Module) -> dict[str, Any]:
    """Return a network's `pretrained_cfg` (set by timm, and perhaps by other libraries); empty if it has none."""
    stated = getattr(network, "pretrained_cfg", None)
    return stated if isinstance(stated, dict) else {}


def list_models(pattern: str = "*", library: str = "") -> list[str]:
    """List the torchvision and timm networks for images; `cadsurgery list` tells which of them can be converted.

    Args:
        pattern: shell-style, e.g. `"*resnet*"`.
        library: `"torchvision"` or `"timm"`; by default both, without duplicates.

    Raises:
        UnknownName: no such library.
    """
    import timm

    names = {"torchvision": _torchvision_names(), "timm": timm.list_models()}
    if library and library not in names:
        raise UnknownName("library", library, names)
    chosen = [library] if library else list(names)
    return sorted({name for key in chosen for name in fnmatch.filter(names[key], pattern)})


def _torchvision_names() -> list[str]:
    import torchvision

    return [name for name in torchvision.models.list_models() if not any(part in name for part in _NO_IMAGES)]


Builder = Callable[[str, dict[str, Any]], tuple[nn.Module, Source]]


def _torchvision_builder(name: str) -> Builder:
    import torchvision

    if name not in torchvision.models.list_models():
        raise UnknownName("torchvision network", name, torchvision.models.list_models())
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    no_backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}

    def build(weights: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Source]:
        all_weights: Any = () if weights == "none" else torchvision.models.get_model_weights(name)
        by_name = {entry.name: entry for entry in all_weights}
        entry: Any = by_name.get(weights) or getattr(all_weights, "DEFAULT", None)
        what = f"{name} {entry.name}" if entry is not None else None
        model, note = _pretrained(
            "torchvision", name, weights, list(by_name), what, lambda: builder(weights=entry, **kwargs)
        )
        if model is None:
            model = builder(weights=None, **no_backbone, **kwargs)
            return model, Source(f"torchvision:{name}", kwargs, "random", note, *_image_statistics(model))
        categories = entry.meta.get("categories")
        classes = {"num_classes": len(categories)} if categories else {}
        kwargs = {**classes, **_decisions(model, parameters), **kwargs}
        note, license = f"pretrained weights {entry.name}", str(entry.meta.get("license", ""))
        statistics = _image_statistics(model, entry)
        return model, Source(f"torchvision:{name}", kwargs, entry.name, note, *statistics, license=license)

    return build


def _image_statistics(model: nn.Module, entry: Any = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the images that a torchvision network expects with the weights `entry`;
    0 and 1 for detectors, which normalise their images themselves."""
    if hasattr(getattr(model, "transform", None), "image_mean"):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    preset = entry.transforms() if entry is not None else None
    return tuple(getattr(preset, "mean", IMAGENET_MEAN)), tuple(getattr(preset, "std", IMAGENET_STD))


def _decisions(model: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        name: getattr(model, name) for name in _DECISIVE if isinstance(getattr(model, name, None), bool)
    }
    if "aux_loss" in parameters:
        options["aux_loss"] = getattr(model, "aux_classifier", None) is not None
    return options


def _timm_builder(name: str) -> Builder:
    with offline_without_network():
        import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise UnknownName(
            "network", name, {*_torchvision_names(), *timm.list_models()}, next="cadsurgery list PATTERN"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in tags:
        raise UnknownName(f"weights of {plain}", tag, tags)

    def build(weights: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Source]:
        full = name if weights == "auto" else f"{plain}.{weights}"
        what = full if tags or timm.is_model_pretrained(plain) else None

        def create() -> nn.Module:
            with offline_without_network():
                return timm.create_model(full, pretrained=True, **kwargs)

        model, note = _pretrained("timm", plain, weights, tags, what, create)
        if model is None:
            model = timm.create_model(plain, pretrained=False, **kwargs)
            return model, Source(f"timm:{plain}", kwargs, "random", note, *_statistics(model))
        tag, license = (str(_config(model).get(stated) or "") for stated in ("tag", "license"))
        weights, note = tag or "default", f"pretrained weights {tag or 'default'}"
        return model, Source(f"timm:{plain}", kwargs, weights, note, *_statistics(model), license=license)

    return build


def _function_builder(module: str, function: str) -> Builder:
    builder = find_function(module, function)

    def build(weights: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Source]:
        _refuse_weights(weights)
        _check_arguments(builder, f"{module}:{function}", kwargs)
        model = builder(**kwargs)
        if not isinstance(model, nn.Module):
            raise InvalidInput(
                f"{module}:{function} returned {type(model).__name__}.",
                next="it must return a torch.nn.Module.",
            )
        note = "weights as the function made them"
        # The name of a file instead of its path: converted networks are shared and should not reveal local folders.
        place = Path(module).name if module.endswith(".py") else module
        return model, Source(f"{place}:{function}", kwargs, "own", note, *_statistics(model))

    return build


def _onnx_builder(path: Path) -> Builder:
    def build(weights: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Source]:
        _refuse_weights(weights)
        if more := kwargs.keys() - {"sha256"}:
            raise InvalidInput(
                f"{path} takes no argument {', '.join(sorted(more))}.",
                why="an ONNX file holds a network as it is, with its number of classes.",
                next="leave it out.",
            )
        sha256 = digest(path)
        if kwargs.get("sha256", sha256) != sha256:
            raise FileError(
                f"{path} is another ONNX file than the one the network was converted from.",
                why="its checksum does not match.",
                next="put that file in its place, or convert this one again.",
            )
        model, name = read_onnx(path), path.name
        source = Source(f"onnx:{name}", {"sha256": sha256}, name, f"weights of {name}", *_statistics(model))
        return model, replace(source, size=model.size, folder=str(path.parent))

    return build


def _refuse_weights(weights: str) -> None:
    """Refuse the name of weights where a network brings its own."""
    if weights not in ("auto", "none"):
        raise FileError(f"there is no file of weights {weights!r}.", next="give a .safetensors or .pth file.")


def _check_arguments(builder: Any, name: str, kwargs: dict[str, Any]) -> None:
    """Refuse a builder that does not accept these arguments; errors inside the builder are not caught."""
    if not callable(builder):
        raise InvalidInput(f"{name} is no function.", next="name one that returns a torch.nn.Module.")
    try:
        inspect.signature(builder).bind(**kwargs)
    except ValueError:  # no signature is known
        return
    except TypeError as error:
        manner = f"with {', '.join(kwargs)}" if kwargs else "without arguments"
        raise InvalidInput(
            f"{name} cannot be called {manner}.",
            why=first_line(error),
            next="name a function that can be called this way, e.g. by giving its parameters default values.",
        ) from error


def _of_classes(
    build: Builder, weights: str, kwargs: dict[str, Any], num_classes: int | None
) -> tuple[nn.Module, Source]:
    """Build a network with a number of outputs and load all weights that fit."""
    if num_classes is None:
        return build(weights, kwargs)
    try:
        return build(weights, {**kwargs, "num_classes": num_classes})
    except ValueError:  # torchvision's builders refuse weights for another number of classes
        if weights == "none":
            raise
    pretrained, source = build(weights, kwargs)
    options = {**source.kwargs, "num_classes": num_classes}
    model, _ = build("none", options)
    state = model.state_dict()
    fitting = {
        name: value for name, value in pretrained.state_dict().items() if state[name].shape == value.shape
    }
    model.load_state_dict(fitting, strict=False)
    missing = sorted(state.keys() - fitting.keys())
    note = f"{source.note}, but for {num_classes} classes {', '.join(missing)} are random"
    return model, replace(source, kwargs=options, note=note)


def _pretrained(
    library: str, name: str, weights: str, names: list[str], what: str | None, build: Callable[[], nn.Module]
) -> tuple[nn.Module | None, str]:
    """Build a network with pretrained weights, named `what` (None: there are none); return None and the reason if it
    must keep random weights."""
    if weights == "none":
        return None, "weights are random (asked for)"
    if weights not in ("auto", *names):
        raise UnknownName(f"weights of {name}", weights, [*names, "auto", "none"])
    if what is None:
        return None, f"weights are RANDOM: {library} has none for this network"
    try:
        return build(), ""
    except Exception as error:
        # A client of HTTP has classes of errors of its own, which differ between versions: there is a connection, and
        # a proxy or server that refuses or breaks off.
        is_refused = not isinstance(error, (OSError, RuntimeError, EOFError))
        if is_refused and (type(error).__module__ == "builtins" or isinstance(error, CadError)):
            raise
        cause = first_line(getattr(error, "reason", None) or error)
        if weights == "auto" and not is_refused:
            return None, f"weights are RANDOM: {what} is neither cached nor reachable ({cause})"
        mend = "look at HTTPS_PROXY and NO_PROXY" if is_refused else "connect to the internet"
        random = "none" if is_refused else "auto or none"
        raise FileError(
            f"the weights {what} cannot be had.",
            why=cause,
            next=f"{mend}, copy the file into the library's cache, or use --weights {random}.",
        ) from error
