"""Verify two laws of an adaptive network on an example, using kernel maps everywhere (no dense shortcut).

Law 1: on the network's own grid, the adaptive network equals the original. All outputs of the call are compared, on the
example and in another call: other pixels, another batch, a size of the other parity, other numbers. A map returned at
the fine size is compared at the original's samples.
Law 2: at every other uniform level, the adaptive network equals the dense network at that output stride, computed with
the same weights in ordinary dense convolutions.

Levels finer than the network's own cost many times its work: they are compared on a part of the example that is small
enough for the time, see `Case.fewer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements, to_dense
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.elements.operations import operation_of
from cadsurgery.following.arguments import (
    AnyLayout,
    Arguments,
    change_images,
    crop,
    has_numbers,
    image_of,
    in_order,
    part_of,
    run_forward,
    widen,
    with_another_batch,
    with_other_numbers,
    with_other_values,
)
from cadsurgery.following.equivalence import TOLERANCE, no_dead_branches, scales, wide_copy
from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import Interpreter, downstream, gives
from cadsurgery.following.guards import GuardFailed
from cadsurgery.following.trace import evaluating
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert, as_refusal, first_line
from cadsurgery.support.torch_internals import TorchDispatchMode, tree_leaves
from cadsurgery.support.torch_operations import chooses
from cadsurgery.surgery.emulate import CannotEmulate, Emulator, can_emulate
from cadsurgery.surgery.plan import SMALL_EFFECT, Decision, Plan
from cadsurgery.surgery.rewrite import ORIGIN

_REPORT = "please report this with the model's name; a smaller region=[...] may avoid the operation."

# Share of the entries of an integer output, such as class labels, that may differ: rounding decides between ties.
DISCRETE = 0.01

_OUTPUT = "output "  # before the number of an output, in the names of compared values

# A channel of an output has a scale of its own if it has so many values: a single one may be zero by chance.
_FEWEST = 64

# Work of all comparisons at levels other than the network's own, in calls of the network on the example.
_MOST_CALLS = 2

_STEP = 32  # parts of an example leave the same rest as the example, by which networks refuse sizes

Masking = Callable[[Tensor, Tensor], Lattice]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        law: description of the compared networks.
        number: number of the law, 1 or 2.
        size: height and width of the image.
        where: node or output with the largest error.
        error: largest difference relative to the largest value; of an output, of the same channel.
        tolerance: largest allowed error.
    """

    law: str
    where: str
    error: float
    tolerance: float
    number: int = 2
    size: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """A converted network, and the example on which it is verified.

    Attributes:
        model: the network whose parameters both graphs use.
        original: graph of the network.
        adapted: the rewritten graph.
        plan: the plan that was carried out.
        geometry: geometry of the adaptive network; patches of blocks have no intermediate levels, quadtrees have.
        call: arguments of the example.
        fewer: arguments for the levels other than the network's own: one image and a part of its pixels.
    """

    model: nn.Module
    original: fx.Graph
    adapted: fx.Graph
    plan: Plan
    geometry: Geometry
    call: Arguments
    fewer: Arguments

    @classmethod
    def of(cls, facts: Facts, adapted: fx.Graph, plan: Plan, geometry: Geometry) -> Case:
        """Return the case of a conversion, on the example that the network was observed on."""
        call, geometry = facts.arguments, replace(geometry, patch="quadtree")
        case = cls(facts.model, facts.graph, adapted, plan, geometry, call, call)
        return replace(case, fewer=_fewer_pixels(case))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the image."""
        return image_of(self.call).dtype

    @property
    def tolerance(self) -> float:
        """The largest allowed error."""
        return TOLERANCE.get(self.dtype, 1e-4)

    def wide(self) -> Case:
        """Return the case in float64, with the tensors that the graphs read from the model, which may be no buffers."""
        wide = wide_copy(self.model, (self.original, self.adapted))
        return replace(self, model=wide, call=widen(self.call), fewer=widen(self.fewer))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepare the model for comparisons, for a block."""
        dead, order = no_dead_branches(self.model), _in_one_order(self.plan)
        with torch.no_grad(), evaluating(self.model), dead, AnyLayout(), order:
            yield

    def run(self, level: int, call: Arguments) -> Any:
        """Return the outputs of the adaptive network with all cells at a level."""
        values = in_order(self.adapted, call, _uniform(self.geometry, level))
        return Interpreter(self.model, graph=self.adapted).run(*values)[0]


