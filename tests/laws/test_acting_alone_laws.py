"""Whatever acts on each position of a map alone stays in the region: all that torch offers, sorted by experiment.

Every function of torch and of `torch.nn.functional`, and every module that can be called on a map, is tried with
several arguments. If a pixel changes the result at its own
position only, wherever it is, then the operation must have a rule, and the converted network equals the original at its
own level.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, some
from networks import Encoded, unverified
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cadsurgery as cs

TOGETHER = 12  # operations in one network
C = 6
MAP = torch.rand(3, C, 7, 9, generator=torch.Generator().manual_seed(0)) + 0.1
PICKED = torch.tensor([2, 0, 1])
# Stand for another map, for the map's truth values, and for numbers of channels.
OTHER, MASK, CHANNELS = "another map", "truth values", "channels"
ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((2,), {}),
    ((), {"dim": 1}),
    ((2, 1), {}),
    ((0.1, 0.5), {}),
    ((OTHER,), {}),
    ((OTHER, OTHER), {}),
    ((MASK, 0.0), {}),
    (([1],), {}),
    ((1, CHANNELS), {}),
    (((1,), (1,)), {}),
    ((1, 2, 1, 1), {}),
    (((1, 2, 1, 1),), {}),
]
# Random, in place of storage, or not for maps at all.
UNUSABLE = (
    *("rand", "normal", "bernoulli", "poisson", "exponential", "geometric", "cauchy"),
    *("log_normal", "uniform", "multinomial", "dropout", "alpha_dropout", "feature_", "gumbel"),
    *("rrelu", "binomial", "empty", "new", "native_", "save", "load", "set_", "share", "resize"),
    *("quantize", "dequantize", "sparse", "compile", "fork", "import", "seed", "use_deterministic"),
    *("manual_seed", "cuda", "xpu", "mps", "ipu", "hpu", "mtia", "vulkan", "dlpack", "jit"),
    *("typename", "is_", "from_", "tensor", "as_tensor", "asarray", "_", "sym_", "get_", "hash_tensor"),
    *("resolve", "fbgemm", "unique"),
)
# Act alone with these arguments, and are left out on purpose.
LEFT_OUT = {
    **dict.fromkeys(("avg_pool3d", "max_pool3d", "lp_pool3d", "lp_pool2d"), "windows of other maps"),
    **dict.fromkeys(("max_pool3d_with_indices", "to_dense", "CrossMapLRN2d"), "of other maps"),
    **dict.fromkeys(
        ("flipud", "fliplr", "hsplit", "msort", "gradient", "rot90"), "name axes of other tensors"
    ),
    **dict.fromkeys(("trapezoid", "trapz", "cumulative_trapezoid"), "integrals, of no network"),
    **dict.fromkeys(
        ("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors"), "return what they are given"
    ),
    **dict.fromkeys(("frexp", "isin", "mvlgamma", "multigammaln"), "of no network"),
    **dict.fromkeys(("slice_scatter", "slice_inverse", "scatter", "index"), "writes or reads at places"),
    **dict.fromkeys(("frobenius_norm",), "not public"),
    **dict.fromkeys(("acosh", "arccosh"), "NaN below one"),
    **dict.fromkeys(("eq", "ne", "not_equal", "isclose"), "rounding decides between interpolated values"),
    **dict.fromkeys(("__eq__", "__ne__"), "rounding decides between interpolated values"),
}


def without_use(name: str) -> bool:
    is_loss = "loss" in name or name in ("binary_cross_entropy_with_logits", "kl_div")
    return name.startswith(UNUSABLE) or name.endswith("_copy") or is_loss or name.rstrip("_") in LEFT_OUT


class Asked(nn.Module):
    """Calls one operation between strided convolutions."""

    def __init__(
        self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.call, self.arguments, self.options = name, call, arguments, options
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, 2, 1), nn.Conv2d(C, C, 3, 2, 1), nn.Sigmoid())
        self.other = nn.Sequential(nn.Conv2d(C, C, 1), nn.Sigmoid())
        self.register_buffer("picked", PICKED)
        self.head = nn.Conv2d(self.channels(MAP.clone()).shape[1], 4, 3, 2, 1)

    def ask(self, y: Tensor, other: Tensor) -> Any:
        stand_ins = {OTHER: other, MASK: other > 0.5, CHANNELS: self.picked}
        given = [stand_ins[value] if isinstance(value, str) else value for value in self.arguments]
        result = self.call(y, *given, **self.options)
        return result[0] if isinstance(result, (tuple, list)) else result

    def channels(self, y: Tensor) -> Tensor:
        """The result as a map (B, C, H, W)."""
        return self.as_map(self.ask(y, y.flip(0) * 0.7))

    def as_map(self, result: Any) -> Any:
        if result.dim() == 3:
            result = result.unsqueeze(1)
        if result.dim() == 5:
            result = result.flatten(1, 2)
        return result if result.is_complex() else result.float()

    def behind(self, stem: Tensor) -> Tensor:
        y = stem + 0.1
        result: Tensor = self.head(self.as_map(self.ask(y, self.other(y))))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.stem(x))


class Together(nn.Module):
    """Several of them behind the stem of the first, since a conversion takes longer than a call; most of the work is
    behind all of them, or else they would stay dense."""

    def __init__(self, parts: Sequence[Asked]) -> None:
        super().__init__()
        self.parts, self.last = nn.ModuleList(parts), nn.Conv2d(4 * len(parts), 64, 3, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        stem = self.parts[0].stem(x)
        results = [part.behind(stem) for part in self.parts]
        return [*results, self.last(torch.cat(results, 1))]


def acts_alone(net: Asked) -> bool:
    """True if a pixel changes the result at its own position only, in the same way at every position."""
    results = net.channels(MAP.clone())
    if (
        not bool(results.isfinite().all())
        or results.dim() != 4
        or results.shape[0] != 3
        or results.shape[2:] != MAP.shape[2:]
    ):
        return False
    changed = MAP.clone()
    changed[0, :, 3, 4] = torch.tensor([0.9, 0.11, 0.35, 0.6, 0.2, 0.77])
    differs = (net.channels(changed) != results) & ~(results != results)
    differs[:, :, 3, 4] = False
    moved = net.channels(MAP.roll((1, 2), (2, 3)))
    alike = torch.allclose(moved, results.roll((1, 2), (2, 3)), 1e-4, 1e-4, equal_nan=True)
    return not bool(differs.any()) and alike


def nets(name: str, call: Callable[..., Any]) -> Iterator[Asked]:
    """Yield networks around a call, with those arguments by which it acts on each position alone."""
    for arguments, options in ARGUMENTS:
        try:
            net = Asked(name, call, arguments, options)
            alone = acts_alone(net)
            net(torch.rand(1, 3, 32, 32))
        except Exception:  # arguments of another operation; torch raises any error
            continue
        if alone:
            yield net.eval()


def faults(nets: Sequence[Asked]) -> dict[str, str]:
    """Return what is wrong with each of the converted networks of which something is."""
    if not fault(Together(nets).eval()):
        return {}
    return {f"{net.name}{net.arguments}{net.options}": problem for net in nets if (problem := fault(net))}


def fault(net: nn.Module) -> str:
    """Return what is wrong with a converted network, or ""."""
    image = torch.rand(1, 3, 40, 56)
    try:
        adaptive = unverified(net, "none", example_input=torch.rand(1, 3, 32, 48), outputs="native")
    except cs.CadError as error:
        return str(error)
    ends = [decision.reason for decision in adaptive.plan.decisions if decision.action == "barrier"]
    if ends:
        return "; ".join(ends)
    found, expected = (tree_leaves(one(image)) for one in (adaptive, net))
    error = max(map(relative_error, found, expected))
    return f"error {error}" * (error > 1e-4)


SPACES: dict[str, Callable[[], dict[str, Callable[..., Any]]]] = {
    "torch": lambda: functions(torch),
    "torch.nn.functional": lambda: functions(F),
    "modules": lambda: modules(),
}


def functions(space: Any) -> dict[str, Callable[..., Any]]:
    values = {name: getattr(space, name) for name in dir(space)}
    return {name: value for name, value in values.items() if callable(value) and not isinstance(value, type)}


# Modules that are random in training or made for other tensors; those that end in a loss.
OTHER_MODULES = ("Module", "Container", "Sequential", "Identity", "Lazy", "Transformer", "RNN", "LSTM", "GRU")


def modules() -> dict[str, Callable[..., Any]]:
    kinds = {
        name: kind for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)
    }
    return {
        name: built
        for name, kind in kinds.items()
        if not name.startswith(OTHER_MODULES)
        and not name.endswith(("Loss", "Cell", "3d", "1d", "List", "Dict"))
        for built in [first_that_builds(kind)]
        if built is not None
    }


def first_that_builds(kind: type[nn.Module]) -> nn.Module | None:
    for arguments in ((), (1,), (2,), (C,), (2, C), (C, C), (C, C, 1), (0.1, 0.5)):
        try:
            built = kind(*arguments)
            built.eval()(MAP.clone())
        except Exception:  # arguments of another module
            continue
        return built
    return None


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_what_acts_on_each_position_alone_stays_in_the_region(space: str) -> None:
    asked: list[Asked] = []
    wrong: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions, and implicit axes
        for name, call in SPACES[space]().items():
            if not without_use(name):
                asked += islice(nets(name, call), 2)
        for first in range(0, len(asked), TOGETHER):
            wrong |= faults(asked[first : first + TOGETHER])
    assert len(asked) > 3
    assert not wrong


def changing(change: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """A network with a function of its map and another one of the same size."""
    kept = {"other": nn.Conv2d(C, C, 1), "picked": nn.Buffer(PICKED)}
    return Encoded(lambda own, image, y: own.head(change(own, y, own.other(y))), C, **kept).eval()


def twice_in_place(own: Any, y: Tensor, z: Tensor) -> Tensor:
    y[:, 1:3] *= 2
    return y


CHANGES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "in place": twice_in_place,
    "channels by numbers": lambda own, y, z: y[:, [2, 0, 1, 3, 4, 5]],
    "channels by a tensor": lambda own, y, z: torch.cat([y[:, own.picked], z[:, 3:]], 1),
    "larger than the mean": lambda own, y, z: y * (y > y.mean((2, 3), keepdim=True)),
    "repeated": lambda own, y, z: y.repeat(1, 2, 1, 1)[:, 1 : C + 1],
}


@pytest.mark.parametrize("change", some(CHANGES))
def test_channels_that_are_written_or_chosen_stay_in_the_region(change: str) -> None:
    model = changing(CHANGES[change])
    image = torch.rand(2, 3, 40, 56)
    net = unverified(model, "none", example_input=torch.rand(1, 3, 32, 48), outputs="native")
    assert not [decision for decision in net.plan.decisions if decision.action == "barrier"]
    assert relative_error(net(image), model(image)) < 1e-4
    assert relative_error(net.optimize()(image), model(image)) < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own, y, z: y.cumsum(2), "cumsum joins positions along the height"),
        (lambda own, y, z: y.roll(1, 3), "roll joins positions along the width"),
        (lambda own, y, z: y.flip(2, 3), "flip joins positions along the height and the width"),
        (lambda own, y, z: y.sort(dim=0)[0], "sort joins positions along the batch"),
        (lambda own, y, z: y[:, :, 2:], "takes parts of the height"),
        (lambda own, y, z: y[:, :, ::2], "stride (2, 1) differs between the axes"),
        (lambda own, y, z: y * torch.einsum("bchw->bcw", y).unsqueeze(2).sigmoid(), "over the height"),
        (lambda own, y, z: torch.einsum("bchw,hw->bchw", y, y.new_ones(y.shape[2:])), "weighs places"),
        (
            lambda own, y, z: y + torch.einsum("bcn,bcm->bnm", y.flatten(2), y.flatten(2)).mean(),
            "different places of two maps",
        ),
    ],
)
def test_what_joins_positions_says_along_which_axes(change: Any, words: str) -> None:
    plan = cs.plan(changing(change), example_input=torch.rand(3, 3, 32, 48))
    assert words in " ".join(decision.reason for decision in plan.decisions if decision.action == "barrier")


def test_class_numbers_leave_as_scores() -> None:
    """Numbers of classes cannot be interpolated: the scores leave the region, and the network chooses among them."""
    model = Encoded(lambda own, image, y: own.head(y).argmax(1)).eval()
    net = unverified(model, "none", example_input=torch.rand(1, 3, 32, 48), outputs="native")
    image = torch.rand(2, 3, 40, 56)
    assert torch.equal(net(image), model(image))
    assert [decision.operation for decision in net.plan.decisions if decision.action == "barrier"] == [
        "Tensor.argmax"
    ]
