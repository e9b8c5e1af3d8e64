"""Laws of the geometry: lattices, kernel maps and the operations on elements, against brute force.

The defining equation of a kernel map from a source to a target lattice, for the taps t of a window with
dilation d and padding p whose samples are S fine pixels apart:

    table[e, t] = row of the source element whose cell holds  a(e) + S (d t - p)                        (*)

with a(e) the top-left pixel of the cell of target element e. `emulation.py` is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, random_levels
from emulation import Emulation, Feature, pixels
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cadsurgery.elements import BACKENDS, functional
from cadsurgery.elements.backends import choose
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Bounds, Geometry, Lattice
from cadsurgery.kernels.load import library

EXACT = 1e-9
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)
STRIDES = [(2,), (2, 2), (2, 2, 2), (4,), (4, 2), (3,)]


@dataclass(frozen=True)
class World:
    """One random level map, for the package and for the emulation."""

    lattice: Lattice
    emulation: Emulation
    seed: int

    @property
    def geometry(self) -> Geometry:
        return self.lattice.geometry

    @property
    def size(self) -> tuple[int, int]:
        return self.lattice.size

    def features(self, channels: int, stage: int) -> tuple[Elements, Feature]:
        """Random features of a stage in both forms."""
        torch.manual_seed(self.seed)
        dense = torch.randn(self.lattice.batch, channels, *self.size, dtype=torch.float64)
        return self.enter(dense, stage)

    def enter(self, dense: Tensor, stage: int) -> tuple[Elements, Feature]:
        lattice = self.lattice.at(stage)
        rows = functional.rows_on(functional.to_elements(dense, self.lattice), lattice)
        return Elements(rows, lattice), self.emulation.coarsen(self.emulation.enter(dense), stage)

    def check(self, found: Elements, expected: Feature) -> None:
        """Same cells, same values, at the elements and as read densely."""
        assert found.lattice.stage == expected.stage
        assert found.lattice.size == expected.size
        assert_same(functional.to_dense(found), self.emulation.read(expected), EXACT)
        b, y, x = found.lattice.coordinates
        assert_same(found.rows, expected.data[b, :, y, x], EXACT)


@st.composite
def worlds(draw: st.DrawFn, *, anchor: str = "corner", pool: str = "atrous") -> World:
    """Random strides, size, fill and level maps; sizes are odd too, except for `anchor="center"`."""
    strides = draw(st.sampled_from(STRIDES))
    max_level = draw(st.integers(1, len(strides)))
    batch = draw(st.integers(1, 3))
    largest = Geometry(strides).sides[-1]
    height, width = draw(st.integers(7, 19)), draw(st.integers(7, 23))
    if anchor == "center":  # the published code demands whole blocks
        height, width = height - height % largest + largest, width - width % largest + largest
    fill = "nearest" if anchor == "center" else draw(st.sampled_from(["linear", "nearest"]))
    patch = draw(st.sampled_from(["quadtree", "block"]))
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    split = draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    levels = random_levels(batch, (height, width), strides, max_level=max_level, patch=patch, split=split)
    geometry = Geometry(strides, max_level, fill, anchor, pool, patch, dense_shortcut=draw(st.booleans()))
    return World(geometry.lattice(levels), Emulation(levels, strides, fill, anchor, pool), seed)


@dataclass(frozen=True)
class Step:
    """Stages, stride and window of one operation."""

    source: int
    target: int
    window: Window


@st.composite
def steps(draw: st.DrawFn, world: World, *, same: bool = False, dilated: bool = True) -> Step:
    """A random operation: a stage, a plain one, one that skips stages, or one with taps inside cells."""
    sides, last = world.geometry.sides, len(world.geometry.strides)
    kind = draw(st.sampled_from(["plain", "stage", "hoisted", "inside"]))
    source = draw(st.integers(0, last - 1 if kind == "stage" else last))
    stride = world.geometry.strides[source] if kind == "stage" else 1
    target = source + (kind == "stage")
    if kind == "hoisted":
        target = draw(st.integers(source, last))
    spacing = 1 if kind == "inside" else sides[source]
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    if same:
        kernel = (2 * (kernel[0] // 2) + 1, 2 * (kernel[1] // 2) + 1)
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 3))) if dilated else (1, 1)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if same:
        pads = (reach[0] // 2, reach[0] // 2, reach[1] // 2, reach[1] // 2)
    else:
        top, left = draw(st.integers(0, reach[0])), draw(st.integers(0, reach[1]))
        pads = (top, draw(st.integers(0, reach[0] - top)), left, draw(st.integers(0, reach[1] - left)))
    for axis in (0, 1):
        samples = -(-world.size[axis] // spacing)
        assume(samples + pads[2 * axis] + pads[2 * axis + 1] > reach[axis])
    return Step(source, target, Window(kernel, stride, dilation, pads, spacing=spacing))


def emulate_conv(
    world: World, x: Feature, weight: Tensor, bias: Tensor | None, step: Step, **more: Any
) -> Feature:
    """The emulation\'s convolution with the window of a step."""
    w = step.window
    common = {"stride": w.stride, "dilation": w.dilation, "padding": w.padding, "spacing": w.spacing}
    return world.emulation.conv(x, weight, bias, stage=step.target, mode=w.mode, **common, **more)


