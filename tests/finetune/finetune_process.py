"""A training run in a process of its own: `python finetune_process.py FOLDER BATCH [STEP TO DIE AFTER]`."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from training import Scenes, adaptive, flip

from cadsurgery.finetune import Row, Settings, fit

folder, batch, *deadly = sys.argv[1:]
torch.set_num_threads(1)
net = adaptive()
for module in net.modules():
    if isinstance(module, nn.Dropout) and "no-dropout" in folder:
        module.p = 0.0
settings = Settings(steps=6, batch=int(batch), lr=0.05, workers=0, save_every=3, batch_norm="frozen", ema=0.5)


def die(row: Row) -> None:
    if deadly and row["step"] == int(deadly[0]):
        os.kill(os.getpid(), signal.SIGKILL)


data = Scenes()
for index, (_, labels) in enumerate(data.items):
    labels[: 8 * index] = 255
fit(net, data, settings, output=Path(folder), augment=flip, device="cpu", on_step=die)
