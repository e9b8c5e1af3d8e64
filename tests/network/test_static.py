"""Static shapes: lattices with bounds, compiled and exported networks, buckets.

Law: with bounds instead of exact counts a lattice has more rows; those of the elements hold what they hold without
bounds, and nothing reads the others. So a graph made for one image is right for every image of its size.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import assert_same, covering, images, random_levels, relative_error
from networks import Composed, build, randomise, strided, unverified
from timm.models._efficientnet_blocks import CondConvResidual
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Bounds, Geometry
from cadsurgery.masks import FineMapSpec
from cadsurgery.masks.masking import Masking
from cadsurgery.network.cuda_graphs import bucket

BUDGET = "edges | budget:fraction=0.34"
double = torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No graph of another test counts against the compiler's limits."""
    torch._dynamo.reset()


def graphs(backend: str = "eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


def converted(model: nn.Module, mask: Any = BUDGET, **options: Any) -> cs.AdaptiveModel:
    example = images(1, 64, 96, next(model.parameters()).dtype)
    return unverified(model, mask, example_input=example, **options)


# -- bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strides", "size", "max_level", "patch", "floors"),
    covering(
        [(2,), (2, 2), (4, 2), (3, 2), (2, 2, 2)],
        [(16, 24), (13, 17), (3, 5)],
        [1, -1],
        ["quadtree", "block"],
        [False, True],
    ),
)
def test_bounds_hold_for_every_choice_of_patches(
    strides: tuple[int, ...], max_level: int, size: tuple[int, int], patch: Any, floors: bool
) -> None:
    """How many patches have level i or finer decides. No map of so many has fewer or more elements after any stage, at
    the whole size or a cut one; where patches divide the map, the bounds are met. The level is known where all cells
    of a stage have one."""
    geometry = Geometry(strides, max_level, patch=patch, floors=floors)
    grid = FineMapSpec.of(geometry, 2, size, 8)
    total, rows = 2 * grid.patches, -(-size[0] // grid.patch)
    cut = (size[0] - 1, size[1] - 2)
    for shares in ((0.0, 0.5), (0.2, 0.2), (0.3, 0.8), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.2, 0.5, 1.0)):
        kept = tuple(round(share * total) for share in shares[: geometry.max_level])
        bounds = Bounds.of_patches(geometry, 2, size, kept)
        for _ in range(3):
            rank = torch.randperm(total).view(2, -1)
            by_patch = sum((rank >= count).long() for count in kept)
            by_patch = torch.where(rank >= kept[-1], geometry.max_level, by_patch).view(2, rows, -1)
            levels = by_patch.repeat_interleave(grid.patch, 1).repeat_interleave(grid.patch, 2)
            levels = levels[:, : size[0], : size[1]]
            exact, bounded = geometry.lattice(levels), geometry.lattice(levels, bounds)
            for stage in range(geometry.stages):
                assert bounds.least[stage] <= len(exact.at(stage)) <= bounds.most[stage]
                least, most = bounded.at(stage, cut).capacity or (0, 0)
                assert least <= len(exact.at(stage, cut)) <= most
                assert bounded.at(stage).uniform_level in (None, exact.at(stage).uniform_level)
            if floors:
                assert bounded.at(len(strides) + 1).uniform_level == len(strides)
            assert bounds.level == exact.uniform_level
            if all(length % grid.patch == 0 for length in size):
                assert bounds.least == bounds.most


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.34, 1.0])
def test_a_budget_keeps_the_patches_it_promises(fraction: float, per_batch: bool) -> None:
    geometry, size = Geometry((2, 2)), (13, 17)
    grid = FineMapSpec(3, size, 8, 2, 4, 4)
    mask = cs.Budget("random", fraction, per_batch)
    levels = mask(images(3, 104, 136), torch.zeros(3, 1, *size), grid)
    kept = int((levels[:, ::4, ::4] == 0).sum())
    assert (kept,) == mask.kept_patches(grid)
    lattice = geometry.lattice(levels)
    bounds = Bounds.of_patches(geometry, 3, size, (kept,))
    assert all(bounds.least[s] <= len(lattice.at(s)) <= bounds.most[s] for s in range(3))
    assert bounds.level == lattice.uniform_level


