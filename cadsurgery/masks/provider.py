"""The protocol of mask providers, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.lattice import Geometry, as_levels
from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.mask_options import format_options, options_of
from cadsurgery.support.describe import describe
from cadsurgery.support.device_checks import check
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.plain import docstring_of
from cadsurgery.support.provenance import check_unclaimed
from cadsurgery.support.running import running


class FineMapSpec(NamedTuple):
    """Size, stride and levels of the fine map that a level map is for.

    Attributes:
        batch: number of images.
        size: (height, width) in samples.
        output_stride: input pixels per sample.
        max_level: the lowest level allowed.
        patch: R_K, side in samples of a cell that every adaptive stage downsamples. Aligned blocks of this side may
            have any level.
        side: R_max_level, side in samples of a cell of the lowest level allowed. It is less than `patch` if the low
            output stride is reached before the last stage.
        deviation: standard deviation of pictures in the unit of masks, where the network's normalisation states one
            that is below that of photos, 1.
    """

    batch: int
    size: tuple[int, int]
    output_stride: int
    max_level: int
    patch: int
    side: int
    deviation: float = 1.0

    @classmethod
    def of(cls, geometry: Geometry, batch: int, size: tuple[int, int], output_stride: int) -> FineMapSpec:
        """Describe the fine map of a geometry's lattices."""
        low, sides = geometry.max_level, geometry.sides
        return cls(batch, size, output_stride, low, sides[-1], sides[low])

    @property
    def patches(self) -> int:
        """Number of patches per image, including patches that extend beyond the map."""
        return divide_up(self.size[0], self.patch) * divide_up(self.size[1], self.patch)


Grid = FineMapSpec  # former name, which providers of users may import
M = TypeVar("M")  # a class of masks, or a protocol


class MaskProvider(nn.Module):
    """Base of all masks. `forward(image, features, grid)` returns levels or a bool map (True = keep high).

    `image` is the input picture (B, C, H, W) in the unit of `masks.unit`, whatever normalisation the network takes:
    RGB, normalised by ImageNet's mean and standard deviation. `features` is the feature map that enters the region.
    The result is (B, h, w) with the grid's size.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    of_recipes: ClassVar[bool] = False  # stays for published recipes, and is not put forward
    takes: ClassVar[Literal["none", "one", "many"]] = "none"  # number of other masks in the text form
    image_only: ClassVar[bool] = False  # does not use the features, which then need not be computed
    ignores_image: ClassVar[bool] = False  # does not use the picture, whose unit then need not be known
    # What a mask that sees all of a picture at once takes beside it, at most.
    bytes_per_pixel: ClassVar[int] = 64
    needs: ClassVar[str] = ""  # further inputs that its maps depend on, e.g. "earlier images"
    has_own_function: bool = False  # made with a function that its options cannot name

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options of this package's masks are read and checked as by the constructor."""
        is_option = name in vars(self) and type(self).__module__.startswith("cadsurgery.")
        if is_option and name in options_of(type(self)):
            value = getattr(type(self)(*self.parts, **self.options() | {name: value}), name)
        super().__setattr__(name, value)

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Compute the level map (B, h, w)."""
        raise NotImplementedError

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Compute how much each sample is worth keeping high, (B, h, w) floating-point, for masks that choose by
        rank.

        Only the order counts. By default, the number of levels above the lowest; masks with finer scores override it.
        """
        levels = check_levels(self(image, features, grid), grid, self.name)
        return (grid.max_level - levels).to(torch.float32)

    def contrast(self, image: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor] | None:
        """Return for each image (B,) the largest value that is compared with a threshold, and the threshold that keeps
        some of it; None for masks without. It explains a mask that keeps nothing."""
        return None

    def reach(self, grid: FineMapSpec) -> int | None:
        """Return the distance in input pixels from which on the picture has no influence on a sample's level, so that
        large pictures are judged in bands of rows; None if all of the picture counts."""
        return None

    def memory(self, pixels: int, samples: int) -> int:
        """Return the bytes that the mask takes, at most, where it sees all of a picture of so many pixels at once."""
        own = self.bytes_per_pixel * (samples if self.ignores_image else pixels)
        return max([own, *(part.memory(pixels, samples) for part in self.parts)])

    def kept_patches(self, grid: FineMapSpec) -> tuple[int, ...] | None:
        """Return how many patches (`FineMapSpec.patch`) of a batch are kept at level 0, at level 1 or finer, and so
        on.

        All other patches must be at the lowest level. None if the numbers depend on more than the grid; with numbers,
        shapes are static.
        """
        return None

    @property
    def static(self) -> bool:
        """True if `kept_patches` returns numbers and a compiled graph can contain the mask."""
        return type(self).kept_patches is not MaskProvider.kept_patches and not self.dependence

    @property
    def parts(self) -> tuple[MaskProvider, ...]:
        """The masks that this mask is made from."""
        return ()

    def find(self, kind: type[M]) -> M | None:
        """Return the first mask of a class or protocol among this mask and its parts; None if there is none."""
        return next((mask for mask in self.modules() if isinstance(mask, kind)), None)

    @property
    def sees_features(self) -> bool:
        """True if the mask, or one of its parts, uses the features that enter the region."""
        return not self.image_only or any(part.sees_features for part in self.parts)

    def first_passes(self, lowest: int) -> frozenset[int]:
        """Return the levels in 0..`lowest` for which the mask, or one of its parts, needs a first pass.

        In a first pass the network runs with everything kept at that level.
        """
        return frozenset().union(*(part.first_passes(lowest) for part in self.parts))

    @property
    def preview_scale(self) -> float | None:
        """Side of the smaller picture on which the mask, or one of its parts, looks at the network's output, as a share
        of the picture's; None if none does. If several do, the largest."""
        return max((part.preview_scale for part in self.parts if part.preview_scale), default=None)

    @property
    def sees_image(self) -> bool:
        """True if the mask, or one of its parts, uses the picture."""
        return not self.ignores_image or any(part.sees_image for part in self.parts)

    def uniform_level(self, max_level: int) -> int | None:
        """Return the level that every image gets everywhere; None if there may be several."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """True if the mask needs a first pass of the network, or a preview."""
        return bool(self.first_passes(1)) or self.preview_scale is not None

    @property
    def dependence(self) -> str:
        """Name the input besides image and features that the mask or one of its parts needs; empty if none."""
        return self.needs or next((part.dependence for part in self.parts if part.dependence), "")

    @property
    def judges_each_image(self) -> bool:
        """True if the levels of an image depend only on that image, so that each may be given by itself."""
        return not self.needs and all(part.judges_each_image for part in self.parts)

    @property
    def storable(self) -> bool:
        """True if `spec()` defines the mask completely, apart from learned tensors."""
        is_known = PROVIDERS.get(self.name) is type(self) and not self.has_own_function
        return is_known and all(part.storable for part in self.parts)

    @property
    def is_shared(self) -> bool:
        """True if optimised copies of a network use this object, so that attributes set on it hold for them, too.

        Objects with tensors are copied, because a copy is moved, converted and frozen by itself; so are objects that
        read `training`, because a copy is for inference.
        """
        has_tensors = any(True for _ in (*self.parameters(), *self.buffers()))
        return not has_tensors and not any(map(_reads_training, {type(module) for module in self.modules()}))

    def options(self) -> dict[str, Any]:
        """Return the options of this provider by name: the arguments of its constructor."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def spec(self) -> str:
        """Return the text form, which `resolve_mask` reads back."""
        options = format_options(self.options())
        return f"{self.name}:{options}" if options else self.name

    def extra_repr(self) -> str:
        """Return the options, for `print`."""
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


