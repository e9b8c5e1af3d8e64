"""`bench`: figures that agree with each other and the network; what it writes, says and refuses. No time is judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawn
import pytest
import torch
from conftest import assert_same, slow, thorough
from networks import strided
from PIL import Image
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.kernels import isa
from cadsurgery.methods import side
from cadsurgery.support import provenance
from cadsurgery.support.rows import Row
from cadsurgery.support.timing import Timing
from cadsurgery.tasks.bench import BAND, GROUPED, LINEAR, band, bench, law
from cadsurgery.tasks.bench_report import BenchReport, BenchSetting, NetworkBench
from cadsurgery.tasks.sides.dense_file import dense_program
from cadsurgery.tasks.sides.engine_sides import InTorch

SIZE, FRACTIONS = (64, 96), (1.0, 0.5, 0.0)


def trunk(groups: int = 1) -> nn.Module:
    """A network by `module:function`."""
    return strided(groups=groups, outputs=4, kernel=3)


class Gated(nn.Module):
    """A skip, squeeze and excitation, and joined channels behind a trunk of output stride 32."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.gate, self.out = trunk(), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk[:-1](x)
        x = x + x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.out(torch.cat((x, x.relu()), 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(folder: Path) -> BenchReport:
    """ResNet-18 with both fills."""
    return bench(
        "resnet18",
        "edges:threshold=0.2",
        FRACTIONS,
        size=SIZE,
        batch=2,
        fill=("nearest", "linear"),
        rounds=1,
        threads=1,
        picture=folder / "bench.png",
        output=folder / "rows.jsonl",
    )


# -- the figures ---------------------------------------------------------------------------------------


def test_ratios_follow_from_times_and_macs(report: BenchReport) -> None:
    for network in report.networks:
        high, low = network.high, network.low
        assert low.macs < high.macs and [row.fraction for row in network.rows] == list(FRACTIONS)
        for row in network.rows:
            share = (row.macs - low.macs) / (high.macs - low.macs)
            line = (1 - share) * low.milliseconds + share * high.milliseconds
            assert row.law_milliseconds == pytest.approx(line)
            assert row.law_ratio == pytest.approx(row.milliseconds / line)
            assert row.speedup == pytest.approx(high.milliseconds / row.milliseconds)
            realised = (high.milliseconds / row.milliseconds) / (high.macs / row.macs)
            assert row.realised == pytest.approx(realised)
            assert 0 < row.milliseconds <= row.milliseconds_median
        # At both ends the line is the dense network, but for what the mask itself computes.
        for row, dense in ((network.rows[0], high), (network.rows[-1], low)):
            own = (row.macs - dense.macs) / (high.macs - low.macs) * (high.milliseconds - low.milliseconds)
            assert 0 <= row.macs - dense.macs < 1e-3 * high.macs
            assert row.law_milliseconds == pytest.approx(dense.milliseconds + own)


def test_each_side_is_run_once_a_round_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def counted(sides: dict[str, Callable[[], object]], rounds: int, **_: Any) -> dict[str, Timing]:
        seen.append(list(sides))
        assert rounds == 3
        return {key: Timing(1.0 + position, 2.0 + position) for position, key in enumerate(sides)}

    monkeypatch.setattr(side, "interleaved", counted)
    (network,) = bench(trunk(), fractions=FRACTIONS, size=SIZE, rounds=3).networks
    assert seen == [["dense high", "dense low", "nearest 1.0", "nearest 0.5", "nearest 0.0"]]
    assert [row.milliseconds for row in network.rows] == [3.0, 4.0, 5.0]
    assert (network.high.milliseconds, network.low.milliseconds_median) == (1.0, 3.0)
    assert "not slower than dense low" in network.notes[0]


def test_the_twins_are_uniform_and_stop_at_the_low_output_stride() -> None:
    net = cs.adaptify(trunk(), output_stride=(8, 16), verify_laws=False)
    image = torch.randn(2, 3, *SIZE)
    runs, budget = InTorch(net), cs.Budget("edges", 0.5)
    sides = [
        (runs.dense("dense high", image), "all"),
        (runs.dense("dense low", image), "none"),
        (runs.under(budget), budget),
    ]
    with torch.no_grad():
        for run, mask in sides:
            assert_same(run(image), net(image, mask=mask), 1e-4)


def test_interpolating_fills_and_grouped_convolutions_are_granted_more() -> None:
    bands = {
        (groups, fill): band(cs.adaptify(trunk(groups), fill=fill, verify_laws=False))
        for groups in (1, 4)
        for fill in ("nearest", "linear", "guided")
    }
    assert bands == {
        (1, "nearest"): BAND,
        (4, "nearest"): GROUPED,
        (4, "linear"): GROUPED,
        (4, "guided"): GROUPED,
        (1, "linear"): BAND + LINEAR,
        (1, "guided"): BAND + LINEAR,
    }


def test_the_law_is_the_straight_line_between_the_twins() -> None:
    high, low = twin(100, 50.0), twin(20, 10.0)
    assert [law(macs, high, low) for macs in (100, 60, 20)] == [50.0, 30.0, 10.0]


def twin(macs: int, milliseconds: float) -> Row:
    return Row("dense", {"macs": macs}, milliseconds=milliseconds, milliseconds_median=milliseconds + 1)


def network(ratios: dict[float, float], high: float = 50.0) -> NetworkBench:
    """A result with these ratios to the law by fraction."""
    rows = [
        Row("", {"fraction": fraction, "law_ratio": ratio}, milliseconds=30 * ratio)
        for fraction, ratio in ratios.items()
    ]
    return NetworkBench("net", "random", "nearest", (8, 32), 1.06, twin(100, high), twin(20, 10), tuple(rows))


def test_a_verdict_says_whether_the_law_holds_and_where_it_is_worst() -> None:
    good = network({0.5: 1.05, 0.1: 1.02})
    assert (
        good.holds and "time follows work:" in good.verdict() and "fraction 0.5 takes 1.050" in good.verdict()
    )
    assert good.slower == () and "nothing is slower than dense high" in good.verdict()
    missed = network({0.5: 1.05, 0.1: 1.07})
    assert (
        not missed.holds and "MISSED" in missed.verdict() and "fraction 0.1 takes 1.070" in missed.verdict()
    )
    slow = network({0.5: 1.05, 0.1: 1.0}, high=30.0)
    assert slow.holds and [row.fraction for row in slow.slower] == [0.5]
    assert slow.verdict().endswith("slower than dense high by more than 3 %: fraction 0.5")
    assert network({0.5: 1.029}, high=30.0).slower == ()


# -- the report ----------------------------------------------------------------------------------------


def test_a_report_says_what_it_was_made_with(report: BenchReport) -> None:
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["versions"].keys() == {"cadsurgery", "torch", "torchvision", "timm", "python"}
    assert values["image"] == [2, 3, *SIZE] and (values["threads"], values["rounds"]) == (1, 1)
    assert values["dtype"] == "float32" and "CPU" in values["device"] and values["date"].endswith("+00:00")
    assert values["mask"].startswith("edges:threshold=0.2,") and values["mask"].endswith("| budget")
    assert values["processor"] == provenance.processor()._asdict()
    assert values["instruction_sets"].keys() >= {"kernels", "torch"}
    assert all(isa.in_words() in told for told in (values["device"], str(report.setting)))
    assert "random" in values["networks"][0]["weights"]
    for entry, result in zip(values["networks"], report.networks, strict=True):
        assert entry["rows"] == [row.to_dict() for row in result.rows]
        assert entry["law"]["holds"] is result.holds and entry["law"]["verdict"] == result.verdict()
        assert entry["law"]["worst_ratio"] == max(row["law_ratio"] for row in entry["rows"])


def test_the_commit_is_told_only_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = BenchSetting("edges", (1, 3, 8, 8), "float32", "CPU", 1, 1, {}, "abc1234", "today")
    assert setting.to_dict()["commit"] == "abc1234" and "commit abc1234" in str(setting)
    outside = replace(setting, commit="")
    assert "commit" not in outside.to_dict() and "commit" not in str(outside)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "environment.py"))
    assert provenance.commit() == ""


