"""Compare two outputs of a network for the same input, pixel by pixel, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.torch_internals import tree_leaves

Kind = Literal["auto", "classes", "values"]
KINDS = ("auto", "classes", "values")
MAIN = "out"  # the main output if a network returns several, as torchvision's segmentation networks name it
_NEAR_ONE = 1e-2  # tolerance for lengths and sums, wide enough for values rounded to bfloat16


def divergence(high: Any, low: Any, kind: Kind = "auto", temperature: float = 1.0) -> Tensor:
    """Return the difference of two outputs of the same call per output pixel, (B, h, w); 0 where they agree.

    For class scores the difference is KL(high || low) of the softmax over the channels, in nats. For other maps it is
    the squared distance over the channels divided by the image's mean square of `high`; an output of zeros has 1 on
    average. Several maps are averaged at the size of the largest. Gradients flow to `low` only.

    Args:
        high: the reference output: a tensor (B, C, h, w), (B, h, w) or (B, C) (a single pixel), or a list, tuple,
            dictionary or dataclass of tensors. If there is an entry `out`, only that entry is compared.
        low: an output of the same structure; maps of another size are resized bilinearly.
        kind: `classes`, `values` or `auto`, see `kind_of`.
        temperature: divisor of class scores.

    Raises:
        InvalidInput: there are no maps, or the maps of `low` do not match those of `high`.
        UnknownName: no such kind.
    """
    kind = kind_of(high) if kind == "auto" else kind
    check_name("kind of output", kind, KINDS)
    high_maps, low_maps = maps_of(high), maps_of(low)
    if [scores.shape[:2] for scores in high_maps] != [scores.shape[:2] for scores in low_maps]:
        shapes = [", ".join(str(tuple(scores.shape)) for scores in maps) for maps in (high_maps, low_maps)]
        raise InvalidInput(
            f"outputs of {shapes[0]} are compared with {shapes[1]}.",
            why="the number of maps, the batch sizes and the channels must be the same.",
            next="compare outputs of one network for one batch.",
        )
    size = max((scores.shape[2:] for scores in high_maps), key=lambda size: size[0] * size[1])
    differences = []
    for exact, approximate in zip(high_maps, low_maps, strict=True):
        target, values = exact.detach(), resize(approximate, exact.shape[2:])
        difference = _relative_square(target, values)
        if kind == "classes":
            difference = _kullback_leibler(target, values, temperature)
        differences.append(resize(difference.unsqueeze(1), size))
    return torch.stack(differences).mean(0).squeeze(1)


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value; it may be NaN.

    Of probabilities, values in 0..1, differences up to the rounding of numbers near one do not count: engines round a
    sigmoid by as much, whatever its value, and a detector that finds nothing returns values of 1e-6.
    """
    limits = torch.finfo(expected.dtype)
    differences = (output - expected).abs()
    if bool((expected >= 0).all() and (expected <= 1).all()):
        differences = differences.masked_fill(differences <= 2 * limits.eps, 0)
    return float(differences.max() / expected.abs().max().clamp(min=limits.tiny))


def kind_of(output: Any) -> Kind:
    """Guess from an output's values if it holds class scores or other values.

    Class scores are a single map (alone or as `out`) with several channels that are probabilities, or that have both
    signs and no common length. The rest are values: depth or disparity (one channel), descriptors and normals (vectors
    of length 1), features after ReLU and colours (no value below 0), and lists of maps. Optical flow and raw features
    look like class scores: name their kind.
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
    """Return the floating-point maps of a network's output, each (B, C, h, w); only `out` if it has that entry.

    Raises:
        InvalidInput: the output has no such map.
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
            why="only floating-point tensors (B, C, H, W), (B, H, W) or (B, C) can be compared.",
            next="wrap the network so that it returns them.",
        )
    shaped = {2: lambda x: x[..., None, None], 3: lambda x: x.unsqueeze(1), 4: lambda x: x}
    return [shaped[value.dim()](value) for value in maps]


def class_scores(
    output: Any,
    *,
    fewest: int = 1,
    batch: int = 0,
    where: str = "",
    next: str = "pass a segmentation network, or wrap the network so that it returns them.",
) -> Tensor:
    """Return the map of class scores (B, C, h, w) of a network's output.

    It is the output itself, entry `out` of a dictionary, or the last of several predictions.

    Args:
        output: output of the network.
        fewest: smallest number of classes.
        batch: number of images; 0 for any.
        where, next: parts of the error.

    Raises:
        InvalidInput: there is no such map.
    """
    scores: Any = output.get(MAIN) if isinstance(output, Mapping) else output
    if isinstance(scores, tuple) and scores:
        scores = scores[-1]
    if (
        not isinstance(scores, Tensor)
        or scores.dim() != 4
        or scores.shape[1] < fewest
        or batch not in (0, len(scores))
    ):
        several = isinstance(output, Mapping) and MAIN not in output
        described = f"a dictionary of {', '.join(map(str, output))}" if several else describe(scores)
        classes = f" of {fewest} classes or more" if fewest > 1 else ""
        raise InvalidInput(
            f"the network's output is not a map of class scores: {described}.",
            where=where,
            why=f"scores (B, C, H, W){classes} are needed, by themselves or as 'out' of a dictionary.",
            next=next,
        )
    return scores


def is_map(value: object, batch: int) -> TypeGuard[Tensor]:
    """True for a floating-point map (B, C, h, w) of a batch of this size."""
    return (
        isinstance(value, Tensor) and value.dim() == 4 and len(value) == batch and value.is_floating_point()
    )


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a network's output in order, also those in lists, tuples, dictionaries and dataclasses."""

    def as_lists(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, (type, Mapping)):
            return [as_lists(getattr(value, entry.name)) for entry in fields(value)]
        if isinstance(value, Mapping):
            return [as_lists(part) for part in value.values()]
        return [as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value

    return [leaf for leaf in tree_leaves(as_lists(output)) if isinstance(leaf, Tensor)]


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly; maps of that size are returned as they are."""
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _relative_square(high: Tensor, low: Tensor) -> Tensor:
    """Compute the squared distance over the channels relative to the mean square of `high`, (B, h, w)."""
    mean = high.square().sum(1).mean((1, 2), keepdim=True)
    return (high - low).square().sum(1) / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _kullback_leibler(high: Tensor, low: Tensor, temperature: float) -> Tensor:
    """Compute KL(high || low) in nats, (B, h, w); the inputs are class scores or probabilities."""
    if _is_distribution(high):
        high, low = (scores.clamp_min(torch.finfo(scores.dtype).tiny).log() for scores in (high, low))
    target, ours = ((scores / temperature).log_softmax(1) for scores in (high, low))
    return F.kl_div(ours, target, reduction="none", log_target=True).sum(1)


def _is_distribution(values: Tensor) -> bool:
    """True if the channels of (B, C, h, w) are probabilities: none below 0, with a sum of 1."""
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() < _NEAR_ONE).all())
