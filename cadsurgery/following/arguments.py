"""Handle the arguments of a call, by parameter name as Python binds them.

A network may take more than an image, and its image may be inside a list or dictionary. The image is the first tensor
with four axes.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from cadsurgery.following.call_entry import call_alone, signature_of
from cadsurgery.support.errors import InvalidInput, first_line
from cadsurgery.support.torch_internals import tree_leaves, tree_map_only

Arguments = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

_PLAIN = (bool, int, float, str, type(None))
# Values that Python code compares and never computes with: a graph has them as constants.
_CONSTANTS = (
    bool,
    str,
    bytes,
    type(None),
    Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def bind(model: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
    """Return the arguments of a call by name, without defaults.

    Raises:
        InvalidInput: the network does not accept these arguments.
    """
    try:
        return dict(signature_of(model).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InvalidInput(
            f"{type(model).__name__} is not called with these arguments.",
            why=first_line(error),
            next="give those of a call: a tensor, a tuple of positional arguments, or a dictionary of named ones. A "
            "list or dictionary that is an argument itself goes into a tuple: example_input=({...},).",
        ) from error


def bind_all(signature: inspect.Signature, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call by name, with defaults."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def contain(output: Any, container: type) -> Any:
    """Convert a graph's output to the original's type if it is a dictionary subclass or a dataclass."""
    if not isinstance(output, dict):
        return output
    return container(**output) if is_dataclass(container) else container(output)


def take_image(model: nn.Module, image: Any) -> Arguments:
    """Return the arguments of a call with an image as the network's first required argument, or its first one."""
    parameters = list(signature_of(model).parameters.values())
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    needed = (parameter for parameter in named if parameter.default is parameter.empty)
    first = next(needed, next(iter(named or parameters), None))
    if first is None:
        return {"image": image}
    return {first.name: (image,) if first.kind is first.VAR_POSITIONAL else image}


# -- what is known of the arguments while a network is traced ------------------------------------------


class _UnknownArgument:
    """Stands for an argument of which nothing is known."""


_UNKNOWN = _UnknownArgument()


@dataclass(frozen=True)
class Inputs:
    """The inputs of a network.

    Attributes:
        signature: signature of its forward.
        values: the arguments of a call by name, with defaults, as far as they are known.
    """

    signature: inspect.Signature
    values: Arguments

    @classmethod
    def of(cls, model: nn.Module, example: Arguments | None = None) -> Self:
        """Return the inputs of a network for a call like the example; by default for one with an image alone."""
        signature = signature_of(model)
        call = signature.bind_partial()
        call.arguments.update(take_image(model, _UNKNOWN) if example is None else example)
        call.apply_defaults()
        return cls(signature, dict(call.arguments))

    @property
    def kinds(self) -> dict[str, Any]:
        """The kind of each argument, see `argument_kind`."""
        return kinds_of(self.values)

    def placeholders(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield name and default of each input, in a tuple that is empty without one; first the inputs without."""
        kinds = inspect.Parameter
        none: dict[Any, tuple[Any, ...]] = {kinds.VAR_POSITIONAL: ((),), kinds.VAR_KEYWORD: ({},)}
        pairs = [
            (name, none.get(one.kind) or (() if one.default is one.empty else (one.default,)))
            for name, one in self.signature.parameters.items()
        ]
        yield from sorted(pairs, key=lambda pair: len(pair[1]))

    def call(self, values: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments of a call with these values, without those that are defaults: code
        around a forward may set these by name."""
        parameters = self.signature.parameters
        kinds = {one.kind for one in parameters.values()}
        can_leave_out = inspect.Parameter.VAR_POSITIONAL not in kinds
        bound = self.signature.bind_partial()
        bound.arguments.update(
            {
                name: values[name]
                for name, one in parameters.items()
                if not (can_leave_out and values[name] is one.default)
            }
        )
        return bound.args, bound.kwargs

    def open(self, name: str, proxy: Any) -> Any:
        """Return what Python code gets for an input: containers with proxies in them, constants as they are."""
        return _opened(self.values.get(name, _UNKNOWN), proxy)


def _opened(value: Any, proxy: Any) -> Any:
    if isinstance(value, _CONSTANTS):
        return value
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _opened(part, proxy[key])) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        parts = (_opened(part, proxy[index]) for index, part in enumerate(value))
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return proxy


def has_numbers(arguments: Arguments) -> bool:
    """True if a number is among the arguments."""
    leaves = tree_leaves(arguments)
    return any(isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool) for leaf in leaves)


def kinds_of(arguments: Arguments) -> dict[str, Any]:
    """Return the kind of each argument by name."""
    return {name: argument_kind(value) for name, value in arguments.items()}