def verify(case: Case) -> tuple[Check, ...]:
    """Compare the values that leave the region, and the outputs, with the original's.

    Raises:
        CannotConvert: a law does not hold; a wrong network is never returned silently.
    """
    with as_refusal(
        lambda error: CannotConvert(
            "the converted network does not run, so it is not returned.",
            why=first_line(error),
            next=_REPORT,
        )
    ):
        checks = _all_checks(case)
        if case.dtype != torch.float64 and not all(check.passed for check in checks):
            # Deep networks can amplify rounding errors beyond the tolerance; in float64 only real errors remain.
            # A network that makes values of float32 itself, or asks for its type, cannot run in float64.
            with contextlib.suppress(RuntimeError, TypeError, GuardFailed):
                checks = _all_checks(case.wide())
    failed = [check for check in checks if not check.passed]
    if failed:
        raise CannotConvert(
            "the converted network is not exact, so it is not returned.",
            where=failed[0].where,
            why=f"{failed[0].law}: relative error {failed[0].error:.2e} exceeds {failed[0].tolerance:.0e}.",
            next=_REPORT,
        )
    return tuple(checks)


def measure_effect(case: Case) -> float:
    """Measure how much the outputs differ between all cells high and all cells low, see `Plan.effect`; the case must
    have passed `verify`. All cells high cost many times the work of the network: it is done on fewer pixels."""
    effect, limit = 0.0, TOLERANCE[torch.float64]
    if case.dtype in (torch.float32, torch.float64):
        effect = _difference(case)
    if case.dtype != torch.float64 and effect < SMALL_EFFECT:
        try:  # a small difference may be rounding
            effect = _difference(case.wide())
        except (RuntimeError, TypeError, GuardFailed):  # see `verify`
            limit = TOLERANCE[torch.float32]
    return effect if effect > limit else 0.0


def _difference(case: Case) -> float:
    with case.running():
        high, low = (_named(case.run(level, case.fewer)) for level in (0, case.plan.max_level))
    differences = [0.0]
    for name, value in high.items():
        if value.shape != low[name].shape:
            return float("inf")
        if not value.is_floating_point():
            differences.append(float((value != low[name]).double().mean()) if value.numel() else 0.0)
        elif value.numel():
            finite = value.isfinite() & low[name].isfinite()
            difference = (value - low[name])[finite].double()
            spread = value[finite].double().std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
            differences.append(float(difference.square().mean().sqrt() / spread) if len(difference) else 0.0)
    return max(differences)


def _all_checks(case: Case) -> list[Check]:
    inside = case.plan.reads_inside_cells and can_emulate(case.adapted, case.geometry)
    with case.running():
        return _emulated_checks(case) if case.plan.floors or inside else _uniform_checks(case)


