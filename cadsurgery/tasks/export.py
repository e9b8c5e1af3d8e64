"""Export a network by name, or a converted file, to a format of another runtime: `cadsurgery export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadsurgery.data.images import find_images, normalise, read_image
from cadsurgery.data.networks import Source
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.export import check_calibration, check_mask, export, format_of
from cadsurgery.network.model import pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.files import check_folder
from cadsurgery.support.progress import Step
from cadsurgery.tasks.open import example_batch, is_file, open_converted
from cadsurgery.tasks.options import Exporting

STATIC_MASK = f"{DEFAULT_MASK} | budget:fraction=0.3"


def export_network(
    model: str,
    weights: str,
    mask: str,
    conversion: dict[str, Any],
    size: tuple[int, int] | None,
    output: Path,
    options: Exporting,
    step: Step,
    trust: bool = False,
) -> dict[str, Any]:
    """Export a network by name or a converted file; see `cadsurgery export --help`.

    Raises:
        InvalidInput: as in `cadsurgery.export`.
    """
    check_folder(output)
    check_calibration(options.precision, options.calibration or None)
    step(f"building {model}")
    kind, is_dynamic = format_of(output, options.to or None), options.dynamic or options.level_map
    net = open_converted(model, mask, conversion, trust=trust) if is_file(model) else None
    provider = (
        net.mask
        if net is not None
        else resolve_mask(mask or (DEFAULT_MASK if kind == "onnx" else STATIC_MASK))
    )
    check_mask(provider, kind, is_dynamic, options.level_map)
    if net is None:
        net = open_converted(model, provider, conversion, weights=weights)
    net.eval()
    source = pictures_for(net)
    first, second = (example_batch(source, None, size, seed) for seed in (0, 1))
    if options.calibration:
        step("reading the calibration images")
    calibration = images_like(first, source, Path(options.calibration)) if options.calibration else None
    changed = {"to": options.to or None, "calibration": calibration}
    written = export(net, first, output, other=second, step=step, **{**vars(options), **changed})
    with torch.inference_mode():
        net(second)
    return {
        "model": model,
        "mask": net.mask.spec(),
        "active_fraction": net.active_fraction,
        **asdict(written),
    }


def images_like(example: Tensor, source: Source | None, folder: Path) -> list[Tensor]:
    """Read the images of a folder, each as a batch of the example's size, normalised for a network of this source.

    Raises:
        FileError: there are no images, or an image cannot be read.
    """
    paths, _ = find_images([folder])
    size = (example.shape[2], example.shape[3])
    return [normalise(read_image(path, size), source).unsqueeze(0) for path in paths]
