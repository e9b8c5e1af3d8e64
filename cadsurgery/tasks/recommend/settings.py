"""The settings worth trying: the network as given, pictures of other sizes, other output strides, conversions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from cadsurgery.network.adaptify import plan
from cadsurgery.network.export import INT8
from cadsurgery.support.defaults import DEFAULT_MASK, KERNELS
from cadsurgery.support.errors import CannotConvert
from cadsurgery.surgery.decide import FLOOR
from cadsurgery.surgery.plan import Plan
from cadsurgery.tasks.sides.engine_sides import TORCH

Pair = tuple[int, int]
# Shares of the patches that `detail` keeps high; "none" is everything low, whose halo the fill still reads.
_MASKS = ("none", *(f"detail | budget:fraction={share:g}" for share in (0.05, 0.1, 0.2, 0.35)))
_MASKS_AT_FOUR = ("none", "detail | budget:fraction=0.1", "detail | budget:fraction=0.25")
# Masks of conversions on the network's own grid, for pictures that are mostly empty.
_MASKS_OF_FLOORS = ("content", "preview")
_SMALLER, _LARGER = (0.5, 0.625, 0.75, 0.875), (1.25, 1.5)
_LEAST_SIDE = 32  # pixels of a scaled picture


@dataclass(frozen=True)
class Setting:
    """A way to run a network.

    Attributes:
        kind: `given` is the network as the user passed it, `compiled` the same after `torch.compile`, `size` the same
            on resized pictures, `dense` the network at another output stride everywhere, on resized pictures or not,
            and `adaptive` a conversion.
        stride: output stride of a dense network, or of the network as given; 0 if unknown.
        pair: output strides (high, low) of the conversion. Dense networks, and the network as given, are the ends of a
            conversion; None if the network cannot be converted.
        mask: mask of the conversion, as typed.
        fill: interpolation inside cells, as of `adaptify`.
        scale: factor by which pictures are resized.
        coarsest: floor of a conversion on the network's own grid, in input pixels; 0 for others.
    """

    kind: Literal["given", "compiled", "size", "dense", "adaptive"]
    stride: int = 0
    pair: Pair | None = None
    mask: str = ""
    fill: str = "linear"
    scale: float = 1.0
    coarsest: int = 0

    @property
    def is_converted(self) -> bool:
        """True if a converted network, or one end of a conversion, runs."""
        return self.pair is not None or self.coarsest > 0

    @property
    def conversion(self) -> dict[str, Any]:
        """The options of `adaptify` that make the network of this setting."""
        if self.coarsest:
            return {"coarsest": self.coarsest}
        return {"output_stride": self.pair, "fill": self.fill}

    @property
    def name(self) -> str:
        """The setting in words, with masks as typed."""
        pictures = f", pictures {self.scale:g} times as large" if self.scale != 1 else ""
        if self.kind == "compiled":
            return "as given, by torch.compile"
        if self.kind in ("given", "size"):
            return f"as given{f', output stride {self.stride}' if self.stride else ''}{pictures}"
        if self.kind == "dense":
            return f"dense, output stride {self.stride}{pictures}"
        if self.coarsest:
            return f"{self.mask}, coarsest {self.coarsest}"
        assert self.pair is not None
        return f"{self.mask}, {self.pair[0]} to {self.pair[1]}, {self.fill}"

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as plain values, for JSON."""
        return {"name": self.name, **asdict(self)}

    @property
    def typed_mask(self) -> str:
        """The mask under which the conversion for `pair` gives this setting."""
        return self.mask or ("all" if self.pair and self.stride == self.pair[0] else "none")

    def command(self, network: str, options: Mapping[str, Any] = {}) -> str:
        """Return the command that makes the network of this setting; "" if the network as given is used.

        Args:
            network: as the user typed it.
            options: `weights`, `bands` and options of `adaptify` that the user gave, by name.
        """
        if self.kind in ("given", "compiled", "size") or not self.is_converted:
            return ""
        more = "".join(f" --{name} {_typed(value)}" for name, value in options.items())
        if self.pair is None:
            return f'cadsurgery convert {network}{more} --coarsest {self.coarsest} --mask "{self.mask}"'
        return (
            f"cadsurgery convert {network}{more} --output-stride {self.pair[0]},{self.pair[1]} "
            f'--mask "{self.typed_mask}" --fill {self.fill}'
        )

    def lines(
        self, precision: str = "float32", options: Mapping[str, Any] = {}, runtime: str = TORCH
    ) -> list[str]:
        """Return lines of Python that use this setting, for a network `model` and a batch of pictures `x`: in an engine
        up to the file that it runs, calibrated by `pictures` if it is in 8 bits."""
        is_resized, is_made = self.scale != 1, self.kind in ("dense", "adaptive")
        lines = ["import torch.nn.functional as F"] * is_resized
        if is_made:
            given = {name: value for name, value in options.items() if name not in ("weights", "bands")}
            more = "".join(f", {name}={value!r}" for name, value in {**self.conversion, **given}.items())
            lines += [
                "import cadsurgery as cs",
                f'net = cs.adaptify(model, mask="{self.typed_mask}"{more}).eval()',
            ]
            if runtime == TORCH:
                lines.append(f"fast = net{'.bfloat16()' if precision == 'bfloat16' else ''}.optimize()")
        elif self.kind == "compiled":
            lines.append(
                "fast = torch.compile(model, dynamic=False)  # the first call of each size takes longer"
            )
        if is_resized:
            lines.append(
                f"small = F.interpolate(x, scale_factor={self.scale:g}, mode='bilinear', antialias=True)"
            )
        if is_made and runtime != TORCH:
            return [*lines, _exported("small" if is_resized else "x", runtime, precision)]
        call = "fast" if is_made or self.kind == "compiled" else "model"
        if not is_resized:
            return [*lines, f"y = {call}(x)"]
        back = f"F.interpolate({call}(small), size=x.shape[2:], mode='bilinear')"
        return [*lines, f'y = {back}  # of a dictionary its entry "out"']