class FirstOfEqual(TorchDispatchMode):
    """Take the first of all values in a pooling window that are equal up to rounding as the largest.

    A map that is read inside its cells has many equal values, such as those between an anchor and the border. Rounding
    would decide which of them is the largest, and an unpooling would put the value at that place.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pooled = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.max_pool2d_with_indices.default or not args[0].is_floating_point():
            return pooled
        values, x = pooled[0], args[0]
        largest = x.nan_to_num(0.0, 0.0, 0.0).abs().max()
        step = (TOLERANCE.get(x.dtype, 1e-4) * largest).clamp(min=torch.finfo(x.dtype).tiny)
        return values, func((x / step).round(), *args[1:], **(kwargs or {}))[1]


@contextmanager
def _in_one_order(plan: Plan) -> Iterator[None]:
    """Let no order of computation decide where networks with unpooling put values.

    Where windows overlap, torch writes some values twice, and with several threads the order of the writes varies: a
    single thread is used. Among equal values of a window the first is the largest, see `FirstOfEqual`.
    """
    if not any("unpool" in decision.operation.lower() for decision in plan.decisions):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FirstOfEqual():
            yield
    finally:
        torch.set_num_threads(threads)


def _uniform_checks(case: Case) -> list[Check]:
    """Compare every uniform level, computed through kernel maps, with the dense networks."""
    plan, geometry, tolerance = case.plan, case.geometry, case.tolerance
    mapped, watched, checks = (
        replace(geometry, dense_shortcut=False),
        _watched(case.adapted, plan),
        list[Check](),
    )
    but_for = f", with {', '.join(d.node for d in plan.between)} as it was" if plan.between else ""
    for level in _levels(plan, geometry, case.adapted):
        own = level == plan.identity_level
        at = case.call if own else case.fewer
        ours = _values(case, _uniform(mapped, level), at, watched, every=not own)
        if own:
            law, expected = "the network as it was", _values(case, None, at, watched)
        else:
            law = f"the dense network at output stride {plan.strides[level]}{but_for}"
            expected = _values(case, _uniform(geometry, level), at, watched, every=True)
        check = _compare(f"everything at level {level} is {law}", ours, expected, tolerance)
        checks.append(replace(check, number=1 if own else 2, size=_size_of(at)))
        if own:
            checks += _on_another_call(case, mapped)
        if level == 0 < (plan.identity_level or 0) and geometry.pool == "atrous":
            unmixed = _unmixed(case.adapted)
            maps = {name: value for name, value in ours.items() if name in unmixed}
            if not maps:
                continue
            law = "everything high, read where the network has samples, is the network as it was"
            given = _values(case, None, at, watched)
            checks.append(_compare(law, maps, {name: given[name] for name in maps}, tolerance))
    return checks


def _emulated_checks(case: Case) -> list[Check]:
    """Compare everything high with the network as it was, and every other level, alone and side by side, with its
    emulation in dense operations (of networks that have one, see `can_emulate`), on fewer pixels."""
    plan, geometry, tolerance = case.plan, case.geometry, case.tolerance
    mapped, watched = replace(geometry, dense_shortcut=False), _watched(case.adapted, plan)
    own = _values(case, None, case.call, watched)
    ours = _values(case, _uniform(mapped, 0), case.call, watched)
    check = _compare("everything high is the network as it was", ours, own, tolerance)
    checks = [replace(check, number=1, size=_size_of(case.call)), *_on_another_call(case, mapped)]
    of_level = "floor" if plan.floors else "output stride"
    maps: dict[str, Callable[..., Tensor]] = {
        f"everything at {of_level} {plan.strides[level]}": partial(torch.full, fill_value=level)
        for level in range(1, plan.max_level + 1)
    }
    maps[f"{of_level}s side by side"] = partial(_side_by_side, geometry=geometry)
    chosen = _chosen_outputs(case.original)
    padded = {node.meta[ORIGIN] for node in case.adapted.nodes if node.target is functional.pad}
    for name, levels in maps.items() if can_emulate(case.adapted, geometry) else ():
        lattices: list[Lattice] = []
        masking = partial(_of_fine_map, geometry=mapped, levels=levels, made=lattices)
        sizes: dict[str, tuple[int, int]] = {}
        ours = _values(case, masking, case.fewer, watched, every=True, sizes=sizes)
        emulator = Emulator(case.model, case.original, plan, geometry, lattices[-1].levels, sizes, padded)
        try:
            expected = _values(case, None, case.fewer, watched, interpreter=emulator)
        except CannotEmulate:
            break
        for values in (ours, expected):
            for one in [n for n, v in values.items() if n in chosen or not v.is_floating_point()]:
                del values[one]
        if not ours:
            break
        check = _compare(f"{name} is its emulation", ours, expected, tolerance)
        checks.append(replace(check, size=_size_of(case.fewer)))
    return checks


def _chosen_outputs(graph: fx.Graph) -> set[str]:
    """Return the names of outputs that depend on choices among the values of maps, such as the highest scores: between
    anchors values are interpolated, many are equal, and rounding would choose. The maps are compared themselves."""
    output = graph.output_node()
    behind = downstream(graph.nodes, chooses)
    leaves = [leaf for leaf in tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    return {f"{_OUTPUT}{index}" for index, leaf in enumerate(leaves) if leaf in behind}


def _size_of(call: Arguments) -> tuple[int, int]:
    image = image_of(call)
    return image.shape[2], image.shape[3]


def _of_fine_map(
    image: Any, features: Tensor, geometry: Geometry, levels: Callable[..., Tensor], made: list[Lattice]
) -> Lattice:
    """Return the lattice of a level map of the fine map's size, and note it in `made`."""
    size = (features.shape[0], *features.shape[2:])
    made.append(geometry.lattice(levels(size, device=features.device)))
    return made[-1]


