"""The command `cadsurgery keypoints extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.commands import KeypointsOptions

commands = typer.Typer(
    name="keypoints",
    help="Keypoints and descriptors from an adaptive network: full resolution around keypoints, nothing else computed.",
    no_args_is_help=True,
)


@commands.command("extract")
@options.command
def extract_command(
    *,
    network: options.Network,
    images: Annotated[list[Path], typer.Argument(help="image files or folders")],
    options: Annotated[dict[str, Any], options.OptionsFrom(KeypointsOptions)],
    as_json: options.Json = False,
) -> None:
    """Write keypoints, scores and descriptors of every image, one file each.

    Existing files are kept, so an interrupted run can be continued. An image that cannot be used is reported, the
    others are processed, and the exit code is 1.
    """
    from cadsurgery.tasks.keypoints import extract
    from cadsurgery.tasks.report import FilesReport

    with screen.steps("keypoints extract") as step:
        rows, failures = extract(network, images, **options, step=step)
    before, count = sum(row["kept"] for row in rows), sum(row["keypoints"] for row in rows)
    text = (
        f"{count} keypoints of {len(rows)} images in {options['output']} ({len(rows) - before} new, "
        f"{before} there already), {len(failures)} failed"
    )
    screen.show_report(FilesReport(tuple(rows), text, tuple(failures)), as_json)
