"""Recommending: quality is that of the figures it stands for, the choice follows from it, and a run is never lost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from networks import Segmenter, seeded
from torch import Tensor, nn
from torchvision.io import write_png
from training import Scenes

import cadsurgery as cs
from cadsurgery.kernels import isa
from cadsurgery.methods.side import Side
from cadsurgery.tasks.judging import FOUND, Estimate, Judgement, estimate, time_error
from cadsurgery.tasks.measuring import (
    AGREEMENT,
    FIDELITY,
    MIOU,
    Counts,
    PictureBatch,
    Quality,
    measure,
)
from cadsurgery.tasks.recommend import Recommendation, recommend
from cadsurgery.tasks.recommend import search as running
from cadsurgery.tasks.recommend.choice import choose, expected_loss, is_beaten
from cadsurgery.tasks.recommend.report import Requirement, SettingRow
from cadsurgery.tasks.recommend.settings import Setting, find_candidates, in_turn

pytestmark = pytest.mark.usefixtures("not_compiled")


def scores(labels: Tensor, classes: int) -> Tensor:
    """Class scores whose largest is the label."""
    return torch.nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2).float() - 0.1


def disturbed(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, other, labels)


# -- quality -------------------------------------------------------------------------------------------


def test_quality_is_the_mean_iou_of_all_pictures_and_its_error_falls_with_their_number() -> None:
    classes, size, metrics = 5, (17, 23), cs.SegmentationMetrics(5)
    ours: list[Judgement] = []
    base: list[Judgement] = []
    for seed in range(24):
        labels = torch.randint(classes, (1, *size), generator=torch.Generator().manual_seed(seed))
        given, output = (disturbed(labels, share, classes, 100 + seed) for share in (0.1, 0.3))
        sides = [
            Side(name, lambda _, one=one: scores(one, classes))
            for name, one in zip("go", (given, output), strict=True)
        ]
        qualities = lambda: [Quality("classes"), Quality(of_labels=True)]  # noqa: E731
        ((_, tallies),) = measure(sides, [PictureBatch(labels, size, labels)], qualities)
        assert isinstance(tallies, list)
        base.append(Judgement.of(tallies[0]))
        ours.append(Judgement.of(tallies[1]))
        metrics.update(output, labels)
    found = estimate(ours, base, MIOU)
    assert found.value == pytest.approx(metrics.compute()["miou"], abs=1e-12)
    assert found.images == 24 and found.change < -5 * found.error < 0
    few = estimate(ours[:6], base[:6], MIOU)
    assert few.error > found.error
    same = estimate(base, base, FIDELITY)
    assert (same.value, same.change, same.error) == (1.0, 0.0, 0.0)
    assert math.isnan(estimate(ours[:1], base[:1], MIOU).error)


# -- the choice ----------------------------------------------------------------------------------------

GIVEN = Setting("given", 8, (8, 16))
SMALL = Setting("size", 8, (8, 16), scale=0.5)
DENSE = Setting("dense", 16, (8, 16))
ADAPTIVE = Setting("adaptive", 0, (8, 16), "detail | budget:fraction=0.1", "guided")
ON_OWN_GRID = Setting("adaptive", mask="content", coarsest=32)


def row(
    setting: Setting, milliseconds: float, change: float, error: float = 0.001, **values: Any
) -> SettingRow:
    quality = Estimate(0.6 + change, change, error, values.pop("images", 40))
    blank = {"pixel_accuracy": None, "balanced_fidelity": None, "loss": None}
    macs = values.pop("macs", round(10 * milliseconds))
    return SettingRow(setting, quality, milliseconds, macs, **{**blank, **values})


@pytest.mark.parametrize(
    ("rows", "expected", "words"),
    [
        ([row(SMALL, 40, -0.1), row(DENSE, 60, -0.03), row(ADAPTIVE, 70, -0.003)], ADAPTIVE, "Convert it"),
        ([row(SMALL, 40, -0.1), row(DENSE, 60, -0.002), row(ADAPTIVE, 70, -0.001)], DENSE, "Do not convert"),
        ([row(SMALL, 40, -0.1), row(ADAPTIVE, 70, -0.1)], GIVEN, "use it as given"),
        ([row(ADAPTIVE, 98, -0.001)], GIVEN, "use it as given"),  # no gain
        (
            [row(SMALL, 70, -0.0015), row(ADAPTIVE, 69, -0.001)],
            SMALL,
            "Do not convert",
        ),  # as good, and simpler
    ],
)
def test_the_fastest_that_keeps_enough_is_chosen_and_the_simplest_of_equals(
    rows: list[SettingRow], expected: Setting, words: str
) -> None:
    choice = choose([row(GIVEN, 100, 0.0, 0.0), *rows], Requirement(keep=0.99), MIOU)
    assert choice.row.setting == expected and words in choice.reasons[0] and choice.images_needed is None


def test_the_best_that_is_fast_enough_is_chosen() -> None:
    rows = [row(GIVEN, 100, 0.0, 0.0), row(SMALL, 40, -0.1), row(ADAPTIVE, 70, -0.003)]
    for limit in (80, 70):  # "70 ms or less"
        assert choose(rows, Requirement(at_most=limit), MIOU).row.setting == ADAPTIVE
    none = choose(rows, Requirement(at_most=10), MIOU)
    assert none.row.setting == SMALL and "Nothing takes 10 ms or less" in none.reasons[0]


def test_without_labels_the_expected_loss_keeps_enough_together_with_its_error() -> None:
    """CamVid's network at stride 16 is expected to lose .6 % of its mIoU, with an error of .6 %, and loses 1.3 %."""
    given = row(GIVEN, 100, 0.0, 0.0, balanced_fidelity=1.0, loss=(0.0, 0.0))
    doubtful = row(DENSE, 47, -0.17, 0.013, balanced_fidelity=0.83, loss=expected_loss(0.83, 0.013))
    safe = row(ADAPTIVE, 70, -0.15, 0.012, balanced_fidelity=0.85, loss=expected_loss(0.85, 0.012))
    assert doubtful.loss is not None and doubtful.loss[0] < 0.01 < sum(doubtful.loss)
    choice = choose([given, doubtful, safe], Requirement(keep=0.99), FIDELITY)
    assert choice.row is safe and any("plus its error" in one for one in choice.reasons)
    assert choose([given, doubtful, safe], Requirement(keep=0.98), FIDELITY).row is doubtful


