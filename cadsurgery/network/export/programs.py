"""Write programs of torch.export, plain or compiled by AOTInductor, for one image size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.target import portable
from cadsurgery.network.export.compare import Comparison, check_difference, difference, more_images
from cadsurgery.network.export.dictionaries import further_inputs
from cadsurgery.network.export.names import output_names
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CannotConvert, describe_error
from cadsurgery.support.progress import Step, counted, silent

Written = tuple[Comparison, tuple[int | None, ...]]


def write_program(
    net: AdaptiveModel,
    image: Tensor,
    other: Tensor | None,
    path: Path,
    is_portable: bool = False,
    step: Step = silent,
) -> Written:
    """Write a program for torch.export.load; return its comparison and the shape of its image.

    Args:
        net: a network.
        image: an image batch.
        other: another batch to compare on.
        path: file to write.
        is_portable: True for a program in operations that other runtimes of such programs have.
        step: progress callback.

    Raises:
        CannotConvert: torch.export cannot follow the network, or the program's outputs differ.
    """
    step("tracing")
    program = (
        _follow_portably(net, image) if is_portable else follow(net, image, *further_inputs(net).values())
    )
    step("writing")
    with warnings.catch_warnings():
        # torch gives this warning for channels_last weights, but stores them completely.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path)
    run = torch.export.load(path).module()
    return _compare(net, run, image, other, step)


def write_package(
    net: AdaptiveModel, image: Tensor, other: Tensor | None, path: Path, step: Step = silent
) -> Written:
    """Write a package of AOTInductor for this machine; return its comparison and the shape of its image.

    The compiled code does not check the shape of its input; the input may be contiguous or in channels_last memory. The
    metadata hold this shape and the names of the outputs.

    Raises:
        CannotConvert: the network cannot be exported or compiled, or the package's outputs differ.
    """
    about = {
        "cadsurgery.image": "x".join(map(str, image.shape)),
        "cadsurgery.outputs": ",".join(output_names(net(image))),
    }
    # In portable form convolutions are matrix products of rows, which Inductor compiles; it would only call
    # convolutions, with copies of the rows.
    step("tracing")
    with portable():
        program = follow(_TakesAnyLayout(net.optimize()), image.contiguous())
    step("compiling")
    compile_program(program, path, about)
    return _compare(net, torch._inductor.aoti_load_package(str(path)), image, other, step)


class _TakesAnyLayout(nn.Module):
    """Copies the image to contiguous memory first: compiled code reads its input by the strides of the example.

    Inductor omits `contiguous()` of an example that is contiguous already. This pooling, which pools single values,
    is an operation that it calls in torch, where the strides of the call count; its result is always contiguous.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Any:
        return self.net(torch.ops.aten._adaptive_avg_pool3d(image, image.shape[1:]))


def compile_program(
    program: torch.export.ExportedProgram, path: Path, about: dict[str, str] | None = None
) -> None:
    """Write a package of AOTInductor for this machine; `about` is its metadata.

    Raises:
        CannotConvert: the program cannot be compiled.
    """
    configs = {"aot_inductor.metadata": about or {}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except Exception as error:
        raise CannotConvert(
            "AOTInductor cannot compile the network.",
            why=describe_error(error),
            next="check that a C++ compiler is installed (CXX), or write a program instead: to='pt2'.",
        ) from error


def follow(net: nn.Module, image: Tensor, *rest: Tensor) -> torch.export.ExportedProgram:
    """Export the network as a program of torch's operations.

    Raises:
        CannotConvert: torch.export cannot follow the network.
    """
    try:
        return torch.export.export(net, (image, *rest))
    except Exception as error:
        raise CannotConvert(
            "torch.export cannot follow the network.",
            why=describe_error(error),
            next="convert a network without data-dependent control flow, as in detectors.",
        ) from error


def _follow_portably(net: AdaptiveModel, image: Tensor) -> torch.export.ExportedProgram:
    """Export the network as a program of operations that ExecuTorch has, too, on values in the order of their shapes.

    Raises:
        CannotConvert: torch.export cannot follow the network.
    """
    copy = net.optimize()
    for value in (*copy.parameters(), *copy.buffers()):
        value.data = value.data.clone(memory_format=torch.contiguous_format)
    with portable():
        return follow(copy, image.contiguous()).run_decompositions(
            {torch.ops.aten.sort.stable: _sort, torch.ops.aten.nonzero_static.default: _nonzero_static}
        )


def _sort(
    values: Tensor, *, stable: bool | None = False, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Sort by counting, for each value, those that are before it; of equal values the first one comes first."""
    last = values.movedim(dim, -1)
    place = torch.arange(last.shape[-1], device=values.device)
    one, other = last.unsqueeze(-1), last.unsqueeze(-2)
    is_before = (other > one if descending else other < one) | ((other == one) & (place < place.unsqueeze(1)))
    rank = is_before.long().sum(-1)
    order = torch.zeros_like(rank).scatter(-1, rank, place.expand_as(rank))
    return last.gather(-1, order).movedim(-1, dim), order.movedim(-1, dim)


def _nonzero_static(values: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """Find the first `size` places (size, 1) of a vector that are not 0, by sums."""
    if values.dim() != 1:
        return NotImplemented
    is_found = values != 0
    # Place `size` is for all others; it is cut off.
    target = torch.where(is_found, is_found.long().cumsum(0) - 1, size).clamp(max=size)
    places = torch.arange(len(values), device=values.device)
    found = torch.full((size + 1,), fill_value, device=values.device).scatter(0, target, places)
    return found[:size].unsqueeze(1)


def _compare(net: AdaptiveModel, run: object, image: Tensor, other: Tensor | None, step: Step) -> Written:
    others = more_images(image, other)
    largest = check_difference(
        difference(run(one, *further_inputs(net).values()), net(one))  # type: ignore[operator]
        for one in counted(others, step, "comparing, batch")
    )
    names = output_names(net(image))
    return Comparison(largest, tuple(tuple(one.shape) for one in others), ("image",), names), tuple(
        image.shape
    )
