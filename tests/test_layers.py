"""The package is layered, its core knows no library of networks, and the README runs as printed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cadsurgery"

# A module imports only modules above it in this list.
LAYERS = [
    *("errors", "files", "plain", "environment"),
    *("layout", "lattice", "kernel_map"),
    *(
        "functional.native",
        "functional.kernels",
        "functional.costs",
        "functional.elements",
        "functional.triton_kernels",
        "functional.gpu",
        "functional.products",
        "functional.windows",
        "functional.statistics",
        "functional.resampling",
        "functional",
    ),
    *("detection", "matching"),
    *(
        "masks.provider",
        "masks.basic",
        "masks.filters",
        "masks.graded",
        "masks.edges",
        "masks.trimap",
        "masks.saliency",
        "masks.text",
        "masks.resolve",
        "masks.budget",
        "masks.detail",
        "masks.confidence",
        "masks.keypoints",
        "masks.learned",
        "masks.wrappers",
        "masks.smooth",
        "masks.masking",
        "masks",
    ),
    *(
        "surgery.trace",
        "surgery.facts",
        "surgery.hooks",
        "surgery.treatment",
        "surgery.rules",
        "surgery.flow",
        "surgery.plan",
        "surgery.planner",
        "surgery.rewrite",
        "surgery.fuse",
        "surgery.verify",
        "surgery",
    ),
    *(
        "interpreter",
        "inputs",
        "macs",
        "model",
        "paths",
        "hosted",
        "reach",
        "points",
        "static",
        "candidates",
        "api",
        "zoo",
        "coverage",
        "io",
    ),
    *(
        "report",
        "bench_report",
        "evaluation_report",
        "matching_report",
        "timing",
        "memory",
        "images",
        "caching",
    ),
    *("data.dataset", "data.sources", "data.augment", "data", "metrics", "launch"),
    *("viz", "conversion", "mask_report", "twins", "bench", "tally", "evaluation"),
    *("keypoints.extraction", "keypoints.folder", "keypoints.sequences", "keypoints.evaluation", "keypoints"),
    *(
        "finetune.settings",
        "finetune.devices",
        "finetune.schedule",
        "finetune.groups",
        "finetune.objectives",
        "finetune.batches",
        "finetune.blend",
        "finetune.evaluation",
        "finetune.probe",
        "finetune.checkpoints",
        "finetune.logs",
        "finetune.results",
        "finetune.loop",
        "finetune.command",
        "finetune",
    ),
    *("options", "screen", "cli_keypoints", "cli"),
]
GEOMETRY = (
    *("layout", "lattice", "kernel_map"),
    *(name for name in LAYERS if name.startswith("functional")),
)
CORE = (*GEOMETRY, *(name for name in LAYERS if name.startswith("surgery")))
FOREIGN = ("torch.fx", "torchvision", "timm")
# Families of networks as torchvision and timm name them; "plan" and "scan" must not match, "resnet18" must.
FAMILIES = re.compile(
    "resnet|resnext|resnest|vgg|deeplab|lraspp|mobilenet|mnasnet|efficientnet|densenet|regnet|inception|googlenet"
    "|shufflenet|squeezenet|convnext|hrnet|darknet|nfnet|ghostnet|rexnet|dpn|sknet|unet|(?<!e)xception|alexnet"
    r"|(?<![a-z])(fcn|vit|swin|dla)(?![a-z])",
    re.IGNORECASE,
)


def path_of(module: str) -> Path:
    plain = PACKAGE / f"{module.replace('.', '/')}.py"
    return plain if plain.exists() else PACKAGE / module / "__init__.py"


def source_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def is_for_types_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, nested ones too, but those behind `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types_only(node):
            for other in node.orelse:  # type: ignore[attr-defined]
                yield from executed(other)
            continue
        yield node
        yield from executed(node)


def imports(module: str) -> set[str]:
    """Dotted names a module imports anywhere in its code: of modules, and `module.name` for names of them."""
    found = set()
    for node in executed(source_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        parts = name.split(".")
        if parts[0] != "cadsurgery":
            continue
        inner = [".".join(parts[1:end]) for end in range(2, len(parts) + 1)]
        known = [candidate for candidate in inner if candidate in LAYERS]
        found |= {known[-1]} if known else set()
    return found


def test_every_module_has_its_place() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__") for path in files} - {"__init__"}
    assert names == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_a_module_imports_only_lower_ones(module: str) -> None:
    lower = LAYERS[: LAYERS.index(module)]
    assert modules_imported(module) - set(lower) == set()


def test_the_package_itself_imports_nothing_on_its_own() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    eager = [
        node
        for node in executed(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "cadsurgery" in ast.unparse(node)
    ]
    assert eager == []


def test_every_public_name_can_be_had() -> None:
    import cadsurgery as cs

    assert sorted(cs.__all__) == sorted(cs._PUBLIC) == sorted(dir(cs))
    assert all(getattr(cs, name) is not None for name in cs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'adaptfy'"):
        _ = cs.adaptfy


@pytest.mark.parametrize("module", GEOMETRY)
def test_geometry_knows_neither_graphs_nor_libraries_of_networks(module: str) -> None:
    names = imports(module)
    assert [name for name in names for foreign in FOREIGN if f"{name}.".startswith(f"{foreign}.")] == []


def test_geometry_loads_neither_libraries_of_networks_nor_surgery() -> None:
    code = (
        "import sys, cadsurgery.functional\n"
        "print([name for name in sys.modules if name.startswith(('torchvision', 'timm', 'cadsurgery.'))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(ast.literal_eval(printed)) == {
        *("cadsurgery.errors", "cadsurgery.files", "cadsurgery.plain"),
        *(f"cadsurgery.{name}" for name in GEOMETRY),
    }


@pytest.mark.parametrize("module", [name for name in LAYERS if name.startswith("surgery")])
def test_surgery_does_not_know_masks(module: str) -> None:
    assert not any(name.startswith("cadsurgery.masks") for name in imports(module))


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


@pytest.mark.parametrize("module", CORE)
def test_core_code_names_no_family_of_networks(module: str) -> None:
    assert [word for word in said(source_of(module)) if FAMILIES.search(word)] == []


def test_the_search_for_families_finds_them() -> None:
    tree = ast.parse(
        'def f(model):\n    "A ResNet."\n    return "resnet18" in name or model.is_vgg(fcn_head)'
    )
    assert {word for word in said(tree) if FAMILIES.search(word)} == {"resnet18", "is_vgg", "fcn_head"}


def snippets(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.mark.parametrize("path", ["README.md", "docs/extending.md"])
def test_the_python_of_the_documents_runs_as_printed(tmp_path: Path, path: str) -> None:
    """All snippets one after another, as a reader would type them, in an empty folder."""
    assert snippets(path)
    (tmp_path / "snippets.py").write_text("\n".join(snippets(path)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "snippets.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
