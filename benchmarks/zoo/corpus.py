"""Networks to check: networks of the libraries by name, and networks of a corpus.

A corpus is a folder of Python files, or one file, in which `network` declares the builders:

    @network("transposed", "pads")
    class UNet(nn.Module):
        ...

Reading such a file runs it, so only files that a user names are read. A checkout contains one corpus, `tests/corpus`.
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

from cadsurgery.data.networks import build_model
from cadsurgery.support import files
from cadsurgery.support.errors import FileError, UnknownName, describe_error
from cadsurgery.support.folders import visible
from cadsurgery.support.kinds import PYTHON, of_another_kind

Builder = Callable[[], nn.Module]
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Subject:
    """A network to check.

    Attributes:
        name: name of the row, `file:builder` for a network of a corpus.
        family: library and module, or the file.
        build: builds the network with random weights.
        idioms: constructs that the network represents.
        about: description of the network.
        call: maps an image batch to the network's arguments, as for `adaptify(example_input=)`: a tensor, a tuple of
            arguments or a dictionary of keywords; None for the image alone.
        size: image size of the conversion; None for the built-in images.
    """

    name: str
    family: str
    build: Builder
    idioms: tuple[str, ...] = ()
    about: str = ""
    call: Call | None = None
    size: tuple[int, int] | None = None

    def arguments(self, image: Tensor) -> Any:
        """Return the network's arguments for an image batch."""
        return image if self.call is None else self.call(image)


# Small, odd and not square; networks that do not accept it are converted on the built-in images.
ZOO_SIZE = (65, 97)

CHECKOUT = Path(__file__).parents[2] / "tests" / "corpus"  # not part of the installed package

_declared: dict[str, dict[str, Subject]] = {}  # by module


def network(
    *idioms: str, call: Call | None = None, name: str = "", size: tuple[int, int] | None = None
) -> Callable[[Builder], Builder]:
    """Declare a class or function that builds a network of a corpus; its docstring is the description.

    Args:
        idioms: constructs that the network represents, in the words of the corpus.
        call: see `Subject`.
        name: name, if it differs from that of the class or function.
        size: image size of the conversion, if the network does not run on the built-in images.
    """

    def declare(build: Builder) -> Builder:
        network_name = name or build.__name__
        about = " ".join((build.__doc__ or "").partition("\n\n")[0].split())
        family = build.__module__
        subjects = _declared.setdefault(family, {})
        if network_name in subjects:
            raise ValueError(f"{family} declares {network_name} twice.")
        subjects[network_name] = Subject(f"{family}:{network_name}", family, build, idioms, about, call, size)
        return build

    return declare


def subject(name: str, corpus: Path | None = None) -> Subject:
    """Return a network by the name of its row: from a library, or from the files of a corpus.

    Raises:
        UnknownName: the corpus has no such network; an unknown name of a library shows when it is built.
        FileError: the corpus cannot be read.
    """
    if corpus is None:
        return Subject(name, family_of(name), partial(build_model, name, "none"), size=ZOO_SIZE)
    family = name.partition(":")[0]
    for file in _files(corpus):
        if file.stem == family:
            subjects = {entry.name: entry for entry in _read(file)}
            if name in subjects:
                return subjects[name]
            raise UnknownName(f"network in {file}", name, subjects)
    raise UnknownName(f"file in {corpus}", family, [file.stem for file in _files(corpus)])


def read_corpus(corpus: Path, pattern: str = "*") -> list[Subject]:
    """Return the networks of a file, or of the files of a folder, in the order of their declaration.

    Args:
        corpus: a file, or a folder whose files (not those of subfolders) are read.
        pattern: shell-style pattern for names.

    Raises:
        FileError: there is no such file or folder, or a file does not run.
    """
    subjects = [entry for file in _files(corpus) for entry in _read(file)]
    return [entry for entry in subjects if fnmatch.fnmatch(entry.name, pattern)]


def find_corpus(argument: str) -> tuple[Path, str]:
    """Find the corpus that an argument names, and the pattern for its networks.

    Args:
        argument: a file or folder; a folder of the checkout's corpus; or a pattern for the checkout's corpus.

    Raises:
        FileError: there is no such file, or this is not a checkout with a corpus.
    """
    for path in (Path(argument), CHECKOUT / argument):
        if argument not in ("", "*") and files.exists(path):
            return path, "*"
    if argument.endswith(".py") or "/" in argument or not CHECKOUT.is_dir():
        raise FileError(
            f"there is no corpus {argument}." if argument not in ("", "*") else "there is no corpus here.",
            why="" if CHECKOUT.is_dir() else "the installed package comes without tests/corpus.",
            next="name a file or folder of networks declared with benchmarks.zoo.corpus.network: "
            "python -m benchmarks.zoo.check PATH --corpus.",
        )
    return CHECKOUT, argument or "*"


def _files(corpus: Path) -> list[Path]:
    if not files.exists(corpus):
        raise FileError(f"there is no {corpus}.", next="name a file or folder of networks.")
    return [path for path in visible(corpus) if path.suffix == ".py"] if corpus.is_dir() else [corpus]


def _read(file: Path) -> list[Subject]:
    """Return the networks that a file declares; the file is run once, and can import modules beside it."""
    if file.suffix != ".py":
        refusal = FileError(
            f"{file} is not a Python file.", next="name a .py file, or a folder of .py files."
        )
        raise of_another_kind(file, PYTHON) or refusal
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
            next="correct it, or install what it imports.",
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
    """Allow imports of a corpus's files, and of modules beside them, inside the `with` block."""
    folder = str((corpus if corpus.is_dir() else corpus.parent).resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def family_of(name: str) -> str:
    """Return the library and module that define a network, e.g. `torchvision.resnet`."""
    import timm
    import torchvision

    if name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
    else:
        module = timm.models.model_entrypoint(name).__module__ if timm.is_model(name) else name
    return f"{module.partition('.')[0]}.{module.rpartition('.')[2]}"
