"""Tiles of the Triton kernels: how many outputs and channels a program computes, chosen by rule.

The same layer on the same GPU always gets the same tile, so its results have the same bits, and nothing is tuned when
a network first runs. The rates were measured on an H100 (`benchmarks/gpu_speed.py --parts tiles`); what does not fit
into the shared memory of a smaller GPU is left out there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

# Shared memory that a program can use, in bytes, and multiprocessors, where no GPU is at hand to ask.
_SHARED, _PROCESSORS = 99 << 10, 128


class Tile(NamedTuple):
    """Block sizes, warps and pipeline stages of a program.

    Attributes:
        n: outputs.
        o: output channels; 1 for kernels that have none of their own.
        c: channels that are summed at a time or, without sums over channels, that are computed.
        warps: warps of 32 threads.
        stages: blocks in flight.
        rate: multiply-accumulates in a multiprocessor's cycle, relative to the best tile.
    """

    n: int
    o: int
    c: int
    warps: int = 4
    stages: int = 4
    rate: float = 1.0

    def shared(self, size: int) -> int:
        """Return the bytes of shared memory that the operands take, of `size` bytes a value."""
        return (self.n + self.o) * self.c * self.stages * size


class Device(NamedTuple):
    """What tiles depend on: the shared memory that a program can use, in bytes, and the number of multiprocessors."""

    shared: int = _SHARED
    processors: int = _PROCESSORS


# In half types and TF32; c is halved for values of four bytes.
PRODUCTS = (
    Tile(128, 256, 64, 8, 4, 1.0),
    Tile(128, 256, 64, 8, 3, 0.97),
    Tile(256, 128, 64, 8, 3, 0.95),
    Tile(128, 128, 64, 8, 4, 0.85),
    Tile(128, 128, 64, 4, 3, 0.85),
    Tile(64, 256, 64, 4, 4, 0.8),
    Tile(64, 128, 64, 4, 4, 0.7),
    Tile(128, 64, 64, 4, 4, 0.7),
    Tile(64, 64, 64, 4, 4, 0.5),
    Tile(128, 32, 64, 4, 4, 0.35),
    Tile(64, 32, 64, 4, 4, 0.3),
    Tile(64, 16, 64, 4, 4, 0.15),
    Tile(32, 32, 32, 4, 3, 0.15),
)
# Products of float32 in full precision, which tensor cores do not compute.
FULL_PRECISION = (Tile(64, 64, 32, 4, 3, 1.0), Tile(64, 32, 32, 4, 3, 0.7), Tile(32, 32, 32, 4, 3, 0.5))
WEIGHT_PRODUCTS = (
    Tile(64, 128, 128, 8, 4, 1.0),
    Tile(64, 128, 64, 4, 4, 0.8),
    Tile(64, 64, 64, 4, 4, 0.6),
    Tile(32, 64, 64, 4, 3, 0.5),
    Tile(32, 32, 32, 4, 3, 0.25),
)
WEIGHT_FULL_PRECISION = (Tile(32, 64, 64, 4, 3, 1.0), Tile(32, 32, 32, 4, 3, 0.5))


def device_of(index: torch.device) -> Device:
    """Return what tiles depend on for a GPU; conservative numbers if it is none."""
    return _properties(index) if index.type == "cuda" and torch.cuda.is_available() else Device()


@lru_cache(64)
def _properties(index: torch.device) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(int(found.shared_memory_per_block_optin), int(found.multi_processor_count))


@lru_cache(4096)
def product_tile(
    count: int, width: int, groups: int, depth: int, size: int, is_full_precision: bool, device: Device
) -> Tile:
    """Return the tile of a product of `count` outputs with `width` channels of `depth` summands per group and tap.

    Args:
        count: outputs, rounded up by `rounded`.
        width: output channels of a group.
        groups: channel groups.
        depth: input channels of a group.
        size: bytes of a value.
        is_full_precision: float32 without TF32.
        device: the GPU.
    """
    tiles = FULL_PRECISION if is_full_precision else PRODUCTS
    return min(_usable(tiles, depth, size, device), key=lambda tile: _time(tile, count, width, groups, device, size))


@lru_cache(4096)
def weight_tile(width: int, depth: int, size: int, is_full_precision: bool, device: Device) -> Tile:
    """Return the tile of the weight's gradient: `o` x `c` of its entries, from `n` outputs at a time."""
    tiles = WEIGHT_FULL_PRECISION if is_full_precision else WEIGHT_PRODUCTS
    able = [
        tile if size < 4 or is_full_precision else tile._replace(n=tile.n // 2)
        for tile in tiles
        if (tile.o + tile.c) * tile.n * tile.stages * min(size, 2 if not is_full_precision else 4) <= device.shared
    ]
    fitting = [tile for tile in able if tile.o < 2 * width and tile.c < 2 * depth]
    return (fitting or able[-1:])[0]


def rounded(count: int) -> int:
    """Round a number of outputs up, so that tiles, and the bits of results, do not change with every image."""
    step = max(1, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _usable(tiles: tuple[Tile, ...], depth: int, size: int, device: Device) -> list[Tile]:
    deepest = max(16, 1 << (depth - 1).bit_length())
    shaped = [
        tile._replace(c=max(16, min(tile.c // (2 if size == 4 and tile.c > 32 else 1), deepest))) for tile in tiles
    ]
    return [tile for tile in shaped if tile.shared(size) <= device.shared] or shaped[-1:]


def _time(tile: Tile, count: int, width: int, groups: int, device: Device, size: int) -> float:
    """Estimate the time of a product: programs run in waves, as many at once as shared memory has room for."""
    programs = -(-count // tile.n) * groups * -(-width // tile.o)
    at_once = max(1, min(4 if tile.warps == 4 else 2, (device.shared + 1024) // (tile.shared(size) + 1024)))
    waves = -(-programs // (device.processors * at_once))
    return waves * at_once * tile.n * tile.o / tile.rate


def elementwise_tile(channels: int) -> Tile:
    """Return the tile of kernels that only move rows: about 4,096 values a program, with whole rows where they fit."""
    c = min(256, max(16, 1 << (channels - 1).bit_length()))
    return Tile(max(8, 4096 // c), 1, c, 4, 1)


def depthwise_tile(channels: int) -> Tile:
    """Return the tile of depthwise convolutions."""
    c = min(64, max(16, 1 << (channels - 1).bit_length()))
    return Tile(32 if c == 64 else 16, 1, c, 4, 1)
