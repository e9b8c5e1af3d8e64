"""Fold and fuse a rewritten graph for inference: convolutions absorb the operations that follow them.

Batch norm and constant factors and shifts are folded into the weight. A residual and an activation, also one that is
written out, are applied to the result while it is in the cache. Every step is exact in evaluation mode. Operations that
match no pattern are not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.backends.packed import PackedConv, PackedLinear, ScaleShift
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.elements.operations import operation_of
from cadsurgery.following.graphs import (
    Constants,
    Interpreter,
    changes_in_place,
    copy_graph,
    downstream,
    gives,
    only_user,
    read_elsewhere,
    torch_target,
)
from cadsurgery.following.guards import drop_dead_code
from cadsurgery.following.hooks import act_alike, acts_as, child, is_hooked
from cadsurgery.network.idioms import Affine, AppliedOperation, affine_of, name_activations, step_of
from cadsurgery.support import torch_operations
from cadsurgery.surgery.rewrite import ACTS
from cadsurgery.surgery.treatment import Attribute, Call, Treatment, has_rule

# Name of the submodule that holds the fused convolutions of a network.
KERNELS = "cadsurgery_kernels"

# Activations by operation name, or functions from the options of a module or call to the activation.
_ACTIVATIONS: dict[str, Activation | Callable[[Any], Activation]] = {
    "relu": Activation("relu"),
    "relu6": Activation("hardtanh", (0.0, 6.0)),
    "silu": Activation("swish"),
    "hardswish": Activation("hardswish"),
    "sigmoid": Activation("sigmoid"),
    "tanh": Activation("tanh"),
    "hardtanh": lambda options: Activation(
        "hardtanh", (options.get("min_val", -1.0), options.get("max_val", 1.0))
    ),
    "leaky_relu": lambda options: Activation("leaky_relu", (options.get("negative_slope", 0.01),)),
    "gelu": lambda options: Activation("gelu", (), options.get("approximate", "none")),
}
_NORMS_THAT_ACT = ("timm.layers.norm_act:BatchNormAct2d",)
_POINT = Window((1, 1))


@dataclass(frozen=True)
class _Fusion:
    """A convolution and the operations fused into it so far.

    Attributes:
        tail: the last fused node, whose value the convolution now computes.
        weight: the weight with all factors folded in.
        bias: the bias with all factors and shifts folded in.
        groups: channel groups.
        residual: node that is added to the result.
        activation: activation that is applied last.
        leaves: node between convolution and tail that turns elements into the fine map, if any.
        joint: how the residual is joined, see `check_joint`.
        baseline: (O,) result where the original convolution (with bias) gives zero; None for zero.
    """

    tail: fx.Node
    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    residual: fx.Node | None = None
    activation: Activation | None = None
    leaves: fx.Node | None = None
    joint: tuple[int, str] | None = None
    baseline: Tensor | None = None

    @property
    def is_linear(self) -> bool:
        """True if factors can still be folded in."""
        return self.residual is None and self.activation is None

    def scale(self, tail: fx.Node, scale: Tensor, shift: Tensor | None = None) -> _Fusion:
        """Return the fusion followed by a factor and a shift per output channel."""
        wide = scale.double()
        bias = self.bias.double() * wide if self.bias is not None else torch.zeros_like(wide)
        bias = bias + shift.double() if shift is not None else bias
        weight = self.weight.double() * wide.view(-1, *(1,) * (self.weight.dim() - 1))
        has_bias = self.bias is not None or shift is not None
        baseline = self.baseline.double() * wide if self.baseline is not None else torch.zeros_like(wide)
        baseline = baseline + shift.double() if shift is not None else baseline
        return replace(
            self,
            tail=tail,
            baseline=baseline.to(self.weight),
            weight=weight.to(self.weight),
            bias=bias.to(self.weight) if has_bias else None,
        )


class Fuser:
    """Fuses the convolutions of one graph; `graph` is changed, `kernels` is filled."""

    def __init__(
        self, graph: fx.Graph, model: nn.Module, epilogues: bool, kernels: nn.Module | None = None
    ) -> None:
        self.graph, self.model, self.epilogues = graph, model, epilogues
        self.kernels = kernels if kernels is not None else nn.Module()
        self.constants = Constants(Interpreter(model, graph=graph))
        self.numbers = _find_numbers(graph)
        first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.dtype = torch.promote_types(first, torch.float32)  # torch computes norms no narrower

    def meets_nan(self) -> bool:
        """True if values may be NaN for a finite image; values that overflow are not considered."""
        tensors = (*self.model.state_dict().values(), *self.kernels.state_dict().values())
        numbers = all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())
        return not numbers or any(map(self.may_make_nan, self.graph.nodes))

    def may_make_nan(self, node: fx.Node) -> bool:
        """True if an operation may give NaN or infinity for moderate inputs; unknown operations may."""
        module = self.module(node)
        if module is not None:
            ours = type(module).__module__.startswith(("torch.nn.", "cadsurgery."))
            return not ours and not has_rule(module, of_package=True)
        is_call = node.op in ("call_function", "call_method")
        return is_call and torch_operations.may_make_nan(torch_target(node)) and node not in self.numbers

    def run(self) -> None:
        """Remove operations that change nothing, then fuse every convolution and linear layer; none where a value is
        read behind a change in place of another view of it: fused operations would read it at another time."""
        if any(
            changes_in_place(node, self.called) and read_elsewhere(node, self.called)
            for node in self.graph.nodes
        ):
            return
        for node in list(self.graph.nodes):
            self.drop_identity(node)
        if self.epilogues:
            name_activations(self.graph, self.module)
        drop_dead_code(self.graph)
        for node in list(self.graph.nodes):
            if node in self.graph.nodes:
                self.fuse(node)
        drop_dead_code(self.graph)
        for node in list(self.graph.nodes):
            if node in self.graph.nodes:
                self.fuse_factors(node)
        if self.meets_nan():
            for kernel in self.kernels.modules():
                if isinstance(kernel, PackedConv):
                    kernel.meets_nan = True
        drop_dead_code(self.graph)
        if self.epilogues:
            self.order_resizes()
        self.graph.lint()

    def order_resizes(self) -> None:
        """Let each dense resize that is returned give contiguous memory, see `functional.interpolate`."""
        (output,) = self.graph.find_nodes(op="output")
        for node in output.all_input_nodes:
            if node.op not in ("call_function", "call_module") or gives(node, "elements"):
                continue
            called = self.called(node)
            if called is F.interpolate:
                node.target = functional.interpolate
            elif type(called) in (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d):
                names = "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"
                node.op, node.target = "call_function", functional.interpolate
                node.kwargs = {**node.kwargs, **{name: getattr(called, name, None) for name in names}}

    # -- reading the graph -------------------------------------------------------------------------

    def module(self, node: Any) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            first, _, rest = str(node.target).partition(".")
            return (
                self.kernels.get_submodule(rest)
                if first == KERNELS
                else self.model.get_submodule(str(node.target))
            )
        if isinstance(node, fx.Node) and torch_target(node) is None:
            return self.model.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
        return None

    def called(self, node: fx.Node) -> Any:
        """Return the module, function or method that a node calls."""
        module = self.module(node)
        return module if module is not None else torch_target(node)

    def consumer(self, node: fx.Node) -> fx.Node | None:
        """Return the only operation that reads the value of a node, and acts on elements where that is elements, on a
        dense map where it is one; or None."""
        user = only_user(node)
        return user if user is not None and _is_elements(node) == isinstance(user.target, OnRows) else None

    # -- changing the graph ------------------------------------------------------------------------

    def drop_identity(self, node: fx.Node) -> None:
        """Remove a node that does not change its input in evaluation mode."""
        module, step = self.module(node), step_of(node)
        operation = operation_of(node.target)
        is_identity = leaves_values(module) and not is_hooked(module)
        if is_identity and "stage" in node.kwargs:
            node.target, node.args = OnRows(functional.keep), (step.operands[0],)
        elif is_identity or (operation is not None and operation.trains_only) or _keeps_all(node):
            node.replace_all_uses_with(step.operands[0])
            self.graph.erase_node(node)

    def fuse(self, node: fx.Node) -> None:
        """Replace a convolution or linear layer, and all operations that it can absorb, by one node."""
        start = self.start(node)
        if start is None:
            return
        fusion = self.take_in_factors(node, start)
        while (longer := self.extend(node, fusion)) is not None:
            fusion = longer
        if fusion.tail is node and fusion is start and not self.takes_in_more(node):
            return
        with self.graph.inserting_before(fusion.tail):
            fused = self.emit(node, fusion)
            head = node
            if (leaves := fusion.leaves) is not None:
                fused = self.graph.node_copy(leaves, lambda read: fused if read is leaves.args[0] else read)
                head = leaves
        fused.meta.update(fusion.tail.meta)
        if ACTS in head.meta:
            fused.meta[ACTS] = _acts_of_kernel(head, fused)
        fusion.tail.replace_all_uses_with(fused)

    def fuse_factors(self, value: fx.Node) -> None:
        """Replace a batch norm that no convolution absorbs, or several factors and shifts one after the other, by one
        factor and one shift, with the activation behind them."""
        affine, source = self.affine(value) or (None, None)
        if affine is None or source is None or not value.users:
            return
        tail, count, activation = value, 1, None
        while (following := self.consumer(tail)) is not None:
            more, before = self.affine(following) or (None, None)
            if more is None or before is not tail or {affine.axis, more.axis} == {-1, -3}:
                break
            affine, tail, count = affine.then(more), following, count + 1
        if following is not None and self.epilogues and not is_hooked(self.module(following)):
            activation = activation_of(step_of(following), self.module(following))
            tail = following if activation is not None else tail
        if count == 1 and affine_of(step_of(value), self.constants) is not None:
            return
        name = f"k{len(self.kernels._modules)}"
        kernel = ScaleShift(affine.factor.to(self.dtype), affine.shift.to(self.dtype), activation)
        kernel.origin = value.name  # type: ignore[assignment]
        self.kernels.add_module(name, kernel)
        with self.graph.inserting_before(tail):
            if _is_elements(tail):
                held = self.graph.get_attr(f"{KERNELS}.{name}")
                fused = self.graph.call_function(functional.scale_and_shift, (source, held))
            else:
                fused = self.graph.call_module(f"{KERNELS}.{name}", (source, affine.axis == -1))
        fused.meta.update(tail.meta)
        tail.replace_all_uses_with(fused)

    def takes_in_more(self, node: fx.Node) -> bool:
        """True if a convolution can absorb more than norms and factors; torch's transposed convolutions cannot."""
        return self.epilogues and not acts_as(self.module(node), nn.ConvTranspose2d)

    def start(self, node: fx.Node) -> _Fusion | None:
        """Start a fusion with a convolution or linear layer whose weight is constant."""
        module: Any = self.module(node)
        if node.target is functional.conv2d:
            weight, bias = self.constants.get(node.args[1]), self.constants.get(node.args[2])
            groups: Any = node.kwargs.get("groups", 1)
            is_constant = isinstance(weight, Tensor) and (bias is not None or node.args[2] is None)
            return _Fusion(node, weight, bias, groups) if is_constant else None
        if is_hooked(module):
            return None
        if acts_as(module, nn.Conv2d) and module.padding_mode == "zeros" and module.padding != "same":
            return _Fusion(node, module.weight.detach(), _detach(module.bias), module.groups)
        if acts_as(module, nn.ConvTranspose2d) and len(node.args) == 1 and not node.kwargs:
            weight = functional.transpose_weight(module.weight.detach(), module.groups)
            return _Fusion(node, weight, _detach(module.bias), module.groups)
        if acts_as(module, nn.Linear) and self.epilogues:
            weight = module.weight.detach()[:, :, None, None]
            return _Fusion(node, weight, _detach(module.bias)) if "stage" not in node.kwargs else None
        return None

    def extend(self, node: fx.Node, fusion: _Fusion) -> _Fusion | None:
        """Return the fusion with the next operation absorbed; None if that is impossible."""
        user = only_user(fusion.tail)
        if user is not None and user.target is functional.batch_norm:
            affine, _ = self.affine(user) or (None, None)
            return fusion.scale(user, *affine[:2]) if affine is not None and fusion.is_linear else None
        if user is not None and _is_fine_map_of(user, node):
            return replace(fusion, tail=user, leaves=user)
        following = self.consumer(fusion.tail)
        if following is None:
            return None
        step, module = step_of(following), self.module(following)
        if is_hooked(module):
            return None
        stated = torch_operations.operation_of(step.target if module is None else module)
        if fusion.is_linear and (longer := self.with_factor(fusion, following)) is not None:
            return longer
        if fusion.activation is not None or not self.takes_in_more(node):
            return None
        if stated is not None and stated.adds and fusion.residual is None and fusion.leaves is None:
            return self.with_residual(node, fusion, following)
        activation = activation_of(step, module)
        if activation is None or step.operands != (fusion.tail,):
            return None
        return replace(fusion, tail=following, activation=activation)

    def with_factor(self, fusion: _Fusion, following: fx.Node) -> _Fusion | None:
        """Fold in constant factors and shifts, such as layer scale."""
        affine, source = self.affine(following) or (None, None)
        channels = fusion.weight.shape[0]
        if affine is None or source is not fusion.tail or not affine.fits(channels):
            return None
        # On a dense map, a factor without its other axes would not tell which axis is the channels'.
        of_linear = acts_as(self.module(fusion.tail), nn.Linear)
        if not _is_elements(following) and affine.axis not in (None, -1 if of_linear else -3):
            return None
        return fusion.scale(following, affine.factor.expand(channels), affine.shift.expand(channels))

    def take_in_factors(self, node: fx.Node, fusion: _Fusion) -> _Fusion:
        """Fold constant factors and shifts of what a 1x1 convolution reads, and nothing else, into its weight."""
        weight, groups = fusion.weight, fusion.groups
        channels = weight.shape[1] * groups
        while self.is_point(node, weight):
            value: Any = node.args[0]
            affine, source = self.affine(value) or (None, None)
            if affine is None or source is None or len(value.users) != 1:
                break
            if affine.axis == -1 or not affine.fits(channels):
                break
            factor, shift = (
                part.expand(channels).view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
                for part in (affine.factor, affine.shift)
            )
            wide = weight.double()
            more = (wide.flatten(1) * shift).sum(1)
            bias = more if fusion.bias is None else fusion.bias.double() + more
            weight = (wide * factor.view(*wide.shape)).to(weight)
            fusion = replace(fusion, weight=weight, bias=bias.to(weight))
            node.replace_input_with(value, source)
            drop_dead_code(self.graph)
        return fusion

    def is_point(self, node: fx.Node, weight: Tensor) -> bool:
        """True if a node is a 1x1 convolution that reads no padding."""
        if tuple(weight.shape[2:]) != (1, 1) or len(node.users) == 0:
            return False
        if node.target is functional.conv2d:
            window: Any = node.kwargs.get("window", _POINT)
            return window.finer == 1 and not any(window.padding)
        module: Any = self.module(node)
        return acts_as(module, nn.Conv2d) and not any(module.padding)

    def affine(self, value: fx.Node) -> tuple[Affine, fx.Node] | None:
        """Return factor and shift if a value (elements or a dense map) is another one with norm, constant factor or
        shift, and that other one."""
        if value in self.numbers:
            return None
        step = step_of(value)
        module, norm = self.module(value), None
        if value.target is functional.batch_norm:
            norm = self.constants.get(value.kwargs.get("norm", value.args[-1]))
        elif acts_as(module, nn.BatchNorm2d, nn.SyncBatchNorm):
            norm = module
        if norm is None:
            written = affine_of(step, self.constants) if module is None else None
            return written if "stage" not in value.kwargs else None
        source: Any = step.operands[0]
        is_fixed = norm.running_mean is not None and norm.running_var is not None and not is_hooked(norm)
        return (Affine(*_factors_of(norm), -3), source) if is_fixed else None

    def with_residual(self, node: fx.Node, fusion: _Fusion, following: fx.Node) -> _Fusion | None:
        """Absorb the addition of another map on the same lattice."""
        other, stage = _other_operand(step_of(following), fusion.tail), following.kwargs.get("stage")
        joint: Any = None
        if isinstance(following.target, OnRows):
            own = node.kwargs.get("stage")
            fits = _is_elements(other) and (None in (own, stage) or own == stage)
            joint = following.target.joint
        else:
            fits = other is not None and self.constants.get(other) is None
        return replace(fusion, tail=following, residual=other, joint=joint) if fits else None

    def emit(self, node: fx.Node, fusion: _Fusion) -> fx.Node:
        """Add the fused node to the graph."""
        module: Any = self.module(node)
        name = f"k{len(self.kernels._modules)}"
        path = f"{KERNELS}.{name}"
        parts = (fusion.weight, fusion.bias, fusion.groups, fusion.activation)
        is_linear = acts_as(module, nn.Linear)
        on_elements = _is_elements(node)
        kernel: nn.Module
        if on_elements:
            kernel = PackedConv(*parts)
        elif not self.takes_in_more(node):
            kernel = _fold_convolution(module, fusion)
        elif is_linear:
            kernel = PackedLinear(*parts)
        else:
            padding = (0, 0) if module.padding == "valid" else module.padding
            kernel = PackedConv(*parts, (module.stride, padding, module.dilation))
        kernel.origin = node.name  # type: ignore[assignment]
        kernel.register_buffer("baseline", fusion.baseline, persistent=False)
        if isinstance(kernel, PackedConv):
            self.share_weight(kernel)
        self.kernels.add_module(name, kernel)
        if not on_elements:
            more = (fusion.residual,) if fusion.residual is not None else ()
            return self.graph.call_module(path, (node.args[0], *more))
        source: Any = step_of(node).operands[0]
        stated = {name: node.kwargs[name] for name in ("window", "stage", "size") if name in node.kwargs}
        options: dict[str, Any] = {"window": _POINT, "stage": None} | stated
        if not self.epilogues:
            tensors = [self.graph.get_attr(f"{path}.{part}") for part in ("weight", "bias")]
            options["groups"] = fusion.groups
            return self.graph.call_function(functional.conv2d, (source, *tensors), options)
        if fusion.joint is not None:
            options["joint"] = fusion.joint
        weights = self.graph.get_attr(path)
        return self.graph.call_function(functional.fused_conv2d, (source, weights, fusion.residual), options)

    def share_weight(self, kernel: PackedConv) -> None:
        """Give a kernel the equal weight of an earlier one, as two graphs of one network have it."""
        for other in self.kernels.children():
            if isinstance(other, PackedConv) and _are_equal(other.weight, kernel.weight):
                kernel.weight = other.weight
                return


