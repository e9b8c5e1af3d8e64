"""The command `list`, which lists networks and masks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.commands import ListOptions

commands = typer.Typer()


@commands.command("list")
@options.command
def list_command(
    *,
    pattern: Annotated[
        str,
        typer.Argument(help='shell-style pattern, e.g. "*resnet*"'),
    ] = "*",
    options: ListOptions,
    as_json: options.Json = False,
) -> None:
    """List networks: whether each of them converts, with which output strides, what stays dense and why."""
    if options.masks:
        from cadsurgery.masks import list_masks

        infos = list_masks()
        lines = [
            f"[bold]{i.form}[/bold]  {i.summary}  {_describe(i.options)}  [dim]{i.source}[/dim]"
            for i in infos
        ]
        kept = ", ".join(info.form for info in list_masks(of_recipes=True))
        lines.append(f"[dim]for published recipes, where another one keeps more at less work: {kept}[/dim]")
        screen.show([vars(info) for info in infos], "\n".join(lines), as_json)
        return
    from cadsurgery.data.networks import list_models
    from cadsurgery.tasks.zoo_record import outlook, recorded, summary

    checked = recorded()
    rows = [checked.get(name, {"model": name, "result": "not checked"}) for name in list_models(pattern)]
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