@pytest.mark.parametrize(
    ("request_", "rows", "words"),
    [
        (Requirement(keep=0.99), [row(ADAPTIVE, 70, -0.003, time_error=0.3)], r"0\.70 \(±0\.30\)"),
        (Requirement(keep=0.99), [row(ADAPTIVE, 110, -0.003, time_error=0.3)], r"1\.10 \(±0\.30\)"),
        (
            Requirement(keep=0.99),
            [row(SMALL, 120, -0.1, macs=250), row(ADAPTIVE, 70, -0.003)],
            r"1\.20 of the time .* 0\.25 of its work",
        ),
    ],
)
def test_times_that_err_or_contradict_the_work_do_not_decide(
    request_: Requirement, rows: list[SettingRow], words: str
) -> None:
    choice = choose([row(GIVEN, 100, 0.0, 0.0), *rows], request_, MIOU)
    disturbed = request_.keep is not None and rows[0].setting == SMALL
    told = "The machine is too busy to decide." if disturbed else "The times of these pictures do not decide."
    assert choice.reasons[0] == told and not choice.is_decided
    assert re.search(words, choice.reasons[1]) and choice.row.setting == GIVEN
    assert any("Stop other programs" in reason and "--output" in reason for reason in choice.reasons)


def test_the_error_of_times_is_that_of_pairs() -> None:
    """A machine that slows down for a whole round changes nothing; one that slows single calls does."""
    speeds = [1.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.0, 4.0]
    given = [Judgement(100 * speed) for speed in speeds]
    assert time_error([Judgement(70 * speed) for speed in speeds], given) == pytest.approx(0, abs=1e-6)
    alone = time_error([Judgement(70 * speed) for speed in reversed(speeds)], given)
    assert alone is not None and alone > 0.1
    assert time_error(given[:1], given) is None


