"""What forward keeps for its next call is computed from the sizes of each call, or refused; networks are left alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering, relative_error
from networks import Composed, Encoded, converted_quietly, followed
from torch import Tensor, fx, nn

import cadsurgery as cs

EXAMPLE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
OF_CODE: dict[str, Tensor] = {}  # what a network keeps beside itself


def with_grid(grid_of: Callable[[Any, Tensor], Tensor], **kept: Any) -> nn.Module:
    """A network to whose map a grid is added that a function makes or finds again."""

    def then(own: Any, image: Tensor, y: Tensor) -> Tensor:
        return own.head(torch.cat([y[:, :6], y[:, 6:] + grid_of(own, y)], 1))

    return Encoded(then, store=Store(), **kept)


class Store(nn.Module):
    """A submodule that keeps tensors in a list, which moves with it, and one as a buffer."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.grids = [torch.empty(0)] * 2
        self.register_buffer("grid", torch.zeros(1, 2, 1, 1), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self.grids = list(map(fn, self.grids))
        return moved


def make(y: Tensor) -> Tensor:
    axes = [torch.arange(length, device=y.device) for length in y.shape[-2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].to(y) * 0.1


def fits(grid: Tensor, y: Tensor) -> bool:
    return grid.shape[-2:] == y.shape[-2:]


def as_attribute(own: Any, y: Tensor) -> Tensor:
    if own.grid is None or not fits(own.grid, y):
        own.grid = make(y)
    return own.grid


def as_new_attribute(own: Any, y: Tensor) -> Tensor:
    if not hasattr(own, "grid") or not fits(own.grid, y):
        own.grid = make(y)
    return own.grid


def as_attribute_that_grows(own: Any, y: Tensor) -> Tensor:
    height, width = y.shape[-2:]
    if own.grid is None or own.grid.shape[-2] < height or own.grid.shape[-1] < width:
        own.grid = make(y)
    return own.grid[..., :height, :width]


def beside_its_size(own: Any, y: Tensor) -> Tensor:
    if own.size != y.shape:
        own.grid, own.size = make(y), y.shape
    return own.grid


def in_list(own: Any, y: Tensor) -> Tensor:
    if not fits(own.store.grids[1], y):
        own.store.grids[1] = make(y)
    return own.store.grids[1]


def as_buffer(own: Any, y: Tensor) -> Tensor:
    if not fits(own.store.grid, y):
        own.store.grid = make(y)
    return own.store.grid


def as_new_buffer(own: Any, y: Tensor) -> Tensor:
    if "grid" not in own._buffers or not fits(own.grid, y):
        own.register_buffer("grid", make(y), persistent=False)
    return own.grid


def under_sizes(own: Any, y: Tensor) -> Tensor:
    if (y.shape[2], y.shape[3]) not in own.grids:
        own.grids[(y.shape[2], y.shape[3])] = make(y)
    return own.grids[(y.shape[2], y.shape[3])]


def under_shape(own: Any, y: Tensor) -> Tensor:
    if y.shape[-2:] not in own.grids:
        own.grids[y.shape[-2:]] = make(y)
    return own.grids[y.shape[-2:]]


def under_text(own: Any, y: Tensor) -> Tensor:
    if f"{y.shape[2]}x{y.shape[3]}" not in OF_CODE:
        OF_CODE[f"{y.shape[2]}x{y.shape[3]}"] = make(y)
    return OF_CODE[f"{y.shape[2]}x{y.shape[3]}"]


def _of_type(own: Any, y: Tensor) -> Tensor:
    own.mean = own.mean.type_as(y)
    axes = torch.arange(y.shape[2])[:, None] + torch.arange(y.shape[3])
    return axes.to(y) - own.mean


@functools.cache
def made_once(height: int, width: int) -> Tensor:
    return torch.arange(height)[:, None] * 0.1 + torch.arange(width) * 0.2


def by_function(own: Any, y: Tensor) -> Tensor:
    return made_once(*y.shape[-2:]).to(y)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "as attribute": lambda: with_grid(as_attribute, grid=None),
    "as new attribute": lambda: with_grid(as_new_attribute),
    "as attribute that grows": lambda: with_grid(as_attribute_that_grows, grid=None),
    "beside its size": lambda: with_grid(beside_its_size, grid=torch.empty(0), size=None),
    "in list": lambda: with_grid(in_list),
    "as buffer": lambda: with_grid(as_buffer),
    "as new buffer": lambda: with_grid(as_new_buffer),
    "under sizes": lambda: with_grid(under_sizes, grids={}),
    "under shape": lambda: with_grid(under_shape, grids={}),
    "under text": lambda: with_grid(under_text),
    "by function": lambda: with_grid(by_function),
    "in the type of the map": lambda: with_grid(_of_type, mean=torch.full((1, 1, 1, 1), 0.5)),
}


def check(net: nn.Module, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Images of size A, B and A give what the network gives."""
    other, limit = torch.rand(2, 3, 72, 56), 3e-2 if dtype == torch.float16 else 1e-4
    with torch.no_grad():
        for image in (EXAMPLE, other, EXAMPLE):
            assert relative_error(net(image.to(dtype)).float(), model(image)) < limit


def walk(value: Any) -> Any:
    """All that a value holds, to the object."""
    if isinstance(value, dict):
        return id(value), [(walk(key), walk(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [walk(part) for part in value]
    assert not isinstance(value, fx.Proxy)
    return id(value), value.tolist() if isinstance(value, Tensor) else value


def all_held(model: nn.Module) -> Any:
    return [walk(vars(module)) for module in model.modules()]


@pytest.mark.parametrize(("way", "is_called"), covering([*WAYS], [False, True]))
def test_what_is_kept_is_computed_in_each_call(way: str, is_called: bool, tmp_path: Path) -> None:
    model = WAYS[way]().eval()
    if is_called:
        model(EXAMPLE)
    original, held = copy.deepcopy(model), all_held(model)
    net = converted_quietly(model)
    cs.plan(model, example_input=EXAMPLE)
    assert all_held(model) == held, "the network given is what it was"
    assert not [part for pair in OF_CODE.items() for part in pair if isinstance(part, fx.Proxy)]
    cs.save(net, tmp_path / "net.safetensors")
    for same in (net, copy.deepcopy(net), net.optimize(), cs.load(tmp_path / "net.safetensors", WAYS[way]())):
        check(same, original)
    check(copy.deepcopy(net).half(), original, torch.float16)
    check(copy.deepcopy(net).double(), original, torch.float64)


def _keep_and_raise(own: Any, y: Tensor) -> Tensor:
    own.grid = own.grids[0] = own.by_name["last"] = OF_CODE["last"] = y
    if y.sum() > 0:
        own.grids.append(y)
    return y[:, 6:]


def test_the_network_given_is_what_it_was_when_it_is_refused() -> None:
    model = with_grid(_keep_and_raise, grid=None, grids=[None], by_name={"last": None}).eval()
    held = all_held(model)
    with pytest.raises(cs.CannotConvert, match="decides by values"):
        followed(model)
    assert all_held(model) == held
    assert not isinstance(OF_CODE.pop("last", None), fx.Proxy)


def _first(own: Any, y: Tensor) -> Tensor:
    if own.grid is None:
        own.grid = y.mean((2, 3), keepdim=True)[:1, :2]
    return own.grid


def _running(own: Any, y: Tensor) -> Tensor:
    own.grids[0] = 0.9 * own.grids[0] + y.mean()
    return own.grids[0]


DEPENDING = {
    "first": (lambda: with_grid(_first, grid=None), r"own\.grid = y\.mean.*\n.*assigns grid, on which"),
    "running": (
        lambda: with_grid(_running, grids=[0.0]),
        r"own\.grids\[0\] = .*\n.*assigns grids\[0\], on which",
    ),
}


@pytest.mark.parametrize("name", DEPENDING)
def test_what_depends_on_pixels_of_earlier_calls_is_refused_with_its_line_and_kept_around_a_part(
    name: str,
) -> None:
    build, words = DEPENDING[name]
    with pytest.raises(cs.CannotConvert, match=words):
        followed(build())
    model = build().eval()
    net = converted_quietly(copy.deepcopy(model))
    assert net.plan.part == "encode"
    for image in torch.rand(3, 1, 3, 64, 64):
        assert torch.equal(net(image), model(image))


def test_values_of_an_earlier_trace_are_refused_with_module_and_operation() -> None:
    last: Any = 0.0

    def beside(own: Any, y: Tensor) -> Tensor:
        nonlocal last
        result, last = y[:, 6:] + last, y.mean()
        return result + torch.zeros(y.shape[2], 1)

    with pytest.raises(cs.CannotConvert, match="Encoded uses the result of mean in an earlier call"):
        followed(with_grid(beside))


def test_modules_in_a_plain_list_are_refused_with_what_holds_them() -> None:
    first, others = nn.Conv2d(3, 4, 3, 2, 1), [nn.Conv2d(4, 4, 3, 2, 1)]
    model = Composed(lambda net, x: net.others[0](net.first(x)), first=first, others=others)
    with pytest.raises(cs.CannotConvert, match=r"a module in a plain list .* nn\.ModuleList"):
        followed(model)
