"""Gradients of networks with instance normalisation: those of the original, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from conftest import covering
from torch import Tensor, nn

import cadsurgery as cs


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x)


NORMS = {
    "module": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "behind the region": nn.BatchNorm2d,
    "function": lambda channels: Functional(),
}


def network(norm: str) -> nn.Module:
    """Norms in the dense stem, which convolutions read, at the entry of the region, and in it."""

    def block(channels: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, outputs, 3, stride, 1), NORMS[norm](outputs), nn.ReLU(inplace=True)]

    blocks = [*block(3, 4, 1)[:2], *block(4, 4, 2)[:2], *block(4, 6, 2), *block(6, 6, 2), *block(6, 6, 2)]
    if norm == "behind the region":  # which running statistics end
        blocks.append(nn.InstanceNorm2d(6, track_running_stats=True))
    return nn.Sequential(*blocks, nn.Conv2d(6, 2, 3, padding=1)).double()


@pytest.mark.parametrize(
    ("norm", "shape", "training", "dtype"),
    covering(
        [*NORMS],
        [(2, 3, 33, 41), (1, 3, 33, 41), (1, 3, 19, 50), (1, 3, 32, 48)],
        [False, True],
        [torch.float64, torch.float32],
    ),
)
def test_gradients_are_those_of_the_original(norm, training, shape, dtype):
    model = network(norm).train(training).to(dtype)
    example = torch.randn(1, 3, 65, 97, dtype=dtype)
    net = cs.adaptify(model, "none", example_input=example)
    with torch.no_grad():
        sizes = [each(torch.zeros(shape, dtype=dtype)).shape[-1] for each in (net.eval(), model.eval())]
    step = -(-sizes[0] // sizes[1])  # from one of the network's own samples to the next
    net.train(training), model.train(training)
    found = []
    for run in (model, lambda x: net(x)[..., ::step, ::step]):
        given = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = run(given)
        output.square().sum().backward()
        found.append((output, given.grad))
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (model, net)]
    for expected, given in zip((*found[0], *gradients[0]), (*found[1], *gradients[1]), strict=True):
        scale = expected.abs().max().item() + 1  # what comes before a norm has gradients that cancel
        torch.testing.assert_close(
            given, expected, rtol=0, atol=scale * (1e-9 if dtype == torch.float64 else 1e-3)
        )
