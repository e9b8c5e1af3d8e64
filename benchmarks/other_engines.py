"""Try exported files in engines for which this package writes no files of their own: the table of docs/deploy.md.

    python -m benchmarks.other_engines write FOLDER                 # where cadsurgery is installed
    python benchmarks/other_engines.py try FOLDER [--only TOOL ...] # where a tool is installed; needs numpy, and torch

The tools need versions of torch and of other packages that exclude each other. So the files, inputs and outputs are
written first, and each environment tries the tools that it has: ExecuTorch (executorch), Core ML (coremltools, which
converts anywhere and predicts on macOS alone), ncnn (ncnn and pnnx), LiteRT, formerly TFLite, by way of ONNX (onnx2tf)
and of torch.export (litert-torch). The network is MobileNetV2 or ResNet-18 with random weights, its mask
`detail | budget:fraction=0.3`. `static` files hold the mask; `level_map` files read the level map, so each tool runs
them at two maps. Each attempt is a process of its own with a time limit; what it prints goes to FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Values = list[np.ndarray[Any, Any]]
Case = tuple[Values, Values]  # inputs and outputs
FORMS = ("static", "level_map")
SECONDS = 600
RESULT = "result: "


def write(folder: Path, network: str, height: int, width: int) -> None:
    """Write the files, and two cases for each."""
    import torch

    import cadsurgery as cs
    from cadsurgery.elements.backends.target import portable
    from cadsurgery.network.export.onnx import Exportable
    from cadsurgery.tasks.open import example_batch, open_converted

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    net = open_converted(network, "detail | budget:fraction=0.3").eval()
    images = [example_batch(net.source, None, (height, width), seed).contiguous() for seed in (0, 1)]
    cs.export(net, images[0], folder / "static.onnx")
    cs.export(net, images[0], folder / "static.pt2", portable=True)
    cs.export(net, images[0], folder / "level_map.onnx", level_map=True)
    with torch.no_grad():
        maps = []
        for image in images:
            net(image)
            maps.append(net.levels.long())
        graph = Exportable(net, False)
        for value in (*graph.parameters(), *graph.buffers()):
            value.data = value.data.clone(memory_format=torch.contiguous_format)
        with portable():
            program = torch.export.export(graph, (images[0], maps[0]), strict=False)
        torch.export.save(program, folder / "level_map.pt2")
        for number, (image, levels) in enumerate(zip(images, maps, strict=True)):
            static, given = net(image), net(images[0], mask=levels)
            np.savez(folder / f"static-{number}.npz", image=image, out=static)
            np.savez(folder / f"level_map-{number}.npz", image=images[0], level_map=levels, out=given)


def cases(folder: Path, form: str) -> list[Case]:
    """Read the inputs and outputs of a form."""
    loaded = [np.load(folder / f"{form}-{number}.npz") for number in range(2)]
    return [([one[name] for name in one.files if name != "out"], [one["out"]]) for one in loaded]


def compare(folder: Path, form: str, run: Callable[[Values], Values]) -> str:
    """Run both cases, and say how near the outputs come to PyTorch's."""
    differences = []
    for inputs, (expected,) in cases(folder, form):
        found = next(
            value for value in run(inputs) if value.size == expected.size and value.dtype.kind == "f"
        )
        if found.shape != expected.shape:  # channels last
            found = found.transpose(0, 3, 1, 2)
        differences.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    largest = max(differences, key=lambda value: np.inf if np.isnan(value) else value)
    verdict = "agrees with PyTorch" if largest < 1e-3 else "DIFFERS from PyTorch"
    return f"runs, {verdict}: {largest:.0e} of the largest output, at two level maps"


