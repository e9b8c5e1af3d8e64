"""Texts that no mask can be made of, and calls that none can be found in: each is refused with what helps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images
from feature_cases import SIZE, Scored, converted
from networks import Composed, adapted_strided, strided
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.masks import (
    Budget,
    FineMapSpec,
    FunctionMask,
    LearnedMask,
    Threshold,
    Union,
    keypoints_at,
    labelled,
    resolve_mask,
)

REFUSED: list[tuple[Any, ...]] = [  # a text, the error, words of it
    # Names and options nobody knows.
    ("edgs", cs.UnknownName, "did you mean edges"),
    ("edges:treshold=0.1", cs.UnknownName, "did you mean threshold"),
    ("", cs.UnknownName),
    ("edges,threshold=1", cs.UnknownName),
    ("edges:threshold=", cs.InvalidInput, "threshold"),
    ("confidence:measure=variance", cs.UnknownName, "measure"),
    ("edges | budget:fraction=half", cs.InvalidInput, "not a number", "fraction=0.3"),
    ("edges | budgt", cs.UnknownName, "did you mean budget"),
    ("edges |", cs.UnknownName, '"edges | budget:fraction=0.3"'),
    # Pipes, pluses and parentheses.
    ("budget | budget", cs.InvalidInput, "'budget' needs another mask", '"edges | budget"'),
    ("| budget", cs.InvalidInput, "nothing stands before the pipe", '"edges | budget"'),
    ("edges | random:seed=3", cs.InvalidInput, "'random' cannot stand behind", '"random:seed=3 | budget'),
    ("+ edges", cs.InvalidInput, "a mask is missing before '+'", "edges + gradient"),
    ("(edges", cs.InvalidInput, "a parenthesis is not closed", "edges + gradient"),
    ("(edges) gradient", cs.InvalidInput, "'gradient' is not expected here", "edges + gradient"),
    ("union", cs.InvalidInput, "'union' needs other masks", "edges + gradient"),
    ("edges | union", cs.InvalidInput, "'union' cannot stand behind a pipe", "edges + gradient"),
    # Functions by name, and keypoints.
    ("usermasks:brigt", cs.UnknownName, "bright"),
    ("nomodule:f", cs.UnknownName, "cannot be imported"),
    ("usermasks:", cs.InvalidInput, "my_module:my_function"),
    ("usermasks:number", cs.InvalidInput, "module:function"),
    ("edges | usermasks:bright", cs.UnknownName, "mask wrapper"),
    ("saliency:threshold=0.5", cs.InvalidInput, "detail", "module:function"),
    ("keypoints:detector=shift", cs.UnknownName, "did you mean sift"),
    ("keypoints:detector=userpoints:corner", cs.UnknownName, "corners"),
]


# By option: words of the refusal, and values that are none of it.
OUT_OF_RANGE: dict[str, tuple[str, str]] = {
    "edges:threshold": ("threshold", "abc 0.1/ nan"),
    "edges:threshold=0.3/0.2/0.1,dilation": ("dilations", "3/5"),
    "random:fraction": ("fraction", "1.5 -0.1 0.1/0.2"),
    "random:block": ("block", "0"),
    "trimap:width": ("width", "4 -3/5"),
    "gradient:sigma": ("sigma", "-1 nan inf"),
    "edges | dilate:size": ("is not odd", "4 0"),
    "edges | threshold:at": ("threshold", "0.2/0.8 nan"),
    "edges | smooth:hold": ("hold=", "-1"),
    "content:share": ("share", "2"),
    "preview:scale": ("scale", "0 2"),
    "edges | budget:fraction": ("0.1/0.3", "0.5/0.2 0.2/1.5 -0.1/0.2 nan/0.5 0.1/nan 1.5 nan"),
    "edges | budget:per_batch": ("per_batch=False", "perhaps"),
    "learned:fraction": ("fraction", "1.1 nan"),
    "learned:temperature": ("temperature", "0 nan"),
    "learned:channels": ("channels", "8/8 8/0/8"),
    "detail:threshold": ("threshold", "1/2 0.1/0.5 nan"),
    "confidence:threshold": ("threshold", "nan"),
    "keypoints:dilations": ("51", "4 5/8/5 5.5 -3 nan wide"),
    "keypoints:count": ("512", "0 1.5"),
}


@pytest.fixture(autouse=True)
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user, with functions and something that is none."""
    for name in ("usermasks", "userpoints"):
        module = ModuleType(name)
        vars(module).update(bright=torch.mean, corners=torch.mean, number=3)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_a_text_that_is_no_mask_is_refused_with_what_helps(row: tuple[Any, ...]) -> None:
    text, kind, *words = row
    with pytest.raises(kind) as caught:
        resolve_mask(text)
    assert caught.value.next and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_an_option_refuses_what_it_cannot_be_and_says_what_it_can(option: str) -> None:
    words, values = OUT_OF_RANGE[option]
    for value in values.split():
        with pytest.raises(cs.InvalidInput) as caught:
            resolve_mask(f"{option}={value}")
        assert caught.value.next and words in str(caught.value), value


