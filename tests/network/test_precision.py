"""The precision of optimised copies: as the weights, or bfloat16; 8 bits are for files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import covering, images
from networks import Undecided, build, made_once, strided, unverified

import cadsurgery as cs
from cadsurgery.network.model import AdaptiveModel

MIXED = "random:fraction=0.4,seed=3,block=3"


@made_once
def network(name: str) -> AdaptiveModel:
    torch.manual_seed(0)
    model = Undecided(strided()).eval() if name == "a host" else build(name, by=4)
    return unverified(model, MIXED, example_input=images(1, 64, 96))


@pytest.mark.parametrize("name", ["resnet18", "a host"])
@torch.no_grad()
def test_a_copy_in_bfloat16_is_the_optimised_one_cast(name: str) -> None:
    net, x = network(name), images(2, 65, 97)
    asked, cast = net.optimize(precision="bfloat16"), net.optimize().to(torch.bfloat16)
    found = asked(x.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found, cast(x.bfloat16()))
    assert net(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "is_optimised", "options"),
    covering(
        ["resnet18", "a host"],
        [False, True],
        [
            {"precision": "int8"},
            {"precision": "int8", "calibration": [images(1, 65, 97)]},
            {"precision": "float", "calibration": "photos"},
            {"calibration": []},
        ],
    ),
)
def test_8_bits_are_refused_with_what_writes_a_file(
    name: str, is_optimised: bool, options: dict[str, Any]
) -> None:
    net = network(name)
    with pytest.raises(cs.InvalidInput) as refusal:
        (net.optimize() if is_optimised else net).optimize(**options)
    assert 'cs.export(net, image, "net.onnx", precision="int8", calibration=images' in refusal.value.next
    assert "--precision int8 --calibration FOLDER" in refusal.value.next


def test_other_precisions_are_refused_with_those_that_there_are() -> None:
    net = network("resnet18")
    with pytest.raises(cs.UnknownName, match="bfloat16, float"):
        net.optimize(precision="int7")
    with pytest.raises(cs.InvalidInput, match="made from"):
        net.optimize().optimize(precision="bfloat16")
