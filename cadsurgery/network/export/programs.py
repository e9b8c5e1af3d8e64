"""Write programs of torch.export, for one image size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cadsurgery.network.export.compare import FileComparison, check_difference, difference, more_images
from cadsurgery.network.export.dictionaries import further_inputs
from cadsurgery.network.export.names import output_names
from cadsurgery.network.export.quiet import without_graphs_of_errors
from cadsurgery.network.export.unsupported import place_of, saying_if_too_large
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import CannotConvert, describe_error
from cadsurgery.support.progress import Step, counted, silent
from cadsurgery.support.torch_internals import MappingKey, tree_flatten_with_path

Written = tuple[FileComparison, tuple[int | None, ...]]


def write_program(
    net: AdaptiveModel,
    image: Tensor,
    other: Tensor | None,
    path: Path,
    step: Step = silent,
) -> Written:
    """Write a program for torch.export.load; return its comparison and the shape of its image.

    It is that of contiguous inputs, whatever the layout of the example: compilers of programs take strides for granted.

    Args:
        net: a network.
        image: an image batch.
        other: another batch to compare on.
        path: file to write.
        step: progress callback.

    Raises:
        CannotConvert: torch.export cannot follow the network, or the program's outputs differ.
    """
    step("tracing")
    output = net(image)
    _check_outputs(output)
    program = follow(net, image, *further_inputs(net).values())
    step("writing")
    with warnings.catch_warnings():
        # torch gives this warning for channels_last weights, but stores them completely.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, content := io.BytesIO())
    path.write_bytes(content.getbuffer())  # torch's own writer ends the process where a disk is full
    run = torch.export.load(path).module()
    others = more_images(image, other)
    with saying_if_too_large(net, others, is_half=False):
        largest = check_difference(
            difference(run(batch, *further_inputs(net).values()), net(batch))
            for batch in counted(others, step, "comparing, batch")
        )
    compared = tuple(tuple(batch.shape) for batch in others)
    return FileComparison(largest, compared, ("image",), output_names(output)), tuple(image.shape)


def _check_outputs(output: object) -> None:
    """Refuse an output of a class, or a dictionary with keys, that torch's programs cannot return.

    Raises:
        CannotConvert: it holds something that is no tensor, number, string or one of torch's containers, or a
            dictionary whose keys a file of torch does not keep, such as tuples.
    """
    plain = (Tensor, bool, int, float, complex, str, type(None))
    leaves = tree_flatten_with_path(output)[0]
    keys = [step.key for path, _ in leaves for step in path if isinstance(step, MappingKey)]
    unkept = [key for key in keys if not isinstance(key, (bool, int, float, str))]
    if unkept:
        raise CannotConvert(
            f"a program of torch.export cannot return a dictionary with the key {unkept[0]!r}.",
            why="torch's files keep only keys that are strings or numbers.",
            next="return a dictionary with strings as keys, or a tuple.",
        )
    strange = [leaf for _, leaf in leaves if not isinstance(leaf, plain)]
    if strange:
        raise CannotConvert(
            f"a program of torch.export cannot return {describe(strange[0])}.",
            why="torch does not know how to take the class apart.",
            next="return a tuple or a dictionary of tensors, or tell torch about the class: "
            "torch.export.register_dataclass(...).",
        )


def _contiguous(value: Tensor) -> Tensor:
    """Return a tensor with exactly the strides of a contiguous one, which axes of length 1 may lack."""
    return value.new_empty(value.shape).copy_(value)


def follow(net: nn.Module, image: Tensor, *rest: Tensor) -> torch.export.ExportedProgram:
    """Export the network as a program of torch's operations.

    Raises:
        CannotConvert: torch.export cannot follow the network.
    """
    try:
        with without_graphs_of_errors():
            return torch.export.export(net, tuple(_contiguous(value) for value in (image, *rest)))
    except Exception as error:
        raise CannotConvert(
            "torch.export cannot follow the network.",
            where=place_of(error, net),
            why=describe_error(error),
            next="write an ONNX file, to='onnx'; or run the network where this package is, net.optimize().",
        ) from error
