"""Decoders at sizes that are no multiple of the strides: what a network without skips returns is larger then, and maps
are padded to the size of their skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from networks import Encoded
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery import functional
from cadsurgery.elements.lattice import Geometry


@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_a_map_padded_to_its_skip_stays_in_the_region(mode: str) -> None:
    """What comes up is padded where a length is odd, by amounts that are known when the network is traced."""

    def padded(own: Any, image: Tensor, skip: Tensor) -> Tensor:
        x, pads = F.interpolate(own.down(F.max_pool2d(skip, 1)), scale_factor=2), [0, 0, 0, 0]
        for axis in range(2):
            if skip.shape[-1 - axis] != x.shape[-1 - axis]:
                pads[2 * axis + 1] = skip.shape[-1 - axis] - x.shape[-1 - axis]
        return own.join(torch.cat([skip, F.pad(x, pads, mode)], 1))

    # Its convolution leaves a row out where their number is odd.
    model = Encoded(padded, down=nn.Conv2d(8, 8, 2, 2), join=nn.Conv2d(16, 8, 3, 1, 1)).double().eval()
    example = torch.randn(2, 3, 67, 99, dtype=torch.float64)
    net = cs.adaptify(model, "none", example_input=example, output_stride=(4, 16), verify_laws=False)
    assert net.plan["pad"].action == net.plan["join"].action == "keep"
    for size in ((67, 99), (83, 113), (96, 99), (64, 96)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert_same(net(x)[:, :, ::2, ::2], model(x), 1e-9)
            both, levels = net(x, mask="random"), net.levels
            alone = torch.cat([net(x[i : i + 1], mask=levels[i : i + 1]) for i in range(2)])
        assert_same(both, alone, 1e-12)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_padding_repeats_the_last_samples_of_the_grids_that_interleave(level: int) -> None:
    lattice = Geometry((2, 2)).uniform(level, 2, (20, 24)).at(2)
    side, spacing = 2**level, 4
    own = torch.randn(2, 3, 16 // side, 20 // side, dtype=torch.float64)
    x = functional.Elements(own.permute(0, 2, 3, 1).flatten(0, 2), lattice.at(2, (16, 20)))
    padded = functional.to_dense(functional.pad(x, (0, 1, 0, 1), spacing, None), side)
    step = spacing // side
    for row in range(step):
        for column in range(step):
            grid = own[:, :, row::step, column::step]
            assert torch.equal(padded[:, :, row::step, column::step], F.pad(grid, (0, 1, 0, 1), "replicate"))
