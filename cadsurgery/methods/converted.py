"""Base classes of the networks of all methods: files, copies, counts and refusals.

Files have the tensors as safetensors and everything else as JSON metadata, both with checksums. Nothing that a file
names is built or run without the user's consent.

A method is a subclass of `ConvertedModel`, or of `GraphModel` if it runs a graph in steps, decorated with
`@register`. It has a plan (`report.MethodPlan`) and a count of MACs (`report.MethodMacs`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from torch import Tensor, fx, nn

from cadsurgery.data.networks import Source, channels_of
from cadsurgery.following.arguments import bind_all, image_of
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.graphs import parts_read
from cadsurgery.following.hooks import copying, freeze_computed_weights
from cadsurgery.masks.masking import check_image
from cadsurgery.methods.program import CallWork, work_of
from cadsurgery.methods.report import MethodMacs, MethodPlan
from cadsurgery.network import storage
from cadsurgery.network.fuse import KERNELS, fuse, split_norms
from cadsurgery.network.macs import meta_copy
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import Derived
from cadsurgery.network.storage import METHOD, OTHER_MODEL, Stored, build_stated, example_for, fill
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.files import as_file_error

_REMEMBERED = 16  # shapes of calls whose work a `GraphModel` knows
M = TypeVar("M", bound="type[ConvertedModel]")
METHODS: dict[str, type[ConvertedModel]] = {}


def register(kind: M) -> M:
    """Let `cadsurgery.save` and `load` handle networks of this class; a later class of the method replaces it."""
    METHODS[kind.method] = kind
    return kind


class ConvertedModel(Derived):
    """A network that a method converted.

    Attributes:
        method: name of the method in files.
        converted_by: public name of the function that converts, for messages.
        already: message for a network that is converted already.
        convert: the function that converts.
        plan_type: class of the plans.
        group: name of the parameters that the method adds, as a group of trained ones; empty for none.
        group_in_words: a network that has the group, in words, where the group can be trained alone; else empty.
        by_length: True if AdamW trains the group's tensors at a rate divided by their number of values.
        child: name of the child module that holds the group.
        objective: name of the objective by which `fit` trains such networks.
        option_types: types of the options in files: those of `convert`, and further attributes of the network.
        field_types: types of the other fields in files.
        plan: how the network was converted.
        options: arguments of `convert`, as plain values.
        source: where the network came from, if it was built by name.
    """

    method: ClassVar[str]
    converted_by: ClassVar[str]
    already: ClassVar[str] = "this network is converted already."
    convert: ClassVar[Callable[..., Any]]
    plan_type: ClassVar[type[MethodPlan]]
    group: ClassVar[str] = ""
    group_in_words: ClassVar[str] = ""
    by_length: ClassVar[bool] = False
    child: ClassVar[str] = ""
    objective: ClassVar[str] = ""
    option_types: ClassVar[dict[str, Any]] = {}
    field_types: ClassVar[dict[str, Any]] = {}
    plan: Any
    source: Source | None = None
    _transient: ClassVar[dict[str, Any]] = {}  # attributes filled by calls, with their initial values

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}

    # -- methods may override these ----------------------------------------------------------------

    def macs(self, *args: Any, **kwargs: Any) -> MethodMacs:
        """Count the multiply-accumulates on an image."""
        raise NotImplementedError

    def optimize(self) -> Any:
        """Return an inference copy."""
        return copy.deepcopy(self).eval()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of the file by name, and metadata fields of this method."""
        return self.state_dict(), {}

    @property
    def inner(self) -> nn.Module:
        """The network that was converted: this one, or the one that it holds."""
        return self

    @property
    def original_signature(self) -> inspect.Signature:
        """The signature of a call of the original network."""
        return signature_of(self.inner)

    @property
    def decided_by(self) -> str:
        """What decides where the network computes, in words."""
        return self.method

    def identity(self) -> dict[str, Any]:
        """Return the plain values, besides the plan, that must be the same when a training is resumed."""
        return {}

    def train_part(self) -> None:
        """Set the training mode in which the group alone is trained, in a network in evaluation mode."""

    @classmethod
    def rebuild(
        cls, path: str | Path, stored: Stored, tensors: dict[str, Tensor], model: nn.Module | None
    ) -> Self:
        """Build the network of a file, in evaluation mode.

        Args:
            path: path of the file, for messages.
            stored: the checked metadata.
            tensors: the tensors.
            model: the original architecture; needed if the network was not built by name.

        Raises:
            FileError: the file does not fit the model.
        """
        if model is None:
            of_model = {name: value for name, value in tensors.items() if not cls.is_own(name)}
            model = build_stated(path, stored.source, of_model)
        net = cls._convert_again(path, model, stored)
        fill(path, net, tensors)
        return net

    # -- common to all methods ---------------------------------------------------------------------

    @classmethod
    def _convert_again(cls, path: str | Path, model: nn.Module, stored: Stored, **given: Any) -> Self:
        """Convert `model` with the options of a file; those that `convert` does not take are set afterwards.

        Raises:
            FileError: it cannot be converted, or its plan is not that in the file.
        """
        parameters = inspect.signature(cls.convert).parameters
        given |= {name: value for name, value in stored.options.items() if name in parameters}
        with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
            example = example_for(stored.plan, model)
            net: Self = cls.convert(model, **given, example_input=example).eval()
            for name in stored.options.keys() - parameters.keys():
                setattr(net, name, stored.options[name])
        if net.plan != stored.plan:
            raise FileError(
                f"{path} holds another plan than this model gives.",
                next="pass the model it was made from, or make it again.",
            )
        return net

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Check the arguments of a call and return them by name.

        Raises:
            InvalidInput: the image is not an image batch.
        """
        arguments = bind_all(self.original_signature, args, kwargs)
        check_image(image_of(arguments))
        return arguments

    @property
    def settings(self) -> dict[str, Any]:
        """The current values of options that are attributes; files store them beside `options`."""
        return {name: getattr(self, name) for name in self.option_types if name not in self.options}

    @classmethod
    def refuse_again(cls, model: object) -> None:
        """Refuse a network that contains a network of this method.

        Raises:
            InvalidInput: the network is converted already.
        """
        if isinstance(model, nn.Module) and any(isinstance(part, cls) for part in model.modules()):
            raise InvalidInput(cls.already, next="pass the network it was made from.")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the method added, by name."""
        return {name: value for name, value in self.named_parameters() if self.is_own(name)}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.__dict__.update(copy.deepcopy(self._transient))  # cached values have the former dtype or device
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **copy.deepcopy(self._transient)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo.update({**copying(self), **memo, id(self): clone})
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone


