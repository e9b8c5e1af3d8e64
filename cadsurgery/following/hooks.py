"""Handle hooks and replaced modules, since a rewritten network does not call most of its modules.

For a convolution it only reads the weight, after running the hooks that compute the weight (`prepare_weights`);
containers are not called at all. A hook that needs a real call is refused or respected: if it exists at conversion, its
module stays dense; `Watch` finds hooks that are added later and raises an error.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, ValuesView
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.torch_internals import tree_leaves

# Hooks that only compute a parameter before each call.
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Types that `copy.deepcopy` can copy or shares, and the dictionaries in which modules keep parameters and submodules.
_COPIED = (
    *(bool, int, float, complex, str, bytes, type(None), type),
    *(FunctionType, BuiltinFunctionType, Tensor, nn.Module),
)
_REGISTRIES = frozenset(("_parameters", "_buffers", "_modules"))
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def is_hooked(module: nn.Module | None) -> bool:
    """True if a module has forward hooks, which whoever does not call it would bypass."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def prepare_weights(module: nn.Module) -> nn.Module:
    """Run the hooks that compute a module's parameters, as a call would, and return the module."""
    if module._forward_pre_hooks:
        for hook in tuple(module._forward_pre_hooks.values()):
            if isinstance(hook, _COMPUTING):
                hook(module, ())
    return module


def parameter(module: nn.Module, name: str) -> Any:
    """Return a parameter of a prepared module."""
    return getattr(module, name)


def stays_whole(module: nn.Module, hooks_in_graph: bool = False) -> str:
    """Return why a module must be called on dense maps, or "": a call does more than its class's forward.

    Args:
        module: the module.
        hooks_in_graph: true if its hooks were traced as code of the network.
    """
    if is_replaced(module):
        return "its forward was exchanged for another one than that of its class"
    for part in () if hooks_in_graph else module.modules():
        for kind in _KINDS:
            if any(not isinstance(hook, _COMPUTING) for hook in getattr(part, kind).values()):
                name = kind.strip("_").removesuffix("s").replace("_", " ")
                return f"it has a {name}, which is called with maps"
    return ""


def is_apart(module: nn.Module, model: nn.Module) -> bool:
    """True if a module must be called as a whole, because of hooks that tracing through it would lose.

    Hooks that belong to the network itself, such as those that collect its features, are part of its forward.
    """
    hooks = [hook for kind in _KINDS for hook in getattr(module, kind).values()]
    return any(isinstance(hook, SpectralNorm) or not _is_own(hook, model) for hook in hooks)


def is_replaced(module: nn.Module) -> bool:
    """True if a module instance has its own `forward` that overrides its class's."""
    return "forward" in vars(module)


def _is_own(hook: Any, model: nn.Module) -> bool:
    """True if a hook computes a weight, is a method of one of the network's modules or of an object they hold, or a
    function that their code or their library makes."""
    if isinstance(hook, _COMPUTING):
        return True
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    if owner is None:
        return isinstance(hook, FunctionType) and _is_made_by(hook, model)
    return any(owner is held for part in model.modules() for held in (part, *_held(part)))


def _is_made_by(hook: FunctionType, model: nn.Module) -> bool:
    """True if a function is defined inside a method of the network's classes, or in the installed library of one."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    if any(hook.__qualname__.startswith(f"{kind.__qualname__}.") for kind in kinds):
        return True
    packages = {kind.__module__.partition(".")[0] for kind in kinds} - {"torch", "builtins"}
    is_installed = bool(
        {"site-packages", "dist-packages"}.intersection(Path(hook.__code__.co_filename).parts)
    )
    return is_installed and str(hook.__module__).partition(".")[0] in packages


def noting_hooks(module: nn.Module, model: nn.Module, every: bool) -> tuple[list[Any], list[Any]]:
    """Return the hooks of a module that are code of the network and run with its inputs, and with its output too: its
    own, or with `every` all of them, but not those that compute a weight."""
    before, after = (
        [(hook, key in named) for key, hook in hooks.items() if not isinstance(hook, _COMPUTING)]
        for hooks, named in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        )
    )
    return tuple([pair for pair in pairs if every or _is_own(pair[0], model)] for pairs in (before, after))  # type: ignore[return-value]


def _held(module: nn.Module) -> Iterator[Any]:
    """Yield the attributes of a module, and the items of attributes that are lists and dictionaries."""
    for value in vars(module).values():
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


def take_over(net: nn.Module, model: nn.Module) -> None:
    """Copy the hooks registered on one network itself to another network."""
    for kind in (*_KINDS, *_OPTIONS):
        getattr(net, kind).update(getattr(model, kind))
    net._is_full_backward_hook = model._is_full_backward_hook


def copying(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` of a network.

    Computed weights, which torch refuses to copy, are detached. Foreign hooks are shared, because their owners read
    their records. Objects that cannot be copied, such as locks, open files and Python modules, are shared as well.
    """
    memo = {id(value): value for value in _find_uncopyable(*map(vars, model.modules()))}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for kind in _KINDS:
            memo |= {id(hook): hook for hook in getattr(module, kind).values() if not _is_own(hook, model)}
    return memo


