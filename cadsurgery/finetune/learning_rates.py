"""Learning rate, samples and random numbers as functions of seed and step alone.

No state is carried from step to step, so a run resumed at any step continues as if it had never stopped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cadsurgery.tasks.task_options import Settings


def learning_rate(step: int, factor: float, settings: Settings) -> float:
    """Return the learning rate of a step, counted from 0: max(lr factor (1 - step / steps)^power, floor)."""
    falling = (1 - step / settings.steps) ** settings.power
    return max(settings.lr * factor * falling, settings.lr_floor)


def derive_seed(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on all numbers (each 0 or above)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Draw:
    """The random state of one forward pass.

    Attributes:
        seed: seed of the run.
        step: step, counted from 0, the same in all processes.
        positions: positions of this process's images in the endless sequence of samples.
    """

    seed: int
    step: int
    positions: tuple[int, ...]

    def of_step(self) -> np.random.Generator:
        """Return random numbers shared by all images of the step, in all processes."""
        return np.random.default_rng((self.seed, self.step, 1))

    def of_images(self) -> list[np.random.Generator]:
        """Return random numbers for each image of the batch, independent of the process it is in."""
        return [np.random.default_rng((self.seed, position, 2)) for position in self.positions]


@dataclass(frozen=True)
class SampleOrder:
    """Order of the samples in an endless sequence, with a new permutation in every epoch.

    Attributes:
        samples: size of the dataset.
        seed: seed of the run.
        batch: images per process and forward pass.
        accumulate: forward passes per step.
        processes: number of processes that train together.
    """

    samples: int
    seed: int
    batch: int
    accumulate: int
    processes: int

    def index(self, position: int) -> int:
        """Return the index of the sample at a position."""
        epoch, offset = divmod(position, self.samples)
        return int(_permutation(self.samples, self.seed, epoch)[offset])

    def positions(self, step: int, part: int, process: int) -> tuple[int, ...]:
        """Return the positions of one process's images in one forward pass (`part`) of a step."""
        first = ((step * self.accumulate + part) * self.processes + process) * self.batch
        return tuple(range(first, first + self.batch))


@functools.lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(samples)
