"""Networks that keep grids for the next call, and one that is fed by a dictionary: detectors, matchers, keypoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, conv
from torch import nn

from benchmarks.zoo.corpus import network


class GridHead(nn.Module):
    """Boxes from two maps; grids and anchors lie in lists, which `_apply` moves (as YOLOv5)."""

    def __init__(self, widths: tuple[int, int], classes: int = 3, anchors: int = 2) -> None:
        super().__init__()
        self.anchors_per_cell, self.outputs = anchors, classes + 5
        self.grid = [torch.empty(0) for _ in widths]
        self.anchor_grid = [torch.empty(0) for _ in widths]
        self.register_buffer("anchors", torch.linspace(0.5, 2, 4 * anchors).view(2, anchors, 2))
        self.stride = torch.tensor([16.0, 32.0])
        self.m = nn.ModuleList([nn.Conv2d(width, anchors * self.outputs, 1) for width in widths])

    def _apply(self, fn):
        self = super()._apply(fn)
        self.stride = fn(self.stride)
        self.grid, self.anchor_grid = list(map(fn, self.grid)), list(map(fn, self.anchor_grid))
        return self

    def forward(self, x):
        boxes = []
        for i in range(2):
            y = self.m[i](x[i])
            bs, _, ny, nx = y.shape
            y = y.view(bs, self.anchors_per_cell, self.outputs, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            if self.grid[i].shape[2:4] != y.shape[2:4]:
                self.grid[i], self.anchor_grid[i] = self._make_grid(nx, ny, i)
            xy, wh, conf = y.sigmoid().split((2, 2, self.outputs - 4), 4)
            xy = (xy * 2 + self.grid[i]) * self.stride[i]
            wh = (wh * 2) ** 2 * self.anchor_grid[i]
            boxes.append(torch.cat((xy, wh, conf), 4).view(bs, self.anchors_per_cell * nx * ny, self.outputs))
        return torch.cat(boxes, 1)

    def _make_grid(self, nx, ny, i):
        d, t, shape = self.anchors[i].device, self.anchors[i].dtype, (1, self.anchors_per_cell, ny, nx, 2)
        y, x = torch.arange(ny, device=d, dtype=t), torch.arange(nx, device=d, dtype=t)
        yv, xv = torch.meshgrid(y, x, indexing="ij")
        anchors = (self.anchors[i] * self.stride[i]).view(1, self.anchors_per_cell, 1, 1, 2)
        return torch.stack((xv, yv), 2).expand(shape) - 0.5, anchors.expand(shape)


@network("kept", "factories", "decisions", "shapes")
class GridDetector(nn.Module):
    """A detector whose head keeps a grid and anchors per map in lists (as YOLOv5)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), GridHead((32, 64))

    def forward(self, x):
        return self.head(self.encoder(x)[2:])


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
