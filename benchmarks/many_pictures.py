"""Pictures per second of `cadsurgery run` by one worker, two workers and Ray, and memory from 1,000 to 10,000 pictures.

    python -m benchmarks.many_pictures [--rounds 3] [--count 10000] [--output many.json]

Every run is a command of its own, and its time is that of a run of many pictures minus that of a tenth of them, so that
starting processes and opening the network do not count. The sides take turns. Random weights, float32, on the CPU.

resident: the largest resident set of the command's first process in MiB, as its kernel records it (Linux).
A run begins when all processes of the run before have ended. Ray's processes get the priority of all others, which Ray
lowers, so that whatever else the machine does takes the same from each side.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.support.provenance import setting

SIDES = {
    "one worker": ("--workers", "1"),
    "two workers": ("--workers", "2"),
    "Ray, two processes": ("--ray", "local", "--workers", "2"),
    "one worker, batches of 4": ("--workers", "1", "--batch", "4"),
}
NETWORK, MASK, SIZE = "lraspp_mobilenet_v3_large", "edges | budget:fraction=0.3", (256, 256)
DIFFERENT = 50  # pictures; the others are links to them
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


def write_pictures(folder: Path, count: int) -> Path:
    """Write `count` pictures into a folder."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:06}.jpg"
        if number < DIFFERENT:
            pixels = 255 * street_scene(*SIZE, number).permute(1, 2, 0)
            Image.fromarray(pixels.round().byte().numpy()).save(path, quality=90)
        else:
            os.link(folder / f"{number % DIFFERENT:06}.jpg", path)
    return folder


def run(file: Path, pictures: Path, output: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """Run the command; return its seconds, and the largest resident set of its first process in MiB."""
    command = ("run", file, pictures, "-o", output, *options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cadsurgery.cli", *map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    with suppress(ChildProcessError):  # processes of Ray end seconds after the command
        while os.wait():
            pass
    if status:
        raise SystemExit(f"cadsurgery {' '.join(map(str, command))} failed")
    return seconds, usage.ru_maxrss / 1024


def measure(file: Path, folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each side."""
    few, many = (write_pictures(folder / str(number), number) for number in (count // 10, count))
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in SIDES}
    for turn in range(rounds):
        for name, options in SIDES.items():
            outputs = [folder / f"{name} {turn} {pictures.name}" for pictures in (few, many)]
            both = [run(file, *pair, options) for pair in zip((few, many), outputs, strict=True)]
            taken[name].append(both)
    rows = []
    for name, turns in taken.items():
        speeds = [(count - count // 10) / (many[0] - few[0]) for few, many in turns]
        resident = [max(turn[at][1] for turn in turns) for at in (0, 1)]
        rows.append(
            {"side": name, "pictures_per_second": median(speeds), "all": speeds, "resident_mib": resident}
        )
    return rows


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("many_pictures.json"))
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # processes that outlive a command become children of this one
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "net.safetensors"
        torch.manual_seed(0)
        cs.save(cs.adaptify(cs.build_model(NETWORK, "none"), MASK, verify_laws=False), file)
        rows = measure(file, Path(name), options.count, options.rounds)
    alone = rows[0]["pictures_per_second"]
    for row in rows:
        few, many = row["resident_mib"]
        speed = row["pictures_per_second"]
        print(
            f"{row['side']:26} {speed:7.1f} pictures/s, {speed / alone:.2f} of one worker; "
            f"resident {few:.0f} MiB at {options.count // 10} pictures, {many:.0f} at {options.count}"
        )
    made = {"network": NETWORK, "mask": MASK, "size": SIZE, "count": options.count}
    options.output.write_text(
        json.dumps({**made, "setting": setting(torch.device("cpu")), "rows": rows}) + "\n"
    )


if __name__ == "__main__":
    main()
