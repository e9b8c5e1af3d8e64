"""Tuning by photos without labels: what does not help is gone, the folder goes on, the budget keeps what was asked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Run, images
from networks import made_once
from torch import Tensor, nn
from torchvision.utils import save_image

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.finetune import gain as module_of_gain
from cadsurgery.finetune import tuning as module
from cadsurgery.finetune.gain import GainFit
from cadsurgery.finetune.refinement import RefinementFit
from cadsurgery.finetune.tuning import TuningReport, tune
from cadsurgery.masks import resolve_mask

# More minutes than it takes: what is fitted depends on no clock.
ARGUMENTS = ("tune", f"{__name__}:Tiny", "--images", "photos", "--steps", 2, "--minutes", 5, "--rounds", 1)


@pytest.fixture
def run(command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module_of_gain, "STEPS", 50)  # no law here is about how well it is fitted
    (tmp_path / "photos").mkdir()
    for place in range(10):
        picture = street_scene(64 + place % 2, 80, seed=place)
        save_image(picture, tmp_path / "photos" / f"{place}.png")
    return command_line


@pytest.mark.slow
def test_one_command_gives_a_network_that_keeps_what_was_asked_for(run: Run, tmp_path: Path) -> None:
    result = run(*ARGUMENTS, "-o", "run", "--keep", "0.9", "--json")
    assert result.code == 0, result
    report = result.json
    rows = {row["mask"]: row for row in report["evaluation"]["rows"] if row["mask"] != "all"}
    rankings = 1 + ("gain" in report["kept"])
    assert len(rows) == 1 + 6 * rankings and report["evaluation"]["images"] == 2 and report["steps"] == 2
    enough = [row for row in rows.values() if row["balanced_fidelity"] >= 0.9]
    assert report["is_kept"] == bool(enough)
    assert rows[report["chosen"]]["macs"] == min(row["macs"] for row in enough)
    net = cs.load(tmp_path / "run" / "net.safetensors", trust=True)
    assert net.mask.spec() == resolve_mask(report["chosen"]).spec()
    assert (net.adapters is not None) == bool({"adapters", "refinement"} & set(report["kept"]))
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    image = images(1, 64, 80)
    original = cs.adaptify(Tiny().eval(), "all", verify_laws=False)
    assert torch.equal(net(image, mask="all"), original(image))


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_gives_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_gain", stop)
        assert run(*ARGUMENTS, "-o", "parted").code == 130
        patch.setattr(module, "calibrate_adapters", stop)  # nothing is done twice
        patch.setattr(module, "fit", stop)
        patch.setattr(module, "fit_gain", cs.finetune.fit_gain)
        parted = run(*ARGUMENTS, "-o", "parted", "--json")
    whole = run(*ARGUMENTS, "-o", "whole", "--json")
    assert parted.code == whole.code == 0
    for name in ("chosen", "decisions", "steps"):
        assert parted.json[name] == whole.json[name]
    files = [(tmp_path / folder / "net.safetensors").read_bytes() for folder in ("parted", "whole")]
    one, two = (cs.load(tmp_path / folder / "net.safetensors", trust=True) for folder in ("parted", "whole"))
    assert len(files[0]) == len(files[1])
    image = images(2, 64, 80)
    assert torch.equal(one(image), two(image))
    for changed in ("--seed", "--steps"):
        refused = run(*ARGUMENTS, "-o", "parted", changed, "1", "--json")
        assert refused.code == 1 and "holds another run" in refused.json["what"]


@pytest.mark.slow
def test_what_no_budget_keeps_is_said(run: Run) -> None:
    result = run(*ARGUMENTS, "-o", "run", "--keep", "1", "--fractions", "0.1")
    assert (
        result.code == 0
        and "no budget keeps 100.00 %" in result.out
        and "wrote run/net.safetensors" in result.out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes above 0"),
        ({"keep": 1.5}, "keep in 0..1"),
        ({"fractions": (0.0,)}, "budgets between 0 and 1"),
        ({"fractions": ()}, "budgets between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match=message):
        tune(adaptive(), tmp_path, output=tmp_path / "run", **options)


def test_few_photos_and_broken_folders_are_refused(tmp_path: Path) -> None:
    net = adaptive()
    (tmp_path / "photos").mkdir()
    save_image(street_scene(64, 80), tmp_path / "photos" / "0.png")
    with pytest.raises(cs.InvalidInput, match="every 8th is held out"):
        tune(net, tmp_path / "photos", output=tmp_path / "run")
    for place in range(1, 10):
        save_image(street_scene(64, 80, seed=place), tmp_path / "photos" / f"{place}.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tune.json").write_text("{")
    with pytest.raises(cs.FileError, match=r"tune\.json cannot be read"):
        tune(net, tmp_path / "photos", output=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calibrated.safetensors").write_bytes(b"no file")
    with pytest.raises(cs.FileError, match="does not fit the network"):
        tune(net, tmp_path / "photos", output=tmp_path / "other")


# -- no worse than not tuning --------------------------------------------------------------------------


class Tiny(nn.Module):
    """Four classes that differ from pixel to pixel; or their mean over the image; or a value; or scaled by a mean."""

    def __init__(self, kind: str = "classes") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, channels = kind, 1 if kind == "values" else 4
        self.stem, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.middle, self.squeeze = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, channels, 1, bias=False)
        nn.init.normal_(self.head.weight, std=10.0)

    def forward(self, image: Tensor) -> Tensor:
        x = self.middle(self.down(self.stem(image).relu()).relu()).relu()
        if self.kind == "means":
            x = x * self.squeeze(x.mean((2, 3), keepdim=True))
        x = self.head(x)
        return x.mean((2, 3)) if self.kind == "vectors" else x


@made_once
def adaptive(kind: str = "classes") -> cs.AdaptiveModel:
    return cs.adaptify(Tiny(kind).eval(), "edges", output_stride=(2, 4), verify_laws=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for place in range(40):
        save_image(street_scene(40 + place % 2, 56, seed=place), folder / f"{place:02}.png")
    return folder


class Fits(NamedTuple):
    """The fits of a run, none of which takes time, by what they were called with."""

    settings: list[Any]
    balance: list[float]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Every fit does harm: adapters and refinements are random, the gain mask ranks all patches the same."""
    found = Fits([], [])

    @torch.no_grad()
    def spoil(net: cs.AdaptiveModel) -> None:
        assert net.adapters is not None
        for parameter in net.adapters.parameters():
            parameter.add_(5 * torch.randn_like(parameter))

    def fit(body: cs.AdaptiveModel, data: Any, settings: Any, **options: Any) -> None:
        found.settings.append(settings)
        spoil(body)

    def fit_refinement(net: cs.AdaptiveModel, *arguments: Any, **options: Any) -> RefinementFit:
        spoil(net)
        return RefinementFit(1, 1, 0.0, 1.0, 0.5, True)

    def fit_gain(net: cs.AdaptiveModel, photos: Any, *, balance: float, **options: Any) -> GainFit:
        found.balance.append(balance)
        net(images(1, 40, 56))  # makes the estimator
        net.mask.restart(0)  # type: ignore[operator]
        return GainFit(1, 1, 0.0, {"gain": 1.0}, {})

    for name, function in {"fit": fit, "fit_refinement": fit_refinement, "fit_gain": fit_gain}.items():
        monkeypatch.setattr(module, name, function)
    return found


