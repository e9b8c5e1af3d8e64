"""Train on CamVid: the sampler, and networks on sampled images.

    python recipes/resampling_mobilenetv2/train.py DATA RUNS --run locations
    python recipes/resampling_mobilenetv2/train.py DATA RUNS --run learned --size 128    # or uniform, labels, edges

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`. Writes RUNS/locations, then RUNS/learned-128, ...: the
network and `training.json` with settings, CPU seconds, and metrics on the validation split. `learned` samples by the
network of `locations`, which is not trained further. A killed run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.resampling import PUBLISHED_SMOOTHNESS, Sampler, SamplerOptions

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.finetune import Settings, augmentation, fit
from recipes.camvid_mobilenetv2.network import CLASSES, build, images

TARGETS = ("pole", "sign", "pedestrian", "bicyclist", "car")
SIZES = (96, 128, 160, 192, 224)
SAMPLERS = ("uniform", "learned", "edges", "labels")
MEAN = "mean"  # sampler with the mean locations of the training images, which needs no image
COMMON: dict[str, Any] = {"workers": 0, "save_every": 100, "validate_every": 10**6}
LOCATIONS: dict[str, Any] = {
    **{
        "objective": "locations",
        "batch": 16,
        "steps": 600,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 1e-2,
    },
    **{"crop": 0, "scale": (1.0, 1.4), "jitter": 0.3},
}
NETWORK: dict[str, Any] = {
    **{"objective": "sampled", "batch": 6, "optimizer": "adamw", "lr": 3e-4, "backbone_factor": 1.0},
    **{
        "weight_decay": 1e-2,
        "batch_norm": "frozen",
        "crop": 0,
        "scale": (1.0, 1.0),
        "jitter": 0.2,
        "ema": 0.97,
        "precision": "bf16",
    },
}
# Steps that take two to five CPU minutes on one core of the machine named in the card.
STEPS = {96: 500, 128: 400, 160: 400, 192: 180, 224: 120}
IMAGE = (360, 480)


class FixedSampler(Sampler):
    """A sampler with the same locations for every image."""

    name = MEAN

    def __init__(self, options: SamplerOptions, locations: Tensor) -> None:
        """Take the locations (grid, grid, 2)."""
        super().__init__(options)
        self.register_buffer("locations", locations)

    def forward(self, image: Tensor) -> Tensor:
        """Return the locations."""
        return self.get_buffer("locations").expand(len(image), -1, -1, -1)


@cache
def mean_sampler(data: Path) -> FixedSampler:
    """Compute the mean locations of the labels of the training images and their mirror images."""
    targets = tuple(CLASSES.index(name) for name in TARGETS)
    options, found = SamplerOptions(smoothness=PUBLISHED_SMOOTHNESS, targets=targets), images(data, "train")
    mean = torch.stack([options.locations_of(found[place][1][None])[0] for place in range(len(found))]).mean(
        0
    )
    mirrored = torch.stack((mean[..., 0], 1 - mean[..., 1]), -1).flip(1)
    return FixedSampler(options, (mean + mirrored) / 2)


def resampled(
    data: Path, runs: Path, sampler: str, size: int, network: nn.Module | None = None
) -> cs.ResampledModel:
    """Build a network on a sampled image; the learned sampler is taken from `locations`, if that was trained."""
    targets = [CLASSES.index(name) for name in TARGETS]
    kind = mean_sampler(data) if sampler == MEAN else sampler
    net = cs.resample(network or build(data), kind, size, targets=targets, smoothness=PUBLISHED_SMOOTHNESS)
    trained = runs / "locations" / "net.safetensors"
    if sampler == "learned" and trained.is_file():
        known = cs.load(trained, build(data))
        assert isinstance(known, cs.ResampledModel)
        net.sampler.load_state_dict(known.sampler.state_dict())
    return net


def main() -> None:
    """Train and write the network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--run", choices=["locations", *SAMPLERS], required=True)
    parser.add_argument("--size", type=int, choices=SIZES, default=128)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    is_sampler = options.run == "locations"
    net = resampled(options.data, options.runs, "learned" if is_sampler else options.run, options.size)
    values = (
        COMMON
        | (LOCATIONS if is_sampler else NETWORK | {"steps": STEPS[options.size]})
        | {"seed": options.seed}
    )
    chosen = Settings.from_dict(values | ({"steps": options.steps} if options.steps else {}))
    folder = options.runs / (options.run if is_sampler else f"{options.run}-{options.size}")
    started = time.process_time()

    def say(row: dict[str, float | None]) -> None:
        if row["step"] in (1, chosen.steps) or int(row["step"] or 0) % 20 == 0:
            parts = (f"{name} {value:.4g}" for name, value in row.items() if value is not None)
            print(f"{', '.join(parts)}, {time.process_time() - started:.0f} CPU s", flush=True)

    fit(
        net,
        images(options.data, "train"),
        chosen,
        output=folder,
        augment=dataclasses.replace(augmentation(chosen), crop=IMAGE),
        device="cpu",
        on_step=say,
    )
    seconds = time.process_time() - started
    details = {"settings": chosen.to_dict(), "cpu_seconds": seconds, "torch": torch.__version__}
    (folder / "training.json").write_text(json.dumps(details, indent=1) + "\n")
    print(f"{folder}: {seconds / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
