"""Find the weights of a network in a file as training scripts write it; nothing that the file names is executed."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cadsurgery.support import files, kinds
from cadsurgery.support.errors import CadWarning, FileError, UnknownName, describe_error

WEIGHTS = (".safetensors", *kinds.WEIGHTS.endings)  # endings of weight files
_DEPTH = 3  # of the dictionaries in a checkpoint that are searched
_HEADERS = 3  # pickles before the content, in the form of torch before 1.6
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # pickles write the names of Python 2
_COUNTERS = ("n_averaged",)  # torch's AveragedModel has one beside the weights


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and where a file holds them.

    Attributes:
        state: the state dict.
        entry: names of the dictionaries that lead to it, joined by dots; "" if the file is the state dict.
        prefix: the prefix that was taken off all names.
    """

    state: Mapping[str, Tensor]
    entry: str = ""
    prefix: str = ""

    def fits(self, shapes: Mapping[str, torch.Size]) -> bool:
        """True if names and shapes are those of a network; counters of batch norm may be missing."""
        missing = [name for name in shapes if not name.endswith("num_batches_tracked")]
        return self._matching(shapes) == len(self.state) and all(name in self.state for name in missing)

    def _matching(self, shapes: Mapping[str, torch.Size]) -> int:
        return sum(shapes.get(name) == value.shape for name, value in self.state.items())

    def without_prefix(self, shapes: Mapping[str, torch.Size]) -> Weights:
        """Return the weights without the prefix that all names share, as much of it as makes most names fit."""
        state = {name: value for name, value in self.state.items() if name not in _COUNTERS}
        prefixes = [prefix for prefix in _shared_prefixes(state) if prefix]
        others = (
            replace(self, state={name[len(prefix) :]: value for name, value in state.items()}, prefix=prefix)
            for prefix in prefixes
        )
        return max((self, *others), key=lambda weights: weights._matching(shapes))


def _shared_prefixes(names: Iterable[str]) -> Iterator[str]:
    """Yield the dotted prefixes that all names share, the shortest first."""
    split = [name.split(".")[:-1] for name in names]
    prefix = ""
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            return
        prefix += f"{parts[0]}."
        yield prefix


def split_entry(text: str) -> tuple[Path, str]:
    """Split `FILE:ENTRY`, which names a dictionary in a file of weights; the entry is "" if none is named."""
    name, colon, entry = text.rpartition(":")
    has_entry = colon and not files.exists(text) and (Path(name).suffix in WEIGHTS or files.exists(name))
    return (Path(name), entry) if has_entry else (Path(text), "")


def load_weights(model: nn.Module, path: Path, entry: str = "") -> str:
    """Load the weights of a file into a network; return the words that say which, and what was done with them.

    Warns:
        CadWarning: a prefix was taken off all names, or several entries fit; it says which was taken.

    Raises:
        FileError: the file is unreadable, holds no state dict, or none that fits; the message says what it holds.
        UnknownName: there is no such entry.
    """
    own = model.state_dict().items()
    shapes = {name: value.shape for name, value in own if isinstance(value, Tensor)}
    listed = [weights.without_prefix(shapes) for weights in _choose(path, read_weights(path), entry)]
    fitting = [weights for weights in listed if weights.fits(shapes)]
    chosen, *others = fitting or listed
    try:
        model.load_state_dict(chosen.state)
    except RuntimeError as error:
        held = (
            f" Of its entries {', '.join(weights.entry for weights in listed)} none fits."
            if len(listed) > 1
            else ""
        )
        raise FileError(
            f"the weights in {path} do not fit this network.",
            why=" ".join(str(error).split())[:400] + held,
            next="check the name and options of the network, e.g. its number of classes.",
        ) from error
    words = _in_words(path, chosen, others if fitting else [])
    if chosen.prefix or (others and fitting):
        warnings.warn(f"{words}.", CadWarning, stacklevel=4)
    return words


def _choose(path: Path, listed: list[Weights], entry: str) -> list[Weights]:
    if not entry:
        return listed
    chosen = [weights for weights in listed if weights.entry == entry]
    if not chosen:
        raise UnknownName(f"state dict in {path}", entry, [weights.entry for weights in listed])
    return chosen


def _in_words(path: Path, chosen: Weights, others: list[Weights]) -> str:
    words = f"weights from {path.name}"
    if chosen.entry:
        words += f", entry {chosen.entry}"
    if chosen.prefix:
        words += f", without the prefix {chosen.prefix!r} of all names"
    if others:
        also = " and ".join(weights.entry for weights in others)
        words += f"; {also} would fit as well: take it by {path.name}:{others[0].entry}"
    return words


