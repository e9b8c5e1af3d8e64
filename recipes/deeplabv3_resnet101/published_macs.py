"""Multiply-accumulates as the code of Hesse et al. (CVPRW 2023) counts them (seed of its Tab. 2).

Counted is the backbone: convolutions with their bias, batch norm 2 and ReLU 1 per value, max-pooling 1 per value that
it reads; a strided k x k convolution before its subsampling.

    python recipes/deeplabv3_resnet101/published_macs.py

prints the totals of the README, on shapes alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.arguments import in_order
from cadsurgery.network.observing import OnShapes
from cadsurgery.surgery.rewrite import WORK
from recipes.deeplabv3_resnet101 import recipe

SIZE = (1024, 2048)
_BACKBONE = "backbone"


def dense_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count a network as it is, on images of a shape; its tensors may be on the meta device."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += _of_module(module, inputs[0].numel(), output.numel())

    counted = [one for one in model.get_submodule(_BACKBONE).modules() if isinstance(one, _COUNTED)]
    hooks = [module.register_forward_hook(count) for module in counted]
    first = next(model.parameters())
    with torch.no_grad():
        model(torch.empty(shape, dtype=first.dtype, device=first.device))
    for hook in hooks:
        hook.remove()
    return total


def adaptive_macs(net: cs.AdaptiveModel, shape: tuple[int, ...], levels: Tensor | int) -> int:
    """Count a converted network on images of a shape, with a level map (B, h, w) or one level everywhere."""
    program, image = net.counted, torch.empty(shape, device="meta")
    masking: Any = (
        program.uniform(levels) if isinstance(levels, int) else _Fixed(net.geometry.lattice(levels))
    )
    counter = _Counter(program, program.graph)
    with torch.no_grad():
        counter.run(*in_order(program.graph, program.bind(image), masking))
    return counter.total


_COUNTED = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU)


def _of_module(module: object, inputs: int, outputs: int) -> int:
    """Count a module by its numbers of input and output values."""
    if isinstance(module, nn.Conv2d):
        bias = module.out_channels if module.bias is not None else 0
        return outputs // module.out_channels * (module.weight.numel() + bias)
    if isinstance(module, nn.BatchNorm2d):
        return 2 * outputs
    if isinstance(module, nn.MaxPool2d):
        return inputs
    return outputs if isinstance(module, nn.ReLU) else 0


class _Fixed(NamedTuple):
    """A masking with one lattice."""

    lattice: Lattice

    def __call__(self, *_: Any) -> Lattice:
        """Return the lattice."""
        return self.lattice


class _Counter(OnShapes):
    """Runs a rewritten graph on shapes and counts its backbone."""

    total = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and count it."""
        value = super().run_node(n)
        if n.meta.get(WORK, ("", ""))[1].startswith(f"{_BACKBONE}."):
            self.total += self._work(n, value)
        return value

    def _work(self, n: fx.Node, value: Any) -> int:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is functional.conv2d:
            (x, weight, bias), window = args[:3], kwargs["window"]
            stage = value.lattice if window.taps == 1 else x.lattice.at(x.lattice.stage, value.lattice.size)
            return int(stage.count * (weight.numel() + (0 if bias is None else len(weight))))
        size = getattr(getattr(value, "rows", value), "numel", lambda: 0)()
        if n.target is functional.batch_norm:
            return 2 * int(size)
        if n.target is functional.max_pool2d:
            return int(args[0].rows.numel())
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else next(iter(args), None)
        return _of_module(module, args[0].numel() if isinstance(module, nn.MaxPool2d) else 0, size)


def main() -> None:
    """Print the totals."""
    shape = (1, 3, *SIZE)
    for layers in (recipe.RESNET101, recipe.RESNET50, recipe.RESNET152):
        for stride in (8, 16, 32):
            with torch.device("meta"):
                model = recipe.deeplabv3(layers, stride).eval()
            print(f"{recipe.NAMES[layers]}, output stride {stride}: {dense_macs(model, shape):.5e}")
    for low in (16, 32):
        net = recipe.adapted(recipe.deeplabv3().eval(), recipe.RUNS[f"edges-8-{low}-0.15"], verify_laws=False)
        for name, level in (("high", 0), ("low", net.plan.max_level)):
            print(f"resnet101, 8 to {low}, everything {name}: {adaptive_macs(net, shape, level):.5e}")


if __name__ == "__main__":
    main()
