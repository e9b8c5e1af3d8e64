"""Time of a few sides, interleaved in one run (of one thread: processor time); the best round counts.

    python -m benchmarks.sides dense [--fractions 1 0.5 0.34 0.1 0]   # an optimised copy beside dense networks
    python -m benchmarks.sides training [--batch 2] [--fractions 0.3] # a training step beside dense networks
    python -m benchmarks.sides compiled [--fractions 0.34]            # eager, with static shapes, torch.compile
    python -m benchmarks.sides pages                                  # large results in fresh memory and large pages
    python -m benchmarks.sides exits [--fractions 0.5 0.3]            # exits that leave so much beside everything
    python -m benchmarks.sides gates [--fractions 0.5 0.3]            # open gates, computed either way, beside none

Random weights, on which times do not depend, float32, channels_last: the backbone of ResNet-50, in evaluation with its
norms folded; `exits` takes an FCN and `gates` the classifier. What exits leave and gates open lies in areas; confidence
and scores are computed as usual, which is part of the time. A benchmark is a function that gives sides by their names:
the first is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet50

import cadsurgery as cs
from cadsurgery.masks.masking import Masking
from cadsurgery.methods.sampling import sampled_calls
from cadsurgery.methods.sampling.gates import Opened
from cadsurgery.support.pages import new_memory
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.open import example_batch

BLOCK = 4  # side of a patch in fine pixels: R_K of the stages 8 -> 16 -> 32
FILLS = ("nearest", "linear")
Sides = dict[str, Callable[[], object]]
Options = argparse.Namespace


def backbone(*dilated: bool, training: bool = False) -> nn.Module:
    """Build ResNet-50 without head, channels_last; batch norm is folded but in training mode."""
    torch.manual_seed(0)
    model = resnet50(weights=None, replace_stride_with_dilation=list(dilated) or None)
    trunk = nn.Sequential(OrderedDict(list(model.named_children())[:-2])).train(training)
    return (trunk if training else fuse(trunk)).to(memory_format=torch.channels_last)


def picture(options: Options) -> Tensor:
    """Draw images (B, 3, H, W)."""
    x = torch.randn(options.batch, 3, *options.size, device=options.device)
    return x.to(memory_format=torch.channels_last)


def block_levels(size: tuple[int, int], fraction: float) -> Tensor:
    """Draw levels (1, h, w): so many of the 4x4 blocks at level 0, in random places, the others at level 2."""
    rows, columns = size[0] // (8 * BLOCK), size[1] // (8 * BLOCK)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    levels = torch.full((rows * columns,), 2)
    levels[order[: round(fraction * rows * columns)]] = 0
    levels = levels.view(1, rows, columns)
    return levels.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


def dense(options: Options) -> Iterator[tuple[str, Sides]]:
    """Dense networks at three output strides, and the optimised copy under level maps of blocks."""
    x = picture(options)
    networks = {"dense OS 8": backbone(False, True, True), "dense OS 16": backbone(False, False, True)}
    networks["dense OS 32"] = trunk = backbone(False, False, False)
    sides: Sides = {name: partial(model, x) for name, model in networks.items()}
    for fill in FILLS:
        net = cs.adaptify(trunk, output_stride=(8, 32), patch="block", fill=fill).optimize()
        for fraction in options.fractions:
            levels = block_levels(tuple(options.size), fraction)
            sides[f"adaptive {fraction:.2f} {fill}"] = partial(net, x, mask=levels)
    yield "ResNet-50 backbone, folded batch norm", sides


def step(model: nn.Module, x: Tensor, **options: object) -> None:
    """Run forward, with a mean square as loss, and backward."""
    with torch.inference_mode(False), torch.enable_grad():
        model.zero_grad(set_to_none=True)
        model(x, **options).square().mean().backward()


def training(options: Options) -> Iterator[tuple[str, Sides]]:
    """A training step of dense networks at two output strides, and of the adaptive one."""
    x = picture(options)
    high, low = (backbone(False, is_high, is_high, training=True) for is_high in (True, False))
    sides: Sides = {"dense OS 8": partial(step, high, x), "dense OS 32": partial(step, low, x)}
    for fill in FILLS:
        mask = cs.Budget("random:seed=0", options.fractions[0])
        net = cs.adaptify(low, mask, output_stride=(8, 32), fill=fill, verify_laws=False).train()
        sides[f"adaptive {options.fractions[0]:g} {fill}"] = partial(step, net, x)
        sides[f"everything high {fill}"] = partial(step, net, x, mask="all")
    yield "ResNet-50 backbone, a training step", sides


def compiled(options: Options) -> Iterator[tuple[str, Sides]]:
    """The network itself under a budget: as it is, with static shapes, compiled."""
    x = picture(options)
    for fill in FILLS:
        mask = cs.Budget("edges", options.fractions[0])
        net = cs.adaptify(backbone(), mask, output_stride=(8, 32), fill=fill, verify_laws=False)
        net.to(options.device)
        static = Masking(net.mask, net.geometry, net.plan.strides[0], static=True)
        fast = torch.compile(net, fullgraph=True)
        yield (
            f"ResNet-50 backbone, fill {fill}, fraction {options.fractions[0]:g}",
            {"eager": partial(net, x), "static": partial(net.run, static, x), "compiled": partial(fast, x)},
        )


def pages(options: Options) -> Iterator[tuple[str, Sides]]:
    """Two maps of 32 MiB are added: see `cadsurgery/support/pages.py`."""
    one = torch.randn(32 << 18)
    other, there = torch.randn_like(one), torch.empty_like(one)
    yield (
        "adding two maps of 32 MiB",
        {
            "memory that is there": lambda: torch.add(one, other, out=there),
            "fresh memory": lambda: torch.add(one, other, out=torch.empty_like(one)),
            "fresh memory in large pages": lambda: torch.add(one, other, out=new_memory(one, *one.shape)),
        },
    )


def exits(options: Options) -> Iterator[tuple[str, Sides]]:
    """A network whose exits leave a share of the positions undecided, and the same with everything computed."""
    net = cs.anytime(cs.build_model("fcn_resnet50", "none").eval()).optimize()
    x, undecided_mask = example_batch(None, size=tuple(options.size)), net.undecided_mask
    field = F.interpolate(torch.rand(1, 1, 16, 32), options.size, mode="bicubic", align_corners=True)

    def at(share: float) -> cs.AnytimeModel:
        def leave(logits: Tensor, *args: Any) -> Tensor:
            undecided_mask(logits, *args)
            values = F.interpolate(field, logits.shape[2:])[:, 0]
            return values > values.quantile(1 - share)

        net.undecided_mask = leave  # type: ignore[method-assign]
        return net

    sides: Sides = {"everything computed": lambda: at(1.0).logits(x, threshold=1.0)}
    for share in options.fractions:
        counted = at(share).macs(x, threshold=0.5)[-1]
        name = f"{share:g} left: {counted.macs / counted.dense:.2f} of MACs"
        sides[name] = lambda share=share: at(share).logits(x, threshold=0.5)  # type: ignore[misc]
    yield "fcn_resnet50 with exits", sides


def gates(options: Options) -> Iterator[tuple[str, Sides]]:
    """A network without gates, and open at shares of the positions: filling whole maps, or computing positions."""
    net = cs.sample(cs.build_model("resnet50", "none").eval()).optimize()
    x = example_batch(None, size=tuple(options.size))

    def at(share: float, whole_from: float) -> None:
        net.score_override = Opened(share)
        with mock.patch.object(sampled_calls, "WHOLE_FROM", whole_from):
            net(x)

    sides: Sides = {"without gates": partial(net.dense, x)}
    for share in (0.0, *options.fractions, 1.0):
        net.score_override = Opened(share)
        counted = net.macs(x)
        for way, whole_from in (("whole maps", 0.0), ("positions", 2.0)):
            name = f"{share:g} open, {way}: {counted.total / counted.dense:.2f} of MACs"
            sides[name] = partial(at, share, whole_from)
    yield "ResNet-50 with gates", sides


# Each with its height and width, shares of the picture kept high, and number of images.
BENCHMARKS: dict[str, tuple[Callable[[Options], Iterator[tuple[str, Sides]]], dict[str, Any]]] = {
    "dense": (dense, {"size": (512, 1024), "fractions": (1.0, 0.5, 0.34, 0.1, 0.0)}),
    "training": (training, {"fractions": (0.3,), "batch": 2}),
    "compiled": (compiled, {}),
    "pages": (pages, {}),
    "exits": (exits, {"size": (512, 1024), "fractions": (0.7, 0.5, 0.3, 0.1), "threads": 1}),
    "gates": (gates, {"size": (512, 1024), "fractions": (0.5, 0.3), "threads": 1}),
}


def main() -> None:
    """Measure and print a table for each list of sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fractions", type=float, nargs="+", default=(0.34,))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--device", default="cpu", help="of `compiled`")
    parser.add_argument("--json", action="store_true")
    make, defaults = BENCHMARKS[parser.parse_known_args()[0].benchmark]
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    print(setting(torch.device(options.device)))
    clock = time.process_time if options.threads == 1 else time.perf_counter
    shape = "" if make is pages else ", {} x {}x{}".format(options.batch, *options.size)
    for title, sides in make(options):
        times = interleaved(sides, options.rounds, warmup=2, clock=clock)
        if options.json:
            print(json.dumps({"title": title, "ms": {name: side.best for name, side in times.items()}}))
            continue
        first = next(iter(sides))
        print(f"{title}{shape}, float32")
        for name, side in times.items():
            ratio, typical = times[first].best / side.best, times[first].median / side.median
            print(
                f"{name:28} {side.best:8.1f} ms   {ratio:5.2f}x {first} (medians {typical:.2f}x)", flush=True
            )


if __name__ == "__main__":
    main()
