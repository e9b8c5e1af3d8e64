"""Train the heads of the exits of the CamVid network, without labels.

    python recipes/anytime_camvid/train.py DATA OUTPUT [--steps N] [--threads N]

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`. Each head learns the network's final prediction at all
positions, so that it is confident where later exits would not change the result. The network itself is not trained.
Writes the network and `training.json` with settings and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.finetune import Settings, augmentation, fit
from recipes.camvid_mobilenetv2.network import build

EXITS = ("backbone.blocks.2", "backbone.blocks.4", "backbone.blocks.5")
HIDDEN = 128
THRESHOLD = (
    0.9,
    0.85,
    0.95,
)  # of the written network; training computes everything


def settings(steps: int) -> Settings:
    """Return the settings: whole images, flips; the backbone and its own head are not trained."""
    return Settings(
        **{"steps": steps, "batch": 4, "optimizer": "adamw", "lr": 0.003, "weight_decay": 1e-4, "crop": 0},
        **{"jitter": 0.2, "train": "exits", "batch_norm": "train", "workers": 0, "save_every": 100},
        objective="anytime",
        validate_every=steps,
    )


def main() -> None:
    """Train and write the network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = cs.anytime(build(options.data), EXITS, hidden=HIDDEN, threshold=1.0, fill="interpolated")
    chosen, started = settings(options.steps), time.process_time()

    def say(row: dict[str, float | None]) -> None:
        parts = (f"{name} {value:.4f}" for name, value in row.items() if value is not None and name != "step")
        print(f"{row['step']}: {', '.join(parts)}, {time.process_time() - started:.0f} CPU s", flush=True)

    fit(
        net,
        cs.open_data(f"images:{options.data / 'camvid' / 'train' / 'images'}"),
        chosen,
        output=options.output,
        augment=augmentation(chosen),
        device="cpu",
        on_step=say,
    )
    seconds = time.process_time() - started
    net.threshold = THRESHOLD
    cs.save(net, options.output / "net.safetensors")
    report = {
        "settings": chosen.to_dict(),
        "cpu_seconds": seconds,
        "exits": EXITS,
        "torch": torch.__version__,
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{seconds / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
