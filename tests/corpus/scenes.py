"""Scene parsing: pyramids of pooling and of dilations, feature pyramids, low-level skips, full convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv
from torch import nn

from benchmarks.zoo.corpus import network


class PyramidPooling(nn.Module):
    """Means of 1, 4, 9 and 36 bins beside the map."""

    def __init__(self, inputs: int, outputs: int, bins=(1, 2, 3, 6)) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(bin), *conv(inputs, outputs, 1)) for bin in bins]
        )

    def forward(self, x):
        x_size = x.size()
        out = [x]
        for f in self.features:
            out.append(F.interpolate(f(x), x_size[2:], mode="bilinear", align_corners=True))
        return torch.cat(out, 1)


@network("bins", "dilation", "sizes")
class PSPNetLike(nn.Module):
    """Output stride 8 by dilations, pyramid pooling to 1, 2, 3, 6; the size of the output is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.ppm = Encoder(output_stride=8), PyramidPooling(64, 16)
        self.cls = nn.Sequential(conv(128, 32), nn.Dropout2d(0.1), nn.Conv2d(32, 4, 1))

    def forward(self, x):
        x_size = x.size()
        assert len(x_size) == 4
        h, w = int(x_size[2]), int(x_size[3])
        x = self.cls(self.ppm(self.encoder(x)[-1]))
        return F.interpolate(x, size=(h, w), mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Dilations 3, 6, 9 and the mean over the image, side by side."""

    def __init__(self, inputs: int, outputs: int, rates=(3, 6, 9)) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [conv(inputs, outputs, 1), *[conv(inputs, outputs, 3, 1, r) for r in rates]]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), *conv(inputs, outputs, 1))
        self.project = nn.Sequential(conv(outputs * (len(rates) + 2), outputs, 1), nn.Dropout(0.5))

    def forward(self, x):
        res = [step(x) for step in self.convs]
        res.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(res, dim=1))


@network("dilation", "arguments", "decisions")
class DeepLabPlusAtrous(nn.Module):
    """ASPP at output stride 16, and a low-level map; `forward(x, return_features=False, size=None)`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.aspp = Encoder(output_stride=16), ASPP(64, 32, (2, 4, 6))
        self.low, self.last = conv(8, 8, 1), nn.Sequential(conv(40, 16), conv(16, 16), nn.Conv2d(16, 4, 1))

    def forward(self, x, return_features: bool = False, size=None):
        low, *_, high = self.backbone(x)
        high = self.aspp(high)
        low = self.low(low)
        if high.size()[2:] != low.size()[2:]:
            high = F.interpolate(high, low.size()[2:], mode="bilinear", align_corners=True)
        y = self.last(torch.cat((high, low), 1))
        y = F.interpolate(y, size=x.size()[2:] if size is None else size, mode="bilinear", align_corners=True)
        return (y, high) if return_features else y


@network("dilation")
class HybridDilated(nn.Module):
    """Dilations 1, 2, 5 and 5, 9, 17 that share no factor; nothing of them was a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.layer1, self.layer2 = Residual(8, 8), Residual(8, 16, 2)
        self.layer3 = nn.Sequential(*[Residual(16, 16, dilation=d) for d in (1, 2, 5)])
        self.layer4 = nn.Sequential(*[Residual(16, 16, dilation=d) for d in (5, 9, 17)])
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = self.out(self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x))))))
        return F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)


@network("resizing", "modules")
class FeaturePyramid(nn.Module):
    """Top-down sums by nearest upsampling, each level brought to stride 4 and added."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in Encoder.widths])
        self.seg = nn.ModuleList([conv(16, 12) for _ in range(4)])
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        c = self.encoder(x)
        p = [self.lateral[-1](c[-1])]
        for lateral, feature in zip(self.lateral[-2::-1], c[-2::-1]):
            p.insert(0, lateral(feature) + F.interpolate(p[0], size=feature.shape[-2:], mode="nearest"))
        y = 0
        for step, level in zip(self.seg, p):
            y = y + F.interpolate(step(level), size=p[0].shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.head(y), size=x.shape[2:], mode="bilinear", align_corners=False)


def vgg(*widths: int, first: int = 1) -> list[nn.Sequential]:
    """Steps of a VGG; the first convolution pads by `first`."""
    steps, before = [], 3
    for width in widths:
        padding = first if before == 3 else 1
        convolution = nn.Conv2d(before, width, 3, padding=padding)
        steps.append(nn.Sequential(convolution, nn.ReLU(True), nn.MaxPool2d(2, 2, ceil_mode=True)))
        before = width
    return steps


@network("transposed", "pads", "sizes")
class FCN8s(nn.Module):
    """The image padded by 100; scores of three depths, transposed 4/2 and 16/8, cropped at fixed offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.step1, self.step2, self.step3, self.step4, self.step5 = vgg(8, 16, 32, 48, 48, first=100)
        self.fc6, self.fc7 = (
            nn.Sequential(nn.Conv2d(48, 64, 7), nn.ReLU(True), nn.Dropout2d()),
            conv(64, 64, 1),
        )
        self.score3, self.score4, self.score = nn.Conv2d(32, 4, 1), nn.Conv2d(48, 4, 1), nn.Conv2d(64, 4, 1)
        self.upscore2 = nn.ConvTranspose2d(4, 4, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(4, 4, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(4, 4, 16, stride=8, bias=False)

    def forward(self, x):
        pool3 = self.step3(self.step2(self.step1(x)))
        pool4 = self.step4(pool3)
        h = self.upscore2(self.score(self.fc7(self.fc6(self.step5(pool4)))))
        c = self.score4(pool4 * 0.01)
        h = h + c[:, :, 5 : 5 + h.size()[2], 5 : 5 + h.size()[3]]
        h = self.upscore_pool4(h)
        c = self.score3(pool3 * 0.0001)
        h = self.upscore8(h + c[:, :, 9 : 9 + h.size()[2], 9 : 9 + h.size()[3]])
        return h[:, :, 31 : 31 + x.size()[2], 31 : 31 + x.size()[3]].contiguous()


@network("transposed")
class FCNSums(nn.Module):
    """Scores added where they have the same size: transposed 3/2 with output padding at sizes that fit."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(vgg(8, 16, 32, 64))
        self.deconv1 = nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, dilation=1, output_padding=1)
        self.deconv2 = nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, dilation=1, output_padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(16)
        self.deconv3 = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.deconv4, self.classifier = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        output = {}
        for idx in range(len(self.pools)):
            x = self.pools[idx](x)
            output["x%d" % (idx + 1)] = x
        score = self.bn1(F.relu(self.deconv1(output["x4"]))) + output["x3"]
        score = self.bn2(F.relu(self.deconv2(score))) + output["x2"]
        return self.classifier(F.relu(self.deconv4(F.relu(self.deconv3(score)))))


