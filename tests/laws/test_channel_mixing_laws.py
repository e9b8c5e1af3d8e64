"""However a mixing of channels is written, it acts at each place alone, as a convolution of one tap does, and converts;
what joins places says which.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import some
from torch import Tensor, nn

import cadsurgery as cs

C = 8
WEIGHT = torch.randn(C, C, generator=torch.Generator().manual_seed(0)) / 3
GROUPS = WEIGHT.view(4, 4, 4)[:2] * 2
Mix = Callable[[Tensor], Tensor]
MIXES: dict[str, Mix] = {
    "letters": lambda x: torch.einsum("bchw,oc->bohw", x, WEIGHT),
    "transposed weights": lambda x: torch.einsum("b c h w, c o -> b o h w", x, WEIGHT),
    "a list": lambda x: torch.einsum("bchw,oc->bohw", [x, WEIGHT]),
    "weights first": lambda x: torch.einsum("oc,bchw->bohw", WEIGHT, x),
    "channels last": lambda x: torch.einsum("bchw,oc->bhwo", x, WEIGHT).permute(0, 3, 1, 2),
    "dots": lambda x: torch.einsum("...chw,oc->...ohw", x, WEIGHT),
    "dots behind": lambda x: torch.einsum("bc...,oc->bo...", x, WEIGHT),
    "in groups": lambda x: torch.einsum("bgchw,goc->bgohw", x.unflatten(1, (2, 4)), GROUPS).flatten(1, 2),
    "twice": lambda x: torch.einsum("bchw,oc,po->bphw", x, WEIGHT, WEIGHT),
    "each channel": lambda x: torch.einsum("bchw,c->bchw", x, WEIGHT[0]),
    "two maps": lambda x: x * torch.einsum("bchw,bchw->bhw", x, x.relu()).unsqueeze(1).sigmoid(),
    "tensordot": lambda x: torch.tensordot(x, WEIGHT, dims=([1], [1])).movedim(-1, 1),
    "tensordot from behind": lambda x: torch.tensordot(x, WEIGHT, dims=([-3], [-1])).permute(0, 3, 1, 2),
    "tensordot of a number": lambda x: torch.tensordot(x.permute(0, 2, 3, 1), WEIGHT, 1).permute(0, 3, 1, 2),
}
JOINING: dict[str, tuple[Mix, str]] = {
    "a sum over rows": (lambda x: x * torch.einsum("bchw->bcw", x).unsqueeze(2).sigmoid(), "over the height"),
    "weights of places": (
        lambda x: torch.einsum("bchw,hw->bchw", x, x.new_ones(x.shape[2:])),
        "weighs places",
    ),
    "attention": (
        lambda x: x + torch.einsum("bcn,bcm->bnm", x.flatten(2), x.flatten(2)).mean(),
        "different places of two maps",
    ),
}


class Net(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix, self.first, self.second = mix, nn.Conv2d(3, C, 3, 2, 1), nn.Conv2d(C, C, 3, 2, 1)
        self.third, self.last = nn.Conv2d(C, C, 3, 2, 1), nn.Conv2d(C, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.mix(self.second(self.mix(self.first(x))))))


@pytest.mark.parametrize("name", some(MIXES, every=4))
def test_a_mixing_of_channels_converts(name: str) -> None:
    torch.manual_seed(0)
    model = Net(MIXES[name]).eval()
    net = cs.adaptify(model, "edges", coarsest=8)
    assert not [one for one in net.plan.decisions if one.action == "barrier"]
    image = torch.rand(2, 3, 52, 70)
    with torch.no_grad():
        torch.testing.assert_close(net(image, mask="all"), model(image))
        torch.testing.assert_close(net.optimize()(image), net(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", JOINING)
def test_what_joins_places_says_which(name: str) -> None:
    mix, words = JOINING[name]
    torch.manual_seed(0)

    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.mix(self.second(self.first(x))))

    plan = cs.plan(Late(mix).eval())
    reasons = [one.reason for one in plan.decisions if one.action == "barrier"]
    assert any(words in reason for reason in reasons), reasons
