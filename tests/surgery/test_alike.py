"""Operations by another name: subclasses that do the same, functions instead of modules, what cannot be copied."""

from __future__ import annotations

import copy
import threading
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import some
from networks import Encoded, unverified
from torch import nn

import cadsurgery as cs
from cadsurgery.following.hooks import act_alike


class Shifted(nn.Conv2d):
    """A forward of its own."""

    def forward(self, x):
        return super().forward(x) + 1


class Scaled(nn.Conv2d):
    """Another function than its parent's, which the inherited forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Quiet(nn.BatchNorm2d):
    """A norm as projects have them: other defaults, fewer checks, another text."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def _check_input_dim(self, x):
        pass

    def extra_repr(self):
        return "quiet"


class Mixin:
    def describe(self):
        return "new names change nothing"


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), *layers, nn.Conv2d(8, 4, 3)
    ).eval()


KINDS = {
    "Conv2d": (nn.Conv2d, (8, 8, 3)),
    "BatchNorm2d": (nn.BatchNorm2d, (8,)),
    "ReLU": (nn.ReLU, ()),
    "LeakyReLU": (nn.LeakyReLU, (0.3,)),
    "MaxPool2d": (nn.MaxPool2d, (3, 2, 1)),
    "AvgPool2d": (nn.AvgPool2d, (3, 1, 1)),
    "ReflectionPad2d": (nn.ReflectionPad2d, (1,)),
    "ZeroPad2d": (nn.ZeroPad2d, (1,)),
    "Softmax": (nn.Softmax, (1,)),
    "Upsample": (nn.Upsample, (None, 2)),
    "GroupNorm": (nn.GroupNorm, (2, 8)),
    "Dropout2d": (nn.Dropout2d, (0.5,)),
    "MaxOut": (nn.AdaptiveAvgPool2d, ((16, 24),)),
    "Average": (nn.AdaptiveMaxPool2d, ((16, 24),)),
}


@pytest.mark.parametrize("name", some(KINDS))
def test_a_subclass_that_does_the_same_is_treated_as_its_parent(name):
    kind, arguments = KINDS[name]
    named = type(name if "Adaptive" in kind.__name__ else "Renamed", (Mixin, kind), {})
    x = torch.randn(2, 3, 65, 98)
    plan, ours = (cs.plan(network(k(*arguments)), example_input=x) for k in (kind, named))
    assert [d.action for d in ours.decisions] == [d.action for d in plan.decisions]
    assert [d.reason for d in ours.decisions] == [d.reason for d in plan.decisions]
    model = network(named(*arguments))
    net = unverified(model, mask="none", example_input=x)
    spacing = net.plan.outputs[0][1] // net.plan.strides[0] if net.plan.outputs else 1
    with torch.no_grad():
        for run in (net, net.optimize()):
            torch.testing.assert_close(run(x)[..., ::spacing, ::spacing], model(x), rtol=1e-4, atol=1e-5)


class Halved(nn.Conv2d):
    """A property in place of a parameter."""

    @property
    def weight(self):
        return self.full / 2


