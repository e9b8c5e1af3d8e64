"""Shifts of means over the image: nothing at level 0, calibrated without labels, stored beside the weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_same, covering, images, random_levels, rewritten, without_kernels
from networks import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling
from torchvision.ops import SqueezeExcitation

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Geometry
from cadsurgery.elements.mean_shift import MeanShift


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


class Linear(nn.Module):
    """A block that weighs its channels by a linear layer on a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.weigh, self.after = nn.Linear(16, 16), nn.Conv2d(16, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(self.stem(image)).relu()
        return self.after(x * self.weigh(x.mean((2, 3))).sigmoid()[:, :, None, None])


class Branch(nn.Module):
    """The branch of a segmentation head that pools over the image, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.pooling, self.after = ASPPPooling(16, 16), nn.Conv2d(16, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(self.stem(image)).relu()
        return self.after(x + self.pooling(x))


class Plain(nn.Module):
    """No mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.down(self.stem(image).relu())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pooled": (Pooled, 2),
    "linear": (Linear, 1),
    "branch": (Branch, 1),
}
TYPES = (torch.float32, torch.float64)


def convert(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> cs.AdaptiveModel:
    model = randomise(make()).to(dtype)
    return cs.adaptify(model, "edges", example_input=images(1, 64, 96, dtype), verify_laws=False)


def shifted(net: cs.AdaptiveModel) -> cs.AdaptiveModel:
    with torch.no_grad():
        for value in net.add_mean_shifts().parameters():
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
    make, count = NETWORKS[name]
    net, image = convert(make, dtype), images(2, 71, 93, dtype)
    masks = ("all", "none", levels_of(net, image))
    before, state = [net(image, mask=mask) for mask in masks], copy.deepcopy(net.state_dict())
    assert len(net.add_mean_shifts()) == count
    assert all(torch.equal(net(image, mask=mask), one) for mask, one in zip(masks, before, strict=True))
    shifted(net)
    assert torch.equal(net(image, mask="all"), before[0])
    assert not any(
        torch.equal(net(image, mask=mask), one) for mask, one in zip(masks[1:], before[1:], strict=True)
    )
    after = net.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    changed = net(image, mask="none")
    net.load_state_dict(state, strict=True)  # a checkpoint of the original
    assert torch.equal(net(image, mask="none"), changed)


def test_what_is_made_of_an_image_has_the_shifts_of_the_shares_of_its_levels() -> None:
    levels = random_levels(3, (13, 18), (2, 2))
    levels[0] = 0
    lattice = Geometry((2, 2)).lattice(levels).at(2)
    by, vector = MeanShift(2, 5, torch.zeros((), dtype=torch.float64)), torch.randn(3, 5, 1, 1).double()
    nn.init.normal_(by.shift)
    found = functional.shift_vector(Elements(torch.randn(lattice.count, 7), lattice), vector, by)
    expected = vector.clone()
    for level in (1, 2):
        share = (lattice.levels == level).double().mean((1, 2))[:, None, None, None]
        expected = expected + share * by.shift[level - 1].view(1, 5, 1, 1)
    assert_same(found, expected)
    assert torch.equal(found[0], vector[0]) and not torch.equal(found[1], vector[1])
    found.sum().backward()
    assert by.shift.grad is not None and torch.isfinite(by.shift.grad).all() and by.shift.grad.abs().min() > 0


@pytest.mark.parametrize(("name", "dtype", "compiled"), covering(list(NETWORKS), TYPES, (True, False)))
@torch.no_grad()
def test_every_copy_gives_the_same_at_every_level(
    name: str, dtype: torch.dtype, compiled: bool, tmp_path: Path
) -> None:
    make, _ = NETWORKS[name]
    with nullcontext() if compiled else without_kernels():
        net, image = shifted(convert(make, dtype)), images(3, 71, 93, dtype)
        fast = net.optimize()
        cs.save(net, tmp_path / "net.safetensors")
        exact = (
            cs.load(tmp_path / "net.safetensors", make()),
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(net)),
        )
        for mask in ("all", "none", levels_of(net, image)):
            expected = net(image, mask=mask)
            assert all(torch.equal(other(image, mask=mask), expected) for other in exact)
            assert_same(fast(image, mask=mask), expected, TOLERANCE[dtype])
        assert fast.macs(image) == net.macs(image)


@torch.no_grad()
def test_calibrated_means_are_on_average_those_of_full_resolution() -> None:
    net = convert(Pooled)
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
    assert cs.finetune.calibrate_means(net, pictures) == 2  # type: ignore[arg-type]
    assert torch.equal(net(batch, mask="all"), high) and bias() < 0.2 * before


def test_a_network_without_means_is_left_as_it_is_or_refused() -> None:
    net = convert(Plain)
    assert cs.finetune.calibrate_means(net, [torch.rand(3, 64, 96) for _ in range(2)]) == 0
    assert net.adapters is None
    with pytest.raises(cs.InvalidInput, match="no layer that reads a mean"):
        net.add_mean_shifts()
    with pytest.raises(cs.InvalidInput, match="no layer that reads a mean"):
        convert(Pooled).optimize().add_mean_shifts()


# -- files ---------------------------------------------------------------------------------------------


def test_a_file_that_lacks_a_shift_is_refused(tmp_path: Path) -> None:
    net = shifted(convert(Pooled))
    assert net.adapters is not None
    del net.adapters["mean__pooling"]
    cs.save(net, tmp_path / "part.safetensors")
    with pytest.raises(cs.FileError, match=r"the adapters in .* do not fit"):
        cs.load(tmp_path / "part.safetensors", Pooled())


@pytest.mark.parametrize("beside", [{}, {"mean__pooling.shift": torch.zeros(1, 6)}])
def test_a_file_with_level_adapters_is_refused_in_words(tmp_path: Path, beside: dict[str, Tensor]) -> None:
    path = tmp_path / "net.safetensors"
    cs.save(convert(Pooled), path)
    of_levels = {"down.scale": torch.zeros(1, 16), "down.shift": torch.zeros(1, 16), **beside}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    more = {f"cadsurgery.adapters.{name}": value for name, value in of_levels.items()}
    save_file(load_file(path) | more, path, metadata)
    rewritten(path, lambda metadata: None)
    with pytest.raises(cs.FileError, match="has level adapters, which there are no longer") as refusal:
        cs.load(path, Pooled())
    assert "2 tensors, first down.scale" in refusal.value.where
    assert "calibrate_means" in refusal.value.why
    assert "the version that wrote it (cadsurgery " in refusal.value.next
    assert "convert the network again" in refusal.value.next


@pytest.mark.slow
@torch.no_grad()
def test_shifts_are_in_what_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = shifted(convert(Pooled))
    report = cs.export(net, images(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    assert report.difference < 1e-4
