"""Weights of classes: all classes count the same, none without bound, and nothing changes unless it is asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import images
from torch import nn

import cadsurgery as cs
from cadsurgery.finetune.balance import RARE, class_weights
from cadsurgery.finetune.learning_rates import Draw
from cadsurgery.finetune.objectives import AnyBudget, Divergence, miss
from cadsurgery.support.divergence import divergence


def scores(classes: torch.Tensor, count: int) -> torch.Tensor:
    """Class scores (B, C, h, w) of these classes (B, h, w)."""
    return nn.functional.one_hot(classes, count).movedim(-1, 1).double() * 2 - 1


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_mean_weight_is_one_and_the_power_sets_how_much_rare_classes_count(power: float) -> None:
    shares = torch.tensor([0.7, 0.25, 0.048, 0.002, 0.0], dtype=torch.float64)
    weights = class_weights(shares, power)
    assert float((weights * shares).sum()) == pytest.approx(1)
    ratio = weights[3] / weights[0]
    assert float(ratio) == pytest.approx(((0.7 + RARE) / (0.002 + RARE)) ** power)
    assert float(weights.max() / weights.min()) <= ((1 + RARE) / RARE) ** power + 1e-9


def test_the_divergence_is_weighted_only_if_asked_for() -> None:
    classes = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    target, output = scores(classes, 3), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    apart = divergence(target, output, "classes")
    plain, _ = miss(output, None, target, kind="classes")
    same, _ = miss(output, None, target, kind="classes", class_weights=(1.0, 1.0, 1.0))
    assert torch.equal(plain, apart.mean()) and torch.equal(plain, same)
    only, _ = miss(output, None, target, kind="classes", class_weights=(0.0, 0.0, 2.0))
    assert float(only) == pytest.approx(2 * float(apart[classes == 2].sum()) / classes.numel())


@pytest.mark.parametrize("supervision", [0.0, 2.0])
def test_both_parts_of_an_objective_count_as_asked_for(supervision: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)).eval()
    net = cs.adaptify(model, "random", verify_laws=False)
    objective = Divergence(net, weight=3.0, supervision=supervision)
    labels = torch.randint(4, (2, 40, 56)) if supervision else None
    found = objective((images(2, 40, 56),), labels, Draw(0, 0, (0, 1)))
    expected = 3 * found["divergence"] + supervision * found.get("entropy", 0)
    torch.testing.assert_close(found["loss"], expected)


def test_weights_that_do_not_fit_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 4, 1))
    net, batch, draw = (
        cs.adaptify(model.eval(), "edges", verify_laws=False),
        (images(2, 40, 56),),
        Draw(0, 0, (0, 1)),
    )
    options = {"ranking": "random", "supervision": 0.0, "fractions": (0.3,)}
    weighted, plain = (AnyBudget(net, class_weights=weights, **options) for weights in ((0, 0, 0, 0), ()))
    assert weighted(batch, None, draw)["loss"].item() == 0 < plain(batch, None, draw)["loss"].item()
    with pytest.raises(cs.InvalidInput, match=r"3 class_weights for outputs of \(2, 4,"):
        AnyBudget(net, class_weights=(1, 1, 1), **options)(batch, None, draw)
    with pytest.raises(cs.InvalidInput, match="at least 0"):
        AnyBudget(net, class_weights=(1, -1, 1, 1), **options)
