"""Train on CamVid: where to sample, and the network on what is sampled.

    python recipes/resampling_mobilenetv2/train.py DATA RUNS --run locations
    python recipes/resampling_mobilenetv2/train.py DATA RUNS --run learned --size 128    # or uniform, labels, edges

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`. Writes RUNS/locations, then RUNS/learned-128, ...: the
network and `training.json`: settings, CPU seconds, metrics on the validation split. `learned` samples by the network
of `locations`, which stays as it is. Killed, a run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.finetune import Settings, augmentation, fit
from recipes.camvid_mobilenetv2.network import CLASSES, build, images

TARGETS = ("pole", "sign", "pedestrian", "bicyclist", "car")
SIZES = (96, 128, 160, 192, 224)
SAMPLERS = ("uniform", "learned", "edges", "labels")
COMMON: dict[str, Any] = {"workers": 0, "save_every": 100, "validate_every": 10**6}
LOCATIONS: dict[str, Any] = {
    **{
        "objective": "locations",
        "batch": 16,
        "steps": 900,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 1e-2,
    },
    **{"crop": 320, "scale": (0.9, 1.3), "jitter": 0.3},
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
    },
}
# Steps that take two to three CPU minutes on one core of the machine named in the card.
STEPS = {96: 240, 128: 200, 160: 150, 192: 110, 224: 90}


def resampled(data: Path, runs: Path, sampler: str, size: int) -> cs.ResampledModel:
    """The given network on a sampled image; the learned sampler is that of `locations`, if it was trained."""
    targets = [CLASSES.index(name) for name in TARGETS]
    net = cs.resample(build(data), sampler, size, targets=targets)
    trained = runs / "locations" / "net.safetensors"
    if sampler == "learned" and trained.is_file():
        known = cs.load(trained, build(data))
        assert isinstance(known, cs.ResampledModel)
        net.sampler.load_state_dict(known.sampler.state_dict())
    return net


def main() -> None:
    """Train and write."""
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
        augment=augmentation(chosen),
        device="cpu",
        on_step=say,
    )
    seconds = time.process_time() - started
    told = {"settings": chosen.to_dict(), "cpu_seconds": seconds, "torch": torch.__version__}
    (folder / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{folder}: {seconds / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
