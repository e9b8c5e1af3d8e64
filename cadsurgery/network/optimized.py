"""The inference copy of an adaptive network: folded, fused, packed."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.backends.integer import form_here
from cadsurgery.network.fuse import KERNELS, fuse, join_pairs, split_norms
from cadsurgery.network.macs import meta_copy
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import Program
from cadsurgery.network.quantise import quantise
from cadsurgery.support.errors import CadWarning, InvalidInput, UnknownName
from cadsurgery.surgery.guards import GuardFailed, is_guard
from cadsurgery.surgery.hooks import Watched, child, freeze_computed_weights, take_over

PRECISIONS = (FLOAT := "float", "int8")


class OptimizedModel(AdaptiveModel):
    """An adaptive network for inference only; see `AdaptiveModel.optimize`. Any number of threads may call it."""

    def __init__(self, net: AdaptiveModel, epilogues: bool, pairs: bool = True) -> None:
        """Fuse the graph of `net` and copy what is left of its modules; `pairs`: also convolutions with each other, see
        `PackedPair`."""
        source = copy.deepcopy(net).eval().requires_grad_(False)
        used = (str(node.target) for node in source.graph.nodes if node.op in ("call_module", "get_attr"))
        freeze_computed_weights(source, {"", *used})
        for module in source.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        root = nn.Module()
        for kind in ("_modules", "_parameters", "_buffers"):
            vars(root)[kind].update(vars(source)[kind])
        for name in source._constants.keys() - source._parameters.keys():
            root.register_buffer(name, getattr(source.program.names(), name))
        graph, kernels = fuse(split_norms(source.graph, root)[0], root, epilogues)
        if pairs:
            join_pairs(graph, kernels)
        root.add_module(KERNELS, kernels)
        fused = fx.GraphModule(root, graph)  # it copies what the graph uses and leaves the rest
        left = [one for one in source.program.watched if child(fused, one.path) is not None]
        watched = tuple(Watched.of(fused, one.path, one.is_called) for one in left)
        program = replace(source.program, graph=graph, unchanged=None, watched=watched, is_fused=True)
        super().__init__(fused, program, source.mask)
        take_over(self, source)
        # Calls that take another way need its weights as they were before they were folded.
        self._unfused: tuple[AdaptiveModel, ...] = ()
        if any(map(is_guard, graph.nodes)):
            self._unfused = (copy.deepcopy(net).eval().requires_grad_(False),)
        self._epilogues = epilogues
        self.register_load_state_dict_post_hook(_forget_other_ways)
        data = {name: value for name, value in vars(net._original[0]).items() if _is_data(name, value)}
        self._original = (SimpleNamespace(**data),)  # type: ignore[assignment]
        self._counted = (meta_copy(net),)
        self.checks, self.source, self._unit = net.checks, net.source, net._unit
        self.training = False

    @torch.compiler.disable(reason="an optimised network is not compiled: compile the one it was made from")
    def forward(self, *args: Any, mask: object = None, **kwargs: Any) -> Any:
        """Run the network as the original is called; see `AdaptiveModel.forward`. torch.compile leaves it as it is."""
        with torch.no_grad():
            return super().forward(*args, mask=mask, **kwargs)

    @property
    def counted(self) -> Program:
        """That of the network it was made from."""
        return self._counted[0].program

    def _counted_on(self, way: Program) -> Program:
        counted: Program = way.net.counted
        return counted

    def _follow(self, arguments: dict[str, Any], refusal: GuardFailed) -> Program:
        """A program for calls that take another way, on kernels of its own; in float, whatever this copy is in."""
        if not self._unfused:
            raise refusal
        source = copy.copy(self._unfused[0])
        source._program = source._follow(arguments, refusal)
        if self.quantisation is not None:
            warnings.warn(
                "this image takes another way through the network than those this copy was calibrated by: it runs in "
                f"float there. {refusal.where}",
                CadWarning,
                stacklevel=2,
            )
        way = OptimizedModel(source, self._epilogues)
        way._unfused, way._unit = (), self._unit
        return way.program

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        """As torch moves modules to a device or type: the weights that other ways are made of, too."""
        self._ways = {}
        for source in self._unfused:
            source._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def optimize(
        self,
        fuse: bool = True,
        *,
        precision: str = "float",
        calibration: Any = None,
        largest_error: float | None = None,
    ) -> OptimizedModel:
        """Itself: it is optimised.

        Raises:
            InvalidInput: another precision is asked for.
        """
        if precision != FLOAT:
            raise InvalidInput(
                f"an optimised network is not put into {precision}.",
                next="ask the network it was made from: net.optimize(precision=..., calibration=images).",
            )
        return self

    def train(self, mode: bool = True) -> OptimizedModel:
        """Refused: its batch norms are folded.

        Raises:
            InvalidInput: mode is True.
        """
        if mode:
            raise InvalidInput(
                "an optimised network cannot be trained.",
                why="its batch norms are folded into its convolutions.",
                next="train the network it was made from, and call optimize() again.",
            )
        super().train(False)
        return self


def in_precision(
    fast: OptimizedModel, precision: str, calibration: Any, largest_error: float | None
) -> OptimizedModel:
    """The copy itself, in the precision that was asked for; see `AdaptiveModel.optimize`."""
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if (precision == "int8") != (calibration is not None):
        raise InvalidInput(
            f"precision {precision} {'lacks images' if calibration is None else 'takes no images'} to calibrate by.",
            next='net.optimize(precision="int8", calibration=images): image batches as the network takes them.',
        )
    if largest_error is not None and (precision == FLOAT or not largest_error > 0):
        raise InvalidInput(
            f"precision {precision} with outputs that differ by {largest_error} at most.",
            why="copies in float differ by rounding alone, those in 8 bits always.",
            next="leave largest_error out, or give int8 a share of the outputs' size: 0.05.",
        )
    if precision == FLOAT:
        return fast
    if form_here() is None:
        warnings.warn(
            "this copy is not in 8 bits: there are no compiled kernels here (cadsurgery --version says why). It stays "
            "in float; .to(torch.bfloat16) is faster where the processor has bfloat16.",
            CadWarning,
            stacklevel=3,
        )
        return fast
    fast.quantisation = quantise(fast, calibration, largest_error)
    return fast


def _forget_other_ways(model: nn.Module, keys: Any) -> None:
    """Weights that were loaded are folded already: there are none that another way could be made of."""
    assert isinstance(model, OptimizedModel)
    model._unfused, model._ways = (), {}


def _is_data(name: str, value: Any) -> bool:
    """Whether an attribute of a network is plain data, no module and no tensor."""
    return not name.startswith("_") and not isinstance(value, (nn.Module, Tensor))
