"""What surgery must keep of a network besides its numbers: how it is written and called."""

from __future__ import annotations

import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images
from networks import build, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.following.trace import trace
from cadsurgery.surgery.treatment import _RULES


class Awkward(nn.Module):
    """Legal Python that surgery has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.mask = nn.Conv2d(8, 8, 3, 2, 1)  # a child with the name of a property
        self.plan = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.register_buffer("shift", torch.rand(8, 1, 1))
        self.never_called = nn.Linear(3, 3)

    def forward(self, x: Tensor, gain: float = 1.0) -> tuple[Tensor, dict[str, list[Tensor]]]:
        y = F.relu(self.stem(x), inplace=True)
        y = self.mask(y)
        before = y
        after = F.relu_(y)  # changes `before` too
        y = after + before
        y = self.plan(y) * self.scale + self.shift
        y = self.plan(y) * gain  # the same module again
        ratio = x.shape[-1] / y.size(3)
        context = F.interpolate(y.mean((2, 3), keepdim=True), size=y.shape[-2:], mode="nearest")
        y = torch.cat([y, context], dim=1) / ratio * torch.tensor(2.0)
        return y, {"deep": [y.sigmoid()]}


def awkward() -> Awkward:
    return Awkward().eval()


@pytest.mark.smoke
def test_awkward_python_is_followed_exactly() -> None:
    """In-place changes, a module called twice, children named like properties, constants, nested outputs."""
    model, x = awkward(), images(2, 45, 71)
    net = unverified(model, "none", output_stride=(2, 4))
    (found, nested), (expected, expected_nested) = net(x), model(x)
    assert_same(found[..., ::2, ::2], expected, 1e-4)
    assert_same(nested["deep"][0][..., ::2, ::2], expected_nested["deep"][0], 1e-4)
    assert net.plan.output_stride == (2, 4)
    assert net.state_dict().keys() == model.state_dict().keys()


@pytest.mark.smoke
def test_an_ordered_dict_stays_one() -> None:
    """torch.fx turns it into a plain dictionary; the network's users may rely on it."""
    model = build("fcn_resnet50", aux_loss=True, by=4)
    net = unverified(model, "all")
    x = images(1, 65, 97)
    found, expected = net(x), model(x)
    assert type(found) is OrderedDict
    assert list(found) == list(expected) == ["out", "aux"]
    assert_same(found["aux"], expected["aux"], 1e-4)


@pytest.mark.parametrize("by_name", [True, False])
def test_functional_dropout_follows_the_mode_of_the_network(by_name: bool) -> None:
    """Tracing sees one mode only; the network must not be stuck in it."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return F.dropout(y, 0.5, training=self.training) if by_name else F.dropout(y, 0.5, self.training)

    net, x = unverified(Dropping().eval(), "all"), images(1, 16, 24)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))
    assert (net(x) == 0).float().mean() > 0.3


@pytest.mark.slow
def test_every_end_of_the_region_has_reason_place_and_cost() -> None:
    """What runs dense because of a barrier is counted, and print(plan) shows it; `strict` refuses it by its line."""
    plan, line = cs.plan(build("fcn_resnet50", by=4)), r"classifier\.0 \(Conv2d 3x3, _utils\.py:\d+\)"
    (end,) = plan.chosen("barrier")
    assert end.node == "classifier_0" and re.fullmatch(line, end.place)
    assert "no multiple of the cells'" in end.reason
    dense = sum(d.macs for d in plan.decisions if d.node.startswith("classifier"))
    assert end.cost == dense > 0
    assert plan.dense_after == pytest.approx(dense / sum(d.macs for d in plan.decisions))
    assert f"{plan.dense_after:.0%} of the MACs run dense" in str(plan)
    with pytest.raises(cs.CannotConvert, match=line):
        cs.adaptify(build("fcn_resnet50", by=4), strict=True)


class Outer(nn.Module):
    """Its part calls a function: three of its own lines lead to a ReLU, and some of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rectified(x)


def rectified(x: Tensor) -> Tensor:
    return torch.relu(x)


def test_a_node_has_the_lines_of_the_network_that_lead_to_it_in_the_order_of_their_calls() -> None:
    (relu,) = [node for node in trace(Outer()).nodes if node.target is torch.relu]
    lines = [line.strip() for line in relu.stack_trace.splitlines()]
    assert lines[1::2] == ["return self.layers(x)", "return rectified(x)", "return torch.relu(x)"]
    assert all(f'"{__file__}"' in line for line in lines[::2])


