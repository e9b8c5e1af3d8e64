"""The command that writes a program which runs without this package: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadsurgery.cli import options, screen

commands = typer.Typer()


@commands.command()
@options.command
def export(
    *,
    model: options.Network,
    mask: Annotated[
        str,
        typer.Option(
            help="one that keeps a fixed share; default: the file's, or edges | budget:fraction=0.3"
        ),
    ] = "",
    weights: options.Weights = "auto",
    conversion: options.Converted,
    size: options.Size = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("network.pt2"),
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write a program for torch.export.load that runs without this package, for images of one size.

    Mask, lattice and network are in it. It is compared with the network on another image before it is written.
    """
    from cadsurgery.tasks.convert import export_program

    with screen.steps(as_json) as step:
        exported = export_program(model, weights, mask, conversion, size, output, step, trust)
    shape = "x".join(map(str, exported["image"]))
    text = (
        f"wrote {exported['file']}: {exported['bytes'] / 1e6:.1f} MB, images {shape}, mask {exported['mask']}; "
        f"largest difference on another image {exported['difference']:.1e}"
    )
    screen.show(exported, text, as_json)
