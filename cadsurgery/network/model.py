"""The adaptive network: the original's modules, run by the rewritten graph, on the level map of a mask."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.lattice import Geometry, Lattice, is_exporting
from cadsurgery.masks.basic import UniformMask
from cadsurgery.masks.context import first_pass
from cadsurgery.masks.masking import NEEDS_STATIC, Masking, check_image
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.fuse import KERNELS, fuse
from cadsurgery.network.inputs import first_types, misfit, wrong_type
from cadsurgery.network.macs import MacReport, count_macs, ghost
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.surgery.hooks import Watch, Watched, child, copying, settle, take_over
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.rewrite import Halves, halves, packed, unpacked
from cadsurgery.surgery.verify import Check


@dataclass(frozen=True)
class Surgery:
    """What was done to a network.

    Attributes:
        graph: the rewritten graph.
        plan: the decisions it carries out.
        geometry: how lattices are built and read.
        signature: of the original's forward.
        container: type of the output if it is a kind of dictionary.
        source: how the network was built, if by name.
        watched: modules that stand for what was rewritten.
        unchanged: the network's own graph, run instead where a mask leaves everything on its own grid; for a part of
            a network whose discrete decisions (detections) must not depend on rounding.
    """

    graph: fx.Graph
    plan: Plan
    geometry: Geometry
    signature: inspect.Signature
    container: type[dict[str, Any]] = dict
    source: Any = None
    unchanged: fx.Graph | None = None
    watched: tuple[Watched, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        graphs = {name: getattr(self, name) for name in ("graph", "unchanged")}
        return {**vars(self), **{name: graph and packed(graph) for name, graph in graphs.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graphs = {name: state[name] and unpacked(state[name]) for name in ("graph", "unchanged")}
        self.__dict__.update(state, **graphs)


class AdaptiveModel(nn.Module):
    """A network with content-adaptive downsampling: same call, same output structure, same state dict.

    Calling it with `mask=` overrides the mask for that call. After a call `levels` and
    `active_fraction` tell what was kept; `checks` holds the laws verified when it was made.
    """

    def __init__(self, model: nn.Module, surgery: Surgery, mask: object) -> None:
        """Take over the modules of `model`; use `cadsurgery.adaptify` to get one."""
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(self, kind).update(getattr(model, kind))
        self._original = (model,)  # for its data; a tuple, because its modules are this network's own
        self._constants = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
        self._surgery = surgery
        self._watch = Watch(self, surgery.watched)
        self._last = _Last()
        self._override: ContextVar[object] = ContextVar("mask", default=None)
        self._halved: Halved | None = None
        self._overridden = False  # whether it was ever set: before torch 2.15 compilers cannot look
        self._checks: tuple[Check, ...] = ()
        self._run = runnable(surgery.graph)
        self._run_unchanged = runnable(surgery.unchanged) if surgery.unchanged is not None else None
        self._mask_provider = resolve_mask(mask)
        self.training = model.training
        self.register_state_dict_post_hook(_without_mask)
        self.register_load_state_dict_post_hook(_mask_not_missing)
        self.lay_out()

    def forward(self, *args: Any, mask: object = None, **kwargs: Any) -> Any:
        """Run the network as the original is called.

        Args:
            args: the original's positional arguments; the first is the image batch (B, C, H, W).
            mask: for this call only: (B, h, w) bool (True = keep high) or integer levels, or anything
                `adaptify` takes as a mask.
            kwargs: the original's keyword arguments.

        Raises:
            InvalidInput: an image that is empty or holds NaN, or a mask of wrong size, type or values.
        """
        if mask is None and self._overridden:
            mask = self._override.get()
        chosen = self._mask_provider if mask is None else mask
        if torch.compiler.is_compiling() and not is_exporting() and not _is_static(chosen):
            return self._run_uncompiled(*args, mask=mask, **kwargs)
        provider = self._mask_provider if mask is None else resolve_mask(mask)
        if self._run_unchanged is not None and isinstance(provider, UniformMask):
            level = 0 if provider.high else self.plan.max_level
            if level == self.plan.identity_level:
                return self._as_it_was(level, *args, **kwargs)
        masking = self.masking(provider)
        if provider.looks_ahead:
            return self._run_twice(masking, *args, **kwargs)
        return self.run(masking, *args, **kwargs)

    def run(self, masking: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run with another masking, a callable (image, fine map) -> Lattice: for verification and tools."""

        def whole(arguments: dict[str, Any]) -> Any:
            return self.finish(*self._run(self.names(), masking, **arguments))

        return self.checked(whole, *args, **kwargs)

    def checked(self, run: Callable[[dict[str, Any]], Any], /, *args: Any, **kwargs: Any) -> Any:
        """What a function makes of the arguments of a call by name.

        Raises:
            InvalidInput: the image is none, or does not fit the network.
        """
        arguments = self.bind(*args, **kwargs)
        image: Any = next(iter(arguments.values()), None)
        self.check(image)
        if torch.compiler.is_compiling():
            return run(arguments)
        try:
            return run(arguments)
        except CadError:
            raise
        except Exception as error:  # the network decides what it takes: ask why only once it has refused
            refusal = misfit(self, self.graph, image, error)
            if refusal is None:
                raise
            raise refusal from error

    def check(self, image: Any) -> None:
        """Refuse what is no image batch; see `check_image`."""
        check_image(image)

    def run_graph(self, masking: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Lattice]:
        """Output and lattice of the rewritten graph, nothing checked or noted."""
        output, lattice = self._run(self.names(), masking, **self.bind(*args, **kwargs))
        return output, lattice

    def masking(self, provider: MaskProvider) -> Masking:
        """How a mask is asked for its lattices."""
        return Masking(provider, self.geometry, self.plan.strides[0])

    def halved(self) -> Halved:
        """Its graph cut where the mask is asked for: what comes before, and the rest."""
        if self._halved is None:
            cut = halves(self._surgery.graph)
            self._halved = Halved(cut, runnable(cut.before), runnable(cut.after))
        return self._halved

    def _run_twice(self, masking: Masking, /, *args: Any, **kwargs: Any) -> Any:
        """For a mask that looks at what the network gives with everything downsampled."""
        halved, names = self.halved(), self.names()

        def twice(arguments: dict[str, Any]) -> Any:
            values = halved.before(names, **arguments)
            with self.ahead(masking.provider, values):
                return self.finish(*halved.after(names, masking, *values))

        return self.checked(twice, *args, **kwargs)

    @contextmanager
    def ahead(self, provider: MaskProvider, values: tuple[Any, ...]) -> Iterator[None]:
        """Show a mask asked within, if it wants it, what the network gives with everything downsampled.

        Args:
            provider: the mask.
            values: what the first half of the graph gave, see `halved`; it is left as it is.
        """
        if not provider.looks_ahead:
            yield
            return
        with torch.no_grad(), evaluating(self):
            # Clones: the region may work in place on what enters it.
            again = (value.clone() if isinstance(value, Tensor) else value for value in values)
            found, _ = self.halved().after(self.names(), self._everything_low, *again)
        with first_pass(found):
            yield

    def _everything_low(self, image: Tensor, features: Tensor) -> Lattice:
        return self.geometry.uniform_like(features, self.geometry.max_level)

    def find_lattice(self, masking: Any, /, *args: Any, **kwargs: Any) -> Lattice:
        """The lattice of a masking for an image, the network run no further than that takes, in evaluation mode."""
        halved = self.halved()

        def found(arguments: dict[str, Any]) -> Any:
            values = halved.before(self.names(), **arguments)
            with self.ahead(masking.provider, values):
                return masking(values[halved.cut.image], values[halved.cut.features])

        with torch.no_grad(), evaluating(self):
            lattice: Lattice = self.checked(found, *args, **kwargs)
        return lattice

    def _as_it_was(self, level: int, *args: Any, **kwargs: Any) -> Any:
        """The network's own graph, operation for operation."""

        def unchanged(arguments: dict[str, Any]) -> Any:
            assert self._run_unchanged is not None
            output, fine = self._run_unchanged(self.names(), **arguments)
            return self.finish(output, self.geometry.uniform_like(fine, level))

        return self.checked(unchanged, *args, **kwargs)

    @torch.compiler.disable(
        reason="the mask keeps another number of elements of each image, or depends on more than the image: "
        f"{NEEDS_STATIC}"
    )
    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` for a mask whose shapes a compiler cannot know: it breaks the graph here, or says why it cannot."""
        return self.forward(*args, **kwargs)

    def finish(self, output: Any, lattice: Lattice) -> Any:
        """The output of a graph in the original's type, once the lattice is remembered for `levels`: of a compiled call
        the level map alone, of an exported one nothing."""
        if not torch.compiler.is_compiling():
            self._last.lattice, self._last.levels = lattice, None
        elif not is_exporting():
            self._last.lattice, self._last.levels = None, lattice.pyramid.levels
        return self.contained(output)

    def contained(self, output: Any) -> Any:
        """The output of a graph in the original's type."""
        return self._surgery.container(output) if isinstance(output, dict) else output

    @contextmanager
    def masked(self, mask: object) -> Iterator[None]:
        """Another mask for the calls made within, in this thread; None leaves the network's own."""
        self._overridden = True
        token = self._override.set(mask)
        try:
            yield
        finally:
            self._override.reset(token)

    def lay_out(self) -> None:
        """Lay out the weights of convolutions as rows of elements are: values and names stay the same.

        Not where the network's own graph is run too: dense convolutions round differently in another layout. Nor where
        they are called together with instance norms, see `functional.contiguous_gradient`.
        """
        nodes: Any = self.graph.nodes
        called = (child(self, str(node.target)) for node in nodes if node.op == "call_module")
        parts = [list(module.modules()) for module in called if module is not None]
        mixed = {
            part for some in parts if any(isinstance(p, nn.InstanceNorm2d) for p in some) for part in some
        }
        for module in self.modules() if self._run_unchanged is None else ():
            plain = type(module) is nn.Conv2d and module.groups == 1 and "weight" in module._parameters
            if plain and module not in mixed:
                weight: Any = module.weight
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a call by the original's parameter names, defaults included."""
        bound = self._surgery.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def names(self) -> _Names:
        """The name space the rewritten graph reads modules and parameters from.

        Raises:
            InvalidInput: a module is no longer what was converted, or has a hook that would not be called.
        """
        if not torch.compiler.is_compiling():
            self._watch()
        return _Names(self)

    @property
    def plan(self) -> Plan:
        """What was changed, and why."""
        return self._surgery.plan

    @property
    def geometry(self) -> Geometry:
        """How its lattices are built and read."""
        return self._surgery.geometry

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph."""
        return self._surgery.graph

    @property
    def checks(self) -> tuple[Check, ...]:
        """The laws verified when it was made."""
        return self._checks

    @checks.setter
    def checks(self, checks: tuple[Check, ...]) -> None:
        self._checks = checks

    @property
    def source(self) -> Any:
        """Where the network came from, if it was built by name: what `save` records."""
        return self._surgery.source

    @source.setter
    def source(self, source: Any) -> None:
        self._surgery = replace(self._surgery, source=source)

    @property
    def mask(self) -> MaskProvider:
        """The mask provider; assign anything `adaptify` takes as a mask."""
        return self._mask_provider

    @mask.setter
    def mask(self, mask: object) -> None:
        self._mask_provider = resolve_mask(mask)

    @property
    def lattice(self) -> Lattice:
        """The lattice of the last call."""
        last = self._last
        if last.lattice is None and last.levels is not None:
            last.lattice = self.geometry.lattice(last.levels)
        if last.lattice is None:
            raise InvalidInput("the network has not run yet.", next="call it on an image first: net(x).")
        return last.lattice

    @property
    def levels(self) -> Tensor:
        """(B, h, w) level map of the last call, made legal; 0 is the high output stride."""
        return self.lattice.levels

    @property
    def active_fraction(self) -> float:
        """Share of the fine map that the last call kept at the high output stride."""
        return self.lattice.active_fraction

    def macs(self, *args: Any, mask: object = None, rule: str = "conv", **kwargs: Any) -> MacReport:
        """Multiply-accumulates of this network on an image: with its mask, dense high and dense low.

        Args:
            args: as for a call. The network is run no further than its mask needs; of the rest only the shapes.
            mask: for this count only, as for a call.
            rule: `"conv"`, multiply-accumulates of convolutions and matrix products, or `"published"`,
                the counting of the CAD reference code (seed of its Tab. 2).
            kwargs: as for a call.
        """
        return count_macs(self, args, kwargs, mask, rule)

    @property
    def counted(self) -> AdaptiveModel:
        """The network whose operations are counted, with shapes and no values."""
        return ghost(self)

    def optimize(self, fuse: bool = True) -> AdaptiveModel:
        """An inference copy: batch norm folded, residuals and activations fused, weights packed, fastest kernels.

        It is called like this network and gives the same to rounding, without gradients. The weights are those of
        this moment; this network is not changed. NaN in weights, and NaN that an operation such as a division makes,
        stays NaN; NaN that comes of values that overflow may not, where a ReLU is fused.

        Args:
            fuse: False folds batch norm only and leaves everything else to torch, as one would do by hand: at a
                uniform mask that is the best ordinary dense network, what `cadsurgery bench` compares with.
        """
        return OptimizedModel(self, fuse)

    def __getattr__(self, name: str) -> Any:
        """Modules and parameters, and the original's data such as `num_classes`; not its methods, which would run it
        as it was."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            value = getattr(original[0], name, None) if original and not name.startswith("_") else None
            if value is None or callable(value):
                raise
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask":  # nn.Module would register a provider, a module, under this name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key not in _MADE_ANEW}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        unchanged = self._surgery.unchanged
        self._run = runnable(self._surgery.graph)
        self._run_unchanged = runnable(unchanged) if unchanged is not None else None
        self._override = ContextVar("mask", default=None)
        self._halved = None
        self._watch = Watch(self, self._surgery.watched)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveModel:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        shared = {"_surgery": self._surgery, "_run": self._run, "_last": _Last()}  # values, never changed
        shared["_run_unchanged"], shared["_halved"] = self._run_unchanged, self._halved
        shared["_override"] = ContextVar("mask", default=None)
        shared["_watch"] = Watch(clone, self._surgery.watched)
        for module in (self, *(part for part in self._original if isinstance(part, nn.Module))):
            memo.update({**copying(module), **memo})
        state = {key: value for key, value in vars(self).items() if key not in shared}
        clone.__dict__.update(copy.deepcopy(state, memo), **shared)
        return clone


class OptimizedModel(AdaptiveModel):
    """An adaptive network for inference only; see `AdaptiveModel.optimize`. Any number of threads may call it."""

    def __init__(self, net: AdaptiveModel, epilogues: bool) -> None:
        """Fuse the graph of `net` and copy what is left of its modules."""
        source = copy.deepcopy(net).eval().requires_grad_(False)
        used = (str(node.target) for node in source.graph.nodes if node.op in ("call_module", "get_attr"))
        settle(source, {"", *used})
        for module in source.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        root = nn.Module()
        for kind in ("_modules", "_parameters", "_buffers"):
            vars(root)[kind].update(vars(source)[kind])
        for name in source._constants.keys() - source._parameters.keys():
            root.register_buffer(name, getattr(source.names(), name))
        graph, kernels = fuse(source.graph, root, epilogues)
        root.add_module(KERNELS, kernels)
        surgery = replace(source._surgery, graph=graph, unchanged=None)
        made = fx.GraphModule(root, graph)  # it copies what the graph uses and leaves the rest
        left = [found for found in surgery.watched if child(made, found.path) is not None]
        still = tuple(Watched.of(made, found.path, found.is_called) for found in left)
        super().__init__(made, replace(surgery, watched=still), source.mask)
        take_over(self, source)
        self._original = (_Data(net._original[0]),)  # type: ignore[assignment]
        self._counted = (ghost(net),)
        self._checks = net.checks
        self.training = False

    @torch.compiler.disable(reason="an optimised network is not compiled: compile the one it was made from")
    def forward(self, *args: Any, mask: object = None, **kwargs: Any) -> Any:
        """Run the network as the original is called; see `AdaptiveModel.forward`. torch.compile leaves it as it is."""
        with torch.no_grad():
            return super().forward(*args, mask=mask, **kwargs)

    def check(self, image: Any) -> None:
        """As of the network it was made from: its kernels alone would convert their weights to any type."""
        super().check(image)
        for dtype in first_types(self, self.graph):
            if refusal := wrong_type(image, dtype):
                raise refusal

    @property
    def counted(self) -> AdaptiveModel:
        """The network it was made from, with shapes and no values."""
        return self._counted[0]

    def optimize(self, fuse: bool = True) -> OptimizedModel:
        """Itself: it is optimised."""
        return self

    def macs(self, *args: Any, mask: object = None, rule: str = "conv", **kwargs: Any) -> MacReport:
        """Multiply-accumulates of the network it was made from; see `AdaptiveModel.macs`."""
        return self._counted[0].macs(*args, mask=self.mask if mask is None else mask, rule=rule, **kwargs)

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


@dataclass(frozen=True)
class Halved:
    """A rewritten graph as two functions; see `Halves`. Their first argument is `AdaptiveModel.names()`."""

    cut: Halves
    before: Any
    after: Any


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in net.modules()}
    if any(modes.values()):
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Data:
    """The plain data of a network, without its modules and tensors."""

    def __init__(self, model: Any) -> None:
        for name, value in vars(model).items():
            if not name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
                setattr(self, name, value)


@dataclass
class _Last:
    """What is known of the last call: its lattice, or its level map."""

    lattice: Lattice | None = None
    levels: Tensor | None = None


def _is_static(mask: object) -> bool:
    return isinstance(mask, MaskProvider) and mask.static


# What a pickled network does without.
_MADE_ANEW = ("_run", "_run_unchanged", "_override", "_halved", "_watch")


def _without_mask(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The state dict is the original's, whatever the mask has learned; `io.save` stores that apart."""
    for name in [name for name in state if name.startswith(f"{prefix}_mask_provider.")]:
        del state[name]


def _mask_not_missing(model: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if "_mask_provider." not in name]


class _Names:
    """The name space the generated code sees as `self`: modules and tensors only, so that a network may
    have a child called `mask` or `plan`."""

    def __init__(self, owner: AdaptiveModel) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        owner = self._owner
        for values in (owner._modules, owner._parameters, owner._buffers):
            if name in values:
                return values[name]
        constant = vars(owner).get(name, owner._constants.get(name))
        if isinstance(constant, Tensor):
            return constant
        if name == "training":
            return owner.training
        raise AttributeError(name)


def runnable(graph: fx.Graph) -> Any:
    """The code of a graph as a function; its first argument is `AdaptiveModel.names()`."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<cadsurgery graph>", "exec"), scope)
    return scope["forward"]
