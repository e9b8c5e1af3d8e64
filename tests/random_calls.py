"""Networks whose Python code asks for much of a call: whether an argument is there, its type, length, keys and text.

A seed is a small encoder with two idioms as people write them, each with an argument of its own. `calls` are what such
a network is called with: other arguments, batches and sizes than those it is converted on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn

Values = Callable[[Tensor], Any]  # the argument of a call with an image


@dataclass(frozen=True)
class Idiom:
    """A way to use an argument.

    Attributes:
        use: what the network computes of its modules, its features and the argument.
        values: arguments that calls have, each made for the image of its call.
        default: what the argument is if it is left out.
    """

    use: Callable[[Any, Tensor, Any], Tensor]
    values: Sequence[Values]
    default: Any = None


def _always(value: Any) -> Values:
    return lambda image: value


def _for_each(image: Tensor) -> Tensor:
    return torch.arange(1.0, len(image) + 1, dtype=image.dtype)


def _map_of(image: Tensor) -> Tensor:
    return image[:, :1, ::4, ::4].contiguous()


IDIOMS: dict[str, Idiom] = {}


def idiom(*values: Values, default: Any = None) -> Callable[[Callable[[Any, Tensor, Any], Tensor]], Any]:
    """Register a way to use an argument."""

    def register(use: Callable[[Any, Tensor, Any], Tensor]) -> Any:
        IDIOMS[use.__name__] = Idiom(use, values, default)
        return use

    return register


@idiom(_always((1.0, 2.0)), _always((3.0,)), _always((1.0, 0.5, 2.0)), _always([2.0, 1.0]), default=(1.0,))
def loop_over_gains(net: Any, y: Tensor, gains: Any) -> Tensor:
    return sum(torch.tanh(y * gain) for gain in gains)


@idiom(_always(None), _map_of, lambda image: _map_of(image) > 0.5)
def optional_map(net: Any, y: Tensor, other: Any) -> Tensor:
    return y if other is None else y + other


@idiom(_always(False), _always(True), _always(None), default=False)
def flag(net: Any, y: Tensor, is_doubled: Any) -> Tensor:
    return y * 2 if is_doubled else y if is_doubled is False else -y


@idiom(_always("sum"), _always("product"), _always("none"), default="sum")
def mode(net: Any, y: Tensor, how: Any) -> Tensor:
    return {"sum": lambda: y + 1, "product": lambda: y * 3}.get(how, lambda: y)()


@idiom(_always(1), _always(2), _always(3), default=1)
def branch_of_name(net: Any, y: Tensor, number: Any) -> Tensor:
    return net.branches[f"x{number}"](y) + getattr(net, "gain_%d" % number)  # noqa: UP031


@idiom(_always(1), _always(2), _always(3), default=2)
def branch_of_text(net: Any, y: Tensor, number: Any) -> Tensor:
    return net.branches["x" + str(number)](y) * {1: 1.0, 2: 0.5, 3: 2.0}[number]


@idiom(_always(2), _always(3.5), _always(True), _for_each, default=2)
def number_or_tensor(net: Any, y: Tensor, gain: Any) -> Tensor:
    if isinstance(gain, Tensor):
        return y * gain.view(-1, 1, 1, 1)
    return y + 1 if isinstance(gain, bool) else y * gain if isinstance(gain, float) else y / gain


@idiom(_always(1.0), _always(2.5), _always(4.0), default=1.0)
def threshold(net: Any, y: Tensor, gain: Any) -> Tensor:
    return y * gain if gain > 2 else y - gain


@idiom(
    _always({}),
    lambda image: {"mask": _map_of(image)},
    lambda image: {"gain": 2.0, "mask": _map_of(image)},
    _always({"gain": 3.0, "further": None}),
    default={},
)
def further(net: Any, y: Tensor, values: Any) -> Tensor:
    for key in values:
        y = y + len(key)
    y = y * values["mask"] if "mask" in values else y
    return y * values.get("gain", 1.5) + len(values)


@idiom(
    lambda image: [_map_of(image)],
    lambda image: [_map_of(image)] * 3,
    lambda image: (_map_of(image),),
    _always([]),
)
def list_of_maps(net: Any, y: Tensor, maps: Any) -> Tensor:
    if isinstance(maps, tuple):
        return y - maps[0]
    return torch.stack([y * one for one in maps]).sum(0) if maps else y


@idiom(
    _map_of,
    lambda image: _map_of(image)[:, 0],
    lambda image: _map_of(image)[0, 0],
    lambda image: _map_of(image) > 0,
)
def axes_and_type(net: Any, y: Tensor, weights: Any) -> Tensor:
    if weights is None:
        return y
    if not weights.is_floating_point():
        return torch.where(weights, y, -y)
    return y * weights if weights.ndim == 4 else y + (weights[:, None] if weights.dim() == 3 else 2 * weights)


@idiom(lambda image: image[:, :2], lambda image: image[:, :1], lambda image: torch.cat([image, image], 1))
def channels_of_another_image(net: Any, y: Tensor, other: Any) -> Tensor:
    if other is None:
        return y
    return sum(y * F.avg_pool2d(other[:, place : place + 1], 4) for place in range(other.shape[1]))


@idiom(_always(None))
def images_one_by_one(net: Any, y: Tensor, _: Any) -> Tensor:
    return torch.stack([image / (1 + image.abs().amax()) for image in y.unbind(0)])


@idiom(_always(1), _always(2), default=1)
def chunks_of_the_batch(net: Any, y: Tensor, count: Any) -> Tensor:
    return torch.cat([part - part.mean() for part in torch.split(y, count)])


@idiom(_always(None))
def strips(net: Any, y: Tensor, _: Any) -> Tensor:
    return torch.cat([strip - strip.amax((2, 3), keepdim=True) for strip in y.split(5, 2)], 2)


@idiom(_always(None))
def parity(net: Any, y: Tensor, _: Any) -> Tensor:
    y = F.pad(y, (1, 0)) if y.shape[3] % 2 else y
    return y + net.gains_of_sizes[str(y.shape[2] % 3)]


@idiom(_always(None))
def channels_by_hand(net: Any, y: Tensor, _: Any) -> Tensor:
    return torch.stack([channel * place for place, channel in enumerate(y.unbind(1))], 1)


class Asking(nn.Module):
    """An encoder to output stride 4 and a head, with the idioms of these names before the head."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.branches = nn.ModuleDict({f"x{number}": nn.Conv2d(8, 8, 1) for number in (1, 2, 3)})
        self.gain_1, self.gain_2, self.gain_3 = 0.5, 1.0, 2.0
        self.gains_of_sizes = {"0": 0.0, "1": 1.0, "2": -1.0}
        self.head = nn.Conv2d(8, 2, 1)
        self.first, self.second = first, second
        self.defaults = IDIOMS[first].default, IDIOMS[second].default

    def forward(self, image: Tensor, value: Any = "default", other: Any = "default") -> Tensor:
        y = F.relu(self.two(F.relu(self.one(image))))
        for name, given, default in zip(
            (self.first, self.second), (value, other), self.defaults, strict=True
        ):
            is_left_out = isinstance(given, str) and given == "default"
            y = IDIOMS[name].use(self, y, default if is_left_out else given)
        return self.head(y)