@pytest.mark.parametrize("per_octave", [1, 3, 4, 8])
def test_buckets_are_a_partition_and_waste_little(per_octave: int) -> None:
    previous = bucket(0, per_octave)
    for count in range(1, 3000):
        least, most = found = bucket(count, per_octave)
        assert least <= count <= most <= count * 2 ** (1 / per_octave) + 1
        assert found == previous or least == previous[1] + 1
        previous = found


# -- operations on elements ----------------------------------------------------------------------------

PAIR = Window((3, 3), 1, (1, 1), (1, 1, 1, 1))
Operation = Callable[[Elements, Tensor], Any]


def mixed_experts(x: Elements, weight: Tensor) -> Elements:
    mix = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=weight.dtype)[: x.lattice.batch]
    experts = torch.stack([weight.flatten(), weight.flip(0).flatten()])
    window = PAIR._replace(spacing=2)
    return functional.conv2d_per_image(x, mix, experts, None, window, 1, tuple(weight.shape))


def matrices(x: Elements, weight: Tensor) -> Elements:
    return functional.matrix_on_rows(x, weight[:, :, :2, 0].permute(2, 0, 1)[: x.lattice.batch], False)


def in_training(x: Elements, weight: Tensor) -> Any:
    norms = [nn.BatchNorm2d(4).to(weight.dtype).train() for _ in range(2)]
    rows = [
        functional.batch_norm(x, norm, weighted=by) for norm, by in zip(norms, (True, False), strict=True)
    ]
    return [*rows, norms[0].running_var, norms[1].running_mean, norms[1].running_var]


def under(mode: str, spacing: int = 2) -> Operation:
    window = PAIR._replace(spacing=spacing, mode=mode)
    return lambda x, w: functional.conv2d(x, w, None, window, x.lattice.stage)


OPERATIONS: dict[str, Operation] = {
    "conv": under("zeros"),
    "conv inside cells": under("zeros", 1),
    "conv reflected": under("reflect"),
    "conv grouped": lambda x, w: functional.conv2d(x, w[:, :1], None, PAIR._replace(spacing=2), 1, 4),
    "conv strided": lambda x, w: functional.conv2d(x, w, None, PAIR._replace(spacing=2, stride=2), 2),
    "conv valid": lambda x, w: functional.conv2d(x, w[..., :2], None, Window((3, 2), spacing=2), 1),
    "conv per image": mixed_experts,
    "point": lambda x, w: functional.conv2d(x, w[:, :, :1, :1], None, Window((1, 1)), 2),
    "max pool": lambda x, w: functional.max_pool2d(x, PAIR._replace(spacing=2, stride=2), 2),
    "mean pool": lambda x, w: functional.avg_pool2d(x, PAIR._replace(spacing=2, stride=2), 2, False),
    "space to depth": lambda x, w: functional.pixel_unshuffle(x, Window((2, 2), 2, spacing=2), 2),
    "transposed": lambda x, w: functional.conv2d(
        x, w, None, Window((3, 3), padding=(1, 0, 1, 0), spacing=2, finer=2), 0
    ),
    "transposed, grouped": lambda x, w: functional.conv2d(
        x, w[:, :1, :2, :2], None, Window((2, 2), spacing=2, finer=2), 0, 4
    ),
    "depth to space": lambda x, w: functional.pixel_shuffle(x, 0, (2, 1), 2),
    "resize": lambda x, w: functional.resize(x, 0, (2, 1), 2, tuple(x.lattice.size), "bilinear"),
    "subsampled": lambda x, w: Elements(functional.rows_on(x, x.lattice.at(2)), x.lattice.at(2)),
    "dense": lambda x, w: functional.to_dense(x),
    "dense native": lambda x, w: functional.to_dense(x, 2),
    "mean": lambda x, w: functional.global_mean(x),
    "bins": lambda x, w: functional.pool_to_bins(x, (3, 2), False, 2),
    "largest of bins": lambda x, w: functional.pool_to_bins(x, (2, 2), True, 2),
    "small map": lambda x, w: Elements(
        functional.rows_on(
            functional.small_map(w[: x.lattice.batch], 2, x.lattice.samples(2), "bilinear"), x.lattice
        ),
        x.lattice,
    ),
    "max": lambda x, w: functional.global_max(x),
    "min": lambda x, w: functional.global_reduce(x, "amin", (2, 3)),
    "deviation": lambda x, w: functional.global_reduce(x, "std", (2, 3)),
    "batch norm": in_training,
    "group norm": lambda x, w: functional.group_norm(x, 2, None, None),
    "products": lambda x, w: functional.sum_of_products(x, x, 2, "bchw"),
    "matrices": matrices,
    "softmax": lambda x, w: functional.softmax_over_image(x, 2),
}


