"""The program of a rewritten network: its graph, the modules it uses, and the functions that run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.following.arguments import argument_kind, bind_all, contain, image_of, in_order
from cadsurgery.following.graphs import GRAPH_FILE, Interpreter
from cadsurgery.following.guards import GuardFailed
from cadsurgery.following.hooks import Watch, Watched
from cadsurgery.following.outside_values import Changed, Outside, OutsideWatch
from cadsurgery.following.trace import evaluating
from cadsurgery.masks.context import first_passes
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.masks.unit import Unit
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import is_traced_by_jit
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.rewrite import Halves, ask_mask, halves, pack_graph, unpack_graph

Masked = tuple[Any, Lattice]  # result of a run: output and lattice
_GRAPHS = ("graph", "unchanged")
PARTS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")  # of a module


@dataclass(frozen=True, eq=False)
class Program:
    """A rewritten graph and the network whose modules it runs, as tools get it.

    Attributes:
        graph: the rewritten graph.
        plan: the decisions that the graph carries out.
        geometry: the geometry by which lattices are built and read.
        signature: signature of the original's forward.
        container: type of the output if it is a dictionary subclass or a dataclass.
        unchanged: the network's own graph, which runs instead if the mask keeps every value on its own grid; only for a
            part of a network whose discrete decisions (detections) must not depend on rounding.
        watched: modules that the rewritten graph relies on.
        kinds: kind of each argument of the call that was traced, see `following.arguments.argument_kind`.
        outside: attributes and global values that the network's code read then.
        is_fused: true if weights are folded and packed for inference; they then convert themselves to any type.
        net: the `AdaptiveModel` whose modules and parameters the graphs use; see `bind_to`.
        image_name: the argument that is the image; "" if masks read none of the arguments as it is.
    """

    graph: fx.Graph
    plan: Plan
    geometry: Geometry
    signature: inspect.Signature
    container: type = dict
    unchanged: fx.Graph | None = None
    watched: tuple[Watched, ...] = ()
    kinds: Mapping[str, Any] = field(default_factory=dict)
    outside: Outside = field(default_factory=Outside)
    is_fused: bool = False
    net: Any = None
    image_name: str = field(init=False, repr=False)
    _run: Any = field(init=False, repr=False)
    _run_unchanged: Any = field(init=False, repr=False)
    _watch: Watch = field(init=False, repr=False)
    _outside: OutsideWatch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Generated here, because a compiler that traces a call could not generate code.
        run_unchanged = runnable(self.unchanged) if self.unchanged is not None else None
        source: Any = next(node.args[1] for node in self.graph.nodes if node.target is ask_mask)
        image = str(source.target) if source.op == "placeholder" else ""  # else it is in a list or dictionary
        run = runnable(self.graph)
        self.__dict__.update(_run=run, _run_unchanged=run_unchanged, image_name=image)

    def bind_to(self, net: Any) -> Program:
        """Return the program bound to the modules of another network; the generated code is shared."""
        program = object.__new__(Program)
        program.__dict__.update(self.__dict__, net=net, _watch=Watch(net, self.watched, not self.is_fused))
        program.__dict__.update(_outside=OutsideWatch(net, self.outside))
        return program

    def interpreted_by(self, make: Callable[[Program, fx.Graph], fx.Interpreter]) -> Program:
        """Return the program with its graphs run node by node by interpreters from `make`, for profiling."""
        program = self.bind_to(self.net)

        def run_by(graph: fx.Graph) -> Callable[..., Any]:
            def run(names: Names, *first: Any, **arguments: Any) -> Any:
                return make(program, graph).run(*in_order(graph, arguments, *first))

            return run

        halves = run_by(self.halves.before), run_by(self.halves.after)
        run_unchanged = run_by(self.unchanged) if self.unchanged is not None else None
        program.__dict__.update(_run=run_by(self.graph), _run_halves=halves, _run_unchanged=run_unchanged)
        return program

    def __getstate__(self) -> dict[str, Any]:
        state = {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "net"}
        return state | {name: state[name] and pack_graph(state[name]) for name in _GRAPHS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, net=None)
        self.__dict__.update({name: state[name] and unpack_graph(state[name]) for name in _GRAPHS})
        self.__post_init__()

    @cached_property
    def halves(self) -> Halves:
        """The graph cut in two where the mask is computed."""
        return halves(self.graph)

    @cached_property
    def _run_halves(self) -> tuple[Any, Any]:
        return runnable(self.halves.before), runnable(self.halves.after)

    def names(self) -> Names:
        """Return the namespace from which the generated code reads modules and parameters.

        Raises:
            InvalidInput: a module was replaced after the conversion, or has a hook that would not be called.
        """
        names = Names(self.net)
        if not running.in_graph:
            self._watch()
            self.check_outside()
            names.look_up_all()
        return names

    def check_outside(self) -> None:
        """Compare attributes and global values that the network's code reads with those at the conversion.

        Raises:
            GuardFailed: one is another; the graph does not hold for it.
            InvalidInput: the same of an inference copy.
        """
        try:
            self._outside()
        except Changed as change:
            if not self.is_fused:
                raise GuardFailed(
                    f"{change}.",
                    why="the network's code reads it, and the network was converted with the value that it had.",
                    next="convert it with this value: set it on the network first, and call cs.adaptify then.",
                ) from None
            raise frozen_copy(f"{change}.") from None

    @property
    def state_outside(self) -> str:
        """A text that is the same while attributes and global values that the network's code reads are the same."""
        return self._outside.state()

    def check_modules(self) -> None:
        """Check that the modules are those that were converted, with the same settings.

        Raises:
            InvalidInput: see `names`.
        """
        self._watch()

    @property
    def is_counted(self) -> bool:
        """True if layers have hooks of a tool that counts work, which `counters.calling_counters` calls."""
        if running.in_graph:
            return False
        self._watch()
        return self._watch.is_counted

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call by the original's parameter names, with defaults."""
        return bind_all(self.signature, args, kwargs)

    def contain(self, output: Any) -> Any:
        """Convert the output of a graph to the original's type."""
        return contain(output, self.container)

    def masking(self, provider: MaskProvider) -> Masking:
        """Return the masking of a mask provider, which computes its lattices."""
        plan = self.plan
        return Masking(provider, self.geometry, plan.strides[0], unit=self.net._unit, around=plan.around)

    @property
    def own_level(self) -> int | None:
        """The level at which the network's own graph gives what this program gives; None if it has no such graph."""
        return self.plan.identity_level if self.unchanged is not None else None

    def graph_at(self, level: int | None) -> fx.Graph:
        """Return the graph that computes a call with all cells at a level, or at several (None): the network's own one,
        where it gives the same."""
        own = self.unchanged if level is not None and level == self.own_level else None
        return self.graph if own is None else own

    # -- running on the arguments of a call by name, without checks --------------------------------

    def __call__(self, masking: Any, arguments: dict[str, Any]) -> Masked:
        """Return output and lattice for a masking, a callable (image, fine map) -> Lattice."""
        self.check_kinds(arguments)
        output, lattice = self._run(self.names(), masking, **arguments)
        return self.contain(output), lattice

    def run_original(self, level: int, arguments: dict[str, Any]) -> Masked:
        """Run the network's own graph, whose maps are all at the given level; return output and lattice."""
        self.check_kinds(arguments)
        output, fine = self._run_unchanged(self.names(), **arguments)
        return self.contain(output), self.geometry.uniform_like(fine, level)

    def before(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Run the first half and return all values that the second half needs."""
        self.check_kinds(arguments)
        values: tuple[Any, ...] = self._run_halves[0](self.names(), **arguments)
        return values

    def after(self, masking: Any, values: tuple[Any, ...]) -> Masked:
        """Run the second half and return output and lattice."""
        output, lattice = self._run_halves[1](self.names(), masking, *values)
        return self.contain(output), lattice

    def ask(self, masking: Any, values: tuple[Any, ...]) -> Lattice:
        """Compute the lattice of a masking from the first half's values, after a first pass if its mask needs one."""
        with self.ahead(masking.provider, values):
            lattice: Lattice = masking(values[self.halves.image], values[self.halves.features])
        return lattice

    @contextmanager
    def ahead(self, provider: MaskProvider, values: tuple[Any, ...]) -> Iterator[None]:
        """Provide the outputs of first passes (all cells at one level) to a mask that is computed in the block.

        Args:
            provider: the mask; if it needs no first pass, nothing is run.
            values: results of the first half; they are not changed.
        """
        if not provider.looks_ahead:
            yield
            return
        levels, scale = provider.first_passes(self.geometry.max_level), provider.preview_scale
        with torch.no_grad(), evaluating(self.net):
            outputs = {level: self.at_level(level, values) for level in levels}
            preview = self.preview(scale, values[self.halves.image]) if scale else None
        with first_passes(outputs, preview):
            yield

    def preview(self, scale: float, image: Tensor) -> Any:
        """Run the network as given, or with everything low if that is not among its levels, on a smaller picture."""
        if len(self.signature.parameters) > 1 or not self.image_name:
            raise InvalidInput(
                "the network cannot be run on a smaller picture.",
                where="mask preview",
                why="it takes more than a picture, or computes from its arguments the picture that masks see.",
                next="choose a mask that looks at the picture, e.g. content or edges.",
            )
        arguments = self.bind(self.smaller(scale, image))
        if self.own_level is not None:
            return self.run_original(self.own_level, arguments)[0]
        own = self.plan.identity_level
        return self(self.uniform(self.geometry.max_level if own is None else own), arguments)[0]

    def smaller(self, scale: float, image: Tensor) -> Tensor:
        """Return a smaller picture, with sides of whole cells of the lowest resolution."""
        cell = self.plan.strides[0] * self.geometry.sides[self.geometry.max_level]
        size = [max(1, round(length * scale / cell)) * cell for length in image.shape[2:]]
        dtype = image.dtype if image.is_floating_point() else torch.get_default_dtype()
        wide = image.to(torch.promote_types(dtype, torch.float32))
        small = F.interpolate(wide, size, mode="bilinear", align_corners=False, antialias=True)
        return small.to(dtype).contiguous(memory_format=torch.channels_last)

    def at_level(self, level: int, values: tuple[Any, ...]) -> Any:
        """Run the second half with all cells at a level; the first half's results are not changed."""
        return self._run_halves[1](self.names(), self.uniform(level), *clone_values(values))[0]

    def uniform(self, level: int) -> Callable[[Tensor, Tensor], Lattice]:
        """Return the masking with all cells at a level."""
        return lambda image, features: self.geometry.uniform_like(features, level)

    def run_after_first_pass(self, masking: Masking, arguments: dict[str, Any]) -> Masked:
        """Return output and lattice for a mask that reads the outputs of first passes."""
        values = self.before(arguments)
        with self.ahead(masking.provider, values):
            return self.after(masking, values)

    def image(self, arguments: dict[str, Any]) -> Any:
        """Return the image among the arguments of a call, which the mask reads."""
        return arguments.get(self.image_name) if self.image_name else image_of(arguments)

    # -- checking the arguments --------------------------------------------------------------------

    def check_kinds(self, arguments: dict[str, Any]) -> None:
        """Compare the arguments of a call with those of the call that was traced.

        Raises:
            GuardFailed: one is of another kind, see `argument_kind`; the graph does not hold for it.
        """
        for name, value in arguments.items():
            if name in self.kinds and argument_kind(value) != self.kinds[name]:
                raise GuardFailed(
                    f"{name}={describe(value)} is not what the network was converted with.",
                    why="its Python code may ask for the type of an argument, its length, its keys or whether it is "
                    "there, and do something else then.",
                    next=f"give {name} as at the conversion, or convert with this call: example_input= takes the "
                    "arguments of a call.",
                )


def frozen_copy(what: str) -> InvalidInput:
    """Return the error for an inference copy whose attributes are changed."""
    return InvalidInput(
        what,
        why="an inference copy keeps the values of the time when it was made.",
        next="set it on the network that the copy was made from, and call optimize() again.",
    )


def refuse_torchscript() -> None:
    """Raise an error while torch.jit traces a network.

    Raises:
        CannotConvert: it does; or it looks through the network's attributes before.
    """
    if is_traced_by_jit():
        raise _no_torchscript()


def _no_torchscript() -> CannotConvert:
    return CannotConvert(
        "torch.jit cannot trace or script a converted network.",
        why="a trace would keep the elements of one image, and what is high differs from image to image.",
        next="write a file: cs.export(net, image, 'net.onnx'), or 'net.pt2' for torch.export.load; "
        "net.macs(x) counts the work of a call, and so does torch's FlopCounterMode.",
    )


class Derived(nn.Module):
    """Base of all networks that are made from another one: they take over its modules, and may add tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_own_not_missing)

    def __prepare_scriptable__(self) -> Self:
        raise _no_torchscript()

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True if a parameter or buffer was added to those of the original."""
        return False

    @property
    def is_optimized(self) -> bool:
        """True for an inference copy."""
        return False

    def adopt(self, model: nn.Module) -> dict[str, Tensor]:
        """Take over modules, parameters, buffers and mode of a network; return the tensors among its attributes."""
        for kind in PARTS:
            getattr(self, kind).update(getattr(model, kind))
        self.training = model.training
        return {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as for any module; an optimised copy refuses `mode=True`.

        Raises:
            InvalidInput: the network is an optimised copy and `mode` is True.
        """
        if mode and self.is_optimized:
            raise InvalidInput(
                "an optimised network cannot be trained.",
                why="its batch norms are folded into its convolutions.",
                next="train the network it was made from, and call optimize() again.",
            )
        return super().train(mode)

    def check_storable(self) -> None:
        """Refuse to save an inference copy, by an `InvalidInput`."""
        if self.is_optimized:
            raise InvalidInput(
                "an optimised network cannot be saved.",
                why="its weights are folded and no longer the original's.",
                next="save the network it was made from, and call optimize() after loading.",
            )


class ProgramNetwork(Derived):
    """A network that runs a program by a mask: what fusing, counting and quantising need to know of it."""

    _program: Program
    _mask_provider: MaskProvider
    _constants: dict[str, Tensor]
    _unit: Unit
    _paths: dict[tuple[Any, ...], Program]

    @property
    def adaptive_part(self) -> Self:
        """The adaptive network: this network, or the part that it hosts."""
        return self

    def use_program(self, program: Program) -> None:
        """Replace the network's program, bound to the modules of this network."""
        self._program = program.bind_to(self)

    def restate(self, plan: Plan) -> None:
        """Replace the plan by one with the same decisions and more information."""
        self.use_program(replace(self._program, plan=plan))

    @property
    def original_signature(self) -> inspect.Signature:
        """The signature of a call of the original network."""
        return self._program.signature

    @property
    def program(self) -> Program:
        """The program of the adaptive part, for tools."""
        return self._program

    @property
    def plan(self) -> Plan:
        """The plan of the conversion: the action at every node, and its reason."""
        return self.program.plan

    @property
    def geometry(self) -> Geometry:
        """The geometry by which lattices are built and read."""
        return self.program.geometry

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph."""
        return self.program.graph

    @property
    def mask(self) -> MaskProvider:
        """The mask provider; accepts anything that `adaptify` takes as a mask."""
        return self._mask_provider

    @mask.setter
    def mask(self, mask: object) -> None:
        self._mask_provider = resolve_mask(mask)

    @property
    def counted(self) -> Program:
        """The program of a copy on meta tensors, on which operations are counted."""
        raise NotImplementedError


def _own_not_missing(net: Any, keys: Any) -> None:
    """Accept a state dict of the original network, which lacks the added tensors."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not net.is_own(name)]


def clone_values(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the first half's results, because the region may change its inputs in place."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


class Names:
    """The namespace that the generated code reads as `self`: only modules and tensors, so that a network may have a
    submodule named `mask` or `plan`."""

    def __init__(self, owner: Any) -> None:
        """Take the `AdaptiveModel`."""
        self._owner = owner

    def look_up_all(self) -> None:
        """Look up all modules and tensors now, which saves a call of Python for each that the code reads."""
        owner, found = self._owner, vars(self)
        for values in (owner._buffers, owner._parameters, owner._modules):
            found.update(values)

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


class GraphInterpreter(Interpreter):
    """Runs a graph of an adaptive network with the modules and parameters of its program."""

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        parts: Mapping[str, Lattice] | None = None,
        note: Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None] | None = None,
    ) -> None:
        """Take a program and its graph, or a part of it.

        Args:
            program: the program.
            graph: the graph.
            parts: reduced lattices, on which the nodes of these names run.
            note: given each node with its value and those of its inputs, when it has run.
        """
        super().__init__(nn.Module(), graph=graph)
        self.module: Any = program.names()
        self._parts, self._note = parts or {}, note

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if self._note is not None:
            self._note(n, value, self.env)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, with its reduced lattice in place of its stage."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        part = self._parts.get(n.name)
        return args, kwargs if part is None else {**kwargs, "stage": part}


def runnable(graph: fx.Graph) -> Any:
    """Compile a graph to a Python function, whose first argument is `Program.names()`."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, GRAPH_FILE, "exec"), scope)
    return scope["forward"]