def argument_kind(value: Any) -> Any:
    """Return all that Python code may ask of an argument without a guard on it: its class, keys and length, the value
    of what is no number; of a tensor how many axes it has, and an image's channels."""
    if isinstance(value, Tensor):
        return Tensor, value.dim(), value.shape[1] if value.dim() == 4 else 0
    if isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((key, argument_kind(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(argument_kind, value))
    return type(value)


def bind_example(model: nn.Module, example: object) -> Arguments:
    """Return the arguments that `example_input` stands for: an image, a tuple of arguments, or a dictionary.

    Raises:
        InvalidInput: another type, or values that cannot be stored in a file.
    """
    if isinstance(example, tuple):
        arguments = bind(model, *example)
    elif isinstance(example, dict) and all(isinstance(name, str) for name in example):
        arguments = bind(model, **example)
    else:
        try:
            arguments = bind(model, example)
        except InvalidInput:  # the image may be a keyword-only argument
            if not isinstance(example, Tensor):
                raise
            arguments = bind(model, **take_image(model, example))
    for value in arguments.values():
        _check_plain(value)
    return arguments


def _check_plain(value: Any) -> None:
    parts: Iterable[Any] = value.values() if type(value) is dict else value
    if type(value) in (list, tuple, dict):
        for part in parts:
            _check_plain(part)
    elif not isinstance(value, (Tensor, *_PLAIN)):
        raise InvalidInput(
            f"example_input holds {value!r:.60}, of type {type(value).__name__}.",
            next="give tensors, numbers and texts, by themselves or in lists, tuples and dictionaries.",
        )


def image_of(arguments: Arguments) -> Any:
    """Return the image of a call: its first tensor with four axes, or its first argument if there is none."""
    first = next(iter(arguments.values()), None)
    if isinstance(first, Tensor) and first.dim() == 4:
        return first
    images = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim() == 4)
    return next(images, first)


def change_images(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Apply a change to the image and to all other inputs (B, C, H, W) of the same height and width."""
    size = image_of(arguments).shape[-2:]

    def changed(value: Tensor) -> Tensor:
        return change(value) if value.dim() == 4 and value.shape[-2:] == size else value

    return dict(tree_map_only(Tensor, changed, arguments))


def crop(image: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left part of an image."""
    return image[..., :height, :width].contiguous()


def part_of(arguments: Arguments, height: int, width: int) -> Arguments:
    """Return a call with the upper left part of its first image, and what is given for each image for the first."""
    batch = len(image_of(arguments))

    def first(value: Tensor) -> Tensor:
        return value[:1] if value.dim() and len(value) == batch else value

    cropped = change_images(arguments, lambda image: crop(image, height, width))
    return dict(tree_map_only(Tensor, first, cropped))


def with_other_values(arguments: Arguments) -> Arguments:
    """Return a call with other values in its tensors, of the same sizes and types."""

    def change(value: Tensor) -> Tensor:
        return value.flip(tuple(range(value.dim()))) / 2 + 0.125 if value.is_floating_point() else value

    return dict(tree_map_only(Tensor, change, arguments))


def with_another_batch(arguments: Arguments) -> Arguments:
    """Return a call without its last image, or with a single image twice, and with what is given for each image."""
    batch = len(image_of(arguments))

    def change(value: Tensor) -> Tensor:
        if not value.dim() or len(value) != batch:
            return value
        return value[:-1] if batch > 1 else torch.cat([value, value])

    return dict(tree_map_only(Tensor, change, arguments))


def with_other_numbers(arguments: Arguments) -> Arguments:
    """Return a call with other numbers among its arguments; tensors and truth values stay."""

    def change(value: Any) -> Any:
        return value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.5

    return dict(tree_map_only((int, float), change, arguments))


def widen(arguments: Arguments) -> Arguments:
    """Convert the arguments to double precision."""
    return dict(tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments))


class AnyLayout(TorchFunctionMode):
    """Replace `view` by `reshape` in the block: maps computed from our weight layouts may not be viewable."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, with `reshape` in place of `view`."""
        if func is Tensor.view and len(args) > 1 and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


def outside_inference_mode(make: Callable[P, T]) -> Callable[P, T]:
    """Let a function that makes a network do so outside of `torch.inference_mode`, without gradients: what is made in
    that mode cannot be trained afterwards."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, _with_history, (args, kwargs))
            return make(*args, **kwargs)

    return made


def _with_history(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def run_forward(model: nn.Module, arguments: Arguments) -> Any:
    """Call a network, without the hooks of the network itself, which are not part of its graph."""
    with AnyLayout():
        return call_alone(model, tree_map_only(Tensor, Tensor.clone, arguments))


def in_order(graph: fx.Graph, arguments: Arguments, *first: Any) -> list[Any]:
    """Return the values of a graph's inputs in order, with defaults for missing arguments, after the values `first`."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"][len(first) :]
    given = (arguments.get(str(node.target), node.args[0] if node.args else None) for node in inputs)
    return [*first, *given]


def describe_call(model: nn.Module, arguments: Arguments) -> str:
    """Describe types and shapes of the arguments as JSON; "" if the call has only an image."""
    image = image_of(arguments)
    is_alone = image is next(iter(arguments.values()))
    if is_alone and take_image(model, image).keys() == arguments.keys():
        return ""
    return json.dumps({name: _plain(value) for name, value in arguments.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {str(name): _plain(part) for name, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plain(part) for part in value]}
    return {"value": value}


def example_of(description: str, device: str = "cpu") -> Arguments:
    """Build arguments from the JSON of `describe_call`, filled with zeros; on the meta device without values.

    Raises:
        Exception: of several types, if the text is not such a description.
    """
    return {name: _from_plain(part, device) for name, part in json.loads(description).items()}


def values_of(description: str) -> int:
    """Return the total number of values in the tensors of `example_of`, without allocating them.

    Raises:
        Exception: see `example_of`.
    """
    tensors = tree_leaves(example_of(description, "meta"))
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))


def _from_plain(part: Any, device: str) -> Any:
    if "tensor" in part:
        dtype = getattr(torch, part["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a type {part['dtype']!r:.60}")
        return torch.zeros([int(length) for length in part["tensor"]], dtype=dtype, device=device)
    if "dict" in part:
        return {name: _from_plain(value, device) for name, value in part["dict"].items()}
    if "list" in part or "tuple" in part:
        values = [_from_plain(value, device) for value in part.get("list", part.get("tuple"))]
        return values if "list" in part else tuple(values)
    return part["value"]
