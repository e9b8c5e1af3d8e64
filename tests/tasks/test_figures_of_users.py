"""Figures take what a notebook has at hand, and refuse what is no picture of the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cadsurgery as cs
from cadsurgery.viz import comparison_figure, mask_figure, prediction_picture

SIZE = (75, 101)


@pytest.fixture(scope="module")
def net() -> Any:
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(4)]
    net = cs.adaptify(nn.Sequential(*layers), "edges", output_stride=(4, 16), verify_laws=False).eval()
    net(torch.rand(1, 3, *SIZE))
    return net


PICTURE = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
ARRAY = PICTURE.permute(1, 2, 0).numpy()
BYTES = (255 * ARRAY).round().astype(np.uint8)
GIVEN = {
    "tensor": PICTURE,
    "batch of one": PICTURE[None],
    "batch": torch.stack((PICTURE, PICTURE.flip(0))),
    "array": ARRAY,
    "array of bytes": BYTES,
    "batch of arrays": ARRAY[None],
    "tensor of bytes": torch.from_numpy(BYTES).movedim(-1, 0),
    "PIL": Image.fromarray(BYTES),
    "PIL with transparency": Image.fromarray(BYTES).convert("RGBA"),
    "grey array": ARRAY[..., 0],
    "grey PIL": Image.fromarray(BYTES).convert("L"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_picture_is_drawn_however_it_is_held(name: str, net: Any) -> None:
    for figure in (
        mask_figure(GIVEN[name], net.lattice, 4),
        comparison_figure(GIVEN[name], [net.lattice], ["edges"], 4),
    ):
        drawn = np.asarray(figure.axes[0].images[0].get_array())
        expected = ARRAY if "grey" not in name else drawn[..., :1]
        assert drawn.shape == (*SIZE, 3) and np.abs(drawn - expected).max() < 0.01
    classes = torch.zeros(SIZE, dtype=torch.long)
    assert prediction_picture(GIVEN[name], classes, "overlay").size == SIZE[::-1]


@pytest.mark.parametrize(
    "wrong", [torch.rand(3, 200, 60), ARRAY[:30], "photo.png", None, torch.rand(4), np.array(["a"])]
)
def test_what_is_no_picture_of_the_call_is_refused(wrong: Any, net: Any) -> None:
    with pytest.raises(cs.InvalidInput, match="image"):
        mask_figure(wrong, net.lattice, 4)
    with pytest.raises(cs.InvalidInput, match="image"):
        comparison_figure(wrong, [net.lattice], [""], 4)
