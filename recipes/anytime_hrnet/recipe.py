"""HRNet with exits as published (ADP-C, Liu et al., ICLR 2022): networks, checkpoints, cost.

    python recipes/anytime_hrnet/recipe.py [FILE] [--size 1024x2048]

prints the multiply-accumulates up to each exit, with everything computed, in the unit of the publication (1024^3).
With the FILE of a published checkpoint, it loads the file and prints the network's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from recipes.anytime_hrnet.network import SIZES, HRNet

EXITS = ("layer1", "stage2", "stage3")
UNIT = 1024**3  # the publication's GFLOP
_REACH, _CENTRE = 3, 1e5


def build(
    name: Literal["w18", "w48"],
    classes: int = 19,
    threshold: float = 0.998,
    head: Literal["redesigned", "plain"] = "redesigned",
) -> cs.AnytimeModel:
    """Build the network with random weights, in evaluation mode.

    It returns the aggregated class scores of its four exits, each (B, classes, H / 4, W / 4).

    Args:
        name: `w18`, HRNet-W18-small-v2, or `w48`.
        classes: number of classes.
        threshold: later exits skip positions whose largest class probability is above it.
        head: heads of the first three exits, `redesigned` as published, or `plain`.

    Raises:
        UnknownName: there is no such network.
    """
    cs.errors.check_name("network", name, SIZES)
    size = SIZES[name]
    hidden = size.hidden if head == "redesigned" else None
    model = HRNet(size, classes).eval()
    return cs.anytime(model, EXITS, head, hidden=hidden, threshold=threshold)


def load_published(net: cs.AnytimeModel, state_dict: Mapping[str, Tensor]) -> cs.AnytimeModel:
    """Load the weights of a published file, with its prefix or with bare keys; all keys must fit.

    Args:
        net: the result of `build`.
        state_dict: state dict of the published code; keys may begin with `model.`, and the class weights of its loss
            may be included.

    Raises:
        FileError: keys or shapes do not fit the network, or its Gaussian is another.
    """
    values = {name.removeprefix("model."): value for name, value in state_dict.items()}
    values.pop("loss.criterion.weight", None)
    renamed: dict[str, Tensor] = {}
    for name, value in values.items():
        module, _, last = name.rpartition(".")
        if last == "square_dis":  # squared distances to the centre, with a large value at the centre itself
            if value.shape != (7, 7) or not torch.allclose(value.double(), squared_distances()):
                raise cs.FileError(
                    f"{name} is not the table of distances that is published.", next="give a published file."
                )
            continue
        renamed[_our_name(module) + "." + ("width" if last == "Lambda" else last)] = value
    own = net.state_dict()
    missing, foreign = own.keys() - renamed.keys(), renamed.keys() - own.keys()
    tables = {_our_name(name.rpartition(".")[0]) for name in values if name.endswith(".square_dis")}
    missing |= {f"{name}.square_dis" for name in _masked(net) - tables}
    wrong = [name for name in own.keys() & renamed.keys() if own[name].shape != renamed[name].shape]
    if missing or foreign or wrong:
        where = [*(f"missing {n}" for n in sorted(missing)), *(f"unknown {n}" for n in sorted(foreign))]
        where += [f"{n}: {tuple(renamed[n].shape)} for {tuple(own[n].shape)}" for n in sorted(wrong)]
        raise cs.FileError(
            "the weights are not those of this network.",
            where="; ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else ""),
            next="build the network of the file, w18 or w48, with its classes.",
        )
    net.load_state_dict(renamed)
    return net


def published_names(net: cs.AnytimeModel) -> dict[str, Tensor]:
    """Return the state dict of a network under the names of the published code, with bare keys."""
    values = {}
    for name, value in net.state_dict().items():
        module, _, last = name.rpartition(".")
        parts = module.split(".")
        if parts[0] == "exit_heads":
            module = ".".join((f"exit{int(parts[1]) + 1}", *parts[2:]))
        values[f"{module}.{'Lambda' if last == 'width' else last}"] = value
        if last == "width":
            values[f"{module}.square_dis"] = squared_distances().float()
    return values


def squared_distances() -> Tensor:
    """Return the squared distances (7, 7), float64, of a window to its centre, which gets a large value."""
    steps = torch.arange(-_REACH, _REACH + 1).double().square()
    table = steps.unsqueeze(1) + steps
    table[_REACH, _REACH] = _CENTRE
    return table


def _our_name(module: str) -> str:
    first, dot, rest = module.partition(".")
    if first in ("exit1", "exit2", "exit3"):
        return f"exit_heads.{int(first[-1]) - 1}{dot}{rest}"
    return module


def _masked(net: cs.AnytimeModel) -> set[str]:
    return {name.removesuffix(".width") for name in net.state_dict() if name.endswith(".width")}


def table(size: tuple[int, int]) -> str:
    """Format the MACs up to each exit, with everything computed, in Markdown."""
    lines = ["| network | heads | e1 | e2 | e3 | e4 | mean | base |", "|---|---|---|---|---|---|---|---|"]
    image = torch.empty(1, 3, *size, device="meta")
    for name in SIZES:
        base = cs.macs.dense_macs(HRNet(SIZES[name], 19), image) / UNIT
        for head in ("plain", "redesigned"):
            found = build(name, head=head).macs(image)  # type: ignore[arg-type]
            figures = [*(exit.macs / UNIT for exit in found), found.mean / UNIT, base]
            lines.append(f"| {name} | {head} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or check a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="a published checkpoint")
    parser.add_argument("--size", default="1024x2048", help="height x width of the image")
    options = parser.parse_args()
    if options.file is None:
        height, width = map(int, options.size.split("x"))
        print(table((height, width)))
    elif not options.file.is_file():
        print(f"skipped: there is no file {options.file}")
    else:
        state = torch.load(options.file, map_location="cpu", weights_only=True)
        width = next(value for name, value in state.items() if name.endswith("transition1.0.0.weight")).shape[
            0
        ]
        name = next(name for name, size in SIZES.items() if size.width == width)
        load_published(build(name), state)  # type: ignore[arg-type]
        print(f"{options.file} holds {name}")


if __name__ == "__main__":
    main()
