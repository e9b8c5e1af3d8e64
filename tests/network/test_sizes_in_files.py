"""Sizes in programs for images of any size stay short: each stage starts from symbols of its own."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import slow, thorough
from exported import File, onnx
from networks import conv_norm, randomise, strided, unverified
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols

import cadsurgery as cs
from cadsurgery.elements.backends import dense, portable, reference
from cadsurgery.network.export import compare
from cadsurgery.network.export import onnx as onnx_files
from cadsurgery.network.export.onnx import Exportable, follow
from cadsurgery.network.export.quiet import quietly


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


@pytest.mark.slow
def test_nothing_that_names_sizes_anew_is_left_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    cs.export(converted(2), torch.rand(1, 3, 64, 96), path, dynamic=True)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}


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


def test_of_several_differences_the_largest_decides() -> None:
    assert compare.check_difference([0.0, 1e-6, 1e-7]) == pytest.approx(1e-6)
    for largest in (1.0, float("nan")):
        with pytest.raises(cs.CannotConvert, match="the written file differs"):
            compare.check_difference([0.0, largest, 1e-7])


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


@pytest.mark.slow
@pytest.mark.parametrize(("file", "options"), FILES)
def test_a_number_that_depends_on_values_is_refused_at_its_operation_and_nothing_is_printed(
    file: str, options: dict[str, bool], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch raises GuardOnDataDependentSymNode, and prints the graph so far."""
    model = nn.Sequential(strided(2, outputs=4), Chosen(), nn.Conv2d(4, 4, 1)).eval()
    net = unverified(model, SHORT, example_input=torch.rand(1, 3, 64, 96))
    capfd.readouterr()
    with pytest.raises(cs.CannotConvert, match="data-dependent") as refusal:
        cs.export(net, torch.rand(1, 3, 64, 96), tmp_path / file, **options)
    assert refusal.value.where.startswith("split (test_sizes_in_files.py:") and refusal.value.next
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_what_others_print_while_torch_is_silent_is_seen_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Progress bars are drawn on stderr while a network is traced."""
    with quietly():
        print("tracing", file=sys.stderr)
        assert capfd.readouterr().err == "tracing\n"


# What raises while a file is written: the owner's module, and the function's name in it.
PHASES = {
    ("net.onnx", "copy"): ("cadsurgery.network.export.onnx", "Exportable"),
    ("net.onnx", "export"): ("torch.export", "export"),
    ("net.onnx", "decompositions"): ("cadsurgery.network.export.onnx", "decompose"),
    ("net.onnx", "translation"): ("torch.onnx._internal.exporter._core", "_translate_fx_graph"),
    ("net.onnx", "optimisation"): ("onnxscript.optimizer", "fold_constants_ir"),
    ("net.onnx", "checking"): ("onnx.checker", "check_model"),
    ("net.onnx", "opening"): ("onnxruntime", "InferenceSession"),
    ("net.onnx", "comparison"): ("cadsurgery.network.export.onnx", "difference"),
    ("net.onnx", "ranges of 8 bits"): ("cadsurgery.network.export.int8", "_reduce"),
    ("net.onnx", "weights of 8 bits"): ("cadsurgery.network.export.in_bytes", "round_weight"),
    ("net.onnx", "comparison of 8 bits"): ("cadsurgery.network.export.int8", "measure"),
    ("net.pt2", "export"): ("torch.export", "export"),
    ("net.pt2", "saving"): ("torch.export", "save"),
    ("net.pt2", "loading"): ("torch.export", "load"),
    ("net.pt2", "comparison"): ("cadsurgery.network.export.programs", "difference"),
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
        raise RuntimeError("not today")

    module, name = PHASES[file, phase]
    monkeypatch.setattr(importlib.import_module(module), name, fail)
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


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [slow(False), True])
def test_an_operation_without_onnx_is_named_with_its_module(dynamic: bool, tmp_path: Path) -> None:
    model = nn.Sequential(strided(2, outputs=4), Bessel(), nn.Conv2d(4, 4, 1)).eval()
    net = unverified(model, SHORT, example_input=torch.rand(1, 3, 64, 96))
    with pytest.raises(cs.CannotConvert, match="No ONNX function found") as refusal:
        cs.export(net, torch.rand(1, 3, 64, 96), tmp_path / "net.onnx", dynamic=dynamic)
    assert refusal.value.where.startswith("special_bessel_j1 (test_sizes_in_files.py:")
    assert refusal.value.where.endswith(", in the original 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_half_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = unverified(strided(2, outputs=4), SHORT, example_input=torch.randn(1, 3, 64, 96))

    def save(program: object, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("the writer stopped")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    with pytest.raises(cs.CannotConvert, match="the writer stopped"):
        cs.export(net, torch.randn(1, 3, 64, 96), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


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


class Pair(nn.Module):
    """Adds the mean of another image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = strided()

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.layers(image) + other.mean()


def test_a_network_that_takes_more_than_an_image_is_refused(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 64, 96)
    net = cs.adaptify(Pair().eval(), "edges", example_input=(image, image)).eval()
    with pytest.raises(cs.InvalidInput, match="takes image, other, and only the image is given"):
        cs.export(net, image, tmp_path / "net.onnx")


class SeveralKinds(nn.Module):
    """What torch decides by the example's size: bins of a dense map, a line of numbers, a norm by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = strided(3, 8), nn.BatchNorm2d(8, track_running_stats=False)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.layers(torch.cat([image, image.flip(3)], 0)))
        dense = torch.linalg.vector_norm(x.flip(3), dim=1, keepdim=True)  # a flip ends the region
        bins = F.adaptive_avg_pool2d(dense, (3, 5))
        line = torch.linspace(-1, 1, x.shape[3]).view(1, 1, 1, -1)
        return self.last(torch.cat([x, x.flip(3) + line], 1)).mean((2, 3)), bins


@pytest.mark.slow
def test_what_torch_decides_by_the_example_holds_at_every_size(tmp_path: Path) -> None:
    """For images that the network joins along the batch, too."""
    torch.manual_seed(0)
    net = unverified(SeveralKinds().eval(), "edges", example_input=torch.rand(1, 3, 64, 96))
    cs.export(net, torch.rand(1, 3, 96, 120), tmp_path / "net.onnx", dynamic=True)
    for size in ((96, 120), (75, 101), (128, 64)):
        image = torch.rand(2, 3, *size)
        *outputs, levels = File(tmp_path / "net.onnx")(image).values()
        for output, expected in zip(outputs, net(image, mask=levels.long()), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


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
