"""Commands that measure networks: bench (time against work), eval (accuracy or fidelity), and recommend (both)."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadsurgery.cli import options
from cadsurgery.tasks.commands import BenchOptions, EvalOptions, RecommendOptions

commands = typer.Typer()


@commands.command()
@options.task("cadsurgery.tasks.bench:bench")
def bench(
    *,
    networks: Annotated[
        list[str],
        options.ArgumentOrOption(
            "torchvision or timm names, or module:function; or a file of another method (convert --method), which is "
            "measured by itself",
            is_repeated=True,
        ),
    ],
    options: Annotated[dict[str, Any], options.OptionsFrom(BenchOptions, apart=True)],
    as_json: options.Json = False,
) -> None:
    """Measure time against work: random weights, budgets of the mask against the dense twins, interleaved.

    A file of another method is measured beside its original network; a file with gates also at shares of open
    positions.

    Time follows work if it is at most 1.06 times the straight line between the dense twins (1.14 with linear or
    guided fill in networks of dense convolutions). A miss is reported in words; the exit code stays 0.
    """


@commands.command("eval")
@options.task("cadsurgery.tasks.evaluation:evaluate")
def eval_command(
    *,
    network: options.Network,
    options: Annotated[dict[str, Any], options.OptionsFrom(EvalOptions, apart=True)],
    as_json: options.Json = False,
) -> None:
    """Evaluate masks and output strides on images: accuracy, MACs and time beside the dense networks.

    Without labels (images:FOLDER) accuracy is fidelity: divergence from, and agreement with, the network's own
    outputs with everything kept high; for maps that are not class scores, the relative error.

    A converted file keeps its own region, fill, patch, anchor and pool.
    """


@commands.command()
@options.task("cadsurgery.tasks.recommend:recommend")
def recommend(
    *,
    network: options.Network,
    options: Annotated[dict[str, Any], options.OptionsFrom(RecommendOptions, apart=True)],
    as_json: options.Json = False,
) -> None:
    """Recommend how to run a network on pictures like yours, on this machine: converted or not, and how.

    Measures the network as given, on pictures of other sizes, dense at other output strides, and converted under
    several masks, all in turn on each picture. Prints quality against time of the whole network, names one setting,
    and how to use it.
    """