def _reads_training(kind: type[nn.Module]) -> bool:
    """True if a method of a module class, other than those of torch's base class, uses an attribute `training`."""
    own = (method for base in kind.__mro__ if base is not nn.Module for method in vars(base).values())
    return any(isinstance(method, FunctionType) and "training" in method.__code__.co_names for method in own)


@dataclass(frozen=True)
class MaskInfo:
    """An entry of `list_masks()`.

    Attributes:
        name: name in the text form.
        summary: what the mask keeps high.
        options: options with their defaults.
        source: publication or origin.
        form: how the mask is written; MASK stands for other masks: `edges`, `MASK | budget`, `MASK + MASK`.
    """

    name: str
    summary: str
    options: dict[str, Any]
    source: str
    form: str


PROVIDERS: dict[str, type[MaskProvider]] = {}
P = TypeVar("P", bound=type[MaskProvider])


def mask_provider(name: str, source: str = "", *, of_recipes: bool = False) -> Callable[[P], P]:
    """Register a provider class under a name; the defaults of its constructor are its options.

    With `of_recipes` it stays for published recipes, and lists do not put it forward.

    A class that is defined again, e.g. by running a notebook cell twice, replaces the earlier definition.

    Raises:
        ValueError: another class has this name.
        InvalidInput: it is no class of masks; functions work without a name.
    """

    def register(provider: P) -> P:
        if not (isinstance(provider, type) and issubclass(provider, MaskProvider)):
            raise InvalidInput(
                f"{describe(provider)} cannot be registered as the mask {name!r}.",
                why="names stand for subclasses of cadsurgery.MaskProvider.",
                next="write such a class, or pass the function itself as the mask: cs.adaptify(model, mask=function).",
            )
        check_unclaimed("mask", name, provider, PROVIDERS)
        provider.name, provider.source, provider.of_recipes = name, source, of_recipes
        PROVIDERS[name] = provider
        return provider

    return register