def words_of(report: TuningReport) -> str:
    return " ".join(str(part) for part in report.parts())


def first(folder: Path, count: int) -> Any:
    return cs.data.open_data(f"images:{folder}", "all").first(count)


def quick(net: cs.AdaptiveModel, photos: Any, output: Path, **options: Any) -> TuningReport:
    chosen = {"steps": 2, "fractions": (0.2, 0.5), "rounds": 0, **options}
    return tune(net, photos, output=output, **chosen)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "measure"),
    [("classes", "fidelity"), ("vectors", "agreement"), ("values", "accuracy")],
)
def test_if_nothing_is_kept_the_file_is_the_network_as_it_was(
    kind: str, measure: str, folder: Path, tmp_path: Path, fits: Fits
) -> None:
    net = adaptive(kind)
    report = quick(net, first(folder, 10), tmp_path)
    assert report.measure == measure and report.kept == () and report.to_dict()["kept"] == []
    assert set(report.decisions) == {"adapters", "gain", *(["refinement"] if report.refinement else [])}
    assert all(decision.images == 2 for decision in report.decisions.values())
    back, image = cs.load(report.network, Tiny(kind).eval()), images(2, 44, 60)
    assert back.adapters is None and back.mask.spec() == resolve_mask(report.chosen).spec()
    assert net.adapters is None and back.source == net.source
    for mask in (report.chosen, "none", "detail | budget:fraction=0.2"):
        assert torch.equal(back(image, mask=mask), net(image, mask=mask))
    assert torch.equal(back(image), net(image, mask=report.chosen))
    # All classes count the same in what is fitted, if there are maps of classes.
    (settings,), (balance,) = fits
    weights = settings.objective_options.get("class_weights", [])
    assert balance == (kind == "classes") and len(weights) == (4 if kind == "classes" else 0)
    assert kind != "classes" or (min(weights) > 0 and len(set(weights)) > 1)


