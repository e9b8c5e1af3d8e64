"""GPU measurements: convolutions on elements against cuDNN, lattices, whole networks, training, memory, a profile.

    python benchmarks/gpu_speed.py --json gpu.jsonl
    python benchmarks/gpu_speed.py --parts kernels maps --channels 64 2048

It has not run on a GPU: none was at hand. `--device cpu` with TRITON_INTERPRET=1 in the environment and small sizes
runs every line of it without one (`tests/elements/test_gpu_kernel.py` does), and its times mean nothing then. Weights
are random, which times do not depend on.

Parts, in the order in which thirty minutes serve best:
    kernels: a convolution of elements as users call it, with 1 and 9 taps, on lattices of several active fractions,
        against cuDNN's dense one with as many outputs: rates of multiply-accumulates. Then the block sizes that
        Triton chose for each shape.
    maps: a call that makes lattice and kernel maps, and how often it waits for the device.
    networks: the adaptive network under a budget, eagerly, compiled, and as a CUDA graph, against the dense twins
        eagerly (channels_last, cuDNN's autotuner) and by torch.compile(mode="max-autotune"). Peak memory of each.
    training: a step of both.
    profile: the operations of an adaptive call that take longest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.backends import gpu, triton_kernels
from cadsurgery.elements.functional import Elements, conv2d
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

BLOCK = 4  # side of a patch in fine pixels: R_K of the stages 8 -> 16 -> 32
FRACTIONS = (0.1, 0.34, 0.9, 1.0)  # 1.0 is an ordinary convolution
REPEATS = 20  # calls of a kernel in one graph, so that launch time does not count
Line = dict[str, Any]


def synchronise() -> None:
    """Wait for the device, if it is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def captured(run: Callable[[], object], repeats: int = 1) -> Callable[[], object] | None:
    """Capture calls as a CUDA graph; None if capture fails."""
    if not torch.cuda.is_available():
        return lambda: [run() for _ in range(repeats)]
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # tuning and compilation must happen before capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


