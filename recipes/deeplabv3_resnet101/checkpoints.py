"""The published checkpoints: their four formats are read into networks of this package, and written back.

`Layout` maps the name and shape of each of our tensors to those in a file; reading and writing both use it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cadsurgery as cs
from recipes.deeplabv3_resnet101.recipe import RUNS, Run, adapted

BUILDER = "recipes.deeplabv3_resnet101.recipe:deeplabv3"
STAGES = ("layer1", "layer2", "layer3", "layer4")
ESTIMATOR = "backbone.mask_estimator."
# `best_score` is a numpy scalar, pickled under its old or its new name.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMBERS = [(_SCALAR, "numpy.core.multiarray.scalar"), _SCALAR, np.dtype, type(np.dtype(np.float64))]
_NEXT = "give a published DeepLabv3 checkpoint as it was downloaded."


@dataclass(frozen=True)
class Layout:
    """Names and shapes, in a file, of the tensors of adaptive stages.

    Attributes:
        adaptive: stages stored as operations on elements: kernels (O, I, taps, 1) and (O, I, 1), in row-major order
            of taps, with names of their own.
        two_paths: the file has the last two stages twice, for the fine and the coarse path; the published evaluation
            uses the coarse one for both resolutions.
    """

    adaptive: tuple[str, ...] = ()
    two_paths: bool = False

    def name(self, ours: str) -> str:
        """Return the name in the file of a tensor of ours."""
        if ours.startswith("classifier."):
            return f"classifier.{ours}"
        _, stage, *rest = ours.split(".")
        path = ".".join(rest)
        if stage in self.adaptive:
            path = re.sub(r"conv2\.weight$", "conv2.conv.weight", path)
            path = path.replace("downsample.0.", "downsample.conv1.").replace(
                "downsample.1.", "downsample.norm1."
            )
        if self.two_paths and stage in STAGES[2:]:
            stage = f"{stage}_low_res"
        return f"backbone.{stage}.{path}"

    def shape(self, ours: str, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape in the file of a tensor of ours."""
        if ours.split(".")[1] not in self.adaptive or len(shape) != 4:
            return tuple(shape)
        taps = shape[2] * shape[3]
        return (*shape[:2], 1) if taps == 1 else (*shape[:2], taps, 1)

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Layout:
        """Detect the layout of a file from its names."""
        adaptive = tuple(stage for stage in STAGES if f"backbone.{stage}.0.conv2.conv.weight" in state)
        return Layout(adaptive, any(name.startswith("backbone.layer3_low_res.") for name in state))


@dataclass(frozen=True)
class Published:
    """The contents of a published checkpoint.

    Attributes:
        net: the network with its weights, in evaluation mode: an `AdaptiveModel`, or dense if it was published dense.
        run: the published run it belongs to.
        layout: layout of the file.
        estimator: weights and biases of the mask estimator's convolutions, `"0.weight"` ... `"7.bias"` (empty unless
            the mask is learned): an `nn.Sequential` of convolution 3x3 512 -> 128, ReLU, 128 -> 64, ReLU, max-pool
            2, 64 -> 64, ReLU, 64 -> 2 on the map of output stride 8. Channel 1 is the score for downsampling 2 x 2
            fine pixels.
        rest: tensors that the published evaluation does not use, by their names in the file: the fine path, and the
            ImageNet classifier.
    """

    net: nn.Module
    run: Run
    layout: Layout
    estimator: dict[str, Tensor]
    rest: dict[str, Tensor]


