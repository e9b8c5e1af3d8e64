"""HRNet for segmentation, with the names of the published checkpoints (Sun et al. 2019, as used by Liu et al.
2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM = 0.01


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        width: channels of the finest branch; each coarser branch has twice as many.
        first: blocks of the first stage.
        modules: modules of each further stage.
        blocks: blocks of a branch in a module.
        hidden: channels inside the heads of the exits.
    """

    width: int
    first: int
    modules: tuple[int, int, int]
    blocks: int
    hidden: int


SIZES = {"w18": Size(18, 2, (1, 3, 2), 2, 64), "w48": Size(48, 4, (1, 4, 3), 4, 128)}


def norm(channels: int) -> nn.BatchNorm2d:
    """Create batch norm with the published options."""
    return nn.BatchNorm2d(channels, momentum=MOMENTUM)


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Create a convolution without bias that keeps the size or divides it by its stride."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """A bottleneck block: three convolutions, with four times as many output channels as inside."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, inside, 1), norm(inside)
        self.conv2, self.bn2 = conv(inside, inside), norm(inside)
        self.conv3, self.bn3 = conv(inside, 4 * inside, 1), norm(4 * inside)
        same = channels == 4 * inside
        self.downsample = None if same else nn.Sequential(conv(channels, 4 * inside, 1), norm(4 * inside))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Basic(nn.Module):
    """A basic block: two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels), norm(channels)
        self.conv2, self.bn2 = conv(channels, channels), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Exchange(nn.Module):
    """Branches of several resolutions, followed by an exchange: each branch is summed with all others, resized."""

    def __init__(self, widths: list[int], blocks: int) -> None:
        super().__init__()
        branches = (nn.Sequential(*(Basic(width) for _ in range(blocks))) for width in widths)
        self.branches = nn.ModuleList(branches)
        rows = range(len(widths))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(self._path(widths, i, j) for j in rows) for i in rows)

    @staticmethod
    def _path(widths: list[int], target: int, source: int) -> nn.Module | None:
        if source == target:
            return None
        if source > target:
            return nn.Sequential(conv(widths[source], widths[target], 1), norm(widths[target]))
        steps = []
        for step in range(source, target):
            last = step == target - 1
            out = widths[target] if last else widths[source]
            steps.append(
                nn.Sequential(conv(widths[source], out, stride=2), norm(out), *[nn.ReLU()] * (not last))
            )
        return nn.Sequential(*steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the maps of all branches, the finest first."""
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        found = []
        for target, paths in enumerate(self.fuse_layers):
            y = None
            for source, path in enumerate(paths):  # type: ignore[arg-type]
                x = maps[source] if path is None else path(maps[source])
                if source > target:
                    x = up(x, maps[target])
                y = x if y is None else y + x
            found.append(F.relu(y))
        return found


def up(x: Tensor, like: Tensor) -> Tensor:
    """Resize to the size of another map; the ratio is not an integer unless sizes are multiples of 32."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class HRNet(nn.Module):
    """Four stages, each with one more branch; class scores at output stride 4."""

    def __init__(self, size: Size, classes: int) -> None:
        super().__init__()
        widths = [size.width << branch for branch in range(4)]
        self.conv1, self.bn1 = conv(3, 64, stride=2), norm(64)
        self.conv2, self.bn2 = conv(64, 64, stride=2), norm(64)
        self.layer1 = nn.Sequential(*(Bottleneck(256 if block else 64, 64) for block in range(size.first)))
        for stage, count in enumerate(size.modules, 2):
            setattr(self, f"transition{stage - 1}", self._transition(widths[:stage]))
            modules = (Exchange(widths[:stage], size.blocks) for _ in range(count))
            setattr(self, f"stage{stage}", nn.ModuleList(modules))
        channels = sum(widths)
        self.last_layer = nn.Sequential(
            nn.Conv2d(channels, channels, 1), norm(channels), nn.ReLU(), nn.Conv2d(channels, classes, 1)
        )

    @staticmethod
    def _transition(widths: list[int]) -> nn.ModuleList:
        if len(widths) == 2:  # both branches start from the map of the first stage
            fine = nn.Sequential(conv(256, widths[0]), norm(widths[0]), nn.ReLU())
            coarse = nn.Sequential(conv(256, widths[1], stride=2), norm(widths[1]), nn.ReLU())
            return nn.ModuleList((fine, nn.Sequential(coarse)))
        coarse = nn.Sequential(conv(widths[-2], widths[-1], stride=2), norm(widths[-1]), nn.ReLU())
        return nn.ModuleList([*(None for _ in widths[:-1]), nn.Sequential(coarse)])

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores (B, classes, H / 4, W / 4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(F.relu(self.bn2(self.conv2(x))))
        maps = [path(x) for path in self.transition1]  # type: ignore[union-attr,operator]
        for stage in (2, 3, 4):
            if stage > 2:
                maps = [*maps, getattr(self, f"transition{stage - 1}")[-1](maps[-1])]
            for exchange in getattr(self, f"stage{stage}"):
                maps = exchange(maps)
        return self.last_layer(torch.cat([maps[0], *(up(y, maps[0]) for y in maps[1:])], 1))
