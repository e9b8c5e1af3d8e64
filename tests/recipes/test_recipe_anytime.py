"""The recipe of the published network with exits: names, cost, and what it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import assert_same, images
from networks import randomise
from torch import Tensor

import cadsurgery as cs
from recipes.anytime_hrnet import recipe
from recipes.anytime_hrnet.network import SIZES, HRNet

pytestmark = pytest.mark.slow  # a network of 140 convolutions is traced


@pytest.fixture(scope="module")
def net() -> cs.AnytimeModel:
    torch.manual_seed(0)
    found = recipe.build("w18", threshold=0.5)
    randomise(found)
    return found


def test_names_and_numbers_are_those_of_the_published_file(net: cs.AnytimeModel) -> None:
    names = recipe.published_names(net)
    masked = [name for name in names if name.endswith(".Lambda")]
    assert len(names) == 1228 and len(masked) == 143
    tables = sum(names[name].numel() for name in names if name.endswith(".square_dis"))
    assert sum(p.numel() for p in net.parameters()) + tables == 4_004_642
    shapes = {
        "transition1.0.0.weight": (18, 256, 3, 3),
        "transition1.1.0.0.Lambda": (),
        "transition2.2.0.0.weight": (72, 36, 3, 3),
        "stage2.0.fuse_layers.0.1.0.weight": (18, 36, 1, 1),
        "stage2.0.fuse_layers.1.0.0.0.weight": (36, 18, 3, 3),
        "exit1.21.weight": (19, 64, 1, 1),
        "exit2.13.Lambda": (),
        "exit3.1.weight": (64, 126, 1, 1),
        "last_layer.0.weight": (270, 270, 1, 1),
    }
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    assert not any(name.startswith(("conv1", "layer1", "exit1")) for name in masked)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_published_file_loads(net: cs.AnytimeModel, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in recipe.published_names(net).items()}
    if prefix:
        state["loss.criterion.weight"] = torch.ones(19)
    torch.manual_seed(1)
    other = recipe.load_published(recipe.build("w18", threshold=0.5), state)
    x = images(1, 64, 96)
    with torch.no_grad():
        for one, found in zip(other(x), net(x), strict=True):
            assert torch.equal(one, found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("exit2.1.Lambda"), "missing"),
        (lambda state: state.pop("exit2.1.square_dis"), "square_dis"),
        (lambda state: state.update(head=torch.ones(1)), "unknown"),
        (lambda state: state.update({"exit1.21.bias": torch.ones(7)}), r"\(7,\)"),
        (lambda state: state["exit2.1.square_dis"].zero_(), "table of distances"),
    ],
)
def test_another_file_is_refused(
    net: cs.AnytimeModel, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    state = recipe.published_names(net)
    change(state)
    with pytest.raises(cs.FileError, match=words):
        recipe.load_published(net, state)


def test_the_call_gives_four_maps_at_output_stride_4_at_any_size(net: cs.AnytimeModel) -> None:
    model, x = HRNet(SIZES["w18"], 19).eval(), images(2, 65, 97)
    model.load_state_dict(
        {name: value for name, value in net.state_dict().items() if name in model.state_dict()}
    )
    with torch.no_grad():
        assert [tuple(one.shape) for one in net(x)] == [(2, 19, 17, 25)] * 4
        assert_same(net(x, threshold=1.0)[-1], model(x))


@pytest.mark.parametrize(
    ("head", "published"),
    [
        ("redesigned", (23.69, 34.74, 49.87, 73.23, 45.38)),
        ("plain", (31.44, 42.56, 59.53, 82.88, 54.10)),
    ],
)
def test_cost_is_that_of_the_publication(head: str, published: tuple[float, ...]) -> None:
    found = recipe.build("w18", head=head).macs(torch.empty(1, 3, 1024, 2048, device="meta"))  # type: ignore[arg-type]
    figures = [*(exit.macs / recipe.UNIT for exit in found), found.mean / recipe.UNIT]
    assert [round(figure, 2) for figure in figures] == list(published)
