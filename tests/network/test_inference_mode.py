"""What is made in `torch.inference_mode` is trained afterwards, and what cannot be says so in words about that mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering, images
from networks import Encoded, Segmenter, seeded, unverified
from torch import nn

import cadsurgery as cs


def _saved(model: nn.Module, x: Any, folder: Path) -> nn.Module:
    cs.save(cs.adaptify(model, "edges", verify_laws=False), folder / "net.safetensors")
    return cs.load(folder / "net.safetensors", seeded(Segmenter, torch.float32))


def _refined(model: nn.Module, x: Any, folder: Path) -> nn.Module:
    net = unverified(model, "edges", example_input=x)
    net.add_refinement()
    return net


MADE: dict[str, Callable[[nn.Module, Any, Path], nn.Module]] = {
    "strides": lambda model, x, folder: unverified(model, "edges"),
    "an example of that mode": lambda model, x, folder: unverified(model, "edges", example_input=x),
    "arguments of that mode": lambda model, x, folder: unverified(model, "edges", example_input={"x": x}),
    "floors": lambda model, x, folder: unverified(model, "edges", coarsest=32, example_input=x),
    "a learned mask": lambda model, x, folder: unverified(model, "learned", example_input=x),
    "a refinement": _refined,
    "a file": _saved,
    "a sampled input": lambda model, x, folder: cs.resample(model, size=(32, 48)),
}


@pytest.mark.parametrize(("make", "is_called"), covering([*MADE], [False, True]))
def test_what_is_made_in_inference_mode_is_trained(make: str, is_called: bool, tmp_path: Path) -> None:
    model = seeded(Segmenter, torch.float32)
    with torch.inference_mode():
        net = MADE[make](model, images(1, 64, 96), tmp_path)
        if is_called:
            net(images(1, 64, 96))
    assert not any(value.is_inference() for value in (*net.parameters(), *net.buffers()))
    net.train()
    output = net(images(2, 64, 96))
    (output["out"] if isinstance(output, dict) else output).square().sum().backward()
    gradients = [value.grad for value in net.parameters()]
    assert sum(gradient is not None for gradient in gradients) >= 14


def test_a_path_that_is_read_in_inference_mode_is_trained() -> None:
    def branch(own: Any, image: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return own.head(y) + torch.ones(1) * y.shape[3] if y.shape[2] > 20 else own.head(2 * y)

    net = cs.adaptify(Encoded(branch).eval(), "edges", verify_laws=False, example_input=images(1, 48, 64))
    with torch.inference_mode():
        net(images(1, 96, 128))
    net(images(1, 96, 128)).sum().backward()
    assert net.head.weight.grad is not None


@pytest.mark.parametrize("size", [(64, 96), (97, 129)])
def test_an_image_of_inference_mode_is_refused_in_training_in_words(size: tuple[int, int]) -> None:
    net = unverified(seeded(Segmenter, torch.float32), "edges", example_input=images(1, 64, 96))
    with torch.inference_mode():
        x = images(1, *size)
    with pytest.raises(cs.InvalidInput, match="inference_mode") as caught:
        net(x)
    assert "resize" not in str(caught.value)
    with torch.no_grad():
        net(x)
