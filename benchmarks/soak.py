"""Resident memory of one process over many calls, each with another image size, batch and mask.

    python benchmarks/soak.py [--minutes 30] [--network mobilenet_v2] [--size 64 320] [--output soak.json]

An optimised, a plain converted and the dense network run side by side, each in its own process, on the same images.
Prints the memory in use over time and writes it as JSON. Random weights, float32, on the CPU.

The exit code is 1 if the heap of a side grew by more than --most MiB from the second quarter of the time to the last.

resident: memory of the whole process. heap: memory allocated in it, according to the C library; other growth is
memory that was freed but not returned. tensors: number of tensors that Python sees.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import cadsurgery as cs
from cadsurgery.kernels import isa as isa  # names the kernels in `setting`
from cadsurgery.support.provenance import setting

SIDES = ("dense", "plain", "optimised")
MASKS = ("edges", "random:fraction=0.3", "edges | budget:fraction=0.34", "gradient", "all", "none")
MIB = 1 << 20
_NUMBERS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class Heap(ctypes.Structure):
    """The result of glibc's `mallinfo2`, in its order."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _NUMBERS)


def memory() -> dict[str, float]:
    """Return MiB resident and allocated, and the number of tensors."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    find = ctypes.CDLL(None).mallinfo2
    find.restype = Heap
    heap = find()
    return {
        "resident": round(resident * 4096 / MIB, 1),
        "heap": round((heap.uordblks + heap.hblkhd) / MIB, 1),
        "tensors": sum(issubclass(type(value), Tensor) for value in gc.get_objects()),
    }


def requests(least: int, most: int) -> Iterator[tuple[Tensor, str]]:
    """Yield images and masks without end, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    while True:
        height, width = (int(torch.randint(least, most + 1, (), generator=draw)) for _ in range(2))
        batch, mask = (int(torch.randint(0, many, (), generator=draw)) for many in (3, len(MASKS)))
        yield torch.rand(batch + 1, 3, height, width, generator=draw), MASKS[mask]


def network(side: str, name: str) -> Callable[[Tensor, str], Any]:
    """Return one side as a function of image and mask."""
    torch.manual_seed(0)
    model = cs.build_model(name, "none")
    if side == "dense":
        model = model.to(memory_format=torch.channels_last)
        return lambda image, mask: model(image)
    net = cs.adaptify(model, verify_laws=False)
    net = net.optimize() if side == "optimised" else net
    return lambda image, mask: net(image, mask=mask)


def soak(side: str, options: argparse.Namespace) -> None:
    """Run one side and print a line of JSON at regular intervals."""
    run, until = network(side, options.network), time.monotonic() + 60 * options.minutes
    with torch.no_grad():
        for calls, (image, mask) in enumerate(requests(*options.size)):
            over = calls >= options.calls if options.calls else time.monotonic() > until
            if calls % options.every == 0 or over:
                print(json.dumps({"calls": calls, **memory()}), flush=True)
            if over:
                return
            run(image, mask)


def growth(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the MiB by which the heap grew from the second to the last quarter of the measurements, by their
    medians.

    Memory kept for reuse is allocated by then. 0 for fewer than 8 measurements.
    """
    quarter = len(rows) // 4
    if quarter < 2:
        return 0.0
    second, last = (
        median(row["heap"] for row in part) for part in (rows[quarter : 2 * quarter], rows[-quarter:])
    )
    return max(0.0, last - second)


def watch(side: str, found: list[dict[str, Any]]) -> None:
    """Run one side in a separate process and print its measurements."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.append(row := json.loads(line))
            numbers = "  ".join(f"{key} {value:8.0f}" for key, value in row.items())
            print(f"{side:10} {numbers}", flush=True)
    if process.returncode:
        raise SystemExit(f"the process of {side} ended with {process.returncode}.")


def main() -> None:
    """Run all sides; print and write their memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--calls", type=int, default=0, help="number of calls of each side, instead of --minutes"
    )
    parser.add_argument("--most", type=float, default=16, help="largest growth of a side's heap in MiB")
    parser.add_argument("--every", type=int, default=100, help="calls between two measurements")
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 320), help="least and largest side of an image"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        soak(options.side, options)
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    threads = [threading.Thread(target=watch, args=item) for item in found.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = {"size": options.size, "minutes": options.minutes, "calls": options.calls}
    made = {"network": options.network, **numbers, "setting": setting(torch.device("cpu")), "sides": found}
    options.output.write_text(json.dumps(made, indent=1) + "\n")
    print(made["setting"])
    grown = {side: growth(rows) for side, rows in found.items()}
    if over := [f"{side} by {mib:.0f} MiB" for side, mib in grown.items() if mib > options.most]:
        raise SystemExit(f"memory is not flat: the heap grew: {', '.join(over)}.")


if __name__ == "__main__":
    main()