def peak_of(run: Callable[[], object]) -> float:
    """Return the MiB by which a call raises the allocated memory, including its results; 0 without a GPU."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def lattice_of(fraction: float, count: int, device: torch.device) -> Lattice:
    """Build a lattice with about `count` elements: random 4 x 4 blocks at level 0, the rest at level 2."""
    rows = max(1, round((count / (1 + 15 * fraction)) ** 0.5))
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows * rows, generator=generator).argsort()
    levels = torch.where(order < round(fraction * rows * rows), 0, 2).view(1, rows, rows)
    levels = levels.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return Geometry((2, 2)).lattice(levels.to(device)).at(2)


def measure_kernels(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per number of channels, taps, dtype and fraction."""
    device = torch.device(options.device)
    for channels in options.channels:
        for taps, dtype in ((9, torch.bfloat16), (1, torch.bfloat16), (9, torch.float16), (9, torch.float32)):
            side = round(taps**0.5)
            layer = nn.Conv2d(channels, channels, side, padding=side // 2, bias=False).to(device, dtype)
            layer = layer.to(memory_format=torch.channels_last)
            for fraction in FRACTIONS:
                lattice = lattice_of(fraction, options.count, device)
                rows = torch.randn(len(lattice), channels, device=device, dtype=dtype)
                height = max(1, round(len(lattice) ** 0.5))
                image = torch.randn(
                    1, channels, height, -(-len(lattice) // height), device=device, dtype=dtype
                )
                image = image.contiguous(memory_format=torch.channels_last)
                x = Elements(rows, lattice)
                with torch.inference_mode():
                    ours = partial(on_elements, x, layer, 4)
                    sides = {
                        "ours": captured(ours, REPEATS) or ours,
                        "cuDNN": captured(partial(layer, image), REPEATS) or partial(layer, image),
                    }
                best = {
                    name: timing.best / REPEATS for name, timing in interleaved(sides, options.rounds).items()
                }
                macs = {
                    "ours": len(rows) * taps * channels**2,
                    "cuDNN": image[0, 0].numel() * taps * channels**2,
                }
                rates = {name: macs[name] / best[name] / 1e9 for name in best}
                yield {
                    **{"part": "kernels", "channels": channels, "taps": taps, "dtype": str(dtype)},
                    **{
                        "fraction": fraction,
                        "outputs": len(rows),
                        "ms": best["ours"],
                        "cudnn_ms": best["cuDNN"],
                    },
                    **{"tera_macs": rates["ours"], "of_cudnn": rates["ours"] / rates["cuDNN"]},
                }
    yield from tuned()


def tuned() -> Iterator[Line]:
    """Yield a line per kernel and shape: the fastest configuration here."""
    for name in ("product", "depthwise", "product_weight", "depthwise_weight"):
        chosen = getattr(getattr(triton_kernels, name), "cache", {})
        for key, config in chosen.items():
            yield {"part": "tuned", "kernel": name, "shape": str(key), "config": str(config)}


def on_elements(x: Elements, layer: nn.Conv2d, spacing: int) -> Elements:
    """Apply a layer to elements; samples of its grid are `spacing` fine pixels apart."""
    window = Window(layer.kernel_size, padding=(layer.padding[0],) * 4, spacing=spacing)  # type: ignore[arg-type]
    return conv2d(x, layer.weight, layer.bias, window, x.lattice)


def adaptive(options: argparse.Namespace) -> Any:
    """Convert the network in float32 on the CPU, where conversion verifies it."""
    height, width = options.size
    model = cs.build_model(options.model, weights="none").eval()
    mask = f"edges | budget:fraction={options.fraction}"
    example = torch.randn(1, 3, min(height, 128), min(width, 128))
    return cs.adaptify(model, mask, example_input=example, verify_laws=False)


def pictures(options: argparse.Namespace, batch: int, dtype: torch.dtype) -> Tensor:
    """Create images (B, 3, H, W) for the networks."""
    x = torch.randn(batch, 3, *options.size).to(options.device, dtype)
    return x.to(memory_format=torch.channels_last)


def on_device(net: Any, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Move a network to the device, dtype and layout of the measurement."""
    return net.to(options.device, dtype).to(memory_format=torch.channels_last)


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor of an output that may be a dict or a list."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def measure_maps(options: argparse.Namespace) -> Iterator[Line]:
    """Yield one line: time of a call with a new mask, and the number of device synchronisations."""
    dtype = torch.bfloat16
    fast = on_device(adaptive(options), options, dtype).optimize()
    x = pictures(options, 1, dtype)
    with torch.inference_mode():
        fast(x)
        waits = None
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fast(x)
            torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(one.message) for one in caught)
        program = fast.program
        lattice = program.find_lattice(program.masking(fast.mask), x)
        sides = {
            "mask, lattice, stem": lambda: program.find_lattice(program.masking(fast.mask), x),
            "whole call": lambda: fast(x),
            "lattice kept": lambda: program(lambda *_: lattice, program.bind(x)),
        }
        best = interleaved(sides, options.rounds)
    yield {"part": "maps", "waits": waits, **{name: timing.best for name, timing in best.items()}}


def measure_networks(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per batch size and side."""
    dtype = torch.bfloat16
    for batch in options.batches:
        net, x = on_device(adaptive(options), options, dtype), pictures(options, batch, dtype)
        with torch.inference_mode():
            fast = net.optimize()
            high, low = (dense_twin(net, level, x) for level in (0, net.geometry.max_level))
            runs: dict[str, Callable[[], object]] = {
                "dense high": partial(high, x),
                "dense low": partial(low, x),
                "adaptive": partial(fast, x),
                "adaptive, all high": partial(fast, x, mask="edges | budget:fraction=1.0"),
            }
            if options.compile:
                for name, function in (("dense high", high), ("dense low", low)):
                    runs[f"{name}, max-autotune"] = partial(torch.compile(function, mode="max-autotune"), x)
                runs["adaptive, compiled"] = partial(torch.compile(fast), x)
            fast(x)
            active = fast.active_fraction
            error = first_tensor(fast(x, mask="all")).float() - first_tensor(high(x)).float()
            sides, kept, memory = dict[str, Callable[[], object]](), set[str](), dict[str, float]()
            for name, run in runs.items():
                try:
                    run()
                    memory[name] = peak_of(run)
                except Exception as failure:  # of a compiler; the other sides are still measured
                    yield {"part": "networks", "batch": batch, "side": name, "failed": str(failure)[:300]}
                    continue
                sides[name] = run
                graph = (
                    captured(run) if "max-autotune" not in name else None
                )  # this mode captures a graph itself
                if graph is not None:
                    sides[f"{name}, CUDA graph"] = graph
                    kept.add(name)
            best = interleaved(sides, options.rounds)
        macs = {
            "dense high": net.macs(x, mask="all").mask,
            "dense low": net.macs(x, mask="none").mask,
            "adaptive": net.macs(x).mask,
        }
        for name, timing in best.items():
            graph_high = best.get("dense high, CUDA graph", best["dense high"]).best
            yield {
                **{
                    "part": "networks",
                    "batch": batch,
                    "side": name,
                    "ms": timing.best,
                    "median": timing.median,
                },
                **{"of_dense_high": timing.best / graph_high, "mib": memory.get(name.split(", CUDA")[0])},
                **{"macs_ratio": macs["dense high"] / macs["adaptive"], "active": active},
                "largest_difference": float(error.abs().max()),
            }


def measure_training(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per side: forward, loss, backward under bfloat16 autocast."""
    net = on_device(adaptive(options), options, torch.float32).train()
    x = pictures(options, options.training_batch, torch.float32)
    kind = torch.device(options.device).type

    def step(mask: str | None) -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16):
            out = first_tensor(net(x, mask=mask))
        out.float().square().mean().backward()

    sides = {
        "all high": partial(step, "all"),
        "adaptive": partial(step, None),
        "all low": partial(step, "none"),
    }
    with torch.inference_mode(False), torch.enable_grad():
        for run in sides.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in sides}
        memory = {name: peak_of(run) for name, run in sides.items()}
        for _ in range(options.rounds):
            for name, run in sides.items():
                times[name].append(milliseconds(run))
    for name in sides:
        yield {"part": "training", "side": name, "ms": min(times[name]), "mib": memory[name]}


def milliseconds(run: Callable[[], object]) -> float:
    """Measure one call with gradients, which `interleaved` turns off."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def measure_profile(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per operation, the slowest first."""
    dtype = torch.bfloat16
    fast, x = on_device(adaptive(options), options, dtype).optimize(), pictures(options, 1, dtype)
    with torch.inference_mode():
        fast(x)
        synchronise()
        with torch.profiler.profile() as profile:
            fast(x)
            synchronise()
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    found = sorted(profile.key_averages(), key=lambda event: -getattr(event, by))
    for event in found[:25]:
        yield {
            "part": "profile",
            "what": event.key[:80],
            "calls": event.count,
            "ms": getattr(event, by) / 1e3,
        }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "kernels": measure_kernels,
    "maps": measure_maps,
    "networks": measure_networks,
    "training": measure_training,
    "profile": measure_profile,
}


def clocks() -> str:
    """Return the driver's description of the device, if there is one."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def main() -> None:
    """Measure, print each line as soon as it is known, and append it to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="deeplabv3_resnet101")
    parser.add_argument("--channels", type=int, nargs="+", default=(64, 128, 256, 512, 1024, 2048))
    parser.add_argument("--count", type=int, default=32768, help="approximate number of outputs of a kernel")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--training-batch", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--fraction", type=float, default=0.34)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="file to append lines to")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not (torch.cuda.is_available() and gpu.available(device)):
        sys.exit("This benchmark needs Triton and a CUDA device from Ampere on; none was found.")
    torch.backends.cudnn.benchmark = True

    def show(line: Line) -> None:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in line.items()
            )
        )
        sys.stdout.flush()
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    show({**describe_run(device), "driver": clocks()})
    for part in options.parts:
        for line in PARTS[part](options):
            show(line)
    show({"driver": clocks()})


if __name__ == "__main__":
    main()