@pytest.mark.parametrize(("pictures", "expected"), [(5, False), (10, True)])
def test_a_setting_is_dropped_where_a_faster_one_is_better_beyond_doubt(
    pictures: int, expected: bool
) -> None:
    """A difference of six standard errors or so is none on five pictures, whose errors are uncertain themselves."""
    lacks = [0.08, 0.10, 0.12, 0.09, 0.11] * (pictures // 5)

    def judged(milliseconds: float, lack: float) -> Judgement:
        """One pixel in a thousand for each thousandth that is lacked."""
        lost = round(1000 * lack)
        return Judgement(milliseconds, Counts(areas=np.array([[0], [1000 - lost], [1000 + lost], [1000]])))

    ours = [judged(100.0, lack) for lack in lacks]
    better = [judged(90.0, 0.06) for _ in lacks]
    slower = [judged(99.0, 0.001) for _ in lacks]
    assert is_beaten(ours, [better, ours], AGREEMENT) is expected
    assert not is_beaten(ours, [slower, ours], AGREEMENT)
    assert not is_beaten(better, [ours], AGREEMENT)


def test_doubt_is_told_with_the_pictures_that_would_end_it() -> None:
    rows = [row(GIVEN, 100, 0.0, 0.0, images=6), row(ADAPTIVE, 70, -0.003, 0.004, images=6)]
    choice = choose(rows, Requirement(keep=0.99), MIOU)
    # It keeps .003 more than asked for, with an error of .004: 6 (1.64 x .004 / .003)^2 pictures.
    assert choice.images_needed == 29 and any("about 29 would decide" in one for one in choice.reasons)
    assert any("cannot be seen" in one for one in choice.reasons)
    finer = [row(GIVEN, 100, 0.0), row(replace(ADAPTIVE, pair=(4, 8)), 200, 0.001)]
    reasons = choose(finer, Requirement(keep=0.99), MIOU).reasons
    assert any("makes the maps of this network finer: at least 2.0 times its work" in one for one in reasons)


def test_settings_are_said_as_typed_and_their_code_compiles() -> None:
    assert ADAPTIVE.name == "detail | budget:fraction=0.1, 8 to 16, guided"
    assert '--mask "detail | budget:fraction=0.1" --fill guided' in ADAPTIVE.command("net")
    assert ON_OWN_GRID.name == "content, coarsest 32"
    assert ON_OWN_GRID.command("net") == 'cadsurgery convert net --coarsest 32 --mask "content"'
    settings = (GIVEN, SMALL, DENSE, replace(DENSE, scale=1.25), ADAPTIVE, ON_OWN_GRID)
    assert len({setting.name for setting in settings}) == 6
    for setting in settings:
        for precision in ("float32", "bfloat16"):
            compile("\n".join(setting.lines(precision)), "lines", "exec")
        for runtime, precision in product(running.RUNTIMES[1:], ("float32", "int8")):
            lines = "\n".join(setting.lines(precision, {}, runtime))
            compile(lines, "lines", "exec")
            exports = setting.kind in ("dense", "adaptive")
            assert ("cs.export" in lines) == exports
            assert ("calibration=pictures" in lines) == (exports and precision == "int8")
            assert ("with_kernels" in lines) == (exports and runtime.endswith("-kernels"))


def test_finer_maps_and_larger_pictures_are_tried_with_labels_alone() -> None:
    model, image = seeded(Segmenter, torch.float32), torch.rand(1, 3, 128, 160)
    without, with_labels = (
        find_candidates(model, image, {"output_stride": (8, 16)}, has_labels=known) for known in (False, True)
    )
    assert (without.settings[0].kind, without.settings[0].stride) == ("given", 16)
    assert not any(setting.scale > 1 for setting in without.settings)
    assert set(without.settings) <= set(with_labels.settings)
    flat = find_candidates(torch.nn.Conv2d(3, 4, 3), image, {}, has_labels=False)
    assert flat.refusal is not None and {one.kind for one in flat.settings} == {"given", "compiled", "size"}
    few = find_candidates(torch.nn.Conv2d(3, 4, 3), image, {}, has_labels=False, few=True)
    assert {one.kind for one in few.settings} == {"given", "size"}  # of files, there is nothing to compile


def test_floors_are_tried_on_the_networks_own_grid_unless_a_pair_is_asked_for() -> None:
    model, image = seeded(Segmenter, torch.float32), torch.rand(1, 3, 128, 160)
    floors = {
        (one.mask, one.coarsest) for one in find_candidates(model, image, {}, has_labels=False).settings
    }
    assert {("content", 32), ("preview", 32)} <= floors
    for options, few in (({"output_stride": (8, 16)}, False), ({}, True)):
        settings = find_candidates(model, image, options, has_labels=False, few=few).settings
        assert not any(one.coarsest for one in settings)


# -- a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, (image, _) in enumerate(Scenes(3, (96, 128)).items):
        write_png(image.mul(255).byte(), str(folder / f"{place}.png"))
    return folder


def run(photos: Path | str, folder: Path, network: nn.Module | None = None, **options: Any) -> Recommendation:
    return recommend(
        network or seeded(Segmenter, torch.float32),
        photos,
        **{"output": folder, **options, "options": {"output_stride": (8, 16), **options.get("options", {})}},
    )


def finder_of_dark() -> nn.Sequential:
    """A detector whose weights are set by hand: nearly 1 where four pixels are dark, else nearly 0."""
    down = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2), nn.Sigmoid()]
    net = nn.Sequential(*down, *up).eval()
    numbers = zip((-1 / 27, 1 / 144, 1 / 16, 20 / 16), (2.4, 0.0, 0.0, -30.0), strict=True)
    for layer, (weight, bias) in zip(net[::2], numbers, strict=True):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    return net


