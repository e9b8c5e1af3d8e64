"""Compare masks by matching images with known homographies: HPatches, the Oxford sequences, or views of photos.

    python -m recipes.hpatches.match NETWORK --data hpatches-sequences-release --output-stride 1,8 --mask all

README.md says what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import main as run_commands
from cadsurgery.cli import options
from cadsurgery.support.fields import documented, option, part
from cadsurgery.tasks.commands import (
    device_option,
    rounds_option,
    strides_option,
    trust_option,
    weights_option,
)
from cadsurgery.tasks.task_options import Conversion, Extraction

_FOUND = ("detector", "count", "reach", "align", "raw", "output", "max_edge", "max_sum", "multiple")
commands = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@documented
@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """Options of the command."""

    folder: Path = option(
        MISSING,
        "folder of sequences with images 1.*, 2.*, ... and H_1_2, ... (HPatches), or one sequence; or "
        "images:FOLDER, photos that are matched with views of themselves",
        name="data",
    )
    masks: Sequence[str] = option((Extraction.mask,), "repeatable", name="mask")
    output_stride: Sequence[tuple[int, int]] = strides_option()
    settings: Extraction = part(Extraction, *_FOUND, is_whole=True)
    weights: str = weights_option()
    options: Mapping[str, Any] = part(Conversion, "region", "fill", "anchor", "pool", "normalisation")
    everything: bool = option(
        False, "include the eight HPatches sequences that the protocol omits", name="all_sequences"
    )
    rounds: int = rounds_option()
    output: Path | None = option(None, "JSON file to write", short="o")
    picture: Path | None = option(None, "PNG: accuracy against threshold and MACs")
    matches: Path | None = option(None, "PNG: matches of the first pair")
    device: str = device_option()
    trust: bool = trust_option()


@commands.command()
@options.task("recipes.hpatches.evaluation:evaluate_matching")
def evaluate(
    *,
    network: options.Network,
    options: Annotated[dict[str, Any], options.OptionsFrom(MatchOptions, apart=True)],
    as_json: options.Json = False,
) -> None:
    """Match images with known homographies: accuracy at 1 to 15 pixels, MACs and time, for several masks.

    The protocol is that of HPatches as used by D2-Net.
    """


def main() -> None:
    """Run the command, with the messages and exit codes of `cadsurgery`."""
    run_commands(commands)


if __name__ == "__main__":
    main()
