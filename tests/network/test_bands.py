"""A picture computed in bands of rows gives what it gives whole, in the memory that is asked for. The rules of fused
layers are asked by every case."""

from __future__ import annotations

import copy
import itertools
import operator
import os
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from conftest import assert_same, covering, slow, some, thorough
from networks import Composed, Encoded, ResidualSegmenter, Segmenter, build, seeded, strided, unverified
from random_networks import random_case
from timm.layers import CondConv2d
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import cadsurgery as cs
from benchmarks.zoo.bands_check import MASK, MUCH, bands_of
from benchmarks.zoo.corpus import CHECKOUT, subject
from cadsurgery.elements.backends import maps
from cadsurgery.elements.kernel_map import Window
from cadsurgery.network.bands.steps import rows_of_window
from cadsurgery.network.bands.walk import SAME, Bytes, RowsRead, Stream, Walk
from cadsurgery.support.memory import bytes_of

SEEDS = int(os.environ.get("CADSURGERY_SEEDS", 500))


def difference(one: Any, other: Any) -> float:
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert all(type(a) is type(b) for a, b in pairs)
    found = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    assert found and all(a.shape == b.shape and a.dtype == b.dtype for a, b in found)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in found)


def picture(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 3, *size, dtype=dtype)


def norms(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Norms over the image, pooling to bins, and a resize, as decoders have them."""
    x = net.body(net.stem(x))
    return nn.functional.interpolate(net.head(net.up(x)), scale_factor=2.0), net.bins(x)


def pools(net: Any, x: Tensor) -> Tensor:
    """Poolings with padding, reflected and repeated borders, and gates of the whole image."""
    x = net.body(net.pool(net.stem(x))).relu()
    return net.head(net.more(x * net.gate(x)))


def located(net: Any, image: Tensor, y: Tensor) -> Tensor:
    lines = [torch.linspace(-1, 1, side).type_as(y) for side in y.shape[2:]]
    rows, columns = lines[0].view(1, 1, -1, 1), lines[1].view(1, 1, 1, -1)
    return net.last(torch.cat([y, rows.expand(len(y), 1, *y.shape[2:]), columns.expand_as(y[:, :1])], 1))


def borders(net: Any, x: Tensor) -> Tensor:
    """Padded maps that two windows read, padding that a stride asks for, depth to space, a map that grows and is cut
    on all sides."""
    x = nn.functional.pad(net.stem(x), (2, 0, 2, 0))
    x = net.body(x) + nn.functional.max_pool2d(x, 3, 1)
    pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
    (top, left), (bottom, right) = (pad // 2 for pad in pads), (pad - pad // 2 for pad in pads)
    x = net.strided(nn.functional.pad(x, (left, right, top, bottom)))
    return net.up(nn.functional.pixel_shuffle(x, 2))[..., 1:-1, 1:-1]


def channels_last(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks with the channels last and what is added to them; returns such a map, and its means."""
    x = net.stem(x).permute(0, 2, 3, 1)
    x = x + net.blocks(x)
    x = net.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x, net.norm(x).mean((1, 2))


def own_residual(net: Any, x: Tensor) -> Tensor:
    """Windows whose result is added to the map that they read."""
    x = net.two(net.one(x).relu()).relu()
    x = x + net.across(x)
    x = net.down((x + net.square(x)).relu())
    return x + net.last(x)


def conv(
    inputs: int, outputs: int, side: int = 3, stride: int = 1, groups: int = 1, **more: Any
) -> nn.Conv2d:
    """A convolution whose padding keeps the size, but for the stride."""
    return nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, **more)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "own residual": lambda: Composed(
        own_residual,
        **{"one": conv(3, 8), "two": conv(8, 8, stride=2), "square": conv(8, 8), "down": conv(8, 8, 5, 2)},
        **{"across": nn.Conv2d(8, 8, (1, 7), padding=(0, 3)), "last": conv(8, 8, 5, groups=8)},
    ),
    "strided": lambda: strided(3, outputs=4, kernel=3),
    "segmenter": Segmenter,
    "residual segmenter": ResidualSegmenter,
    "norms": lambda: Composed(
        norms,
        stem=nn.Sequential(conv(3, 8, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
        body=nn.Sequential(conv(8, 8, stride=2), nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
        bins=nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(8, 8, 1)),
        **{"up": nn.ConvTranspose2d(8, 8, 2, 2), "head": nn.Conv2d(8, 4, 1)},
    ),
    "pools": lambda: Composed(
        pools,
        stem=conv(3, 8, 7, 2, padding_mode="reflect"),
        body=nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="replicate"),
        gate=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()),
        **{"pool": nn.AvgPool2d(3, 2, 1), "more": nn.MaxPool2d(2, 2, ceil_mode=True), "head": conv(8, 3, 5)},
    ),
    "bins": lambda: subject("scenes:PSPNetLike", CHECKOUT).build(),
    "coordinates": lambda: Encoded(located, last=conv(10, 4)),
    "borders": lambda: Composed(
        borders,
        stem=nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, 8, 7, 2)),
        **{
            "body": nn.Conv2d(8, 8, 3),
            "strided": nn.Conv2d(8, 16, 3, 2),
            "up": nn.ConvTranspose2d(4, 3, 4, 2),
        },
    ),
    "decoder": lambda: subject("unets:unet_bilinear", CHECKOUT).build(),
    "channels last": lambda: Composed(
        channels_last,
        blocks=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)),
        **{"stem": nn.Conv2d(3, 8, 4, 4), "down": nn.Conv2d(8, 8, 2, 2), "norm": nn.LayerNorm(8)},
    ),
    "convnext": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5),
    "lopsided": lambda: make_lopsided(),
}
SMALL = tuple(name for name in NETWORKS if name not in ("convnext", "lopsided"))
LIBRARY = ("densenet121", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "vgg11")


