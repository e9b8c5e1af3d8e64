"""Examples and recipes run as they are."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from alone import smaller
from conftest import ROOT, assert_same, picture, thorough
from nbclient import NotebookClient
from networks import ManyOperations, StreetSegmenter, randomise
from PIL import Image
from torch import nn

import cadsurgery as cs
from cadsurgery.data.images import normalise, read_image, street_scene
from cadsurgery.data.networks import Source

DEPLOY = ROOT / "examples" / "deploy"
NEEDS_NO_DATA = "d2net_vgg"
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/recipe.py") if path.parent.name != NEEDS_NO_DATA)


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_that_a_notebook_uses_exist(path: Path) -> None:
    """What it imports, and what it takes of the package."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    code = ast.parse("\n".join(cells))
    imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(path), "exec"), {})
    used = {
        node.attr
        for node in ast.walk(code)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cs"
    }
    assert used & {"adaptify", "anytime", "resample", "sample"} and used <= {*dir(cs)}


def small_network(mask: str) -> cs.AdaptiveModel:
    """Several classes in an image, whose mean and standard deviation are its own; random weights."""
    model = randomise(ManyOperations())
    nn.init.normal_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.cad_source = Source("small", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))  # type: ignore[assignment]
    return cs.adaptify(model, mask, verify_laws=False)


@pytest.mark.slow
@pytest.mark.parametrize("is_dynamic", [True, thorough(False)], ids=["dynamic", "static"])
def test_the_classes_of_an_image_by_onnx_runtime_alone(tmp_path: Path, is_dynamic: bool) -> None:
    pytest.importorskip("onnxruntime")
    photo, height, width = tmp_path / "photo.png", 72, 104
    scene = street_scene(*((131, 97) if is_dynamic else (height, width)))
    Image.fromarray((255 * scene).byte().permute(1, 2, 0).numpy()).save(photo)
    net = small_network("edges" if is_dynamic else "edges | budget:fraction=0.3")
    cs.export(net, picture(1, height, width), tmp_path / "net.onnx", dynamic=is_dynamic)
    files = (tmp_path / "net.onnx", photo, tmp_path / "classes.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-X", "importtime", str(DEPLOY / "segment.py"), *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "at high resolution" in done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported and not {"torch", "cadsurgery"} & imported
    with torch.no_grad():
        expected = net(normalise(read_image(photo), net.source)[None])["out"].argmax(1)[0]
    classes = torch.from_numpy(np.array(Image.open(files[2]))).long()
    assert classes.shape == expected.shape and len(expected.unique()) > 1
    assert (classes != expected).float().mean() < 1e-3  # two classes that are equal to rounding


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no compiler")
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    model, image = (
        StreetSegmenter(as_dictionary=True).eval(),
        picture(2, 72, 104),
    )  # compilers take a minute for more
    mask = "edges | budget:fraction=0.3"
    net = cs.adaptify(model, mask, verify_laws=False, output_stride=(16, 32))
    cs.export(net, image, tmp_path / "net.pt2")
    files = [tmp_path / "net.pt2", tmp_path / "compiled.pt2"]
    subprocess.run([sys.executable, DEPLOY / "compile.py", *files], check=True)
    np.save(tmp_path / "image.npy", image.flip(3).numpy())
    build, torch_folder = tmp_path / "build", Path(torch.__file__).parent
    subprocess.run(["cmake", "-S", DEPLOY, "-B", build, f"-DTORCH={torch_folder}"], check=True)
    subprocess.run(["cmake", "--build", build], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([build / "run", *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = run("compiled.pt2", "image.npy", "output")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = net(image.flip(3))["out"]
    assert_same(torch.from_numpy(np.load(tmp_path / "output_out.npy")), expected, 1e-4)
    assert run().returncode == 2


def onnxruntime_headers() -> Path | None:
    """The folder of ONNX Runtime's headers, which its wheel lacks."""
    named = os.environ.get("ONNXRUNTIME_INCLUDE", "")
    places = (
        [Path(named)] if named else [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")]
    )
    return next((place for place in places if (place / "onnxruntime_cxx_api.h").is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(onnxruntime_headers() is None, reason="no headers of ONNX Runtime (ONNXRUNTIME_INCLUDE)")
def test_a_file_with_kernels_runs_without_python(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    library = next((Path(runtime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("this wheel of ONNX Runtime has no library for C++")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    command = [
        "c++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        DEPLOY / "classes.cpp",
        "-o",
        tmp_path / "classes",
    ]
    linked = [f"-isystem{onnxruntime_headers()}", f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run([*command, *linked], check=True)
    net, height, width = small_network("edges"), 72, 104
    net.normalisation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the program's
    export = {"with_kernels": True, "fixed_batch": True}
    cs.export(net, picture(1, height, width), tmp_path / "net.onnx", **export)
    pixels = (255 * street_scene(height, width)).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.ppm")

    def run(*files: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "classes", *files], cwd=tmp_path, capture_output=True, text=True)

    done = run("net.onnx", cs.kernels_for(), "picture.ppm", "classes.pgm")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = net(normalise(read_image(tmp_path / "picture.ppm"), net.source)[None])["out"].argmax(1)[0]
    classes = torch.from_numpy(np.array(Image.open(tmp_path / "classes.pgm"))).long()
    assert classes.shape == expected.shape and len(expected.unique()) > 1
    assert (classes != expected).float().mean() < 1e-3  # two classes that are equal to rounding
    for files, said in (
        (("net.onnx", "nothing.so", "picture.ppm", "classes.pgm"), "nothing.so"),
        (("net.onnx", cs.kernels_for(), "net.onnx", "classes.pgm"), "no PPM"),
    ):
        refused = run(*files)
        assert refused.returncode == 1 and said in refused.stderr
    assert run().returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        thorough(path) if path.stem in ("anytime", "learned_mask", "resampling") else path
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_notebook_runs_and_shows_pictures(path: Path, tmp_path: Path) -> None:
    notebook, given = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in notebook.cells:
        cell.source = smaller(cell.source)
    assert notebook != given
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_without_its_data_says_so_and_stops(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(recipe), str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(recipe.parent), *sys.path])
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    assert "skipped" in capsys.readouterr().out
