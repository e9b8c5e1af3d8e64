"""Quantise an optimised network to 8 bits, calibrated by images without labels.

    fast = net.optimize(precision="int8", calibration=images)

Convolutions and linear layers of the fused graph multiply 8-bit values (`elements.backends.integer`), and activations
stay in 8 bits from layer to layer. Pooling, concatenation and moves keep the quantisation parameters of their inputs.
Quantisation parameters are chosen by mean square error, percentiles or the full range, whichever gives the smallest
error of the outputs. The mean error of rounding is corrected in the biases. Layers without a kernel, and layers with by
far the largest error, stay in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.backends.integer import (
    LARGEST_PAIR,
    LARGEST_WEIGHT,
    MOST_PRODUCTS,
    IntegerWeights,
    QuantParams,
    can_apply,
    form_here,
)
from cadsurgery.elements.backends.integer_layers import (
    IntegerConv,
    IntegerLinear,
    from_bytes,
    max_pool_bytes,
    to_bytes,
)
from cadsurgery.elements.backends.onednn import convolve, multiply
from cadsurgery.elements.backends.packed import PackedConv, PackedLinear
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.network.calibration import batch_of
from cadsurgery.network.fidelity import UNSAID, measure
from cadsurgery.network.fuse import KERNELS, path_of
from cadsurgery.network.idioms import step_of
from cadsurgery.network.macs import Counter
from cadsurgery.network.program import GraphInterpreter, Program, ProgramNetwork
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CadWarning, CannotConvert
from cadsurgery.support.progress import Step, counted, silent
from cadsurgery.support.torch_operations import is_in_place
from cadsurgery.surgery.graphs import copy_graph, torch_target, upwards
from cadsurgery.surgery.guards import GuardFailed, is_guard
from cadsurgery.surgery.hooks import child

_COMPARED = 2  # batches on which layers and outputs are compared
_SAMPLES = 65536  # values sampled from each map of a batch to choose quantisation parameters
_END = 1e-3  # share of the values at either end of which all are sampled
# A layer stays in float32 if it has more than _SHARE of the squared errors of all layers, and an error above _HARMLESS.
_SHARE, _HARMLESS = 0.2, 0.03
# Fewer layers in float32 are preferred while the error is at most _WORTH times the smallest error, or below _SMALL.
_WORTH, _SMALL = 1.2, 0.02
# The warning of an error names up to _NAMED layers with at least the share _PART of the largest one.
_NAMED, _PART = 3, 0.05
_BEYOND, _STEPS = 1e-4, 24  # share clipped at either end by "percentile"; ranges tried by "mse"
_FIRST = 4  # first layers in float32 for `largest_error`, doubled until the error is small enough
_FEWEST_ROWS = 64  # with fewer rows, quantising takes longer than it saves
_METHODS = ("mse", "percentile", "range")
_EXACT = 1e-8  # mean squared error of integers that only single precision causes
_CACHED = 1 << 18  # weights rounded at a time, so that they stay in the cache while all scales are tried
Exact = dict[fx.Node, str]  # layers that stay in float32, with the reason
_CARRIES = (functional.to_elements, functional.to_dense, functional.max_pool2d, functional.keep)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a network in 8 bits.

    Attributes:
        name: name of its node in the graph.
        shape: shape of its weight.
        error: error of its sums in 8 bits relative to their standard deviation, for exact inputs; None if unknown.
        why: reason why it stays in float32; empty for a layer in 8 bits.
    """

    name: str
    shape: tuple[int, ...]
    error: float | None
    why: str = ""


@dataclass(frozen=True)
class Quantisation:
    """Report of a quantisation: its layers, and its error on the calibration images.

    Attributes:
        layers: all layers in order.
        error: root mean square of the output differences relative to that of the outputs; the largest over all outputs.
        grids: method that chose the quantisation parameters: `mse`, `percentile` or `range` (minimum to maximum).
        form: instruction set of the compiled kernels; empty for torch.
        images: number of batches of the comparison.
    """

    layers: tuple[Layer, ...]
    error: float
    grids: str
    form: str
    images: int

    def __str__(self) -> str:
        """Return the report in a few lines."""
        exact: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why:
                exact.setdefault(layer.why, []).append(layer.name)
        count = len(self.layers)
        head = (
            f"{count - sum(map(len, exact.values()))} of {count} layers in 8 bits ({self.form or 'torch'}), "
            f"ranges by {self.grids}; outputs differ by {self.error:.3g} of their size on {self.images} images"
        )
        several = {
            why: names[0] if len(names) == 1 else f"{len(names)} layers" for why, names in exact.items()
        }
        return "\n".join((head, *(f"  {names} in float32: {why}" for why, names in several.items())))