def made(name: str) -> nn.Module:
    return build(name, torch.float64, by=8) if name in LIBRARY else seeded(NETWORKS[name])


# Bands of the fewest rows find most. (With a mask: the rows of `test_rows_are_those_of_the_call_from_any_start`.)
# Bands of the fewest rows find most. (With a mask: the rows of `test_rows_are_those_of_the_call_from_any_start`.)
FLOORS, SIZE = {"coarsest": 16}, (75, 101)
WHOLE = [
    (name, mask, rows, FLOORS, SIZE)
    if name in SMALL and (mask, rows) == ("all", 1)
    else thorough(name, mask, rows, FLOORS, SIZE, few=3)
    for name, mask, rows in itertools.product((*SMALL, "convnext", *LIBRARY), ("all", MASK), (1, 16, 1000))
]
STRIDES = [(name, MASK, 8, {}, (131, 101)) for name in ("strided", "segmenter", "decoder")]
STRIDES += [slow(name, MASK, 64, {}, (131, 101)) for name in ("strided", "segmenter", "decoder", *LIBRARY)]
STRIDES += [slow(name, MASK, 8, {}, (131, 101)) for name in LIBRARY]


@pytest.mark.parametrize(("name", "mask", "rows", "options", "size"), [*WHOLE, *STRIDES])
@torch.no_grad()
def test_in_bands_is_whole(
    name: str, mask: str, rows: int, options: dict[str, Any], size: tuple[int, int]
) -> None:
    """Floors, where `all` is the network as given, and removed strides; at odd sizes, for bands of the fewest rows and
    for one band."""
    net, image = unverified(made(name), mask, example_input=picture(64, 96), **options), picture(*size)
    whole, banded = net.optimize(), net.optimize(memory=MUCH)
    with bands_of(rows):
        output = banded(image)
    assert difference(whole(image), output) < 1e-9
    assert torch.equal(whole.levels, banded.levels)


