"""What a converted network shows of its calls is what the original shows, with what the conversion adds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import some
from networks import Undecided, made_once, strided, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.network.model import whole_program


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
    """With their defaults and annotations."""
    make, expected = CONVERSIONS[name]
    signature = inspect.signature(make().forward)
    assert f"({', '.join(signature.parameters)})" == expected
    signature.bind(pixels=EXAMPLE) if "pixels" in expected else signature.bind(EXAMPLE)
    given = inspect.signature(Scaled.forward).parameters
    if "scale" in expected:
        assert [signature.parameters[one] for one in ("pixels", "scale", "others")] == [
            given[one] for one in ("pixels", "scale", "others")
        ]


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


class Backbone(nn.Module):
    """Two maps in a dictionary, at half and an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        half = self.stem(x).relu()
        return {"half": half, "eighth": self.body(half)}


@made_once
def adapted(model: nn.Module | None = None) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return cs.adaptify(
        (model or Backbone()).eval(), "edges", example_input=torch.randn(1, 3, 64, 64), verify_laws=False
    )


def test_a_host_answers_for_its_part() -> None:
    net, x = adapted(Undecided(Backbone())), torch.rand(2, 3, 64, 96)
    part = net.adaptive_part
    assert net.hosts_part and not part.hosts_part and part.adaptive_part is part
    assert net.program is part.program and (net.plan, net.geometry) == (part.plan, part.geometry)
    net.mask = "all"
    assert part.mask is net.mask and part.mask.spec() == "all"
    with net.masked("none"):
        net(x)
    assert net.active_fraction == part.active_fraction == 0
    net(x)
    assert net.active_fraction == 1
    clone = copy.deepcopy(net)
    assert clone.adaptive_part is clone.get_submodule("backbone") is clone.program.net is not part


def test_only_a_network_that_is_adaptive_as_a_whole_has_a_program_of_its_own() -> None:
    net, host = adapted(), adapted(Undecided(Backbone()))
    fast = net.optimize()
    assert whole_program(net, "is none") is net.program and whole_program(fast, "is none") is fast.program
    assert not net.program.is_fused and fast.program.is_fused and host.optimize().program.is_fused
    for other in (host, Backbone(), "net"):
        with pytest.raises(cs.InvalidInput, match=f"{type(other).__name__} is none"):
            whole_program(other, "is none")
