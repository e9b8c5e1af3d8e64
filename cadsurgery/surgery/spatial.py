"""How the operations of a graph act on the positions of maps, according to their rules."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.kernel_map import Window
from cadsurgery.following.facts import Facts
from cadsurgery.surgery.flow import flow_forward
from cadsurgery.surgery.rules import treat
from cadsurgery.surgery.treatment import Treatment

CHANNELS_FIRST, CHANNELS_LAST = "bchw", "bhwc"
_LAYOUTS = (CHANNELS_FIRST, CHANNELS_LAST)


class SpatialKind(NamedTuple):
    """How a step acts on positions.

    Attributes:
        kind: `conv`, a convolution that can be computed at chosen positions; `pool` and `resize`, computed on the
            whole map, with each position reading its surroundings; `point`, acts on each position alone; `permute`,
            moves the channels first or last; `whole`, anything else.
        window: window of a convolution or pool.
    """

    kind: Literal["conv", "pool", "resize", "point", "permute", "whole"] = "whole"
    window: Window | None = None


WHOLE = SpatialKind()


class Spatial:
    """Classifies the nodes of a graph by how they act on positions of maps, channels first or last."""

    def __init__(self, facts: Facts) -> None:
        # No map is dilated here, and padding is a separate step.
        known = flow_forward(facts, removed_up_to=0)
        # Bins of the image, and what is computed of them, are maps here, which elements cannot be.
        maps = {
            node: CHANNELS_FIRST
            for node, shape in facts.shapes.items()
            if len(shape) == 4 and shape[0] == len(facts.example) and min(shape[2:]) > 1
        }
        images = {node: (facts.shapes[node][2], facts.shapes[node][3]) for node in maps}
        self.facts = replace(known, pads={}, layouts=maps | known.layouts, images=images | known.images)

    @cached_property
    def treatments(self) -> dict[fx.Node, Treatment]:
        """Treatments of all nodes."""
        return {
            node: treat(node, self.facts)
            for node in self.facts.graph.nodes
            if node.op not in ("placeholder", "output")
        }

    def maps(self, node: fx.Node) -> list[fx.Node]:
        """Return the maps of several positions that a node reads."""
        return [value for value in node.all_input_nodes if self.facts.layout(value) in _LAYOUTS]

    def kind(self, node: fx.Node) -> SpatialKind:
        """Return how a node acts on positions in evaluation mode."""
        treatment, maps = self.treatments.get(node), self.maps(node)
        if treatment is None or not maps:
            return WHOLE
        if treatment.window is not None and treatment.kind == "window":
            is_conv = node.op == "call_module" and isinstance(self.facts.module(node), nn.Conv2d)
            return SpatialKind("conv" if is_conv else "pool", treatment.window)
        if treatment.kind == "resize" and treatment.call is functional.resize:
            return SpatialKind("resize")
        layouts = {self.facts.layout(value) for value in (*maps, node)}
        if treatment.kind == "pointwise" and layouts == set(_LAYOUTS):
            return SpatialKind("permute")
        operation, rows, layout = treatment.operation, treatment.rows, self.facts.layout(node)
        if treatment.kind not in ("pointwise", "join") or layouts != {layout} or treatment.spaced:
            return WHOLE
        if operation is not None and (operation.reads != "element" or treatment.axes not in ("", layout)):
            return WHOLE
        # The node, called on chosen positions as it is, must do to rows what its rule says.
        return SpatialKind("point") if rows is None or rows.target in (node.target, torch.cat) else WHOLE
