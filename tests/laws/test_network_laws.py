"""Laws of converted networks, on torchvision and timm networks with random weights.

Law 1: at its own resolution the network is the original. Law 2: the other extreme is the other dense twin.
Law 3: any level map equals the brute-force emulation of `emulation.py`. Law 5: a batch is its images one by
one, at any size and precision. Law 6: weights, names and gradients stay. Law 7, that counted MACs are executed
MACs: `network/test_macs.py`. Law 8: anchor="center", pool="drop", patch="block", fill="nearest" is the published
method.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import networks
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (
    assert_same,
    covering,
    images,
    pointwise_rule,
    random_levels,
    relative_error,
    slow,
    some,
    thorough,
)
from emulation import Emulation
from networks import thin, unverified
from planned_emulation import StridedEmulator, emulate
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import cadsurgery as cs

Size = tuple[int, int]
SMALL: Size = (65, 97)
SAMPLE = pytest.mark.parametrize("name", ["resnet18", slow("resnet50")])
RESNETS = ("resnet18", slow("resnet50"), "resnext50_32x4d")
PAIRS = [(4, 32), (8, 32), (8, 16), (16, 32)]
TWO = ("linear", "nearest")
THREE = (*TWO, "guided")  # guided: what leaves at the fine size
double = torch.float64
# The networks of this file have one of so many channels: laws are of geometry, which a quarter of the channels shows
# at a sixteenth of the work.
BY = 4


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A network of torchvision, or of timm after `timm/`."""
    if name.startswith(("deeplab", "fcn")) and BY > 1:  # wide ones
        return networks.build(name, dtype, by=4 * BY, **options)
    if not name.startswith("timm/"):
        return networks.build(name, dtype, by=BY, **options)
    return thin(partial(timm.create_model, name.removeprefix("timm/"), **options), BY).to(dtype)


def convert(model: nn.Module, mask: Any = "none", size: Size = SMALL, **options: Any) -> cs.AdaptiveModel:
    """`adaptify` on a small example; its own verification is off, since these tests are another."""
    example = images(1, *size, next(model.parameters()).dtype)
    return unverified(model, mask, example_input=example, **options)


def with_features(model: nn.Module) -> nn.Module:
    """A ResNet that returns its last feature map and its logits."""
    return create_feature_extractor(model, {"layer4": "map", "fc": "logits"}).train(model.training)


def dilated(name: str, model: nn.Module, high: int) -> nn.Module:
    """The dense twin: the ResNet with the strides after output stride `high` replaced by dilation.

    timm builds it, and torchvision for bottleneck blocks; with basic blocks it is done here: what reads the map
    before a removed stride keeps its dilation, what follows doubles it.
    """
    replaced = [stride > high for stride in (8, 16, 32)]
    if name != "resnet18":
        options = {"output_stride": high} if "timm" in name else {"replace_stride_with_dilation": replaced}
        twin = build(name, **options)
        twin.load_state_dict(model.state_dict())
        return twin.to(next(model.parameters()).dtype)
    twin, rate = copy.deepcopy(model), 1
    for layer, gone in zip((twin.layer2, twin.layer3, twin.layer4), replaced, strict=True):
        if not gone:
            continue
        layer[0].conv1.stride = layer[0].downsample[0].stride = (1, 1)
        for index, block in enumerate(layer):
            for conv, first in ((block.conv1, index == 0), (block.conv2, False)):
                conv.dilation = conv.padding = (rate, rate) if first else (2 * rate, 2 * rate)
        rate *= 2
    return twin


