"""The networks of all methods, and all that they have in common: files, copies, counts, refusals.

A method is a subclass of `ConvertedModel`, or of `GraphModel` if it runs a graph in steps, with a plan
(`report.MethodPlan`) and a count (`report.MethodMacs`), and `@register` above it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import Source
from cadsurgery.masks.masking import check_image
from cadsurgery.methods import files
from cadsurgery.methods.program import Program, Work, work_of
from cadsurgery.methods.report import RULES, MethodMacs, MethodPlan
from cadsurgery.network.candidates import check_network
from cadsurgery.network.fuse import KERNELS, fuse, split_norms
from cadsurgery.network.macs import meta_copy
from cadsurgery.network.storage import OTHER_MODEL, as_file_error, build_stated
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.surgery.arguments import image_of
from cadsurgery.surgery.hooks import copying, freeze_computed_weights

_REMEMBERED = 16  # values of the last few calls
M = TypeVar("M", bound="type[ConvertedModel]")
METHODS: dict[str, type[ConvertedModel]] = {}


def register(kind: M) -> M:
    """Make the networks of a class ones that `cadsurgery.save` and `load` know; the class defined last counts."""
    METHODS[kind.method] = kind
    return kind


class ConvertedModel(nn.Module):
    """A network that a method made.

    Attributes:
        method: its name in files.
        converted_by: the function that gives one, as users call it.
        already: what is said of a network that is converted already.
        convert: that function itself.
        plan_type: of its plans.
        option_types: of the options that its files hold: those of `convert`, and further attributes of the network.
        field_types: of what else its files hold.
        plan: what was made of the network.
        options: of `convert`, as values.
        source: where the network came from, if it was built by name.
    """

    method: ClassVar[str]
    converted_by: ClassVar[str]
    already: ClassVar[str] = "this network is converted already."
    convert: ClassVar[Callable[..., Any]]
    plan_type: ClassVar[type[MethodPlan]]
    option_types: ClassVar[dict[str, Any]] = {}
    field_types: ClassVar[dict[str, Any]] = {}
    plan: Any
    source: Source | None = None
    _transient: ClassVar[dict[str, Any]] = {}  # attributes of the last calls, as they are at first

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}
        self.register_load_state_dict_post_hook(_own_not_missing)

    # -- what a method may say in its own way ------------------------------------------------------

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True if a parameter or buffer is not the original's."""
        return False

    @property
    def is_optimized(self) -> bool:
        """True if it is an inference copy."""
        return False

    def macs(self, *args: Any, rule: str = "conv", **kwargs: Any) -> MethodMacs:
        """Multiply-accumulates on an image."""
        raise NotImplementedError

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of its file by name, and fields that other methods do not have."""
        return self.state_dict(), {}

    def fitting(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, as older ones have to be changed to be this network's."""
        return tensors

    @classmethod
    def check_stored(cls, path: str | Path, stored: files.Stored, tensors: dict[str, Tensor]) -> None:
        """Refuse options of a file that ask for more than there is."""

    @classmethod
    def rebuild(
        cls, path: str | Path, stored: files.Stored, tensors: dict[str, Tensor], model: nn.Module | None
    ) -> Self:
        """The network of a file, in evaluation mode.

        Args:
            path: of the file, for messages.
            stored: its metadata, checked.
            tensors: its tensors.
            model: the original architecture; needed if the network was not built by name.

        Raises:
            FileError: it does not fit the model.
        """
        if model is None:
            of_model = {name: value for name, value in tensors.items() if not cls.is_own(name)}
            model = build_stated(path, stored.source, of_model)
        with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
            net = cls._convert_again(check_network(model), stored)
        files.check_plan(path, net.plan, stored.plan)
        files.fill(path, net, net.fitting(tensors))
        return net

    # -- what all have -----------------------------------------------------------------------------

    @classmethod
    def _convert_again(cls, model: nn.Module, stored: files.Stored, **given: Any) -> Self:
        """A network converted as another was; options that `convert` does not take are set afterwards."""
        taken = inspect.signature(cls.convert).parameters
        given |= {name: value for name, value in stored.options.items() if name in taken}
        dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        example = torch.zeros(stored.plan.example_shape, dtype=dtype)
        net: Self = cls.convert(model, **given, example_input=example).eval()
        for name in stored.options.keys() - taken.keys():
            setattr(net, name, stored.options[name])
        return net

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are attributes, as they are now: those a file holds beside `options`."""
        return {name: getattr(self, name) for name in self.option_types if name not in self.options}

    @classmethod
    def refuse_again(cls, model: object) -> None:
        """Refuse a network in which one of this method is.

        Raises:
            InvalidInput: it is converted already.
        """
        if isinstance(model, nn.Module) and any(isinstance(part, cls) for part in model.modules()):
            raise InvalidInput(cls.already, next="pass the network it was made from.")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the original does not have, by name."""
        return {name: value for name, value in self.named_parameters() if self.is_own(name)}

    def train(self, mode: bool = True) -> Self:
        """As of any network; refused of an optimised copy.

        Raises:
            InvalidInput: it is one, and mode is True.
        """
        if mode and self.is_optimized:
            raise InvalidInput(
                "an optimised network cannot be trained.",
                why="its batch norms are folded into its convolutions.",
                next="train the network it was made from, and call optimize() again.",
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.__dict__.update(copy.deepcopy(self._transient))  # of another type, or elsewhere
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **copy.deepcopy(self._transient)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo.update({**copying(self), **memo, id(self): clone})
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone


def _own_not_missing(net: Any, keys: Any) -> None:
    """A state dict of the original loads: it has nothing of the method's own."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not net.is_own(name)]


class Fused(NamedTuple):
    """A network for inference.

    Attributes:
        module: with its modules, kernels among them.
        graph: that calls them.
        origins: of nodes of the graph the node they were made of, by name.
    """

    module: nn.Module
    graph: fx.Graph
    origins: dict[str, str]

    def kernel(self, node: fx.Node) -> Any:
        """The kernel that a node calls; None if it is something else."""
        is_kernel = node.op == "call_module" and str(node.target).startswith(f"{KERNELS}.")
        return self.module.get_submodule(str(node.target)) if is_kernel else None


class GraphModel(ConvertedModel):
    """A network that is run as steps of a graph, on modules that are its own, under their names."""

    program: Any
    _transient: ClassVar[dict[str, Any]] = {"_known": {}}

    def __init__(self, model: nn.Module, program: Any, options: dict[str, Any], **settings: Any) -> None:
        """Take over the modules, parameters and buffers of a network.

        Args:
            model: the network, with what the method added.
            program: what is run.
            options: of `convert` that stay as they are.
            settings: attributes.
        """
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(self, kind).update(getattr(model, kind))
        self.constants = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
        self.training = model.training
        self.program, self.options = program, options
        self._known: dict[Any, Any] = {}
        for name, value in settings.items():
            setattr(self, name, value)

    @property
    def is_optimized(self) -> bool:
        """True if it is an inference copy."""
        return self.program.is_fused

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], rule: str = "conv") -> dict[str, Any]:
        """Arguments of a call by name, checked.

        Raises:
            InvalidInput: what is no image batch.
            UnknownName: no such counting rule.
        """
        check_name("counting rule", rule, RULES)
        arguments = self.program.bind(args, kwargs)
        check_image(image_of(arguments))
        return arguments

    def work(self, arguments: dict[str, Any]) -> Work:
        """Shapes and multiply-accumulates of a call before it is run; remembered for the last few shapes."""
        key = tuple(
            (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, repr(value))
            for name, value in arguments.items()
        )
        work: Work = self.remember(
            ("work", key),
            lambda: work_of(
                self.program.steps, self.remember("meta copy", lambda: meta_copy(self)), arguments
            ),
        )
        return work

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value that `make` gives; remembered for the last few keys."""
        if key not in self._known:
            value = make()
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = value
        return self._known[key]

    def fused(self, *kept: str) -> Fused:
        """Its modules and its graph for inference: batch norm folded, residuals and activations fused, weights packed.

        Args:
            kept: children that the graph does not call.
        """
        source = copy.deepcopy(self).eval().requires_grad_(False)
        graph = self.program.graph
        used = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        freeze_computed_weights(source, {"", *used})
        for name, value in self.constants.items():
            source.register_buffer(name, value)
        graph, origins = split_norms(graph, source)
        graph, kernels = fuse(graph, source)
        source.add_module(KERNELS, kernels)
        module = fx.GraphModule(source, graph)
        for name in kept:
            module.add_module(name, source._modules[name])
        fused = Fused(module, graph, origins)
        for node in graph.nodes:
            if (kernel := fused.kernel(node)) is not None:
                origins[node.name] = kernel.origin
        return fused

    def inference_copy(self, fused: Fused, program: Program) -> Self:
        """A network of its kind that runs a program on the modules of `fused`."""
        net = type(self)(fused.module, program, self.options, **self.settings)
        net.plan, net.source = self.plan, self.source
        return net.eval()
