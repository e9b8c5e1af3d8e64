"""Versions, commit and device that a result was made with. Reports and files state them."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cadsurgery
from cadsurgery.support.errors import FileError, InvalidInput, UnknownName, closest, first_line
from cadsurgery.support.processor import instruction_sets, processor, processor_in_words, sets_in_words

_UNTRUSTED: ContextVar[str] = ContextVar("file that is not trusted", default="")


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that networks come from."""
    numbers = {"cadsurgery": cadsurgery.__version__}
    for package in ("torch", "torchvision", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


def commit() -> str:
    """The commit of this package, if it is run from a checkout of its repository; else empty."""
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""


def describe_run(device: torch.device) -> dict[str, Any]:
    """The fields in which a report states what a result was made with, here and now: `device` with threads,
    `processor`, `instruction_sets`, `versions`, `commit` and `date`."""
    return {
        "device": device_with_threads(device),
        "processor": processor()._asdict(),
        "instruction_sets": instruction_sets(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def setting(device: torch.device) -> str:
    """The same in one line, for benchmarks that print a table."""
    made = describe_run(device)
    numbers = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    at = f"commit {made['commit'][:7]}, " if made["commit"] else ""
    return f"{made['device']}; {numbers}; {at}{made['date'][:10]}"


def find_device(name: str) -> torch.device:
    """A device that is here.

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
    except Exception as error:  # a torch that was built without it says so in many ways
        raise InvalidInput(
            f"there is no device {name!r} here.", why=first_line(error), next="use cpu or cuda."
        ) from error
    return device


def device_in_words(device: torch.device) -> str:
    """The name of a GPU; of the CPU its model, family, caches and the instruction sets in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_in_words()}; {sets_in_words(instruction_sets())}"


def device_with_threads(device: torch.device) -> str:
    """The device in words, and how many threads torch uses beside it."""
    return f"{device_in_words(device)}; {torch.get_num_threads()} threads"


def function_at(name: str, where: str, example: str) -> Any:
    """Return the object that `module:function` names.

    Args:
        name: as written.
        where: for the message.
        example: how it is written.

    Raises:
        InvalidInput: it is not written so.
        UnknownName: no such module or function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InvalidInput(f"{name!r} is not module:function.", where=where, next=f"write e.g. {example}.")
    return find_function(module, function)


@contextlib.contextmanager
def import_nothing(file: str) -> Iterator[None]:
    """While a file that nobody has said to trust is read: what it names is refused, not imported, in this thread."""
    token = _UNTRUSTED.set(file)
    try:
        yield
    finally:
        _UNTRUSTED.reset(token)


def untrusted(file: str, code: str, instead: str) -> FileError:
    """The refusal to run what a file names.

    Args:
        file: its path.
        code: what would have run.
        instead: what else can be given to `cs.load`.
    """
    return FileError(
        f"{file} names code of its own, which was not run.",
        where=code,
        why="it is neither ours nor listed by torchvision or timm, and a file of somebody else can name anything.",
        next=f"if you know the file: cs.load(path, trust=True), on the command line --trust; or {instead}.",
    )


def same_place(one: Any, other: Any) -> bool:
    """True if two classes or functions have one name in one module: the same piece of code, run again, as in a
    notebook."""
    places = [
        (getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")) for thing in (one, other)
    ]
    named = bool(places[0][1]) and "<lambda>" not in places[0][1]
    return one is other or (named and places[0] == places[1])


def find_function(module: str, function: str) -> Any:
    """Return the object that a user's module has under a name.

    Raises:
        UnknownName: no such module, or nothing of that name in it.
        FileError: a file names it that is not trusted.
    """
    if file := _UNTRUSTED.get():
        code = f"import of {module}, for its {function}"
        raise untrusted(file, f"{code:.400}", "another mask: cs.load(path, mask=...), --mask")
    try:
        imported = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        known = [path.stem for path in Path().glob("*.py")] if getattr(error, "name", "") == module else []
        raise UnknownName(
            "module", module, closest(module, known), next=f"it cannot be imported: {error}."
        ) from error
    if not hasattr(imported, function):
        public = {name: one for name, one in vars(imported).items() if callable(one) and name[0] != "_"}
        of_module = [n for n, one in public.items() if getattr(one, "__module__", "") == imported.__name__]
        own = of_module or [*public]  # what it took from other modules may be meant, too
        there = f"it has {', '.join(own[:12])}{', ...' * (len(own) > 12)}." if own else "it has no functions."
        raise UnknownName(f"function in {module}", function, own, next="" if 0 < len(own) <= 12 else there)
    return getattr(imported, function)