def values_of(found: Any) -> list[Tensor]:
    if isinstance(found, list):
        return [value for part in found for value in values_of(part)]
    if isinstance(found, Tensor):
        return [found]
    return [found.rows[: int(found.lattice.counts.sum())]]


PUBLISHED = {"fill": "nearest", "anchor": "center", "pool": "drop", "patch": "block"}


@pytest.mark.parametrize(
    ("name", "size", "options"),
    covering(
        [*OPERATIONS],
        [(13, 18), (16, 24)],
        [*({"fill": fill} for fill in ("linear", "nearest", "guided")), PUBLISHED],
    ),
)
def test_padding_changes_nothing(name: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    """Every operation on a lattice with loose bounds, its padding full of NaN, is that on the exact one."""
    geometry = Geometry((2, 2), **options)
    if name == "space to depth" and size[0] % 2:  # torch refuses sides that do not divide
        size = (12, 20)
    for batch, dtype in ((1, torch.float32), (2, double)):
        levels = random_levels(batch, size, (2, 2), patch=geometry.patch)
        pixels = batch * size[0] * size[1]
        exact = geometry.lattice(levels).at(1)
        most = tuple(min(len(exact.at(stage)) + 7, pixels) for stage in range(3))
        bounded = geometry.lattice(levels, Bounds((0, 5, 3), most)).at(1)
        dense, weight = torch.randn(batch, 4, *size, dtype=dtype), torch.randn(4, 4, 3, 3, dtype=dtype)
        results = []
        for lattice in (exact, bounded):
            rows = functional.rows_on(functional.to_elements(dense, lattice), lattice).clone()
            rows[len(exact) :] = torch.nan
            results.append(values_of(OPERATIONS[name](Elements(rows, lattice), weight)))
        assert len(bounded) == len(exact) + 7
        for found, expected in zip(results[1], results[0], strict=True):
            assert found.isfinite().all()
            assert_same(found, expected, 1e-5 if dtype == torch.float32 else 1e-12)


# -- networks ------------------------------------------------------------------------------------------


def normed_trunk() -> nn.Module:
    """The same with a norm behind each convolution, and a residual."""
    layers: list[nn.Module] = []
    for layer in strided(outputs=4, kernel=3):
        if isinstance(layer, nn.Conv2d):
            layer.bias = None  # its gradient would be rounding alone
            layers += [layer, nn.BatchNorm2d(4)]
        else:
            layers.append(layer)
    return randomise(nn.Sequential(*layers, BasicBlock(4, 4)))


@pytest.mark.slow
def test_one_graph_serves_every_image_of_a_size() -> None:
    """fullgraph: no break; one graph for four images; levels and active fraction of each call are known."""
    trunk = create_feature_extractor(build("resnet18", by=4), {"layer4": "map", "fc": "logits"})
    net, seen = converted(trunk), graphs("aot_eager")
    fast = torch.compile(net, backend=seen, fullgraph=True)
    maps = []
    for _ in range(4):
        x = images(2, 65, 97)
        with torch.no_grad():
            found = fast(x)
            levels, fraction = net.levels.clone(), net.active_fraction
            assert_same(found, net(x), 1e-5)
        assert torch.equal(levels, net.levels) and fraction == net.active_fraction
        maps.append(levels)
    assert seen.frame_count == 1
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.slow
def test_another_size_is_another_graph_and_other_weights_are_the_same() -> None:
    net, seen = converted(strided(outputs=4, kernel=3)), graphs()
    fast = torch.compile(net, backend=seen, fullgraph=True)
    with torch.no_grad():
        for count, size in enumerate([(64, 96), (65, 97)], 1):
            x = images(1, *size)
            assert_same(fast(x), net(x), 1e-5)
            assert seen.frame_count == count
        net.load_state_dict(strided(outputs=4, kernel=3).state_dict())
        assert_same(fast(x), net(x), 1e-5)
        assert seen.frame_count == count


@pytest.mark.slow
def test_compiled_training_is_eager_training() -> None:
    """Outputs, gradients and running statistics, on sizes with padding."""
    net = converted(normed_trunk().double()).train()
    twin, x = copy.deepcopy(net), images(2, 72, 104, double)
    found, expected = torch.compile(net, backend="aot_eager", fullgraph=True)(x), twin(x)
    assert_same(found, expected, 1e-9)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, one), (_, two) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert relative_error(one.grad, two.grad) < 1e-8, name
    for (name, one), (_, two) in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(one, two, atol=1e-12), name


