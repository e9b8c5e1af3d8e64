"""GPU measurements: whole networks, lattices, floors, training, memory, a profile.

    python benchmarks/gpu_speed.py --json gpu.jsonl
    python benchmarks/gpu_speed.py --parts networks maps --batches 1 4

`--device cpu` with TRITON_INTERPRET=1 in the environment and small sizes runs it without a GPU, and its times mean
nothing then. Weights are random, which times do not depend on.

Parts, in the order in which few minutes serve best:
    networks: the adaptive network under budgets, called layer by layer and recorded, against the network as
        given, eagerly (channels_last, cuDNN's autotuner), as a CUDA graph, and by torch.compile with frozen weights;
        and against its twin at the lowest output stride. Peak memory of each.
    maps: a call that makes lattice and kernel maps, and how often it waits for the device.
    floors: networks whose maps become coarser where the mask keeps nothing, at several shares in clusters, against the
        network as given; with taps found among samples of the network's own grid, and by a table. Needs timm.
    training: a step of both; of the adaptive network also with torch's operations in place of the kernels of batch
        norms, or of all kernels. Peak memory of each.
    profile: the operations of an adaptive call that take longest, in inference and in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements import BACKENDS
from cadsurgery.elements.backends import gpu
from cadsurgery.elements.backends.choose import Backend
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.elements.backends.triton_backend import Triton, TritonSamples
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.invocations import find_lattice
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import Timing, interleaved

KEPT = 0.34  # of the patches, where a part measures one fraction
FLOOR_MODELS = ("networks:unet", "networks:resnet50_pyramid")
FLOOR_SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)
Line = dict[str, Any]


def synchronise() -> None:
    """Wait for the device, if it is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Capture a call as a CUDA graph; without a GPU, or if capture fails, return the call."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # tuning and compilation must happen before capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return run
    return graph.replay


Runs = dict[str, Callable[[], object]]


def measured(runs: Runs, rounds: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time runs in turns, and return their peak memory in MiB too."""
    memory = {}
    for name, run in runs.items():
        for _ in range(3):  # recorded calls are recorded in the second one
            run()
        memory[name] = peak_of(run)
    return interleaved(runs, rounds), memory


def runs_of_given(given: nn.Module, x: Tensor, compiles: bool) -> Runs:
    """Return the calls of the network as given that the others are compared with."""
    runs: Runs = {"as given": partial(given, x), "as given, CUDA graph": recorded(partial(given, x))}
    return runs | ({"as given, compiled": compiled(given, x)} if compiles else {})


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


def as_given(options: argparse.Namespace) -> nn.Module:
    """Build the network with random weights."""
    return cs.build_model(options.model, weights="none").eval()


def adaptive(options: argparse.Namespace) -> Any:
    """Convert the network in float32 on the CPU."""
    height, width = options.size
    example = torch.randn(1, 3, min(height, 128), min(width, 128))
    mask = budget(KEPT)
    return cs.adaptify(as_given(options), mask, example_input=example, verify_laws=False)


def budget(fraction: float) -> str:
    """Return the mask that keeps a fraction of the patches."""
    return f"edges | budget:fraction={fraction}"


def pictures(options: argparse.Namespace, batch: int, dtype: torch.dtype) -> Tensor:
    """Create images (B, 3, H, W) for the networks."""
    x = torch.randn(batch, 3, *options.size).to(options.device, dtype)
    return x.to(memory_format=torch.channels_last)


def on_device(net: Any, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Move a network to the device, dtype and layout of the measurement."""
    return net.to(options.device, dtype).to(memory_format=torch.channels_last)


def unrecorded(net: Any) -> Any:
    """Return an optimised copy that runs layer by layer, as where calls are not recorded."""
    fast = net.optimize()
    fast._recordings = SimpleNamespace(call=lambda *_: None)
    return fast


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor of an output that may be a dict or a list."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def measure_maps(options: argparse.Namespace) -> Iterator[Line]:
    """Yield one line: time of a call with a new mask, and the number of device synchronisations."""
    dtype = torch.bfloat16
    net = on_device(adaptive(options), options, dtype)
    fast, replayed, x = unrecorded(net), net.optimize(), pictures(options, 1, dtype)
    with torch.inference_mode():
        fast(x)
        for _ in range(2):
            replayed(x)
        waits = None
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fast(x)
            torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(one.message) for one in caught)
        program = fast.program
        lattice = find_lattice(program, program.masking(fast.mask), program.bind(x))
        sides = {
            "mask, lattice, stem": lambda: find_lattice(program, program.masking(fast.mask), program.bind(x)),
            "whole call": lambda: fast(x),
            "recorded call": lambda: replayed(x),
            "lattice kept": lambda: program(lambda *_: lattice, program.bind(x)),
        }
        best = interleaved(sides, options.rounds)
    yield {"part": "maps", "waits": waits, **{name: timing.best for name, timing in best.items()}}


