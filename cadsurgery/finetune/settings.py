"""The settings of a training run: one frozen value that can be stored as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cadsurgery.support.errors import FileError, InvalidInput, check_name, first_line
from cadsurgery.tasks.options import option

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "precision": ("no", "fp16", "bf16"),
    "batch_norm": ("train", "frozen"),
    "freeze": ("", "stem"),
    "train": ("all", "adapters", "exits", "gates"),
    "log": ("csv", "tensorboard"),
}
# Settings that may change when a run is resumed, because they do not affect the weights.
FREE = ("save_every", "validate_every", "log", "workers")


@dataclass(frozen=True)
class Settings:
    """How a network is trained; the defaults are published (Hesse et al., CVPRW 2023, supplementary B).

    Attributes:
        steps: optimiser steps; the learning rate falls to its floor over all of them.
        batch: images per process and forward pass.
        accumulate: forward passes per step, whose gradients are averaged.
        lr: initial learning rate of the classifier.
        backbone_factor: factor of `lr` for the backbone.
        mask_factor: factor of `lr` for the parameters of the mask.
        power: exponent of the polynomial schedule lr (1 - step / steps)^power.
        lr_floor: smallest learning rate of any group.
        optimizer: `sgd` or `adamw`.
        momentum: momentum of SGD.
        weight_decay: weight decay of all trained parameters.
        clip: maximum norm of the gradient; 0 for no clipping.
        crop: side of the training crops in pixels; 0 for whole images.
        flip: mirror half of the images.
        jitter: strength of brightness, contrast and saturation jitter.
        scale: range of random scaling; (1, 1) for none.
        precision: `no` (float32), `fp16` or `bf16` autocast.
        batch_norm: `train`, or `frozen`: running statistics are used and not updated, affine parameters are trained.
        freeze: `stem` freezes everything before the adaptive region.
        train: `all`; or `adapters`: only level adapters, which are created if missing, while everything else stays in
            evaluation mode, so that outputs at full resolution do not change; or `exits`: the heads of a network
            with exits and the widths of its Gaussians; or `gates`: the gates of a network with gates.
        ema: decay per step of an average of the weights, which is then validated and saved; 0 for no average.
        seed: seed of everything random.
        objective: name of the objective, see `list_objectives`; empty for `mixed`, or `divergence` without labels;
            for a network with exits `anytime`, with gates `sparse`, with a sampled input `sampled`.
        objective_options: options of the objective by name.
        save_every: steps between checkpoints.
        validate_every: steps between validations.
        log: `csv` or `tensorboard`.
        workers: number of processes per training process that load images; 0 to load in the training process.
    """

    steps: int = option(30_000, "optimiser steps; default {default}")
    batch: int = option(8, "images per process and pass; default {default}")
    accumulate: int = option(1, "passes per step; default {default}")
    lr: float = option(0.1, "learning rate of the classifier; default {default}")
    backbone_factor: float = 0.1
    mask_factor: float = 0.01
    power: float = 0.9
    lr_floor: float = 1e-6
    optimizer: str = option("sgd", "{default} (default) or adamw")
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = option(0.0, "maximum norm of the gradient; default none")
    crop: int = option(768, "side of the crops; default {default}, 0 for whole images")
    flip: bool = True
    jitter: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    precision: str = option("no", "{default} (default), fp16 or bf16")
    batch_norm: str = option("train", "{default} (default) or frozen")
    freeze: str = option("", "stem: layers before the adaptive region are not trained")
    train: str = option(
        "all",
        "{default} (default); adapters: level adapters alone; exits: their heads alone; or gates: gates alone",
    )
    ema: float = option(0.0, "decay of an average of the weights")
    seed: int = option(0, "seed of everything random; default {default}")
    objective: str = option(
        "",
        "mixed (default), divergence (default without labels), any-budget, blend for a learned mask, anytime "
        "(default of networks with exits), sparse (default of networks with gates), sampled (default of networks with "
        "a sampled input), or locations, for a learned sampler; their options are below",
    )
    objective_options: dict[str, Any] = field(default_factory=dict)
    save_every: int = option(500, "steps between checkpoints; default {default}")
    validate_every: int = option(1000, "steps between validations; default {default}")
    log: str = option("csv", "{default} (default) or tensorboard")
    workers: int = option(4, "processes that load images; default {default}")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_name(name, str(getattr(self, name)), choices)
        for setting in fields(self):
            _check(setting.name, getattr(self, setting.name), setting.type)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """Create settings from the result of `to_dict`, or a part of it; missing settings have their defaults.

        Raises:
            UnknownName: there is no such setting, or no such choice for a setting.
            InvalidInput: a value is out of range or has the wrong type.
        """
        return Settings().changed(values)

    def changed(self, values: dict[str, Any]) -> Settings:
        """Return a copy with changed values; raises as `from_dict`."""
        known = [setting.name for setting in fields(Settings)]
        for name in values:
            check_name("setting", name, known)
        changes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return replace(self, **changes)

    @staticmethod
    def read(path: Path) -> Settings:
        """Read settings from a JSON file with some or all of them.

        Raises:
            FileError: the file is missing or is not a JSON object.
            UnknownName, InvalidInput: as `from_dict`.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(
                f"{path} cannot be read as settings.",
                why=first_line(error),
                next='write a JSON object such as {"steps": 1000, "lr": 0.01}.',
            ) from error
        if not isinstance(values, dict):
            raise FileError(f"{path} holds no JSON object.", next='write e.g. {"steps": 1000}.')
        return Settings.from_dict(values)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("steps", "batch", "accumulate", "lr", "power", "save_every", "validate_every"),
        (lambda value: value > 0, "above 0"),
    ),
    **dict.fromkeys(("momentum", "ema"), (lambda value: 0 <= value < 1, "in 0..1, 1 excluded")),
    "scale": (lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1], "two numbers, 0 < low <= high"),
}
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
    "tuple[float, float]": (tuple, "two numbers"),
    "dict[str, Any]": (dict, "an object"),
}


def _check(name: str, value: Any, kind: Any) -> None:
    expected, words = _KINDS[kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
        raise InvalidInput(f"setting {name}={value!r} is not {words}.", next=f"give {words}.")
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside, words = _RANGES.get(name, (lambda number: not numeric or number >= 0, "0 or above"))
    if not inside(value):  # NaN fails every comparison
        raise InvalidInput(f"setting {name}={value} is out of range.", next=f"it must be {words}.")
