"""What became of a network whose input is sampled: a pure value."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from cadsurgery.support.plain import read_as


@dataclass(frozen=True)
class ResampledPlan:
    """How an image is sampled, and what the network gives is brought back.

    Attributes:
        sampler: `learned`, `labels`, `uniform`, or a mask.
        grid: locations on a side.
        size: (height, width) of the sampled image.
        mode: how pixels are taken.
        back: how scores are brought back.
        maps: what the network returns of the sampled image that is brought back: (channels, height, width) of each.
        example_shape: of the image batch it was observed on.
        macs: on the example, of the sampler, the network, and the network without sampling.
    """

    sampler: str
    grid: int
    size: tuple[int, int]
    mode: str
    back: str
    maps: tuple[tuple[int, ...], ...]
    example_shape: tuple[int, ...]
    macs: tuple[int, int, int]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ResampledPlan:
        """The plan written by `to_json`.

        Raises:
            ValueError: a text that is no plan.
        """
        plan: ResampledPlan = read_as(ResampledPlan, json.loads(text), "the plan")
        numbers = (*plan.example_shape, *plan.size, plan.grid)
        if len(plan.example_shape) != 4 or min(numbers) < 1 or not plan.maps or math.prod(plan.size) < 4:
            raise ValueError("it is no plan of a sampled input")
        return plan

    def __str__(self) -> str:
        height, width = self.example_shape[2:]
        sampler, network, original = self.macs
        maps = ", ".join("x".join(map(str, shape)) for shape in self.maps)
        return "\n".join(
            (
                f"{self.size[0]} x {self.size[1]} pixels of {height} x {width}, {self.mode}, at a grid of "
                f"{self.grid} x {self.grid} locations by {self.sampler}",
                f"  the network gives {maps}, brought back to the image's size by {self.back}",
                f"  MACs: {sampler:.3e} of the sampler, {network:.3e} of the network; {original:.3e} without sampling",
            )
        )
