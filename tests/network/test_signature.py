"""What a converted network shows of its calls is what the original shows, with what the conversion adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same, some
from networks import Encoded, strided, unverified
from torch import Tensor, nn

import cadsurgery as cs


class Scaled(nn.Module):
    """Arguments with names, defaults and annotations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.branch = strided(3, outputs=2), nn.Conv2d(2, 2, 3, 1, 1)

    def forward(self, pixels: Tensor, scale: float = 1.0, **others: Any) -> Tensor:
        x = self.trunk(pixels)
        return (x + self.branch(x)) * scale


class Masked(Scaled):
    """An argument that is called as ours."""

    def forward(self, pixels: Tensor, mask: float = 1.0) -> Tensor:  # type: ignore[override]
        return self.trunk(pixels) * mask


class Hosting(nn.Module):
    """Decides by values, so that its backbone alone is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = strided(3, outputs=2)

    def forward(self, pictures: Tensor, least: float = 0.0) -> Tensor:
        found = self.backbone(pictures)
        return found if float(found.detach().max()) > least else -found


EXAMPLE = torch.rand(1, 3, 32, 48)
CONVERSIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "adaptify": (
        lambda: unverified(Scaled().eval(), "edges", example_input=EXAMPLE),
        "(pixels, scale, mask, sizes, others)",
    ),
    "an own mask": (
        lambda: unverified(Masked().eval(), "edges", example_input=EXAMPLE),
        "(pixels, mask, sizes)",
    ),
    "optimize": (
        lambda: unverified(Scaled().eval(), "edges", example_input=EXAMPLE).optimize(),
        "(pixels, scale, mask, sizes, others)",
    ),
    "hosted": (lambda: unverified(Hosting().eval(), "edges"), "(pictures, least, mask, sizes)"),
    "anytime": (lambda: cs.anytime(Scaled().eval(), exits=["trunk.1"]), "(pixels, scale, threshold, others)"),
    "resample": (lambda: cs.resample(Scaled().eval(), size=(16, 24)), "(pixels, scale, others)"),
    "sample": (lambda: cs.sample(Scaled().eval()), "(pixels, scale, others)"),
}


@pytest.mark.parametrize("name", some(CONVERSIONS))
def test_a_converted_network_shows_the_arguments_of_the_original(name: str) -> None:
    make, expected = CONVERSIONS[name]
    signature = inspect.signature(make().forward)
    assert f"({', '.join(signature.parameters)})" == expected
    signature.bind(pixels=EXAMPLE) if "pixels" in expected else signature.bind(EXAMPLE)


def test_defaults_and_annotations_are_shown() -> None:
    shown = inspect.signature(unverified(Scaled().eval(), "edges", example_input=EXAMPLE).forward).parameters
    given = inspect.signature(Scaled.forward).parameters
    assert [shown[name] for name in ("pixels", "scale", "others")] == [
        given[name] for name in ("pixels", "scale", "others")
    ]


@torch.no_grad()
def test_exporters_take_it() -> None:
    """They read the signature and the place of its code."""
    net = unverified(Encoded(lambda net, image, z: net.head(z)).eval(), "none", example_input=EXAMPLE)
    program = torch.export.export(net, (EXAMPLE,))
    assert_same(program.module()(EXAMPLE), net(EXAMPLE), 1e-5)


class Library(Scaled):
    """What libraries add to networks: a configuration, properties, methods that store or run the network."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"channels": 2}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError

    def predict(self, pixels: Tensor) -> Tensor:
        return self.forward(pixels)


@pytest.mark.parametrize(("name", "instead"), [("save_pretrained", "cs.save"), ("predict", "model.predict")])
def test_methods_of_the_original_name_what_to_call_instead(name: str, instead: str) -> None:
    net = unverified(Library().eval(), "edges", example_input=EXAMPLE)
    assert net.config == {"channels": 2} and net.device == torch.device("cpu")
    assert not hasattr(net, name)
    with pytest.raises(cs.NotConverted, match=instead):
        getattr(net, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = net.nothing


@pytest.mark.slow
def test_files_take_named_arguments_as_calls_do(tmp_path: Any) -> None:
    """And so does the example: preprocessors give dictionaries of their own kind."""
    from collections import UserDict

    call = UserDict(pixels=EXAMPLE)
    net = unverified(Scaled().eval(), "edges", example_input=call)
    written = cs.export(net, call, tmp_path / "net.onnx")
    assert written.inputs == ("pixels",)
