"""However an operation is spelled, the converted network computes it with the arguments that it was given.

Functions, methods and modules pass arguments by place and by name; rules read them by torch's own signatures. Each call
below stands behind three strided convolutions and is compared with torch at a size the example did not have.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, slow, some
from networks import Encoded, converted_quietly
from torch import Tensor

import cadsurgery as cs

_random = torch.Generator().manual_seed(0)
WEIGHT, OF_GROUPS = (torch.randn(8, 8, 3, 3, generator=_random), torch.randn(8, 2, 3, 3, generator=_random))
BIAS, SCALE = torch.randn(8, generator=_random), torch.rand(8, generator=_random) + 0.5
BOTH, PLACES = (2, 3), torch.randn(1, 8, 5, 7, generator=_random)


def last(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)


def first(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2)


Calls = dict[str, Callable[[Tensor], Tensor]]

# Each has rules of its own, and no other test.
ALONE: Calls = {
    "padding by negative widths": lambda y: F.max_pool2d(
        F.pad(F.pad(y, (2, 2, 2, 2)), (0, -1, 0, -2)), 3, 1, 1
    ),
    "padding that crops one border": lambda y: F.conv2d(F.pad(y, (0, -1, 0, 1)), WEIGHT, padding=1),
    "two paddings of other values": lambda y: F.conv2d(F.pad(y, (1, 1, 1, 1), "reflect"), WEIGHT, padding=1),
    "conv_transpose2d of a weight that is computed": lambda y: F.conv_transpose2d(y, WEIGHT.to(y), padding=1),
    "every second sample": lambda y: F.interpolate(y, scale_factor=0.5),
    "the middle of four samples": lambda y: F.interpolate(y, scale_factor=0.5, mode="bilinear"),
    "the middle of sixteen": lambda y: F.interpolate(y, scale_factor=0.25, mode="bilinear"),
    "a value of every place": lambda y: y + F.interpolate(PLACES, size=y.shape[-2:], mode="bilinear"),
}

# Spellings that were not read as torch reads them.
MISREAD: Calls = {
    "avg_pool2d of the whole map by a divisor": lambda y: F.avg_pool2d(y, y.shape[-2:], divisor_override=7),
    "avg_pool2d of a window larger than the map": lambda y: F.avg_pool2d(y, 64, ceil_mode=True),
    "avg_pool2d of the whole map, and what there is": lambda y: F.avg_pool2d(y, y.shape[2:], ceil_mode=True),
    "avg_pool2d of a window wider than the map": lambda y: F.avg_pool2d(y, (3, 12), (3, 12), ceil_mode=True),
    "max_pool2d of a window larger than the map": lambda y: F.max_pool2d(y, 64, ceil_mode=True),
    "var: the third is unbiased": lambda y: torch.var(y, BOTH, False),
    "var: the fourth is keepdim": lambda y: torch.var(y, 1, False, True),
    "var as a method": lambda y: y.var(BOTH, False),
    "var of everything": lambda y: y.var(False).reshape(1, 1),
    "std": lambda y: torch.std(y, BOTH, False),
    "std: the fourth is keepdim": lambda y: y.std(BOTH, False, True),
    "mean of an input by name": lambda y: torch.mean(input=y, dim=BOTH),
    "conv2d of an input by name": lambda y: F.conv2d(input=y, weight=WEIGHT, padding=1, bias=BIAS),
    "pixel_shuffle of an input by name": lambda y: F.pixel_shuffle(input=y, upscale_factor=2),
    "interpolate of an input by name": lambda y: F.interpolate(input=y, scale_factor=2.0, mode="bilinear"),
    "fields of max": lambda y: torch.max(y, 1).values,
    "indices of max": lambda y: torch.max(y, 1, True).indices.float(),
    "fields of min as a method": lambda y: y.min(dim=1, keepdim=True).values,
    "fields of topk": lambda y: y.topk(3, 1).values,
    "fields of sort": lambda y: y.sort(1).indices.float(),
    "median of everything": lambda y: y - last(y).median(),
    "nanmedian of everything": lambda y: y - last(y).nanmedian(),
    "fields of median": lambda y: y.median(1).values,
    "weights in float32 that are no buffers": lambda y: F.conv2d(y, WEIGHT, BIAS, 1, 1),
}

SPELLINGS: Calls = {
    "avg_pool2d, names": lambda y: F.avg_pool2d(
        y, kernel_size=3, stride=1, padding=1, count_include_pad=False
    ),
    "avg_pool2d of the whole map": lambda y: F.avg_pool2d(y, y.shape[-2:]),
    "max_pool2d of the whole map": lambda y: F.max_pool2d(y, y.shape[2:], y.shape[2:]),
    "var, names": lambda y: y.var(dim=BOTH, correction=0, keepdim=True),
    "std, unbiased": lambda y: torch.std(y, dim=[2, 3], keepdim=True, unbiased=True),
    "amin": lambda y: torch.amin(y, BOTH, True),
    "norm": lambda y: y.norm(2, BOTH, True),
    "vector_norm": lambda y: torch.linalg.vector_norm(y, 2, BOTH),
    "softmax in float64": lambda y: torch.softmax(y, 1, torch.float64).float(),
    "normalize, names": lambda y: F.normalize(y, dim=1, p=1.0),
    "max, names": lambda y: torch.max(y, dim=1, keepdim=True)[0],
    "min of two": lambda y: torch.min(y, y * 0.5 + 0.2),
    "split": lambda y: torch.split(y, split_size_or_sections=[2, 6], dim=1)[1],
    "concat": lambda y: torch.concat([y, y * 2], axis=1),
    "stack": lambda y: torch.stack(tensors=(y, y * 2), dim=1).sum(1),
    "group_norm, names": lambda y: F.group_norm(y, num_groups=2, eps=0.1),
    "instance_norm": lambda y: F.instance_norm(y, None, None, SCALE.to(y), BIAS.to(y), True, 0.1, 0.01),
    "layer_norm, names": lambda y: first(F.layer_norm(last(y), normalized_shape=(8,), eps=0.3)),
    "conv2d, same": lambda y: F.conv2d(y, WEIGHT, padding="same", dilation=2),
    "conv_transpose2d": lambda y: F.conv_transpose2d(y, WEIGHT, BIAS, 1, 1),
    "pad": lambda y: F.conv2d(F.pad(y, (1, 1, 1, 1), "constant", 0.5), WEIGHT),
    "pad, names": lambda y: F.conv2d(F.pad(y, pad=[1, 1, 1, 1], mode="reflect"), WEIGHT),
    "adaptive_avg_pool2d": lambda y: F.adaptive_avg_pool2d(y, output_size=(2, 1)),
    "leaky_relu": lambda y: F.leaky_relu(y - 0.5, negative_slope=0.3),
    "gelu": lambda y: F.gelu(y - 0.5, approximate="tanh"),
}


def check(call: Callable[[Tensor], Tensor]) -> None:
    """The converted network and its optimised copy compute the call as torch does, or it is refused with a reason."""
    model, other = Encoded(lambda own, image, y: call(y)).eval(), torch.rand(2, 3, 56, 88)
    try:
        net = converted_quietly(model, example_input=torch.rand(2, 3, 64, 64))
    except cs.CannotConvert as refusal:
        assert "not exact" not in refusal.what and "does not run" not in refusal.what
        return
    with torch.no_grad():
        expected = model(other)
        for found in (net(other), net.optimize()(other)):
            assert found.shape == expected.shape
            assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", [*ALONE, *some([*MISREAD, *map(slow, SPELLINGS)], every=4)])
def test_calls_are_computed_as_torch_does_however_they_are_spelled(name: str) -> None:
    check((ALONE | MISREAD | SPELLINGS)[name])
