"""Optimised copies in 8 bits: near the float copy under any mask, and what cannot be is said."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, relative_error, slow
from networks import Undecided, build, strided, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.backends import integer, integer_layers
from cadsurgery.elements.backends.integer_layers import IntegerConv
from cadsurgery.kernels import load
from cadsurgery.network import optimized, quantise
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadWarning

MIXED = "random:fraction=0.4,seed=3,block=3"
torch.manual_seed(0)  # whatever is collected before
CALIBRATION = [images(2, 65, 97), images(1, 64, 96)]


@pytest.fixture(scope="module")
def float_and_int8() -> tuple[AdaptiveModel, AdaptiveModel]:
    net = unverified(build("resnet18", by=4), MIXED)
    return net, net.optimize(precision="int8", calibration=CALIBRATION)


@pytest.mark.parametrize(
    "name", ["resnet18", slow("mobilenet_v2"), slow("densenet121"), slow("convnext_tiny"), "vgg11_bn"]
)
@torch.no_grad()
def test_it_gives_nearly_what_the_network_gives(name: str) -> None:
    net = unverified(build(name, by=1 if name == "convnext_tiny" else 4), MIXED)
    fast, x = net.optimize(precision="int8", calibration=CALIBRATION), images(2, 65, 97)
    assert fast.quantisation is not None
    in_8_bits = [layer for layer in fast.quantisation.layers if not layer.why]
    assert 2 * len(in_8_bits) > len(fast.quantisation.layers)
    for mask in (None, "all", "none"):
        assert relative_error(fast(x, mask=mask), net(x, mask=mask)) < 0.25
        assert torch.equal(fast.levels, net.levels)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(float_and_int8: Any) -> None:
    fast, x = float_and_int8[1], images(2, 65, 97)
    alone = [fast(one, mask="edges:threshold=0.1") for one in x.split(1)]
    assert_same(fast(x, mask="edges:threshold=0.1"), torch.cat(alone))


@torch.no_grad()
def test_without_compiled_code_for_8_bits_the_copy_gives_the_same_bits(
    float_and_int8: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, x = float_and_int8[1], images(1, 65, 97)
    expected = fast(x)
    for module in (integer, integer_layers):
        monkeypatch.setattr(module, "form_here", lambda: None)
    load.forget()  # backends are chosen anew
    assert torch.equal(fast(x), expected)


@torch.no_grad()
def test_it_copies_pickles_and_counts_as_the_network_does(float_and_int8: Any) -> None:
    (net, fast), x = float_and_int8, images(1, 65, 97)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))
    assert fast.macs(x).mask == net.macs(x).mask
    assert "8 bits" in str(fast.quantisation)


class FullyConvolutional(nn.Module):
    """Four convolutions, two of them strided, one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
        ]
        more = [nn.ReLU6(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Hardswish(), nn.Conv2d(24, 8, 1)]
        self.layers = nn.Sequential(*layers, *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Averaged(nn.Module):
    """Two means over the image: of a map that nothing else reads, and of one that is scaled by its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.excited, self.squeeze = nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 1)
        self.last, self.head = nn.Conv2d(24, 40, 1), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.excited(self.stem(x).relu()).relu()
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(nn.functional.adaptive_avg_pool2d(self.last(x).relu(), 1).flatten(1))


@torch.no_grad()
def test_a_map_whose_mean_is_all_that_is_read_is_in_8_bits() -> None:
    net = unverified(Averaged().eval(), MIXED)
    fast = net.optimize(precision="int8", calibration=CALIBRATION)
    grids = {tuple(k.weight.shape): k.weights.out for k in fast.modules() if isinstance(k, IntegerConv)}
    assert grids[40, 24, 1, 1] is not None and grids[24, 24, 3, 3] is None
    for x in (images(3, 65, 97), images(1, 130, 71)):
        for mask in (None, "all", "none"):
            assert relative_error(fast(x, mask=mask), net(x, mask=mask)) < 0.05


class Outlier(nn.Module):
    """A convolution that reads small values beside a large one that it does not weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.hurt = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        with torch.no_grad():
            self.stem.bias[0] = 1000.0
            self.hurt.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hurt(self.stem(x)).relu())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the outputs of the copy in 8 bits differ")
def test_a_layer_that_rounding_hurts_most_stays_in_float() -> None:
    net = unverified(Outlier().eval(), "all")
    fast, x = net.optimize(precision="int8", calibration=CALIBRATION), images(1, 64, 96)
    assert fast.quantisation is not None
    exact = [layer for layer in fast.quantisation.layers if layer.why]
    assert len(exact) == 1 and exact[0].error is not None and exact[0].error > 0.1
    assert relative_error(fast(x), net(x)) < 0.05


@pytest.mark.slow
@torch.no_grad()
def test_a_depthwise_convolution_that_nothing_in_bytes_reads_stays_in_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is a kernel of bytes to bytes alone; another would be slower than float by far."""
    net = unverified(build("mobilenet_v2", by=4), MIXED)
    kept, rewrite = list[Any](), quantise._Quantiser.rewrite

    def behind_depthwise(work: Any, exact: Any) -> set[Any]:
        depthwise = {node for node, layer in work.layers.items() if layer.kernel.groups > 1}
        return {node for node, layer in work.layers.items() if layer.source in depthwise} - set(exact)

    def keep(work: Any, *args: Any) -> Iterator[Any]:
        for rewritten in rewrite(work, *args):
            kept.append(rewritten)
            yield rewritten

    monkeypatch.setattr(quantise._Quantiser, "_sensitive", behind_depthwise)
    monkeypatch.setattr(quantise._Quantiser, "rewrite", keep)
    net.optimize(precision="int8", calibration=CALIBRATION)
    for rewritten in kept:
        kernels = (kernel.weights for kernel in rewritten.kernels.values())
        assert all(
            weights.out is not None for weights in kernels if weights.groups == len(weights.weight) > 1
        )
    whys = [{layer.why for layer in rewritten.layers} for rewritten in kept]
    assert all(any("it is depthwise" in why for why in found) for found in whys[1::2])
    assert not any("it is depthwise" in why for found in whys[::2] for why in found)


@torch.no_grad()
def test_points_are_read_as_everything_is_computed(float_and_int8: Any) -> None:
    net = unverified(FullyConvolutional().eval(), MIXED)
    fast, x = net.optimize(precision="int8", calibration=CALIBRATION), images(1, 65, 97)
    points = [torch.tensor([[3.0, 5.0], [90.0, 60.0], [31.5, 47.5]])]
    receptive, everything = (cs.read_at(fast, x, points, reach=reach)[0] for reach in ("receptive", "all"))
    assert torch.equal(receptive, everything)


def test_where_there_are_no_instructions_it_says_so_and_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    net = unverified(build("resnet18", by=4), MIXED)
    monkeypatch.setattr(optimized, "form_here", lambda: None)
    with pytest.warns(CadWarning, match="no compiled kernels"):
        fast = net.optimize(precision="int8", calibration=CALIBRATION)
    x = images(1, 65, 97)
    assert fast.quantisation is None
    assert relative_error(fast(x), net(x)) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int7"}, "int8"),
        ({"precision": "int8"}, "calibrate"),
        ({"calibration": CALIBRATION}, "calibrate"),
        ({"precision": "int8", "calibration": []}, "no images"),
        ({"precision": "int8", "calibration": CALIBRATION, "largest_error": -0.1}, "at most"),
        ({"largest_error": 0.1}, "at most"),
        ({"precision": "int8", "calibration": [torch.zeros(65, 97)]}, "no images"),
    ],
)
def test_what_is_asked_wrongly_is_refused(float_and_int8: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.CadError, match=words):
        float_and_int8[0].optimize(**options)


def test_what_cannot_be_done_says_what_can(float_and_int8: Any, tmp_path: Any) -> None:
    net, fast = float_and_int8
    with pytest.raises(cs.CadError, match="made from"):
        fast.optimize(precision="int8", calibration=CALIBRATION)
    with pytest.raises(cs.CadError, match="cannot be moved"):
        fast.to(torch.bfloat16)
    with pytest.raises(cs.CadError, match="cannot be saved"):
        cs.save(fast, tmp_path / "net.safetensors")
    with pytest.raises(cs.CadError, match="the network float32"):
        fast(images(1, 65, 97).double())
    with pytest.raises(cs.CannotConvert, match="8 bits"):
        copy.deepcopy(net).to(torch.float64).optimize(
            precision="int8", calibration=[batch.double() for batch in CALIBRATION]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 1, 3, 3), (5, 33, 1, 1), (3, 700, 7, 7)])
def test_weights_that_were_in_8_bits_stay_what_they_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of one scale for all outputs, too, most of which then do not reach 127."""
    numbers = torch.randint(-90, 91, shape) // torch.arange(1, shape[0] + 1).view(-1, 1, 1, 1)
    numbers[-1] = 0
    weight = 0.0123 * numbers.to(dtype)
    for limited in (None, "adjacent"):
        whole, scale = quantise.round_weight(weight, limited)
        assert whole.dtype == torch.int8 and scale.dtype == torch.float32
        assert_same(whole * scale.view(-1, 1, 1, 1), weight.float(), 1e-6)


@pytest.mark.parametrize("shape", [(64, 1, 3, 3), (16, 33, 3, 3)])
def test_no_weight_is_rounded_more_than_by_a_scale_of_its_largest(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    whole, scale = (one.double() for one in quantise.round_weight(weight))
    rows, largest = weight.double().flatten(1), weight.double().flatten(1).abs().amax(1, keepdim=True)
    plain = (rows * 127 / largest).round() * largest / 127
    error, of_plain = (
        (found - rows).square().sum(1) for found in (whole.flatten(1) * scale.unsqueeze(1), plain)
    )
    assert (error <= of_plain * (1 + 1e-5)).all() and (error < of_plain).float().mean() > 0.5


@pytest.mark.slow
@torch.no_grad()
def test_first_layers_stay_in_float_until_outputs_differ_by_as_little_as_wanted() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if place == 0 else 16, 16, 3, 1 + (place in (2, 4)), 1) for place in range(10)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    layers[0].weight[0] *= 50  # a channel that hardly counts, and alone makes the grid of its map coarse
    layers[1].weight[:, 0] *= 1e-3
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    net, x = unverified(model, MIXED), images(1, 65, 97)
    known: dict[str, Any] = {"precision": "int8", "calibration": CALIBRATION}
    with pytest.warns(CadWarning, match=r"comes in at 16 \(from "):
        fast = net.optimize(**known)
    nearer = net.optimize(**known, largest_error=0.02)
    assert fast.quantisation.error > 0.02 >= nearer.quantisation.error
    first = [layer for layer in nearer.quantisation.layers if layer.why]
    assert first == list(nearer.quantisation.layers[:4]) and all(
        "one of the first" in one.why for one in first
    )
    assert (nearer(x) - net(x)).norm() < (fast(x) - net(x)).norm()
    same = net.optimize(**known, largest_error=1.0)
    assert_same(same(x), fast(x))


def test_an_error_that_cannot_be_met_is_said(float_and_int8: Any) -> None:
    with pytest.warns(CadWarning, match="not by 1e-09"):
        float_and_int8[0].optimize(precision="int8", calibration=CALIBRATION, largest_error=1e-9)


def test_of_a_host_its_part_is_to_be_converted() -> None:
    model = Undecided(strided()).eval()
    with pytest.raises(cs.CadError, match="hosts"):
        unverified(model, "all").optimize(precision="int8", calibration=CALIBRATION)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the outputs of the copy in 8 bits differ")
def test_rows_that_are_read_alone_are_values() -> None:
    """An operation on rows that is no layer, before and behind ones in 8 bits."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x).square()).abs()

    net, x = unverified(Squared().eval(), MIXED), images(2, 65, 97)
    fast = net.optimize(precision="int8", calibration=CALIBRATION)
    assert relative_error(fast(x), net(x)) < 0.25


class Unpools(nn.Module):
    """As SegNet: where values in 8 bits are largest in another place, unpooling puts them there."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.pool, self.deep = nn.MaxPool2d(2, return_indices=True), nn.Conv2d(16, 16, 3, 1, 1)
        self.unpool, self.last = nn.MaxUnpool2d(2), nn.Conv2d(16, 16, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.one(x))))
        z, indices = self.pool(y)
        return self.last(self.unpool(F.relu(self.deep(z)), indices, y.size()))