# -- lattices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@settings(QUICK, max_examples=12)
@given(st.data())
def test_any_level_map_becomes_the_largest_legal_one_below_it(
    strides: tuple[int, ...], data: st.DataObject
) -> None:
    """A cell of level l exists exactly where all its fine pixels ask for at least l (and none above it)."""
    geometry = Geometry(strides, data.draw(st.integers(1, len(strides))))
    size = (data.draw(st.integers(5, 18)), data.draw(st.integers(5, 18)))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    anything = torch.randint(0, geometry.max_level + 1, (2, *size))
    asked = torch.where(torch.rand(2, *size) < 0.85, geometry.max_level, anything)
    legal = geometry.lattice(asked).levels
    assert bool((legal <= asked).all())
    assert torch.equal(geometry.lattice(legal.long()).levels, legal), "legalising is idempotent"
    for b in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                fitting = [0]
                for level in range(1, geometry.max_level + 1):
                    side = geometry.sides[level]
                    top, left = y - y % side, x - x % side
                    if bool((asked[b, top : top + side, left : left + side] >= level).all()):
                        fitting.append(level)
                assert int(legal[b, y, x]) == max(fitting)


@QUICK
@given(st.data())
def test_block_patches_are_wholly_high_or_wholly_at_the_lowest_level(data: st.DataObject) -> None:
    """patch="block": a block of R_K pixels is at the lowest allowed level if all of it asks for that."""
    strides = data.draw(st.sampled_from(STRIDES))
    geometry = Geometry(strides, data.draw(st.integers(1, len(strides))), patch="block")
    size, side = (data.draw(st.integers(1, 18)), data.draw(st.integers(1, 18))), geometry.sides[-1]
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    anything = torch.randint(0, geometry.max_level + 1, (2, *size))  # levels in between are not the lowest
    asked = torch.where(torch.rand(2, *size) < 0.95, geometry.max_level, anything)
    legal = geometry.lattice(asked).levels
    for y in range(0, size[0], side):
        for x in range(0, size[1], side):
            for b in range(2):
                block = asked[b, y : y + side, x : x + side]
                expected = geometry.max_level if bool((block == geometry.max_level).all()) else 0
                assert bool((legal[b, y : y + side, x : x + side] == expected).all())
    assert torch.equal(geometry.lattice(legal.long()).levels, legal), "legalising is idempotent"


