"""The command `push`, which publishes a converted network."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen

commands = typer.Typer()


@commands.command()
def push(
    file: Annotated[str, typer.Argument(help="a converted file")],
    repository: Annotated[
        str, typer.Argument(help="repository on the Hugging Face Hub: owner/name, or owner/name@branch")
    ],
    license: Annotated[
        str, typer.Option(help="license of the network: apache-2.0, mit, cc-by-nc-4.0, other, ...")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="visible to its owner only")] = False,
    message: Annotated[str, typer.Option(help="message of the commit")] = "",
    pipeline: Annotated[
        str, typer.Option(help="task under which it is listed; default: by the network's outputs")
    ] = "",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write a converted file to the Hugging Face Hub, with a model card; hf:owner/name loads it.

    The account is that of HF_TOKEN, or of hf auth login.
    """
    from cadsurgery.methods.storage import load
    from cadsurgery.network.publish import push_to_hub

    with screen.steps("push") as step:
        step(f"loading {file}")
        net: Any = load(file, trust=trust)
        step(f"writing {repository}")
        pushed = push_to_hub(
            net,
            repository,
            license=license,
            private=private or None,
            message=message,
            pipeline=pipeline,
        )
    text = (
        f"wrote {pushed.page} ({'private' if pushed.private else 'public'}): {pushed.bytes / 1e6:.1f} MB; "
        f"load it with {pushed.address}"
    )
    screen.show(vars(pushed), text, as_json)
