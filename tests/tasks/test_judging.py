"""Judgements picture by picture: what rare classes lose is not paid for by what others gain, and nothing by chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.tasks.judging import FOUND, Judgement, estimate, in_rows, kind_to_judge
from cadsurgery.tasks.measuring import AGREEMENT, FIDELITY, Kind, Quality, Tally

SIZE = (23, 31)


def scores(classes: Tensor, count: int) -> Tensor:
    return F.one_hot(classes, count).movedim(-1, 1).float()


def drawn(images: int, seed: int, share: float) -> Tensor:
    """Classes (images, 1, h, w) of pixels: 0 and 1, and a share of 2."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (images, 1, *SIZE), generator=generator)
    return classes.where(torch.rand(classes.shape, generator=generator) > share, 2)


def judge(output: Tensor, given: Tensor, size: tuple[int, int], kind: Kind) -> Judgement:
    quality = Quality(kind)
    quality.update(output, given, size)
    return Judgement.from_dict(Judgement.of(Tally([quality])).to_dict())  # as from the journal


def of(found: Tensor, dense: Tensor) -> Judgement:
    return judge(scores(found, 3), scores(dense, 3), SIZE, "classes")


def test_it_is_the_balanced_fidelity_of_an_evaluation() -> None:
    dense, found = drawn(4, 0, 0.02), drawn(4, 1, 0.02)
    metrics = Quality("classes")
    for one, other in zip(found, dense, strict=True):
        metrics.update(scores(one, 4), scores(other, 4), SIZE)
    judged = [of(one, other) for one, other in zip(found, dense, strict=True)]
    figures = metrics.compute()
    assert figures["balanced_fidelity"] == pytest.approx(estimate(judged, judged, FIDELITY).value)
    assert figures["pixel_accuracy"] == pytest.approx(estimate(judged, judged, AGREEMENT).value)
    dense[:], found[:] = 0, 0
    found[..., 0, 0] = 1  # not a class of the dense network: it lowers mean IoU alone
    alone = Quality("classes")
    alone.update(scores(found[0], 4), scores(dense[0], 4), SIZE)
    assert alone.compute()["balanced_fidelity"] > 0.99 > alone.compute()["miou"]


def test_pictures_of_one_class_agree_or_not() -> None:
    given = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    judged = [judge(one[None], given[0][None], SIZE, "classes") for one in given]
    assert estimate(judged, judged, AGREEMENT).value == 0.5


def test_a_map_of_probabilities_is_judged_by_what_it_finds() -> None:
    """Half of what is found is missed: IoU 2 / 4 there and 60 / 62 elsewhere."""
    given = torch.full((1, 1, 8, 8), 0.01)
    given[..., :2, :2] = 0.97
    half = given.where(torch.arange(8) != 1, 0.3)
    assert kind_to_judge(given) == "found"
    judged = [judge(values, given, (8, 8), "found") for values in (half, given)]
    assert estimate(judged[:1], judged[1:], FOUND).value == pytest.approx((2 / 4 + 60 / 62) / 2)


PICTURES = [(128, 160), (97, 129), (640, 640), (64, 512)]
SCALES = [0.5, 0.625, 0.875, 1.25]


def _anchors(size: tuple[int, int]) -> int:
    return sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in (8, 16, 32))


ROWS: dict[str, Callable[[tuple[int, int]], tuple[int, ...]]] = {
    "boxes of anchors": lambda size: (1, 6, _anchors(size)),
    "boxes first": lambda size: (1, _anchors(size), 84),
    "two numbers of each": lambda size: (1, 2, _anchors(size)),
    "boxes of the best": lambda size: (1, 300, 6),
    "classes of queries": lambda size: (1, 100, 91),
    "in four axes": lambda size: (1, 1, _anchors(size), 85),
    "of one channel": lambda size: (1, 4, 1, _anchors(size)),
}
MAPS: dict[str, Callable[[tuple[int, int]], tuple[int, ...]]] = {
    "classes": lambda size: (1, 19, *size),
    "depth": lambda size: (1, *size),
    "at stride 8": lambda size: (1, 5, -(-size[0] // 8), -(-size[1] // 8)),
    "at stride 32, rounded down": lambda size: (1, max(1, size[0] // 32), max(1, size[1] // 32)),
    "without a border": lambda size: (1, 2, size[0] // 4 - 1, size[1] // 4 - 1),
    "a vector": lambda size: (1, 10),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", PICTURES)
def test_rows_of_a_resized_picture_are_not_compared_and_maps_are(size: tuple[int, int], scale: float) -> None:
    """By resizing along its anchors a detector of another picture would get a number without meaning."""
    small = (round(size[0] * scale), round(size[1] * scale))
    for name, shape in ROWS.items():
        words = in_rows(torch.rand(shape(size)), (torch.rand(shape(small)), []), size, is_resized=True)
        assert "is rows" in words and str(shape(size)[-1]) in words, name
        assert not in_rows(torch.rand(shape(size)), torch.rand(shape(size)), size, is_resized=False), name
    for name, shape in MAPS.items():
        assert not in_rows(
            {"out": torch.rand(shape(size))}, torch.rand(shape(small)), size, is_resized=True
        ), name
