"""Maps that are joined must fit in every call, and images joined along the batch keep their own maps."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn

import cadsurgery as cs

MASK = "edges:threshold=0.3,dilation=3"


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    strided = [nn.Conv2d(channels, 8, 3, 2, 1) for channels in (3, 8, 8)]
    return nn.Sequential(
        strided[0], nn.ReLU(), strided[1], nn.ReLU(), strided[2], nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)
    )


def half(batch: int, left: bool) -> Tensor:
    """Images with detail in one half."""
    images = torch.rand(batch, 3, 64, 96)
    images[..., 48 * left : 48 + 48 * left] = 0.5
    return images


# -- maps of unequal sizes ------------------------------------------------------------------------------


class TwoWays(nn.Module):
    """A sum of two paths, whose roundings agree at multiples of 64 and differ elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = encoder()
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.once, self.head = nn.Conv2d(8, 8, 3, 4), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        map = self.encode(image)
        return self.head(self.twice(map) + self.once(map))


@pytest.mark.parametrize("mask", ["none", "all", MASK])
@pytest.mark.parametrize("size", [(48, 64), (72, 72)], ids=["torch repeats a row", "torch refuses"])
@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_maps_of_unequal_sizes_are_not_joined(mask: str, size: tuple[int, int], optimised: bool) -> None:
    options = {"output_stride": (8, 32), "example_input": torch.rand(1, 3, 64, 64), "outputs": "native"}
    model = TwoWays().eval()
    net = cs.adaptify(model, mask=mask, **options)
    net = net.optimize() if optimised else net
    with torch.no_grad():
        if mask == "none":
            fits = torch.rand(2, 3, 64, 128)
            assert relative_error(net(fits), model(fits)) < 1e-4
        with pytest.raises(cs.InvalidInput, match=r"add joins maps of \dx\d and \dx\d samples") as caught:
            net(torch.rand(1, 3, *size))
    assert ("refuses" if size == (72, 72) else "repeats") in caught.value.why and "pad" in caught.value.next


@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_a_file_for_a_size_at_which_maps_do_not_fit_is_refused(tmp_path: object) -> None:
    net = cs.adaptify(
        TwoWays().eval(), mask="none", output_stride=(8, 32), example_input=torch.rand(1, 3, 64, 64)
    )
    with pytest.raises(cs.CadError, match="joins maps"):
        cs.export(net, torch.rand(1, 3, 48, 64), f"{tmp_path}/net.onnx")


# -- images joined along the batch ----------------------------------------------------------------------


class Pair(nn.Module):
    """Features of one image minus those of another: both go through the encoder in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = encoder(), nn.Conv2d(8, 4, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        of_first, of_second = self.encode(torch.cat([first, second])).chunk(2)
        return self.head(of_first - of_second)


class Flipped(nn.Module):
    """The mean over an image and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = encoder(), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        own, mirrored = self.head(self.encode(torch.cat([image, image.flip(3)]))).chunk(2)
        return (own + mirrored.flip(3)) / 2


class Doubled(nn.Module):
    """The batch grows where there are no images any more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encode = nn.Conv2d(3, 3, 3, 2, 1), encoder()

    def forward(self, image: Tensor) -> Tensor:
        map = self.first(image)
        return self.encode(torch.cat([map, 2 * map]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("optimised", [False, True])
def test_each_image_of_a_pair_gets_its_own_map(batch: int, optimised: bool) -> None:
    left, right = half(batch, False), half(batch, True)
    net = cs.adaptify(Pair().eval(), mask=MASK, output_stride=(2, 8), example_input=(left, right))
    single = cs.adaptify(encoder().eval(), mask=MASK, output_stride=(2, 8), example_input=left)
    net = net.optimize() if optimised else net
    with torch.no_grad():
        there, levels = net(left, right), net.levels
        back, exchanged = net(right, left), net.levels
        own = []
        for images in (left, right):
            single(images)
            own.append(single.levels)
    bias = net.state_dict()["head.bias"].view(1, -1, 1, 1) if not optimised else (there + back) / 2
    assert not torch.equal(*own) and torch.equal(levels, torch.cat(own))
    assert torch.equal(exchanged, torch.cat(own[::-1]))
    assert relative_error(there - bias, bias - back) < 1e-4
    assert optimised or 0 < net.macs(left, right).active_fraction < 1


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mirror_image_gets_a_mirrored_map(batch: int) -> None:
    image = half(batch, True)
    net = cs.adaptify(Flipped().eval(), mask=MASK, output_stride=(2, 8), example_input=image)
    with torch.no_grad():
        net(image)
    assert net.levels.shape[0] == 2 * batch
    assert (net.levels[:batch] == 0).any() and (net.levels[batch:] == 0).any()
    with torch.no_grad():
        kept = net.levels[:batch].clone()
        net(image.flip(3))
    assert torch.equal(net.levels[batch:], kept)


def test_a_batch_that_is_not_made_of_images_is_refused_with_its_line() -> None:
    with pytest.raises(cs.CannotConvert, match="2 maps enter the region for 1 image") as caught:
        cs.adaptify(
            Doubled().eval(), mask=MASK, output_stride=(4, 16), example_input=torch.rand(1, 3, 64, 96)
        )
    assert "test_joined_images_laws.py" in caught.value.where and "join the images" in caught.value.next


class OfList(Pair):
    """A pair that comes as a list, which is joined as a whole."""

    def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
        of_first, of_second = self.encode(torch.cat(images)).chunk(2)
        return self.head(of_first - of_second)


def test_a_list_that_is_joined_as_a_whole_is_refused_with_its_line() -> None:
    images = [half(1, False), half(1, True)]
    with pytest.raises(cs.CannotConvert, match="No operation reads one of the images") as caught:
        cs.adaptify(OfList().eval(), mask=MASK, output_stride=(2, 8), example_input=(images,))
    assert "test_joined_images_laws.py" in caught.value.where and "images[0]" in caught.value.next
