"""Compare masks by matching images with known homographies: HPatches, the Oxford sequences, or views of photos.

    python -m recipes.hpatches.match NETWORK --data hpatches-sequences-release --output-stride 1,8 --mask all

README.md says what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import main as run_commands
from cadsurgery.cli import options
from cadsurgery.cli.keypoints import FOUND
from cadsurgery.tasks.options import Conversion, Extraction

commands = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@commands.command()
@options.task("recipes.hpatches.evaluation:evaluate_matching")
def evaluate(
    *,
    network: options.Network,
    folder: Annotated[
        Path,
        typer.Option(
            "--data",
            help="folder of sequences with images 1.*, 2.*, ... and H_1_2, ... (HPatches), or one sequence; or "
            "images:FOLDER, photos that are matched with views of themselves",
        ),
    ],
    masks: Annotated[list[str], typer.Option("--mask", help="repeatable")] = [Extraction.mask],  # noqa: B006
    output_stride: options.Strides = [],  # noqa: B006
    settings: Annotated[Extraction, options.OptionsFrom(Extraction, FOUND)],
    weights: options.Weights = "auto",
    options: Annotated[
        dict[str, Any], options.OptionsFrom(Conversion, ("region", "fill", "anchor", "pool", "normalisation"))
    ],
    everything: Annotated[
        bool,
        typer.Option("--all-sequences", help="include the eight HPatches sequences that the protocol omits"),
    ] = False,
    rounds: options.Rounds = 3,
    output: options.Report = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: accuracy against threshold and MACs")] = None,
    matches: Annotated[Path | None, typer.Option(help="PNG: matches of the first pair")] = None,
    device: options.Device = "cpu",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Match images with known homographies: accuracy at 1 to 15 pixels, MACs and time, for several masks.

    The protocol is that of HPatches as used by D2-Net. Runs under accelerate launch and torchrun.
    """


def main() -> None:
    """Run the command, with the messages and exit codes of `cadsurgery`."""
    run_commands(commands)


if __name__ == "__main__":
    main()
