"""Commands, options and paths that the pages name, and whether they exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(
        path
        for room in ("docs", "recipes", "examples")
        for path in sorted((ROOT / room).rglob("*.md"))
        if ROOT / "docs" / "generated" not in path.parents  # copies, which a build of the site makes
    ),
]
ROOMS = ("cadsurgery", "tests", "benchmarks", "recipes", "docs", "examples")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9_-]*")


class Named(NamedTuple):
    """What a page names: a command line or a path, and the line of the page."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def code_of(page: Path) -> Iterator[Named]:
    """Find the code of a page: lines of blocks that are commands, and what stands between backquotes."""
    text = page.read_text()
    for block in re.finditer(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL):
        first = text.count("\n", 0, block.start(1)) + 1
        for line in re.sub(r"\\\n\s*", " ", block[1]).splitlines():
            yield Named(page, first, line.partition(" #")[0])
    plain = re.sub(r"```.*?```", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    for inline in re.finditer(r"`([^`]+)`", plain):
        yield Named(page, plain.count("\n", 0, inline.start()) + 1, " ".join(inline[1].split()))


def commands_of(group: Any, name: str) -> dict[str, set[str]]:
    """Names of all commands, each with its options and with what `--set` takes."""
    found = {}
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands_of(command, f"{name} {key}")
        else:
            settable = getattr(command.callback, "settable", ())
            options = {option for one in command.params for option in one.opts}
            found[f"{name} {key}"] = options | {f"--set {setting}" for setting in settable}
    return found


@cache
def own_commands() -> dict[str, set[str]]:
    """The options of each command of `cadsurgery`."""
    import typer

    from cadsurgery.cli.main import make_app
    from cadsurgery.methods.registry import KINDS
    from cadsurgery.tasks.task_options import Conversion

    found = commands_of(typer.main.get_command(make_app()), "cadsurgery")
    of_methods = (f"--set {setting}" for kind in KINDS for setting in kind.settings)
    found["cadsurgery convert"] |= {*of_methods, *(f"--set {field.name}" for field in fields(Conversion))}
    return found


def program(page: Path, path: str) -> Path | None:
    """Find a program in the repository or beside the page."""
    places = (ROOT / path, page.parent / path, (ROOT / path).with_suffix("") / "__main__.py")
    return next((place for place in places if place.is_file()), None)


@cache
def source_of(folder: Path) -> str:
    """The text of the programs of a folder."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.py")))


def takes(path: Path, option: str) -> bool:
    """Whether a program names an option, itself or as a parameter of ours."""
    name = option[2:].replace("-", "_")
    parameter = re.compile(rf'\b{name}: |"{name}"')
    own = source_of(path.parent)
    if "cadsurgery.cli" in path.read_text():
        own += source_of(ROOT / "cadsurgery" / "tasks") + source_of(ROOT / "cadsurgery" / "cli")
    return option == "--help" or f'"{option}"' in own or bool(parameter.search(own))


def faults(named: Named) -> Iterator[str]:
    """Say what of a command line or a path does not exist."""
    if found := re.search(r"(?:^|[ /(])cadsurgery ((?:[a-z]+ ?)+)(.*)", named.text):
        known = own_commands()
        words = f"cadsurgery {found[1]}{found[2]} "
        names = [name for name in known if words.startswith(f"{name} ")]
        if not names:
            if not found[1].split()[0].startswith("-"):
                yield f"no command: {words}"
            return
        rest = words.removeprefix(max(names, key=len)).partition("|")[0]
        plain = re.sub(r'"[^"]*"|\'[^\']*\'', "", rest)
        settings = [f"--set {name}" for name in re.findall(r"--set (\w+)", plain)]
        for option in (*settings, *OPTION.findall(plain)):
            if option not in known[max(names, key=len)] | {"--help"}:
                yield f"{option} is no option of {max(names, key=len)}"
    elif found := re.search(r"python3? (?:-m ([\w.]+)|([\w/]+\.py))(.*)", named.text):
        module, path, rest = found.groups()
        if module and module.split(".")[0] not in ROOMS:
            return
        where = program(named.page, path or module.replace(".", "/") + ".py")
        if where is None:
            yield f"no program: {path or module}"
            return
        for option in OPTION.findall(re.sub(r'"[^"]*"|\'[^\']*\'', "", rest)):
            if option.startswith("--") and not takes(where, option):
                yield f"{option} is no option of {where.relative_to(ROOT)}"
    else:
        for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w/.-]*\w", named.text):
            if not ((ROOT / path).exists() or (named.page.parent / path).exists()):
                yield f"no path: {path}"
