"""Networks that torch.fx cannot follow, such as detectors, with their backbone made adaptive inside them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.hooks import copying
from cadsurgery.following.module_state import left_as_it_is
from cadsurgery.following.trace import evaluating
from cadsurgery.masks.context import call_context, note_sizes, sized, sizes_in
from cadsurgery.network.macs import MacReport
from cadsurgery.network.model import AdaptiveModel, shapes_of
from cadsurgery.network.program import PARTS, Derived
from cadsurgery.network.signature import Forward
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.running import running


class Reached(NamedTuple):
    """How a network calls its part.

    Attributes:
        inputs: positional arguments.
        named: keyword arguments.
        sizes: sizes of the images of a padded batch, see `masks.sized`; None if they are not known.
    """

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    sizes: Sequence[tuple[int, int]] | None


class _Stopped(Exception):
    """The part was reached."""


def reach(part: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Reached | None:
    """Run a call until it reaches a part; return the part's arguments, None if it is never reached."""

    def stop(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Stopped(Reached(inputs, named, call_context().sizes))

    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            call(*args, **kwargs)
    except _Stopped as stopped:
        reached: Reached = stopped.args[0]
        return reached
    finally:
        handle.remove()
    return None


def check_used(host: nn.Module, path: str, example: Tensor) -> None:
    """Refuse a part that its network does not use on an example.

    The example is passed as a batch and as a list of images, unchanged, negated and zero, because the network may
    branch on values. A network that runs on none of these is not refused.

    Raises:
        CannotConvert: the network ran and did not call the part.
    """
    ran, part = False, host.get_submodule(path)
    with left_as_it_is(host), evaluating(host):
        for images in (example, -example, torch.zeros_like(example)):
            for batch in (images, list(images)):
                with contextlib.suppress(Exception):  # the network may refuse its input with any error
                    if reach(part, host, batch) is not None:
                        return
                    ran = True
    if ran:
        kind = type(host).__name__
        raise CannotConvert(
            f"{kind} does not use its {path}.",
            why=f"its forward, which torch.fx cannot follow, never called it on a batch of {tuple(example.shape)}.",
            next=f"convert the part that it runs, cs.adaptify(model.PART), or only the {path}: "
            f"cs.adaptify(model.{path}).",
        )


def _may_pad(module: nn.Module) -> bool:
    """True for a module that may put images into a padded batch, and knows their sizes: it has no tensors, and is none
    of torch's layers."""
    has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
    return not has_tensors and not type(module).__module__.startswith("torch.nn.")


def _note_sizes(module: nn.Module, args: Any, output: Any) -> None:
    note_sizes(output)


class Host(Derived):
    """Base of networks that run their own code around one converted part; their state dict is the original's.

    Attributes:
        of_part: names of attributes of the part that are read and set on the hosting network as well.
    """

    hosts_part = True
    of_part: ClassVar[tuple[str, ...]] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name) if name in self.of_part else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.of_part:
            setattr(self.part, name, value)
        else:
            super().__setattr__(name, value)

    def put(self, host: nn.Module, path: str, part: nn.Module) -> None:
        """Put `part` into `host` at `path`, and share the modules of `host`."""
        host.set_submodule(path, part)
        for child in filter(_may_pad, host.children()):
            if _note_sizes not in child._forward_hooks.values():
                child.register_forward_hook(_note_sizes)
        self._host = (host,)  # in a tuple, so that it is not registered as a submodule
        self.__dict__.update({kind: host.__dict__[kind] for kind in PARTS})
        self._path, self.training = path, host.training

    @property
    def original_signature(self) -> inspect.Signature:
        """The signature of a call of the original network."""
        return signature_of(self._host[0])

    @property
    def part(self) -> Any:
        """The converted part."""
        return self.get_submodule(self._path)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network's own code."""
        host = self._host[0]
        host.training = self.training
        with sized(call_context().sizes or sizes_in(kwargs)):
            return host(*args, **kwargs)

    def reach_part(self, *args: Any, **kwargs: Any) -> Reached:
        """Return the arguments of its part when the network is called with these arguments.

        Raises:
            InvalidInput: the network did not call its part.
        """
        reached = reach(self.part, self, *args, **kwargs)
        if reached is None:
            raise InvalidInput(f"the network did not call its {self._path}.", next="check the arguments.")
        return reached

    def with_part(self, part: nn.Module) -> Self:
        """Return an inference copy of the network with another part."""
        host = copy.deepcopy(self._host[0], copying(self)).eval().requires_grad_(False)
        return type(self)(host, self._path, part)  # type: ignore[call-arg]


class HostedModel(Host, AdaptiveModel):
    """A network that runs its own code, with one adaptive part.

    It is called like the original and has the same state dict. Plan, levels, active fraction and MACs are those of the
    part. The mask reads the input of the part, e.g. after a detector's resizing and normalisation.
    """

    of_part = ("_program", "_mask_provider", "_unit", "checks", "source")

    def __init__(self, host: nn.Module, path: str, part: AdaptiveModel) -> None:
        """Put `part` into `host` at `path`; users call `cadsurgery.adaptify` instead."""
        nn.Module.__init__(self)
        self.put(host, path, part)
        self._shapes = shapes_of(self)

    @Forward
    def forward(self, *args: Any, mask: object = None, sizes: Any = None, **kwargs: Any) -> Any:
        """Run the network as the original is called; see `AdaptiveModel.forward`. Compile its part, not the whole:
        `net.part.compile()`."""
        if sizes is not None:
            with sized(sizes):
                return self.forward(*args, mask=mask, **kwargs)
        if running.is_compiled:
            return self._run_uncompiled(*args, mask=mask, **kwargs)
        with self.part.masked(mask) if mask is not None else contextlib.nullcontext():
            return self.run_host(*args, **kwargs)

    @torch.compiler.disable(
        reason="what surrounds the adaptive part decides by values; use net.part.compile()."
    )
    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    adaptive_part = Host.part

    def macs(self, *args: Any, mask: object = None, sizes: Any = None, **kwargs: Any) -> MacReport:
        """Count the multiply-accumulates of the first call of the part when the network is called with these
        arguments."""
        inputs, named, known = self.reach_part(*args, **kwargs)
        sizes = known if sizes is None else sizes
        return self.part.macs(*inputs, mask=mask, sizes=sizes, **named)

    def _optimize(self, fuse: bool) -> HostedModel:
        return self.with_part(self.part.optimize(fuse))

    @property
    def lattice(self) -> Lattice:
        """The lattice of the last call."""
        try:
            return self.part.lattice
        except InvalidInput as error:
            raise InvalidInput(
                f"the network's {self._path} has not run yet.",
                why="it is the part that is adaptive.",
                next="call the network on images with which it uses that part: net(images).",
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> HostedModel:
        memo.update({**copying(self), **memo})
        return HostedModel(copy.deepcopy(self._host[0], memo), self._path, copy.deepcopy(self.part, memo))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
