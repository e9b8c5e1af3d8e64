"""Time of interpolating scores back from a sampled image: the published method, ours, and scipy's, interleaved.

    python benchmarks/resampling_back.py [--rounds N] [--output FILE.json]

Milliseconds of processor time on one thread, best and median. The grid has the published smoothness, for an image
with two rectangles. scipy's `LinearNDInterpolator` is skipped if scipy is not installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cadsurgery.methods.resampling.back import _triangulate, invert_warp
from cadsurgery.methods.resampling.locations import upsample
from cadsurgery.resampling import (
    PUBLISHED_SMOOTHNESS,
    boundaries,
    interpolate_back,
    target_locations,
)
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

CASES = ((360, 480, 160, 11), (1024, 1024, 128, 19))  # height, width, samples per side, classes


def grid(height: int, width: int) -> Tensor:
    """Return the sampling grid, (1, 8, 8, 2)."""
    labels = torch.zeros(1, height, width, dtype=torch.int64)
    labels[:, height // 4 : height // 2, width // 3 : width // 2] = 1
    labels[:, 3 * height // 4 : 7 * height // 8, width // 6 : width // 3] = 2
    return target_locations(boundaries(labels, None, None), 8, PUBLISHED_SMOOTHNESS).float()


def points_of(locations: Tensor, samples: int, size: tuple[int, int]) -> Tensor:
    """Return the points (samples^2, 2), in pixels."""
    points = upsample(locations, (samples, samples))[0] * torch.tensor([size[0] - 1, size[1] - 1])
    return points.flatten(0, 1)


def by_triangles(locations: Tensor, samples: int, size: tuple[int, int]) -> object:
    """Return the corners around each pixel, and their weights."""
    return _triangulate(points_of(locations, samples, size), size)


def pixels(size: tuple[int, int]) -> np.ndarray:
    """Return the pixel coordinates (H W, 2)."""
    return np.stack(np.mgrid[: size[0], : size[1]], -1).reshape(-1, 2)


def found_by_scipy(locations: Tensor, samples: int, size: tuple[int, int]) -> object:
    """Find the triangle of each pixel with scipy."""
    from scipy.spatial import Delaunay

    return Delaunay(points_of(locations, samples, size).numpy()).find_simplex(pixels(size))


def by_scipy(scores: Tensor, locations: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate with scipy, as the published code does."""
    from scipy.interpolate import LinearNDInterpolator

    points = points_of(locations, scores.shape[2], size)
    found = LinearNDInterpolator(points.numpy(), scores[0].flatten(1).T.numpy())
    return torch.from_numpy(found(pixels(size))).T.view(1, -1, *size).float()


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for height, width, samples, classes in CASES:
        locations, scores, size = (
            grid(height, width),
            torch.randn(1, classes, samples, samples),
            (height, width),
        )
        sides: dict[str, Callable[[], object]] = {
            "triangulation": partial(interpolate_back, scores, locations, size),
            "inverse": partial(interpolate_back, scores, locations, size, "inverse"),
            "of triangulation: places": partial(by_triangles, locations, samples, size),
            "of inverse: places": partial(invert_warp, locations, (samples, samples), size),
        }
        try:
            import scipy.interpolate  # noqa: F401
        except ImportError:
            print("scipy is not installed: skipped")
        else:
            sides["scipy"] = partial(by_scipy, scores, locations, size)
            sides["of scipy: places"] = partial(found_by_scipy, locations, samples, size)
        times = interleaved(sides, options.rounds, clock=time.process_time)
        rows.append(
            {"case": [height, width, samples, classes], **{name: vars(t) for name, t in times.items()}}
        )
        print(
            f"{height} x {width} pixels from {samples} x {samples} samples, {classes} classes, ms of processor time:"
        )
        for name, timing in times.items():
            print(f"  {name}: {timing.best:.1f} best, {timing.median:.1f} median")
    if options.output is not None:
        document = {**describe_run(torch.device("cpu")), "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
