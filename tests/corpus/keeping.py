"""Networks that keep grids for the next call, and one that is fed by a dictionary: detectors, matchers, keypoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, conv
from torch import nn

from benchmarks.zoo.corpus import network


@network("kept", "factories", "inputs", call=lambda x: (x, x.flip(3)))
class CoordinateMatcher(nn.Module):
    """Two images, each by the same encoder and with a grid of coordinates, in the type of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mix, self.head = Encoder(), conv(66, 32), nn.Conv2d(64, 2, 1)
        self.coords = {}

    def grid(self, y):
        size = (y.shape[2], y.shape[3])
        if size not in self.coords:
            axes = [torch.arange(length) for length in y.shape[2:]]
            self.coords[size] = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] / 10
        return self.coords[size].type(y.type()).expand(y.shape[0], -1, -1, -1)

    def features(self, image):
        y = self.encoder(image)[-1]
        return self.mix(torch.cat([y, self.grid(y)], 1))

    def forward(self, first, second):
        flow = self.head(torch.cat([self.features(first), self.features(second)], 1))
        return F.interpolate(flow, size=first.shape[2:], mode="bilinear", align_corners=False)


@network("inputs", "outputs", call=lambda x: ({"image": x},))
class KeypointsOfDictionary(nn.Module):
    """Scores and descriptors of an image in a dictionary (as SuperPoint)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.scores, self.descriptors = Encoder(), nn.Conv2d(64, 65, 1), nn.Conv2d(64, 16, 1)

    def forward(self, data):
        y = self.encoder(data["image"])[-1]
        scores = F.softmax(self.scores(y), 1)[:, :-1]
        return {"scores": scores, "descriptors": F.normalize(self.descriptors(y), p=2, dim=1)}
