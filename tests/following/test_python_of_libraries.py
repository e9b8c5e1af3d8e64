"""What the code of libraries asks of torch and of sizes is traced: checks, names of types, legacy constructors, the
question whether torch.jit traces, arguments that are handed on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, relative_error, some
from networks import randomise, unverified
from torch import Tensor, nn

Use = Callable[[Any, Tensor], Tensor]


class Encoder(nn.Module):
    """An encoder to output stride 4; `use` gets the network and its map."""

    def __init__(self, use: Use = lambda net, y: y) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)
        self.gate, self.use = nn.Conv2d(8, 1, 1), use

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, self.encode(x)))


def checked(net: Any, y: Tensor) -> Tensor:
    torch._check(y.shape[2] * y.shape[3] >= 16, lambda: f"too small: {y.shape}")
    return y


def by_name_of_type(net: Any, y: Tensor) -> Tensor:
    if "Half" in y.type():
        return y.float().mean((2, 3), keepdim=True).half() + y
    return y * 2 if y.type() == "torch.DoubleTensor" else y


def whole(x: Any) -> Any:
    return x.to(torch.int64) if torch.jit.is_tracing() and isinstance(x, Tensor) else int(x)


def asks_whether_jit_traces(net: Any, y: Tensor) -> Tensor:
    high, wide = y.shape[2:]
    if torch.jit.is_tracing():
        high, wide = whole(torch.ceil(high / 2)), whole(torch.ceil(wide / 2))
    else:
        high, wide = math.ceil(high / 2), math.ceil(wide / 2)
    return y + F.interpolate(F.adaptive_avg_pool2d(y, (high, wide)), size=y.shape[2:])


USES: dict[str, Use] = {
    "a check of sizes": checked,
    "the name of a type": by_name_of_type,
    "whether jit traces": asks_whether_jit_traces,
    "torch.Tensor": lambda net, y: y + torch.Tensor(y.shape[0], 1, y.shape[2], y.shape[3]).fill_(0.5).to(y),
    "torch.Tensor of a size": lambda net, y: (
        y + torch.Tensor(torch.Size((y.shape[2], y.shape[3]))).fill_(0.5).to(y)
    ),
    "torch.FloatTensor": lambda net, y: y + torch.FloatTensor(y.size(2), 1).zero_().to(y),
    "an instance of torch.Tensor": lambda net, y: y * 3 if isinstance(y, torch.Tensor) else y,
}


@pytest.mark.parametrize("use", some(USES.values()), ids=USES)
def test_what_libraries_ask_of_torch_is_traced(use: Use) -> None:
    model = randomise(Encoder(use)).eval()
    net = unverified(model, "none", output_stride=(1, 4), outputs="native", example_input=images(1, 64, 96))
    with torch.no_grad():
        for size in ((2, 64, 96), (1, 67, 90)):
            x = images(*size)
            assert_same(net(x), model(x))
        x = images(1, 64, 96, torch.float64)
        if "Float" not in str(use.__code__.co_names):
            assert_same(net.double()(x), model.double()(x))


EXPANSIONS: dict[str, Use] = {
    "broadcast": lambda net, y: net.gate(y).sigmoid() * y,
    "expand": lambda net, y: net.gate(y).sigmoid().expand(-1, 8, -1, -1) * y,
    "expand to sizes": lambda net, y: net.gate(y).sigmoid().expand(y.size(0), 8, y.size(2), y.size(3)) * y,
    "expand_as": lambda net, y: net.gate(y).sigmoid().expand_as(y) * y,
    "repeat": lambda net, y: net.gate(y).sigmoid().repeat(1, 8, 1, 1) * y,
}


def test_a_gate_of_one_channel_is_the_same_in_all_spellings() -> None:
    x, outputs = images(2, 61, 83), []
    levels = torch.randint(0, 2, (2, 61, 83)) * 2
    for use in EXPANSIONS.values():
        torch.manual_seed(1)
        net = unverified(randomise(Encoder(use)).double().eval(), "none", output_stride=(1, 4))
        assert [decision.node for decision in net.plan.region_end] == ["output"]
        with torch.no_grad():
            outputs.append(net(x.double(), mask=levels))
    assert max(relative_error(output, outputs[0]) for output in outputs) < 1e-12


def hands_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        output = forward(self, *args, **kwargs)
        return (output,) if as_tuple else output

    return wrapper


class Decorated(Encoder):
    @hands_on
    def forward(self, pixels: Tensor | None = None, gain: float = 1.0) -> Tensor:  # type: ignore[override]
        assert pixels is not None
        return self.head(self.encode(pixels)) * gain


class HandsOn(Encoder):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.predict(x, *args, **kwargs)

    def predict(self, x: Tensor, gain: float = 1.0, shift: float = 0.0) -> Tensor:
        return self.head(self.encode(x)) * gain + shift


class OfImages(Encoder):
    def forward(self, *pictures: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [self.head(self.encode(one)) for one in pictures]


@pytest.mark.parametrize("options", [{"output_stride": (1, 4)}, {"coarsest": 16}], ids=["strides", "floors"])
@pytest.mark.parametrize("kind", [Decorated, HandsOn, OfImages])
def test_forwards_that_hand_on_their_arguments_are_followed(kind: type[Encoder], options: Any) -> None:
    """No example is needed: the image is the first argument."""
    model, x = randomise(kind()).eval(), images(2, 61, 83)
    own = "all" if "coarsest" in options else "none"
    net = unverified(model, own, outputs="native", **options)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {})]
    calls += [((x, x.flip(3)), {})] if kind is OfImages else [((x, 2.0), {}), ((x,), {"gain": 3.0})]
    with torch.no_grad():
        for args, kwargs in calls:
            assert_same(net(*args, **kwargs), model(*args, **kwargs))
