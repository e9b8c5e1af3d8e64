"""Recognise files of `cs.export` where a converted file is expected, and say how they are opened."""

from __future__ import annotations

import mmap
from pathlib import Path

from cadsurgery.support.errors import FileError

# Key of the metadata of ONNX files with this package's kernels, and its value, which is the document's text, too.
KERNELS_KEY = "cadsurgery.kernels"
HOW_TO_OPEN = (
    "This file calls functions of the domain cadsurgery. OpenVINO does not expand them, and may end the process with a "
    'segmentation fault: call core.add_extension(cadsurgery.kernels_for("openvino")) before it reads the file. ONNX '
    "Runtime runs the file as it is, and faster with "
    'options.register_custom_ops_library(cadsurgery.kernels_for("onnxruntime")).'
)
_ENGINES = {
    ".onnx": ("an ONNX file", "onnxruntime.InferenceSession(path), or openvino.Core().read_model(path)"),
    ".pt2": (
        "an exported program",
        "torch.export.load(path).module(), or torch._inductor.aoti_load_package(path)",
    ),
}


def refuse_exported(path: Path) -> FileError | None:
    """Return the error for a file of `cs.export`, by the end of its name; None for other files."""
    if path.suffix.lower() not in _ENGINES:
        return None
    kind, call = _ENGINES[path.suffix.lower()]
    if has_kernels(path):
        kind, call = f"{kind} with this package's kernels", f"{call}. {HOW_TO_OPEN}"
    return FileError(
        f"{path} is {kind}, no converted network.",
        why="it runs in its engine, without this package.",
        next=f"open it there: {call.rstrip('.')}. Or give the file of cs.save that it was made from.",
    )


def has_kernels(path: Path) -> bool:
    """True if a file is an ONNX file that calls this package's kernels."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(KERNELS_KEY.encode()) >= 0
