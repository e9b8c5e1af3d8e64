"""Export a network by name, or a converted file, to a format of another runtime: `cadsurgery export`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from cadsurgery.data import open_pictures
from cadsurgery.data.samples import pictures_of
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.export import check_calibration, check_mask, export, format_of
from cadsurgery.network.model import pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.files import check_folder
from cadsurgery.support.progress import Step
from cadsurgery.tasks.commands import ExportOptions
from cadsurgery.tasks.open import example_batch, is_file, open_converted, pictures_like

STATIC_MASK = f"{DEFAULT_MASK} | budget:fraction=0.3"


def export_network(model: str, options: ExportOptions, step: Step) -> dict[str, Any]:
    """Export a network by name or a converted file; see `cadsurgery export --help`.

    Raises:
        InvalidInput: as in `cadsurgery.export`.
    """
    mask, size, output, kind = options.mask, options.size, options.output, options.kind
    check_folder(output)
    check_calibration(kind.precision, kind.calibration or None)
    step(f"building {model}")
    form, is_dynamic = format_of(output, kind.to or None), kind.dynamic
    shown = open_pictures(kind.calibration) if kind.calibration else None
    pictures = None if shown is None else pictures_of(shown)
    chosen: object = mask
    if not is_file(model):
        chosen = resolve_mask(mask or (DEFAULT_MASK if form == "onnx" else STATIC_MASK))
        check_mask(chosen, form, is_dynamic, False)  # before the network is built
    how: dict[str, Any] = {"weights": options.weights, "bands": options.bands, "trust": options.trust}
    net = open_converted(model, chosen, options.conversion, pictures=pictures, **how).eval()
    check_mask(net.mask, form, is_dynamic, False)
    source = pictures_for(net)
    first, second = (example_batch(source, None, size, seed) for seed in (0, 1))
    if shown is not None:
        step("reading the calibration images")
    own = (first.shape[2], first.shape[3])
    calibration = pictures_like(shown, own, source) if shown is not None else None
    changed = {"to": kind.to or None, "calibration": calibration}
    written = export(net, first, output, other=second, step=step, **{**vars(kind), **changed})
    with torch.inference_mode():
        net(second)
    return {
        "model": model,
        "mask": net.mask.spec(),
        "active_fraction": net.active_fraction,
        **asdict(written),
    }
