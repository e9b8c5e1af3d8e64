"""The optimised copy is the same network: to rounding, for any mask, from any thread.

That it gives what the network gives is a law on random networks: `tests/laws/test_form_laws.py`.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, relative_error, slow, some
from encoder_heads import HEADS
from encoder_heads import network as behind_an_encoder
from networks import Composed, Encoded, Undecided, build, made_once, randomise, strided, unverified
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.axes import in_order
from cadsurgery.elements.backends.native import Native, has_fast_code
from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.packed import PackedConv, PackedLinear
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import Convolution
from cadsurgery.elements.functional import Elements, conv2d
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.kernels import isa
from cadsurgery.network import fuse
from cadsurgery.network.model import AdaptiveModel, OptimizedModel
from cadsurgery.network.optimized import KERNELS

MIXED = "random:fraction=0.4,seed=3,block=3"
CONVOLUTIONS = {"resnet18": 18 + 2, "mobilenet_v2": 52, "vgg11_bn": 8, "mobilenet_v3_small": 52}


def modules_of(net: cs.AdaptiveModel) -> list[nn.Module]:
    return [net.get_submodule(str(n.target)) for n in net.graph.nodes if n.op == "call_module"]


@pytest.fixture(scope="module")
def small() -> cs.AdaptiveModel:
    return unverified(build("resnet18", by=4), MIXED)


@pytest.mark.parametrize("name", some(CONVOLUTIONS))
def test_every_batch_norm_and_activation_is_part_of_a_convolution(name: str) -> None:
    fast = unverified(build(name, by=4)).optimize()
    left = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Conv2d, nn.Dropout)
    convolutional = [m for m in modules_of(fast) if isinstance(m, left)]
    after_linear = 2 if name == "vgg11_bn" else 0  # dropped or fused as well
    assert len(convolutional) <= after_linear
    fused = [n for n in fast.graph.nodes if n.target is functional.fused_conv2d]
    dense = [m for m in modules_of(fast) if isinstance(m, PackedConv) and not isinstance(m, PackedLinear)]
    assert len(fused) + len(dense) == CONVOLUTIONS[name]
    assert not any(n.target in (functional.conv2d, functional.batch_norm) for n in fast.graph.nodes)


@torch.no_grad()
@pytest.mark.smoke
def test_other_types_and_autocast(small: cs.AdaptiveModel) -> None:
    """Its packed weights follow `to`."""
    x, fast = images(1, 65, 97), small.optimize()
    expected = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(x).float(), expected, 5e-2)
    assert_same(fast.double()(x.double()), expected.double(), 1e-4)
    assert_same(fast.float()(x), expected, 1e-4)


def test_the_network_stays_as_it_is() -> None:
    """In training mode it is left training; its values and gradients are its own."""
    net = unverified(build("resnet18", by=4).train(), MIXED)
    before = copy.deepcopy(net.state_dict())
    fast = net.optimize()
    assert net.training and not fast.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not fast(images(1, 65, 97).requires_grad_()).requires_grad


class Boxes(cs.MaskProvider):
    column = 0

    def forward(self, image: Tensor, features: Tensor, grid: cs.masks.FineMapSpec) -> Tensor:
        return (torch.arange(grid.size[1]) < self.column).expand(grid.batch, *grid.size)


class WithTensor(Boxes):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(1))


class NoisyInTraining(Boxes):
    def forward(self, image: Tensor, features: Tensor, grid: cs.masks.FineMapSpec) -> Tensor:
        return super().forward(image, features, grid) ^ self.training


@pytest.mark.parametrize(
    ("kind", "is_shared"), [(Boxes, True), (WithTensor, False), (NoisyInTraining, False)]
)
def test_state_set_on_a_mask_holds_for_optimised_copies(kind: type[Boxes], is_shared: bool) -> None:
    """Copies of other kinds keep their own, and so does a copy whose mask has tensors or reads `training`."""
    net = unverified(build("resnet18", by=4).train(), kind())
    x, fast, twin = images(1, 64, 96), net.optimize(), copy.deepcopy(net)
    net.mask.column = 4
    fast(x)
    assert fast.levels.eq(0).any() == is_shared
    assert not fast.mask.training or is_shared
    twin(x, mask=twin.mask.eval())
    assert not twin.levels.eq(0).any()
    again = copy.deepcopy(fast)
    fast.mask.column = 0
    again(x)
    assert again.levels.eq(0).any() == is_shared
    assert all(module.training for module in net.modules())


def test_threads_do_not_disturb_each_other(small: cs.AdaptiveModel) -> None:
    """Different sizes and masks at once, weights packed while others run."""
    fast = small.optimize()
    tasks = [(images(1, 65 + 8 * i, 97), mask) for i in range(3) for mask in (MIXED, "all", "none")] * 2
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda task: fast(task[0], mask=task[1]), tasks))
    with torch.no_grad():
        for (x, mask), value in zip(tasks, found, strict=True):
            assert_same(value, small(x, mask=mask), 1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(small: cs.AdaptiveModel, assign: bool) -> None:
    """Also after a call has packed those before them."""
    x, fast = images(1, 65, 97), small.optimize()
    other = unverified(build("resnet18", by=4), MIXED).optimize()
    expected, before = fast(x), other(x)
    other.load_state_dict(copy.deepcopy(fast.state_dict()), assign=assign)
    assert not torch.equal(before, expected)
    assert_same(other(x), expected, 1e-5)


def test_what_cannot_be_done_says_what_can(small: cs.AdaptiveModel, tmp_path: Any) -> None:
    fast = small.optimize()
    assert fast.optimize() is fast
    with pytest.raises(cs.InvalidInput, match="train the network it was made from"):
        fast.train()
    with pytest.raises(cs.InvalidInput, match="save the network it was made from"):
        cs.save(fast, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@torch.no_grad()
def test_a_hosted_part_is_optimised() -> None:
    torch.manual_seed(0)
    net: Any = unverified(Undecided(strided(norm=True, outputs=4, kernel=3)).eval(), MIXED)
    fast: Any = net.optimize()
    assert isinstance(fast, type(net)) and isinstance(fast.part, OptimizedModel)
    x = images(1, 96, 128)
    net.part(x, mask="all")
    levels = torch.zeros(net.part.levels.shape, dtype=torch.bool)
    levels[:, ::3] = True
    with net.part.masked(levels), fast.part.masked(levels):
        assert_same(fast.backbone(x), net.backbone(x), 1e-4)


# -- patterns the networks above do not have -----------------------------------------------------------


def odd(net: Any, x: Tensor) -> Tensor:
    """A value read before its activation, a residual that is smaller, a convolved mean that is added to a map, a
    product that is no factor, shared weights."""
    x = net.stem(x)
    x = net.down(torch.relu(x) + x)
    y = net.norm(net.same(x)) * net.scale
    y = net.free(y + torch.sigmoid(y))
    y += x
    y = y + net.of_mean(x.mean((2, 3), keepdim=True))
    y = nn.functional.leaky_relu(net.same(y) * y, 0.2)
    return net.last(net.shrink(y) + 1.0)


@pytest.mark.parametrize("fill", ["nearest", "linear"])
@torch.no_grad()
def test_what_only_looks_like_a_pattern_is_left(fill: Any) -> None:
    norm, free = randomise(nn.BatchNorm2d(8)), nn.BatchNorm2d(8, affine=False)
    free.running_var.uniform_(0.5, 1.5)
    parts = {"shrink": nn.Conv2d(8, 8, 3), "same": nn.Conv2d(8, 8, 1), "of_mean": nn.Conv2d(8, 8, 1)}
    parts |= {"stem": nn.Conv2d(3, 8, 3, 2, 1), "down": nn.Conv2d(8, 8, 3, 2, 1)}
    scale, last = nn.Parameter(torch.randn(8, 1, 1)), nn.Conv2d(8, 4, 3, 2, 1)
    model = Composed(odd, norm=norm, free=free, scale=scale, last=last, **parts)
    net, x = unverified(model.eval(), MIXED, fill=fill), images(2, 65, 97)
    for fast in (net.optimize(), net.optimize(fuse=False)):
        for mask in (None, "all", "none"):
            assert_same(fast(x, mask=mask), net(x, mask=mask), 1e-4)


RUNGS = 12


def deep(net: Any, x: Tensor) -> Tensor:
    """A weight and a map that are each made by a ladder: two ways to every rung."""
    x, weight = net.down(net.stem(x)), net.weight
    for _ in range(RUNGS):
        weight = torch.tanh(weight) - torch.exp(weight)
        x = torch.sigmoid(x) - torch.tanh(x)
    x = net.same(x) * x
    return net.last(nn.functional.conv2d(x, weight, None, 1, 1))


class _Counted(TorchFunctionMode):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.calls = function, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is self.function
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_is_constant_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And found without walking every way to it, of which there may be exponentially many."""
    stem, down, last = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, 2, 1)
    same, weight = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8, 8, 3, 3))
    model = Composed(deep, stem=stem, down=down, same=same, last=last, weight=weight)
    net, x = unverified(model.eval(), MIXED), images(2, 65, 97)
    asked, get = [], fuse.Constants.get
    monkeypatch.setattr(fuse.Constants, "get", lambda self, node: asked.append(node) or get(self, node))
    with _Counted(torch.exp) as counted:
        fast = net.optimize()
    assert counted.calls == RUNGS
    assert len(asked) < 3 * len(net.graph.nodes)
    assert_same(fast(x), net(x), 1e-4)


