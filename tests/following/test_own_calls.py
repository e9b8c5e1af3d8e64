"""Networks and blocks whose class has a `__call__` of its own: a converted network computes what a call of it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images
from networks import followed, unverified
from torch import Tensor, nn

import cadsurgery as cs

EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve", "ignore:masks hardly change")
OPTIONS: dict[str, dict[str, Any]] = {
    "finer": {"outputs": "native"},
    "floors": {"coarsest": 32},
}


class Plain(nn.Module):
    """Output stride 8."""

    def __init__(self) -> None:
        super().__init__()
        strides = (2, 2, 2)
        self.blocks = nn.Sequential(
            *(nn.Conv2d(3 if i == 0 else 6, 6, 3, s, 1) for i, s in enumerate(strides))
        )
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.blocks(x)))


class Normalises(Plain):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__((x - 0.45) / 0.25)


class PassesOn(Plain):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 3 * super().__call__(*args, **kwargs).sigmoid()


class TakesMore(Plain):
    """Its call takes what its forward does not."""

    def __call__(self, picture: Tensor, gain: float = 2.0) -> Any:
        return super().__call__(gain * picture)


class WithoutForward(Plain):
    forward = nn.Module.forward  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Any:
        return self.head(F.relu(self.blocks(x / 3)))


class Inherits(Normalises):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x.square()) + 1


class WithinTheCall(Plain):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return -super()._call_impl(*args, **kwargs)


class Doubled(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(2 * x) + 1


class DoubledConvolution(nn.Conv2d):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(2 * x) + 1


class OfBlocks(Plain):
    """A container and a convolution with calls of their own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Doubled(*self.blocks[:2], DoubledConvolution(6, 6, 3, 2, 1))


class WithHook(OfBlocks):
    """A hook keeps a block whole: its own call runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].register_forward_hook(lambda module, args, output: output.abs())


KINDS = (
    *(Normalises, PassesOn, TakesMore, WithoutForward, Inherits, WithinTheCall),
    *(OfBlocks, WithHook),
)


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double().eval()


def own_level(net: cs.AdaptiveModel) -> str:
    return "all" if net.plan.floors else "none"


@pytest.mark.parametrize(("kind", "options", "given"), covering(KINDS, OPTIONS, ["example", "no example"]))
@torch.no_grad()
def test_a_converted_network_computes_what_a_call_does(
    kind: type[nn.Module], options: str, given: str
) -> None:
    """With its weights and with others, and so does an optimised copy."""
    model, x = made(kind), images(2, 72, 104, torch.float64)
    example = {"example_input": x[:1]} if given == "example" else {}
    net = cs.adaptify(model, **example, **OPTIONS[options])
    assert_same(net(x, mask=own_level(net)), model(x), EXACT)
    other = made(kind, seed=1)
    net.load_state_dict(other.state_dict())
    assert_same(net(x, mask=own_level(net)), other(x), EXACT)
    assert_same(net.optimize()(x, mask=own_level(net)), other(x), EXACT)


@torch.no_grad()
def test_arguments_are_those_of_the_call() -> None:
    model, x = made(TakesMore), images(1, 64, 96, torch.float64)
    net = unverified(model, "none", outputs="native", example_input=(x,))
    assert_same(net(picture=x, gain=5.0), model(x, 5.0), EXACT)
    with pytest.raises(TypeError, match="unexpected"):
        net(x, loss=3)


@torch.no_grad()
def test_hooks_of_the_network_itself_run_once() -> None:
    model, x, calls = made(Normalises), images(1, 64, 96, torch.float64), []
    model.register_forward_hook(lambda module, args, output: calls.append(module))
    net = unverified(model, "none", outputs="native", example_input=x)
    assert not calls
    net(x)
    assert calls == [net]


class ByValues(Plain):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x / 255 if x.max() > 1 else x)


def test_a_call_that_cannot_be_followed_is_refused_with_its_line() -> None:
    with pytest.raises(cs.CannotConvert, match=r"x\.max\(\) > 1"):
        followed(made(ByValues))
    net, x = unverified(made(ByValues), "none"), images(1, 64, 96, torch.float64)
    assert net.plan.part == "blocks"
    for image in (x, 300 * x.abs()):
        assert_same(net(image), made(ByValues)(image), EXACT)
