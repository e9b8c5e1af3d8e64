"""What a network's Python code asks of tensors, fills them with, and keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, relative_error, some
from networks import Encoded, converted_quietly, followed, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.surgery.rules import read


def check(model: nn.Module) -> None:
    """The converted network and its optimised copy compute what the network does, at another size."""
    net, other = converted_quietly(model), torch.rand(2, 3, 56, 88)
    with torch.no_grad():
        expected = model(other)
        for one in (net, net.optimize()):
            assert relative_error(one(other), expected) < 1e-4


Then = Callable[[Any, Tensor, Tensor], Tensor]

# Of others `test_all_that_a_tensor_says_without_its_pixels_is_answered` asks.
FACTS: dict[str, Callable[[Tensor], bool]] = {
    "torch.is_floating_point": lambda y: torch.is_floating_point(y),
    "torch.is_complex": lambda y: not torch.is_complex(y),
    "finfo": lambda y: torch.finfo(y.dtype).max > 1,
    "nbytes": lambda y: y.nbytes > 0,
    "device": lambda y: y.device.type == "cpu",
    "tracing": lambda y: torch.jit.is_tracing(),
    "not tracing": lambda y: not torch.jit.is_tracing(),
    "an instance": lambda y: isinstance(y, torch.Tensor),
    "the name of its type": lambda y: y.type() == "torch.FloatTensor",
}
FILLED: dict[str, Callable[[Tensor], Tensor]] = {
    "new_zeros of one": lambda y: y.new_zeros(1),
    "new_ones of channels": lambda y: y.new_ones(8, 1, 1),
    "new_full of one": lambda y: y.new_full((1,), 0.3),
    "full of channels": lambda y: torch.full((8, 1, 1), 0.3),
    "zeros of channels": lambda y: torch.zeros(8, 1, 1),
    "a number": lambda y: torch.tensor(0.3),
    "torch.Tensor": lambda y: torch.Tensor(y.shape[0], 1, y.shape[2], y.shape[3]).fill_(0.5).to(y),
    "torch.Tensor of a size": lambda y: torch.Tensor(torch.Size((y.shape[2], y.shape[3]))).fill_(0.5).to(y),
    "torch.FloatTensor": lambda y: torch.FloatTensor(y.size(2), 1).zero_().to(y),
}


def checked(own: Any, image: Tensor, y: Tensor) -> Tensor:
    torch._check(y.shape[2] * y.shape[3] >= 16, lambda: f"too small: {y.shape}")
    return y


def whole(x: Any) -> Any:
    return x.to(torch.int64) if torch.jit.is_tracing() and isinstance(x, Tensor) else int(x)


def asks_whether_jit_traces(own: Any, image: Tensor, y: Tensor) -> Tensor:
    high, wide = y.shape[2:]
    if torch.jit.is_tracing():
        high, wide = whole(torch.ceil(high / 2)), whole(torch.ceil(wide / 2))
    else:
        high, wide = math.ceil(high / 2), math.ceil(wide / 2)
    return y + F.interpolate(F.adaptive_avg_pool2d(y, (high, wide)), size=y.shape[2:])


def branching(own: Any, image: Tensor, y: Tensor) -> Tensor:
    if y.requires_grad:
        return own.head(y * 2)
    return own.head(y * 2)


def of_fact(fact: Callable[[Tensor], bool]) -> Then:
    return lambda own, image, y: own.head(2 * y) if fact(y) else own.head(y)


def of_filled(fill: Callable[[Tensor], Tensor]) -> Then:
    return lambda own, image, y: own.head((y + fill(y)) * (fill(y) + 2))


def of_layout(fact: Callable[[Tensor], bool]) -> Then:
    def branch(own: Any, image: Tensor, y: Tensor) -> Tensor:
        if fact(y):
            return own.head(y)
        return own.head(y.contiguous() * 2) / 2 + own.head.bias.view(1, -1, 1, 1) / 2

    return branch


LAYOUTS: dict[str, Callable[[Tensor], bool]] = {
    "is_contiguous": lambda y: y.is_contiguous(),
    "channels last": lambda y: not y.is_contiguous(memory_format=torch.channels_last),
    "stride": lambda y: y.stride()[1] != 1,
    "stride of an axis": lambda y: y.stride(1) > y.stride(3),
}
# Facts that no pixel decides, tensors of fewer axes, branches that compute the same on both ways.
USES: dict[str, Then] = {
    **{name: of_fact(fact) for name, fact in FACTS.items()},
    **{name: of_filled(fill) for name, fill in FILLED.items()},
    **{f"{name} of the same": of_layout(fact) for name, fact in LAYOUTS.items()},
    "gradients of the same": branching,
    "a check of sizes": checked,
    "whether jit traces": asks_whether_jit_traces,
}


@pytest.mark.parametrize("name", some(USES))
def test_what_code_asks_of_tensors_and_makes_of_them_is_followed(name: str) -> None:
    check(Encoded(USES[name]))


# What a tensor says of its memory or its history: other tensors of equal values say something else.
OF_MEMORY = {
    *("data_ptr", "const_data_ptr", "storage", "untyped_storage", "storage_type", "stride", "dim_order"),
    *("is_contiguous", "type", "grad", "grad_fn", "grad_dtype", "is_leaf", "requires_grad", "output_nr"),
    *("name", "get_device", "nbytes"),
}


def say_something_else_of_other_pixels(name: str) -> bool:
    """True if a fact of a tensor depends on its values, is no fact at all, or is one of its memory."""
    said = []
    for seed in (0, 1):
        tensor = torch.rand(2, 6, 8, 12, generator=torch.Generator().manual_seed(seed))
        try:
            said.append(asked(tensor, name))
        except Exception:  # of other tensors, or with arguments; torch raises any error
            return True
    return not isinstance(said[0], (bool, int, torch.dtype, torch.layout)) or said[0] != said[1]


def asked(tensor: Any, name: str) -> Any:
    return getattr(tensor, name)() if callable(getattr(torch.rand(1), name)) else getattr(tensor, name)


@pytest.mark.slow
def test_all_that_a_tensor_says_without_its_pixels_is_answered() -> None:
    names = [name for name in dir(Tensor) if not name.startswith("_") and name not in OF_MEMORY]
    facts = [name for name in names if not say_something_else_of_other_pixels(name)]
    problems = {name: problem for name in facts if (problem := problem_with(name))}
    assert len(facts) > 20
    assert problems == {}


def problem_with(name: str) -> str:
    def then(own: Any, image: Tensor, y: Tensor) -> Tensor:
        result: Tensor = own.head(y * 2 if asked(y, name) else y)
        return result

    try:
        check(Encoded(then))
    except (cs.CadError, AssertionError) as error:
        return str(error)
    return ""


def _places(y: Tensor) -> Tensor:
    axes = [torch.arange(length) for length in y.shape[-2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "type by name": lambda y: _places(y).type(y.type()),
    "type of a constant by name": lambda y: torch.arange(2).type(y.type()).view(1, 2, 1, 1),
    "type of a name": lambda y: _places(y).type("torch.FloatTensor"),
    "type of a class": lambda y: _places(y).type(torch.FloatTensor),
    "type of a dtype": lambda y: _places(y).type(y.dtype),
    "to a dtype": lambda y: _places(y).to(y.dtype),
    "constant to a dtype": lambda y: torch.arange(2).to(y.dtype).view(1, 2, 1, 1),
    "constant to device and dtype": lambda y: torch.arange(2).to(y.device, y.dtype).view(1, 2, 1, 1),
    "of the map": lambda y: y[:, :2].double().type(y.type()),
}


@pytest.mark.parametrize("name", some(TYPES))
def test_types_are_those_of_this_call(name: str) -> None:
    of_type = TYPES[name]
    model = Encoded(lambda own, image, y: own.head(torch.cat([y[:, :6], y[:, 6:] + 0.1 * of_type(y)], 1)))
    check(model)
    if "of a" not in name:  # else float32 in any network
        image = torch.rand(1, 3, 48, 80)
        with torch.no_grad():
            halves = converted_quietly(model).half()(image.half())
            assert halves.dtype == torch.float16 and relative_error(halves.float(), model(image)) < 2e-2


def _count(own: Any, image: Tensor, y: Tensor) -> Tensor:
    own.count += 1
    own.calls += 1
    own.last = y
    return own.head(y)


def test_what_forward_assigns_and_does_not_return_is_left_alone() -> None:
    model = Encoded(_count, count=nn.Buffer(torch.ones(())), calls=0, last=None).eval()
    count, before = model.count, {name: value for name, value in vars(model).items() if name[0] != "_"}
    net = converted_quietly(model)
    assert model.count is count and count == 1
    assert all(vars(model)[name] is value for name, value in before.items())
    other = torch.rand(1, 3, 48, 80)
    with torch.no_grad():
        assert relative_error(net(other), model.head(model.encode(other))) < 1e-4


def test_a_buffer_that_the_next_call_depends_on_is_refused() -> None:
    def scaled(own: Any, image: Tensor, y: Tensor) -> Tensor:
        own.count = own.count * 0.9
        return own.head(y) * own.count

    with pytest.raises(cs.CannotConvert, match=r"own\.count \* 0\.9\n.*assigns count, on which"):
        followed(Encoded(scaled, count=nn.Buffer(torch.ones(()))))


REFUSED = {"gradients": (lambda y: y.requires_grad, "where gradients are needed")} | {
    name: (fact, "another memory layout") for name, fact in LAYOUTS.items()
}


@pytest.mark.parametrize(("name", "of"), covering([*REFUSED], ["image", "map"]))
def test_a_branch_on_what_no_call_promises_is_refused_where_both_ways_differ(name: str, of: str) -> None:
    fact, words = REFUSED[name]

    def branch(own: Any, image: Tensor, y: Tensor) -> Tensor:
        return own.head(y) if fact(image if of == "image" else y) else own.head(2 * y)

    with pytest.raises(cs.CannotConvert, match=rf"{words}, at test_asked_of_tensors\.py"):
        followed(Encoded(branch))


def by_shape(x: Tensor, radix: int) -> Any:
    _, channels = x.shape[:2]
    return torch.split(x, channels // radix, dim=1)


def by_size(x: Tensor, radix: int) -> Any:
    return x.split(int(x.size(1) // radix), 1)


def by_chunk(x: Tensor, radix: int) -> Any:
    return torch.chunk(x, radix, 1)


def attending(split: Callable[[Tensor, int], Any], radix: int, times: int = 1) -> nn.Module:
    """Parts of the channels are added by Python's `sum`, and weighed by what their mean says (ResNeSt)."""

    def then(own: Any, image: Tensor, y: Tensor) -> Tensor:
        for _ in range(times):
            parts = split(y, radix)
            gap = own.head(F.adaptive_avg_pool2d(torch.cat([sum(parts)] * radix, 1), 1))
            shares = F.softmax(gap.view(y.size(0), 1, radix, -1).transpose(1, 2), dim=1)
            weights = split(shares.reshape(y.size(0), -1, 1, 1), radix)
            y = own.head(torch.cat([share * part for share, part in zip(weights, parts, strict=True)], 1))
        return y.contiguous()

    return Encoded(then).eval().double()


