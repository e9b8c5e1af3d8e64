"""Static shapes for compilers: programs that run without this package, and networks compiled once per bucket.

A network whose mask always keeps the same number of patches (`"edges | budget:fraction=0.3"`) has shapes that depend
on the size of the image alone: `torch.compile(net)` makes one graph for all images of a size, and `export` one file.
For any other mask `Bucketed` rounds the numbers of elements up.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.lattice import Bounds, Lattice
from cadsurgery.masks.masking import check_image, not_static
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.program import runnable
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.files import check_folder, write_whole

# Graphs that a bucketed network keeps.
MOST_GRAPHS = 128
# Largest difference between a written program and the network, relative to the largest output.
TOLERANCE = 1e-4


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
        counts = [len(lattice.at(stage)) for stage in range(lattice.stage + 1)]
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


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        file: its path.
        bytes: its size.
        image: shape of the image batch it takes.
        difference: largest difference from the network on another image, relative to the largest output.
    """

    file: str
    bytes: int
    image: tuple[int, ...]
    difference: float


def export(
    net: AdaptiveModel, image: Tensor, path: str | os.PathLike[str], *, other: Tensor | None = None
) -> Exported:
    """Write a network with a static mask as a program that torch.export.load reads without this package.

    The program holds mask, lattice and network in torch's own operations, for images of one size. It is read back and
    compared with the network before it appears under its name.

    Args:
        net: what `adaptify` gave, in evaluation mode, with a mask such as `"edges | budget:fraction=0.3"`.
        image: an image batch (B, C, H, W) of the size the program is for.
        path: file to write, usually `.pt2`.
        other: another such batch to compare on; default: `image` turned upside down.

    Raises:
        InvalidInput: the mask is not static, the network is in training mode, or an image is none.
        CannotConvert: torch.export cannot follow the network, or the program gives something else.
        FileError: the file cannot be written.
    """
    check_image(image)
    other = image.flip(2, 3) if other is None else other
    check_image(other, "the image to compare on")
    if not net.mask.static:
        raise not_static(net.mask, "an exported program has fixed shapes.")
    if net.training:
        raise InvalidInput("the network is in training mode.", next="call net.eval() first.")
    file = Path(path)
    check_folder(file, "path")
    with torch.no_grad():
        try:
            program = torch.export.export(net, (image,))
        except Exception as error:
            raise CannotConvert(
                "torch.export cannot follow the network.",
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                next="convert a network without data-dependent control flow; detectors have such.",
            ) from error
        with write_whole(file) as temporary, warnings.catch_warnings():
            # Of weights in channels_last memory torch says that none is complete, and stores them whole.
            warnings.filterwarnings("ignore", "No complete tensor found")
            with temporary.open("wb") as stream:
                torch.export.save(program, stream)
            with temporary.open("rb") as stream:
                output = torch.export.load(stream).module()(other)
            difference = _difference(output, net(other))
            if not difference < TOLERANCE:
                raise CannotConvert(
                    f"the written program differs from the network by {difference:.1e}.",
                    why=f"more than {TOLERANCE:.0e} of the largest output, on another image; nothing was written.",
                    next="report it with the name of the network; torch.compile(net) needs no export.",
                )
    return Exported(str(file), file.stat().st_size, tuple(image.shape), difference)


def _difference(output: Any, expected: Any) -> float:
    """Largest difference of two outputs of the same structure, each tensor relative to its largest value, or NaN."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(value) for value in (output, expected)), strict=True)
    differences = [
        float((one - two).abs().max() / two.abs().max().clamp(min=torch.finfo(two.dtype).tiny))
        for one, two in pairs
        if isinstance(two, Tensor) and two.is_floating_point()
    ]
    return float(torch.tensor([0.0, *differences]).max())  # Python's max would drop a NaN that is not first