def measure_networks(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per batch size and side."""
    dtype = torch.bfloat16
    given, net = on_device(as_given(options), options, dtype), adaptive(options)
    small = torch.randn(1, 3, *(min(length, 256) for length in options.size))
    macs = {fraction: net.macs(small, mask=budget(fraction)).mask for fraction in options.fractions}
    macs_high = net.macs(small, mask="all").mask
    net = on_device(net, options, dtype)
    with torch.inference_mode():
        fast, layered = net.optimize(), unrecorded(net)
    for batch in options.batches:
        x = pictures(options, batch, dtype)
        with torch.inference_mode():
            low = dense_twin(net, net.geometry.max_level, x)
            runs = runs_of_given(given, x, batch == options.batches[0])
            runs["low, CUDA graph"] = recorded(partial(low, x))
            runs["adaptive"] = partial(layered, x)
            for fraction in options.fractions:
                name, call = f"adaptive {fraction}", partial(layered, x, mask=budget(fraction))
                runs[f"{name}, CUDA graph"] = recorded(call)
                runs[f"{name}, recorded"] = partial(fast, x, mask=budget(fraction))
            runs["edges, recorded"] = partial(fast, x, mask="edges")
            best, memory = measured(runs, options.rounds)
            expected = first_tensor(dense_twin(net, 0, x)(x)).float()
            error = first_tensor(fast(x, mask="all")).float() - expected
            largest = float(expected.abs().max())
        fastest = min(timing.best for name, timing in best.items() if name.startswith("as given"))
        for name, timing in best.items():
            line: Line = {"part": "networks", "batch": batch, "side": name, "ms": timing.best}
            line |= {"median": timing.median, "times_faster": fastest / timing.best, "mib": memory[name]}
            share = next((fraction for fraction in options.fractions if f"adaptive {fraction}" in name), None)
            if share is not None:
                ratio = macs_high / macs[share]
                line |= {"macs_ratio": ratio, "realised": fastest / timing.best / ratio}
            yield line
        yield {
            "part": "networks",
            "batch": batch,
            "side": "all high",
            "error": float(error.abs().max()) / largest,
        }


def clusters(image: Tensor) -> Tensor:
    """Return scores (B, h, w) whose largest values lie in a few clusters, as content does; a mask for a budget."""
    y, x = (torch.arange(64, device=image.device) / 64 for _ in range(2))
    waves = torch.sin(9 * y).unsqueeze(1) * torch.sin(7 * x) + 0.3 * torch.sin(17 * x + 11 * y.unsqueeze(1))
    return waves.expand(len(image), -1, -1)


@contextmanager
def without_backends(*kinds: type[Backend]) -> Iterator[None]:
    """Switch off the backends of these kinds in the block."""
    every = BACKENDS[:]
    BACKENDS[:] = [backend for backend in every if not isinstance(backend, kinds)]
    try:
        yield
    finally:
        BACKENDS[:] = every


def measure_floors(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per network, size of the picture, batch size and side."""
    dtype = torch.bfloat16
    for model, size, batch in product(FLOOR_MODELS, options.floor_sizes, options.batches):
        network = cs.build_model(model, weights="none").eval()
        example = torch.randn(1, 3, 64, 64)
        net = cs.adaptify(network, "none", coarsest=32, example_input=example, verify_laws=False)
        masks = {share: f"gpu_speed:clusters | budget:fraction={share}" for share in FLOOR_SHARES}
        small = torch.randn(1, 3, min(size, 256), min(size, 256))
        work = {share: net.macs(small, mask=mask).of_given for share, mask in masks.items()}
        given, net = on_device(network, options, dtype), on_device(net, options, dtype)
        x = torch.randn(batch, 3, size, size).to(options.device, dtype)
        x = x.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            layered, fast = unrecorded(net), net.optimize()
            runs = runs_of_given(given, x, batch == options.batches[0])
            for share, mask in masks.items():
                call = partial(layered, x, mask=mask)
                runs[f"floors {share}, CUDA graph"] = recorded(call)
                runs[f"floors {share}, by tables, CUDA graph"] = recorded(partial(_by_tables, call))
                runs[f"floors {share}, recorded"] = partial(fast, x, mask=mask)
            runs["everything high, recorded"] = partial(fast, x, mask="all")
            best, memory = measured(runs, options.rounds)
            line: Line = {"part": "floors", "model": model, "size": size, "batch": batch}
            fastest = min(timing.best for name, timing in best.items() if name.startswith("as given"))
            ends = best.get("floors 0.0, CUDA graph")
            for name, timing in best.items():
                found = {"side": name, "ms": timing.best, "median": timing.median, "mib": memory[name]}
                found["of_given"] = timing.best / fastest
                share = next((share for share in masks if f"floors {share}," in name), None)
                if share is not None and ends is not None:
                    found["of_line"] = timing.best / (ends.best + share * (fastest - ends.best))
                yield line | found
            for share, mask in masks.items():
                call = partial(layered, x, mask=mask)
                ours, other = (first_tensor(run()).float() for run in (call, partial(_by_tables, call)))
                error = float((ours - other).abs().max() / other.abs().max())
                side = {"side": f"floors {share}, beside tables", "error": error}
                yield line | side | {"macs_of_given": work[share]}


def _by_tables(run: Callable[[], object]) -> object:
    with without_backends(TritonSamples):
        return run()


def compiled(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Compile a network with frozen weights, so that norms are folded, and CUDA graphs; the first call compiles."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    run = torch.compile(net, mode="reduce-overhead")
    run(x)
    return partial(run, x)


def measure_training(options: argparse.Namespace) -> Iterator[Line]:
    """Yield a line per batch size and side: forward, loss, backward under bfloat16 autocast."""
    for batch in options.training_batches:
        sides = training_steps(options, batch)
        with torch.inference_mode(False), torch.enable_grad():
            for run in sides.values():
                run()
            times: dict[str, list[float]] = {name: [] for name in sides}
            memory = {name: peak_of(run) for name, run in sides.items()}
            for _ in range(options.rounds):
                for name, run in sides.items():
                    times[name].append(milliseconds(run))
        for name, found in times.items():
            share = min(found) / min(times["as given"])
            line: Line = {"part": "training", "batch": batch, "side": name, "ms": min(found)}
            yield line | {"median": statistics.median(found), "of_given": share, "mib": memory[name]}


@contextmanager
def torch_only(norms_alone: bool) -> Iterator[None]:
    """Compute with torch's operations in the block: batch norms alone, or all works."""
    of_gpu = () if norms_alone else (Triton, TritonSamples)
    with (
        patch.object(Triton, "normalise", lambda _, work: Torch().normalise(work)),
        without_backends(*of_gpu),
    ):
        yield


def training_steps(options: argparse.Namespace, batch: int) -> Runs:
    """Return a step of training (forward, loss, backward, in bfloat16 by autocast) of the network as given and of the
    adaptive one: at three masks, and with torch's operations in place of kernels."""
    given = on_device(as_given(options), options, torch.float32).train()
    net = on_device(adaptive(options), options, torch.float32).train()
    x = pictures(options, batch, torch.float32)
    kind = torch.device(options.device).type

    def step(model: nn.Module, **how: Any) -> None:
        given.zero_grad(set_to_none=True)
        net.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16):
            out = first_tensor(model(x, **how))
        out.float().square().mean().backward()

    def without_kernels(norms_alone: bool) -> None:
        with torch_only(norms_alone):
            step(net)

    return {
        "as given": partial(step, given),
        "adaptive": partial(step, net),
        "adaptive, norms by torch": partial(without_kernels, True),
        "adaptive, all by torch": partial(without_kernels, False),
        "all high": partial(step, net, mask="all"),
        "all low": partial(step, net, mask="none"),
    }


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
    fast, x = unrecorded(on_device(adaptive(options), options, dtype)), pictures(options, 1, dtype)

    def infer() -> None:
        with torch.inference_mode():
            fast(x)

    runs = {"inference": infer, "training": training_steps(options, options.training_batches[0])["adaptive"]}
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    for what, run in runs.items():
        run()
        synchronise()
        with torch.profiler.profile() as profile:
            run()
            synchronise()
        found = sorted(profile.key_averages(), key=lambda event: -getattr(event, by))
        for event in found[:25]:
            line: Line = {"part": "profile", "of": what, "what": event.key[:80], "calls": event.count}
            yield line | {"ms": getattr(event, by) / 1e3}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "networks": measure_networks,
    "maps": measure_maps,
    "floors": measure_floors,
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
    parser.add_argument("--floor-sizes", type=int, nargs="+", default=(1024, 2048))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--training-batches", type=int, nargs="+", default=(2, 8))
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--fractions", type=float, nargs="+", default=(0.1, 0.34, 1.0))
    parser.add_argument("--rounds", type=int, default=10)
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
