"""The command explore: a page on this machine that shows what a mask does to an image."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.commands import ExploreOptions

commands = typer.Typer()
_EXAMPLE = "lraspp_mobilenet_v3_large"  # a small network for segmentation


@commands.command()
@options.command
def explore(
    *,
    model: Annotated[str, options.ArgumentOrOption(f"file or name of a network; default {_EXAMPLE}", False)],
    options: ExploreOptions,
) -> None:
    """Show on a local page what masks do to an image: maps, predictions, cost, and the code. Ctrl-C ends it."""
    # When the process is ended by a signal, it deletes uploaded images as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with screen.steps("explore") as step:
        from cadsurgery.tasks.explore_page import serve

        address = serve(model or _EXAMPLE, options, step=step)
    screen.out.print(f"{address} (this machine only; Ctrl-C ends it)")
    while True:
        time.sleep(3600)
