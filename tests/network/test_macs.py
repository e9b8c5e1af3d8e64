"""Law 7: the MACs counted from the plan are those that run; they grow with the map; what ResNet-101 costs."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same, covering, images, random_levels, slow, some, thorough
from networks import Composed, build, unverified
from ptflops import get_model_complexity_info
from random_networks import random_case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs
from benchmarks.zoo.corpus import CHECKOUT, subject
from cadsurgery.network.macs import dense_macs
from cadsurgery.surgery.plan import third_kept


def convolutions(*layers: tuple[int, int, int], width: int = 8, **options: Any) -> nn.Sequential:
    """Convolutions only; each layer is (kernel, stride, dilation)."""
    modules, channels = [], 3
    for kernel, stride, dilation in layers:
        padding = dilation * (kernel // 2)
        modules.append(nn.Conv2d(channels, width, kernel, stride, padding, dilation, **options))
        channels = width
    return nn.Sequential(*modules).eval()


STRIDED = [(3, 2, 1), (3, 2, 1), (3, 2, 1), (3, 2, 1), (3, 1, 1), (1, 1, 1), (3, 2, 1), (3, 1, 1)]
DILATED = [(3, 2, 1), (3, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 2), (1, 1, 1), (3, 1, 2), (3, 1, 4)]


def mixed() -> nn.Module:
    """Grouped, depthwise, pointwise and biased convolutions, pooling, a residual connection, norms."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = net.depthwise(net.grouped(x)) + net.shortcut(x)
        return net.head(net.pool(torch.relu(x)))

    stem = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    grouped, shortcut = nn.Conv2d(8, 16, 3, 2, 1, groups=4), nn.Conv2d(8, 16, 1, 2)
    parts = {"stem": nn.Sequential(*stem), "grouped": grouped, "shortcut": shortcut, "pool": nn.AvgPool2d(2)}
    deep, head = nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.Conv2d(16, 5, 1)
    return Composed(forward, depthwise=deep, head=head, **parts).eval()


