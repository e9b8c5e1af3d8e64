"""Fine-tuning on CamVid at CPU scale: it takes minutes, because the frozen stem's outputs are computed once.

    python recipes/camvid_mobilenetv2/train.py DATA --run any-budget --seed 0 --output runs

Writes `runs/any-budget-0/`: settings, log, and `net.safetensors`. A killed run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from network import build, images
from rich.console import Console
from stem import CachedStem, body_of

import cadsurgery as cs
from cadsurgery.finetune import Settings, calibrate, fit

CROP, PLACES = (224, 288), (2, 2)
COMMON: dict[str, Any] = {
    **{
        "steps": 150,
        "batch": 4,
        "optimizer": "adamw",
        "lr": 1e-4,
        "backbone_factor": 1.0,
        "weight_decay": 1e-2,
    },
    **{
        "batch_norm": "frozen",
        "ema": 0.97,
        "jitter": 0.0,
        "workers": 0,
        "save_every": 50,
        "validate_every": 10**6,
    },
}


@dataclass(frozen=True)
class Run:
    """One way to fine-tune.

    Attributes:
        mask: mask of the network during training.
        settings: settings besides the common ones.
    """

    mask: str
    settings: dict[str, Any] = field(default_factory=dict)


DETAIL = "detail | budget:fraction=0.13"
LEARNED = "learned:fraction=0.11,channels=16/16/16"
RUNS = {
    "dense": Run("all"),
    "detail": Run(DETAIL),
    "any-budget": Run(
        "detail | budget:fraction=0.3",
        {"objective": "any-budget", "objective_options": {"ranking": ["own", "random"]}},
    ),
    "distilled": Run(  # without labels: 92 images are few, and the weights were trained on them
        "detail | budget:fraction=0.3",
        {
            "objective": "any-budget",
            "objective_options": {"ranking": ["own", "random"], "supervision": 0.0},
            **{"lr": 3e-5, "weight_decay": 0.0},  # so that nothing is forgotten
        },
    ),
    "learned": Run(
        LEARNED,
        {
            "objective": "blend",
            "objective_options": {"network": "mixed", "supervision": 0.0, "distil": 1.0},
            **{"lr": 3e-5, "mask_factor": 30.0, "weight_decay": 0.0},
        },
    ),
    "mask": Run(
        LEARNED, {"objective": "blend", "objective_options": {"network": "fixed"}, "mask_factor": 10.0}
    ),
}


def train(data: Path, name: str, seed: int, output: Path, steps: int | None = None) -> None:
    """Train one run, and write it to `output/NAME-SEED`."""
    console, begin = Console(stderr=True), time.perf_counter()
    run = RUNS[name]
    settings = Settings(**{**COMMON, **run.settings, "seed": seed, **({"steps": steps} if steps else {})})
    mask = f"{run.mask},seed={seed}" if run.mask.startswith("learned") else run.mask
    net = cs.adaptify(build(data), mask, output_stride=(8, 16), fill="guided")
    cached = CachedStem(net, images(data, "train"), CROP, PLACES)
    validation = CachedStem(net, images(data, "val"))
    console.print(f"{len(cached)} crops cached after {time.perf_counter() - begin:.0f} s")

    def on_step(row: dict[str, Any]) -> None:
        if row["step"] % 25 == 0:
            told = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None)
            console.print(f"{told}; {time.perf_counter() - begin:.0f} s", highlight=False)

    body, folder = body_of(net), output / f"{name}-{seed}"
    outcome = fit(body, cached, settings, output=folder, validation=validation, on_step=on_step)
    if mask.startswith("learned"):  # on whole images, because crops have more borders
        share = calibrate(body, CachedStem(net, images(data, "train")))
        console.print(f"share kept of the training images: {share:.4f}")
        cs.save(body, folder / "net.safetensors")
    told = {
        **outcome.to_dict(),
        **{"run": name, "seed": seed, "mask": mask, "seconds": time.perf_counter() - begin},
        **{"threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    (folder / "outcome.json").write_text(json.dumps(told, indent=2) + "\n")
    console.print(f"val mIoU {outcome.before['miou']:.4f} -> {outcome.after['miou']:.4f}")


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", choices=list(RUNS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 150")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    options = parser.parse_args()
    train(options.data, options.run, options.seed, options.output, options.steps)


if __name__ == "__main__":
    main()
