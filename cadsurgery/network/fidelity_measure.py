"""Agreement of a file in 8 bits with its float version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNSAID = 0.01  # errors above give a warning


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a file in 8 bits with its float version on the calibration images.

    Attributes:
        error: root mean square of the differences relative to that of the outputs; the largest over all outputs.
        agreement: share of pixels (or of images, for outputs (B, C)) with the same largest class; None if no output has
            one value per class for each pixel of the image or each image.
        images: number of images.
        taken_in: engine that ran both files, and the processor's instruction set, e.g.
            "ONNX Runtime 1.32.0 (AVX512, avx512_vnni)"; empty if no files were compared.
    """

    error: float
    agreement: float | None
    images: int
    taken_in: str = ""


def measure(outputs: Iterable[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]) -> Fidelity:
    """Compare rounded with exact outputs; each item is (image batch (B, C, H, W), rounded outputs, exact outputs)."""
    squares: dict[int, Tensor] = {}
    same = pixels = images = 0
    for image, rounded, exact in outputs:
        images += len(image)
        for index, (values, expected) in enumerate(zip(rounded, exact, strict=True)):
            values, expected = values.double(), expected.double()
            sums = torch.stack(((values - expected).square().sum(), expected.square().sum()))
            squares[index] = squares.get(index, torch.zeros_like(sums)) + sums
            if expected.dim() > 1 and expected.shape[1] > 1 and expected.shape[2:] in (image.shape[2:], ()):
                same += int((values.argmax(1) == expected.argmax(1)).sum())
                pixels += expected[:, 0].numel()
    errors = [float((difference / size).sqrt()) for difference, size in squares.values() if size]
    return Fidelity(max(errors, default=0.0), same / pixels if pixels else None, images)
