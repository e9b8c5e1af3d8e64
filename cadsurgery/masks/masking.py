"""From an image to its lattice: provider, checks, geometry."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cadsurgery.elements.lattice import Bounds, Geometry, Lattice, describe, is_exporting
from cadsurgery.elements.sizes import is_for_any_size
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, check_levels
from cadsurgery.masks.unit import AS_IT_COMES, Unit
from cadsurgery.support.errors import InvalidInput

# What a message says where a mask is not static.
NEEDS_STATIC = (
    'keep a fixed share of the patches, mask="edges | budget:fraction=0.3", or compile with cs.Bucketed(net).'
)


@dataclass(frozen=True, eq=False)  # hashed by compilers while its fields do not exist yet
class Masking:
    """From an image and its fine map to the lattice: what the rewritten graph calls where the region begins.

    Attributes:
        provider: the mask.
        geometry: how lattices are built.
        output_stride: input pixels per sample of the fine map.
        static: give the lattice bounds instead of exact numbers of elements; always while a graph is made.
        any_number: in a graph, of a mask that is not static, let the level map say how many elements there are.
        unit: from the image to what the mask sees of it.
    """

    provider: MaskProvider
    geometry: Geometry
    output_stride: int
    static: bool = False
    any_number: bool = False
    unit: Unit = field(default_factory=lambda: Unit(AS_IT_COMES))

    def __call__(self, image: Tensor, features: Tensor) -> Lattice:
        """The lattice for an image (B, C, H, W) whose fine map is `features`."""
        geometry, bounds, grid = self.geometry, None, self.grid(features)
        in_graph = torch.compiler.is_compiling() and not is_for_any_size(features.shape)
        if self.static or (
            in_graph and (self.provider.static or not self.any_number)
        ):  # otherwise exact counts are known, and faster
            bounds = self._bounds(grid)
        if (
            not image.is_floating_point()
        ):  # of a network that scales pictures itself; differences would wrap around
            image = image.to(torch.get_default_dtype())
        with torch.no_grad():
            shown = self.unit(image) if self.provider.sees_image else image
            levels = self.provider(shown, features, grid)
        return geometry.lattice(check_levels(levels, grid, self.provider.name), bounds)

    def grid(self, features: Tensor) -> FineMapSpec:
        """Return what the mask needs to know of the fine map `features` (B, C, h, w)."""
        size = (features.shape[2], features.shape[3])
        return FineMapSpec.of(self.geometry, features.shape[0], size, self.output_stride)

    def _bounds(self, grid: FineMapSpec) -> Bounds:
        patches = self.provider.kept_patches(grid) if self.provider.static else None
        if patches is None:
            raise not_static(self.provider, "a compiled or exported network has fixed shapes.")
        return Bounds.of_patches(self.geometry, grid.batch, grid.size, patches)


def not_static(mask: MaskProvider, why: str, next: str = "") -> InvalidInput:
    """The refusal of a mask that is not static: what it does, `why` that does not do, and the next step."""
    depends = f"depends on {mask.dependence}, not the image alone"
    what = depends if mask.dependence else "keeps another number of elements of each image"
    return InvalidInput(f"mask {mask.spec()} {what}.", why=why, next=next or NEEDS_STATIC)


def check_image(image: Any, name: str = "the image") -> None:
    """Refuse what is no image batch; `name` is what the message calls it.

    Raises:
        InvalidInput: not a 4-d tensor, empty, or with NaN or infinite values.
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
    if torch.compiler.is_compiling():
        if not is_exporting():
            for length in image.shape:
                operator.index(length)  # one graph per size: lattices are made of Python numbers
        return
    if image.is_meta or image.sum(dtype=_wide(image.dtype)).isfinite():
        return  # one NaN or infinity makes the sum one; so can a large sum, so what follows looks closer
    if not image.isfinite().all():
        bad = int((~image.isfinite()).sum())
        raise InvalidInput(
            f"{name} holds {bad} NaN or infinite values.",
            why="they would spread through every mask and layer.",
            next="check the loading and normalisation of the image.",
        )


def _made_from(value: object) -> str:
    """How an image batch is made of what is none, for messages."""
    if isinstance(value, Tensor):
        return ", here image.unsqueeze(0)" if value.dim() == 3 else ""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        return ", here torch.stack(images)" if value[0].dim() == 3 else ", here torch.cat(images)"
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return " as a float tensor, scaled and normalised: see cadsurgery.images.read_image and normalise"
    return ""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A type in which the sum of an ordinary image does not overflow."""
    return torch.promote_types(dtype, torch.float32)
