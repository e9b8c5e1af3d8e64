"""Write ONNX files: mask, lattice and network in standard operations, for one image size or any, and verify them."""

from __future__ import annotations

import copy
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, fx, nn
from torch.export import Dim

from cadsurgery.data.channels import per_channel
from cadsurgery.data.networks import license_of, source_of
from cadsurgery.elements import functional
from cadsurgery.elements.backends.graph_sizes import Condition, recorded_conditions
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.size_symbols import drop_fresh, fresh_map, in_multiples, of_size
from cadsurgery.elements.sizes import divide_up, is_for_any_size, is_statically_true
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.provider import check_levels
from cadsurgery.network.calibration import batch_of
from cadsurgery.network.export.compare import (
    TOLERANCE,
    FileComparison,
    check_difference,
    difference,
    more_images,
    rounding_of,
)
from cadsurgery.network.export.conditions import require
from cadsurgery.network.export.decompose import decompose
from cadsurgery.network.export.dictionaries import further_inputs
from cadsurgery.network.export.engine import Engine
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.export.kernels import declare_kernels, resize_by_kernels
from cadsurgery.network.export.names import output_names
from cadsurgery.network.export.programs import Written
from cadsurgery.network.export.quiet import quietly
from cadsurgery.network.export.shortcuts import (
    following_quickly,
    promoting_without_runs,
)
from cadsurgery.network.export.tidy import tidy
from cadsurgery.network.export.unsupported import (
    cause_of,
    place_of,
    place_of_translation,
    refused,
    saying_if_too_large,
)
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import Program
from cadsurgery.support.errors import CadError, CannotConvert, describe_error, warn
from cadsurgery.support.kinds import HOW_TO_OPEN, KERNELS_KEY
from cadsurgery.support.progress import Step, counted, silent
from cadsurgery.support.provenance import versions
from cadsurgery.support.running import Target, portable
from cadsurgery.support.torch_internals import tree_leaves

# Tolerance in half precision, and number of patches per image that a mask may choose differently through rounding.
TOLERANCE_OF_HALVES = 2e-2
PATCHES_BY_ROUNDING = 2
# More bytes of weights than this go into a separate file; protobuf's limit is twice as large.
_LARGEST_FILE = 1 << 30
# Images of other sizes that a file is compared on keep about so many samples of the deepest map along the shorter side.
_UNITS = 4


def write(
    net: AdaptiveModel,
    image: Tensor,
    other: Tensor | None,
    path: Path,
    dynamic: bool,
    level_map: bool,
    float16: bool,
    engine: type[Engine],
    calibration: Sequence[Any] = (),
    step: Step = silent,
    name: str = "image",
    fixed_batch: bool = False,
) -> Written:
    """Write an ONNX file; return its comparison, and the shape of its image with None for dynamic axes. See `export`.

    `name` is that of the image among the inputs.
    The file is compared in the engine, and calls kernels if it has some.

    Raises:
        CannotConvert: torch or ONNX cannot follow the network or its mask, or the file's outputs differ.
    """
    step("tracing")
    seen = [image, *([] if other is None else [other]), *map(batch_of, calibration)]
    multiple = find_multiple(net, seen) if dynamic else 1
    graph = Exportable(net, float16, multiple)
    answer = _cut_awkwardly(net, image, multiple) if dynamic else _ask(net, image)
    example, names = answer.image, output_names(answer.output)
    if not engine.has_kernels:
        _warn_of_grouped_layers(graph.net)
    rest = further_inputs(net)
    inputs: tuple[Tensor, ...] = (example, *rest.values())
    input_names = (name, *rest)
    if level_map:
        inputs, input_names = (example, answer.levels.long()), (name, "level_map")
    target = Target(engine.has_kernels, bool(calibration), engine.has_8_bit_depthwise)
    from cadsurgery.network.export.translate import TABLE

    program, free = follow(graph, inputs, dynamic, target, fixed_batch or bool(rest))
    shape = tuple(None if axis in free else length for axis, length in enumerate(image.shape))
    outputs = (*names, "levels")
    step("translating to ONNX")
    model = translate(
        program,
        f"write a program of torch's operations instead: to='pt2'.{_alternative(net, level_map)}",
        graph,
        custom_translation_table=TABLE,
        optimize=False,
        input_names=input_names,
        output_names=outputs,
    )
    with refused("the file cannot be finished", "report it with the name of the network."):
        _finish(model.model, target.has_kernels, _metadata(net, dynamic, multiple), free)
        step("writing")
        _save(model, path)
    with refused("the engine does not open the file", _other_files(dynamic, level_map)):
        run = engine(path, torch.get_num_threads(), any_size=dynamic)
    answers = _answers(net, image, other, dynamic, None if 0 in free else len(image), multiple)
    batches = [answer.image for answer in answers]
    tolerance = TOLERANCE_OF_HALVES if float16 else TOLERANCE
    with saying_if_too_large(net, batches, float16):
        largest = _compare_all(net, run, answers, level_map, tolerance, step)
    shapes = tuple(tuple(batch.shape) for batch in batches)
    compared = FileComparison(largest, shapes, input_names, outputs, multiple)
    if calibration:
        calls, others = (
            [_inputs(net, batch, level_map) for batch in part] for part in (calibration, batches)
        )
        compared = replace(compared, fidelity=to_8_bits(path, engine, calls, others, step))
    return compared, shape


