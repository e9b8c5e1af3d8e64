"""Choices that hold in every command and function where the user makes none, and names. Nothing here imports torch."""

DEFAULT_MASK = "edges"
# Engines of ONNX files by name, with their classes (see `cadsurgery.network.export.engine`); the name of one that runs
# this package's kernels is that of the engine with `KERNELS` behind it.
KERNELS = "-kernels"
ENGINES = {
    "onnx": "cadsurgery.network.export.engines:OnnxRuntime",
    "onnx-kernels": "cadsurgery.network.export.engines:OnnxRuntimeWithKernels",
    "openvino": "cadsurgery.network.export.engines:OpenVino",
    "openvino-kernels": "cadsurgery.network.export.engines:OpenVinoWithKernels",
}
