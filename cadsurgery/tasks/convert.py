"""What the commands do: from names and paths to networks, reports and files."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadsurgery.data.images import check_size, find_images, normalise, read_image, write_picture
from cadsurgery.elements.backends import costs
from cadsurgery.masks import resolve_mask
from cadsurgery.methods.anytime import AnytimeMacs, AnytimeModel
from cadsurgery.methods.resampling import ResampledMacs, ResampledModel
from cadsurgery.methods.sampling import SampledMacs, SampledModel
from cadsurgery.methods.storage import AnyPlan, Converted, load, read_plan
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.adaptify import plan as make_plan
from cadsurgery.network.macs import MacReport, count_network, dense_macs
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.optimized import FLOAT, PRECISIONS
from cadsurgery.network.storage import read_method, save
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import InvalidInput, UnknownName, check_name
from cadsurgery.support.files import check_folder, make_folder
from cadsurgery.support.processes import own_device
from cadsurgery.support.provenance import describe_run, find_device
from cadsurgery.support.timing import interleaved
from cadsurgery.surgery.plan import Plan
from cadsurgery.tasks.by_method import TIMING_SECONDS
from cadsurgery.tasks.convert_report import ConversionReport, Side
from cadsurgery.tasks.exits import ExitsReport, convert_exits
from cadsurgery.tasks.export import images_like
from cadsurgery.tasks.figures import class_picture
from cadsurgery.tasks.for_each import Failure, Failures, Step, for_each
from cadsurgery.tasks.gates import GatesReport, convert_gates
from cadsurgery.tasks.open import check_options, example_batch, is_file, open_converted, original
from cadsurgery.tasks.samples import SamplingReport, convert_resampled
from cadsurgery.tasks.slowest import explain_slowness

METHODS = ("adaptive", "anytime", "sampling", "resampling")
_KINDS: dict[type, str] = {
    AnytimeModel: "with exits",
    SampledModel: "with gates",
    ResampledModel: "whose input is sampled",
}
EXPORTED_MASK = "edges | budget:fraction=0.3"


def convert(
    *,
    model: str,
    weights: str,
    mask: str,
    options: dict[str, Any],
    image: Path | None,
    size: tuple[int, int] | None,
    output: Path | None,
    device: str,
    verify_laws: bool,
    rounds: int,
    step: Step,
    precision: str = FLOAT,
    calibration: Path | None = None,
    largest_error: float | None = None,
    method: str = "adaptive",
    exits: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> ConversionReport | ExitsReport | GatesReport | SamplingReport:
    """Build, convert, verify, measure and save; see `cadsurgery convert --help`."""
    check_name("method", method, METHODS)
    told: Any = {"image": image, "size": size, "output": output, "device": device, "verify": verify_laws}
    if method == "resampling":
        _refuse_precision(precision, _KINDS[ResampledModel])
        given = _sampling(sampling or {})
        return convert_resampled(
            model=model, weights=weights, options=given, rounds=rounds, step=step, **told
        )
    if method == "sampling":
        _refuse_precision(precision, _KINDS[SampledModel])
        return convert_gates(
            model=model, weights=weights, options=gates or {}, rounds=rounds, step=step, **told
        )
    if method == "anytime":
        _refuse_precision(precision, _KINDS[AnytimeModel])
        given = {name: value or None for name, value in (exits or {}).items()}
        given["fill"] = given.pop("gaps", None)
        return convert_exits(model=model, weights=weights, options=given, rounds=rounds, step=step, **told)
    resolve_mask(mask)  # a typo should not wait for the network to be built
    check_precision(precision, calibration, largest_error)
    where = find_device(device)
    output = output or Path(f"{re.sub('[:/]', '-', model)}-{mask.partition(':')[0]}.safetensors")
    check_folder(output)
    step(f"building {model}")
    before, source = original(model, weights)
    step("converting and verifying" if verify_laws else "converting")
    net = adaptify(before, mask, **options, verify_laws=verify_laws)
    batch = example_batch(pictures_for(net), image, size)
    batch = batch.to(where).contiguous(memory_format=torch.channels_last)
    before.to(where).to(memory_format=torch.channels_last)
    net.to(where)
    step("counting multiply-accumulates")
    counted = net.macs(batch)
    if net.hosts_part:  # the part alone: the rest decides by values, which counting does not have
        of_original = counted.low if net.plan.identity_level == net.plan.max_level else counted.high
    else:
        of_original = dense_macs(before, batch)
    pictures = images_like(batch, pictures_for(net), calibration) if calibration is not None else None
    if pictures is not None:
        step(f"calibrating by {len(pictures)} images")
    fast = net.optimize()
    copies = {"net.optimize()": fast}
    if precision != FLOAT:
        copies[f"net.optimize(), {precision}"] = net.optimize(
            precision=precision, calibration=pictures, largest_error=largest_error
        )
    step("measuring")
    is_high = net.plan.identity_level == 0
    dense = (
        f"dense high (output stride {net.plan.output_stride[0]})",
        counted.high,
        partial(net, mask="all"),
    )
    compared: list[tuple[str, int, Callable[[Tensor], object]]] = [
        ("original = dense high" if is_high else "original", of_original, before),
        *(() if is_high else (dense,)),
        ("converted", counted.mask, net),
        *((f"converted, {name}", counted.mask, copy) for name, copy in copies.items()),
    ]
    calls = {name: partial(run, batch) for name, _, run in compared}
    times = interleaved(calls, rounds, seconds=TIMING_SECONDS) if rounds else {}
    sides = [Side(name, macs, times[name].best if times else None) for name, macs, _ in compared]
    step("looking for what is slow")
    slow = [
        explain_slowness(
            name,
            times[f"converted, {name}"].best,
            {
                "dense high": times[compared[not is_high][0]].best,
                "the converted network": times["converted"].best,
            },
            copy,
            calls[f"converted, {name}"],
        )
        for name, copy in (copies.items() if times else ())
    ]
    step(f"writing {output}")
    save(net, output)
    return ConversionReport(
        model=source.name,
        weights=source.note,
        random=source.weights == "random",
        mask=net.mask.spec(),
        normalisation=str(net.normalisation or "the input as it comes, until a picture has come"),
        plan=net.plan,
        active_fraction=counted.active_fraction,
        image=tuple(batch.shape),
        sides=tuple(sides),
        checks=net.checks,
        file=str(output),
        notes=(*_notes(net.plan, counted, copies), *filter(None, slow)),
        costs=costs.record(),
        **describe_run(where),
    )


def _notes(plan: Plan, counted: MacReport, copies: Mapping[str, AdaptiveModel]) -> tuple[str, ...]:
    """Notes that a user can act on, beside what `adaptify` warns of."""
    notes = []
    if counted.active_fraction > 0.9:
        notes.append("the mask keeps nearly everything high here: little is saved; raise its threshold.")
    if plan.dense_after > 0.25:
        notes.append(f"{plan.dense_after:.0%} of the MACs run dense after the region and limit the gain.")
    notes += filter(None, [describe_not_counted(counted.not_counted)])
    notes += [str(copy.quantisation) for copy in copies.values() if copy.quantisation is not None]
    return tuple(notes)


def _sampling(told: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `cadsurgery.resample` from those of the command."""
    options = dict(told)
    targets = options.pop("targets", "")
    try:
        chosen = [int(part) for part in targets.split(",")] if targets.strip() else None
    except ValueError:
        raise InvalidInput(
            f"--targets {targets} is not a list of numbers.",
            next="write numbers of classes such as 11,12,13.",
        ) from None
    size = options.pop("sample_size", (224, 224))
    return {**options, "size": size, "targets": chosen}


