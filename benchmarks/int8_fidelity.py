"""The cost of int8 on real images: the network of recipes/camvid_mobilenetv2, dense and adaptive, in ONNX Runtime.

    python benchmarks/int8_fidelity.py --data DATA

DATA holds camvid and camvid_mobilenetv2_fcn. Files are calibrated on images of the training split. On every fourth
image of the test split the int8 file is compared with the same file in floating point (relative error, share of
pixels of the same class), and with the labels (mean IoU).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cadsurgery as cs
from cadsurgery.network.export.engines import OnnxRuntime, OnnxRuntimeWithKernels
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.fidelity_measure import measure
from cadsurgery.support.provenance import setting
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "camvid_mobilenetv2"))
import network as recipe  # noqa: E402

MASK = "edges | budget:fraction=0.34"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    model = recipe.build(options.data)
    calibration = [image for image, _ in pairs(options.data, "train", 1)][:32]
    with tempfile.TemporaryDirectory() as name:
        sessions = write(model, calibration, Path(name))
        rows = [(kind, *compare(*files, pairs(options.data, "test", 4))) for kind, files in sessions.items()]
    print(
        f"{setting(torch.device('cpu'))}, onnxruntime {importlib.metadata.version('onnxruntime')}, "
        f"{rows[0][1].images} images, calibrated by {len(calibration)}\n"
    )
    print("| network | mIoU, float | mIoU, 8 bits | relative error | pixels of the same class |")
    print("| --- | --- | --- | --- | --- |")
    for kind, fidelity, *scores in rows:
        figures = " | ".join(f"{100 * score:.2f}" for score in scores)
        print(f"| {kind} | {figures} | {fidelity.error:.3f} | {100 * fidelity.agreement:.2f} % |")


def pairs(data: Path, split: str, every: int) -> Any:
    """Yield images (1, 3, H, W), normalised for the network, and their labels (1, H, W)."""
    found = recipe.images(data, split)
    for index in range(0, len(found), every):
        image, labels = found[index]
        yield image.mul(2).sub(1).unsqueeze(0), labels.unsqueeze(0)


def write(
    model: torch.nn.Module, calibration: list[Tensor], folder: Path
) -> dict[str, tuple[OnnxRuntime, OnnxRuntime]]:
    """Write dense and adaptive files, these also with kernels, each in floating point and in int8."""
    image, dense = calibration[0], [folder / "dense.onnx", folder / "dense8.onnx"]
    torch.onnx.export(model, (image,), dense[0], dynamo=True, external_data=False, verbose=False)
    shutil.copy(dense[0], dense[1])
    to_8_bits(dense[1], OnnxRuntime, [(one,) for one in calibration])
    # Masks see -1..1 unchanged, as when the figures were measured.
    net = cs.adaptify(model, MASK, normalisation="raw")
    high, low = net.plan.output_stride
    found = {f"dense, output stride {high}": (OnnxRuntime(dense[0]), OnnxRuntime(dense[1]))}
    for engine, words in ((OnnxRuntime, ""), (OnnxRuntimeWithKernels, ", with kernels")):
        files = [folder / f"{engine.__name__}{bits}.onnx" for bits in ("", "8")]
        cs.export(net, image, files[0], with_kernels=engine.has_kernels)
        cs.export(
            net, image, files[1], precision="int8", calibration=calibration, with_kernels=engine.has_kernels
        )
        found[f"{MASK}, {high} to {low}{words}"] = (engine(files[0]), engine(files[1]))
    return found


def compare(exact: OnnxRuntime, rounded: OnnxRuntime, images: Any) -> tuple[Any, float, float]:
    """Return the fidelity of the second file, and the mean IoU of both."""
    scores = [SegmentationMetrics(len(recipe.CLASSES)) for _ in range(2)]

    def outputs() -> Any:
        for image, labels in images:
            found = [session(image)[:1] for session in (exact, rounded)]
            for score, (logits,) in zip(scores, found, strict=True):
                score.update(logits.argmax(1), labels)
            yield image, found[1], found[0]

    fidelity = measure(outputs())
    return fidelity, *(float(score.compute()["miou"]) for score in scores)


if __name__ == "__main__":
    main()
