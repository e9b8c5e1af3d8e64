"""Networks for real time: two paths, unpooling, dilated bottlenecks, early downsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Residual, conv
from torch import nn

from benchmarks.zoo.corpus import network


@network("indices", "sizes")
class SegNet(nn.Module):
    """Pooling remembers where the maxima were, and unpooling puts values back there; sizes are kept for it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = conv(3, 8), conv(8, 16), conv(16, 32)
        self.dec3, self.dec2, self.dec1 = conv(32, 16), conv(16, 8), conv(8, 8)
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.enc1(x)
        size1 = x.size()
        x, id1 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.enc2(x)
        size2 = x.size()
        x, id2 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.enc3(x)
        size3 = x.size()
        x, id3 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.dec3(F.max_unpool2d(x, id3, kernel_size=2, stride=2, output_size=size3))
        x = self.dec2(F.max_unpool2d(x, id2, kernel_size=2, stride=2, output_size=size2))
        x = self.dec1(F.max_unpool2d(x, id1, kernel_size=2, stride=2, output_size=size1))
        return self.out(x)


@network("transposed", "decisions")
class LinkNet(nn.Module):
    """Sums of encoder and decoder; transposed in the middle of a bottleneck; padded by `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.enc1, self.enc2, self.enc3 = Residual(8, 8), Residual(8, 16, 2), Residual(16, 24, 2)
        self.dec3, self.dec2, self.dec1 = self.decode(24, 16), self.decode(16, 8), self.decode(8, 8)
        self.out = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Conv2d(8, 4, 2, padding=1),
        )  # fmt: skip

    @staticmethod
    def decode(a: int, b: int) -> nn.Sequential:
        """A bottleneck that doubles the size."""
        up = nn.ConvTranspose2d(a // 4, a // 4, 3, stride=2, padding=1, output_padding=1)
        return nn.Sequential(conv(a, a // 4, 1), up, nn.BatchNorm2d(a // 4), nn.ReLU(), conv(a // 4, b, 1))

    def add(self, x, skip):
        if x.size(2) > skip.size(2):
            x = x[:, :, :-1]
        if x.size(3) > skip.size(3):
            x = x[:, :, :, :-1]
        return x + skip

    def forward(self, x):
        x = self.stem(x)
        e1 = self.enc1(x)
        e2 = self.enc2(e1)
        d3 = self.add(self.dec3(self.enc3(e2)), e2)
        d2 = self.add(self.dec2(d3), e1)
        return self.out(self.dec1(d2))


class Refine(nn.Module):
    """Attention by the mean over the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.atten = conv(inputs, outputs), nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        feat = self.conv(x)
        atten = F.avg_pool2d(feat, feat.size()[2:])
        return torch.mul(feat, torch.sigmoid(self.bn(self.atten(atten))))


@network("pads", "gates", "sizes", "outputs")
class BiSeNetLike(nn.Module):
    """A spatial and a context path; means by `avg_pool2d(x, x.size()[2:])`; three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv(3, 8, 7, 2), conv(8, 8, 3, 2), conv(8, 16, 3, 2))
        self.context8 = nn.Sequential(
            conv(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1), Residual(8, 12), Residual(12, 12, 2)
        )
        self.context16, self.context32 = Residual(12, 16, 2), Residual(16, 24, 2)
        self.arm16, self.arm32, self.tail = Refine(16, 12), Refine(24, 12), conv(24, 12, 1)
        self.fuse, self.conv1, self.conv2 = conv(28, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.heads = nn.ModuleList([nn.Sequential(conv(c, 8), nn.Conv2d(8, 4, 1)) for c in (16, 12, 12)])

    def forward(self, x):
        H, W = x.size()[2:]
        sp = self.spatial(x)
        f8 = self.context8(x)
        f16 = self.context16(f8)
        f32 = self.context32(f16)
        H16, W16 = f16.size()[2:]
        avg = self.tail(F.avg_pool2d(f32, f32.size()[2:]))
        avg_up = F.interpolate(avg, f32.size()[2:], mode="nearest")
        up32 = F.interpolate(self.arm32(f32) + avg_up, (H16, W16), mode="nearest")
        up16 = F.interpolate(self.arm16(f16) + up32, sp.size()[2:], mode="nearest")
        feat = self.fuse(torch.cat([sp, up16], dim=1))
        atten = F.avg_pool2d(feat, feat.size()[2:])
        atten = self.conv2(F.relu(self.conv1(atten), inplace=True)).sigmoid()
        feat = torch.mul(feat, atten) + feat
        maps = [head(m) for head, m in zip(self.heads, (feat, up16, up32))]
        return tuple(F.interpolate(m, (H, W), mode="bilinear", align_corners=True) for m in maps)