@pytest.mark.parametrize("text", ["confidence", "keypoints:detector=own", "preview"])
def test_outside_of_a_network_there_is_no_pass_to_look_at(text: str) -> None:
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(cs.InvalidInput, match=r"no (first pass|preview)"):
        resolve_mask(text)(image, image, FineMapSpec(1, (32, 32), 1, 2, 4, 4))


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("edges:threshold=0.9/0.5/0.1", "thresholds"),
        ("edges | threshold:at=3/2/1", "thresholds"),
        ("trimap:width=1/3/5", "widths"),
        ("keypoints:dilations=1/3/5", "dilations"),
        ("edges | budget:fraction=0.1/0.2/0.3", "fractions"),
    ],
)
def test_more_steps_than_levels_are_refused_with_their_number(text: str, counted: str) -> None:
    net, labels = converted(text), torch.zeros(1, *SIZE, dtype=torch.long)
    with pytest.raises(cs.InvalidInput, match=f"3 {counted} for 2 levels") as caught, labelled(labels):
        net(images(1, *SIZE))
    assert f"at most 2 {counted}" in caught.value.next


@pytest.mark.parametrize("registered", [lambda image: image.mean(1) > 0.5, torch.nn.Identity, 3])
def test_only_classes_of_masks_get_a_name(registered: Any) -> None:
    with pytest.raises(cs.InvalidInput, match="cannot be registered as the mask 'nameless'") as refusal:
        cs.mask_provider("nameless")(registered)
    assert "MaskProvider" in refusal.value.why
    with pytest.raises(cs.UnknownName):
        resolve_mask("nameless")


ONE, TWO = (torch.zeros(batch, 3, 64, 64) for batch in (1, 2))
SHORT = torch.tensor([torch.inf, -torch.inf]).repeat(2, 8, 4)


def net(mask: object) -> cs.AdaptiveModel:
    return adapted_strided(mask)


def of_labels(labels: Any) -> object:
    with labelled(labels):
        return net("trimap")(TWO)


def of_points(count: int) -> object:
    with keypoints_at([torch.zeros(1, 2)] * count):
        return net("keypoints:detector=given")(TWO)


def of_function(returned: Any) -> object:
    grid = FineMapSpec(2, (8, 8), 8, 2, 4, 4)
    return Threshold(FunctionMask(lambda image: returned))(TWO, TWO, grid)


def after_strides(then: Any, mask: str, **options: Any) -> object:
    """A call of a network that gives what a function makes of a map."""
    model = Composed(lambda net, x: then(net.body(x)), body=strided(3, outputs=1)).eval()
    return cs.adaptify(model, mask, example_input=ONE, verify_laws=False, **options)(TWO)


