"""The package is layered, as its tests are; its core knows no library of networks; the documents run."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from inspect import ismodule
from pathlib import Path

import pytest
from alone import run_alone, smaller
from conftest import thorough
from environments import NEEDED

from cadsurgery.support.defaults import DEFAULT_MASK, ENGINES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cadsurgery"

# A room imports only rooms above it in this list.
ROOMS = (
    *("support", "data", "kernels", "elements", "masks", "following"),
    *("surgery", "network", "methods", "tasks", "finetune", "cli"),
)
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
ELEMENTS = [path for path in FILES if path.startswith("cadsurgery/elements/")]
SURGERY = [path for path in FILES if path.startswith("cadsurgery/surgery/")]
FOREIGN = ("torch.fx", "torchvision", "timm")
# Families of networks as torchvision and timm name them; "plan" and "scan" must not match, "resnet18" must.
FAMILIES = re.compile(
    "resnet|resnext|resnest|vgg|deeplab|lraspp|mobilenet|mnasnet|efficientnet|densenet|regnet|inception|googlenet"
    "|shufflenet|squeezenet|convnext|hrnet|darknet|nfnet|ghostnet|rexnet|dpn|sknet|unet|(?<!e)xception|alexnet"
    r"|(?<![a-z])(fcn|vit|swin|dla)(?![a-z])",
    re.IGNORECASE,
)


@cache
def source_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(path: str) -> set[str]:
    """Dotted names a file imports at its top, in a function or for types alone: `module`, or `module.name`."""
    found = set()
    for node in ast.walk(source_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: str) -> set[str]:
    """The rooms that a file imports something of; what is of the package as a whole is in none."""
    inner = [name.split(".")[1] for name in imports(path) if name.startswith("cadsurgery.")]
    return {name for name in inner if (PACKAGE / name).is_dir()}


def test_the_package_has_twelve_rooms() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    for path in PACKAGE.glob("*.py"):  # beside the rooms stand names alone
        code = source_of(f"cadsurgery/{path.name}").body[1:]
        assert path.name in ("__init__.py", "__main__.py") or (
            len(code) == 1 and ast.unparse(code[0]).endswith("import *")
        )


def test_a_name_of_a_file_says_which_it_is() -> None:
    names = Counter(Path(path).name for path in FILES if path.count("/") > 1)
    alike = {name for name, times in names.items() if times > 1}
    assert alike <= {"__init__.py", "model.py", "program.py", "report.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    described = ast.get_docstring(source_of(f"cadsurgery/{room}/__init__.py")) or ""
    assert re.search(r"\bIn comes? .*\bout (go|come)", described, re.DOTALL)


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_goes_up(room: str) -> None:
    lower = ROOMS[: ROOMS.index(room) + 1]
    upper = {path: rooms_imported(path) - set(lower) for path in FILES if path.split("/")[1] == room}
    assert upper and not any(upper.values()), upper


MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in FILES}


def modules_imported(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top, in a function, or for types alone."""
    modules = set()
    for imported in imports(MODULES[name]):
        while imported and imported not in MODULES:
            imported = imported.rpartition(".")[0]
        modules.add(imported)
    return modules - {"", name, "cadsurgery"}


def find_circles(imported: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules of which each reaches all others of the group by imports."""
    reached = {name: set(names) for name, names in imported.items()}
    for middle in reached:  # Warshall: paths through one more module each time
        for names in reached.values():
            if middle in names:
                names |= reached[middle]
    return {
        frozenset(other for other in names if name in reached[other])
        for name, names in reached.items()
        if name in names
    }


def test_no_module_is_part_of_an_import_circle() -> None:
    assert find_circles({name: modules_imported(name) for name in MODULES}) == set()


@pytest.mark.parametrize("room", ["tasks", "cli"])
def test_commands_name_no_method(room: str) -> None:
    """What they know of a method is in its folder, and they find it in `methods/registry.py`."""
    from cadsurgery.methods.registry import KINDS

    names = [
        word for kind in KINDS for word in (kind.method, kind.network.__name__, kind.network.converted_by)
    ]
    named = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    found = {
        f"{path}: {match[0]}"
        for path in FILES
        if path.startswith(f"cadsurgery/{room}/")
        for match in named.finditer((ROOT / path).read_text())
    }
    assert not found


def test_every_public_name_can_be_had() -> None:
    import cadsurgery as cs

    assert sorted(cs.__all__) == sorted(dir(cs)) and len(cs.__all__) > 40
    assert all(getattr(cs, name) is not None for name in cs.__all__)
    with pytest.raises(AttributeError, match="adaptfy"):
        _ = cs.adaptfy


ALIASES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("name", ALIASES)
def test_modules_keep_the_names_that_users_know(name: str) -> None:
    """`cadsurgery.images` has the names of the module of its room, the same objects."""
    import cadsurgery as cs

    module = importlib.import_module(f"cadsurgery.{name}")
    (statement,) = source_of(f"cadsurgery/{name}.py").body[1:]
    place = importlib.import_module(str(statement.module))  # type: ignore[attr-defined]
    defined = (one for one, value in vars(place).items() if one[0] != "_" and not ismodule(value))
    public = getattr(place, "__all__", list(defined))
    assert public and all(getattr(module, one) is getattr(place, one) for one in public)
    assert module is getattr(cs, name) and f"`{place.__name__}`" in str(module.__doc__)


def test_geometry_knows_neither_graphs_nor_libraries_of_networks() -> None:
    names = [(path, name) for path in ELEMENTS for name in imports(path)]
    assert [pair for pair in names for foreign in FOREIGN if f"{pair[1]}.".startswith(f"{foreign}.")] == []


@pytest.mark.slow
def test_geometry_loads_neither_libraries_of_networks_nor_surgery() -> None:
    code = (
        "import sys, cadsurgery.elements\n"
        "print([name for name in sys.modules if name.startswith(('torchvision', 'timm', 'cadsurgery.'))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    rooms = {name.split(".")[1] for name in ast.literal_eval(printed) if name.startswith("cadsurgery.")}
    assert not any(name.startswith(("torchvision", "timm")) for name in ast.literal_eval(printed))
    assert rooms == {"support", "kernels", "elements"}


def test_surgery_does_not_know_masks() -> None:
    assert [path for path in SURGERY if "masks" in rooms_imported(path)] == []


def said(tree: ast.Module) -> set[str]:
    """Every identifier and string of the code, docstrings left out."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.add(node.value)
        for field in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                words.add(value)
    return words


@pytest.mark.parametrize("paths", [ELEMENTS, SURGERY], ids=["elements", "surgery"])
def test_core_code_names_no_family_of_networks(paths: list[str]) -> None:
    words = [(path, word) for path in paths for word in said(source_of(path))]
    assert [pair for pair in words if FAMILIES.search(pair[1])] == []


TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))


