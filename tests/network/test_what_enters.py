"""A picture of other channels, size or layout is computed as the network as given does, or refused, by every copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering, relative_error, some
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.elements.backends.choose import Misfit
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.windows import conv2d

SIZE = (64, 96)


def plain(channels: int = 3) -> nn.Sequential:
    layers = [nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))


FIRST: dict[str, Callable[[], nn.Sequential]] = {
    "a convolution": plain,
    "a depthwise convolution": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), *plain()),
    "a 1x1 convolution": lambda: nn.Sequential(nn.Conv2d(3, 5, 1), *plain(5)),
    "a norm": lambda: nn.Sequential(nn.BatchNorm2d(3), *plain()),
    "a strided 1x1 convolution": lambda: nn.Sequential(nn.Conv2d(3, 5, 1, 2), *plain(5)),
    "a depthwise strided convolution": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3), *plain(6)),
    "a grey convolution": partial(plain, 1),
}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "floors": {"mask": "content", "coarsest": 8},
    "edges": {"mask": "edges"},
    "a stride": {"mask": "edges", "output_stride": (2, 4)},
}


def network(first: str) -> nn.Module:
    torch.manual_seed(0)
    return FIRST[first]().eval()


def example(first: str) -> Tensor:
    image = street_scene(*SIZE)[None]
    return image[:, :1] if first == "a grey convolution" else image


@cache
def copies(first: str, conversion: str) -> dict[str, Any]:
    image, options = example(first), CONVERSIONS[conversion]
    net = cs.adaptify(network(first), example_input=image, verify_laws=False, **options)
    return {"converted": net, "optimised": net.optimize()}


PAIRS = covering([*FIRST], [*CONVERSIONS], ["converted", "optimised"])


@pytest.mark.parametrize(("first", "conversion", "copy"), some(PAIRS, rows=True))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_other_channels_are_refused_with_a_map_of_ones_own_too(
    first: str, conversion: str, copy: str
) -> None:
    net, image = copies(first, conversion)[copy], example(first)
    for channels in {1, 2, 3, 4, 7} - {image.shape[1]}:
        picture = image[:, :1].expand(-1, channels, -1, -1).contiguous()
        for options in ({}, {"mask": "random"}, {"mask": "all"}, {"mask": "none"}):
            with torch.no_grad(), pytest.raises(cs.InvalidInput, match="channel"):
                net(picture, **options)
    kept = torch.zeros(1, *SIZE, dtype=torch.bool)
    kept[:, 16:48, 32:64] = True
    options = {"mask": kept} if conversion == "floors" else {}
    with torch.no_grad(), pytest.raises(cs.InvalidInput, match="channel"):
        net(torch.cat([image] * 4, 1)[:, :4], **options)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "turned": lambda image: image.transpose(2, 3).contiguous().transpose(2, 3),
    "a part": lambda image: nn.functional.pad(image, (3, 4, 5, 6))[..., 5:-6, 3:-4],
    "every second": lambda image: image.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda image: image.expand(3, -1, -1, -1),
    "other size": lambda image: image[..., :37, :51],
    "one pixel": lambda image: image[..., :1, :1],
}


@pytest.mark.parametrize(("copy", "strides"), covering(["converted", "optimised"], [*STRIDES]))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_the_layout_of_an_image_does_not_matter(copy: str, strides: str) -> None:
    net, image = copies("a convolution", "edges")[copy], STRIDES[strides](example("a convolution"))
    with torch.no_grad():
        expected = net(image.contiguous(), mask="all")
        assert relative_error(net(image, mask="all"), expected) < 1e-5


@pytest.mark.parametrize("copy", ["converted", "optimised"])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_empty_batches_are_refused(copy: str, axis: int) -> None:
    image = example("a convolution")
    with torch.no_grad(), pytest.raises(cs.InvalidInput):
        copies("a convolution", "edges")[copy](image.narrow(axis, 0, 0))


@pytest.mark.parametrize("groups", [1, 8])
def test_rows_that_are_not_those_of_their_lattice_are_refused(groups: int) -> None:
    geometry = copies("a convolution", "edges")["optimised"].geometry
    lattice = geometry.lattice(torch.zeros(1, 8, 12, dtype=torch.int8))
    window, weight = Window((3, 3), padding=(1, 1, 1, 1)), torch.rand(8, 8 // groups, 3, 3)
    with torch.no_grad():
        assert len(conv2d(Elements(torch.rand(96, 8), lattice), weight, None, window, 0, groups).rows) == 96
        for shape, words in (((89, 8), "lattice"), ((97, 8), "lattice"), ((96, 7), "channels")):
            with pytest.raises(Misfit, match=words):
                conv2d(Elements(torch.rand(shape), lattice), weight, None, window, 0, groups)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_computes_contiguous_images_whatever_the_layout_of_the_example(tmp_path: Path) -> None:
    image = example("a convolution")
    net = cs.adaptify(
        network("a convolution"), "edges | budget:fraction=0.3", example_input=image, verify_laws=False
    )
    last = image.contiguous(memory_format=torch.channels_last)
    cs.export(net, last, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    (taken,) = (
        node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )
    assert taken.stride() == torch.empty(image.shape).stride()  # which compilers of programs do not check
    run = program.module()
    with torch.no_grad():
        expected = net(image)
        for layout in (image, last):
            assert relative_error(run(layout), expected) < 1e-5
    with pytest.raises((RuntimeError, AssertionError)):
        run(image[:, :2])
