"""A network's map read at points only: the same rows as its dense output has, and nothing computed in vain.

Law: `read_at(net, x, points)[b][n]` is `net(x)[b, :, y, x]` at the sample the n-th point of image b lies in, for any
mask, fill, size and type. With `reach="receptive"` it is the same bit for bit where the network works by elements, and
to rounding where a uniform map runs as ordinary convolutions; the elements that are computed are those that the points
depend on, no others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, random_levels, slow, some
from networks import Composed, Undecided, randomise, strided, unverified
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.mobilenetv3 import InvertedResidual as SqueezedResidual
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

import cadsurgery as cs
from cadsurgery.masks import keypoints_at, resolve_mask
from cadsurgery.network.invocations import find_lattice
from cadsurgery.network.macs import dense_macs
from cadsurgery.network.points import readable

Size = tuple[int, int]
SIZE: Size = (65, 97)
# Rows have the same bits however many there are with one thread alone, as `read_at` says.
pytestmark = pytest.mark.usefixtures("one_thread")
FILLS = ("linear", "nearest", "guided")
SEEDS = range(3)  # of random sets of points for each network
PUBLISHED = {"anchor": "center", "fill": "nearest", "pool": "drop", "patch": "block"}


# -- networks ------------------------------------------------------------------------------------------


# Sixteen channels throughout, whole vectors, and no SiLU: others differ by rounding, as `read_at` says.


def plain() -> nn.Module:
    """Even kernels, all kinds of padding."""
    even = (nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 4, 2, 1), nn.Conv2d(16, 16, 2), nn.GELU())
    reflected = nn.Conv2d(16, 16, 3, 2, 1, padding_mode="reflect")
    return nn.Sequential(
        *even, reflected, nn.Hardswish(), nn.Conv2d(16, 16, 3, 1, 1, padding_mode="replicate")
    )


def cut() -> nn.Module:
    first = nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2)
    return nn.Sequential(*first, nn.ReLU(), nn.Conv2d(16, 16, 3, 2))


def halved(channels: int, wider: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(channels, wider, 1, 2, bias=False), nn.BatchNorm2d(wider))
    return BasicBlock(channels, wider, 2, shortcut)


def residual() -> nn.Module:
    """As a ResNet-18: joins, batch norm, shortcuts."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        *(BasicBlock(16, 16), halved(16, 32), BasicBlock(32, 32), halved(32, 16), BasicBlock(16, 16)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        *(InvertedResidual(16, 16, 2, 3), InvertedResidual(16, 16, 1, 3), InvertedResidual(16, 16, 2, 3)),
        InvertedResidual(16, 16, 1, 2),
    )


def squeezed(at: int = 1) -> nn.Module:
    """As MobileNetV3: squeeze-excite, which looks at the whole image, in the block `at`."""

    def block(place: int, stride: int) -> nn.Module:
        values = (16, 3, 32, 16, place == at, "HS", stride, 1, 1.0)
        return SqueezedResidual(InvertedResidualConfig(*values), nn.BatchNorm2d)

    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), block(0, 2), block(1, 1), block(2, 2))


def inception(channels: int, stride: int) -> nn.Module:
    """Pools of both kinds beside a convolution, joined."""
    beside = nn.Conv2d(channels, 16, (1, 3), stride, (0, 1)), nn.BatchNorm2d(16), nn.ReLU()
    pools = nn.MaxPool2d(3, stride, 1), nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    branches = nn.ModuleList([*pools, nn.Sequential(*beside)])
    return Composed(lambda net, x: torch.cat([one(x) for one in net.branches], 1), branches=branches)


def pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), inception(16, 2), nn.Conv2d(48, 16, 1), nn.ReLU(), inception(16, 2)
    )


def same(net: Any, x: Tensor) -> Tensor:
    """Pads in front of each stride by what the size of the map asks for, as networks ported from TensorFlow do."""
    for layer in net.layers:
        rows, columns = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:])
        x = F.relu(layer(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))))
    return x


