"""From an image to its lattice: run the mask provider, check its levels, build the lattice."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.lattice import Bounds, Geometry, Lattice
from cadsurgery.elements.size_symbols import of_size
from cadsurgery.elements.sizes import divide_up, is_for_any_size
from cadsurgery.masks.content import ContentMask
from cadsurgery.masks.context import call_context, provided, sized, sizes_of
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, check_levels
from cadsurgery.masks.unit import AS_IT_COMES, Unit
from cadsurgery.masks.wrappers import Budget
from cadsurgery.support import device_checks
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running

# Pixels by which the normalisation of a large picture is estimated, in so many bands.
_SEEN, _SEEN_BANDS = 1 << 22, 16
_LEVEL_MAPS = 3  # bytes of a sample of the fine map, in level maps
_BAND = 1 << 18  # pixels of a large picture that masks see at once

# Next step in the error message about a mask that is not static.
NEEDS_STATIC = (
    'keep a fixed share of the patches, mask="edges | budget:fraction=0.3", or run net.optimize() uncompiled.'
)


@dataclass(frozen=True, eq=False)  # compilers hash it before its fields exist
class Masking:
    """Computes the lattice of an image; the rewritten graph calls this module where the region begins.

    Attributes:
        provider: the mask.
        geometry: builds the lattices.
        output_stride: input pixels per sample of the fine map.
        static: give lattices bounds instead of exact numbers of elements; always the case in a compiled graph.
        any_number: in a graph, let the number of elements of a mask that is not static depend on its level map.
        unit: converts the image to the unit of masks.
        around: input pixels by which the fine map is longer than the image, which is in its middle, by large
            paddings in front.
    """

    provider: MaskProvider
    geometry: Geometry
    output_stride: int
    static: bool = False
    any_number: bool = False
    unit: Unit = field(default_factory=lambda: Unit(AS_IT_COMES))
    around: int = 0

    def __call__(self, image: Tensor, features: Tensor) -> Lattice:
        """Return the lattice for an image (B, C, H, W) whose fine map is `features`."""
        geometry, bounds, grid = self.geometry, None, self.grid(features)
        in_graph = running.in_graph and not is_for_any_size(features.shape)
        # Exact numbers are faster on the CPU; a GPU would have to be waited for.
        sizes = sizes_of(image) if self.provider.sees_image or self.provider.sees_features else None
        # The numbers of patches of a static mask are those of images that fill the batch.
        is_bounded = sizes is None and (
            self.static or (self.provider.static and features.device.type == "cuda")
        )
        if is_bounded or (in_graph and (self.provider.static or not self.any_number)):
            bounds = self._bounds(grid)
        # torch.export splits a program and joins it again where it switches gradients off.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if sizes is None:
                levels = self._levels(image, features, grid)
            else:
                levels = self._levels_of_each(image, features, grid, sizes)
        levels = of_size(levels, grid.size)
        return geometry.lattice(levels, bounds)

    def _levels(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the levels (B, h, w) that the mask asks for."""
        image = _floating(image)
        shown = self.unit(image) if self.provider.sees_image else image
        part, before = self._of_image(grid._replace(deviation=self.unit.deviation))
        levels = check_levels(self.provider(shown, features, part), part, self.provider.name)
        if before:
            levels = F.pad(levels, [before, self._beyond - before] * 2, value=grid.max_level)
        return levels

    def _levels_of_each(
        self, image: Tensor, features: Tensor, grid: FineMapSpec, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return the levels of a padded batch: those of each image alone, and the lowest in the padding. A mask that
        looks at more than an image, such as labels or earlier images, is computed for the whole batch."""
        is_alone = self.provider.judges_each_image
        levels = None if is_alone else self._levels(image, features, grid)
        every = []
        for number, (height, width) in enumerate(sizes):
            own = self._samples_of((height, width), grid)
            if levels is None:
                one = slice(number, number + 1)
                seen, entering = image[one, :, :height, :width], features[one, :, : own[0], : own[1]]
                alone = self._levels(seen, entering, grid._replace(batch=1, size=own))
            else:
                alone = levels[number : number + 1, : own[0], : own[1]]
            every.append(_beyond(alone, grid))
        return torch.cat(every)

    def of_rows(self, read: Callable[[int, int], Tensor], height: int, features: Tensor) -> Lattice:
        """Return the lattice of a picture that is read in rows: `read` gives rows [first, end) of all `height`,
        (B, C, end - first, W). Masks that judge samples by their surroundings never have more than a band of it."""
        sizes = call_context().sizes
        if sizes is None or len(sizes) > 1 or not self.provider.judges_each_image:
            return self.geometry.lattice(self._levels_of_rows(read, height, features))
        (own_height, width), whole = sizes[0], self.grid(features)
        own = self._samples_of(sizes[0], whole)
        with sized(None):
            of_picture = (own_height, features[:, :, : own[0], : own[1]])
            levels = self._levels_of_rows(lambda first, end: read(first, end)[..., :width], *of_picture)
        return self.geometry.lattice(_beyond(levels, whole))

    def _levels_of_rows(self, read: Callable[[int, int], Tensor], height: int, features: Tensor) -> Tensor:
        """Return the levels (B, h, w) of a picture that is read in rows, see `of_rows`."""
        grid = self.grid(features)._replace(deviation=self.unit.deviation)
        reach, unit = self._reach(grid), grid.patch * self.output_stride
        if reach is not None and self.unit.normalisation is None and self.provider.sees_image:
            self.unit(_floating(_sample(read, height, grid.size[1] * self.output_stride)))
        is_known = self.unit.normalisation is not None or not self.provider.sees_image
        if reach is None or not is_known:
            return self(read(0, height), features).pyramid.levels
        budget = self.provider if isinstance(self.provider, Budget) else None  # which ranks all patches
        tall = divide_up(max(1, _BAND // max(1, grid.size[1] * self.output_stride)), unit) * unit

        def bands(around: int) -> Iterator[tuple[int, int, Tensor]]:
            for first in range(0, grid.size[0] * self.output_stride, tall):
                end = first + tall if first + tall < grid.size[0] * self.output_stride else height
                yield first, end, read(max(first - around, 0), min(end + around, height))

        with torch.no_grad():
            limits: dict[nn.Module, Tensor] = {}
            for mask in self.provider.modules():
                if isinstance(mask, ContentMask):
                    shown = ((first, end, self.unit(_floating(rows))) for first, end, rows in bands(2))
                    limits[mask] = mask.limit_of_parts(shown, height, grid)
            judged = list[Tensor]()  # levels, or scores of patches
            around = divide_up(reach, unit) * unit
            with provided(limits=limits):
                for first, end, rows in bands(around):
                    top, start = max(first - around, 0) // self.output_stride, first // self.output_stride
                    stop = grid.size[0] if end + around >= height else (end + around) // self.output_stride
                    last = grid.size[0] if end >= height else end // self.output_stride
                    part = grid._replace(size=(stop - top, grid.size[1]))
                    if budget is not None:
                        own = self.unit(_floating(rows)) if budget.sees_image else rows
                        scores = budget.patch_scores(own, features[:, :, top:stop], part)
                        above, below = (start - top) // grid.patch, divide_up(last - top, grid.patch)
                        judged.append(scores[:, above:below].clone())
                    else:
                        levels = self._levels(rows, features[:, :, top:stop], part)
                        judged.append(levels[:, start - top : last - top].to(torch.int8, copy=True))
            whole = torch.cat(judged, 1)
            if budget is None:
                return whole
            return check_levels(budget.levels_of_patches(whole, grid), grid, budget.name)

    def _reach(self, grid: FineMapSpec) -> int | None:
        """Return the pixels around a band of a picture that the mask of the band depends on; None for a mask that sees
        the whole picture."""
        if self._beyond or call_context().sizes is not None:
            return None
        mask = self.provider
        return mask.reach_of_patches(grid) if isinstance(mask, Budget) else mask.reach(grid)

    def memory(self, pixels: int, features: Tensor) -> tuple[int, bool]:
        """Return the bytes that the mask of a picture of so many pixels takes, at most, beside the picture, and True if
        it sees all of the picture at once; else these are level maps."""
        grid, sizes = self.grid(features), call_context().sizes
        samples = grid.size[0] * grid.size[1]
        is_alone = sizes is None or (len(sizes) == 1 and self.provider.judges_each_image)
        with sized(None if is_alone else sizes):
            reach = self._reach(grid._replace(deviation=self.unit.deviation))
        if reach is not None:
            return _LEVEL_MAPS * samples, False
        return max(_LEVEL_MAPS * samples, self.provider.memory(pixels, samples)), True

    def _samples_of(self, size: tuple[int, int], grid: FineMapSpec) -> tuple[int, int]:
        """Return the size of the part of the fine map that an image of this size in pixels has in a padded batch."""
        own = (
            min(divide_up(length, self.output_stride) + self._beyond, most)
            for length, most in zip(size, grid.size, strict=True)
        )
        return next(own), next(own)

    def grid(self, features: Tensor) -> FineMapSpec:
        """Describe the fine map `features` (B, C, h, w) for the mask."""
        size = (features.shape[2], features.shape[3])
        return FineMapSpec.of(self.geometry, features.shape[0], size, self.output_stride)

    def contrasts(self, image: Tensor) -> list[tuple[MaskProvider, float, float]]:
        """Return the masks with a threshold, each with the largest value in an image and the least threshold for it."""
        image = _floating(image)
        grid = FineMapSpec.of(self.geometry, image.shape[0], (1, 1), self.output_stride)
        with torch.no_grad():
            shown, grid = self.unit(image), grid._replace(deviation=self.unit.deviation)
            masks = [mask for mask in self.provider.modules() if isinstance(mask, MaskProvider)]
            found = [(mask, values) for mask in masks if (values := mask.contrast(shown, grid)) is not None]
        return [(mask, float(largest.max()), float(least.min())) for mask, (largest, least) in found]

    @property
    def _beyond(self) -> int:
        """Samples of the fine map beyond the image, in front and behind together."""
        return self.around // self.output_stride

    def _of_image(self, grid: FineMapSpec) -> tuple[FineMapSpec, int]:
        """Return the part of the fine map that the image covers, whole cells, and the samples in front of it: the
        padding around is kept low. A mask that reads features, or is no matter of the image, is for the whole map."""
        before = (self._beyond // 2 + grid.patch // 2) // grid.patch * grid.patch
        if not before or not self.provider.sees_image or self.provider.sees_features:
            return grid, 0
        height, width = grid.size
        return grid._replace(size=(height - self._beyond, width - self._beyond)), before

    def _bounds(self, grid: FineMapSpec) -> Bounds:
        patches = self.provider.kept_patches(self._of_image(grid)[0]) if self.provider.static else None
        if patches is None:
            raise not_static(self.provider, "a compiled or exported network has fixed shapes.")
        return Bounds.of_patches(self.geometry, grid.batch, grid.size, patches)


def _sample(read: Callable[[int, int], Tensor], height: int, width: int) -> Tensor:
    """Return a picture by which the normalisation is estimated: that which is read in rows, or bands of a large one."""
    rows = max(_SEEN // max(1, width * _SEEN_BANDS), 2)
    if height <= rows * _SEEN_BANDS:
        return read(0, height)
    firsts = (number * (height - rows) // (_SEEN_BANDS - 1) for number in range(_SEEN_BANDS))
    return torch.cat([read(first, first + rows) for first in firsts], 2)


def _beyond(levels: Tensor, grid: FineMapSpec) -> Tensor:
    """Return the levels of a padded batch by those of its image: the lowest in the padding."""
    height, width = levels.shape[1:]
    return F.pad(levels, (0, grid.size[1] - width, 0, grid.size[0] - height), value=grid.max_level)


def _floating(image: Tensor) -> Tensor:
    """Return an image whose differences do not wrap around, as those of uint8 do."""
    return image if image.is_floating_point() else image.to(torch.get_default_dtype())


def not_static(mask: MaskProvider, why: str, next: str = "") -> InvalidInput:
    """Return the error for a mask that is not static: its dependence, `why` this is refused, the next step."""
    depends = f"depends on {mask.dependence}, not only the image"
    dynamic = "keeps a number of elements that varies from image to image"
    problem = depends if mask.dependence else dynamic
    return InvalidInput(f"mask {mask.spec()} {problem}.", why=why, next=next or NEEDS_STATIC)


def check_image(image: Any, name: str = "the image") -> None:
    """Check that a value is an image batch; `name` is its name in the error message.

    Raises:
        InvalidInput: it is not a 4-d tensor, is empty, or has NaN or infinite values.
    """
    if not isinstance(image, Tensor) or image.dim() != 4:
        raise InvalidInput(
            f"{name} is {describe(image)}.",
            next=f"give an image batch (batch, channels, height, width){_made_from(image)}.",
        )
    if image.layout is not torch.strided:
        raise InvalidInput(f"{name} is sparse.", next="give an ordinary tensor: image.to_dense().")
    if image.is_complex():
        raise InvalidInput(f"{name} is {describe(image)}.", next="give real numbers, e.g. image.abs().")
    if 0 in image.shape:
        raise InvalidInput(
            f"{name} has size zero: {tuple(image.shape)}.",
            next="give an image batch (batch, channels, height, width) with no axis empty.",
        )
    if running.in_graph:
        if not running.is_exported:
            for length in image.shape:
                operator.index(length)  # one graph per size: lattices are built from Python integers
        return
    wide = torch.promote_types(image.dtype, torch.float32)  # in which the sum of an ordinary image is finite
    if not image.is_meta:  # any NaN or infinity makes the sum non-finite
        device_checks.check(~image.sum(dtype=wide).isfinite(), lambda: _not_finite(image, name))


def _not_finite(image: Tensor, name: str) -> InvalidInput | None:
    """Return the error for an image with NaN or infinities; None if only the sum of its values was too large."""
    bad = int((~image.isfinite()).sum())
    if not bad:
        return None
    return InvalidInput(
        f"{name} holds {bad} NaN or infinite values.",
        why="they would spread through every mask and layer.",
        next="check the loading and normalisation of the image.",
    )


def _made_from(value: object) -> str:
    """Suggest how to make an image batch from a value, for error messages."""
    if isinstance(value, Tensor):
        return ", here image.unsqueeze(0)" if value.dim() == 3 else ""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        return ", here torch.stack(images)" if value[0].dim() == 3 else ", here torch.cat(images)"
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return " as a float tensor, scaled and normalised: see cadsurgery.images.read_image and normalise"
    return ""