def executed(model: nn.Module, *args: object, **kwargs: object) -> int:
    """Multiply-accumulates that torch sees while the network really runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def of_zeros(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds at its full width, without the time that random weights take: counts do not ask for them."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    return model.eval()


def _without_means(first: Sequence[int], second: Sequence[int], *_: object, **__: object) -> int:
    """Count a product, but nothing for a mean over the image, which is one of a row per image with all rows."""
    rows, inner = first
    return 0 if inner > max(200, 64 * rows) else 2 * rows * inner * second[1]


MODELS = {
    "strided": lambda: convolutions(*STRIDED),
    "dilated": lambda: convolutions(*DILATED),
    "mixed": mixed,
}


@pytest.mark.parametrize("seed", [4, 6, slow(0), *map(thorough, (1, 3, 5))])
def test_the_count_of_a_random_network_is_what_runs_but_for_means(seed: int) -> None:
    """Means over an image, also those of norms, are matrix products on elements; as in dense networks they count for
    nothing. The mask is given: what computes it is counted by itself."""
    case = random_case(seed)
    net = unverified(case.model, "edges", example_input=case.given)
    args = (case.image, *case.more)
    with torch.no_grad():
        net(*args)
    half = torch.zeros_like(net.levels)
    half[:, : half.shape[1] // 2] = net.plan.max_level
    for levels in (
        torch.zeros_like(half),
        half,
    ):  # with everything low few rows are left, as in a linear layer
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: _without_means})
        with torch.no_grad(), counter:
            net(*args, mask=levels)
        assert net.macs(*args, mask=levels).mask == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "options"),
    covering(
        [*MODELS], [{}, {"fill": "nearest"}, {"fill": "nearest", "anchor": "center"}, {"patch": "block"}]
    ),
)
def test_macs_are_those_that_run_and_fall_with_each_raised_level(name: str, options: dict[str, Any]) -> None:
    """Of a mixed map, in the optimised copy too, of both extremes, and of maps between them. They are affine in the
    share of blocks that are kept."""
    net, image = unverified(MODELS[name](), **options), images(2, 97, 161)
    net(image, mask="none")
    size, most = tuple(net.levels.shape[1:]), net.plan.max_level
    levels = random_levels(2, size, net.plan.stage_strides, patch=options.get("patch", "quadtree"))
    report = net.macs(image, mask=levels)
    assert report.mask == executed(net, image, mask=levels) == executed(net.optimize(), image, mask=levels)
    assert report.active_fraction == net.active_fraction and len(levels.unique()) > 1
    for mask, expected in (("all", report.high), ("none", report.low)):
        assert net.macs(image, mask=mask).mask == expected == executed(net, image, mask=mask)
    levels, counts = torch.zeros(2, *size).long(), [report.high]
    for step in torch.randperm(levels.numel()).split(-(-levels.numel() // 6)):
        levels.view(-1)[step] = most
        counts.append(net.macs(image, mask=levels).mask)
    assert counts == sorted(counts, reverse=True) and counts[-1] == report.low < report.high


@pytest.mark.parametrize("name", [*MODELS, *map(slow, ("resnet18", "mobilenet_v2", "fcn_resnet50"))])
def test_macs_at_its_own_resolution_are_the_originals(name: str) -> None:
    model, image = MODELS[name]() if name in MODELS else build(name, by=4), images(1, 97, 129)
    net = unverified(model, "none")
    identity = net.plan.identity_level
    report = net.macs(image)
    assert (report.low if identity else report.high) == executed(model, image) == dense_macs(model, image)


def test_a_report_lists_the_layers_that_add_up_to_it_and_runs_nothing() -> None:
    net, image = unverified(mixed(), "none"), images(1, 96, 128)
    report = net.macs(image)
    with pytest.raises(cs.InvalidInput, match="not run yet"):
        _ = net.levels
    values = report.to_dict()
    of = {"mask": report.mask, "high": report.high, "low": report.low, "given": report.given}
    assert values["macs"] == of
    for side in ("mask", "high", "low"):
        assert sum(layer[side] for layer in values["layers"]) == values["macs"][side]
    assert {layer.layer for layer in report.layers} == {"stem_0", "grouped", "depthwise", "shortcut", "head"}
    assert values["shape"] == [1, 3, 96, 128]


@pytest.mark.parametrize("size", [(96, 128), (97, 161)])
def test_the_dense_twins_cost_what_ptflops_counts(size: tuple[int, int]) -> None:
    strided = convolutions(*STRIDED, bias=False)
    # the same network at output stride 8: strides of the last two stages as dilations 2 and 4
    twin = convolutions(*STRIDED[:3], (3, 1, 1), (3, 1, 2), (1, 1, 1), (3, 1, 2), (3, 1, 4), bias=False)
    report = unverified(strided, output_stride=(8, 32)).macs(images(1, *size))
    functional = {"backend_specific_config": {"count_functional": False}}
    assert report.low == by_ptflops(strided, size, **functional)
    assert report.high == by_ptflops(twin, size, **functional)


@pytest.mark.parametrize(("name", "count"), covering([*MODELS], [1, 5, 11]))
def test_macs_are_affine_in_the_share_of_active_blocks(name: str, count: int) -> None:
    net, image = unverified(MODELS[name](), patch="block"), images(1, 96, 128)
    net(image, mask="none")
    side = net.geometry.sides[-1]
    rows, columns = (length // side for length in net.levels.shape[1:])
    kept = (torch.randperm(whole := rows * columns) < count).view(1, rows, columns)
    report = net.macs(image, mask=kept.repeat_interleave(side, 1).repeat_interleave(side, 2))
    assert report.active_fraction == count / whole
    assert report.mask * whole == count * report.high + (whole - count) * report.low


@pytest.mark.slow
def test_resnet101_costs_what_is_published_for_its_convolutions() -> None:
    trunk = nn.Sequential(*list(of_zeros(torchvision.models.resnet101).children())[:-2]).eval()
    report = unverified(trunk, "all", example_input=images(1, 64, 64)).macs(torch.zeros(1, 3, 1024, 2048))
    assert report.mask == report.high
    assert report.high == pytest.approx(1.4180e12, rel=5e-5)
    assert report.low == pytest.approx(3.2598e11, rel=5e-5)


NETWORKS = MODELS | {"unet": lambda: subject("unets:unet_bilinear", CHECKOUT).build().eval()}


@pytest.mark.parametrize(
    ("name", "pair"),
    some(
        [("strided", None), ("strided", (8, 16)), ("dilated", None), ("unet", (2, 4)), ("mixed", None)],
        rows=True,
    ),
)
def test_work_of_the_network_given_is_what_torch_counts_of_it(
    name: str, pair: tuple[int, int] | None
) -> None:
    """Also where its own output stride is not among those of the conversion, and in optimised copies."""
    model, image = NETWORKS[name](), images(2, 65, 97)
    net = unverified(model, "edges", output_stride=pair)
    for converted in (net, net.optimize()):
        report = converted.macs(image)
        assert report.given == executed(model, image)
        assert report.of_given == report.mask / executed(model, image)
    inside = [layer for layer in report.layers if layer.in_region]
    assert report.region_of_high == sum(layer.mask for layer in inside) / sum(layer.high for layer in inside)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("strided", None), ("unet", (97, 161))])
def test_a_plan_that_makes_maps_finer_says_by_how_much(name: str, size: tuple[int, int] | None) -> None:
    """On the user's example; without one on an image of a photograph's size, since the default example is small."""
    model, image = NETWORKS[name](), images(1, *(size or (512, 1024)))
    example = {"example_input": image} if size else {}
    plan = cs.plan(model, **example)
    net = cs.adaptify(model, "none", **example)
    assert plan.work == net.plan.work and plan.work is not None and plan.work.is_finer
    given, high = executed(model, image), executed(net, image, mask="all")
    assert (plan.work.given, plan.work.high) == (given, high) and high > given
    told = (
        f"this makes maps finer: the same network at output stride {plan.output_stride[0]} everywhere does "
        f"{high / given:.2f} times the work of the network as given"
    )
    assert told in plan.summary() and told in str(net.plan)
    report = net.macs(image, mask="all")
    assert str(report).startswith(f"this makes maps finer: {high / given:.2f} times the work of the network")
    share = f"1.00 of the same network at output stride {plan.output_stride[0]} everywhere"
    assert f"{share}; in the region {report.region_of_high:.2f} of everything high" in str(report)


def test_a_plan_that_makes_no_map_finer_says_what_both_ends_cost_and_is_stored() -> None:
    model, image = MODELS["dilated"](), images(1, 96, 160)
    plan = cs.plan(model, example_input=image)
    share = executed(unverified(model, "none"), image) / executed(model, image)
    assert plan.work is not None and not plan.work.is_finer and plan.work.shape == (1, 3, 96, 160)
    assert f"everything high does 1.00 and everything low {share:.2f} times the work" in plan.summary()
    assert "finer" not in plan.summary() and type(plan).from_json(plan.to_json()).work == plan.work
    values = json.loads(plan.to_json())
    del values["work"]  # as in files of earlier versions
    older = type(plan).from_json(json.dumps(values))
    assert older.work is None and older == plan and "times the work" not in older.summary()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("scenes:FeaturePyramid", None),
        ("unets:unet_transposed", (97, 161)),
        slow("unets:unet_transposed", None),
        thorough("realtime:LinkNet", None),
        slow("realtime:LinkNet", (96, 160)),
    ],
)
def test_a_plan_says_what_floors_would_save(name: str, size: tuple[int, int] | None) -> None:
    """The estimate is the MACs of the conversion with floors, in which only a part of LinkNet's decoder is dense."""
    model = subject(name, CHECKOUT).build().eval()
    example = {"example_input": images(1, *size)} if size else {}
    plan, floors = cs.plan(model, **example), cs.plan(model, coarsest=32, **example)
    assert floors.work is not None and floors.prospect is None and plan.prospect is not None
    low = floors.work.low / floors.work.given
    assert plan.prospect.coarsest == 32 and abs(plan.prospect.nothing_kept - low) < 0.005
    words = f"{low + (1 - low) / 3:.2f} of the MACs of the network as given where a third is kept, {low:.2f} where"
    assert "coarsest=32 takes about" in plan.summary() and words in plan.summary()
    assert type(plan).from_json(plan.to_json()).prospect == plan.prospect


