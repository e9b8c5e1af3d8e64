"""Sizes in programs for images of any size stay short: each stage starts from symbols of its own."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import thorough
from networks import conv_norm, randomise, strided, unverified
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols

import cadsurgery as cs
from cadsurgery.elements.backends import dense, portable, reference
from cadsurgery.network.export import compare
from cadsurgery.network.export import onnx as onnx_files
from cadsurgery.network.export.onnx import Exportable, follow
from cadsurgery.network.export.quiet import quietly

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Stages(nn.Module):
    """Stages whose sizes are rounded down (pools) and up (convolutions)."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        widths = [6 + 2 * stage for stage in range(stages + 1)]
        self.first = conv_norm(3, widths[0])
        self.down = nn.ModuleList(
            conv_norm(a, b, 1 + place % 2) for place, (a, b) in enumerate(pairwise(widths))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for place, down in enumerate(self.down):
            x = down(x if place % 2 else F.max_pool2d(x, 2, 2))
        return x


def converted(stages: int, mask: object = "edges") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = torch.rand(1, 3, 96, 128)
    return unverified(randomise(Stages(stages)), mask, example_input=example).eval()


def longest_size(stages: int) -> int:
    """Count the operations in the longest size of a map in a program for any size."""
    net, image = converted(stages), torch.rand(1, 3, 125, 155)
    with torch.no_grad():
        program, free = follow(Exportable(net, float16=False), (image,), dynamic=True)
    assert free == {0, 2, 3}
    values = (node.meta.get("val") for node in program.graph.nodes)
    lengths = (length for value in values if isinstance(value, Tensor) for length in value.shape)
    return max(int(sympy.count_ops(one.node.expr)) for one in lengths if isinstance(one, torch.SymInt))


@pytest.mark.slow
def test_sizes_do_not_grow_with_the_number_of_stages() -> None:
    assert longest_size(5) == longest_size(3)


class Cancels(nn.Sequential):
    """Sums in which large numbers cancel, so that float32 rounds to some ten thousandths."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 256, 3, 2, 1),
            nn.Conv2d(256, 64, 1, 2),  # no border, where less would cancel
            nn.ReLU(),
            nn.Conv2d(64, 4, 3, 1, 1),
        )
        with torch.no_grad():
            self[0].bias.fill_(500.0)
            self[1].weight.sub_(self[1].weight.mean((1, 2, 3), keepdim=True))


@pytest.mark.slow
def test_a_file_may_differ_by_what_its_network_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 96)
    net = unverified(Cancels().eval(), "edges", example_input=image)
    own = compare.rounding_of(net, [image])
    assert own > 1e-4
    monkeypatch.setattr(onnx_files, "TOLERANCE", 1e-12)  # less than any file differs
    assert 1e-12 < cs.export(net, image, tmp_path / "net.onnx").difference < 4 * own
    monkeypatch.setattr(compare, "_TIMES_ROUNDING", 1e-9)
    with pytest.raises(cs.CannotConvert, match="whose own rounding, in float32 instead of float64, is"):
        cs.export(net, image, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


SHORT = "all"  # a mask that asks for no operations: for what raises whatever the file computes
FILES = [("net.onnx", {"dynamic": True}), ("net.pt2", {})]
ADVICE = {"dynamic": "write a file for one size", "net.onnx": "level_map=True", "net.pt2": "to='onnx'"}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "options"), FILES)
def test_what_torch_raises_names_the_operation_and_another_file(
    file: str, options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = "edges | budget:fraction=0.3"
    net = unverified(strided(3, outputs=4, kernel=3), mask, example_input=torch.randn(1, 3, 64, 96))

    def fail(*args: object, **options: object) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("Eq(u1, 0)")
        return convolve(*args, **options)

    convolve = dense.convolve
    monkeypatch.setattr(dense, "convolve", fail)
    monkeypatch.setattr(reference.Expression, "convolve", lambda self, work: fail())
    monkeypatch.setattr(portable.Portable, "convolve", lambda self, work: fail())
    with pytest.raises(cs.CannotConvert) as refusal:
        cs.export(net, torch.randn(1, 3, 64, 96), tmp_path / file, **options)
    error = refusal.value
    assert ("fused_conv2d, in the original" if file == "net.onnx" else "conv2d") in error.where
    assert "Eq(u1, 0)" in error.why
    assert {name for name, words in ADVICE.items() if words in error.next} == {file, *options}
    assert not list(tmp_path.iterdir())


class Chosen(nn.Module):
    """How many parts there are depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.masked_select(x, x > x.mean()).split(7)[0].mean()


def test_what_others_print_while_torch_is_silent_is_seen_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Progress bars are drawn on stderr while a network is traced."""
    with quietly():
        print("tracing", file=sys.stderr)
        assert capfd.readouterr().err == "tracing\n"


# What raises while a file is written: the owner's module, and the function's name in it.
# What raises while a file is written; what is given a path has written a half of it.
PHASES = {
    ("net.onnx", "copy"): "cadsurgery.network.export.onnx.Exportable",
    ("net.onnx", "export"): "torch.export.export",
    ("net.onnx", "decompositions"): "cadsurgery.network.export.onnx.decompose",
    ("net.onnx", "translation"): "torch.onnx._internal.exporter._core._translate_fx_graph",
    ("net.onnx", "optimisation"): "onnxscript.optimizer.fold_constants_ir",
    ("net.onnx", "saving"): "torch.onnx.ONNXProgram.save",
    ("net.onnx", "checking"): "onnx.checker.check_model",
    ("net.onnx", "opening"): "onnxruntime.InferenceSession",
    ("net.onnx", "comparison"): "cadsurgery.network.export.onnx.difference",
    ("net.onnx", "ranges of 8 bits"): "cadsurgery.network.export.int8._reduce",
    ("net.onnx", "weights of 8 bits"): "cadsurgery.network.export.in_bytes.round_weight",
    ("net.onnx", "comparison of 8 bits"): "cadsurgery.network.export.int8.measure",
    ("net.pt2", "export"): "torch.export.export",
    ("net.pt2", "saving"): "torch.export.save",
    ("net.pt2", "loading"): "torch.export.load",
    ("net.pt2", "comparison"): "cadsurgery.network.export.programs.difference",
}


@pytest.mark.parametrize(
    ("file", "phase"), [case if case[1] in ("copy", "export") else thorough(*case, few=4) for case in PHASES]
)
def test_whatever_raises_is_refused_and_leaves_nothing(
    file: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was there before stays as it was."""
    path = tmp_path / file
    path.write_bytes(b"an older file")
    net = unverified(strided(2, outputs=4), SHORT, example_input=torch.randn(1, 3, 64, 96))

    def fail(*args: object, **options: object) -> object:
        for part in args:
            if phase == "saving" and isinstance(part, str | Path):
                Path(part).write_bytes(b"half")
        raise RuntimeError("not today")

    monkeypatch.setattr(PHASES[file, phase], fail)
    in_8_bits: Any = {"precision": "int8", "calibration": torch.randn(2, 3, 64, 96)}
    options = in_8_bits if phase.endswith("8 bits") else {}
    with pytest.raises(cs.CannotConvert) as refusal:
        cs.export(net, torch.randn(1, 3, 64, 96), path, **options)
    assert "not today" in refusal.value.why and refusal.value.next
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(file, b"an older file")]


