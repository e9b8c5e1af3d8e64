"""Count the multiply-accumulates (MACs) of an adaptive network for a mask, running only the part that the mask needs.

The network runs on meta tensors (shapes without values), but with the real lattice of the image's mask. Convolutions
on elements count `output elements x weight entries`; dense operations are counted by the rules of `support.counting`.
Interpolated halo rows are memory traffic, not MACs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.arguments import Arguments, change_images, image_of, in_order
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.invocations import find_lattice
from cadsurgery.network.observing import LatticeId, Observation, observe
from cadsurgery.network.program import Program, ProgramNetwork
from cadsurgery.support.counting import MacCounter, describe_not_counted
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, first_line
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import tree_map
from cadsurgery.surgery.plan import PlannedWork
from cadsurgery.surgery.rewrite import WORK

PICTURE = (512, 1024)  # size of the image on which the work of a plan is counted by default


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer: with the mask, with all cells high, with all cells low, and in the network as given.

    `given` is None if the output strides of the network as given are not among those of the converted one; `in_region`
    is true for layers of the region and for the work of the mask.
    """

    layer: str
    operation: str
    mask: int
    high: int
    low: int
    given: int | None = None
    in_region: bool = False


@dataclass(frozen=True)
class MacReport:
    """MACs of a network on an image; `print` shows the totals.

    Attributes:
        layers: layers with MACs, in order.
        active_fraction: active fraction of the mask.
        shape: shape of the image batch.
        not_counted: operations that may multiply but are missing, because they have no counting rule.
        given: MACs of the network as given (of its converted part, if that is counted alone); None if unknown.
        part: name of the part that is counted alone; empty for the whole network.
        high_stride: the high output stride; 0 if unknown.
        whole: if only boxes of the image are computed, MACs with the mask of the whole image; else None.
    """

    layers: tuple[LayerMacs, ...]
    active_fraction: float
    shape: tuple[int, ...]
    not_counted: tuple[str, ...] = ()
    given: int | None = None
    part: str = ""
    high_stride: int = 0
    whole: int | None = None

    @property
    def of_whole(self) -> float:
        """The MACs with the mask relative to those of the whole image: less than 1 where only boxes are computed."""
        return self.mask / self.whole if self.whole else 1.0

    def within(self, work: Mapping[str, float]) -> MacReport:
        """Return the report for boxes, with other MACs of each layer with the mask; the mask sees the whole image."""
        layers = tuple(
            layer if layer.layer in MASK_LAYERS else replace(layer, mask=round(work.get(layer.layer, 0)))
            for layer in self.layers
        )
        return replace(self, layers=layers, whole=self.mask)

    @property
    def mask(self) -> int:
        """The MACs with the mask."""
        return sum(layer.mask for layer in self.layers)

    @property
    def of_mask(self) -> int:
        """The MACs that compute the mask: its own operations, and first passes of the network that it needs."""
        return sum(layer.mask for layer in self.layers if layer.layer in MASK_LAYERS)

    @property
    def high(self) -> int:
        """The MACs of the dense network at the high output stride."""
        return sum(layer.high for layer in self.layers)

    @property
    def low(self) -> int:
        """The MACs of the dense network at the low output stride."""
        return sum(layer.low for layer in self.layers)

    @property
    def of_given(self) -> float | None:
        """The MACs with the mask relative to those of the network as given; None if these are unknown."""
        return self.mask / self.given if self.given else None

    @property
    def region_of_high(self) -> float:
        """The MACs with the mask in the region, relative to everything high; the mask's own work is among them."""
        region = [layer for layer in self.layers if layer.in_region]
        high = sum(layer.high for layer in region)
        return sum(layer.mask for layer in region) / high if high else 1.0

    def describe(self) -> str:
        """Return the work with the mask relative to the network as given, in words; the region comes last."""
        given = f"the {self.part} as given" if self.part else "the network as given"
        stride = f"output stride {self.high_stride}" if self.high_stride else "the high output stride"
        of_high = f"{self.mask / max(1, self.high):.2f} of the same network at {stride} everywhere"
        region = f"in the region {self.region_of_high:.2f} of everything high"
        if self.of_given is None:
            return f"{of_high}; {region}"
        if self.given is not None and self.high > self.given:
            return (
                f"this makes maps finer: {self.of_given:.2f} times the work of {given}, {of_high}; {region}"
            )
        return f"{self.of_given:.2f} of the work of {given}; {region}"

    def to_dict(self) -> dict[str, Any]:
        """Return the totals and the layers as plain values, for `--json`."""
        return {
            "shape": list(self.shape),
            "active_fraction": self.active_fraction,
            "macs": {"mask": self.mask, "high": self.high, "low": self.low, "given": self.given},
            "of_given": self.of_given,
            "region_of_high": self.region_of_high,
            **({} if self.whole is None else {"of_whole": self.of_whole}),
            "not_counted": list(self.not_counted),
            "layers": [vars(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        given = "" if self.given is None else f"{self.given:.4e} as given, "
        within = (
            "" if self.whole is None else f"in the boxes {self.of_whole:.3f} of the work of the whole image"
        )
        counts = (
            f"MACs on {size}: {self.mask:.4e} with this mask "
            f"(active fraction {self.active_fraction:.3f}), {given}{self.high:.4e} everything high, "
            f"{self.low:.4e} everything low"
        )
        return "\n".join(
            filter(None, (within, self.describe(), counts, describe_not_counted(self.not_counted)))
        )


def count_macs(program: Program, counted: Program, provider: MaskProvider, arguments: Arguments) -> MacReport:
    """Count for `AdaptiveModel.macs`; `counted` is the program on meta tensors."""
    image = program.image(arguments)
    masking = _CountedMasking(program.masking(provider), image)
    if provider.sees_features or provider.looks_ahead or not program.image_name:
        find_lattice(program, masking, arguments)

    not_counted = masking.not_counted

    def count(chosen: Any, call: Arguments = arguments) -> dict[str, int]:
        seen = _observe_call(counted, chosen, call)
        not_counted.update(seen.not_counted)
        return seen.by_layer

    lowest, own = program.geometry.max_level, program.plan.identity_level
    passes = provider.first_passes(lowest)
    with_mask = count(masking)
    by_level = {
        level: count(program.uniform(level)) for level in {0, lowest, 0 if own is None else own, *passes}
    }
    layers = [
        LayerMacs(
            name := decision.node,
            decision.operation,
            with_mask.get(name, 0),
            by_level[0].get(name, 0),
            by_level[lowest].get(name, 0),
            None if own is None else by_level[own].get(name, 0),
            decision.on_elements,
        )
        for decision in program.plan.decisions
        if any(counts.get(decision.node) for counts in (with_mask, by_level[0], by_level[lowest]))
    ]
    given = sum(by_level[own].values()) if own is not None else _given_macs(counted, arguments)
    after = {node.meta[WORK][0] for node in counted.halves.after.nodes if WORK in node.meta}
    ahead = sum(work for level in passes for name, work in by_level[level].items() if name in after)
    if scale := provider.preview_scale:
        smaller = program.bind(program.smaller(scale, image))
        ahead += sum(count(program.uniform(lowest if own is None else own), smaller).values())
    for name, work in zip(MASK_LAYERS, (masking.macs, ahead), strict=True):
        if work:
            layers.append(LayerMacs(name, provider.name, work, 0, 0, 0, in_region=True))
    assert masking.lattice is not None
    return MacReport(
        tuple(layers),
        masking.lattice.active_fraction,
        tuple(image.shape),
        tuple(sorted(not_counted)),
        given,
        program.plan.part,
        program.plan.output_stride[0],
    )


def _given_macs(counted: Program, arguments: Arguments) -> int | None:
    """Count the original network itself: its own output strides are not among those of the converted one."""
    with contextlib.suppress(InvalidInput):  # it may read values, which shapes alone do not have
        call = inspect.BoundArguments(counted.signature, OrderedDict(arguments))
        return count_network(counted.net._original[0], *call.args, **call.kwargs).macs
    return None


def _observe_call(counted: Program, masking: Any, arguments: Arguments) -> Observation:
    """Run the whole graph of a program on meta tensors for a masking."""
    return observe(counted, counted.graph, in_order(counted.graph, arguments, masking))


def count_planned(program: Program, arguments: Arguments, is_example: bool) -> PlannedWork | None:
    """Count the work of a planned conversion: as given, everything high, everything low; None if it cannot be counted.

    Args:
        program: the program that carries out the plan.
        arguments: arguments of the call that the plan was made with.
        is_example: False if the user chose the image; True for the default example, which is too small for shares that
            hold for pictures: a larger image is counted then, if the network takes it.
    """
    image = image_of(arguments)
    larger = image.new_empty((1, image.shape[1], *PICTURE), device="meta")
    calls = [change_images(arguments, lambda _: larger)] if is_example else []
    counted, plan, own = program.net.counted, program.plan, program.plan.identity_level
    for call in (*calls, arguments):
        # Networks refuse sizes, and tensors without values, with any error.
        with contextlib.suppress(Exception):
            by_level = {
                level: sum(_observe_call(counted, counted.uniform(level), call).macs.values())
                for level in {0, plan.max_level, 0 if own is None else own}
            }
            given = by_level[own] if own is not None else _given_macs(counted, call)
            if given:
                return PlannedWork(given, by_level[0], by_level[plan.max_level], tuple(image_of(call).shape))
    return None


# See `MacReport.of_mask`.
MASK_LAYERS = ("(mask)", "(first pass)")


@dataclass
class _CountedMasking:
    """A masking that computes its lattice once, on the real image, and counts the MACs of its provider."""

    masking: Masking
    image: Tensor
    lattice: Lattice | None = None
    macs: int = 0
    not_counted: set[str] = field(default_factory=set)

    @property
    def provider(self) -> MaskProvider:
        """The mask provider."""
        return self.masking.provider

    def __call__(self, image: Tensor, features: Tensor) -> Lattice:
        """Return the lattice of the mask."""
        if self.lattice is None:
            if features.is_meta:  # the mask reads only the image
                image, features = self.image, torch.empty(features.shape, device=self.image.device)
            with MacCounter() as counter:
                self.lattice = self.masking(image, features)
            self.macs = counter.macs
            self.not_counted.update(counter.not_counted)
        return self.lattice


@dataclass(frozen=True)
class LayerWork:
    """MACs of one layer as a function of the lattice, for images of one size.

    Attributes:
        layer: name of the layer.
        per_element: stage and fine size of the lattices that it runs on, and MACs per element there.
        dense: MACs of its dense calls: with all cells high, and otherwise.
    """

    layer: str
    per_element: tuple[tuple[LatticeId, int], ...]
    dense: tuple[int, int]

    def on(self, lattice: Lattice) -> int:
        """Return the MACs for the lattice of a run, given at any stage."""
        dense = self.dense[lattice.uniform_level != 0]
        return dense + sum(work * lattice.resample(*key).count for key, work in self.per_element)


def layer_work(net: ProgramNetwork, image: Tensor) -> tuple[LayerWork, ...] | None:
    """Return per layer a function from the lattice of a run on such a batch to the MACs that `net.macs` counts.

    MACs are linear in the numbers of elements after each stage, so one count serves all masks. Return None if a count
    on a second lattice shows that they are not linear, or if a host changes the batch before its adaptive part.
    """
    if net.adaptive_part is not net:
        return None
    counted = net.counted
    windows = [node.kwargs.get("window") for node in counted.graph.nodes]
    if any(isinstance(window, Window) and not window.has_equal_phases for window in windows):
        return None
    call = counted.bind(image)
    high, low = (
        _observe_call(counted, counted.uniform(level), call) for level in (0, counted.geometry.max_level)
    )
    lattice = next(value for value in low.values.values() if isinstance(value, Lattice))
    of_low = low.by_lattice
    layers = tuple(
        LayerWork(
            name,
            tuple((key, work) for key, work in per_element.items() if key is not None),
            (per_element.get(None, 0), of_low[name].get(None, 0)),
        )
        for name, per_element in high.by_lattice.items()
    )
    return layers if {layer.layer: layer.on(lattice) for layer in layers} == low.by_layer else None


@dataclass(frozen=True)
class NetworkMacs:
    """MACs of an ordinary network, and the operations missing from them; see `MacReport.not_counted`."""

    macs: int
    not_counted: tuple[str, ...] = ()


def dense_macs(model: nn.Module, *args: Any) -> int:
    """Return only the multiply-accumulates of `count_network`."""
    return count_network(model, *args).macs


def count_network(model: nn.Module, *args: Any, **kwargs: Any) -> NetworkMacs:
    """Count the multiply-accumulates of any network on an image, on shapes only.

    Args:
        model: the network.
        args: positional arguments of a call.
        kwargs: named arguments of a call.

    Raises:
        InvalidInput: the network does not run on these arguments.
    """
    counted = meta_copy(model)
    with torch.no_grad(), MacCounter() as counter:
        try:
            counted(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
        except Exception as error:  # the network may refuse its input with any error
            raise InvalidInput(
                f"{type(model).__name__} does not run on {describe(next(iter((*args, *kwargs.values())), None))}.",
                why=first_line(error),
                next="give an image batch that it takes.",
            ) from error
    return NetworkMacs(counter.macs, tuple(sorted(counter.not_counted)))
