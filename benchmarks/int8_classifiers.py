"""The cost of int8 files for classifiers with trained weights, in ONNX Runtime or OpenVINO on this processor.

    python benchmarks/int8_classifiers.py --data DATA [--engine openvino] [--every 2] [--calibrate 32]

DATA holds imagenet_sample, mobilenet_v2_imagenet, squeezenet1_0_imagenet and cifar10. The networks are dense; the
files are calibrated on images spread over the sample, and compared on every N-th image. To measure processors
without VNNI or AVX-512, hide these instruction sets (Linux, x86-64 with cpuid_fault):

    cc -O2 -shared -fPIC -o /tmp/hide.so tests/hide_instructions.c
    HIDE=avx512 LD_PRELOAD=/tmp/hide.so python benchmarks/int8_classifiers.py --data DATA
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.io import decode_image
from torchvision.models import mobilenet_v2, squeezenet1_0
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import center_crop

from cadsurgery.network.export.engines import ENGINES
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.fidelity_measure import measure

Data = tuple[nn.Module, list[Tensor], list[int]]  # a network, images (1, 3, H, W) and their classes


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--engine", choices=("onnx", "openvino"), default="onnx")
    parser.add_argument("--calibrate", type=int, default=32, help="number of calibration images")
    parser.add_argument("--every", type=int, default=2, help="compare on every N-th image")
    options = parser.parse_args()
    engine = ENGINES[options.engine]
    print("| network | images | top-1, float | top-1, 8 bits | relative error | images of the same class |")
    print("| --- | --- | --- | --- | --- | --- |")
    taken_in = ""
    for name, build in NETWORKS.items():
        model, images, classes = build(options.data)
        calibration = images[5 :: len(images) // options.calibrate][: options.calibrate]
        with tempfile.TemporaryDirectory() as folder:
            exact, rounded = (Path(folder) / f"{kind}.onnx" for kind in ("float", "int8"))
            torch.onnx.export(model, (images[0],), exact, dynamo=True, external_data=False, verbose=False)
            shutil.copy(exact, rounded)
            taken_in = to_8_bits(rounded, engine, [(one,) for one in calibration]).taken_in
            files = engine(exact), engine(rounded)
            compared = range(0, len(images), options.every)
            outputs = [[file(images[index])[0] for file in files] for index in compared]
        right = [
            sum(
                int(both[file].argmax()) == classes[index]
                for index, both in zip(compared, outputs, strict=True)
            )
            for file in (0, 1)
        ]
        found = measure(
            (images[index], [less], [full]) for index, (full, less) in zip(compared, outputs, strict=True)
        )
        scores = " | ".join(f"{100 * count / len(compared):.1f}" for count in right)
        print(
            f"| {name} | {len(compared)} | {scores} | {found.error:.3f} | {100 * (found.agreement or 0):.1f} % |"
        )
    print(f"\n{taken_in}")


def load(model: nn.Module, file: Path) -> nn.Module:
    """Load half-precision weights from a file into a network."""
    weights = load_file(file)
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()},
        strict=False,  # batch counters are missing
    )
    return model.eval()


def photographs(data: Path, prepare: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return the images of the sample, prepared from (3, H, W) in 0..255, and their classes."""
    files = sorted((data / "imagenet_sample" / "images").glob("*.jpg"))
    images = [prepare(decode_image(str(file)).float()).unsqueeze(0) for file in files]
    return images, [int(file.name[:3]) for file in files]


def mobilenet(data: Path) -> Data:
    """Return MobileNetV2, whose weights were published in int8."""
    model = load(mobilenet_v2(), data / "mobilenet_v2_imagenet" / "mobilenet_v2.fp16.safetensors")
    return model, *photographs(data, lambda image: center_crop(image, [225, 225]) / 127.5 - 1)


def squeezenet(data: Path) -> Data:
    """Return SqueezeNet v1.0, whose weights were published with a codebook of 8 bits."""
    mean = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    model = load(squeezenet1_0(), data / "squeezenet1_0_imagenet" / "squeezenet1_0.fp16.safetensors")
    return model, *photographs(data, lambda image: center_crop(image, [227, 227]).flip(0) - mean)


def resnet56(data: Path) -> Data:
    """Return ResNet-56 for CIFAR-10, as described in the README of the data; its weights are in half precision."""

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(8)))

    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    model = nn.Sequential(*stem, stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2), *head)
    sample = np.load(data / "cifar10" / "cifar10_test1000.npz")
    images = torch.from_numpy(sample["images"]).permute(0, 3, 1, 2) / 255
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    batches = list(((images - mean) / deviation).split(1))
    return load(model, data / "cifar10" / "resnet56.fp16.safetensors"), batches, sample["labels"].tolist()


NETWORKS = {
    "ResNet-56, CIFAR-10": resnet56,
    "SqueezeNet 1.0, ImageNet": squeezenet,
    "MobileNetV2, ImageNet": mobilenet,
}

if __name__ == "__main__":
    main()
