"""With the base packages alone nearly everything works; what needs an extra says which, in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from alone import run_alone
from conftest import ROOT
from environments import EXTRAS, NEEDED, lacking
from PIL import Image

from cadsurgery.cli.main import make_app

COMMANDS: list[dict[str, Any]] = NEEDED["command"]
# Modules that functions import alone, after they have looked whether their packages are there.
OF_EXTRAS = {"cadsurgery.network.export.translate": "onnx_ir"}

IMPORT_ALL = """
import importlib, json, pkgutil, subprocess, sys
import cadsurgery
from cadsurgery.support import torch_internals
missing = {}
for _, name, _ in pkgutil.walk_packages(cadsurgery.__path__, "cadsurgery."):
    try:
        importlib.import_module(name) if not name.endswith("__main__") else None
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps([missing, [name for name in torch_internals.NAMES if name in vars(torch_internals)]]))
"""
NETWORKS = """
import torch
from torch import nn


def features(*channels):
    torch.manual_seed(0)
    pairs = zip((3, *channels), channels)
    return [layer for pair in pairs for layer in (nn.Conv2d(*pair, 3, 2, 1), nn.ReLU())]


def network():
    return nn.Sequential(*features(8, 8, 8), nn.Conv2d(8, 4, 1), nn.Upsample(scale_factor=8, mode="bilinear")).eval()


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Sequential(*features(8, 8, 8)), nn.Conv2d(8, 1, 1)

    def forward(self, image):
        descriptors = self.body(image)
        return {"descriptors": descriptors, "scores": self.score(descriptors)}


def points():
    return Points().eval()
"""
RUN = """
import contextlib, io, json, os, sys
from cadsurgery.cli.main import main
os.environ |= {"XDG_CACHE_HOME": os.path.abspath("cache"), "HF_HUB_OFFLINE": "1"}
done = []
for argv in json.load(open("commands.json")):
    sys.argv, said, code = ["cadsurgery", *argv], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            import traceback
            code = traceback.format_exc()
    done.append([code, said.getvalue()])
    json.dump(done, open("done.json", "w"))
