"""Mask `preview`: the network on a smaller picture says where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cadsurgery as cs


class Spots(nn.Module):
    """Strided convolutions with positive weights, and a map of the picture's size, high where the picture is bright."""

    def __init__(self, answer: str = "map") -> None:
        super().__init__()
        self.answer = answer
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 4), (4, 4), (4, 4)))
        for conv in self.down:
            nn.init.constant_(conv.weight, 0.1)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Any:
        y = x
        for conv in self.down:
            y = conv(y).relu()
        if self.answer == "class":
            return y.mean((2, 3))
        y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return {"out": y, "deep": y[:, :1]} if self.answer == "dictionary" else y


def spotted(height: int, width: int, *places: tuple[int, int]) -> Tensor:
    """Return a dark picture with a bright square in the middle of some cells of 32 pixels."""
    image = torch.zeros(1, 3, height, width)
    for row, column in places:
        image[..., 32 * row + 8 : 32 * row + 24, 32 * column + 8 : 32 * column + 24] = 4
    return image


def converted(answer: str = "map", mask: str = "preview") -> Any:
    model = Spots(answer).eval()
    return cs.adaptify(
        model,
        mask,
        coarsest=32,
        example_input=torch.rand(1, 3, 128, 128),
        normalisation="raw",
        verify_laws=False,
    )


def kept(net: Any) -> Tensor:
    kept: Tensor = net.levels[0, ::32, ::32] == 0
    return kept


@pytest.mark.parametrize(
    ("answer", "size", "mask", "margin"),
    [
        ("map", (256, 320), "preview:threshold=0.6,margin=0,scale=0.5", 0),
        ("dictionary", (230, 301), "preview:threshold=0.6,margin=0,scale=0.5", 0),
        ("map", (256, 320), "preview:threshold=0.6,scale=0.5", 1),
        ("map", (256, 320), "preview:least=1e6", None),
    ],
)
def test_cells_with_a_response_are_kept_and_those_around(
    answer: str, size: tuple[int, int], mask: str, margin: int | None
) -> None:
    """What is less than the least is no response."""
    net, places = converted(answer, mask), ((2, 3), (5, 7))
    expected = torch.zeros(-(-size[0] // 32), -(-size[1] // 32), dtype=torch.bool)
    for row, column in places if margin is not None else ():
        expected[row - margin : row + margin + 1, column - margin : column + margin + 1] = True
    for form in (net, net.optimize()):
        with torch.no_grad():
            form(spotted(*size, *places))
        assert torch.equal(kept(form), expected)


def test_optimised_copies_look_at_the_network_as_given() -> None:
    """What lies between the samples of the floor, 32 pixels apart, shows only on the network's own grid."""
    net, image = converted(mask="preview:scale=1,threshold=0.5,margin=0"), torch.zeros(1, 3, 128, 128)
    image[..., 70:78, 40:60] = 4
    net(image)
    expected = kept(net)
    assert expected.sum() == 1
    fast = net.optimize()
    fast(image)
    assert torch.equal(kept(fast), expected)


def test_a_conversion_to_a_finer_stride_previews_the_network_as_given() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    net = cs.adaptify(
        model,
        "preview:threshold=0.5,margin=0,scale=0.5",
        output_stride=(2, 8),
        normalisation="raw",
        verify_laws=False,
    )
    net(spotted(128, 128, (1, 2)))
    assert 0 < net.active_fraction < 0.3


def test_its_work_is_counted() -> None:
    """Law 7: the preview takes the multiply-accumulates of the network as given on the smaller picture."""
    net, image = converted(mask="preview:scale=0.5"), spotted(256, 256, (4, 4))
    layer = next(layer for layer in net.macs(image).layers if layer.layer == "(first pass)")
    assert layer.mask == net.macs(torch.zeros(1, 3, 128, 128), mask="all").given


def test_a_network_without_a_map_is_refused() -> None:
    net = converted("class")
    with pytest.raises(cs.InvalidInput, match="gives no map"):
        net(spotted(128, 128))


def test_a_network_of_several_inputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spots = Spots()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.spots(x) + y

    image, more = torch.rand(1, 3, 128, 128), torch.rand(1, 1, 128, 128)
    net = cs.adaptify(Two().eval(), "preview", coarsest=32, example_input=(image, more), normalisation="raw")
    with pytest.raises(cs.InvalidInput, match="smaller picture"):
        net(image, more)


def test_a_file_cannot_hold_it(tmp_path: Any) -> None:
    with pytest.raises(cs.InvalidInput, match="level_map"):
        cs.export(converted(), torch.rand(1, 3, 128, 128), tmp_path / "net.onnx")


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    net, image = converted(), spotted(192, 256, (2, 3))
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", model=Spots().eval())
    assert torch.equal(again(image), net(image)) and 0 < again.active_fraction < 1
