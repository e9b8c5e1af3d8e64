"""Networks of the zoo and the corpus in bands: what is compared of one, and a sample of families."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, some
from networks import strided
from torch import Tensor, nn

from benchmarks.zoo.bands_check import CONVERSIONS, check_in_bands
from benchmarks.zoo.corpus import CHECKOUT, Subject, subject
from cadsurgery.network.bands import steps
from cadsurgery.tasks.zoo_record import read_rows

NAMES = {name for _, comparisons in CONVERSIONS for name in comparisons}
SMALL = '''
from torch import nn
from benchmarks.zoo.corpus import network

@network("norms")
def plain():
    """Three strides."""
    return nn.Sequential(*[nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8)], nn.Conv2d(8, 2, 1))
'''
CORPUS = ("unets:UNetUnpadded", "pictures:Inpainting", "realtime:BiSeNetLike")
# Families that `network/test_bands.py` has no network of, one small network of each.
SAMPLE = (
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "hgnetv2_b0",
    "mobilenetv2_035",
    "squeezenet1_1",
    "starnet_s050",
    "test_byobnet",
    "test_mambaout",
)


class Turned(nn.Module):
    """Reads the picture from below."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = strided(3), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flip(2))


def test_a_network_is_compared_as_given_under_floors_and_without_strides() -> None:
    row = check_in_bands(Subject("own:strided", "own", lambda: strided(3, outputs=2)))
    assert row["result"] == "in bands" and row["compared"] == dict.fromkeys(NAMES, "equal"), row


def test_a_refusal_says_why_and_where() -> None:
    row = check_in_bands(Subject("own:turned", "own", Turned))
    assert row["result"] == "refused" and "flip" in row["why"], row


def test_a_wrong_result_and_a_failure_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    one, made = Subject("own:strided", "own", lambda: strided(3, outputs=2)), steps.windowed

    def shifted(compute: Any, *args: Any) -> Tensor:
        return compute(*args) + 0.1

    def fails(compute: Any, *args: Any) -> Tensor:
        raise RuntimeError("out of order")

    for broken, words in ((shifted, "is not whole"), (fails, "fails")):

        def make(*args: Any, broken: Any = broken, **options: Any) -> steps.BandStep:
            step = made(*args, **options)
            return replace(step, compute=partial(broken, step.compute))

        monkeypatch.setattr(steps, "windowed", make)
        row = check_in_bands(one)
        assert row["result"] == "broken" and words in row["why"], row


def test_what_is_late_is_left_out_and_that_is_said() -> None:
    row = check_in_bands(Subject("own:strided", "own", lambda: strided(3, outputs=2)), seconds=0.0)
    assert row["result"] == "not converted" and "no time was left" in row["why"], row


@pytest.mark.parametrize("name", some(CORPUS, every=3))
def test_networks_as_users_write_them_in_bands_are_whole(name: str) -> None:
    """Pooled maps that are added to others, crops on all sides, coarse dense maps beside the region, other inputs."""
    row = check_in_bands(subject(name, CHECKOUT))
    assert row["result"] == "in bands", row


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_networks_of_other_families_in_bands_are_whole(name: str) -> None:
    row = check_in_bands(subject(name), seconds=300)
    assert row["result"] == "in bands" and row["compared"].keys() == NAMES, row


@pytest.mark.slow
def test_the_script_compares_in_bands(tmp_path: Path, command_line: Run) -> None:
    file = tmp_path / f"nets_{tmp_path.name.replace('-', '_')}.py"
    file.write_text(SMALL)
    path = file.with_suffix(".jsonl")
    run = command_line(file, "--corpus", "--bands", "--output", path, module="benchmarks.zoo.check")
    (row,) = read_rows(path)
    assert "1 networks: 1 in bands" in run.out and row["compared"] == dict.fromkeys(NAMES, "equal"), row
