"""Weights that are computed when a module is called, hooks, and modules exchanged after the conversion.

The law: the network gives what the original gives with the same modules, hooks and tensors, or says why it does not.
"""

import copy
import functools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import covering, some
from networks import conv_norm, unverified
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import cadsurgery as cs
from cadsurgery.support.errors import CannotConvert, InvalidInput

How = Callable[[nn.Module], object]


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and what older networks are made with
        old_weight_norm(module)


HOOKS: dict[str, How] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda module: prune.ln_structured(module, "weight", 0.5, n=2, dim=0),
    "prune twice": lambda module: [prune.ln_structured(module, "weight", 0.3, n=2, dim=d) for d in range(2)],
}
PARAMETRIZATIONS: dict[str, How] = {
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
}
WAYS = (*HOOKS, *PARAMETRIZATIONS)
SOME = pytest.mark.parametrize(
    "how", some(WAYS, every=3)
)  # weight_norm, prune twice, parametrizations.orthogonal


class Net(nn.Module):
    """Output stride 16; the fine map is at 4, so that the last two blocks and the head are in the region."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 8, 1), (8, 16, 1), (16, 16, 1), (16, 16, 16))
        self.blocks = nn.Sequential(*(conv_norm(a, b, 2, groups=groups) for a, b, groups in widths))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


PLACES = ("blocks.1.0", "blocks.2.0", "blocks.3.0", "head")


def network(how: str = "", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().double()
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    for place in PLACES if how else ():
        {**HOOKS, **PARAMETRIZATIONS}[how](net.get_submodule(place))
    return net.eval()


def low(net: nn.Module, x: Tensor) -> Tensor:
    """What a converted network gives with everything low, where the original has samples."""
    return net(x, mask="none")[..., ::4, ::4]


def x() -> Tensor:
    return torch.randn(2, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("how", "training"), covering(WAYS, [False, True]))
def test_computed_weights_are_those_of_the_call_and_have_the_gradients_of_the_original(how, training):
    model = network(how).train(training)
    model(x()).sum().backward()  # a network that has run with gradients can be converted
    model.zero_grad()
    net = unverified(model)
    other = network(how, seed=1)
    for each in (model, net):
        each.load_state_dict(other.state_dict())
    results = []
    for run in (model, functools.partial(low, net)):
        for _ in range(2):  # a second step reads what the first one left
            given = x().requires_grad_()
            output = run(given)
            output.square().sum().backward()
        results.append((output, given.grad))
    torch.testing.assert_close(results[1], results[0])
    ours, theirs = dict(net.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)
    torch.testing.assert_close(net.state_dict(), model.state_dict())


@SOME
def test_copies_files_optimised_networks_and_counts_have_the_computed_weights(how, tmp_path):
    model, other = network(how), network(how, seed=1)
    net = unverified(model)
    low(net, x()).sum().backward()  # weights with a history
    net.load_state_dict(other.state_dict())
    expected = other(x())
    cs.save(net, tmp_path / "net.safetensors")
    copies = [net.optimize(), net.optimize(fuse=False), copy.deepcopy(net)]
    copies.append(cs.load(tmp_path / "net.safetensors", network(how)))
    if how in HOOKS:  # torch does not pickle parametrised modules
        copies.append(pickle.loads(pickle.dumps(net)))
    for one in copies:
        torch.testing.assert_close(low(one, x()), expected)
    assert net.macs(x()).high >= unverified(network()).macs(x()).high  # computing may take products
    torch.testing.assert_close(low(net, x()), expected)


@SOME
def test_weights_may_be_made_computed_after_the_conversion(how):
    net, model = unverified(network()), network(how)
    low(net, x())
    torch.manual_seed(0)
    for place in PLACES:
        {**HOOKS, **PARAMETRIZATIONS}[how](net.get_submodule(place))
    net.load_state_dict(model.state_dict())
    torch.testing.assert_close(low(net, x()), model(x()))
    torch.testing.assert_close(low(net.optimize(), x()), model(x()))


def test_a_pruned_norm_and_linear_layer_of_the_region_are_those_of_the_call():
    def pruned() -> nn.Module:
        model = network()
        model.head = nn.Sequential(nn.Conv2d(16, 8, 1), Rows()).double()
        for part in (model.blocks[2][1], model.head[1].linear):
            prune.random_unstructured(part, "weight", 0.5)
        return model

    model = pruned()
    net = unverified(model)
    model.load_state_dict(state := pruned().state_dict())
    net.load_state_dict(state)
    torch.testing.assert_close(low(net, x()), model(x()))
    torch.testing.assert_close(low(net.optimize(), x()), model(x()))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Noted:
    """Notes the shapes of what a hook is shown."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.shapes.append(tuple(output.shape))


