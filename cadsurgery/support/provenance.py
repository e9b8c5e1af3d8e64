"""Record the versions, commit and device that a result was made with, for reports and files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import cadsurgery
from cadsurgery.support.errors import CadError, FileError, InvalidInput, UnknownName, closest, first_line
from cadsurgery.support.processor import instruction_sets, processor, processor_in_words, sets_in_words

_REFUSAL: ContextVar[Callable[[str], CadError] | None] = ContextVar("error for an import", default=None)


def versions() -> dict[str, str]:
    """Return the versions of this package and of torch, torchvision and timm."""
    numbers = {"cadsurgery": cadsurgery.__version__}
    for package in ("torch", "torchvision", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


def commit() -> str:
    """Return the git commit of this package if it runs from a checkout of its repository; else an empty string."""
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return a report's provenance fields for a run made now: `device` with threads, `processor`, `instruction_sets`,
    `versions`, `commit` and `date`."""
    return {
        "device": f"{device_in_words(device)}; {torch.get_num_threads()} threads",
        "processor": processor()._asdict(),
        "instruction_sets": instruction_sets(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def setting(device: torch.device) -> str:
    """Return the provenance of `describe_run` in one line, for benchmarks that print a table."""
    run = describe_run(device)
    numbers = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    at = f"commit {run['commit'][:7]}, " if run["commit"] else ""
    return f"{run['device']}; {numbers}; {at}{run['date'][:10]}"


def find_device(name: str) -> torch.device:
    """Return the torch device of a name, if this machine has it.

    Raises:
        InvalidInput: no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInput(
            f"{name!r} is not a device.", why=first_line(error), next="use cpu or cuda."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("there is no CUDA device here.", next="use --device cpu.")
    if device.type == "meta":
        raise InvalidInput("device meta holds shapes and no values.", next="use cpu or cuda.")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # a torch built without this device raises errors of many types
        raise InvalidInput(
            f"there is no device {name!r} here.", why=first_line(error), next="use cpu or cuda."
        ) from error
    return device


def device_in_words(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU's model, family, caches and the instruction sets in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_in_words()}; {sets_in_words(instruction_sets())}"


def function_at(name: str, where: str, example: str) -> Any:
    """Return the object that `module:function` names.

    Args:
        name: the text `module:function`.
        where: location for the error message.
        example: a correct text for the error message.

    Raises:
        InvalidInput: the text has another form.
        UnknownName: no such module or function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InvalidInput(f"{name!r} is not module:function.", where=where, next=f"write e.g. {example}.")
    return find_function(module, function)


@contextlib.contextmanager
def import_nothing(refusal: Callable[[str], CadError]) -> Iterator[None]:
    """Forbid imports in this thread: `find_function` raises the error that `refusal` returns for the import's name."""
    token = _REFUSAL.set(refusal)
    try:
        yield
    finally:
        _REFUSAL.reset(token)


def import_nothing_for(file: str) -> contextlib.AbstractContextManager[None]:
    """Forbid imports in this thread while an untrusted file is read."""
    return import_nothing(lambda code: untrusted(file, code, "another mask: cs.load(path, mask=...), --mask"))


def untrusted(file: str, code: str, instead: str) -> FileError:
    """Return the error for an untrusted file that names code to be run.

    Args:
        file: path of the file.
        code: the code that would have run.
        instead: an alternative argument of `cs.load`.
    """
    return FileError(
        f"{file} names code of its own, which was not run.",
        where=code,
        why="it is neither ours nor listed by torchvision or timm, and a file of somebody else can name anything.",
        next=f"if you know the file: cs.load(path, trust=True), on the command line --trust; or {instead}.",
    )


def same_place(one: Any, other: Any) -> bool:
    """True if two classes or functions have the same name and module: the same code, perhaps run twice in a
    notebook."""
    places = [
        (getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")) for thing in (one, other)
    ]
    named = bool(places[0][1]) and "<lambda>" not in places[0][1]
    return one is other or (named and places[0] == places[1])


def check_unclaimed(what: str, name: str, thing: Any, claimed: Mapping[str, Any]) -> None:
    """Refuse a name in a table of registered things that another thing has; the same code may be run twice.

    Raises:
        ValueError: another class or function has this name.
    """
    other = claimed.get(name, thing)
    if not same_place(other, thing):
        place = f"{other.__module__}.{other.__qualname__}"
        raise ValueError(f"{what} {name!r} is registered already, by {place}; choose another name")


@cache
def _of_file(path: Path) -> ModuleType:
    """Run a Python file as a module, which finds what lies beside it; once in a process."""
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    name = path.stem if known is None and path.stem not in sys.stdlib_module_names else f"{path.stem}_of_file"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for a name that ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def find_function(module: str, function: str) -> Any:
    """Import a user's module, or run the Python file that is named instead of it, and return its attribute of a name.

    Raises:
        UnknownName: there is no such module, or no such name in it.
        CadError: the name comes from somebody else, such as the author of an untrusted file (`import_nothing`).
    """
    if refusal := _REFUSAL.get():
        raise refusal(f"import of {module}, for its {function}"[:400])
    try:
        imported = (
            _of_file(Path(module).resolve()) if module.endswith(".py") else importlib.import_module(module)
        )
    except (ImportError, ValueError, OSError) as error:
        known = [path.stem for path in Path().glob("*.py")] if getattr(error, "name", "") == module else []
        raise UnknownName(
            "module", module, closest(module, known), next=f"it cannot be imported: {error}."
        ) from error
    if not hasattr(imported, function):
        public = {name: value for name, value in vars(imported).items() if callable(value) and name[0] != "_"}
        defined = [n for n, value in public.items() if getattr(value, "__module__", "") == imported.__name__]
        known = defined or [*public]  # without functions of its own, suggest those it imports
        listed = ", ".join(known[:12]) + ", ..." * (len(known) > 12)
        hint = f"it has {listed}." if known else "it has no functions."
        raise UnknownName(f"function in {module}", function, known, next="" if 0 < len(known) <= 12 else hint)
    return getattr(imported, function)
