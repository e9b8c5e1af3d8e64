"""The command line: parse arguments, call the library, print results. Exit codes: 0 done, 1 refused, 2 usage
or a package that is not installed."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import screen
from cadsurgery.cli.replaced import COMMANDS, replacement
from cadsurgery.support.errors import CadError, NotInstalled

_INTERRUPTED = 130  # exit code of a command that Ctrl-C ended, as of shells


def make_app() -> typer.Typer:
    """Collect the groups of commands in every module of this package; those with a name of their own come last.

    Importing torch takes seconds, so these modules import what a command needs only when it runs.
    """
    app = typer.Typer(
        help="Give convolutional networks content-adaptive downsampling: full feature resolution where a mask says it "
        "matters, strided elsewhere, in one pass, with the same weights.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain: at 80 columns boxes and types leave half of a line for the text
    )

    @app.callback()
    def common(
        version: Annotated[
            bool,
            typer.Option(
                "--version",
                is_eager=True,
                callback=_show_version,
                help="print versions, processor and instruction sets, and the origin of the compiled kernels",
            ),
        ] = False,
    ) -> None:
        pass

    folders = sys.modules[str(__package__)].__path__
    names = [name for _, name, _ in pkgutil.iter_modules(folders) if name not in ("main", "__main__")]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    groups = [
        group for module in modules for group in vars(module).values() if isinstance(group, typer.Typer)
    ]
    for group in sorted(groups, key=lambda group: isinstance(group.info.name, str)):
        app.add_typer(group)
    return app


def _say_what_replaces(error: Any) -> None:
    """Let the refusal of an option or a command that there was name what is typed in its place."""
    for name, instead in COMMANDS.items():
        if error.message.startswith(f"No such command '{name}'"):
            error.message = f"{name} is no command. Next: {instead}"
    if option := getattr(error, "option_name", None):
        context, names = error.ctx, list[str]()
        while context.parent is not None:
            names.insert(0, context.info_name)
            context = context.parent
        settable = getattr(error.ctx.command.callback, "settable", ())
        if line := replacement(" ".join(names), option, settable):
            error.message, error.possibilities = f"{option} is no option. Next: {line}", None


def _show_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(_describe_installation())
        raise typer.Exit


def _describe_installation() -> str:
    """Return versions, processor, instruction sets, and the state of the compiled kernels, for reports about speed.

    Raises:
        InvalidInput: CADSURGERY_ISA names an unknown instruction set, or one that the processor lacks.
    """
    from cadsurgery.kernels import isa
    from cadsurgery.kernels.load import open_kernels
    from cadsurgery.support.processor import processor_in_words
    from cadsurgery.support.provenance import commit, versions

    ours, *others = (f"{name} {number}" for name, number in versions().items())
    at = f" (commit {commit()})" if commit() else ""
    kernels = open_kernels()
    state = f"none: {kernels.reason}; torch's operations take their place"
    available = f"; the processor has {', '.join(isa.here())}" if kernels.library is not None else ""
    lines = [
        f"{ours}{at}",
        ", ".join(others),
        f"processor: {processor_in_words()}",
        f"instruction sets: {isa.in_words()}{available}",
        f"compiled kernels: {state if kernels.library is None else 'in the package'}",
    ]
    return "\n".join(lines)


def main(app: typer.Typer | None = None) -> None:
    """Run the command line, or that of a recipe.

    Errors that a user can cause are printed without a traceback, with exit code 1, or 2 where a package of an extra is
    not installed.
    Modules named as `module:function` are also searched for in the current folder, after all installed modules.
    """
    if not sys.flags.safe_path:
        sys.path.append(str(Path.cwd()))
    try:
        with screen.warnings_as_lines():
            code = (app or make_app())(standalone_mode=False)
    except CadError as error:
        if "--json" in sys.argv:
            screen.print_json(error.to_dict())
        else:
            screen.err.print(f"[bold red]{type(error).__name__}:[/bold red]", end=" ")
            screen.err.print(str(error), markup=False, highlight=False)
        sys.exit(2 if isinstance(error, NotInstalled) else 1)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.say_interrupted()
        sys.exit(_INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the argument parser
        if show is None:
            raise
        _say_what_replaces(error)
        show()
        sys.exit(2)
    if code == _INTERRUPTED:  # newer versions of typer return this code instead of raising
        screen.say_interrupted()
    sys.exit(code if isinstance(code, int) else 0)
