"""Tuning of copies in 8 bits: the simulation is the copy; what is kept is nearer to the float copy, or as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import assert_same, build, images, relative_error, slow
from torch import Tensor, fx, nn

import cadsurgery as cs
from cadsurgery.elements.elements import Elements
from cadsurgery.network import tune
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter
from cadsurgery.network.quantise import difference_of

MIXED = "random:fraction=0.4,seed=3,block=3"
CALIBRATION = [images(2, 65, 97), images(1, 64, 96), images(2, 65, 97).flip(3)]


class Mixing(nn.Module):
    """Convolutions, a pool of elements, a join, an addition of bytes, hardswish; one in groups and one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.down = nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.act, self.last = nn.Hardswish(), nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).relu())
        x = torch.cat([self.depthwise(x).relu(), x + self.grouped(x)], 1)
        return self.last(self.act(self.down(x)))


class Comparison(tune.Simulation):
    """Shows each simulated operation what the copy itself computed before, and compares what they make of it."""

    def __init__(self, program: Any, layers: Any, computed: dict[fx.Node, Any]) -> None:
        super().__init__(program, layers)
        self.computed, self.compared = computed, list[fx.Node]()

    def run_node(self, n: fx.Node) -> Any:
        found, expected = super().run_node(n), self.computed[n]
        rows, exact = (one.rows if isinstance(one, Elements) else one for one in (found, expected))
        if not isinstance(exact, Tensor):
            return found
        if exact.dtype == torch.uint8:  # a tie may be rounded otherwise
            apart = (rows - exact).abs()
            assert apart.max() <= 1 and apart.mean() < 1e-3
            self.compared.append(n)
            return Elements(exact.float(), expected.lattice) if isinstance(found, Elements) else exact.float()
        assert_same(rows, exact)
        return expected


def in_8_bits(model: nn.Module) -> AdaptiveModel:
    """A network's copy."""
    return cs.adaptify(model, MIXED, verify_laws=False).optimize(precision="int8", calibration=CALIBRATION)


@pytest.mark.parametrize(
    "name", ["mixing", "resnet18", "mobilenet_v2", slow("densenet121"), slow("vgg11_bn")]
)
@pytest.mark.parametrize("mask", [MIXED, "all"])
@torch.no_grad()
def test_the_simulation_computes_what_the_copy_computes(name: str, mask: str) -> None:
    fast = in_8_bits(Mixing().eval() if name == "mixing" else build(name, by=4))
    x, computed, program = images(2, 65, 97), dict[fx.Node, Any](), fast.program

    class Recorder(GraphInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            computed[n] = value
            if isinstance(value, Elements):  # rows may be overwritten
                computed[n] = Elements(value.rows.clone(), value.lattice)
            elif isinstance(value, Tensor):
                computed[n] = value.clone()
            return value

    fast(x, mask=mask)
    lattice = fast.lattice
    Recorder(program, program.graph).run(lambda *_: lattice, x)
    layers = tune.simulated_layers(fast)
    comparison = Comparison(program, layers, computed)
    comparison.run(lambda *_: lattice, x)
    assert len(comparison.compared) >= len(layers) - 1  # all but the last
    assert relative_error(tune.simulate(program, layers, x, lattice), fast(x, mask=mask)) < 0.1  # ties spread


def test_layers_that_were_not_trained_are_made_as_they_were() -> None:
    fast = in_8_bits(Mixing().eval())
    x = images(2, 65, 97)
    before = fast(x)
    for name, layer in tune.simulated_layers(fast).items():
        fast.set_submodule(f"{KERNELS}.{name}", layer.make())
    assert_same(fast(x), before)


@pytest.mark.parametrize("name", ["mixing", "resnet18"])
def test_a_tuned_copy_is_never_further_away_on_images_it_was_not_tuned_by(name: str) -> None:
    model = Mixing().eval() if name == "mixing" else build(name, by=4)
    net = cs.adaptify(model, MIXED, verify_laws=False)
    known: Any = {"precision": "int8", "calibration": CALIBRATION}
    fast, tuned, exact = net.optimize(**known), net.optimize(**known, tune=7), net.optimize()
    told = tuned.quantisation
    assert told.layers == fast.quantisation.layers and told.images == 2
    assert told.tuning.images == 3 and told.tuning.steps == 7 and "tuned by 3 images in 7 steps" in str(told)
    assert told.error <= told.tuning.before and (told.error < told.tuning.before) == (told.tuning.kept > 0)
    apart = (CALIBRATION[0][:1], CALIBRATION[2][1:])
    errors = [difference_of(([one(x)] for x in apart), ([exact(x)] for x in apart)) for one in (fast, tuned)]
    assert errors == pytest.approx([told.tuning.before, told.error], rel=1e-6)
    assert torch.equal(copy.deepcopy(tuned)(apart[0]), tuned(apart[0]))


def test_biases_that_are_wrong_are_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_RATE", 0.2)
    net = cs.adaptify(Mixing().eval(), MIXED, verify_laws=False)
    fast = net.optimize(precision="int8", calibration=CALIBRATION)
    for name, layer in tune.simulated_layers(fast).items():
        with torch.no_grad():
            layer.bias += 3
        fast.set_submodule(f"{KERNELS}.{name}", layer.make())
    told = tune.tune_copy(fast, net.optimize(), CALIBRATION, 40)
    assert told.tuning is not None and told.error < told.tuning.before / 2


def test_where_no_step_comes_nearer_the_copy_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_RATE", 1e3)
    net, x = cs.adaptify(Mixing().eval(), MIXED, verify_laws=False), images(2, 65, 97)
    known: Any = {"precision": "int8", "calibration": CALIBRATION[0]}
    fast, tuned = net.optimize(**known), net.optimize(**known, tune=2)
    assert tuned.quantisation is not None and tuned.quantisation.tuning is not None
    assert tuned.quantisation.tuning.kept == 0
    assert tuned.quantisation.error == tuned.quantisation.tuning.before
    assert torch.equal(tuned(x), fast(x))


class Stepped(nn.Module):
    """Whether features are positive, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 8, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) > 0).float()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tune": 5}, "5 steps of tuning in precision float"),
        ({"precision": "int8", "calibration": CALIBRATION, "tune": -1}, "-1 steps"),
    ],
)
def test_steps_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    net = cs.adaptify(Mixing().eval(), MIXED, verify_laws=False)
    with pytest.raises(cs.InvalidInput, match=words):
        net.optimize(**options)


@pytest.mark.filterwarnings("ignore:no mask can improve")
def test_a_network_without_gradients_is_not_tuned() -> None:
    net = cs.adaptify(Stepped().eval(), MIXED, verify_laws=False)
    with pytest.raises(cs.CannotConvert, match="no gradients"):
        net.optimize(precision="int8", calibration=CALIBRATION, tune=1)
