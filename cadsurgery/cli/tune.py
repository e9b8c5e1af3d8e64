"""The command `tune`, which fits a network to photos without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadsurgery.cli import options

commands = typer.Typer()


@commands.command()
@options.task("cadsurgery.finetune.tuning:tune")
def tune(
    *,
    network: options.Network,
    images: Annotated[Path, typer.Option(help="folder of photos; needs no labels")],
    output: options.RunFolder,
    minutes: Annotated[float, typer.Option(help="processor time for all fitting")] = 20.0,
    keep: Annotated[
        float,
        typer.Option(
            help="share of the balanced fidelity to the dense network that the chosen budget must keep"
        ),
    ] = 0.99,
    steps: Annotated[
        int,
        typer.Option(min=0, help="training steps of adapters and refinements; 0: as many as the time allows"),
    ] = 0,
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    fractions: Annotated[
        str, typer.Option(parser=options.read_fractions, help="budgets to evaluate")
    ] = "0.05,0.1,0.2,0.3,0.5,0.75",
    rounds: options.Rounds = 3,
    weights: options.Weights = "auto",
    options: options.Converted,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Fit level adapters, refinements and a gain mask to photos without labels, and choose a budget.

    The weights, and all outputs at full resolution, do not change. What is fitted is kept only if photos held out show
    that it helps. Prints agreement and balanced fidelity (the mean over classes) to the dense network against work
    and measured time on held-out photos, and writes OUTPUT/net.safetensors with the mask that keeps the balanced
    fidelity at the least work of the whole network.
    """