def test_the_picture_has_a_panel_for_each_entry(report: BenchReport, folder: Path) -> None:
    with Image.open(folder / "bench.png") as picture:
        assert picture.format == "PNG" and picture.width > 1.5 * picture.height
    figure = report.figure()
    assert drawn.faults_of(figure) == []
    panels = [axis for axis in figure.axes if axis.get_visible()]
    titles = [axis.get_title().partition(":")[0] for axis in panels]
    assert titles == [f"resnet18, {fill}" for fill in ("nearest", "linear")]
    assert all(axis.get_legend().texts[0].get_text().startswith("law: 1.00 to 1.") for axis in panels)


def test_what_is_done_is_kept_when_a_later_network_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(sides: dict[str, Callable[[], object]], rounds: int, **_: Any) -> dict[str, Timing]:
        if (tmp_path / "rows.jsonl").exists():
            raise KeyboardInterrupt
        return dict.fromkeys(sides, Timing(1.0, 1.0))

    monkeypatch.setattr(side, "interleaved", counted)
    with pytest.raises(KeyboardInterrupt):
        bench([trunk(), trunk()], fractions=[0.5], size=SIZE, output=tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


# -- engines -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "package", "dtype"),
    [
        thorough("onnx", "onnxruntime", "float32"),
        ("openvino", "openvino", "int8"),
    ],
)
def test_all_sides_are_files_of_the_same_engine(runtime: str, package: str, dtype: str) -> None:
    pytest.importorskip(package)
    options = {"size": SIZE, "rounds": 1, "runtime": runtime, "dtype": dtype}
    found = bench(trunk(), fractions=[0.5], fill=["linear"], **options)
    assert package in found.setting.versions and found.to_dict()["runtime"] == runtime
    assert f"runtime {runtime}" in str(found.setting)
    assert all(side.milliseconds > 0 for side in (found.networks[0].high, *found.networks[0].rows))


