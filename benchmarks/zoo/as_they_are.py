"""Check one network of a library as its users have it: convert it without a wrapper, and compare the calls.

Where `network_check` compares what the conversion makes of a network inside, this compares what a user sees: the same
call, the same type of output, the same values, at the sizes, batches and types that users have.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cadsurgery as cs
from benchmarks.zoo.corpus import Subject
from benchmarks.zoo.network_check import (
    EVEN_SIZES,
    ODD_SIZES,
    call_network,
    largest_error,
    raise_memory_errors,
    takes,
    try_network,
)
from cadsurgery.following.arguments import image_of
from cadsurgery.following.facts import default_examples
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadError, CannotConvert, describe_error, first_line
from cadsurgery.surgery.verify import TOLERANCE
from cadsurgery.tasks.zoo_record import Row

# Comparisons of a converted network with the network as given, in the order of the table's columns.
COMPARISONS = ("own", "high", "floors", "odd", "batch", "float64")

# A network is worth converting if everything at the floor takes less than this share of its work.
USEFUL_SHARE = 0.6

FLOOR = 32  # input pixels; networks whose largest stride is larger get that as their floor


def check_as_it_is(subject: Subject, *, write: bool = False, seconds: float = 100.0) -> Row:
    """Build a network with random weights, convert it as it is, and compare the two as their users call them.

    The comparisons are: `own`, all outputs of the call at the network's own level; `high`, law 2 of the conversion
    (everything high is the dense network of that output stride); `floors`, `coarsest=32`: everything high is the
    network as given, and everything at the floor its emulation; `odd`, `own` at a size of the other parity; `batch`, a
    batch of two after a conversion with a batch of one; `float64`.

    Args:
        subject: the network.
        write: also write an ONNX file, and compare what ONNX Runtime computes from it.
        seconds: comparisons that would begin later are left out, and the row says so.

    Returns:
        One row: `result` (`converts`, `refused`, `broken` or `not built`), the reason, whether an example was needed,
        the outcome and error of each comparison, the share of the work at the floor, and seconds.

    Raises:
        MemoryError: there is not enough memory.
    """
    end = time.perf_counter() + seconds

    def compare(model: nn.Module, example: Any, row: Row) -> None:
        _compare_calls(_Checked(subject, model, example, end), row, write)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return try_network(subject, compare)


class _Checked:
    """A network to compare, and when its comparisons end."""

    def __init__(self, subject: Subject, model: nn.Module, example: Any, end: float) -> None:
        self.subject, self.model, self.example, self.end = subject, model, example, end

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.end

    def arguments(self, size: tuple[int, int], batch: int = 2, channels: int = 3) -> Any:
        """Arguments of a call at a size; those of the network's type."""
        image = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))
        return self.subject.arguments(image.to(next(self.model.parameters(), image).dtype))

    @functools.cached_property
    def channels(self) -> tuple[int, ...]:
        """Numbers of channels to try: those of the images that the conversion tries."""
        if self.subject.call:
            return (3,)
        return tuple(dict.fromkeys(image_of(call).shape[1] for call in default_examples(self.model)))

    def sizes(self, kinds: tuple[tuple[int, int], ...], batch: int = 2) -> list[Any]:
        """The arguments at the first of some sizes that the network takes."""
        drawn = (self.arguments(size, batch, count) for count in self.channels for size in kinds)
        return list(itertools.islice((values for values in drawn if takes(self.model, values)), 1))

    @property
    def even(self) -> tuple[tuple[int, int], ...]:
        """Even sizes to try: the subject's own first."""
        return (*([self.subject.size] if self.subject.size else []), *EVEN_SIZES)

    def own(self, net: AdaptiveModel, arguments: Any) -> float:
        """The error of the call at the network's own level; infinite if the output is of another type."""
        level = net.plan.identity_level
        if level is None:
            return float("inf")
        words = {net.plan.max_level: "none", 0: "all"}
        with torch.no_grad():
            expected = call_network(self.model, arguments)
            mask: object = words.get(level)
            if mask is None:
                call_network(net, arguments, mask="random")
                mask = torch.full_like(net.levels, level)
            output = call_network(net, arguments, mask=mask)
        return largest_error(output, expected) if type(output) is type(expected) else float("inf")


def _compare_calls(checked: _Checked, row: Row, write: bool) -> None:
    """Convert and compare; everything that is found goes into the row."""
    begin = time.perf_counter()
    net = _convert(checked, row)
    row["seconds_to_convert"] = round(time.perf_counter() - begin, 1)
    chosen = net.plan
    row |= {
        "part": chosen.part,
        "output_stride": list(chosen.output_stride),
        "given_stride": chosen.strides[chosen.identity_level] if chosen.identity_level is not None else 0,
        "share_in_region": round(chosen.share("adapt", "keep"), 4),
        "matters": chosen.matters,
    }
    found: dict[str, float | str] = {}
    row["compared"] = found
    even = checked.sizes(checked.even)
    tolerance = TOLERANCE[torch.float32]
    found["own"] = checked.own(net, even[0]) if even else "takes no size of the check"
    if (
        not _holds(found["own"], tolerance) and even
    ):  # rounding that a deep random network amplifies is no finding
        row["own_in"] = "float64"
    second = [] if row.get("floors_alone") else [check.error for check in net.checks if check.number == 2]
    found["high"] = max(second, default="not compared: it is the network as given")
    odd = checked.sizes(ODD_SIZES)
    found["odd"] = checked.own(net, odd[0]) if odd else "takes no odd size"
    for name, compare in {"floors": _floors, "wide": _wide}.items():
        if checked.is_late:
            names = ("floors",) if name == "floors" else ("batch", "float64")
            found |= dict.fromkeys(names, "not compared: no time was left")
        else:
            compare(checked, row, found, even)
    if row.get("own_in") and _holds(found.get("float64"), TOLERANCE[torch.float64]):
        found["own"] = found["float64"]
        if isinstance(found["odd"], float) and not _holds(found["odd"], tolerance):
            found["odd"] = "float32 rounds too much"
    if write and even:
        row["file"] = _attempt(lambda: _file(checked, row, even[0]))
    wrong = [
        name
        for name, value in found.items()
        if isinstance(value, float)
        and not _holds(value, TOLERANCE[torch.float64 if name in ("batch", "float64") else torch.float32])
    ]
    failed = [f"{name}: {value}" for name, value in found.items() if str(value).startswith("fails")]
    row["compared"] = {name: _rounded(found[name]) for name in COMPARISONS if name in found}
    row |= {"result": "broken" if wrong or failed else "converts"}
    row["why"] = "; ".join([*(f"{name} is not exact ({found[name]:.1e})" for name in wrong), *failed])


