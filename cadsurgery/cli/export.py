"""The command `export`, which writes a program that runs without this package."""

from __future__ import annotations

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.commands import ExportOptions

commands = typer.Typer()


@commands.command()
@options.command
def export(
    *,
    model: options.Network,
    options: ExportOptions,
    as_json: options.Json = False,
) -> None:
    """Write a network for use without this package: a torch.export program or an ONNX file.

    The file contains mask, lattice and network. It is compared with the network on other images before it is written.
    """
    from cadsurgery.tasks.export_files import export_network

    with screen.steps("export") as step:
        exported = export_network(model, options, step)
    shape = "x".join("any" if length is None else str(length) for length in exported["image"])
    shape += f" (multiples of {exported['multiple']})" * (exported["multiple"] > 1)
    text = (
        f"wrote {exported['file']} ({exported['format']}): {exported['bytes'] / 1e6:.1f} MB, images {shape}, mask "
        f"{exported['mask']}; largest difference on {len(exported['compared'])} other batches "
        f"{exported['difference']:.1e}"
    )
    if fidelity := exported["fidelity"]:
        text += f"; error in 8 bits {fidelity['error']:.1%}"
        if fidelity["agreement"] is not None:
            text += f", {fidelity['agreement']:.2%} of the pixels of the same class"
        text += f", on {fidelity['images']} images in {fidelity['taken_in']}"
    screen.show(exported, text, as_json)
