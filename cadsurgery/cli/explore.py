"""The command explore: a page on this machine that shows what a mask does to an image."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer

from cadsurgery.cli import options, screen

commands = typer.Typer()
_EXAMPLE = "lraspp_mobilenet_v3_large"  # a small network for segmentation


@commands.command()
@options.command
def explore(
    *,
    model: Annotated[str, options.ArgumentOrOption(f"file or name of a network; default {_EXAMPLE}", False)],
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on 127.0.0.1; 0 for a free one")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="timing rounds; 0 to skip timing")] = 3,
    browser: Annotated[bool, typer.Option("--browser", help="open the page in the browser")] = False,
    trust: options.Trust = False,
) -> None:
    """Show on a local page what masks do to an image: maps, predictions, cost, and the code. Ctrl-C ends it."""
    # When the process is ended by a signal, it deletes uploaded images as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with screen.steps("explore") as step:
        from cadsurgery.tasks.explore_page import serve

        subject = (model or _EXAMPLE, weights, device, trust)
        address = serve(*subject, port=port, rounds=rounds, browser=browser, step=step)
    screen.out.print(f"{address} (this machine only; Ctrl-C ends it)")
    while True:
        time.sleep(3600)