def _refuse_precision(precision: str, network: str) -> None:
    """Of a network that runs in the precision of its weights."""
    if precision != FLOAT:
        raise InvalidInput(
            f"--precision {precision} for a network {network}.",
            why="they run in the precision of their weights.",
            next="leave it out.",
        )


def check_precision(precision: str, calibration: Path | None, largest_error: float | None = None) -> None:
    """Refuse what `optimize` would, before anything is built.

    Raises:
        UnknownName: an unknown precision.
        InvalidInput: images to calibrate by and nothing to calibrate, or the other way round; an error that cannot be.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if (precision == FLOAT) != (calibration is None):
        raise InvalidInput(
            f"precision {precision} {'lacks' if calibration is None else 'needs no'} images to calibrate by.",
            next="give both: --precision int8 --calibration FOLDER.",
        )
    if largest_error is not None and (precision == FLOAT or not largest_error > 0):
        raise InvalidInput(
            f"--largest-error {largest_error} with precision {precision}.",
            why="it is by how much outputs in 8 bits may differ, a share of their size.",
            next="--precision int8 --calibration FOLDER --largest-error 0.05.",
        )


def _first_image(folder: Path, size: tuple[int, int] | None) -> Tensor:
    """An image batch of the size that a folder is read in."""
    found, _ = find_images([folder])
    return read_image(next(iter(found)), size).unsqueeze(0)


def make_or_read_plan(
    model: str, output_stride: tuple[int, int] | None, region: str | list[str], outputs: str = "fine"
) -> AnyPlan:
    """The plan of a network by name, or the one stored in a converted file, of any method.

    Raises:
        InvalidInput: options for a file that are not the defaults.
    """
    check_options(model, {"output_stride": output_stride, "region": region, "outputs": outputs})
    if is_file(model):
        return read_plan(model)
    return make_plan(original(model, "none")[0], output_stride, region, outputs=outputs)  # type: ignore[arg-type]


def count(
    model: str,
    mask: str,
    options: dict[str, Any],
    image: Path | None,
    size: tuple[int, int] | None,
    rule: str,
    trust: bool = False,
) -> MacReport | AnytimeMacs | SampledMacs | ResampledMacs:
    """MACs of a network by name or of a converted file, of any method, on an image."""
    check_options(model, options)
    if is_file(model) and read_method(model):
        net: Converted = load(model, mask=mask or None, trust=trust)
    else:
        net = open_converted(model, mask, options, trust=trust)
    return net.macs(example_batch(pictures_for(net), image, size), rule=rule)


def count_dense(model: str, image: Path | None, size: tuple[int, int] | None, rule: str) -> dict[str, Any]:
    """MACs of a network by name as it is, not converted.

    Raises:
        InvalidInput: a converted file.
    """
    if is_file(model):
        raise InvalidInput(
            f"{model} is a converted network: --dense counts one that is not.",
            next="leave --dense out, which lists dense high and dense low too, or give the network's name.",
        )
    net, source = original(model, "none")
    batch = example_batch(source, image, size)
    counted = count_network(net, batch, rule=rule)
    values = {"shape": list(batch.shape), "rule": rule, "macs": {"dense": counted.macs}}
    return {**values, "not_counted": list(counted.not_counted)}


def predict(
    file: str | Path,
    images: Sequence[Path],
    output: Path,
    mask: str | None,
    size: tuple[int, int] | None,
    device: str,
    step: Step,
    trust: bool = False,
    precision: str = FLOAT,
    calibration: Path | None = None,
    largest_error: float | None = None,
    until: float | None = None,
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Run a converted file on images; an unreadable image is reported and the others are done.

    In `int8` the images of the folder `calibration` show the ranges, in the size of the first of them or in `size`. A
    network with exits is run until so many milliseconds, if they are said, see `AnytimeModel.until`.

    Under a launcher each process takes its share of the images; every one returns the rows of all.
    """
    check_size(size)
    where = own_device(device)
    paths, lacking = find_images(images)
    check_precision(precision, calibration, largest_error)
    converted = load(file, mask=mask, trust=trust).to(where)
    if until is not None and not isinstance(converted, AnytimeModel):
        raise InvalidInput(
            "--until needs a network with exits, and this file holds none.",
            next="convert one with cadsurgery convert --method anytime, and train its heads.",
        )
    source, shown = pictures_for(converted), None
    net: Any
    if isinstance(converted, (AnytimeModel, ResampledModel, SampledModel)):
        _refuse_precision(precision, _KINDS[type(converted)])
        net = converted.optimize()
    else:
        if calibration is not None:
            step("calibrating")
            shown = images_like(_first_image(calibration, size), source, calibration)
        net = converted.optimize(precision=precision, calibration=shown, largest_error=largest_error)
    make_folder(output)

    def draw(item: tuple[Path, Path]) -> dict[str, Any]:
        path, place = item
        batch = normalise(read_image(path, size), source).unsqueeze(0).to(where)
        start = time.perf_counter()
        with torch.inference_mode():
            if isinstance(net, AnytimeModel):
                prediction, exit = net.until(batch, milliseconds=math.inf if until is None else until)
                noted: dict[str, Any] = {"exit": exit}
            else:
                prediction = _first_tensor(net(batch))
                noted = _noted(net)
        milliseconds = 1e3 * (time.perf_counter() - start)
        target = output / place
        target.parent.mkdir(parents=True, exist_ok=True)
        write_picture(class_picture(_classes(prediction), prediction.shape[1]), target)
        return {"image": str(path), "output": str(target), **noted, "milliseconds": milliseconds}

    failures = Failures("image", lacking)
    return for_each(list(paths.items()), draw, failures, where, name=lambda item: str(item[0]), step=step)


def _noted(net: Any) -> dict[str, Any]:
    """What is told of the last call of a network."""
    if isinstance(net, SampledModel):
        densities = net.densities.values()
        return {"density": sum(densities) / len(densities)}
    if isinstance(net, ResampledModel):
        return {"sampled": "x".join(map(str, net.size))}
    return {"active_fraction": net.active_fraction}


def _first_tensor(output: Any) -> Tensor:
    tensors = tensors_of(output)
    if not tensors or tensors[0].dim() != 4:
        shape = tuple(tensors[0].shape) if tensors else ()
        raise InvalidInput(
            f"the network's output {shape} is no map, so there is nothing to draw.",
            next="use cs.load in Python for classifiers, or convert a segmentation network.",
        )
    return tensors[0]


def _classes(prediction: Tensor) -> Tensor:
    """(H, W) class numbers: the strongest channel, or for one channel its value in 256 steps."""
    scores = prediction[0].float()
    if scores.shape[0] > 1:
        return scores.argmax(0)
    low, high = scores.aminmax()
    return ((scores[0] - low) / (high - low).clamp(min=1e-12) * 255).round()