class Bessel(nn.Module):
    """An operation that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(x)


# A module between a strided network and its last layer; the file; words of the refusal, and its place.
AT_AN_OPERATION: list[Any] = [
    *((Chosen, *file, "data-dependent", "split (test_sizes_in_files.py:") for file in FILES),
    *(
        (Bessel, *file, "No ONNX function found", "special_bessel_j1 (test_sizes_in_files.py:")
        for file in (("net.onnx", {}), FILES[0])
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "options", "words", "where"), AT_AN_OPERATION)
def test_what_no_file_can_hold_is_refused_at_its_operation_and_nothing_is_printed(
    kind: Any,
    file: str,
    options: dict[str, bool],
    words: str,
    where: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of values torch raises GuardOnDataDependentSymNode, and prints the graph so far."""
    model = nn.Sequential(strided(2, outputs=4), kind(), nn.Conv2d(4, 4, 1)).eval()
    net = unverified(model, SHORT, example_input=torch.rand(1, 3, 64, 96))
    capfd.readouterr()
    with pytest.raises(cs.CannotConvert, match=words) as refusal:
        cs.export(net, torch.rand(1, 3, 64, 96), tmp_path / file, **options)
    assert refusal.value.where.startswith(where) and refusal.value.next
    assert kind is Chosen or refusal.value.where.endswith(", in the original 1")
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["net.onnx", "net.pt2"])
def test_a_full_disk_is_said_and_leaves_nothing(file: str, tmp_path: Path) -> None:
    """Files cannot grow beyond some bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    net, limit = converted(2, SHORT), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(cs.FileError, match=r"cannot be written[\s\S]*File too large"):
            cs.export(net, torch.rand(1, 3, 96, 128), tmp_path / file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / f"mine.{suffix}").write_bytes(b"mine")
    (tmp_path / f"mine.{suffix}").chmod(0o444)
    net, steps = converted(1, mask="edges | budget:fraction=0.3"), list[str]()
    for name in ("no/net", "mine", "folder"):
        with pytest.raises(cs.FileError, match=name.split("/")[0]):
            path = tmp_path / f"{name}.{suffix}"
            cs.export(net, torch.rand(1, 3, 96, 128), path, step=lambda text, *more: steps.append(text))
    assert not steps and len(list(tmp_path.iterdir())) == 2


class Blocks(nn.Module):
    """Residual blocks of factorised and dilated convolutions behind two strides."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 8, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1)), conv_norm(8, 8))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return x


def work_for(blocks: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what torch does while it follows a network: operations, symbols, and decisions about sizes."""
    counts: Counter[str] = Counter()
    decide = ShapeEnv._evaluate_expr

    def count(self: ShapeEnv, *args: Any, **options: Any) -> Any:
        counts["decisions"] += 1
        return decide(self, *args, **options)

    monkeypatch.setattr(ShapeEnv, "_evaluate_expr", count)
    image = torch.rand(1, 3, 61, 93)
    net = unverified(randomise(Blocks(blocks)), "edges", example_input=image).eval()
    with torch.no_grad():
        program, _ = follow(Exportable(net, float16=False), (image,), dynamic=True)
    monkeypatch.undo()
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    symbols = {symbol for x in values for length in x.shape for symbol in free_symbols(length)}
    return counts + Counter(operations=len(program.graph.nodes), symbols=len(symbols))


@pytest.mark.slow
def test_each_block_of_a_network_adds_as_much_work_as_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So twice the blocks take at most twice the time."""
    few, more, most = (work_for(blocks, monkeypatch) for blocks in (2, 3, 4))
    assert few["operations"] < more["operations"] and few["symbols"] > 2
    assert {name: more[name] - few[name] for name in more} == {name: most[name] - more[name] for name in more}
