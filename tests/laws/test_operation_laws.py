"""Laws of the table of operations: what is said of each is what it does, found by experiment.

What an element depends on shows in its gradient: with random weights, the rows whose gradient is not zero are those
that were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import assert_same, images, random_levels
from networks import ManyOperations, unverified
from timm.layers import DropPath
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.backends.packed import ScaleShift
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.functional import to_dense
from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.elements.mean_shift import MeanShift
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.elements.operations import Operation, operations
from cadsurgery.elements.windows import drops
from cadsurgery.surgery.treatment import Treatment


def name_of(op: Operation) -> str:
    return op.call.__name__


OWN = [op for op in operations().values() if op.call.__module__.startswith("cadsurgery.")]
C, SIZE, STRIDES = 4, (13, 11), (2, 2)
EVEN = (16, 12)  # of what torch refuses at odd sizes
KERNEL = Window((3, 3), 2, padding=(1, 1, 1, 1), spacing=2)


@dataclass(frozen=True)
class Example:
    """Arguments of an operation behind its elements."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def numbers(*shape: int) -> Tensor:
    """The same for the same shape."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(C, **options).double().eval()


def mean_shift() -> MeanShift:
    module = MeanShift(len(STRIDES), C, numbers(1))
    module.shift.data = numbers(*module.shift.shape)
    return module


WINDOWED = {"window": KERNEL, "stage": 2}
EXAMPLES: dict[str, Example] = {
    "conv2d": Example((numbers(6, C, 3, 3), None), WINDOWED),
    "fused_conv2d": Example((FusedConv(numbers(6, C, 3, 3), None),), WINDOWED),
    "conv2d_per_image": Example(
        (numbers(2, 3), numbers(3, 6 * C * 9), None), {**WINDOWED, "shape": (6, C, 3, 3)}
    ),
    "shift_vector": Example((mean_shift(),)),
    "max_pool2d": Example((), WINDOWED),
    "avg_pool2d": Example((), WINDOWED),
    "max_pool2d_with_indices": Example((), WINDOWED),
    "dense_indices": Example((4,)),
    "pixel_unshuffle": Example((), {"window": Window((2, 2), 2, spacing=2), "stage": 2}),
    "batch_norm": Example((norm(),)),
    "scale_and_shift": Example((ScaleShift(numbers(C), numbers(C + 1)[:C]),)),
    "norm_of_batch": Example((norm(track_running_stats=False),)),
    "group_norm": Example((2, None, None)),
    "group_deviation": Example((2, 1e-5)),
    "drop_channels": Example(("dropout2d", 0.5, False)),
    "drop_per_image": Example((DropPath(0.5).eval(),)),
    "global_mean": Example(),
    "global_max": Example(),
    "pool_to_bins": Example(((2, 2),)),
    "global_reduce": Example(("norm", (2, 3))),
    "softmax_over_image": Example((2,)),
    "normalize_over_image": Example((2,)),
    "sum_of_products": Example((), {"spacing": 2, "layout": "bpc"}),
    "matrix_on_rows": Example((numbers(C, 5), False)),
    "resize": Example((), {"stage": 1, "spacings": (4, 2), "scale": 2, "mode": "bilinear"}),
    "resize_to_dense": Example((2,), {"scale_factor": 4, "mode": "bilinear"}),
    "pixel_shuffle": Example((), {"stage": 1, "spacings": (4, 2), "scale": 2}),
    "check_same_padding": Example(((0, 1, 1, 1), Window((3, 3), 2, same=True)), {"spacing": 2}),
    "crop": Example(((0, None), (5, -1)), {"spacing": 2}),
    "pad": Example(((0, -1, 0, 1),), {"spacing": 2, "value": 0.5}),
    "to_dense": Example(),
    "native_shape": Example((2,)),
    "small_map": Example((2, (7, 6), "bilinear")),
    "one_sample": Example((2, "an addition")),
    "to_elements": Example(),
    "fine_map": Example(),
}


def lattice(size: tuple[int, int] = SIZE, **options: Any) -> Lattice:
    """Two images with cells of every level."""
    torch.manual_seed(0)
    levels = random_levels(2, size, STRIDES)
    return Geometry(STRIDES, **options).lattice(levels)


def elements(stage: int = 1, **options: Any) -> Elements:
    on = lattice(**options).at(stage)
    return Elements(numbers(len(on), C).requires_grad_(), on)


def entering(op: Operation) -> Elements:
    """What an operation reads in its example."""
    stages = {"resize": 2, "pixel_shuffle": 2, "to_elements": 0}
    return elements(stages.get(name_of(op), 1), size=EVEN if name_of(op) == "pixel_unshuffle" else SIZE)


def values_of(value: Any) -> Any:
    """Of what gives several maps side by side, the first."""
    several = isinstance(value, Elements) and isinstance(value.rows, tuple)
    return Elements(value.rows[0], value.lattice) if several else value


def called(op: Operation, x: Elements) -> Any:
    """The operation on elements, by its example."""
    return values_of(_called(op, x))


def _called(op: Operation, x: Elements) -> Any:
    name, example = name_of(op), EXAMPLES[name_of(op)]
    options = example.options
    if name == "dense_indices":
        indices = functional.max_pool2d_with_indices(
            elements(), Window((2, 2), 2, spacing=2, ceil_mode=True), 2
        )
        indices = Elements(indices.rows[1], indices.lattice)
        return op.call(indices, *example.arguments)
    if name == "shift_vector":
        return op.call(x, functional.global_mean(x), *example.arguments)
    if name == "sum_of_products":
        return op.call(x, x, **options)
    if name == "small_map":
        return op.call(to_dense(x, 4), *example.arguments)
    if name == "one_sample":
        return op.call(torch.ones(2, C, *x.lattice.samples(2)), x, *example.arguments)
    if name == "to_elements":
        return op.call(to_dense(x, 1), x.lattice)
    if name == "fine_map":
        return op.call(to_dense(x, 1).permute(0, 2, 3, 1), "bhwc")
    return op.call(x, *example.arguments, **options)


def parts(value: Any) -> tuple[Tensor, Callable[[int], tuple[int, int, int] | None]]:
    """Vectors of a result, and where the i-th is: image and pixel, or None where it is of a whole image."""
    if isinstance(value, Elements):
        b, y, x = value.lattice.coordinates
        return value.rows.flatten(1), lambda i: (int(b[i]), int(y[i]), int(x[i]))
    if value.dim() == 4 and min(value.shape[2:]) > 2:  # bins of an image are no places
        batch, _, height, width = value.shape
        flat = value.permute(0, 2, 3, 1).reshape(batch * height * width, -1)
        return flat, lambda i: (i // (height * width), i // width % height, i % width)
    return value.flatten(1), lambda i: None


def influences(op: Operation, x: Elements, value: Any) -> list[tuple[int, set[int]]]:
    """For some vectors of a result their number and the rows of `x` that they depend on."""
    vectors, _ = parts(value)
    chosen = torch.linspace(0, len(vectors) - 1, min(len(vectors), 12)).long().tolist()
    weights = numbers(vectors.shape[1])
    read = []
    for number in dict.fromkeys(chosen):
        (gradient,) = torch.autograd.grad(
            (vectors[number] * weights).sum(), x.rows, retain_graph=True, allow_unused=True
        )
        rows = gradient.abs().sum(1).nonzero().flatten().tolist() if gradient is not None else []
        read.append((number, set(rows)))
    return read


def image_of(x: Elements, row: int) -> int:
    return int(x.lattice.coordinates[0][row])


def test_every_operation_has_an_example() -> None:
    assert {name_of(op) for op in OWN} == EXAMPLES.keys()


@pytest.mark.parametrize("op", OWN, ids=name_of)
def test_an_operation_gives_what_it_says(op: Operation) -> None:
    x = entering(op)
    value = called(op, x)
    if op.gives == "elements":
        assert isinstance(value, Elements)
    elif op.gives == "vector":
        assert (
            isinstance(value, Tensor) and value.shape[0] == 2 and math.prod(value.shape[2:]) in (1, C, 2 * 2)
        )
    elif op.gives == "dense":
        assert isinstance(value, Tensor) and value.dim() == 4 and value.shape[:2] == (2, C)
    else:
        assert not isinstance(value, Elements)


ELEMENTWISE = [op for op in OWN if op.reads == "element" and op.gives == "elements"]
WINDOWS = [op for op in OWN if "window" in EXAMPLES[name_of(op)].options]
BORDERED = [op for op in WINDOWS if name_of(op) != "pixel_unshuffle"]
RESIZES = ("resize", "resize_to_dense", "small_map")
WHOLE = [op for op in OWN if op.mixes and name_of(op) not in RESIZES]


@pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)
def test_what_reads_an_element_reads_that_of_its_own_place(op: Operation) -> None:
    x = entering(op)
    value = called(op, x)
    _, place = parts(value)
    own = {tuple(map(int, at)): row for row, at in enumerate(zip(*x.lattice.coordinates, strict=True))}
    for number, rows in influences(op, x, value):
        assert rows <= {own.get(place(number))}  # type: ignore[arg-type] # beyond the map nothing is read


@pytest.mark.parametrize("op", WINDOWS, ids=name_of)
def test_what_reads_a_window_reads_what_its_kernel_map_names(op: Operation) -> None:
    x, window = entering(op), EXAMPLES[name_of(op)].options["window"]
    if name_of(op) == "fused_conv2d":  # has no gradient: its way through training is `conv2d`
        with torch.no_grad():
            value = called(op, x)
        assert_same(
            value.rows, cs.functional.conv2d(x, EXAMPLES["conv2d"].arguments[0], None, **WINDOWED).rows
        )
        return
    value = called(op, x)
    reading = kernel_map(x.lattice, value.lattice, window, drop=op.drops and drops(value.lattice, window))
    count, beyond = len(x.lattice), 0
    for number, rows in influences(op, x, value):
        named = set(reading.table[number].tolist())
        mixed = {
            row for entry in named if entry > count for row in reading.sources[entry - count - 1].tolist()
        }
        assert rows <= named | mixed
        beyond += len(rows) > 1
    assert beyond


@pytest.mark.parametrize("op", WHOLE, ids=name_of)
def test_what_reads_an_image_or_batch_reads_beyond_its_place_and_no_further(op: Operation) -> None:
    x = elements()
    value = called(op, x)
    _, place = parts(value)
    other_images = 0
    for number, rows in influences(op, x, value):
        at = place(number)
        image = at[0] if at is not None else number
        images = {image_of(x, row) for row in rows}
        assert image in images and (len(rows) > 1 or name_of(op) == "global_max")
        other_images += len(images - {image})
    assert (other_images > 0) == (op.reads == "batch")


@pytest.mark.parametrize("op", BORDERED, ids=name_of)
def test_what_is_beyond_the_border_is_what_an_operation_says(op: Operation) -> None:
    x, example = elements(), EXAMPLES[name_of(op)]
    if name_of(op) == "fused_conv2d":
        x = Elements(x.rows.detach(), x.lattice)

    def padded(outside: float | None) -> Tensor:
        options = {**example.options, "window": KERNEL._replace(outside=outside)}
        return values_of(op.call(x, *example.arguments, **options)).rows.detach()

    assert_same(padded(op.outside), padded(None))
    assert not torch.equal(padded(100.0), padded(None))


def test_an_operation_is_declared_in_the_words_of_the_table() -> None:
    with pytest.raises(cs.InvalidInput, match="cannot read or give 'neighbours'"):
        cs.operation(reads="neighbours")  # type: ignore[arg-type]


def test_a_treatment_calls_what_is_declared() -> None:
    def undeclared(x: Elements) -> Elements:
        return x

    with pytest.raises(cs.InvalidInput, match="'undeclared' is not declared"):
        Treatment("pointwise", call=undeclared)
    with pytest.raises(cs.UnknownName, match="max_pool2d"):
        Treatment("window", call="max_pool")
    assert Treatment("window", call="max_pool2d").call is cs.functional.max_pool2d


@torch.no_grad()
def test_each_operation_of_the_region_is_one_node() -> None:
    net = unverified(ManyOperations().eval(), "edges", example_input=images(1, 97, 129))
    made = [node for node in net.graph.nodes if isinstance(node.target, OnRows)]
    names = {decision.node for decision in net.plan.chosen("keep")}
    origins = [node.meta["origin"] for node in made if "origin" in node.meta]
    assert made and len(set(origins)) == len(origins) and set(origins) <= names
    assert not any(node.target is getattr and node.args[1] == "lattice" for node in net.graph.nodes)
