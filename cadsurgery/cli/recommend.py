"""The command recommend: is a conversion worth it, and with which setting?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadsurgery.cli import options
from cadsurgery.tasks.commands import RecommendOptions

commands = typer.Typer()


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
