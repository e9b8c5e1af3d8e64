"""Networks of the zoo and the corpus in bands: what is compared of one, and a sample of families."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from conftest import some
from networks import strided
from torch import Tensor, nn

from benchmarks.zoo.bands_check import CONVERSIONS, check_in_bands
from benchmarks.zoo.corpus import CHECKOUT, Subject, subject
from cadsurgery.network.bands import steps

NAMES = {name for _, comparisons in CONVERSIONS for name in comparisons}
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


@pytest.mark.slow
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