def in_place(change: Callable[[Tensor], Tensor], skips: bool = False) -> nn.Module:
    """Halves a map in place, which a convolution before it reads, too, and, if `skips`, one behind it."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.body(net.stem(x).sigmoid())
        y = net.before(x)
        z = net.deep(change(x))
        return y + z + x if skips else y + z

    stem, body = conv(3, 8, stride=2), conv(8, 8, stride=2)
    return Composed(forward, stem=stem, body=body, before=conv(8, 8, 5), deep=conv(8, 8))


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.mul_(0.5),
    "function": lambda x: nn.functional.elu(x, inplace=True),
    "module": nn.ELU(inplace=True),
    "operator": lambda x: operator.imul(x, 0.5),
    "view": lambda x: x.view(len(x), -1, *x.shape[2:]).clamp_(-0.1, 0.1),
}


@pytest.mark.parametrize(
    ("changed", "mask", "rows"),
    covering(
        [*((name, False) for name in IN_PLACE), ("method", True), ("module", True)], ["all", MASK], [2, 16]
    ),
)
@torch.no_grad()
def test_a_change_in_place_reaches_what_is_read_behind_it_alone(
    changed: tuple[str, bool], mask: str, rows: int
) -> None:
    """Neither fused layers nor bands read the map at another time than the network."""
    change, skips = changed
    model, image = seeded(lambda: in_place(IN_PLACE[change], skips)), picture(75, 101)
    net = unverified(model, mask, example_input=picture(64, 96), coarsest=16)
    expected = model(image) if mask == "all" else net(image)
    with bands_of(rows):
        output = net.optimize(memory=MUCH)(image)
    assert difference(expected, output) < 1e-9 and difference(expected, net.optimize()(image)) < 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_random_networks_in_bands_are_whole_or_refused() -> None:
    """Of those that convert; what needs a whole map is refused in words, before anything is computed."""
    computed = 0
    for seed in range(SEEDS):
        case = random_case(seed)
        for options in ({"coarsest": 16}, {}):
            try:
                net = unverified(case.model, MASK, example_input=case.given, **options)
                expected = net.optimize()(case.image, *case.more)
            except cs.CadError:
                continue
            for rows in (8, 64):
                with bands_of(rows):
                    try:
                        output = net.optimize(memory=MUCH)(case.image, *case.more)
                    except (cs.CannotConvert, cs.InvalidInput) as refusal:
                        assert refusal.why and refusal.next, seed
                        continue
                assert difference(expected, output) < 1e-9, seed
                computed += 1
    assert computed >= SEEDS // 5


@pytest.mark.parametrize("seed", [192, slow(293), slow(435), slow(481)])
@torch.no_grad()
def test_a_fused_sum_reads_a_map_of_an_earlier_stage(seed: int) -> None:
    """Random networks with strides removed whose convolution adds a map that has more elements."""
    case = random_case(seed)
    net = unverified(case.model, MASK, example_input=case.given)
    expected = net.optimize()(case.image, *case.more)
    for rows in (8, 64):
        with bands_of(rows):
            output = net.optimize(memory=MUCH)(case.image, *case.more)
        assert difference(expected, output) < 1e-9


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_batch_is_computed_picture_by_picture_in_any_memory_format(layout: torch.memory_format) -> None:
    net = unverified(made("segmenter"), MASK, example_input=picture(64, 96), coarsest=16)
    images = torch.cat([picture(80, 96), picture(80, 96)]).contiguous(memory_format=layout)
    whole, banded = net.optimize(), net.optimize(memory=MUCH)
    with bands_of(16):
        output = banded(images)
    assert difference(whole(images), output) < 1e-9 and torch.equal(whole.levels, banded.levels)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_other_types_agree_up_to_their_rounding(dtype: torch.dtype, error: float) -> None:
    model = made("residual segmenter").to(torch.float32)
    net = unverified(model, "all", example_input=picture(64, 96, dtype=torch.float32), coarsest=16)
    image = picture(80, 96, dtype=torch.float32).to(dtype)
    options: dict[str, Any] = {"precision": "bfloat16"} if dtype == torch.bfloat16 else {}
    with bands_of(16):
        output = net.optimize(memory=MUCH, **options)(image)
    assert difference(net.optimize(**options)(image), output) < error


@torch.no_grad()
def test_threads_may_call_it_at_once() -> None:
    net = unverified(made("strided"), MASK, example_input=picture(64, 96), coarsest=16)
    images = [picture(80, 96) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(torch.no_grad()(net.optimize(memory=MUCH)), images))
    assert all(
        difference(net.optimize()(one), found) < 1e-9 for one, found in zip(images, outputs, strict=True)
    )


@torch.no_grad()
def test_a_copy_of_the_copy_has_the_same_memory() -> None:
    net = unverified(made("strided"), "all", example_input=picture(64, 96), coarsest=16)
    banded, image = net.optimize(memory=MUCH), picture(80, 96)
    for other in (copy.deepcopy(banded), pickle.loads(pickle.dumps(banded))):
        assert difference(banded(image), other(image)) == 0 and other.plan_memory(image).peak


# -- pictures and results that are larger than the memory ------------------------------------------------


@pytest.mark.parametrize(("name", "mask"), covering(["segmenter", "norms", "pools"], ["all", MASK]))
@torch.no_grad()
def test_rows_are_those_of_the_call_from_any_start(name: str, mask: str) -> None:
    """The picture is any array that gives rows; a later start computes no more than what is read for it."""
    net = unverified(made(name), mask, example_input=picture(64, 96), coarsest=16)
    image = picture(175, 101)
    whole, banded = tree_leaves(net.optimize()(image))[0], net.optimize(memory=MUCH)
    height, tasks = whole.shape[2], list[int]()
    for start in (0, 1, height // 3, height - 1):
        with bands_of(16):
            rows = banded.rows(image[0].numpy(), start=start)
        parts = list(rows)
        first = parts[0][0]
        assert rows.shape == whole.shape[1:] and first <= start
        assert [number for number, _ in parts] == [
            first + sum(part.shape[1] for _, part in parts[:place]) for place in range(len(parts))
        ]
        assert difference(whole[0, :, first:], torch.cat([part for _, part in parts], 1)) < 1e-9
        tasks.append(rows.walks.walks[-1].measured().computed)
        if mask == "all":
            assert int(rows.levels.sum()) == 0
    assert tasks[-1] < tasks[0]


class Watched:
    """A picture that notes the most rows that were read of it at once."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.shape, self.most = image, image.shape, 0

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows = self.image[place]
        self.most = max(self.most, rows.shape[1])
        return rows


