"""What tests of training and evaluation share: generated scenes, and networks converted for them."""

from __future__ import annotations

from typing import Any

import torch
from networks import ResidualSegmenter, Segmenter, made_once, seeded
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import SCENE_CLASSES, labelled_scene
from cadsurgery.finetune.learning_rates import Draw

SIZE = (48, 64)
DATA = "scene:2,height=48,width=64"
DRAW = Draw(0, 0, (0, 1))
QUICK: dict[str, Any] = {
    **{"steps": 2, "batch": 2, "crop": 0, "jitter": 0.0, "flip": False, "workers": 0, "validate_every": 2},
    **{"lr": 0.01, "save_every": 1},
}
TARGETS = (4, 5)  # classes whose boundaries inputs are sampled at
# Options of `cadsurgery finetune` for one step on the CPU.
ONE_STEP_BY_COMMAND = (
    *(part for setting in ("steps=1", "batch=2", "crop=0", "workers=0") for part in ("--set", setting)),
    *("--device", "cpu"),
)


class Scenes:
    """Generated scenes of a number and size; all of them labelled."""

    name = "scenes"
    classes = SCENE_CLASSES

    def __init__(self, count: int = 5, size: tuple[int, int] = SIZE) -> None:
        self.items = [labelled_scene(*size, seed) for seed in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def flip(image: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """An augmentation: mirrored for odd seeds."""
    return (image.flip(-1), labels.flip(-1)) if seed % 2 else (image, labels)


@made_once
def adaptive(mask: object = "edges:threshold=0.2,dilation=3") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = torch.zeros(1, 3, *SIZE)
    return cs.adaptify(Segmenter(), mask, output_stride=(4, 16), example_input=example, verify_laws=False)


def batch() -> tuple[tuple[Tensor, ...], Tensor]:
    """Two scenes and their labels."""
    images, labels = zip(*(Scenes(2)[place] for place in range(2)), strict=True)
    return (torch.stack(images),), torch.stack(labels)


@made_once
def with_exits(threshold: float = 0.2) -> cs.AnytimeModel:
    torch.manual_seed(0)
    return cs.anytime(Segmenter().eval(), ["backbone.1", "backbone.2"], threshold=threshold, hidden=4)


@made_once
def with_sampler(sampler: object = "learned", **options: Any) -> cs.ResampledModel:
    torch.manual_seed(0)
    return cs.resample(Segmenter().eval(), sampler, 32, targets=TARGETS, **options)


def residual_segmenter() -> nn.Module:
    """A network by `module:function`."""
    return seeded(ResidualSegmenter, torch.float32)


@made_once
def with_gates() -> cs.SampledModel:
    return cs.sample(residual_segmenter())
