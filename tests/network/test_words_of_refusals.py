"""Refusals that users can act on: the range of float16, amounts of memory, and no words of torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import images
from networks import Composed, unverified
from torch import Tensor, fx, nn

import cadsurgery as cs
from cadsurgery.following.graphs import Interpreter
from cadsurgery.support.errors import first_line
from cadsurgery.support.memory import bytes_of, in_mebibytes

MASK = "edges | budget:fraction=0.3"


def network(factor: float, of: str) -> nn.Sequential:
    """A network whose values, or weights, are large in the middle only."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    with torch.no_grad():
        if of == "weights":
            layers[0].weight.mul_(1 / factor)  # type: ignore[operator, union-attr]
            layers[0].bias.mul_(1 / factor)  # type: ignore[operator, union-attr]
        layers[2].weight.mul_(factor)  # type: ignore[operator, union-attr]
        if of == "values":
            layers[2].weight.mul_(0.1)  # type: ignore[operator, union-attr]
            layers[0].weight.mul_(10)  # type: ignore[operator, union-attr]
            layers[4].weight.mul_(1 / factor)  # type: ignore[operator, union-attr]
    return nn.Sequential(*layers).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "of", "factor"),
    [  # programs have the type of the network
        ("net.onnx", "a file in float16", "values", 3e5),
        ("net.pt2", "a network in float16", "weights", 1e7),
        ("net.onnx", "a file in float16", "weights", 1e7),
        ("net.onnx", "a network in float16", "weights", 1e7),
        ("net.pt2", "a network in float16", "values", 3e5),
    ],
)
def test_values_beyond_float16_are_named_with_their_layer(
    name: str, how: str, of: str, factor: float, tmp_path: Path
) -> None:
    net, x = unverified(network(factor, of), MASK, normalisation="imagenet"), images(1, 64, 96)
    precision = "float16" if how == "a file in float16" else "float"
    if precision == "float":
        net, x = net.half(), x.half()
    with pytest.raises(cs.CannotConvert, match=r"(?s)reach .*65504.*bfloat16") as caught:
        cs.export(net, x, tmp_path / name, precision=precision)
    assert ("2.weight" if of == "weights" else "conv2d") in caught.value.where
    assert "report it" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [1, 700, 2**20, 3 * 2**20 + 12345, 2**33])
@pytest.mark.parametrize("more", [1, 17, 2000, 2**20])
def test_two_amounts_are_told_apart_and_read_back_as_no_less(scale: int, more: int) -> None:
    low, high = in_mebibytes(scale, scale + more), in_mebibytes(scale + more, scale)
    assert low != high
    assert in_mebibytes(scale, scale) == in_mebibytes(scale)
    for text, amount in ((low, scale), (high, scale + more)):
        assert bytes_of(text.replace(" ", "")) >= amount


def refusing(error: str) -> nn.Module:
    """Refuses sizes in the middle, with a message or without."""
    one, two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, 2, 1)
    return Composed(lambda net, x: net.two(refuse(net.one(x), error)), one=one, two=two).eval()


ERRORS: dict[str, Callable[[], Exception]] = {
    "in words": lambda: ValueError("too high"),
    "a key": lambda: KeyError("size"),
    "without words": lambda: AssertionError(),
}


def refuse(y: Tensor, error: str) -> Tensor:
    if y.shape[2] > 40:
        raise ERRORS[error]()
    return y * 2


fx.wrap("refuse")


def _messages(error: BaseException | None) -> str:
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(found)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: net(x),
        lambda net, x: net.macs(x),
        lambda net, x: net(x, mask="none"),
        lambda net, x: cs.adaptify(refusing("in words"), example_input=x),
    ],
    ids=["call", "macs", "given", "conversion"],
)
def test_torch_fx_does_not_speak_behind_errors(call: Callable[[Any, Any], Any], error: str) -> None:
    net = unverified(refusing(error), "edges", example_input=images(1, 64, 96))
    with pytest.raises(Exception) as caught:
        call(net, images(1, 128, 96))
    assert "While executing" not in _messages(caught.value) and "tlparse" not in _messages(caught.value)


def test_own_interpreters_are_silent_and_none_is_torchs() -> None:
    def kinds(base: type) -> set[type]:
        return {base}.union(*(kinds(kind) for kind in base.__subclasses__()))

    ours = {kind for kind in kinds(fx.Interpreter) if kind.__module__.startswith("cadsurgery.")}
    assert ours and all(issubclass(kind, Interpreter) for kind in ours)


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert first_line(AssertionError("While executing %relu : [num_users=1]\n...")) == "AssertionError"
