"""The recipe of the published detector: names, cost, training, and that it runs whole; that of two classifiers, without
their data."""

from __future__ import annotations

import pytest
import torch
from conftest import images, slow
from networks import randomise

import cadsurgery as cs
from recipes.sampling_faster_rcnn import recipe


@pytest.fixture(scope="module")
def net() -> cs.SampledModel:
    torch.manual_seed(0)
    return recipe.backbone("resnet50")


@pytest.mark.parametrize(
    ("resolution", "density", "digits", "total"),
    [
        *((500, None, 2, 70.03), (600, None, 2, 100.20), (800, None, 2, 184.06), (1000, None, 2, 289.47)),
        *((1000, 1.0, 3, 294.511), (1000, 0.5, 3, 162.342), (1000, 0.3, 3, 106.836)),
    ],
)
def test_cost_is_the_published_one(resolution: int, density: float | None, digits: int, total: float) -> None:
    """Of the dense network, and at uniform densities."""
    given = (resolution,) if density is None else (resolution, density)
    assert round(recipe.gflops("resnet101", *given), digits) == total


@pytest.mark.slow
def test_names_are_those_of_the_published_file(net: cs.SampledModel) -> None:
    names = recipe.published_names(net)
    theirs = {name: net.state_dict()[ours] for ours, name in names.items()}
    assert len(theirs) == 446
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "layer1.0.conv1_mask.weight": (1, 64, 3, 3),
        "layer1.0.conv2_mask.bias": (1,),
        "layer2.0.conv2_mask.weight": (1, 256, 3, 3),
        "layer4.2.conv1_sigma": (),
        "layer4.2.conv2_gumbel.cur_T": (),
        "layer3.0.downsample.1.running_var": (1024,),
    }
    assert {name: tuple(theirs[name].shape) for name in shapes} == shapes


@pytest.mark.slow
@pytest.mark.parametrize("nested", [slow(False), True])
def test_a_published_file_loads_strictly(net: cs.SampledModel, nested: bool) -> None:
    other, x = recipe.backbone("resnet50"), images(1, 64, 96)
    with torch.no_grad():
        for gate in other.gates:
            gate.weight.normal_(0, 0.05)
            gate.bias.zero_()
    randomise(other)
    names = recipe.published_names(other)
    state = {names[ours]: value for ours, value in other.state_dict().items()}
    given = {"meta": {}, "state_dict": {f"backbone.{n}": v for n, v in state.items()} | {"neck.x": x}}
    found = recipe.load_published(net, given if nested else state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(found(x), other(x), strict=True))
        assert [tuple(value.shape[1:]) for value in found(x)] == [
            (256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)
        ]  # fmt: skip
    for broken, says in (
        ({**state, "conv9.weight": x}, "unknown conv9.weight"),
        ({name: value for name, value in state.items() if name != "layer1.0.conv1_sigma"}, "missing"),
        ({**state, "layer1.0.conv1_mask.bias": torch.zeros(2)}, "\\(2,\\) for \\(1,\\)"),
        ({**state, "layer2.0.conv2_offset.weight": x}, "deformable"),
    ):
        with pytest.raises(cs.FileError, match=says):
            recipe.load_published(net, broken)


@pytest.mark.slow
def test_it_detects_and_trains_inside_torchvisions_detector() -> None:
    body = recipe.backbone("resnet50", noise=True)
    kept = {"rpn_pre_nms_top_n_train": 40, "rpn_post_nms_top_n_train": 20}
    net = recipe.detector(body, 3, min_size=64, max_size=96, rpn_post_nms_top_n_test=20, **kept)
    with torch.no_grad():
        (found,) = net.eval()([torch.rand(3, 60, 80)])
    assert set(found) == {"boxes", "labels", "scores"}
    recipe.set_training(net)
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    parts = recipe.loss(net, [torch.rand(3, 60, 80)], [target], 0.02)
    assert float(parts["sparse"].detach()) == pytest.approx(0.02 * 0.952574, rel=1e-5)
    parts["loss"].backward()
    assert body.conv1.weight.grad is None
    assert all(gate.weight.grad is not None for gate in body.gates)
    assert all(gate.bias.grad.abs().sum() > 0 for gate in body.gates)  # type: ignore[union-attr]
    optimizer = recipe.make_optimizer(net)
    before = body.gates[0].bias.detach().clone()
    optimizer.step()
    assert not torch.equal(body.gates[0].bias, before)


def test_the_learning_rate_is_that_published() -> None:
    rates = [recipe.learning_rate(step, 1000) for step in (0, 250, 500, 7999, 8000, 10_999, 11_000)]
    assert rates == pytest.approx([0.01 / 3, 0.01 * 2 / 3, 0.01, 0.01, 0.001, 0.001, 0.0001])