def read_weights(path: Path) -> list[Weights]:
    """Read all state dicts of a `.safetensors` file or a torch checkpoint, in their order.

    Raises:
        FileError: the file is missing, unreadable, or holds no state dict.
    """
    kinds.check_kind(path, kinds.WEIGHTS, kinds.CONVERTED, kinds.TORCHSCRIPT)
    if not files.is_file(path):
        raise files.absent(path)
    content = _read(path)
    listed = list(_state_dicts(content))
    if not listed:
        raise _no_state_dict(path, content)
    return listed


def _state_dicts(value: Any, entry: str = "", depth: int = _DEPTH) -> Iterator[Weights]:
    """Yield all dictionaries of names and tensors in nested dictionaries."""
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        return
    if all(isinstance(part, Tensor) for part in value.values()):
        yield Weights(value, entry)
        return
    for name, part in value.items() if depth else ():
        yield from _state_dicts(part, f"{entry}.{name}".removeprefix("."), depth - 1)


# -- reading without executing --------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """Return the content of a file; objects of classes that torch does not read safely are `_Inert`."""
    names: list[str] = []
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        names = _globals_in(path)
        kinds: list[Any] = [(_Kind("Inert", (_Inert,), {"named": name}), name) for name in names]
        with torch.serialization.safe_globals(kinds):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileError:
        raise
    except Exception as error:  # each reader raises its own error types for broken files
        if any(name.startswith("torch.nn.modules.") for name in names):
            raise _whole_network(path, names[0]) from error
        words = "Python objects in it cannot be read without running its code."
        raise FileError(
            f"{path} cannot be read as weights.",
            why=words if isinstance(error, pickle.UnpicklingError) and names else describe_error(error),
            next="give a .safetensors file, or a file of torch.save(model.state_dict(), path).",
        ) from error


def _globals_in(path: Path) -> list[str]:
    """Return the names of all classes and functions in a checkpoint, in their order; nothing is unpickled.

    Raises:
        FileError: the file is an archive of TorchScript.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _names_of(file, _HEADERS + 1)  # the form of torch before 1.6
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise FileError(
                    f"{path} is a network compiled by TorchScript, not a state dict.",
                    next=_two_lines(path, "torch.jit.load({path!r})"),
                )
            pickled = next((name for name in names if name.endswith("/data.pkl")), "")
            return _names_of(io.BytesIO(archive.read(pickled)), 1) if pickled else []


def _names_of(file: IO[bytes], pickles: int) -> list[str]:
    operations = (operation for _ in range(pickles) for operation in pickletools.genops(file))
    split = (str(text).split(" ") for kind, text, _ in operations if kind.name == "GLOBAL")
    return list(dict.fromkeys(f"{_RENAMED.get(module, module)}.{name}" for module, name in split))


class _Kind(type):
    """The class of `_Inert`: equal to `dict`, because torch adds items to nothing but dictionaries."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict

    __hash__ = type.__hash__


class _Inert(dict[Any, Any], metaclass=_Kind):
    """Stands for an object of a class that the file names, e.g. of hyperparameters: neither is anything imported, nor
    does any code of it run. Items are kept, because they may hold a state dict."""

    named = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys()


def _no_state_dict(path: Path, content: Any) -> FileError:
    """Return the error for a file without a state dict; it says what a pickled module is and how to convert it."""
    entries = {"": content, **(content if isinstance(content, dict) else {})}
    for entry, value in entries.items():
        if getattr(value, "is_module", False):
            return _whole_network(path, value.named, entry)
    return FileError(f"{path} holds no state dict.", next="write one: torch.save(model.state_dict(), path).")


def _whole_network(path: Path, name: str, entry: str = "") -> FileError:
    place, index = (f" in its entry {entry!r}", f"[{entry!r}]") if entry else ("", "")
    return FileError(
        f"{path} holds a pickled network of class {name}{place}, not a state dict.",
        why="to unpickle it runs code that the file names, which is never done here.",
        next=_two_lines(path, "torch.load({path!r}, weights_only=False)" + index, name.rpartition(".")[0]),
    )


def _two_lines(path: Path, reading: str, module: str = "") -> str:
    where = f", where {module} can be imported" if module and module != "__main__" else ""
    target = path.with_name(f"{path.stem}-weights.pth")
    return (
        f"if you trust the file, write its weights{where}:\n"
        f"    model = {reading.format(path=str(path))}\n"
        f"    torch.save(model.state_dict(), {str(target)!r})"
    )
