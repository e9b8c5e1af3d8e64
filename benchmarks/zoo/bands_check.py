"""Check one network in bands: a picture computed in bands of rows is the picture computed whole, or is refused."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import cadsurgery as cs
from benchmarks.zoo.corpus import Subject
from benchmarks.zoo.network_check import call_network, largest_error, raise_memory_errors, takes, try_network
from cadsurgery.network.bands import banded_call
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadError, describe_error
from cadsurgery.surgery.verify import TOLERANCE
from cadsurgery.tasks.zoo_record import Row

SIZES = ((131, 101), (129, 161), (128, 160), (160, 224))  # odd ones, and those of networks that take few
MASK = "gradient | budget:fraction=0.4"
FLOOR = 32  # input pixels
MUCH = "1TiB"

# Options of each conversion; the masks of its comparisons, by name, and for each rows of a band.
CONVERSIONS: tuple[tuple[dict[str, Any], dict[str, tuple[str, tuple[int, int]]]], ...] = (
    ({"coarsest": FLOOR}, {"as given": ("all", (1, 16)), "floors": (MASK, (1, 64))}),
    ({}, {"strides": (MASK, (1, 64))}),
)
REFUSALS = ("cannot be computed in bands", "not computed in bands here")  # other errors are findings


@contextmanager
def bands_of(rows: int) -> Iterator[None]:
    """Within, every band has so many rows of the tallest map, rounded up to whole cells; one of them at a time, or of
    bands with many rows two."""
    cells = mock.patch.object(banded_call, "_CELLS", (1 if rows <= 16 else 2,))
    with cells, mock.patch.object(banded_call, "_bands", lambda *_: iter([rows])):
        yield


def check_in_bands(subject: Subject, *, seconds: float = 60.0) -> Row:
    """Build a network with random weights, convert it, and compare `optimize(memory=)` with `optimize()` in float64.

    Compared are a picture of an odd size in bands of one row or cell, and a batch of two in channels_last in bands of
    many: `as given`, the network's own graph; `floors`, its elements under `coarsest=`; `strides`, those of a
    conversion that removes strides.

    Args:
        subject: the network.
        seconds: comparisons that would begin later are left out, and the row says so.

    Returns:
        One row: `result` (`in bands`, `partly`, `refused`, `broken`, `not converted` or `not built`), the reason, the
        outcome of each comparison, the place of each refusal, and seconds.

    Raises:
        MemoryError: there is not enough memory.
    """
    end = time.perf_counter() + seconds

    def compare(model: nn.Module, example: Any, row: Row) -> None:
        model, example = model.double(), tree_map_only(Tensor, _widen, example)
        found = row["compared"] = dict[str, str]()
        for options, comparisons in CONVERSIONS:
            try:
                net = cs.adaptify(model, MASK, example_input=example, verify_laws=False, **options)
            except CadError as refusal:
                found |= dict.fromkeys(comparisons, f"not converted: {describe_error(refusal)}")
                continue
            whole, banded = net.optimize(), net.optimize(memory=MUCH)
            for name, (mask, rows) in comparisons.items():
                is_late = time.perf_counter() > end
                found[name] = (
                    "not compared: no time was left"
                    if is_late
                    else _compared(subject, whole, banded, mask, rows)
                )
        row |= _result(found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return try_network(subject, compare)


def _widen(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def _compared(
    subject: Subject, whole: AdaptiveModel, banded: AdaptiveModel, mask: str, rows: tuple[int, int]
) -> str:
    """Compare calls of two copies, and return in words what is found."""
    for batch, many in enumerate(rows, 1):
        arguments = _arguments(subject, whole, batch)
        if arguments is None:
            return "not compared: it takes none of the sizes"
        with torch.no_grad():
            expected = call_network(whole, arguments, mask=mask)
            try:
                with bands_of(many):
                    output = call_network(banded, arguments, mask=mask)
            except Exception as error:  # any failure but a refusal is a finding
                raise_memory_errors(error)
                if isinstance(error, CadError) and any(words in str(error) for words in REFUSALS):
                    return f"refused: {error.why} ({error.where})"
                return f"fails: in bands of {many} rows {describe_error(error)}"
        error_of_bands = largest_error(output, expected)
        if not error_of_bands <= TOLERANCE[torch.float64]:
            return f"is not whole: in bands of {many} rows an error of {error_of_bands:.1e}"
        if not torch.equal(whole.levels, banded.levels):
            return f"is not whole: in bands of {many} rows the levels differ"
    return "equal"


def _arguments(subject: Subject, net: AdaptiveModel, batch: int) -> Any:
    """The arguments of a call at the first of the sizes that the network takes; None if it takes none."""
    channels = 3 if subject.call else net.plan.example_shape[1]
    layout = torch.contiguous_format if batch == 1 else torch.channels_last
    for size in SIZES:
        image = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).double()
        arguments = subject.arguments(image.contiguous(memory_format=layout))
        if takes(net, arguments):
            return arguments
    return None


def _result(found: dict[str, str]) -> Row:
    compared = {name: what for name, what in found.items() if not what.startswith("not ")}
    refused = [what for what in compared.values() if what.startswith("refused")]
    wrong = [f"{name} {what}" for name, what in compared.items() if what != "equal" and what not in refused]
    if wrong:
        return {"result": "broken", "why": "; ".join(wrong)}
    if not compared:
        return {"result": "not converted", "why": next(iter(found.values()))}
    result = "in bands" if not refused else "refused" if len(refused) == len(compared) else "partly"
    return {"result": result, "why": next(iter(refused), "").removeprefix("refused: ")}
