"""The command recommend: is a conversion worth it, and with which setting?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options
from cadsurgery.support.defaults import ENGINES
from cadsurgery.tasks.options import Conversion

commands = typer.Typer()


@commands.command()
@options.task("cadsurgery.tasks.recommend:recommend")
def recommend(
    *,
    network: options.Network,
    images: Annotated[
        str,
        typer.Option(help="folder of photos, or labelled data as of eval --data"),
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            help="folder of PNGs named as the photos: the number of the class of each pixel, 255 ignored; "
            "folder:PATH,ignore=11 ignores more"
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="share of the network's quality to keep: the fastest such setting; default 0.99"),
    ] = None,
    at_most: Annotated[
        float | None,
        typer.Option(help="milliseconds for a picture: the best setting that takes no more", metavar="MS"),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(help=f"torch, or the engine of all settings: {', '.join(ENGINES)}"),
    ] = "torch",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or int8")] = "float32",
    size: Annotated[Any, options.size("of the pictures; default: of the first")] = None,
    limit: options.Limit = 0,
    minutes: Annotated[float, typer.Option(help="of measuring at most")] = 10.0,
    split: Annotated[str, typer.Option(help="of labelled data; all: val where it has splits")] = "all",
    weights: options.Weights = "auto",
    options: Annotated[
        dict[str, Any],
        options.OptionsFrom(Conversion, ("output_stride", "region", "normalisation"), given=True),
    ],
    output: Annotated[
        Path | None, options.output("folder of the run, default NAME-recommended; a run goes on there")
    ] = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Recommend how to run a network on pictures like yours, on this machine: converted or not, and how.

    Measures the network as given, on pictures of other sizes, dense at other output strides, and converted under
    several masks, all in turn on each picture. Prints quality against time of the whole network, names one setting,
    and how to use it.
    """
