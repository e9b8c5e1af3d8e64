"""Make the inference copy of an adaptive network: fold, fuse, pack, and convert the precision."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from cadsurgery.elements.backends.integer import form_here
from cadsurgery.network.fuse import KERNELS, fuse, split_norms
from cadsurgery.network.program import Program, ProgramNetwork
from cadsurgery.network.quantise import Quantisation, quantise
from cadsurgery.support.errors import CadWarning, InvalidInput, UnknownName
from cadsurgery.support.progress import Step, silent
from cadsurgery.surgery.hooks import Watched, child, freeze_computed_weights

PRECISIONS = (FLOAT := "float", "int8")


def fuse_network(source: ProgramNetwork, epilogues: bool, with_own: bool) -> tuple[fx.GraphModule, Program]:
    """Fuse a network's graph; return the modules that the fused graph needs, and its program.

    Args:
        source: a copy of the network in evaluation mode, which is changed and cannot be used afterwards.
        epilogues: see `fuse`.
        with_own: True also fuses the network's own graph, which floors run where everything is high.
    """
    graph = source.program.graph
    used = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    freeze_computed_weights(source, {"", *used})
    for module in source.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    root = nn.Module()
    for kind in ("_modules", "_parameters", "_buffers"):
        vars(root)[kind].update(vars(source)[kind])
    for name in source._constants.keys() - source._parameters.keys():
        root.register_buffer(name, getattr(source.program.names(), name))
    own = source.program.unchanged if with_own and source.program.plan.floors else None
    graph, kernels = fuse(split_norms(graph, root)[0], root, epilogues)
    if own is not None:
        own, _ = fuse(split_norms(own, root)[0], root, epilogues, kernels)
    graphs = [part for part in (graph, own) if part is not None]
    root.add_module(KERNELS, kernels)
    fused = fx.GraphModule(root, _reading(graphs))  # it keeps only the modules that the graphs use
    fused.graph = graph
    remaining = [module for module in source.program.watched if child(fused, module.path) is not None]
    watched = tuple(
        Watched.of(fused, module.path, module.is_called, module.settings is not None) for module in remaining
    )
    return fused, replace(source.program, graph=graph, unchanged=own, watched=watched, is_fused=True)


def _reading(graphs: list[fx.Graph]) -> fx.Graph:
    """Return a graph that only reads the modules and parameters that graphs read."""
    reading = fx.Graph()
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op == "call_module":
            reading.call_module(str(node.target))
        elif node.op == "get_attr":
            reading.get_attr(str(node.target))
    reading.output(None)
    return reading


class Precision(NamedTuple):
    """A precision and how it is reached; see `AdaptiveModel.optimize`."""

    name: str = FLOAT
    calibration: Any = None
    largest_error: float | None = None
    step: Step = silent

    @property
    def is_asked(self) -> bool:
        """True if anything but the defaults is asked for."""
        return self.name != FLOAT or self.calibration is not None or self.largest_error is not None


def check_precision(precision: str, calibration: Any, largest_error: float | None = None) -> None:
    """Refuse a precision that `optimize` cannot reach with such options.

    Raises:
        UnknownName: there is no such precision.
        InvalidInput: int8 without images to calibrate by, images without int8, or an invalid largest error.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if (precision == FLOAT) != (calibration is None):
        raise InvalidInput(
            f"precision {precision} {'lacks' if calibration is None else 'takes no'} images to calibrate by.",
            next='give both: precision="int8", calibration=images; or --precision int8 --calibration FOLDER.',
        )
    if largest_error is not None and (precision == FLOAT or not largest_error > 0):
        raise InvalidInput(
            f"precision {precision} with outputs that differ by {largest_error} at most.",
            why="it limits the error of int8 outputs, relative to their size.",
            next="leave it out, or give a share of the outputs' size with int8: largest_error=0.05; or --precision "
            "int8 --calibration FOLDER --largest-error 0.05.",
        )


def put_in_precision(fast: ProgramNetwork, wanted: Precision) -> Quantisation | None:
    """Convert an optimised copy to a precision, see `AdaptiveModel.optimize`; return its quantisation, if any."""
    precision, calibration, largest_error, step = wanted
    check_precision(precision, calibration, largest_error)
    if precision == FLOAT:
        return None
    if form_here() is None:
        warnings.warn(
            "this copy is not in 8 bits: there are no compiled kernels here (cadsurgery --version says why). It stays "
            "in float; .to(torch.bfloat16) is faster where the processor has bfloat16.",
            CadWarning,
            stacklevel=4,
        )
        return None
    return quantise(fast, calibration, largest_error, step)
