"""How far what a network gives is apart from what it gave otherwise, at each pixel: what needs no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cadsurgery.support.errors import InvalidInput, check_name

Kind = Literal["auto", "classes", "values"]
KINDS = ("auto", "classes", "values")
MAIN = (
    "out"  # the output that counts where it is among others, as torchvision's segmentation networks name it
)
_NEAR_ONE = 1e-2  # of lengths and sums that were rounded, to bfloat16 too


def divergence(high: Any, low: Any, kind: Kind = "auto", temperature: float = 1.0) -> Tensor:
    """How far apart two outputs of the same call are, (B, h, w), per pixel of the output: 0 where they agree.

    Class scores: KL(high || low) of their softmax over the channels, in nats. Other maps: the squared distance over
    the channels relative to the mean square of `high` over its image, so that 1 is what zeros in its place would have
    on average. Of several maps the mean, at the size of the largest. Gradients reach `low` alone.

    Args:
        high: the better output: a tensor (B, C, h, w), (B, h, w) or (B, C), which is one pixel; or lists, tuples,
            dictionaries and dataclasses of them, of which only `out` counts where it is among them.
        low: the same structure; maps of another size are resized, bilinear.
        kind: `classes`, `values` or `auto`, see `kind_of`.
        temperature: that divides class scores.

    Raises:
        InvalidInput: no maps, or others in `low` than in `high`.
        UnknownName: no such kind.
    """
    kind = kind_of(high) if kind == "auto" else kind
    check_name("kind of output", kind, KINDS)
    theirs, ours = maps_of(high), maps_of(low)
    if [one.shape[:2] for one in theirs] != [one.shape[:2] for one in ours]:
        shapes = [", ".join(str(tuple(one.shape)) for one in maps) for maps in (theirs, ours)]
        raise InvalidInput(
            f"outputs of {shapes[0]} are compared with {shapes[1]}.",
            why="number, images and channels of the maps must be the same.",
            next="compare outputs of one network for one batch.",
        )
    size = max((one.shape[2:] for one in theirs), key=lambda size: size[0] * size[1])
    apart = []
    for exact, approximate in zip(theirs, ours, strict=True):
        target, values = exact.detach(), resize(approximate, exact.shape[2:])
        of_map = _relative_square(target, values)
        if kind == "classes":
            of_map = _kullback_leibler(target, values, temperature)
        apart.append(resize(of_map.unsqueeze(1), size))
    return torch.stack(apart).mean(0).squeeze(1)


def kind_of(output: Any) -> Kind:
    """Tell class scores from other values, by what an output is.

    Class scores are one map, alone or as `out`, of several channels which are probabilities, or have both signs and
    no common length: not depth or disparity (one channel), descriptors and normals (vectors of length 1), maps of
    features after ReLU or of colours (no value below 0), or lists of maps. Optical flow and raw features cannot be
    told from scores: name their kind.
    """
    maps = maps_of(output)
    values = maps[0].detach()
    if len(maps) > 1 or values.shape[1] < 2:
        return "values"
    if _is_distribution(values):
        return "classes"
    is_unit = bool(((values.norm(dim=1) - 1).abs() < _NEAR_ONE).all())
    is_rectified = values[0, 0].numel() > 1 and bool((values >= 0).all())
    return "values" if is_unit or is_rectified else "classes"


def maps_of(output: Any) -> list[Tensor]:
    """The floating-point maps among what a network returns, each (B, C, h, w): `out` alone where there is one.

    Raises:
        InvalidInput: there are none.
    """
    main = output.get(MAIN) if isinstance(output, Mapping) else getattr(output, MAIN, None)
    maps = [
        tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors_of(output if main is None else main)
        if tensor.is_floating_point() and 2 <= tensor.dim() <= 4
    ]
    if not maps:
        raise InvalidInput(
            f"the network returns no maps, but {type(output).__name__}.",
            why="what is compared are floating-point tensors (B, C, H, W), (B, H, W) or (B, C).",
            next="wrap the network so that it returns them.",
        )
    shaped = {2: lambda x: x[..., None, None], 3: lambda x: x.unsqueeze(1), 4: lambda x: x}
    return [shaped[one.dim()](one) for one in maps]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of what a network returns, in order: within lists, tuples, dictionaries and dataclasses."""

    def opened(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, (type, Mapping)):
            return [opened(getattr(value, one.name)) for one in fields(value)]
        if isinstance(value, Mapping):
            return [opened(part) for part in value.values()]
        return [opened(part) for part in value] if isinstance(value, (list, tuple)) else value

    return [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, Tensor)]


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear, if they do not have it."""
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _relative_square(high: Tensor, low: Tensor) -> Tensor:
    """(B, h, w)."""
    mean = high.square().sum(1).mean((1, 2), keepdim=True)
    return (high - low).square().sum(1) / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _kullback_leibler(high: Tensor, low: Tensor, temperature: float) -> Tensor:
    """(B, h, w), in nats; probabilities are softmaxes already."""
    if _is_distribution(high):
        high, low = (one.clamp_min(torch.finfo(one.dtype).tiny).log() for one in (high, low))
    target, ours = ((one / temperature).log_softmax(1) for one in (high, low))
    return F.kl_div(ours, target, reduction="none", log_target=True).sum(1)


def _is_distribution(values: Tensor) -> bool:
    """True if the channels (B, C, h, w) are probabilities: none below 0, their sum 1."""
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() < _NEAR_ONE).all())