class Exchange(nn.Module):
    """Three resolutions, each the sum of all."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.fuse_layers = nn.ModuleList()
        for i, into in enumerate(widths):
            row = nn.ModuleList()
            for j, out_of in enumerate(widths):
                if j > i:
                    row.append(nn.Sequential(nn.Conv2d(out_of, into, 1, bias=False), nn.SyncBatchNorm(into)))
                elif j == i:
                    row.append(nn.Identity())
                else:
                    downs = [conv(out_of, out_of, 3, 2) for _ in range(i - j - 1)]
                    last = nn.Sequential(nn.Conv2d(out_of, into, 3, 2, 1, bias=False), nn.SyncBatchNorm(into))
                    row.append(nn.Sequential(*downs, last))
            self.fuse_layers.append(row)

    def forward(self, x):
        x_fuse = []
        for i in range(len(self.fuse_layers)):
            y = x[0] if i == 0 else self.fuse_layers[i][0](x[0])
            for j in range(1, len(self.fuse_layers)):
                if i == j:
                    y = y + x[j]
                elif j > i:
                    height, width = x[i].shape[-2], x[i].shape[-1]
                    y = y + F.interpolate(self.fuse_layers[i][j](x[j]), size=[height, width], mode="bilinear")
                else:
                    y = y + self.fuse_layers[i][j](x[j])
            x_fuse.append(F.relu(y))
        return x_fuse


@network("norms", "modules", "resizing", "sizes")
class HRNetLike(nn.Module):
    """Branches of three resolutions that are exchanged; SyncBatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 12, 16)
        self.stem = nn.Sequential(conv(3, 8, 3, 2), conv(8, 8, 3, 2), Residual(8, 8))
        self.transition = nn.ModuleList(
            [conv(8, 8), conv(8, 12, 3, 2), nn.Sequential(conv(8, 8, 3, 2), conv(8, 16, 3, 2))]
        )
        self.branches = nn.ModuleList([nn.Sequential(Residual(w, w), Residual(w, w)) for w in widths])
        self.exchange, self.last = Exchange(widths), nn.Sequential(conv(36, 24, 1), nn.Conv2d(24, 4, 1))

    def forward(self, x):
        x = self.stem(x)
        x_list = [step(x) for step in self.transition]
        x = self.exchange([branch(y) for branch, y in zip(self.branches, x_list)])
        x0_h, x0_w = x[0].size(2), x[0].size(3)
        x1 = F.interpolate(x[1], size=(x0_h, x0_w), mode="bilinear", align_corners=True)
        x2 = F.interpolate(x[2], size=(x0_h, x0_w), mode="bilinear", align_corners=True)
        return self.last(torch.cat([x[0], x1, x2], 1))


@network("resizing", "dilation")
class DenseUpsampling(nn.Module):
    """Channels become positions: PixelShuffle(8) at the end, dilated before."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(output_stride=8)
        self.duc = nn.Sequential(conv(64, 16), nn.Conv2d(16, 2 * 64, 1), nn.PixelShuffle(8))

    def forward(self, x):
        y = self.duc(self.encoder(x)[-1])
        return y[:, :, : x.shape[2], : x.shape[3]]