def test_tests_stand_in_folders_of_the_rooms_under_names_of_their_own() -> None:
    """Files of one name would be one module to pytest."""
    folders = {path.split("/")[1] for path in TESTS if path.count("/") > 1}
    assert folders == {*ROOMS, "laws", "recipes", "zoo"}
    assert len({path.rpartition("/")[2] for path in TESTS}) == len(TESTS)


def places_of(texts: Iterable[str]) -> set[str]:
    """The files of the package that have one of these texts as a constant."""
    return {
        path
        for path in FILES
        for node in ast.walk(source_of(path))
        if isinstance(node, ast.Constant) and node.value in texts
    }


def test_another_default_mask_is_one_line() -> None:
    """Its name stands where it is chosen and where the mask is defined."""
    assert places_of([DEFAULT_MASK]) == {"cadsurgery/support/defaults.py", "cadsurgery/masks/graded.py"}


def test_another_engine_is_a_file_and_a_row() -> None:
    """Names and classes of engines stand in their table alone."""
    own_names = {name for name in ENGINES if "-" in name} | set(ENGINES.values())
    assert places_of(own_names) == {"cadsurgery/support/defaults.py"}


def test_no_test_imports_another() -> None:
    """What two files need is in a module that has no tests, so that each runs alone."""
    say_so = [path for path in TESTS if re.search(r"\b(from|import) test_", (ROOT / path).read_text())]
    found = {path: [name for name in imports(path) if name.startswith("test_")] for path in say_so}
    assert len(TESTS) > 90 and not any(found.values()), found


def snippets(path: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


SITE = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("docs/**/*.md"))
    if "```python" in path.read_text() and "generated" not in path.parts
]


# What they run, others run too.
LONG = ("docs/howto/many-pictures.md", "docs/tutorials/empty-pages.md")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["README.md", *(thorough(path) if path in LONG else path for path in SITE)])
def test_the_python_of_the_documents_runs(tmp_path: Path, path: str) -> None:
    """All snippets one after another, as a reader would type them, in an empty folder and an environment with the
    extras that the page names; with smaller numbers. Pages on other libraries have everything that is installed."""
    assert snippets(path)
    libraries = NEEDED["libraries"].get(path, ())
    for library in libraries:
        pytest.importorskip(library, reason="an optional library that the page is about")
    extras = None if libraries else NEEDED["pages"].get(path, [])
    (tmp_path / "snippets.py").write_text(smaller("\n".join(snippets(path))))
    code, told = run_alone(tmp_path / "snippets.py", tmp_path, extras=extras)
    assert code == 0, told[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", NEEDED["pages"])
def test_without_the_extra_a_page_ends_in_the_line_that_installs_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "snippets.py").write_text(smaller("\n".join(snippets(path))))
    code, told = run_alone(tmp_path / "snippets.py", tmp_path, extras=())
    if path in NEEDED["by_itself"]:
        assert code == 1 and "ModuleNotFoundError: " in told, told[-2000:]
        return
    last = told[told.rfind(".NotInstalled: ") :]
    lines = [f"pip install 'cadsurgery[{extra}]'" for extra in NEEDED["pages"][path]]
    assert code == 1 and any(line in last for line in lines), told[-2000:]
