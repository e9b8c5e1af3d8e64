"""Refusals of files: what torch and engines raise, with the operation of the network and its module."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.elements import Elements
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.following.graphs import module_of, raised_by, source_line, written_at
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter
from cadsurgery.support.errors import CadError, CannotConvert, describe_error
from cadsurgery.surgery.rewrite import ORIGIN

LINE = "cadsurgery_line"  # of the network's graph, in the metadata of a node that was traced there


@contextmanager
def refused(what: str, next: str, net: nn.Module | None = None) -> Iterator[None]:
    """Turn what other packages raise in the block into a `CannotConvert`, with its place in a network that the block
    runs; a full disk or missing right stays one."""
    try:
        yield
    except (CadError, OSError):
        raise
    except Exception as error:
        place = place_of(error, net)
        raise CannotConvert(f"{what}.", where=place, why=cause_of(error), next=next) from error


@contextmanager
def saying_if_too_large(net: AdaptiveModel, images: Iterable[Tensor], is_half: bool) -> Iterator[None]:
    """Let a refusal in the block say which layer's values exceed the range of float16, if one's do on these images.

    Args:
        net: the network, in any type.
        images: image batches on which a file was compared.
        is_half: the file computes in float16, whatever the type of the network.

    Raises:
        CannotConvert: in place of another.
    """
    try:
        yield
    except CannotConvert as error:
        first = next((value for value in net.parameters() if value.is_floating_point()), None)
        if not (is_half or (first is not None and first.dtype == torch.float16)):
            raise
        for image in images:
            if (found := _beyond_float16(net, image)) is not None:
                where, largest = found
                raise CannotConvert(
                    f"values of the network reach {largest:.3g}, and float16 ends at {_LARGEST:.0f}.",
                    where=where,
                    why="larger ones become infinite, and differences of these NaN; nothing was written.",
                    next='write the file in float32, precision="float" of a network in float32; or run it in bfloat16, '
                    'which has the range of float32: net.optimize(precision="bfloat16").',
                ) from error
        raise


_LARGEST = torch.finfo(torch.float16).max


@torch.no_grad()
def _beyond_float16(net: AdaptiveModel, image: Tensor) -> tuple[str, float] | None:
    """Return the weight, or else the first operation, with values beyond float16's range, and the largest of them; None
    if there is none."""
    wide = copy.deepcopy(net).float()
    for name, weight in wide.named_parameters():
        if weight.numel() and not float(weight.abs().max()) <= _LARGEST:
            return f"the weights {name}", float(weight.abs().max())
    found: list[tuple[str, float]] = []

    def note(node: fx.Node, value: Any, _: Any) -> None:
        tensor = value.rows if isinstance(value, Elements) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            largest = float(tensor.abs().max())
            if largest > _LARGEST and math.isfinite(largest):
                found.append((_words_for(node), largest))

    wide._program = wide.program.interpreted_by(partial(GraphInterpreter, note=note))
    try:
        wide(image.float())
    except Exception:  # operations of users' own may know no other type
        return None
    return found[0] if found else None


def cause_of(error: BaseException) -> str:
    """Describe the innermost cause of an error, such as an exporter's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return describe_error(error)


def place_of(error: BaseException, net: nn.Module | None) -> str:
    """Return the operation of a network, and the original's name for it, in which an error was raised; empty if it was
    raised elsewhere."""
    return _words_for(raised_by(error, net.program.graph)) if isinstance(net, AdaptiveModel) else ""


def place_of_translation(error: BaseException, translated: fx.Graph, net: nn.Module | None) -> str:
    """Return the operation of a network, and the original's name for it, that torch's exporter could not translate:
    its error tells the name of a node that was traced there."""
    name = re.search(r"translating node %(\w+)", str(error.__cause__ or error))
    node = next((node for node in translated.nodes if name and node.name == name[1]), None)
    line = node.meta.get(LINE) if node is not None else None
    if line is None or not isinstance(net, AdaptiveModel):
        return ""
    return _words_for(written_at(line, net.program.graph))


def _words_for(node: fx.Node | None) -> str:
    """Return the name of a node's operation, and the original's name for it or for its module, with the line."""
    if node is None:
        return ""
    target = node.target.operation if isinstance(node.target, OnRows) else node.target
    what = target if isinstance(target, str) else getattr(target, "__name__", node.name)
    origin, line = module_of(node) or node.meta.get(ORIGIN, ""), source_line(node)
    return f"{what}{f' ({line})' * bool(line)}{f', in the original {origin}' * bool(origin)}"
