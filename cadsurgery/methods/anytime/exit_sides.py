"""Sides of a network with exits: every exit at every threshold of confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import source_of
from cadsurgery.methods.anytime import AnytimeModel, anytime
from cadsurgery.methods.anytime.model import Threshold
from cadsurgery.methods.side import (
    Comparison,
    ConversionRequest,
    Counts,
    Figures,
    MethodConversion,
    MethodSides,
    Side,
    Timed,
    once_per_batch,
)
from cadsurgery.network.macs import dense_macs
from cadsurgery.support.divergence import maps_of, relative_difference
from cadsurgery.support.fields import Reader, read_names, read_threshold
from cadsurgery.support.rows import Row, accuracy_columns, time_columns
from cadsurgery.support.tables import Column

EVERYTHING = "all computed"


def in_words(threshold: float | Sequence[float] | None) -> str:
    """Format a threshold, or the thresholds of several exits; None means that everything is computed."""
    if threshold is None:
        return EVERYTHING
    return " ".join(f"{value:g}" for value in (threshold if isinstance(threshold, Sequence) else [threshold]))


# -- evaluating ----------------------------------------------------------------------------------------


def _sides(net: AnytimeModel, threshold: Any) -> Iterator[Side]:
    """Yield all exits at a threshold (None: everything is computed); exits share one run per batch."""
    reached: Threshold = net.everything if threshold is None else threshold
    run = once_per_batch(partial(net.predict_and_count, threshold=reached))

    def predict(exit: int, images: Tensor) -> Any:
        return run(images)[0][exit]

    def count(exit: int, images: Tensor) -> Counts:
        exits = run(images)[1]
        return {"macs": exits[exit].macs, "whole": exits[-1].dense}

    def run_until(exit: int, images: Tensor) -> None:
        steps = net.steps(images, threshold=reached)
        for _ in range(exit + 1):
            next(steps)

    words = in_words(threshold)
    for exit, exit_plan in enumerate(net.plan.exits):
        yield Side(
            f"exit {exit + 1}",
            partial(predict, exit),
            partial(count, exit),
            about={"threshold": threshold, "exit": exit + 1, "name": exit_plan.name, "setting": words},
            timed=partial(run_until, exit),
            summary=_work,
            anchor=threshold is None,
            curve=words if threshold is None else f"threshold {words}",
        )


def _work(counts: Counts, figures: Figures) -> dict[str, Any]:
    return {"macs": counts["macs"] / counts["images"], "macs_of_whole": counts["macs"] / counts["whole"]}


def compare(net: AnytimeModel, data: SegmentationData, thresholds: Sequence[Any]) -> Comparison:
    """Return the sides: every exit with everything computed, then at each threshold.

    The time of an exit is the time until its prediction. Rows have the `threshold` (None: everything is computed),
    the number of the `exit` from 1, the `name` of the module it follows, and `macs_of_whole`, the MACs relative to
    the last exit with everything computed.

    Args:
        net: network whose optimised copy is run.
        data: the images.
        thresholds: confidence thresholds, each one number or one for each exit but the last; default: the network's
            own.
    """
    fast = net.optimize()
    limits = [
        tuple(limit) if isinstance(limit, Sequence) else limit for limit in thresholds or (net.threshold,)
    ]
    others = [limit for limit in limits if not net.asks_everything(limit)]
    sides = [side for threshold in (None, *others) for side in _sides(fast, threshold)]
    return Comparison(source_of(net), sides, _columns, "setting")


def _columns(report: Any) -> Iterator[Column[Row]]:
    whole = next(row for row in reversed(report.rows) if row.anchor)
    yield Column("threshold", "setting")
    yield Column("exit", lambda row: f"{row.exit} {row.name}" if "exit" in row.values else "", False)
    yield from accuracy_columns()
    yield Column("MACs", "macs", form=".3e")
    yield Column("of whole", lambda row: f"{row.macs / whole.macs:.2f}")
    yield from time_columns("whole", lambda row: whole)


# -- timing --------------------------------------------------------------------------------------------


def time(net: AnytimeModel, images: Tensor, fractions: Sequence[float]) -> Timed:
    """Return the sides: all exits with everything computed, and at the network's own threshold."""
    counted, fast = net.macs(images), net.optimize()
    whole = Side("all exits, everything computed", partial(fast, threshold=net.everything), counted[-1].dense)
    own = Side(f"all exits, threshold {in_words(net.threshold)}", fast, counted[-1].macs)
    return Timed([whole, own], counted.not_counted)


# -- converting ----------------------------------------------------------------------------------------


def convert(request: ConversionRequest) -> MethodConversion:
    """Add exits. The last exit, with everything computed, is compared with the original network."""
    before, batch = request.before, request.batch(request.source)
    request.step("adding exits")
    net = anytime(before, **request.options)
    error = _difference(before, net, batch)
    timed = time(net, batch, ())
    verified = f"verified: the last exit is the original (relative error {error or 0:.1e})"
    untrained = "the heads of the other exits are new: train them with cadsurgery finetune --set train=exits"
    return MethodConversion(
        net,
        batch,
        [Side("original", before, dense_macs(before, batch)), *timed.sides],
        {"threshold": net.threshold, "error": error, "not_counted": timed.not_counted},
        Text(str(net.plan)),
        [*([Text(verified, style="green")] if error is not None else ()), Text(untrained, style="yellow")],
    )


def _difference(before: nn.Module, net: AnytimeModel, batch: Tensor) -> float | None:
    """Return the relative error of the last exit; None for a backbone, whose heads are all new."""
    if len(net.heads) == len(net.plan.exits):
        return None
    with torch.inference_mode():
        expected, output = maps_of(before(batch))[0], net(batch, threshold=net.everything)[-1]
    return relative_difference(output, expected)


def run(net: AnytimeModel, batch: Tensor, milliseconds: float) -> tuple[Tensor, dict[str, Any]]:
    """Return the best prediction within a time limit, and its exit."""
    prediction, exit = net.until(batch, milliseconds=milliseconds)
    return prediction, {"exit": exit}


_SETTINGS: dict[str, Reader] = {
    **{"exits": read_names, "head": str, "classes": int, "hidden": int, "threshold": read_threshold},
    **{"confidence": str, "fill": str},
}
KIND: MethodSides = MethodSides(
    *(AnytimeModel, "with exits", convert, compare, time, run, _SETTINGS),
    renamed={"gaps": "fill"},
    has_thresholds=True,
)
