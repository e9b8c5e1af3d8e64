"""Int8 matrix products on rows: this package's kernels and oneDNN's, one thread, processor time, interleaved.

    python benchmarks/int8_kernels.py [--rounds 7]

Ours read rows by a kernel map, add a residual if the line says so, and requantise. oneDNN's read a dense map or
stored rows, without a residual.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cadsurgery.elements.backends.integer import (
    IntegerConvolution,
    Integers,
    IntegerWeights,
    QuantParams,
    _has,
)
from cadsurgery.elements.backends.integer_layers import _read_pixels
from cadsurgery.elements.kernel_map import read_rows
from cadsurgery.kernels import isa
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

# Height and width of the map, input and output channels, side of the kernel, and whether a residual is added.
CASES = (
    *((64, 128, 256, 256, 3, False), (64, 128, 512, 512, 3, False), (64, 128, 128, 128, 3, False)),
    *((64, 128, 1024, 256, 1, False), (64, 128, 2048, 512, 1, False), (64, 128, 256, 1024, 1, True)),
    *((64, 128, 512, 2048, 1, True), (128, 256, 64, 256, 1, True)),
)
GRID = QuantParams(0.05, 0)


def forms_here() -> tuple[str, ...]:
    """Return the forms of the 8-bit kernels that this processor can run, widest instruction set first.

    Forms for limited weights (`int8_limited.c`), such as "limited_avx2", precede those for any weights.
    """
    names = (form for name in reversed(isa.allowed()) for form in (f"limited_{name}", name))
    return tuple(name for name in names if _has(f"convolve_{name}"))


def sides_of(
    height: int, width: int, channels: int, outputs: int, side: int, adds: bool
) -> dict[str, Callable[[], object]]:
    """Return the calls to compare."""
    count, pad = height * width, side // 2
    weight = torch.randint(-127, 128, (outputs, channels, side, side), dtype=torch.int8)
    image = torch.randint(0, 256, (1, channels, height, width), dtype=torch.uint8)
    image = image.contiguous(memory_format=torch.channels_last)
    rows, scale = image.permute(0, 2, 3, 1).reshape(count, channels), torch.rand(outputs) / weight[0].numel()
    weights = IntegerWeights(weight, scale, torch.rand(outputs), 1, None, GRID, GRID if adds else None, GRID)
    residual = torch.randint(0, 256, (count, outputs), dtype=torch.uint8) if adds else None
    table, _ = _read_pixels(1, (height, width), (side, side), (1, 1), (pad, pad), (1, 1))
    work = IntegerConvolution(rows, weights, read_rows(table, True) if side > 1 else None, residual)
    sides: dict[str, Callable[[], object]] = {
        form: lambda form=form: Integers().convolve_integers(work, form) for form in forms_here()
    }
    onednn, zeros, bias = torch.ops.onednn, torch.zeros(outputs, dtype=torch.long), torch.rand(outputs)
    if side == 1:
        packed: Tensor = onednn.qlinear_prepack(weight.flatten(1), [count, channels])
        of = (packed, scale, zeros, bias, 0.05, 0, torch.uint8, "none", [], "")
        sides["oneDNN"] = lambda: onednn.qlinear_pointwise(rows, 0.05, 0, *of)
    else:
        window = ([1, 1], [pad, pad], [1, 1], 1)
        packed = onednn.qconv_prepack(weight, scale, 0.05, 0, *window, list(image.shape))
        after = (packed, scale, zeros, bias, *window, 0.05, 0, torch.uint8, "none", [], "")
        sides["oneDNN"] = lambda: onednn.qconv2d_pointwise(image, 0.05, 0, *after)
    return sides


def main() -> None:
    """Measure and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(describe_run(torch.device("cpu")))
    for case in CASES:
        height, width, channels, outputs, side, adds = case
        times = interleaved(sides_of(*case), rounds, clock=time.process_time)
        work = height * width * channels * outputs * side**2 / 1e6
        rates = " | ".join(f"{name} {work / timing.best:.0f}" for name, timing in times.items())
        print(
            f"{height * width} rows, {channels} -> {outputs}, {side}x{side}{', residual' * adds}: GMAC/s {rates}",
            flush=True,
        )


if __name__ == "__main__":
    main()
