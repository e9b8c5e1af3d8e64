"""Count the Python calls of one call of a converted network, and time it.

    python benchmarks/python_calls.py [MODEL] [SIZE]

Counts functions of this package and of others; the time is the best of 60 calls in one thread. If maps are small,
Python takes a notable share of the time.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.support.provenance import describe_run


def main() -> None:
    """Print calls and milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mobilenet_v2")
    parser.add_argument("size", nargs="?", default="256x256")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    height, width = map(int, options.size.split("x"))
    model = cs.build_model(options.model, weights="none").eval()
    mask = "edges:threshold=0.2 | budget:fraction=0.34"
    net = cs.adaptify(model, mask, verify_laws=False).optimize()
    image = street_scene(height, width).reshape(1, 3, height, width)
    image = (image - image.mean()) / image.std()
    calls: Counter[str] = Counter()
    package = f"{Path(cs.__file__).parent}/"

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls["own" if frame.f_code.co_filename.startswith(package) else "other"] += 1

    with torch.no_grad():
        for _ in range(5):
            net(image)
        sys.setprofile(count)
        net(image)
        sys.setprofile(None)
        milliseconds = 1e3 * min(timeit.repeat(lambda: net(image), number=1, repeat=7))
    print(describe_run(torch.device("cpu")))
    print(f"{calls.total()} calls, {calls['own']} of this package; {milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