def stages(output_stride: Size, lowest: int = 32) -> tuple[int, ...]:
    """Strides of all adaptive stages; those after the low output stride only dilate."""
    count = (lowest // output_stride[0]).bit_length() - 1
    return (2,) * count


def ceil_div(size: Size, by: int) -> Size:
    return -(-size[0] // by), -(-size[1] // by)


def levels_for(size: Size, output_stride: Size, batch: int = 2, **options: Any) -> Tensor:
    """A random legal level map for a ResNet on images of this size."""
    top = (output_stride[1] // output_stride[0]).bit_length() - 1
    return random_levels(
        batch, ceil_div(size, output_stride[0]), stages(output_stride), max_level=top, **options
    )


def every(value: Any, step: int) -> Any:
    """Maps at every `step`-th position; other results as they are."""
    if isinstance(value, dict):
        return {key: every(entry, step) for key, entry in value.items()}
    return value[:, :, ::step, ::step] if value.dim() == 4 else value


def guide_of(net: cs.AdaptiveModel, fill: str) -> str:
    """The node whose value guides the fill, as the emulator is told."""
    return net.plan.chosen("enter")[0].node.removeprefix("backbone_") if fill == "guided" else ""


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


# -- 1: identity ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "region"), covering(some(["deeplabv3_resnet50", "fcn_resnet50"]), some(["auto", "backbone"]))
)
def test_all_high_dilated_network_is_the_original(name: str, region: str) -> None:
    """Law 1, dilated: mask="all" gives the original's whole output."""
    model, x = build(name, aux_loss=False), images(2, *SMALL)
    net = convert(model, "all", region=region)
    assert net.plan.output_stride == (8, 32)
    assert_same(dict(run(net, x)), dict(run(model, x)))
    assert net.active_fraction == 1


TIMM = ("timm/resnet10t", slow("timm/resnet18"), "timm/resnet26d", "timm/seresnet18", slow("timm/seresnet50"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [thorough("resnet18"), "resnet50"])
def test_networks_of_full_width_keep_laws_1_to_3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where kernels work in tiles of channels that thin networks do not fill."""
    monkeypatch.setitem(globals(), "BY", 1)
    model, x, levels = build(name), images(2, *SMALL), levels_for(SMALL, (8, 32))
    net = convert(with_features(model))
    assert_same(every(run(net, x, mask="none"), 4), run(with_features(model), x))
    assert_same(run(net, x, mask="all"), run(with_features(dilated(name, model, 8)), x))
    exact = emulate(with_features(copy.deepcopy(model).double()), x.double(), Emulation(levels, (2, 2)), 8)
    for form in (net, net.optimize()):
        for key, value in run(form, x, mask=levels).items():
            assert_same(value, exact[key].float())


# -- 2: the other extreme ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [*covering(some(RESNETS), [(8, 32), slow((4, 32)), (8, 16)]), ("timm/seresnet18", (8, 32))],
)
def test_extremes_are_the_twins_at_the_strides_asked_for(name: str, output_stride: Size) -> None:
    """Law 2: everything high and everything low are the network dilated to these strides, logits included."""
    model, x = build(name), images(2, *SMALL)
    net = convert(with_features(model), output_stride=output_stride)
    for mask, stride in zip(("all", "none"), output_stride, strict=True):
        found = every(run(net, x, mask=mask), stride // output_stride[0])
        assert_same(found, run(with_features(dilated(name, model, stride)), x))


def strided_backbone(model: nn.Module) -> nn.Module:
    """The undilated ResNet-50 with the weights of a segmentation network's backbone, up to layer4."""
    by = 2048 // model.backbone.layer4[-1].conv3.out_channels
    resnet = networks.build("resnet50", next(model.parameters()).dtype, by=by)
    missing = resnet.load_state_dict(model.backbone.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    return create_feature_extractor(resnet, {"layer4": "out"})


@pytest.mark.smoke
def test_all_low_dilated_backbone_is_the_undilated_twin() -> None:
    """Law 2, dilated: mask="none" on DeepLab's backbone is the strided ResNet at the native positions."""
    model, x = build("deeplabv3_resnet50", aux_loss=False), images(2, *SMALL)
    net = convert(model.backbone, "none")
    assert_same(dict(every(run(net, x), 4)), run(strided_backbone(model), x))


def vgg_trunk(name: str, low: int = 8) -> nn.Sequential:
    """VGG's features up to the convolutions at output stride `low`."""
    layers = list(build(name, double).features)
    pools = [index for index, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    return nn.Sequential(*layers[: pools[low.bit_length() - 1]]).eval()


VGGS = ("vgg11", "vgg16_bn", slow("vgg19_bn"))


# -- 3: any level map ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "output_stride", "fill"),
    [
        *covering(["resnet18"], PAIRS, THREE),
        *covering(some([*RESNETS[1:], *TIMM]), [(8, 32)], TWO),
    ],
)
def test_any_level_map_on_a_resnet_is_the_emulation(name: str, output_stride: Size, fill: str) -> None:
    """Law 3 for every pair of output strides: the map and the logits. For deeper, grouped and wider networks,
    average-pool shortcuts (ceil_mode, padding not counted) and squeeze-excite, too; and law 1."""
    model, x = build(name, double), images(2, *SMALL, double)
    model = with_features(model) if name == "resnet18" else model
    levels = levels_for(SMALL, output_stride)
    net = convert(model, output_stride=output_stride, fill=fill)
    emulation = Emulation(levels, stages(output_stride), fill)
    expected = emulate(model, x, emulation, output_stride[0], guide_of(net, fill))
    assert_same(run(net, x, mask=levels), expected)
    assert torch.equal(net.levels.long(), levels)
    laid_out = net.to(
        memory_format=torch.channels_last
    )  # law 5: memory layouts of images and weights do not matter
    assert_same(run(laid_out, x.contiguous(memory_format=torch.channels_last), mask=levels), expected)
    if output_stride[1] == 32:
        own = run(net, x, mask="none")
        assert_same(every(own, 32 // output_stride[0]), run(model, x))


@pytest.mark.parametrize(
    ("name", "region", "fill"),
    covering(["deeplabv3_resnet50", slow("fcn_resnet50")], ["auto", slow("backbone")], some(THREE, every=3)),
)
def test_any_level_map_on_a_dilated_network_is_the_emulation_of_the_strided_one(
    name: str, region: str, fill: str
) -> None:
    """Law 3: backbone undilated, ASPP with taps 12, 24, 36 fine pixels apart, then the rest dense.

    With region="backbone", and in FCN, all of the head is dense and reads the features at every fine pixel.
    """
    model, x = build(name, double, aux_loss=False), images(2, *SMALL, double)
    levels = levels_for(SMALL, (8, 32))
    emulation = Emulation(levels, (2, 2), fill)
    net = convert(model, region=region, fill=fill)
    with torch.no_grad():
        trunk = StridedEmulator(strided_backbone(model), emulation, 8, guide_of(net, fill))
        features = trunk.run(x)["out"]
        assert features.stage == 2 and features.stride == 4
        rest = nn.Sequential(*model.classifier)
        if (
            name.startswith("deeplab") and region == "auto"
        ):  # the head counts its dilations in samples of output stride 8
            head_input = replace(features, stride=1)
            features = StridedEmulator(rest[0], emulation, 8).run(head_input)
            rest = rest[1:]
        logits = rest(emulation.read(features, trunk.guide))
        expected = F.interpolate(logits, size=SMALL, mode="bilinear", align_corners=False)
    assert_same(run(net, x, mask=levels)["out"], expected)


# -- 5: batches, sizes, precision, layout --------------------------------------------------------------


def test_autocast_trains_in_lower_precision() -> None:
    """Under torch.autocast outputs and gradients are those of float32 up to bfloat16 rounding."""
    net = unverified(build("resnet18"), "random:fraction=0.4,seed=0")
    x = images(2, 65, 97)
    exact = torch.autograd.grad(net(x).square().mean(), net.conv1.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    rounded = torch.autograd.grad(y.float().square().mean(), net.conv1.weight)[0]
    assert y.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.98


# -- 6: weights and gradients --------------------------------------------------------------------------


def test_state_dict_keys_and_values_stay_and_the_argument_is_not_touched() -> None:
    """Law 6: original checkpoints load strictly; the model handed in keeps weights, modes and behaviour."""
    model, x = build("resnet18"), images(2, *SMALL)
    model.layer1[0].bn1.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {key: module.training for key, module in model.named_modules()}
    written = str(model)
    net = cs.adaptify(model, "none", example_input=images(1, *SMALL))
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert str(model) == written
    for state in (model.state_dict(), net.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in state.items())
    trained = build("resnet18").train()
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    state = cs.adaptify(trained, "none", example_input=images(2, *SMALL)).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in state.items()), "running statistics too"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = build("resnet18")
    net.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "no shared storage"
    )
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad == dict(model.named_parameters())[key].requires_grad
    run(net.eval(), x)


class Remembering(nn.Module):
    """Adds a bias that it computes once from its weights in evaluation, and drops in `train`, as attention of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.known = nn.Parameter(torch.randn(())), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.known:
            self.known = [self.bias.square()]
        return x + self.known[0]

    def train(self, mode: bool = True) -> Remembering:
        self.known = []
        return super().train(mode)


def test_other_weights_count_whatever_modules_remember_of_the_former() -> None:
    """The verification has run the network on the weights of the conversion; what is loaded later counts alone."""

    def make() -> nn.Module:
        return nn.Sequential(networks.strided(outputs=4), Remembering(), nn.Conv2d(4, 3, 1)).eval()

    model, other = (networks.seeded(make, seed=seed) for seed in (0, 1))
    with pointwise_rule(Remembering):  # its memory cannot be followed
        net, x = cs.adaptify(model, "none", outputs="native"), images(2, *SMALL).double()
    net(x)
    net.load_state_dict(other.state_dict())
    for form in (net, net.optimize()):
        assert_same(form(x), other(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fill"), covering(["resnet18", slow("resnext50_32x4d")], ["guided", "linear", slow("nearest")])
)
def test_gradients_of_any_level_map_are_the_emulations(name: str, fill: str) -> None:
    """Law 6: of a loss on the dense output, for every parameter that it depends on and the image."""
    model = create_feature_extractor(build(name, double), {"layer4": "out"})
    x, levels = images(2, *SMALL, double).requires_grad_(), levels_for(SMALL, (8, 32))
    net = convert(model, fill=fill)
    expected = emulate(model, x, Emulation(levels, (2, 2), fill), 8, guide_of(net, fill))["out"]
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *model.parameters()])
    found = net(x, mask=levels)["out"]
    found_grads = torch.autograd.grad((found * weights).sum(), [x, *net.parameters()])
    assert_same(found_grads, expected_grads, 1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_adaptify_keeps_the_mode(training: bool) -> None:
    model = build("resnet18").train(training)
    extractor = create_feature_extractor(model, ["layer4"]).train(training)
    assert {module.training for module in convert(extractor).layer4.modules()} == {training}
    net = convert(model)
    assert {module.training for module in net.modules()} <= {training, net.mask.training}
    assert net.training == training and net.layer4[0].bn1.training == training


@SAMPLE
def test_training_mode_of_an_all_low_network_is_the_originals(name: str) -> None:
    """Law 1 in training: batch statistics, running statistics and outputs are the original's."""
    model, x = build(name, double).train(), images(3, 97, 129, double)
    net = convert(model, "none", size=(97, 129))
    assert_same(run(net, x), run(model, x))
    running = dict(model.named_buffers())
    for key, value in net.named_buffers():
        if "running" in key:
            assert_same(value, running[key])


# -- 8: the published method ---------------------------------------------------------------------------


def published(anchor: str, patch: str = "quadtree") -> dict[str, Any]:
    return {"anchor": anchor, "pool": "drop", "patch": patch, "fill": "nearest"}


@pytest.mark.parametrize("split", [0.3, slow(0.7)])
def test_published_options_are_the_published_resnet(split: float) -> None:
    """Law 8 on ResNet-50 (8, 32): convolutions start at the middle of cells, corners are kept, blocks of 4."""
    size = (96, 128)
    model = create_feature_extractor(build("resnet50", double), {"layer4": "out"})
    x = images(2, *size, double)
    levels = levels_for(size, (8, 32), patch="block", split=split)
    net = convert(model, output_stride=(8, 32), **published("center", "block"))
    emulation = Emulation(levels, (2, 2), "nearest", "center", "drop")
    found = run(net, x, mask=levels)
    assert_same(found, emulate(model, x, emulation, 8))
    corner = emulate(model, x, replace(emulation, anchor="corner"), 8)
    assert relative_error(found["out"], corner["out"]) > 0.01, "the anchor matters"
    assert_same(run(net.float(), x.float(), mask=levels)["out"], found["out"].float(), 1e-4)


@pytest.mark.parametrize(
    ("name", "high", "options"),
    covering(
        VGGS, [1, 2, 4], [{"fill": fill} for fill in TWO] + [published(one) for one in ("center", "corner")]
    ),
    ids=str,
)
def test_any_level_map_on_vgg_is_the_emulation(name: str, high: int, options: dict[str, Any]) -> None:
    """Law 3 where max-pools are the stages; odd sizes lose a border, as in the original. Law 8 as D2-Net uses it:
    max-pools take the maximum of boxes that drop a level."""
    size = (24, 40) if "pool" in options else (21, 35)
    model, x = vgg_trunk(name), images(2, *size, double)
    strides = stages((high, 8), 8)
    levels = random_levels(2, (size[0] // high, size[1] // high), strides)
    net = convert(model, output_stride=(high, 8), size=size, **options)
    given = {key: options[key] for key in ("fill", "anchor", "pool") if key in options}
    expected = emulate(model, x, Emulation(levels, strides, **given), high)
    assert_same(run(net, x, mask=levels), expected)
