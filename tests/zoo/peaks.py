"""What a process of its own runs to measure memory; it imports no more than that needs."""

from __future__ import annotations

import torch

from benchmarks import memory


def print_peak_among_holes(mebibytes: int) -> None:
    """MiB by which a call that frees and takes memory of growing sizes raises the peak; three pieces live at once."""

    def run() -> None:
        before = torch.ones(1)
        for step in range(8):
            before = torch.ones(mebibytes * 2**18 - (8 - step) * 2**16) + before[:1]

    run()
    print(memory.peak_raised_by(run))