@pytest.mark.parametrize("kind", [Shifted, Scaled])
def test_a_subclass_that_does_something_else_has_no_rule_of_its_parents(kind):
    assert act_alike(kind) == (kind,) and act_alike(Halved) == (Halved,)
    model = network(kind(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1))
    x = torch.randn(2, 3, 66, 97)
    net = unverified(model, mask="none", example_input=x, outputs="native")
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Quiet, nn.SyncBatchNorm])
def test_a_norm_by_another_name_is_trained_as_batch_norm_is(kind):
    x = torch.randn(2, 3, 64, 96)
    plain = network(kind(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    plain[2] = nn.BatchNorm2d(8, plain[2].eps, plain[2].momentum)
    renamed = copy.deepcopy(plain)
    renamed[2] = kind(8)
    nets = [unverified(model, mask="random", example_input=x).train() for model in (plain, renamed)]
    outputs = [net(x, mask=torch.eye(32, 48).bool().expand(2, -1, -1)) for net in nets]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(net.get_submodule("2").running_var for net in nets))


def _train_a_half(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}.met", rank=rank, world_size=2)
    model, x, mask = torch.load(path, weights_only=False)
    net = unverified(nn.SyncBatchNorm.convert_sync_batchnorm(model), mask="all", example_input=x).train()
    mine = slice(rank, rank + 1)
    y = net(x[mine], mask=mask[mine])
    y.square().sum().backward()
    norm = net.get_submodule("2")
    torch.save(
        (y.detach(), net.get_submodule("0").weight.grad, norm.running_mean, norm.running_var), f"{path}{rank}"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_statistics_of_a_sync_batch_norm_are_those_of_all_processes(tmp_path):
    """Two processes with an image each are one process with both: outputs, statistics, the sum of gradients."""
    model = network(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)).double()
    x = torch.randn(2, 3, 64, 96).double()
    net = unverified(copy.deepcopy(model), mask="all", example_input=x)
    net(x)
    mask = torch.randint(0, net.plan.max_level + 1, net.levels.shape)
    torch.save((model, x, mask), tmp_path / "all")
    torch.multiprocessing.spawn(_train_a_half, (str(tmp_path / "all"),), nprocs=2)
    y = net.train()(x, mask=mask)
    y.square().sum().backward()
    halves = [torch.load(f"{tmp_path / 'all'}{rank}", weights_only=False) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), y.detach())
    torch.testing.assert_close(halves[0][1] + halves[1][1], net.get_submodule("0").weight.grad)
    norm = net.get_submodule("2")
    for half in halves:
        torch.testing.assert_close(half[2:], (norm.running_mean, norm.running_var))


def dropping(drop) -> nn.Module:
    """Functional dropout, with its flag."""
    return Encoded(lambda own, image, y: own.head(drop(y, p=0.4, training=own.training))).eval()


@pytest.mark.parametrize("drop", [F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout])
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_functional_dropout_is_torchs(drop):
    """Where everything is low and the random numbers are the same, so is what is dropped of channels."""
    torch.manual_seed(0)
    model, x = dropping(drop), torch.randn(2, 3, 65, 90)
    net = unverified(model, mask="none", example_input=x, outputs="native")
    assert net.plan["head"].action == "keep"
    torch.testing.assert_close(net(x), model(x))
    torch.manual_seed(1)
    dropped = net.train()(x)
    torch.manual_seed(1)
    if drop is not F.alpha_dropout:
        assert not any("drop" in node.name for node in net.optimize().graph.nodes)
        torch.testing.assert_close(dropped, model.train()(x), rtol=1e-4, atol=1e-4)
    assert (dropped - net.eval()(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    "take",
    [lambda x: x.data, lambda x: x.detach(), lambda x: x.clone().contiguous()],
    ids=["data", "detach", "clone"],
)
def test_values_without_history_stay_in_the_region(take):
    model, x = Encoded(lambda own, image, y: own.head(take(y))).eval(), torch.randn(1, 3, 66, 97)
    net = unverified(model, mask="all", example_input=x)
    assert net.plan["head"].action == "keep"
    needs = net(x).requires_grad
    net(x).sum().backward()
    model(x).sum().backward()
    assert needs and (net.encode[0].weight.grad is None) == (model.encode[0].weight.grad is None)


def holding(value: object) -> nn.Module:
    model = network(nn.Conv2d(8, 8, 3, 2, 1))
    model[0].held = value
    return model


class InSlots:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_what_cannot_be_copied_is_shared(tmp_path):
    lock, text = threading.Lock(), (tmp_path / "log").open("w")
    held = {
        "lock": lock,
        "names": {"a": 1}.keys(),
        "module": F,
        "log": [text],
        "images": (i for i in range(3)),
        "others": (InSlots(), partial(print, lock), deque([lock])),
    }
    x = torch.randn(1, 3, 64, 96)
    net = unverified(holding(held), mask="none", example_input=x)
    copied = copy.deepcopy(net)
    copied.optimize()
    for one in (net, copied):
        assert one.get_submodule("0").held is not held
        assert one.get_submodule("0").held["lock"] is lock and one.get_submodule("0").held["log"][0] is text
    text.close()


def test_what_holds_parts_of_the_network_and_cannot_be_copied_is_refused():
    model = holding(None)
    model[0].held = {"parts": model._modules.values()}
    with pytest.raises(
        cs.CannotConvert, match=r"cannot be copied.*\n.*0\.held.*\n.*dict_values.*\n.*take that"
    ):
        cs.plan(model)
