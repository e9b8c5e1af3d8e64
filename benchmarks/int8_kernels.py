"""Int8 matrix products on rows: this package's kernels and oneDNN's, one thread, processor time, interleaved.

    python benchmarks/int8_kernels.py [--rounds 7]

Ours read rows by a table, add a residual if the line says so, and requantise. oneDNN's read a dense map or stored rows,
without a residual.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.kernels import isa
from cadsurgery.kernels.dispatch import check_code
from cadsurgery.kernels.load import library
from cadsurgery.kernels.packing import pack, takes
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

# Height and width of the map, input and output channels, side of the kernel, and whether a residual is added.
CASES = (
    *((64, 128, 256, 256, 3, False), (64, 128, 512, 512, 3, False), (64, 128, 128, 128, 3, False)),
    *((64, 128, 1024, 256, 1, False), (64, 128, 2048, 512, 1, False), (64, 128, 256, 1024, 1, True)),
    *((64, 128, 512, 2048, 1, True), (128, 256, 64, 256, 1, True)),
)
KINDS = (
    "depthwise",
    "grouped_uint8",
    "convolve_limited",
    "convolve",
)  # in the order in which files choose them


class Reading(ctypes.Structure):
    """The structure `reading` of the kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "halo", "outside", "table")),
        *((name, ctypes.c_long) for name in ("count", "n", "taps", "channels", "stride")),
        ("held", ctypes.c_void_p),
    )


class Result(ctypes.Structure):
    """The structure `result` of `requantise.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offset", "scale", "bias", "more", "out")),
        ("outputs", ctypes.c_long),
        *((name, ctypes.c_float) for name in ("more_scale", "low", "high")),
    )


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of rows in 8 bits, as files have it.

    Attributes:
        rows: (N, C), uint8.
        weight: (O, C / groups, taps, 1), int8.
        scale, bias: (O,), from the exact sums to numbers in 8 bits, in single precision.
        zero: number that stands for 0 in the rows.
        groups: channel groups.
        table: (n, taps), int32: the row that each tap reads; N reads zeros, larger ones the halo. None for a product.
        halo: (M, C), uint8.
        residual: (n, O), uint8; `more` times it is added.
        low, high: bounds of the result.
    """

    rows: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    zero: int = 0
    groups: int = 1
    table: Tensor | None = None
    halo: Tensor | None = None
    residual: Tensor | None = None
    more: float = 1.0
    low: int = 0
    high: int = 255

    def takes(self, form: str) -> bool:
        """True if a form, e.g. "convolve_avx2", computes this convolution."""
        adds = self.residual is not None
        if form.startswith("convolve"):
            return takes(form, self.weight, self.groups)
        return not adds and self.table is not None and takes(form, self.weight, self.groups)

    def by_torch(self) -> Tensor:
        """Compute the result (n, O) by torch: the reference, whose bits the kernels give."""
        beyond = torch.full((1, self.rows.shape[1]), self.zero, dtype=torch.uint8)
        known = torch.cat([self.rows, beyond, *([] if self.halo is None else [self.halo])]).double()
        table = torch.arange(len(self.rows)).view(-1, 1) if self.table is None else self.table.long()
        read = (known[table] - self.zero).unflatten(2, (self.groups, -1))
        weight = self.weight.squeeze(3).double().unflatten(0, (self.groups, -1))
        sums = torch.einsum("ntgc,goct->ngo", read, weight).flatten(1)
        value = _multiply_add(sums.float(), self.scale, self.bias)
        if self.residual is not None:
            value = _multiply_add(self.residual.float(), torch.tensor(self.more), value)
        return value.clamp(self.low, self.high).round().to(torch.uint8)

    def packed(self, form: str) -> tuple[Tensor, ...]:
        """Return the memory of the weight, and of the constants of each output, for a form."""
        offset = -self.zero * self.weight.flatten(1).sum(1, dtype=torch.int32)
        constants = (offset.float(),) if form.startswith("grouped") else (offset, self.scale, self.bias)
        return pack(form, self.weight, self.groups, *constants)

    def call(self, form: str, memory: tuple[Tensor, ...]) -> Tensor:
        """Compute the result (n, O) by a form of the kernels, from what `packed` returned."""
        kernel = getattr(library(), form)
        kernel.restype = ctypes.c_long
        weight, *constants = memory
        n, taps = (len(self.rows), 1) if self.table is None else self.table.shape
        channels = self.weight.shape[1] if form.startswith("convolve") else self.rows.shape[1]
        out = torch.empty(n, len(self.weight), dtype=torch.uint8)
        beyond = torch.full((self.rows.shape[1],), self.zero, dtype=torch.uint8)
        buffers = (_place(tensor) for tensor in (self.rows, self.halo, beyond, self.table))
        reading = Reading(*buffers, len(self.rows), n, taps, channels, self.rows.shape[1], None)
        if not n:
            return out
        if form.startswith("grouped"):
            ends = ctypes.c_double(self.low), ctypes.c_double(self.high)
            finish = (_place(tensor) for tensor in (weight, *constants, self.scale, self.bias, None, out))
            code = kernel(ctypes.byref(reading), *map(ctypes.c_void_p, finish), ctypes.c_long(1), *ends)
        else:
            finish = (_place(tensor) for tensor in (*constants, self.residual, out))
            result = Result(*finish, len(self.weight), self.more, self.low, self.high)
            groups = (ctypes.c_long(self.groups),) if form.startswith("convolve") else ()
            code = kernel(
                ctypes.byref(reading), ctypes.byref(result), ctypes.c_void_p(_place(weight)), *groups
            )
        check_code(code, form)
        return out


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _multiply_add(value: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """Compute value * factor + shift in float32 with a single rounding; in float64 the product is exact."""
    return (value.double() * factor.double() + shift.double()).float()


def forms_here(kinds: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """Return the forms of the 8-bit kernels that this processor can run, widest instruction set first."""
    names = (f"{kind}_{name}" for name in reversed(isa.allowed()) for kind in kinds)
    return tuple(name for name in names if hasattr(library(), name))


def sides_of(
    height: int, width: int, channels: int, outputs: int, side: int, adds: bool
) -> dict[str, Callable[[], object]]:
    """Return the calls to compare."""
    count, pad = height * width, side // 2
    weight = torch.randint(-127, 128, (outputs, channels, side, side), dtype=torch.int8)
    image = torch.randint(0, 256, (1, channels, height, width), dtype=torch.uint8)
    image = image.contiguous(memory_format=torch.channels_last)
    rows, scale = image.permute(0, 2, 3, 1).reshape(count, channels), torch.rand(outputs) / weight[0].numel()
    residual = torch.randint(0, 256, (count, outputs), dtype=torch.uint8) if adds else None
    places = F.pad(torch.arange(count).view(1, 1, height, width).float(), [pad] * 4, value=count)
    table = F.unfold(places, side)[0].T.int().contiguous() if side > 1 else None
    work = Convolution(
        rows, weight.flatten(2).unsqueeze(3), scale, torch.rand(outputs), table=table, residual=residual
    )
    sides: dict[str, Callable[[], object]] = {}
    for form in forms_here(("convolve_limited", "convolve")):
        if work.takes(form):
            memory = work.packed(form)
            sides[form] = lambda form=form, memory=memory: work.call(form, memory)
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
