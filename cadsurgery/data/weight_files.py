"""Find the weights of a network in a file as training scripts write it; nothing that the file names is executed."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cadsurgery.support import files, kinds
from cadsurgery.support.errors import FileError, UnknownName, describe_error, warn

WEIGHTS = (".safetensors", ".index.json", *kinds.WEIGHTS.endings)  # endings of weight files
_INDEX = ".index.json"  # of weights in several files, as the Hub's libraries write it
_DEPTH = 3  # of the dictionaries in a checkpoint that are searched
_HEADERS = 3  # pickles before the content, in the form of torch before 1.6
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # pickles write the names of Python 2
_LISTED = 6  # names of what was left out
_EXTRA = "_extra_state"  # what a module keeps beside its tensors, see torch's `get_extra_state`


class ExpectedState:
    """The tensors that a network's state dict has, and which state dicts of files fit it.

    A state dict fits if it has all of them; tensors that several names share may have one of these names. What else it
    has is left out, unless it belongs to a module that the network has, too: then it is of a deeper network.

    Attributes:
        own: the network's state dict.
        tied: the names of each tensor.
        children: names of the network's direct submodules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own = model.state_dict()
        tied: dict[tuple[Any, ...], list[str]] = {}
        for name, value in self.own.items():
            if isinstance(value, Tensor):
                where = value.data_ptr(), value.device, value.shape, value.stride()
                tied.setdefault(where if value.numel() else (name,), []).append(name)
        self.tied = list(tied.values())
        self.children = {name for name, _ in model.named_children()}

    def matching(self, weights: Weights) -> int:
        """Return how many tensors of a state dict have a name and shape of the network."""
        return sum(self._is_of(name, value) for name, value in weights.state.items())

    def is_met_by(self, weights: Weights) -> bool:
        """True if a state dict fits, see the class; counters of batch norm may be missing."""
        has = {name for name, value in weights.state.items() if self._is_of(name, value)}
        return all(
            has.intersection(names) or names[0].endswith("num_batches_tracked") for names in self.tied
        ) and not any(self._is_deeper(name) for name, value in weights.state.items() if name not in has)

    def taken_from(self, weights: Weights) -> dict[str, Any]:
        """Return the state dict to load: the network's names alone, each name of a shared tensor among them."""
        state = {name: value for name, value in weights.state.items() if name in self.own}
        for names in self.tied:
            known = [name for name in names if name in state]
            if not known and names[0].endswith("num_batches_tracked"):
                state[names[0]] = self.own[names[0]]
            state |= {name: state[known[0]] for name in names if known and name not in state}
        return state

    def _is_of(self, name: str, value: Any) -> bool:
        own = self.own.get(name)
        return isinstance(value, Tensor) and isinstance(own, Tensor) and own.shape == value.shape

    def _is_deeper(self, name: str) -> bool:
        """True for the name of a tensor in a module that the network has, or behind its last numbered one."""
        first, _, rest = name.partition(".")
        if name.endswith(_EXTRA):
            return False
        if not rest:
            return name in self.own
        return first in self.children or (first.isdigit() and any(map(str.isdigit, self.children)))


@dataclass(frozen=True)
class Weights:
    """Values by name, tensors among them, and where a file holds them.

    Attributes:
        state: the state dict.
        entry: names of the dictionaries that lead to it, joined by dots; "" if the file is the state dict.
        prefix: the prefix that was taken off the names.
        beside: names that do not have the prefix.
        license: the licence that the file states, in the metadata of a safetensors file or as an entry `license` beside
            the weights of a checkpoint; "" if it states none.
    """

    state: Mapping[str, Any]
    entry: str = ""
    prefix: str = ""
    beside: tuple[str, ...] = ()
    license: str = ""

    @property
    def name(self) -> str:
        """What follows `FILE:` to take these weights."""
        return f"{self.entry}.{self.prefix}".strip(".")

    def parts(self) -> Iterator[Weights]:
        """Yield the state dict as it is, and without prefixes: `module.` that all names have, and then one such as
        `net.` that some of them have, beside names of a loss or a teacher."""
        yield self
        groups = dict.fromkeys(name.partition(".")[0] for name in self.state if "." in name)
        if len(groups) > 1 and any("." in name for name in self.beside):
            return  # one group of a group is a module like any other
        for prefix in (f"{first}." for first in groups):
            inside = {
                name.removeprefix(prefix): value
                for name, value in self.state.items()
                if name.startswith(prefix)
            }
            others = [self.prefix + name for name in self.state if not name.startswith(prefix)]
            beside = (*self.beside, *others)
            yield from replace(self, state=inside, prefix=self.prefix + prefix, beside=beside).parts()


