"""The command `finetune`, which trains a network."""

from __future__ import annotations

import typer

from cadsurgery.cli import options
from cadsurgery.tasks.commands import FinetuneOptions

commands = typer.Typer()


@commands.command()
@options.task("cadsurgery.finetune.command:finetune")
def finetune(
    *,
    model: options.Network,
    options: FinetuneOptions,
    as_json: options.Json = False,
) -> None:
    """Train a network on mixed resolution, and write it to OUTPUT/net.safetensors.

    Without labels (--data images:FOLDER) the network learns from its own outputs with everything kept high, and
    validation compares with these; of a folder without splits, every eighth image is for validation.

    The defaults are the published settings. An interrupted run continues exactly where it stopped when the command is
    given again. Several processes: torchrun --nproc_per_node N -m cadsurgery.cli finetune ..., with --device cpu
    on the CPU.

    Settings are --set NAME=VALUE or lines of --config: steps, batch, crop, lr, objective and others, which
    docs/howto/finetune.md describes. Those of an objective are --set objective_options.NAME=VALUE
    (docs/reference/objectives.md).
    """
