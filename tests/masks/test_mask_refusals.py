"""Texts that no mask can be made of: each is refused with what is wrong, and a next step that helps."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import images
from feature_cases import SIZE, converted

import cadsurgery as cs
from cadsurgery.masks import FineMapSpec, labelled, resolve_mask

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
