"""Networks whose picture is mostly empty: time with floors against the straight line between the extremes.

    python -m benchmarks.floor_speed [--networks unet resnet50_pyramid] [--size 512] [--coarsest 16 32] [--runs onnx]

The kept cells form clusters, as content does. *Line* is the time divided by that of the straight line between the
network as given and everything at the floor. Weights are random, which times do not depend on.

--runs: `float32` (as given: torch, channels_last, batch norm folded), `bfloat16` (as given: the same in it),
`onnx` (a file of any size with this
package's kernels in ONNX Runtime; as given: the network's own file).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cadsurgery as cs
from benchmarks import networks
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export.engines import ENGINES, engine_for
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.sides.dense_file import write_dense

SHARES = (0.1, 0.3, 0.6)


def clustered(share: float, size: int, cell: int) -> Tensor:
    """Return a bool map (1, size, size) that keeps a share of the cells, in a few clusters."""
    torch.manual_seed(0)
    heights = F.interpolate(torch.rand(1, 1, 4, 4), size=(size // cell,) * 2, mode="bicubic")[:, 0]
    limit = heights.flatten().sort().values[int((1 - share) * heights.numel())]
    return (heights >= limit).repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def main() -> None:
    """Print a row for each floor and share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["unet"], help="functions of benchmarks.networks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", nargs="+", default=["float32"], choices=["float32", "bfloat16", "onnx"])
    options = parser.parse_args()
    print(describe_run(torch.device("cpu")))
    image = torch.rand(1, 3, 512, 512).contiguous(memory_format=torch.channels_last)
    for name in options.networks:
        for cell in (16, 32):
            for kind in options.runs:
                measure(name, cell, image, options.rounds, kind)


def measure(name: str, cell: int, image: Tensor, rounds: int, kind: str) -> None:
    """Print the rows of a network, a floor and a kind of run."""
    net = cs.adaptify(getattr(networks, name)().eval(), "none", coarsest=cell, verify_laws=False)
    masks: dict[str, tuple[float, Any]] = {"all": (1.0, "all"), "none": (0.0, "none")}
    masks |= {f"{share} high": (share, clustered(share, image.shape[2], cell)) for share in SHARES}
    with TemporaryDirectory() as folder:
        call, given = _RUNS[kind](net, image, Path(folder))
        runs = {key: partial(call, mask) for key, (_, mask) in masks.items()}
        timings = interleaved({"given": given, **runs}, rounds)
    times = {key: timing.best for key, timing in timings.items()}
    print(f"{name}, floor {cell}, {kind}: as given {times['given']:.1f} ms")
    for key, (share, mask) in masks.items():
        line = times["none"] + share * (times["given"] - times["none"])
        counted = net.macs(image.to(next(net.parameters()).dtype), mask=mask)
        work, ratio = counted.of_given, times[key] / times["given"]
        print(f"  {key:9} MACs {work:5.2f}  {times[key]:8.1f} ms", end="")
        print(f", {ratio:.2f} of given, {times[key] / line:.2f} of the line", flush=True)


Run = tuple[Callable[[Any], Any], Callable[[], Any]]  # a call with a mask, and one of the network as given


def _in_torch(net: cs.AdaptiveModel, image: Tensor, _: Path, dtype: torch.dtype = torch.float32) -> Run:
    net, image = net.to(dtype), image.to(dtype)
    fast, given = net.optimize(), dense_twin(net, 0, image)
    return lambda mask: fast(image, mask=mask), partial(given, image)


def _in_onnx(net: cs.AdaptiveModel, image: Tensor, folder: Path) -> Run:
    write_dense(net, 0, image, folder / "given.onnx", ENGINES["onnx"])
    cs.export(net, image[:, :, :256, :256], folder / "floors.onnx", level_map=True, with_kernels=True)
    threads = torch.get_num_threads()
    given = ENGINES["onnx"](folder / "given.onnx", threads)
    fast = engine_for("onnx", with_kernels=True)(folder / "floors.onnx", threads)

    def call(mask: Any) -> Any:
        high = torch.full(image[:, 0].shape, mask == "all") if isinstance(mask, str) else mask
        return fast(image, (~high).long() * net.plan.max_level)

    return call, partial(given, image)


_RUNS: dict[str, Callable[[cs.AdaptiveModel, Tensor, Path], Run]] = {
    "float32": _in_torch,
    "bfloat16": partial(_in_torch, dtype=torch.bfloat16),
    "onnx": _in_onnx,
}


if __name__ == "__main__":
    main()
