"""cadsurgery: content-adaptive downsampling for any convolutional network, by model surgery.

import cadsurgery as cs
net = cs.adaptify(model, mask="edges")
y = net(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Imported on first use, so that `import cadsurgery` and the command line
# start without waiting for torch.
_PUBLIC = {
    "adaptify": "api",
    "plan": "api",
    "AdaptiveModel": "model",
    "Bucketed": "static",
    "Budget": "masks",
    "CachedStem": "caching",
    "body_of": "caching",
    "stem_outputs": "caching",
    "Elements": "functional",
    "Geometry": "lattice",
    "Lattice": "lattice",
    "MaskProvider": "masks",
    "MaskWrapper": "masks",
    "Plan": "surgery.plan",
    "Augment": "data",
    "EvaluationReport": "evaluation_report",
    "SegmentationData": "data",
    "SegmentationMetrics": "metrics",
    "build_model": "zoo",
    "macs_at": "points",
    "read_at": "points",
    "evaluate": "evaluation",
    "open_data": "data",
    "list_masks": "masks",
    "list_models": "zoo",
    "load": "io",
    "mask_provider": "masks",
    "export": "static",
    "rule": "surgery.rules",
    "Call": "surgery.rules",
    "Treatment": "surgery.rules",
    "Window": "kernel_map",
    "save": "io",
    "CadError": "errors",
    "CadWarning": "errors",
    "CannotConvert": "errors",
    "FileError": "errors",
    "InvalidInput": "errors",
    "TrainingStopped": "errors",
    "UnknownName": "errors",
}

__all__ = [
    "AdaptiveModel",
    "Augment",
    "Bucketed",
    "Budget",
    "CachedStem",
    "CadError",
    "CadWarning",
    "Call",
    "CannotConvert",
    "Elements",
    "EvaluationReport",
    "FileError",
    "Geometry",
    "InvalidInput",
    "Lattice",
    "MaskProvider",
    "MaskWrapper",
    "Plan",
    "SegmentationData",
    "SegmentationMetrics",
    "TrainingStopped",
    "Treatment",
    "UnknownName",
    "Window",
    "adaptify",
    "body_of",
    "build_model",
    "evaluate",
    "export",
    "list_masks",
    "list_models",
    "load",
    "macs_at",
    "mask_provider",
    "open_data",
    "plan",
    "read_at",
    "rule",
    "save",
    "stem_outputs",
]

if TYPE_CHECKING:
    from cadsurgery.api import adaptify, plan
    from cadsurgery.caching import CachedStem, body_of, stem_outputs
    from cadsurgery.data import Augment, SegmentationData, open_data
    from cadsurgery.errors import (
        CadError,
        CadWarning,
        CannotConvert,
        FileError,
        InvalidInput,
        TrainingStopped,
        UnknownName,
    )
    from cadsurgery.evaluation import evaluate
    from cadsurgery.evaluation_report import EvaluationReport
    from cadsurgery.functional import Elements
    from cadsurgery.io import load, save
    from cadsurgery.kernel_map import Window
    from cadsurgery.lattice import Geometry, Lattice
    from cadsurgery.masks import Budget, MaskProvider, MaskWrapper, list_masks, mask_provider
    from cadsurgery.metrics import SegmentationMetrics
    from cadsurgery.model import AdaptiveModel
    from cadsurgery.points import macs_at, read_at
    from cadsurgery.static import Bucketed, export
    from cadsurgery.surgery.plan import Plan
    from cadsurgery.surgery.rules import Call, Treatment, rule
    from cadsurgery.zoo import build_model, list_models


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cadsurgery' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cadsurgery.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