def why_not_copied(model: nn.Module) -> str:
    """Return the name of the attribute that keeps a network from being copied; "" if there is none."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _REGISTRIES and not isinstance(value, (nn.Module, Tensor)):
                try:
                    copy.deepcopy(value, copying(model))
                except Exception:  # foreign code may raise any error
                    return f"{path}.{name}".removeprefix(".")
    return ""


def _find_uncopyable(*values: Any) -> Iterator[Any]:
    """Yield objects inside some values that cannot be copied and hold no tensors or modules."""
    seen, pending = dict[int, Any](), list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, _COPIED) or id(value) in seen:
            continue
        seen[id(value)] = value  # held, since the state of an object may be made for the occasion
        if isinstance(value, dict):
            pending.extend(part for name, part in value.items() if name not in _REGISTRIES)
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending.extend(value)
        elif (copies_itself := _copies_itself(value)) is None:
            yield value
        elif copies_itself:
            continue
        elif isinstance(value, ModuleType) or (parts_copied := _reduced(value)) is None:
            parts = list(value) if isinstance(value, (KeysView, ValuesView, ItemsView)) else []
            if not any(isinstance(part, (Tensor, nn.Module)) for part in tree_leaves(parts)):
                yield value
        else:
            pending.extend(parts_copied)


def _copies_itself(value: Any) -> bool | None:
    """True if an object has its own way to be copied; None if it cannot be asked, as a missing optional package that
    raises an error for every attribute."""
    try:
        return hasattr(value, "__deepcopy__")
    except Exception:  # objects may raise any error
        return None


def _reduced(value: Any) -> list[Any] | None:
    """Return what a copy of an object copies, which may be less than the object holds; None if it cannot be copied."""
    try:
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # the name of a global object, which is shared
            return []
        _, arguments, *state = reduced
        return [arguments, *state[:1], *(part for items in state[1:3] for part in items or ())]
    except Exception:  # objects may raise any error
        return None


def child(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule of a name, or None; other attributes of a converted network may have the same name."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def freeze_computed_weights(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace computed weights of the named modules by parameters with their current values."""
    for path in paths:
        module = child(model, path)
        if module is None:
            continue
        if path and parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                _freeze_parametrization(module, name)
        for key, hook in list(prepare_weights(module)._forward_pre_hooks.items()):
            if isinstance(hook, _COMPUTING):
                name = getattr(hook, "name", None) or hook._tensor_name  # type: ignore[union-attr]
                value = getattr(module, name).detach().clone()
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
                del module._forward_pre_hooks[key]


def _freeze_parametrization(module: nn.Module, name: str) -> None:
    value = getattr(module, name).detach().clone()
    lists: Any = module.parametrizations
    del lists[name]
    if not len(lists):
        del module.parametrizations
        module.__class__ = type(module).__mro__[1]
    else:
        delattr(type(module), name)
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class Watched:
    """State of a module at conversion.

    Attributes:
        path: name of the module.
        kind: class of the module, as `package.module:Name`.
        hooks: number of hooks that were traced with it.
        is_replaced: true if the instance overrides its class's forward.
        is_called: true if it is an operation of the region; false for a container, which is not called.
        settings: plain attributes that the conversion read, see `_settings`; None if calls use the module itself, and
            follow its settings.
    """

    path: str
    kind: str
    hooks: int
    is_replaced: bool
    is_called: bool
    settings: tuple[tuple[str, Any], ...] | None = None

    @classmethod
    def of(cls, model: nn.Module, path: str, is_called: bool, is_read: bool = False) -> Watched:
        """Record the current state of a module; with `is_read` also its settings."""
        module = model.get_submodule(path)
        settings = _settings(module) if is_read else None
        return cls(path, _kind(module), _foreign(module), is_replaced(module), is_called, settings)


