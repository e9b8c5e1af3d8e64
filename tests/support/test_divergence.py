"""How far outputs are apart: against torch's own divergence, and the laws that make it a measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cadsurgery.support.divergence import class_scores, divergence, kind_of
from cadsurgery.support.errors import CadError, InvalidInput, UnknownName

SHAPE = (2, 5, 7, 4)


@dataclass
class Prediction:
    out: Tensor
    aux: Tensor | None = None


class Pair(NamedTuple):
    descriptors: Tensor
    scores: Tensor


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape or SHAPE), torch.randn(shape or SHAPE)


def unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=1, keepdim=True)


KINDS: dict[str, tuple[Any, str]] = {
    "scores": (torch.randn(SHAPE), "classes"),
    "scores of images": (torch.randn(2, 5), "classes"),
    "rectified scores of images": (4 * torch.rand(2, 5), "classes"),
    "probabilities": (torch.randn(SHAPE).softmax(1), "classes"),
    "scores beside auxiliary ones": ({"out": torch.randn(SHAPE), "aux": torch.randn(SHAPE)}, "classes"),
    "depth": (torch.randn(2, 1, 7, 4), "values"),
    "depth without channels": (torch.randn(2, 7, 4), "values"),
    "descriptors": (unit(torch.randn(SHAPE)), "values"),
    "rectified features": (torch.randn(SHAPE).relu(), "values"),
    "pyramid": ([torch.randn(SHAPE), torch.randn(2, 8, 3, 2)], "values"),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_output_is_no_way_apart_from_itself_and_some_way_from_another(name: str) -> None:
    output, kind = KINDS[name]
    assert kind_of(output) == kind
    other = torch.utils._pytree.tree_map(lambda values: values.flip(0), output)
    assert divergence(output, output).abs().max() < 1e-6
    assert divergence(output, other).mean() > 1e-2


def test_of_scores_it_is_the_divergence_of_distributions() -> None:
    high, low = pair()
    for temperature in (1.0, 3.0):
        one, two = (
            torch.distributions.Categorical(logits=values.movedim(1, -1) / temperature)
            for values in (high, low)
        )
        expected = torch.distributions.kl_divergence(one, two)
        assert_close(divergence(high, low, temperature=temperature), expected)
        ours = divergence(high.softmax(1), low.softmax(1), temperature=temperature)
        assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_of_values_zeros_are_one_apart_on_average_and_the_unit_of_measure_is_nothing() -> None:
    high, low = pair()
    assert_close(divergence(high, 0 * low, "values").mean((1, 2)), torch.ones(2))
    assert_close(divergence(40 * high, 40 * low, "values"), divergence(high, low, "values"))
    assert_close(divergence(0 * high, 0 * high, "values"), torch.zeros(2, 7, 4))


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_what_stands_beside_the_main_output_does_not_count_and_gradients_reach_the_lower_alone(
    kind: Any,
) -> None:
    high, low = (values.requires_grad_() for values in pair())
    expected = divergence(high, low, kind)
    assert_close(divergence({"out": high, "aux": low}, {"out": low}, kind), expected)
    assert_close(divergence(Prediction(high, low), Prediction(low), kind), expected)
    assert_close(divergence((high,), [low], kind), expected)
    expected.mean().backward()
    assert high.grad is None and low.grad is not None and bool(low.grad.abs().sum() > 0)


def test_of_several_maps_it_is_the_mean_at_the_size_of_the_largest() -> None:
    (high, low), (large, near) = pair(2, 3, 4, 4), pair(2, 1, 8, 8)
    apart = divergence(Pair(high, large), Pair(low, near))
    assert apart.shape == (2, 8, 8)
    assert_close(divergence(Pair(high, large), Pair(high, near)), divergence(large, near, "values") / 2)


def test_a_map_of_another_size_is_resized_and_pooled_outputs_are_one_pixel() -> None:
    high, low = pair()
    assert divergence(high, low[:, :, ::2, ::2]).shape == (2, 7, 4)
    assert divergence(*pair(2, 5)).shape == (2, 1, 1)
    assert divergence(torch.ones(2, 5, 8, 8), torch.ones(2, 5, 4, 4), "values").abs().max() == 0


ONES, MORE = torch.ones(2, 5, 4, 4), torch.ones(2, 6, 4, 4)
NO_MAP = "not a map of class scores"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: divergence(ONES.long(), ONES, "values"), InvalidInput, "Next"),
        (lambda: divergence({"boxes": []}, {"boxes": []}, "auto"), InvalidInput, "Next"),
        (lambda: divergence(ONES, MORE, "classes"), InvalidInput, "Next"),
        (lambda: divergence([ONES] * 2, [ONES], "values"), InvalidInput, "Next"),
        (lambda: divergence(ONES, ONES, "clases"), UnknownName, "Next"),
        (lambda: class_scores(torch.zeros(2, 3)), InvalidInput, NO_MAP),
        (lambda: class_scores({"scores": torch.zeros(1, 2, 3, 3)}), InvalidInput, NO_MAP),
        (lambda: class_scores([torch.zeros(1)]), InvalidInput, NO_MAP),
        (lambda: class_scores(None), InvalidInput, NO_MAP),
        (lambda: class_scores(ONES, fewest=6), InvalidInput, r"tensor of shape \(2, 5, 4, 4\)"),
        (lambda: class_scores(ONES, batch=1), InvalidInput, r"tensor of shape \(2, 5, 4, 4\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    call: Callable[[], Any], error: type[CadError], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()


def test_class_scores_are_alone_or_one_of_several() -> None:
    scores = torch.zeros(2, 3, 4, 5)
    for output in (scores, {"aux": torch.zeros(1), "out": scores}, (torch.zeros(1), scores)):
        assert class_scores(output, fewest=3, batch=2) is scores