def executorch(folder: Path, form: str) -> str:
    """ExecuTorch with XNNPACK, and portable kernels for what XNNPACK leaves."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.load(folder / f"{form}.pt2")
    # Operations that are not in Core ATen may have kernels all the same.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
    lowered = edge.to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")

    def run(inputs: Values) -> Values:
        return [np.array(value) for value in method.execute([torch.from_numpy(value) for value in inputs])]

    return compare(folder, form, run)


def coreml(folder: Path, form: str) -> str:
    """Core ML by coremltools, as an ML Program."""
    import coremltools as ct
    import torch

    program = torch.export.load(folder / f"{form}.pt2").run_decompositions({})
    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18)
    model.save(str(folder / f"{form}.mlpackage"))
    if sys.platform != "darwin":
        return "converts; predicts on macOS alone"
    names = [one.name for one in model.get_spec().description.input]

    def run(inputs: Values) -> Values:
        return list(model.predict(dict(zip(names, inputs, strict=True))).values())

    return compare(folder, form, run)


def ncnn(folder: Path, form: str) -> str:
    """Run ncnn by way of pnnx, from ONNX."""
    import ncnn as engine

    place = folder / f"pnnx-{form}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(folder / f"{form}.onnx", place / "net.onnx")
    inputs = cases(folder, form)[0][0]
    shapes = ",".join(
        f"[{','.join(map(str, value.shape))}]{'i64' if value.dtype == np.int64 else 'f32'}"
        for value in inputs
    )
    command = [Path(sys.executable).with_name("pnnx"), "net.onnx", f"inputshape={shapes}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, errors="replace")
    print(said := done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"pnnx ends with status {done.returncode}: {said.strip().splitlines()[-1]}")
    kinds = {line.split()[0] for line in (place / "net.ncnn.param").read_text().splitlines()[2:]}
    missing = sorted(kind for kind in kinds if engine.layer_to_index(kind) < 0)
    if missing:
        raise NotImplementedError(f"layers that ncnn does not have: {', '.join(missing)}")
    net = engine.Net()
    if net.load_param(str(place / "net.ncnn.param")) or net.load_model(str(place / "net.ncnn.bin")):
        raise NotImplementedError("ncnn does not load the file, see the log")

    def run(inputs: Values) -> Values:
        extractor = net.create_extractor()
        for number, value in enumerate(inputs):
            extractor.input(f"in{number}", engine.Mat(value[0]))
        return [np.array(extractor.extract("out0")[1])[None]]

    return compare(folder, form, run)


def onnx2tf(folder: Path, form: str) -> str:
    """LiteRT by way of onnx2tf, from ONNX."""
    from ai_edge_litert.interpreter import Interpreter

    target = folder / f"onnx2tf-{form}"
    shutil.rmtree(target, ignore_errors=True)
    inputs = cases(folder, form)[0][0]
    names = ("image", "level_map")[: len(inputs)]
    shapes = [f"{name}:{','.join(map(str, value.shape))}" for name, value in zip(names, inputs, strict=True)]
    tool = Path(sys.executable).with_name("onnx2tf")
    subprocess.run([tool, "-i", folder / f"{form}.onnx", "-o", target, "-ois", *shapes], check=True)
    model = Interpreter(str(next(target.glob("*_float32.tflite"))))
    places = sorted(model.get_input_details(), key=lambda one: str(one["name"]))
    # Images have their channels last there.
    shaped = [value.shape if value.ndim < 4 else np.moveaxis(value, 1, 3).shape for value in inputs]
    for place, shape in zip(places, shaped, strict=True):
        model.resize_tensor_input(place["index"], shape)
    model.allocate_tensors()

    def run(inputs: Values) -> Values:
        for place, value in zip(places, inputs, strict=True):
            last = value if value.ndim < 4 else np.moveaxis(value, 1, 3)
            model.set_tensor(place["index"], np.ascontiguousarray(last, place["dtype"]))
        model.invoke()
        return [model.get_tensor(one["index"]) for one in model.get_output_details()]

    return compare(folder, form, run)


def litert(folder: Path, form: str) -> str:
    """LiteRT by litert-torch, from torch.export."""
    import litert_torch
    import torch

    program = torch.export.load(folder / f"{form}.pt2").run_decompositions({}).module()
    inputs = tuple(torch.from_numpy(value) for value in cases(folder, form)[0][0])
    model = litert_torch.convert(program, inputs, strict_export=False)

    def run(inputs: Values) -> Values:
        outputs = model(*inputs)
        return [np.asarray(one) for one in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]

    return compare(folder, form, run)


# Name of the package that says whether a tool is here, and the attempt.
TOOLS: dict[str, Callable[[Path, str], str]] = {
    "executorch": executorch,
    "coremltools": coreml,
    "ncnn": ncnn,
    "onnx2tf": onnx2tf,
    "litert-torch": litert,
}


def attempt(folder: Path, tool: str, form: str) -> str:
    """Try a file in a process of its own; what it prints is kept beside the file."""
    log = folder / f"{tool}-{form}.log"
    command = [sys.executable, __file__, "one", str(folder), "--only", tool, "--form", form]
    try:
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=SECONDS
            ).returncode
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"
    lines = log.read_text(errors="replace").splitlines()
    results = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    return results[-1] if results else f"ends with status {code}: {' '.join(lines[-1:])[:300]}"


def main() -> None:
    """Write the files, or print a line for each tool and form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("write", "try", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="benchmarks.networks:resnet18_unet")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96))
    parser.add_argument("--only", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--form", choices=FORMS)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    if options.what == "write":
        write(folder, options.network, *options.size)
        return
    if options.what == "one":
        (tool,) = options.only
        try:
            result = TOOLS[tool](folder, options.form)
        except Exception as error:
            result = f"refused, {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            raise
        finally:
            print(f"\n{RESULT}{result}", flush=True)
        return
    for tool in options.only:
        try:
            version = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            print(f"{tool}: not installed here")
            continue
        for form in FORMS:
            print(f"{tool} {version} | {form} | {attempt(folder, tool, form)}", flush=True)


if __name__ == "__main__":
    main()
