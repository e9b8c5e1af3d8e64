"""Every network that converts is written as an ONNX file, of one size and of any, which gives what the network gives.

The networks: thin ones of the libraries, the corpus, the heads of `test_heads_in_files`, and random networks, of which
the variable CADSURGERY_FILES takes so many (default: 200). Some of them in OpenVINO and as programs of torch.export.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from random_networks import LATER, random_case
from test_heads_in_files import HEADS
from test_heads_in_files import network as behind_an_encoder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.network.export.compare import difference, rounding_of
from cadsurgery.tasks import network_check
from cadsurgery.tasks.corpus import CHECKOUT, read_corpus, subject

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SEEDS = int(os.environ.get("CADSURGERY_FILES", 200))
# Sizes in the order in which they are tried, for networks that take any and for those that take multiples of a stride.
SIZES = ((75, 101), (90, 64), (97, 145), (64, 160), (96, 96), (128, 96), (128, 192), (160, 128), (192, 256), (256, 192))
EXAMPLES = ((96, 128), (128, 160), (160, 192), (256, 256))


@dataclass(frozen=True)
class Given:
    """A converted network, and an image for its file."""

    net: cs.AdaptiveModel
    image: Tensor


def of_library(name: str) -> Given:
    image = torch.rand(1, 3, 96, 128)
    return Given(cs.adaptify(build(name, by=8), example_input=image, verify_laws=False).eval(), image)


def of_corpus(name: str) -> Given:
    entry = subject(name, CHECKOUT)
    torch.manual_seed(0)
    model = entry.build().eval()
    example = network_check._example(entry, model)
    network_check.settle(model, example=example)
    net = cs.adaptify(model, example_input=example, verify_laws=False).eval()
    first = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    sizes = [*EXAMPLES, (512, 512)] if entry.size is None else [entry.size]
    images = (torch.rand(1, channels, *size) for size in sizes for channels in (3, first))
    return Given(net, next(image for image in images if accepts(net, image)))


def of_head(name: str) -> Given:
    image = torch.rand(1, 3, 64, 64)
    return Given(cs.adaptify(behind_an_encoder(name), example_input=image, verify_laws=False), image)


def of_seed(seed: int) -> Given:
    case = random_case(seed)
    example = torch.utils._pytree.tree_map_only(Tensor, Tensor.float, case.given)
    return Given(cs.adaptify(case.model.float(), example_input=example, verify_laws=False), case.image.float())


def accepts(net: nn.Module, image: Tensor) -> bool:
    try:
        net(image)
    except (cs.CadError, RuntimeError):
        return False
    return True


def of_other_sizes(given: Given) -> Iterator[Tensor]:
    """Images of three sizes that the network takes, of one image and of two."""
    lengths = given.image.shape[2:]
    own = [(height + dy, width + dx) for dy, dx in ((32, 0), (0, 64), (64, 32)) for height, width in [lengths]]
    shapes = ((1 + place % 2, given.image.shape[1], *size) for place, size in enumerate([*SIZES, *own]) if size != lengths)
    return islice((image for image in map(torch.rand, shapes) if accepts(given.net, image)), 3)


def check(given: Given, run: Callable[..., list[Tensor]], image: Tensor) -> None:
    """Outputs are the network's, up to rounding, and so is the level map but for two patches of an image."""
    net = given.net
    net(image)
    *outputs, levels = run(image)
    differing, side = int((levels != net.levels).sum()), net.geometry.sides[-1]
    assert differing <= 2 * len(image) * side * side
    expected = [leaf for leaf in tree_leaves(net(image, mask=levels.long())) if isinstance(leaf, Tensor)]
    error = difference(outputs, expected)
    assert error < 1e-4 or error < 4 * rounding_of(net, [image]), error


def written(given: Given, path: Path, **options: Any) -> Callable[..., list[Tensor]]:
    from exported import File

    cs.export(given.net, given.image, path, **options)
    return lambda image: [*File(path)(image).values()]


LIBRARY = ("resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121")
LIBRARY += ("googlenet", "squeezenet1_1", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "mnasnet0_5")
LIBRARY += ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_resnet50")
CASES: dict[str, Callable[[], Given]] = {
    **{name: partial(of_library, name) for name in LIBRARY},
    **{one.name: partial(of_corpus, one.name) for one in read_corpus(CHECKOUT)},
    **{head: partial(of_head, head) for head in HEADS},
    **{f"seed {seed}": partial(of_seed, seed) for at in range(SEEDS) for seed in [at // 2 + LATER * (at % 2)]},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_network_is_written_as_files_of_one_size_and_of_any(name: str, tmp_path: Path) -> None:
    given = CASES[name]()
    check(given, written(given, tmp_path / "fixed.onnx"), given.image.flip(3))
    run, images = written(given, tmp_path / "any.onnx", dynamic=True), [*of_other_sizes(given)]
    assert len(images) == 3
    for image in images:
        check(given, run, image)
