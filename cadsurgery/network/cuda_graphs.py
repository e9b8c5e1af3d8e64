"""Calls of an optimised copy on a GPU, recorded as CUDA graphs: the kernels of a call are launched together, which
takes a few microseconds instead of twenty milliseconds of Python for a network of a hundred layers.

A call is recorded when its kind (shapes, types, mask) comes for the second time, and replayed from then on. With a mask
that always keeps the same number of patches a call is one recording. With any other mask the layers before the region
are one and the rest is another: the mask runs between them, and the number of elements after each stage is rounded up
to a bucket, so that images with similar masks share a recording. All other calls run as they would without recordings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from operator import attrgetter, is_
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from cadsurgery.elements.backends import gpu_maps
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.lattice import Bounds, Lattice
from cadsurgery.following.hooks import is_hooked
from cadsurgery.masks.basic import RandomMask
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.program import Program, ProgramNetwork, clone_values
from cadsurgery.support import device_checks
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import has_global_hooks, tree_flatten, tree_map, tree_unflatten

# Largest number of kinds of calls that a network remembers, with or without a recording, which has its own memory for
# arguments and results. Of more kinds in turn none comes again in time, and none is recorded in vain.
MOST_RECORDINGS = 16
# Number of buckets between a number of elements and its double: padding adds at most a fifth, 2 ** (1 / 4).
PER_OCTAVE = 4
# Calls before a recording: kernels are compiled, weights are packed, and constants are made.
_CALLS_BEFORE = 2

# Output of a call, and its lattice; of a recorded mask only the level map.
Called = tuple[Any, Lattice | Tensor]
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)


class Recorder(Protocol):
    """Records functions of tensors in static memory, see `CudaGraphs`."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """Run a function; return its results and a function that computes them again, into the same memory."""
        ...

    def in_turn(self) -> AbstractContextManager[None]:
        """Return a block in which recordings are made and replayed, after all that was done in earlier blocks."""
        ...


class CudaGraphs:
    """Records CUDA graphs, which share one memory pool: what one of them computes on the way, another overwrites."""

    def __init__(self, device: torch.device) -> None:
        """Take a CUDA device."""
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._is_done: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """See `Recorder.record`."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_CALLS_BEFORE):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return result, graph.replay

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """See `Recorder.in_turn`; another thread may use another stream."""
        with torch.cuda.device(self._device):
            if self._is_done is not None:
                self._is_done.wait()
            try:
                yield
            finally:
                self._is_done = torch.cuda.current_stream().record_event()


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a new recorder for a device; None where calls are not recorded: there the sizes of maps are read from the
    device."""
    return CudaGraphs(device) if device.type == "cuda" and gpu_maps.available(device) else None


class Recordings:
    """The recorded calls of one optimised copy; copies of this object start without any."""

    def __init__(self) -> None:
        self._lock, self._is_running = RLock(), False
        self._recorder: tuple[torch.device, Recorder | None] | None = None
        self._reliance: _Reliance | None = None
        # By kind of call, ordered by last use; None for one that came once, False for one that cannot be recorded.
        self._kinds: dict[Hashable, _Recording | bool | None] = {}

    def __len__(self) -> int:
        """Return the number of recordings."""
        return sum(isinstance(one, _Recording) for one in self._kinds.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, ()

    def call(
        self,
        net: ProgramNetwork,
        provider: MaskProvider,
        arguments: dict[str, Any],
        run: Callable[[dict[str, Any]], Called],
    ) -> Called | None:
        """Return the results of a recorded call, in memory of their own; None if the call has to be run as it is.

        Args:
            net: the network that has these recordings.
            provider: the mask of this call.
            arguments: the arguments by name.
            run: runs the network on arguments.
        """
        leaves, form = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _is_plain(leaves) or not tensors or any(x.requires_grad or x.is_meta for x in tensors):
            return None
        device = tensors[0].device
        if self._recorder == (device, None):  # soon, where calls are never recorded
            return None
        if running.is_observed or has_global_hooks() or device_checks.is_capturing(device):
            return None
        with self._lock:
            if self._is_running:  # a mask calls the network itself
                return None
            if self._recorder is None or self._recorder[0] != device:
                self._recorder = device, recorder_for(device)
            recorder = self._recorder[1]
            if recorder is None or not self._is_current(net):
                return None
            self._is_running = True
            try:
                # Replays write what the recording has made: neither may be in inference mode.
                with torch.inference_mode(False), torch.no_grad(), recorder.in_turn():
                    return _RecordedCall(self, recorder, net, provider, leaves, form).make(run)
            finally:
                self._is_running = False

    def _is_current(self, net: ProgramNetwork) -> bool:
        """Drop all recordings if the network has other modules or tensors now; return False if it has hooks."""
        if self._reliance is None or not self._reliance.holds():
            self._reliance = _Reliance(net)
            self._kinds.clear()
        return not self._reliance.is_hooked

    def find(self, key: Hashable, make: Callable[[], _Recording]) -> _Recording | None:
        """Return the recording of a kind of calls, which is made when it is asked for the second time; None before,
        and of what cannot be recorded."""
        is_new = key not in self._kinds
        found = self._kinds.pop(key, None)
        if found is None and not is_new:
            try:
                found = make()
            except Exception:  # a network, a mask or CUDA may raise any error; the call itself is run instead
                found = False
        self._kinds[key] = found
        for oldest in list(self._kinds)[: max(0, len(self._kinds) - MOST_RECORDINGS)]:
            del self._kinds[oldest]
        return found if isinstance(found, _Recording) else None

    def cannot(self, key: Hashable) -> bool:
        """Return True if a kind of calls could not be recorded."""
        return self._kinds.get(key) is False


class _RecordedCall:
    """One call of a network with recordings."""

    def __init__(
        self,
        recordings: Recordings,
        recorder: Recorder,
        net: ProgramNetwork,
        provider: MaskProvider,
        leaves: list[Any],
        form: Any,
    ) -> None:
        self._recordings, self._recorder, self._net, self._provider = recordings, recorder, net, provider
        self._leaves, self._form = leaves, form
        self._kind = (str(form), *map(_kind_of, leaves), *_settings(leaves), net._unit.normalisation)

    def make(self, run: Callable[[dict[str, Any]], Called]) -> Called | None:
        """Replay one recording or two; None if there is none yet."""
        program = self._net.program
        program.check_modules()
        program.check_outside()
        if (mask := _key_of(self._provider)) is None:
            return self._in_halves(program)

        def whole(arguments: dict[str, Any]) -> tuple[Any, Tensor]:
            output, lattice = run(arguments)
            return output, lattice.pyramid.levels if isinstance(lattice, Lattice) else lattice

        key = "whole", mask, self._kind
        recording = self._recordings.find(key, lambda: self._record(whole))
        if recording is not None:
            output, levels = _copied(recording(self._leaves))
            return output, levels
        return self._in_halves(program) if self._recordings.cannot(key) else None

    def _record(self, run: Callable[[dict[str, Any]], Any]) -> _Recording:
        """Record a function of the arguments."""
        return _Recording(
            self._recorder, lambda leaves: run(tree_unflatten(leaves, self._form)), _clones(self._leaves)
        )

    def _in_halves(self, program: Program) -> Called | None:
        """Replay the layers before the mask, run the mask, and replay the rest."""
        if self._net._paths:  # which of several graphs a call takes is known when it runs
            return None
        before = self._recordings.find(("before", self._kind), lambda: self._record(program.before))
        if before is None:
            return None
        values = before(self._leaves)
        lattice = program.ask(program.masking(self._provider), values)
        levels, bounds = lattice.pyramid.levels, bounds_of(lattice)
        leaves, form = tree_flatten(values)

        def rest(leaves: list[Any]) -> Any:
            levels, values = leaves[0], tree_unflatten(leaves[1:], form)
            return program.after(lambda *_: program.geometry.lattice(levels, bounds), values)[0]

        after = None
        if _is_plain(leaves):
            key = "after", bounds, str(form), *map(_kind_of, (levels, *leaves)), self._kind
            # The values stay where the recording before writes them: they are not copied.
            own = [levels.clone(), *leaves]
            after = self._recordings.find(key, lambda: _Recording(self._recorder, rest, own))
        if after is None:
            return program.after(lambda *_: lattice, clone_values(values))
        return _copied(after([levels, *leaves])), lattice


class _Recording:
    """One recording: where it reads its arguments, and where it writes its results."""

    def __init__(self, recorder: Recorder, run: Callable[[list[Any]], Any], own: list[Any]) -> None:
        """Record a function of arguments, which are in the memory that replays will read."""
        self._own = own
        self._result, self._replay = recorder.record(lambda: run(own))

    def __call__(self, leaves: list[Any]) -> Any:
        """Return the results for other arguments, which the next call overwrites."""
        for own, given in zip(self._own, leaves, strict=True):
            if isinstance(own, Tensor) and own is not given:
                own.copy_(given)
        self._replay()
        return self._result


class _Reliance:
    """What recordings of a network rely on: its modules and their tensors. A check is a few calls of compiled code.

    The network's own mask is left out: one whose tensors change runs between recordings, and any other is part of a
    call's kind.
    """

    def __init__(self, net: ProgramNetwork) -> None:
        of_mask = set(net.mask.modules())
        inner = [part for part in net.modules() if part is not net and part not in of_mask]
        self._hooks = [hooks for part in inner for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._top = net._modules
        self._children = [part._modules for part in inner]
        self._parts = self._parts_now(), list(map(dict.copy, self._children))
        self._holders: list[dict[str, Any]] = [
            holder for part in (net, *inner) for holder in (part._parameters, part._buffers)
        ]
        # What a recording reads must live as long as the recording: tensors, and their packed forms.
        self._tensors = self._tensors_now()
        self._places = list(map(_place, self._tensors))
        self._layers = [part for part in inner if isinstance(part, PackedConv)]
        self._packed = [layer.weights for layer in self._layers]

    def holds(self) -> bool:
        """Return True if the network has the same modules and tensors, in the same places."""
        now, packed = self._tensors_now(), list(map(_packed, self._layers))
        return (
            (self._parts_now(), self._children) == self._parts
            and len(now) == len(self._tensors)
            and all(map(is_, now, self._tensors))
            and list(map(_place, now)) == self._places
            and all(map(is_, packed, self._packed))
        )

    @property
    def is_hooked(self) -> bool:
        """True if a module inside the network has hooks, which only a call runs."""
        return any(self._hooks)

    def _parts_now(self) -> list[Any]:
        return [part for name, part in self._top.items() if name != "_mask_provider"]

    def _tensors_now(self) -> list[Any]:
        return [value for value in chain.from_iterable(map(dict.values, self._holders)) if value is not None]


_place, _packed = Tensor.data_ptr, attrgetter("_packed")


def _key_of(mask: MaskProvider) -> Hashable | None:
    """Return a key of a mask that is recorded with the network; None of one that runs outside of recordings."""
    is_fixed = mask.static and mask.storable and not mask.looks_ahead and mask.find(RandomMask) is None
    if not is_fixed or any(map(is_hooked, mask.modules())):
        return None
    places = tuple(value.data_ptr() for value in chain(mask.parameters(), mask.buffers()))
    return (mask.spec(), mask, places) if places else mask.spec()


def _kind_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return type(leaf), leaf


def _settings(leaves: list[Any]) -> tuple[Hashable, ...]:
    """Return the settings of torch that kernels are chosen by."""
    kind = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    cudnn = torch.backends.cudnn
    return (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, cudnn.enabled),
    )


def _is_plain(leaves: list[Any]) -> bool:
    """Return True if values are tensors or plain values, by which calls can be told apart."""
    return all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)


def _clones(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _copied(results: Any) -> Any:
    """Copy results out of the memory of a recording; a tensor that occurs twice still does."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in copies:
                copies[id(leaf)] = leaf.clone()
            return copies[id(leaf)]
        if is_dataclass(leaf) and not isinstance(leaf, type):
            parts = {part.name: getattr(leaf, part.name) for part in fields(leaf) if part.init}
            return replace(leaf, **tree_map(copied, parts))
        if isinstance(leaf, dict):  # of a class that torch does not know
            return type(leaf)({key: tree_map(copied, value) for key, value in leaf.items()})
        return leaf

    return tree_map(copied, results)


def bounds_of(lattice: Lattice) -> Bounds:
    """Return the bucket of a lattice: bounds on its numbers of elements, which many level maps share."""
    counts = [lattice.at(stage).count for stage in range(lattice.geometry.stages)]
    if lattice.uniform_level is not None:
        return Bounds(tuple(counts), tuple(counts), lattice.uniform_level)
    least, most = zip(*map(bucket, counts), strict=True)
    return Bounds(least, most)


def bucket(count: int, per_octave: int = PER_OCTAVE) -> tuple[int, int]:
    """Return the smallest and the largest number of the bucket that contains `count`."""

    def most(place: int) -> int:
        return math.ceil(2 ** (place / per_octave)) if place >= 0 else -1

    place = math.floor(per_octave * math.log2(count - 1)) if count > 1 else 0
    while most(place) < count:
        place += 1
    return most(place - 1) + 1, most(place)