def is_weights(path: Path) -> bool:
    """True for a name that files of weights have."""
    return path.name.lower().endswith(WEIGHTS)


def split_entry(text: str) -> tuple[Path, str]:
    """Split `FILE:ENTRY`, which names a dictionary in a file of weights; the entry is "" if none is named."""
    name, colon, entry = text.rpartition(":")
    has_entry = colon and not files.exists(text) and (is_weights(Path(name)) or files.exists(name))
    return (Path(name), entry) if has_entry else (Path(text), "")


def load_weights(model: nn.Module, path: Path, entry: str = "") -> tuple[str, str]:
    """Load the weights of a file into a network; return the words that say which, and what was done with them, and the
    licence that the file states.

    Warns:
        CadWarning: a prefix was taken off all names, or several entries fit; it says which was taken.

    Raises:
        FileError: the file is unreadable, holds no state dict, or none that fits; the message says what it holds.
        UnknownName: there is no such entry.
    """
    expected = ExpectedState(model)
    listed = _choose(path, read_weights(path), entry)
    parts = [part for weights in listed for part in weights.parts()]
    fitting = [part for part in parts if expected.is_met_by(part)]
    chosen, *others = [part for part in fitting if part.name == entry] or fitting or parts
    if not fitting:
        chosen = max(parts, key=expected.matching)
    try:
        model.load_state_dict(expected.taken_from(chosen) if fitting else chosen.state)
    except RuntimeError as error:
        entries = ", ".join(part.entry for part in listed if part.entry)
        held = f" Of its entries {entries} none fits." if len(listed) > 1 else ""
        raise FileError(
            f"the weights in {path} do not fit this network.",
            why=" ".join(str(error).split())[:400] + held,
            next="check the name and options of the network, e.g. its number of classes.",
        ) from error
    left_out = (*chosen.beside, *(name for name in chosen.state if name not in expected.own))
    words = _in_words(path, chosen, others if fitting else [], left_out)
    if chosen.prefix or left_out or (others and fitting):
        warn(f"{words}.")
    return words, chosen.license


def _choose(path: Path, listed: list[Weights], entry: str) -> list[Weights]:
    if not entry:
        return listed
    chosen = [
        weights for weights in listed if any(entry in (part.name, part.entry) for part in weights.parts())
    ]
    if not chosen:
        raise UnknownName(
            f"state dict in {path}", entry, [weights.entry for weights in listed if weights.entry]
        )
    return chosen


def _in_words(path: Path, chosen: Weights, others: list[Weights], left_out: Sequence[str]) -> str:
    words = f"weights from {path.name}"
    if chosen.entry:
        words += f", entry {chosen.entry}"
    if chosen.prefix:
        words += f", without the prefix {chosen.prefix!r} of {'its' if chosen.beside else 'all'} names"
    if others:
        also = " and ".join(part.name for part in others)
        words += f"; {also} would fit as well: take it by {path.name}:{others[0].name}"
    if left_out:
        words += f"; left out: {_shortly(left_out)}"
    return words


