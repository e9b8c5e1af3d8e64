"""Options that commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="torchvision or timm name, module:function, or a converted file")
]
Weights = Annotated[str, typer.Option(help="auto, none, a name of weights, or a file")]
Mask = Annotated[
    str,
    typer.Option(
        help='a name of cadsurgery list --masks, with options: "edges:threshold=0.15,dilation=11", '
        'wrappers: "edges | budget:fraction=0.3", several: "edges + gradient"'
    ),
]
Stride = Annotated[
    str,
    typer.Option("--output-stride", metavar="HIGH,LOW", help="e.g. 8,32; default: the network's own range"),
]
Region = Annotated[str, typer.Option(help="auto, backbone, or names of modules, separated by commas")]
Fill = Annotated[str, typer.Option(help="how points inside a cell are read: linear, nearest or guided")]
Patch = Annotated[str, typer.Option(help="shape of areas kept high: quadtree or block")]
Anchor = Annotated[str, typer.Option(help="corner, or center to reproduce the published code")]
Pool = Annotated[str, typer.Option(help="max-pool stages: atrous, or drop as published")]
Outputs = Annotated[
    str,
    typer.Option(
        help="size of returned maps that leave the region as they are: fine, or native as the network returns them"
    ),
]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="image file; default: a generated street scene")
]
Size = Annotated[
    str, typer.Option(metavar="HxW", help="size of the image; default 512x1024, or the file's own")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run code that the converted file names: a network or mask of its own, module:function",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def adaptify_options(
    output_stride: str, region: str, fill: str, patch: str, anchor: str, pool: str, outputs: str = "fine"
) -> dict[str, Any]:
    """Options of `adaptify` from those of a command."""
    return {
        "output_stride": read_pair(output_stride),
        "region": read_names(region),
        "fill": fill,
        "patch": patch,
        "anchor": anchor,
        "pool": pool,
        "outputs": outputs,
    }


def read_pair(text: str) -> tuple[int, int] | None:
    """HIGH,LOW."""
    if not text:
        return None
    try:
        high, low = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not HIGH,LOW such as 8,32", param_hint="--output-stride"
        ) from None
    return high, low


def read_fractions(text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1,0.5,0", param_hint="--fractions"
        ) from None


def read_size(text: str) -> tuple[int, int] | None:
    """HxW."""
    if not text:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not HxW such as 512x1024", param_hint="--size") from None
    return height, width


def read_names(region: str) -> str | list[str]:
    """A region: auto, backbone, or names between commas."""
    return region if region in ("auto", "backbone") else [name.strip() for name in region.split(",")]
