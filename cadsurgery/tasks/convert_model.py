"""Convert networks, and the commands around it: from names and paths to networks, reports and files."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from cadsurgery.data.images import check_size
from cadsurgery.data.networks import Source
from cadsurgery.data.onnx_files import is_onnx
from cadsurgery.masks import resolve_mask
from cadsurgery.methods.method_files import AnyPlan, Converted, load, read_plan, save
from cadsurgery.methods.registry import KINDS
from cadsurgery.methods.report import MethodMacs
from cadsurgery.methods.side import ConversionRequest, MethodConversion, Side, work_and_time
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.adaptify import plan as make_plan
from cadsurgery.network.macs import MacReport, count_network, dense_macs
from cadsurgery.network.model import pictures_for
from cadsurgery.network.storage import read_method
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import CadWarning, CannotConvert, InvalidInput, check_name, warn
from cadsurgery.support.fields import read_settings, reader_of
from cadsurgery.support.files import check_folder
from cadsurgery.support.kinds import CONVERTED, check_kind
from cadsurgery.support.progress import Step, within
from cadsurgery.support.provenance import find_device
from cadsurgery.support.rows import SLOWER, Row
from cadsurgery.surgery.plan import Plan
from cadsurgery.tasks.commands import ConvertOptions, MacsOptions, PlanOptions
from cadsurgery.tasks.convert_report import ConversionReport
from cadsurgery.tasks.open import (
    check_options,
    example_batch,
    example_image,
    is_file,
    open_converted,
    original,
    provenance,
    read_by,
    with_statistics,
)
from cadsurgery.tasks.task_options import Conversion

ADAPTIVE = "adaptive"
_DEAR = 2.0  # times the work of the network as given: what costs more says so first
_LISTED = 4  # other output strides in the report
_VERIFIED = "verified: {law} (error {error:.1e}, allowed {tolerance:.0e})"
TIMING_SECONDS = 15.0  # large networks on slow machines get fewer rounds


def convert(*, model: str, options: ConvertOptions, step: Step) -> ConversionReport:
    """Build, convert, verify, measure and save a network; see `cadsurgery convert --help`."""
    methods = {kind.method: kind for kind in KINDS}
    check_name("method", options.method, (ADAPTIVE, *methods))
    make: Callable[[ConversionRequest], MethodConversion]
    if kind := methods.get(options.method):
        make, suffix, own = kind.convert, options.method, read_settings(kind.settings, options.settings)
    else:
        resolve_mask(options.mask)  # a typo should not wait for the network to be built
        make, suffix = partial(_adapt, options.mask), options.mask.partition(":")[0]
        readers = {field.name: reader_of(field) for field in fields(Conversion)}
        own = {**options.conversion, **read_settings(readers, options.settings)}
    device = find_device(options.device)
    output = options.output or _default_output(model, suffix)
    check_folder(output)
    step(f"building {model}")
    before, source = original(model, options.weights, bands=options.bands)
    if options.image is not None:
        own = with_statistics(own, source, partial(_image_of, options))

    def example(source: Source) -> Tensor:
        return _piece_of(example_batch(source, options.image, options.size), options).to(device)

    torch.manual_seed(0)  # new parameters of a method are the same in every run
    made = make(ConversionRequest(before.to(device), source, example, own, step))
    timing = {"seconds": TIMING_SECONDS, "step": within(step, "measuring")}
    rows = work_and_time(made.sides, made.batch, options.rounds, "name", **timing)
    beside = f"{output.name} holds the weights and names {source.weights}: keep both in one folder."
    notes = [*made.notes(rows), *[beside] * is_onnx(source.name)]
    step(f"writing {output}")
    save(made.net, output)
    return ConversionReport(
        image=tuple(made.batch.shape),
        sides=tuple(rows),
        file=str(output),
        made=made.without_network(),
        notes=tuple(notes),
        **provenance(model, source, device),
    )


# Pixels of a picture on which a network is verified and timed as a whole; of a larger one it is the middle.
_MOST_PIXELS = 1 << 21
_PIECE = (1024, 2048)  # (height, width), multiples of all usual strides


def _piece_of(batch: Tensor, options: ConvertOptions) -> Tensor:
    """Return the middle of a large picture of the user's, with a warning; any other batch as it is."""
    size, sides = (
        batch.shape[2:],
        [min(have, most) for have, most in zip(batch.shape[2:], _PIECE, strict=True)],
    )
    if options.image is None or options.size is not None or size.numel() <= _MOST_PIXELS:
        return batch
    top, left = ((have - side) // 2 for have, side in zip(size, sides, strict=True))
    warn(
        f"the network is verified and timed on the middle of {options.image}: {sides[0]} x {sides[1]} of its "
        f"{size[0]} x {size[1]} pixels.\n"
        "  Why: the maps of all of it take many times its memory.\n"
        f"  Next: --size {_PIECE[0]}x{_PIECE[1]} takes all of it, made smaller."
    )
    return batch[:, :, top : top + sides[0], left : left + sides[1]].clone()


def _image_of(options: ConvertOptions | MacsOptions, source: Source) -> list[Tensor]:
    """Return the image that a command names, as a network of this source reads it; none if it names none."""
    return [] if options.image is None else [example_image(options.image, options.size, source=source)]


def _default_output(model: str, suffix: str) -> Path:
    """Return the file to write: named as the network, and beside its ONNX file, where it is looked for."""
    if is_onnx(model):
        path = Path(model.removeprefix("onnx:"))
        return path.with_name(f"{path.stem}-{suffix}.safetensors")
    return Path(f"{re.sub('[:/]', '-', model)}-{suffix}.safetensors")


def _adapt(mask: str, request: ConversionRequest) -> MethodConversion:
    """Make a network adaptive.

    The sides are the original network (unless it is dense high), dense high, the converted network and its optimised
    copy.
    """
    before, step = request.before, request.step
    step("converting and verifying")
    net = adaptify(before, mask, **request.options)
    batch = request.batch(pictures_for(net)).contiguous(memory_format=torch.channels_last)
    before.to(memory_format=torch.channels_last)
    net.to(batch.device)
    step("counting multiply-accumulates")
    counted, plan = net.macs(batch), net.plan
    # Of a network that hosts its adaptive part the part is counted alone: the rest depends on values.
    original_macs = counted.given or counted.high if net.hosts_part else dense_macs(before, batch)
    counted = replace(counted, given=original_macs)
    fast = net.optimize()
    if counted.mask > original_macs:
        warn(
            f"the converted network does {counted.mask / original_macs:.1f} times the work of the network as given: "
            f"{counted.mask:.3e} multiply-accumulates instead of {original_macs:.3e}.\n"
            f"  Why: its maps are as fine as output stride {plan.output_stride[0]} where the mask says so, finer than "
            "those of the network as given.\n"
            "  Next: convert it for quality, not for speed; cadsurgery recommend measures if that pays."
        )
    is_dear = counted.mask > _DEAR * original_macs
    others: list[dict[str, Any]] = []
    if is_dear and not plan.floors and not request.options.get("output_stride"):
        others = _other_strides(mask, request, plan, batch, original_macs, counted.mask)
    is_high = plan.identity_level == 0
    dense = f"dense high (output stride {plan.output_stride[0]})"
    sides = [
        Side("original = dense high" if is_high else "original", before, original_macs),
        *([] if is_high else [Side(dense, partial(net, mask="all"), counted.high)]),
        Side("converted", net, counted.mask),
        Side("converted, net.optimize()", fast, counted.mask),
    ]

    adapted = [decision.node for decision in plan.chosen("adapt")]
    spec, seen = net.mask.spec(), str(net.normalisation or "the input as it comes, until a picture has come")
    return MethodConversion(
        net,
        batch,
        sides,
        {
            "mask": spec,
            "normalisation": seen,
            "adapted": adapted,
            "other_output_strides": others,
            "active_fraction": counted.active_fraction,
            "output_stride": plan.output_stride,
            "region_ends": [f"{decision.node}: {decision.reason}" for decision in plan.region_end],
            "share_of_macs_in_region": plan.share("adapt", "keep"),
            "macs_of_given": counted.of_given,
            "region_of_high": counted.region_of_high,
            "checks": [{**vars(check), "passed": check.passed} for check in net.checks],
        },
        Text.assemble(plan.summary(), (f"\nadapted: {', '.join(adapted)}" if adapted else "", "dim")),
        [
            Text(f"with this mask: {counted.describe()}", style="bold"),
            Text(f"active fraction {counted.active_fraction:.3f} (share of the fine map kept high)"),
            Text(f"masks see {seen}", style="dim"),
            *(Text(_VERIFIED.format(**vars(check)), style="green") for check in net.checks),
        ],
        f"{batch.shape[0]} image of {batch.shape[2]}x{batch.shape[3]}, mask {spec}",
        notes=lambda rows: [*_notes(plan, counted), *_slow_copy(rows, rows[not is_high])],
        first=_say_dear(plan, counted.mask / original_macs, others) if is_dear else "",
    )


def _slow_copy(rows: Sequence[Row], high: Row) -> Iterator[str]:
    """Yield a sentence if the optimised copy is slower than dense high, and one if than the converted network.

    Args:
        rows: the rows of all sides; the last two are the converted network and its copy.
        high: the row of dense high.
    """
    for other, limit in (("dense high", high), ("the converted network", rows[-2])):
        ratio = (rows[-1].milliseconds or 0.0) / (limit.milliseconds or math.inf)
        if ratio > SLOWER:
            yield f"net.optimize() is slower than {other}: {ratio:.2f} times as long."


def _other_strides(
    mask: str, request: ConversionRequest, plan: Plan, batch: Tensor, given: int, most: int
) -> list[dict[str, Any]]:
    """Return the pairs of output strides that cost less than `most` with this mask, the cheapest first.

    Each has its `output_stride`, its `macs`, these relative to the network as given (`of_given`), and the `option` that
    is typed for it.
    """
    cheaper = list[dict[str, Any]]()
    for pair in plan.possible:
        if pair == plan.output_stride or pair[0] < plan.output_stride[0]:
            continue  # finer maps cost more
        request.step(f"counting output strides {pair[0]} and {pair[1]}")
        options = {**request.options, "output_stride": pair}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CadWarning)
            try:
                net = adaptify(request.before, mask, **options, verify_laws=False).to(batch.device)
            except CannotConvert:  # no operation works between these strides
                continue
        macs = net.macs(batch).mask
        option = f"--output-stride {pair[0]},{pair[1]}"
        cheaper.append({"output_stride": pair, "macs": macs, "of_given": macs / given, "option": option})
    return sorted((pair for pair in cheaper if pair["macs"] < most), key=lambda pair: pair["macs"])


