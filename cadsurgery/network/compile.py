"""Give compilers and CUDA graphs static shapes: a network is compiled once per bucket of element counts.

With a mask that always keeps the same number of patches (`"edges | budget:fraction=0.3"`), shapes depend only on the
image size, and `torch.compile(net)` makes one graph per image size. For any other mask, `Bucketed` rounds the numbers
of elements up.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.lattice import Bounds, Lattice
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.model import AdaptiveModel, OptimizedModel, whole_program
from cadsurgery.network.program import Masked, runnable
from cadsurgery.network.recorded import Recorded
from cadsurgery.network.signature import Forward
from cadsurgery.support.errors import InvalidInput

# Largest number of graphs that a bucketed network keeps.
MOST_GRAPHS = 128


class Bucketed(nn.Module):
    """A network compiled for any mask: once per bucket of element counts instead of once per image.

        fast = cs.Bucketed(net)             # compiled by torch.compile
        fast = cs.Bucketed(net.optimize())  # on a GPU: recorded as CUDA graphs
        y = fast(x)

    An optimised copy on a GPU is not compiled but recorded; its results are overwritten by the next call, so keep
    copies (`y.clone()`). With a mask that always keeps the same number of patches, a call is one recording, and the
    device is waited for only to check the image.

    The layers before the region and the mask run first, including a first pass if the mask needs one. Then the number
    of elements after each stage is rounded up to a bucket, and the rest runs in a graph compiled for that bucket, whose
    last rows are unused padding. A graph is compiled for the first image of its bucket and size; beyond `MOST_GRAPHS`,
    the least recently used graph is dropped. `net.levels` and `net.active_fraction` are those of the last call.
    """

    def __init__(self, net: AdaptiveModel, per_octave: int = 4, **options: Any) -> None:
        """Wrap a network, whose weights and mask are shared.

        Args:
            net: a network from `adaptify`.
            per_octave: number of buckets between a number and its double. More buckets mean less padding (at most a
                factor 2 ** (1 / per_octave)) and more graphs.
            options: options of torch.compile, such as `mode` or `backend`.

        Raises:
            InvalidInput: the network is not converted or only hosts a converted part, it has floors, or `per_octave`
                is below 1.
        """
        super().__init__()
        part = "pass what cs.adaptify(...) gave; of a detector, its backbone: cs.adaptify(model.backbone)."
        program = whole_program(net, "cannot be bucketed", part)
        if net.geometry.floors:
            raise InvalidInput(
                "a network with floors cannot be bucketed.",
                why="its kept cells are small dense maps, as many as the mask keeps: it is no graph of static shapes.",
                next="run net.optimize() itself, which is for CPUs; on a GPU keep the network as given.",
            )
        if per_octave < 1:
            raise InvalidInput(f"per_octave={per_octave}.", next="use a positive number such as 4.")
        self.net, self.per_octave, self.options = net, per_octave, options
        self._before = self._compile(runnable(program.halves.before))
        self._after: dict[object, Callable[..., Any]] = {}
        self._whole: dict[str, Recorded] = {}  # by mask

    def _compile(self, run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return a function of the network as it is run: recorded, or compiled with options."""
        if not isinstance(self.net, OptimizedModel):
            return torch.compile(_with_own_code(run), **options, **self.options)
        if self.options:
            raise InvalidInput(
                f"{', '.join(self.options)} of an optimised copy.",
                why="options are those of torch.compile, and an optimised copy is recorded, not compiled.",
                next="leave the options out, or pass the network it was made from.",
            )
        names = self.net.program.names
        return Recorded(lambda *args, **kwargs: run(names(), *args, **kwargs), self.net, MOST_GRAPHS)

    @property
    def buckets(self) -> int:
        """The number of compiled graphs; buckets of different image sizes count separately."""
        return len(self._after)

    @property
    def original_signature(self) -> inspect.Signature:
        """The signature of a call of the original network."""
        return self.net.original_signature

    @Forward
    def forward(self, *args: Any, mask: object = None, **kwargs: Any) -> Any:
        """Run the network; see `AdaptiveModel.forward`."""
        net, program = self.net, self.net.program
        provider = net.mask if mask is None else resolve_mask(mask)
        if isinstance(net, OptimizedModel):
            with torch.no_grad():
                masked = program.check_and_run(partial(self._replay, net, provider), *args, **kwargs)
            return net.finish(*masked)
        values = program.check_and_run(
            lambda arguments: self._before(program.names(), **arguments), *args, **kwargs
        )
        lattice = program.ask(program.masking(provider), values)
        levels = lattice.pyramid.levels
        run = self._after_for(self._bounds(lattice), levels)
        return net.finish(program.contain(run(levels, *values)), lattice)

    def _after_for(self, bounds: Bounds, levels: Tensor) -> Callable[..., Any]:
        """Return the function of level map and values that runs the network from the mask on."""
        return _latest(self._after, (bounds, levels.shape), lambda: self._make_for(bounds))

    def _replay(self, net: OptimizedModel, provider: MaskProvider, arguments: dict[str, Any]) -> Masked:
        """Run recordings of an optimised copy: one if the mask is static, else one on each side of the mask."""
        program, masking = net.program, net.program.masking(provider)
        if provider.static and provider.storable and not provider.looks_ahead:
            key = "" if provider is net.mask else provider.spec()
            run = partial(program, masking)
            masked: Masked = _latest(self._whole, key, lambda: Recorded(run, net, MOST_GRAPHS))(arguments)
            return masked
        values = self._before(**arguments)
        lattice = program.ask(masking, values)
        after = self._after_for(self._bounds(lattice), lattice.pyramid.levels)
        return program.contain(after(lattice.pyramid.levels, *values)), lattice

    def _bounds(self, lattice: Lattice) -> Bounds:
        counts = [lattice.at(stage).count for stage in range(lattice.stage + 1)]
        if lattice.uniform_level is not None:
            return Bounds(tuple(counts), tuple(counts), lattice.uniform_level)
        least, most = zip(*(bucket(count, self.per_octave) for count in counts), strict=True)
        return Bounds(least, most)

    def _make_for(self, bounds: Bounds) -> Callable[..., Any]:
        program = self.net.program
        forward, geometry = runnable(program.halves.after), program.geometry

        def run(names: Any, levels: Tensor, *values: Any) -> Any:
            return forward(names, lambda *_: geometry.lattice(levels, bounds), *values)[0]

        run = self._compile(run, fullgraph=True, dynamic=False)
        return run if self.net.is_optimized else partial(run, program.names())


def _latest(made: dict[Any, Any], key: object, make: Callable[[], Any]) -> Any:
    """Return what was made for a key, or make it; beyond `MOST_GRAPHS` the least recently used is dropped."""
    value = made.pop(key, None)
    made[key] = value = make() if value is None else value  # ordered by last use
    for oldest in list(made)[:-MOST_GRAPHS]:
        made.pop(oldest, None)
    return value


def bucket(count: int, per_octave: int) -> tuple[int, int]:
    """Return the smallest and the largest number of the bucket that contains `count`."""

    def most(place: int) -> int:
        return math.ceil(2 ** (place / per_octave)) if place >= 0 else -1

    place = math.floor(per_octave * math.log2(count - 1)) if count > 1 else 0
    while most(place) < count:
        place += 1
    return most(place - 1) + 1, most(place)


def _with_own_code(function: Any) -> Any:
    """Give a function its own code object, because torch.compile limits the graphs per code object to eight."""
    function.__code__ = function.__code__.replace()
    return function
