"""Level adapters: nothing at level 0, a scale and a shift below, folded where a network is optimised."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_same, covering, images, random_levels, without_kernels
from networks import build, randomise
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import SqueezeExcitation

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.elements import functional
from cadsurgery.elements.adapters import LevelAdapter
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Geometry


class Residual(nn.Module):
    """Strided, depthwise, pointwise and residual convolutions with norms and several activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.point = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.again = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.Hardswish(), nn.Conv2d(24, 5, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(self.stem(image))
        return self.again(F.relu(x + self.norm(self.point(self.depthwise(x)))))


class Linear(nn.Module):
    """A block whose products are linear layers on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 2, 2)
        self.block = CNBlock(16, 0.5, 0.0)

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.down(self.stem(image)))


class Pooled(nn.Module):
    """A block that weighs its channels by a mean over the image, and a head that adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.excite, self.after, self.pooling = (
            SqueezeExcitation(16, 4),
            nn.Conv2d(16, 6, 1),
            nn.Conv2d(16, 6, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.excite(F.relu(self.down(self.stem(image))))
        return self.after(x) + self.pooling(x.mean((2, 3), keepdim=True))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "residual": (Residual, {"output_stride": (2, 8)}),
    "linear": (Linear, {}),
    "pooled": (Pooled, {}),
    "resnet": (lambda: build("resnet18", by=8), {"output_stride": (8, 32)}),
}
TYPES = (torch.float32, torch.float64)


def convert(make: Callable[[], nn.Module], options: dict[str, Any], dtype: torch.dtype) -> cs.AdaptiveModel:
    model = randomise(make()).to(dtype)
    example = images(1, 64, 96, dtype)
    return cs.adaptify(model, "edges", example_input=example, verify_laws=False, **options)


def learn(net: cs.AdaptiveModel) -> cs.AdaptiveModel:
    """With adapters that learned something."""
    with torch.no_grad():
        for value in net.add_adapters().parameters():
            value.normal_(0.0, 0.3)
    return net


def levels_of(net: cs.AdaptiveModel, image: Tensor) -> Tensor:
    net(image, mask="none")
    strides = net.plan.strides[1:]
    steps = tuple(low // high for high, low in zip(net.plan.strides, strides, strict=False))
    return random_levels(len(image), tuple(net.levels.shape[1:]), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), covering(list(NETWORKS), TYPES))
@torch.no_grad()
def test_level_0_is_the_original_bit_for_bit_and_the_rest_is_not(name: str, dtype: torch.dtype) -> None:
    net, image = convert(*NETWORKS[name], dtype), images(2, 71, 93, dtype)
    masks = ("all", "none", levels_of(net, image))
    before, state = [net(image, mask=mask) for mask in masks], copy.deepcopy(net.state_dict())
    net.add_adapters()
    assert all(torch.equal(net(image, mask=mask), one) for mask, one in zip(masks, before, strict=True))
    learn(net)
    assert torch.equal(net(image, mask="all"), before[0])
    assert not any(
        torch.equal(net(image, mask=mask), one) for mask, one in zip(masks[1:], before[1:], strict=True)
    )
    after = net.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    changed = net(image, mask="none")
    net.load_state_dict(state, strict=True)  # a checkpoint of the original
    assert torch.equal(net(image, mask="none"), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_element_has_the_factors_of_its_level(dtype: torch.dtype) -> None:
    lattice = Geometry((2, 2)).lattice(random_levels(2, (13, 18), (2, 2))).at(2)
    adapter = LevelAdapter(2, 5, torch.zeros((), dtype=dtype))
    for value in adapter.parameters():
        nn.init.normal_(value)
    rows = torch.randn(lattice.count, 5, dtype=dtype, requires_grad=True)
    found = functional.adapt(Elements(rows, lattice), adapter).rows
    for row, level, result in zip(rows, lattice.level_of_rows.tolist(), found, strict=True):
        if level:
            row = row * (1 + adapter.scale[level - 1]) + adapter.shift[level - 1]
        assert_same(result, row)
    fine = Elements(torch.randn(13 * 18 * 2, 5, dtype=dtype), lattice.at(0))
    assert functional.adapt(fine, adapter) is fine
    found.sum().backward()
    assert adapter.shift.grad is not None
    assert adapter.shift.grad[0, 0] == (lattice.level_of_rows == 1).sum()
    assert torch.equal(
        rows.grad[lattice.level_of_rows == 0], torch.ones_like(rows)[lattice.level_of_rows == 0]
    )  # type: ignore[index]


def test_what_is_made_of_an_image_has_the_factors_of_the_shares_of_its_levels() -> None:
    levels = random_levels(3, (13, 18), (2, 2))
    levels[0] = 0
    lattice = Geometry((2, 2)).lattice(levels).at(2)
    adapter, vector = (
        LevelAdapter(2, 5, torch.zeros((), dtype=torch.float64)),
        torch.randn(3, 5, 1, 1).double(),
    )
    for value in adapter.parameters():
        nn.init.normal_(value)
    x = Elements(torch.randn(lattice.count, 7), lattice)
    found = functional.adapt_vector(x, vector, adapter)
    expected = vector.clone()
    for level in (1, 2):
        share = (lattice.levels == level).double().mean((1, 2))[:, None, None, None]
        factors = (value[level - 1].view(1, 5, 1, 1) for value in (adapter.scale, adapter.shift))
        scale, shift = factors
        expected = expected + share * (vector * scale + shift)
    assert_same(found, expected)
    assert torch.equal(found[0], vector[0]) and not torch.equal(found[1], vector[1])


@pytest.mark.parametrize(("name", "dtype", "compiled"), covering(list(NETWORKS), TYPES, (True, False)))
@torch.no_grad()
def test_an_optimised_copy_gives_the_same_at_every_level(
    name: str, dtype: torch.dtype, compiled: bool
) -> None:
    with nullcontext() if compiled else without_kernels():
        net, image = learn(convert(*NETWORKS[name], dtype)), images(3, 71, 93, dtype)
        fast = net.optimize()
        assert not any(node.target is functional.adapt for node in fast.graph.nodes)
        for mask in ("all", "none", levels_of(net, image), levels_of(net, image)):
            assert_same(fast(image, mask=mask), net(image, mask=mask), TOLERANCE[dtype])
        folded = net.optimize(fuse=False)
        assert_same(folded(image, mask="none"), net(image, mask="none"), TOLERANCE[dtype])
        assert fast.macs(image) == net.macs(image)


@torch.no_grad()
def test_what_an_optimised_copy_of_the_dense_network_gives_stays_bit_for_bit() -> None:
    net, image = convert(Residual, {}, torch.float32), images(2, 71, 93)
    before = net.optimize()(image, mask="all")
    assert torch.equal(learn(net).optimize()(image, mask="all"), before)


@torch.no_grad()
def test_adapters_are_saved_beside_the_weights(tmp_path: Path) -> None:
    net, image = learn(convert(Residual, {"output_stride": (2, 8)}, torch.float32)), images(2, 71, 93)
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", Residual())
    mask = levels_of(net, image)
    assert torch.equal(again(image, mask=mask), net(image, mask=mask))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(image, mask=mask), net(image, mask=mask))
    assert net.adapters is not None
    del net.adapters["point"]
    cs.save(net, tmp_path / "part.safetensors")
    with pytest.raises(cs.FileError, match=r"the adapters in .* do not fit"):
        cs.load(tmp_path / "part.safetensors", Residual())


@torch.no_grad()
def test_the_body_of_an_adapted_network_is_adapted() -> None:
    net = learn(convert(Residual, {"output_stride": (2, 8)}, torch.float64))
    image = images(1, 71, 93, torch.float64)
    mask = levels_of(net, image)
    assert_same(cs.body_of(net)(*cs.stem_outputs(net, image), mask=mask), net(image, mask=mask))


@torch.no_grad()
def test_calibrated_means_are_on_average_those_of_full_resolution() -> None:
    net = convert(Pooled, {}, torch.float32)
    stripes = (torch.arange(96) // 4 % 2).expand(
        3, 64, 96
    )  # of which every second sample sees one kind alone
    labels = torch.zeros(64, 96, dtype=torch.long)
    pictures = [(0.8 * stripes + 0.2 * torch.rand(3, 64, 96), labels) for _ in range(5)]
    batch = torch.stack([normalise(image, net.source) for image, _ in pictures])

    def bias() -> float:
        """Of the output, whose other part is the same at anchors."""
        side = net.geometry.sides[-1]
        high, low = (net(batch, mask=mask)[..., ::side, ::side].mean((0, 2, 3)) for mask in ("all", "none"))
        return float((high - low).norm())

    before, high = bias(), net(batch, mask="all")
    assert cs.finetune.calibrate_adapters(net, pictures) == 2  # type: ignore[arg-type]
    assert torch.equal(net(batch, mask="all"), high) and bias() < 0.2 * before
    assert cs.finetune.calibrate_adapters(convert(Residual, {}, torch.float32), pictures) == 0  # type: ignore[arg-type]


def test_what_cannot_have_adapters_is_refused() -> None:
    net = convert(Residual, {}, torch.float32)
    with pytest.raises(cs.InvalidInput, match="no layer that could have a level adapter"):
        net.optimize().add_adapters()


@pytest.mark.slow
@torch.no_grad()
def test_adapters_are_in_what_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = learn(convert(Residual, {}, torch.float32))
    report = cs.export(net, images(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    assert report.difference < 1e-4
