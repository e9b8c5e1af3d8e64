"""The measuring loop: one quality has one name and one value wherever it is shown, and counts of pictures merge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from networks import street_segmenter
from PIL import Image
from torch import Tensor

import cadsurgery as cs
from cadsurgery.finetune.validation import evaluate as validate
from cadsurgery.methods.side import Side
from cadsurgery.support.errors import CadError
from cadsurgery.tasks.judging import Judgement, estimate
from cadsurgery.tasks.measuring import (
    AGREEMENT,
    ERROR,
    FIDELITY,
    MIOU,
    PictureBatch,
    Quality,
    Tally,
    compare,
    measure,
)

MASK, SIZE = "edges:threshold=0.95,dilation=3", (23, 31)


def test_a_quality_has_one_name_and_one_value_wherever_it_is_shown(command_line: Run, tmp_path: Path) -> None:
    """By `eval`, `mask --compare`, and validation, on one picture."""
    picture = (255 * cs.open_data("scene:1,height=48,width=80")[0][0]).round().byte().permute(1, 2, 0).numpy()
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture).save(tmp_path / "photos" / "a.png")
    network = ("networks:street_segmenter", "--output-stride", "8,32")
    of_eval = command_line(
        "eval", *network, "--data", "images:photos", "--mask", MASK, "--rounds", 0, "--json"
    )
    asked = ("-m", *network, "--compare", "--mask", MASK, "--mask", "all", "-o", "mask.png", "--json")
    of_mask = command_line("mask", "photos/a.png", *asked)
    of_eval_row, of_mask_row = of_eval.json["rows"][1], of_mask.json["masks"][0]
    net = cs.adaptify(street_segmenter(), MASK, output_stride=(8, 32), verify_laws=False)
    of_validation = validate(net, cs.open_data("images:photos", "all"))
    names = {AGREEMENT, FIDELITY}
    assert names <= of_eval_row.keys() & of_mask_row.keys() & of_validation.keys()
    assert of_mask_row[ERROR] is None and of_eval_row[ERROR] is None and ERROR not in of_validation
    for name in names:
        expected = pytest.approx(of_validation[name], abs=2e-3)  # a pixel may round the other way
        assert 0 < of_eval_row[name] == expected and of_mask_row[name] == expected
    json.dumps(of_validation)


def scores(seed: int, count: int = 1, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "quality"), [("classes", FIDELITY), ("classes", AGREEMENT), ("values", ERROR)]
)
def test_the_error_of_a_quality_is_that_of_the_mean_over_such_pictures(kind: Any, quality: str) -> None:
    """And `recommend` finds the same values from the counts of its journal."""
    qualities: dict[int, Quality] = {}
    judged: list[Judgement] = []
    for pictures in (1, 8, 32):
        qualities[pictures] = Quality(kind)
        for seed in range(pictures):
            target = scores(seed)
            output = target + (0.5 + seed % 3) * scores(seed + 100)
            qualities[pictures].update(output, target, SIZE)
            one = Quality(kind)
            one.update(output, target, SIZE)
            judged += [Judgement.from_dict(Judgement.of(Tally([one])).to_dict())] if pictures == 32 else []
    figures = {pictures: each.compute() for pictures, each in qualities.items()}
    assert figures[1]["errors"] == {}
    assert 0 < figures[32]["errors"][quality] < figures[8]["errors"][quality]
    found = estimate(judged, judged, quality)
    assert found.value == pytest.approx(figures[32][quality], abs=1e-12) and found.change == found.error == 0


def test_figures_of_one_picture_are_those_of_a_comparison() -> None:
    target, output = scores(0), scores(1)
    figures = compare(output, target, SIZE)
    ((_, tallies),) = measure(
        [Side("high", lambda _: target, is_target=True), Side("mask", lambda _: output, 7)],
        [PictureBatch(target, SIZE)],
        lambda: [Quality()],
    )
    assert isinstance(tallies, list)
    assert tallies[1].metrics[0].compute() == figures and tallies[1].counts == {"images": 1, "macs": 7}
    assert tallies[0].metrics[0].compute()[MIOU] == 1 and not math.isnan(figures[MIOU])


def test_measuring_ends_when_it_is_told_and_sides_may_change_on_the_way() -> None:
    seen: list[int] = []

    def sides() -> list[Side]:
        return [Side(str(place), lambda x: x) for place in range(3 - len(seen))]

    batches = [PictureBatch(scores(place), SIZE, places=(place,)) for place in range(5)]
    for _, tallies in measure(sides, batches, lambda: [Quality()], until=lambda: len(seen) == 2, turns=2):
        assert isinstance(tallies, list) and all(tally.milliseconds >= 0 for tally in tallies)
        seen.append(len(tallies))
    assert seen == [3, 2]


def test_a_picture_that_the_first_side_refuses_is_an_error_and_the_others_are_measured() -> None:
    def refuse(x: Tensor) -> Tensor:
        if x.shape[2] == 5:
            raise RuntimeError("sizes of tensors must match")
        return x

    batches = [PictureBatch(torch.randn(1, 4, side, 5), (side, 5)) for side in (4, 5, 6)]
    found = [each for _, each in measure([Side("one", refuse)], batches, lambda: [Quality()])]
    assert [isinstance(each, CadError) for each in found] == [False, True, False]
    assert "5x5 pixels" in str(found[1])
    other = [Side("one", lambda x: x), Side("another", refuse)]
    with pytest.raises(RuntimeError, match="must match"):
        list(measure(other, batches, lambda: [Quality()]))