def fuse(
    graph: fx.Graph, model: nn.Module, epilogues: bool = True, kernels: nn.Module | None = None
) -> tuple[fx.Graph, nn.Module]:
    """Return a graph with fused convolutions, and the module `KERNELS` that holds them; the graph does not change.

    Args:
        graph: rewritten graph of a network in evaluation mode.
        model: the network with the modules and parameters of the graph.
        epilogues: True also fuses residuals and activations and packs weights; False only folds batch norm and factors.
        kernels: the module of another graph of the same network, which gets this one's kernels as well; equal weights
            are shared.
    """
    fuser = Fuser(copy_graph(graph)[0], model, epilogues, kernels)
    fuser.run()
    return fuser.graph, fuser.kernels


def split_norms(graph: fx.Graph, net: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """Split norms with a built-in activation into norm and activation, so that both can be fused.

    Args:
        graph: the graph, which is copied.
        net: a copy of the network in evaluation mode; it gets the plain norms.

    Returns:
        The new graph, and the name of the norm's node for each new activation node.
    """
    copied, acts = copy_graph(graph)[0], dict[str, str]()
    for node in list(copied.nodes):
        module: Any = child(net, str(node.target)) if node.op == "call_module" else None
        kinds = act_alike(type(module)) if module is not None else ()
        names = {f"{kind.__module__}:{kind.__name__}" for kind in kinds}
        if names.isdisjoint(_NORMS_THAT_ACT) or is_hooked(module):
            continue
        norm = nn.BatchNorm2d(module.num_features, module.eps, device="meta")
        norm._parameters, norm._buffers = dict(module._parameters), dict(module._buffers)
        module.add_module("norm", norm.eval())
        with copied.inserting_after(node):
            act = copied.call_module(f"{node.target}.act", (node,))
        if ACTS in node.meta:
            act.meta[ACTS] = node.meta[ACTS] = replace(node.meta[ACTS], then=())
        node.replace_all_uses_with(act, lambda user, act=act: user is not act)
        node.target = f"{node.target}.norm"
        acts[act.name] = node.name
    return copied, acts


def _find_numbers(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are computed only from sizes."""

    def asks(node: fx.Node) -> bool:
        stated = operation_of(node.target)
        return torch_operations.asks(node) or (stated is not None and stated.reads == "nothing")

    return downstream(graph.nodes, asks, only=True)


def _other_operand(step: AppliedOperation, value: fx.Node) -> fx.Node | None:
    """Return the second operand of a binary operation (elements or a map); None if the operation overwrites it."""
    if (
        len(step.operands) != 2
        or step.options
        or not all(isinstance(part, fx.Node) for part in step.operands)
    ):
        return None
    first, second = step.operands
    if first is second or (torch_operations.is_in_place(step.target) and first is not value):
        return None
    return second if first is value else first


def _is_elements(node: Any) -> bool:
    """True if a node's value is `Elements`."""
    return gives(node, "elements")


def _acts_of_kernel(head: fx.Node, kernel: fx.Node) -> Treatment:
    """Return how a fused node acts: as its first operation, with the parameters of the kernel."""
    acts: Treatment = head.meta[ACTS]

    def moved(value: Any) -> Any:
        if isinstance(value, Call):
            return replace(value, args=tuple(map(moved, value.args)))
        is_held = head.op == "call_module" and isinstance(value, Attribute)
        return Attribute(value.path.replace(f"{head.target}.", f"{kernel.target}.", 1)) if is_held else value

    return replace(acts, arguments=tuple((name, moved(value)) for name, value in acts.arguments))


def _keeps_all(node: fx.Node) -> bool:
    """True if elements are those of the operand, on the same lattice."""
    return node.target == OnRows(functional.keep) and "stage" not in node.kwargs


def _is_fine_map_of(node: fx.Node, convolution: fx.Node) -> bool:
    """True if a node turns the elements of a convolution at stage 0 into the fine map. Each such element is one pixel,
    so that later pointwise operations can be applied before."""
    of_pixels = convolution.target is functional.conv2d and bool(convolution.kwargs.get("stage") == 0)
    return of_pixels and node.target is functional.to_dense and tuple(node.args[1:]) in ((), (1,))


def leaves_values(module: nn.Module | None) -> bool:
    """True if a module is the identity in evaluation mode."""
    alike = (torch_operations.operation_of(kind) for kind in act_alike(type(module)))
    return any(operation is not None and operation.keeps_values for operation in alike)


def activation_of(step: AppliedOperation, module: nn.Module | None) -> Activation | None:
    """Return the activation that an operation applies to its only operand, or None."""
    options = vars(module) if module is not None else step.options
    stated = {"inplace", "approximate", "negative_slope", "min_val", "max_val"}
    if len(step.operands) != 1 or not set(step.options) <= stated:
        return None
    kinds = act_alike(type(module)) if module is not None else (step.target,)
    names = (known.name for kind in kinds if (known := torch_operations.operation_of(kind)) is not None)
    entry = next((_ACTIVATIONS[name] for name in names if name in _ACTIVATIONS), None)
    return entry(options) if callable(entry) else entry


def _factors_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift per channel of a batch norm with running statistics."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale * norm.weight.detach().double() if norm.weight is not None else scale
    shift = -norm.running_mean.double() * scale
    shift = shift + norm.bias.detach().double() if norm.bias is not None else shift
    return scale, shift


def _fold_convolution(module: nn.Conv2d | nn.ConvTranspose2d, fusion: _Fusion) -> nn.Module:
    """Return the convolution with its folded weight, in the memory layout that is fastest in torch."""
    folded = copy.copy(module)
    weight = fusion.weight.contiguous(memory_format=torch.channels_last)
    if isinstance(module, nn.ConvTranspose2d):
        weight = functional.transpose_weight(fusion.weight, fusion.groups).contiguous()
    bias = nn.Parameter(fusion.bias, False) if fusion.bias is not None else None
    folded._parameters = {"weight": nn.Parameter(weight, False), "bias": bias}
    return folded


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """True if tensors are equal; most that differ do so in their first value."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(first.flatten()[0] == second.flatten()[0]) and torch.equal(first, second)


def _detach(value: Tensor | None) -> Tensor | None:
    return value.detach() if value is not None else None
