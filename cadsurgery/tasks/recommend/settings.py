"""The settings worth trying: the network as given, pictures of other sizes, other output strides, conversions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from cadsurgery.network.adaptify import plan
from cadsurgery.support.errors import CannotConvert
from cadsurgery.surgery.plan import Plan

Pair = tuple[int, int]
# Shares of the patches that `detail` keeps high; "none" is everything low, whose halo the fill still reads.
_MASKS = ("none", *(f"detail | budget:fraction={share:g}" for share in (0.05, 0.1, 0.2, 0.35)))
_MASKS_AT_FOUR = ("none", "detail | budget:fraction=0.1", "detail | budget:fraction=0.25")
_SMALLER, _LARGER = (0.5, 0.625, 0.75, 0.875), (1.25, 1.5)
_LEAST_SIDE = 32  # pixels of a scaled picture


@dataclass(frozen=True)
class Setting:
    """A way to run a network.

    Attributes:
        kind: `given`, as the user passed it; `size`, that on pictures scaled by `scale`; `dense`, at another output
            stride everywhere, which may be on scaled pictures too; `adaptive`, converted.
        stride: output stride of a dense network.
        pair: output strides (high, low) of the conversion; that a dense network is made by.
        mask: as typed.
        fill: of the conversion.
        scale: of the pictures.
    """

    kind: Literal["given", "size", "dense", "adaptive"]
    stride: int = 0
    pair: Pair | None = None
    mask: str = ""
    fill: str = "linear"
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The setting in words, with masks as typed."""
        pictures = f", pictures {self.scale:g} times as large" if self.scale != 1 else ""
        if self.kind in ("given", "size"):
            return f"as given{f', output stride {self.stride}' if self.stride else ''}{pictures}"
        if self.kind == "dense":
            return f"dense, output stride {self.stride}{pictures}"
        assert self.pair is not None
        return f"{self.mask}, {self.pair[0]} to {self.pair[1]}, {self.fill}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"name": self.name, **asdict(self)}

    def command(self, network: str, weights: str = "auto") -> str:
        """The command that makes it; of settings without a conversion none is needed."""
        if self.kind in ("given", "size"):
            return ""
        weighted = f" --weights {weights}" if weights != "auto" else ""
        high, low = self.pair or (0, 0)
        mask = self.mask or ("all" if self.stride == high else "none")
        return (
            f'cadsurgery convert {network}{weighted} --output-stride {high},{low} --mask "{mask}" '
            f"--fill {self.fill}"
        )

    def lines(self, precision: str = "float32") -> list[str]:
        """Python that uses it, where `model` is the network and `x` a batch of pictures."""
        convert = ["import cadsurgery as cs", *self._conversion(precision)]
        small = [
            f"small = F.interpolate(x, scale_factor={self.scale:g}, mode='bilinear', antialias=True)",
            "y = F.interpolate({}, size=x.shape[2:], mode='bilinear')  # of a dictionary its entry \"out\"",
        ]
        if self.kind == "given":
            return ["y = model(x)"]
        head = ["import torch.nn.functional as F"] if self.scale != 1 else []
        if self.kind == "size":
            return [*head, small[0], small[1].format("model(small)")]
        if self.scale != 1:
            return [*head, *convert, small[0], small[1].format("fast(small)")]
        return [*convert, "y = fast(x)"]

    def _conversion(self, precision: str) -> Iterator[str]:
        if self.pair is None:
            return
        mask = self.mask or ("all" if self.stride == self.pair[0] else "none")
        yield f'net = cs.adaptify(model, mask="{mask}", output_stride={self.pair}, fill="{self.fill}")'
        copies = {"int8": 'precision="int8", calibration=pictures'}
        cast = ".bfloat16()" if precision == "bfloat16" else ""
        yield f"fast = net.eval(){cast}.optimize({copies.get(precision, '')})"


