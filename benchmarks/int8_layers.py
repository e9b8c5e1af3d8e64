"""The time of an optimised copy by layer: random weights, one thread, processor time.

    python benchmarks/int8_layers.py mobilenet_v2 [--precision bfloat16] [--fraction 0.34] [--rounds 5]

Each node of the graph is timed while the whole graph runs; the best round of each counts. The limit of a convolution
is the time of its multiply-accumulates at the highest rate of any layer that takes half a millisecond or more.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

import cadsurgery as cs
from cadsurgery.data.images import normalise, street_scene
from cadsurgery.data.networks import source_of
from cadsurgery.elements.backends.integer_layers import IntegerConv
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter
from cadsurgery.support.provenance import describe_run
from cadsurgery.surgery.hooks import child

LONG = 5e-4  # shortest time in seconds that the processor clock resolves well


class Timed(GraphInterpreter):
    """Runs a graph and records the seconds and the number of rows of each node."""

    def __init__(self, net: AdaptiveModel) -> None:
        super().__init__(net.program, net.program.graph)
        self.seconds, self.rows = dict[fx.Node, float](), dict[fx.Node, int]()

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and record its time."""
        start = time.process_time()
        value = super().run_node(n)
        self.seconds[n] = min(self.seconds.get(n, 1e9), time.process_time() - start)
        found = value.rows if isinstance(value, Elements) else value
        if isinstance(found, Tensor) and found.dim() in (2, 4):
            self.rows[n] = found.numel() // found.shape[1]
        return value


def kind_of(net: AdaptiveModel, node: fx.Node) -> tuple[str, IntegerConv | PackedConv | None]:
    """Return the kind of a node and, if it is one convolution, its layer."""
    attributes = [one for one in node.args if isinstance(one, fx.Node) and one.op == "get_attr"]
    holders = [node.target, *(one.target for one in attributes)]
    paths = [path for path in holders if isinstance(path, str) and path.startswith(f"{KERNELS}.")]
    kernel = child(net, paths[0]) if paths and node.op != "get_attr" else None
    if isinstance(kernel, IntegerConv):
        window = kernel.weight.shape[2:]
        if kernel.groups > 1:
            return "depthwise, grouped", kernel
        if tuple(window) != (1, 1):
            return "several taps", kernel
        return ("1x1 to float32" if kernel.weights.out is None else "1x1 to bytes"), kernel
    if isinstance(kernel, PackedConv) and net.quantisation is None:
        kind = "depthwise, grouped" if kernel.groups > 1 else "x".join(map(str, kernel.weight.shape[2:]))
        return ("rows, " if kernel.window is None else "dense, ") + kind, kernel
    return ("layers in float32" if kernel is not None else "between layers"), None


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--precision", default="int8", choices=("int8", "bfloat16", "float32"))
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--fraction", type=float, default=0.34)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="number of slowest layers to list")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_run(torch.device("cpu")), "\n")
    height, width = map(int, options.size.split("x"))
    mask = f"edges:threshold=0.35,dilation=11 | budget:fraction={options.fraction}"
    model = cs.build_model(options.model, weights="none").eval()
    net = cs.adaptify(model, mask, output_stride=(8, 32), fill="linear", verify_laws=False)
    image = normalise(street_scene(height, width), source_of(model)).unsqueeze(0)
    if options.precision == "int8":
        fast = net.optimize(precision="int8", calibration=image)
    else:
        dtype = getattr(torch, options.precision)
        fast, image = net.to(dtype).optimize(), image.to(dtype)
    program, runs = fast.program, Timed(fast)
    with torch.no_grad():
        for _ in range(options.rounds):
            lattice = program.find_lattice(program.masking(fast.mask), image)
            runs.run(lambda *_, found=lattice: found, image)
    sums, rows = defaultdict[str, list[float]](lambda: [0.0, 0.0, 0]), []
    for node, seconds in runs.seconds.items():
        kind, layer = kind_of(fast, node)
        macs = float(runs.rows[node] * layer.weight.numel()) if layer is not None else 0.0
        total = sums[kind]
        total[0], total[1], total[2] = total[0] + seconds, total[1] + macs, total[2] + 1
        if layer is not None:
            rows.append((seconds, macs, runs.rows[node], tuple(layer.weight.shape), kind))
        elif seconds > 1e-3:
            print(f"{node.name}: {kind}, {1e3 * seconds:.1f} ms")
    best = max(macs / seconds for seconds, macs, *_ in rows if seconds > LONG)
    whole = sum(total[0] for total in sums.values())
    if options.precision == "int8":
        print(f"{fast.quantisation}\n")
    print("| what | nodes | ms | of all | GMAC/s |\n|---|---|---|---|---|")
    for kind, (seconds, macs, count) in sorted(sums.items(), key=lambda item: -item[1][0]):
        rate = f"{macs / seconds / 1e9:.0f}" if macs else ""
        print(f"| {kind} | {count} | {1e3 * seconds:.1f} | {seconds / whole:.2f} | {rate} |")
    print(f"\nhighest rate of a layer: {best / 1e9:.0f} GMAC/s\n")
    print("| weight | kind | rows | ms | limit, ms | GMAC/s |\n|---|---|---|---|---|---|")
    for seconds, macs, count, shape, kind in sorted(rows, reverse=True)[: options.layers]:
        size, limit = "x".join(map(str, shape)), 1e3 * macs / best
        print(
            f"| {size} | {kind} | {count} | {1e3 * seconds:.2f} | {limit:.2f} | {macs / seconds / 1e9:.0f} |"
        )


if __name__ == "__main__":
    main()