@torch.no_grad()
def test_a_convolution_with_hooks_is_left_alone() -> None:
    """A hook may make its weight, as the older weight norm does."""
    model = build("resnet18", by=4)

    def make_weight(module: Any, args: Any) -> None:
        module.weight.mul_(1.0)

    model.conv1.register_forward_pre_hook(make_weight)
    fast = unverified(model, MIXED).optimize()
    assert [type(m) for m in modules_of(fast)].count(nn.Conv2d) == 1


@pytest.mark.parametrize("fuse_all", [True, False])
@pytest.mark.parametrize("name", ["norm", "same", "act"])
@torch.no_grad()
def test_what_has_hooks_is_neither_dropped_nor_taken_in(name: str, fuse_all: bool) -> None:
    parts = {"stem": nn.Conv2d(3, 8, 3, 4, 1), "norm": nn.BatchNorm2d(8), "same": nn.Identity()}
    parts |= {"down": nn.Conv2d(8, 8, 3, 2, 1), "act": nn.ReLU(), "last": nn.Conv2d(8, 8, 3, 2, 1)}
    model = nn.Sequential(OrderedDict(parts)).eval()
    model.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out + 1)
    net, x = unverified(model, MIXED), images(2, 65, 97)
    assert_same(net.optimize(fuse_all)(x), net(x), 1e-4)


