"""Laws of the Triton convolution; `test_gpu_kernel.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 the kernels run on the CPU and sizes are small; otherwise they run on the GPU.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from networks import SmallUNet
from torch import Tensor, nn
from torch.testing import assert_close

import cadsurgery as cs
from cadsurgery.elements.backends import gpu, gpu_maps, gpu_norm, triton_kernels
from cadsurgery.elements.backends.choose import CHOICES, choose, compute
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.elements.backends.triton_backend import Triton
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import Convolution, Pooling, WindowRead, extend
from cadsurgery.elements.functional import Elements, batch_norm, to_dense
from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Bounds, CellSearch, Geometry, Lattice

DEVICE = torch.device("cpu" if triton_kernels.INTERPRETED else "cuda")
COUNT = 37 if triton_kernels.INTERPRETED else 5000
# Outputs, input channels, output channels. On a GPU wide ones too, for which every configuration is tuned.
SHAPES = [
    (1, 70, 33),
    (COUNT, 5, 70),
    (130, 33, 5),
    *([] if triton_kernels.INTERPRETED else [(COUNT, 256, 320)]),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def random_table(count: int, taps: int, rows: int) -> Tensor:
    """Some entries read zero, and row 0 is read by many."""
    table = torch.randint(-rows // 8, rows, (count, taps))
    table[torch.rand(count, taps) < 0.1] = 0
    return table.clamp(min=-1).to(DEVICE, torch.int32)


def operands(count: int, channels: int, outputs: int, taps: int, dtype: torch.dtype, groups: int = 1) -> Any:
    """Rows, weight and table; products of about unit size."""
    rows = random(2 * count + 3, channels, dtype=dtype)
    depth = taps * (channels // groups)
    weight = random(outputs, depth, dtype=dtype) / depth**0.5
    return rows, weight, random_table(count, taps, len(rows))


ACTIVATIONS = {
    "none": None,
    "relu": Activation("relu"),
    "relu6": Activation("hardtanh", (0.0, 6.0)),
    "silu": Activation("swish"),
    "hardswish": Activation("hardswish"),
    "gelu": Activation("gelu", (), "none"),
    "sigmoid": Activation("sigmoid"),
    "leaky_relu": Activation("leaky_relu", (0.1,)),
    "tanh": Activation("tanh"),  # which the kernels have not
}


def reference(
    rows: Tensor,
    weight: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    groups: int = 1,
) -> Tensor:
    """Gather, multiply, finish: in float64, in the type of the rows at the end."""
    padded = torch.cat([rows, torch.zeros_like(rows[:1])]).double()
    gathered = padded[torch.where(table < 0, len(rows), table).long()]
    by_group = gathered.unflatten(2, (groups, -1))  # (N, taps, groups, C / groups)
    kernel = weight.double().unflatten(0, (groups, -1)).unflatten(2, (table.shape[1], -1))
    out = torch.einsum("ntgc,gotc->ngo", by_group, kernel).flatten(1)
    out = out if bias is None else out + bias.double()
    out = out if residual is None else out + residual.double()
    out = activation.apply_(out) if activation is not None else out
    return out.to(rows.dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "taps", "dtype"),
    [
        pytest.param(*case, marks=() if at % 4 == 0 else pytest.mark.slow)  # of each some by default
        for at, case in enumerate(product(SHAPES, (1, 9), gpu.DTYPES))
    ],
)
def test_it_is_gathering_and_multiplying(shape: tuple[int, int, int], taps: int, dtype: torch.dtype) -> None:
    rows, weight, table = operands(*shape, taps, dtype)
    close(gpu.gather_conv(rows, weight, table), reference(rows, weight, table))
    if taps == 9 and shape[0] == COUNT:  # depthwise, too, and with more taps
        for more in (taps, 49):
            rows, weight, table = operands(COUNT, 37, 37, more, dtype, groups=37)
            given: Any = {"bias": random(37, dtype=dtype), "residual": random(COUNT, 37, dtype=dtype)}
            given |= {"activation": ACTIVATIONS["silu"], "groups": 37}
            found = gpu.gather_conv(rows, weight, table, **given)
            close(found, reference(rows, weight, table, **given))


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_bias_residual_and_activation_follow_the_sum(activation: Activation | None) -> None:
    rows, weight, table = operands(20, 6, 9, 2, torch.float32)
    parts = {"bias": random(9), "residual": 3 * random(20, 9)}
    for present in product((False, True), repeat=2):
        given: Any = {key: part for (key, part), here in zip(parts.items(), present, strict=True) if here}
        found = gpu.gather_conv(rows, weight, table, **given, activation=activation)
        close(found, reference(rows, weight, table, **given, activation=activation))


def with_halo(rows: Tensor, halo: gpu.Halo, outside: int, table: Tensor, **more: Any) -> Tensor:
    """The reference of a convolution whose table names halo rows behind a row of zeros, `outside`."""
    mixed = (rows[halo.sources.long()] * halo.shares.to(rows).unsqueeze(2)).sum(1)
    return reference(torch.cat([rows, 0 * rows[:1], mixed]), table=table, **more)


def random_halo(rows: int, count: int) -> gpu.Halo:
    """Row 0 is read by many, row 9 by none, and some sources have no weight."""
    sources = (torch.randint(rows, (count, 4)) - 10).clamp(min=0)
    shares = torch.rand(count, 4, dtype=torch.float64)
    sources[sources == 9] = 8
    shares[torch.rand(count, 4) < 0.2] = 0
    return gpu.Halo(sources.to(DEVICE, torch.int32), shares.to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_halo_rows_stand_behind_the_rows_and_the_padding(groups: int, dtype: torch.dtype) -> None:
    """With gradients, which are the same every time."""
    rows, weight, table = operands(COUNT, 12, 12, 9, dtype, groups)
    halo, outside = random_halo(len(rows), 7), len(rows)
    table = torch.where(table % 5 == 3, outside + 1 + table % 7, table)
    table[table == 1] = outside
    options: Any = {"groups": groups, "halo": halo, "outside": outside}
    close(
        gpu.gather_conv(rows, weight, table, **options),
        with_halo(rows, weight=weight, table=table, **options),
    )
    parts = {"rows": rows, "weight": weight}
    found = gradients(gpu.gather_conv, parts, table, **options)
    expected = gradients(with_halo, {key: part.double() for key, part in parts.items()}, table, **options)
    for key, value in expected.items():
        assert float((found[key] - value).norm() / value.norm()) < TOLERANCE[dtype], key
    again = gradients(gpu.gather_conv, parts, table, **options)
    assert all(torch.equal(found[key], again[key]) for key in parts)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_blended_rows_are_weighted_sums_and_the_unused_are_not_computed(dtype: torch.dtype) -> None:
    rows, shares = random(50, 300, dtype=dtype), torch.rand(COUNT, 4, dtype=torch.float64).to(DEVICE)
    sources = torch.randint(50, (COUNT, 4), device=DEVICE, dtype=torch.int32)
    expected = (rows.double()[sources.long()] * shares.unsqueeze(2)).sum(1).to(dtype)
    close(gpu.blend(rows, sources, shares), expected)
    used = torch.tensor(COUNT // 2, device=DEVICE)
    close(gpu.blend(rows, sources, shares, used)[: COUNT // 2], expected[: COUNT // 2])


@pytest.mark.skipif(triton_kernels.INTERPRETED, reason="the interpreter has one precision")
@pytest.mark.parametrize(("allowed", "tolerance"), [(False, 1e-4), (True, 1e-2)])
def test_float32_is_multiplied_as_torch_may(
    allowed: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within TF32's rounding where the user allows it, else to float32's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    rows, weight, table = operands(COUNT, 256, 128, 9, torch.float32)
    found, expected = gpu.gather_conv(rows, weight, table), reference(rows, weight, table)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(triton_kernels.INTERPRETED, reason="it takes ten gigabytes")
@pytest.mark.parametrize("groups", [1, 64])
def test_places_beyond_32_bits(groups: int) -> None:
    """Rows, and results, of more than 2 ** 31 values."""
    channels, count = 64, 2**25 + 700
    rows = torch.randn(4096, channels, device=DEVICE, dtype=torch.bfloat16).repeat(-(-count // 4096), 1)[
        :count
    ]
    weight = random(channels, channels if groups == 1 else 1, dtype=torch.bfloat16) / 8
    table = torch.arange(count, device=DEVICE, dtype=torch.int32).flip(0).unsqueeze(1)
    found = gpu.gather_conv(rows, weight, table, groups=groups)
    for part in (slice(0, 100), slice(count - 100, count)):
        close(found[part], reference(rows, weight, table[part], groups=groups))


def test_no_outputs() -> None:
    for groups in (1, 5):
        rows, weight, _ = operands(3, 5, 5, 9, torch.float32, groups)
        table = torch.empty(0, 9, dtype=torch.int32, device=DEVICE)
        out = gpu.gather_conv(rows.requires_grad_(), weight.requires_grad_(), table, groups=groups)
        assert out.shape == (0, 5)
        gradients = torch.autograd.grad(out.sum(), (rows, weight))
        assert [float(gradient.abs().sum()) for gradient in gradients] == [0, 0]


def gradients(convolution: Any, parts: dict[str, Tensor], table: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = {key: part.clone().requires_grad_() for key, part in parts.items()}
    out = convolution(table=table, **leaves, **options)
    torch.manual_seed(1)
    grad = random(*out.shape, dtype=out.dtype)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


@pytest.mark.parametrize(
    ("activation", "groups"),
    [
        pytest.param(
            *case, marks=() if case == ("relu", 33) else pytest.mark.slow
        )  # below groups of one, too
        for case in product(("relu", "none", "relu6", "gelu", "leaky_relu"), (1, 3, 33))
    ],
)
def test_gradients_are_those_of_the_reference_and_the_same_every_time(activation: str, groups: int) -> None:
    outputs = {1: 70, 3: 60, 33: 33}[groups]
    # More than 256 outputs: the weight's gradient is summed in several shares.
    rows, weight, table = operands(COUNT, 33, outputs, 9, torch.float32, groups)
    parts = {
        "rows": rows,
        "weight": weight,
        "bias": random(outputs),
        "residual": 3 * random(len(table), outputs),
    }
    options: Any = {"activation": ACTIVATIONS[activation], "groups": groups}
    found = gradients(gpu.gather_conv, parts, table, **options)
    expected = gradients(reference, parts, table, **options)
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=key)
    again = gradients(gpu.gather_conv, parts, table, **options)
    assert all(torch.equal(found[key], again[key]) for key in parts)


def bounded(levels: Tensor, geometry: Geometry) -> Lattice:
    """The lattice of a level map with bounds: with rows of padding, or as on a GPU with exact numbers."""
    lattice = geometry.lattice(levels.cpu())
    counts = [len(lattice.at(stage)) for stage in range(geometry.stages)]
    return geometry.lattice(levels, Bounds(tuple(counts), tuple(count + 3 for count in counts)))


@pytest.mark.parametrize("fill", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("kernel", "spacing", "dilation", "size"),
    [((3, 3), 1, 1, (9, 11)), ((5, 3), 2, 2, (13, 8)), ((1, 1), 1, 1, (9, 11)), ((3, 1), 4, 1, (9, 10))],
)
def test_kernel_maps_read_what_those_of_torch_read(
    fill: Any, kernel: tuple[int, int], spacing: int, dilation: int, size: tuple[int, int], monkeypatch: Any
) -> None:
    """Between lattices of two stages, cropped, with a halo of which only what is read is mixed."""
    geometry = Geometry((2, 2), fill=fill)
    levels = torch.randint(0, 3, (2, 9, 11)).to(DEVICE)
    pads = (kernel[0] // 2 * dilation,) * 2 + (kernel[1] // 2 * dilation,) * 2
    window = Window(kernel, 1, (dilation, dilation), pads, spacing=spacing)

    def read() -> tuple[Tensor, Tensor, Tensor]:
        lattice = bounded(levels, geometry)
        height, width = (min(pair) for pair in zip(size, (9, 11), strict=True))
        source, target = lattice.at(1, (height, width)), lattice.at(2, (height, width))
        torch.manual_seed(0)
        rows = random(len(source), 3)
        reading = kernel_map(source, target, window)
        taps = extend(rows, reading, 0.0)[reading.table.long()]
        dense = to_dense(Elements(rows, source))
        return taps[: int(target.counts.sum())], dense, source.index

    search = CellSearch(levels, bounded(levels, geometry))
    assert Triton().applies(search)
    found = read()
    monkeypatch.setattr(gpu_maps, "available", lambda device: False)
    CHOICES.clear()
    for one, other in zip(found, read(), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def mixed_lattice(padded: bool) -> Lattice:
    """Cells of three sizes in two images, some cropped; with rows of padding if asked for."""
    geometry, levels = Geometry((2, 2)), torch.randint(0, 3, (2, 13, 18)).to(DEVICE)
    return (bounded(levels, geometry) if padded else geometry.lattice(levels)).at(2)


def norm_of(channels: int, dtype: torch.dtype, **options: Any) -> nn.BatchNorm2d:
    """A batch norm in training, whose parameters differ by channel."""
    norm = nn.BatchNorm2d(channels, **options).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, channels))
    return norm


def normalised(
    norm: nn.BatchNorm2d, rows: Tensor, grad: Tensor, lattice: Lattice, weighted: bool
) -> dict[str, Tensor]:
    """The rows behind a batch norm, all gradients, and the running statistics."""
    leaf = rows.clone().requires_grad_()
    out = batch_norm(Elements(leaf, lattice), norm, weighted=weighted).rows
    named = dict(norm.named_parameters())
    found = torch.autograd.grad(out, [leaf, *named.values()], grad.to(out.dtype))
    return {"out": out, **dict(zip(("rows", *named), found, strict=True)), **dict(norm.named_buffers())}


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize(
    ("channels", "padded", "weighted", "options"),
    [
        (5, False, True, {}),
        (70, True, True, {"momentum": None}),
        (33, True, False, {"affine": False}),
        (264, True, True, {"track_running_stats": False}),
    ],
)
def test_weighted_batch_norm_is_that_of_the_reference_and_the_same_every_time(
    channels: int, padded: bool, weighted: bool, options: Any, dtype: torch.dtype, monkeypatch: Any
) -> None:
    """Values, gradients and running statistics in float64 without the kernels; padding is not read, whatever it is.

    The parameters are float32, as under autocast. A mean far from zero costs no digits."""
    lattice = mixed_lattice(padded)
    real = lattice.real if lattice.real is not None else torch.ones(len(lattice), dtype=torch.bool)
    assert bool(real.all()) != padded
    rows, grad = (
        3 * random(len(lattice), channels, dtype=dtype) + 20,
        random(len(lattice), channels, dtype=dtype),
    )
    rows[~real] = torch.inf
    norms = [norm_of(channels, kind, **options) for kind in (torch.float32, torch.float32, torch.float64)]
    found, again = (normalised(norm, rows, grad, lattice, weighted) for norm in norms[:2])
    expected = normalised(norms[2], rows.double(), grad, lattice, weighted)
    assert found["out"].dtype == found["rows"].dtype == dtype and not found["rows"][~real].any()
    tolerance = TOLERANCE[dtype] if dtype != torch.float32 else 2e-5
    for key, value in expected.items():
        same = real if key in ("out", "rows") else ...
        error = (found[key] - value)[same].double().norm() / value[same].double().norm()
        # Statistics and gradients of parameters are sums in float32 of what is in the rows.
        assert error <= (tolerance if key in ("out", "rows") else 2e-5), key
        assert torch.equal(found[key][same], again[key][same]), key


def test_a_step_of_training_is_that_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole network: loss, every gradient and every buffer."""
    layers: list[nn.Module] = []
    for stride, width in ((2, 6), (2, 8), (2, 12)):
        before = layers[-2].num_features if layers else 3
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    image = random(2, 3, 32, 48)
    net = cs.adaptify(
        nn.Sequential(*layers).to(DEVICE).eval(),
        "edges",
        output_stride=(2, 8),
        example_input=image,
        verify_laws=False,
    )
    state = {key: value.clone() for key, value in net.state_dict().items()}

    def step() -> dict[str, Tensor]:
        net.load_state_dict(state)
        net.train().zero_grad()
        loss = net(image, mask="edges | budget:fraction=0.4").square().mean()
        loss.backward()
        gradients = {key: part.grad for key, part in net.named_parameters() if part.grad is not None}
        return {
            "loss": loss.detach(),
            **gradients,
            **{key: part.clone() for key, part in net.named_buffers()},
        }

    calls: list[bool] = []
    normalise = gpu_norm.normalise
    monkeypatch.setattr(gpu_norm, "normalise", lambda *parts: calls.append(True) or normalise(*parts))
    found, again = step(), step()
    assert calls
    monkeypatch.setattr(gpu, "available", lambda device: False)
    CHOICES.clear()
    expected = step()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=key)
        assert torch.equal(found[key], again[key]), key


