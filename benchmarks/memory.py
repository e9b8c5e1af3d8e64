"""Measure the peak memory of one call of each side of `cadsurgery bench`.

    python -m benchmarks.memory resnet50 mobilenet_v2 --fractions 1,0.5,0.34,0 --output memory.json

The peak is the growth of the resident set in a process that does nothing else. The report is that of `cadsurgery
bench --json` with `memory_mib` and `memory_ratio` in its rows; `benchmarks/speed_report.py` makes a table of it. Linux
only: its kernel records the peak of each process and resets it on request.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cadsurgery.masks import Budget
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.tasks.bench import bench, convert
from cadsurgery.tasks.sides.engine_sides import HIGH, LOW, InTorch
from cadsurgery.tasks.task_options import Benchmark

PROCESS = Path("/proc/self")
# Allocations from this many bytes on are mapped by glibc and returned to the system when freed. Its default threshold
# grows up to 32 MiB; smaller allocations leave holes in the heap, which can double the peak by a different amount in
# every run.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_raised_by(run: Callable[[], object]) -> float:
    """Return by how many MiB a call raises the peak of the resident set above its size before the call."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library can return freed memory
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # if the peak cannot be reset, the peak so far is the base
        (PROCESS / "clear_refs").write_text("5")
    before = _peak_mib()
    run()
    return _peak_mib() - before


def run_alone(code: str, argument: str, gives_back: bool = True) -> str:
    """Run Python code with an argument in a new process and return the last line that it prints.

    If it `gives_back` freed memory to the system at once, its peak counts only memory in use; that takes time.
    """
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    environment = {**os.environ, **(_MAPPED if gives_back else {}), "PYTHONPATH": path}
    command = [sys.executable, "-c", f"import sys; {code}", argument]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()[-1]


def _peak_mib() -> float:
    """Return the peak of this process alone; `getrusage` would include the peak of its parent."""
    lines = (PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def print_peak(task: str) -> None:
    """Build one side, run it, and print by how many MiB a call raises the peak of the resident set."""
    arguments = ast.literal_eval(task)
    setup, share = Benchmark(**arguments["setup"]), arguments["fraction"]
    torch.set_num_threads(setup.threads)
    net, image, _ = convert(arguments["network"], arguments["mask"], setup)
    runs, mask = InTorch(net), arguments["mask"]
    run = runs.dense(share, image) if isinstance(share, str) else runs.under(Budget(mask, share))
    del net, runs
    with torch.inference_mode():
        run(image)  # one-time memory: packed weights, the libraries' own
        print(peak_raised_by(lambda: run(image)))


def add_memory(report: dict[str, Any], mask: str, setup: dict[str, Any]) -> None:
    """Measure the peak of each side of a report of `bench`, and add it to the rows."""
    for network in report["networks"]:
        task = {"network": network["model"], "mask": mask}
        task["setup"] = {**setup, "fill": network["fill"], "threads": report["threads"]}
        sides = {HIGH: network["dense_high"], LOW: network["dense_low"]}
        sides |= {row["fraction"]: row for row in network["rows"]}
        for share, row in sides.items():
            code = f"from {__spec__.name} import print_peak; print_peak(sys.argv[1])"
            row["memory_mib"] = float(run_alone(code, repr({**task, "fraction": share})))
            row["memory_ratio"] = row["memory_mib"] / network["dense_high"]["memory_mib"]


def main() -> None:
    """Measure the networks, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--mask", default=DEFAULT_MASK)
    parser.add_argument("--fractions", default="1,0.5,0.34,0")
    parser.add_argument("--fill", default="nearest", help="one or more, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    setup = {"dtype": options.dtype, "size": tuple(options.size), "threads": options.threads, "rounds": 1}
    fractions = [float(share) for share in options.fractions.split(",")]
    report = bench(options.networks, options.mask, fractions, fill=options.fill.split(","), **setup).to_dict()
    add_memory(report, options.mask, setup)
    options.output.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
