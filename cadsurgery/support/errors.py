"""Errors that say what happened, where, why, and what to do next."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_PACKAGE = __name__.partition(".")[0]


class CadError(Exception):
    """Base of every error a user can cause; the CLI turns it into exit code 1, or 2 for `NotInstalled`.

    Args:
        what: the refusal in one sentence.
        where: the node, module, file or option concerned.
        why: the reason.
        next: the next step the user can take.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", next: str = "") -> None:
        self.what, self.where, self.why, self.next = what, where, why, next
        lines = [what]
        for label, text in (("Where", where), ("Why", why), ("Next", next)):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))

    def to_dict(self) -> dict[str, str]:
        """Return the parts of the message, for `--json`."""
        parts = {"what": self.what, "where": self.where, "why": self.why, "next": self.next}
        return {"error": type(self).__name__, **{key: text for key, text in parts.items() if text}}

    @staticmethod
    def from_dict(values: Mapping[str, str]) -> CadError:
        """Rebuild an error from the values of `to_dict`; other values are ignored."""
        kinds = {kind.__name__: kind for kind in CadError.__subclasses__()}
        error = CadError.__new__(kinds.get(values["error"], CadError))
        parts = {name: values.get(name, "") for name in ("where", "why", "next")}
        CadError.__init__(error, values["what"], **parts)
        return error


class CannotConvert(CadError):
    """The network, or the requested part of it, cannot be made adaptive."""


class NotConverted(CadError, AttributeError):
    """A method of the original network is not one of the converted network, since it would run the original."""


class UnknownName(CadError):
    """A model, mask, option, node or weight name does not exist; the message lists the closest names."""

    def __init__(self, kind: str, name: str, options: Iterable[str], *, next: str = "") -> None:
        options = sorted(options)
        close = closest(name, options)
        listed = options if len(options) <= 12 else []
        hint = f"did you mean {', '.join(close)}?" if close else ""
        known = f"known: {', '.join(listed)}." if listed else ""
        super().__init__(
            f"there is no {kind} named {name!r}.",
            next=" ".join(part for part in (hint, known, next) if part) or "check the spelling.",
        )


def check_name(kind: str, name: str, options: Iterable[str]) -> None:
    """Refuse a name that is not among the options.

    Raises:
        UnknownName: the name is not among the options.
    """
    if name not in options:
        raise UnknownName(kind, name, options)


class InvalidInput(CadError):
    """An image, mask or argument has the wrong type, size or values."""


class FileError(CadError):
    """A file is missing, truncated, foreign, or cannot be written."""


class CadWarning(UserWarning):
    """Warning to the user; the work continues, and the CLI prints the warning as a line."""


class LeftOut(CadWarning):
    """Warning that something in a folder was left out; the CLI prints it when the command ends."""


def warn(message: str, category: type[CadWarning] = CadWarning) -> None:
    """Warn, and name the line outside of this package that led here; the first of all if there is none."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        names.get("__name__") or "<unknown>",  # Python says nothing of a module without a name
        names.setdefault("__warningregistry__", {}),
    )


class NotInstalled(CadError):
    """A package is not installed that only some installations have; `next` is the command that installs it."""


class TrainingStopped(CadError):
    """Training cannot continue: the loss or the weights are no longer finite numbers."""


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type's name if the message is empty."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    # torch.fx's own words where an error has none
    return text.splitlines()[0] if text and not text.startswith("While executing ") else type(error).__name__


def describe_error(error: BaseException | None) -> str:
    """Describe an error of another package in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def as_refusal(refuse: Callable[[Exception], CadError]) -> Iterator[None]:
    """Raise what `refuse` makes of an error in the block, of whatever type; those of this package are raised as they
    are. For code of others: of decoders, of networks, of users."""
    try:
        yield
    except CadError:
        raise
    except Exception as error:
        raise refuse(error) from error


def import_optional(module: str, what: str, next: str) -> Any:
    """Import a module of an optional package.

    Raises:
        NotInstalled: the package is not installed, or cannot be imported; the message is `what` and the command `next`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else describe_error(error)
        raise NotInstalled(what, why=why, next=next) from error


def closest(name: str, options: Iterable[str]) -> list[str]:
    """Return up to three options that resemble `name`."""
    return difflib.get_close_matches(name, list(options), n=3, cutoff=0.6)