def unpools(shift: float = 0.0) -> AdaptiveModel:
    torch.manual_seed(0)
    model = Unpools().eval()
    with torch.no_grad():
        model.last.bias.fill_(shift)
    return unverified(model, MIXED)


def test_a_copy_in_8_bits_that_cannot_be_good_says_by_how_much_and_where_it_comes_in() -> None:
    with pytest.warns(CadWarning, match="differ from those in float") as said:
        fast = unpools().optimize(precision="int8", calibration=CALIBRATION)
    (message,) = (str(one.message) for one in said)
    error = fast.quantisation.error
    assert error > 0.01 and f"by {100 * error:.2g} % of their size" in message
    assert "comes in at unpool (from " in message and "largest_error=0.01" in message
    assert said[0].filename == __file__


@pytest.mark.parametrize("options", [{"largest_error": 0.5}, {}], ids=["asked for", "near"])
def test_a_copy_in_8_bits_that_is_as_good_as_asked_for_says_nothing(
    options: dict[str, float], recwarn: pytest.WarningsRecorder
) -> None:
    net = unpools(0.0 if options else 10.0)
    fast = net.optimize(precision="int8", calibration=CALIBRATION, **options)
    assert (fast.quantisation.error > 0.01) == bool(options)
    assert not [one for one in recwarn if issubclass(one.category, CadWarning)]
