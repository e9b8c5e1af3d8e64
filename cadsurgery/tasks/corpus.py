"""Networks that are checked: those that the libraries have by name, and those of a corpus.

A corpus is a folder of Python files, or one file, in which `network` declares what builds them:

    @network("transposed", "pads")
    class UNet(nn.Module):
        ...

Such files are run when they are read, so only what a user names is read; a checkout has one, `tests/corpus`.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadsurgery.data.networks import build_model, family_of
from cadsurgery.support import files
from cadsurgery.support.errors import FileError, UnknownName, describe_error

Builder = Callable[[], nn.Module]
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Subject:
    """A network to be checked.

    Attributes:
        name: of the row, `file:builder` for one of a corpus.
        family: library and module, or the file.
        build: makes it, with random weights.
        idioms: that it stands for.
        about: the same in words.
        call: from an image batch to what the network is called with, as `adaptify(example_input=)` takes it: a tensor,
            a tuple of arguments or a dictionary of keywords; None: the image alone.
        size: of the image it is converted on; None: of the built-in one.
    """

    name: str
    family: str
    build: Builder
    idioms: tuple[str, ...] = ()
    about: str = ""
    call: Call | None = None
    size: tuple[int, int] | None = None

    def arguments(self, image: Tensor) -> Any:
        """The arguments of the network for an image batch."""
        return image if self.call is None else self.call(image)


# Small, odd and not square; networks that do not take it are converted on the built-in images.
ZOO_SIZE = (65, 97)

CHECKOUT = Path(__file__).parents[2] / "tests" / "corpus"  # which the installed package comes without

_declared: dict[str, dict[str, Subject]] = {}  # by module


def network(
    *idioms: str, call: Call | None = None, name: str = "", size: tuple[int, int] | None = None
) -> Callable[[Builder], Builder]:
    """Declare a class or function that builds a network of a corpus; its docstring tells about it.

    Args:
        idioms: that it stands for, in the words of the corpus.
        call: see `Subject`.
        name: if it is not that of the class or function.
        size: of the image it is converted on, if it does not run on the built-in ones.
    """

    def declare(build: Builder) -> Builder:
        called = name or build.__name__
        about = " ".join((build.__doc__ or "").partition("\n\n")[0].split())
        family = build.__module__
        subjects = _declared.setdefault(family, {})
        if called in subjects:
            raise ValueError(f"{family} declares {called} twice.")
        subjects[called] = Subject(f"{family}:{called}", family, build, idioms, about, call, size)
        return build

    return declare


def subject(name: str, corpus: Path | None = None) -> Subject:
    """A network by the name of its row: of a library, or of the files of a corpus.

    Raises:
        UnknownName: the corpus has none of that name; of the libraries' names that shows when it is built.
        FileError: the corpus cannot be read.
    """
    if corpus is None:
        return Subject(name, family_of(name), partial(build_model, name, "none"), size=ZOO_SIZE)
    family = name.partition(":")[0]
    for file in _files(corpus):
        if file.stem == family:
            subjects = {one.name: one for one in _read(file)}
            if name in subjects:
                return subjects[name]
            raise UnknownName(f"network in {file}", name, subjects)
    raise UnknownName(f"file in {corpus}", family, [file.stem for file in _files(corpus)])


def read_corpus(corpus: Path, pattern: str = "*") -> list[Subject]:
    """The networks of a file or of the files of a folder, in their order there.

    Args:
        corpus: a file, or a folder, of which only the files right in it are read.
        pattern: shell-style, for names.

    Raises:
        FileError: there is no such file or folder, or one of the files does not run.
    """
    subjects = [one for file in _files(corpus) for one in _read(file)]
    return [one for one in subjects if fnmatch.fnmatch(one.name, pattern)]


def find_corpus(argument: str) -> tuple[Path, str]:
    """The corpus that is meant, and the pattern for its names.

    Args:
        argument: a file or folder; that of a folder in the checkout's corpus; or a pattern for the checkout's corpus.

    Raises:
        FileError: there is no such file, or this is no checkout, which has a corpus.
    """
    for path in (Path(argument), CHECKOUT / argument):
        if argument not in ("", "*") and files.exists(path):
            return path, "*"
    if argument.endswith(".py") or "/" in argument or not CHECKOUT.is_dir():
        raise FileError(
            f"there is no corpus {argument}." if argument not in ("", "*") else "there is no corpus here.",
            why="" if CHECKOUT.is_dir() else "the installed package comes without tests/corpus.",
            next="name a file or folder of networks declared with cadsurgery.tasks.corpus.network: "
            "cadsurgery list PATH --check --corpus.",
        )
    return CHECKOUT, argument or "*"


def _files(corpus: Path) -> list[Path]:
    if not files.exists(corpus):
        raise FileError(f"there is no {corpus}.", next="name a file or folder of networks.")
    return sorted(corpus.glob("*.py")) if corpus.is_dir() else [corpus]


def _read(file: Path) -> list[Subject]:
    """The networks a file declares; it is run once, and finds what lies beside it."""
    if file.suffix != ".py":
        raise FileError(f"{file} is no Python file.", next="name a .py file, or a folder of such.")
    importlib.invalidate_caches()
    try:
        with beside(file):
            module = importlib.import_module(file.stem)
    except BaseException as error:
        _declared.pop(file.stem, None)
        if not isinstance(error, Exception):
            raise
        raise FileError(
            f"{file} does not run.",
            why=describe_error(error),
            next="mend it, or install what it imports.",
        ) from error
    known = getattr(module, "__file__", None)
    if known is None or Path(known).resolve() != file.resolve():
        raise FileError(
            f"{file} has the name of another module.",
            why=f"{file.stem} is {known or 'a part of Python'}.",
            next="give the file another name.",
        )
    return list(_declared.get(file.stem, {}).values())


@contextmanager
def beside(corpus: Path) -> Iterator[None]:
    """The files of a corpus, and what lies beside them, can be imported for a while."""
    folder = str((corpus if corpus.is_dir() else corpus.parent).resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
