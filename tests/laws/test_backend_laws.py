"""Every backend of the table gives what the reference gives, in values and, where it has them, gradients.

The reference, torch in float64, is the last of the table. Triton's laws are in `tests/elements/gpu_kernel_laws.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from cadsurgery.elements import BACKENDS, functional
from cadsurgery.elements.backends.choose import Backend, Work, choose, compute
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import (
    Convolution,
    Filling,
    MapConvolution,
    Mixing,
    MixingLines,
    Picking,
    PixelReading,
    Pooling,
    WindowRead,
)
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.gaps import resolution
from cadsurgery.elements.kernel_map import Reading, Window, kernel_map
from cadsurgery.elements.lattice import Geometry, Lattice

NAMES = [
    *("uniform", "without overlap", "portable", "graph", "triton samples", "triton", "native"),
    *("products", "oneDNN", "expression", "torch"),
]
OF_GRAPHS = ("portable", "graph", "expression")  # which apply while a graph is made
TYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2}
FINISHES: dict[str, Activation | None] = {
    "plain": None,
    "relu": Activation("relu"),
    "hardtanh": Activation("hardtanh", (0.0, 3.0)),
    "swish": Activation("swish"),
}


def named(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend.name == name)


@cache
def lattice(kind: str, fill: str = "linear") -> Lattice:
    """Two images of 13 x 10 fine pixels after one of two stages."""
    geometry = Geometry((2, 2), fill=fill)  # type: ignore[arg-type]
    if kind == "uniform":
        return geometry.uniform(1, 2, (13, 10)).at(1)
    levels = torch.randint(0, 3, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    whole = geometry.lattice(levels.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :13, :10]).at(1)
    if kind == "ragged":
        return whole
    there = torch.zeros(2 * 13 * 10, dtype=torch.bool)
    there[whole.anchors[:-5]] = True
    return whole.choose(there.view(2, 13, 10))


class Case(NamedTuple):
    """A convolution: kind of lattice, groups, channels in and out, kernel, stride, stage, type, how it is finished."""

    kind: str
    groups: int
    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    dtype: torch.dtype
    finish: str

    def __str__(self) -> str:
        inner, outer = self.channels
        kernel = f"{self.kernel[0]}x{self.kernel[1]}-s{self.stride}"
        return f"{self.kind}-{self.groups}-{inner}to{outer}-{kernel}-{str(self.dtype)[6:]}-{self.finish}"


SHAPES = (
    (1, (5, 70), (1, 1), 1),
    (1, (5, 9), (1, 1), 2),
    (1, (6, 17), (3, 3), 1),
    (1, (6, 4), (3, 3), 2),
    (1, (6, 4), (4, 2), 1),
    (6, (6, 6), (3, 3), 1),
    (6, (6, 6), (1, 1), 1),
    (2, (8, 8), (3, 3), 2),
    (2, (8, 6), (3, 3), 1),
)
KINDS = ("uniform", "ragged")
# Every kind of lattice, shape and type, each with another finish: two of these four values meet in some case.
CASES = [
    Case(kind, *shape, dtype, [*FINISHES][at % len(FINISHES)])
    for at, (kind, shape, dtype) in enumerate(itertools.product(KINDS, SHAPES, TYPES))
]


def values(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def work_of(case: Case, packed: bool) -> Convolution:
    """The work; weights as an inference copy keeps them if `packed`. Its residual comes with an activation."""
    source = lattice(case.kind)
    inner, outer = case.channels
    padding = (case.kernel[0] // 2, case.kernel[0] // 2, case.kernel[1] // 2, case.kernel[1] // 2)
    window = Window(case.kernel, case.stride, (1, 1), padding, spacing=2)
    target = source.at(case.stride, window.output_size(source.size))
    weight = values(outer, inner // case.groups, *case.kernel, seed=1, dtype=case.dtype)
    bias = values(outer, seed=2, dtype=case.dtype)
    activation, residual = FINISHES[case.finish], None
    if activation is not None:
        residual = values(len(target), outer, seed=3, dtype=case.dtype)
    weights = FusedConv(weight, bias, case.groups, activation, {} if packed else None)
    rows = values(len(source), inner, seed=4, dtype=case.dtype)
    return Convolution(rows, weights, WindowRead(source, target, window), 0.0, residual)


def exactly(work: Convolution) -> Convolution:
    """The same in float64, for the reference."""
    weights = replace(
        work.weights, weight=work.weights.weight.double(), bias=work.weights.bias.double(), packed_cache=None
    )
    residual = work.residual.double() if work.residual is not None else None
    return replace(work, rows=work.rows.double(), weights=weights, residual=residual)


def takes(name: str, case: Case) -> bool:
    """Whether a backend is to give what the reference gives: where it applies, or would in a graph."""
    work, backend = work_of(case, packed=True), named(name)
    if not hasattr(backend, "convolve"):
        return False
    if name in OF_GRAPHS:
        return case.finish == "plain"
    with torch.no_grad():
        return backend.applies(work)


def cases(name: str) -> list[Any]:
    """Cases of a backend."""
    return [pytest.param(name, case, id=f"{name}-{case}") for case in CASES if takes(name, case)]


@pytest.mark.parametrize(
    ("name", "case"), [case for name in NAMES if name != "triton" for case in cases(name)]
)
@torch.no_grad()
def test_a_convolution_is_that_of_the_reference(name: str, case: Case) -> None:
    work = work_of(case, packed=True)
    if name not in OF_GRAPHS:
        assert named(name).applies(work)
    found = named(name).convolve(work)  # type: ignore[attr-defined]
    expected = named("torch").convolve(exactly(work))  # type: ignore[attr-defined]
    assert found.dtype == case.dtype and found.is_contiguous()
    tolerance = TOLERANCE[case.dtype] * max(1.0, float(expected.abs().max()))
    assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("outside", [0.0, 0.5])
@torch.no_grad()
def test_taps_that_are_outside_for_whole_tiles_are_what_lies_there(
    outside: float, dtype: torch.dtype
) -> None:
    """A dilation of half the map and more, and more channels than a tile is multiplied by at once."""
    case = Case("ragged", 1, (130, 70), (3, 3), 1, dtype, "relu")
    work = work_of(case, packed=True)
    window = Window((3, 3), 1, (5, 4), (5, 5, 4, 4), spacing=2)
    work = replace(work, reads=replace(work.reads, window=window), outside=outside)
    table = work.reading.table
    assert bool((table == len(work.rows)).view(-1, 9)[:6].all(0).any())
    expected = named("torch").convolve(exactly(work))  # type: ignore[attr-defined]
    found = named("native").convolve(work)  # type: ignore[attr-defined]
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert_close(found.double(), expected, atol=tolerance, rtol=0)


def leaves_of(work: Convolution) -> Iterator[Tensor]:
    yield from (work.rows, work.weights.weight)
    assert work.weights.bias is not None
    yield work.weights.bias


def with_gradients(work: Convolution) -> Convolution:
    rows, weight, bias = (value.detach().requires_grad_() for value in leaves_of(work))
    return replace(work, rows=rows, weights=replace(work.weights, weight=weight, bias=bias))


def gradients(backend: Backend, work: Convolution) -> list[Tensor]:
    out = backend.convolve(work)  # type: ignore[attr-defined]
    by = values(*out.shape, seed=5, dtype=out.dtype)
    return list(torch.autograd.grad((out * by).sum(), list(leaves_of(work))))


def trained(name: str) -> list[Any]:
    plain = [Case(kind, *shape, torch.float32, "plain") for kind in KINDS for shape in SHAPES]
    works = [(case, with_gradients(work_of(case, packed=False))) for case in plain]
    backend = named(name)
    return [
        pytest.param(name, case, id=f"{name}-{case}")
        for case, work in works
        if name in OF_GRAPHS or backend.applies(work)
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [case for name in ("uniform", "products", "expression", "torch") for case in trained(name)],
)
def test_gradients_are_those_of_the_reference(name: str, case: Case) -> None:
    work = with_gradients(work_of(case, packed=False))
    found = gradients(named(name), work)
    expected = gradients(named("torch"), with_gradients(exactly(work)))
    for value, exact in zip(found, expected, strict=True):
        assert_close(value.double(), exact, atol=1e-4 * float(exact.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["graph", "portable", "native"])
def test_what_has_no_gradients_does_not_apply_where_they_are_asked_for(name: str) -> None:
    case = Case("ragged", 6, (6, 6), (3, 3), 1, torch.float32, "plain")
    assert not named(name).applies(with_gradients(work_of(case, packed=True)))


# -- pools, sums, copies ------------------------------------------------------------------------------


def has(name: str, task: str) -> bool:
    return hasattr(named(name), task)


TASKS = [
    (name, task)
    for name in NAMES
    for task in ("pool", "mix", "mix_lines", "pick", "read_pixels", "fill")
    if has(name, task)
    and (name, task) != ("portable", "read_pixels")  # which exists in files alone
    and name not in ("torch", "without overlap", "triton samples", "triton")
]


def other_works(task: str, dtype: torch.dtype) -> list[Work]:
    source = lattice("ragged")
    rows = values(len(source), 21, seed=0, dtype=dtype)
    window = Window((3, 3), 1, (1, 1), (1, 1, 1, 1), spacing=2)
    reading = kernel_map(source, source, window)
    if task == "pool":
        even = lattice("uniform")
        uniform = values(len(even), 21, seed=0, dtype=dtype)
        return [
            Pooling(some, WindowRead(one, one.at(2), window._replace(stride=2)), outside, outside < 0)
            for some, one in ((rows, source), (uniform, even))
            for outside in (0.0, -torch.inf)
        ]
    if task == "mix":
        return [Mixing(rows, reading.sources, reading.mix)]
    if task == "mix_lines":
        first = torch.tensor([0, 1, 2, 3, 3])
        share = values(5, seed=1, dtype=dtype).sigmoid()
        return [MixingLines(values(3, 5, 7, seed=0, dtype=dtype), first, first + 1, share)]
    if task == "fill":
        return fillings(dtype)
    if task == "read_pixels":
        return [
            PixelReading(values(len(one), channels, seed=0, dtype=dtype), one, spacing)
            for one in (source, lattice("ragged", "nearest"), lattice("uniform"), source.at(2), source.at(0))
            for channels, spacing in itertools.product((1, 2, 21), (1, 2, 3, 4))
        ]
    return [Picking(rows, Reading(reading.table, reading.sources, reading.mix, False))]


def fillings(dtype: torch.dtype) -> list[Work]:
    """Of a part or all of a map, whole rows and shares, to a part or all; by what is there and by a constant."""
    whole = resolution(2, 9, 14)
    draw = torch.Generator().manual_seed(3)
    some, wanted = (whole.choose(torch.rand(2, 9, 14, generator=draw) < share) for share in (0.15, 0.6))
    weights = torch.rand(5, 5, generator=draw, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    works: list[Work] = []
    for source, target, least in itertools.product((some, whole), (wanted, whole), (0.0, 1e-5)):
        rows, shares = values(source.count, 21, seed=0, dtype=dtype), torch.rand(source.count, generator=draw)
        weigh = weights if least else weights / weights.sum()
        residual, baseline = values(target.count, 21, seed=1, dtype=dtype), values(21, seed=2, dtype=dtype)
        works.append(Filling(rows, source, target, weigh, least, None, shares * (shares > 0.4)))
        works.append(Filling(rows, source, target, weigh, least, baseline, None, residual, FINISHES["relu"]))
        works.append(
            Filling(rows, source, target, weigh, least, baseline, shares.ceil(), residual, FINISHES["swish"])
        )
    return works


def computed(backend: Backend, work: Work) -> Tensor:
    return getattr(backend, work.task)(work)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("name", "task"), TASKS)
@torch.no_grad()
def test_every_other_task_is_that_of_the_reference(name: str, task: str, dtype: torch.dtype) -> None:
    works = [work for work in other_works(task, dtype) if name in OF_GRAPHS or named(name).applies(work)]
    assert works
    for work in works:
        changes: dict[str, Any] = {"rows": work.rows.double()}
        if isinstance(work, Filling):
            doubled = ("weights", "baseline", "shares", "residual")
            changes |= {
                name: value.double() for name in doubled if (value := getattr(work, name)) is not None
            }
        if isinstance(work, MixingLines):
            changes["share"] = work.share.double()
        expected = computed(named("torch"), replace(work, **changes))
        found = computed(named(name), work)
        assert_close(found.double(), expected, atol=TOLERANCE[dtype] * 10, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_behind_the_last_cells_values_stay_equal_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """So that the place of a maximum (pooling with indices) does not hang on rounding where a map is flat."""
    geometry, draw = Geometry((2, 2), fill="linear"), torch.Generator().manual_seed(0)
    levels = torch.randint(0, 3, (2, 4, 3), generator=draw) if kind == "ragged" else torch.full((2, 4, 3), 2)
    one = geometry.lattice(levels.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :15, :11]).at(2)
    sides = torch.tensor(one.geometry.sides)[one.levels.long()]
    (height, width), pixels = one.size, one.index.view(one.batch, *one.size)
    y, x = torch.arange(height).view(-1, 1), torch.arange(width)
    behind = ((y // sides + 1) * sides >= height) & (y % sides > 0)  # below, no cell follows
    beside = ((x // sides + 1) * sides).clamp(max=width - 1)
    lowest, image = torch.full_like(beside, height - 1), torch.arange(one.batch).view(-1, 1, 1)
    # ... nor another one beside the cell, further down
    behind &= pixels[image, y - y % sides, beside] == pixels[image, lowest, beside]
    assert behind.any() and not behind.all()
    work = PixelReading(values(len(one), 21, seed=0, dtype=dtype), one, 1)
    for backend in map(named, ("native", "torch")):
        if backend.applies(work):
            found = computed(backend, work)
            above = found.gather(1, (y - y % sides).unsqueeze(3).expand_as(found))
            assert torch.equal(found[behind], above[behind])


# -- level maps, dense maps and sums ---------------------------------------------------------------------


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "channels", "kernel", "window"),
    [
        (1, (6, 8), (3, 3), ((2, 2), (1, 1), (1, 1))),
        (1, (6, 8), (1, 1), ((1, 1), (0, 0), (1, 1))),
        (1, (6, 8), (1, 1), ((2, 2), (0, 0), (1, 1))),
        (8, (8, 8), (3, 3), ((1, 1), (12, 12), (12, 12))),
        (4, (8, 8), (3, 5), ((1, 2), (1, 2), (1, 1))),
    ],
)
@torch.no_grad()
def test_dense_maps_are_convolved_as_by_the_reference(
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    dtype: torch.dtype,
    with_residual: bool,
) -> None:
    """By each backend that applies, at two sizes and from two memory layouts."""
    weight = values(channels[1], channels[0] // groups, *kernel, seed=1, dtype=dtype)
    bias, activation = values(channels[1], seed=2, dtype=dtype), Activation("relu")
    weights = FusedConv(weight, bias, groups, activation, {}, dense=True)
    exact = replace(weights, weight=weight.double(), bias=bias.double(), packed_cache=None)
    tried = set()
    for size in ((13, 10), (1, 7)):
        image = values(2, channels[0], *size, seed=3, dtype=dtype)
        work = MapConvolution(image, weights, window)
        more = values(*work.shape, seed=4, dtype=dtype) if with_residual else None
        wide = replace(work, rows=image.double(), weights=exact)
        expected = named("torch").convolve_map(
            replace(wide, residual=more.double() if more is not None else None)
        )
        for rows in (image, image.contiguous(memory_format=torch.channels_last)):
            work = replace(work, rows=rows, residual=more)
            for backend in BACKENDS:
                if hasattr(backend, "convolve_map") and backend.applies(work):
                    found = backend.convolve_map(work)
                    tried.add(backend.name)
                    assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert "torch" in tried


RESIZES = [
    {"size": (28, 11)},
    {"size": 9},
    {"scale_factor": (1.7, 2.3)},
    {"scale_factor": 2.0, "recompute_scale_factor": True},
    {"size": (1, 1)},
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("how", RESIZES, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 9, 4), (1, 1, 1, 1), (1, 3, 5, 1100)], ids=str)
def test_a_dense_map_is_resized_as_by_torch(shape: tuple[int, ...], how: Any, aligned: bool) -> None:
    """In every type and from two memory layouts, to contiguous memory; with its gradient."""
    exact = values(*shape, seed=0, dtype=torch.float64)
    options = {"mode": "bilinear", "align_corners": aligned, **how}
    for dtype, layout in itertools.product(TYPES, (torch.contiguous_format, torch.channels_last)):
        image = exact.to(dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            found = functional.interpolate(image, **options)
        assert found.is_contiguous()
        # Where samples lie is rounded as by torch, which counts in long lines.
        assert_close(found, F.interpolate(image, **options), atol=TOLERANCE[dtype] / 50, rtol=0)
    image = exact.requires_grad_()
    assert_close(
        torch.autograd.grad(functional.interpolate(image, **options).square().sum(), image),
        torch.autograd.grad(F.interpolate(image, **options).square().sum(), image),
    )


# -- the choice ------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_table_is_in_this_order_and_its_last_takes_everything() -> None:
    assert [backend.name for backend in BACKENDS] == NAMES
    assert all(has("torch", task) for task in ("convolve", *(task for _, task in TASKS)))
    assert all(
        has("torch", task) for task in ("find_cells", "find_taps", "convolve_map", "weigh", "normalise")
    )
    assert all(named("torch").applies(work_of(case, packed=True)) for case in CASES[:3])


class Sevens(Backend):
    """A backend in one file: what it is called, what it takes, what it computes."""

    name = "sevens"

    def applies(self, work: Convolution) -> bool:
        """Depthwise convolutions, for inference."""
        return work.is_inference and work.weights.groups == work.rows.shape[1] > 1

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, O)."""
        return work.rows.new_full((len(work.reading.table), work.weights.weight.shape[0]), 7.0)


