"""Does time follow work? A network under budgets of patches is timed with its dense twins, in one interleaved run.

Time follows work if a mask of M multiply-accumulates takes at most 1.06 times the time that the straight line between
the dense twins gives for M,

    t <= 1.06 (t_low + (M - M_low) / (M_high - M_low) (t_high - t_low)),

including the mask itself and all tables. Reports call this the law. `fill="linear"` and `"guided"` interpolate rows
at level changes and are allowed 0.08 more; networks with depthwise or grouped convolutions, whose work is mostly
memory traffic, are allowed 1.2. A miss is a result, not an error: the report states it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data import open_pictures
from cadsurgery.data.networks import Source, source_of
from cadsurgery.data.samples import pictures_of
from cadsurgery.masks import Budget, labelled, resolve_mask
from cadsurgery.methods.registry import need_kind
from cadsurgery.methods.side import Side, work_and_time
from cadsurgery.network.adaptify import adaptify, plan
from cadsurgery.network.export import INT8, check_mask
from cadsurgery.network.export.engine import check_packages
from cadsurgery.network.export.engines import ENGINES
from cadsurgery.network.macs import MacReport
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.files import append_lines
from cadsurgery.support.memory import bytes_of
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.support.provenance import describe_run, device_in_words, find_device
from cadsurgery.support.rows import Row
from cadsurgery.tasks.bench_report import (
    BenchReport,
    BenchSetting,
    MethodBench,
    NetworkBench,
    macs_notes,
)
from cadsurgery.tasks.open import (
    example_batch,
    open_any,
    original,
    pictures_like,
    provenance,
    with_statistics,
)
from cadsurgery.tasks.report import check_outputs
from cadsurgery.tasks.sides.engine_sides import (
    HIGH,
    LOW,
    RIVALS,
    TORCH,
    InEngine,
    InTorch,
    Runs,
    engine_for,
    further_sides,
)
from cadsurgery.tasks.task_options import Benchmark, Conversion

FRACTIONS = (1.0, 0.5, 0.34, 0.25, 0.1, 0.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BAND, LINEAR, GROUPED = 1.06, 0.08, 1.2
# Options of `bench` for a network made by a method.
OF_METHODS = ("images", "size", "batch", "device", "threads", "rounds", "processor_time")


def bench(
    networks: str | nn.Module | Sequence[str | nn.Module],
    mask: object = DEFAULT_MASK,
    fractions: Sequence[float] = FRACTIONS,
    *,
    fill: Sequence[str] = ("nearest",),
    picture: Path | None = None,
    output: Path | None = None,
    sides: Sequence[Side] = (),
    trust: bool = False,
    step: Step = silent,
    **options: Any,
) -> BenchReport | MethodBench:
    """Measure networks with random weights under budgets, and compare their times with the law.

    A network made by a method, or its file, is measured alone, with its own weights, beside the original network. A
    network with gates is also measured at shares of open positions. The straight line over MACs between all gates
    closed (except the grid) and all gates open is the time it would take if time followed work.

    Args:
        networks: names, or modules, which keep their weights.
        mask: ranks the patches for `Budget`; anything `adaptify` accepts as a mask.
        fractions: budgets, each 0..1.
        fill: one or more of "nearest", "linear" and "guided", each of which gives an entry of its own, with the same
            twins; "both" stands for the first two.
        picture: PNG to write.
        output: JSON Lines file; the rows of each network are appended as soon as they are measured.
        sides: sides of the user, timed in the same rounds on the same images; see `cadsurgery.methods.side.Side`.
        trust: run code that a file names; see `cadsurgery.load`.
        step: progress callback.
        options: further options of `adaptify`, and conditions of the measurement, see `Benchmark`: `size` (height and
            width) and number (`batch`) of the pictures, which are generated street scenes or those of a folder or a
            clip (`images`), `dtype`, `device`, `threads`, timing `rounds`, the engine (`runtime`), engines whose dense
            networks are timed in the same run (`against`), the scale of smaller pictures (`smaller`), what maps may
            take in bands of rows (`memory`), and images for int8 (`calibration`).

    Raises:
        InvalidInput: an option is out of range or does not fit the others.
        UnknownName: there is no such network, mask or dtype.
        CannotConvert: a network has nothing to make adaptive, or the engine does not support it.
        FileError: a file cannot be written.
        NotInstalled: the engine is not installed.
    """
    listed = [networks] if isinstance(networks, str | nn.Module) else list(networks)
    setup, fill = Benchmark(**options), ("nearest", "linear") if "both" in fill else fill
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    check_outputs(output, picture=picture)
    for network in listed:
        if (made := open_any(network, trust)) is not None:
            _check_alone(listed, setup)
            with _threads(setup.threads):
                alone = _bench_made(made, listed[0], fractions, setup, sides, step)
            if output is not None:
                append_lines(output, map(json.dumps, alone.lines()))
            alone.write(picture=picture)
            return alone
    setup = replace(setup, runtime=engine_for(setup.runtime, setup.dtype))
    _check(listed, mask, fractions, setup, fill)
    if len(listed) > 1:  # find wrong names before the first measurement
        for place, network in enumerate(listed):
            step(f"planning {_name(network)}", place, len(listed))
            plan(original(network, "none")[0], setup.output_stride, setup.region, coarsest=setup.coarsest)
    budgets = list(dict.fromkeys(map(float, fractions)))
    setting = _setting(mask, setup)
    done: list[NetworkBench] = []
    for network in listed:
        with _threads(setup.threads), tempfile.TemporaryDirectory() as folder:
            entries, image = _compare(network, mask, budgets, setup, fill, sides, step, Path(folder))
        setting = replace(setting, image=tuple(image.shape))
        if output is not None:
            rows = [{**setting.to_dict(), **row} for entry in entries for row in entry.lines()]
            append_lines(output, map(json.dumps, rows))
        done += entries
    report = BenchReport(setting, tuple(done))
    report.write(picture=picture)
    return report


def law(macs: float, high: Row, low: Row) -> float:
    """Return the milliseconds that the straight line between two rows, usually the dense twins, gives for `macs`."""
    share = (macs - low.macs) / max(high.macs - low.macs, 1)
    ends = [row.milliseconds or 0.0 for row in (low, high)]
    return float(ends[0] + share * (ends[1] - ends[0]))


# -- networks made by methods ----------------------------------------------------------------------------


def _bench_made(
    net: Any, network: object, fractions: Sequence[float], setup: Benchmark, sides: Sequence[Side], step: Step
) -> MethodBench:
    """Measure a network made by a method, and the original network, both optimised."""
    kind, device, source = need_kind(net), find_device(setup.device), source_of(net)
    net = net.eval().to(device)
    images = _scenes(source, setup).to(device).contiguous(memory_format=torch.channels_last)
    step("counting multiply-accumulates")
    empty = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64, device=device)
    with labelled(empty):  # for a sampler that needs labels
        timed = kind.time(net, images, fractions)
        rows = work_and_time(
            [*timed.sides, *sides],
            images,
            setup.rounds,
            is_processor_time=setup.processor_time,
            step=within(step, "measuring"),
        )
    ends = [row for row in rows if timed.ends and row.label in timed.ends]
    lines = [law(row.macs, ends[1], ends[0]) if ends and not row.anchor else None for row in rows]
    return MethodBench(
        data=setup.images or "street scenes",
        image=tuple(images.shape),
        clock="processor" if setup.processor_time else "wall",
        rounds=setup.rounds,
        rows=tuple(row.with_values(row.label, line=line) for row, line in zip(rows, lines, strict=True)),
        part=getattr(net.plan, "part", ""),
        not_counted=timed.not_counted,
        **provenance(network, source, device),
    )


def _check_alone(listed: Sequence[object], setup: Benchmark) -> None:
    """Refuse options that would be ignored or fail later for a network made by a method."""
    if len(listed) > 1:
        raise InvalidInput(
            f"{len(listed)} networks are to be measured, one of which a method made.",
            why="it is compared with its original, not under budgets of a mask.",
            next="measure it in a run of its own.",
        )
    plain = Benchmark()
    others = [option.name for option in fields(Benchmark) if option.name not in OF_METHODS]
    if changed := [name for name in others if getattr(setup, name) != getattr(plain, name)]:
        raise InvalidInput(
            f"a network that a method made is measured without {', '.join(changed)}.",
            why="these options are for networks with masks, or for other engines.",
            next=f"leave them out; it takes {', '.join(OF_METHODS)}.",
        )
    _check_run(setup)


# -- a network under budgets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Filled:
    """A network with one fill: its images, a text about its weights, its work by budget, and its calls."""

    fill: str
    net: AdaptiveModel
    image: Tensor
    weights: str
    counts: dict[float, MacReport]
    runs: Runs

    @property
    def dense(self) -> MacReport:
        """Counts of which those of the dense networks are used, the same under every budget."""
        return next(iter(self.counts.values()))

    def result(
        self, model: str, high: Row, low: Row, rows: Sequence[Row], sides: Sequence[Row]
    ) -> NetworkBench:
        """Return what was measured: the dense networks, the budgets in their order, and further sides."""
        plan = self.net.plan
        own: dict[int | None, str] = {0: HIGH, plan.max_level: LOW}
        measured = zip(self.counts.items(), rows, strict=True)
        small = [_SMALL] * ((high.milliseconds or 0.0) <= (low.milliseconds or 0.0))
        return NetworkBench(
            model=model,
            weights=self.weights,
            fill=self.fill,
            output_stride=plan.output_stride,
            band=band(self.net),
            high=high,
            low=low,
            given_macs=self.dense.given,
            twin=own.get(plan.identity_level, ""),
            rows=tuple(_row(share, counted, row, high, low) for (share, counted), row in measured),
            notes=(*macs_notes(plan.part, self.dense.not_counted), *small),
            sides=tuple(sides),
        )


_SMALL = "dense high is not slower than dense low at this size: the law says little; give a larger size."


def _compare(
    network: str | nn.Module,
    mask: object,
    fractions: Sequence[float],
    setup: Benchmark,
    fills: Sequence[str],
    own: Sequence[Side],
    step: Step,
    folder: Path,
) -> tuple[list[NetworkBench], Tensor]:
    """Measure a network with every fill in one interleaved run, and return the images; `folder` is for the files of an
    engine.

    A map with one level everywhere needs no filling, so the dense networks of the first fill serve all fills.
    """
    name, filled = _name(network), list[_Filled]()
    for fill in dict.fromkeys(fills):
        step(f"converting {name}, fill {fill}")
        net, image, weights = convert(network, mask, replace(setup, fill=fill))
        counts = {share: net.macs(image, mask=Budget(mask, share)) for share in fractions}
        shown, size = [image], (image.shape[2], image.shape[3])
        if setup.calibration:
            shown = pictures_like(open_pictures(setup.calibration), size, pictures_for(net))
        runs: Runs = InTorch(net)
        if setup.runtime != TORCH:
            place = folder / fill
            runs = InEngine(net, image, setup.runtime, place, setup.dtype, shown, setup.threads, step)
        filled.append(_Filled(fill, net, image, weights, counts, runs))
        if filled[-1].dense.high == filled[-1].dense.low:
            raise InvalidInput(
                f"{name} does the same work at both output strides on {setup.size[0]}x{setup.size[1]} pixels.",
                next="give a larger size.",
            )
    first = filled[0]
    work = {HIGH: first.dense.high, LOW: first.dense.low}
    twins = [Side(twin, first.runs.dense(twin, first.image), macs) for twin, macs in work.items()]
    budgets = [
        Side(f"{entry.fill} {share!r}", entry.runs.under(Budget(mask, share)), count.mask)
        for entry in filled
        for share, count in entry.counts.items()
    ]
    others = [
        *further_sides(first.net, first.image, setup, first.runs, first.dense, folder, step),
        *own,
    ]
    high, low, *rows = work_and_time(
        [*twins, *budgets, *others],
        first.image,
        setup.rounds,
        is_processor_time=setup.processor_time,
        step=within(step, f"measuring {name}"),
    )
    high, low = (
        replace(row, values={"active_fraction": share, "macs": row.macs})
        for row, share in ((high, 1.0), (low, 0.0))
    )
    count, sides = len(fractions), rows[len(budgets) :]
    results = [
        entry.result(name, high, low, rows[place * count : (place + 1) * count], sides)
        for place, entry in enumerate(filled)
    ]
    return results, first.image


def _row(fraction: float, counted: MacReport, measured: Row, high: Row, low: Row) -> Row:
    milliseconds, whole = measured.milliseconds or 0.0, high.milliseconds or 0.0
    line, speedup = law(counted.mask, high, low), whole / milliseconds
    return replace(
        measured,
        label=f"budget {fraction:g}",
        values={
            "fraction": fraction,
            "active_fraction": counted.active_fraction,
            "macs": counted.mask,
            "law_milliseconds": line,
            "law_ratio": milliseconds / line,
            "realised": speedup / (high.macs / counted.mask),
            "speedup": speedup,
        },
    )


def convert(network: str | nn.Module, mask: object, setup: Benchmark) -> tuple[AdaptiveModel, Tensor, str]:
    """Convert a network without verification; return it with its images (B, C, H, W) and a text about its weights."""
    model, stated = original(network, "none", bands=setup.bands)
    options: dict[str, Any] = {option.name: getattr(setup, option.name) for option in fields(Conversion)}
    shown = setup.calibration or setup.images
    options = with_statistics(options, stated, pictures_of(open_pictures(shown)) if shown else None)
    net = adaptify(model, mask, **options, verify_laws=False)
    source = pictures_for(net)
    target: dict[str, Any] = {
        "device": find_device(setup.device),
        "dtype": DTYPES.get(setup.dtype, torch.float32),
    }
    layout = torch.channels_last if setup.runtime == TORCH else torch.contiguous_format
    image = _scenes(source, setup).to(**target).contiguous(memory_format=layout)
    return net.eval().to(**target), image, source.note if isinstance(network, str) else "its own weights"


def _scenes(source: Source, setup: Benchmark) -> Tensor:
    """Return the images (B, C, H, W) of the measurement.

    Raises:
        InvalidInput: there are fewer pictures than a batch has, or they have no bands that the network reads.
    """
    if not setup.images:
        return torch.cat([example_batch(source, None, setup.size, seed) for seed in range(setup.batch)])
    pictures = pictures_like(open_pictures(setup.images), setup.size, source, setup.batch)
    if len(pictures) < setup.batch:
        raise InvalidInput(
            f"{setup.images} has {len(pictures)} pictures, and a batch is {setup.batch}.",
            next=f"give more pictures, or a smaller batch: --set batch={len(pictures)}.",
        )
    return torch.cat(pictures)


def band(net: AdaptiveModel) -> float:
    """Return the multiple of the line that the law allows for this network."""
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
        images=setup.images,
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
    """Refuse invalid options before anything is built."""
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
    check_name("dtype", setup.dtype, (*DTYPES, INT8))
    if not 0 <= setup.smaller < 1:
        raise InvalidInput(
            f"smaller={setup.smaller:g}.",
            next="give the scale of the smaller pictures, between 0 and 1, e.g. 0.7.",
        )
    if setup.memory:
        bytes_of(setup.memory)
        if setup.runtime != TORCH or setup.device != "cpu":
            raise InvalidInput(
                f"memory={setup.memory} for {setup.runtime} on {setup.device}.",
                why="bands of rows are computed by torch on the CPU.",
                next="leave it out.",
            )
    if setup.calibration and setup.dtype != INT8:
        raise InvalidInput(
            "there is nothing to calibrate by images.",
            why=f"calibration images are for int8, and this is {setup.dtype}.",
            next="leave out calibration, or measure int8: dtype int8.",
        )
    for package in setup.against.split(",") if setup.against else ():
        check_name("engine", package, RIVALS)
        check_packages(ENGINES[RIVALS[package]])
    check_name("runtime", setup.runtime, (TORCH, *ENGINES))
    if setup.runtime != TORCH:
        unable = [f"dtype={setup.dtype}"] * (setup.dtype not in ("float32", INT8))
        unable += [f"device={setup.device}"] * (setup.device != "cpu")
        if unable:
            raise InvalidInput(
                f"runtime {setup.runtime} does not go with {' and '.join(unable)}.",
                why="engines are timed on the CPU, in float32 and int8.",
                next="leave that out, or measure it in torch.",
            )
        check_packages(ENGINES[setup.runtime])
        check_mask(Budget(mask, 0.5), "onnx", dynamic=False, level_map=False)
    _check_run(setup)
    find_device(setup.device)
    resolve_mask(mask)


def _check_run(setup: Benchmark) -> None:
    """Refuse invalid conditions of a measurement."""
    if setup.processor_time and setup.threads != 1:
        raise InvalidInput(
            f"processor time of {setup.threads} threads is asked for.",
            why="threads that wait for others would be counted.",
            next="give threads=1 (--threads 1).",
        )
    if min(setup.batch, setup.threads, setup.rounds, *setup.size) < 1:
        height, width = setup.size
        raise InvalidInput(
            f"not all are positive: batch={setup.batch}, threads={setup.threads}, rounds={setup.rounds}, "
            f"size={height}x{width}.",
            next="give at least 1 of each.",
        )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch's number of threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