def _compare_all(
    net: AdaptiveModel,
    run: Engine,
    answers: Sequence[_Answer],
    level_map: bool,
    tolerance: float,
    step: Step,
) -> float:
    """Run a file in its engine on all images and return its largest difference from the network's answers.

    Raises:
        CannotConvert: it is above the tolerance.
    """
    step("comparing")
    shown = counted(answers, step, "comparing, batch")
    differences = (_compare(net, run, answer, level_map) for answer in shown)
    return check_difference(
        differences, tolerance, lambda: rounding_of(net, [answer.image for answer in answers])
    )


def _finish(model: Any, has_kernels: bool, metadata: dict[str, str], free: set[int]) -> None:
    """Make a translated graph smaller and faster, and add metadata and names."""
    tidy(model, has_kernels)
    if has_kernels:
        resize_by_kernels(model)
    model.metadata_props.update(metadata)
    if declare_kernels(model):
        model.metadata_props[KERNELS_KEY] = model.doc_string = HOW_TO_OPEN
    _name_axes(model, free)


def _save(model: Any, path: Path) -> None:
    import onnx

    weights = (weight.const_value for weight in model.model.graph.initializers.values())
    model.save(path, external_data=sum(weight.nbytes for weight in weights) > _LARGEST_FILE)
    onnx.checker.check_model(str(path), full_check=True)


def _warn_of_grouped_layers(net: AdaptiveModel) -> None:
    """Warn if an optimised network convolves rows in groups; engines have no fast operation for that."""
    read = functional.fused_conv2d
    kernels = [node.args[1].target for node in net.program.graph.nodes if node.target is read]
    grouped = sum(operator.attrgetter(name)(net).groups > 1 for name in kernels)
    if grouped:
        warn(
            f"{grouped} of {len(kernels)} convolutions of rows in the file are depthwise or grouped, for which "
            "engines have no fast operation: on CPUs such files were little faster than the dense network, or slower, "
            "in float32, and slower in 8 bits. Write the file with this package's kernels, with_kernels=True "
            "(--with-kernels), or compare it with the dense network: cadsurgery bench --runtime onnx."
        )


def _inputs(net: AdaptiveModel, image: Any, level_map: bool) -> tuple[Tensor, ...]:
    """Return the inputs of a file for an image batch, or for a dictionary that holds it."""
    if isinstance(image, dict):
        return (batch_of(image), *(image.get(name, value) for name, value in further_inputs(net).items()))
    if not level_map:
        return (image, *further_inputs(net).values())
    net(image)
    return image, net.levels.long()


