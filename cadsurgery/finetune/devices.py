"""The device, precision and processes of a training run, through Accelerate."""

from __future__ import annotations

from typing import Any

from cadsurgery.finetune.settings import Settings
from cadsurgery.support.errors import InvalidInput, first_line, import_optional
from cadsurgery.support.processes import world

INSTALL = "pip install 'cadsurgery[train]'"


def make_accelerator(settings: Settings, device: str) -> Any:
    """Create an Accelerator for the settings.

    Raises:
        InvalidInput: the device does not support the precision; or as `world`.
        CadError: Accelerate is not installed.
    """
    world()
    accelerate = import_optional("accelerate", "training needs accelerate.", INSTALL)
    accelerate.state.AcceleratorState._reset_state()  # earlier runs may differ in precision
    if device not in ("auto", "cpu"):
        raise InvalidInput(
            f"training cannot run on device {device!r}.",
            next='use "auto" or "cpu"; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch.',
        )
    reason = "its gradients need a scaler, which this device does not support"
    try:
        accelerator = accelerate.Accelerator(mixed_precision=settings.precision, cpu=device == "cpu")
    except (ValueError, RuntimeError) as error:
        accelerator, reason = None, first_line(error)
    if accelerator is None or (settings.precision == "fp16" and accelerator.scaler is None):
        raise InvalidInput(
            f"precision {settings.precision!r} is not available on this device.",
            why=reason,
            next="train in precision no or bf16, or on a GPU.",
        )
    return accelerator
