"""Networks that read their image from a dictionary or list: files take its tensors as inputs by name."""

from __future__ import annotations

import copy
import inspect
import operator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.arguments import bind_all, image_of
from cadsurgery.surgery.graphs import copy_graph


def open_dictionary(net: AdaptiveModel, given: Any) -> tuple[AdaptiveModel, Any, str]:
    """Return a network that takes as an argument what `net` reads from a dictionary or list, its image, and their name.

    Args:
        net: a network; one that takes its image as an argument is returned itself.
        given: the image, or what `net` is called with: a dictionary or list.

    Raises:
        InvalidInput: the network reads something else of it, too, or it holds no image.
    """
    holder = None if net.program.masks_an_argument else _holder_of_image(net.program.graph)
    if holder is None:
        return net, given, "image"
    image = given if isinstance(given, Tensor) else image_of(bind_all(net.program.signature, (given,), {}))
    graph, _ = copy_graph(net.program.graph)
    name = _take_out(graph, str(holder.target))
    opened = copy.deepcopy(net)
    signature = _renamed(net.program.signature, str(holder.target), name)
    opened._program = replace(net.program, graph=graph, signature=signature).bind_to(opened)
    return opened, image, name


def _holder_of_image(graph: fx.Graph) -> fx.Node | None:
    """Return the input that is a dictionary or list with the image; None if each input is read as a whole."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    return next((node for node in inputs if all(map(_key_of, node.users))), None)


def _key_of(reader: fx.Node) -> tuple[Any] | None:
    """Return the name or number by which a node reads a dictionary or list; None if it does something else."""
    is_read = reader.target is operator.getitem or (reader.op == "call_method" and reader.target == "get")
    return (reader.args[1],) if is_read and isinstance(reader.args[1], (str, int)) else None


def _take_out(graph: fx.Graph, holder: str) -> str:
    """Let a graph take the only tensor that it reads from an input as this input; return the tensor's name.

    Raises:
        InvalidInput: it reads several.
    """
    source = next(node for node in graph.nodes if node.op == "placeholder" and node.target == holder)
    keys = dict.fromkeys(key[0] for reader in source.users if (key := _key_of(reader)))
    if len(keys) > 1:
        raise InvalidInput(
            f"the network reads {', '.join(map(repr, keys))} from {holder}; a file takes the image alone.",
            next="let the network take its image alone, and compute the others from it or keep them as buffers.",
        )
    (key,) = keys
    name = key if isinstance(key, str) and key.isidentifier() else "image"
    for reader in list(source.users):
        reader.replace_all_uses_with(source)
        graph.erase_node(reader)
    source.target = source.name = name
    return name


def _renamed(signature: inspect.Signature, parameter: str, name: str) -> inspect.Signature:
    """Return a signature with another name for a parameter."""
    every = signature.parameters.values()
    return inspect.Signature([one.replace(name=name) if one.name == parameter else one for one in every])