class Pyramid(nn.Module):
    """Two maps; the coarser one is hardly any of the work."""

    def __init__(self) -> None:
        super().__init__()
        strided = [nn.Conv2d(8 if depth else 3, 8, 3, 2, 1) for depth in range(4)]
        self.trunk = nn.Sequential(*strided, *(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3)))
        self.tail = nn.Conv2d(8, 4, 1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.trunk(x)
        return [x, self.tail(x)]


def test_a_mere_tail_has_a_stage_of_its_own_only_where_a_region_names_it() -> None:
    plain = cs.adaptify(Pyramid().eval(), "none")
    assert plain.plan.output_stride == (4, 16) and plain.plan["tail"].action == "barrier"
    named = cs.adaptify(Pyramid().eval(), "none", region=["trunk", "tail"])  # its laws are verified
    assert named.plan.output_stride == (8, 32) and named.plan["tail"].action != "barrier"


@pytest.mark.slow
def test_where_everything_leaves_at_native_size_the_plan_says_that_a_mask_cannot_matter() -> None:
    trunk = build("vgg11", by=4).features  # whose pooling to bins brings finer values to the rest
    plan = cs.plan(nn.Sequential(trunk, nn.Flatten(), nn.Linear(128 * 3 * 4, 10)))
    assert not plan.matters and "gains nothing" in str(plan)
    for name in ("resnet18", "fcn_resnet50", "vgg11"):
        assert cs.plan(build(name, by=4)).matters


def test_data_of_the_original_can_be_read_but_its_methods_would_run_it_as_it_was() -> None:
    net = unverified(build("mobilenet_v2", by=4), "none")
    assert net.last_channel == 1280
    with pytest.raises(AttributeError):
        net._forward_impl(images(1, 64, 64))
    with pytest.raises(AttributeError):
        net.no_such_thing  # noqa: B018


def data_dependent(x: Tensor) -> Tensor:
    return x.relu() if x.numel() > 0 and float(x.detach().sum()) > -1e9 else x


class Calling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return data_dependent(x)


def test_an_operation_has_one_rule_and_a_cell_of_a_notebook_that_is_run_twice_replaces_it() -> None:
    cell = "@cs.rule(Calling)\ndef calling(node, facts):\n    return cs.Treatment('barrier', 'version {}')"
    scope = {"cs": cs, "Calling": Calling, "__name__": "__main__"}
    try:
        for version in (1, 2):
            exec(cell.format(version), scope)
        assert _RULES[Calling] is scope["calling"]
        for kind, name in ((Calling, " calling"), (nn.ReLU, "")):
            with pytest.raises(ValueError, match=f"already has the rule{name}"):
                cs.rule(kind)(lambda node, facts: cs.Treatment("barrier", "another"))
    finally:
        _RULES.pop(Calling, None)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.multigammaln(x + 9, 1)  # no rule knows this function


@pytest.mark.parametrize(("kind", "taught"), [(Gate, Gate), (Calling, data_dependent)])
def test_what_has_a_rule_of_a_users_is_one_operation(kind: type[nn.Module], taught: Any) -> None:
    """A user teaches a module or a function without touching the package; tracing does not look into it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), kind(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    with pytest.raises(cs.CannotConvert):
        cs.adaptify(model)
    try:
        cs.rule(taught)(lambda node, facts: cs.Treatment("pointwise", "acts on each value alone"))
        net, x = cs.adaptify(model, "none"), images(2, 17, 23)
        assert next(d.operation for d in net.plan.chosen("keep")) == taught.__name__
        assert_same(net(x)[..., ::2, ::2], model(x), 1e-4)
    finally:
        _RULES.pop(taught, None)


class CallsMeanwhile(nn.Module):
    """While it is traced, another thread calls another network, and a part of this one."""

    found: ClassVar[SimpleQueue[Any]] = SimpleQueue()  # of all copies; lists are put back after a trace

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.others, self.image = [nn.Conv2d(3, 4, 3), self.body], images(1, 33, 47)

    def call(self, module: nn.Module) -> Any:
        """In the other thread."""
        with torch.no_grad():
            return module(self.image)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        with ThreadPoolExecutor(1) as pool:
            self.found.put(list(pool.map(self.call, self.others)))
        return self.body(x)


def test_other_threads_may_call_networks_while_one_is_traced() -> None:
    model = CallsMeanwhile().eval()
    expected = [model.call(module) for module in model.others]
    unverified(model, "none", output_stride=(2, 4))
    assert model.found.qsize()
    while model.found.qsize():
        for one, wanted in zip(model.found.get(), expected, strict=True):
            assert type(one) is Tensor and torch.equal(one, wanted)


@pytest.mark.parametrize("kind", [nn.AvgPool2d, nn.MaxPool2d])
def test_a_pooling_that_makes_maps_larger_than_their_grid_says_why_it_is_no_stage(kind: Any) -> None:
    """With padding and `ceil_mode`, windows of 3 give one sample more than there are pairs of samples."""
    pooling = kind(3, 2, 1, ceil_mode=True)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), pooling, nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
    )
    with pytest.raises(cs.InvalidInput, match=r"is no adaptive stage: its padding .* makes the map grow"):
        cs.plan(model.eval(), output_stride=(2, 8), example_input=torch.rand(1, 3, 64, 64))
    fits = kind(3, 2, ceil_mode=True)
    model[1] = fits
    assert cs.plan(model, example_input=torch.rand(1, 3, 64, 64)).strides == (2, 4, 8)


def test_barriers_and_stages_follow_the_strides_that_are_asked_for() -> None:
    """Taps 48 and 144 pixels apart are multiples of cells of 16 pixels, not of 32."""
    strided = [nn.Conv2d(channels, 8, 3, 2, 1) for channels in (3, 8, 8)]
    dilated = [nn.Conv2d(8, 8, 3, 1, rate, rate) for rate in (2, 2, 4, 4, 6, 18)]
    model = nn.Sequential(*strided, *dilated).eval()
    usual, coarse = (
        cs.plan(model, output_stride=pair, example_input=torch.rand(1, 3, 128, 128))
        for pair in ((8, 32), (8, 16))
    )
    assert "taps are 48 pixels apart, which is no multiple of the cells' 32 pixels" in usual.summary()
    assert not [decision for decision in coarse.decisions if decision.action == "barrier"]
    assert "adaptive stages: 1, from 8 to 16; levels 0..1" in coarse.summary()


class AsksForItsTracer(nn.Module):
    """Calls another convolution, for five channels, while torch.fx traces without an example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.wide = nn.Conv2d(5, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.wide(first) if isinstance(first, torch.fx.Proxy) else self.second(first)


def test_where_a_graph_does_not_run_the_network_is_traced_on_an_example() -> None:
    model, x = AsksForItsTracer().eval(), images(1, 64, 96)
    net = unverified(model, "none", outputs="native")
    assert_same(net(x), model(x))
