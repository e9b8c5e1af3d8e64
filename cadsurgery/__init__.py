"""cadsurgery: content-adaptive downsampling for any convolutional network, by model surgery.

import cadsurgery as cs
net = cs.adaptify(model, mask="edges")
y = net(x)
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Imported on first use, so that `import cadsurgery` and the command line
# start without waiting for torch.
_PUBLIC = {
    "adaptify": "network.adaptify",
    "plan": "network.adaptify",
    "AdaptiveModel": "network.model",
    "Bucketed": "network.compile",
    "Budget": "masks",
    "CachedStem": "network.stem",
    "body_of": "network.stem",
    "stem_outputs": "network.stem",
    "Elements": "elements.functional",
    "Geometry": "elements.lattice",
    "Lattice": "elements.lattice",
    "MaskProvider": "masks",
    "MaskWrapper": "masks",
    "Plan": "surgery.plan",
    "Augment": "data",
    "EvaluationReport": "tasks.segmentation.report",
    "SegmentationData": "data",
    "SegmentationMetrics": "tasks.segmentation.metrics",
    "build_model": "data.networks",
    "macs_at": "network.points",
    "read_at": "network.points",
    "evaluate": "tasks.segmentation.evaluation",
    "open_data": "data",
    "list_masks": "masks",
    "list_models": "data.networks",
    "load": "network.storage",
    "mask_provider": "masks",
    "export": "network.export",
    "operation": "elements.operations",
    "rule": "surgery.rules",
    "Call": "surgery.rules",
    "Treatment": "surgery.rules",
    "Window": "elements.kernel_map",
    "save": "network.storage",
    "CadError": "support.errors",
    "CadWarning": "support.errors",
    "CannotConvert": "support.errors",
    "FileError": "support.errors",
    "InvalidInput": "support.errors",
    "TrainingStopped": "support.errors",
    "UnknownName": "support.errors",
}

# Rooms that users know by their own names.
_ROOMS = ("data", "finetune", "masks")

# Modules under the names users know them by, whichever room they are in.
_MODULES = {
    "errors": "support.errors",
    "environment": "support.provenance",
    "timing": "support.timing",
    "images": "data.images",
    "zoo": "data.networks",
    "functional": "elements.functional",
    "lattice": "elements.lattice",
    "kernel_map": "elements.kernel_map",
    "detection": "masks.detectors",
    "macs": "network.macs",
    "model": "network.model",
    "io": "network.storage",
    "api": "network.adaptify",
    "coverage": "tasks.zoo_check",
    "bench": "tasks.bench",
    "evaluation": "tasks.segmentation.evaluation",
    "metrics": "tasks.segmentation.metrics",
    "viz": "tasks.figures",
    "matching": "tasks.keypoints.matching",
    "keypoints": "tasks.keypoints",
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
    "operation",
    "plan",
    "read_at",
    "rule",
    "save",
    "stem_outputs",
]

if TYPE_CHECKING:
    from cadsurgery.data import Augment, SegmentationData, open_data
    from cadsurgery.data.networks import build_model, list_models
    from cadsurgery.elements.functional import Elements
    from cadsurgery.elements.kernel_map import Window
    from cadsurgery.elements.lattice import Geometry, Lattice
    from cadsurgery.elements.operations import operation
    from cadsurgery.masks import Budget, MaskProvider, MaskWrapper, list_masks, mask_provider
    from cadsurgery.network.adaptify import adaptify, plan
    from cadsurgery.network.compile import Bucketed
    from cadsurgery.network.export import export
    from cadsurgery.network.model import AdaptiveModel
    from cadsurgery.network.points import macs_at, read_at
    from cadsurgery.network.stem import CachedStem, body_of, stem_outputs
    from cadsurgery.network.storage import load, save
    from cadsurgery.support.errors import (
        CadError,
        CadWarning,
        CannotConvert,
        FileError,
        InvalidInput,
        TrainingStopped,
        UnknownName,
    )
    from cadsurgery.surgery.plan import Plan
    from cadsurgery.surgery.rules import Call, Treatment, rule
    from cadsurgery.tasks.segmentation.evaluation import evaluate
    from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
    from cadsurgery.tasks.segmentation.report import EvaluationReport


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _ROOMS:
        return importlib.import_module(f"cadsurgery.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cadsurgery' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cadsurgery.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


class _Named(MetaPathFinder, Loader):
    """Imports `cadsurgery.images` and the like from the room they are in: one module under two names."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """A spec for the names of the table."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module in its room, whose own spec the import would overwrite."""
        module = importlib.import_module(f"cadsurgery.{_MODULES[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; its own spec is put back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Named())


def __dir__() -> list[str]:
    return __all__