@pytest.mark.slow
@pytest.mark.parametrize(("squares", "names_floors"), [(1, True), (40, False)])
def test_floors_are_named_on_pages_that_are_mostly_empty_and_on_no_others(
    squares: int, names_floors: bool, tmp_path: Path
) -> None:
    """Where time follows the work; squares are in the middle of cells."""
    torch.manual_seed(0)
    for place in range(2):
        page = torch.full((3, 192, 256), 230, dtype=torch.uint8)
        for cell in torch.randperm(48)[:squares].tolist():
            top, left = 32 * (cell // 8) + 4, 32 * (cell % 8) + 4
            page[:, top : top + 24, left : left + 24] = 20
        write_png(page, str(tmp_path / f"{place}.png"))
    report = recommend(finder_of_dark(), tmp_path, output=tmp_path / "run")
    assert report.measure == FOUND
    rows = [replace(row, milliseconds=float(row.macs or 0), time_error=0.0) for row in report.rows]
    choice = choose(rows, Requirement(keep=0.95), report.measure)
    assert (choice.row.setting.coarsest == 32) == names_floors
    assert names_floors or choice.row.setting.kind == "given"


def test_a_loss_of_fidelity_under_floors_is_expected_to_be_one_of_miou() -> None:
    """ESPNet loses .13 ± .03 of its mIoU on CamVid where floors under `content` leave a fidelity of .78; another
    stride, of which so much fidelity is expected to cost .013, would keep .98."""
    given = row(GIVEN, 100, 0.0, 0.0, balanced_fidelity=1.0, loss=(0.0, 0.0))
    for setting, keeps_enough in ((DENSE, True), (ON_OWN_GRID, False)):
        loss = expected_loss(0.78, 0.001, has_floor=setting.coarsest > 0)
        fast = row(setting, 50, -0.22, 0.001, balanced_fidelity=0.78, loss=loss)
        choice = choose([given, fast], Requirement(keep=0.97), FIDELITY)
        assert (choice.row is fast) == keeps_enough


@pytest.mark.slow
def test_an_interrupted_run_reports_and_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(text: str, *count: object) -> None:
        if text.startswith("picture 2"):
            raise KeyboardInterrupt

    half = run(photos, tmp_path / "run", step=interrupt)
    assert half.images == 1 and half.end == "interrupted"
    judged: list[str] = []
    of = Judgement.of
    monkeypatch.setattr(Judgement, "of", staticmethod(lambda tally: judged.append("one") or of(tally)))
    whole = run(photos, tmp_path / "run")
    assert whole.images == 3 and whole.end == "" and len(judged) == 2 * len(whole.rows)
    with pytest.raises(cs.InvalidInput, match=r"holds another run(?s:.)*size: \[96, 128\], now \[64, 96\]"):
        run(photos, tmp_path / "run", size=(64, 96))
    with pytest.raises(cs.InvalidInput, match=r"holds another run(?s:.)*normalisation: .* now"):
        run(photos, tmp_path / "run", options={"normalisation": "raw"})
    last = sorted(photos.iterdir())[-1]
    last.write_bytes(last.read_bytes() + b"\0")
    with pytest.raises(cs.InvalidInput, match=r"holds another run(?s:.)*files: .* now"):
        run(photos, tmp_path / "run")
    (tmp_path / "run" / "manifest.jsonl").write_text("{\n")
    with pytest.raises(cs.FileError, match=r"manifest\.jsonl cannot be read"):
        run(photos, tmp_path / "run")


def test_another_precision_is_advised_where_the_processor_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "used", lambda: "amx")
    assert "--precision bfloat16" in "".join(running._on_precision("float32"))
    assert not running._on_precision("bfloat16")
    monkeypatch.setattr(isa, "used", lambda: "avx512bf16")
    assert not running._on_precision("float32")


def test_labels_of_more_classes_than_outputs_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="have 7 classes and the network has 6 outputs"):
        run(photos, tmp_path / "run", labels=f"{photos},classes=7", limit=1)
    assert not (tmp_path / "run").exists()


