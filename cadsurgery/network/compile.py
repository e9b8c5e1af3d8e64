"""Static shapes for compilers: networks compiled once per bucket of numbers of elements.

A network whose mask always keeps the same number of patches (`"edges | budget:fraction=0.3"`) has shapes that depend
on the size of the image alone: `torch.compile(net)` makes one graph for all images of a size. For any other mask
`Bucketed` rounds the numbers of elements up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.lattice import Bounds, Lattice
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.program import runnable
from cadsurgery.support.errors import InvalidInput

# Graphs that a bucketed network keeps.
MOST_GRAPHS = 128


class Bucketed(nn.Module):
    """A network compiled for any mask: once per bucket of element counts instead of once per image.

        fast = cs.Bucketed(net)
        y = fast(x)

    What precedes the region and the mask come first, with the first pass that a mask may want; then the numbers of
    elements after each stage are rounded up to a bucket, and the rest runs in a graph made for that bucket, its last
    rows padding that nothing reads. A graph is made at the first image of its bucket and size; of more than
    `MOST_GRAPHS` the one that was not used for longest goes. `net.levels` and `net.active_fraction` are those of the
    last call.
    """

    def __init__(self, net: AdaptiveModel, per_octave: int = 4, **options: Any) -> None:
        """Wrap a network; its weights and mask stay its own.

        Args:
            net: what `adaptify` gave.
            per_octave: buckets between a number and its double. More mean less padding (at most a factor
                2 ** (1 / per_octave)) and more graphs.
            options: of torch.compile, such as `mode` or `backend`.

        Raises:
            InvalidInput: no converted network, one that only hosts a converted part, or no bucket at all.
        """
        super().__init__()
        part = "pass what cs.adaptify(...) gave; of a detector, its backbone: cs.adaptify(model.backbone)."
        program = whole_program(net, "cannot be bucketed", part)
        if per_octave < 1:
            raise InvalidInput(f"per_octave={per_octave}.", next="use a positive number such as 4.")
        self.net, self.per_octave, self.options = net, per_octave, options
        self._before = torch.compile(_apart(runnable(program.halves.before)), **options)
        self._after: dict[object, Callable[..., Any]] = {}

    @property
    def buckets(self) -> int:
        """Number of buckets there are graphs for, those of different image sizes apart."""
        return len(self._after)

    def forward(self, *args: Any, mask: object = None, **kwargs: Any) -> Any:
        """Run the network; see `AdaptiveModel.forward`."""
        net, program = self.net, self.net.program
        provider = net.mask if mask is None else resolve_mask(mask)
        values = program.check_and_run(
            lambda arguments: self._before(program.names(), **arguments), *args, **kwargs
        )
        lattice = program.ask(program.masking(provider), values)
        bounds, levels = self._bounds(lattice), lattice.pyramid.levels
        key = (bounds, levels.shape)
        run = self._after.pop(key, None) or self._make_for(bounds)
        self._after[key] = run  # the last used stands last
        for oldest in list(self._after)[:-MOST_GRAPHS]:
            self._after.pop(oldest, None)
        return net.finish(program.contain(run(levels, *values)), lattice)

    def _bounds(self, lattice: Lattice) -> Bounds:
        counts = [lattice.at(stage).count for stage in range(lattice.stage + 1)]
        if lattice.uniform_level is not None:
            return Bounds(tuple(counts), tuple(counts), lattice.uniform_level)
        least, most = zip(*(bucket(count, self.per_octave) for count in counts), strict=True)
        return Bounds(least, most)

    def _make_for(self, bounds: Bounds) -> Callable[..., Any]:
        program = self.net.program
        forward, geometry = runnable(program.halves.after), program.geometry

        def run(levels: Tensor, *values: Any) -> Any:
            return forward(program.names(), lambda *_: geometry.lattice(levels, bounds), *values)[0]

        return torch.compile(_apart(run), fullgraph=True, dynamic=False, **self.options)


def bucket(count: int, per_octave: int) -> tuple[int, int]:
    """The bucket a number is in: its least and its largest."""

    def most(place: int) -> int:
        return math.ceil(2 ** (place / per_octave)) if place >= 0 else -1

    place = math.floor(per_octave * math.log2(count - 1)) if count > 1 else 0
    while most(place) < count:
        place += 1
    return most(place - 1) + 1, most(place)


def _apart(function: Any) -> Any:
    """The function with code of its own: torch.compile counts graphs, and gives up at eight, per code object."""
    function.__code__ = function.__code__.replace()
    return function