def _shortly(names: Sequence[str]) -> str:
    """List names, those with one beginning together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    listed = [f"{first}.* ({len(group)} names)" if group[1:] else group[0] for first, group in groups.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{', '.join(listed[:_LISTED])}{more}"


def read_weights(path: Path) -> list[Weights]:
    """Read all state dicts of a `.safetensors` file or a torch checkpoint, in their order.

    Raises:
        FileError: the file is missing, unreadable, or holds no state dict.
    """
    if path.name.endswith(_INDEX):
        return [Weights(_read_parts(path))]
    if kinds.kind_of_file(path) is kinds.TORCHSCRIPT:
        raise FileError(
            f"{path} is a network compiled by TorchScript, not a state dict.",
            next=_two_lines(path, "torch.jit.load({path!r})"),
        )
    kinds.check_kind(path, kinds.WEIGHTS, kinds.CONVERTED)
    if not files.is_file(path):
        raise files.absent(path)
    content, license = _read(path)
    listed = [replace(weights, license=license) for weights in _state_dicts(content)]
    if not listed:
        raise _no_state_dict(path, content)
    return listed


def _state_dicts(value: Any, entry: str = "", depth: int = _DEPTH) -> Iterator[Weights]:
    """Yield all dictionaries of names and tensors in nested dictionaries."""
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        return
    if any(isinstance(part, Tensor) for part in value.values()):
        yield Weights(value, entry)
    for name, part in value.items() if depth else ():
        yield from _state_dicts(part, f"{entry}.{name}".removeprefix("."), depth - 1)


def _read_parts(path: Path) -> dict[str, Tensor]:
    """Read weights that are spread over several files, listed in an index: `{"weight_map": {name: file}}`.

    Raises:
        FileError: the index or one of the files is missing, unreadable, or lacks a tensor.
    """
    if not files.is_file(path):
        raise files.absent(path)
    wrong = f"{path} is no index of weights."
    with files.as_file_error(wrong, 'it is written as {"weight_map": {name of a tensor: name of a file}}.'):
        by_name = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        places = {name: str(place) for name, place in by_name.items()}
    if any(Path(place).name != place for place in places.values()):
        raise FileError(wrong, why="it names files of other folders.", next="put all files into one folder.")
    read = {place: read_weights(path.with_name(place))[0].state for place in dict.fromkeys(places.values())}
    missing = [name for name, place in places.items() if name not in read[place]]
    if missing:
        raise FileError(
            f"{path} names {missing[0]}, which {places[missing[0]]} lacks.",
            next="copy the files of one version of the network again.",
        )
    return {name: read[place][name] for name, place in places.items()}


# -- reading without executing --------------------------------------------------------------------------


def _read(path: Path) -> tuple[Any, str]:
    """Return the content of a file and its licence; objects of classes that torch does not read safely are `_Inert`."""
    names: list[str] = []
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return held, (file.metadata() or {}).get("license", "")
        names = _globals_in(path)
        kinds: list[Any] = [(_LikeDict("Inert", (_Inert,), {"named": name}), name) for name in names]
        with torch.serialization.safe_globals(kinds):
            content = torch.load(path, map_location="cpu", weights_only=True)
        stated = content.get("license", "") if isinstance(content, dict) else ""
        return content, stated if isinstance(stated, str) else ""
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
    """Return the names of all classes and functions in a checkpoint, in their order; nothing is unpickled."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _names_of(file, _HEADERS + 1)  # the form of torch before 1.6
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
            return _names_of(io.BytesIO(archive.read(pickled)), 1) if pickled else []


def _names_of(file: IO[bytes], pickles: int) -> list[str]:
    operations = (operation for _ in range(pickles) for operation in pickletools.genops(file))
    split = (str(text).split(" ") for kind, text, _ in operations if kind.name == "GLOBAL")
    return list(dict.fromkeys(f"{_RENAMED.get(module, module)}.{name}" for module, name in split))


class _LikeDict(type):
    """The class of `_Inert`: equal to `dict`, because torch adds items to nothing but dictionaries."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict

    __hash__ = type.__hash__


class _Inert(dict[Any, Any], metaclass=_LikeDict):
    """Stands for an object of a class that the file names, e.g. of hyperparameters: neither is anything imported, nor
    does any code of it run. Items are kept, because they may hold a state dict."""

    named = ""

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
