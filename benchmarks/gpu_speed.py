"""Time of the Triton convolution and of an adaptive DeepLabv3-ResNet101 against cuDNN and the dense twins.

    python benchmarks/gpu_speed.py [--channels 256 512] [--counts 8192 65536] [--batches 1 4] [--json]

Not yet run on a GPU: written without one, and the network takes whichever way through
`functional.windows` is wired. bfloat16, random weights (times do not depend on them).

Kernel: a 3x3 convolution on elements against cuDNN's dense one with as many outputs, as multiply-accumulate
rates; on the table of an image, and on the kernel map of 4x4 blocks of which a third is at level 0.
Networks: everything that can be captured runs as a CUDA graph; "eager" marks what cannot. "mask given" makes
lattice and kernel maps anew in each call, "lattice kept" has them from the call before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import cadsurgery as cs
from cadsurgery.elements.backends import gpu
from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved

BLOCK = 4  # fine pixels of a patch: R_K of the stages 8 -> 16 -> 32
FRACTION = 0.34
REPEATS = 20  # calls of a kernel in one graph, so that its launch does not count


def block_levels(batch: int, rows: int, columns: int) -> Tensor:
    """(B, 4 rows, 4 columns): a share of blocks at level 0, in random places, the rest at level 2."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
    levels = torch.where(order < round(FRACTION * rows * columns), 0, 2).view(batch, rows, columns)
    return levels.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).cuda()


def captured(run: Callable[[], object], repeats: int = 1) -> tuple[Callable[[], object], bool]:
    """A CUDA graph of so many calls, and True; where capture fails the call itself, and False."""
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # tuning and compilation happen before capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def table_of(lattice: Lattice) -> Tensor:
    """The kernel map of a 3x3 convolution; padding is -1, halo rows stay."""
    reading = kernel_map(lattice, lattice, Window((3, 3), padding=(1, 1, 1, 1))).reading
    return reading.table.masked_fill(reading.table == len(lattice), -1)


def measure_kernel(channels: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """One line per kind of table."""
    side = 32
    lattices = {
        "image": Geometry((2, 2)).uniform(0, 1, (side, count // side), "cuda"),
        # A third of the blocks has 16 elements and the others one: so many blocks give about `count`.
        "blocks": Geometry((2, 2)).lattice(
            block_levels(1, side // BLOCK, round(count / (side // BLOCK) / (1 + 15 * FRACTION)))
        ),
    }
    kernel = torch.randn(channels, channels, 3, 3, device="cuda", dtype=torch.bfloat16) / channels**0.5 / 3
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    weight = kernel.permute(0, 2, 3, 1).flatten(1)
    image = torch.randn(1, channels, side, count // side, device="cuda", dtype=torch.bfloat16)
    image = image.contiguous(memory_format=torch.channels_last)
    dense = F.conv2d(image, kernel, padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    sides = {"cuDNN": captured(lambda: F.conv2d(image, kernel, padding=1), REPEATS)[0]}
    outputs = {"cuDNN": len(dense)}
    for name, lattice in lattices.items():
        table = table_of(lattice)
        rows = torch.randn(int(table.max()) + 1, channels, device="cuda", dtype=torch.bfloat16)
        if name == "image":
            rows = image.permute(0, 2, 3, 1).flatten(0, 2)
            found = gpu.gather_conv(rows, weight, table)
            torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)
        run = lambda rows=rows, table=table: gpu.gather_conv(rows, weight, table)  # noqa: E731
        sides[name], outputs[name] = captured(run, REPEATS)[0], len(table)
    best = interleaved(sides, rounds)
    rates = {
        name: REPEATS * outputs[name] * 9 * channels**2 / (time / 1e3) / 1e12 for name, time in best.items()
    }
    return [
        {
            "channels": channels,
            "table": name,
            "outputs": outputs[name],
            "ms": best[name] / REPEATS,
            "tera_macs": rates[name],
            "of_cudnn": rates[name] / rates["cuDNN"],
        }
        for name in sides
    ]


def deeplab(*dilated: bool) -> nn.Module:
    """DeepLabv3-ResNet101 at output stride 8, or at 16 with the rates of its head halved."""
    trunk = resnet101(weights=None, replace_stride_with_dilation=list(dilated))
    rates = (12, 24, 36) if dilated[1] else (6, 12, 18)
    model = DeepLabV3(IntermediateLayerGetter(trunk, {"layer4": "out"}), DeepLabHead(2048, 21, rates), None)
    return model.eval()


def on_device(model: nn.Module) -> nn.Module:
    """The model as it is measured."""
    return model.to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)


def measure_networks(batch: int, size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """One line per side."""
    x = torch.randn(batch, 3, *size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    levels = block_levels(batch, size[0] // (8 * BLOCK), size[1] // (8 * BLOCK))
    high = deeplab(False, True, True)
    # Converted before it is moved: conversion compares the graph with the network, to float32's precision.
    net: Any = on_device(cs.adaptify(high, example_input=torch.randn(1, 3, 128, 128), verify_laws=False))
    high, low = on_device(high), on_device(deeplab(False, False, True))
    lattice = net.geometry.lattice(levels)
    runs: dict[str, Callable[[], object]] = {
        "dense OS 8": lambda: high(x),
        "dense OS 16": lambda: low(x),
        "adaptive, mask given": lambda: net(x, mask=levels),
        # What `net.run` does but for its check of the image, which waits for the device.
        "adaptive, lattice kept": lambda: net.program(lambda *_: lattice, net.program.bind(x)),
    }
    sides = {name: captured(run) for name, run in runs.items()}
    best = interleaved({name: run for name, (run, _) in sides.items()}, rounds)
    return [
        {
            "batch": batch,
            "side": name,
            "ms": time,
            "graph": sides[name][1],
            "speedup": best["dense OS 8"] / time,
        }
        for name, time in best.items()
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, nargs="+", default=(256, 512))
    parser.add_argument("--counts", type=int, nargs="+", default=(8192, 16384, 32768, 65536))
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 4))
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not gpu.available(torch.device("cuda")):
        sys.exit("This benchmark needs Triton and a CUDA device from Ampere on; none was found.")

    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        kernels = [
            line
            for channels in options.channels
            for count in options.counts
            for line in measure_kernel(channels, count, options.rounds)
        ]
        networks = [
            line
            for batch in options.batches
            for line in measure_networks(batch, tuple(options.size), options.rounds)
        ]
    device = torch.cuda.get_device_name()
    if options.json:
        print(
            json.dumps(
                {"device": device, "torch": torch.__version__, "kernels": kernels, "networks": networks}
            )
        )
        return
    print(setting(torch.device("cuda")))
    print("3x3 convolution, bfloat16")
    for line in kernels:
        print(
            f"{line['channels']:4} channels {line['outputs']:7} outputs  {line['table']:8} {line['ms']:8.3f} ms"
            f" {line['tera_macs']:7.1f} TMAC/s   {line['of_cudnn']:.2f} of cuDNN"
        )
    print(f"DeepLabv3-ResNet101, {options.size[0]}x{options.size[1]}, {FRACTION} of the blocks high")
    for line in networks:
        print(
            f"batch {line['batch']}  {line['side']:24} {line['ms']:8.2f} ms  {line['speedup']:5.2f}x dense OS 8"
            f"{'' if line['graph'] else '  (eager)'}"
        )


if __name__ == "__main__":
    main()
