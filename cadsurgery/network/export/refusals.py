"""Refusals of files: what torch and engines raise, with the operation of the network and its module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from cadsurgery.elements.on_rows import OnRows
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadError, CannotConvert, describe_error
from cadsurgery.surgery.graphs import module_of, raised_by, source_line, written_at
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