class AskingByName(Asking):
    """The same with its further arguments by name, in any number."""

    def forward(self, image: Tensor, *more: Any, **named: Any) -> Tensor:  # type: ignore[override]
        values = {**dict(zip(("value", "other"), more, strict=False)), **named}
        return super().forward(image, **values)


@dataclass(frozen=True)
class CallsCase:
    """A network, the call it is converted on, the others, and options of the conversion."""

    model: nn.Module
    example: tuple[Any, ...]
    calls: list[tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)


def random_calls(seed: int) -> CallsCase:
    """Draw a network with arguments and its calls."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    names = draw.sample(sorted(IDIOMS), 2)
    model = randomise(draw.choice([Asking, AskingByName])(*names)).double().eval()

    def call() -> tuple[Any, ...]:
        size = draw.choice([(64, 96), (61, 83), (96, 64), (70, 70)])
        image = torch.rand(draw.choice([1, 2, 3]), 3, *size, dtype=torch.float64)
        count = draw.choice([0, 1, 2, 2])
        return image, *(draw.choice(IDIOMS[name].values)(image) for name in names[:count])

    calls = [call() for _ in range(5)]
    return CallsCase(model, calls[0], calls[1:], draw.choice([{"output_stride": (1, 4)}, {"coarsest": 16}]))