def translate(
    program: torch.export.ExportedProgram, next: str, graph: nn.Module | None = None, **options: Any
) -> Any:
    """Translate a program, of `graph`, to ONNX.

    Raises:
        CannotConvert: torch's exporter cannot write it; `next` is the advice in the message.
    """
    in_torch, translatable = program.run_decompositions, program

    def run_decompositions(table: dict[Any, Any]) -> torch.export.ExportedProgram:
        """The exporter calls this with the operations that have no translation."""
        nonlocal translatable
        translatable = program if decompose(program, table) else in_torch(table)
        drop_fresh(translatable)
        return translatable

    program.run_decompositions = run_decompositions
    with quietly(), promoting_without_runs():
        try:
            return torch.onnx.export(program, dynamo=True, verbose=False, **options)
        except Exception as error:
            raise CannotConvert(
                "torch's exporter has no ONNX for the network or its mask.",
                where=place_of_translation(error, translatable.graph, getattr(graph, "net", None)),
                why=cause_of(error),
                next=next,
            ) from error


class Exportable(nn.Module):
    """A network as a function of tensors: from the image, or image and level map, to the outputs and the level map."""

    def __init__(self, net: AdaptiveModel, float16: bool, multiple: int = 1) -> None:
        """Copy a network and fold its batch norms; images have sides that are multiples of a number."""
        super().__init__()
        self.net = net.optimize()
        self.net._program = _count_in_symbols(self.net.program)
        self.mask = copy.deepcopy(net.mask)
        self.float16, self.multiple = float16, multiple
        if float16:
            self.net = self.net.half()

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Run the network on an image (B, C, H, W), and either its further inputs or a level map (B, h, w), int64;
        return the outputs in order and the level map (B, h, w), int8."""
        program = self.net.program
        further = rest if further_inputs(self.net) else ()
        levels = rest[0] if rest and not further else None
        if self.multiple > 1:
            given, image = image, in_multiples(image, self.multiple)
            reason = f"sides of images are multiples of {self.multiple}"
            sides = zip(given.shape[2:], image.shape[2:], strict=True)
            image = require(image, [Condition(length, known, reason) for length, known in sides])
            if levels is not None:
                stride = program.plan.strides[0]
                levels = of_size(
                    levels, [divide_up(length + program.plan.around, stride) for length in image.shape[2:]]
                )
        masking = program.masking(self.mask)
        masking = _InSingle(**vars(masking) | {"any_number": True, "image": image, "levels": levels})
        run = program.run_after_first_pass if self.mask.looks_ahead and levels is None else program
        with recorded_conditions() as conditions:
            output, lattice = run(masking, program.bind(image.half() if self.float16 else image, *further))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        outputs = (leaf.to(image.dtype) if leaf.is_floating_point() else leaf for leaf in tensors)
        return (*outputs, require(lattice.pyramid.levels, conditions))


# Python functions on sizes, and torch's replacements that accept symbolic sizes.
_OF_SYMBOLS: dict[Any, Any] = {
    int: torch.sym_int,
    float: torch.sym_float,
    max: torch.sym_max,
    min: torch.sym_min,
}


def _linspace(start: Any, end: Any, steps: int, **options: Any) -> Tensor:
    """Compute `torch.linspace`, whose number of steps torch fixes in a program."""
    if not isinstance(steps, torch.SymInt):
        return torch.linspace(start, end, steps, **options)
    places = torch.arange(steps, **{"dtype": torch.get_default_dtype(), **options})
    return places * ((end - start) / torch.sym_max(steps - 1, 1)) + start


def _of_whole_map(pool: Callable[..., Any], reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a pooling that is a mean or maximum where its window is the whole map: torch.export fixes the size of a
    window in the program."""

    def run(x: Tensor, kernel_size: Any, *rest: Any, **options: Any) -> Any:
        sides = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        others = {name: value for name, value in options.items() if name not in ("stride", *_WITHOUT_EFFECT)}
        is_plain = len(rest) <= 1 and not any(others.values())
        if is_plain and is_for_any_size(sides):
            pairs = zip(sides, x.shape[-2:], strict=True)
            if all(is_statically_true(side == length) for side, length in pairs):
                return reduce(x, (-2, -1), keepdim=True)
        return pool(x, kernel_size, *rest, **options)

    return run