@QUICK
@given(worlds())
def test_cells_partition_the_map_at_every_stage(world: World) -> None:
    """Each element is an aligned square of min(T, j); together they hold every pixel of every image once."""
    for stage in range(len(world.geometry.strides) + 1):
        lattice = world.lattice.at(stage)
        side = world.emulation.side(stage, world.size)
        holder = torch.full((lattice.batch, *world.size), -1)
        for row, (b, y, x) in enumerate(zip(*(c.tolist() for c in lattice.coordinates), strict=True)):
            length = int(side[b, y, x])
            assert y % length == 0 and x % length == 0
            cell = holder[b, y : y + length, x : x + length]
            assert bool((cell == -1).all()) and bool(
                (side[b, y : y + length, x : x + length] == length).all()
            )
            cell.fill_(row)
        assert bool((holder >= 0).all())
        assert torch.equal(lattice.index.long(), holder.flatten())


# -- kernel maps ---------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_kernel_map_satisfies_its_defining_equation_in_both_directions(data: st.DataObject) -> None:
    """Nothing wrong is in the map, and nothing is missing from it: (*) for every element and tap.

    Points outside the map are the padding row N; points inside a cell read by `fill="linear"` are halo
    rows N + 1, N + 2, ... whose mix of elements is the bilinear one.
    """
    world = data.draw(worlds())
    step = data.draw(steps(world))
    window, spacing = step.window, step.window.spacing
    source = world.lattice.at(step.source)
    target = source.at(step.target, window.output_size(source.size))
    reading = kernel_map(source, target, window)
    (height, width), count = source.size, len(source)
    side = world.emulation.side(step.source, source.size)
    probe, feature = world.features(2, step.source)
    read = world.emulation.read(feature)
    linear = world.geometry.fill == "linear"

    holder = {}  # (image, pixel) -> row of the source element whose cell holds it
    for row, (b, y, x) in enumerate(zip(*(c.tolist() for c in source.coordinates), strict=True)):
        for v in range(int(side[b, y, x])):
            for u in range(int(side[b, y, x])):
                holder[b, y + v, x + u] = row
    anchor_of = list(zip(*(c.tolist() for c in source.coordinates), strict=True))
    taps = [(v, u) for v in range(window.kernel[0]) for u in range(window.kernel[1])]
    offsets = [
        (
            spacing * (window.dilation[0] * v - window.padding[0]),
            spacing * (window.dilation[1] * u - window.padding[2]),
        )
        for v, u in taps
    ]
    table = reading.table.tolist()
    elements = list(zip(*(c.tolist() for c in target.coordinates), strict=True))
    assert len(table) == len(elements)
    for entries, (b, y, x) in zip(table, elements, strict=True):
        for entry, (dy, dx) in zip(entries, offsets, strict=True):
            q = (b, y + dy, x + dx)
            if not (0 <= q[1] < height and 0 <= q[2] < width):
                assert entry == count
            elif not linear or anchor_of[holder[q]] == q:
                assert entry == holder[q]
            else:
                assert entry > count
                halo = entry - count - 1
                mixed = reading.mix[halo] @ probe.rows[reading.sources[halo].long()]
                torch.testing.assert_close(mixed, read[b, :, q[1], q[2]], rtol=1e-12, atol=1e-12)

    rows_of = {element: row for row, element in enumerate(elements)}  # and from the source's side
    for row, (b, y, x) in enumerate(anchor_of):
        for column, (dy, dx) in enumerate(offsets):
            reader = rows_of.get((b, y - dy, x - dx))
            if reader is not None:
                assert table[reader][column] == row