@pytest.mark.parametrize("place", ["blocks.3", "blocks.3.0", "blocks.3.1", "blocks.3.2"])
def test_a_hook_there_before_the_conversion_ends_the_region_and_may_change_values(place):
    """It is called with maps."""
    model, noted = network(), Noted()
    model.get_submodule(place).register_forward_hook(noted.note)
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: 2 * output)
    model.get_submodule(place).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    net = unverified(model, "none")
    reasons = [decision.reason for decision in net.plan.chosen("barrier")]
    assert any("which is called with maps" in reason for reason in reasons)
    noted.shapes.clear()
    torch.testing.assert_close(net(x()), model(x()))
    assert noted.shapes == [(2, 16, 5, 7)] * 2
    torch.testing.assert_close(net.optimize()(x()), model(x()))


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        ("blocks.3", {"strict": True}, "it has a forward hook"),
        ("blocks", {}, r"(?s)blocks.*it has a forward hook.*handle\.remove"),
    ],
)
def test_a_hook_where_nothing_may_be_dense_is_refused(place, options, words):
    model = network()
    model.get_submodule(place).register_forward_hook(Noted().note)
    with pytest.raises(CannotConvert, match=words):
        cs.adaptify(model, **options)


@pytest.mark.parametrize(
    ("place", "register"),
    covering(
        ["blocks", "blocks.3", "blocks.3.0", "blocks.2.1", "blocks.3.2", "blocks.0"],
        ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
    ),
)
def test_a_hook_that_would_never_be_called_is_refused(place, register):
    net = cs.adaptify(network(), "none")
    expected = net(x())
    handle = getattr(net.get_submodule(place), register)(lambda *_: None)
    for call in (net, copy.deepcopy(net), net.macs):
        with pytest.raises(
            InvalidInput, match=rf"(?s)^{place} has a hook .*handle\.remove.*before cs\.adaptify"
        ):
            call(x())
    handle.remove()
    torch.testing.assert_close(net(x()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_dense_operations_and_the_network_itself_are_called(before):
    model, noted, inside = network(), Noted(), Noted()
    if before:
        model.register_forward_hook(noted.note)
    net = unverified(model, "none")
    if not before:
        net.register_forward_hook(noted.note)
    net.blocks[0][2].register_forward_hook(inside.note)
    noted.shapes.clear()
    net(x())
    assert inside.shapes == [(2, 8, 33, 49)]
    for each in (net.optimize(), copy.deepcopy(net)):
        each(x())
    assert noted.shapes == [(2, 5, 17, 25)] * 3


def test_hooks_on_the_network_itself_may_change_what_it_is_given_and_gives():
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    net = unverified(model)
    for each in (net, net.optimize()):
        torch.testing.assert_close(low(each, x()), model(x()))


class Collecting(nn.Module):
    """Collects features by hooks of its own, as timm's `FeatureHookNet` does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.found = network(), Noted()
        self.seen: list[Tensor] = []
        self.body.blocks[2].register_forward_hook(self.collect)

    def collect(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = [output]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), self.seen[0]


def test_hooks_that_belong_to_the_network_are_part_of_its_forward():
    model = Collecting().eval()
    net = cs.adaptify(model, "none")
    for given, expected in zip(net(x()), model(x()), strict=True):
        step = -(-given.shape[-1] // expected.shape[-1])
        torch.testing.assert_close(given[..., ::step, ::step], expected)
    assert not any("hook" in decision.reason for decision in net.plan.chosen("barrier"))


def test_a_forward_exchanged_before_the_conversion_ends_the_region():
    model = network()
    conv = model.blocks[3][0]
    conv.forward = lambda x: 3 * nn.Conv2d.forward(conv, x)
    net = unverified(model, "none")
    assert any("its forward was exchanged" in decision.reason for decision in net.plan.chosen("barrier"))
    torch.testing.assert_close(net(x()), model(x()))