def decoding(up: nn.Module) -> nn.Module:
    """Down to stride 8 and up again by a resize or a transposed convolution, joined with what was skipped."""

    def decode(net: Any, image: Tensor) -> Tensor:
        skipped = net.down(image)
        return net.last(net.up(F.relu(net.third(skipped))) + skipped)

    third, last = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
    return Composed(decode, down=strided(2, 16), third=third, last=last, up=up)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "cut": cut,
    "residual": residual,
    "depthwise": depthwise,
    "squeezed": squeezed,
    "pools": pools,
    "same": lambda: Composed(same, layers=nn.ModuleList(nn.Conv2d(c, 16, 3, 2) for c in (3, 16, 16))),
    "decoding": lambda: decoding(nn.Upsample(scale_factor=2.0, mode="bilinear")),
    "spreading": lambda: decoding(nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU())),
}
FEW = ("squeezed", "same", "spreading")


def size_of(name: str) -> Size:
    """Of test images: odd, but for networks that find their own way back up or pad by what a size asks for."""
    return (64, 96) if name in ("decoding", "same", "spreading") else SIZE


def convert(model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> cs.AdaptiveModel:
    example = torch.zeros(1, 3, 64, 96, dtype=dtype)
    options = {"output_stride": (2, 8), "mask": "none", "example_input": example, **options}
    return unverified(randomise(model).to(dtype), **options)


def converted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> cs.AdaptiveModel:
    """A copy of the network's conversion, which is made once; what is drawn next is the same each time."""
    net = copy.deepcopy(_converted(name, dtype, tuple(options.items())))
    torch.manual_seed(1)
    return net


@cache
def _converted(name: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return convert(BUILDERS[name](), dtype, **dict(options))


# -- points --------------------------------------------------------------------------------------------


def points_in(size: Size, *counts: int) -> list[Tensor]:
    room = torch.tensor([size[1], size[0]], dtype=torch.float64)
    return [torch.rand(count, 2, dtype=torch.float64) * room - 0.5 for count in counts]


def levels_of(net: cs.AdaptiveModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        fine = find_lattice(
            net.program, net.program.masking(resolve_mask("none")), net.program.bind(x)
        ).whole_size
    geometry = net.geometry
    return random_levels(len(x), fine, geometry.strides, max_level=geometry.max_level, patch=geometry.patch)


def samples(point: Tensor, stride: int, dense: Tensor) -> tuple[int, int]:
    """Row and column of the sample whose pixels hold a point; the last one where the map lost its border."""
    x, y = (math.floor((float(value) + 0.5) / stride) for value in point)
    return min(y, dense.shape[2] - 1), min(x, dense.shape[3] - 1)


def rows_of(dense: Tensor, points: list[Tensor], stride: int) -> list[Tensor]:
    """What the dense output (B, C, h, w) holds at the points of each image."""
    found = []
    for image, part in zip(dense, points, strict=True):
        places = [samples(point, stride, dense) for point in part]
        rows = [image[:, y, x] for y, x in places]
        found.append(torch.stack(rows) if rows else image.new_empty(0, image.shape[0]))
    return found


@cache
def rows_are_alike() -> bool:
    """Whether torch's products give a row the same bits however many there are: MKL's with AVX2 alone do not."""
    rows, weight = torch.randn(80, 144), torch.randn(32, 144)
    many = F.linear(rows, weight)
    return all(torch.equal(F.linear(rows[:count], weight), many[:count]) for count in range(1, 80))


def limit(reach: str) -> float:
    """How much rows may differ from those of the dense output, see `read_at`."""
    return 0.0 if reach == "all" or rows_are_alike() else 1e-5


def assert_rows(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    """Equal, or up to this share of the largest value."""
    assert len(found) == len(expected)
    found, expected = ([part.detach() for part in parts] for parts in (found, expected))
    largest = max([float(part.abs().max()) for part in expected if part.numel()], default=1.0)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if tolerance == 0:
            assert torch.equal(one, other)
        elif one.numel():
            assert float((one - other).abs().max()) <= tolerance * largest


# -- the dense output at points: of random networks in laws/test_form_laws.py, here what those have not -----


@pytest.mark.parametrize(
    ("name", "options", "reach"),
    covering(
        ["residual", "pools", "depthwise"],
        [PUBLISHED, {"anchor": "center", "fill": "nearest"}, {"pool": "drop"}],
        ["receptive", "all"],
    ),
)
@torch.no_grad()
def test_rows_are_those_of_the_published_geometry_too(name: str, options: dict[str, Any], reach: Any) -> None:
    net = converted(name, **options)
    x, points = images(2, *SIZE), points_in(SIZE, 3, 7)
    levels = levels_of(net, x)
    expected = rows_of(net(x, mask=levels), points, 2)
    assert_rows(cs.read_at(net, x, points, mask=levels, reach=reach), expected, limit(reach))


@pytest.mark.parametrize("name", some(FEW, every=3))
@torch.no_grad()
def test_bfloat16_rows_are_those_of_the_dense_output(name: str) -> None:
    net, size = converted(name, torch.bfloat16), size_of(name)
    x, points = images(2, *size, torch.bfloat16), points_in(size, 5, 2)
    levels = levels_of(net, x)
    expected = rows_of(net(x, mask=levels), points, 2)
    assert_rows(cs.read_at(net, x, points, mask=levels), expected)
    assert_rows(cs.read_at(net, x, points, mask=levels, reach="receptive"), expected, 2e-2)


@torch.no_grad()
def test_points_in_any_form_are_read_in_the_order_given() -> None:
    """Of several types, as arrays, of all images in one tensor, and a point twice."""
    net, x, points = converted("residual", fill="guided"), images(2, *SIZE), points_in(SIZE, 5, 5)
    whole, levels = [part.floor().clamp(min=0) for part in points], levels_of(net, x)
    expected = cs.read_at(net, x, whole, mask=levels)
    forms: list[Any] = [[part.float() for part in whole], [part.long() for part in whole], torch.stack(whole)]
    for form in (*forms, tuple(part.numpy() for part in whole)):
        assert_rows(cs.read_at(net, x, form, mask=levels), expected)
    twice = [torch.cat((part.flip(0), part)) for part in whole]
    for reach in ("all", "receptive"):
        again = cs.read_at(net, x, twice, mask=levels, reach=reach)
        assert_rows(again, [torch.cat((rows.flip(0), rows)) for rows in expected], limit(reach))


@torch.no_grad()
def test_reading_leaves_image_and_network_as_they_were() -> None:
    net, x, points = converted("residual"), images(2, *SIZE), points_in(SIZE, 4, 2)
    state, before = copy.deepcopy(net.state_dict()), x.clone()
    first = cs.read_at(net, x, points, mask="edges", reach="receptive")
    cs.macs_at(net, x, points, mask="edges")
    assert_rows(cs.read_at(net, x, points, mask="edges", reach="receptive"), first)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


# -- only what is needed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), covering([*BUILDERS], SEEDS))
@torch.no_grad()
def test_only_what_is_needed_gives_the_same_bits(name: str, seed: int) -> None:
    """Random points, numbers of points and level maps; the three fills in turn."""
    net, size, batch = converted(name, fill=FILLS[seed % 3]), size_of(name), 1 + seed % 2
    torch.manual_seed(seed)
    counts = [int(torch.randint(0, 9, ())) for _ in range(batch)]
    x, points = images(batch, *size), points_in(size, 1 + counts[0], *counts[1:])
    levels = levels_of(net, x)
    expected = cs.read_at(net, x, points, mask=levels)
    assert_rows(cs.read_at(net, x, points, mask=levels, reach="receptive"), expected, limit("receptive"))


@pytest.mark.parametrize(("name", "fill"), covering(["residual", "squeezed"], FILLS))
@torch.no_grad()
def test_what_lies_beyond_the_reach_of_the_points_does_not_matter(name: str, fill: str) -> None:
    """Other noise right of column 64: points on the left see none of it, squeeze-excite does."""
    net, x = converted(name, fill=fill), images(1, 64, 160)
    changed = x.clone()
    changed[..., 128:] = torch.randn(1, 3, 64, 32)
    levels, points = levels_of(net, x), [torch.rand(6, 2) * 30]
    read = partial(cs.read_at, net, points=points, mask=levels, reach="receptive")
    assert torch.equal(read(x)[0], read(changed)[0]) == (name == "residual")


@pytest.mark.parametrize("name", ["plain", "squeezed"])
@torch.no_grad()
def test_a_batch_without_points_has_no_rows_and_computes_nothing(name: str) -> None:
    """But the first convolution, and what looks at the whole image."""
    net, x = converted(name), images(2, *SIZE)
    points, levels = points_in(SIZE, 0, 0), levels_of(net, x)
    for form, reach in product((net, net.optimize()), ("all", "receptive")):
        rows = cs.read_at(form, x, points, mask=levels, reach=reach)
        assert [tuple(part.shape) for part in rows] == [(0, net(x).shape[1])] * 2
    found = cs.macs_at(net, x, points, mask=levels)
    assert name != "plain" or (found.elements[1] == 0 and found.receptive == stem_macs(net, x))


# -- work ----------------------------------------------------------------------------------------------


def stem_macs(net: cs.AdaptiveModel, x: Tensor) -> int:
    """Of the first convolution, which comes before the region."""
    return dense_macs(net.get_submodule("0"), x)


def chain(**options: Any) -> cs.AdaptiveModel:
    """A stem, then a strided convolution and one behind it: four channels, nine taps each."""
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return convert(nn.Sequential(*layers, nn.Conv2d(4, 4, 3, 1, 1)), output_stride=(1, 2), **options)


@pytest.mark.parametrize(
    ("point", "mask", "fill", "rows"),
    [
        ((20, 10), "all", "linear", (1, 9)),  # taps two pixels apart
        ((21, 11), "all", "linear", (1, 9)),
        ((0, 0), "all", "linear", (1, 4)),
        ((0, 11), "all", "nearest", (1, 6)),
        ((20, 10), "none", "linear", (1, 9)),
        ((21, 10), "none", "linear", (2, 12)),  # between two cells
        ((21, 11), "none", "linear", (4, 16)),
        ((21, 11), "none", "nearest", (1, 9)),
        ((0, 0), "none", "nearest", (1, 4)),
        ((39, 31), "none", "linear", (1, 4)),  # past the last anchor the map is replicated
    ],
)
def test_the_elements_that_are_computed_are_those_the_point_depends_on(
    point: tuple[int, int], mask: str, fill: str, rows: tuple[int, int]
) -> None:
    """Counted by hand: of the last convolution, and of the one before."""
    net, x = chain(fill=fill), images(1, 32, 40)
    found = cs.macs_at(net, x, [torch.tensor([point])], mask=mask)
    pixels = 32 * 40 // (1 if mask == "all" else 4)
    assert found.elements == (2 * pixels, sum(rows))
    stem = 32 * 40 * 3 * 4 * 9
    assert found.all == stem + 2 * pixels * 144 == net.macs(x, mask=mask).mask
    assert found.receptive == stem + sum(rows) * 144


@pytest.mark.parametrize(("pool", "rows"), [("drop", (1, 9, 9)), ("atrous", (1, 9, 36))])
def test_a_pool_that_drops_reads_nothing_but_what_it_passes_on(pool: str, rows: tuple[int, ...]) -> None:
    """Of a convolution, a pool and a convolution before it, all of them high; a window of two by two otherwise."""
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.MaxPool2d(2)]
    net = convert(nn.Sequential(*layers, nn.Conv2d(4, 4, 3, 1, 1)), output_stride=(1, 4), pool=pool)
    x, points = images(1, 32, 40), [torch.tensor([[20, 10]])]
    found = cs.macs_at(net, x, points, mask="all")
    assert found.elements == (3 * 32 * 40, sum(rows))
    dense = net(x, mask="all")
    assert_rows(cs.read_at(net, x, points, mask="all", reach="receptive"), rows_of(dense, points, 1), 1e-5)


@pytest.mark.parametrize("name", ["residual", "same", slow("spreading")])
def test_nothing_is_computed_twice_or_in_vain(name: str) -> None:
    """Never more than everything; less for few points unless all of an image is looked at; more points, more work."""
    net, size = converted(name), size_of(name)
    x, points = images(2, *size), points_in(size, 12, 8)
    levels = levels_of(net, x)
    before = cs.macs_at(net, x, [part[:1] for part in points], mask=levels)
    assert before.elements[1] < before.elements[0] and before.receptive < before.all
    first = before
    for count in (2, 5, 12):
        found = cs.macs_at(net, x, [part[:count] for part in points], mask=levels)
        assert found.all == before.all == net.macs(x, mask=levels).mask
        assert before.receptive <= found.receptive <= found.all
        assert before.elements[0] == found.elements[0]
        assert before.elements[1] <= found.elements[1] <= found.elements[0]
        before = found
    assert first.receptive < before.receptive


def test_all_pixels_need_everything() -> None:
    net, x = converted("residual"), images(1, 32, 48)
    levels = levels_of(net, x)
    y, column = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    found = cs.macs_at(net, x, [torch.stack((column.flatten(), y.flatten()), 1)], mask=levels)
    assert found.receptive == found.all and found.elements[0] == found.elements[1]


@pytest.mark.parametrize("at", some([0, 1, 2]))
def test_squeeze_excite_needs_the_whole_image_and_nothing_behind_it_does(at: int) -> None:
    """The later it stands, the more is needed; behind it only what the point depends on."""
    model = randomise(squeezed(at))
    net, x = convert(model), images(1, *SIZE)
    levels, (point,) = levels_of(net, x), points_in(SIZE, 1)
    found = cs.macs_at(net, x, [point], mask=levels)
    shares = found.elements[1] / found.elements[0]
    assert (shares < 0.6, shares > 0.3, shares > 0.6)[at]


@pytest.mark.parametrize("mask", ["none", "confidence:threshold=0.9"])
def test_work_is_that_of_the_mask_with_its_first_pass_too(mask: str) -> None:
    net, x, (point,) = converted("decoding"), images(1, 64, 96), points_in((64, 96), 1)
    work = net.macs(x, mask=mask)
    assert cs.macs_at(net, x, [point], mask=mask).all == work.mask
    assert (work.of_mask > 0) == (mask != "none")


# -- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fill"), covering(["residual", "squeezed", "pools"], FILLS))
def test_gradients_are_those_of_the_dense_output_at_the_points(name: str, fill: str) -> None:
    """Of every parameter and of the image."""
    net, points = converted(name, torch.float64, fill=fill), points_in(SIZE, 5, 0)
    x = images(2, *SIZE, torch.float64).requires_grad_()
    levels = levels_of(net, x)
    weights = torch.randn(5, 48, dtype=torch.float64)
    wanted = [x, *net.parameters()]
    found = cs.read_at(net, x, points, mask=levels)[0]
    expected = rows_of(net(x, mask=levels), points, 2)[0]
    gradients = [
        torch.autograd.grad((rows * weights[:, : rows.shape[1]]).sum(), wanted) for rows in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other, 1e-9)
    assert any(float(part.abs().max()) > 0 for part in gradients[0][1:])


def test_only_the_whole_of_a_network_that_can_be_trained_has_a_gradient() -> None:
    net, x, points = converted("residual"), images(1, *SIZE).requires_grad_(), points_in(SIZE, 3)
    assert cs.read_at(net, x, points)[0].requires_grad
    assert not cs.read_at(net, x, points, reach="receptive")[0].requires_grad
    assert not cs.read_at(net.optimize(), x, points)[0].requires_grad
    with torch.no_grad():
        assert not cs.read_at(net, x, points)[0].requires_grad


def test_a_network_in_training_is_read_whole() -> None:
    """Its batch statistics depend on everything, as those of a call."""
    net, x, points = converted("residual").train(), images(2, *SIZE), points_in(SIZE, 3, 2)
    levels, other = levels_of(net, x), copy.deepcopy(net)
    found = cs.read_at(net, x, points, mask=levels)
    assert_rows(found, rows_of(other(x, mask=levels), points, 2), 1e-6)
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    with pytest.raises(cs.InvalidInput, match="no receptive field") as caught:
        cs.read_at(net, x, points, reach="receptive")
    assert "net.eval()" in caught.value.next


# -- masks and outputs ---------------------------------------------------------------------------------


def describing(form: type) -> nn.Module:
    """A score map, descriptors, and a vector for the image, in a dictionary or a tuple."""

    def describe(net: Any, image: Tensor) -> Any:
        found = net.body(image)
        several = {"scores": net.score(found), "descriptors": net.features(found)}
        several["image"] = net.image(found.mean((2, 3)))
        return several if form is dict else tuple(several.values())

    score, features, image = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 2)
    return Composed(describe, body=plain()[:5], score=score, features=features, image=image)


@pytest.mark.parametrize("form", [dict, tuple])
@torch.no_grad()
def test_one_of_several_outputs_is_read_by_its_name_or_place(form: type) -> None:
    torch.manual_seed(0)
    net = convert(describing(form), output_stride=(2, 4))
    x, points = images(2, *SIZE), points_in(SIZE, 4, 2)
    names: list[Any] = ["scores", "descriptors", "image"] if form is dict else [0, 1, 2]
    dense = net(x, mask="edges:threshold=1")
    for name in names[:2]:
        assert readable(net, name)
        for reach in ("all", "receptive"):
            found = cs.read_at(net, x, points, mask="edges:threshold=1", output=name, reach=reach)
            assert_rows(found, rows_of(dense[name], points, 2), 1e-6)
    assert not readable(net, names[2]) and not readable(net) and not readable(net, "depth")
    with pytest.raises(cs.InvalidInput, match="not read from the adaptive region") as refused:
        cs.read_at(net, x, points, output=names[2])
    assert "output=" in refused.value.next
    for wrong in (None, "descriptor", 7):
        with pytest.raises(cs.UnknownName) as caught:
            cs.read_at(net, x, points, output=wrong)
        assert all(str(name) in caught.value.next for name in names)


@torch.no_grad()
def test_the_keypoints_mask_is_given_the_points_that_are_read() -> None:
    net, x, points = converted("residual"), images(2, *SIZE), points_in(SIZE, 3, 0)
    mask = "keypoints:detector=given,dilations=5/11"
    with keypoints_at(points):
        dense = net(x, mask=mask)
    levels = net.levels.clone()
    for reach in ("all", "receptive"):
        rows = cs.read_at(net, x, points, mask=mask, reach=reach)
        assert_rows(rows, rows_of(dense, points, 2), limit(reach))
        assert torch.equal(net.levels, levels)
    for part, map_ in zip(points, levels, strict=True):
        for point in part:
            assert map_[samples(point, 2, dense)] == 0
    with keypoints_at(points):
        assert cs.macs_at(net, x, points, mask=mask).all == net.macs(x, mask=mask).mask
    with pytest.raises(cs.InvalidInput, match="no keypoints"):
        net(x, mask=mask)


@pytest.mark.parametrize("reach", ["all", "receptive"])
@torch.no_grad()
def test_a_mask_that_looks_ahead_is_asked_once_and_right(reach: Any) -> None:
    torch.manual_seed(0)
    net = convert(describing(dict), output_stride=(2, 4))
    x, points = images(2, *SIZE), points_in(SIZE, 4, 2)
    mask = "keypoints:detector=own,count=5,dilations=9"
    dense = net(x, mask=mask)["descriptors"]
    assert 0 < net.active_fraction < 1
    rows = cs.read_at(net, x, points, mask=mask, output="descriptors", reach=reach)
    assert_rows(rows, rows_of(dense, points, 2), limit(reach))


@torch.no_grad()
def test_a_network_uses_its_own_mask_unless_another_is_given() -> None:
    net, x, points = converted("residual", mask="edges:threshold=2"), images(1, *SIZE), points_in(SIZE, 4)
    own = cs.read_at(net, x, points)
    assert_rows(own, rows_of(net(x), points, 2))
    levels = net.levels
    other = cs.read_at(net, x, points, mask="all")
    assert not torch.equal(own[0], other[0]) and net.active_fraction == 1
    cs.read_at(net, x, points, reach="receptive")
    assert torch.equal(net.levels, levels) and net.active_fraction < 1
    net.mask = "all"
    assert_rows(cs.read_at(net, x, points), other)


def flattened(net: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """What follows its map needs the size it was made for, so the map leaves at that."""
    found = net.body(image)
    return found, net.last(found.flatten(1))


# Of `cut` the level map has more samples.
@pytest.mark.parametrize(("body", "size", "own"), [(residual, (64, 96), (8, 12)), (cut, SIZE, (7, 11))])
@pytest.mark.parametrize("align", ["cell", "corners"])
@torch.no_grad()
def test_a_map_that_leaves_at_its_own_size_is_read_at_that(
    body: Callable[[], nn.Module], size: Size, own: Size, align: Any
) -> None:
    """Every pixel, with everything and with what is needed only."""
    torch.manual_seed(0)
    example, x = torch.zeros(1, 3, *size), images(1, *size)
    net = convert(
        Composed(flattened, body=body(), last=nn.Linear(16 * own[0] * own[1], 2)), example_input=example
    )
    y, column = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    every = torch.stack((column.flatten(), y.flatten()), 1)
    dense = net(x, mask="all")[0]
    assert tuple(dense.shape[2:]) == own
    if align == "corners":
        rows = torch.tensor([round(place * (own[0] - 1) / (size[0] - 1)) for place in range(size[0])])
        columns = torch.tensor([round(place * (own[1] - 1) / (size[1] - 1)) for place in range(size[1])])
    else:
        rows = (torch.arange(size[0]) // 8).clamp(max=own[0] - 1)
        columns = (torch.arange(size[1]) // 8).clamp(max=own[1] - 1)
    wanted = dense[0][:, rows][:, :, columns].flatten(1).T
    for reach in ("all", "receptive"):
        found = cs.read_at(net, x, [every], mask="all", output=0, reach=reach, align=align)
        assert_rows(found, [wanted], 1e-5)


# -- what is refused -----------------------------------------------------------------------------------


def ended() -> cs.AdaptiveModel:
    return convert(nn.Sequential(residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)))


def hosted() -> Any:
    model = Undecided(residual()).eval()
    return unverified(model, "none", output_stride=(2, 8), example_input=images(1, *SIZE))


ONE = torch.zeros(1, 2)
BEYOND = ((97.0, 3.0), (3.0, 65.0), (-1.0, 3.0), (math.nan, 3.0))
# What is given in place of a network, points of two images and the defaults; the error, and words of it.
REFUSED: list[tuple[dict[str, Any], type[cs.CadError], tuple[str, ...]]] = [
    *(({"points": [ONE] * n}, cs.InvalidInput, (f"a list of {n} for a batch of 2",)) for n in (0, 1, 3)),
    ({"points": None}, cs.InvalidInput, ("NoneType",)),
    ({"points": torch.zeros(4, 2)}, cs.InvalidInput, ("(4, 2)",)),
    ({"points": [ONE, torch.zeros(1, 3)]}, cs.InvalidInput, ("(1, 3)",)),
    *(({"points": [ONE, torch.tensor([at])]}, cs.InvalidInput, ("not in the image",)) for at in BEYOND),
    ({"align": "corner"}, cs.UnknownName, ("did you mean corners",)),
    ({"align": "centre"}, cs.UnknownName, ("cell, corners",)),
    *(({"output": name}, cs.UnknownName, ("leave output out",)) for name in ("map", 1)),
    ({"mask": "edgs"}, cs.UnknownName, ("edges",)),
    ({"mask": torch.zeros(1, 3, 3).long()}, cs.InvalidInput, ("shape (1, 3, 3)",)),
    *(({"net": net}, cs.InvalidInput, ("no network that is adaptive", "adaptify")) for net in (None, plain)),
    ({"net": ended}, cs.InvalidInput, ("region: 3 makes it", "leaves the region unchanged")),
    ({"net": hosted}, cs.InvalidInput, ("HostedModel cannot be read at points",)),
]
OF_READING = ({"reach": "some"}, cs.UnknownName, ("all, receptive",))
OF_WORK = ({"net": lambda: converted("residual").train()}, cs.InvalidInput, ("training mode",))


@pytest.mark.parametrize(
    ("read", "given", "error", "words"),
    [
        *((read, *row) for read in (cs.read_at, cs.macs_at) for row in REFUSED),
        *((cs.read_at, *OF_READING), (cs.macs_at, *OF_WORK)),
    ],
)
def test_what_is_not_read_at_points_is_refused(
    read: Callable[..., Any], given: dict[str, Any], error: type[cs.CadError], words: tuple[str, ...]
) -> None:
    given = {"net": lambda: converted("residual"), "points": points_in(SIZE, 1, 1), **given}
    make = given.pop("net")
    with pytest.raises(error) as caught:
        read(make and make(), images(2, *SIZE), **given)
    assert caught.value.next and all(word in str(caught.value) for word in words)


def test_the_part_of_a_host_and_no_output_behind_the_region_is_readable() -> None:
    net, x, points = hosted(), images(1, *SIZE), points_in(SIZE, 2)
    assert not readable(net) and not readable(ended()) and readable(net.part)
    assert cs.read_at(net.part, x, points) and cs.macs_at(net.part, x, points)
