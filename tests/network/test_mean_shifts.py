"""Shifts of means over the image: nothing at level 0, calibrated without labels, stored beside the weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, assert_same, covering, images, random_levels, rewritten, without_kernels
from networks import Encoded, randomise
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


def pooled(net: Any, image: Tensor, x: Tensor) -> Tensor:
    """A block that weighs its channels by a mean over the image, and a head that adds one."""
    x = net.excite(x)
    return net.after(x) + net.pooling(x.mean((2, 3), keepdim=True))


def linear(net: Any, image: Tensor, x: Tensor) -> Tensor:
    return net.after(x * net.weigh(x.mean((2, 3))).sigmoid()[:, :, None, None])


def branch(net: Any, image: Tensor, x: Tensor) -> Tensor:
    """The branch of a segmentation head that pools over the image, with a norm."""
    return net.after(x + net.pooling(x))


def without_means(net: Any, image: Tensor, x: Tensor) -> Tensor:
    return net.head(x)


def point(outputs: int = 5) -> nn.Conv2d:
    return nn.Conv2d(16, outputs, 1)


def make_pooled() -> nn.Module:
    return Encoded(pooled, 16, excite=SqueezeExcitation(16, 4), after=point(6), pooling=point(6))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pooled": (make_pooled, 2),
    "linear": (lambda: Encoded(linear, 16, weigh=nn.Linear(16, 16), after=point()), 1),
    "branch": (lambda: Encoded(branch, 16, pooling=ASPPPooling(16, 16), after=point()), 1),
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
    net = convert(make_pooled)
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
    net = convert(lambda: Encoded(without_means))
    assert cs.finetune.calibrate_means(net, [torch.rand(3, 64, 96) for _ in range(2)]) == 0
    assert net.adapters is None
    with pytest.raises(cs.InvalidInput, match="no layer that reads a mean"):
        net.add_mean_shifts()
    with pytest.raises(cs.InvalidInput, match="no layer that reads a mean"):
        convert(make_pooled).optimize().add_mean_shifts()


# -- files ---------------------------------------------------------------------------------------------


def test_a_file_that_lacks_a_shift_is_refused(tmp_path: Path) -> None:
    net = shifted(convert(make_pooled))
    assert net.adapters is not None
    del net.adapters["mean__pooling"]
    cs.save(net, tmp_path / "part.safetensors")
    with pytest.raises(cs.FileError, match=r"the adapters in .* do not fit"):
        cs.load(tmp_path / "part.safetensors", make_pooled())


@pytest.mark.parametrize("beside", [{}, {"mean__pooling.shift": torch.zeros(1, 6)}])
def test_a_file_with_level_adapters_is_refused_in_words(tmp_path: Path, beside: dict[str, Tensor]) -> None:
    path = tmp_path / "net.safetensors"
    cs.save(convert(make_pooled), path)
    of_levels = {"down.scale": torch.zeros(1, 16), "down.shift": torch.zeros(1, 16), **beside}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    more = {f"cadsurgery.adapters.{name}": value for name, value in of_levels.items()}
    save_file(load_file(path) | more, path, metadata)
    rewritten(path, lambda metadata: None)
    with pytest.raises(cs.FileError, match="has level adapters, which there are no longer") as refusal:
        cs.load(path, make_pooled())
    assert "2 tensors, first down.scale" in refusal.value.where
    assert "calibrate_means" in refusal.value.why
    assert "the version that wrote it (cadsurgery " in refusal.value.next
    assert "convert the network again" in refusal.value.next


@pytest.mark.slow
@torch.no_grad()
def test_shifts_are_in_what_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = shifted(convert(make_pooled))
    report = cs.export(net, images(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    assert report.difference < 1e-4