def _say_dear(plan: Plan, of_given: float, others: Sequence[Mapping[str, Any]]) -> str:
    """Return the first line of a report on a conversion that costs much more than the network as given."""
    high, low = plan.output_stride
    cost = f"{of_given:.2f} times the work of the network as given"
    text = f"With this mask, output strides {high} and {low} cost {cost}."
    if not others:
        return text
    listed = ", ".join(f"{pair['option']} ({pair['of_given']:.2f} times)" for pair in others[:_LISTED])
    return f"{text} Others cost less: {listed}."


def _notes(plan: Plan, counted: MacReport) -> list[str]:
    """Return notes that a user can act on, in addition to the warnings of `adaptify`."""
    notes = []
    if counted.active_fraction > 0.9:
        notes.append("the mask keeps nearly everything high here: little is saved; raise its threshold.")
    if plan.dense_after > 0.25:
        notes.append(f"{plan.dense_after:.0%} of the MACs run dense after the region and limit the gain.")
    notes += filter(None, [describe_not_counted(counted.not_counted)])
    return notes


def make_or_read_plan(model: str, options: PlanOptions) -> AnyPlan:
    """Return the plan of a network by name, or the plan stored in a converted file of any method.

    Raises:
        InvalidInput: options other than the defaults are given for a file.
    """
    check_options(model, options.conversion)
    check_size(options.size)
    if is_file(model):
        if options.size is not None:
            check_kind(model, CONVERTED)
            raise InvalidInput(
                f"{model} is converted already: the size of its example cannot be changed.",
                next="leave --size out, or give the network's name.",
            )
        return read_plan(model)
    network, source = original(model, "none")
    example = example_batch(source, None, options.size) if options.size is not None else None
    return make_plan(network, example_input=example, **options.conversion)