@dataclass(frozen=True)
class Candidates:
    """The settings worth trying.

    Attributes:
        settings: the network as given first.
        own_stride: output stride of the network as given; 0 if unknown.
        own_pair: pair of output strides by which a conversion gives the network as it is at one end; None without one.
        refusal: why the network cannot be converted; None if it can.
    """

    settings: tuple[Setting, ...]
    own_stride: int = 0
    own_pair: Pair | None = None
    refusal: CannotConvert | None = None


def find_candidates(
    model: nn.Module,
    image: Tensor,
    options: Mapping[str, Any],
    *,
    has_labels: bool,
    few: bool = False,
) -> Candidates:
    """Find the settings worth trying for a network.

    Without labels nothing can be said for maps that are finer than the network's own, or for larger pictures: only
    settings that may be faster are tried then.

    Args:
        model: the network as given.
        image: (1, 3, H, W), as it expects it.
        options: `region` and `output_stride` of `adaptify`, where the user gave them.
        has_labels: True if quality is measured against labels.
        few: True to try few settings, because each takes long to prepare: it is exported, or put into 8 bits.
    """
    asked = options.get("output_stride")
    region = options.get("region") or "auto"
    try:
        found = plan(model, asked, region, image)
    except CannotConvert as error:
        sizes = _sizes(image, _SMALLER + (_LARGER if has_labels else ()), 32)
        return Candidates((Setting("given"), *(Setting("size", scale=s) for s in sizes)), refusal=error)
    own = found.strides[found.identity_level] if found.identity_level is not None else 0
    pairs = [asked] if asked else _pairs(found, own, has_labels)
    if few:
        pairs = pairs[:1]
    own_pair = next((pair for pair in pairs if own in pair), None)
    given = Setting("given", own if own_pair else 0, own_pair)
    settings = [given]
    multiple = max((own, *(low for _, low in pairs)))
    sizes = _sizes(image, (0.5, 0.75) if few else _SMALLER, multiple)
    settings += [Setting("size", given.stride, own_pair, scale=scale) for scale in sizes]
    dense: dict[int, Pair] = {}
    for pair in pairs:
        for stride in pair:
            if stride != own or own_pair is None:
                dense.setdefault(stride, pair)
    for stride, pair in sorted(dense.items()):
        settings.append(Setting("dense", stride, pair))
        if has_labels and own and stride > own and not few:  # larger pictures, at about the same work
            larger = _sizes(image, _LARGER, multiple)
            settings += [Setting("dense", stride, pair, scale=scale) for scale in larger]
    for pair in pairs:
        masks: Sequence[str] = _MASKS if pair[1] == 2 * pair[0] else _MASKS_AT_FOUR
        if few:
            masks = tuple(mask for mask in masks if mask.endswith(("=0.1", "=0.2")))
        settings += [Setting("adaptive", 0, pair, mask, "guided") for mask in masks]
        if pair == pairs[0] and not few:
            settings.append(Setting("adaptive", 0, pair, "edges", "linear"))
    return Candidates(tuple(settings), own, own_pair)


def _pairs(found: Plan, own: int, has_labels: bool) -> list[Pair]:
    """Pairs that make maps of the network coarser and, with labels, finer; that of the plan if there are none."""
    coarser = [(own, own * step) for step in (2, 4)]
    finer = [(own // step, own) for step in (2, 4) if own % step == 0]
    known = [pair for pair in (*coarser, *(finer if has_labels else ())) if pair in found.possible]
    return known or [found.output_stride]


def _sizes(image: Tensor, scales: Sequence[float], multiple: int) -> list[float]:
    """The scales at which both sides are large enough for the network's grid."""
    sides = image.shape[2:]
    return [scale for scale in scales if all(side * scale >= max(_LEAST_SIDE, multiple) for side in sides)]


def scaled_size(size: Sequence[int], scale: float, multiple: int) -> tuple[int, int]:
    """The size of scaled pictures, in multiples of the coarsest stride, where the network's grid fits."""
    if scale == 1:
        return size[0], size[1]
    sides = [max(multiple, multiple * math.floor(side * scale / multiple + 0.5)) for side in size]
    return sides[0], sides[1]
