"""Does time follow work? A network under budgets of patches against its dense twins, in one interleaved run.

The law: a mask of M multiply-accumulates takes at most 1.06 times what the straight line between the dense
twins gives at M,

    t <= 1.06 (t_low + (M - M_low) / (M_high - M_low) (t_high - t_low)),

the mask itself and all tables included. `fill="linear"` and `"guided"` interpolate rows at level changes and are
granted 0.08 more; networks with depthwise or grouped convolutions, whose work is mostly memory traffic, 1.2 in all. A
miss is a result, not an error: the report states it.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.elements.backends import costs
from cadsurgery.elements.backends.integer import form_here
from cadsurgery.kernels import isa
from cadsurgery.masks import Budget, resolve_mask
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.network.adaptify import adaptify, plan
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export import check_mask, export
from cadsurgery.network.export.dense import write_dense
from cadsurgery.network.export.engines import (
    ENGINES,
    Engine,
    OnnxRuntime,
    OpenVino,
    OpenVinoInBfloat16,
    import_package,
)
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.macs import MacReport
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.files import append_lines, make_folder
from cadsurgery.support.memory import is_measurable, peak_raised_by, run_alone
from cadsurgery.support.provenance import describe_run, device_in_words, find_device
from cadsurgery.support.timing import Timing, interleaved
from cadsurgery.tasks.bench_isa import bench_capped, check_caps, joined, read_caps
from cadsurgery.tasks.bench_method import MethodBench, bench_method
from cadsurgery.tasks.bench_report import BenchReport, BenchRow, BenchSetting, NetworkBench, Rival, Twin
from cadsurgery.tasks.by_method import open_any
from cadsurgery.tasks.export import images_like
from cadsurgery.tasks.for_each import Step, silent
from cadsurgery.tasks.open import example_batch, original
from cadsurgery.tasks.options import Benchmark, Conversion
from cadsurgery.tasks.report import check_outputs
from cadsurgery.tasks.slowest import explain_slowness

FRACTIONS = (1.0, 0.5, 0.34, 0.25, 0.1, 0.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BAND, LINEAR, GROUPED = 1.06, 0.08, 1.2
HIGH, LOW = "dense high", "dense low"
TORCH = "torch"  # the runtime that needs no files
INT8 = "int8"
# What the dense networks are timed in besides, by package and type; both written in float32 first.
RIVALS: dict[str, dict[str, type[Engine]]] = {
    "onnxruntime": {"float32": OnnxRuntime, INT8: OnnxRuntime},
    "openvino": {"float32": OpenVino, "bfloat16": OpenVinoInBfloat16, INT8: OpenVino},
}


def bench(
    networks: str | nn.Module | Sequence[str | nn.Module],
    mask: object = "edges",
    fractions: Sequence[float] = FRACTIONS,
    *,
    fill: Sequence[str] = ("nearest",),
    picture: Path | None = None,
    output: Path | None = None,
    trust: bool = False,
    step: Step = silent,
    **options: Any,
) -> BenchReport | MethodBench:
    """Measure networks with random weights under budgets, and compare their times with the law.

    A network that a method made, or its file, is measured alone, as it is: see `bench_method`.

    Args:
        networks: names, or modules, which keep their weights.
        mask: ranks the patches, which `Budget` then keeps; anything `adaptify` takes as a mask.
        fractions: budgets, each 0..1.
        fill: one or more of "nearest", "linear" and "guided"; each gives an entry of its own, against the same twins.
        picture: PNG to write.
        output: JSON Lines to append the rows of each network to as soon as it is done.
        trust: run code that a file names; see `cadsurgery.load`.
        step: called with what is being done.
        options: further ones of `adaptify`, and what networks are run on: `size`, height and width of the generated
            street scenes, their number `batch`, `dtype` and `device`, `threads`, `rounds` that count, `runtime`: the
            engine, `against`: engines whose dense networks are timed in the same run, `isa`: names of instruction
            sets, each measured in processes of its own (see `bench_isa`), `calibration`: images for int8, and `memory`:
            whether to measure the peak of each side (Linux, CPU, names only). See `Benchmark`.

    Raises:
        InvalidInput: an impossible option.
        UnknownName: an unknown network, mask or dtype.
        CannotConvert: a network has nothing to make adaptive, or the engine does not take it.
        FileError: a file cannot be written.
        CadError: the engine is not installed.
    """
    listed = [networks] if isinstance(networks, str | nn.Module) else list(networks)
    setup = Benchmark(**options)
    for network in listed:
        if (made := open_any(network, trust)) is not None:
            return _alone(made, listed, fractions, setup, picture=picture, output=output, step=step)
    caps = read_caps(setup.isa)
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    _check(listed, mask, fractions, setup, fill)
    check_caps(caps, listed, mask, setup)
    check_outputs(output, picture=picture)
    if len(listed) > 1 or caps:  # a typo in the last name should not wait for the others to be measured
        for network in listed:
            step(f"planning {_name(network)}")
            plan(original(network, "none")[0], setup.output_stride, setup.region)
    budgets = list(dict.fromkeys(map(float, fractions)))
    if caps:
        told: dict[str, Any] = {"mask": mask, "fractions": budgets, "fill": list(fill), "trust": trust}
        told["output"] = output and str(output)
        runs = []
        for network, cap in product(listed, caps):
            step(f"measuring {_name(network)} with {cap}")
            runs.append((cap, bench_capped(cap, setup, networks=network, **told)))
        report = joined(runs, setup)
        report.write(picture=picture)
        return report
    setting = _setting(mask, setup)
    done: list[NetworkBench] = []
    for network in listed:
        with _threads(setup.threads), tempfile.TemporaryDirectory() as folder:
            entries = _compare(network, mask, budgets, setup, fill, step, Path(folder))
        if output is not None:
            provenance = {**setting.to_dict(), "costs": costs.record()["digest"]}
            rows = [{**provenance, **row} for entry in entries for row in entry.lines()]
            append_lines(output, map(json.dumps, rows))
        done += entries
    report = BenchReport(setting, tuple(done), costs.record())
    report.write(picture=picture)
    return report


def _alone(
    net: ConvertedModel,
    listed: list[str | nn.Module],
    fractions: Sequence[float],
    setup: Benchmark,
    **told: Any,
) -> MethodBench:
    """What a method made, without others beside it."""
    if len(listed) > 1:
        raise InvalidInput(
            f"{len(listed)} networks are to be measured, one of which a method made.",
            why="it is compared with what it was made from, not under budgets of a mask.",
            next="measure it in a run of its own.",
        )
    _check_run(setup)
    with _threads(setup.threads or torch.get_num_threads()):
        return bench_method(net, fractions, setup, network=listed[0], **told)


def law(macs: int, high: Twin, low: Twin) -> float:
    """Milliseconds on the straight line between the dense twins."""
    share = (macs - low.macs) / (high.macs - low.macs)
    return low.milliseconds + share * (high.milliseconds - low.milliseconds)


def _compare(
    network: str | nn.Module,
    mask: object,
    fractions: Sequence[float],
    setup: Benchmark,
    fills: Sequence[str],
    step: Step,
    folder: Path,
) -> list[NetworkBench]:
    """One interleaved run of a network with every fill, and what it says; files of an engine are made in a folder."""
    name = _name(network)
    nets: dict[str, AdaptiveModel] = {}
    sides: dict[str, Callable[[], object]] = {}
    fill_of: dict[str, str] = {}
    notes: list[str] = []
    for fill in dict.fromkeys(fills):
        step(f"converting {name}, fill {fill}")
        nets[fill], image, weights = _convert(network, mask, replace(setup, fill=fill))
        make: Callable[..., dict[str, Callable[[Tensor], object]]] = partial(_sides, setup=setup, notes=notes)
        if setup.runtime != TORCH:
            make = partial(_files, setup=setup, folder=folder, step=step)
        for key, run in make(nets[fill], image, mask, fill, fractions, has_twins=bool(sides)).items():
            sides[key], fill_of[key] = partial(run, image), fill
    step(f"counting the multiply-accumulates of {name}")
    counts = {
        _key(fill, fraction): net.macs(image, mask=Budget(mask, fraction))
        for fill, net in nets.items()
        for fraction in fractions
    }
    counted = next(iter(counts.values()))
    if counted.high == counted.low:
        raise InvalidInput(
            f"{name} does the same work at both output strides on {setup.size[0]}x{setup.size[1]} pixels.",
            next="give a larger size.",
        )
    rivals = _rivals(next(iter(nets.values())), setup, folder, step)
    step(f"measuring {name}")
    batch = image.float().contiguous()
    beside = {" ".join(key): partial(run, batch) for key, run in rivals.items()}
    measure = partial(interleaved, clock=time.process_time) if setup.processor_time else interleaved
    times = measure({**sides, **beside}, setup.rounds)
    peaks: dict[str, float] = {}
    for key, fill in fill_of.items() if setup.memory else ():
        step(f"measuring the memory of {name}, {key}")
        peaks[key] = _peak_memory(name, mask, replace(setup, fill=fill), key)

    def twin(key: str, macs: int) -> Twin:
        return Twin(macs, times[key].best, times[key].median, peaks.get(key))

    high, low = twin(HIGH, counted.high), twin(LOW, counted.low)
    slow = {fill: _explain(fill, fractions, sides, times) for fill in nets}
    return [
        NetworkBench(
            model=name,
            weights=weights,
            fill=fill,
            output_stride=net.plan.output_stride,
            band=band(net),
            high=high,
            low=low,
            rows=tuple(
                _row(fraction, counts[key], times[key], peaks.get(key), high, low)
                for fraction in fractions
                for key in [_key(fill, fraction)]
            ),
            notes=(*_notes(net, counted, high, low), *notes, *slow[fill]),
            rivals=tuple(
                Rival(engine, dtype, *(_pair(times[f"{engine} {dtype} {key}"]) for key in (HIGH, LOW)))
                for engine, dtype in dict.fromkeys(key[:2] for key in rivals)
            ),
            isa=os.environ.get(isa.VARIABLE, "").strip().lower(),
        )
        for fill, net in nets.items()
    ]


def _explain(
    fill: str,
    fractions: Sequence[float],
    sides: Mapping[str, Callable[[], object]],
    times: Mapping[str, Timing],
) -> list[str]:
    """The operation that takes the time of the slowest budget, if that is slower than dense high.

    Nothing is said of files in engines, whose operations cannot be seen.
    """
    fraction = max(fractions, key=lambda fraction: times[_key(fill, fraction)].best)
    key = _key(fill, fraction)
    net = getattr(sides[key], "func", None)  # of a partial call: the copy, or a file in an engine
    if not isinstance(net, AdaptiveModel):
        return []
    name, high = f"fraction {fraction:g}", {HIGH: times[HIGH].best}
    told = explain_slowness(name, times[key].best, high, net, sides[key])
    return [told] if told else []


def _pair(time: Timing) -> tuple[float, float]:
    return time.best, time.median


def _row(
    fraction: float, counted: MacReport, time: Timing, peak: float | None, high: Twin, low: Twin
) -> BenchRow:
    line, speedup = law(counted.mask, high, low), high.milliseconds / time.best
    return BenchRow(
        fraction=fraction,
        active_fraction=counted.active_fraction,
        macs=counted.mask,
        milliseconds=time.best,
        milliseconds_median=time.median,
        law_milliseconds=line,
        law_ratio=time.best / line,
        realised=speedup / (high.macs / counted.mask),
        speedup=speedup,
        memory_mib=peak,
        memory_ratio=peak / high.memory_mib if peak is not None and high.memory_mib else None,
    )


def _notes(net: AdaptiveModel, counted: MacReport, high: Twin, low: Twin) -> tuple[str, ...]:
    """What a reader must know to judge the figures."""
    notes = []
    if net.plan.part:
        notes.append(f"MACs are those of the {net.plan.part}, times those of the whole network.")
    notes += filter(None, [describe_not_counted(counted.not_counted)])
    if high.milliseconds <= low.milliseconds:
        notes.append(
            "dense high is not slower than dense low at this size: the law says little; give a larger one."
        )
    return tuple(notes)


def _convert(network: str | nn.Module, mask: object, setup: Benchmark) -> tuple[AdaptiveModel, Tensor, str]:
    """An unverified network, its images (B, 3, H, W) and its weights in words, on the device."""
    model, _ = original(network, "none")
    options: dict[str, Any] = {one.name: getattr(setup, one.name) for one in fields(Conversion)}
    net = adaptify(model, mask, **options, verify_laws=False)
    source = pictures_for(net)
    where: dict[str, Any] = {
        "device": find_device(setup.device),
        "dtype": DTYPES.get(setup.dtype, torch.float32),
    }
    layout = torch.channels_last if setup.runtime == TORCH else torch.contiguous_format
    image = _scenes(source, setup).to(**where).contiguous(memory_format=layout)
    return net.eval().to(**where), image, source.note if isinstance(network, str) else "its own weights"


def _scenes(source: Source, setup: Benchmark) -> Tensor:
    """The images (B, 3, H, W) it is measured on."""
    return torch.cat([example_batch(source, None, setup.size, seed) for seed in range(setup.batch)])


def _sides(
    net: AdaptiveModel,
    image: Tensor,
    mask: object,
    fill: str,
    fractions: Sequence[float],
    has_twins: bool,
    setup: Benchmark,
    notes: list[str],
) -> dict[str, Callable[[Tensor], object]]:
    """What is compared, by key, each a call on images: the dense twins, and the network under each budget.

    Uniform maps are read without filling: where there are twins already, of another fill, they serve all. In 8 bits the
    twins are the copy itself, which has dense maps as rows, too.
    """
    fast, levels = _optimize(net, image, setup), {} if has_twins else {HIGH: 0, LOW: net.geometry.max_level}
    twins: dict[str, Callable[[Tensor], object]] = {}
    for key, level in levels.items():
        if setup.dtype == INT8:
            twins[key] = partial(fast, mask="all" if level == 0 else "none")
        else:
            twins[key] = dense_twin(net, level, image)
    if setup.dtype == INT8 and fast.quantisation is not None:
        notes.append(f"dense high and low are the copy in 8 bits with one level: {fast.quantisation}")
    budgets = {_key(fill, fraction): Budget(mask, fraction) for fraction in fractions}
    return {**twins, **{key: partial(fast, mask=budget) for key, budget in budgets.items()}}


def _optimize(net: AdaptiveModel, image: Tensor, setup: Benchmark) -> AdaptiveModel:
    """The copy that is measured."""
    if setup.dtype != INT8:
        return net.optimize()
    folder = setup.calibration
    images = images_like(image, pictures_for(net), Path(folder)) if folder else image.split(1)
    return net.optimize(precision=INT8, calibration=list(images))


def _rivals(
    net: AdaptiveModel, setup: Benchmark, folder: Path, step: Step
) -> dict[tuple[str, str, str], Callable[[Tensor], object]]:
    """The dense networks in other engines, by engine, type and side, each compared with the network before."""
    rivals: dict[tuple[str, str, str], Callable[[Tensor], object]] = {}
    if not setup.against:
        return rivals
    net = copy.deepcopy(net).float()
    image = _scenes(pictures_for(net), setup)
    for package in setup.against.split(","):
        for dtype, engine in RIVALS[package].items():
            for key, level in ((HIGH, 0), (LOW, net.geometry.max_level)):
                step(f"exporting {key} to {engine.name}, {dtype}")
                path = make_folder(folder / package / key) / f"{dtype}.onnx"
                write_dense(net, level, image, path, RIVALS[package]["float32"])
                if dtype == INT8:
                    to_8_bits(path, engine, [(image,)])
                rivals[engine.name, dtype, key] = engine(path, setup.threads)
    return rivals


def _files(
    net: AdaptiveModel,
    image: Tensor,
    mask: object,
    fill: str,
    fractions: Sequence[float],
    has_twins: bool,
    setup: Benchmark,
    folder: Path,
    step: Step,
) -> dict[str, Callable[[Tensor], object]]:
    """The same as files in an engine, each compared with the network before it is measured; see `_sides`."""
    engine, name = ENGINES[setup.runtime], "net.pt2" if setup.runtime == "aoti" else "net.onnx"
    levels = {} if has_twins else {HIGH: 0, LOW: net.geometry.max_level}
    budgets = {_key(fill, fraction): Budget(mask, fraction) for fraction in fractions}
    sides: dict[str, Callable[[Tensor], object]] = {}
    for key in (*levels, *budgets):
        step(f"exporting {key}")
        path = make_folder(folder / key) / name
        if key in levels:
            write_dense(net, levels[key], image, path, engine)
            if setup.dtype == INT8:
                to_8_bits(path, engine, [(image,)])
        else:
            net.mask = budgets[key]
            check_in = setup.runtime if engine.format == "onnx" else "onnx"
            calibration = image if setup.dtype == INT8 else None
            export(net, image, path, to=engine.format, check_in=check_in, int8=calibration)
        sides[key] = engine(path, setup.threads)
    return sides


def _key(fill: str, fraction: float) -> str:
    return f"{fill} {fraction!r}"


def band(net: AdaptiveModel) -> float:
    """The multiple of the line that the law allows this network."""
    if any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in net.modules()):
        return GROUPED
    return BAND + LINEAR if net.geometry.interpolates else BAND


def _name(network: str | nn.Module) -> str:
    return network if isinstance(network, str) else type(network).__name__


def _setting(mask: object, setup: Benchmark) -> BenchSetting:
    device = find_device(setup.device)
    provenance = describe_run(device)
    versions = {**provenance["versions"], "python": platform.python_version()}
    if setup.runtime != TORCH:
        package = ENGINES[setup.runtime].package
        versions[package] = version(package)
    return BenchSetting(
        mask=f"{resolve_mask(mask).spec()} | budget",
        image=(setup.batch, 3, *setup.size),
        runtime=setup.runtime,
        dtype=setup.dtype,
        threads=setup.threads,
        rounds=setup.rounds,
        clock="processor" if setup.processor_time else "wall",
        **{**provenance, "device": device_in_words(device), "versions": versions},
    )


def _check(
    networks: Sequence[str | nn.Module],
    mask: object,
    fractions: Sequence[float],
    setup: Benchmark,
    fills: Sequence[str],
) -> None:
    """Refuse what would fail later, before anything is built."""
    if not networks or not fills:
        raise InvalidInput(
            f"there is no {'network' if fills else 'fill'} to measure.",
            next='name at least one, e.g. "resnet50" and "nearest".',
        )
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise InvalidInput(
            f"the fractions are {', '.join(f'{fraction:g}' for fraction in fractions) or 'none'}.",
            next="give shares of the patches from 0 to 1, e.g. 1,0.5,0.25,0.",
        )
    if setup.dtype not in (*DTYPES, INT8):
        raise UnknownName("dtype", setup.dtype, (*DTYPES, INT8))
    if setup.runtime == TORCH and setup.dtype == INT8 and form_here() is None:
        raise InvalidInput(
            "there are no compiled kernels for int8 here.",
            why="cadsurgery --version says why there are none.",
            next="measure files in onnx or openvino: runtime.",
        )
    if setup.calibration and (setup.dtype, setup.runtime) != (INT8, TORCH):
        raise InvalidInput(
            "there is nothing to calibrate by images.",
            why="they show the ranges of the copy in 8 bits of this package.",
            next="leave out calibration, or measure int8 in torch.",
        )
    for package in setup.against.split(",") if setup.against else ():
        if package not in RIVALS:
            raise UnknownName("engine", package, RIVALS)
        import_package(package)
    if setup.runtime != TORCH:
        _check_engine(mask, setup)
    _check_run(setup)
    device = find_device(setup.device)
    resolve_mask(mask)
    if not setup.memory:
        return
    if not is_measurable() or device.type != "cpu":
        raise InvalidInput(
            "peak memory is measured on the CPU of a Linux system only.",
            next="leave out memory, or run it there.",
        )
    if not isinstance(mask, str) or not all(isinstance(network, str) for network in networks):
        raise InvalidInput(
            "peak memory of a network or mask without a name cannot be measured.",
            why="each side runs in a process of its own, which builds it anew.",
            next='give names, e.g. "resnet50" or "module:function", and a mask such as "edges".',
        )


def _check_run(setup: Benchmark) -> None:
    """Refuse what no run can be made with."""
    threads = setup.threads or torch.get_num_threads()
    if setup.processor_time and threads != 1:
        raise InvalidInput(
            f"processor time of {threads} threads is asked for.",
            why="threads that wait for others would be counted.",
            next="give threads=1 (--threads 1).",
        )
    if min(setup.batch, threads, setup.rounds, *setup.size) < 1:
        height, width = setup.size
        raise InvalidInput(
            f"not all are positive: batch={setup.batch}, threads={threads}, rounds={setup.rounds}, "
            f"size={height}x{width}.",
            next="give at least 1 of each.",
        )


def _check_engine(mask: object, setup: Benchmark) -> None:
    """Refuse what does not go into files of an engine."""
    if setup.runtime not in ENGINES:
        raise UnknownName("runtime", setup.runtime, (TORCH, *ENGINES))
    dtypes = ("float32", INT8) if ENGINES[setup.runtime].format == "onnx" else ("float32",)
    plain = {"dtype": setup.dtype in dtypes, "device": setup.device == "cpu", "memory": not setup.memory}
    if unable := [f"{name}={getattr(setup, name)}" for name, is_plain in plain.items() if not is_plain]:
        raise InvalidInput(
            f"runtime {setup.runtime} does not go with {' and '.join(unable)}.",
            why="engines are timed on the CPU in float32, ONNX in int8, too.",
            next="leave that out, or measure it in torch.",
        )
    import_package(ENGINES[setup.runtime].package)
    check_mask(Budget(mask, 0.5), ENGINES[setup.runtime].format, dynamic=False, level_map=False)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak_memory(network: str, mask: object, setup: Benchmark, key: str) -> float:
    """MiB by which one call of a side raises the peak of the resident set."""
    task = {"network": network, "mask": mask, "setup": vars(setup), "key": key}
    return float(run_alone(__name__, print_peak.__name__, repr(task)))


def print_peak(task: str) -> None:
    """What the process for one side does: build it, run it, print MiB."""
    told = ast.literal_eval(task)
    setup, key = Benchmark(**told["setup"]), told["key"]
    torch.set_num_threads(setup.threads)
    net, image, _ = _convert(told["network"], told["mask"], setup)
    if key in (HIGH, LOW) and setup.dtype == INT8:
        run: Callable[..., object] = partial(
            _optimize(net, image, setup), mask="all" if key == HIGH else "none"
        )
    elif key in (HIGH, LOW):
        run = dense_twin(net, 0 if key == HIGH else net.geometry.max_level, image)
    else:
        run = partial(_optimize(net, image, setup), mask=Budget(told["mask"], float(key.rpartition(" ")[2])))
    del net
    with torch.inference_mode():
        run(image)  # what is made once: packed weights, measured costs, the libraries' own memory
        print(peak_raised_by(lambda: run(image)))
