"""The command that fits a network to photos without labels: tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadsurgery.cli import options

commands = typer.Typer()


@commands.command()
@options.task("cadsurgery.finetune.tune:tune")
def tune(
    *,
    network: options.Network,
    images: Annotated[Path, typer.Option(help="folder of photos, no labels needed")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of the run; an interrupted run goes on")
    ],
    minutes: Annotated[float, typer.Option(help="of processor time for all that is fitted")] = 20.0,
    keep: Annotated[
        float, typer.Option(help="share of agreement with the dense network that the chosen budget keeps")
    ] = 0.99,
    steps: Annotated[
        int,
        typer.Option(min=0, help="of the adapters' and the refinements' training; 0: what the time allows"),
    ] = 0,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    fractions: Annotated[
        str, typer.Option(parser=options.read_fractions, help="budgets that are measured")
    ] = "0.05,0.1,0.2,0.3,0.5,0.75",
    rounds: options.Rounds = 3,
    weights: options.Weights = "auto",
    options: options.Converted,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Fit level adapters, refinements and a mask of its own to a network by photos without labels; choose a budget.

    Weights and all that the network gives at full resolution stay as they are. Prints agreement with the dense network
    against work and measured time on photos held out, and writes OUTPUT/net.safetensors with the budget that keeps
    enough at the least work.
    """