def _exported(image: str, runtime: str, precision: str) -> str:
    """Return the line that writes the file for an engine."""
    options = [f'check_in="{runtime.removesuffix(KERNELS)}"']
    options += ["with_kernels=True"] * runtime.endswith(KERNELS)
    options += [f'precision="{precision}"', "calibration=pictures"] * (precision == INT8)
    return f'cs.export(net, {image}, "net.onnx", {", ".join(options)})  # how to run it: docs/howto/deploy.md'


def _typed(value: Any) -> str:
    """Return the value of an option as it is typed: a text, several names, or (mean, std)."""
    if isinstance(value, str):
        return value
    if all(isinstance(part, str) for part in value):
        return ",".join(value)
    return "/".join(",".join(map(str, part)) if isinstance(part, Sequence) else str(part) for part in value)


class Candidates(NamedTuple):
    """The settings worth trying, the network as given first, and why it cannot be converted; None if it can."""

    settings: tuple[Setting, ...]
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
        image: (1, 3, H, W), normalised for the network.
        options: `region` and `output_stride` of `adaptify`, if the user gave them.
        has_labels: True if quality is measured against labels.
        few: True to try few settings, because the export of each takes long, and none by `torch.compile`.
    """
    asked = options.get("output_stride")
    region = options.get("region") or "auto"
    on_own_grid = [] if few or asked else _with_floors(model, region, image)
    try:
        own_plan = plan(model, asked, region, image)
    except CannotConvert as error:
        sizes = _sizes(image, _SMALLER + (_LARGER if has_labels else ()), 32)
        on_own_grid = on_own_grid or _with_floors(model, region, image)[: 1 if few else None]
        as_given = [Setting("given")] if few else [Setting("given"), Setting("compiled")]
        without = (*as_given, *(Setting("size", scale=s) for s in sizes), *on_own_grid)
        return Candidates(without, refusal=None if on_own_grid else error)
    own = own_plan.strides[own_plan.identity_level] if own_plan.identity_level is not None else 0
    pairs = [asked] if asked else _pairs(own_plan, own, has_labels)
    if few:
        pairs = pairs[:1]
    own_pair = next((pair for pair in pairs if own in pair), None)
    given = Setting("given", own if own_pair else 0, own_pair)
    settings = [given] if few else [given, Setting("compiled", given.stride, own_pair)]
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
            settings.append(Setting("adaptive", 0, pair, DEFAULT_MASK, "linear"))
    return Candidates((*settings, *on_own_grid))


def in_turn(settings: Sequence[Setting]) -> list[Setting]:
    """Return settings in an order whose beginning has some of each kind: the network as given, the kinds in turn, and
    the compiled network, which takes longest to prepare."""
    given, *others = settings
    kinds: dict[tuple[str, bool], list[Setting]] = {}
    for setting in others:
        kinds.setdefault((setting.kind, setting.coarsest > 0), []).append(setting)
    compiled = kinds.pop(("compiled", False), [])
    turns = (setting for turn in zip_longest(*kinds.values()) for setting in turn if setting is not None)
    return [given, *turns, *compiled]


def _with_floors(model: nn.Module, region: str, image: Tensor) -> list[Setting]:
    """Return conversions on the network's own grid, which save where nothing is in the picture; none if impossible."""
    try:
        plan(model, None, region, image, coarsest=FLOOR)
    except CannotConvert:
        return []
    return [Setting("adaptive", mask=mask, coarsest=FLOOR) for mask in _MASKS_OF_FLOORS]


def _pairs(own_plan: Plan, own: int, has_labels: bool) -> list[Pair]:
    """Return pairs of output strides that make maps coarser and, with labels, finer; else the pair of the plan."""
    coarser = [(own, own * step) for step in (2, 4)]
    finer = [(own // step, own) for step in (2, 4) if own % step == 0]
    possible = [pair for pair in (*coarser, *(finer if has_labels else ())) if pair in own_plan.possible]
    return possible or [own_plan.output_stride]


def _sizes(image: Tensor, scales: Sequence[float], multiple: int) -> list[float]:
    """Return the scales at which both sides are large enough for the network's grid."""
    sides = image.shape[2:]
    return [scale for scale in scales if all(side * scale >= max(_LEAST_SIDE, multiple) for side in sides)]
