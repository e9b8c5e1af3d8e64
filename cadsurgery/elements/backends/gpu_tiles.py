"""Tiles of the Triton kernels: how many outputs and channels a program computes, chosen by rule.

A tile follows from the shapes and the GPU alone, so that a call repeats its bits, and nothing is tuned when a network
first runs. The rates are from a sweep over layers of DeepLabv3-ResNet101 on an H100, in bfloat16
(docs/bench/gpu_h100_tiles.jsonl); what does not fit into the shared memory of a smaller GPU is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """Block sizes, warps and pipeline stages of a program.

    Attributes:
        n: outputs.
        o: output channels; 1 for kernels that have none of their own.
        c: channels that are summed at a time or, without sums over channels, that are computed.
        warps: warps of 32 threads.
        stages: blocks in flight.
        rate: multiply-accumulates that a multiprocessor does in a microsecond, in millions.
        rest: microseconds that 10,000 results take besides their sums, for loads and stores.
        needs: least compute capability, times ten; older tensor cores keep more in registers, which are too few.
    """

    n: int
    o: int
    c: int
    warps: int = 4
    stages: int = 4
    rate: float = 1.0
    rest: float = 1.8
    needs: int = 80

    def shared(self, size: int) -> int:
        """Return the bytes of shared memory that the operands take, of `size` bytes a value."""
        return (self.n + self.o) * self.c * self.stages * size


class Device(NamedTuple):
    """What tiles depend on.

    Attributes:
        shared: shared memory that a program can use, in bytes.
        processors: multiprocessors.
        capability: compute capability, times ten.
    """

    shared: int = 99 << 10
    processors: int = 128
    capability: int = 80


# For values of two bytes; c is halved for four.
PRODUCTS = (
    Tile(128, 256, 64, 8, 4, 2.61),
    Tile(128, 256, 64, 8, 3, 2.53),
    Tile(128, 128, 64, 4, 3, 2.42, needs=90),
    Tile(128, 128, 64, 8, 3, 2.1),
    Tile(64, 256, 64, 8, 4, 1.96),
    Tile(64, 128, 64, 4, 4, 1.5),
    Tile(128, 64, 64, 4, 4, 1.42),
    Tile(64, 64, 64, 4, 4, 1.1),
    Tile(128, 32, 64, 4, 4, 0.7),
    Tile(64, 32, 64, 4, 4, 0.55),
    Tile(64, 16, 64, 4, 4, 0.28),
    Tile(32, 32, 32, 4, 3, 0.25),
)
# With a residual; several programs at once hide its latency.
RESIDUAL_PRODUCTS = (
    Tile(128, 128, 64, 8, 3, 2.1, 1.9),
    Tile(64, 128, 64, 4, 3, 1.5, 1.7),
    Tile(64, 64, 64, 4, 3, 1.1, 1.7),
    Tile(64, 32, 64, 4, 3, 0.55, 1.7),
    Tile(64, 16, 64, 4, 3, 0.28, 1.7),
    Tile(32, 32, 32, 4, 3, 0.25, 1.7),
)
# Products of float32 in full precision, which tensor cores do not compute.
FULL_PRECISION = (Tile(64, 32, 32, 4, 3, 0.15), Tile(32, 32, 32, 4, 3, 0.1))
WEIGHT_PRODUCTS = (
    Tile(64, 128, 128, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(32, 64, 64, 4, 3),
    Tile(32, 32, 32, 4, 2),
)
WEIGHT_FULL_PRECISION = (Tile(32, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3))


def device_of(index: torch.device) -> Device:
    """Return what tiles depend on for a GPU; conservative numbers if it is none."""
    return _properties(index) if index.type == "cuda" and torch.cuda.is_available() else Device()


@lru_cache(64)
def _properties(index: torch.device) -> Device:
    found: Any = torch.cuda.get_device_properties(index)  # whose types lack some of its attributes
    capability = 10 * found.major + found.minor
    return Device(int(found.shared_memory_per_block_optin), int(found.multi_processor_count), capability)


def tile_of(count: int, *rest: Any) -> Tile:
    """Return the tile of a product of `count` outputs; see `product_tile` for the other arguments."""
    return product_tile(rounded(count), *rest)


@lru_cache(4096)
def product_tile(
    count: int, width: int, groups: int, depth: int, taps: int, size: int, kind: str, device: Device
) -> Tile:
    """Return the tile of a product that is estimated to be the fastest.

    Args:
        count: outputs, rounded up by `rounded`.
        width: output channels of a group.
        groups: channel groups.
        depth: input channels of a group.
        taps: taps of an output.
        size: bytes of a value.
        kind: "full" for float32 without TF32, "residual" if a residual is added, otherwise "".
        device: the GPU.
    """
    narrow = 2 if size == 4 and kind != "full" else 1

    def time(tile: Tile) -> float:
        programs = -(-count // tile.n) * groups * -(-width // tile.o)
        summed = taps * -(-depth // tile.c) * tile.c * narrow
        of_result = summed / (tile.rate * 1e6) + tile.rest * 1e-4
        at_once = 8 // tile.warps  # four warps alone do not keep a multiprocessor busy
        waves = -(-programs // (device.processors * at_once))
        return waves * at_once * tile.n * tile.o * of_result

    return min(usable_products(depth, size, kind, device), key=time)


def tile_kind(is_full_precision: bool, has_residual: bool) -> str:
    """Return the kind of a product, see `product_tile`."""
    return "full" if is_full_precision else "residual" if has_residual else ""


def usable_products(depth: int, size: int, kind: str, device: Device) -> list[Tile]:
    """Return the tiles that fit a device, see `product_tile`; if none does, the smallest."""
    deepest = max(16, 1 << (depth - 1).bit_length())
    tiles = {"full": FULL_PRECISION, "residual": RESIDUAL_PRODUCTS, "": PRODUCTS}[kind]
    narrow = 2 if size == 4 and kind != "full" else 1
    able = [
        tile._replace(c=max(16, min(tile.c // narrow, deepest)))
        for tile in tiles
        if tile.needs <= device.capability
    ]
    return [tile for tile in able if tile.shared(size) <= device.shared] or able[-1:]


@lru_cache(4096)
def weight_tile(width: int, depth: int, size: int, is_full_precision: bool, device: Device) -> Tile:
    """Return the tile of the weight's gradient: `o` x `c` of its entries, from `n` outputs at a time."""
    tiles = WEIGHT_FULL_PRECISION if is_full_precision else WEIGHT_PRODUCTS
    narrow = 2 if size == 4 and not is_full_precision else 1
    able = [tile._replace(n=tile.n // narrow) for tile in tiles]
    able = [tile for tile in able if (tile.o + tile.c) * tile.n * tile.stages * size <= device.shared]
    fitting = [tile for tile in able if tile.o < 2 * width and tile.c < 2 * depth]
    return (fitting or able[-1:])[0]


def rounded(count: int) -> int:
    """Round a number of outputs up, so that tiles, and the bits of results, do not change with every image."""
    step = 1 << max(0, count.bit_length() - 7)
    return -(-count // step) * step


def elementwise_tile(channels: int) -> Tile:
    """Return the tile of kernels that only move rows: up to 4,096 values a program, with whole rows where they fit."""
    c = min(256, max(16, 1 << (channels - 1).bit_length()))
    return Tile(min(64, _values(channels) // c), 1, c, 4, 1)


def depthwise_tile(channels: int) -> Tile:
    """Return the tile of depthwise convolutions."""
    c = min(64, max(16, 1 << (channels - 1).bit_length()))
    return Tile(max(1, min(16, _values(channels) // 2 // c)), 1, c, 4, 1)


def _values(channels: int) -> int:
    """Return how many values a program takes at once; fewer where they cannot be read eight at a time."""
    return 4096 if channels % 8 == 0 else 1024