def test_labels_of_0_and_255_alone_and_those_of_no_photo_are_said(photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    for name in ("0", "1", "2", "strange"):
        write_png(torch.tensor([0, 255]).byte().repeat(96, 64)[None], str(labels / f"{name}.png"))
    data = cs.open_data(f"images:{photos}", "all")
    with pytest.warns(cs.CadWarning) as warned:
        running._look_into_labels(data, labels)
    first, second = (str(warning.message) for warning in warned)
    assert "only 0 and 255 (3 of 3 files read)" in first and "classes=2,values=0/255" in first
    assert second == f"left out of {labels}: no labels of these photos: strange.png."
    with pytest.raises(cs.FileError, match="no folder"):
        running._look_into_labels(data, tmp_path / "missing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.9, "at_most": 5.0}, "cannot be combined"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"runtime": "gpu"}, "no runtime named"),
        ({"precision": "int4"}, "no precision named"),
        ({"runtime": "onnx", "precision": "bfloat16"}, "not exported in bfloat16"),
        ({"size": (0, 4)}, "no pixels"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(
    options: dict[str, Any], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(cs.CadError, match=message):
        run(photos, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_recommends_and_refuses_an_empty_folder(
    command_line: Run, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "usernets.py").write_text(
        "from networks import Segmenter, seeded\nimport torch\n"
        "def net():\n    return seeded(Segmenter, torch.float32)\n"
    )
    line = "recommend usernets:net --set output_stride=8,16 --set limit=1 --size 64x96"
    words = line.split()
    done = command_line(*words, "--images", photos, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["rows"][0]["setting"]["kind"] == "given" and found["python"]
    assert (tmp_path / "net-recommended" / "curve.png").is_file()
    (tmp_path / "empty").mkdir()
    none = command_line(*words, "--images", tmp_path / "empty")
    assert none.code == 1 and "no images" in none.err
    absent = command_line("recommend", "some.safetensors", "--images", photos)
    assert absent.code == 1 and "some.safetensors" in absent.err


@pytest.mark.slow
def test_a_converted_file_is_judged_as_the_network_before_the_conversion(
    command_line: Run, photos: Path, tmp_path: Path
) -> None:
    words = f"--set output_stride=8,16 --set limit=2 --size 64x96 --images {photos} --json".split()
    given = json.loads(command_line("recommend", "networks:segmenter", *words, "-o", "run").out)
    made = command_line("convert", "networks:segmenter", "-o", "net.safetensors", "--size", "64x96")
    assert made.code == 0, made.err
    refused = command_line("recommend", "net.safetensors", *words)
    assert refused.code == 1 and "--trust" in refused.out
    # The folder of a run takes the same network alone.
    done = command_line("recommend", "net.safetensors", *words, "--trust", "-o", "run")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["rows"] == given["rows"]
    assert (found["network"], found["options"]) == ("networks:segmenter", {"weights": "net.safetensors"})
    again = command_line(
        "convert", "networks:segmenter", "--weights", "net.safetensors", "-o", "again.safetensors"
    )
    assert again.code == 0, again.err


# -- time ----------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass with each setting that is prepared."""

    def __init__(self, by: float) -> None:
        self.by, self.now = by, 0.0

    def perf_counter(self) -> float:
        self.now += 1e-4
        return self.now

    def step(self, text: str, *count: object) -> None:
        self.now += self.by * text.startswith("preparing")


@pytest.mark.slow
def test_minutes_bound_the_preparation_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[float, list[str]] = {}
    for seconds, minutes in ((25, 1.5), (70, 1), (1, 10)):
        clock = Clock(seconds)
        monkeypatch.setattr(running, "time", clock)
        folder = tmp_path / str(seconds)
        report = run(photos, folder, minutes=minutes, step=clock.step)
        names[minutes] = [row.name for row in report.rows]
        if seconds == 70:
            assert len(report.rows) == 1 and not report.is_decided
            assert (
                "--minutes 1 was too little" in report.reasons[0]
                and "--minutes 10 or more" in report.reasons[0]
            )
        assert any("left no time" in why for why in report.refused.values()) == (minutes < 10)
    assert 1 < len(names[1.5]) < len(names[10])
    settings = in_turn([GIVEN, Setting("compiled"), SMALL, SMALL, DENSE, ADAPTIVE])
    assert settings == [GIVEN, SMALL, DENSE, ADAPTIVE, SMALL, Setting("compiled")]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting("dense", 8, (4, 8)), "use it at output stride 8 everywhere. That takes 0.50 of the time"),
        (Setting("size", 8, scale=0.5), "use it on pictures 0.5 times as large. That takes 0.50"),
    ],
)
def test_what_is_recommended_is_a_sentence(setting: Setting, words: str) -> None:
    rows = [row(GIVEN, 100, 0.0, 0.0), row(setting, 50, 0.0)]
    assert words in choose(rows, Requirement(keep=0.99), MIOU).reasons[0]