def _side_by_side(size: tuple[int, ...], geometry: Geometry, device: torch.device) -> Tensor:
    """Return a level map of a size (B, H, W) in which cells of all levels are neighbours."""
    side = geometry.sides[geometry.max_level]
    b, y, x = (torch.arange(length, device=device) for length in size)
    number = b.view(-1, 1, 1) + 2 * (y // side).view(1, -1, 1) + (x // side).view(1, 1, -1)
    return number % 3 * geometry.max_level // 2


def _fewer_pixels(case: Case) -> Arguments:
    """Return the example with one image and a part of its pixels, on which all levels can be compared in time; the
    example itself if it is small enough, or if the network or its graph does not take the part."""
    image, work = image_of(case.call), _work_of_levels(case.plan)
    if work <= _MOST_CALLS:
        return case.call
    whole, least = _size_of(case.call), 2 * case.plan.output_stride[1]
    part = _largest_part(whole, image[:, 0].numel() * _MOST_CALLS / work, least)
    for size in dict.fromkeys((part, whole)):
        fewer = part_of(case.call, *size)
        # A network may refuse a size, or a single image, with any error.
        with contextlib.suppress(Exception), torch.no_grad(), evaluating(case.model), AnyLayout():
            run_forward(case.model, fewer)
            case.run(case.plan.max_level, fewer)
            return fewer
    return case.call


def _largest_part(whole: tuple[int, int], pixels: float, least: int) -> tuple[int, int]:
    """Return height and width of the largest part of an image with at most so many pixels, which leaves the same rests
    as the image and is no smaller than `least` along a side."""
    heights, widths = (range(n, min(n, max(_STEP, least)) - 1, -_STEP) for n in whole)
    fitting = [size for size in product(heights, widths) if size[0] * size[1] <= pixels]
    # Windows reach furthest where both sides are long.
    return max(fitting, key=lambda size: (min(size), size[0] * size[1]), default=(heights[-1], widths[-1]))


def _work_of_levels(plan: Plan) -> float:
    """Return the work of comparing all levels but the network's own, and of measuring their effect, in calls."""
    levels = [level for level in range(plan.max_level + 1) if level != plan.identity_level]
    return sum(2 * _work_at(level, plan) for level in levels) + _work_at(0, plan)


def _work_at(level: int, plan: Plan) -> float:
    """Return the multiply-accumulates with all cells at a level, relative to those of the network as given."""
    of_level = total = 0.0
    for decision in plan.decisions:
        finer = 1.0
        if decision.on_elements:
            stage = decision.stages[1]
            finest = max(level, stage - 1) if plan.floors else min(stage, level)
            finer = decision.spacing * plan.strides[0] / plan.strides[finest]
        total += decision.macs
        of_level += decision.macs * finer**2
    return of_level / total if total else 0.0


def _on_another_call(case: Case, geometry: Geometry) -> list[Check]:
    """Compare the outputs at the network's own level in a call that the example was not: other pixels and, as far as
    the network takes it on this path, another batch, one pixel less along each side, and other numbers."""
    for call in _other_calls(case):
        try:
            expected = run_forward(case.model, call)
        except Exception:  # the network refuses this call with an error of its own
            continue
        try:
            ours = replace(case, geometry=geometry).run(case.plan.identity_level or 0, call)
        except GuardFailed:  # the network is read anew for such a call
            continue
        law = "the outputs of another call are the network's as it was"
        read = _named(at_own_samples(ours, case.adapted, case.plan))
        check = _compare(law, read, _named(expected), case.tolerance)
        return [replace(check, number=1, size=_size_of(call))]
    return []


def _other_calls(case: Case) -> Iterator[Arguments]:
    """Yield calls that differ from the example in fewer and fewer ways."""
    batch = len(image_of(case.call))
    for example in (case.fewer, case.call):
        height, width = (length - 1 for length in image_of(example).shape[2:])
        darker = with_other_values(example)
        smaller = change_images(darker, partial(crop, height=height, width=width))
        is_other_batch = len(image_of(example)) != batch
        others = smaller if is_other_batch else with_another_batch(smaller)
        if has_numbers(others):
            yield with_other_numbers(others)
        yield others
        if not is_other_batch:
            yield smaller
    yield with_another_batch(darker)
    yield darker


def _named(outputs: Any) -> dict[str, Tensor]:
    return {f"{_OUTPUT}{i}": value for i, value in enumerate(tensors_of(outputs))}


def at_own_samples(outputs: Any, adapted: fx.Graph, plan: Plan) -> Any:
    """Reduce the outputs of a rewritten graph to the positions at which the original network has samples."""
    node = next(node for node in adapted.nodes if node.op == "output")

    def read(value: Any, source: Any) -> Any:
        if isinstance(source, (list, tuple)):
            return [read(*pair) for pair in zip(value, source, strict=True)]
        if isinstance(source, dict):
            parts = value if isinstance(value, dict) else vars(value)  # a dataclass
            return {key: read(parts[key], part) for key, part in source.items()}
        if not isinstance(source, fx.Node) or source.target is not functional.to_dense:
            return value
        decision = plan[source.args[0].meta[ORIGIN]]  # type: ignore[union-attr]
        if decision.leaves != "fine" or decision.spacing == 1:
            return value
        every = slice(None, None, decision.spacing)
        return value[tuple(every if axis in "hw" else slice(None) for axis in decision.layout)]

    return read(outputs, node.args[0][0])


def _unmixed(adapted: fx.Graph) -> set[str]:
    """Return the original's values that depend on no operation that mixes positions."""

    def mixes(node: fx.Node) -> bool:
        operation = operation_of(node.target)
        return operation is not None and operation.mixes

    mixed = downstream(adapted.nodes, mixes)
    return {node.meta[ORIGIN] for node in adapted.nodes if node not in mixed and ORIGIN in node.meta}


def _watched(adapted: fx.Graph, plan: Plan) -> dict[str, Decision]:
    """Return the maps to compare: those that leave the region or are reduced to one vector per image. Pooling indices
    are not compared themselves; errors in them show in the unpooled maps."""
    numbers = {
        node.args[0].meta.get(ORIGIN) for node in adapted.nodes if node.target is functional.dense_indices
    }
    read = {node.args[0].meta.get(ORIGIN) for node in adapted.nodes if gives(node, "vector")}
    return {
        d.node: d
        for d in plan.decisions
        if ((d.leaves and d.stages[1]) or d.node in read) and d.node not in numbers
    }


def _levels(plan: Plan, geometry: Geometry, adapted: fx.Graph) -> list[int]:
    """Return the levels to compare: all, or only the lowest if pooling drops elements, as only it has a dense twin."""
    levels = list(range(plan.max_level + 1))
    windows: Any = ((node, node.kwargs.get("window")) for node in adapted.nodes)
    operations = (operation_of(node.target) for node, window in windows if window and window.stride > 1)
    drops = geometry.pool == "drop" and any(known is not None and known.drops for known in operations)
    return [level for level in levels if level == len(geometry.strides)] if drops else levels


def _uniform(geometry: Geometry, level: int) -> Masking:
    return lambda image, features: geometry.uniform_like(features, level)


def _values(
    case: Case,
    masking: Masking | None,
    call: Arguments,
    watched: dict[str, Decision],
    every: bool = False,
    sizes: dict[str, tuple[int, int]] | None = None,
    interpreter: fx.Interpreter | None = None,
) -> dict[str, Tensor]:
    """Run the adaptive network, or without a masking the network itself, and return the watched values on the network's
    own grid, and the outputs there or, with `every`, at all positions; note the sizes of watched elements in fine
    pixels. Another interpreter may run the graph."""
    graph, first = (case.original, []) if masking is None else (case.adapted, [masking])
    interpreter = interpreter or Interpreter(case.model, graph=graph)
    values: dict[str, Tensor] = {}
    run_node = interpreter.run_node

    def collect(n: fx.Node) -> Any:
        value = run_node(n)
        origin = n.meta.get(ORIGIN) if first else n.name
        if origin in watched and isinstance(value, (Elements, Tensor)):
            dense = value
            if isinstance(dense, Elements) and isinstance(dense.rows, tuple):
                return value  # parts along the channels, which are compared themselves
            if isinstance(dense, Elements):
                if sizes is not None:
                    sizes[origin] = dense.lattice.size
                dense = to_dense(dense, watched[origin].spacing, watched[origin].layout)
            values[origin] = dense.clone()  # later nodes may change it in place
        return value

    interpreter.run_node = collect  # type: ignore[method-assign]
    output = interpreter.run(*in_order(graph, call, *first))
    if first:
        output = output[0] if every else at_own_samples(output[0], case.adapted, case.plan)
    return values | _named(output)


def _compare(law: str, ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> Check:
    worst = Check(law, "", 0.0, tolerance)
    if not ours or ours.keys() != expected.keys():
        return Check(law, "nothing to compare", float("nan"), tolerance)
    for name, value in ours.items():
        reference = expected[name]
        if value.shape != reference.shape:
            return Check(
                law, f"{name}: {tuple(value.shape)} against {tuple(reference.shape)}", float("inf"), tolerance
            )
        if not reference.is_floating_point():
            error = float((value != reference).double().mean()) if reference.numel() else 0.0
            if not error <= DISCRETE:
                return Check(law, name, error, DISCRETE)
            continue
        if not reference.numel():
            continue
        # Of the maps inside, channels may be nothing but rounding; what is returned is judged channel by channel.
        scale = scales(reference, _FEWEST if name.startswith(_OUTPUT) else reference.numel() + 1)
        error = float(((value - reference).abs() / scale).max())
        if not error <= worst.error:
            worst = Check(law, name, error, tolerance)
    return worst
