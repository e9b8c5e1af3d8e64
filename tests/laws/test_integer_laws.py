"""Laws of 8 bits: sums are exact, what becomes of them is the same bit for bit in every form of the code."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.int8_kernels import Convolution, forms_here
from cadsurgery.kernels import isa
from cadsurgery.kernels.packing import takes
from cadsurgery.network.export.rounding import QuantParams

FORMS = forms_here()
BOUNDS = {"none": (0, 255), "relu": (30, 255), "narrow": (12, 160)}
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
    "a product": (70, 33, 40, 1, 0),
    "no rows": (0, 8, 8, 1, 9),
}


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


def convolution(shape: str, bounds: str, adds: bool, is_limited: bool) -> Convolution:
    """One whose results are spread over 0..255, and beyond: it reads elements, what is outside, and a halo."""
    count, inputs, outputs, groups, taps = SHAPES[shape]
    weight = torch.randint(-127, 128, (outputs, inputs // groups, max(taps, 1), 1), dtype=torch.int8)
    halo = bytes_of(8 if count else 0, inputs)
    return Convolution(
        bytes_of(count, inputs),
        limit(weight) if is_limited else weight,
        (torch.rand(outputs) + 0.2) / (20 * weight[0].numel() ** 0.5),
        100 + 9 * torch.randn(outputs),
        11,
        groups,
        torch.randint(0, count + 1 + len(halo), (count, taps)).int() if taps else None,
        halo,
        bytes_of(count, outputs) if adds else None,
        0.37,
        *BOUNDS[bounds],
    )


CASES = [
    (form, shape, bounds, adds)
    for form, adds in product(FORMS, (False, True))
    for shape, bounds in zip(SHAPES, cycle(BOUNDS), strict=False)
    if convolution(shape, bounds, adds, "limited" in form).takes(form)
]


@pytest.mark.parametrize(("form", "shape", "bounds", "adds"), CASES, ids=str)
def test_compiled_code_gives_the_bits_of_the_reference(
    form: str, shape: str, bounds: str, adds: bool
) -> None:
    work = convolution(shape, bounds, adds, "limited" in form)
    expected = work.by_torch()
    assert torch.equal(work.call(form, work.packed(form)), expected)
    assert len(expected.unique()) > 20 or not len(expected)


def test_every_form_computes_some_convolution_and_every_shape_has_a_form() -> None:
    assert {form for form, *_ in CASES} == {*FORMS}
    assert {shape for _, shape, *_ in CASES} == ({*SHAPES} if FORMS else set())


@pytest.mark.parametrize("form", forms_here(("convolve_limited", "convolve")))
@pytest.mark.parametrize("zero", [0, 255])
def test_the_largest_sums_are_exact(form: str, zero: int) -> None:
    """Where products of bytes that are added in 16 bits would saturate."""
    most = 64 if "limited" in form else 127
    weight, sums = torch.full((16, 2048, 1, 1), -most, dtype=torch.int8), (2 * zero - 255) * most * 2048
    rows = torch.full((7, 2048), 255 - zero, dtype=torch.uint8)
    work = Convolution(rows, weight, torch.ones(16), torch.full((16,), 100.0 - sums), zero)
    assert torch.equal(work.call(form, work.packed(form)), torch.full((7, 16), 100, dtype=torch.uint8))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("pair", [(127, 1), (64, 64), (127, -127), (1, 127)])
def test_weights_at_the_limit_are_exact_and_beyond_it_are_for_another_form(
    pair: tuple[int, int], sign: int
) -> None:
    """At every place of a vector."""
    weight = sign * torch.tensor(pair, dtype=torch.int8).repeat(4).view(1, 8, 1, 1)
    rows = bytes_of(37, 8)
    rows[::5] = 255
    scale, bias = torch.full((19,), 1 / 1024), torch.full((19,), 100.0)
    for output in range(19):
        whole = torch.zeros(19, 8, 1, 1, dtype=torch.int8)
        whole[output] = weight
        for more in (0, 1):  # one more is beyond the limit unless the signs differ
            whole[output, 0] += more * sign if abs(whole[output, 0]) < 127 else 0
            whole[output, 1] += more * sign if pair[0] == 127 and pair[1] > 0 else 0
            if "avx2" in isa.allowed():
                assert takes("convolve_limited_avx2", whole, 1) == (not more or pair[1] < 0)
            work = Convolution(rows, whole, scale, bias)
            for form in filter(work.takes, FORMS):
                assert torch.equal(work.call(form, work.packed(form)), work.by_torch())


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_grid_has_zero_and_both_ends(low: float, high: float) -> None:
    grid: Any = QuantParams.of_range(low, high)
    for value in (0.0, min(low, 0.0), max(high, 0.0)):
        number = max(0, min(255, round(value / grid.scale) + grid.zero))
        back = (number - grid.zero) * grid.scale
        assert back == 0 if value == 0 else abs(back - value) <= grid.scale / 2 + 1e-6