def pack(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the contents of a converted network's file: tensors by name, and metadata as plain values.

    Raises:
        InvalidInput: the network is not converted, or is an inference copy.
    """
    if not isinstance(net, ConvertedModel):
        return storage.pack(net)
    net.check_storable()
    tensors, more = net.pack()
    source = net.source if net.source is not None and ":" in net.source.name else None
    options = {**net.options, **net.settings}
    return tensors, {METHOD: net.method, **more, **storage.describe(net, tensors, source, options, net.plan)}


def kind_of(path: str | Path, values: Mapping[str, Any]) -> type[ConvertedModel] | None:
    """Return the class of the network that metadata are of; None for an adaptive network.

    Raises:
        FileError: no class is registered for its method.
    """
    name = str(values.get(METHOD, ""))
    if name and name not in METHODS:
        raise FileError(
            f"{path} was made by a method {name!r:.60}.",
            next="update cadsurgery, or import the module that registers the method.",
        )
    return METHODS[name] if name else None


def unpack(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None,
    *,
    mask: object = None,
    trust: bool = False,
) -> AdaptiveModel | ConvertedModel:
    """Build the network from the contents of a file, in evaluation mode.

    Args:
        path: path of the file, for messages.
        values: the metadata.
        tensors: the tensors.
        model, mask, trust: see `cadsurgery.load`.

    Raises:
        FileError: the file is damaged, does not fit the model, or its example is too large to be created.
        InvalidInput: a mask is given for a network that has none.
    """
    kind = kind_of(path, values)
    if kind is None:
        return storage.unpack(path, values, tensors, model, mask=mask, trust=trust)
    if mask is not None:
        raise InvalidInput(f"{path} holds a network without masks.", next="leave out mask=, --mask.")
    stored = storage.read_stored(path, values, kind, tensors, trust)
    net = kind.rebuild(path, stored, tensors, model)
    net.source = replace(stored.source, channels=channels_of(net)) if stored.source else net.source
    if net.source is not None:
        net.source = replace(net.source, license=stored.fields["license"])
    return net


class Fused(NamedTuple):
    """A network prepared for inference.

    Attributes:
        module: the network, with the fused kernels as submodules.
        graph: the graph that calls these modules.
        origins: for each node of the graph the name of the original node.
    """

    module: nn.Module
    graph: fx.Graph
    origins: dict[str, str]

    def kernel(self, node: fx.Node) -> Any:
        """Return the fused kernel that a node calls; None for any other node."""
        is_kernel = node.op == "call_module" and str(node.target).startswith(f"{KERNELS}.")
        return self.module.get_submodule(str(node.target)) if is_kernel else None


class GraphModel(ConvertedModel):
    """A network that runs a graph in steps, on its own modules, which keep the names of the original."""

    program: Any
    _transient: ClassVar[dict[str, Any]] = {"_works": {}, "_on_meta": ()}
    _on_meta: tuple[nn.Module, ...] = ()  # so that it is not registered as a child

    def __init__(self, model: nn.Module, program: Any, options: dict[str, Any], **settings: Any) -> None:
        """Take over the modules, parameters and buffers of a network.

        Args:
            model: the network, including what the method added.
            program: the program to run.
            options: arguments of `convert` that do not change.
            settings: attributes to set.
        """
        super().__init__()
        self._constants = self.adopt(model)
        self.program, self.options = program, options
        self._works: dict[Any, CallWork] = {}
        for name, value in settings.items():
            setattr(self, name, value)

    @property
    def original_signature(self) -> inspect.Signature:
        """The signature of a call of the original network."""
        signature: inspect.Signature = self.program.signature
        return signature

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the arguments of a call."""
        return {name: one.default for name, one in self.original_signature.parameters.items()}

    @property
    def is_optimized(self) -> bool:
        """True for an inference copy."""
        return self.program.is_fused

    def work(self, arguments: dict[str, Any]) -> CallWork:
        """Return shapes and multiply-accumulates of a call without running it; cached for the last few shapes."""
        key = tuple(
            (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, repr(value))
            for name, value in arguments.items()
        )
        if key not in self._works:
            self._on_meta = self._on_meta or (meta_copy(self),)
            while len(self._works) >= _REMEMBERED:
                del self._works[next(iter(self._works))]
            self._works[key] = work_of(self.program.steps, self._on_meta[0], arguments)
        return self._works[key]

    def fused(self) -> Fused:
        """Prepare modules and graph for inference: fold batch norm, fuse residuals and activations, pack weights."""
        source = copy.deepcopy(self).eval().requires_grad_(False)
        graph = self.program.graph
        used = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        freeze_computed_weights(source, {"", *used})
        for name, value in self._constants.items():
            source.register_buffer(name, value)
        graph, origins = split_norms(graph, source)
        graph, kernels = fuse(graph, source)
        source.add_module(KERNELS, kernels)
        module = parts_read(source, graph)
        if self.child and self.child not in module._modules:
            module.add_module(self.child, source._modules[self.child])
        fused = Fused(module, graph, origins)
        for node in graph.nodes:
            if (kernel := fused.kernel(node)) is not None:
                origins[node.name] = kernel.origin
        return fused

    def inference_copy(self, fused: Fused, **changes: Any) -> Self:
        """Create a network of the same class that runs a fused graph, by its program with these changes."""
        program = replace(self.program, graph=fused.graph, is_fused=True, **changes)
        net = type(self)(fused.module, program, self.options, **self.settings)
        net.plan, net.source = self.plan, self.source
        return net.eval()
