"""The settings of a training run: one frozen value that goes through JSON."""

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
# What a run may change when it is resumed: nothing of it touches the weights.
FREE = ("save_every", "validate_every", "log", "workers")


@dataclass(frozen=True)
class Settings:
    """How a network is trained; the defaults are those published (Hesse et al., CVPRW 2023, supplementary B).

    Attributes:
        steps: optimiser steps; the learning rate falls to its floor over all of them.
        batch: images per process and forward pass.
        accumulate: forward passes per step, whose gradients are averaged.
        lr: initial learning rate of the classifier.
        backbone_factor: of `lr`, for the backbone.
        mask_factor: of `lr`, for the parameters of the mask.
        power: of the polynomial schedule lr (1 - step / steps)^power.
        lr_floor: the least learning rate of any group.
        optimizer: `sgd` or `adamw`.
        momentum: of SGD.
        weight_decay: of all trained parameters.
        clip: largest norm of the gradient; 0 leaves it.
        crop: side in pixels of the crops trained on; 0 takes whole images.
        flip: mirror half of the images.
        jitter: strength of brightness, contrast and saturation jitter.
        scale: range of random scaling; (1, 1) for none.
        precision: `no` (float32), `fp16` or `bf16` autocast.
        batch_norm: `train`, or `frozen`: running statistics are used and kept, affine parts still trained.
        freeze: `stem` keeps everything before the adaptive region as it is.
        train: `all`, or `adapters`: those of the levels below full resolution alone, made if the network has none; all
            else stays as it is, in evaluation mode, and with it all that the network gives at full resolution. Or
            `exits`: heads of the exits and widths of what fills what they leave out, of a network with exits. Or
            `gates`: of a network with gates, these alone.
        ema: decay per step of an average of the weights, which is then what is validated and saved; 0 for none.
        seed: of everything random.
        objective: name of what is minimised, see `list_objectives`; empty for `mixed`, or `divergence` without labels;
            of a network with exits for `anytime`, with gates for `sparse`, of one whose input is sampled for `sampled`.
        objective_options: its options by name.
        save_every: steps between checkpoints.
        validate_every: steps between validations.
        log: `csv` or `tensorboard`.
        workers: processes per training process that load images; 0 loads in it.
    """

    steps: int = option(30_000, "optimiser steps; default {default}")
    batch: int = option(8, "images per process and pass; default {default}")
    accumulate: int = option(1, "passes per step; default {default}")
    lr: float = option(0.1, "of the classifier; default {default}")
    backbone_factor: float = 0.1
    mask_factor: float = 0.01
    power: float = 0.9
    lr_floor: float = 1e-6
    optimizer: str = option("sgd", "{default} (default) or adamw")
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = option(0.0, "largest norm of the gradient; default none")
    crop: int = option(768, "side of the crops; default {default}, 0 for whole images")
    flip: bool = True
    jitter: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    precision: str = option("no", "{default} (default), fp16 or bf16")
    batch_norm: str = option("train", "{default} (default) or frozen")
    freeze: str = option("", "stem: what comes before the region stays as it is")
    train: str = option(
        "all",
        "{default} (default); adapters of the levels alone; heads of the exits; or gates alone",
    )
    ema: float = option(0.0, "decay of an average of the weights")
    seed: int = option(0, "of everything random; default {default}")
    objective: str = option(
        "",
        "mixed (default), divergence (default without labels), any-budget, blend for a learned mask, anytime "
        "(default of networks with exits), sparse (of those with gates), sampled (default where the input is sampled), "
        "or locations, where it is; their options are below",
    )
    objective_options: dict[str, Any] = field(default_factory=dict)
    save_every: int = option(500, "steps between checkpoints; default {default}")
    validate_every: int = option(1000, "steps between validations; default {default}")
    log: str = option("csv", "{default} (default) or tensorboard")
    workers: int = option(4, "processes that load images; default {default}")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_name(name, str(getattr(self, name)), choices)
        for one in fields(self):
            _check(one.name, getattr(self, one.name), one.type)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """From `to_dict`, or any part of it; what is missing has its default.

        Raises:
            UnknownName: there is no such setting, or no such choice for one.
            InvalidInput: a value out of range or of the wrong type.
        """
        return Settings().changed(values)

    def changed(self, values: dict[str, Any]) -> Settings:
        """These settings with others for some; raises as `from_dict` does."""
        known = [one.name for one in fields(Settings)]
        for name in values:
            check_name("setting", name, known)
        changes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return replace(self, **changes)

    @staticmethod
    def read(path: Path) -> Settings:
        """From a JSON file with some or all settings.

        Raises:
            FileError: missing or no JSON object.
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


def _positive(value: float) -> bool:
    return value > 0


def _fraction(value: float) -> bool:
    return 0 <= value < 1


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("steps", "batch", "accumulate", "save_every", "validate_every"), (_positive, "above 0")),
    **dict.fromkeys(("lr", "power"), (_positive, "above 0")),
    **dict.fromkeys(("momentum", "ema"), (_fraction, "in 0..1, 1 excluded")),
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
    wanted, words = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise InvalidInput(f"setting {name}={value!r} is not {words}.", next=f"give {words}.")
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside, words = _RANGES.get(name, (lambda number: not numeric or number >= 0, "0 or above"))
    if not inside(value):  # NaN fails every comparison
        raise InvalidInput(f"setting {name}={value} is out of range.", next=f"it must be {words}.")