def excited(how: str) -> nn.Module:
    """Channels weighed by a reduction of the whole image, as squeeze-and-excitation does."""
    return Composed(lambda net, x: x * getattr(x, how)(dim=(2, 3), keepdim=True).sigmoid())


def with_reductions() -> nn.Module:
    reductions = [excited(how) for how in ("mean", "sum", "norm", "var", "std", "amax", "amin")]
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)]
    return nn.Sequential(*strided(outputs=4, kernel=3), *reductions, *norms, nn.Conv2d(4, 4, 3, 1, 1)).eval()


def with_blocks() -> nn.Module:
    """Kernels mixed per image, attention over the image, split attention, norms of groups by their deviation."""
    blocks = (
        CondConvResidual(4, 4, 3, num_experts=3),
        timm.layers.GlobalContext(4, rd_channels=2),
        timm.layers.SplitAttn(4, rd_channels=4),
        timm.layers.EvoNorm2dS0(4, groups=2),
    )
    return randomise(nn.Sequential(strided(outputs=4, kernel=3), *blocks, nn.Conv2d(4, 4, 3, 1, 1)))


def with_means() -> nn.Module:
    """Dense, depthwise and pointwise convolutions, pooling, reductions of an image and a global mean."""
    more = [nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.MaxPool2d(3, 1, 1), excited("norm"), nn.GroupNorm(2, 4)]
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(strided(outputs=4, kernel=3), *more, *last).eval()