@pytest.mark.parametrize("mask", some(["all", "none", MASK], every=3))
def test_rows_can_be_computed_again_and_leave_gradients_to_the_caller(mask: str) -> None:
    """Only a mask that looks at the picture is given all of it."""
    net = unverified(made("strided"), mask, example_input=picture(64, 96), coarsest=16)
    watched = Watched(picture(256, 96)[0])
    with bands_of(16):
        rows = net.optimize(memory=MUCH).rows(watched)
    seen = []
    for _, part in rows:
        assert torch.is_grad_enabled() and not part.requires_grad
        seen.append(part)
    assert torch.equal(torch.cat(seen, 1), torch.cat([part for _, part in rows], 1))
    assert torch.is_grad_enabled() and (watched.most == 256) == (mask == MASK)


def test_rows_of_what_has_no_such_rows_are_refused() -> None:
    vector = nn.Sequential(*strided(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = picture(64, 96)
    for model, memory, start, words in (
        (made("strided"), MUCH, 64, "is no row of the result"),
        (made("strided"), None, 0, "runs whole"),
        (vector.double(), MUCH, 0, "holds no map"),
    ):
        copied = unverified(model, "all", example_input=image, coarsest=4).optimize(memory=memory)
        with pytest.raises(cs.InvalidInput, match=words):
            copied.rows(image[0], start=start)
    net = unverified(seeded(lambda: Encoded(boxes)), MASK, example_input=image, coarsest=16)
    with pytest.raises(cs.InvalidInput, match="holds no map") as refusal:  # while a call gives them
        net.optimize(memory=MUCH).rows(image[0])
    assert "boxes" in refusal.value.why and "as a tensor" in refusal.value.next
    assert_same(net.optimize(memory=MUCH)(image), net(image), 1e-9)


def boxes(net: Any, image: Tensor, y: Tensor) -> Tensor:
    return net.head(y).permute(0, 2, 3, 1).reshape(len(y), -1, 4).softmax(-1)


# -- the memory that is asked for ----------------------------------------------------------------------


@torch.no_grad()
def test_too_little_memory_names_the_least_that_works() -> None:
    net = unverified(made("segmenter").float(), "all", example_input=torch.randn(1, 3, 64, 96), coarsest=16)
    image = torch.randn(1, 3, 1024, 1024)
    with pytest.raises(cs.InvalidInput, match="too little for this picture") as refusal:
        net.optimize(memory="1KiB")(image)
    least = least_of(refusal)
    banded = net.optimize(memory=least)
    plan = banded.plan_memory(image)
    assert plan.peak <= bytes_of(least) and plan.band < 1024
    amount, unit = least[:-3], least[-3:]
    assert f"at most {amount} {unit} at once, in bands of {plan.band} rows, in 1 walk" in str(plan)
    assert difference(net.optimize()(image), banded(image)) < 1e-5


@torch.no_grad()
def test_the_memory_grows_with_the_width_and_not_with_the_height() -> None:
    net = unverified(made("strided").float(), "all", example_input=torch.randn(1, 3, 64, 96), coarsest=16)
    banded = net.optimize(memory=MUCH)
    with bands_of(16):
        peaks = [
            banded.plan_memory(torch.empty(1, 3, height, width).normal_()).peak
            for height, width in ((256, 128), (1024, 128), (256, 256))
        ]
    assert peaks[1] <= 1.1 * peaks[0] and peaks[2] > 1.8 * peaks[0]


@pytest.mark.parametrize("name", ["segmenter", "residual segmenter"])
@torch.no_grad()
def test_rows_with_many_elements_and_with_few_follow_each_other(name: str) -> None:
    """The memory of maps becomes larger and smaller, and their elements move."""
    image = torch.zeros(1, 3, 611, 90, dtype=torch.float64)
    for first, end in ((40, 120), (190, 200), (300, 480), (560, 611)):
        image[:, :, first:end] = picture(end - first, 90)
    net = unverified(made(name), "gradient | budget:fraction=0.5", example_input=picture(64, 96), coarsest=16)
    assert difference(net.optimize()(image), net.optimize(memory=MUCH)(image)) < 1e-9


@torch.no_grad()
def test_layers_behind_each_other_share_kernel_maps_which_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made_maps, alive = list[Any](), list[int]()
    layers = [nn.Conv2d(3, 8, 3, 2, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))]
    model = seeded(lambda: nn.Sequential(*layers))
    net = unverified(model, MASK, example_input=picture(64, 96), coarsest=16)
    image, find = picture(320, 64), maps.shift_taps

    def counted(*args: Any) -> Any:
        found = find(*args)
        made_maps.append(weakref.ref(found[0]))
        alive.append(sum(one() is not None for one in made_maps))
        return found

    monkeypatch.setattr(maps, "shift_taps", counted)
    with bands_of(16):
        net.optimize(memory=MUCH)(image)
    rows = 320 // 16
    assert (
        rows <= len(made_maps) <= 3 * rows
    )  # one for each row of the seven layers' two windows, and at the exit
    assert max(alive) <= 8


def lopsided(net: Any, x: Tensor) -> Tensor:
    """Windows that are not square, padded unlike at each side, a transposed convolution, and what tells rows from
    columns."""
    x = net.up(net.down(net.body(x)).relu())
    return x * torch.linspace(0, 1, x.shape[2], dtype=x.dtype, device=x.device).view(-1, 1)


def make_lopsided() -> nn.Module:
    stem, wide = nn.Conv2d(3, 8, (3, 5), 2, (1, 2)), nn.Conv2d(8, 8, (1, 7), padding=(0, 3))
    body = nn.Sequential(stem, wide, nn.ReLU(), nn.AvgPool2d((3, 1), 1, (1, 0)))
    return Composed(
        lopsided, body=body, down=nn.Conv2d(8, 8, (2, 3), 2, (0, 1)), up=nn.ConvTranspose2d(8, 8, 2, 2)
    )


def least_of(refusal: pytest.ExceptionInfo[cs.InvalidInput]) -> str:
    return refusal.value.next.partition('memory="')[2].partition('"')[0]


@pytest.mark.parametrize(
    ("name", "mask"), covering(some(["segmenter", "pools", "norms", "lopsided"]), ["all", MASK])
)
@torch.no_grad()
def test_wide_pictures_are_refused_with_what_rows_take_and_computed_in_it(name: str, mask: str) -> None:
    net = unverified(made(name), mask, example_input=picture(64, 96), coarsest=16)
    image = torch.cat([picture(76, 1601), picture(76, 1601)])
    with pytest.raises(cs.InvalidInput, match="too little for this picture") as refusal:
        net.optimize(memory="1KiB")(image)
    banded = net.optimize(memory=least_of(refusal))
    assert banded.plan_memory(image).peak <= bytes_of(least_of(refusal))
    assert difference(net.optimize()(image), banded(image)) < 1e-9


@torch.no_grad()
def test_means_over_the_image_are_passes_that_keep_what_fits() -> None:
    net = unverified(made("pools").float(), "all", example_input=torch.randn(1, 3, 64, 96), coarsest=16)
    banded, image = net.optimize(memory=MUCH), torch.randn(1, 3, 512, 128)
    kept = banded.plan_memory(image)
    assert len(kept.walks) == 2 and kept.work == 1
    with pytest.raises(cs.InvalidInput) as refusal:
        net.optimize(memory="1KiB")(image)
    assert bytes_of(least_of(refusal)) < kept.peak


def test_amounts_of_memory() -> None:
    assert bytes_of("1.5GiB") == bytes_of("1536 MiB") == bytes_of(3 * 2**29)
    assert bytes_of("2GB") == 2 * 10**9 and bytes_of("512K") == 2**19
    for wrong in ("much", "", 0, -1, True, "0MiB", "1.5XB"):
        with pytest.raises(cs.InvalidInput, match="no amount of memory"):
            bytes_of(wrong)


# -- what is refused -----------------------------------------------------------------------------------


def growing(*more: nn.Module) -> nn.Module:
    """A network that is dense behind a convolution whose padding makes its map larger."""
    return nn.Sequential(*strided(2, 4), nn.Conv2d(4, 4, 3, 1, 2), *more)


# A network, its mask, a picture that its copy in bands refuses, and words of the refusal; what it takes whole.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int], tuple[str, ...], bool]] = {
    "a flip": (
        lambda: Encoded(lambda net, x, y: net.head(y.flip(2))),
        *("all", (80, 96), ("cannot be computed in bands", "flip", "memory")),
        True,
    ),
    "a view that is changed": (
        lambda: in_place(IN_PLACE["view"], skips=True),
        *("all", (75, 101), ("cannot be computed in bands", "it changes in place what others read.")),
        True,
    ),
    "a window of the example's map": (
        lambda: growing(nn.AvgPool2d(30, ceil_mode=True)),
        *("all", (333, 90), ("its window was the whole map where the network was converted.",)),
        False,
    ),
    "little of a large map": (lambda: detector(salient), "all", (203, 131), ("bands",), True),
    "a mask of a first pass": (
        lambda: strided(3, outputs=4, kernel=3),
        *("preview:scale=0.5", (80, 96), ("not computed in bands", "first pass")),
        True,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_needs_more_than_rows_is_refused_in_words_in_bands_alone(name: str) -> None:
    make, mask, size, words, is_whole = REFUSED[name]
    model, image = seeded(make), picture(*size)
    net = unverified(model, mask, example_input=picture(64, 96), coarsest=16)
    with pytest.raises((cs.CannotConvert, cs.InvalidInput)) as refusal:
        net.optimize(memory=MUCH)(image)
    assert all(word in str(refusal.value) for word in words) and refusal.value.next
    small = image if is_whole else picture(72, 64)
    copied = net.optimize() if is_whole else net.optimize(memory=MUCH)
    assert difference(net(small), copied(small)) < 1e-9


def test_only_a_new_copy_gets_a_memory() -> None:
    net = unverified(made("strided"), "all", example_input=picture(64, 96), coarsest=16)
    with pytest.raises(cs.InvalidInput, match="optimised network gets no other memory"):
        net.optimize().optimize(memory=MUCH)
    with pytest.raises(cs.InvalidInput, match="runs whole"):
        net.optimize().plan_memory(picture(80, 96))
    with pytest.raises(cs.InvalidInput, match="no amount of memory"):
        net.optimize(memory="much")


# -- the schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_no_band_computes_more_rows_than_others(mode: str, dilation: int) -> None:
    """However far a deep network reads ahead: the first bands lie above the picture."""
    padding = (dilation,) * 4
    window = Window((3, 3), dilation=(dilation, dilation), padding=padding, mode=mode)
    maps = [Stream(height=1024)]
    for place in range(40):
        stride = 2 if place in (1, 5) else 1
        rows = rows_of_window(window._replace(stride=stride), maps[-1].height)
        maps.append(Stream(height=maps[-1].height // stride, row=10, sources=[(maps[-1], rows)]))
    walk = Walk(maps, maps[-1:], 16, maps[:1])
    noted = Noted(walk)
    for one, _, (first, end) in walk.carry_out(noted):
        assert end - first <= 2 * 16 * one.height // maps[1].height


class Noted(Bytes):
    """Notes the rows of each map that are there, and asks that rows are read where they are."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk)
        self.held = dict.fromkeys(walk.streams, (0, 0)) | {one: (0, one.height) for one in walk.known}

    def compute(self, one: Stream, first: int, end: int) -> Any:
        begin, stop = self.held[one]
        assert first == stop
        for source, read in one.sources:
            assert self.held[source][0] <= max(read.first(first), 0)
            assert min(read.last(end - 1) + 1, source.height) <= self.held[source][1]
        self.held[one] = begin, end
        super().compute(one, first, end)
        return first, end

    def drop(self, one: Stream, row: int) -> None:
        self.held[one] = max(self.held[one][0], row), self.held[one][1]
        super().drop(one, row)


def test_nothing_is_computed_twice_or_read_before_it_is_there() -> None:
    """A chain with a skip connection: all that is read is held then."""
    window = RowsRead(lambda row: row - 1, lambda row: row + 1)
    strided_window = RowsRead(lambda row: 2 * row - 1, lambda row: 2 * row + 1)
    upwards = RowsRead(lambda row: row // 2, lambda row: row // 2)
    picture = Stream(height=101)
    first = Stream(height=101, row=10, sources=[(picture, window)])
    half = Stream(height=51, row=10, sources=[(first, strided_window)])
    deep = Stream(height=51, row=10, sources=[(half, window)])
    up = Stream(height=101, row=10, sources=[(deep, upwards)])
    both = Stream(height=101, row=10, sources=[(first, SAME), (up, SAME)])
    for rows in (1, 7, 32, 500):
        walk = Walk([picture, first, half, deep, up, both], [both], rows, [picture])
        noted = Noted(walk)
        for _ in walk.carry_out(noted):
            pass
        assert all(noted.held[one][1] == one.height for one in walk.streams)
        assert noted.peak <= sum(one.height * one.row for one in walk.streams)


@pytest.mark.parametrize("names", ["a", "aa", "ab"])
def test_kernel_maps_count_while_layers_behind_each_other_read_them(names: str) -> None:
    """A layer's kernel map of a block is freed behind the block, unless a layer that shares it is still to come."""
    window, of_block = RowsRead(lambda row: row - 4, lambda row: row + 4), 4 * 3

    def bytes_of(taken: int) -> Bytes:
        maps = [Stream(height=64)]
        for name in names:
            more = Stream(height=64, row=10, chunk=4, elements=range(0, 65 * 3, 3), table=(name, taken))
            more.sources = [(maps[-1], window)]
            maps.append(more)
        return Walk(maps, maps[-1:], 4, maps[:1]).measured()

    most = bytes_of(1000).peak - bytes_of(0).peak
    assert most == 1000 * of_block * (2 if names == "aa" else 1)


# -- windows whose padding makes the map grow ----------------------------------------------------------

GROWING: dict[str, Callable[[], nn.Module]] = {
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max pooling by itself": lambda: nn.MaxPool2d(2, 1, 1),
    "mean": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "mean without padding": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
}


def resize(**options: Any) -> nn.Module:
    return Composed(lambda net, x: nn.functional.interpolate(x, **options))


def up_to(more: int) -> nn.Module:
    return Composed(
        lambda net, x: net.up(x, output_size=[2 * n - 1 + more for n in x.shape[2:]]),
        up=nn.ConvTranspose2d(4, 4, 3, 2, 1),
    )


def experts() -> nn.Module:
    """A convolution whose kernel is mixed by the whole image."""
    return Composed(
        lambda net, x: net.mixed(x, torch.sigmoid(net.route(x.mean((2, 3))))),
        mixed=CondConv2d(4, 4, 3, 2, padding="same", num_experts=3),
        route=nn.Linear(4, 3),
    )


WINDOWS: dict[str, Callable[[], nn.Module]] = {
    "means of what is there": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "means by a divisor": lambda: nn.AvgPool2d(4, 3, 2, divisor_override=5),
    "same means": lambda: AvgPool2dSame(3, 2, count_include_pad=False),
    "same largest": lambda: MaxPool2dSame(4, 3),
    "largest of dilated taps": lambda: nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True),
    "space to depth": lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    "depth to space": lambda: nn.PixelShuffle(2),
    "every third": lambda: resize(scale_factor=1 / 3),
    "every fourth": lambda: resize(scale_factor=0.25),
    "half": lambda: resize(scale_factor=0.5, mode="bilinear"),
    "reflected": lambda: nn.Conv2d(4, 4, 5, 2, 2, padding_mode="reflect"),
    "repeated": lambda: nn.Conv2d(4, 4, 5, 1, 4, 2, padding_mode="replicate"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1),
    "transposed with more rows": lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
    "transposed by three": lambda: nn.ConvTranspose2d(4, 4, 5, 3, 2, groups=2, bias=False),
    "transposed that grows": lambda: nn.ConvTranspose2d(4, 4, 7, 2),
    "transposed to a size": lambda: up_to(0),
    "transposed to a size and one": lambda: up_to(1),
    "kernels of experts": experts,
}


WHERE = [*(("dense", name) for name in WINDOWS), *(("region", name) for name in GROWING)]


@pytest.mark.parametrize(("where", "name"), some(WHERE, every=3, rows=True))
@torch.no_grad()
def test_every_window_on_dense_maps_in_bands_is_whole(where: str, name: str) -> None:
    """Called on more rows than asked for, so that their own padding reaches none of these; at sizes with any rest. And
    windows of the region whose padding makes the map grow."""
    layers = (WINDOWS | GROWING)[name], lambda: nn.Conv2d(1 if name == "depth to space" else 4, 2, 3, 2, 1)
    first = growing if where == "dense" else partial(nn.Sequential, *strided(2, 4), nn.Conv2d(4, 4, 1))
    model = seeded(lambda: first(*(make() for make in layers)))
    net = unverified(model, "all", example_input=picture(64, 96), coarsest=4)
    banded = net.optimize(memory=MUCH)
    for height in (75, 76, 77, 78, 79, 80):
        image = picture(height, 61)
        for rows in (1, 16):
            with bands_of(rows):
                assert difference(model(image), banded(image)) < 1e-9


def anchors(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A detector that flattens the scores of its maps to rows at the very end, as YOLOv5 does."""
    b = net.b(net.a(x).relu()).relu()
    rows = []
    for head, found in zip(net.heads, (b, net.c(b).relu()), strict=True):
        y = head(found)
        y = y.view(len(y), 3, 7, *y.shape[2:]).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
        rows.append(y.view(len(x), -1, 7))
    return torch.cat(rows, 1), b


def salient(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    found = net.a(x).relu()
    return found.view(len(x), 2, 4, -1).cumsum(3).amax(3), net.c(found)


def detector(then: Callable[[Any, Tensor], Any]) -> nn.Module:
    """Three strided convolutions, and two heads of anchors."""
    a, b, c = (conv(channels, 8, stride=2) for channels in (3, 8, 8))
    return Composed(then, a=a, b=b, c=c, heads=nn.ModuleList(nn.Conv2d(8, 3 * 7, 1) for _ in range(2)))


@pytest.mark.parametrize("mask", some(["all", "none", MASK], every=3))
def test_rows_of_a_detector_are_arranged_when_its_maps_are_complete(mask: str) -> None:
    torch.manual_seed(0)
    net = unverified(detector(anchors).eval().double(), mask, coarsest=16, example_input=picture(64, 96))
    x = torch.cat([picture(203, 131), picture(203, 131)])
    with pytest.raises(cs.InvalidInput) as refusal:
        net.optimize(memory="1KiB")(x)
    banded = net.optimize(memory=least_of(refusal))
    assert difference(banded(x), net.optimize()(x)) < 1e-12
    assert banded.plan_memory(x).band < 203