def find_watched(
    model: nn.Module, operations: Iterable[str], others: Iterable[str], live: Collection[str] = ()
) -> tuple[Watched, ...]:
    """Record the state of all modules that a rewritten graph relies on.

    Args:
        model: the network that is converted.
        operations: names of modules that run on elements.
        others: names of the other modules and tensors that the graph uses.
        live: names of the operations that the graph calls or reads as modules, so that it follows their settings.
    """
    operations = set(operations)
    containers = {holder for path in (*operations, *others) for holder in _holders(path)}
    parts = {
        f"{path}.{name}"
        for path in operations
        for name, _ in model.get_submodule(path).named_modules()
        if name and not name.startswith("parametrizations")
    }
    paths = [
        *((path, False) for path in containers - operations),
        *((path, True) for path in operations | parts),
    ]
    read = operations.difference(live)
    return tuple(Watched.of(model, path, is_called, path in read) for path, is_called in sorted(paths))


def _holders(path: str) -> Iterator[str]:
    """Yield the names of the modules that contain a module or tensor, without the network itself."""
    while path := path.rpartition(".")[0]:
        yield path


class _CheckedModule(NamedTuple):
    """A module that passed the check, with the values by which changes are detected."""

    siblings: dict[str, Any]
    name: str
    module: nn.Module
    kind: type
    children: tuple[str, ...]
    settings: tuple[Any, ...]


class Watch:
    """Detects hooks that would never be called, and modules that were replaced after the conversion.

    A check takes a few microseconds, because modules that passed before are compared by identity.
    """

    def __init__(self, net: nn.Module, watched: tuple[Watched, ...], counts: bool = False) -> None:
        """Take a network and the modules that its rewritten graph relies on; `counts` is true if the network calls
        hooks that count work itself, see `is_counted`."""
        self._net, self._watched, self._counts = net, watched, counts
        self._seen: tuple[_CheckedModule, ...] = ()
        self._order: _Order | None = None
        self.is_counted = False  # by the hooks of a tool, as the last check found

    def __call__(self) -> None:
        """Check all modules.

        Raises:
            InvalidInput: a module was replaced by one of another class, or has a hook that reads maps.
        """
        self.is_counted = False
        if self._order is None or not self._order.holds():
            before = self._seen or (None,) * len(self._watched)
            self._seen = tuple(map(self._look_at, self._watched, before))
            self._order = _Order(self._seen)
            self.is_counted = self._counts and any(counters_of(place.module) for place in self._seen)

    def _look_at(self, watched: Watched, before: _CheckedModule | None) -> _CheckedModule:
        module = child(self._net, watched.path)
        if module is None:
            raise _exchange(watched, "it is gone")
        if _kind(module) != watched.kind:
            raise _exchange(watched, f"it is {type(module).__name__} and was {_name(watched.kind)}")
        if is_replaced(module) != watched.is_replaced:
            raise _exchange(watched, "its forward was exchanged")
        if _foreign(module) - self._counts * len(counters_of(module)) > watched.hooks:
            of_elements = "it runs on elements of several sizes, where a hook expects a map."
            looked_into = f"{watched.path} itself is not called: what it holds was rewritten."
            raise InvalidInput(
                f"{watched.path} has a hook that this network cannot call as it is meant.",
                why=of_elements if watched.is_called else looked_into,
                next="remove it (handle.remove()). A hook on the network itself is called, and so is one on an "
                f"operation outside the region, see print(net.plan). One that {watched.path} has before cs.adaptify "
                "is called too: the region then ends there, and what follows runs dense. If it counts work, use "
                "net.macs(x), torch's torch.utils.flop_counter.FlopCounterMode, which needs no hooks, or ptflops, "
                "thop or torchinfo on the network that cs.adaptify gave.",
            )
        holder, _, name = watched.path.rpartition(".")
        around, children = child(self._net, holder), tuple(module._modules)
        assert around is not None
        seen = _CheckedModule(around._modules, name, module, type(module), children, _settings(module))
        if before is not None and _own(children) != _own(before.children):
            raise _exchange(watched, "it holds other modules")
        if watched.settings is not None:
            known = dict(seen.settings)
            for name, value in watched.settings:
                if known.get(name, value) != value:
                    raise _exchange(watched, f"its {name} is {known[name]} and was {value}")
        elif before is not None and module is not before.module and seen.settings != before.settings:
            raise _exchange(watched, "its settings are others")
        return seen


