"""What `cadsurgery finetune` does: from names and paths to a trained file and a short report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadsurgery.finetune.batches import Samples, augmentation
from cadsurgery.finetune.logs import Row
from cadsurgery.finetune.loop import fit
from cadsurgery.finetune.results import Outcome
from cadsurgery.finetune.settings import Settings
from cadsurgery.masks import resolve_mask
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.stem import CachedStem, body_of
from cadsurgery.network.storage import load
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.processes import own_device, start_others
from cadsurgery.tasks.convert import build, is_file


@dataclass(frozen=True)
class Report:
    """What a run gave, in words or as JSON."""

    model: str
    mask: str
    data: str
    outcome: Outcome
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.model,
            "mask": self.mask,
            "data": self.data,
            "notes": list(self.notes),
            **self.outcome.to_dict(),
        }

    def render(self) -> str:
        """A few lines: what was trained, metrics before and after, files."""
        found = self.outcome
        went_on = f", resumed after step {found.resumed}" if found.resumed else ""
        lines = [f"{self.model}, mask {self.mask}, {self.data}: {found.steps} steps{went_on}", *self.notes]
        for group in found.groups:
            rate = f"lr x {group['factor']}" if group["factor"] else "not trained"
            lines.append(f"  {group['group']}: {group['tensors']} tensors, {group['values']} values, {rate}")
        for name, before in found.before.items():
            lines.append(f"{name}: {before:.4f} before, {found.after[name]:.4f} after")
        if found.best is not None:
            lines.append(f"best mIoU {found.best:.4f} at step {found.best_step}: {found.best_network}")
        return "\n".join([*lines, f"wrote {found.network}"])


def finetune(
    *,
    model: str,
    data: str,
    split: str,
    validation_split: str,
    weights: str,
    mask: str,
    options: dict[str, Any],
    settings: Settings,
    output: Path,
    resume: bool,
    device: str,
    on_step: Callable[[Row], None] | None,
    step: Callable[[str], None],
    cache: bool = False,
    trust: bool = False,
) -> Report:
    """Build or load, convert, train, report; see `cadsurgery finetune --help`.

    Raises:
        CadError: what the data, the network, the cache or `fit` refuse.
    """
    from cadsurgery.data import open_data

    start_others()
    if mask:
        resolve_mask(mask)
    step(f"opening {data}")
    training = open_data(data, split)
    validation = open_data(data, validation_split) if validation_split else None
    step(f"building {model}")
    net = network(model, weights, mask, options, len(training.classes), trust)
    spec = getattr(getattr(net, "mask", None), "spec", lambda: "none")()
    found = _Prepared(net, training, validation, settings)
    if cache:
        step("running the stem over the data")
        found = _cached(found, device)
    step("training")
    outcome = fit(
        found.net,
        found.training,
        found.settings,
        output=output,
        validation=found.validation,
        augment=None if cache else augmentation(found.settings),
        resume=resume,
        device=device,
        on_step=on_step,
    )
    return Report(model, spec, f"{training.name} ({len(training)} images)", outcome, found.notes)


@dataclass(frozen=True)
class _Prepared:
    """What is trained, on what, how; and what is to be said about it."""

    net: Any
    training: Samples
    validation: Samples | None
    settings: Settings
    notes: tuple[str, ...] = ()


def _cached(given: _Prepared, device: str) -> _Prepared:
    """The body on the outputs of the stem; they take the place of the augmentation, but for crops and mirroring.

    Raises:
        InvalidInput: the settings scale images, a crop that does not fit, or what `CachedStem` refuses.
    """
    settings = given.settings
    if settings.scale != (1.0, 1.0):
        raise InvalidInput(
            f"--cache with scale={settings.scale}.",
            why="what the stem has seen cannot be scaled any more.",
            next="leave out scale, or train without --cache.",
        )
    gpu = device != "cpu" and torch.cuda.is_available()
    given.net.to(own_device("cuda" if gpu else "cpu"))
    crop = (settings.crop, settings.crop) if settings.crop else None
    training = CachedStem(given.net, given.training, flip=settings.flip, crop=crop)
    validation = CachedStem(given.net, given.validation) if given.validation is not None else None
    kept = training.bytes + (validation.bytes if validation is not None else 0)
    note = (
        f"the stem is fixed, its outputs are kept in {kept / 1e9:.2f} GB of memory: {len(training)} samples to train "
        "on, crops at fixed places, colours not jittered"
    )
    changed = settings.changed({"freeze": "stem", "jitter": 0.0})
    return _Prepared(body_of(given.net), training, validation, changed, (note,))


def network(
    model: str, weights: str, mask: str, options: dict[str, Any], classes: int, trust: bool
) -> nn.Module:
    """A converted file, with another mask if one is given, or a network by name, converted.

    One of torchvision or timm is built with the number of classes; a function's is taken as it is.
    """
    if is_file(model):
        given = [name for name, value in options.items() if value not in _DEFAULTS[name]]
        if given:
            raise InvalidInput(
                f"{model} is converted already; {', '.join(given)} cannot be changed.",
                next="leave these options out, or convert the network anew with them.",
            )
        return load(model, mask=mask or None, trust=trust)
    library, _, function = model.partition(":")
    own = bool(function) and library not in (
        "torchvision",
        "timm",
    )  # a function decides on its classes itself
    built, _ = build(model, weights, None if own else classes)
    return adaptify(built, mask or "edges", **options, verify_laws=False)


_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "output_stride": (None,),
    "region": ("auto",),
    "fill": ("linear",),
    "patch": ("quadtree",),
    "anchor": ("corner",),
    "pool": ("atrous",),
    "outputs": ("fine",),
}


def make_settings(config: Path | None, overrides: dict[str, Any], objective_options: list[str]) -> Settings:
    """Defaults, changed by a file, changed by options that are not None.

    Raises:
        InvalidInput: an option of the objective is not NAME=VALUE, or a setting is out of range.
        UnknownName, FileError: as `Settings.read`.
    """
    settings = Settings.read(config) if config is not None else Settings()
    found = dict(settings.objective_options)
    for text in objective_options:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise InvalidInput(f"objective option {text!r} is not NAME=VALUE.", next="write e.g. low=0.1.")
        found[name] = _value(value)
    given = {name: value for name, value in overrides.items() if value is not None}
    return settings.changed({**given, "objective_options": found})


def _value(text: str) -> Any:
    """JSON where it is JSON (a number, a list), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
