"""Laws of transposed convolutions: each element reads the taps of its own phase, at their fine positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import assert_same, covering, images, random_levels, some
from networks import conv_norm, unverified
from random_laws import compare
from random_networks import Case, Draw, settled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.network.macs import dense_macs, layer_work

pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve")

double = torch.float64


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("uniform", [True, False])
def test_gradients_are_finite_differences(kernel: int, uniform: bool) -> None:
    levels = torch.full((1, 7, 6), 1) if uniform else random_levels(1, (7, 6), (2,))
    lattice, pad = Geometry((2,)).lattice(levels).at(1), kernel - 2
    window = Window((kernel, kernel), padding=(pad, 0, pad, 0), spacing=2, finer=2)

    def run(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = functional.transpose_weight(weight, 2)
        return functional.conv2d(Elements(rows, lattice), weight, bias, window, 0, 2).rows

    shapes = (len(lattice), 4), (4, 3, kernel, kernel), (6,)
    operands = [torch.randn(shape, dtype=double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, operands, fast_mode=True)


# -- networks ------------------------------------------------------------------------------------------------


class Unjoined(nn.Module):
    """An encoder and back, at any size."""

    def __init__(self, *ups: nn.Module) -> None:
        super().__init__()
        self.down = nn.Sequential(*(nn.Sequential(conv_norm(a, 8, 2), conv_norm(8, 8)) for a in (3, 8, 8)))
        self.up = nn.Sequential(*ups, nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


UNJOINED: dict[str, Callable[[], list[nn.Module]]] = {
    "2/2": lambda: [
        *(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2))
    ],
    "3/2": lambda: [nn.ConvTranspose2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)],
    "4/4": lambda: [nn.ConvTranspose2d(8, 8, 4, 4)],
    "3/2, shorter": lambda: [nn.ConvTranspose2d(8, 8, 3, 2, 1)],
    "4/2, in groups": lambda: [nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2)],
    "4/2, padded more": lambda: [nn.ConvTranspose2d(8, 8, 4, 2, 2, 1)],
    "5/2": lambda: [nn.ConvTranspose2d(8, 8, 5, 2, 2, 1)],
    "8/4": lambda: [nn.ConvTranspose2d(8, 8, 8, 4, 2)],
    "stride one": lambda: [nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2), nn.ConvTranspose2d(8, 8, 5, 1, 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), covering(some(UNJOINED), [(53, 58), (48, 64)]))
def test_its_sizes_are_the_networks_at_any_size_of_the_image(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = settled(Unjoined(*UNJOINED[name]()).double(), images(2, 48, 64, double), Draw(0))
    net = compare(Case(model, images(2, *size, double), images(1, 40, 40, double), True), Draw(1), {})
    assert {d.action for d in net.plan.decisions if d.operation.startswith("ConvTranspose")} == {"keep"}


def test_what_follows_is_part_of_it_in_the_inference_copy() -> None:
    """Batch norm and, in the region, ReLU."""
    torch.manual_seed(0)
    x = images(2, 48, 64)
    model = settled(Unjoined(*UNJOINED["2/2"]()), x, Draw(0))
    net = unverified(model, "random", output_stride=(2, 8), example_input=x)
    fast, levels = net.optimize(), random_levels(2, (24, 32), (2, 2))
    called = [fast.get_submodule(str(node.target)) for node in fast.graph.nodes if node.op == "call_module"]
    assert not [module for module in called if isinstance(module, nn.BatchNorm2d | nn.ReLU)]
    with torch.no_grad():
        assert_same(fast(x, mask=levels), net(x, mask=levels))
        assert_same(net.optimize(fuse=False)(x, mask=levels), net(x, mask=levels))


@pytest.mark.parametrize("name", ["2/2", "3/2"])
def test_macs_of_a_network_are_those_that_run_and_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    model, x = Unjoined(*UNJOINED[name]()).eval(), images(2, 48, 64)
    net = unverified(model, "none", output_stride=(2, 8), example_input=x)
    levels = random_levels(2, (24, 32), (2, 2))
    report = net.macs(x, mask=levels)
    assert report.low == dense_macs(model, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, mask=levels)
    assert report.mask == counter.get_total_flops() // 2
    work = layer_work(net, x)
    assert (work is None) == (name == "3/2")  # whose phases have different numbers of taps
    if work is not None:
        assert sum(layer.on(net.lattice) for layer in work) == report.mask


REFUSED = {
    "makes the map grow": (3, 2),
    "its kernel is smaller than its stride": (1, 2),
    "differs between the axes": (2, (2, 1)),
    "stride and dilation": (3, 2, 1, 1, 1, True, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_phases_or_grows_ends_the_region_with_a_reason(reason: str) -> None:
    torch.manual_seed(0)
    model = Unjoined(nn.ConvTranspose2d(8, 8, *REFUSED[reason])).eval()
    net, x = unverified(model, "none", example_input=images(1, 48, 64)), images(2, 48, 64)
    assert reason in net.plan["up_0"].reason and net.plan["up_0"].action == "barrier"
    with torch.no_grad():
        assert_same(net(x), model(x))