def load_published(
    source: str | Path | Mapping[str, Tensor], run: str = "", mask: object = None
) -> Published:
    """Read a published checkpoint.

    Args:
        source: the file, or its state dict.
        run: a name of `RUNS`; default: the run whose published file has this name. Layers, width and number of
            classes are read from the tensors.
        mask: mask to use instead of the run's.

    Raises:
        UnknownName: there is no such run, or the file has another name and no run is given.
        FileError: the file is missing or unreadable; tensors are missing, unknown or of another shape.
        InvalidInput: format or output stride of the run differ from the file's.
    """
    name = run or _run_of(source)
    if name not in RUNS:
        raise cs.UnknownName("published run", name, RUNS)
    chosen = RUNS[name]
    state = dict(source) if isinstance(source, Mapping) else read_checkpoint(Path(source))
    layout = Layout.of(state)
    _check_format(layout, chosen, name)
    net = cs.build_model(BUILDER, "none", output_stride=chosen.output_stride, **_architecture(state, layout))
    estimator = {key.removeprefix(ESTIMATOR): state[key] for key in state if key.startswith(ESTIMATOR)}
    rest = {key: state[key] for key in state if layout.two_paths and _is_unused(key)}
    known = {f"{ESTIMATOR}{key}" for key in estimator} | rest.keys()
    net.load_state_dict(_ours({key: state[key] for key in state if key not in known}, net, layout))
    _check_estimator(estimator, state, layout)
    made = adapted(net, chosen, mask).eval()
    if estimator and mask is None and isinstance(made, cs.AdaptiveModel):
        _hand_over(estimator, made)
    return Published(made, chosen, layout, estimator, rest)


