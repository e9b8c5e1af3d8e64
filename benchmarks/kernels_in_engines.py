"""Time converted networks in engines with this package's kernels, beside the engines' own operations and torch.

    python -m benchmarks.kernels_in_engines resnet50 FOLDER [--rounds 5]
    python -m benchmarks.kernels_in_engines camvid FOLDER --data DATA [--rounds 9]

`camvid` is the trained network of recipes/camvid_mobilenetv2, `detail | budget:fraction=0.1`, 8 to 16, guided, on one
image of 360 x 480; another name is torchvision's network with random weights, `edges | budget:fraction=0.34`, 8 to 32,
linear, 512 x 1024. One thread; all sides in turn in each round. Files are written to FOLDER, and kept for the next run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import cadsurgery as cs
from benchmarks.trained import NETWORKS
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export.dense import write_dense
from cadsurgery.network.export.engines import ENGINES, options_for

RUNTIMES = ("onnx", "onnx-kernels", "openvino", "openvino-kernels")


def converted(name: str, data: Path | None) -> tuple[cs.AdaptiveModel, Tensor]:
    """Return a converted network and its image."""
    if name == "camvid":
        assert data is not None, "camvid needs --data"
        model, pictures = NETWORKS["camvid-8"](data)
        image, mask, strides, fill = pictures[0][0][None], "detail | budget:fraction=0.1", (8, 16), "guided"
    else:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        image, mask, strides, fill = (
            torch.randn(1, 3, 512, 1024),
            "edges | budget:fraction=0.34",
            (8, 32),
            "linear",
        )
    return cs.adaptify(model, mask, output_stride=strides, fill=fill, example_input=image), image


def sides_of(net: cs.AdaptiveModel, image: Tensor, folder: Path) -> dict[str, Callable[[Tensor], Any]]:
    """Return the calls to time: dense networks and the converted one, in torch and in engines."""
    sides: dict[str, Callable[[Tensor], Any]] = {"converted, torch, optimize()": net.optimize()}
    for words, level in (("dense high", 0), ("dense low", net.geometry.max_level)):
        sides[f"{words}, torch"] = dense_twin(net, level, image)
        for runtime in ("onnx", "openvino"):
            path = folder / f"{runtime}-{words.replace(' ', '-')}.onnx"
            if not path.exists():
                write_dense(net, level, image, path, ENGINES[runtime])
            sides[f"{words}, {ENGINES[runtime].name}"] = ENGINES[runtime](path, 1)
    for runtime in RUNTIMES:
        path = folder / f"{runtime}-converted.onnx"
        if not path.exists():
            cs.export(net, image, path, **options_for(runtime))
        sides[f"converted, {ENGINES[runtime].name}"] = ENGINES[runtime](path, 1)
        if runtime == "onnx-kernels":
            sides["converted, ONNX Runtime without the library"] = ENGINES["onnx"](path, 1)
    return sides


def main() -> None:
    """Print the share of the work and the best and median milliseconds of each side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    net, image = converted(options.network, options.data)
    sides = sides_of(net, image, options.folder)
    print(net.macs(image))
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, run in sides.items():
                begin = time.perf_counter()
                run(image)
                times[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in times.items():
        print(f"{name:44} best {min(values):8.1f} ms, median {sorted(values)[len(values) // 2]:8.1f} ms")


if __name__ == "__main__":
    main()