class Growth(NamedTuple):
    """Relative errors before and after one node of a quantised network: of its inputs, and of its result.

    Attributes:
        path: module path of the node.
        before: largest relative error of its inputs.
        behind: relative error of its result.
    """

    path: str
    before: float
    behind: float

    @property
    def amount(self) -> float:
        """The squared error that the node adds; errors of different nodes add up by their squares."""
        return self.behind**2 - self.before**2


@dataclass
class _Values:
    """Statistics of a node's values: their range, a sample, and the number of values that each sample represents."""

    low: float = 0.0
    high: float = 0.0
    samples: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """Sample values at a regular step, and keep all extreme values, which clipping affects most."""
        values = values.detach()
        channels_last = values.permute(0, 2, 3, 1) if values.dim() == 4 else values
        flat = channels_last.reshape(-1)  # in the order of memory
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        step = max(1, len(flat) // _SAMPLES) | 1  # odd, so that all channels are sampled
        samples = flat[::step].clone()
        if step > 1:
            least, most = (
                float(samples.kthvalue(max(1, math.ceil(share * len(samples)))).values)
                for share in (_END, 1 - _END)
            )
            ends = flat[(flat < least) | (flat > most)]
            samples = samples[(samples >= least) & (samples <= most)]
            self.samples += [samples, ends]
            self.counts += [torch.full_like(samples, float(step)), torch.ones_like(ends)]
        else:
            self.samples.append(samples)
            self.counts.append(torch.ones_like(samples))


@dataclass
class _Convolution:
    """A layer that may be quantised: its node and kernel, its input and residual, and its measured error."""

    node: fx.Node
    name: str
    kernel: PackedConv
    why: str = ""
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    shift: Any = 0.0
    rows: int = 0

    @property
    def source(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def residual(self) -> fx.Node | None:
        place = 1 if self.node.op == "call_module" else 2
        return self.node.args[place] if len(self.node.args) > place else None  # type: ignore[return-value]

    @cached_property
    def rounded(self) -> tuple[Tensor, Tensor]:
        """The weight in 8 bits and its scale, see `round_weight`."""
        return round_weight(self.kernel.weight, "adjacent")

    @property
    def error(self) -> float:
        """The rounding error relative to the standard deviation of the sums."""
        return float((self.squares[0] / self.squares[1].clamp(min=1e-30)).sqrt())


class _Observer(GraphInterpreter):
    """Runs a graph and calls a function with each node, access to its inputs, and its value."""

    def __init__(
        self, program: Program, look: Callable[[fx.Node, Callable[[fx.Node], Any], Any], None]
    ) -> None:
        super().__init__(program, program.graph)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and pass its value to the function."""
        value = super().run_node(n)
        self.look(n, self.env.__getitem__, value)
        return value


def quantise(
    fast: ProgramNetwork,
    calibration: list[Any],
    largest_error: float | None = None,
    step: Step = silent,
) -> Quantisation:
    """Quantise an optimised network to 8 bits, in place.

    Args:
        fast: a network from `optimize()`, in float32, on the CPU.
        calibration: image batches (B, C, H, W), or dictionaries that hold one, like those of later calls,
            about 8 to 100 images, preprocessed for the
            network. They are run with the network's own mask.
        largest_error: largest allowed `Quantisation.error`; first layers are kept in float32 until it is met.
        step: progress callback; gets the calibration images, and the ways to choose scales.

    Warns:
        CadWarning: the error exceeds `largest_error` even with up to half of the layers in float32; or, without
            `largest_error`, it exceeds 1 %.

    Raises:
        InvalidInput: another network, no images, or images that the network does not accept.
        CannotConvert: no layer can be quantised.
    """
    program = fast.program
    batches = _on_converted_path(fast, calibration)
    with torch.no_grad():
        work = _Quantiser(fast, program)
        work.observe(batches, step)
        compared = [(batch, _outputs(fast, batch)) for batch in batches[:_COMPARED]]
        tried: list[_Tried] = []
        for place, method in enumerate(_METHODS):
            step(f"quantising, scales by {method}", place, len(_METHODS))
            tried += work.try_out(method, compared)
        least = min(way.error for way in tried)
        near = [way for way in tried if way.error <= max(_WORTH * least, _SMALL)] or tried  # if all are NaN
        best = min(near, key=lambda way: (way.rewritten.in_float, way.error))
        if largest_error is not None:
            best = work.keep_first_in_float(best, largest_error, compared, step)
        error, method, rewritten = best
        if not error < float("inf"):
            raise CannotConvert(
                "the network in 8 bits gives values that are not finite.",
                next="give other images to calibrate by.",
            )
        rewritten.apply(fast)
        if largest_error is None and error > UNSAID:
            warnings.warn(
                f"the outputs of the copy in 8 bits differ from those in float by {100 * error:.2g} % of their size on "
                f"the calibration images.{_largest_sources(work.find_growth(rewritten, _first_image(batches[0])))} "
                f"net.optimize(..., largest_error={UNSAID:g}) keeps the first layers in float32 until they differ by "
                "no more; net.optimize() keeps all.",
                CadWarning,
                stacklevel=5,
            )
    return Quantisation(tuple(rewritten.layers), error, method, form_here() or "", len(compared))


class _Tried(NamedTuple):
    """A way to quantise a network: its error, the method of its ranges, and the network."""

    error: float
    method: str
    rewritten: _Rewritten


class _Quantiser:
    """Facts about a network that is to be quantised."""

    def __init__(self, fast: ProgramNetwork, program: Program) -> None:
        self.fast, self.program = fast, program
        self.kernels: Any = getattr(fast, KERNELS)
        found = (self._layer(node) for node in program.graph.nodes)
        self.layers = {layer.node: layer for layer in found if layer is not None}
        self.values: dict[fx.Node, _Values] = {}
        self.kinds: dict[fx.Node, type] = {}

    def try_out(
        self, method: str, compared: Sequence[tuple[Any, list[Tensor]]], first: int = 0
    ) -> list[_Tried]:
        """Compare the ways to quantise with ranges by a method; `compared` are batches with the outputs in float."""
        tried = []
        for rewritten in self.rewrite(method, [batch for batch, _ in compared], first):
            rewritten.apply(self.fast)
            outputs = ((batch_of(batch), _outputs(self.fast, batch), exact) for batch, exact in compared)
            tried.append(_Tried(measure(outputs).error, method, rewritten))
            self.fast.use_program(self.program)
            self.restore()
        return tried

    def keep_first_in_float(
        self,
        best: _Tried,
        largest_error: float,
        compared: Sequence[tuple[Any, list[Tensor]]],
        step: Step,
    ) -> _Tried:
        """Return the best way with more and more of the first layers in float32, until its error is small enough.

        Warns:
            CadWarning: it is too large with half of the layers in float32.
        """
        first = _FIRST
        count = sum(not layer.why for layer in self.layers.values())
        while best.error > largest_error and 2 * first <= count:
            step(f"quantising, the first {first} layers in float32")
            best = min(best, *self.try_out(best.method, compared, first), key=lambda way: way.error)
            first *= 2
        if best.error > largest_error:
            warnings.warn(
                f"the outputs of the copy in 8 bits differ by {best.error:.3g} of their size, not by "
                f"{largest_error:g}, even with the first {first // 2} layers in float32. Leave it in float, or "
                "calibrate by more images like those it will see.",
                CadWarning,
                stacklevel=6,
            )
        return best

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node) -> _Convolution | None:
        holder = node if node.op == "call_module" else None
        if node.target is functional.fused_conv2d:
            holder = node.args[1]  # type: ignore[assignment]
        path, _, name = str(holder.target if holder is not None else "").partition(".")
        kernel = getattr(self.kernels, name) if path == KERNELS else None
        if not isinstance(kernel, PackedConv):
            return None
        return _Convolution(node, name, kernel, self._refusal(node, kernel))

    def _refusal(self, node: fx.Node, kernel: PackedConv) -> str:
        """Return why a layer cannot be quantised, as far as is known without images, or ""."""
        window = node.kwargs.get("window", Window((1, 1)))
        if kernel.weight.dtype != torch.float32:
            return "it is not in float32"
        if window.finer > 1 or window.outside:  # type: ignore[union-attr]
            return "there is no kernel for its window"
        if kernel.weight[0].numel() > MOST_PRODUCTS:
            return "its sums may be too large for 32 bits"
        return ""

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs whose values a node moves or max-pools unchanged, so that it can run on 8-bit values."""
        read: Any = ()
        if node.op == "call_module":
            module: Any = child(self.fast, str(node.target))
            plain = isinstance(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices
            read = node.args if plain and not module._forward_hooks and not module._forward_pre_hooks else ()
        elif torch_target(node) is torch.cat:
            read = node.args[0] if (*node.args[1:], *step_of(node).options.values()) == (1,) else ()
        elif torch_target(node) in _CARRIES and "guide" not in node.kwargs:
            read = node.args[:1]
        known = [one for one in read if isinstance(one, fx.Node) and one in self.kinds]
        return known if node in self.kinds and len(known) == len(read) else []

    # -- calibration -------------------------------------------------------------------------------

    def observe(self, batches: Sequence[Any], step: Step = silent) -> None:
        """Run the calibration images and collect statistics of all nodes that may be in 8 bits."""

        def look(node: fx.Node, read: Callable[[fx.Node], Any], value: Any) -> None:
            values = value.rows if isinstance(value, Elements) else value
            if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.dim() not in (2, 4):
                return
            if isinstance(value, Elements) and values.dim() != 2:
                return
            self.kinds[node] = type(value) if isinstance(value, Elements) else Tensor
            self.values.setdefault(node, _Values()).add(values)
            layer = self.layers.get(node)
            if layer is None:
                return
            layer.rows = values.numel() // layer.kernel.weight.shape[0]
            if layer.residual is not None and not isinstance(value, Elements):
                more: Any = read(layer.residual)
                if more.shape != values.shape:
                    layer.why = layer.why or "its residual has another shape"

        self._run(
            counted(batches, step, "calibrating, image", size=lambda call: len(batch_of(call))),
            look,
            self.program,
        )
        for layer in self.layers.values():
            if layer.node not in self.kinds or layer.source not in self.kinds:
                layer.why = layer.why or "its values are not rows in float32"
            elif layer.rows < _FEWEST_ROWS:
                layer.why = layer.why or "it has few rows"
        if not any(not layer.why for layer in self.layers.values()):
            raise CannotConvert(
                "no layer of the network can be in 8 bits.",
                why=next((layer.why for layer in self.layers.values()), "it has no convolution") + ".",
                next="leave out precision.",
            )

    def _run(self, batches: Iterable[Any], look: Callable[..., None], program: Program) -> None:
        provider = self.fast.mask
        for batch in batches:
            lattice = program.find_lattice(program.masking(provider), batch)
            arguments = program.bind(batch)
            inputs = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"][1:]
            _Observer(program, look).run(
                lambda *_, found=lattice: found, *(arguments.get(name) for name in inputs)
            )

    # -- quantisation parameters -------------------------------------------------------------------

    def rewrite(self, method: str, batches: Sequence[Any], first: int = 0) -> Iterator[_Rewritten]:
        """Yield quantised networks with parameters chosen by a method: with all possible layers but the first ones, and
        without the layers that have by far the largest error, if there are any."""
        exact = {node: layer.why for node, layer in self.layers.items() if layer.why}
        possible = [node for node in self.layers if node not in exact]
        exact |= dict.fromkeys(possible[:first], "it is one of the first, for a smaller error")
        grids = self._grids(method, exact)
        self._compare(batches, grids, exact)
        sensitive = {
            node: f"rounding changes its sums by {self.layers[node].error:.2g}"
            for node in self._sensitive(exact)
        }
        for chosen in [exact, exact | sensitive] if sensitive else [exact]:
            while more := self._unread(chosen):
                chosen = chosen | dict.fromkeys(more, "it is depthwise, and no layer in 8 bits reads it")
            yield _Rewritten(self, grids, dict(chosen))

    def _unread(self, exact: Exact) -> list[fx.Node]:
        """Return depthwise convolutions whose results are not in 8 bits: their kernel only returns 8-bit values."""
        on_grids = {node for group in self.groups(exact) for node in group}
        return [
            node
            for node, layer in self.layers.items()
            if node not in exact
            and layer.kernel.groups == len(layer.kernel.weight) > 1
            and node not in on_grids
        ]

    def groups(self, exact: Exact) -> list[list[fx.Node]]:
        """Return groups of nodes that share quantisation parameters and whose values are used in 8 bits."""
        parent = {node: node for node in self.kinds}

        def first(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        for node in self.program.graph.nodes:
            for source in self.carried(node):
                parent[first(source)] = first(node)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.kinds:
            groups.setdefault(first(node), []).append(node)
        read = {layer.source for node, layer in self.layers.items() if node not in exact}
        added = {
            layer.residual
            for node, layer in self.layers.items()
            if node not in exact and layer.residual in self.layers and layer.residual not in exact
        }
        averaged = {
            node for node, layer in self.layers.items() if node not in exact and self._is_averaged(layer)
        }
        return [
            group
            for group in groups.values()
            if (read | added | averaged) & set(group) and not any(map(self._overwritten, group))
        ]

    def _is_averaged(self, layer: _Convolution) -> bool:
        """True if only means over images read the values of a layer; they accept 8-bit values."""
        readers = list(layer.node.users)
        return bool(readers) and can_apply(layer.kernel.activation) and all(map(_is_mean, readers))

    def _overwritten(self, node: fx.Node) -> bool:
        """True if a user changes the value of a node in place."""

        def called(user: fx.Node) -> Any:
            return child(self.fast, str(user.target)) if user.op == "call_module" else torch_target(user)

        users = (user for user in node.users if user.args and user.args[0] is node)
        return any(is_in_place(called(user), user.args, user.kwargs) for user in users)

    def _grids(self, method: str, exact: Exact) -> dict[fx.Node, QuantParams]:
        grids = dict[fx.Node, QuantParams]()
        for group in self.groups(exact):
            origins = [node for node in group if not self.carried(node)]
            values = [self.values[node] for node in origins]
            low, high = min(one.low for one in values), max(one.high for one in values)
            samples = torch.cat([part for one in values for part in one.samples])
            counts = torch.cat([part for one in values for part in one.counts])
            grid = _choose_grid(low, high, samples, counts, method)
            grids |= dict.fromkeys(group, grid)
        return grids

    def _compare(self, batches: Sequence[Any], grids: dict[fx.Node, QuantParams], exact: Exact) -> None:
        """Measure the rounding error of each layer's sums: its mean per channel, and its variance around the mean."""
        tested: dict[fx.Node, IntegerConv] = {}
        for node, layer in self.layers.items():
            layer.squares.zero_()
            layer.shift = 0.0
            if node not in exact and layer.source in grids:
                tested[node] = _integer_layer(layer, grids[layer.source], None, None, sums_only=True)
        counts: dict[fx.Node, int] = {}

        def look(node: fx.Node, read: Callable[[fx.Node], Any], value: Any) -> None:
            if node not in tested:
                return
            layer, x = self.layers[node], read(self.layers[node].source)
            is_elements = isinstance(x, Elements)
            rounded = grids[layer.source].quantise(x.rows if is_elements else x)
            if is_elements:
                options: Any = node.kwargs
                full = functional.fused_conv2d(x, layer.kernel.weights.without_activation, **options).rows
                less = functional.fused_conv2d(Elements(rounded, x.lattice), tested[node], **options).rows
            else:
                plain = layer.kernel.weights.without_activation
                if isinstance(layer.kernel, PackedLinear):
                    full = multiply(plain, x.reshape(-1, x.shape[-1]))
                    less = tested[node](rounded).reshape(full.shape)
                else:
                    assert layer.kernel.window is not None
                    full, less = convolve(plain, x, *layer.kernel.window), tested[node](rounded)
                    full, less = (rows.permute(0, 2, 3, 1).flatten(0, 2) for rows in (full, less))
            shift = (full - less).mean(0)
            number = counts[node] = counts.get(node, 0) + 1
            layer.shift = layer.shift + (shift - layer.shift) / number
            error = (less + shift - full).square().sum(dtype=torch.float64)
            layer.squares += torch.stack((error, (full - full.mean(0)).square().sum(dtype=torch.float64)))

        self._run(batches, look, self.program)

    def _sensitive(self, exact: Exact) -> set[fx.Node]:
        """Return the layers that have by far the largest errors."""
        squares = {node: layer.error**2 for node, layer in self.layers.items() if node not in exact}
        chosen: set[fx.Node] = set()
        while squares:
            worst = max(squares, key=squares.__getitem__)
            others, largest = sum(squares.values()) - squares[worst], squares[worst]
            if largest < _HARMLESS**2 or largest < _SHARE * (others + largest) or len(squares) == 1:
                break
            chosen.add(worst)
            del squares[worst]
        return chosen

    def find_growth(self, rewritten: _Rewritten, image: Tensor) -> list[Growth]:
        """Return how the error grows from node to node on an image, largest growth first; `rewritten` is applied."""
        exact, found = dict[str, Tensor](), dict[fx.Node, float]()
        growth = list[Growth]()

        def keep(node: fx.Node, read: Callable[[fx.Node], Any], value: Any) -> None:
            if (values := _values_of(value)) is not None:
                exact[node.name] = values.clone()  # later nodes may change them in place

        def compare(node: fx.Node, read: Callable[[fx.Node], Any], value: Any) -> None:
            own, values = rewritten.own.get(node), _values_of(value)
            if own is None or values is None or own.target in _CARRIES:  # values that are only moved
                return
            expected = exact.pop(own.name, values[:0])
            if values.shape != expected.shape:  # the mask chose other elements, because its features differ
                return
            values = rewritten.grids[own].dequantise(values) if values.dtype == torch.uint8 else values
            error = measure([(values, [values], [expected])]).error
            before = max(
                (found[earlier] for earlier in upwards(own, until=found) if earlier in found), default=0.0
            )
            found[own] = error
            growth.append(Growth(path_of(self.fast, self.fast.counted.graph, own), before, error))

        self.restore()
        self._run([image], keep, self.program)
        rewritten.apply(self.fast)
        self._run([image], compare, self.fast.program)
        return sorted(growth, key=lambda one: one.amount, reverse=True)

    def restore(self) -> None:
        """Put the float kernels back."""
        for layer in self.layers.values():
            setattr(self.kernels, layer.name, layer.kernel)


class _Rewritten:
    """A quantised graph and its kernels."""

    def __init__(self, work: _Quantiser, grids: dict[fx.Node, QuantParams], exact: Exact) -> None:
        grids = {node: grids[node] for group in work.groups(exact) for node in group}
        self.work, self.grids, self.exact = work, grids, exact
        self.in_float = len(exact)
        self.program, self.kernels = work.program, dict[str, IntegerConv]()
        self.layers: list[Layer] = []
        for node, layer in work.layers.items():
            shape, error = tuple(layer.kernel.weight.shape), float(layer.error) if not layer.why else None
            if node not in exact and layer.source not in grids:
                exact[node] = "its input is changed in place"
            why = exact.get(node, "")
            self.layers.append(Layer(node.name, shape, error, why))
            if not why:
                more = grids.get(layer.residual) if layer.residual is not None else None
                self.kernels[layer.name] = _integer_layer(layer, grids[layer.source], more, grids.get(node))
        self.graph, self.copies = copy_graph(work.program.graph)
        for node, grid in grids.items():
            self._convert(node, grid)
        self.own = {copy: node for node, copy in self.copies.items()}
        self.graph.lint()

    def _convert(self, node: fx.Node, grid: QuantParams) -> None:
        """Insert conversions so that each reader of a node gets its value in 8 bits or in float, as it requires."""
        work, copies, in_bytes = self.work, self.copies, set[fx.Node]()
        here = copies[node]
        for user in node.users:
            layer = work.layers.get(user)
            passes = user in self.grids and node in work.carried(user)
            takes = passes or (layer is not None and user not in self.exact)
            if takes:
                in_bytes.add(copies[user])
        layer, carried = work.layers.get(node), work.carried(node)
        is_bytes = bool(carried) or (layer is not None and node not in self.exact)
        if carried and node.op == "call_module":
            pool: Any = work.fast.get_submodule(str(node.target))
            options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in options]
            with self.graph.inserting_after(here):
                pooled = self.graph.call_function(max_pool_bytes, (here.args[0], *pairs))
            here.replace_all_uses_with(pooled)
            self.graph.erase_node(here)
            here = copies[node] = pooled
        if is_bytes:
            for mean in [user for user in here.users if _is_mean(user)]:
                with self.graph.inserting_after(mean):
                    values = self.graph.call_function(from_bytes, (mean, *grid))
                mean.replace_all_uses_with(values, lambda user, values=values: user is not values)  # type: ignore[misc]
                in_bytes.add(mean)
                copies.update((of, values) for of, copy in list(copies.items()) if copy is mean)
        readers = [user for user in here.users if (user in in_bytes) != is_bytes]
        if not readers:
            return
        change = from_bytes if is_bytes else to_bytes
        with self.graph.inserting_before(here.next):
            if work.kinds[node] is Tensor:
                changed = self.graph.call_function(change, (here, *grid))
            else:
                changed = self.graph.call_function(functional.OnRows(change), (here, *grid))
        for user in readers:
            user.replace_input_with(here, changed)

    def apply(self, fast: ProgramNetwork) -> None:
        """Install the quantised graph and kernels in a network."""
        kernels: Any = getattr(fast, KERNELS)
        for name, kernel in self.kernels.items():
            setattr(kernels, name, kernel)
        fast.use_program(replace(self.program, graph=self.graph))


def _values_of(value: Any) -> Tensor | None:
    """Return the values of a map or of elements, in floating point or 8 bits; None for any other value."""
    values = value.rows if isinstance(value, Elements) else value
    is_number = isinstance(values, Tensor) and (values.is_floating_point() or values.dtype == torch.uint8)
    return values if is_number else None


def _largest_sources(growth: Sequence[Growth]) -> str:
    """Return a sentence that names the layers which add most of the error."""
    most = [layer for layer in growth[:_NAMED] if layer.amount > _PART * growth[0].amount]
    places = (f"{layer.path} (from {100 * layer.before:.2g} to {100 * layer.behind:.2g} %)" for layer in most)
    return f" Most of it comes in at {', '.join(places)}." if most else ""


def _is_mean(user: fx.Node) -> bool:
    return user.target is functional.global_mean


def _integer_layer(
    layer: _Convolution,
    source: QuantParams,
    more: QuantParams | None,
    out: QuantParams | None,
    sums_only: bool = False,
) -> IntegerConv:
    """Build the quantised kernel of a layer; with `sums_only` it returns its sums in float32, without activation."""
    kernel, (whole, scale) = layer.kernel, layer.rounded
    bias = kernel.bias.detach().float() if kernel.bias is not None else torch.zeros(len(whole))
    bias, act = bias + layer.shift, kernel.activation
    weights = IntegerWeights(whole, scale, bias, kernel.groups, None, source)
    if not sums_only:
        weights = replace(weights, activation=act, more=more, out=out)
    kind = IntegerLinear if isinstance(kernel, PackedLinear) else IntegerConv
    result = kind(weights, kernel.window)
    result.origin = kernel.origin
    return result


def round_weight(weight: Tensor, limited: Literal["any", "adjacent"] | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight (O, ...) to integers in -127..127 with a scale (O,) per output channel.

    For each output, 64 candidate scales make its largest weight an integer of 64 to 127; the one with the smallest
    squared error is used. The gain is largest for few taps and channels; weights that were quantised to 8 bits before,
    with any scale, are kept exactly, with "any" if they are within the limit.

    Args:
        weight: floating-point weights, outputs first.
        limited: integers of an output that together are at most `LARGEST_PAIR`, so that products of two can be added in
            16 bits: "any" two, or two "adjacent" channels (the first with the second, the third with the fourth, ...)
            of equal sign at the same tap; this package's kernels use 32 bits beyond it. A largest weight of 64
            is always possible.
    """
    flat = weight.detach().flatten(1)
    largest = flat.abs().amax(1)
    largest = torch.where(largest > 0, largest, 1.0)
    tried = torch.arange(LARGEST_WEIGHT, LARGEST_WEIGHT // 2, -1)
    fitting = _find_fitting(weight.detach(), largest, tried, limited)
    numbers = torch.empty_like(largest)
    count = max(1, _CACHED // flat.shape[1])
    parts = (*(one.split(count) for one in (numbers, flat, largest)), fitting.split(count, 1))
    for rows, part, most, fits in zip(*parts, strict=True):
        share, least = part / most.unsqueeze(1), torch.full_like(most, torch.inf)
        for number, is_fitting in zip(tried.tolist(), fits, strict=True):
            # Nothing else is of use with "any"; "adjacent" keeps exact ones that do not fit.
            places = is_fitting.nonzero().flatten() if limited == "any" else slice(None)
            values, error = share[places] * number, torch.full_like(most, torch.inf)
            error[places] = values.sub_(values.round()).square_().sum(1).div_(number**2)
            if limited == "adjacent":  # exact ones may exceed the limit, unless one within it is exact, too
                is_exact = error < _EXACT * part.shape[1] / number**2
                error = torch.where(is_exact & ~is_fitting, error.clamp_min(_EXACT / number**2), error)
                is_fitting = is_fitting | is_exact
            nearer = (error < least).logical_and_(is_fitting)
            rows.masked_fill_(nearer, float(number))
            least = torch.where(nearer, error, least)
    scale = largest.double() / numbers
    whole = (flat.double() / scale.unsqueeze(1)).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    return whole.to(torch.int8).view(weight.shape).contiguous(), scale.float()


def _find_fitting(weight: Tensor, largest: Tensor, tried: Tensor, limited: str | None) -> Tensor:
    """Return which of the tried largest integers keep each output within a limit, (tried, O)."""
    flat = weight.flatten(1)
    if limited is None:
        return torch.ones(len(tried), len(flat), dtype=torch.bool)
    if limited == "adjacent":
        by_tap = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        padded = F.pad(by_tap, (0, 0, 0, by_tap.shape[1] % 2))
        ends = torch.stack([sign * (sign * padded).clamp_min(0) for sign in (1, -1)])
        sums = ends.unflatten(2, (-1, 2)).sum(3).abs().flatten(2).amax((0, 2))
        # Each of the two is rounded by at most a half. Two weights of 64 fit exactly.
        most = sums.double() / largest * tried.view(-1, 1) + 1
        return (most <= LARGEST_PAIR) | (tried == tried[-1]).view(-1, 1)
    # Rounding keeps the order, so only the two largest and the two smallest weights have to be checked.
    pairs = torch.stack([flat.topk(min(2, flat.shape[1]), largest=end).values for end in (True, False)], 1)
    # The same division as for the weights, so that ties are rounded the same way.
    in_scale = pairs.double() / (largest.double() / tried.view(-1, 1)).view(len(tried), -1, 1, 1)
    return in_scale.round().sum(3).abs().amax(2) <= LARGEST_PAIR


def mean_error(error: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """Return the mean (O,) of what an error of the weight adds to the sums of a convolution.

    Args:
        error: error of the weight, (O, C / groups, ...), taps last.
        mean: (C,), mean of the input in each channel.
        groups: channel groups.
    """
    by_input = error.double().flatten(2).sum(2) if error.dim() > 2 else error.double()
    return (by_input.unflatten(0, (groups, -1)) * mean.view(groups, 1, -1)).sum(2).flatten()


def _choose_grid(low: float, high: float, samples: Tensor, counts: Tensor, method: str) -> QuantParams:
    """Choose quantisation parameters from the range of values, and from samples with their counts."""
    if method == "range":
        return QuantParams.of_range(low, high)
    if method == "percentile":
        least, most = _ends(samples, counts, _BEYOND)
        return QuantParams.of_range(max(low, least), min(high, most))
    best, chosen = float("inf"), QuantParams.of_range(low, high)
    for step in range(_STEPS):
        share = 1 - 0.8 * step / _STEPS
        grid = QuantParams.of_range(share * low, share * high)
        rounded = (samples / grid.scale).round_().clamp_(-grid.zero, 255 - grid.zero).mul_(grid.scale)
        error = float((rounded - samples).square() @ counts)
        if error < best:
            best, chosen = error, grid
    return chosen


def _ends(samples: Tensor, counts: Tensor, share: float) -> tuple[float, float]:
    """Return the quantiles `share` and `1 - share` of samples with counts."""
    ordered, places = samples.sort()
    below = counts[places].double().cumsum(0)
    bounds = torch.tensor([share, 1 - share], dtype=torch.float64) * below[-1]
    least, most = torch.searchsorted(below, bounds).clamp_(max=len(samples) - 1).tolist()
    return float(ordered[least]), float(ordered[most])


def _on_converted_path(fast: ProgramNetwork, batches: list[Any]) -> list[Any]:
    """Return the batches that take the converted path through the network; other paths stay in float.

    Raises:
        GuardFailed: no batch takes the converted path.
    """
    program, refusal, fitting = fast.counted, None, []
    for batch in batches if any(map(is_guard, program.graph.nodes)) else ():
        try:
            with torch.no_grad():
                Counter(program).count(program.uniform(program.geometry.max_level), program.bind(batch))
            fitting.append(batch)
        except GuardFailed as error:
            refusal = refusal or error
    if refusal is None:
        return batches
    if not fitting:
        raise refusal
    warnings.warn(
        f"{len(batches) - len(fitting)} of {len(batches)} image batches take another path through the network than the "
        f"converted one: they are not used for calibration, and run in float. {refusal.where}",
        CadWarning,
        stacklevel=6,
    )
    return fitting


def _first_image(call: Any) -> Any:
    """Return the first image of a batch; a dictionary with its batch as it is."""
    return call[:1] if isinstance(call, Tensor) else call


def _outputs(fast: ProgramNetwork, batch: Any) -> list[Tensor]:
    """Return a network's outputs in floating point."""
    return [value for value in tensors_of(fast(batch)) if value.is_floating_point()]
