"""Laws of 8 bits: sums are exact, what becomes of them is the same bit for bit in every form of the code."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import covering, without_kernels
from torch import Tensor

from benchmarks.int8_kernels import forms_here
from cadsurgery.elements import BACKENDS
from cadsurgery.elements.backends import integer
from cadsurgery.elements.backends.choose import Picking, Pooling
from cadsurgery.elements.backends.integer import (
    IntegerConvolution,
    Integers,
    IntegerWeights,
    QuantParams,
    convolve,
)
from cadsurgery.elements.backends.integer_layers import IntegerConv, IntegerLinear, max_pool_bytes
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Reading
from cadsurgery.elements.lattice import Geometry
from cadsurgery.elements.whole_image import global_mean
from cadsurgery.kernels import isa

TORCH: Any = BACKENDS[-1]
NATIVE: Any = next(backend for backend in BACKENDS if backend.name == "native")
FORMS = ("", *forms_here())  # "": as it is chosen
ACTIVATIONS = {
    "none": None,
    "relu": Activation("relu"),
    "relu6": Activation("hardtanh", (0.0, 6.0)),
    "hardswish": Activation("hardswish"),
}
SHAPES = {  # rows, channels, outputs, groups, taps
    "odd": (97, 37, 45, 1, 9),
    "whole chunks": (64, 128, 128, 1, 9),
    "few rows": (5, 3, 21, 1, 4),
    "one tap": (200, 130, 70, 1, 1),
    "groups": (100, 24, 48, 4, 9),
    "depthwise": (100, 30, 30, 30, 9),
    "depthwise, whole vectors": (100, 64, 64, 64, 9),
    "depthwise, half a vector left": (97, 96, 96, 96, 9),
    "depthwise, more than half": (33, 110, 110, 110, 9),
    "depthwise, many taps": (51, 80, 80, 80, 25),
    "no rows": (0, 8, 8, 1, 9),
}
ADDED = {"alone": None, "residual in 8 bits": QuantParams(0.02, 7), "residual": "float"}


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def limit(weight: Tensor) -> Tensor:
    """Let each second channel, together with the one before it, have weights that sum to 128 at most."""
    pairs = weight.short()[:, : weight.shape[1] // 2 * 2].unflatten(1, (-1, 2))
    rest = 128 - pairs[:, :, 0].abs()
    second = torch.minimum(torch.maximum(pairs[:, :, 1], -rest), rest)
    limited = weight.clone()
    limited[:, 1::2] = second.to(weight.dtype)
    return limited


def weights_of(
    outputs: int, inputs: int, kernel: tuple[int, int], groups: int = 1, form: str = "", **options: Any
) -> IntegerWeights:
    """Weights whose results are spread over a grid, and beyond its ends; limited for the forms that need it."""
    weight = torch.randint(-127, 128, (outputs, inputs // groups, *kernel), dtype=torch.int8)
    weight = limit(weight) if form.startswith("limited") else weight
    scale = torch.rand(outputs) / weight[0].numel() / 100 + 1e-4
    return IntegerWeights(
        weight,
        scale,
        torch.randn(outputs),
        groups,
        source=QuantParams(0.03, 11),
        **{"activation": None, **options},
    )


def reading_of(count: int, taps: int, halo: int = 8) -> Reading:
    """A table that reads elements, what is outside, and rows between elements."""
    table = torch.randint(0, count + 1 + (halo if count else 0), (count, taps)).int()
    shares = torch.tensor([0.25, 0.5, 0.125, 0.125]).double().repeat(halo if count else 0, 1)
    return Reading(table, torch.randint(0, max(count, 1), (len(shares), 4)).int(), shares, True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "act", "added", "out"),
    covering(
        list(SHAPES), list(ACTIVATIONS), list(ADDED), [None, QuantParams(0.05, 30), QuantParams(0.0004, 128)]
    ),
)
def test_compiled_code_gives_the_bits_of_the_reference(
    form: str, shape: str, act: str, added: str, out: Any
) -> None:
    count, inputs, outputs, groups, taps = SHAPES[shape]
    more, kernel = ADDED[added], {9: (3, 3), 25: (5, 5)}.get(taps, (taps, 1))
    grid = more if isinstance(more, QuantParams) else None
    options: Any = {"activation": ACTIVATIONS[act], "more": grid, "out": out}
    weights = weights_of(outputs, inputs, kernel, groups, form, **options)
    residual = torch.randn(count, outputs) if more == "float" else None
    residual = bytes_of(count, outputs) if grid is not None else residual
    work = IntegerConvolution(bytes_of(count, inputs), weights, reading_of(count, taps), residual)
    expected = TORCH.convolve_integers(work)
    found = Integers().convolve_integers(work, form)
    assert found.dtype == (torch.float32 if out is None else torch.uint8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_sums_are_exact(form: str) -> None:
    """Where products of bytes that are added in 16 bits would saturate."""
    most = 64 if form.startswith("limited") else 127
    weight = torch.full((16, 2048, 1, 1), -most, dtype=torch.int8)
    for zero in (0, 255):
        weights = IntegerWeights(weight, torch.ones(16), None, 1, None, QuantParams(1.0, zero))
        rows = torch.full((7, 2048), 255 - zero, dtype=torch.uint8)
        found = Integers().convolve_integers(IntegerConvolution(rows, weights, None), form)
        assert torch.equal(found, torch.full((7, 16), (2 * zero - 255.0) * most * 2048))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("pair", [(127, 1), (64, 64), (127, -127), (1, 127)])
def test_weights_at_the_limit_are_exact_and_beyond_it_use_another_form(
    pair: tuple[int, int], sign: int
) -> None:
    """In the form that is chosen, at every place of a vector."""
    weight = sign * torch.tensor(pair, dtype=torch.int8).repeat(4).view(1, 8, 1, 1)
    rows, source = bytes_of(37, 8), QuantParams(1.0, 0)
    rows[::5] = 255
    for output in range(19):
        whole = torch.zeros(19, 8, 1, 1, dtype=torch.int8)
        whole[output] = weight
        for more in (0, 1):  # one more is beyond the limit unless the signs differ
            whole[output, 0] += more * sign if abs(whole[output, 0]) < 127 else 0
            whole[output, 1] += more * sign if pair[0] == 127 and pair[1] > 0 else 0
            weights = IntegerWeights(whole, torch.ones(19), None, 1, None, source)
            if "avx2" in isa.here():
                assert weights.fits("convolve_limited_avx2") == (not more or pair[1] < 0)
            work = IntegerConvolution(rows, weights, None)
            assert torch.equal(Integers().convolve_integers(work), TORCH.convolve_integers(work))


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "stride", "padding", "dilation"),
    [
        (3, 1, (7, 7), (2, 2), (3, 3), (1, 1)),  # of an image: lines at once
        (1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
        (4, 1, (5, 3), (1, 2), (0, 2), (1, 1)),
        (3, 1, (3, 3), (1, 1), (1, 0), (2, 2)),
        (8, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
        (8, 1, (1, 1), (2, 2), (0, 0), (1, 1)),
        (8, 2, (3, 3), (1, 2), (1, 1), (1, 1)),
        (6, 6, (5, 3), (2, 1), (2, 1), (1, 2)),
    ],
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_dense_maps_are_convolved_as_torch_does(
    channels: int, groups: int, kernel: Any, stride: Any, padding: Any, dilation: Any, is_compiled: bool
) -> None:
    weights = weights_of(12, channels, kernel, groups)
    image = bytes_of(2, channels, 13, 11)
    layer = IntegerConv(weights, (stride, padding, dilation))
    exact = image.double() - weights.source.zero
    sums = F.conv2d(exact, weights.weight.double(), None, stride, padding, dilation, groups)
    known = weights.constants
    expected = (sums * known.scale.double().view(-1, 1, 1) + known.bias.double().view(-1, 1, 1)).float()
    with nullcontext() if is_compiled else without_kernels():
        for layout in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(layer(image.contiguous(memory_format=layout)), expected)


def test_what_is_pooled_and_read_between_bytes_is_of_their_values() -> None:
    image = bytes_of(2, 70, 9, 12)
    expected = F.max_pool2d(image.float(), 3, 2, 1)
    assert torch.equal(max_pool_bytes(image, (3, 3), (2, 2), (1, 1), (1, 1)).float(), expected)
    rows, reading = bytes_of(50, 37), reading_of(50, 9)
    for backend in (NATIVE, TORCH):
        pooled = backend.pool(Pooling(rows, reading, -torch.inf, largest=True))
        assert torch.equal(pooled, TORCH.pool(Pooling(rows, reading, -torch.inf, largest=True)))
        assert torch.equal(backend.pick(Picking(rows, reading)), TORCH.pick(Picking(rows, reading)))


def test_a_mean_of_bytes_is_of_their_values() -> None:
    grid, levels = (
        QuantParams(0.03, 11),
        torch.randint(0, 3, (2, 5, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2),
    )
    lattice = Geometry((2, 2)).lattice(levels[:, :19, :15]).at(2)
    rows = bytes_of(len(lattice), 37)
    found = global_mean(Elements(rows, lattice))
    expected = global_mean(Elements(grid.dequantise(rows).double(), lattice))
    torch.testing.assert_close(grid.dequantise(found).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "swish", "leaky_relu"])
def test_an_activation_that_is_not_fused_comes_after(name: str) -> None:
    act = Activation(name, (0.1,) if name == "leaky_relu" else (), "none")
    weights = weights_of(20, 16, (1, 1), activation=act, more=QuantParams(0.02, 7), out=QuantParams(0.05, 30))
    residual = bytes_of(90, 20)
    found = convolve(IntegerConvolution(rows := bytes_of(90, 16), weights, None, residual))
    product = convolve(IntegerConvolution(rows, weights.without_activation, None))
    values = act.apply_(product + QuantParams(0.02, 7).dequantise(residual))
    assert torch.equal(found, QuantParams(0.05, 30).quantise(values))


def test_a_linear_layer_keeps_the_other_axes() -> None:
    layer = IntegerLinear(weights_of(20, 16, (1, 1)))
    values = bytes_of(2, 5, 7, 16)
    assert torch.equal(layer(values).view(-1, 20), layer(values.view(-1, 16)))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_grid_has_zero_and_both_ends(low: float, high: float) -> None:
    grid = QuantParams.of_range(low, high)
    ends = torch.tensor([0.0, min(low, 0.0), max(high, 0.0)])
    assert torch.equal(grid.dequantise(grid.quantise(ends))[0], torch.tensor(0.0))
    assert (grid.dequantise(grid.quantise(ends)) - ends).abs().max() <= grid.scale / 2 + 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_are_rounded_alike_in_every_layout(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, values = QuantParams.of_range(-2.0, 3.0), 2 * torch.randn(2, 5, 7, 9)
    found = grid.quantise(values.contiguous(memory_format=layout))
    back = grid.dequantise(found)
    monkeypatch.setattr(integer, "isa_of", lambda name: "")
    assert torch.equal(found, grid.quantise(values))
    assert torch.equal(back, grid.dequantise(found))
