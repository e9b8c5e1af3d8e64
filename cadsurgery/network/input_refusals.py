"""Explain why a network does not accept an image: its type, device, number of channels or size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.functional import to_elements
from cadsurgery.following.graphs import torch_target
from cadsurgery.following.hooks import parameter
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, describe_error, first_line
from cadsurgery.support.memory import is_out_of_memory
from cadsurgery.surgery.rewrite import ask_mask


def misfit(
    net: nn.Module, graph: fx.Graph, image: Tensor, error: Exception, channels: int
) -> InvalidInput | None:
    """Return the error for an image batch of a wrong device, type or number of channels; None if these are right.

    Args:
        net: the network.
        graph: its rewritten graph, which tells how the image is used.
        image: the image batch of the call.
        error: the error that the call raised.
        channels: channels of the image at conversion; a network that checks them itself accepts no others.
    """
    if refusal := wrong_for_weights(net, graph, image):
        return refusal
    first = first_value(net)
    if image.shape[1] != channels:
        return _wrong_channels(image, channels)
    is_read = next(_readers(net, graph), None) is not None
    if is_read or first is None or (image.dtype == first.dtype and image.device == first.device):
        return None
    return InvalidInput(
        f"the network does not run on {describe(image)} on {image.device}.",
        why=first_line(error),  # the network changes the image first; only its own error tells more
        next=f"give images like those of the conversion; it computes in {_name(first.dtype)} on {first.device}.",
    )


def wrong_for_weights(net: nn.Module, graph: fx.Graph, image: Tensor) -> InvalidInput | None:
    """Return the error for an image batch of another device, type or number of channels than the weights that read it;
    None if it fits. Compiled kernels and packed weights cannot tell by themselves."""
    for weight, groups in _readers(net, graph):
        if image.device != weight.device and not weight.is_meta:  # a network on meta tensors only counts
            return InvalidInput(
                f"the image is on {image.device}, the network on {weight.device}.",
                next=f'bring them together: image.to("{weight.device}"), or net.to("{image.device}").',
            )
        if refusal := wrong_type(image, weight.dtype):
            return refusal
        if weight.dim() == 4 and image.shape[1] != weight.shape[1] * groups:
            return _wrong_channels(image, weight.shape[1] * groups)
    return None


def wrong_size(image: Tensor, example: tuple[int, ...], low: int, error: Exception) -> InvalidInput | None:
    """Return the error for an image of a size that the network refuses; None for the size of the conversion.

    Args:
        image: the image batch of the call.
        example: shape of the image at conversion.
        low: the lowest output stride.
        error: the error that the call raised, which is the original's own.
    """
    if "Inference tensors cannot be saved" in str(error):
        return InvalidInput(
            "a tensor that was made in torch.inference_mode() cannot be part of training.",
            why=first_line(error),
            next="make images and weights outside of that mode (image.clone()), or call under torch.no_grad().",
        )
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if is_out_of_memory(error):
        return InvalidInput(
            f"there is not enough memory for an image of {image.shape[2]} x {image.shape[3]} pixels.",
            why=first_line(error),
            next='compute it in bands, net.optimize(memory="1.5GiB") or cadsurgery run --memory 1.5GiB; or give a '
            "smaller image.",
        )
    if image.shape[2:] == example[2:]:
        return None
    return InvalidInput(
        f"the network does not run on an image of {image.shape[2]} x {image.shape[3]} pixels.",
        why=describe_error(error),
        next=f"resize or pad the images to sizes that the original takes, such as multiples of {low}; the conversion's "
        f"was {example[2]} x {example[3]}.",
    )


def first_value(net: nn.Module) -> Tensor | None:
    """Return the first parameter or buffer of real numbers; None of a network without any."""
    values = chain(net.parameters(), net.buffers())  # an optimised copy holds its weights in buffers
    return next((value for value in values if value.is_floating_point()), None)


def wrong_type(image: Tensor, dtype: torch.dtype) -> InvalidInput | None:
    """Return the error for an image of another type than the network's, or None."""
    given, expected = _name(image.dtype), _name(dtype)
    if not image.is_floating_point():
        return InvalidInput(
            f"the image holds {given} values, the network computes in {expected}.",
            why="it expects an image that is scaled and normalised.",
            next="for a picture in 0..255: "
            f"cadsurgery.images.normalise(image.to(torch.{expected}) / 255, net.source).",
        )
    if image.dtype == dtype or torch.is_autocast_enabled(image.device.type):
        return None
    return InvalidInput(
        f"the image is {given}, the network {expected}.",
        next=f"give it in the network's type, image.to(torch.{expected}), or convert the network: "
        f"net.to(torch.{given}).",
    )


def _wrong_channels(image: Tensor, channels: int) -> InvalidInput:
    if image.shape[3] == channels:
        hint = "the channels come second: image.permute(0, 3, 1, 2)."
    elif image.shape[1] == 1 and channels == 3:
        hint = "for a grey image: image.expand(-1, 3, -1, -1)."
    elif image.shape[1] == 3 and channels == 1:
        hint = "for a colour image, before it is normalised: cadsurgery.images.as_channels(image, 1) makes it grey."
    elif image.shape[1] == 4 and channels == 3:
        hint = "leave out transparency: image[:, :3]."
    else:
        hint = "give an image batch (batch, channels, height, width) as the network was made for."
    count = f"{image.shape[1]} channel{'s' * (image.shape[1] != 1)}"
    return InvalidInput(
        f"the image has {count}, the network takes {channels}.",
        where=f"an image batch of shape {tuple(image.shape)}",
        next=hint,
    )


def _readers(net: nn.Module, graph: fx.Graph) -> Iterator[tuple[Tensor, int]]:
    """Yield weight and groups of each operation that reads the image directly."""
    image: Any = next((node.args[1] for node in graph.nodes if node.target is ask_mask), None)
    waiting = [(image, user) for user in image.users] if image is not None else []
    for source, node in waiting:
        if node.target is to_elements:
            waiting += [(node, user) for user in node.users]
            continue
        if not node.args or node.args[torch_target(node) is None] is not source:
            continue
        owner = _owner(net, node)
        weight = owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)
        if isinstance(weight, Tensor):
            yield weight, int(node.kwargs.get("groups") or getattr(owner, "groups", 1))


def _owner(net: nn.Module, node: fx.Node) -> Any:
    """Return the module or tensor that an operation applies to its first argument, or None."""
    if node.op == "call_module":
        return net.get_submodule(str(node.target))
    place = 0 if torch_target(node) is None else 1
    operand = node.args[place] if node.op == "call_function" and len(node.args) > place else None
    if not isinstance(operand, fx.Node):
        return None
    if operand.target is parameter:
        operand = operand.all_input_nodes[0].all_input_nodes[0]  # the module before `prepare_weights`
    holder, _, name = str(operand.target).rpartition(".")
    return getattr(net.get_submodule(holder), name, None) if operand.op == "get_attr" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