def clusters(share: float, size: tuple[int, int], side: int) -> Tensor:
    """Level maps (2, H, W) of two levels: cells of the coarsest level, of which a share is kept, cut at the border."""
    cells = [-(-length // side) for length in size]
    heights = F.interpolate(torch.rand(2, 1, 3, 3), size=cells, mode="bicubic")[:, 0]
    kept = heights.flatten().argsort().argsort().view_as(heights) < round(share * heights.numel())
    levels = torch.where(kept, 0, side.bit_length() - 1).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return levels[:, : size[0], : size[1]]


LEVELS = {
    **{f"{share} kept": clusters(share, (19, 25), 8) for share in (0, 0.1, 0.5, 1)},
    "many levels": torch.randint(0, 4, (2, 19, 25)),
}


class Windowed(NamedTuple):
    """A window on the maps of floors: its kernel, stride, dilation, the stages it goes between, and channel groups."""

    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    stages: tuple[int, int] = (1, 1)
    groups: int = 1
    channels: tuple[int, int] = (5, 33)
    fill: Any = "linear"


WINDOWS = {
    "3x3 on the finest grid": Windowed(),
    "3x3 on a coarser grid": Windowed(stages=(2, 2), channels=(33, 5)),
    "dilated": Windowed(dilation=2),
    "5x5": Windowed(kernel=5),
    "strided": Windowed(stride=2, stages=(1, 2)),
    "even": Windowed(kernel=2, stride=2, stages=(2, 3)),
    "from a dense map": Windowed(stages=(0, 1)),
    "on the coarsest grid": Windowed(stages=(4, 4)),
    "in groups": Windowed(groups=3, channels=(12, 6)),
    "depthwise": Windowed(groups=6, channels=(6, 6)),
    "nearest": Windowed(fill="nearest"),
}


def floor_lattices(levels: Tensor, case: Windowed) -> tuple[Window, tuple[Lattice, ...]]:
    """The window with its lattices: source and target on a GPU with bounds, then on the CPU without."""
    geometry = Geometry((2, 2, 2), floors=True, fill=case.fill)
    before, after = case.stages
    pad = case.kernel // 2 * case.dilation if case.kernel % 2 else 0
    spacing = geometry.sides[max(before - 1, 0)]
    window = Window((case.kernel,) * 2, case.stride, (case.dilation,) * 2, (pad,) * 4, spacing=spacing)
    size = window.output_size((19, 25))
    maps = (bounded(levels.to(DEVICE), geometry), geometry.lattice(levels))
    return window, tuple(one for whole in maps for one in (whole.at(before, (19, 25)), whole.at(after, size)))


def rows_of(source: Lattice, channels: int, dtype: torch.dtype, room: int) -> tuple[Tensor, Tensor]:
    """Rows in float64 on the CPU, and the same with NaN in the rows of padding, which nothing may read."""
    rows = torch.randn(len(source), channels).to(dtype)
    padded = F.pad(rows, (0, 0, 0, room - len(rows)), value=torch.nan)
    return rows.double(), padded.to(DEVICE)


@pytest.mark.parametrize(
    ("levels", "case", "dtype"),
    [
        pytest.param(*pair, gpu.DTYPES[(at + at // len(WINDOWS)) % 3], marks=marks)
        for at, pair in enumerate(product(LEVELS, WINDOWS))  # each in one type after the other
        for marks in [() if at % 12 == 2 else pytest.mark.slow]
    ],
)
def test_under_floors_a_convolution_is_that_of_the_reference(
    levels: str, case: str, dtype: torch.dtype
) -> None:
    """With bias, residual and activation; cells of one level, and of all, beside each other and cut at the border."""
    how = WINDOWS[case]
    window, (source, target, plain, plain_target) = floor_lattices(LEVELS[levels], how)
    inner, outer = how.channels
    exact, rows = rows_of(plain, inner, dtype, len(source))
    more = torch.randn(len(plain_target), outer).to(dtype)
    weight = (torch.randn(outer, inner // how.groups, how.kernel, how.kernel) / how.kernel).to(dtype)
    bias, relu = torch.randn(outer).to(dtype), Activation("relu")
    on_gpu = (weight.to(DEVICE), bias.to(DEVICE), how.groups, relu)
    padded = F.pad(more, (0, 0, 0, len(target) - len(more))).to(DEVICE)
    work = Convolution(rows, FusedConv(*on_gpu), WindowRead(source, target, window), 0.0, padded)
    is_dense = case == "on the coarsest grid"  # which is known to be uniform
    assert choose(work).backend.name == ("uniform" if is_dense else "triton samples")
    weights = FusedConv(weight.double(), bias.double(), how.groups, relu)
    reads = WindowRead(plain, plain_target, window)
    expected = compute(Convolution(exact, weights, reads, 0.0, more.double()))
    close(compute(work)[: len(expected)].cpu(), expected.to(dtype))


@pytest.mark.parametrize(
    ("case", "dtype", "largest", "levels"),
    [
        pytest.param(*case, marks=() if at % 7 == 0 else pytest.mark.slow)  # of each some by default
        for at, case in enumerate(
            product(["even", "strided", "dilated"], gpu.DTYPES, [True, False], ["0.5 kept", "many levels"])
        )
    ],
)
def test_under_floors_pooling_is_that_of_the_reference(
    levels: str, case: str, dtype: torch.dtype, largest: bool
) -> None:
    window, (source, target, plain, plain_target) = floor_lattices(LEVELS[levels], WINDOWS[case])
    exact, rows = rows_of(plain, 21, dtype, len(source))
    exact[3] = rows[3] = torch.nan
    outside = -torch.inf if largest else 0.0
    work = Pooling(rows, WindowRead(source, target, window), outside, largest)
    assert choose(work).backend.name == "triton samples"
    expected = compute(Pooling(exact, WindowRead(plain, plain_target, window), outside, largest)).to(dtype)
    tolerance = TOLERANCE[dtype]
    found = compute(work)[: len(expected)].cpu()
    assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_what_lies_between_samples_or_needs_a_gradient_is_read_by_a_table() -> None:
    window, (source, target, *_) = floor_lattices(LEVELS["0.5 kept"], Windowed(stages=(2, 2)))
    weights = FusedConv(random(4, 4, 3, 3), None)
    rows = random(len(source), 4)

    def name(rows: Tensor, window: Window) -> str:
        return choose(Convolution(rows, weights, WindowRead(source, target, window))).backend.name

    assert name(rows, window) == "triton samples"
    assert name(rows, window._replace(spacing=1)) == name(rows, window._replace(mode="replicate")) == "triton"
    assert name(rows.clone().requires_grad_(), window) == "triton"


@pytest.mark.parametrize("share", [0.0, 0.4, pytest.param(1.0, marks=pytest.mark.slow)])
def test_under_floors_a_network_is_itself_and_nothing_is_left_to_the_reference(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(2, 3, 32, 48)
    mask = cs.Budget(lambda image: image.mean(1), share)
    net = cs.adaptify(SmallUNet().eval(), mask, coarsest=8, example_input=x, verify_laws=False)
    with torch.no_grad():
        expected, levels = net.double()(x.double()).float(), net.levels
        program = net.float().to(DEVICE).optimize().program
        for task in ("convolve", "spread", "pool"):
            monkeypatch.delattr(Torch, task)
        lattice = program.geometry.lattice
        kept = int((levels[:, ::8, ::8] == 0).sum())
        bounds = Bounds.of_patches(program.geometry, 2, (32, 48), (kept,))
        found = program(lambda *_: lattice(levels.to(DEVICE), bounds), program.bind(x.to(DEVICE)))[0]
    close(found.cpu(), expected)
