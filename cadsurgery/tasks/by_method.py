"""What `cadsurgery convert` has in common for all methods: where the network comes from, sides, report and file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import Source
from cadsurgery.methods.storage import Converted, SiblingModel, load, save
from cadsurgery.network.storage import read_method
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import CadError, InvalidInput, describe_error
from cadsurgery.support.files import check_folder
from cadsurgery.support.provenance import describe_run, find_device
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.convert_report import Side
from cadsurgery.tasks.for_each import Failures, Step
from cadsurgery.tasks.open import example_batch, is_file, original
from cadsurgery.tasks.report import Column, MeasuredReport, RunReport, heading, number, table

TIMING_SECONDS = 15.0  # large networks on slow machines get fewer rounds
Result = TypeVar("Result")
Calls = Mapping[str, tuple[int, Callable[[Tensor], object]]]  # by name of a side: its MACs, and what is timed


@dataclass(frozen=True, kw_only=True)
class MethodReport(RunReport):
    """What `cadsurgery convert --method` tells: `sides` are the original and what was made of it; `not_counted` are
    operations that are not among its MACs, because no rule says how much they multiply."""

    model: str
    weights: str
    random: bool
    plan: Any
    image: tuple[int, ...]
    sides: tuple[Side, ...]
    file: str
    not_counted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**super().to_dict(), "plan": str(self.plan)}

    def parts(self) -> Iterator[RenderableType]:
        """Network, plan, the sides beside each other, what was verified and what is new."""
        yield heading(self.model, self.weights, self.random)
        yield Text(str(self.plan))
        columns: list[Column[Side]] = [
            Column("network", lambda side: side.name, False),
            Column("MACs", lambda side: f"{side.macs:.3e}"),
            Column("ms", lambda side: number(side.milliseconds)),
        ]
        yield table(self.sides, columns, f"image of {self.image[2]}x{self.image[3]}")
        yield self.run_with()
        if left := describe_not_counted(self.not_counted):
            yield Text(left, style="yellow")
        if verified := self.verified():
            yield Text(f"verified: {verified}", style="green")
        if new := self.new():
            yield Text(new, style="yellow")
        yield Text(f"wrote {self.file}", style="bold green")

    def verified(self) -> str:
        """What was; empty: nothing."""
        return ""

    def new(self) -> str:
        """What has to be trained, and how; empty: nothing."""
        return ""


def open_any(network: object, trust: bool = False) -> SiblingModel | None:
    """A network that any method made, or that of a file; None if it is no such.

    Args:
        network: anything that names a network, or one.
        trust: see `cadsurgery.load`.
    """
    if isinstance(network, SiblingModel):
        return network
    if not isinstance(network, str) or not is_file(network) or not read_method(network):
        return None
    return cast(SiblingModel, load(network, trust=trust))


@dataclass(frozen=True, kw_only=True)
class MethodEvaluation(MeasuredReport):
    """Accuracy against work and time of what a method made, on labelled images.

    Attributes:
        split: part of the data.
        images: how many counted.
        image: (3, H, W) of the image that was timed.
    """

    split: str
    images: int
    image: tuple[int, ...]

    def subject(self) -> str:
        """Data, device, and what was timed."""
        size = "x".join(map(str, self.image[1:]))
        timed = f"; ms: {size}, best of {self.rounds} interleaved rounds" if self.rounds else ""
        return f"{self.data}, split {self.split}, {self.in_words()}, on {self.device}{timed}"

    def in_words(self) -> str:
        """How many images, and how they were seen."""
        return f"{self.images} images"


def each_labelled(
    samples: SegmentationData,
    source: Source,
    device: torch.device,
    work: Callable[[Tensor, Tensor], Result],
    failures: Failures,
    step: Step,
) -> Iterator[tuple[Tensor, Tensor, Result]]:
    """What some work gives for labelled images one after another; a failure is noted, and the next one is seen.

    Args:
        samples: with labels.
        source: by which images are prepared.
        device: to run on.
        work: on a batch of one image, (1, 3, H, W), and its labels, (H, W).
        failures: where they are noted.
        step: told how far it is.

    Yields:
        The batch, the labels and what the work gave.
    """
    for place in range(len(samples)):
        step(f"{place + 1} of {len(samples)} images")
        try:
            image, labels = samples[place]
            batch = normalise(image.unsqueeze(0), source).to(device)
            result = work(batch, labels)
        except (CadError, RuntimeError) as error:  # whatever the network itself says of an image of this size
            failures.at(place, samples.names[place])
            failures.note(error if isinstance(error, CadError) else InvalidInput(describe_error(error)))
            continue
        yield batch, labels, result


@dataclass
class Conversion:
    """A conversion by a method under way.

    Attributes:
        before: the network as it was built, on the device.
        source: where it came from.
        batch: the image.
        output: file to write.
    """

    before: nn.Module
    source: Source
    batch: Tensor
    output: Path
    rounds: int
    step: Step

    @classmethod
    def begin(
        cls,
        method: str,
        *,
        model: str,
        weights: str,
        image: Path | None,
        size: tuple[int, int] | None,
        output: Path | None,
        device: str,
        rounds: int,
        step: Step,
    ) -> Conversion:
        """Build the network and the image; what a method makes anew is the same in every run."""
        where = find_device(device)
        output = output or Path(f"{re.sub('[:/]', '-', model)}-{method}.safetensors")
        check_folder(output)
        step(f"building {model}")
        before, source = original(model, weights)
        batch = example_batch(source, image, size).to(where)
        torch.manual_seed(0)
        return cls(before.to(where), source, batch, output, rounds, step)

    def end(self, net: Converted, calls: Calls, not_counted: tuple[str, ...]) -> dict[str, Any]:
        """Measure the sides, write the file, and give what every report tells."""
        self.step("measuring")
        runs = {name: partial(run, self.batch) for name, (_, run) in calls.items()}
        times = interleaved(runs, self.rounds, seconds=TIMING_SECONDS) if self.rounds else {}
        sides = (Side(name, macs, times[name].best if times else None) for name, (macs, _) in calls.items())
        self.step(f"writing {self.output}")
        save(net, self.output)
        return {
            **{"model": self.source.name, "weights": self.source.note, "plan": net.plan},
            **{"random": self.source.weights == "random", "image": tuple(self.batch.shape)},
            "sides": tuple(sides),
            "file": str(self.output),
            "not_counted": not_counted,
            **describe_run(self.batch.device),
        }
