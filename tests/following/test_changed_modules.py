"""A module that is changed after the conversion is followed exactly, or the next call is refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering, relative_error
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.surgery.treatment import _RULES


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


# Of all other arguments `test_any_argument_of_any_class_is_followed_or_refused` says it.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "dilation of a new convolution": exchanges("dilated", lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "the same settings": exchanges("dilated", lambda: nn.Conv2d(8, 8, 3, 1, 2, dilation=2, bias=False)),
    "more classes": exchanges("head", lambda: nn.Conv2d(8, 7, 1)),
    "no bias": sets("head", "bias", None),
    "padding mode": sets("dilated", "padding_mode", "reflect"),
    "epsilon of a batch norm": sets("block.1", "eps", 0.5),
    "an adapter": lambda net: setattr(net, "dilated", nn.Sequential(net.dilated, nn.Identity())),
    "one module more": lambda net: net.block.append(nn.ReLU6()),
    "one module less": lambda net: net.block.__delitem__(1),
    "another forward": lambda net: setattr(net.dilated, "forward", lambda x: 2 * x),
    "another forward of a container": lambda net: setattr(
        net.block, "forward", lambda x: 2 * x[:, :, ::2, ::2]
    ),
    "another class": lambda net: setattr(net.block[1], "__class__", nn.SyncBatchNorm),
    "a block of other modules": exchanges(
        "block", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    ),
}


@pytest.mark.parametrize(("name", "is_called_before"), covering([*CHANGES], [False, True]))
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


class Around(nn.Module):
    """One module between convolutions of stride 2."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.module, self.last = module, nn.Conv2d(4 if isinstance(module, nn.GLU) else 8, 4, 3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        map = self.second(self.first(image)).sigmoid()
        if isinstance(self.module, OF_LAST_AXIS):
            map = self.module(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            map = self.module(map)
        result: Tensor = self.last(map)
        return result


ARGUMENTS: dict[type[nn.Module], dict[str, Any]] = {
    nn.Conv2d: {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1},
    nn.ConvTranspose2d: {"in_channels": 8, "out_channels": 8, "kernel_size": 2, "stride": 2},
    nn.MaxPool2d: {"kernel_size": 3, "stride": 1, "padding": 1},
    nn.AvgPool2d: {"kernel_size": 3, "stride": 1, "padding": 1},
    nn.BatchNorm2d: {"num_features": 8},
    nn.InstanceNorm2d: {"num_features": 8},
    nn.GroupNorm: {"num_groups": 2, "num_channels": 8},
    nn.Upsample: {"scale_factor": 2},
    nn.LocalResponseNorm: {"size": 3},
    nn.ChannelShuffle: {"groups": 2},
    nn.Softmax: {"dim": 1},
    nn.LogSoftmax: {"dim": 1},
    nn.Softmin: {"dim": 1},
    nn.GLU: {"dim": 1},
    nn.Threshold: {"threshold": 0.5, "value": 0.1},
    nn.ConstantPad2d: {"padding": 1, "value": 0.0},
    nn.ZeroPad2d: {"padding": 1},
    nn.ReflectionPad2d: {"padding": 1},
    nn.ReplicationPad2d: {"padding": 1},
    nn.UpsamplingNearest2d: {"scale_factor": 2},
    nn.UpsamplingBilinear2d: {"scale_factor": 2},
    nn.AdaptiveMaxPool2d: {"output_size": 1},
    nn.AdaptiveAvgPool2d: {"output_size": 1},
    nn.SyncBatchNorm: {"num_features": 8},
    nn.Flatten: {"start_dim": 1, "end_dim": 1},
    nn.Linear: {"in_features": 8, "out_features": 8},
    nn.LayerNorm: {"normalized_shape": 8},
    nn.RMSNorm: {"normalized_shape": 8},
}
OF_LAST_AXIS = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
OF_MORE_INPUTS = (nn.MaxUnpool2d, nn.MultiheadAttention)
# All other modules of torch with a rule are built without arguments, where they can be.
ARGUMENTS |= {
    kind: {}  # type: ignore[misc]
    for kind in _RULES
    if kind in vars(nn).values() and kind not in ARGUMENTS and kind not in OF_MORE_INPUTS
}


def others(value: Any) -> list[Any]:
    """Other values for an argument."""
    if isinstance(value, bool) or value is None:
        return [True, 2, 0.3] if value is None else [not value]
    if isinstance(value, str):
        return [other for other in ("reflect", "bilinear", "nearest", "tanh") if other != value]
    return [value + 1, value * 2 + 1] if isinstance(value, int | float) else []


def variants(kind: type[nn.Module]) -> list[dict[str, Any]]:
    """The arguments of a class, each in turn with other values."""
    own = ARGUMENTS[kind]
    stated = {
        name: own.get(name, parameter.default)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in ("device", "dtype", "args", "kwargs")
    }
    return [own | {name: other} for name, value in stated.items() for other in others(value)]


def problem(kind: type[nn.Module], arguments: dict[str, Any], as_attributes: bool) -> str:
    """Return what is wrong after a change by other arguments; "" if it is followed or refused, or cannot be made."""
    model, image = Around(kind(**ARGUMENTS[kind])).eval(), torch.rand(2, 3, 48, 72)
    changed = copy.deepcopy(model)
    try:
        module = kind(**arguments)
        changed.module = module
        changed.eval()(image)
    except Exception:  # arguments that do not fit; torch raises any error
        return ""
    net = cs.adaptify(
        model, mask="none", example_input=torch.rand(1, 3, 48, 48), outputs="native", verify_laws=False
    )
    if as_attributes:
        changed = copy.deepcopy(model)
        for place in (net.module, changed.module):
            for name, value in vars(module).items():
                if not name.startswith("_"):
                    setattr(place, name, value)
    else:
        net.module = copy.deepcopy(module)
    try:
        expected = changed.eval()(image)
    except Exception:  # as above
        return ""
    try:
        found = net(image)
    except cs.InvalidInput as refusal:
        return "" if "not the module that was converted" in refusal.what else str(refusal)
    return (
        ""
        if found.shape == expected.shape and relative_error(found, expected) < 1e-4
        else "is silently wrong"
    )


@pytest.mark.slow
@pytest.mark.parametrize("as_attributes", [False, True], ids=["exchanged", "set"])
@pytest.mark.parametrize("kind", ARGUMENTS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_any_argument_of_any_class_is_followed_or_refused(kind: type[nn.Module], as_attributes: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of conversions without effect, and deprecated classes
        problems = {str(other): problem(kind, other, as_attributes) for other in variants(kind)}
    assert not {other: text for other, text in problems.items() if text}