@torch.no_grad()
def test_a_residual_smaller_than_the_product() -> None:
    """The sum is cut to what both have, as without fusion."""
    lattice = Geometry((2,)).lattice(torch.randint(0, 2, (2, 12, 14))).at(0)
    window, kernel = Window((3, 3), 1, (1, 1), (1, 1, 1, 1)), torch.randn(4, 4, 3, 3)
    x = Elements(torch.randn(len(lattice), 4), lattice)
    less = lattice.at(0, (10, 12))
    residual = Elements(torch.randn(len(less), 4), less)
    found = functional.fused_conv2d(
        x, FusedConv(kernel, None, 1, Activation("relu")), residual, window=window, stage=0
    )
    whole = conv2d(x, kernel, None, window, 0)
    assert found.lattice == less
    assert_same(found.rows, (functional.rows_on(whole, less) + residual.rows).relu(), 1e-4)


def broadcast(net: Any, x: Tensor) -> Tensor:
    """The sum of a map with one of a single channel, either of them the product."""
    x = net.down(net.stem(x))
    more = net.one(x).sigmoid() if net.conv.out_channels > 1 else x
    return net.last(torch.relu(net.conv(x) + more))


@pytest.mark.parametrize(
    ("side", "outputs", "groups"),
    some([(1, 64, 1), (3, 64, 1), (3, 64, 64), (1, 1, 1), (3, 1, 1)], rows=True),
)
@torch.no_grad()
def test_a_residual_of_other_channels_is_broadcast(side: int, outputs: int, groups: int) -> None:
    """Never read as if it had the product's: its memory is smaller."""
    stem, down, last = nn.Conv2d(3, 64, 3, 4, 1), nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 4, 3, 2, 1)
    conv, one = nn.Conv2d(64, outputs, side, 1, side // 2, groups=groups), nn.Conv2d(64, 1, 3, 1, 1)
    model = Composed(broadcast, stem=stem, down=down, one=one, conv=conv, last=last)
    net = unverified(model.eval(), MIXED)
    fast, x = net.optimize(), images(2, 65, 97)
    for mask in (None, "all", "none"):
        assert_same(fast(x, mask=mask), net(x, mask=mask), 1e-4)


@pytest.mark.parametrize(
    ("activation", "more", "dtype"),
    covering(
        [None, Activation("relu"), Activation("gelu", (), "none")],
        [(2, 5, 4), (4,), (5, 1), (3, 2, 5, 4), (3, 1, 1, 1)],
        [torch.float32, torch.float64],
    ),
)
@torch.no_grad()
def test_a_linear_layer_adds_what_broadcasts(
    activation: Activation | None, more: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also to a larger shape than the product's."""
    weight, bias = torch.randn(4, 6, 1, 1, dtype=dtype), torch.randn(4, dtype=dtype)
    x, residual = torch.randn(2, 5, 6, dtype=dtype), torch.randn(more, dtype=dtype)
    found = PackedLinear(weight, bias, 1, activation)(x, residual)
    expected = nn.functional.linear(x, weight[:, :, 0, 0], bias) + residual
    assert_same(found, activation.apply_(expected) if activation is not None else expected, 1e-5)


@pytest.mark.parametrize(("channels", "side"), [(8, 1), (8, 3), (1, 3)])
@torch.no_grad()
def test_packed_weights_are_few_and_right(channels: int, side: int) -> None:
    """Of many sizes and types of dense maps the last are kept."""
    conv = PackedConv(
        torch.randn(8, channels, side, side), None, 8 // channels, None, ((1, 1), (1, 1), (1, 1))
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for height in range(5, 12):
            x = torch.randn(2, 8, height, 9).to(dtype)
            expected = nn.functional.conv2d(x, conv.weight.to(dtype), None, 1, 1, groups=conv.groups)
            assert_same(conv(x).float(), expected.float(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert 0 < len(conv.weights.packed_cache or ()) <= 4


@pytest.mark.parametrize(
    ("dtype", "group", "kernel", "stride", "dilation", "padding"),
    covering(
        [torch.float32, torch.bfloat16, torch.float64],
        [1, 2, 4, 8],
        [(3, 3), (5, 3), (1, 7)],
        [(1, 1), (2, 2), (1, 3)],
        [(1, 1), (9, 4), (36, 36)],
        [(0, 0), (3, 9), (36, 36)],
    ),
)
@torch.no_grad()
def test_grouped_convolutions_of_dense_maps_compute_what_torch_does(
    dtype: torch.dtype, group: int, kernel: tuple[int, int], stride: Any, dilation: Any, padding: Any
) -> None:
    """Whatever computes them: oneDNN, torch or a kernel for elements; batches, residuals and clamps, too."""
    window = (stride, padding, dilation)
    x, weight = torch.randn(2, 24, 41, 77).to(dtype), torch.randn(24, group, *kernel).to(dtype)
    sizes = [
        side + 2 * pad - step * (taps - 1)
        for side, pad, step, taps in zip(x.shape[2:], padding, dilation, kernel, strict=True)
    ]
    bias, act = torch.randn(24).to(dtype), Activation("hardtanh", (-1.0, 2.0))
    conv = PackedConv(weight, bias, 24 // group, act, window)
    if min(sizes) < 1:
        with pytest.raises(RuntimeError):
            conv(x)
        return
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), *window, 24 // group)
    more = torch.randn(exact.shape).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for residual in (None, more, more[:, :, :1, :1]):
        expected = (exact if residual is None else exact + residual.double()).clamp(-1, 2)
        assert_same(conv(x, residual).double(), expected, tolerance)


AVX2 = ("scalar", "sse4", "avx2")


@pytest.mark.parametrize(
    ("dtype", "available", "group", "padding", "expected"),
    [
        *((torch.float32, (*AVX2, "avx512"), *case) for case in ((1, 6, True), (1, 7, False), (4, 0, True))),
        *((torch.float32, AVX2, *case) for case in ((1, 5, False), (4, 0, False))),
        (torch.bfloat16, AVX2, 1, 1, False),
        (torch.float64, (*AVX2, "avx512"), 1, 1, False),
        (torch.float32, ("scalar", "neon"), 1, 36, True),
        (torch.float32, (), 1, 36, True),
    ],
)
def test_what_onednn_has_no_fast_code_for_is_a_kernels(
    dtype: torch.dtype,
    available: tuple[str, ...],
    group: int,
    padding: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A depthwise window as of a separable ASPP took twenty times its time."""
    monkeypatch.setattr(isa, "allowed", lambda: available)
    assert has_fast_code(dtype, group, padding) is expected


@torch.no_grad()
def test_a_dilated_depthwise_layer_of_a_dense_head_is_a_kernels() -> None:
    window = ((1, 1), (12, 12), (12, 12))
    conv, x = PackedConv(torch.randn(16, 1, 3, 3), None, 16, None, window), torch.randn(1, 16, 32, 48)
    if not Native().applies(Convolution(x[0].flatten(1).T, conv.weights, None)):
        pytest.skip("needs compiled kernels")
    with torch.profiler.profile() as profile:
        conv(x)
    called = "convolve_map (native)" in {event.key for event in profile.key_averages()}
    assert called is not has_fast_code(torch.float32, 1, 12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [(5, 6), (1, 1)])
@pytest.mark.parametrize(
    ("groups", "channels", "outputs"), [(1, 8, 8), (1, 1, 8), (1, 8, 1), (2, 8, 8), (8, 8, 8)]
)
@torch.no_grad()
def test_a_residual_and_relu_in_bfloat16(
    groups: int, channels: int, outputs: int, size: tuple[int, int], packed: bool
) -> None:
    """torch refused it in groups and for maps of a single pixel: "Unsupported datatype for add_relu"."""
    weight = torch.randn(outputs, channels // groups, 3, 3)
    weights = FusedConv(weight.bfloat16(), None, groups, Activation("relu"), {}, packed)
    image, more = torch.randn(2, channels, *size).bfloat16(), torch.randn(2, outputs, *size).bfloat16()
    found = convolve(weights, image, (1, 1), (1, 1), (1, 1), more)
    expected = nn.functional.conv2d(image.float(), weights.weight.float(), None, 1, 1, 1, groups) + more
    assert found.dtype == torch.bfloat16
    assert_same(found.float(), expected.relu(), 2e-2)


# -- compiled kernels against torch --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_050", "densenet121"])
@torch.no_grad()
def test_norms_that_hold_their_activation_are_folded(name: str) -> None:
    """Before the region and in it, with what they apply."""
    net = unverified(randomise(timm.create_model(name)), "random:fraction=0.4,seed=3,block=3")
    fast, x = net.double().optimize(), images(2, 65, 97, torch.float64)
    targets = {str(node.target) for node in fast.program.graph.nodes if node.op == "call_module"}
    acts = {
        path
        for path, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d) and "act" in module._modules
    }
    left = {target for target in targets if target.removesuffix(".norm").removesuffix(".act") in acts}
    assert acts and (not left or name == "densenet121")  # whose norms come before its convolutions
    for mask in (None, "all", "none"):
        assert relative_error(fast(x, mask=mask), net(x, mask=mask)) < 1e-10


@pytest.mark.slow
def test_a_hooked_norm_is_not_taken_apart() -> None:
    model, seen = timm.create_model("mobilenetv2_050").eval(), list[int]()
    net = unverified(model, "all")
    net.get_submodule("bn1").register_forward_hook(lambda *_: seen.append(1))
    fast = net.optimize()
    seen.clear()
    fast(images(1, 64, 64))
    assert seen == [1]


@torch.no_grad()
@pytest.mark.parametrize("optimised", [False, True])
def test_levels_after_a_call_are_those_of_the_thread(optimised: bool) -> None:
    """Calls of several threads take turns, and each reads what its own kept, whatever the size of the others."""
    net = unverified(strided())
    called = net.optimize() if optimised else net
    masks = {"all": images(1, 64, 96), "none": images(2, 32, 48), "edges": images(1, 96, 64)}
    expected = {}
    for mask, x in masks.items():
        called(x, mask=mask)
        expected[mask] = called.levels
    pools = {mask: ThreadPoolExecutor(1) for mask in masks}
    for _ in range(2):
        for mask, pool in pools.items():
            pool.submit(called, masks[mask], mask=mask).result()
        for mask, pool in pools.items():
            assert torch.equal(pool.submit(lambda: called.levels).result(), expected[mask])
            assert pool.submit(lambda: called.active_fraction).result() == float(
                (expected[mask] == 0).float().mean()
            )
    for pool in pools.values():
        pool.shutdown()


def test_a_thread_without_a_call_reads_the_last_one() -> None:
    net = unverified(strided())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(net, images(1, 32, 48), mask="all").result()
    assert net.active_fraction == 1


# -- what relies on the memory layout of a map ---------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda y: y.view(y.size(0), -1),
    "in one": lambda y: y.view(-1),
    "pooled": lambda y: F.adaptive_avg_pool2d(y, (2, 2)).view(y.shape[0], 32),
    "positions": lambda y: y.view(y.shape[0], 8, -1),
    "not at all": lambda y: y,
    "summed": lambda y: y.cumsum(3),
    "resized": lambda y: F.interpolate(y.cumsum(3), scale_factor=8.0, mode="bilinear"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 21, 64, 65), (2, 64, 33, 40), (3, 16, 1, 5000), (0, 32, 8, 8), (2, 7, 5, 3)]
)
def test_maps_are_put_in_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.randint(0, 200, shape).to(dtype)
    for given in (image, image.contiguous(memory_format=torch.channels_last), image.mT.contiguous().mT):
        found = in_order(given)
        assert found.is_contiguous() and torch.equal(found, image)


@pytest.mark.parametrize("is_module", [False, True])
@torch.no_grad()
def test_a_resize_that_is_returned_gives_contiguous_memory(is_module: bool) -> None:
    """So that no larger map is copied for its layout."""
    torch.manual_seed(0)
    model = viewed("summed" if is_module else "resized")
    model = nn.Sequential(model, nn.Upsample(scale_factor=8.0, mode="bilinear")) if is_module else model
    fast = cs.adaptify(model.eval(), "none", example_input=images(1, 48, 64)).optimize()
    (output,) = fast.program.graph.find_nodes(op="output")
    assert output.all_input_nodes[0].target is functional.interpolate
    x = images(2, 37, 51)
    found, expected = fast(x), model(x)
    assert found.is_contiguous() and (found - expected).abs().max() < 1e-4 * expected.abs().max()


def viewed(how: str) -> nn.Module:
    """A head that flattens a map by `view`, which takes its memory as the network has it."""
    return Composed(lambda net, x: VIEWS[how](net.body(x)), body=nn.Sequential(*strided(3, 8)[:-1])).eval()


@pytest.mark.parametrize(
    ("how", "options", "optimised"),
    covering([*VIEWS], [{"output_stride": (2, 8), "outputs": "native"}, {"coarsest": 16}], [False, True]),
)
@torch.no_grad()
def test_a_map_can_be_viewed_as_that_of_the_network(
    how: str, options: dict[str, Any], optimised: bool
) -> None:
    """Within the network and behind it; of channels_last pictures the layout is theirs."""
    torch.manual_seed(0)
    model, x = viewed(how), images(2, 48, 64)
    net = cs.adaptify(model, "none", example_input=x, **options)
    net = net.optimize() if optimised else net
    for mask in ("all", "none"):
        output = net(x, mask=mask)
        assert output.view(-1).numel() == output.numel()
    assert_same(net(x, mask="all" if net.plan.floors else "none"), model(x))


# -- heads behind an encoder -----------------------------------------------------------------------


@pytest.mark.parametrize("head", [slow(head) if at % 3 else head for at, head in enumerate(HEADS)])
def test_no_norm_is_left_in_an_optimised_copy(head: str) -> None:
    """Norms are folded into convolutions, or are one factor and shift per channel with the activation behind them."""
    net = unverified(behind_an_encoder(head), example_input=torch.rand(1, 3, 64, 64))
    fast, image = net.optimize(), torch.rand(2, 3, 80, 72)
    assert relative_error(fast(image), net(image)) < 1e-5
    targets = [node.target for node in fast.program.graph.nodes]
    assert functional.batch_norm not in targets
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules_of(fast))


# -- precisions ------------------------------------------------------------------------------------


@made_once
def network(name: str) -> AdaptiveModel:
    torch.manual_seed(0)
    model = Undecided(strided()).eval() if name == "a host" else build(name, by=4)
    return unverified(model, MIXED, example_input=images(1, 64, 96))


@pytest.mark.parametrize("name", ["resnet18", "a host"])
@torch.no_grad()
def test_a_copy_in_bfloat16_is_the_optimised_one_cast(name: str) -> None:
    net, x = network(name), images(2, 65, 97)
    asked, cast = net.optimize(precision="bfloat16"), net.optimize().to(torch.bfloat16)
    found = asked(x.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found, cast(x.bfloat16()))
    assert net(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "is_optimised", "options"),
    covering(
        ["resnet18", "a host"],
        [False, True],
        [
            {"precision": "int8"},
            {"precision": "int8", "calibration": [images(1, 65, 97)]},
            {"precision": "float", "calibration": "photos"},
            {"calibration": []},
        ],
    ),
)
def test_8_bits_are_refused_with_what_writes_a_file(
    name: str, is_optimised: bool, options: dict[str, Any]
) -> None:
    net = network(name)
    with pytest.raises(cs.InvalidInput) as refusal:
        (net.optimize() if is_optimised else net).optimize(**options)
    assert 'cs.export(net, image, "net.onnx", precision="int8", calibration=images' in refusal.value.next
    assert "--precision int8 --calibration FOLDER" in refusal.value.next


def test_other_precisions_are_refused_with_those_that_there_are() -> None:
    net = network("resnet18")
    with pytest.raises(cs.UnknownName, match="bfloat16, float"):
        net.optimize(precision="int7")
    with pytest.raises(cs.InvalidInput, match="made from"):
        net.optimize().optimize(precision="bfloat16")


# -- factors, shifts and activations that are written out: fused, values stay the same -------------


Step = Callable[[Tensor], Tensor]


def between(step: Step) -> nn.Module:
    """A strided, a depthwise and a 1x1 convolution, with the same operation after each."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = step(net.norm(net.deep(step(net.first(x)))) * net.by_channel)
        return net.point(x).relu()

    first, deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
    norm, scale = nn.BatchNorm2d(8), nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5, requires_grad=False)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    point = nn.Conv2d(8, 6, 1)
    return Composed(forward, first=first, deep=deep, norm=norm, by_channel=scale, point=point).double().eval()


def hard_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


FUSED: dict[str, Step] = {
    "factor and shift": lambda x: (2 * x - 0.5) / 4 + 1,
    "reversed difference": lambda x: 1.5 - x,
    "factors around an activation": lambda x: 0.7 * F.relu(0.3 * x + 0.1) - 0.2,
    "hard swish": hard_swish,
    "hard swish, share first": lambda x: x * (F.relu6(3 + x) * (1 / 6)),
    "hard swish, other order": lambda x: (x + 3).clamp(0, 6) / 6 * x,
    "hard swish, in place clamp": lambda x: x.mul(F.hardtanh(x + 3, 0, 6, inplace=True)).div(6),
    "hard swish of a factor": lambda x: 0.5 * hard_swish(2 * x + 1) - 0.1,
    "hard swish by hard sigmoid": lambda x: x * F.hardsigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
}
OTHERS: dict[str, Step] = {
    "another share": lambda x: x * F.relu6(x + 3) / 5,
    "another shift": lambda x: x * F.relu6(x + 2) / 6,
    "other bounds": lambda x: x * (x + 3).clamp(0, 5) / 6,
    "another value": lambda x: x * F.relu6(x.relu() + 3) / 6,
    "sum in place": lambda x: x * F.relu6(x.add_(3)) / 6,
    "read twice": lambda x: (0.5 * x) * F.relu(x + 1),
    "infinite": lambda x: (x * 1e30 * 1e30).clamp(-1, 1),
}


def optimised(step: Step) -> tuple[cs.AdaptiveModel, cs.AdaptiveModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model, image = between(step), torch.rand(2, 3, 36, 50, dtype=torch.float64)
    levels = torch.randint(0, 3, (2, 9, 13)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :36, :50]
    net = unverified(model, "none", coarsest=4, example_input=image)
    return net, net.optimize(), image, levels


@pytest.mark.parametrize("name", some([*FUSED, *OTHERS]))
def test_values_stay_the_same(name: str) -> None:
    net, fast, image, levels = optimised((FUSED | OTHERS)[name])
    with torch.no_grad():
        for mask in (levels, "all", "none"):
            expected = net(image, mask=mask)
            assert torch.allclose(
                fast(image, mask=mask), expected, rtol=0, atol=1e-12 * float(expected.abs().max())
            )


@pytest.mark.parametrize("name", FUSED)
def test_nothing_but_convolutions_and_one_pass_between_them_is_left(name: str) -> None:
    _, fast, _, _ = optimised(FUSED[name])
    for graph in (fast.graph, fast.program.unchanged):
        assert graph is not None
        left = [
            node for node in graph.nodes if getattr(node.target, "__module__", "") in ("_operator", "torch")
        ]
        assert [node for node in left if node.target is not operator.getitem] == []
        kernels = [node for node in graph.nodes if str(node.target).startswith(KERNELS)]
        assert (
            len(kernels) <= 4
        )  # three convolutions; before the depthwise one, padding is zero: a shift stays


def space_to_depth(net: Any, x: Tensor) -> Tensor:
    """By numbers that are computed from the image's size, as TResNet's stem."""
    batch, channels, height, width = x.shape
    parts = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    channels = channels * 5 - 1
    return net.body(parts.reshape(batch, channels - 2, height // 2, width // 2))


def tokens(net: Any, x: Tensor) -> Tensor:
    """Attention over positions, behind a gate of one factor and one shift for all channels, as StarReLU."""
    rows = net.body(x).flatten(2).transpose(1, 2)
    rows = (rows @ rows.transpose(1, 2)).softmax(-1) @ rows
    rows = net.scale * rows.relu() ** 2 + net.shift
    batch, count, channels = rows.shape
    return rows.reshape(batch, count, 2, channels // 2)


@pytest.mark.parametrize(("then", "inputs"), [(space_to_depth, 12), (tokens, 3)])
def test_numbers_and_tokens_stay_what_they_are(then: Any, inputs: int) -> None:
    torch.manual_seed(0)
    scale, shift = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-0.25]))
    body = nn.Sequential(nn.Conv2d(inputs, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1))
    model = Composed(then, body=body, scale=scale, shift=shift).double().eval()
    net = unverified(model, "edges", example_input=torch.rand(1, 3, 64, 96).double())
    fast, image = net.optimize(), torch.rand(2, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
        assert torch.allclose(fast(image), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


NAMES = sorted({*vars(fx.GraphModule({}, fx.Graph())), *dir(fx.GraphModule)} - {*dir(nn.Module())})
OF_KINDS: dict[str, Callable[[Any, str], object]] = {
    "a plain tensor": lambda net, name: setattr(net, name, torch.rand(1, 8, 1, 1)),
    "a buffer": lambda net, name: net.register_buffer(name, torch.rand(1, 8, 1, 1)),
    "a parameter": lambda net, name: setattr(net, name, nn.Parameter(torch.rand(1, 8, 1, 1))),
    "a module": lambda net, name: setattr(net, name, nn.GroupNorm(2, 8)),
}


@pytest.mark.parametrize("kind", OF_KINDS)
def test_names_of_the_network_may_be_those_of_torchs_graphs(kind: str) -> None:
    """Such as `code`, `graph` and `meta`."""
    names = [name for name in NAMES if not name.startswith("__")]

    def by_names(own: Any, image: Tensor, y: Tensor) -> Tensor:
        for part in [getattr(own, name) for name in names]:
            y = part(y) if kind == "a module" else y + part.clamp(max=image.shape[3] / 100)
        return own.head(y)

    model, x = Encoded(by_names), images(2, 64, 96)
    for name in names:
        OF_KINDS[kind](model, name)
    net = unverified(model.eval(), MIXED, outputs="native")
    with torch.no_grad():
        assert_same(net(x, mask="none"), model(x))
        for fast in (net.optimize(), copy.deepcopy(net).optimize()):
            assert_same(fast(x), net(x))
