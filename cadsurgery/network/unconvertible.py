"""Refuse modules that cannot be converted, and say what to pass instead."""

from __future__ import annotations

from itertools import chain

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.torch_internals import OpOverload

# torch's wrapper modules and the attribute that holds the network; by name, because some take seconds to import.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
# Packages of torch's quantised modules, and of those that prepare for them.
_QUANTISED = (
    *("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", "torch.ao.nn.sparse"),
    "torch.ao.quantization",
)
# Packages among them that compute in floats: modules fused before quantisation; dynamic ones, whose inputs and outputs
# are floats.
_IN_FLOATS = (
    "torch.ao.nn.intrinsic.modules",
    *("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic"),
    "torch.ao.nn.sparse.quantized.dynamic",
)
# What torchvision's quantizable networks hold before they are quantised: plain arithmetic, and modules that do nothing.
_OF_FLOATS = ("FloatFunctional", "FXFloatFunctional", "QuantStub", "DeQuantStub", "QuantWrapper")


def check_network(model: object) -> nn.Module:
    """Check that an object is an ordinary network, and return it.

    Raises:
        InvalidInput: it is not a network.
        CannotConvert: it wraps the network, is compiled, scripted, exported, quantised or converted, or has no values.
    """
    if not isinstance(model, nn.Module):
        network = "the network that was exported" if hasattr(model, "graph_module") else "a torch.nn.Module"
        raise InvalidInput(
            f"{model!r:.60} is not a network.",
            next=f"pass {network}; cs.build_model(name) makes one by name.",
        )
    for path, module in model.named_modules():
        where = f"module {path} of {type(model).__name__}" if path else ""
        if what := _quantisation(module):
            whole = "pass the network as it was before quantisation, in floating point."
            raise CannotConvert(f"{type(module).__name__} {what}.", where=where, next=whole)
        if reason := _reason(module):
            what, next = reason
            inner = f"put the module it was made from in its place: model.{path} = ..."
            raise CannotConvert(f"{type(module).__name__} {what}.", where=where, next=inner if path else next)
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise CannotConvert(
                f"{type(model).__name__} has parameters without a shape.",
                where=name,
                next="call it on an image first, which gives its lazy modules their shapes.",
            )
        if value.is_meta:
            raise CannotConvert(
                f"{type(model).__name__} is on the meta device: it has shapes and no values.",
                where=name,
                next='give it values first: model.to_empty(device="cpu"), then model.load_state_dict(...).',
            )
    return model


def _reason(module: nn.Module) -> tuple[str, str] | None:
    """Return why a module cannot be converted and what to do about it, or None."""
    if isinstance(module, AdaptiveModel):
        return (
            "is converted already",
            "pass the original network; another mask needs no conversion: net.mask = ..., or net(x, mask=...).",
        )
    if method := getattr(type(module), "converted_by", ""):  # a class of cadsurgery.methods
        return f"was made by {method}", "pass the network it was made from."
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if wrapper := next((name for name in _WRAPPERS if name in kinds), None):
        return "wraps the network", f"pass model.{_WRAPPERS[wrapper]}, and wrap what cs.adaptify gives."
    if isinstance(module, torch.jit.ScriptModule):
        return ("is a TorchScript program", "pass the network it was scripted or traced from.")
    if isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, OpOverload) for node in module.graph.nodes
    ):
        return ("is an exported program", "pass the network that was exported.")
    return None


def _quantisation(module: nn.Module) -> str:
    """Return what a module has to do with quantisation; "" for one that computes in floats."""
    kind, place = type(module).__name__, type(module).__module__
    of_floats = place.startswith(_IN_FLOATS) or "PackedParams" in kind or kind in _OF_FLOATS
    if of_floats or not place.startswith(_QUANTISED):
        return ""
    prepares = place.startswith(("torch.ao.quantization", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat"))
    return "prepares a network to be quantised" if prepares else "is quantised"