# Options of a pooling that change nothing where its window is the whole map.
_WITHOUT_EFFECT = ("ceil_mode", "count_include_pad", "dilation")
# Functions whose sizes torch.export fixes, and replacements that accept symbolic sizes.
_OF_ANY_SIZE: dict[Any, Callable[..., Any]] = {
    torch.linspace: _linspace,
    F.avg_pool2d: _of_whole_map(F.avg_pool2d, torch.mean),
    F.max_pool2d: _of_whole_map(F.max_pool2d, torch.amax),
    torch.max_pool2d: _of_whole_map(torch.max_pool2d, torch.amax),
}


def _count_in_symbols(program: Program) -> Program:
    """Return the program with a graph that accepts symbolic sizes, and names those of each map anew."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _OF_SYMBOLS:
            count = 2 if node.target in (max, min) else 1
            if len(node.args) == count and not node.kwargs:
                node.target = _OF_SYMBOLS[node.target]
        elif node.op == "call_function":
            node.target = _OF_ANY_SIZE.get(node.target, node.target)
    _name_sizes(program.graph)
    return replace(program).bind_to(program.net)


def _name_sizes(graph: fx.Graph) -> None:
    """Let what follows an operation read its map with fresh symbols for sizes."""
    for node in list(graph.nodes):
        if (
            node.op in ("call_module", "call_method", "call_function")
            and node.target not in _OF_SYMBOLS.values()
        ):
            with graph.inserting_after(node):
                renamed = graph.call_function(fresh_map, (node,))
            renamed.meta = dict(node.meta)
            node.replace_all_uses_with(renamed, lambda user, own=renamed: user is not own)


@dataclass(frozen=True, eq=False)
class _InSingle(Masking):
    """A masking that gives the mask the original image, and the features in the image's type; or uses a level map."""

    image: Tensor | None = None
    levels: Tensor | None = None

    def __call__(self, image: Tensor, features: Tensor) -> Lattice:
        assert self.image is not None
        if self.levels is None:
            return super().__call__(self._in_single(image), features.to(self.image.dtype))
        return self.geometry.lattice(check_levels(self.levels, self.grid(features), "levels"))

    def _in_single(self, image: Tensor) -> Tensor:
        """Return the image of the mask, before it was rounded; of images that the network joins, the joined ones."""
        assert self.image is not None
        is_joined = image.dtype == self.image.dtype or image.shape[0] is not self.image.shape[0]
        return image.to(self.image.dtype) if is_joined else self.image


