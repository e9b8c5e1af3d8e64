"""Compare a network read from an ONNX file with ONNX Runtime, on random images."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadsurgery.data.onnx_graphs import inputs_of
from cadsurgery.support.divergence import relative_difference
from cadsurgery.support.errors import CadError, CannotConvert, describe_error

TOLERANCE = 1e-4  # largest allowed difference from ONNX Runtime, relative to the largest output
# Lengths of sides that graphs fix.
_USUAL = (
    *(32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 240, 256),
    *(299, 300, 320, 384, 416, 448, 480, 512, 608, 640),
)
_OTHER = (320, 256, 640)  # lengths of the axis that the graph leaves free
_SIZES = ((97, 129), (128, 160), (64, 96), (224, 320), (320, 256), (299, 299))


class Reference:
    """An ONNX model in ONNX Runtime, and the images on which a network is compared with it.

    Where the file fixes height and width, a model without these sizes is tried: if ONNX Runtime computes it at another
    size, and maps that it returns grow with the image, the file's size was only that of an example. Where it does not,
    `fixed_size` is the file's; of an axis that the file leaves free it is that of the images compared here, and
    `is_free` tells these axes. A length that the file leaves free and the graph fixes is looked for among usual ones.
    Batches of a fixed number are computed one after the other.
    """

    def __init__(self, path: Path, model: Any, shape: tuple[int | str, ...]) -> None:
        self.path, self.channels = path, int(shape[1])
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.model, self.fixed_size = model, None
        self._error: Exception | None
        self._session = own = _session(path, model)
        self.is_free = tuple(isinstance(size, str) for size in shape[2:])
        size: Any = tuple(
            size if isinstance(size, int) else _SIZES[1][axis] for axis, size in enumerate(shape[2:])
        )
        self._calls = self._first_that_run(_SIZES if all(self.is_free) else (size,))
        if any(self.is_free) and len(self._calls) < 1 + all(self.is_free):  # one by chance, or none
            size = tuple(self._calls[0][0].shape[2:]) if self._calls else size
            size = self._size_that_runs(shape[2:]) or size
            others = _longer(size, (64, 128, 256)) if all(self.is_free) else []
            self._calls = self._first_that_run((size, *others))
        if not self._calls:
            raise CannotConvert(
                f"ONNX Runtime does not run {self.path}.",
                why=describe_error(self._error),
                next="if its graph needs certain sizes, write these into the file: python -m "
                "onnxruntime.tools.make_dynamic_shape_fixed --input_name NAME --input_shape 1,3,H,W net.onnx new.onnx",
            ) from self._error
        if all(self.is_free):
            return
        freed = _freed(model)
        with suppress(CadError):
            self._session = _session(path, freed)
            calls = self._first_that_run((size, *_longer(size, (64, 33))))
            if len(calls) > 1 and _grow(calls):
                self.model, self._calls = freed, calls
                return
        self.fixed_size, self._session = size, own
        if any(self.is_free):
            self._calls = self._first_that_run((size, *_longer(size, (64, 33), self.is_free)))

    def _first_that_run(self, sizes: Any) -> list[tuple[Tensor, list[Tensor]]]:
        """Return random images of the first two sizes that ONNX Runtime computes, and what it returns; keep its first
        error."""
        generator, calls, self._error = torch.Generator().manual_seed(0), [], None
        for size in sizes:
            image = torch.randn(2 * (self.batch or 1), self.channels, *size, generator=generator)
            try:
                calls.append((image, self._run(image)))
            except Exception as error:  # ONNX Runtime's errors have no common type
                self._error = self._error or error
            if len(calls) == 2:
                break
        return calls

    def _size_that_runs(self, stated: tuple[int | str, ...]) -> tuple[int, int] | None:
        """Return a size that the graph computes, where it fixes what the file leaves free; set `is_free` and `batch`.

        Args:
            stated: height and width in the file; texts are free there.
        """
        heights, widths = ([size] if isinstance(size, int) else _USUAL for size in stated)
        of_files = [
            *((height, width) for width in (_OTHER if len(widths) > 1 else widths) for height in heights),
            *((height, width) for height in (_OTHER if len(heights) > 1 else heights) for width in widths),
            *((side, side) for side in heights if side in widths),
        ]
        count = self.batch or 1
        size = next((size for size in dict.fromkeys(of_files) if self._runs(count, size)), None)
        if size is None:
            return None
        if not self._runs(2 * count, size):
            self.batch = count  # the graph fixes the number of images, too
        self.is_free = tuple(
            free and any(self._runs(count, other) for other in _longer(size, (64, 128, 256), axis))
            for free, axis in zip(self.is_free, ((True, False), (False, True)), strict=True)
        )
        return size

    def _runs(self, count: int, size: tuple[int, ...]) -> bool:
        with suppress(Exception):  # ONNX Runtime's errors have no common type
            self._run(torch.zeros(count, self.channels, *size))
            return True
        return False

    def _run(self, image: Tensor) -> list[Tensor]:
        name = self._session.get_inputs()[0].name
        parts = image.split(self.batch) if self.batch else [image]
        outputs = [self._session.run(None, {name: part.numpy()}) for part in parts]
        return [torch.from_numpy(np.concatenate(values)) for values in zip(*outputs, strict=True)]

    def ranks(self, model: Any, names: list[str]) -> dict[str, tuple[None, ...]]:
        """Return the axes, of unknown lengths, that values within a model have on the first image."""
        import onnx

        asked, (image, _) = deepcopy(model), self._calls[0]
        known = {value.name for value in asked.graph.output}
        asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        session = _session(self.path, asked)
        given = {session.get_inputs()[0].name: image[: self.batch].numpy()}
        return {
            name: (None,) * value.ndim for name, value in zip(names, session.run(names, given), strict=True)
        }

    def check(self, network: nn.Module) -> None:
        """Refuse a network that computes something else.

        Raises:
            CannotConvert: it does not run, or its outputs differ.
        """
        for image, expected in self._calls:
            size = " x ".join(map(str, image.shape))
            try:
                with torch.no_grad():
                    outputs = network(image)
            except Exception as error:  # of any layer
                raise self._refusal(
                    f"it does not run on images of {size}: {describe_error(error)}"
                ) from error
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            if [value.shape for value in outputs] != [value.shape for value in expected]:
                shapes = [[tuple(value.shape) for value in values] for values in (outputs, expected)]
                raise self._refusal(
                    f"its outputs for images of {size} have shapes {shapes[0]}, not {shapes[1]}"
                )
            for output, right in zip(outputs, expected, strict=True):
                if not right.is_floating_point():  # numbers of classes
                    output, right = output.double(), right.double()
                difference = relative_difference(output, right)
                if not difference <= TOLERANCE:  # also NaN
                    raise self._refusal(
                        f"an output for images of {size} differs by {difference:.1e} of its largest value, "
                        f"more than {TOLERANCE:.0e}"
                    )

    def _refusal(self, why: str) -> CannotConvert:
        return CannotConvert(
            f"the network read from {self.path} computes something else than ONNX Runtime.",
            why=f"{why}.",
            next="export the network in evaluation mode with torch.onnx.export, with dynamic axes for batch, height "
            "and width; or load it where it was trained: cs.adaptify(model).",
        )


def _longer(
    size: tuple[int, ...], steps: tuple[int, ...], axes: tuple[bool, ...] = (True, True)
) -> list[tuple[int, ...]]:
    """Return sizes that are longer by each of some steps, along some axes."""
    return [
        tuple(length + by * is_longer for length, is_longer in zip(size, axes, strict=True)) for by in steps
    ]


def _session(path: Path, model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = model.SerializeToString()  # from memory, so that it reads no other file
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common type
        raise CannotConvert(
            f"ONNX Runtime cannot open {path}.",
            why=describe_error(error),
            next="write the file again with torch.onnx.export; onnx.checker.check_model(path) says more.",
        ) from error


def _freed(model: Any) -> Any:
    """Return an ONNX model whose height and width are not fixed."""
    free = deepcopy(model)
    image = inputs_of(free)[0]
    for axis, name in ((2, "height"), (3, "width")):
        image.type.tensor_type.shape.dim[axis].dim_param = name
    del free.graph.value_info[:]
    for output in free.graph.output:
        output.type.tensor_type.ClearField("shape")
    return free


def _grow(calls: list[tuple[Tensor, list[Tensor]]]) -> bool:
    """True if the maps that a network returns grow with its image."""
    (small, first), (large, second) = calls
    for small_map, other in zip(first, second, strict=True):
        for axis in (2, 3) if small_map.dim() == 4 else ():
            factor = large.shape[axis] / small.shape[axis]
            if abs(other.shape[axis] - small_map.shape[axis] * factor) > factor + 1:
                return False
    return True
