"""Fine-tuning: train a converted network, or any other, resumable to the exact step.

In come a network, labelled or unlabelled images, and settings; out come the network trained, checkpoints, a log and
what it scored before and after.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadsurgery.finetune.batches import augmentation
    from cadsurgery.finetune.blend import Blend, calibrate
    from cadsurgery.finetune.evaluation import evaluate
    from cadsurgery.finetune.logs import Row
    from cadsurgery.finetune.loop import fit
    from cadsurgery.finetune.objectives import Objective, list_objectives, objective
    from cadsurgery.finetune.results import Outcome
    from cadsurgery.finetune.schedule import Draw
    from cadsurgery.finetune.settings import Settings

__all__ = [
    "Blend",
    "Draw",
    "Objective",
    "Outcome",
    "Row",
    "Settings",
    "augmentation",
    "calibrate",
    "evaluate",
    "fit",
    "list_objectives",
    "objective",
]

# Imported on first use: the command line reads the settings when it starts, which must not wait for torch.
_MODULES = ("batches", "blend", "evaluation", "logs", "loop", "objectives", "results", "schedule", "settings")


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        values = vars(importlib.import_module(f"{__name__}.{module}"))
        if name in values:
            return values[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
