"""Make the inference copy of an adaptive network: fold, fuse and pack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cadsurgery.following.graphs import parts_read
from cadsurgery.following.hooks import Watched, child, freeze_computed_weights
from cadsurgery.network.fuse import KERNELS, fuse, split_norms
from cadsurgery.network.program import Program, ProgramNetwork
from cadsurgery.support.errors import InvalidInput, check_name

PRECISIONS = (FLOAT := "float", BFLOAT16 := "bfloat16")


def fuse_network(source: ProgramNetwork, epilogues: bool) -> tuple[nn.Module, Program]:
    """Fuse a network's graph, and its own one, which floors run where everything is high; return the modules that the
    fused graphs need, and the program.

    Args:
        source: a copy of the network in evaluation mode, which is changed and cannot be used afterwards.
        epilogues: see `fuse`.
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
    own = source.program.unchanged if source.program.plan.floors else None
    graph, kernels = fuse(split_norms(graph, root)[0], root, epilogues)
    if own is not None:
        own, _ = fuse(split_norms(own, root)[0], root, epilogues, kernels)
    graphs = [part for part in (graph, own) if part is not None]
    root.add_module(KERNELS, kernels)
    fused = parts_read(root, *graphs)
    remaining = [module for module in source.program.watched if child(fused, module.path) is not None]
    watched = tuple(
        Watched.of(fused, module.path, module.is_called, module.settings is not None) for module in remaining
    )
    return fused, replace(source.program, graph=graph, unchanged=own, watched=watched, is_fused=True)


def check_precision(precision: str, calibration: Any = None) -> None:
    """Refuse a precision that a copy in torch cannot have.

    Raises:
        InvalidInput: 8 bits, or images to calibrate them by: these are for files.
        UnknownName: there is no such precision.
    """
    if precision == "int8" or calibration is not None:
        raise InvalidInput(
            "a copy in torch is not put into 8 bits, and takes no images to calibrate by.",
            why="files in 8 bits run in ONNX Runtime and OpenVINO, with this package's kernels.",
            next='write one: cs.export(net, image, "net.onnx", precision="int8", calibration=images, '
            "with_kernels=True); or cadsurgery export ... --precision int8 --calibration FOLDER --with-kernels.",
        )
    check_name("precision", precision, PRECISIONS)