def test_what_helps_is_kept(
    folder: Path, tmp_path: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training takes back the adapters that spoil the network as it was passed."""

    @torch.no_grad()
    def mend(body: cs.AdaptiveModel, *arguments: Any, **options: Any) -> None:
        body.adapters.load_state_dict(clean)  # type: ignore[union-attr]

    net = adaptive()
    clean = {name: value.clone() for name, value in net.add_adapters().state_dict().items()}
    module.fit(net, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "fit", mend)
    report = quick(net, first(folder, 10), tmp_path)
    assert report.kept == ("adapters",) and report.decisions["adapters"].change > 0
    back = cs.load(report.network, Tiny().eval())
    assert back.adapters is not None and back.adapters.state_dict().keys() == clean.keys()
    assert all(torch.equal(value, clean[name]) for name, value in back.adapters.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("change", "error", "is_kept"), [(0.3, 0.1, True), (0.2, 0.1, False)])
def test_a_part_is_kept_if_it_improves_by_more_than_its_error(
    change: float, error: float, is_kept: bool, folder: Path, tmp_path: Path, fits: Fits, monkeypatch: Any
) -> None:
    """Two photos decide here, so that it must be two and a half of the bootstrap's errors."""
    real = module.estimate
    monkeypatch.setattr(module, "estimate", lambda *args: replace(real(*args), change=change, error=error))
    report = quick(adaptive("means"), first(folder, 10), tmp_path)
    assert set(report.decisions) == {"calibration", "adapters", "refinement", "gain"}
    assert report.kept == (tuple(report.decisions) if is_kept else ())
    assert {row.mask for row in report.evaluation.rows} >= {"none", "detail | budget:fraction=0.2"}
    assert ("gain | budget:fraction=0.2" in {row.mask for row in report.evaluation.rows}) == is_kept
    adapters = cs.load(report.network, Tiny("means").eval()).adapters
    assert (adapters is not None) == is_kept


def test_the_least_work_may_be_everything_low(folder: Path, tmp_path: Path, fits: Fits) -> None:
    report = quick(adaptive(), first(folder, 10), tmp_path, keep=0.01)
    assert "it may flatter what was kept" in words_of(report) and "% agreement)" in words_of(report)
    low = next(row for row in report.evaluation.rows if row.mask == "none")
    assert report.chosen == "none" and report.is_kept and low.balanced_fidelity >= 0.01
    assert cs.load(report.network, Tiny().eval()).mask.spec() == "none"
    assert report.evaluation.rows[0].balanced_fidelity == 1


def test_from_forty_photos_on_others_decide_than_those_of_the_table(
    folder: Path, tmp_path: Path, fits: Fits
) -> None:
    report = quick(adaptive(), folder, tmp_path)
    used = [set(report.photos[name]) for name in ("fitted", "deciding", "table")]
    assert [len(names) for names in used] == [30, 5, 5] and len(set.union(*used)) == 40
    assert report.evaluation.images == 5 == report.decisions["adapters"].images
    text = words_of(report)
    assert "5 others decided what is kept, and the table and the choice of the budget are of 5 others" in text
    assert "they cannot tell improvements below" in text


@pytest.mark.slow
def test_progress_is_reported_for_each_photo_and_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_gain, "STEPS", 3)
    said: list[tuple[str, float | None, float | None]] = []
    quick(
        adaptive("means"),
        first(folder, 10),
        tmp_path,
        step=lambda text, done=None, of=None, limit=None: said.append((text, done, of)),
    )
    assert said[0][0] == "building and converting"
    for what, total in {
        "calibrating means over the image": "photo 16 of 16",
        "running the stem over the photos": "photo 8 of 8",
        "counting classes": "photo 8 of 8",
        "training level adapters": "step 2 of 2",
        "fitting refinements": "step 2 of 2",
        "measuring what each patch loses": "photo 8 of 8",
        "comparing the network as it is": "photo 2 of 2",
        "comparing the gain mask": "photo 2 of 2",
    }.items():
        told = [one for one in said if one[0].startswith(what)]
        count = int(total.split()[-1])
        assert told[-1] == (f"{what}, {total}", count - 1, count), told
        assert re.fullmatch(rf"{what}, (photo|step) 1 of \d+", told[0][0]) and told[0][1] == 0, told


@pytest.mark.slow
def test_a_finished_run_fits_and_decides_nothing_again(
    folder: Path, tmp_path: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError

    before = quick(adaptive(), first(folder, 10), tmp_path)
    for name in ("fit", "fit_refinement", "fit_gain", "calibrate_adapters", "judge"):
        monkeypatch.setattr(module, name, refuse)
    after = quick(adaptive(), first(folder, 10), tmp_path)
    assert after.decisions == before.decisions and after.chosen == before.chosen


def test_a_folder_of_a_run_before_photos_decided_is_refused(folder: Path, tmp_path: Path, fits: Fits) -> None:
    def stop(text: str, *count: float | None) -> None:
        if text.startswith("running the stem"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(adaptive(), first(folder, 10), tmp_path, step=stop)
    values = json.loads((tmp_path / "tune.json").read_text())
    del values["identity"]["photos"]
    (tmp_path / "tune.json").write_text(json.dumps(values))
    with pytest.raises(cs.InvalidInput, match="holds another run") as refused:
        quick(adaptive(), first(folder, 10), tmp_path)
    assert "photos" in str(refused.value)
