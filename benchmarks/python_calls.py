"""Count the Python calls of one call of a converted network, and time it.

    python benchmarks/python_calls.py [MODEL] [SIZE] [--plain] [--most 20]

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
from typing import Any

import torch

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.support.provenance import describe_run


def main() -> None:
    """Print calls and milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mobilenet_v2")
    parser.add_argument("size", nargs="?", default="256x256")
    parser.add_argument("--plain", action="store_true", help="the converted network, not its optimised copy")
    parser.add_argument("--most", type=int, default=0, help="number of most-called functions to list")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    height, width = map(int, options.size.split("x"))
    model = cs.build_model(options.model, weights="none").eval()
    mask = "edges:threshold=0.2 | budget:fraction=0.34"
    net: Any = cs.adaptify(model, mask, verify_laws=False)
    net = net if options.plain else net.optimize()
    image = street_scene(height, width).reshape(1, 3, height, width)
    image = (image - image.mean()) / image.std()
    calls: Counter[str] = Counter()
    package = f"{Path(cs.__file__).parent}/"

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            place = (
                code.co_filename.removeprefix(package) if code.co_filename.startswith(package) else "other"
            )
            calls[f"{place}: {code.co_qualname}"] += 1

    with torch.no_grad():
        for _ in range(5):
            net(image)
        sys.setprofile(count)
        net(image)
        sys.setprofile(None)
        milliseconds = 1e3 * min(timeit.repeat(lambda: net(image), number=1, repeat=7))
    others = sum(number for name, number in calls.items() if name.startswith("other"))
    print(describe_run(torch.device("cpu")))
    print(f"{calls.total()} calls, {calls.total() - others} of this package; {milliseconds:.1f} ms")
    for name, number in calls.most_common(options.most):
        print(f"{number:6} {name}")


if __name__ == "__main__":
    main()
