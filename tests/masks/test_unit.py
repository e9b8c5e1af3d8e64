"""Masks see the picture in one unit, whatever the network takes: a threshold means the same on every network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, covering, some
from networks import made_once, strided
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import normalise, street_scene
from cadsurgery.data.networks import IMAGENET_MEAN, IMAGENET_STD, Source, source_of, stated_statistics
from cadsurgery.masks import FineMapSpec, MaskProvider, Normalisation, resolve_mask
from cadsurgery.masks.unit import estimate, read_normalisation

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
CONVENTIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": IMAGENET,
    "-1..1": ((0.5,) * 3, (0.5,) * 3),
    "0..1": ((0.0,) * 3, (1.0,) * 3),
    "0..255": ((0.0,) * 3, (1 / 255,) * 3),
    "caffe": (IMAGENET_MEAN, (1 / 255,) * 3),
}
OTHERS = [name for name in CONVENTIONS if name != "imagenet"]
OF_IMAGES = [
    "edges",
    "edges:threshold=0.95/0.1,dilation=5/15",
    "gradient:threshold=0.5,sigma=1",
    "keypoints:dilations=9/25",
    "edges | budget:fraction=0.3",
    "(edges:threshold=1 | dilate:size=3) + gradient:threshold=2",
    "detail",
]


class Folded(nn.Module):
    """A network of output stride 32 whose first convolution takes pictures after any normalisation.

    That is 1x1, so that no zeros of a border stand for another grey in each convention.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 1)
        with torch.no_grad():  # of a picture p in 0..1 it sees x = (p - mean) / std
            weight = self.first.weight.double()
            bias = self.first.bias.double() + torch.einsum(
                "ocij,c->o", weight, torch.tensor(mean, dtype=torch.float64)
            )
            self.first = self.first.double()
            self.first.weight.copy_(weight * torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1))
            self.first.bias.copy_(bias)
        self.rest = strided(inputs=4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def shown(picture: Tensor, name: str) -> Tensor:
    """A picture in 0..1 as a network of a convention takes it."""
    mean, std = (torch.tensor(values, dtype=picture.dtype).view(-1, 1, 1) for values in CONVENTIONS[name])
    return (picture - mean) / std


def scenes(dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, 96, 150) in 0..1."""
    return torch.stack([street_scene(96, 150, seed) for seed in (0, 1)]).to(dtype)


@made_once
def adapted(name: str, mask: object = "edges", **options: Any) -> cs.AdaptiveModel:
    return cs.adaptify(Folded(*CONVENTIONS[name]), mask, verify_laws=False, **options)


def levels(net: cs.AdaptiveModel, image: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        net(image, **options)
    return net.levels


@pytest.mark.parametrize(("name", "mask"), covering([*OTHERS], [*OF_IMAGES]))
def test_the_same_picture_has_the_same_level_map_on_every_network(mask: str, name: str) -> None:
    """In float64 rounding decides nothing here."""
    first = adapted("imagenet", mask, normalisation=IMAGENET)
    other = adapted(name, mask, normalisation=CONVENTIONS[name])
    expected = levels(first, shown(scenes(), "imagenet"))
    assert 0 < first.active_fraction < 1
    assert torch.equal(levels(other, shown(scenes(), name)), expected)
    with torch.no_grad():
        assert_same(other(shown(scenes(), name)), first(shown(scenes(), "imagenet")), 1e-9)


class Spy(MaskProvider):
    """Keeps what it is shown."""

    image: Tensor

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        self.image = image
        return torch.zeros(grid.batch, *grid.size, dtype=torch.int8)


def test_masks_and_functions_of_users_see_the_unit() -> None:
    spy, seen = Spy(), []

    def function(image: Tensor) -> Tensor:
        seen.append(image)
        return image[:, 0, ::8, ::8] > 0

    net = adapted("0..255", spy, normalisation=(0, 1 / 255))
    image = shown(scenes(), "0..255")
    levels(net, image)
    levels(net, image, mask=function)
    for what in (spy.image, *seen):
        assert_same(what, shown(scenes(), "imagenet"), 1e-12)


def test_bytes_are_pictures_of_0_to_255() -> None:
    """A network that scales them itself."""

    class Scaling(Folded):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double() / 255)

    picture = (255 * scenes()).round().to(torch.uint8)
    net = cs.adaptify(Scaling(*CONVENTIONS["0..1"]), "edges", example_input=picture, verify_laws=False)
    expected = levels(
        adapted("0..1", normalisation=(0, 1)), (picture.to(torch.get_default_dtype()) / 255).double()
    )
    assert (levels(net, picture) != expected).double().mean() < 0.01  # masks see them in single precision


def test_what_a_library_states_is_known() -> None:
    for name in ("timm:resnet10t", "torchvision:resnet18"):
        model = cs.build_model(name, "none")
        net = cs.adaptify(model, verify_laws=False)
        assert net.normalisation is not None and source_of(net) == model.cad_source
        assert net.normalisation.mean == source_of(net).mean and "stated by" in net.normalisation.origin


def test_a_pretrained_cfg_is_known_and_what_is_given_goes_before() -> None:
    model = Folded(*CONVENTIONS["-1..1"])
    assert stated_statistics(model) is None
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[assignment]
    net = cs.adaptify(model, verify_laws=False)
    assert net.normalisation == Normalisation((0.5,) * 3, (0.5,) * 3, "stated by its pretrained_cfg")
    net = cs.adaptify(model, verify_laws=False, normalisation=([0.4] * 3, [0.2] * 3))
    assert net.normalisation == Normalisation((0.4,) * 3, (0.2,) * 3, "given")
    assert source_of(net).mean == (0.4,) * 3  # and pictures are prepared so


@pytest.mark.parametrize(("name", "dtype"), covering([*CONVENTIONS], [torch.float32, torch.float64]))
def test_a_picture_tells_what_a_network_takes(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        image = shown(street_scene(96, 150, seed).to(dtype)[None], name)
        told = estimate(image)
        assert told is not None and told == estimate(image)
        wrong = told.in_unit(image) - Normalisation(*CONVENTIONS[name]).in_unit(image)
        assert wrong.abs().max() < 1e-4 and "estimated" in told.origin


@pytest.mark.parametrize(
    "image",
    [
        *(torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.7), torch.zeros(1, 3, 1, 9)),
        *(torch.rand(2, 3, 64, 64), torch.randn(1, 3, 65, 33), torch.full((1, 3, 8, 8), torch.nan)),
    ],
)
def test_what_is_no_picture_tells_nothing(image: Tensor) -> None:
    assert estimate(image) is None


def test_the_first_picture_settles_it_and_no_other() -> None:
    """Warming up on noise does not, nor masks that look at no picture; copies share it."""
    net, image = adapted("0..255", "detail"), shown(scenes(), "0..255")
    fast, copied = net.optimize(), copy.deepcopy(net)
    levels(net, image)
    assert net.normalisation is None
    net.mask = "edges"
    levels(net, torch.randn(1, 3, 64, 96).double())
    assert net.normalisation is None
    first = levels(net, image)
    known = net.normalisation
    assert known is not None and known == fast.normalisation == copied.normalisation
    levels(net, scenes())
    assert net.normalisation == known and torch.equal(levels(net, image), first)
    assert torch.equal(levels(fast, image, mask="edges"), first)
    expected = levels(adapted("0..255", normalisation=CONVENTIONS["0..255"]), image)
    assert torch.equal(first, expected)


@pytest.mark.parametrize("given", some([None, "raw", (0.5, 0.5), CONVENTIONS["0..255"]]))
def test_a_file_keeps_what_is_known(tmp_path: Path, given: Any) -> None:
    net = adapted("-1..1", normalisation=given)
    cs.save(net, tmp_path / "net.safetensors")
    loaded = cs.load(tmp_path / "net.safetensors", Folded(*CONVENTIONS["0..1"]))
    assert loaded.normalisation == net.normalisation
    image = shown(scenes(), "-1..1")
    assert torch.equal(levels(loaded, image), levels(net, image))
    cs.save(net, tmp_path / "seen.safetensors")  # an estimate, too
    assert cs.load(tmp_path / "seen.safetensors", Folded(*IMAGENET)).normalisation == net.normalisation


def test_names_stand_for_mean_and_deviation() -> None:
    names = {"imagenet": IMAGENET, "none": ((0.0,), (1.0,)), "raw": ((), ())}
    for name, (mean, std) in names.items():
        found = read_normalisation(name, 3)
        assert (found.mean, found.std) == (tuple(mean), tuple(std))
    with pytest.raises(cs.UnknownName, match="imagenette") as refusal:
        read_normalisation("imagenette", 3)
    assert "imagenet" in str(refusal.value)
    with pytest.raises(cs.InvalidInput, match="taken from pictures"):
        adapted("0..1", normalisation="bands")


# Every registered mask by name that sees the picture, but keypoints, which need OpenCV.
ON_PICTURES = (
    "edges",
    "edges:threshold=0.9/0.2,dilation=3/9",
    "gradient:threshold=0.3,dilation=5,sigma=1",
    "content",
)


@pytest.mark.parametrize("channels", (1, 2, 4, 6))
@pytest.mark.parametrize("mask", ON_PICTURES)
def test_a_mask_on_pictures_sees_the_mean_of_their_channels(mask: str, channels: int) -> None:
    grid = FineMapSpec(2, (32, 48), 2, 2, 4, 4)
    pictures = torch.stack([street_scene(64, 96, seed, channels) for seed in range(2)])
    image = normalise(pictures, Source("mine", channels=channels))
    features = torch.zeros(2, 8, 32, 48)
    provider = resolve_mask(mask)
    found = provider(image, features, grid)
    assert torch.equal(found, provider(image.mean(1, keepdim=True), features, grid))
    assert torch.equal(found, provider(image.flip(1), features, grid))  # the order of bands does not count