class _Order:
    """Modules that passed the check, arranged so that a repeated check takes a few calls of compiled code."""

    def __init__(self, seen: tuple[_CheckedModule, ...]) -> None:
        self._siblings = [place.siblings for place in seen]
        self._names = [place.name for place in seen]
        self._modules = [place.module for place in seen]
        self._kinds = [place.kind for place in seen]
        self._children = [place.module._modules for place in seen]
        self._counts = [len(place.children) for place in seen]
        self._states = [vars(place.module) for place in seen]
        self._hooks = [hooks for state in self._states for hooks in map(state.__getitem__, _KINDS)]
        # Settings are compared by value. (A parameter or an attribute that is gone leaves None in its place.)
        names = [[name for name, _ in place.settings] for place in seen]
        self._read = [
            (state, name)
            for state, own in zip(self._states, names, strict=True)
            for name in own
            if name in state
        ]
        self._values = [state[name] for state, name in self._read]
        self._absent = [
            (state["_parameters"], name)
            for state in self._states
            for name, value in state["_parameters"].items()
            if value is None
        ]

    def holds(self) -> bool:
        """True if the network still has the same modules, without hooks or forwards of their own."""
        return not (
            any(self._hooks)
            or list(map(dict.get, self._siblings, self._names)) != self._modules
            or list(map(type, self._modules)) != self._kinds
            or list(map(len, self._children)) != self._counts
            or any(map(operator.contains, self._states, itertools.repeat("forward")))
            or [state.get(name) for state, name in self._read] != self._values
            or any(parameters.get(name) is not None for parameters, name in self._absent)
        )


def _own(children: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in children if name != "parametrizations")


def _exchange(watched: Watched, why: str) -> InvalidInput:
    return InvalidInput(
        f"{watched.path} is not the module that was converted: {why}.",
        why="the network does not run its forward, which was rewritten when it was converted.",
        next="change the network first and convert it then: cs.adaptify(model). A single weight can be computed by "
        'torch.nn.utils.parametrize.register_parametrization(module, "weight", ...) at any time.',
    )


def own_class(module: nn.Module) -> type:
    """Return the class of a module; for a parametrized module, the class that torch derived its class from."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


# Attributes that a class may override without changing what a call computes.
_HARMLESS = frozenset(
    (
        *("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__"),
        *("__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__", "__parameters__"),
        *("__annotations_cache__", "__abstractmethods__", "_abc_impl", "__orig_bases__", "__dict__"),
        *("__weakref__", "__hash__", "__eq__", "_version", "extra_repr", "_get_name", "reset_parameters"),
        *("reset_running_stats", "_check_input_dim", "train", "eval", "_load_from_state_dict"),
        *("_save_to_state_dict", "state_dict", "load_state_dict"),
        *("__setstate__", "__getstate__", "__deepcopy__", "__repr__"),
    )
)
_ALIKE: WeakKeyDictionary[type, tuple[type, ...]] = WeakKeyDictionary()


def act_alike(kind: type) -> tuple[type, ...]:
    """Return a module class and those of its base classes that compute the same in a call, nearest first."""
    if kind not in _ALIKE:
        parents = enumerate(kind.__mro__)
        _ALIKE[kind] = tuple(parent for index, parent in parents if _is_run(parent, kind.__mro__[:index]))
    return _ALIKE[kind]


def _is_run(parent: type, before: tuple[type, ...]) -> bool:
    """True if none of the classes before it in the method resolution order changes what a call of `parent` computes."""
    if parent is nn.Module or not issubclass(parent, nn.Module):
        return False
    annotated = {name for base in parent.__mro__ for name in vars(base).get("__annotations__", ())}
    return not any(
        getattr(parent, name, value) is not value or (isinstance(value, property) and name in annotated)
        for child in before
        for name, value in vars(child).items()
        if name not in _HARMLESS
    )


def acts_as(module: nn.Module | None, *kinds: type) -> bool:
    """True if a call of a module computes the same as one of these classes."""
    return any(kind in kinds for kind in act_alike(type(module)))


def _kind(module: nn.Module) -> str:
    kind = own_class(module)
    return f"{kind.__module__}:{kind.__qualname__}"


def _name(kind: str) -> str:
    return kind.rpartition(":")[2].rpartition(".")[2]


_LIVE = ("training", "in_channels", "out_channels", "in_features", "out_features")


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the plain attributes of a module as text, and which parameters it has. Its training mode is left out, and
    so are numbers of channels, which follow from the weight."""
    plain = (bool, int, float, str, tuple, type(None))
    values = ((key, value) for key, value in vars(module).items() if isinstance(value, plain))
    named = [(key, repr(value)) for key, value in values if key[0] != "_" and key not in _LIVE]
    named += [
        (name, "None" if value is None else "a parameter") for name, value in module._parameters.items()
    ]
    return tuple(sorted(named))


def _foreign(module: nn.Module) -> int:
    return sum(not isinstance(hook, _COMPUTING) for kind in _KINDS for hook in getattr(module, kind).values())


# Packages whose hooks read nothing but shapes, to count work.
_COUNTERS = ("ptflops", "thop", "torchinfo")


def is_counter(hook: Any) -> bool:
    """True if a hook is that of a tool that counts work."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in _COUNTERS


def counters_of(module: nn.Module) -> list[Any]:
    """Return the forward hooks of a module by which tools count its work."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if is_counter(hook)]
