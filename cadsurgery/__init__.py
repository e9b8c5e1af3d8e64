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

# The modules of public names. Imported on first use, so that `import cadsurgery` and the command line start without
# waiting for torch.
_NAMES = {
    "support.errors": (
        *("CadError", "CadWarning", "CannotConvert", "FileError"),
        *("InvalidInput", "TrainingStopped", "UnknownName"),
    ),
    "data": ("Augment", "SegmentationData", "open_data"),
    "data.networks": ("build_model", "list_models"),
    "elements.functional": ("Elements",),
    "elements.kernel_map": ("Window",),
    "elements.lattice": ("Geometry", "Lattice"),
    "elements.operations": ("operation",),
    "masks": ("Budget", "MaskProvider", "MaskWrapper", "list_masks", "mask_provider"),
    "surgery.plan": ("Plan",),
    "surgery.rules": ("Call", "Treatment", "rule"),
    "methods.anytime": ("AnytimeModel", "anytime"),
    "methods.resampling": ("ResampledModel", "resample"),
    "methods.sampling": ("SampledModel", "sample"),
    "methods.storage": ("load", "save"),
    "network.adaptify": ("adaptify", "plan"),
    "network.compile": ("Bucketed",),
    "network.export": ("export",),
    "network.model": ("AdaptiveModel",),
    "network.points": ("macs_at", "read_at"),
    "network.stem": ("CachedStem", "body_of", "stem_outputs"),
    "network.publish": ("push_to_hub",),
    "tasks.evaluation": ("EvaluationReport", "evaluate"),
    "tasks.segmentation.metrics": ("SegmentationMetrics",),
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}

# The same names in words that type checkers read.
__all__ = ["CadError", "CadWarning", "CannotConvert", "FileError", "InvalidInput", "TrainingStopped"]
__all__ += ["Augment", "SegmentationData", "UnknownName", "build_model", "list_models", "open_data"]
__all__ += ["Elements", "Geometry", "Lattice", "Window", "operation"]
__all__ += ["Budget", "MaskProvider", "MaskWrapper", "list_masks", "mask_provider"]
__all__ += ["Call", "Plan", "Treatment", "rule"]
__all__ += ["AdaptiveModel", "AnytimeModel", "Bucketed", "CachedStem", "adaptify", "anytime", "body_of"]
__all__ += ["export", "load", "macs_at"]
__all__ += ["ResampledModel", "SampledModel", "plan", "push_to_hub", "read_at", "resample", "sample", "save"]
__all__ += ["stem_outputs"]
__all__ += ["EvaluationReport", "SegmentationMetrics", "evaluate"]

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
    "io": "methods.storage",
    "api": "network.adaptify",
    "coverage": "tasks.zoo_check",
    "bench": "tasks.bench",
    "evaluation": "tasks.evaluation",
    "metrics": "tasks.segmentation.metrics",
    "viz": "tasks.figures",
    "matching": "tasks.keypoints.matching",
    "keypoints": "tasks.keypoints",
    "resampling": "methods.resampling",
}

if TYPE_CHECKING:
    from cadsurgery.data import Augment, SegmentationData, open_data
    from cadsurgery.data.networks import build_model, list_models
    from cadsurgery.elements.functional import Elements
    from cadsurgery.elements.kernel_map import Window
    from cadsurgery.elements.lattice import Geometry, Lattice
    from cadsurgery.elements.operations import operation
    from cadsurgery.masks import Budget, MaskProvider, MaskWrapper, list_masks, mask_provider
    from cadsurgery.methods.anytime import AnytimeModel, anytime
    from cadsurgery.methods.resampling import ResampledModel, resample
    from cadsurgery.methods.sampling import SampledModel, sample
    from cadsurgery.methods.storage import load, save
    from cadsurgery.network.adaptify import adaptify, plan
    from cadsurgery.network.compile import Bucketed
    from cadsurgery.network.export import export
    from cadsurgery.network.model import AdaptiveModel
    from cadsurgery.network.points import macs_at, read_at
    from cadsurgery.network.publish import push_to_hub
    from cadsurgery.network.stem import CachedStem, body_of, stem_outputs
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
    from cadsurgery.tasks.evaluation import EvaluationReport, evaluate
    from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics


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