def follow(
    graph: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic: bool,
    target: Target | None = None,
    is_fixed: bool = False,
) -> tuple[torch.export.ExportedProgram, set[int]]:
    """Export a network as a program in portable operations; return it with the dynamic axes of the image.

    A file for one size accepts any number of images if torch can export that, and unless `is_fixed`.

    Raises:
        CannotConvert: torch.export cannot follow the network.
    """
    pair = [torch.cat((value, value.flip(0)))[: max(2, len(value))] for value in inputs]
    attempts: list[tuple[tuple[Tensor, ...], set[int]]] = [
        (tuple(pair), {0, 2, 3} if dynamic else {0}),
        (inputs, {2, 3} if dynamic else set()),
    ]
    refusal: Exception | None = None
    for example, free in attempts[is_fixed:]:
        of_image, of_levels = (
            {axis: Dim.DYNAMIC for axis in free},
            {axis - (axis > 0): Dim.AUTO for axis in free},
        )
        # torch counts the further inputs of a call as a single one.
        shapes = (of_image, (of_levels,) * (len(example) - 1))[: len(example)] if free else None
        try:
            with portable(target), torch.no_grad(), quietly(), following_quickly():
                program = torch.export.export(
                    graph,
                    example,
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            _drop_assertions(program.graph_module)
            _round_quotients_down(program.graph_module)
            return program, free
        except Exception as error:
            if isinstance(error, CadError):
                raise
            refusal = refusal or error
    assert refusal is not None
    raise CannotConvert(
        "torch.export cannot follow the network or its mask.",
        where=place_of(refusal, getattr(graph, "net", None)),
        why=describe_error(refusal),
        next=_other_files(dynamic, level_map=len(inputs) > 1 and not is_fixed),
    ) from refusal


def _other_files(dynamic: bool, level_map: bool) -> str:
    """Return the advice to write a file that torch can follow more easily than the one that was asked for."""
    advice = []
    if dynamic and not level_map:
        advice.append("write a file for one size, without dynamic=True")
    if not level_map:
        advice.append("write an ONNX file with the level map as an input, level_map=True")
    return "; or ".join([*advice, "run the network where this package is, net.optimize()"]) + "."


def _drop_assertions(graph: fx.GraphModule) -> None:
    """Remove torch.export's assertions on sizes: ONNX has no assertions, and with their operands they are a third of
    all nodes to translate."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "").startswith("_assert_"):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _round_quotients_down(graph: fx.GraphModule) -> None:
    """Make quotients of sizes that may be negative, as in `-(-height // 2)`, exact divisions: ONNX rounds towards zero
    where Python rounds down, and OpenVINO sometimes one and sometimes the other."""
    for node in graph.graph.find_nodes(op="call_function", target=operator.floordiv):
        size, by = node.args
        if not _may_be_negative(_value_of(size)):
            continue
        with graph.graph.inserting_before(node):
            rest = graph.graph.call_function(operator.mod, (size, by))
            exact = graph.graph.call_function(operator.sub, (size, rest))
        rest.meta["val"] = _value_of(size) % _value_of(by)
        exact.meta["val"] = _value_of(size) - rest.meta["val"]
        node.args = (exact, by)
    graph.recompile()


def _value_of(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _may_be_negative(size: Any) -> bool:
    if not isinstance(size, SymInt):
        return bool(size < 0)
    shapes: Any = size.node.shape_env
    return bool(shapes.bound_sympy(size.node.expr).lower < 0)


@dataclass(frozen=True)
class _Answer:
    """What the network gives for a batch of images: output and level map."""

    image: Tensor
    output: Any
    levels: Tensor


def _ask(net: AdaptiveModel, image: Tensor) -> _Answer:
    return _Answer(image, net(image), net.levels)


def _ask_first(net: AdaptiveModel, images: Iterable[Tensor]) -> _Answer | None:
    """Return the answer to the first batch whose size the network accepts; None if it accepts none."""
    for image in images:
        try:
            return _ask(net, image.contiguous())
        except Exception:  # a network may refuse a size with any error
            continue
    return None


def find_multiple(net: AdaptiveModel, images: Sequence[Tensor]) -> int:
    """Return the number of whose multiples the sides of a network's images must be, 1 if it accepts all sizes: the
    smallest power of two that it accepts beyond, and short of, a multiple of all its strides. Those of the images that
    are given are multiples, too."""
    sides = [length for image in images for length in image.shape[2:]]
    multiple = 1
    while not any(length % multiple or length < 2 * multiple for length in sides):
        if all(_is_accepted(net, images[0], change) for change in (multiple, -multiple)):
            return multiple
        multiple *= 2
    return 1


def _is_accepted(net: AdaptiveModel, image: Tensor, change: int) -> bool:
    crops = (_cut_to_multiples(net, whole, change) for whole in (_thinned(net, image), image))
    return _ask_first(net, crops) is not None


def _cut_to_multiples(net: AdaptiveModel, image: Tensor, change: int) -> Tensor:
    """Crop an image to a multiple of all strides of a network and so many pixels more: halved again and again, rounded
    up or down, each length is odd until the change is one."""
    unit = max(32, net.plan.strides[-1])
    height, width = (max(0, length - change) // unit * unit + change for length in image.shape[2:])
    return image[:, :, : max(0, height), : max(0, width)]


def _cut_awkwardly(net: AdaptiveModel, image: Tensor, multiple: int = 1) -> _Answer:
    """Crop an image, small if possible, so that its fine map does not fill the outermost cells, because torch decides
    by the example whether a slice takes all; and so that a network that pads some images pads this one. Take an image
    of multiples, or itself, if the network accepts no crop."""
    wholes = (_thinned(net, image), image)
    if multiple == 1:
        crops = (_crop_awkwardly(net, whole) for whole in wholes)
    else:
        crops = (_cut_to_multiples(net, whole, -multiple) for whole in wholes)
    answer = _ask_first(net, crops) or _ask(net, image)
    if multiple == 1 and not _is_padded(net, answer):
        shorter = _ask_first(net, [answer.image[:, :, :-1, :-1]])
        return shorter if shorter is not None and _is_padded(net, shorter) else answer
    return answer


def _is_padded(net: AdaptiveModel, answer: _Answer) -> bool:
    """True if the fine map has more samples than the image has at its stride."""
    sides = zip(answer.levels.shape[1:], answer.image.shape[2:], strict=True)
    return any(samples > divide_up(length, net.plan.strides[0]) for samples, length in sides)


def _crop_awkwardly(net: AdaptiveModel, image: Tensor) -> Tensor:
    side, stride, deepest = net.geometry.sides[-1], net.plan.strides[0], net.plan.strides[-1]
    whole = [(divide_up(length, stride) + 1) // side * side for length in image.shape[2:]]
    cut = [(samples - 1) * stride - 1 for samples in whole]
    # A map of length one would be fixed in the file, so that the deepest one keeps two samples.
    height, width = (
        part if part > deepest else length for part, length in zip(cut, image.shape[2:], strict=True)
    )
    return image[:, :, :height, :width]


def _answers(
    net: AdaptiveModel, image: Tensor, other: Tensor | None, dynamic: bool, number: int | None, multiple: int
) -> list[_Answer]:
    """Return the batches that a file is compared on, with what the network gives for them; `number` is that of the
    images of a file that takes no other, and their sides are multiples of `multiple`."""
    batches = more_images(image, other)
    if not dynamic:
        return [_ask(net, batch) for batch in batches]
    return [_ask(net, batches[0]), *_of_other_sizes(net, image, number, multiple)]


def _compare(net: AdaptiveModel, run: Engine, answer: _Answer, level_map: bool) -> float:
    """Return the largest difference on a batch; if rounding changed a few patches of the mask, at the file's level map.

    Raises:
        CannotConvert: the masks differ in more than a few patches, or the file does not run.
    """
    image, expected, levels = answer.image, answer.output, answer.levels
    rest = (levels.long(),) if level_map else further_inputs(net).values()
    *outputs, file_levels = run(image, *rest)
    same_shape = file_levels.shape == levels.shape
    differing = int((file_levels != levels).sum()) if same_shape else levels.numel()
    side = net.geometry.sides[-1]
    if differing > PATCHES_BY_ROUNDING * len(image) * side * side:
        raise CannotConvert(
            f"the mask of the written file differs from the network's in {differing} of {levels.numel()} samples.",
            why="rounding explains only a few patches; nothing was written.",
            next="report it with the mask; give the level map as an input meanwhile: level_map=True.",
        )
    if differing:
        expected = net(image, mask=file_levels.long())
    return difference(outputs, [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)])


def _of_other_sizes(
    net: AdaptiveModel, image: Tensor, number: int | None = None, multiple: int = 1
) -> Iterator[_Answer]:
    """Yield the answers to batches of other sizes, multiples of a number, that the network accepts: an odd one, and one
    of one image more than the example has, or of `number`, and long."""
    small = _thinned(net, image)
    odd = small[:, :, : small.shape[2] - 5, : small.shape[3] - 3]
    if multiple > 1:
        odd = _cut_to_multiples(net, small, multiple)
    for choices in ([odd], [*_of_two(net, small), *_of_two(net, image), _one_more(image)]):
        fitting = (one for one in choices if not any(length % multiple for length in one.shape[2:]))
        if answer := _ask_first(net, (choice[:number] for choice in fitting)):
            yield answer


def _of_two(net: AdaptiveModel, image: Tensor) -> Iterator[Tensor]:
    """Yield narrow batches with one more image, higher than this one: by another stride of the network, or by multiples
    of 32 and 64, which more networks accept."""
    height, width = image.shape[2:]
    more = _one_more(image.transpose(2, 3) if width > height else torch.cat((image, image), 2))
    deepest = net.plan.strides[-1]
    unit = max(32, deepest)
    half = more.shape[3] // 2 // unit * unit
    more, longest = more[..., :half] if half > deepest else more, more.shape[2]
    steps = (step for step in (net.plan.output_stride[1], 32, 64) if step < longest - height)
    yield from (more[:, :, : longest - step] for step in steps)
    yield more


def _one_more(image: Tensor) -> Tensor:
    return torch.cat((image, image[:1].flip(3)))


def _thinned(net: AdaptiveModel, image: Tensor) -> Tensor:
    """Leave out rows and columns of a large image: the sizes of a file are compared in a fraction of the time."""
    unit = max(32, net.plan.strides[-1])  # networks that refuse other sizes accept its multiples
    step = min(image.shape[2:]) // (_UNITS * unit)
    if step < 2:
        return image
    height, width = (length // step // unit * unit for length in image.shape[2:])
    return image[:, :, ::step, ::step][:, :, :height, :width]


def _metadata(net: AdaptiveModel, dynamic: bool, multiple: int) -> dict[str, str]:
    """Return the metadata of a file, including mean and standard deviation of each channel, and the bands that are read
    if they were chosen."""
    source = source_of(net)
    images = {
        "mean": per_channel(source.mean, source.channels),
        "std": per_channel(source.std, source.channels),
    }
    options = {"fill": net.geometry.fill, "dynamic": dynamic, "multiple": multiple}
    return {
        "cadsurgery.mask": net.mask.spec(),
        "cadsurgery.plan": net.plan.to_json(),
        "cadsurgery.options": json.dumps(options),
        "cadsurgery.images": json.dumps({**images, **({"bands": source.bands} if source.bands else {})}),
        "cadsurgery.versions": json.dumps(versions()),
        **({"license": stated} if (stated := license_of(net)) else {}),
    }


def _name_axes(model: Any, free: set[int]) -> None:
    """Give the dynamic axes of the image readable names, and those of all values whose length is computed from them."""
    import onnx_ir

    image, names = model.graph.inputs[0], {0: "batch", 2: "height", 3: "width"}
    named = {str(getattr(image.shape[axis], "value", "")): names[axis] for axis in free}
    image.shape = onnx_ir.Shape(
        [names[axis] if axis in free else length for axis, length in enumerate(image.shape)]
    )
    results = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs[1:], *results):
        if value.shape is not None:  # lengths are numbers, symbols of torch.export and expressions of these
            lengths = (getattr(length, "value", length) for length in value.shape)
            value.shape = onnx_ir.Shape(
                [
                    re.sub(r"\w+", lambda word: named.get(word[0], word[0]), length)
                    if isinstance(length, str)
                    else length
                    for length in lengths
                ]
            )


def _alternative(net: AdaptiveModel, level_map: bool) -> str:
    return (
        ""
        if level_map
        else f" If it is mask {net.mask.spec()}, give the level map as an input: level_map=True."
    )
