"""Networks that take more than an image, or their image in a dictionary or list: files take each tensor by name.

The further tensors are arguments with defaults, those of the example, so that wherever the network is compared it is
called with an image alone.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from cadsurgery.following.arguments import bind_all, image_of
from cadsurgery.following.graphs import copy_graph
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput

_Inputs = dict[
    str, tuple[fx.Node, Any]
]  # by name: the node of a graph that stands for an input, and its value


def open_call(net: AdaptiveModel, given: Any) -> tuple[AdaptiveModel, Any, str]:
    """Return a network that takes the image first and every other tensor by name, the image, and its name.

    Args:
        net: a network; one that takes an image alone is returned itself.
        given: the image; or what `net` is called with: a tuple of arguments, a dictionary of arguments by name, or the
            only argument, a dictionary or list.

    Raises:
        InvalidInput: the network reads more tensors than are given, or something that is no tensor.
    """
    if isinstance(given, Tensor):
        holder = None if net.program.image_name else _holder_of_image(net.program.graph)
        if holder is None and not further_inputs(net):
            return net, given, "image"
        given = (given,) if holder is None else _held(holder, given)
    signature = net.program.signature
    if isinstance(given, Mapping) and given.keys() <= signature.parameters.keys():
        arguments = bind_all(signature, (), given)
    else:
        arguments = bind_all(signature, given if isinstance(given, tuple) else (given,), {})
    image = image_of(arguments)
    graph, _ = copy_graph(net.program.graph)
    inputs, others = _take_out(graph, arguments)
    name = next((name for name, (_, value) in inputs.items() if value is image), "")
    if not name:
        return net, given, "image"
    opened = copy.deepcopy(net)
    opened._program = replace(net.program, graph=graph, signature=_signature(inputs, name, others)).bind_to(
        opened
    )
    return opened, image, name


def further_inputs(net: AdaptiveModel) -> dict[str, Tensor]:
    """Return the tensors of the example that a network takes beside its image, by name; see `open_call`."""
    parameters = net.program.signature.parameters.values()
    return {
        parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, Tensor)
    }


def _holder_of_image(graph: fx.Graph) -> fx.Node | None:
    """Return the input that is a dictionary or list with the image; None if each input is read as a whole."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    return next((node for node in inputs if all(map(_key_of, node.users))), None)


def _key_of(reader: fx.Node) -> tuple[Any] | None:
    """Return the name or number by which a node reads a dictionary or list; None if it does something else."""
    is_read = reader.target is operator.getitem or (reader.op == "call_method" and reader.target == "get")
    return (reader.args[1],) if is_read and isinstance(reader.args[1], (str, int)) else None


def _keys_of(holder: fx.Node) -> list[Any]:
    """Return the names or numbers by which the tensors of a dictionary or list are read."""
    return list(dict.fromkeys(key[0] for reader in holder.users if (key := _key_of(reader))))


def _held(holder: fx.Node, image: Tensor) -> dict[Any, Tensor]:
    """Return the dictionary in which a network takes an image.

    Raises:
        InvalidInput: the network reads more than the image from it.
    """
    keys = _keys_of(holder)
    if len(keys) != 1:
        raise InvalidInput(
            f"the network reads {', '.join(map(repr, keys))} from {holder.target}, and an image is given.",
            next="give what the network is called with, as an example: cs.export(net, {...}, path).",
        )
    return {keys[0]: image}


def _take_out(graph: fx.Graph, arguments: dict[str, Any]) -> tuple[_Inputs, dict[str, Any]]:
    """Let a graph take each tensor that it reads from its arguments as an input of its own; return these by name, and
    the other arguments.

    Raises:
        InvalidInput: it reads something that is no tensor.
    """
    inputs, others = dict[str, tuple[fx.Node, Any]](), dict[str, Any]()
    for source in [node for node in graph.nodes if node.op == "placeholder" and node.target in arguments]:
        value = arguments[str(source.target)]
        if isinstance(value, Tensor):
            inputs[str(source.target)] = (source, value)
        elif isinstance(value, (dict, list, tuple)) and source.users and all(map(_key_of, source.users)):
            for key in _keys_of(source):
                _add_input(graph, source, key, value[key], inputs)
            graph.erase_node(source)
        else:
            others[str(source.target)] = value
    return inputs, others


def _add_input(graph: fx.Graph, source: fx.Node, key: Any, value: Any, inputs: _Inputs) -> None:
    """Let a graph take what it reads from a dictionary or list by a key as an input."""
    if not isinstance(value, Tensor):
        raise InvalidInput(
            f"the network reads {key!r} from {source.target}, which is {describe(value)}; a file takes tensors.",
            next="give it as a tensor, or let the network keep it as an attribute.",
        )
    is_name = isinstance(key, str) and key.isidentifier() and key not in inputs
    name = (
        key if is_name else "image" if value.dim() == 4 and "image" not in inputs else f"input_{len(inputs)}"
    )
    with graph.inserting_before(source):
        taken = graph.placeholder(name)
    for reader in [reader for reader in source.users if _key_of(reader) == (key,)]:
        reader.replace_all_uses_with(taken)
        graph.erase_node(reader)
    inputs[name] = (taken, value)


def _signature(inputs: _Inputs, image: str, others: dict[str, Any]) -> inspect.Signature:
    """Return the signature of a call by name: the image, then all else, with the values as defaults."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {name: value for name, (_, value) in inputs.items() if name != image} | others
    rest = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    return inspect.Signature([inspect.Parameter(image, kind), *rest])