# A network, its mask, that of the call, and the compiler's backend; on elements each operation is in `OPERATIONS`.
COMPILED: dict[str, tuple[Callable[[], nn.Module], str, Any, str]] = {
    "everything high": (normed_trunk, "all", None, "eager"),
    "nothing high": (normed_trunk, "none", None, "eager"),
    "a mask of a call": (normed_trunk, "edges", cs.Budget("edges", 0.5), "eager"),
    "reductions": (with_reductions, BUDGET, None, "aot_eager"),
    "blocks of libraries": (with_blocks, BUDGET, None, "aot_eager"),
    "inductor": (with_means, BUDGET, None, "inductor"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_a_compiled_network_is_one_graph_that_gives_what_it_gives(name: str) -> None:
    """fullgraph: no break. On sizes with padding, which no reduction may count; uniform masks are dense networks."""
    make, mask, given, backend = COMPILED[name]
    options = {"output_stride": (16, 32)} if backend == "inductor" else {}  # of few stages, which takes long
    net, x, seen = converted(make(), mask, **options), images(2, 72, 104), graphs(backend)
    fast = torch.compile(lambda image: net(image, mask=given), backend=seen, fullgraph=True)
    assert_same(fast(x), net(x, mask=given), 1e-5)
    assert seen.frame_count == 1
    targets = [str(node.target) for graph in seen.graphs for node in graph.graph.nodes]
    assert mask not in ("all", "none") or not any("product_by_table" in target for target in targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_replays_on_other_images() -> None:
    net = converted(build("resnet18", by=4)).cuda()
    fast = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = images(1, 72, 104).cuda()
            assert_same(fast(x).clone(), net(x), 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_static_form_is_captured_without_a_compiler() -> None:
    net = converted(build("resnet18", by=4)).cuda()
    static = Masking(net.mask, net.geometry, net.plan.strides[0], static=True)
    image = images(1, 72, 104).cuda()
    with torch.no_grad():
        forward = torch.export.export(net, (image,)).module()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            forward(image)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward(image)
        for _ in range(3):
            image.copy_(images(1, 72, 104))
            graph.replay()
            assert_same(found.clone(), net.run(static, image), 1e-3)


# -- export --------------------------------------------------------------------------------------------

WITHOUT_PACKAGE = """
import sys
sys.modules["cadsurgery"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.slow
def test_an_exported_program_runs_without_the_package(tmp_path: Path) -> None:
    """On another image than it was made from; its operations are torch's own."""
    net, x = converted(normed_trunk()), images(2, 72, 104)
    report = cs.export(net, images(2, 72, 104), tmp_path / "net.pt2")
    assert report.difference < 1e-5 and report.bytes == (tmp_path / "net.pt2").stat().st_size
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / file) for file in ("net.pt2", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *paths], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert_same(torch.load(tmp_path / "y.pt"), net(x), 1e-5)


@pytest.mark.slow
def test_strict_export_is_torch_operations_too_and_leaves_the_last_call_alone() -> None:
    net, x = converted(strided(outputs=4, kernel=3)), images(1, 64, 96)
    with torch.no_grad():
        before = net(x)
        for strict in (False, True):
            program = torch.export.export(net, (images(1, 64, 96),), strict=strict)
            assert net.levels.shape == (1, 8, 12) and type(net.levels) is Tensor
            assert_same(program.module()(x), before, 1e-5)
            assert torch.equal(net(x), before)
            assert not any("cadsurgery" in str(node.target) for node in program.graph.nodes)


# -- masks that are not static -------------------------------------------------------------------------


def test_other_masks_break_the_graph_or_are_refused_in_words() -> None:
    """Without fullgraph the network runs as it does in eager mode; with it the message names both ways out."""
    net, x = converted(strided(outputs=4, kernel=3), "edges"), images(1, 64, 96)
    levels = random_levels(1, (8, 12), (2, 2))
    with torch.no_grad():
        assert_same(torch.compile(net, backend="eager")(x), net(x), 1e-6)
        assert_same(torch.compile(net, backend="eager")(x, mask=levels), net(x, mask=levels), 1e-6)
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught:
            torch.compile(net, backend="eager", fullgraph=True)(x)
        for words in ("edges | budget:fraction=0.3", "net.optimize()"):
            assert words in str(caught.value)
        with pytest.raises(cs.InvalidInput, match=r"net\.optimize"):
            torch.export.export(net, (x,), strict=False)


def host() -> nn.Module:
    """Takes and returns lists as a detector does, and decides by values, so that only its backbone converts."""

    def forward(net: Any, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        x = torch.stack(pictures)
        scores = net.backbone(x if x.sum() > x.numel() else 2 * x)
        return [{"scores": one.flatten()} for one in scores]

    return Composed(forward, backbone=strided(outputs=4, kernel=3)).eval()


@pytest.mark.slow
def test_a_detector_runs_uncompiled_and_its_part_compiled() -> None:
    net = unverified(host(), BUDGET)
    x, seen = [images(1, 64, 96)[0]], graphs()
    with torch.no_grad():
        expected = net(x)[0]
        assert_same(torch.compile(net, backend="eager")(x)[0]["scores"], expected["scores"])
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"net\.part\.compile"):
            torch.compile(net, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()
        net.part.compile(backend=seen, fullgraph=True)
        found = net(x)[0]
    assert seen.frame_count == 1
    assert_same(found["scores"], expected["scores"], 1e-3)
