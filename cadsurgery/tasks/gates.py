"""Networks with gates by name and file: converted, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.methods.sampling import SampledModel, sample
from cadsurgery.methods.sampling.plan import SamplingPlan
from cadsurgery.methods.sampling.storage import NAME
from cadsurgery.methods.storage import load, save
from cadsurgery.network.storage import read_method
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.files import check_folder
from cadsurgery.support.provenance import device_with_threads, find_device
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.convert_report import Side
from cadsurgery.tasks.for_each import Step
from cadsurgery.tasks.open import example_batch, is_file, original
from cadsurgery.tasks.report import Column, Report, heading, number, table

TIMING_SECONDS = 15.0  # large networks on slow machines get fewer rounds


def open_gates(network: object, trust: bool = False) -> SampledModel | None:
    """A network with gates, or that of a file; None if it is no such."""
    if isinstance(network, SampledModel):
        return network
    if not isinstance(network, str) or not is_file(network) or read_method(network) != NAME:
        return None
    net = load(network, trust=trust)
    assert isinstance(net, SampledModel)
    return net


@dataclass(frozen=True)
class GatesReport(Report):
    """What `cadsurgery convert --method sampling` tells.

    `sides` are the original, the network with its gates open as they start, both as they are and optimised; and the
    optimised copy with everything closed but the grid: what training lies between.
    """

    model: str
    weights: str
    random: bool
    plan: SamplingPlan
    image: tuple[int, ...]
    sides: tuple[Side, ...]
    is_verified: bool
    device: str
    file: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**super().to_dict(), "plan": str(self.plan)}

    def parts(self) -> Iterator[RenderableType]:
        """Network, plan, the sides beside each other."""
        yield heading(self.model, self.weights, self.random)
        yield Text(str(self.plan))
        columns: list[Column[Side]] = [
            Column("network", lambda side: side.name, False),
            Column("MACs", lambda side: f"{side.macs:.3e}"),
            Column("ms", lambda side: number(side.milliseconds)),
        ]
        yield table(self.sides, columns, f"image of {self.image[2]}x{self.image[3]}, on {self.device}")
        if self.is_verified:
            yield Text("verified: with open gates it is the original, bit for bit", style="green")
        yield Text("gates start open: train them with cadsurgery finetune --train gates", style="yellow")
        yield Text(f"wrote {self.file}", style="bold green")


def convert_gates(
    *,
    model: str,
    weights: str,
    options: Mapping[str, Any],
    image: Path | None,
    size: tuple[int, int] | None,
    output: Path | None,
    device: str,
    verify: bool,
    rounds: int,
    step: Step,
) -> GatesReport:
    """Build, add gates, verify, measure and save; see `cadsurgery convert --help`.

    Raises:
        CannotConvert: with open gates the network is not the original.
    """
    where = find_device(device)
    output = output or Path(f"{re.sub('[:/]', '-', model)}-sampling.safetensors")
    check_folder(output)
    step(f"building {model}")
    before, source = original(model, weights)
    step("adding gates")
    net = sample(before, **options).to(where)
    batch = example_batch(source, image, size).to(where)
    before.to(where)
    if verify:
        _check_open(before, net, batch)
    fast, closed = net.optimize(), net.optimize()
    for gate in closed.gates:
        gate.bias.data.neg_()
    counted, least = net.macs(batch), closed.macs(batch)
    calls: dict[str, tuple[int, Callable[[Tensor], object]]] = {
        "original": (counted.dense, before),
        "gates open": (counted.total, net),
        "original, optimised": (counted.dense, fast.dense),
        "gates open, net.optimize()": (counted.total, fast),
        "all closed but the grid, net.optimize()": (least.total, closed),
    }
    step("measuring")
    runs = {name: partial(run, batch) for name, (_, run) in calls.items()}
    times = interleaved(runs, rounds, seconds=TIMING_SECONDS) if rounds else {}
    sides = [Side(n, macs, times[n].best if times else None) for n, (macs, _) in calls.items()]
    step(f"writing {output}")
    save(net, output)
    return GatesReport(
        model=source.name,
        weights=source.note,
        random=source.weights == "random",
        plan=net.plan,
        image=tuple(batch.shape),
        sides=tuple(sides),
        is_verified=verify,
        device=f"{device_with_threads(where)}, torch {torch.__version__}",
        file=str(output),
    )


def _check_open(before: nn.Module, net: SampledModel, batch: Tensor) -> None:
    with torch.inference_mode():
        found, expected = tensors_of(net(batch)), tensors_of(before(batch))
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    if not same:
        raise CannotConvert(
            "with all gates open the network is not the original.",
            where=net.plan.branches[0].name,
            why="what it returns on the image differs.",
            next="report it, with the network; --no-verify converts all the same.",
        )