@pytest.fixture
def sevens() -> Iterator[None]:
    BACKENDS.insert(0, Sevens())
    yield
    BACKENDS.remove(named("sevens"))


def a_convolution(groups: int, gradient: bool = False) -> tuple[Tensor, list[str]]:
    """Rows of a 3x3 convolution, and what a profile shows of it."""
    source, window = lattice("ragged"), Window((3, 3), 1, (1, 1), (1, 1, 1, 1), spacing=2)
    x = Elements(values(len(source), 6, seed=0, dtype=torch.float32).requires_grad_(gradient), source)
    weight = values(6, 6 // groups, 3, 3, seed=1, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        out = functional.conv2d(x, weight, None, window, 1, groups).rows
    return out, [event.name for event in profile.events() if event.name.startswith("convolve")]


@pytest.mark.smoke
def test_a_backend_that_is_added_is_chosen_used_and_shown(sevens: None) -> None:
    out, shown = a_convolution(6)
    assert bool((out == 7).all()) and shown == ["convolve (sevens)"]


@torch.no_grad()
def test_rows_are_mixed_alike_wherever_they_are_read() -> None:
    """Interpolated into a halo or read one by one: another backend for one of both would round them differently."""
    rows = torch.randn(40, 20).bfloat16()
    sources, shares = torch.randint(0, 40, (30, 4), dtype=torch.int32), torch.rand(30, 4)
    places = 41 + torch.arange(30, dtype=torch.int32).view(-1, 1, 1)
    mixed = compute(Mixing(rows, sources, shares))
    assert torch.equal(mixed, compute(Picking(rows, Reading(places, sources, shares, False))))


@torch.no_grad()
def test_kernels_serve_grouped_convolutions_of_uniform_maps_that_are_dilated() -> None:
    """Dense ones take up to eight times as long."""
    source = Geometry((2,)).uniform(0, 1, (13, 10)).at(1)
    far = work_of(Case("uniform", 20, (20, 20), (5, 5), 1, torch.float32, "plain"), packed=True)
    reads = WindowRead(source, source, far.reads.window)
    far = replace(far, rows=values(len(source), 20, seed=4, dtype=torch.float32), reads=reads)
    if not named("native").applies(far):
        pytest.skip("needs compiled kernels")
    assert choose(far).backend.name == "native"