@pytest.mark.parametrize(
    ("split", "radix", "options"),
    covering([by_shape, by_size, by_chunk], [2, 4], [{"coarsest": 16}, {"output_stride": (2, 8)}]),
)
@torch.no_grad()
def test_parts_of_channels_are_as_many_in_every_call(
    split: Callable[[Tensor, int], Any], radix: int, options: dict[str, Any]
) -> None:
    model = attending(split, radix)
    net, x = unverified(model, "none", outputs="native", **options), torch.rand(2, 3, 50, 70).double()
    assert_same(net(x, mask="all" if net.plan.floors else "none"), model(x))
    assert not net.plan.chosen("barrier")


@pytest.mark.slow
def test_a_deep_network_is_read_without_recursion() -> None:
    """What a number is computed from is followed through all layers before it."""
    graph = read(attending(by_shape, 2, 40), {"image": torch.rand(1, 3, 32, 32).double()}).graph
    assert len(graph.nodes) > 1000


# -- plain tensors and sizes ---------------------------------------------------------------------------

OF_SIZES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "expand": lambda code, b, w: code.expand(b, -1, -1, -1),
    "repeat": lambda code, b, w: code.repeat(b, 1, 1, 1),
    "tile": lambda code, b, w: code.tile((b, 1, 1, 1)),
    "view": lambda code, b, w: code.view(1, -1, 1, w // w),
    "reshape": lambda code, b, w: code.reshape((w // w, 4, 1, 1)),
    "narrow": lambda code, b, w: code.narrow(0, 0, w // w),
    "roll": lambda code, b, w: code.roll(w, 1),
    "repeat_interleave": lambda code, b, w: code.repeat_interleave(b, 0),
    "select": lambda code, b, w: code.select(0, w - w)[None],
    "split": lambda code, b, w: code.split(w, 1)[0],
    "slice": lambda code, b, w: code[: w // w],
    "new_zeros": lambda code, b, w: code + code.new_zeros((b, 1, 1, 1)),
    "clamp": lambda code, b, w: code.clamp(max=w / 100),
}


@pytest.mark.parametrize("name", some(OF_SIZES))
def test_a_plain_tensor_takes_sizes_of_the_image(name: str) -> None:
    """It is an attribute of the network, and neither a parameter nor a buffer."""

    def coded(own: Any, image: Tensor, y: Tensor) -> Tensor:
        return own.head(y * OF_SIZES[name](own.table, image.shape[0], image.shape[3]))

    check(Encoded(coded, 4, table=torch.rand(1, 4, 1, 1)))