def count(model: str, options: MacsOptions) -> MacReport | MethodMacs:
    """Count the MACs of a network by name or of a converted file, of any method, on an image."""
    check_options(model, options.conversion)
    if is_file(model) and read_method(model):
        net: Converted = load(model, mask=options.mask or None, trust=options.trust)
        read_by(net, options.bands, options.conversion.get("normalisation"), partial(_image_of, options))
    else:
        pictures = partial(_image_of, options) if options.image is not None else None
        net = open_converted(
            model,
            options.mask,
            options.conversion,
            bands=options.bands,
            pictures=pictures,
            trust=options.trust,
        )
    return net.macs(example_batch(pictures_for(net), options.image, options.size))


def count_dense(model: str, options: MacsOptions) -> dict[str, Any]:
    """Count the MACs of a network by name without converting it.

    Raises:
        InvalidInput: `model` is a converted file.
    """
    if is_file(model):
        check_kind(model, CONVERTED)
        raise InvalidInput(
            f"{model} is a converted network: --set dense=true counts one that is not.",
            next="leave --set dense out, which lists dense high and dense low too, or give the network's name.",
        )
    net, source = original(model, "none", bands=options.bands)
    batch = example_batch(source, options.image, options.size)
    counted = count_network(net, batch)
    values = {"shape": list(batch.shape), "macs": {"dense": counted.macs}}
    return {**values, "not_counted": list(counted.not_counted)}