"""


@pytest.mark.slow
def test_every_module_is_imported_with_the_base_packages_alone(tmp_path: Path) -> None:
    """And no name of torch is looked up in a module that `import torch` has not loaded."""
    (tmp_path / "program.py").write_text(IMPORT_ALL)
    code, told = run_alone(tmp_path / "program.py", tmp_path, extras=())
    assert code == 0, told[-2000:]
    missing, asked_for = json.loads(told.splitlines()[-1])
    assert missing == OF_EXTRAS
    late = {
        "min_of_sizes",
        "compiler_options",
        "tracing_for_export",
        "promoter",
        "promotion_of",
    }
    assert asked_for and late.isdisjoint(asked_for)


def words_of_commands(group: Any, *before: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from words_of_commands(command, *before, name)
        else:
            yield (*before, name)


WORDS = sorted(words_of_commands(typer.main.get_command(make_app())))
CONVERT = next(row for row in COMMANDS if row["what"] == "`convert`")


def test_the_table_has_every_command() -> None:
    runs = [shlex.split(row["run"]) for row in COMMANDS]
    assert [words for words in WORDS if not any(tuple(run[: len(words)]) == words for run in runs)] == []
    assert {row["extra"] for row in COMMANDS} <= {"", *EXTRAS}
    assert {extra for extras in NEEDED["pages"].values() for extra in extras} <= {*EXTRAS}


def line_of(extra: str) -> str:
    return f"pip install 'cadsurgery[{extra}]'"


def run_commands(folder: Path, extras: tuple[str, ...], commands: list[list[str]]) -> list[tuple[Any, str]]:
    """Run commands one after the other in an environment; return the exit code, or the traceback, and the output."""
    (folder / "tiny.py").write_text(NETWORKS)
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
    (folder / "given.onnx").write_bytes(onnx_file())
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "program.py").write_text(RUN)
    code, told = run_alone(folder / "program.py", folder, extras=extras)
    assert code == 0, told[-2000:]
    return [(code, said) for code, said in json.loads((folder / "done.json").read_text())]


def onnx_file() -> bytes:
    """An ONNX file of three convolutions, each of stride 2; a damaged one where onnx is not installed."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return b"no onnx"
    weights = [torch.ones(8, 3 if number == 0 else 8, 3, 3).numpy() / 27 for number in range(3)]
    nodes = [
        helper.make_node(
            "Conv", [f"x{number}", f"w{number}"], [f"x{number + 1}"], strides=[2, 2], pads=[1] * 4
        )
        for number in range(3)
    ]
    given, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, height, width])
        for name, channels, height, width in (("x0", 3, 64, 64), ("x3", 8, 8, 8))
    )
    constants = [numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)]
    model = helper.make_model(
        helper.make_graph(nodes, "given", [given], [result], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    return bytes(model.SerializeToString())


def check(row: dict[str, Any], code: Any, said: str, extra: str) -> str:
    """Return what is wrong with the end of a command in an environment with an extra; "" if nothing is."""
    if row["extra"] in ("", extra):
        fits = code == row.get("code", 0)
    else:
        fits = code == 2 and line_of(row["extra"]) in said and said.count("pip install") == 1
    is_bare = any(word in f"{code} {said}" for word in ("Traceback", "ModuleNotFoundError", "ImportError"))
    return "" if fits and not is_bare else f"{row['run']}: {code} {said[-600:]}"


def wrong(folder: Path, extra: str, rows: list[dict[str, Any]]) -> list[str]:
    rows = [CONVERT, *(row for row in rows if row is not CONVERT)]  # others read its file
    done = run_commands(
        folder,
        (extra,) if extra else (),
        [shlex.split(row["run"].replace("{here}", str(folder))) for row in rows],
    )
    return [problem for row, end in zip(rows, done, strict=True) if (problem := check(row, *end, extra))]


@pytest.mark.slow
def test_commands_run_with_the_base_packages_alone_or_name_the_extra(tmp_path: Path) -> None:
    rows = [row for row in COMMANDS if row["extra"] or not row.get("slow")]
    assert wrong(tmp_path, "", rows) == []


@pytest.mark.slow
def test_every_command_has_its_help_with_the_base_packages_alone(tmp_path: Path) -> None:
    done = run_commands(tmp_path, (), [[*words, "--help"] for words in WORDS])
    assert [end for end in done if end[0] != 0 or "Usage:" not in end[1]] == []


ENVIRONMENTS = sorted({row["extra"] for row in COMMANDS})


def with_extra(extra: str, is_slow: bool) -> list[dict[str, Any]]:
    return [row for row in COMMANDS if row["extra"] == extra and bool(row.get("slow")) == is_slow]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [extra for extra in ENVIRONMENTS if extra and with_extra(extra, False)])
def test_commands_run_with_the_one_extra_that_they_name(tmp_path: Path, extra: str) -> None:
    if missing := lacking(extra):
        pytest.skip(f"{', '.join(missing)} is not installed: {line_of(extra)}")
    assert wrong(tmp_path, extra, with_extra(extra, False)) == []


@pytest.mark.slow
@pytest.mark.parametrize("extra", [extra for extra in ENVIRONMENTS if with_extra(extra, True)])
def test_long_commands_run_with_the_one_extra_that_they_name(tmp_path: Path, extra: str) -> None:
    if missing := lacking(extra):
        pytest.skip(f"{', '.join(missing)} is not installed: {line_of(extra)}")
    assert wrong(tmp_path, extra, with_extra(extra, True)) == []


@pytest.mark.parametrize("path", NEEDED["pages"])
def test_a_page_says_what_to_install_before_its_code(path: str) -> None:
    before = (ROOT / path).read_text().partition("```python")[0]
    extras = ",".join(NEEDED["pages"][path])
    assert f"pip install 'cadsurgery[{extras}]'" in before
