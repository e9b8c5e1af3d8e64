"""Private names of torch stand in one table, are there in this version, and are asked for no earlier than needed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from cadsurgery.support import torch_internals
from cadsurgery.support.errors import CadError
from cadsurgery.support.torch_internals import ATTRIBUTES, NAMES

PACKAGE = ROOT / "cadsurgery"
TABLE = PACKAGE / "support" / "torch_internals.py"
FILES = [path for path in PACKAGE.rglob("*.py") if path != TABLE]
HERE = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
# Attributes of other libraries, of Python, and of named tuples.
OF_OTHERS = {
    *("_replace", "_fields", "_asdict", "_getframe", "_exit", "_lru_cache_wrapper", "_get_protocol_attrs"),
    *("_reset_state", "_images", "_type_"),
}


@pytest.mark.parametrize("name", NAMES)
def test_this_version_of_torch_has_the_name(name: str) -> None:
    row = NAMES[name]
    if row.since and tuple(map(int, row.since.split("."))) > HERE:
        assert not torch_internals.is_here(name)
        return
    if row.part and not getattr(torch.backends, row.part).is_available():
        assert torch_internals.find(name) is None
        return
    if "onnx" in row.place:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    _ = torch_internals.__getattr__(name)  # an error says what is gone, and of which version


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_objects_of_this_version_of_torch_have_the_attributes(place: str) -> None:
    thing: Any = torch
    for part in place.split(".")[1:]:
        thing = getattr(thing, part)
    if isinstance(thing, type):
        options: dict[str, Any] = {"L1Unstructured": {"amount": 1}, "BatchNorm2d": {"num_features": 1}}.get(
            thing.__name__, {}
        )
        thing = thing(**options)
        thing._tensor_name = "weight" if "prune" in place else ""
    missing = [name for name in ATTRIBUTES[place][0] if not hasattr(thing, name)]
    assert not missing, f"torch {torch.__version__}: {place} has no {', '.join(missing)}"


def test_a_name_that_is_gone_is_told_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch_internals.Internal("torch.utils._gone.leaves", "nested outputs")
    monkeypatch.setitem(NAMES, "leaves", row)
    with pytest.raises(CadError, match=rf"torch {re.escape(torch.__version__)} has no torch\.utils\._gone"):
        _ = torch_internals.leaves
    with pytest.raises(AttributeError, match="leafs"):
        _ = torch_internals.leafs


@cache
def code_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(word: str) -> bool:
    return word.startswith("_") and not word.startswith("__")


def dotted(node: ast.expr) -> str:
    """`torch.nn.functional`; an empty text for attributes of anything but a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def private_places(tree: ast.Module) -> set[str]:
    """Private names of torch that a file imports, or names from `torch`, `nn`, `F` or `fx` on."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("torch")}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
    start = re.compile(r"(torch|nn|F|fx|_ATEN)\.[\w.]+$")
    return {name for name in found if start.match(name) and any(map(is_private, name.split(".")[1:]))}


def attributes_read(tree: ast.Module) -> set[str]:
    """Private attributes that a file reads of anything but `self`, `cls` and `super()`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and ast.unparse(node.value) not in ("self", "cls")
    }


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, attributes, variables and values of slots."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@pytest.mark.slow
def test_no_other_file_imports_or_names_private_things_of_torch() -> None:
    listed = {name for names, _ in ATTRIBUTES.values() for name in names}
    found = {path: private_places(code_of(path)) for path in FILES}
    other = {
        (path.relative_to(ROOT).as_posix(), place)
        for path, places in found.items()
        for place in places
        if not listed.intersection(place.split("."))
    }
    assert other == set(), "put them into cadsurgery/support/torch_internals.py"


@pytest.mark.slow
def test_private_attributes_that_the_package_reads_are_its_own_or_listed() -> None:
    own = {name for path in FILES for name in own_names(code_of(path))} | OF_OTHERS
    listed = {name for names, _ in ATTRIBUTES.values() for name in names}
    read = {name for path in FILES for name in attributes_read(code_of(path))}
    assert read - own - listed == set()