def test_the_network_as_given_is_measured_in_bands_that_the_label_names() -> None:
    found = bench(trunk(), fractions=[0.5], size=SIZE, rounds=1, memory="1GiB")
    (side,) = found.networks[0].sides
    assert "as given, in bands of" in side.label and side.label.endswith("iB") and side.milliseconds > 0
    assert side.macs == found.networks[0].low.macs


@pytest.mark.parametrize(
    "options",
    [{}, slow({"dtype": "int8"}), *map(thorough, ({"dtype": "bfloat16"}, {"runtime": "onnx"}))],
    ids=str,
)
def test_dense_high_is_measured_on_smaller_pictures_too(options: dict[str, Any]) -> None:
    if options.get("runtime") or options.get("dtype") == "int8":
        pytest.importorskip("onnxruntime")
    found = bench(
        trunk(), fractions=[0.5], fill=["linear", "nearest"], size=SIZE, rounds=1, smaller=0.5, **options
    )
    for network in found.networks:
        (side,) = network.sides
        height, width = map(int, side.label.removeprefix("dense high at ").split("x"))
        assert side.milliseconds > 0 and height % 32 == width % 32 == 0  # the network's grid fits
        assert abs(height - SIZE[0] / 2) <= 16 and abs(width - SIZE[1] / 2) <= 16
        share = height * width / (SIZE[0] * SIZE[1])
        assert side.macs / network.high.macs == pytest.approx(share, rel=0.01)
        assert side.to_dict() in found.to_dict()["networks"][0]["sides"]


@pytest.mark.parametrize("level", [slow(0), 2])
def test_a_dense_twin_for_engines_is_written_as_anyone_would(level: int) -> None:
    model, image = Gated().eval(), torch.randn(1, 3, *SIZE)
    net = cs.adaptify(model, outputs="native" if level else "fine", verify_laws=False)
    program = dense_program(net, level, image)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    used, aten = Counter(node.target for node in nodes), torch.ops.aten
    assert used[aten.convolution.default] == 7
    assert not {aten.index_select.default, aten.index.Tensor, aten.mm.default} & used.keys()
    orders = [node.args[1] for node in nodes if node.target is aten.permute.default]
    assert all(order == sorted(order) for order in orders)
    with torch.no_grad():
        assert_same(program.module()(image), net(image, mask="none" if level else "all"), 1e-5)


# -- options -------------------------------------------------------------------------------------------


def test_a_network_of_ones_own_is_measured_as_it_is_and_left_alone() -> None:
    model, threads = trunk(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (found,) = bench(
        model, lambda image: image[:, 0, ::8, ::8] > 0, [0.5], size=SIZE, rounds=1, threads=1
    ).networks
    assert found.model == "Sequential" and found.weights == "its own weights"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads


# -- refusals ------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[cs.CadError], str, str]] = [
    ({"networks": []}, cs.InvalidInput, "no network", "resnet50"),
    ({"fractions": [0.5, 1.5]}, cs.InvalidInput, "1.5", "0 to 1"),
    ({"dtype": "float23"}, cs.UnknownName, "float23", "float32"),
    ({"runtime": "onnx", "dtype": "bfloat16"}, cs.InvalidInput, "dtype=bfloat16", "in torch"),
    ({"processor_time": True, "threads": 2}, cs.InvalidInput, "2 threads", "threads=1"),
    ({"calibration": "photos"}, cs.InvalidInput, "calibrate", "int8"),
    ({"runtime": "openvino", "mask": "edges | smooth"}, cs.InvalidInput, "smooth", "level_map"),
    ({"smaller": 1.5}, cs.InvalidInput, "smaller=1.5", "0.7"),
    ({"memory": "1GiB", "runtime": "openvino"}, cs.InvalidInput, "memory=1GiB", "leave it out"),
    ({"networks": ["resnet18", "resnt18"]}, cs.UnknownName, "resnt18", "resnet18"),
    ({"size": (0, 96)}, cs.InvalidInput, "size=0x96", "at least 1"),
    ({"size": (1, 1)}, cs.InvalidInput, "same work", "larger size"),
    ({"picture": Path("no/bench.png")}, cs.FileError, "no folder", "--picture"),
]


@pytest.mark.parametrize(
    ("given", "error", "what", "next_step"), WRONG, ids=[str(row[0])[:60] for row in WRONG]
)
def test_what_cannot_be_measured_is_refused(
    given: dict[str, Any], error: type[cs.CadError], what: str, next_step: str
) -> None:
    with pytest.raises(error) as caught:
        bench(**{"networks": trunk(), "size": SIZE, "fractions": [0.5], "rounds": 1, **given})
    assert what in str(caught.value) and caught.value.next and next_step in caught.value.next


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(cs.InvalidInput, match="no CUDA device") as caught:
        bench(trunk(), size=SIZE, device="cuda")
    assert "cpu" in caught.value.next