class Added(nn.Sequential):
    """Of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x) + y


def of_two_inputs(mask: str) -> object:
    inputs = ONE, torch.zeros(1, 1, 1, 1)
    model = Added(*strided(3, outputs=1)).eval()
    return cs.adaptify(model, mask, coarsest=32, example_input=inputs, normalisation="raw")(*inputs)


def another(channels: int, low: int) -> object:
    mask = LearnedMask()
    mask.logits(torch.zeros(1, 6, 5, 5), FineMapSpec(1, (5, 5), 4, 2, 4, 4))
    return mask.logits(torch.zeros(1, channels, 5, 5), FineMapSpec(1, (5, 5), 4, low, 2**low, 2**low))


def graph_of(mask: str, folder: Path) -> object:
    return cs.export(converted(mask), images(1, *SIZE), folder / "net.pt2")


def known_as(given: Any) -> None:
    net("edges").normalisation = given


OFF = (torch.zeros(1, 2, 8, 8), torch.zeros(8, 8).long(), torch.zeros(0, 8, 8).long(), "a")
SHAPES = (torch.zeros(2, 2, 8, 8), torch.zeros(1, 8, 8), torch.zeros(8, 8), torch.zeros(2, 0, 8))
REFUSED_CALLS: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (lambda _: net(Budget(Scored(torch.zeros(2, 7, 8)), 0.5))(TWO), ("shape (2, 7, 8)", "(2, 8, 8)")),
    (lambda _: net(Budget(Scored(torch.zeros(2, 8, 8).long()), 0.5))(TWO), ("int64", "floating-point")),
    (lambda _: net(Budget(Scored(torch.full((2, 8, 8), torch.nan)), 0.5))(TWO), ("NaN", "check the image")),
    (lambda _: net(Budget(Scored(SHORT), 0.5))(TWO), ("infinities", "check the image")),
    (lambda _: net("trimap")(TWO), ("labelled(labels)", "--labels")),
    (lambda _: of_labels(torch.zeros(2, 64, 32).long()), ("(2, 64, 32)", "(2, 64, 64)")),
    *((lambda _, bad=bad: of_labels(bad), ("integer tensor (batch, height, width)",)) for bad in OFF),
    (lambda _: of_function(None), ("NoneType",)),
    (lambda _: of_function(torch.full((2, 8, 8), torch.nan)), ("NaN",)),
    *((lambda _, bad=bad: of_function(bad), (str(tuple(bad.shape)),)) for bad in SHAPES),
    (lambda _: net("usermasks:bright")(TWO), ("floating-point", "threshold:at=0.5")),
    (lambda _: Union(), ("0 masks", "edges + gradient")),
    (lambda _: Union("edges"), ("1 masks", "edges + gradient")),
    (
        lambda _: net("edges")(TWO, mask=torch.ones(2, 30, 40, dtype=torch.bool)),
        ("(2, 30, 40)", "(2, 8, 8)", "image's size"),
    ),
    (lambda _: net("edges")(ONE, mask=np.array(["a"])), ("array",)),
    (lambda _: net("edges")(TWO, sizes=[(64, 64)]), ("do not fit a batch",)),
    *((lambda _, bad=bad: net("edges")(TWO, sizes=bad), ("no sizes of images",)) for bad in ("all", [64, 9])),
    (lambda _: net("keypoints:detector=given")(TWO), ("there are no keypoints", "keypoints_at(points)")),
    (lambda _: of_points(1), ("a list of 1 for a batch of 2",)),
    *(
        (lambda _, then=then: after_strides(then, "keypoints:detector=own,dilations=5"), (words, "sift"))
        for then, words in (
            (lambda y: torch.cat((y, y), 1), "0 maps of one channel"),
            (lambda y: (y, y * 2), "2 maps of one channel"),
        )
    ),
    *(
        (lambda _, then=then: after_strides(then, "confidence"), (words, "detail or edges"))
        for then, words in (
            (lambda y: y.mean((2, 3)).expand(-1, 1000), "tensor of shape (2, 1000)"),
            (lambda y: {"scores": y, "aux": -y}, "a dictionary of scores, aux"),
            (lambda y: y, "tensor of shape (2, 1, 32, 32)"),
        )
    ),
    (
        lambda _: after_strides(lambda y: y.mean((2, 3)), "preview", coarsest=32, normalisation="raw"),
        ("gives no map",),
    ),
    (lambda _: of_two_inputs("preview"), ("smaller picture",)),
    (lambda folder: graph_of("preview", folder), ("level_map",)),
    (lambda folder: graph_of("confidence | budget", folder), ("a first pass of the network",)),
    (lambda folder: graph_of("learned | budget", folder), ("weights that the first call",)),
    (lambda _: another(7, 2), ("made for 6 channels and 3 levels", "7 channels", "3 levels")),
    (lambda _: another(6, 1), ("made for 6 channels and 3 levels", "6 channels", "2 levels")),
    *(
        (lambda _, way=way, given=given: way(given), words)
        for given, words in (
            (((0.5, 0.5), (0.5, 0.5)), ("2 channels, the images have 3", "channels")),
            (((0.5,) * 3, (0.5,) * 2), ("no normalisation", "raw")),
            ((0.5, 0.0), ("above 0", "raw")),
            ((0.5, (1.0, 1.0, float("inf"))), ("no normalisation", "raw")),
            (0.5, ("no normalisation", "raw")),
        )
        for way in (known_as, lambda given: adapted_strided(normalisation=given))
    ),
]


@pytest.mark.parametrize(
    ("call", "words"), REFUSED_CALLS, ids=lambda value: value[0] if isinstance(value, tuple) else ""
)
def test_what_no_mask_can_be_found_of_is_refused_with_what_helps(
    call: Callable[[Path], object], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(cs.InvalidInput) as caught:
        call(tmp_path)
    assert caught.value.next and all(word in str(caught.value) for word in words), str(caught.value)
