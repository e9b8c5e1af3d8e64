"""Fine-tuning: train a converted network, or any other; a run can be resumed at the exact step.

In come a network, labelled or unlabelled images, and settings; out come the trained network, checkpoints, a log, and
the network's metrics before and after.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadsurgery.finetune.adapters import calibrate_adapters
    from cadsurgery.finetune.batches import augmentation
    from cadsurgery.finetune.blend import Blend, calibrate
    from cadsurgery.finetune.evaluation import evaluate
    from cadsurgery.finetune.gain import GainFit, fit_gain
    from cadsurgery.finetune.logs import Row
    from cadsurgery.finetune.loop import Outcome, fit
    from cadsurgery.finetune.objectives import Objective, list_objectives, objective
    from cadsurgery.finetune.refinement import RefinementFit, fit_refinement
    from cadsurgery.finetune.schedule import Draw
    from cadsurgery.finetune.settings import Settings
    from cadsurgery.finetune.tuning import TuningReport, tune

# Imported on first use: the command line reads the settings when it starts, and must not wait for torch.
_PLACES = {
    "adapters": ("calibrate_adapters",),
    "refinement": ("RefinementFit", "fit_refinement"),
    "batches": ("augmentation",),
    "blend": ("Blend", "calibrate"),
    "evaluation": ("evaluate",),
    "gain": ("GainFit", "fit_gain"),
    "logs": ("Row",),
    "loop": ("Outcome", "fit"),
    "objectives": ("Objective", "list_objectives", "objective"),
    "schedule": ("Draw",),
    "settings": ("Settings",),
    "tuning": ("TuningReport", "tune"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