def published_state(read: Published) -> dict[str, Tensor]:
    """Return the state dict in the published format, with the current weights of the network."""
    ours = {
        read.layout.name(name): value.detach().reshape(read.layout.shape(name, value.shape))
        for name, value in read.net.state_dict().items()
    }
    return {**ours, **{f"{ESTIMATOR}{name}": value for name, value in read.estimator.items()}, **read.rest}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a published file, which contains `model_state` and the state of the training.

    Raises:
        FileError: the file is missing, unreadable, or has no state dict.
    """
    if not path.is_file():
        raise cs.FileError(f"there is no file {path}.", next="check the path.")
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for broken and foreign files
        raise cs.FileError(
            f"{path} cannot be read.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
            next="download it again; nothing but tensors and numbers is read from it.",
        ) from error
    state = content.get("model_state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise cs.FileError(f"{path} holds no model_state.", next=_NEXT)
    return dict(state)


def _run_of(source: str | Path | Mapping[str, Tensor]) -> str:
    stem = "" if isinstance(source, Mapping) else Path(source).name.removesuffix(".pth")
    found = [name for name, run in RUNS.items() if run.stem and run.stem == stem]
    if not found:
        raise cs.UnknownName(
            "published file", stem, [run.stem for run in RUNS.values() if run.stem], next="or give run=NAME."
        )
    return found[0]


def _check_format(layout: Layout, run: Run, name: str) -> None:
    """Refuse weights of another format, which would fit but compute something else."""
    learned = run.mask.startswith("learned")
    adaptive = {8: STAGES[2:], 16: STAGES[3:]}[run.output_stride]
    expected = () if run.low is None or learned else adaptive
    if layout.adaptive != expected or layout.two_paths != learned:
        found = "with two paths" if layout.two_paths else "dense"
        found = f"adaptive in {' and '.join(layout.adaptive)}" if layout.adaptive else found
        raise cs.InvalidInput(
            f"this checkpoint is not of run {name!r}.",
            why=f"its network is {found}.",
            next=f"give the run it is of: {', '.join(RUNS)}.",
        )


def _architecture(state: Mapping[str, Tensor], layout: Layout) -> dict[str, object]:
    """Return arguments of the builder, read from the tensors."""
    layers = []
    for stage in STAGES:
        prefix = layout.name(f"backbone.{stage}.")
        numbers = {int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)}
        layers.append(len(numbers))
    needed = ("backbone.layer1.0.conv1.weight", "classifier.classifier.4.weight")
    absent = [name for name in needed if name not in state]
    if absent or not all(layers):
        raise cs.FileError(
            "this is no published DeepLabv3 checkpoint.",
            where=", ".join(absent) or "backbone",
            why=f"it has {' + '.join(map(str, layers))} blocks in the four stages.",
            next=_NEXT,
        )
    width, classes = (state[name].shape[0] for name in needed)
    return {"layers": layers, "width": width, "num_classes": classes}


def _ours(state: Mapping[str, Tensor], net: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return the state dict of `net`; each tensor of the file is used exactly once."""
    wanted = net.state_dict()
    names = {name: layout.name(name) for name in wanted}
    shapes = {name: layout.shape(name, value.shape) for name, value in wanted.items()}
    missing = [theirs for theirs in names.values() if theirs not in state]
    unknown = sorted(state.keys() - set(names.values()))
    wrong = [
        f"{theirs} is {tuple(state[theirs].shape)}, not {shapes[name]}"
        for name, theirs in names.items()
        if theirs in state and tuple(state[theirs].shape) != shapes[name]
    ]
    for what, found in (("lacks", missing), ("has unknown", unknown), ("has misshapen", wrong)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise cs.FileError(
                f"the checkpoint {what} tensors.", where=f"{'; '.join(found[:3])}{more}", next=_NEXT
            )
    return {name: state[theirs].reshape(wanted[name].shape) for name, theirs in names.items()}


def _is_unused(name: str) -> bool:
    return name.startswith("backbone.fc.") or "_high_res." in name


def _check_estimator(estimator: Mapping[str, Tensor], state: Mapping[str, Tensor], layout: Layout) -> None:
    """Check the estimator: convolutions at 0, 2, 5 and 7, with 512 (the second stage), 128, 64, 64 channels."""
    channels = {"0": (128, 512), "2": (64, 128), "5": (64, 64), "7": (2, 64)} if layout.two_paths else {}
    wanted: dict[str, tuple[int, ...]] = {f"{at}.weight": (*io, 3, 3) for at, io in channels.items()}
    wanted |= {f"{at}.bias": (io[0],) for at, io in channels.items()}
    found = {name: tuple(value.shape) for name, value in estimator.items()}
    if found != wanted:
        differing = sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        raise cs.FileError(
            "the mask estimator is not the published one.",
            where=", ".join(f"{ESTIMATOR}{name}" for name in differing[:3]),
            why=f"shapes there {[found.get(n) for n in differing[:3]]}, "
            f"published {[wanted.get(n) for n in differing[:3]]}.",
            next=_NEXT,
        )


def _hand_over(estimator: Mapping[str, Tensor], net: cs.AdaptiveModel) -> None:
    """Copy the estimator's tensors to the network's mask provider, whose convolutions have the same order."""
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 64))  # a provider may create its layers in its first call
    own = dict(net.mask.named_parameters())
    given = [tuple(value.shape) for value in estimator.values()]
    if [tuple(value.shape) for value in own.values()] != given:
        raise cs.InvalidInput(
            f"mask {net.mask.spec()!r} cannot take the published mask estimator.",
            why=f"its tensors have shapes {[tuple(value.shape) for value in own.values()]}, the published {given}.",
            next="pass a mask of your own made from it: load_published(..., mask=...).",
        )
    net.mask.load_state_dict({**net.mask.state_dict(), **dict(zip(own, estimator.values(), strict=True))})


def main() -> None:
    """Convert the published checkpoints in a folder: adaptive ones to files of `cs.save`, dense ones to weights."""
    parser = argparse.ArgumentParser(description="Convert published DeepLabv3-ResNet101 checkpoints.")
    parser.add_argument("folder", type=Path, help="folder of the downloaded files")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write to")
    options = parser.parse_args()
    found = [path for path in sorted(options.folder.glob("*.pth")) if _is_published(path)]
    if not found:
        print(f"skipped: {options.folder} holds no published checkpoint")
        return
    for path in found:
        target = options.output / f"{path.stem}.safetensors"
        try:
            net = load_published(path).net
            if isinstance(net, cs.AdaptiveModel):
                cs.save(net, target)
            else:
                save_file(net.state_dict(), target)
        except (cs.CadError, OSError) as error:
            sys.exit(str(error))
        print(f"{path.name}: wrote {target}")


def _is_published(path: Path) -> bool:
    return path.name.removesuffix(".pth") in {run.stem for run in RUNS.values() if run.stem}
