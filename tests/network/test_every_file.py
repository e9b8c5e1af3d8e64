"""Every network that converts is written as an ONNX file, of one size and of any, which gives what the network gives.

The networks: heads behind an encoder, thin networks of the libraries, those of the zoo's sample, the corpus with its
stand-ins for sixteen well-known networks, and 200 random ones. All of them take two hours; CADSURGERY_FILES=24 takes
one of six heads, and one of 24 of the others besides a few that always run. Thirty are written for OpenVINO and as
programs of torch.export, too; of a sample, two that are written quickly and one of 120.
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
from conftest import thorough
from encoder_heads import HEADS
from encoder_heads import network as behind_an_encoder
from networks import build, unverified
from random_networks import LATER, random_case
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only

import cadsurgery as cs
from benchmarks.zoo import network_check
from benchmarks.zoo.corpus import CHECKOUT, read_corpus, subject
from cadsurgery.following.guards import is_guard
from cadsurgery.network.export import Exported
from cadsurgery.network.export.compare import difference, rounding_of
from cadsurgery.network.export.dictionaries import further_inputs, open_call
from cadsurgery.network.export.engines import ENGINES

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EVERY, SEEDS = int(os.environ.get("CADSURGERY_FILES", 1)), 200
# Not `edges`: its maxima are equal in many cells, so that an engine that rounds otherwise ranks them otherwise.
STATIC = "gradient | budget:fraction=0.3"
# Sizes in the order in which they are tried, for networks that take any and for those that take multiples of a stride.
SIZES = [
    (75, 101),
    (90, 64),
    (97, 145),
    (64, 160),
    (96, 96),
    (128, 96),
    (128, 192),
    (160, 128),
    (192, 256),
    (256, 192),
]
EXAMPLES = [(96, 128), (128, 160), (160, 192), (256, 256), (512, 512)]
# Conversion refuses it; its bins follow the ratio of the image's sides, which no file computes.
OTHERS = {"backbones:in_data_parallel", "backbones:RatioPyramid"}


@dataclass(frozen=True)
class Given:
    """A converted network, an image for its file, and what else the network is called with."""

    net: cs.AdaptiveModel
    image: Tensor
    more: tuple[Tensor, ...] = ()


def of_model(make: Callable[[], nn.Module], size: tuple[int, int], mask: str) -> Given:
    model, image = make(), torch.rand(1, 3, *size)
    return Given(unverified(model, mask, example_input=image), image)


def of_library(name: str) -> nn.Module:
    model = build(name, by=8)
    # It may have layers that are not made thin.
    return build(name) if any(parameter.is_meta for parameter in model.parameters()) else model


def of_zoo(name: str) -> nn.Module:
    network_check.settle(model := subject(name).build().eval())
    return model


def of_call(net: cs.AdaptiveModel, arguments: Any) -> Given:
    """A network that takes more than an image, with each of its tensors as an argument."""
    if isinstance(arguments, dict):  # keywords
        bound = net.program.signature.bind(**arguments)
        bound.apply_defaults()
        arguments = bound.args
    opened, image, _ = open_call(net, arguments)
    return Given(opened, image, tuple(further_inputs(opened).values()))


def of_corpus(name: str, mask: str) -> Given:
    entry = subject(name, CHECKOUT)
    model = entry.build().eval()
    example = network_check.example_of(entry, model)
    network_check.settle(model, example=example)
    net = unverified(model, mask, example_input=example)
    first = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    sizes = EXAMPLES if entry.size is None else [entry.size]
    if entry.call is not None:
        return of_call(net, entry.arguments(torch.rand(1, 3, *sizes[0])))
    images = (torch.rand(1, channels, *size) for size in sizes for channels in (3, first))
    return Given(net, next(image for image in images if accepts(net, image)))


def of_seed(seed: int, mask: str) -> Given:
    case = random_case(seed)
    example = tree_map_only(Tensor, Tensor.float, case.given)
    net = unverified(case.model.float(), mask, example_input=example)
    if case.more:
        return of_call(net, tree_map_only(Tensor, Tensor.float, (case.image, *case.more)))
    if any(map(is_guard, net.program.graph.nodes)):  # its files are for the path of the conversion
        net = unverified(case.model, mask, example_input=case.image.float())
    images = (case.image.float(), example)
    return Given(net, next(image for image in images if image is not None and accepts(net, image)))


def accepts(net: nn.Module, image: Tensor) -> bool:
    try:
        net(image)
    except cs.InvalidInput:
        return False
    return True


def of_other_sizes(given: Given, report: Exported) -> Iterator[Tensor]:
    """Images of three sizes that the network and its file take, of one image and of two unless the file is for one."""
    height, width = given.image.shape[2:]
    own = [(height + dy, width + dx) for dy, dx in ((32, 0), (0, 64), (64, 32))]
    others = (size for size in (*SIZES, *own) if size != (height, width))
    sizes = enumerate(size for size in others if not any(side % report.multiple for side in size))
    numbers = (1, 1 if report.image[0] == 1 else 2)
    images = (torch.rand(numbers[place % 2], given.image.shape[1], *size) for place, size in sizes)
    return islice((image for image in images if accepts(given.net, image)), 3)


def compare(given: Given, outputs: Any, image: Tensor, levels: Tensor) -> None:
    """Outputs are the network's, up to rounding, at the file's level map."""
    with given.net.masked(levels.long()):  # an argument may have the name `mask`
        result = given.net(image, *given.more)
    error = difference(*([x for x in tree_leaves(one) if isinstance(x, Tensor)] for one in (outputs, result)))
    assert error < 1e-4 or (not given.more and error < 4 * rounding_of(given.net, [image])), error


def check(given: Given, run: Callable[..., list[Tensor]], image: Tensor) -> None:
    """A file gives what the network gives, and its level map but for two patches of an image."""
    given.net(image, *given.more)
    own, side = given.net.levels, given.net.geometry.sides[-1]
    *outputs, levels = run(image, *given.more)
    assert int((levels != own).sum()) <= 2 * len(image) * side * side
    compare(given, outputs, image, levels)


def written(
    given: Given, path: Path, engine: str, **options: Any
) -> tuple[Callable[..., list[Tensor]], Exported]:
    """Write a file; return what runs it, and the report."""
    from exported import File

    inputs = (given.image, *given.more) if given.more else given.image
    report = cs.export(given.net, inputs, path, check_in=engine, **options)
    if engine == "onnx":
        return lambda *given: [*File(path)(*given).values()], report
    return ENGINES[engine](path, any_size=options.get("dynamic", False)), report


def check_files(given: Given, folder: Path, engine: str) -> None:
    """Write a file of one size and one of any, unless Python code takes another way at other sizes; check both.

    Networks that take more than an image have files of one size alone.
    """
    run, _ = written(given, folder / "fixed.onnx", engine)
    check(given, run, given.image.flip(3))
    if given.more:
        with pytest.raises(cs.InvalidInput, match="cannot be dynamic"):
            written(given, folder / "any.onnx", engine, dynamic=True)
        return
    if any(map(is_guard, given.net.program.graph.nodes)):
        return
    run, report = written(given, folder / "any.onnx", engine, dynamic=True)
    images = [*of_other_sizes(given, report)]
    assert len(images) == 3
    for image in images:
        check(given, run, image)


LIBRARY = ("resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121")
LIBRARY += ("googlenet", "squeezenet1_1", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "mnasnet0_5")
LIBRARY += ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_resnet50")
# Of `zoo/test_coverage.py`, at their real widths.
ZOO = ("convnextv2_atto", "dla46_c", "focalnet_tiny_srf", "gcresnet50t", "hrnet_w18_small", "lcnet_050")
ZOO += ("mixnet_s", "tf_efficientnet_cc_b0_4e", "tresnet_m")
ZOO += ("nf_resnet26", "regnetz_b16_evos", "res2net50_26w_4s", "resnest14d", "resnetblur18", "swiftformer_xs")
CORPUS = [one.name for one in read_corpus(CHECKOUT) if one.name not in OTHERS]
# A value of this one is so near its threshold that the engine rounds it to the other side.
AT_A_JUMP = LATER + 46
_SEEDS = (at // 2 + LATER * (at % 2) for at in range(SEEDS + 1))
RANDOM = [seed for seed in _SEEDS if seed != AT_A_JUMP]
SAMPLED: dict[str, Callable[[str], Given]] = {
    **{name: partial(of_model, partial(of_library, name), (96, 128)) for name in LIBRARY},
    **{name: partial(of_model, partial(of_zoo, name), (128, 160)) for name in ZOO},
    **{name: partial(of_corpus, name) for name in CORPUS},
    **{f"seed {seed}": partial(of_seed, seed) for seed in RANDOM},
}
# Own networks of the kinds of sixteen well-known ones for real time.
LIGHT = ("ContextNet", "DABNet", "ESNet", "FPENet", "FSSNet", "SQNet")
REALTIME = ("CGNet", "EDANet", "ENet", "ERFNet", "ESPNet", "FastSCNN", "LEDNet")
STAND_INS = {
    **{name: f"light:{name}Like" for name in LIGHT},
    **{name: f"realtime:{name}Like" for name in REALTIME},
    **{"LinkNet": "realtime:LinkNet", "SegNet": "realtime:SegNet", "U-Net": "unets:unet_bilinear"},
}
ALWAYS = (f"seed {LATER}", "seed 1")
OF_HEADS = {head: partial(of_model, partial(behind_an_encoder, head), (64, 64)) for head in HEADS}
CASES = {head: OF_HEADS[head] for head in [*HEADS][:: min(EVERY, 6)]}
CASES |= {name: SAMPLED[name] for name in dict.fromkeys([*[*SAMPLED][::EVERY], STAND_INS["CGNet"], *ALWAYS])}


def test_sixteen_well_known_networks_have_stand_ins() -> None:
    assert len(STAND_INS) == 16 and SAMPLED.keys() >= set(STAND_INS.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name if name in ALWAYS else thorough(name, few=8) for name in CASES])
@torch.no_grad()
def test_a_network_is_written_as_files_of_one_size_and_of_any(name: str, tmp_path: Path) -> None:
    check_files(CASES[name]("edges"), tmp_path, "onnx")


# A tensor alone, and Python code that asks for sizes: what is written for OpenVINO in any sample.
QUICK = ("rates of whole cells", "pythonic:LargestSide")
NAMES = [*HEADS, *LIBRARY, *ZOO, *CORPUS]
# Their parameters' `.data` ends torch.export of the network as given, too.
NOT_FOLLOWED = ("pythonic:ChangesInPlace",)


# No random networks: in noise many patches are alike but for rounding, and a budget may choose others.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [thorough(one) if one == QUICK[0] else one for one in dict.fromkeys([*NAMES[:: 5 * EVERY], *QUICK])],
)
@torch.no_grad()
def test_some_are_written_for_openvino_and_as_programs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    given = (SAMPLED | OF_HEADS)[name](STATIC)
    check_files(given, tmp_path, "openvino")
    image = given.image.flip(3)
    inputs = (given.image, *given.more) if given.more else given.image
    leaves = tree_flatten_with_path(given.net(image, *given.more))[0]
    plain = all(
        isinstance(leaf, Tensor | None) and all(isinstance(getattr(step, "key", ""), str) for step in path)
        for path, leaf in leaves
    )
    if not plain or name in NOT_FOLLOWED:
        with pytest.raises(cs.CannotConvert, match="cannot return" if not plain else "cannot follow"):
            cs.export(given.net, inputs, tmp_path / "net.pt2")
        return
    cs.export(given.net, inputs, tmp_path / "net.pt2")
    output = torch.export.load(tmp_path / "net.pt2").module()(image, *given.more)
    given.net(image, *given.more)
    compare(given, output, image, given.net.levels)