def list_masks(*, of_recipes: bool = False) -> list[MaskInfo]:
    """List the mask providers with their options, defaults and sources; or those that stay for published recipes."""
    listed = []
    for name, cls in sorted(PROVIDERS.items()):
        summary = " ".join(docstring_of(cls).partition("\n\n")[0].split())  # the first paragraph as one line
        if cls.of_recipes is of_recipes:
            form = _FORMS[cls.takes].format(name=name)
            listed.append(MaskInfo(name, summary, options_of(cls), cls.source, form))
    return listed


_FORMS = {"none": "{name}", "one": "MASK | {name}", "many": "MASK + MASK"}


@runtime_checkable
class TrainableMask(Protocol):
    """What a mask with parameters of its own has so that the objective `blend` trains it.

    Scores (B, levels, h, w) are those of each cell of the lowest level, in any unit in which the best one wins.

    Attributes:
        fraction: share to keep high that training aims at.
    """

    fraction: float

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that are trained."""
        ...

    def logits(self, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the scores, by which the mask decides."""
        ...

    def balanced_logits(self, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the scores such that the map of this batch keeps `fraction`."""
        ...

    def kept(self, logits: Tensor, grid: FineMapSpec, generator: Any = None) -> Tensor:
        """Return the share kept high, a scalar with a gradient; with generators that of a random sample."""
        ...

    def sample(self, logits: Tensor, grid: FineMapSpec, generator: Any = None) -> Tensor:
        """Draw a one-hot sample (B, levels, h, w) on the fine map, with a gradient."""
        ...

    def balance(self, logits: Sequence[tuple[Tensor, FineMapSpec]]) -> float:
        """Shift the scores for good, so that their maps keep `fraction` on average; return what they keep."""
        ...


def check_levels(returned: object, grid: FineMapSpec, provider: str) -> Tensor:
    """Check a provider's result and return it as integer levels (B, h, w); True in a bool map means level 0.

    A bool map in pixels, of the image's size, keeps every sample that one of its pixels touches.

    Raises:
        InvalidInput: wrong type or size, or wrong values (not checked while a graph is compiled).
    """
    where = f"mask {provider}" if provider else "mask"
    size = f"({grid.batch}, {grid.size[0]}, {grid.size[1]})"
    expected = f"a bool or integer tensor of shape {size}: one value per {grid.output_stride} image pixels"
    if grid.output_stride > 1:
        expected += ", or a bool map of the image's size"
    if not isinstance(returned, Tensor):
        raise InvalidInput(f"a mask cannot be {describe(returned)}.", where=where, next=f"give {expected}.")
    if returned.is_floating_point() or returned.is_complex():
        raise InvalidInput(
            f"a mask cannot be {describe(returned)}.",
            where=where,
            why="floating-point values are neither levels nor a yes or no.",
            next=f"threshold it, e.g. scores > 0.5, to get {expected}; or let a threshold or budget follow the mask: "
            '"MASK | threshold:at=0.5".',
        )
    levels = returned.unsqueeze(0) if returned.dim() == 2 else returned
    if levels.dim() == 3 and levels.shape[0] == 1:
        levels = levels.expand(grid.batch, -1, -1)
    if levels.dtype == torch.bool and levels.dim() == 3 and _is_in_pixels(levels, grid):
        levels = F.max_pool2d(levels.to(torch.float32), grid.output_stride, ceil_mode=True) > 0
    if tuple(levels.shape) != (grid.batch, *grid.size):
        raise InvalidInput(
            f"the mask has shape {tuple(returned.shape)}.",
            where=where,
            why=f"the fine map of this image has {grid.size[0]} x {grid.size[1]} samples.",
            next=f"give {expected}.",
        )
    return as_levels(levels, grid.max_level, where)


def _is_in_pixels(kept: Tensor, grid: FineMapSpec) -> bool:
    """True if a map (B, H, W) is of the image's size, and the fine map is smaller: samples keep what they touch."""
    in_samples = tuple(divide_up(length, grid.output_stride) for length in kept.shape[1:])
    return grid.output_stride > 1 and tuple(kept.shape[1:]) != tuple(grid.size) == in_samples


def check_scores(scores: object, grid: FineMapSpec, provider: str, user: str) -> Tensor:
    """Check a provider's scores and return them, (B, h, w); `user` is the mask that ranks by them.

    Raises:
        InvalidInput: wrong type or size, or NaN (not checked while a graph is compiled).
    """
    where = f"mask {user}, scores of mask {provider}"
    shape = (grid.batch, *grid.size)
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or tuple(scores.shape) != shape:
        raise InvalidInput(
            f"the scores are {describe(scores)}.",
            where=where,
            next=f"give a floating-point tensor of shape {shape}.",
        )
    if not running.in_graph:
        check(scores.isnan().any(), lambda: no_rank("the scores hold NaN.", where, "NaN has no rank."))
    return scores


def no_rank(what: str, where: str, why: str) -> InvalidInput:
    """Return the error for scores that cannot be ranked."""
    return InvalidInput(
        what, where=where, why=why, next="check the image and the mask that gives the scores."
    )