def _holds(error: Any, tolerance: float) -> bool:
    return isinstance(error, float) and error <= tolerance


def _rounded(value: float | str) -> float | str:
    return float(f"{value:.1e}") if isinstance(value, float) and value < float("inf") else str(value)


def _convert(checked: _Checked, row: Row) -> AdaptiveModel:
    """Convert a network as it is; if the conversion finds no images for it, with an example, which the row says."""
    if checked.subject.call is None:
        try:
            return cs.adaptify(checked.model, "edges", outputs="native")
        except CannotConvert as refusal:
            first = refusal
        with contextlib.suppress(CannotConvert):  # a network without strides can still have floors
            net = cs.adaptify(checked.model, "edges", coarsest=FLOOR, outputs="native")
            row["floors_alone"] = True
            return net
        example = checked.sizes(checked.even)
        if not example:
            raise first
        net = cs.adaptify(checked.model, "edges", outputs="native", example_input=example[0])
        checked.example, row["needs_example"] = example[0], first_line(first)
        return net
    example = checked.sizes(checked.even)
    checked.example, row["needs_example"] = example[0], "its call has other arguments than an image"
    return cs.adaptify(checked.model, "edges", outputs="native", example_input=checked.example)


def _floor_of(row: Row) -> dict[str, int]:
    """The option of further conversions of a network without strides."""
    return {"coarsest": FLOOR} if row.get("floors_alone") else {}


def _floors(checked: _Checked, row: Row, found: dict[str, float | str], even: list[Any]) -> None:
    """Convert with `coarsest`, compare everything high, and count the work of everything at the floor."""
    example = checked.example
    try:
        net = cs.adaptify(checked.model, "edges", coarsest=FLOOR, outputs="native", example_input=example)
    except CadError as refusal:
        found["floors"] = f"refused: {describe_error(refusal)}"
        return
    except Exception as error:
        found["floors"] = f"fails: {describe_error(error)}"
        return
    errors = [check.error for check in net.checks]
    emulated = [check.error for check in net.checks if "emulation" in check.law]
    row["floors_emulated"] = bool(emulated)
    found["floors"] = max([*errors, *([checked.own(net, even[0])] if even else [])])
    arguments = even[0] if even else example
    if arguments is not None:
        work = _attempt(lambda: call_work(net, arguments))
        row["floor_share"] = work


def call_work(net: AdaptiveModel, arguments: Any) -> float:
    """Return the work of everything at the floor relative to the network as given."""
    args, kwargs = (
        ((), arguments)
        if isinstance(arguments, dict)
        else (
            arguments if isinstance(arguments, tuple) else (arguments,),
            {},
        )
    )
    with net.masked("none"):  # a network may have an argument named mask
        report = net.macs(*args, **kwargs)
    return round(report.low / max(1, report.given or report.high), 3)


def _wide(checked: _Checked, row: Row, found: dict[str, float | str], even: list[Any]) -> None:
    """Convert in float64 with a batch of one, and compare a batch of one and of two."""
    wide = _Checked(checked.subject, copy.deepcopy(checked.model).double(), None, checked.end)
    one, two = wide.sizes(wide.even, 1), wide.sizes(wide.even, 2)
    if not one or not two:
        found |= dict.fromkeys(("batch", "float64"), "does not run in float64")
        return
    try:
        net = cs.adaptify(
            wide.model, "edges", outputs="native", example_input=one[0], verify_laws=False, **_floor_of(row)
        )  # the laws were verified in float32; the calls are compared below
    except Exception as error:
        found["float64"] = f"fails: {describe_error(error)}"
        return
    for name, arguments in (("float64", one[0]), ("batch", two[0])):
        try:
            found[name] = wide.own(net, arguments)
        except Exception as error:
            found[name] = f"fails: {describe_error(error)}"


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise_memory_errors(error)
        return f"fails: {describe_error(error)}"


def _file(checked: _Checked, row: Row, arguments: Any) -> str:
    """Write an ONNX file, which is compared with the network in ONNX Runtime before it appears under its name."""
    net = cs.adaptify(checked.model, "edges", outputs="native", example_input=arguments, **_floor_of(row))
    with tempfile.TemporaryDirectory() as folder:
        cs.export(net, arguments, Path(folder) / "net.onnx")
    return "written"
