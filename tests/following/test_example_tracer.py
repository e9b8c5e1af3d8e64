"""Networks whose Python asks for sizes: one graph for all of them, or a guard that says where another way begins."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels
from networks import conv_norm, randomise, unverified
from torch import Tensor, nn

import cadsurgery as cs

EXACT = 1e-4


class Decoder(nn.Module):
    """A U-Net over max-pooling, which rounds sizes down."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_norm(*io) for io in ((3, 6), (6, 8), (8, 8))])
        self.up, self.head = nn.ModuleList([conv_norm(16, 6), conv_norm(12, 6)]), nn.Conv2d(6, 3, 1)

    def enlarge(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.interpolate(x, size=(int(skip.size(2)), int(float(skip.size(3)))))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"an image batch, not {x.shape}"
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            if len(skips) < len(self.down):
                x = F.max_pool2d(x, 2)
        for layer, skip in zip(self.up, skips[-2::-1], strict=True):
            x = layer(torch.cat([skip, self.enlarge(x, skip)], 1))
        return self.head(x)


def test_a_call_that_goes_another_way_gets_a_graph_of_its_own() -> None:
    """With the network's modules, made once for each kind of call, by copies too."""
    model = randomise(Large()).eval()
    net = unverified(model, "none", outputs="native")
    small, large = images(1, 100, 80), images(2, 260, 80)
    for same in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for x in (small, large, small, large):
            assert_same(same(x), model(x), EXACT)
        assert len(same._paths) == 1
        levels = random_levels(2, tuple(same.levels.shape[1:]), same.plan.stage_strides)
        assert_same(same(large, mask=levels)[:1], same(large[:1], mask=levels[:1]), EXACT)
    with torch.no_grad():
        net.rest[0].weight.mul_(2)
    changed = copy.deepcopy(model)
    changed.load_state_dict(net.state_dict())
    assert_same(net(large), changed(large), EXACT)
    assert_same(net.optimize()(large), changed(large), EXACT)


class Large(nn.Module):
    """Goes another way for large images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest = conv_norm(3, 6, 2), conv_norm(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[2] > 112:
            x = torch.tanh(x)
        return self.rest(x)


def test_another_way_names_the_line_and_the_sizes() -> None:
    """Where it cannot be followed: its strides are others."""
    net = unverified(Deeper().eval(), "none", outputs="native")
    with pytest.raises(cs.InvalidInput) as refusal:
        net(images(1, 260, 80))
    message = str(refusal.value)
    assert "test_example_tracer.py" in message and "if x.shape[2] > 112" in message
    assert "49 and 112 (False)" in message and "130 and 112 (True)" in message


class Deeper(Large):
    """Has an operation that no rule knows in its other way, in front of all strides."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[2] > 112:
            return torch.fft.rfft2(x).real
        return self.rest(x)


def test_what_moves_a_map_ends_the_region_or_is_refused() -> None:
    class Moved(Decoder):
        def enlarge(self, x: Tensor, skip: Tensor) -> Tensor:
            x = super().enlarge(x, skip)
            return F.pad(x[:, :, 1:, 1:], (x.size(3) - x.size(3) + 1, 0, 1, 0))

    model = randomise(Moved()).eval()
    net = unverified(model, "none")
    assert {"getitem", "pad"} & {
        decision.node.rpartition("_")[0] or decision.node for decision in net.plan.region_end
    }
    x = images(2, 50, 61)
    assert_same(net(x), model(x), EXACT)


def test_padding_that_moves_in_another_image_is_refused() -> None:
    class Uneven(Decoder):
        """Pads by nothing where the example is small."""

        def enlarge(self, x: Tensor, skip: Tensor) -> Tensor:
            x = super().enlarge(x, skip)
            more = skip.size(3) // 150
            return F.pad(x, (more, more))[:, :, :, : skip.size(3)]

    net = unverified(randomise(Uneven()).eval(), "none")
    with pytest.raises(cs.InvalidInput, match="moves the map against its lattice"):
        net(images(1, 40, 330))


class Inpainting(nn.Module):
    """Has an argument of its own that is named as that of every converted network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest = conv_norm(4, 6, 2), conv_norm(6, 6, 2)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.rest(self.stem(torch.cat([image, mask], 1)))


def test_a_networks_own_mask_is_the_networks() -> None:
    model, x = randomise(Inpainting()).eval(), images(2, 40, 56)
    hole = (x[:, :1] > 0).to(x.dtype)
    net = unverified(model, "none", outputs="native", example_input={"image": x, "mask": hole})
    assert_same(net(x, hole), model(x, hole), EXACT)
    assert_same(net(image=x, mask=hole), model(x, hole), EXACT)
    for one in (net, net.optimize()):
        with one.masked("all"):
            one(x, mask=hole)
        assert one.active_fraction == 1
        one.mask = "all"
        report = one.macs(x, mask=hole)
        assert report.mask == report.high > report.low


def test_a_conversion_leaves_torch_as_it_was() -> None:
    """A list of scalar tensors becomes a tensor afterwards, too: torch asks whether they are sequences, which Python
    affirms of a class once its `__getitem__` was replaced."""
    before = {name: getattr(Tensor, name) for name in dir(Tensor)}
    unverified(randomise(Decoder()).eval(), example_input=images(1, 40, 56))
    assert {name: getattr(Tensor, name) for name in dir(Tensor)} == before
    assert torch.tensor([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1, 2]
