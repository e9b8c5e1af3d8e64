"""The command `list`, which lists networks and masks."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.support.errors import InvalidInput

commands = typer.Typer()


@commands.command("list")
def list_command(
    pattern: Annotated[
        str,
        typer.Argument(
            help='shell-style pattern, e.g. "*resnet*"; with --corpus also a file or folder of networks'
        ),
    ] = "*",
    library: Annotated[str, typer.Option(help="torchvision or timm; default both")] = "",
    masks: Annotated[bool, typer.Option("--masks", help="list mask providers instead")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="build, convert and verify each network now")
    ] = False,
    corpus: Annotated[
        bool,
        typer.Option(
            "--corpus", help="with --check: networks from Python files, which are run; default tests/corpus"
        ),
    ] = False,
    output: Annotated[
        Path, options.output("with --check: JSON Lines file; an interrupted check continues")
    ] = Path("zoo.jsonl"),
    workers: Annotated[int, typer.Option(min=1, help="with --check: number of networks at a time")] = 2,
    memory: Annotated[
        float, typer.Option(min=0.5, help="with --check: memory limit per network in GiB")
    ] = 10.0,
    seconds: Annotated[
        float, typer.Option(min=1, help="with --check: time limit per network in seconds")
    ] = 600.0,
    as_json: options.Json = False,
) -> None:
    """List networks: whether each of them converts, with which output strides, what stays dense and why."""
    if masks:
        from cadsurgery.masks import list_masks

        infos = list_masks()
        lines = [
            f"[bold]{i.form}[/bold]  {i.summary}  {_describe(i.options)}  [dim]{i.source}[/dim]"
            for i in infos
        ]
        screen.show([vars(info) for info in infos], "\n".join(lines), as_json)
        return
    from cadsurgery.tasks.recorded import list_names, outlook, recorded, summary

    if corpus and not check:
        raise InvalidInput("--corpus needs --check.", next="add --check, which checks its networks now.")
    folder, names = None, []
    if corpus:
        from cadsurgery.tasks.corpus import find_corpus, read_corpus

        folder, pattern = find_corpus(pattern)
        names = [subject.name for subject in read_corpus(folder, pattern)]
    else:
        names = list_names(pattern, library)
    if check:
        from cadsurgery.tasks.zoo_check import Limits, check_networks

        with screen.steps("list --check") as step:
            numbers = count(1)

            def told(row: dict[str, Any]) -> None:
                number = next(numbers)
                step(f"{number} of {len(names)}, {row['model']}: {row['result']}", number, len(names))

            rows = check_networks(
                names,
                output,
                corpus=folder,
                workers=workers,
                limits=Limits(seconds, memory),
                on_row=told,
            )
    else:
        known = recorded()
        rows = [known.get(name, {"model": name, "result": "not checked"}) for name in names]
    if as_json:
        screen.print_json(rows)
        return
    for row in rows:
        screen.out.print(f"{row['model']:40} {outlook(row)}", highlight=False, markup=False, soft_wrap=True)
    screen.out.print(summary(rows), highlight=False)


def _describe(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.items()
    )