def test_a_third_kept_takes_what_the_plan_says() -> None:
    model, image = subject("scenes:FeaturePyramid", CHECKOUT).build().eval(), images(1, 192, 192)
    net = unverified(model, "none", coarsest=32, example_input=image)
    kept = torch.zeros(1, 192, 192, dtype=torch.bool)
    kept[:, :64] = True
    expected = third_kept(executed(net, image) / executed(model, image))
    assert abs(executed(net, image, mask=kept) / executed(model, image) - expected) < 0.01


@pytest.mark.parametrize("convert", [cs.plan, cs.adaptify])
def test_what_cannot_be_made_finer_is_told_of_floors(convert: Any) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, 1, 1)).eval()
    with pytest.raises(cs.CannotConvert, match="network without strides") as caught:
        convert(convolutions)
    assert "coarsest=32 takes about 0.33 of the MACs" in caught.value.next
    with pytest.raises(cs.CannotConvert) as caught:
        convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval())
    assert "coarsest" not in caught.value.next


def test_a_conversion_without_effect_names_floors() -> None:
    with pytest.warns(cs.CadWarning, match="coarsest=32 takes about"):
        cs.adaptify(subject("heads:PoseBaseline", CHECKOUT).build().eval())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "options"), covering(["nearest", "bilinear", "transposed"], [{}, {"coarsest": 16}], few=0)
)
def test_counting_takes_no_more_memory_than_a_call(how: str, options: dict[str, int]) -> None:
    """Tables of positions are not made for rows without values: beyond the mask, a count holds little."""
    code = f"""
import os, resource, torch
from torch import nn
import cadsurgery as cs
torch.set_num_threads(1); torch.manual_seed(0)
up = nn.ConvTranspose2d(16, 8, 2, 2) if {how!r} == "transposed" else nn.Upsample(scale_factor=2, mode={how!r})
layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)]
net = cs.adaptify(nn.Sequential(*layers, nn.ReLU(), up, nn.Conv2d(8 if {how!r} == "transposed" else 16, 2, 3)).eval(),
                  "random:fraction=0.3,seed=0", verify_laws=False, **{options!r})
image = torch.rand(1, 3, 1536, 1536)
for act in (net.optimize(), net.macs):
    if child := os.fork():  # each in a process of its own, whose memory is counted from here on
        assert os.waitpid(child, 0)[1] == 0
        continue
    with torch.no_grad():
        act(image[..., :128, :128])
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        act(image)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024, flush=True)
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    call, count = map(float, done.stdout.split())
    assert count <= max(call, 64)


# -- sizes held in tensors -----------------------------------------------------------------------------

HELD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tolist": lambda x, y: (torch.tensor(x.shape) - torch.tensor(y.shape))[2:].tolist(),
    "item": lambda x, y: [
        (torch.tensor(x.shape)[axis] - torch.tensor(y.shape)[axis]).item() for axis in (2, 3)
    ],
    "int": lambda x, y: [int(torch.as_tensor(x.shape[axis]) - y.shape[axis]) for axis in (2, 3)],
    "on its device": lambda x, y: (
        torch.tensor(x.shape[2:], device=x.device) - torch.tensor(y.shape[2:], device=y.device)
    ).tolist(),
    "rounded": lambda x, y: (torch.tensor([x.size(2), x.size(3)]).float() / 1).int().tolist(),
}


def holding(held: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    """A U-Net that computes how much its skip is cropped, in tensors."""

    def forward(net: Any, x: Tensor) -> Tensor:
        skip = net.a(x).relu()
        y = net.up(net.b(net.down(skip)).relu())
        down, across = (by % 2 for by in held(skip, y))
        return net.end(torch.cat((F.pad(skip, (0, -across, 0, -down)), y), 1))

    a, b, end = (nn.Conv2d(*channels, 3, 1, 1) for channels in ((3, 6), (6, 6), (12, 2)))
    return Composed(forward, a=a, b=b, end=end, down=nn.MaxPool2d(2), up=nn.Upsample(scale_factor=2)).eval()


@pytest.mark.parametrize("held", some(HELD, every=3))
@torch.no_grad()
def test_sizes_held_in_tensors_have_values_on_shapes_alone(held: str) -> None:
    torch.manual_seed(0)
    model = holding(HELD[held])
    net, x = cs.adaptify(model, "none", coarsest=16), torch.rand(1, 3, 256, 64)
    report = net.macs(x, mask="all")
    assert report.given == report.mask > 0
    assert_same(net.optimize(memory="2MiB")(x, mask="all"), model(x))


class Counted(nn.Module):
    """Convolutions without bias, and norms: ptflops counts biases and activations, too. The stem is no part of the
    region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 4, 1, bias=False)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)) * 2)
        self.head = nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(self.stem(pixels)))