@pytest.mark.skipif(library() is None, reason="no C compiler here")
@QUICK
@given(st.data())
def test_compiled_cells_and_kernel_maps_are_those_of_torch(data: st.DataObject) -> None:
    """Entry for entry, the rows of the halo in the same order, their shares to the last bit."""
    world = data.draw(worlds())
    step = data.draw(steps(world))
    found, cells = [], []
    for is_compiled in (True, False):
        source = world.geometry.lattice(world.lattice.pyramid.levels).at(step.source)
        target = source.at(step.target, step.window.output_size(source.size))
        with patch.object(choose, "BACKENDS", BACKENDS if is_compiled else [Torch()]):
            found.append(kernel_map(source, target, step.window))
            cells.append((source.anchors, source.index, source.counts))
    for one, other in zip(*cells, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    compiled, expected = found
    assert compiled.has_outside == expected.has_outside
    for name in ("table", "sources", "mix"):
        one, other = getattr(compiled, name), getattr(expected, name)
        assert one.dtype == other.dtype and torch.equal(one, other)


# -- reading -------------------------------------------------------------------------------------------


@pytest.mark.skipif(library() is None, reason="no C compiler here")
@pytest.mark.parametrize("strides", [(2, 2, 2), (3,), (4, 2)], ids=str)
def test_compiled_cells_are_those_of_torch_where_threads_share_them(strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    levels = random_levels(3, (205, 71), strides)
    compiled = [Geometry(strides).lattice(levels).at(stage) for stage in range(len(strides) + 1)]
    found = [(lattice.anchors, lattice.index, lattice.counts) for lattice in compiled]
    with patch.object(choose, "BACKENDS", [Torch()]):
        for stage, own in enumerate(found):
            lattice = Geometry(strides).lattice(levels).at(stage)
            for one, expected in zip(own, (lattice.anchors, lattice.index, lattice.counts), strict=True):
                assert torch.equal(one, expected)


@QUICK
@given(worlds(), st.integers(0, 3), st.sampled_from([1, 2, 4, 8]))
def test_to_dense_reads_every_pixel_by_fill(world: World, stage: int, spacing: int) -> None:
    """At the fine size every pixel is read; at a native size the pixels at multiples of the spacing."""
    x, feature = world.features(3, min(stage, len(world.geometry.strides)))
    expected = world.emulation.read(feature)[:, :, ::spacing, ::spacing]
    assert_same(functional.to_dense(x, spacing), expected, EXACT)


@QUICK
@given(worlds(), st.integers(0, 3), st.integers(1, 4))
def test_a_guide_weighs_what_is_read_between_anchors(world: World, stage: int, channels: int) -> None:
    """As the formula says, per pixel; anchors and level 0 are exact, and only the fine size is guided."""
    emulation = Emulation(world.emulation.levels, world.geometry.strides, "guided")
    lattice = replace(world.geometry, anchor="corner", pool="atrous", fill="guided").lattice(emulation.levels)
    world, stage = World(lattice, emulation, world.seed), min(stage, len(world.geometry.strides))
    x, feature = world.features(3, stage)
    guide = torch.randn(lattice.batch, channels, *world.size, dtype=torch.float64)
    found = functional.to_dense(x, guide=guide)
    assert_same(found, emulation.read(feature, guide), EXACT)
    side = emulation.side(stage, world.size)
    y, c = pixels(side)
    anchors = ((y % side == 0) & (c % side == 0))[:, None].expand_as(found)
    assert torch.equal(found[anchors], feature.data[anchors])
    assert torch.equal(functional.to_dense(x, 2, guide=guide), functional.to_dense(x, 2))
    assert_same(functional.to_dense(x, guide=8 * guide), found, EXACT)  # a guide has no scale


@QUICK
@given(worlds(), st.sampled_from([0.0, 1.0, -7.3]), st.sampled_from([torch.float64, torch.float32]))
def test_a_guide_that_does_not_vary_leaves_the_linear_fill(
    world: World, value: float, dtype: torch.dtype
) -> None:
    """Nor does one that varies by rounding alone; and its gradient is finite."""
    lattice = Geometry(world.geometry.strides, fill="guided").lattice(world.emulation.levels)
    dense = torch.randn(lattice.batch, 3, *world.size, dtype=dtype)
    x = functional.to_elements(dense, lattice)
    x = Elements(functional.rows_on(x, lattice), lattice)
    expected = functional.to_dense(x)
    flat = torch.full((lattice.batch, 2, *world.size), value, dtype=dtype, requires_grad=True)
    found = functional.to_dense(x, guide=flat)
    assert_same(found, expected)
    if found.requires_grad:
        assert torch.autograd.grad(found.square().sum(), flat)[0].isfinite().all()
    noise = 1 + torch.finfo(dtype).eps * torch.randn(flat.shape, dtype=dtype)
    assert_same(functional.to_dense(x, guide=noise * flat.detach()), expected, 1e-3)


@QUICK
@given(worlds(), st.integers(0, 3), st.integers(0, 3))
def test_rows_on_a_later_stage_are_those_at_the_remaining_anchors(
    world: World, first: int, second: int
) -> None:
    """Coarsening keeps the value at the top-left of each new cell; a vector per image is repeated."""
    last = len(world.geometry.strides)
    first, second = sorted((min(first, last), min(second, last)))
    x, feature = world.features(3, first)
    lattice = world.lattice.at(second)
    world.check(Elements(functional.rows_on(x, lattice), lattice), world.emulation.coarsen(feature, second))
    vector = torch.randn(lattice.batch, 3, 1, 1, dtype=torch.float64)
    spread = Elements(functional.rows_on(vector, lattice), lattice)
    assert_same(functional.to_dense(spread), vector.expand(-1, -1, *world.size), EXACT)


@pytest.mark.parametrize("fill", ["linear", "nearest"])
def test_elements_read_a_map_of_the_networks_own_between_its_samples(fill: Any) -> None:
    own, spacing = torch.randn(2, 3, 6, 7, dtype=torch.float64), 4
    torch.manual_seed(0)
    lattice = Geometry((2, 2), fill=fill).lattice(random_levels(2, (24, 26), (2, 2)))
    rows = functional.rows_on(functional.small_map(own, spacing), lattice)
    for row, image, y, x in zip(rows, *(part.tolist() for part in lattice.coordinates), strict=True):
        expected = torch.zeros(3, dtype=torch.float64)
        for at_y, of_y in (
            (y // spacing, 1 - y % spacing / spacing),
            (y // spacing + 1, y % spacing / spacing),
        ):
            for at_x, of_x in (
                (x // spacing, 1 - x % spacing / spacing),
                (x // spacing + 1, x % spacing / spacing),
            ):
                expected += of_y * of_x * own[image, :, min(at_y, 5), min(at_x, 6)]
        expected = expected if fill == "linear" else own[image, :, y // spacing, x // spacing]
        assert_same(row, expected, EXACT)


# -- operations ----------------------------------------------------------------------------------------


@settings(QUICK, max_examples=50)
@given(st.data())
def test_convolution_is_the_emulation(data: st.DataObject) -> None:
    """Any kernel (even too), dilation, asymmetric padding, groups, stage and fill. With anchor="center", as published,
    y(p) = sum W[u, v] x(a(p) + s (u, v)), a = corner + side // 2; corners are kept."""
    is_published = data.draw(st.booleans())
    world = data.draw(worlds(anchor="center" if is_published else "corner"))
    step = data.draw(steps(world, same=is_published))
    assume(not is_published or step.window.spacing == world.geometry.sides[step.source])
    groups = data.draw(st.sampled_from([1, 2, 4]))
    x, feature = world.features(4, step.source)
    weight = torch.randn(8, 4 // groups, *step.window.kernel, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64) if data.draw(st.booleans()) else None
    found = functional.conv2d(x, weight, bias, step.window, step.target, groups)
    world.check(found, emulate_conv(world, feature, weight, bias, step, groups=groups))


@QUICK
@given(st.data())
def test_reflected_and_replicated_borders_are_those_of_interleaved_grids(data: st.DataObject) -> None:
    """The map is `spacing` grids, one per phase, each padded the way the network pads its own grid."""
    world = data.draw(worlds())
    step = data.draw(steps(world, same=True, dilated=False))
    own = -(-min(world.size) // step.window.spacing)  # samples of the network's own grid
    assume(own > max(step.window.padding))  # torch reflects only once; grids beside it may have a sample less
    mode = data.draw(st.sampled_from(["reflect", "replicate"]))
    step = Step(step.source, step.target, step.window._replace(mode=mode))
    x, feature = world.features(3, step.source)
    weight = torch.randn(4, 3, *step.window.kernel, dtype=torch.float64)
    found = functional.conv2d(x, weight, None, step.window, step.target)
    world.check(found, emulate_conv(world, feature, weight, None, step))


def test_a_reflected_border_that_is_too_long_for_a_grid_beside_the_own_is_reflected_at_both_ends() -> None:
    """A map of 7 fine pixels has 4 own samples, for which a border of 3 is short enough, and 3 samples beside them."""
    lattice = Geometry((2,)).uniform(0, 1, (7, 7))
    line = torch.arange(7, dtype=torch.float64)
    x = functional.to_elements(line.expand(1, 1, 7, 7), lattice)
    window = Window((1, 7), padding=(0, 0, 3, 3), mode="reflect", spacing=2)
    weight = 10 ** torch.arange(7, dtype=torch.float64)
    found = functional.to_dense(functional.conv2d(x, weight.view(1, 1, 1, 7), None, window, 1), 1)[0, 0, 0]
    own = F.conv1d(F.pad(line[None, None, ::2], (3, 3), "reflect"), weight.view(1, 1, 7))
    beside = torch.tensor([3, 5, 3, 1, 3, 5, 3, 1, 3], dtype=torch.float64)  # 1, 3, 5 with a border of 3
    assert_same(found[::2], own.flatten(), EXACT)
    assert_same(found[1::2], beside.unfold(0, 7, 1) @ weight, EXACT)


@st.composite
def pools(draw: st.DrawFn, world: World) -> Step:
    """A random pooling window with torch's limits: padding at most half the kernel; ceil_mode."""
    sides, last = world.geometry.sides, len(world.geometry.strides)
    strided = draw(st.booleans())
    source = draw(st.integers(0, last - 1 if strided else last))
    stride = world.geometry.strides[source] if strided else 1
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    top, left = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
    ceil = draw(st.booleans())
    grown = stride - 1 if ceil else 0
    assume(2 * top + grown <= kernel[0] - 1 and 2 * left + grown <= kernel[1] - 1)  # else a barrier
    for axis, pad in enumerate((top, left)):
        assume(-(-world.size[axis] // sides[source]) + 2 * pad >= kernel[axis])
    window = Window(kernel, stride, (1, 1), (top, top, left, left), "zeros", ceil, sides[source])
    return Step(source, source + strided, window)


@QUICK
@given(st.data(), st.sampled_from(["atrous", "drop"]), st.booleans(), st.sampled_from([None, None, 3]))
def test_pooling_is_the_emulation(
    data: st.DataObject, pool: str, include_pad: bool, divisor: int | None
) -> None:
    """For maxima what is outside is minus infinity, and "drop" passes on cells that the stage does not downsample. The
    divisor of means counts taps in the padded map or in the map, as torch does at the border."""
    world = data.draw(worlds(pool=pool))
    step = data.draw(pools(world))
    x, feature = world.features(3, step.source)
    w = step.window
    common = {"stride": w.stride, "padding": w.padding, "spacing": w.spacing, "ceil_mode": w.ceil_mode}
    common["stage"] = step.target
    largest = world.emulation.max_pool(feature, w.kernel, **common)
    world.check(functional.max_pool2d(x, w, step.target), largest)
    if pool == "atrous":
        common |= {"count_include_pad": include_pad, "divisor": divisor}
        means = world.emulation.avg_pool(feature, w.kernel, **common)
        world.check(functional.avg_pool2d(x, w, step.target, include_pad, divisor), means)


@QUICK
@given(worlds(), st.integers(0, 3), st.booleans())
def test_batch_norm_statistics_run_over_all_elements(world: World, stage: int, weighted: bool) -> None:
    """weighted: each element by the area of its cell in the map, else each once; running ones follow."""
    x, feature = world.features(3, min(stage, len(world.geometry.strides)))
    count = len(x.lattice)
    assume(count > 1)
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
    expected, mean, variance = world.emulation.batch_norm(
        feature, norm.weight, norm.bias, norm.eps, weighted=weighted
    )
    world.check(functional.batch_norm(x, norm, weighted=weighted), expected)
    assert_same(norm.running_mean, 0.3 * mean, EXACT)
    assert_same(norm.running_var, 0.7 + 0.3 * variance * count / (count - 1), EXACT)
    assert int(norm.num_batches_tracked) == 1
    norm.eval()
    rows = functional.batch_norm(x, norm).rows
    assert_same(rows, norm(x.rows[:, :, None, None])[:, :, 0, 0], EXACT)


@QUICK
@given(worlds(), st.integers(0, 3))
def test_global_pooling_is_the_emulation(world: World, stage: int) -> None:
    """The mean weighs an element by its area in the map; in an image of one level each cell counts once."""
    x, feature = world.features(3, min(stage, len(world.geometry.strides)))
    assert_same(functional.global_mean(x), world.emulation.mean(feature), EXACT)
    assert_same(functional.global_mean(x, keepdim=False), world.emulation.mean(feature)[:, :, 0, 0], EXACT)
    assert_same(functional.global_max(x), world.emulation.maximum(feature), EXACT)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_many_elements_is_summed_in_single_precision(dtype: torch.dtype, gradient: bool) -> None:
    """More of them than are widened at once, of two images; the result alone is rounded."""
    levels = random_levels(2, (25, 31), (2, 2), max_level=2, patch="quadtree", split=0.6)
    lattice = Geometry((2, 2)).lattice(levels).at(2)
    rows = torch.randn(len(lattice), 5).to(dtype).requires_grad_(gradient)
    found = functional.global_mean(Elements(rows, lattice), keepdim=False)
    expected = lattice.membership @ rows.double()
    assert found.dtype == dtype and found.requires_grad == gradient
    assert_same(found.double(), expected.to(dtype).double(), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("floors", [False, True])
@pytest.mark.parametrize("strides", [(), (2,), (2, 3)], ids=str)
def test_a_part_has_the_cells_whose_anchors_are_chosen(
    strides: tuple[int, ...], floors: bool, bounded: bool
) -> None:
    """In the order of the whole lattice, image after image; rows beyond the last are padding."""
    geometry = Geometry(strides, floors=floors and bool(strides))
    levels = random_levels(2, (13, 10), strides)
    bounds = Bounds((0,) * geometry.stages, (levels.numel(),) * geometry.stages) if bounded else None
    for stage in range(geometry.stages):
        whole = geometry.lattice(levels, bounds).at(stage, (12, 10))
        chosen = torch.rand(2, 12, 10) < 0.6
        part, anchors = whole.choose(chosen), whole.anchors[: int(whole.counts.sum())]
        expected, count = anchors[chosen.flatten()[anchors]], int(part.counts.sum())
        assert torch.equal(part.anchors[:count], expected) and not part.anchors[count:].any()
        assert part.counts.tolist() == [int((expected // 120 == image).sum()) for image in range(2)]
        held = torch.isin(anchors, expected)[whole.index.long()]  # pixels whose cells are there
        assert torch.equal(part.anchors[part.index.long()][held], whole.anchors[whole.index.long()][held])
        first, end = len(anchors) // 3, 2 * len(anchors) // 3
        assert torch.equal(whole.of_rows(slice(first, end)).anchors, whole.anchors[first:end])


# -- gradients -----------------------------------------------------------------------------------------


def small_world(fill: str) -> World:
    """Two small images with all levels, cut cells included."""
    torch.manual_seed(3)
    levels = random_levels(2, (6, 9), (2, 2), split=0.4)
    assert set(levels.flatten().tolist()) == {0, 1, 2}
    geometry = Geometry((2, 2), fill=fill)  # type: ignore[arg-type]
    return World(geometry.lattice(levels), Emulation(levels, (2, 2), fill), 3)


@pytest.mark.parametrize("fill", ["linear", "nearest"])
@pytest.mark.parametrize(
    "operation", ["max_pool2d", "avg_pool2d", "to_dense", "guided", "batch_norm", "global_mean", "rows_on"]
)
def test_other_gradients_are_finite_differences(fill: str, operation: str) -> None:
    """Law 6 for the operations without weights, guided reading, and batch norm in training, weighted and not."""
    world = small_world("guided" if operation == "guided" else fill)
    x, _ = world.features(2, 1)
    norm = nn.BatchNorm2d(2).double().train()
    window = Window((3, 3), 2, padding=(1, 1, 1, 1), spacing=2)
    guide = torch.randn(world.lattice.batch, 2, *world.size, dtype=torch.float64, requires_grad=True)

    def run(rows: Tensor, guide: Tensor) -> Any:
        value = Elements(rows, x.lattice)
        if operation == "batch_norm":
            both = [functional.batch_norm(value, norm, weighted=weighted).rows for weighted in (True, False)]
            return torch.cat(both)
        if operation == "rows_on":
            return functional.rows_on(value, x.lattice.at(2))
        if operation == "guided":
            return functional.to_dense(value, guide=guide)
        if operation in ("to_dense", "global_mean"):
            return getattr(functional, operation)(value)
        return getattr(functional, operation)(value, window, 2).rows

    assert torch.autograd.gradcheck(run, (x.rows.detach().requires_grad_(), guide))


@QUICK
@given(st.data())
def test_gradients_are_those_of_the_emulation(data: st.DataObject) -> None:
    """Law 6: of a convolution, batch norm and pooling, w.r.t. input, weights and affine parameters."""
    world = data.draw(worlds())
    step = data.draw(steps(world))
    groups = data.draw(st.sampled_from([1, 2]))
    torch.manual_seed(world.seed)
    dense = torch.randn(world.lattice.batch, 4, *world.size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, *step.window.kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm2d(4).double().train()
    values = [dense, weight, bias, norm.weight, norm.bias]

    x, feature = world.enter(dense, step.source)
    found = functional.conv2d(x, weight, bias, step.window, step.target, groups)
    assume(len(found.lattice) > 4)  # statistics of a handful of values amplify rounding
    pooled = functional.max_pool2d(
        functional.batch_norm(found, norm), Window((2, 2), padding=(0, 1, 0, 1)), step.target
    )
    expected = emulate_conv(world, feature, weight, bias, step, groups=groups)
    expected, *_ = world.emulation.batch_norm(expected, norm.weight, norm.bias, norm.eps)
    expected = world.emulation.max_pool(expected, (2, 2), stage=step.target, padding=(0, 1, 0, 1))
    ours, theirs = functional.to_dense(pooled), world.emulation.read(expected)
    direction = torch.randn_like(ours)
    found_grads = torch.autograd.grad((ours * direction).sum(), values)
    expected_grads = torch.autograd.grad((theirs * direction).sum(), values)
    scale = max(float(grad.abs().max()) for grad in expected_grads)
    for one, other in zip(found_grads, expected_grads, strict=True):
        assert float((one - other).abs().max()) < EXACT * scale


@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout2d(0.5), DropPath(0.5), StochasticDepth(0.5, "batch")],
    ids=lambda dropout: repr(dropout),
)
def test_dropout_per_image_scales_elements_as_the_module_scales_the_map(dropout: nn.Module) -> None:
    """One factor per image and channel, so dropping commutes with any lattice; nothing happens in evaluation."""
    dense, lattice = (
        torch.rand(4, 6, 8, 12).double() + 1,
        Geometry((2, 2), fill="nearest").uniform(1, 4, (8, 12)),
    )
    x = functional.to_elements(dense, lattice)
    coarse = Elements(functional.rows_on(x, lattice.at(2)), lattice.at(2))
    torch.manual_seed(3)
    dropped = functional.to_dense(functional.drop_per_image(coarse, dropout.train()))
    torch.manual_seed(3)
    assert_same(dropped, dropout(functional.to_dense(coarse)), EXACT)
    assert functional.drop_per_image(coarse, dropout.eval()) is coarse
