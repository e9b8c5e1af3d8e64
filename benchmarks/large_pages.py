"""The cost of memory for large results: adding two maps into existing memory, fresh memory, and large pages.

    python benchmarks/large_pages.py [--mib 32] [--rounds 10]

Processor time of one thread, the best round; see `cadsurgery/support/pages.py`.
"""

from __future__ import annotations

import argparse
import time

import torch

from cadsurgery.support.pages import new_memory
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved


def main() -> None:
    """Print the times in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=32, help="size of a map")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    one = torch.randn(options.mib << 18)
    other, there = torch.randn_like(one), torch.empty_like(one)
    sides = {
        "memory that is there": lambda: torch.add(one, other, out=there),
        "fresh memory": lambda: torch.add(one, other, out=torch.empty_like(one)),
        "fresh memory in large pages": lambda: torch.add(one, other, out=new_memory(one, *one.shape)),
    }
    times = interleaved(sides, options.rounds, clock=time.process_time)
    print(f"{options.mib} MiB; {setting(torch.device('cpu'))}\n\n| into | CPU ms |\n|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {taken.best:.1f} |")


if __name__ == "__main__":
    main()
