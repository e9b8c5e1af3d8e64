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
    ("randm", cs.UnknownName, "did you mean random"),
    ("edges:treshold=0.1", cs.UnknownName, "did you mean threshold"),
    ("edges:dilaton=3", cs.UnknownName, "did you mean dilation"),
    ("random:fracton=0.1", cs.UnknownName, "did you mean fraction"),
    ("", cs.UnknownName),
    ("zzz", cs.UnknownName),
    ("all:x=1", cs.UnknownName),
    ("edges,threshold=1", cs.UnknownName),
    ("edges | budgt", cs.UnknownName, "did you mean budget"),
    ("edges |", cs.UnknownName, '"edges | budget:fraction=0.3"'),
    ("edges | budget:fracton=0.3", cs.UnknownName, "did you mean fraction"),
    ("edgs | budget", cs.UnknownName, "did you mean edges"),
    # Values out of range.
    ("edges:threshold=abc", cs.InvalidInput, "threshold"),
    ("edges:threshold=0.1/", cs.InvalidInput, "threshold"),
    ("edges:threshold=nan", cs.InvalidInput, "threshold"),
    ("edges:threshold", cs.InvalidInput, "threshold"),
    ("edges:threshold=", cs.InvalidInput, "threshold"),
    ("edges:dilation=1.5", cs.InvalidInput, "dilation"),
    ("edges:dilation=4", cs.InvalidInput, "odd"),
    ("edges:dilation=-3", cs.InvalidInput, "dilation"),
    ("edges:threshold=0.3/0.2/0.1,dilation=3/5", cs.InvalidInput, "dilations"),
    ("random:fraction=1.5", cs.InvalidInput, "fraction"),
    ("random:fraction=-0.1", cs.InvalidInput, "fraction"),
    ("random:fraction=0.1/0.2", cs.InvalidInput, "fraction"),
    ("random:block=0", cs.InvalidInput, "block"),
    ("trimap:width=4", cs.InvalidInput, "width=4"),
    ("trimap:width=-3/5", cs.InvalidInput, "width=-3/5"),
    ("gradient:sigma=-1", cs.InvalidInput, "sigma"),
    ("gradient:sigma=nan", cs.InvalidInput, "sigma"),
    ("gradient:sigma=inf", cs.InvalidInput, "sigma"),
    ("gradient:threshold=nan", cs.InvalidInput, "threshold"),
    ("gradient:dilation=2", cs.InvalidInput, "dilation"),
    ("gradient:threshold=1/2/3,dilation=3/5", cs.InvalidInput, "dilations"),
    ("edges | dilate:size=4", cs.InvalidInput, "size=4 is not odd"),
    ("edges | dilate:size=0", cs.InvalidInput, "size=0 is not odd"),
    ("edges | threshold:at=0.2/0.8", cs.InvalidInput, "0.2/0.8 do not fall"),
    ("edges | threshold:at=nan", cs.InvalidInput, "NaN"),
    ("edges | smooth:hold=-1", cs.InvalidInput, "hold=-1"),
    ("content:share=2", cs.InvalidInput),
    ("content:noise=-1", cs.InvalidInput),
    ("content:margin=-1", cs.InvalidInput),
    ("content:least=-1", cs.InvalidInput),
    ("preview:scale=0", cs.InvalidInput),
    ("preview:scale=2", cs.InvalidInput),
    ("preview:margin=-1", cs.InvalidInput),
    ("preview:least=-1", cs.InvalidInput),
    ("edges | budget:fraction=0.5/0.2", cs.InvalidInput, "0.1/0.3"),
    ("edges | budget:fraction=0.2/1.5", cs.InvalidInput, "0.1/0.3"),
    ("edges | budget:fraction=-0.1/0.2", cs.InvalidInput, "0.1/0.3"),
    ("edges | budget:fraction=nan/0.5", cs.InvalidInput, "0.1/0.3"),
    ("edges | budget:fraction=0.1/nan", cs.InvalidInput, "0.1/0.3"),
    ("learned:fraction=1.1", cs.InvalidInput, "fraction"),
    ("learned:fraction=nan", cs.InvalidInput, "fraction"),
    ("learned:temperature=0", cs.InvalidInput, "temperature"),
    ("learned:temperature=nan", cs.InvalidInput, "temperature"),
    ("learned:channels=8/8", cs.InvalidInput, "channels"),
    ("learned:channels=8/0/8", cs.InvalidInput, "channels"),
    ("learned:seed=-1", cs.InvalidInput, "seed"),
    ("detail:sigma=-1", cs.InvalidInput, "sigma"),
    ("detail:sigma=inf", cs.InvalidInput, "sigma"),
    ("detail:threshold=1/2", cs.InvalidInput, "threshold"),
    ("confidence:threshold=nan", cs.InvalidInput, "threshold"),
    ("confidence:sigma=nan", cs.InvalidInput, "sigma"),
    ("learned:channels=8/8", cs.InvalidInput, "channels"),
    ("confidence:measure=variance", cs.UnknownName, "measure"),
    # Pipes, pluses and parentheses.
    ("budget:fraction=0.3", cs.InvalidInput, "'budget' needs another mask", '"edges | budget:fraction=0.3"'),
    ("budget | budget", cs.InvalidInput, "'budget' needs another mask", '"edges | budget"'),
    (
        "| budget:fraction=0.3",
        cs.InvalidInput,
        "nothing stands before the pipe",
        '"edges | budget:fraction=0.3"',
    ),
    (
        "edges | random:seed=3",
        cs.InvalidInput,
        "'random' cannot stand behind",
        '"random:seed=3 | budget:fraction=0.3"',
    ),
    ("edges | budget:fraction=1.5", cs.InvalidInput, "fraction=1.5", "fraction=0.3"),
    ("edges | budget:fraction=nan", cs.InvalidInput, "fraction=nan", "fraction=0.3"),
    ("edges | budget:fraction=half", cs.InvalidInput, "not a number", "fraction=0.3"),
    ("edges | budget:per_batch=perhaps", cs.InvalidInput, "not True or False", "per_batch=False"),
    ("edges +", cs.InvalidInput, "a mask is missing before the end", "edges + gradient"),
    ("+ edges", cs.InvalidInput, "a mask is missing before '+'", "edges + gradient"),
    ("edges + | budget", cs.InvalidInput, "nothing stands before the pipe", "| budget"),
    ("(edges", cs.InvalidInput, "a parenthesis is not closed", "edges + gradient"),
    ("edges)", cs.InvalidInput, "')' is not expected here", "edges + gradient"),
    ("(edges) gradient", cs.InvalidInput, "'gradient' is not expected here", "edges + gradient"),
    ("()", cs.InvalidInput, "a mask is missing before ')'", "edges + gradient"),
    ("union", cs.InvalidInput, "'union' needs other masks", "edges + gradient"),
    ("edges | union", cs.InvalidInput, "'union' cannot stand behind a pipe", "edges + gradient"),
    ("edges | gradient", cs.InvalidInput, "'gradient' cannot stand behind a pipe", "edges + gradient"),
    ("edges + dilate:size=3", cs.InvalidInput, "'dilate' needs another mask", "edges | dilate:size=3"),
    # Functions by name, and keypoints.
    ("usermasks:brigt", cs.UnknownName, "bright"),
    ("nomodule:f", cs.UnknownName, "cannot be imported"),
    ("usermasks:", cs.InvalidInput, "my_module:my_function"),
    (":bright", cs.InvalidInput, "my_module:my_function"),
    ("usermasks:number", cs.InvalidInput, "module:function"),
    ("edges | usermasks:bright", cs.UnknownName, "mask wrapper"),
    ("saliency:threshold=0.5", cs.InvalidInput, "detail", "module:function"),
    ("detail:threshold=0.1/0.5", cs.InvalidInput, "0.5/0.1"),
    ("detail:threshold=nan", cs.InvalidInput, "0.35"),
    ("keypoints:dilations=4", cs.InvalidInput, "odd"),
    ("keypoints:dilations=5/8/5", cs.InvalidInput, "odd"),
    ("keypoints:dilations=5.5", cs.InvalidInput, "dilations=51"),
    ("keypoints:dilations=-3", cs.InvalidInput, "dilations=51"),
    ("keypoints:dilations=nan", cs.InvalidInput, "dilations=51"),
    ("keypoints:dilations=wide", cs.InvalidInput, "dilations=51"),
    ("keypoints:count=0", cs.InvalidInput, "512"),
    ("keypoints:count=1.5", cs.InvalidInput, "512"),
    ("keypoints:detector=shift", cs.UnknownName, "did you mean sift"),
    ("keypoints:detector=harris", cs.UnknownName, "module:function"),
    ("keypoints:detector=userpoints:corner", cs.UnknownName, "corners"),
    ("keypoints:detector=nomodule:f", cs.UnknownName, "cannot be imported"),
    ("keypoints:detector=:f", cs.InvalidInput, "my_module:my_function"),
    ("keypoints:detector=userpoints:number", cs.InvalidInput, "module:function"),
    ("keypoints:dilation=5", cs.UnknownName, "dilations"),
]


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


@pytest.mark.parametrize("text", ["confidence", "keypoints:detector=own", "preview"])
def test_outside_of_a_network_there_is_no_pass_to_look_at(text: str) -> None:
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(cs.InvalidInput, match=r"no (first pass|preview)"):
        resolve_mask(text)(image, image, FineMapSpec(1, (32, 32), 1, 2, 4, 4))


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("edges:threshold=0.9/0.5/0.1", "thresholds"),
        ("gradient:threshold=3/2/1", "thresholds"),
        ("detail:threshold=3/2/1", "thresholds"),
        ("confidence:threshold=0.9/0.5/0.1", "thresholds"),
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