def by_ptflops(model: nn.Module, size: tuple[int, int], **options: Any) -> float | None:
    """What ptflops counts of convolutions without bias; None where a call fails."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_model_complexity_info(
            model,
            (3, *size),
            as_strings=False,
            print_per_layer_stat=False,
            ignore_modules=[nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d],
            **options,
        )[0]


def counted(net: nn.Module, x: Tensor) -> float | None:
    return by_ptflops(net, (65, 97), backend="pytorch", input_constructor=lambda size: {"pixels": x})


@torch.no_grad()
@pytest.mark.parametrize("mask", ["all", "none", "mixed"])
def test_ptflops_counts_what_macs_counts(mask: str) -> None:
    net, x = unverified(Counted().eval(), "edges", example_input=images(1, 65, 97)), images(1, 65, 97)
    net(x, mask="all")
    half = torch.zeros(net.levels.shape, dtype=torch.bool)
    half[:, :, : half.shape[2] // 2] = True
    chosen: Any = half if mask == "mixed" else mask
    before = net(x, mask=chosen)
    with net.masked(chosen):
        assert counted(net, x) == net.macs(x, mask=chosen).mask
    assert torch.equal(net(x, mask=chosen), before)


@torch.no_grad()
def test_after_a_counter_failed_the_network_works_as_before_and_refuses_other_hooks() -> None:
    """Its hooks stay, and calls still give what they gave."""
    net, x = unverified(Counted().eval(), "edges", example_input=images(1, 65, 97)), images(1, 65, 97)
    before = net(x)
    with pytest.raises(cs.InvalidInput):
        net(torch.full_like(x, float("nan")))
    assert counted(net, x[:, :2]) is None
    assert torch.equal(net(x), before)
    handle = net.body[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(cs.InvalidInput, match="cannot call as it is meant"):
        net(x)
    handle.remove()
    assert torch.equal(net(x), before)
