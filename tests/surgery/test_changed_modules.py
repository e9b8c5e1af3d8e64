"""A module that is changed after the conversion is followed exactly, or the next call is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn

import cadsurgery as cs


class Mixed(nn.Module):
    """One operation of each kind that rules read settings of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.dilated = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, bias=False)
        self.mean, self.largest = nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
        self.norm, self.leaky = nn.GroupNorm(2, 8), nn.LeakyReLU(0.1)
        self.larger, self.head = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        map = self.block(self.second(self.first(image)).relu())
        map = self.leaky(self.norm(self.largest(self.mean(self.dilated(map)))))
        return self.head(self.larger(map))


def sets(path: str, name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda net: setattr(net.get_submodule(path), name, value)


def exchanges(name: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        torch.manual_seed(1)
        setattr(net, name, make())

    return change


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "dilation of a new convolution": exchanges("dilated", lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "bias of a new convolution": exchanges("dilated", lambda: nn.Conv2d(8, 8, 3, 1, 2, dilation=2)),
    "padding mode of a new convolution": exchanges(
        "dilated", lambda: nn.Conv2d(8, 8, 3, 1, 2, dilation=2, bias=False, padding_mode="reflect")
    ),
    "kernel of a new convolution": exchanges("dilated", lambda: nn.Conv2d(8, 8, 1, bias=False)),
    "groups of a new convolution": exchanges(
        "dilated", lambda: nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=2, bias=False)
    ),
    "the same settings": exchanges("dilated", lambda: nn.Conv2d(8, 8, 3, 1, 2, dilation=2, bias=False)),
    "more classes": exchanges("head", lambda: nn.Conv2d(8, 7, 1)),
    "no bias": sets("head", "bias", None),
    "dilation": sets("dilated", "dilation", (1, 1)),
    "padding": sets("dilated", "padding", (1, 1)),
    "stride": sets("second", "stride", (1, 1)),
    "padding mode": sets("dilated", "padding_mode", "reflect"),
    "kernel of a mean": sets("mean", "kernel_size", 5),
    "what a mean counts": sets("mean", "count_include_pad", False),
    "a new mean": exchanges("mean", lambda: nn.AvgPool2d(5, 1, 2)),
    "dilation of a maximum": sets("largest", "dilation", 2),
    "groups of a norm": sets("norm", "num_groups", 4),
    "epsilon of a norm": sets("norm", "eps", 0.5),
    "epsilon of a batch norm": sets("block.1", "eps", 0.5),
    "slope": sets("leaky", "negative_slope", 0.5),
    "a new slope": exchanges("leaky", lambda: nn.LeakyReLU(0.9)),
    "factor of a resize": sets("larger", "scale_factor", 4.0),
    "mode of a resize": sets("larger", "mode", "nearest"),
    "a block of other modules": exchanges(
        "block", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("is_called_before", [False, True])
@torch.no_grad()
def test_a_change_is_followed_or_refused(name: str, is_called_before: bool, tmp_path: Path) -> None:
    """In the network itself, in its optimised copy, in its file."""
    model, image = Mixed().eval(), torch.rand(2, 3, 64, 96)
    example = torch.rand(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cs.CadWarning)
        net = cs.adaptify(model, mask="none", output_stride=(2, 8), example_input=example, outputs="native")
    if is_called_before:
        net(image)
    changed = copy.deepcopy(model)
    CHANGES[name](net)
    CHANGES[name](changed)
    try:
        found = net(image)
    except cs.InvalidInput as refusal:
        assert "not the module that was converted" in refusal.what and "cs.adaptify" in refusal.next
        for refused in (net.optimize, lambda: cs.save(net, tmp_path / "net.safetensors")):
            with pytest.raises(cs.InvalidInput, match="not the module that was converted"):
                refused()
        return
    expected = changed(image)
    for values in (found, net.optimize()(image)):
        assert values.shape == expected.shape and relative_error(values, expected) < 1e-4
